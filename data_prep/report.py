"""The data card: report.html, one self-contained page about a prepared data set."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from markupsafe import Markup

from data_prep import card_charts, card_facts, pictures
from data_prep.card_colours import Pixels, colours, sample_order
from data_prep.card_facts import Pair, Rows
from data_prep.card_words import FLAG_MEANING, LABELS, REASON_MEANING, count, megabytes, percent, points, short, value
from sentinode import CLASS_NAMES, RESEARCH_USE_NOTICE
from sentinode.manifests import LEAK_MEANING, DatasetManifest
from sentinode.pages import LARGEST_PX, data_uri, page_environment

_SAMPLES = 48  # about 1.4 MB of PNGs in the page
_MOST_SAMPLES_OF_A_KIND = 24


@dataclass(frozen=True)
class Samples:
    """Patches of one class in one split: how many there are, and (id, PNG data URI) of some."""

    label: int
    name: str
    total: int
    shown: list[tuple[str, str]]


def data_card(manifest: DatasetManifest, index: pa.Table, rejected: pa.Table, overlaps: pa.Table | None, pixels: Pixels) -> str:
    """Return the data card as HTML text: one page without scripts that loads nothing. The same arguments give the same text.

    Parameters
    ----------
    manifest : DatasetManifest
        With everything but the record of the page itself.
    index, rejected : pa.Table
        INDEX_SCHEMA, sorted by id, and REJECTED_SCHEMA.
    overlaps : pa.Table or None
        OVERLAP_SCHEMA; None where overlaps were not searched for.
    pixels : callable
        Ids of accepted patches -> their pixels, uint8 (n, side, side, 3), RGB, in that order.
    """
    environment = page_environment("data_prep")
    environment.filters |= {"n": count, "percent": percent, "points": points, "short": short, "mb": megabytes, "value": value}
    rows = Rows.of(index)
    splits = list(manifest.counts)
    lines, whole = card_facts.split_balance(manifest)
    folds = card_facts.fold_balance(rows)
    order = sample_order(rows)
    coloured = {split: colours(rows.ids[order[split]].tolist(), pixels, manifest.patch_size_px) for split in splits if split in order}
    groups = card_facts.size_classes(Counter(rows.groups).values(), card_facts.GROUP_BOUNDS)
    slides = card_facts.slide_facts(rows, splits)
    found = None if overlaps is None else card_facts.overlap_facts(overlaps, index, manifest.patch_size_px)
    tissue = card_facts.tissue_by_label(rows)
    samples = list(_samples(rows, splits, order, pixels))
    return environment.get_template("data_card.html").render(
        manifest=manifest,
        notice=RESEARCH_USE_NOTICE,
        leak_meaning=LEAK_MEANING[manifest.leak_level],
        class_names=CLASS_NAMES,
        lines=lines,
        whole=whole,
        folds=folds,
        balance_chart=card_charts.balance_chart(lines, whole) if whole.prevalence is not None else None,
        samples=samples,
        centre=_centre_example(samples, pixels),
        centre_px=pictures.CENTRE_PX,
        reduced_px=LARGEST_PX if manifest.patch_size_px > LARGEST_PX else None,
        colours=coloured,
        colour_charts=[card_charts.colour_chart(channel, name, coloured) for channel, name in enumerate(("Red", "Green", "Blue"))],
        tissue=[(card_charts.STYLES[label], LABELS[label], figures) for label, figures in tissue.items()],
        tissue_chart=card_charts.tissue_chart(tissue) if tissue else None,
        flags=card_facts.count_flags(index),
        flag_meaning=FLAG_MEANING,
        grouped_by=card_facts.grouped_by(manifest, rows),
        groups=groups,
        group_chart=card_charts.group_chart(groups, whole.rows),
        largest=card_facts.largest_groups(rows),
        slides=slides,
        slide_chart=card_charts.slide_chart(slides.sizes, slides.slides) if slides else None,
        centres=card_facts.centre_table(rows, splits),
        overlaps=found,
        shared_chart=card_charts.shared_chart(found) if found and found.pairs else None,
        pair=_pair(found.example, rows, pixels) if found and found.example else None,
        refusals=card_facts.refusals(manifest, rejected),
        reason_meaning=REASON_MEANING,
        refused=sum(manifest.rejected.values()),
        shards=[(split, [shard for shard in manifest.shards if shard.split == split]) for split in splits],
    )


def _samples(rows: Rows, splits: Sequence[str], order: dict[str, Any], pixels: Pixels) -> Iterator[tuple[str, list[Samples]]]:
    """Yield each split with a random sample of each class that the data set has."""
    labels = [label for label in LABELS if (rows.labels == label).any()]
    each = min(_MOST_SAMPLES_OF_A_KIND, max(1, _SAMPLES // max(1, len(labels) * len(splits))))
    for split in splits:
        own = order.get(split, np.empty(0, np.int64))
        kinds = []
        for label in labels:
            members = own[rows.labels[own] == label]
            ids = rows.ids[members[:each]].tolist()
            shown = [data_uri(image) for image in pixels(ids)] if ids else []
            kinds.append(Samples(label, LABELS[label], len(members), list(zip(ids, shown, strict=True))))
        yield split, kinds


def _centre_example(samples: Sequence[tuple[str, list[Samples]]], pixels: Pixels) -> Markup | None:
    """Draw the first metastatic sample, or the first of all, with its centre outlined."""
    kinds = sorted((kind for _, kinds in samples for kind in kinds if kind.shown), key=lambda kind: kind.label != 1)
    if not kinds:
        return None
    image = pixels([kinds[0].shown[0][0]])[0]
    return pictures.centre_picture(image, f"{kinds[0].name} patch, enlarged, its centre outlined")


def _pair(pair: Pair, rows: Rows, pixels: Pixels) -> dict[str, Any]:
    first, second = pixels([pair.first_id, pair.second_id])
    about = []
    for id_ in (pair.first_id, pair.second_id):
        row = np.flatnonzero(rows.ids == id_)[0]
        about.append((id_, LABELS[int(rows.labels[row])], rows.splits[row]))
    return {"pair": pair, "about": about, "pictures": pictures.pair_pictures(first, second, pair.dy_px, pair.dx_px)}
