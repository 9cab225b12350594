"""Bytes become exactly the pixels they hold, or a PatchError; nothing in between and nothing else."""

import struct
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sentinode.errors import PatchError, PatchErrorCode
from sentinode.images import UInt8Array, decode_patch, plain_tiff
from tests.factories import random_patches
from tests.sentinode.image_files import LONG, SHORT, encode, png, rgb_tiff, tiff, tiled_grey_tiff

PIXELS = random_patches(1)[0]
# Smooth pixels compress, so that damage to the few bytes left is felt everywhere.
SMOOTH = (np.add.outer(np.arange(96), np.arange(96))[..., None] * (1.0, 0.8, 0.6) + (20, 40, 60)).astype(np.uint8)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    # Pillow warns about damaged tags and large headers, which is what these files are full of.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def refusal(data: bytes, size_px: int | None = 96) -> PatchErrorCode:
    with pytest.raises(PatchError) as caught:
        decode_patch(data, size_px=size_px)
    assert "\n" not in str(caught.value)
    return caught.value.code


GOOD = {
    "tif": encode(PIXELS),
    "tif by hand": rgb_tiff(PIXELS),
    "tif lzw": encode(PIXELS, compression="tiff_lzw"),
    "tif deflate": encode(PIXELS, compression="tiff_adobe_deflate"),
    "tif packbits": encode(PIXELS, compression="packbits"),
    "tif big-endian": encode(PIXELS, big_endian=True),
    "png": encode(PIXELS, "PNG"),
    "png opaque rgba": encode(Image.fromarray(PIXELS).convert("RGBA"), "PNG"),
    "tif opaque rgba": encode(Image.fromarray(PIXELS).convert("RGBA")),
    "lossless webp": encode(PIXELS, "WEBP", lossless=True),
    "lossless webp opaque rgba": encode(Image.fromarray(PIXELS).convert("RGBA"), "WEBP", lossless=True),
}


@pytest.mark.parametrize("name", GOOD)
def test_lossless_files_give_exactly_their_pixels(name: str) -> None:
    decoded = decode_patch(GOOD[name], size_px=96)
    assert decoded.dtype == np.uint8
    assert decoded.shape == (96, 96, 3)
    np.testing.assert_array_equal(decoded, PIXELS)


def test_channels_come_in_the_order_red_green_blue() -> None:
    red = np.zeros((96, 96, 3), np.uint8)
    red[..., 0] = 255
    for data in (encode(red), encode(red, "PNG"), encode(red, "JPEG", quality=100)):
        assert decode_patch(data, size_px=96).mean(axis=(0, 1)) == pytest.approx([255, 0, 0], abs=2)


def test_a_jpeg_is_what_pillow_makes_of_it() -> None:
    data = encode(SMOOTH, "JPEG", quality=90)
    decoded = decode_patch(data, size_px=96)
    assert np.abs(decoded.astype(int) - SMOOTH).max() < 12
    assert np.abs(decoded.astype(int) - SMOOTH).mean() < 2


@pytest.mark.parametrize("format", ["TIFF", "PNG"])
def test_greyscale_becomes_three_equal_channels(format: str) -> None:
    grey = PIXELS[..., 1]
    np.testing.assert_array_equal(decode_patch(encode(grey, format), size_px=96), np.stack([grey] * 3, axis=-1))


