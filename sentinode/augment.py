"""Training augmentation, batched on the device.

Every random number is a function of (seed, epoch, row), so a row looks the same whatever the number of workers, the batch it falls into
or the epoch at which a run was resumed.
"""

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional

from sentinode.config import AugmentConfig
from sentinode.jpeg import compress
from sentinode.preprocess import to_unit_nchw
from sentinode.stain import jitter_stains

_DRAWS = 18
# Pieces of a batch that stay in a CPU's cache and in memory that the process keeps: whole batches take twice the time, half of it for fresh pages.
_CPU_ROWS = 16
# The shift of a stain beside its scaling; 1 would drown haematoxylin in pale tissue, whose optical density is some 0.2.
_SHIFT_PER_SCALE = 0.2
# ITU-R BT.601 luma, the grey that torchvision's colour functions use too.
_LUMA = (0.299, 0.587, 0.114)
_YIQ = (_LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))


def draw(seed: int, epoch: int, rows: int) -> torch.Tensor:
    """Return the random numbers of one epoch: float32 (rows, 18), uniform in [0, 1), on the CPU."""
    generator = np.random.default_rng([seed, epoch])
    return torch.from_numpy(generator.random((rows, _DRAWS), dtype=np.float32))


def augment(batch: torch.Tensor, draws: torch.Tensor, config: AugmentConfig) -> torch.Tensor:
    """Augment patches.

    Parameters
    ----------
    batch : uint8 tensor, shape (n, side, side, 3), or float tensor, shape (n, 3, side, side), 0..1; RGB
        The same comes out of both; uint8 is faster.
    draws : float tensor, shape (n, 18), uniform in [0, 1)
        The rows of `draw` that belong to these patches, on the same device.
    config : AugmentConfig

    Returns
    -------
    float tensor, shape (n, 3, side, side), 0..1, contiguous
    """
    if batch.device.type != "cpu":
        return _augment(batch, draws, config)
    side_px = batch.shape[2]
    result = torch.empty((len(batch), 3, side_px, side_px), dtype=torch.float32 if batch.dtype == torch.uint8 else batch.dtype)
    for start in range(0, len(batch), _CPU_ROWS):
        rows = slice(start, start + _CPU_ROWS)
        result[rows] = _augment(batch[rows], draws[rows], config)
    return result


def _augment(batch: torch.Tensor, draws: torch.Tensor, config: AugmentConfig) -> torch.Tensor:
    is_stored = batch.dtype == torch.uint8
    if is_stored:
        batch = batch.permute(0, 3, 1, 2)
    if config.dihedral:
        batch = dihedral(batch, (draws[:, 0] * 8).long().clamp_(max=7))
    if config.flip:
        # Elements 0, 4, 6 and 2: nothing, left-right, top-bottom, both.
        batch = dihedral(batch, ((draws[:, 0] < 0.5).long() * 4 + (draws[:, 1] < 0.5).long() * 6) % 8)
    if is_stored:
        batch = to_unit_nchw(batch.permute(0, 2, 3, 1))
    batch = batch.contiguous()  # planes: twice as fast below and in the resizing that follows
    if config.rotation_deg or config.scale_jitter or config.shift_px:
        angles = math.radians(config.rotation_deg) * (draws[:, 2] * 2 - 1)
        scales = 1 + config.scale_jitter * (draws[:, 15] * 2 - 1)
        batch = warp(batch, angles, scales, config.shift_px * (draws[:, 16:18] * 2 - 1))
    if config.stain_jitter:
        stains = config.stain_jitter * (draws[:, 7:13] * 2 - 1)
        batch = jitter_stains(batch, 1 + stains[:, :3], _SHIFT_PER_SCALE * stains[:, 3:])
    if config.colour_jitter or config.hue_jitter:
        spread = config.colour_jitter
        brightness, contrast, saturation = (1 + spread * (draws[:, k] * 2 - 1) for k in (3, 4, 5))
        batch = jitter_colours(batch, brightness, contrast, saturation, config.hue_jitter * (draws[:, 6] * 2 - 1))
    # The number of the row decides whether it is changed (from one half on), and what it has above that, how strongly.
    if config.blur_sigma_px:
        strength = draws[:, 13] * 2 - 1
        some_blur = functools.partial(blur, radius_px=math.ceil(3 * config.blur_sigma_px))
        batch = _change_some(batch, strength >= 0, some_blur, config.blur_sigma_px * strength.clamp(min=0))
    if config.jpeg_quality is not None:
        strength = draws[:, 14] * 2 - 1
        quality = (config.jpeg_quality + strength * (101 - config.jpeg_quality)).floor().clamp_(config.jpeg_quality, 100)
        batch = _change_some(batch, strength >= 0, compress, quality)
    return batch


def dihedral(batch: torch.Tensor, element: torch.Tensor) -> torch.Tensor:
    """Apply to each patch one of the eight symmetries of the square: a mirroring left-right for 4..7, then `element % 4` quarter turns.

    `batch`: any dtype, (n, channels, side, side); `element`: int64 (n,), 0..7.
    """
    places = _places(batch.shape[-1], batch.device)[element]
    return batch.flatten(2).gather(2, places.unsqueeze(1).expand(-1, batch.shape[1], -1)).view(batch.shape)


