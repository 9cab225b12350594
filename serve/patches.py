"""Bytes of a request to the patch that a bundle accepts, and the built-in patch that health checks use."""

import numpy as np
import torch

from sentinode.errors import PatchError, PatchErrorCode
from sentinode.images import UInt8Array, decode_patch
from sentinode.preprocess import resize, to_unit_nchw


def patch_from_bytes(data: bytes, size_px: int, allow_resize: bool) -> UInt8Array:
    """Decode one image file to the patch that a bundle accepts.

    Parameters
    ----------
    data : bytes
        TIFF, PNG, JPEG or WebP.
    size_px : int
        Side that the bundle accepts.
    allow_resize : bool
        Resize square images of another size instead of refusing them.

    Returns
    -------
    ndarray of uint8, shape (size_px, size_px, 3), RGB, 0..255

    Raises
    ------
    PatchError
        With the code of the first defect found.
    """
    if not allow_resize:
        return decode_patch(data, size_px=size_px)
    image = decode_patch(data, size_px=None)
    height, width = image.shape[:2]
    if (height, width) == (size_px, size_px):
        return image
    if height != width:
        raise PatchError(PatchErrorCode.WRONG_SIZE, f"the image is {width}x{height} pixels; expected a square one")
    resized = resize(to_unit_nchw(torch.tensor(image)[None]), size_px)[0].permute(1, 2, 0)
    pixels: UInt8Array = (resized.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    return pixels


def probe_patch(size_px: int) -> UInt8Array:
    """Return the built-in patch of health checks: eosin pink with a haematoxylin disc, uint8 (size_px, size_px, 3), RGB."""
    rows, columns = np.mgrid[:size_px, :size_px] - (size_px - 1) / 2
    nucleus = (rows**2 + columns**2 < (size_px / 5) ** 2)[..., None]
    return np.where(nucleus, (92, 60, 140), (224, 160, 196)).astype(np.uint8)
