"""Bytes of an image file to the pixels of a patch. Inputs are hostile: everything is checked before it is decoded."""

import struct
import zlib
from io import BytesIO

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from sentinode.errors import PatchError, PatchErrorCode

UInt8Array = npt.NDArray[np.uint8]

ALLOWED_FORMATS = ("TIFF", "PNG", "JPEG")
IMAGE_SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg")

_ALLOWED_SIGNATURES = (b"II*\x00", b"MM\x00*", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")
_OTHER_SIGNATURES = {b"GIF8": "GIF", b"BM": "BMP", b"RIFF": "WebP", b"%PDF": "PDF", b"II+\x00": "BigTIFF", b"MM\x00+": "BigTIFF"}

# What Pillow's format plugins raise on damaged files, by fuzzing and by reading them; there is no common base class.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    AttributeError,
    OverflowError,
    RuntimeError,
    struct.error,
    zlib.error,
)


def decode_patch(data: bytes, *, size_px: int | None) -> UInt8Array:
    """Decode one image file that must be exactly one patch.

    Parameters
    ----------
    data : bytes
        A TIFF, PNG or JPEG file.
    size_px : int or None
        Side that the image must have; None accepts any square-or-not image of 8 to 4096 pixels a side.

    Returns
    -------
    ndarray of uint8, shape (height, width, 3), RGB, 0..255
        Greyscale, palette and fully opaque RGBA images are converted, which is exact; anything that would lose information is refused.

    Raises
    ------
    PatchError
        With the code of the first defect found.
    """
    if not data:
        raise PatchError(PatchErrorCode.EMPTY, "the file is empty")
    _check_signature(data)
    try:
        image = Image.open(BytesIO(data), formats=ALLOWED_FORMATS)
    except Image.DecompressionBombError as error:
        raise PatchError(PatchErrorCode.WRONG_SIZE, f"the image is far too large; expected {_expected(size_px)}") from error
    except (UnidentifiedImageError, *_DAMAGE) as error:
        raise PatchError(PatchErrorCode.TRUNCATED, "the image is truncated or damaged") from error
    with image:
        width, height = image.size
        if (width, height) != (size_px, size_px) if size_px else not (8 <= width <= 4096 and 8 <= height <= 4096):
            raise PatchError(PatchErrorCode.WRONG_SIZE, f"the image is {width}x{height} pixels; expected {_expected(size_px)}")
        try:
            if getattr(image, "n_frames", 1) > 1:
                raise PatchError(PatchErrorCode.SEVERAL_PAGES, f"the file holds {image.n_frames} images; expected one")  # type: ignore[attr-defined]
            image.load()
            return _to_rgb(image)
        except _DAMAGE as error:
            raise PatchError(PatchErrorCode.TRUNCATED, "the image is truncated or damaged") from error


def _check_signature(data: bytes) -> None:
    if data.startswith(_ALLOWED_SIGNATURES):
        return
    for signature, name in _OTHER_SIGNATURES.items():
        if data.startswith(signature):
            raise PatchError(PatchErrorCode.FORMAT_NOT_ALLOWED, f"{name} is not accepted; expected {', '.join(ALLOWED_FORMATS)}")
    raise PatchError(PatchErrorCode.NOT_AN_IMAGE, f"not an image; expected {', '.join(ALLOWED_FORMATS)}")


def _expected(size_px: int | None) -> str:
    return f"{size_px}x{size_px}" if size_px else "8 to 4096 pixels a side"


def _to_rgb(image: Image.Image) -> UInt8Array:
    """Return RGB pixels where the conversion loses nothing."""
    # A TIFF of 16 bits a channel opens as mode RGB with its low bytes dropped, so the tag decides, not the mode.
    bits = image.tag_v2.get(258) if hasattr(image, "tag_v2") else None
    if bits is not None and any(depth != 8 for depth in (bits if isinstance(bits, tuple) else (bits,))):
        raise PatchError(PatchErrorCode.WRONG_MODE, f"the image has {bits} bits a channel; expected 8-bit RGB")
    if image.mode == "RGB":
        return np.asarray(image)
    if image.mode == "L" or (image.mode == "P" and "transparency" not in image.info):
        return np.asarray(image.convert("RGB"))
    if image.mode == "RGBA" and image.getchannel("A").getextrema() == (255, 255):
        return np.asarray(image.convert("RGB"))
    raise PatchError(PatchErrorCode.WRONG_MODE, f"the image has mode {image.mode}; expected 8-bit RGB")
