"""Hostile requests, made of good ones: files that are cut, bent and mixed, and forms that are malformed. Each is a function of its number."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from tests.factories import random_patches
from tests.serve.patch_files import encode

CONTENT_TYPE = "multipart/form-data; boundary=frontier"


@dataclass(frozen=True)
class Hostile:
    """A body, its content type, and what was done to make it."""

    body: bytes
    content_type: str
    made: str


@cache
def good_files() -> dict[str, bytes]:
    """Every accepted format, in its variants, and some that are not accepted."""
    pixels = random_patches(1)[0]
    image = Image.fromarray(pixels)
    grey, palette, alpha = image.convert("L"), image.quantize(64), image.convert("RGBA")
    deep = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)

    def saved(one: Image.Image, format: str, **options: Any) -> bytes:
        buffer = BytesIO()
        one.save(buffer, format, **options)
        return buffer.getvalue()

    return {
        "tif": encode(pixels),
        "tif lzw": saved(image, "TIFF", compression="tiff_lzw"),
        "tif deflate": saved(image, "TIFF", compression="tiff_adobe_deflate"),
        "tif jpeg": saved(image, "TIFF", compression="jpeg"),
        "tif big endian": saved(image, "TIFF", big_endian=True),
        "tif palette": saved(palette, "TIFF"),
        "tif pages": saved(image, "TIFF", save_all=True, append_images=[image, image]),
        "tif 16 bit": saved(deep, "TIFF"),
        "tif cmyk": saved(image.convert("CMYK"), "TIFF"),
        "png": saved(image, "PNG"),
        "png grey": saved(grey, "PNG"),
        "png palette": saved(palette, "PNG", transparency=3),
        "png alpha": saved(alpha, "PNG"),
        "png 16 bit": saved(deep, "PNG"),
        "png animated": saved(image, "PNG", save_all=True, append_images=[image.rotate(90)]),
        "jpeg": saved(image, "JPEG"),
        "jpeg progressive": saved(image, "JPEG", progressive=True),
        "jpeg cmyk": saved(image.convert("CMYK"), "JPEG"),
        "webp": saved(image, "WEBP"),
        "webp lossless": saved(alpha, "WEBP", lossless=True),
        "webp animated": saved(image, "WEBP", save_all=True, append_images=[image.rotate(90)]),
        "gif": saved(image, "GIF"),
        "bmp": saved(image, "BMP"),
        "wide": saved(Image.new("RGB", (100_000, 1)), "PNG"),
        "large": saved(Image.new("RGB", (6_000, 6_000)), "PNG"),
    }


def form_of(data: bytes, name: str = "file") -> bytes:
    """A form with one file."""
    head = f'--frontier\r\nContent-Disposition: form-data; name="{name}"; filename="p"\r\nContent-Type: application/octet-stream\r\n\r\n'
    return head.encode() + data + b"\r\n--frontier--\r\n"


def _flip_bits(data: bytearray, generator: np.random.Generator) -> None:
    # Headers decide most.
    for _ in range(int(generator.integers(1, 9))):
        place = int(generator.integers(0, min(len(data), 400) if generator.random() < 0.6 else len(data)))
        data[place] ^= 1 << int(generator.integers(8))


def _cut(data: bytearray, generator: np.random.Generator) -> None:
    del data[int(generator.integers(0, len(data) // 64 + 1)) * 64 :]


def _overwrite(data: bytearray, generator: np.random.Generator) -> None:
    start = int(generator.integers(0, len(data)))
    length = int(generator.integers(1, 64))
    filler = [b"\0", b"\xff", generator.bytes(1)][int(generator.integers(3))]
    data[start : start + length] = filler * length


def _large_number(data: bytearray, generator: np.random.Generator) -> None:
    start = int(generator.integers(0, min(len(data), 300)))
    value = [0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 100_000][int(generator.integers(6))]
    data[start : start + 4] = value.to_bytes(4, "little" if generator.random() < 0.5 else "big")


def _insert(data: bytearray, generator: np.random.Generator) -> None:
    start = int(generator.integers(0, len(data)))
    data[start:start] = generator.bytes(int(generator.integers(1, 200)))


def _splice(data: bytearray, generator: np.random.Generator) -> None:
    others = list(good_files().values())
    other = others[int(generator.integers(len(others)))]
    start = int(generator.integers(0, len(data)))
    data[start:] = other[int(generator.integers(0, len(other))) :]


_BENDS: list[Callable[[bytearray, np.random.Generator], None]] = [_flip_bits, _cut, _overwrite, _large_number, _insert, _splice]


def _malformed_form(body: bytes, generator: np.random.Generator) -> tuple[bytes, str]:
    kinds: list[tuple[bytes, str]] = [
        (body[: int(generator.integers(0, len(body)))], CONTENT_TYPE),
        (body, "multipart/form-data"),
        (body, "multipart/form-data; boundary="),
        (body, f"multipart/form-data; boundary={'x' * int(generator.integers(1, 300))}"),
        (body, 'multipart/form-data; boundary="fron tier'),
        (body, f"{CONTENT_TYPE}; charset=undefined"),
        (body, "text/plain"),
        (body, "application/x-www-form-urlencoded"),
        (body.replace(b"\r\n", b"\n"), CONTENT_TYPE),
        (body.replace(b"--frontier--", b"--frontier"), CONTENT_TYPE),
        (body.replace(b"form-data", b"attachment"), CONTENT_TYPE),
        (body.replace(b'name="file"', b""), CONTENT_TYPE),
        (body.replace(b'name="file"', b'name="' + generator.bytes(40).replace(b"\r", b"").replace(b"\n", b"") + b'"'), CONTENT_TYPE),
        (body.replace(b"Content-Type", b"Content-Transfer-Encoding: base64\r\nContent-Type"), CONTENT_TYPE),
        (body.replace(b"Content-Type", b"X" * 10_000 + b": y\r\nContent-Type"), CONTENT_TYPE),
        (body.replace(b"application/octet-stream", b"application/octet-stream; charset=utf-7"), CONTENT_TYPE),
        (b"--frontier\r\n" * 200 + body, CONTENT_TYPE),
        (body[:-4] + body, CONTENT_TYPE),
        (generator.bytes(500), CONTENT_TYPE),
    ]
    return kinds[int(generator.integers(len(kinds)))]


def hostile(number: int) -> Hostile:
    """Return request `number` for a route that takes one file."""
    generator = np.random.default_rng(number)
    names = list(good_files())
    name = names[number % len(names)]
    data = bytearray(good_files()[name])
    if generator.random() < 0.15:
        body, content_type = _malformed_form(form_of(bytes(data)), generator)
        return Hostile(body, content_type, f"{number}: malformed form of {name}")
    bends = [_BENDS[int(index)] for index in generator.integers(0, len(_BENDS), int(generator.integers(1, 4)))]
    for bend in bends:
        if data:
            bend(data, generator)
    return Hostile(form_of(bytes(data)), CONTENT_TYPE, f"{number}: {name}, {' '.join(bend.__name__.strip('_') for bend in bends)}")
