"""Mean and standard deviation of colours, in whole numbers up to the end, so that no figure depends on the order of addition."""

import numpy as np
import numpy.typing as npt

from sentinode.config import Rgb
from sentinode.images import UInt8Array

Int64Array = npt.NDArray[np.int64]

RANGE_QUANTILES = (0.001, 0.999)
"""The share of validation patches outside the range of colours at either end of a channel, before it is widened."""
RANGE_MARGIN = 0.1
"""The range is widened by this share of its width at both ends: a fold has few patches, of which the outermost are near its quantiles."""

_SQUARES = np.arange(256, dtype=np.uint16) ** 2


def channel_sums(patches: UInt8Array) -> tuple[Int64Array, Int64Array]:
    """Return sums and sums of squares of all pixels of each patch, per channel.

    `patches`: uint8 (n, h, w, 3). Returns two arrays of int64 (n, 3).
    """
    sums, squares = (np.empty((len(patches), 3), np.int64) for _ in range(2))
    for channel in range(3):
        plane = np.ascontiguousarray(patches[..., channel])
        sums[:, channel] = plane.sum(axis=(1, 2), dtype=np.int64)
        squares[:, channel] = _SQUARES[plane].sum(axis=(1, 2), dtype=np.int64)
    return sums, squares


def colour_range(sums: Int64Array, pixels_per_patch: int) -> tuple[Rgb, Rgb]:
    """Return the lowest and highest mean colour that a patch is expected to have, per channel, scale 0..1, RGB.

    `sums`: of the patches to learn it from, as by `channel_sums`.
    """
    low, high = np.quantile(sums / (pixels_per_patch * 255), RANGE_QUANTILES, axis=0)
    margin = RANGE_MARGIN * (high - low)
    (red, green, blue), (red_high, green_high, blue_high) = np.clip(low - margin, 0, 1).tolist(), np.clip(high + margin, 0, 1).tolist()
    return (red, green, blue), (red_high, green_high, blue_high)


def outside_colours(sums: Int64Array, pixels_per_patch: int, low: Rgb | None, high: Rgb | None) -> npt.NDArray[np.bool_]:
    """Tell which patches have a mean colour outside of a range of `colour_range`; none where there is no range.

    `sums`: int64 (n, 3), as by `channel_sums`. Returns bool (n,).
    """
    if low is None or high is None:
        return np.zeros(len(sums), bool)
    means = sums / (pixels_per_patch * 255)
    outside: npt.NDArray[np.bool_] = np.any((means < np.array(low)) | (means > np.array(high)), axis=1)
    return outside


def channel_statistics(sums: Int64Array, sums_of_squares: Int64Array, pixels_per_patch: int) -> tuple[Rgb, Rgb]:
    """Return mean and standard deviation per channel, scale 0..1, RGB, of patches whose sums are given as by `channel_sums`."""
    pixels = len(sums) * pixels_per_patch
    means, stds = [], []
    for channel in range(3):
        total, squares = int(sums[:, channel].sum()), int(sums_of_squares[:, channel].sum())
        means.append(total / pixels / 255)
        # E[x^2] - E[x]^2 in floats would lose digits on 2 * 10^9 pixels.
        stds.append(((squares * pixels - total * total) / (pixels * pixels)) ** 0.5 / 255)
    return (means[0], means[1], means[2]), (stds[0], stds[1], stds[2])
