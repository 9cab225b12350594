"""Training augmentation, batched on the device.

Every random number is a function of (seed, epoch, row), so a row looks the same whatever the number of workers, the batch it falls into
or the epoch at which a run was resumed.
"""

import math

import numpy as np
import torch
from torch.nn import functional

from sentinode.config import AugmentConfig
from sentinode.stain import jitter_stains

_DRAWS = 16
# The shift of a stain beside its scaling; 1 would drown haematoxylin in pale tissue, whose optical density is some 0.2.
_SHIFT_PER_SCALE = 0.2
# ITU-R BT.601 luma, the grey that torchvision's colour functions use too.
_LUMA = (0.299, 0.587, 0.114)


def draw(seed: int, epoch: int, rows: int) -> torch.Tensor:
    """Return the random numbers of one epoch: float32 (rows, 16), uniform in [0, 1), on the CPU."""
    generator = np.random.default_rng([seed, epoch])
    return torch.from_numpy(generator.random((rows, _DRAWS), dtype=np.float32))


def augment(batch: torch.Tensor, draws: torch.Tensor, config: AugmentConfig) -> torch.Tensor:
    """Augment patches.

    Parameters
    ----------
    batch : float tensor, shape (n, 3, side, side), 0..1, RGB
    draws : float tensor, shape (n, 16), uniform in [0, 1)
        The rows of `draw` that belong to these patches, on the same device.
    config : AugmentConfig

    Returns
    -------
    float tensor of the same shape, 0..1
    """
    if config.dihedral:
        batch = dihedral(batch, (draws[:, 0] * 8).long().clamp_(max=7))
    if config.flip:
        batch = dihedral(batch, (draws[:, 0] < 0.5).long() * 4)
        batch = torch.where((draws[:, 1] < 0.5).view(-1, 1, 1, 1), batch.flip(2), batch)
    if config.rotation_deg:
        batch = rotate(batch, (draws[:, 2] * 2 - 1) * math.radians(config.rotation_deg))
    if config.stain_jitter:
        stains = config.stain_jitter * (draws[:, 7:13] * 2 - 1)
        batch = jitter_stains(batch, 1 + stains[:, :3], _SHIFT_PER_SCALE * stains[:, 3:])
    if config.colour_jitter or config.hue_jitter:
        spread = config.colour_jitter
        brightness, contrast, saturation = (1 + spread * (draws[:, k] * 2 - 1) for k in (3, 4, 5))
        batch = jitter_colours(batch, brightness, contrast, saturation, config.hue_jitter * (draws[:, 6] * 2 - 1))
    return batch


def dihedral(batch: torch.Tensor, element: torch.Tensor) -> torch.Tensor:
    """Apply to each patch one of the eight symmetries of the square: a mirroring left-right for 4..7, then `element % 4` quarter turns."""
    mirrored = torch.where((element >= 4).view(-1, 1, 1, 1), batch.flip(3), batch)
    turns = (element % 4).view(-1, 1, 1, 1)
    result = mirrored
    for quarter in (1, 2, 3):
        # All patches are turned, then chosen from: the same work for every batch, and no gathering.
        result = torch.where(turns == quarter, torch.rot90(mirrored, quarter, (2, 3)), result)
    return result


def rotate(batch: torch.Tensor, angles_rad: torch.Tensor) -> torch.Tensor:
    """Rotate each patch around its centre, bilinear, the corners filled by reflection."""
    cos, sin, zero = angles_rad.cos(), angles_rad.sin(), torch.zeros_like(angles_rad)
    matrices = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)
    grid = functional.affine_grid(matrices.to(batch.dtype), list(batch.shape), align_corners=False)
    return functional.grid_sample(batch, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def jitter_colours(
    batch: torch.Tensor, brightness: torch.Tensor, contrast: torch.Tensor, saturation: torch.Tensor, hue_turns: torch.Tensor
) -> torch.Tensor:
    """Scale brightness, contrast and saturation by the given factors and turn the hue, each per patch (tensors of shape (n,)).

    Hue is a rotation of the chroma plane of YIQ, which is linear; together with saturation and brightness it is one 3x3 matrix per patch.
    """
    to_yiq = batch.new_tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    angle = hue_turns * (2 * math.pi)
    cos, sin = saturation * angle.cos(), saturation * angle.sin()
    one, zero = torch.ones_like(cos), torch.zeros_like(cos)
    chroma = torch.stack([torch.stack([one, zero, zero], 1), torch.stack([zero, cos, -sin], 1), torch.stack([zero, sin, cos], 1)], 1)
    matrices = brightness.view(-1, 1, 1) * (torch.linalg.inv(to_yiq) @ chroma @ to_yiq)
    mixed = torch.einsum("nij,njhw->nihw", matrices, batch)
    grey = (mixed * batch.new_tensor(_LUMA).view(1, 3, 1, 1)).sum(1).mean((1, 2)).view(-1, 1, 1, 1)
    return (grey + (mixed - grey) * contrast.view(-1, 1, 1, 1)).clamp_(0, 1)
