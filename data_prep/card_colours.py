"""A random sample of each split, and its colours."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_prep.card_facts import FloatArray, Rows
from sentinode.images import UInt8Array

SAMPLED_PATCHES = 1000
"""Patches of each split that colours are counted on; fewer where patches are larger than 96 px."""
_PIXELS_AT_ONCE = 1 << 21

Pixels = Callable[[Sequence[str]], UInt8Array]
"""Ids of accepted patches -> their pixels, uint8 (n, side, side, 3), RGB, in that order."""


def sample_order(rows: Rows) -> dict[str, npt.NDArray[np.int64]]:
    """Split -> its rows in the order of a hash of their ids: the first so many are a random sample, the same one each time."""
    hashes = [hashlib.sha256(str(id_).encode()).digest() for id_ in rows.ids]
    found: dict[str, list[int]] = defaultdict(list)
    for row in sorted(range(len(hashes)), key=hashes.__getitem__):
        found[rows.splits[row]].append(row)
    return {split: np.asarray(own, np.int64) for split, own in found.items()}


@dataclass(frozen=True)
class Colours:
    """Colour of some patches.

    Attributes
    ----------
    patches : int
    mean, std : ndarray of float64, shape (3,)
        Over all their pixels, R, G, B, scale 0..1.
    histogram : ndarray of float64, shape (3, 256)
        Share of the pixels with each 8-bit value.
    """

    patches: int
    mean: FloatArray
    std: FloatArray
    histogram: FloatArray


def colours(ids: Sequence[str], pixels: Pixels, side_px: int) -> Colours:
    """Count the colours of the first of `ids`, up to SAMPLED_PATCHES at 96 px or as many pixels."""
    chosen = ids[: max(1, min(SAMPLED_PATCHES, SAMPLED_PATCHES * 96**2 // side_px**2))]
    at_once = max(1, _PIXELS_AT_ONCE // side_px**2)
    counts = np.zeros((3, 256), np.int64)
    for start in range(0, len(chosen), at_once):
        flat = pixels(chosen[start : start + at_once]).reshape(-1, 3)
        for channel in range(3):
            counts[channel] += np.bincount(flat[:, channel], minlength=256)
    histogram = counts / max(counts[0].sum(), 1)
    values = np.arange(256) / 255
    mean = histogram @ values
    std = np.sqrt(np.maximum(histogram @ values**2 - mean**2, 0))
    return Colours(len(chosen), mean, std, histogram)
