"""Image files as bytes, good and bad, for the tests of the endpoint."""

from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from sentinode.images import UInt8Array
from tests.factories import random_patches


def encode(pixels: UInt8Array, format: str = "TIFF", **options: Any) -> bytes:
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


def good_tif(seed: int = 0) -> bytes:
    return encode(random_patches(1, seed)[0])


def _saved(image: Image.Image, format: str = "TIFF", **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def refused_files() -> dict[str, tuple[bytes, str, int]]:
    """Name -> (bytes, problem kind, status)."""
    pixels = random_patches(1)[0]
    tif = encode(pixels)
    image = Image.fromarray(pixels)
    see_through = np.dstack([pixels, np.full(pixels.shape[:2], 128, np.uint8)])
    deep = (pixels[..., 0].astype(np.uint16) * 257).astype(np.uint16)
    return {
        "empty": (b"", "empty", 422),
        "text": (b"hello, this is not an image at all", "not_an_image", 422),
        "gif": (_saved(image, "GIF"), "format_not_allowed", 415),
        "bmp": (_saved(image, "BMP"), "format_not_allowed", 415),
        "tif cut after its signature": (tif[:8], "truncated", 422),
        "tif cut in the middle": (tif[: len(tif) // 2], "truncated", 422),
        "tif without its last byte of pixels": (_cut_pixels(pixels), "truncated", 422),
        "png cut": (encode(pixels, "PNG")[:-200], "truncated", 422),
        "jpeg cut": (encode(pixels, "JPEG")[:400], "truncated", 422),
        "95x96": (encode(pixels[:, :95]), "wrong_size", 422),
        "192x192": (encode(np.tile(pixels, (2, 2, 1))), "wrong_size", 422),
        "16 bit": (_saved(Image.fromarray(deep)), "wrong_mode", 422),
        "cmyk": (_saved(image.convert("CMYK")), "wrong_mode", 422),
        "half transparent": (encode(see_through, "PNG"), "wrong_mode", 422),
        "two pages": (_saved(image, save_all=True, append_images=[image]), "several_pages", 422),
    }


def _cut_pixels(pixels: UInt8Array) -> bytes:
    """A TIFF whose directory is whole and whose strip of pixels ends one byte early."""
    tif = bytearray(encode(pixels))
    # Pillow writes the directory first and the pixels last.
    assert tif.endswith(pixels.tobytes()[-16:])
    return bytes(tif[:-1])
