"""The data card: whole, honest, safe to open and readable by everybody, for each kind of data set."""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest

from data_prep.card_facts import GROUP_BOUNDS, Rows, fold_balance, overlap_facts, size_classes, slide_facts
from data_prep.card_words import REASON_MEANING, percent, points
from data_prep.rejects import RejectReason
from data_prep.report import data_card
from sentinode import RESEARCH_USE_NOTICE
from sentinode.dataset import INDEX_SCHEMA, OVERLAP_SCHEMA, REJECTED_SCHEMA
from sentinode.errors import PatchErrorCode
from sentinode.images import UInt8Array
from sentinode.manifests import LEAK_MEANING, DatasetManifest, ShardRecord, SplitCounts
from tests.factories import dataset_manifest

SECTIONS = ["splits", "samples", "colour", "tissue", "groups", "refusals", "provenance"]
VOID = {"meta", "img", "br", "link", "input", "hr"}
EVIL = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>{{ 7*7 }}"


@dataclass
class Card:
    """The arguments of data_card."""

    manifest: DatasetManifest
    index: pa.Table
    rejected: pa.Table = field(default_factory=REJECTED_SCHEMA.empty_table)
    overlaps: pa.Table | None = field(default_factory=OVERLAP_SCHEMA.empty_table)

    def html(self) -> str:
        return data_card(self.manifest, self.index, self.rejected, self.overlaps, pixels_of(self.manifest.patch_size_px))


def pixels_of(side: int) -> Callable[[Sequence[str]], UInt8Array]:
    """Pixels that depend on the id alone; noise, which PNG cannot compress, is the worst case for the size of the page."""

    def pixels(ids: Sequence[str]) -> UInt8Array:
        images = [np.random.default_rng(list(id_.encode())).integers(0, 256, (side, side, 3), np.uint8) for id_ in ids]
        return np.stack(images) if images else np.empty((0, side, side, 3), np.uint8)

    return pixels


def index_of(rows: Sequence[dict[str, object]]) -> pa.Table:
    """An index, sorted by id; each row needs id, label and split."""
    filled = [
        dict.fromkeys(INDEX_SCHEMA.names)
        | {"group": row["id"], "tissue_fraction": 0.5, "flags": [], "pixel_sha1": "0" * 40, "shard": f"{row['split']}/part-00000.parquet", "row": 0}
        | row
        for row in rows
    ]
    return pa.Table.from_pylist(filled, schema=INDEX_SCHEMA).sort_by("id")


def manifest_of(index: pa.Table, **changes: object) -> DatasetManifest:
    """A manifest with the counts of an index."""
    rows = index.select(["split", "label", "group"]).to_pylist()
    counts = {}
    for split in dict.fromkeys(row["split"] for row in rows):
        own = [row for row in rows if row["split"] == split]
        normal, metastatic, unlabelled = (sum(row["label"] == label for row in own) for label in (0, 1, None))
        groups = len({row["group"] for row in own})
        counts[split] = SplitCounts(rows=len(own), normal=normal, metastatic=metastatic, unlabelled=unlabelled, groups=groups)
    sizes = [sum(row["group"] == group for row in rows) for group in {row["group"] for row in rows}]
    split_changes = {"groups": len(sizes), "multi_patch_groups": sum(size > 1 for size in sizes), "largest_group_rows": max(sizes)}
    split = dataset_manifest().split.model_copy(update=split_changes | dict(changes.pop("split_changes", {})))  # type: ignore[call-overload]
    shards = [
        ShardRecord(path=f"{name}/part-00000.parquet", bytes=27_648 * one.rows, sha256="0" * 64, split=name, rows=one.rows)
        for name, one in counts.items()
    ]
    return dataset_manifest(**({"counts": counts, "split": split, "shards": shards} | changes))


def labelled_rows(count: int = 60) -> list[dict[str, object]]:
    """Rows of three splits; rows 0 and 1 share a group."""
    rows: list[dict[str, object]] = []
    for number in range(count):
        split = ("train", "train", "val", "test")[number % 4]
        rows.append({"id": f"p{number:04d}", "label": int(number % 5 < 2), "split": split, "tissue_fraction": number / count})
    rows[1]["group"] = rows[0]["group"] = "p0000"
    return rows


