"""The forward pass without gradients, the same for every caller."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import numpy.typing as npt
import torch

from sentinode.config import Rgb
from sentinode.images import UInt8Array
from sentinode.preprocess import network_input

VIEWS = 8
"""Symmetries of the square, as `view` numbers them."""


def without_tf32() -> AbstractContextManager[None]:
    """Return the context of every forward pass whose numbers count: a GPU's probabilities must equal a CPU's, and cuDNN uses TF32 by default."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)  # type: ignore[no-untyped-call, no-any-return]


@torch.inference_mode()
def network_logits(
    model: Callable[[torch.Tensor], torch.Tensor],
    patches: UInt8Array,
    *,
    input_size_px: int,
    mean: Rgb,
    std: Rgb,
    tta: int = 1,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
) -> npt.NDArray[np.float32]:
    """Return z1 - z0 of a network in eval mode.

    Parameters
    ----------
    model : nn.Module or engine
        Maps float (n, 3, input_size_px, input_size_px) to logits (n, 2); on `device`.
    patches : ndarray of uint8, shape (n, height, width, 3), RGB
    input_size_px, mean, std
        Of the bundle or training configuration.
    tta : int
        Views of each patch whose z1 - z0 are averaged: 1 (as it is), 4 (quarter turns) or 8 (these and their mirror images).
    batch_size : int
        Patches per forward pass.

    Returns
    -------
    ndarray of float32, shape (n,)
    """
    parts = [np.empty(0, np.float32)]
    for start in range(0, len(patches), batch_size):
        # A copy: patches often lie in read-only shared memory, which torch does not accept.
        batch = torch.tensor(patches[start : start + batch_size], device=device)
        with without_tf32():
            inputs = network_input(batch, input_size_px, mean, std)
            logits = torch.stack([_difference(model(view(inputs, number))) for number in range(tta)]).mean(0)
        parts.append(logits.cpu().numpy())
    return np.concatenate(parts)


def view(inputs: torch.Tensor, number: int) -> torch.Tensor:
    """Return one of the eight symmetries of the square, (n, c, side, side); 0 is the input itself. The label is about the centre, which stays."""
    turned = torch.rot90(inputs, number % 4, (2, 3)) if number % 4 else inputs
    return turned.flip(3) if number >= 4 else turned


def _difference(z: torch.Tensor) -> torch.Tensor:
    return (z[:, 1] - z[:, 0]).float()
