"""Bytes of an image file to the pixels of a patch. Inputs are hostile: everything is checked before it is decoded."""

import struct
import zlib
from io import BytesIO

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from sentinode.errors import PatchError, PatchErrorCode

UInt8Array = npt.NDArray[np.uint8]

ALLOWED_FORMATS = ("TIFF", "PNG", "JPEG")
IMAGE_SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg")

_ALLOWED_SIGNATURES = (b"II*\x00", b"MM\x00*", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")
_OTHER_SIGNATURES = {b"GIF8": "GIF", b"BM": "BMP", b"RIFF": "WebP", b"%PDF": "PDF", b"II+\x00": "BigTIFF", b"MM\x00+": "BigTIFF"}

_MAX_SIDE = 1024
_BITS_PER_SAMPLE, _TILE_WIDTH, _TILE_LENGTH = 258, 322, 323

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
        Side that the image must have; None accepts any square-or-not image of 8 to 1024 pixels a side.

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
        if (width, height) != (size_px, size_px) if size_px else not (8 <= width <= _MAX_SIDE and 8 <= height <= _MAX_SIDE):
            raise PatchError(PatchErrorCode.WRONG_SIZE, f"the image is {width}x{height} pixels; expected {_expected(size_px)}")
        # Not `n_frames`, which reads every page: a megabyte of tiny ones takes seconds.
        if getattr(image, "is_animated", False):
            raise PatchError(PatchErrorCode.SEVERAL_PAGES, "the file holds several images; expected one")
        try:
            if isinstance(image, TiffImageFile):
                _check_tiff(image, data)
            _check_mode(image)
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
    return f"{size_px}x{size_px}" if size_px else f"8 to {_MAX_SIDE} pixels a side"


def _check_tiff(image: TiffImageFile, data: bytes) -> None:
    """Refuse what would make the decoder allocate more than the size says, and what Pillow and libtiff read differently."""
    order = "<" if data.startswith(b"II") else ">"
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    (entries,) = struct.unpack_from(f"{order}H", data, start)
    tags = [struct.unpack_from(f"{order}H", data, start + 2 + 12 * entry)[0] for entry in range(entries)]
    # Of a tag that stands twice Pillow believes the last, libtiff the first.
    if len(set(tags)) < len(tags):
        raise PatchError(PatchErrorCode.TRUNCATED, "the image is damaged: a TIFF tag stands there twice")
    if any(image.tag_v2.get(tag, 0) > _MAX_SIDE for tag in (_TILE_WIDTH, _TILE_LENGTH)):
        raise PatchError(PatchErrorCode.WRONG_SIZE, f"the image's tiles are too large; expected at most {_MAX_SIDE} pixels a side")
    bits = image.tag_v2.get(_BITS_PER_SAMPLE)
    if bits is not None and any(depth != 8 for depth in (bits if isinstance(bits, tuple) else (bits,))):
        raise PatchError(PatchErrorCode.WRONG_MODE, f"the image has {bits} bits a channel; expected 8-bit RGB")


def _check_mode(image: ImageFile) -> None:
    """Refuse, before decoding, modes that cannot become RGB without loss."""
    # 16 bits a channel open as mode RGB with their low bytes dropped; only the raw mode of the data, e.g. RGB;16B, tells.
    if any(";16" in str(tile[3]) for tile in image.tile):
        raise PatchError(PatchErrorCode.WRONG_MODE, "the image has 16 bits a channel; expected 8-bit RGB")
    if image.mode not in ("RGB", "L", "P", "RGBA"):
        raise PatchError(PatchErrorCode.WRONG_MODE, f"the image has mode {image.mode}; expected 8-bit RGB")
    if "transparency" in image.info:
        raise PatchError(PatchErrorCode.WRONG_MODE, "the image has a transparent colour; expected 8-bit RGB")


def _to_rgb(image: ImageFile) -> UInt8Array:
    """Return the RGB pixels of a loaded image, which loses nothing."""
    if image.mode == "RGB":
        return np.asarray(image)
    if image.mode == "RGBA" and image.getchannel("A").getextrema() != (255, 255):
        raise PatchError(PatchErrorCode.WRONG_MODE, "the image has transparent pixels; expected 8-bit RGB")
    return np.asarray(image.convert("RGB"))
