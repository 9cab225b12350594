"""Bytes of an image file to the pixels of a patch. Inputs are hostile: everything is checked before it is decoded."""

import struct
import zlib
from functools import lru_cache
from io import BytesIO

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from sentinode.errors import PatchError, PatchErrorCode

UInt8Array = npt.NDArray[np.uint8]

ALLOWED_FORMATS = ("TIFF", "PNG", "JPEG", "WebP")
IMAGE_SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg", ".webp")

_ALLOWED_SIGNATURES = (b"II*\x00", b"MM\x00*", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF")
_OTHER_SIGNATURES = {b"GIF8": "GIF", b"BM": "BMP", b"%PDF": "PDF", b"II+\x00": "BigTIFF", b"MM\x00+": "BigTIFF"}

_MAX_SIDE = 1024
_BOMB_PIXELS = 1 << 24  # 4096 x 4096, 48 MB as RGB: no patch, whatever went wrong, only a small file that would fill the memory
_BITS_PER_SAMPLE, _TILE_WIDTH, _TILE_LENGTH = 258, 322, 323

# The baseline TIFF that scanners and tifffile write: one page, one strip, no compression. Tag -> the values it may have there; None = any.
# Tags: TIFF 6.0, part 1. What is not in this table is read by Pillow.
_PLAIN_TAGS: dict[int, tuple[int, ...] | None] = {
    254: (0,),  # NewSubfileType: the full image
    256: None,  # ImageWidth
    257: None,  # ImageLength
    _BITS_PER_SAMPLE: None,
    259: (1,),  # Compression: none
    262: (2,),  # PhotometricInterpretation: RGB
    270: None,  # ImageDescription
    273: None,  # StripOffsets
    274: (1,),  # Orientation: as it lies there
    277: (3,),  # SamplesPerPixel
    278: None,  # RowsPerStrip
    279: None,  # StripByteCounts
    282: None,  # XResolution
    283: None,  # YResolution
    284: (1,),  # PlanarConfiguration: RGBRGB...
    296: None,  # ResolutionUnit
    305: None,  # Software
    306: None,  # DateTime
    339: (1,),  # SampleFormat: unsigned
}
_SHORT, _LONG = 3, 4
_BYTES_OF_KIND = {1: 1, 2: 1, _SHORT: 2, _LONG: 4, 5: 8}  # byte, text, short, long, fraction

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
        A TIFF, PNG, JPEG or WebP file.
    size_px : int or None
        Side that the image must have; None accepts any square-or-not image of 8 to 1024 pixels a side.

    Returns
    -------
    ndarray of uint8, shape (height, width, 3), RGB, 0..255
        Greyscale, palette and fully opaque RGBA images are converted, which is exact; anything that would lose information is refused.
        May be read-only.

    Raises
    ------
    PatchError
        With the code of the first defect found.
    """
    if not data:
        raise PatchError(PatchErrorCode.EMPTY, "the file is empty")
    if size_px is not None and (plain := plain_tiff(data, size_px)) is not None:
        return plain
    _check_signature(data)
    if data.startswith(b"RIFF"):
        _check_webp(data, size_px)
    try:
        image = Image.open(BytesIO(data), formats=ALLOWED_FORMATS)
    except Image.DecompressionBombError as error:
        raise PatchError(PatchErrorCode.DECOMPRESSION_BOMB, f"the image claims to be far too large; expected {_expected(size_px)}") from error
    except (UnidentifiedImageError, *_DAMAGE) as error:
        raise PatchError(PatchErrorCode.TRUNCATED, "the image is truncated or damaged") from error
    with image:
        width, height = image.size
        _check_pixels(width, height, size_px)
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


def plain_tiff(data: bytes, size_px: int) -> UInt8Array | None:
    """Return the pixels of a plain TIFF (uncompressed, one strip), or None where anything about the file is not plain.

    Takes a microsecond, a fortieth of what Pillow takes, whatever the bytes are.

    Returns
    -------
    ndarray of uint8, shape (size_px, size_px, 3), RGB, 0..255, or None
        Read-only, a view of `data`.
    """
    if data[:4] != b"II*\x00" or len(data) < 10:
        return None
    (start,) = struct.unpack_from("<I", data, 4)
    if start + 2 > len(data):
        return None
    (entries,) = struct.unpack_from("<H", data, start)
    if entries > len(_PLAIN_TAGS):
        return None  # before a copy of it is made, and kept as a key
    layout = _plain_layout(data[start + 2 : start + 2 + 12 * entries + 4], size_px)
    if layout is None:
        return None
    pixels, bits, end = layout
    if end > len(data) or data[bits : bits + 6] != b"\x08\x00\x08\x00\x08\x00":
        return None
    return np.frombuffer(data, np.uint8, size_px * size_px * 3, pixels).reshape(size_px, size_px, 3)


@lru_cache(maxsize=64)  # all files of one archive share a directory, byte for byte
def _plain_layout(directory: bytes, size_px: int) -> tuple[int, int, int] | None:
    """Return where pixels and bits per sample stand and where the last value ends, from the end of a TIFF directory; None if it is not plain."""
    if len(directory) < 16 or len(directory) % 12 != 4 or directory[-4:] != b"\x00\x00\x00\x00":
        return None
    value_of, end = {}, 0
    for tag, kind, count, value in struct.iter_unpack("<HHII", directory[:-4]):
        if tag not in _PLAIN_TAGS or tag in value_of or kind not in _BYTES_OF_KIND:
            return None
        if (allowed := _PLAIN_TAGS[tag]) is not None and (kind not in (_SHORT, _LONG) or count != 1 or value not in allowed):
            return None
        if tag in (256, 257, 273, 278, 279) and (kind not in (_SHORT, _LONG) or count != 1):
            return None
        if tag == _BITS_PER_SAMPLE and (kind, count) != (_SHORT, 3):
            return None
        value_of[tag] = value
        if (size := count * _BYTES_OF_KIND[kind]) > 4:  # else the value stands in the entry itself
            end = max(end, value + size)
    if not {256, 257, _BITS_PER_SAMPLE, 259, 262, 273, 277, 279} <= value_of.keys():
        return None
    if (value_of[256], value_of[257], value_of[279]) != (size_px, size_px, size_px * size_px * 3) or value_of.get(278, size_px) < size_px:
        return None
    return value_of[273], value_of[_BITS_PER_SAMPLE], max(end, value_of[273] + value_of[279])


def _check_signature(data: bytes) -> None:
    if data.startswith(_ALLOWED_SIGNATURES):
        return
    for signature, name in _OTHER_SIGNATURES.items():
        if data.startswith(signature):
            raise PatchError(PatchErrorCode.FORMAT_NOT_ALLOWED, f"{name} is not accepted; expected {', '.join(ALLOWED_FORMATS)}")
    raise PatchError(PatchErrorCode.NOT_AN_IMAGE, f"not an image; expected {', '.join(ALLOWED_FORMATS)}")


def _check_webp(data: bytes, size_px: int | None) -> None:
    """Refuse, before a decoder is made, which takes eight bytes for each pixel claimed, what claims too many (RFC 9649, section 2.5 to 2.7)."""
    head = data[:30].ljust(30, b"\0")
    chunk = head[12:16] if head[8:12] == b"WEBP" else b""
    if chunk == b"VP8X":
        width, height = (1 + int.from_bytes(head[at : at + 3], "little") for at in (24, 27))
    elif chunk == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    elif chunk == b"VP8 ":
        width, height = (int.from_bytes(head[at : at + 2], "little") & 0x3FFF for at in (26, 28))
    elif head[8:12] == b"WEBP":
        raise PatchError(PatchErrorCode.TRUNCATED, "the image is truncated or damaged")
    else:
        raise PatchError(PatchErrorCode.NOT_AN_IMAGE, f"not an image; expected {', '.join(ALLOWED_FORMATS)}")
    _check_pixels(width, height, size_px)


def _check_pixels(width: int, height: int, size_px: int | None) -> None:
    if width * height > _BOMB_PIXELS:
        raise PatchError(PatchErrorCode.DECOMPRESSION_BOMB, f"the image claims {width}x{height} pixels; expected {_expected(size_px)}")


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
        raise PatchError(PatchErrorCode.DECOMPRESSION_BOMB, f"the image's tiles are too large; expected at most {_MAX_SIDE} pixels a side")
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
