"""Changes of a patch that should not change the answer: what scanners, stains and storage do to it."""

import hashlib
import io
from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from sentinode.augment import blur
from sentinode.images import UInt8Array
from sentinode.inference import VIEWS, view
from sentinode.preprocess import resize, to_unit_nchw
from sentinode.stain import jitter_stains


def _stained(patches: UInt8Array, haematoxylin: float, eosin: float) -> UInt8Array:
    batch = to_unit_nchw(torch.tensor(patches))
    scale = torch.tensor([[haematoxylin, eosin, 1.0]]).expand(len(patches), 3)
    return _to_uint8(jitter_stains(batch, scale, torch.zeros(len(patches), 3)))


def _brighter(patches: UInt8Array, factor: float) -> UInt8Array:
    return _to_uint8(to_unit_nchw(torch.tensor(patches)) * factor)


def _blurred(patches: UInt8Array, sigma_px: float) -> UInt8Array:
    return _to_uint8(blur(to_unit_nchw(torch.tensor(patches)), torch.full((len(patches),), sigma_px), radius_px=int(3 * sigma_px + 0.5)))


def _as_jpeg(patches: UInt8Array, quality: int) -> UInt8Array:
    changed = np.empty_like(patches)
    for number, patch in enumerate(patches):
        file = io.BytesIO()
        Image.fromarray(patch).save(file, "JPEG", quality=quality)
        changed[number] = np.asarray(Image.open(file, formats=("JPEG",)))
    return changed


def _resized(patches: UInt8Array, side_px: int) -> UInt8Array:
    return _to_uint8(resize(resize(to_unit_nchw(torch.tensor(patches)), side_px), patches.shape[1]))


def _seen_as(patches: UInt8Array, number: int) -> UInt8Array:
    seen: UInt8Array = view(torch.tensor(patches).permute(0, 3, 1, 2), number).permute(0, 2, 3, 1).contiguous().numpy()
    return seen


def _to_uint8(batch: torch.Tensor) -> UInt8Array:
    result: UInt8Array = (batch.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    return result


PERTURBATIONS: dict[str, Callable[[UInt8Array], UInt8Array]] = {
    "haematoxylin +15 %": partial(_stained, haematoxylin=1.15, eosin=1.0),
    "haematoxylin -15 %": partial(_stained, haematoxylin=0.85, eosin=1.0),
    "eosin +15 %": partial(_stained, haematoxylin=1.0, eosin=1.15),
    "eosin -15 %": partial(_stained, haematoxylin=1.0, eosin=0.85),
    "brightness +10 %": partial(_brighter, factor=1.1),
    "brightness -10 %": partial(_brighter, factor=0.9),
    "blur, sigma 1 px": partial(_blurred, sigma_px=1.0),
    "JPEG, quality 90": partial(_as_jpeg, quality=90),
    "JPEG, quality 75": partial(_as_jpeg, quality=75),
    "JPEG, quality 50": partial(_as_jpeg, quality=50),
    "resized to 64 px and back": partial(_resized, side_px=64),
}
"""Name -> function of uint8 patches (n, h, w, 3), RGB, to others of the same shape."""

CHANGES = len(PERTURBATIONS) + VIEWS - 1
"""Columns of `answers`: the perturbations, then the views 1 to 7."""


def is_chosen(ids: list[str], share: float) -> npt.NDArray[np.bool_]:
    """Tell which rows belong to a sample: bool (n,), about `share` (0..1) of them, by a hash of the id, so that order and grouping do not matter."""
    limit = share * 2**64
    return np.array([int.from_bytes(hashlib.sha256(f"robustness:{id_}".encode()).digest()[:8]) < limit for id_ in ids], bool)


def answers(patches: UInt8Array, logits: Callable[[UInt8Array], npt.NDArray[np.float32]], *, views: bool = True) -> npt.NDArray[np.float64]:
    """Return a model's logits for all changes of some patches.

    Parameters
    ----------
    patches : ndarray of uint8, shape (n, h, h, 3), RGB
    logits : callable
        Patches to float32 (n,).
    views : bool
        False for a model that averages over the eight views itself: its answer to each is the same, and they are not asked for.

    Returns
    -------
    ndarray of float64, shape (n, CHANGES)
    """
    columns = [logits(change(patches)) for change in PERTURBATIONS.values()]
    if views:
        columns += [logits(_seen_as(patches, number)) for number in range(1, VIEWS)]
    else:
        columns += [logits(patches)] * (VIEWS - 1)
    return np.stack(columns, axis=1).astype(np.float64)