def overlap_card() -> Card:
    rows = labelled_rows()
    rows[3]["flags"] = ["pale"]
    index = index_of(rows)
    overlaps = pa.Table.from_pylist([{"first_id": "p0000", "second_id": "p0001", "dy_px": -16, "dx_px": 48}], schema=OVERLAP_SCHEMA)
    rejected = [{"path": f"train/bad{number}.tif", "id": f"bad{number}", "reason": "blank", "detail": f"all values {number}"} for number in range(7)]
    manifest = manifest_of(index, rejected={"blank": 7}, split_changes={"overlap_pairs": 1, "notes": ["split val: few rows"]})
    return Card(manifest, index, pa.Table.from_pylist(rejected, schema=REJECTED_SCHEMA), overlaps)


def leaky_card() -> Card:
    index = index_of(labelled_rows())
    overlaps = pa.Table.from_pylist([{"first_id": "p0001", "second_id": "p0002", "dy_px": 0, "dx_px": 0}], schema=OVERLAP_SCHEMA)
    return Card(manifest_of(index, leak_level="none", split_changes={"method": "random"}), index, overlaps=overlaps)


def slide_card() -> Card:
    rows = labelled_rows()
    for number, row in enumerate(rows):
        row |= {"slide": f"slide-{row['split']}-{number % 3}", "group": f"slide-{row['split']}-{number % 3}", "centre": f"centre {number % 2}"}
    index = index_of(rows)
    return Card(manifest_of(index, leak_level="slide", split_changes={"method": "slide", "overlap_pairs": None}), index, overlaps=None)


def folds_card() -> Card:
    rows = labelled_rows()
    for number, row in enumerate(rows):
        row["fold"] = None if row["split"] == "test" else number % 3
    index = index_of(rows)
    return Card(manifest_of(index, split_changes={"folds": 3}), index)


def unlabelled_card() -> Card:
    index = index_of([{"id": f"u{number:03d}", "label": None, "split": "all"} for number in range(40)])
    return Card(manifest_of(index, leak_level="unsplit", split_changes={"method": "all", "overlap_pairs": None}), index, overlaps=None)


def one_class_card() -> Card:
    index = index_of([row | {"label": 0} for row in labelled_rows(20)])
    return Card(manifest_of(index), index)


def tiny_card() -> Card:
    splits = ("train", "val", "test")
    index = index_of([{"id": split, "label": int(split == "val"), "split": split, "tissue_fraction": None, "flags": None} for split in splits])
    return Card(manifest_of(index), index)


def large_patches_card() -> Card:
    index = index_of(labelled_rows(60))
    overlaps = pa.Table.from_pylist([{"first_id": "p0000", "second_id": "p0001", "dy_px": 100, "dx_px": -30}], schema=OVERLAP_SCHEMA)
    return Card(manifest_of(index, patch_size_px=256, spacing_um_px=None), index, overlaps=overlaps)


CARDS = [overlap_card, leaky_card, slide_card, folds_card, unlabelled_card, one_class_card, tiny_card, large_patches_card]


