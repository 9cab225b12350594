"""Pixels to network input: one function for training, evaluation and serving."""

import torch
from torch.nn import functional

from sentinode.config import Rgb


def to_unit_nchw(patches: torch.Tensor) -> torch.Tensor:
    """Turn uint8 (n, h, w, 3), 0..255, into float32 (n, 3, h, w), 0..1, on the same device."""
    # In planes while they are bytes: what follows is faster on planes, resizing nearly twice.
    return patches.permute(0, 3, 1, 2).contiguous().to(torch.float32).div_(255.0)


def resize(batch: torch.Tensor, size_px: int) -> torch.Tensor:
    """Resize float (n, 3, h, w) to (n, 3, size_px, size_px), bilinear with antialias; returned as it is where the size is right already."""
    if batch.shape[-2:] == (size_px, size_px):
        return batch
    return functional.interpolate(batch, size=(size_px, size_px), mode="bilinear", antialias=True, align_corners=False)


def normalise(batch: torch.Tensor, mean: Rgb, std: Rgb) -> torch.Tensor:
    """Return (batch - mean) / std per channel; `batch`: float (n, 3, h, w), scale 0..1."""
    shape = (1, 3, 1, 1)
    return (batch - batch.new_tensor(mean).view(shape)) / batch.new_tensor(std).view(shape)


def network_input(patches: torch.Tensor, size_px: int, mean: Rgb, std: Rgb) -> torch.Tensor:
    """Turn uint8 patches (n, h, w, 3), RGB, into the network's input, float32 (n, 3, size_px, size_px), on the same device."""
    return normalise(resize(to_unit_nchw(patches), size_px), mean, std)