@pytest.mark.parametrize("format", ["TIFF", "PNG"])
def test_a_palette_is_looked_up(format: str) -> None:
    palette = Image.fromarray(PIXELS).quantize(100)
    np.testing.assert_array_equal(decode_patch(encode(palette, format), size_px=96), np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize(("height", "width"), [(8, 8), (50, 70), (300, 1024)])
def test_any_size_is_taken_where_none_is_asked_for(height: int, width: int) -> None:
    pixels = np.resize(PIXELS, (height, width, 3))
    np.testing.assert_array_equal(decode_patch(encode(pixels), size_px=None), pixels)


RGB16 = PIXELS.astype(np.uint16) * 256 + 7
TRANSPARENT = np.dstack([PIXELS, np.full((96, 96), 255, np.uint8)])
TRANSPARENT[5, 5, 3] = 254

REFUSED = {
    "nothing": (b"", PatchErrorCode.EMPTY),
    "text": (b"hello, this is not an image", PatchErrorCode.NOT_AN_IMAGE),
    "html": (b"<html><body>404</body></html>", PatchErrorCode.NOT_AN_IMAGE),
    "zeros": (bytes(5000), PatchErrorCode.NOT_AN_IMAGE),
    "gif": (encode(PIXELS, "GIF"), PatchErrorCode.FORMAT_NOT_ALLOWED),
    "bmp": (encode(PIXELS, "BMP"), PatchErrorCode.FORMAT_NOT_ALLOWED),
    "webp with a transparent pixel": (encode(TRANSPARENT, "WEBP", lossless=True, exact=True), PatchErrorCode.WRONG_MODE),
    "animated webp": (encode(PIXELS, "WEBP", save_all=True, append_images=[Image.fromarray(255 - PIXELS)]), PatchErrorCode.SEVERAL_PAGES),
    "webp of 95": (encode(PIXELS[:, :95], "WEBP"), PatchErrorCode.WRONG_SIZE),
    "webp of an unknown kind": (b"RIFF\x20\0\0\0WEBPVP8Q" + bytes(40), PatchErrorCode.TRUNCATED),
    "wave": (b"RIFF\x20\0\0\0WAVEfmt " + bytes(40), PatchErrorCode.NOT_AN_IMAGE),
    "pdf": (b"%PDF-1.7\n", PatchErrorCode.FORMAT_NOT_ALLOWED),
    "big tiff": (encode(PIXELS, big_tiff=True), PatchErrorCode.FORMAT_NOT_ALLOWED),
    "95 wide": (encode(PIXELS[:, :95]), PatchErrorCode.WRONG_SIZE),
    "95 high": (encode(PIXELS[:95], "PNG"), PatchErrorCode.WRONG_SIZE),
    "192": (encode(np.tile(PIXELS, (2, 2, 1)), "JPEG"), PatchErrorCode.WRONG_SIZE),
    "16 bit rgb tif": (rgb_tiff(RGB16), PatchErrorCode.WRONG_MODE),
    "16 bit rgb png": (png(96, 96, 16, 2, RGB16.astype(">u2")), PatchErrorCode.WRONG_MODE),
    "16 bit opaque rgba png": (
        png(96, 96, 16, 6, np.dstack([RGB16, np.full((96, 96), 65535)]).astype(">u2")),
        PatchErrorCode.WRONG_MODE,
    ),
    "16 bit grey tif": (encode(RGB16[..., 0].copy()), PatchErrorCode.WRONG_MODE),
    "16 bit grey png": (encode(RGB16[..., 0].copy(), "PNG"), PatchErrorCode.WRONG_MODE),
    "float tif": (encode(PIXELS[..., 0].astype(np.float32)), PatchErrorCode.WRONG_MODE),
    "bilevel": (encode(Image.fromarray(PIXELS).convert("1")), PatchErrorCode.WRONG_MODE),
    "cmyk tif": (encode(Image.fromarray(PIXELS).convert("CMYK")), PatchErrorCode.WRONG_MODE),
    "cmyk jpeg": (encode(Image.fromarray(PIXELS).convert("CMYK"), "JPEG"), PatchErrorCode.WRONG_MODE),
    "one pixel nearly opaque": (encode(TRANSPARENT, "PNG"), PatchErrorCode.WRONG_MODE),
    "grey with alpha": (encode(Image.fromarray(PIXELS).convert("LA"), "PNG"), PatchErrorCode.WRONG_MODE),
    "transparent colour": (png(96, 96, 8, 2, PIXELS, (b"tRNS", b"\0\1\0\2\0\3")), PatchErrorCode.WRONG_MODE),
    "transparent grey": (png(96, 96, 8, 0, PIXELS[..., 0], (b"tRNS", b"\0\1")), PatchErrorCode.WRONG_MODE),
    "transparent palette": (encode(Image.fromarray(PIXELS).quantize(9), "PNG", transparency=0), PatchErrorCode.WRONG_MODE),
    "two pages": (encode(PIXELS, save_all=True, append_images=[Image.fromarray(PIXELS)]), PatchErrorCode.SEVERAL_PAGES),
    "animated png": (encode(PIXELS, "PNG", save_all=True, append_images=[Image.fromarray(255 - PIXELS)]), PatchErrorCode.SEVERAL_PAGES),
    "two jpegs in one": (encode(PIXELS, "MPO", save_all=True, append_images=[Image.fromarray(PIXELS)]), PatchErrorCode.SEVERAL_PAGES),
    "signature only": (b"II*\0", PatchErrorCode.TRUNCATED),
    "png signature only": (b"\x89PNG\r\n\x1a\n", PatchErrorCode.TRUNCATED),
    "jpeg signature only": (b"\xff\xd8\xff", PatchErrorCode.TRUNCATED),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_one_patch_of_8_bit_rgb_is_refused_with_its_reason(name: str) -> None:
    data, code = REFUSED[name]
    assert refusal(data) is code


@pytest.mark.parametrize(("height", "width"), [(7, 96), (96, 7), (96, 1025), (1025, 96)])
def test_sizes_have_bounds_even_where_any_is_taken(height: int, width: int) -> None:
    assert refusal(encode(np.zeros((height, width, 3), np.uint8)), None) is PatchErrorCode.WRONG_SIZE


CUT = {
    "tif": encode(PIXELS),
    "tif lzw": encode(SMOOTH, compression="tiff_lzw"),
    "tif deflate": encode(PIXELS, compression="tiff_adobe_deflate"),
    "png": encode(PIXELS, "PNG"),
    "smooth png": encode(SMOOTH, "PNG"),
    "jpeg": encode(PIXELS, "JPEG"),
    "progressive jpeg": encode(PIXELS, "JPEG", progressive=True),
    "lossless webp": encode(PIXELS, "WEBP", lossless=True),
    "lossy webp": encode(SMOOTH, "WEBP", quality=90),
    "extended webp": encode(SMOOTH, "WEBP", quality=90, exif=b"Exif\0\0II*\0\x08\0\0\0\0\0"),
}


@pytest.mark.parametrize("name", CUT)
def test_a_file_cut_anywhere_never_gives_a_part_of_the_image(name: str) -> None:
    data = CUT[name]
    whole = decode_patch(data, size_px=96)
    codes = []
    for end in {*range(1, len(data), 512), *range(1, 64), *range(len(data) - 32, len(data))}:
        try:
            # The last bytes may lie behind the last pixel; then nothing is missing.
            np.testing.assert_array_equal(decode_patch(data[:end], size_px=96), whole)
        except PatchError as error:
            codes.append(error.code)
    assert set(codes) == {PatchErrorCode.TRUNCATED, PatchErrorCode.NOT_AN_IMAGE}
    assert len(codes) >= len(range(1, len(data), 512)) + 60


def test_a_tif_without_its_last_pixel_is_refused() -> None:
    data = rgb_tiff(PIXELS)
    assert data.endswith(PIXELS.tobytes())
    assert refusal(data[:-1]) is PatchErrorCode.TRUNCATED


@pytest.mark.parametrize("name", CUT)
def test_flipped_bits_end_in_a_patch_error_or_an_image(name: str) -> None:
    generator = np.random.default_rng(len(name))
    data = CUT[name]
    refused = 0
    # Headers decide most, so half of the flips go there.
    for place in [*generator.integers(0, len(data), 150), *generator.integers(0, min(len(data), 400), 150)]:
        damaged = bytearray(data)
        damaged[place] ^= 1 << generator.integers(8)
        try:
            decoded = decode_patch(bytes(damaged), size_px=96)
        except PatchError:
            refused += 1
        else:
            assert decoded.shape == (96, 96, 3)
            assert decoded.dtype == np.uint8
    assert refused > 10


def test_a_damaged_png_is_not_taken_for_a_good_one() -> None:
    data = bytearray(encode(SMOOTH, "PNG"))
    data[len(data) // 2] ^= 0x10
    assert refusal(bytes(data)) is PatchErrorCode.TRUNCATED


# In a process of its own, where hardly more memory can be had than it has.
DECODE_WITH_LITTLE_MEMORY = """
import resource, sys, warnings
from pathlib import Path
from sentinode.errors import PatchError
from sentinode.images import decode_patch
warnings.simplefilter("ignore")
good, *hostile = sorted(Path(sys.argv[1]).iterdir())
decode_patch(good.read_bytes(), size_px=96)
in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + 32_000_000, resource.RLIM_INFINITY))
for path in hostile:
    for size_px in (96, None):
        try:
            decode_patch(path.read_bytes(), size_px=size_px)
            print(path.name, size_px, "decoded")
        except PatchError as error:
            print(path.name, size_px, error.code)
"""


def test_small_files_that_unpack_to_huge_ones_are_refused_without_allocating(tmp_path: Path) -> None:
    entries = [(256, LONG, [50_000]), (257, LONG, [50_000]), (258, SHORT, [8]), (262, SHORT, [1]), (273, LONG, [-1]), (279, LONG, [100])]
    jpeg = bytearray(encode(SMOOTH, "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 65_500, 65_500)
    row = np.zeros((1, 3), np.uint8)
    expected = {
        "png": (png(50_000, 50_000, 8, 2, row), "decompression_bomb"),
        "png below Pillow's own limit": (png(9_000, 9_000, 8, 2, row), "decompression_bomb"),
        "png of a size that somebody may have": (png(4_000, 4_000, 8, 2, row), "wrong_size"),
        "tif": (tiff(entries, bytes(100)), "decompression_bomb"),
        "jpeg": (bytes(jpeg), "decompression_bomb"),
        # 16,384 x 16,384, of which a decoder would take two canvases, 2 GB, before it looks at what is in them.
        "webp extended": (b"RIFF\x80\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xff\x3f\0" * 2 + bytes(90), "decompression_bomb"),
        "webp lossless": (b"RIFF\x80\0\0\0WEBPVP8L\x20\0\0\0\x2f" + b"\xff\xff\xff\x0f" + bytes(90), "decompression_bomb"),
        "webp lossy": (b"RIFF\x80\0\0\0WEBPVP8 \x40\0\0\0\x30\x01\0\x9d\x01\x2a" + b"\xff\x3f" * 2 + bytes(90), "decompression_bomb"),
        "tile": (tiled_grey_tiff(96, 8_192), "decompression_bomb"),
        # Of a tag that stands twice libtiff believes the first, Pillow the last.
        "tile hidden by a second tag": (tiled_grey_tiff(96, 8_192, twice=True), "truncated"),
    }
    (tmp_path / "0").write_bytes(encode(PIXELS))
    for name, (data, _) in expected.items():
        assert len(data) < 400_000
        (tmp_path / name).write_bytes(data)
    run = subprocess.run([sys.executable, "-c", DECODE_WITH_LITTLE_MEMORY, str(tmp_path)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [f"{name} {size} {expected[name][1]}" for name in sorted(expected) for size in (96, None)]


def test_a_tile_of_usual_size_is_read() -> None:
    np.testing.assert_array_equal(decode_patch(tiled_grey_tiff(96, 256), size_px=96), np.full((96, 96, 3), 128, np.uint8))


def test_ten_thousand_tiny_pages_are_refused_without_reading_them() -> None:
    entries = [(256, SHORT, [96]), (257, SHORT, [96]), (258, SHORT, [8]), (262, SHORT, [1]), (273, LONG, [-1]), (279, LONG, [96 * 96])]
    data = tiff(entries, bytes(96 * 96), more_pages=10_000)
    started = time.process_time()
    assert refusal(data) is PatchErrorCode.SEVERAL_PAGES
    # Reading them all takes seconds.
    assert time.process_time() - started < 0.5


def test_decoding_does_not_depend_on_what_was_decoded_before() -> None:
    def outcome(data: bytes) -> UInt8Array | PatchErrorCode:
        try:
            return decode_patch(data, size_px=96)
        except PatchError as error:
            return error.code

    first = outcome(GOOD["png"])
    for data, _ in REFUSED.values():
        outcome(data)
    np.testing.assert_array_equal(outcome(GOOD["png"]), first)


def kaggle_like_tiff(pixels: UInt8Array) -> bytes:
    """What tifffile wrote for the Kaggle set: description and software before one uncompressed strip."""
    side = len(pixels)
    text = [*b"{}  "]
    entries = [(254, LONG, [0]), (256, LONG, [side]), (257, LONG, [side]), (258, SHORT, [8, 8, 8]), (259, SHORT, [1]), (262, SHORT, [2])]
    more = [(270, SHORT, text), (273, LONG, [-1]), (277, SHORT, [3]), (278, LONG, [side]), (279, LONG, [pixels.size]), (284, SHORT, [1])]
    return tiff([*entries, *more, (339, SHORT, [1])], pixels.tobytes())


def by_pillow(data: bytes) -> UInt8Array | PatchErrorCode:
    """The answer without the short way for plain files."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("sentinode.images.plain_tiff", lambda data, size_px: None)
        return answer(data)


def answer(data: bytes) -> UInt8Array | PatchErrorCode:
    try:
        return decode_patch(data, size_px=96)
    except PatchError as error:
        return error.code


@pytest.mark.parametrize("make", [rgb_tiff, kaggle_like_tiff, encode])
def test_plain_tiffs_take_the_short_way_and_give_what_pillow_gives(make: Callable[[UInt8Array], bytes]) -> None:
    pixels = random_patches(1)[0]
    data = make(pixels)
    short = plain_tiff(data, 96)
    assert short is not None
    assert np.array_equal(short, pixels)
    assert np.array_equal(by_pillow(data), pixels)


@pytest.mark.parametrize("make", [rgb_tiff, kaggle_like_tiff])
def test_the_short_way_never_gives_other_pixels_than_pillow_whatever_byte_of_the_header_is_changed(make: Callable[[UInt8Array], bytes]) -> None:
    """Where both give pixels they are the same ones; where the short way gives any, Pillow knows no better."""
    whole = make(random_patches(1)[0])
    taken = 0
    for place in range(len(whole) - 96 * 96 * 3):
        for change in (1, 2, 4, 8, 16, 32, 64, 128, 255):
            data = whole[:place] + bytes([whole[place] ^ change]) + whole[place + 1 :]
            short = plain_tiff(data, 96)
            if short is None:
                continue
            taken += 1
            slow = by_pillow(data)
            assert isinstance(slow, np.ndarray), (place, change, slow)
            assert np.array_equal(short, slow), (place, change)
    assert taken  # a changed description, for instance, is no reason


@pytest.mark.parametrize("keep", [0, 3, 8, 9, 10, 100, 200, -1, -27648])
def test_a_plain_tiff_that_is_cut_off_is_not_plain(keep: int) -> None:
    assert plain_tiff(kaggle_like_tiff(random_patches(1)[0])[:keep], 96) is None