class Page(HTMLParser):
    """What a browser would make of the page; any tag that is not closed in order is an error."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title"):
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


@cache
def html_of(make: Callable[[], Card]) -> str:
    return make().html()


@pytest.fixture(params=CARDS, ids=lambda make: make.__name__.removesuffix("_card"))
def html(request: pytest.FixtureRequest) -> str:
    return html_of(request.param)


def words(make: Callable[[], Card]) -> str:
    return Page(html_of(make)).words()


def test_every_kind_of_data_set_gives_a_whole_page_with_all_sections(html: str) -> None:
    page = Page(html)
    assert [section["id"] for section in page.all("section")] == SECTIONS
    assert RESEARCH_USE_NOTICE in page.words()
    assert not re.search(
        r"\b(nan|inf|None)\b", page.words().replace("None found", "").replace("None. Every", "").replace("None of", "").replace("None has", "")
    )


def test_the_page_needs_no_script_and_nothing_from_elsewhere(html: str) -> None:
    page = Page(html)
    assert not {"script", "link", "iframe", "object", "embed", "form", "base"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "xlink:href", "srcset", "action", "background", "poster"):
            target = attributes.get(name)
            assert target is None or target.startswith(("data:image/png;base64,", "#")), (tag, target)
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]*", "", html)
    assert not re.search(r"@import|url\(", html)


def test_links_inside_the_page_lead_somewhere(html: str) -> None:
    page = Page(html)
    names = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(names) == len(set(names))
    targets = [attributes["href"] or "" for tag, attributes in page.tags if tag in ("a", "use")]
    assert targets
    assert {target.removeprefix("#") for target in targets} <= set(names)


def test_those_who_cannot_see_the_page_are_told_what_is_on_it(html: str) -> None:
    page = Page(html)
    assert page.all("html")[0]["lang"] == "en"
    assert all(image["alt"] for image in page.all("img"))
    assert all(picture["role"] == "img" and picture["aria-label"] for picture in page.all("svg"))
    assert all(cell["scope"] in ("row", "col") for cell in page.all("th"))
    assert len(page.all("table")) == len(page.all("caption"))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(following <= level + 1 for level, following in pairwise(levels))


@pytest.mark.parametrize("make", [overlap_card, slide_card, unlabelled_card])
def test_the_same_data_set_gives_the_same_page(make: Callable[[], Card]) -> None:
    assert make().html() == html_of(make)


def test_every_leak_level_is_explained_and_a_leaky_one_loudly() -> None:
    for make in (overlap_card, slide_card, unlabelled_card):
        page = Page(html_of(make))
        assert LEAK_MEANING[make().manifest.leak_level] in page.words()
        assert not [one for one in page.all("p") if one.get("class") == "alarm"]
    page = Page(html_of(leaky_card))
    assert LEAK_MEANING["none"] in page.words()
    assert [one for one in page.all("p") if one.get("class") == "alarm"]


def test_pairs_that_straddle_splits_are_counted() -> None:
    assert "1 of the pairs (100.0 %) lies in different splits" in words(leaky_card)
    assert "None of the pairs lies in different splits" in words(overlap_card)


def test_not_searched_for_and_none_found_are_told_apart() -> None:
    assert "Not searched for." in words(slide_card)
    assert "Searched for; none found." in words(folds_card)


def test_an_example_pair_is_drawn_with_its_common_part_outlined() -> None:
    html = html_of(overlap_card)
    text = words(overlap_card)
    assert "41.7 % of the patch in common" in text  # 80 x 48 of 96 x 96
    assert "16 pixels above and 48 pixels right of the first" in text
    boxes = re.findall(r'<rect class="shared over" x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', html)
    # The legend's centre, then the common part in the first patch, in the second and in the field of both.
    assert boxes == [("32.5", "32.5", "31", "31"), ("48.5", "0.5", "47", "79"), ("0.5", "16.5", "47", "79"), ("48.5", "16.5", "47", "79")]
    assert 'viewBox="0 0 144 112"' in html


def test_refusals_show_their_meaning_and_the_first_five() -> None:
    text = words(overlap_card)
    assert "7 of 67 inputs" in text
    assert REASON_MEANING["blank"] in text
    assert "the first 5 of 7" in text
    assert "train/bad4.tif" in text
    assert "all values 4" in text
    assert "bad5" not in text


def test_no_refusals_are_said_plainly() -> None:
    assert "None. Every input was accepted." in words(folds_card)


def test_every_reason_of_a_refusal_has_a_meaning() -> None:
    assert {str(reason) for reason in (*RejectReason, *PatchErrorCode)} <= set(REASON_MEANING)


def test_a_reason_that_is_not_known_is_shown_all_the_same() -> None:
    card = overlap_card()
    card.manifest = card.manifest.model_copy(update={"rejected": {"of_tomorrow": 1}})
    assert "of_tomorrow" in Page(card.html()).words()


def test_what_makes_a_group_is_said() -> None:
    assert "A group holds patches that share pixels" in words(overlap_card)
    assert "Each patch is a group of its own" in words(leaky_card)
    assert "The largest slides" in words(slide_card)


def test_the_whole_is_no_second_line_where_there_is_one_split() -> None:
    card = unlabelled_card()
    assert "whole" not in Page(card.html()).words()
    card.index = index_of([{"id": f"u{number:03d}", "label": number % 2, "split": "all"} for number in range(40)])
    card.manifest = manifest_of(card.index, leak_level="unsplit", split_changes={"method": "all"})
    assert "split patches share groups normal metastatic prevalence all 40 100.0 % 40 20 20 50.0 %" in Page(card.html()).words()
    assert "Difference" not in Page(card.html()).words()


def test_notes_of_the_split_are_shown() -> None:
    assert "split val: few rows" in words(overlap_card)


def test_flagged_patches_are_counted() -> None:
    assert "pale 1 Hardly any stain" in words(overlap_card)
    assert "duplicate 0 Same pixels" in words(overlap_card)


def test_samples_show_each_class_of_each_split() -> None:
    alts = [image["alt"] or "" for image in Page(html_of(overlap_card)).all("img")]
    for split in ("train", "val", "test"):
        for name in ("Normal", "Metastatic"):
            assert sum(alt.startswith(name) and alt.endswith(f"of split {split}") for alt in alts) in range(5, 9)


def test_a_class_without_patches_in_a_split_is_said() -> None:
    assert words(tiny_card).count("No such patches in this split.") == 3


def test_samples_without_labels_are_shown_too() -> None:
    page = Page(html_of(unlabelled_card))
    assert len(page.all("img")) == 24
    assert "prevalence – no labels" in page.words()


def test_channel_figures_of_the_samples_are_those_of_their_pixels() -> None:
    card = tiny_card()
    pixels = pixels_of(96)(["val"])[0].reshape(-1, 3) / 255
    figures = " ".join(f"{value:.4f}" for value in (*pixels.mean(axis=0), *pixels.std(axis=0)))
    assert f"val, sample 1 {figures}" in Page(card.html()).words()


def test_slides_are_counted_per_split() -> None:
    text = words(slide_card)
    assert "9 slides" in text
    assert "None has patches in more than one split." in text
    assert "train 3 30 10 10 10" in text
    assert "centre 0" in text


def test_slides_that_straddle_splits_are_counted() -> None:
    rows = labelled_rows()
    for row in rows:
        row["slide"] = "one for all"
    facts = slide_facts(Rows.of(index_of(rows)), ("train", "val", "test"))
    assert facts is not None
    assert (facts.slides, facts.straddling) == (1, 1)


def test_folds_are_compared_with_all_folds_together() -> None:
    assert "Folds over the rows of train and val" in words(folds_card)
    folds = fold_balance(Rows.of(folds_card().index))
    assert [fold.rows for fold in folds] == [15, 15, 15]
    assert sum(fold.difference or 0 for fold in folds) == pytest.approx(0)


def test_group_sizes_fall_into_classes_without_gaps() -> None:
    classes = size_classes([1, 1, 1, 2, 40, 5000], GROUP_BOUNDS)
    assert [one.name for one in classes][:3] == ["1", "2", "3–4"]
    assert classes[-1].name == "1,025+"
    assert sum(one.rows for one in classes) == 5045


def test_the_example_pair_has_the_median_share() -> None:
    index = index_of(labelled_rows())
    rows = [{"first_id": "p0000", "second_id": f"p{number:04d}", "dy_px": 0, "dx_px": dx} for number, dx in ((1, 0), (5, 24), (4, 24), (9, 90))]
    facts = overlap_facts(pa.Table.from_pylist(rows, schema=OVERLAP_SCHEMA), index, 96)
    assert facts.example is not None
    assert (facts.example.second_id, facts.example.shared) == ("p0004", 0.75)
    assert (facts.pairs, facts.patches, facts.straddling) == (4, 5, 0)


def test_names_and_details_of_users_stay_text() -> None:
    rows = [
        row | {"id": f"{EVIL}{number}", "slide": f"{EVIL}{number % 4}", "centre": EVIL, "flags": [EVIL]} for number, row in enumerate(labelled_rows())
    ]
    for row in rows:
        row |= {"group": f"{EVIL}{int(row['label'] or 0)}"}  # names of splits are checked by the manifest
    index = index_of(rows)
    ids = index["id"].to_pylist()
    overlaps = pa.Table.from_pylist([{"first_id": ids[0], "second_id": ids[1], "dy_px": 3, "dx_px": 3}], schema=OVERLAP_SCHEMA)
    rejected = pa.Table.from_pylist([{"path": EVIL, "id": EVIL, "reason": EVIL, "detail": EVIL}], schema=REJECTED_SCHEMA)
    manifest = manifest_of(
        index,
        rejected={EVIL: 1},
        source={"kind": EVIL, "path": EVIL, EVIL: EVIL},
        config={EVIL: EVIL, "columns": {EVIL: EVIL}},
        library_versions={EVIL: EVIL},
        git_commit=EVIL,
        created_at=EVIL,
        split_changes={"notes": [EVIL]},
    )
    html = Card(manifest, index, rejected, overlaps).html()
    page = Page(html)
    assert "<script" not in html
    assert not page.all("script")
    assert not [attributes for _, attributes in page.tags if "onerror" in attributes]
    assert all((image["src"] or "").startswith("data:") for image in page.all("img"))
    assert EVIL in page.words()
    assert [section["id"] for section in page.all("section")] == SECTIONS


def test_texts_of_any_length_do_not_swell_the_page() -> None:
    long = "x" * 1_000_000
    card = overlap_card()
    card.rejected = pa.Table.from_pylist([{"path": long, "id": long, "reason": "blank", "detail": long}], schema=REJECTED_SCHEMA)
    card.manifest = card.manifest.model_copy(update={"config": {"columns": {"id": long}}, "source": {"kind": "kaggle", "path": long}})
    assert len(card.html()) < 2_000_000


def test_large_patches_are_reduced_to_keep_the_page_small() -> None:
    html = html_of(large_patches_card)
    assert "reduced to 96 pixels" in html
    assert len(html) < 2_000_000


def test_a_full_sized_set_gives_a_small_page_quickly() -> None:
    count = 220_025
    numbers = np.arange(count)
    ids = pa.array([f"{number:040x}" for number in range(count)])
    columns = {
        "id": ids,
        "label": pa.array((numbers % 5 < 2).astype(np.int8)),
        "split": pa.array(np.asarray(["train", "val", "test"])[np.minimum(numbers // 154_017, 2)]),
        "group": ids.take(pa.array(numbers // 7 * 7)),
        "tissue_fraction": pa.array((numbers / count).astype(np.float32)),
        "flags": pa.array([[]] * count, pa.list_(pa.string())),
        "pixel_sha1": ids,
        "shard": pa.array(["train/part-00000.parquet"] * count),
        "row": pa.array(numbers),
    }
    index = pa.table([columns.get(name, pa.nulls(count, INDEX_SCHEMA.field(name).type)) for name in INDEX_SCHEMA.names], schema=INDEX_SCHEMA)
    first = np.repeat(numbers[:200_000], 4)
    second = first + np.tile(np.arange(1, 5), 200_000)
    offsets = pa.array((first % 64).astype(np.int16))
    overlaps = pa.table([ids.take(pa.array(first)), ids.take(pa.array(second)), offsets, offsets], schema=OVERLAP_SCHEMA)
    counts = {"train": (154_017, 92_411), "val": (66_008, 39_604)}
    manifest = manifest_of(index.slice(0, 100)).model_copy(
        update={
            "counts": {
                name: SplitCounts(rows=rows, normal=normal, metastatic=rows - normal, groups=rows // 7) for name, (rows, normal) in counts.items()
            }
        }
    )
    card = Card(manifest, index, overlaps=overlaps)
    start = time.process_time()  # not the clock on the wall: other tests may run beside this one
    html = card.html()
    assert time.process_time() - start < 10
    assert len(html) < 2_000_000
    assert "800,000 pairs" in Page(html).words()


def test_shares_never_round_to_nothing_or_to_all() -> None:
    assert [percent(share) for share in (0.0, 0.0001, 0.40502, 0.99999, 1.0, None)] == ["0.0 %", "<0.1 %", "40.5 %", ">99.9 %", "100.0 %", "–"]


def test_a_difference_that_rounds_to_nothing_has_no_sign() -> None:
    assert [points(share) for share in (0.0, -0.00001, 0.0123, -0.0123, None)] == ["0.00", "0.00", "+1.23", "−1.23", "–"]
