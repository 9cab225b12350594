"""Is there tissue on a patch? The rule is the one the Kaggle set itself was filtered with."""

import numpy as np
import numpy.typing as npt

from sentinode.images import UInt8Array

TISSUE_SATURATION = 0.07
"""Maximum HSV saturation below which a patch counts as background (PatchCamelyon's own filter, github.com/basveeling/pcam)."""
BLACK_MAX = 10
"""A patch whose brightest value is at most this is black."""
WHITE_MIN = 245
"""A patch whose darkest value is at least this is white."""


def saturation(patches: UInt8Array) -> npt.NDArray[np.float32]:
    """Return HSV saturation per pixel, (max - min) / max over channels, 0 for black.

    `patches`: uint8, shape (..., 3), RGB. Returns float32 of shape (...), 0..1.
    """
    high, low = patches.max(axis=-1), patches.min(axis=-1)
    result: npt.NDArray[np.float32] = (high - low).astype(np.float32) / np.maximum(high, 1)
    return result


def is_tissue(high: UInt8Array, low: UInt8Array) -> npt.NDArray[np.bool_]:
    """Tell which pixels are stained: saturation of at least 0.07, in whole numbers, which gives the same answer as `saturation` ten times as fast.

    `high`, `low`: uint8, largest and smallest channel of each pixel. Returns bool of the same shape.
    """
    # 100 (high - low) >= 7 high; at least 1, or black would count.
    stained: npt.NDArray[np.bool_] = (high - low) * np.uint16(100) >= np.maximum(high * np.uint16(7), np.uint16(1))
    return stained


def tissue_fraction(patches: UInt8Array) -> npt.NDArray[np.float32]:
    """Return the share of pixels with saturation of at least 0.07. `patches`: uint8 (n, h, w, 3) -> float32 (n,), 0..1."""
    stained = is_tissue(patches.max(axis=-1), patches.min(axis=-1)).reshape(len(patches), -1)
    fraction: npt.NDArray[np.float32] = stained.mean(axis=1, dtype=np.float32)
    return fraction


def is_black_or_white(high: UInt8Array, low: UInt8Array) -> npt.NDArray[np.bool_]:
    """Tell which patches hold no image at all: maximum <= 10 or minimum >= 245.

    `high`, `low`: uint8 (n, h, w), largest and smallest channel of each pixel. Returns bool (n,).
    """
    blank: npt.NDArray[np.bool_] = (high.max(axis=(1, 2)) <= BLACK_MAX) | (low.min(axis=(1, 2)) >= WHITE_MIN)
    return blank


def is_pale(patches: UInt8Array) -> npt.NDArray[np.bool_]:
    """Tell which patches have a maximum saturation below 0.07: glass, or tissue without stain. `patches`: uint8 (n, h, w, 3) -> bool (n,)."""
    red, green, blue = (np.ascontiguousarray(patches[..., channel]) for channel in range(3))
    # Plane by plane and in whole numbers: a fifth of the time of `saturation`, or less. Every prediction passes here.
    stained = is_tissue(np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue))
    pale: npt.NDArray[np.bool_] = np.logical_not(stained.any(axis=(1, 2)))
    return pale