@functools.lru_cache(maxsize=8)
def _places(side_px: int, device: torch.device) -> torch.Tensor:
    """Return where each symmetry takes each pixel from: int64 (8, side * side)."""
    square = torch.arange(side_px * side_px, device=device).view(side_px, side_px)
    return torch.stack([torch.rot90(one, turns).flatten() for one in (square, square.flip(1)) for turns in range(4)])


def warp(batch: torch.Tensor, angles_rad: torch.Tensor, scales: torch.Tensor, shifts_px: torch.Tensor) -> torch.Tensor:
    """Rotate and magnify each patch around its centre, then move it; bilinear, what comes in from outside is a reflection.

    `batch`: float (n, channels, side, side); `angles_rad`, `scales`: (n,); `shifts_px`: (n, 2), to the right and down.
    """
    cos, sin = angles_rad.cos() / scales, angles_rad.sin() / scales
    # The grid asks where each pixel comes from, in halves of a side: the inverse of what happens to the patch.
    x, y = (shifts_px * (-2 / batch.shape[-1])).unbind(1)
    matrices = torch.stack(
        [torch.stack([cos, -sin, cos * x - sin * y], 1), torch.stack([sin, cos, sin * x + cos * y], 1)],
        1,
    )
    grid = functional.affine_grid(matrices.to(batch.dtype), list(batch.shape), align_corners=False)
    return functional.grid_sample(batch, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def jitter_colours(
    batch: torch.Tensor, brightness: torch.Tensor, contrast: torch.Tensor, saturation: torch.Tensor, hue_turns: torch.Tensor
) -> torch.Tensor:
    """Scale brightness, contrast and saturation by the given factors and turn the hue, each per patch (tensors of shape (n,)).

    Contrast is around the patch's mean grey. Hue is a rotation of the chroma plane of YIQ, which is linear; together with the others it is one 3x3
    matrix and one offset per patch.
    """
    angle = hue_turns * (2 * math.pi)
    parts = torch.stack([torch.ones_like(angle), saturation * angle.cos(), saturation * angle.sin()], 1)
    matrices = ((brightness * contrast).unsqueeze(1) * (parts @ _grey_chroma_turned(batch.device, batch.dtype))).view(-1, 3, 3)
    grey = brightness * (batch.mean((2, 3)) @ _luma(batch.device, batch.dtype))
    offsets = ((1 - contrast) * grey).view(-1, 1, 1)
    return torch.baddbmm(offsets, matrices, batch.flatten(2)).view(batch.shape).clamp_(0, 1)


@functools.lru_cache(maxsize=8)
def _luma(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(_LUMA, device=device, dtype=dtype)


@functools.lru_cache(maxsize=8)
def _grey_chroma_turned(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return three matrices on RGB, (3, 9): to the grey, to the chroma (what is left), and to the chroma turned by a quarter in YIQ."""
    to_yiq = torch.tensor(_YIQ, dtype=torch.float64)
    to_rgb = torch.linalg.inv(to_yiq)
    turned = torch.outer(to_rgb[:, 2], to_yiq[1]) - torch.outer(to_rgb[:, 1], to_yiq[2])
    grey = torch.outer(to_rgb[:, 0], to_yiq[0])
    return torch.stack([grey, torch.eye(3, dtype=torch.float64) - grey, turned]).view(3, 9).to(device, dtype)


def blur(batch: torch.Tensor, sigma_px: torch.Tensor, radius_px: int) -> torch.Tensor:
    """Blur each patch by a Gaussian of its own standard deviation (n,), cut off at `radius_px`, the border mirrored; 0 changes nothing."""
    offsets = torch.arange(-radius_px, radius_px + 1, device=batch.device)
    # The kernel at 0 is 1, whatever sigma, and the others vanish with it.
    kernels = torch.exp(-0.5 * (offsets / sigma_px.clamp(min=1e-3).unsqueeze(1)) ** 2)
    kernels = (kernels / kernels.sum(1, keepdim=True)).view(-1, 2 * radius_px + 1, 1, 1, 1)
    for dim, padding in ((2, (0, 0, radius_px, radius_px)), (3, (radius_px, radius_px, 0, 0))):
        # Sums of moved copies: a row's bits do not depend on the batch, as they may in a grouped convolution; as fast up to sigma 1.
        padded = functional.pad(batch, padding, mode="reflect")
        batch = torch.zeros_like(batch)
        for tap in range(2 * radius_px + 1):
            batch.addcmul_(padded.narrow(dim, tap, batch.shape[dim]), kernels[:, tap])
    return batch


def _change_some(
    batch: torch.Tensor, chosen: torch.Tensor, change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], parameter: torch.Tensor
) -> torch.Tensor:
    """Change the chosen patches (bool (n,)), each by its own parameter (n,)."""
    if batch.device.type != "cpu":
        # Picking them out would wait for the device: all are changed, then chosen from.
        return torch.where(chosen.view(-1, 1, 1, 1), change(batch, parameter), batch)
    rows = chosen.nonzero().flatten()
    return batch.index_copy(0, rows, change(batch[rows], parameter[rows]))
