"""The charts of the data card: which figures each shows, and what it tells those who cannot see it."""

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from data_prep.card_colours import Colours
from data_prep.card_facts import Balance, OverlapFacts, SizeClass, Tissue
from data_prep.card_words import LABELS, percent, short
from sentinode import charts
from sentinode.charts import Series

STYLES = {0: "normal", 1: "metastatic", -1: "unlabelled"}
"""Label, -1 for none -> class of the style sheet."""
_COLOUR_BINS = 32
_PERCENT_TICKS = [(share / 100, f"{share} %") for share in (0, 25, 50, 75, 100)]


def balance_chart(lines: Sequence[Balance], whole: Balance) -> Markup:
    """Draw the labelled patches of each split and of the whole; metastatic first, so that prevalences line up at the left."""
    shown = [*lines, whole] if len(lines) > 1 else lines
    bars = []
    for line in shown:
        labelled = max(line.normal + line.metastatic, 1)
        bars.append(
            (short(line.name, 10), [("metastatic", line.metastatic / labelled), ("normal", line.normal / labelled)], percent(line.prevalence))
        )
    description = "Share of metastatic patches: " + ", ".join(f"{line.name} {percent(line.prevalence)}" for line in shown)
    return charts.stacked_bars(bars, description, whole.prevalence if len(lines) > 1 else None)


def group_chart(groups: Sequence[SizeClass], rows: int) -> Markup:
    """Draw groups and the patches in them by size of the group; `rows`: patches of the data set."""
    count = sum(one.groups for one in groups)
    bars = [
        (
            one.name,
            [
                ("k1", one.groups / count, f"{one.groups:,} ({percent(one.groups / count)})"),
                ("k0", one.rows / rows, f"{one.rows:,} ({percent(one.rows / rows)})"),
            ],
        )
        for one in groups
    ]
    return charts.paired_bars(bars, "Groups and patches by size of the group; the table below has the figures")


def slide_chart(sizes: Sequence[SizeClass], slides: int) -> Markup:
    """Draw the slides by number of patches; `slides`: how many there are."""
    bars = [(one.name, [("k1", one.groups / slides, f"{one.groups:,} ({percent(one.groups / slides)})")]) for one in sizes]
    return charts.paired_bars(bars, "Slides by number of patches: " + ", ".join(f"{one.name} patches {one.groups} slides" for one in sizes))


def shared_chart(found: OverlapFacts) -> Markup:
    """Draw how much the pairs have in common; there must be a pair."""
    shares = np.histogram(found.shared, 20, (0, 1))[0] / found.pairs
    description = f"Distribution of the part in common over {found.pairs} pairs; median {percent(float(np.median(found.shared)))} of the patch"
    return charts.histogram([Series("k0", shares.tolist(), filled=True)], _PERCENT_TICKS, description, "part of the patch in common")


def tissue_chart(tissue: dict[int, Tissue]) -> Markup:
    """Draw the tissue fractions of each label."""
    series = [Series(STYLES[label], one.histogram.tolist()) for label, one in tissue.items()]
    medians = ", ".join(f"{LABELS[label]} {percent(one.median)}" for label, one in tissue.items())
    return charts.histogram(series, _PERCENT_TICKS, f"Distribution of the tissue fraction by class; medians: {medians}", "tissue on the patch")


def colour_chart(channel: int, name: str, coloured: dict[str, Colours]) -> Markup:
    """Draw one channel (0, 1, 2) of each split's sample, the first split filled."""
    series = [
        Series(f"k{number % 4}", one.histogram[channel].reshape(_COLOUR_BINS, -1).sum(axis=1).tolist(), filled=number == 0)
        for number, one in enumerate(coloured.values())
    ]
    means = ", ".join(f"{split} {255 * one.mean[channel]:.0f}" for split, one in coloured.items())
    ticks = [(0.0, "0"), (64 / 256, "64"), (128 / 256, "128"), (192 / 256, "192"), (1.0, "255")]
    return charts.histogram(series, ticks, f"{name} channel, 8-bit values; means: {means}", f"{name.lower()}, 8-bit value")
