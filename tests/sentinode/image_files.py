"""Image files as bytes, made by Pillow or, where no library would, by hand."""

import struct
import zlib
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

SHORT, LONG = 3, 4
Entry = tuple[int, int, Sequence[int]]


def encode(pixels: npt.NDArray[Any] | Image.Image, format: str = "TIFF", **options: Any) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, colour_type: int, rows: npt.NDArray[Any], *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of given rows of samples (already big-endian where two bytes wide), with more chunks before its data."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    data = b"".join(b"\0" + np.ascontiguousarray(row).tobytes() for row in rows)
    all_chunks = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, content) for kind, content in all_chunks)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def tiff(entries: Sequence[Entry], data: bytes, *, more_pages: int = 0) -> bytes:
    """A little-endian TIFF: the directory, further equal directories, values that do not fit into an entry, then `data`.

    The value -1 stands for the place of `data`. Entries are written in the given order, equal tags included.
    """
    directory = 2 + 12 * len(entries) + 4
    place = 8 + directory * (1 + more_pages)
    outside = {tag: values for tag, kind, values in entries if len(values) * (2 if kind == SHORT else 4) > 4}
    places = {}
    for tag, values in outside.items():
        places[tag] = place
        place += 2 * len(values)
    fields = b""
    for tag, kind, values in entries:
        if tag in places:
            value = struct.pack("<I", places[tag])
        else:
            value = b"".join(struct.pack("<H" if kind == SHORT else "<I", place if item == -1 else item) for item in values).ljust(4, b"\0")
        fields += struct.pack("<HHI", tag, kind, len(values)) + value
    pages = b"".join(
        struct.pack("<H", len(entries)) + fields + struct.pack("<I", 8 + directory * (page + 1) if page < more_pages else 0)
        for page in range(1 + more_pages)
    )
    return b"II*\0" + struct.pack("<I", 8) + pages + b"".join(struct.pack(f"<{len(v)}H", *v) for v in outside.values()) + data


def rgb_tiff(pixels: npt.NDArray[Any]) -> bytes:
    """An uncompressed RGB TIFF with the depth of `pixels`, (height, width, 3), uint8 or uint16."""
    height, width, _ = pixels.shape
    data = np.ascontiguousarray(pixels, dtype=pixels.dtype.newbyteorder("<")).tobytes()
    entries: list[Entry] = [
        (256, SHORT, [width]),
        (257, SHORT, [height]),
        (258, SHORT, [8 * pixels.itemsize] * 3),
        (259, SHORT, [1]),
        (262, SHORT, [2]),
        (273, LONG, [-1]),
        (277, SHORT, [3]),
        (278, SHORT, [height]),
        (279, LONG, [len(data)]),
    ]
    return tiff(entries, data)


def tiled_grey_tiff(side: int, tile: int, *, twice: bool = False) -> bytes:
    """A grey, deflated TIFF of one tile; with `twice` the true tile size stands before a harmless one."""
    data = zlib.compress(b"\x80" * (tile * tile), 1)
    sizes: list[Entry] = [(tag, LONG, [value]) for tag in (322, 323) for value in ([tile, side] if twice else [tile])]
    entries: list[Entry] = [
        (256, SHORT, [side]),
        (257, SHORT, [side]),
        (258, SHORT, [8]),
        (259, SHORT, [8]),
        (262, SHORT, [1]),
        (277, SHORT, [1]),
        *sizes,
        (324, LONG, [-1]),
        (325, LONG, [len(data)]),
    ]
    return tiff(entries, data)
