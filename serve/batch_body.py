"""Bodies of `/predict/batch`: many files in a form, or one array of pixels, which is read piece by piece so that memory stays bounded."""

import ast
import struct
from collections.abc import AsyncIterator

import numpy as np

from sentinode.images import UInt8Array
from serve.problems import ProblemError

NPY_TYPE = "application/x-npy"
ARRAY_TYPES = ("application/octet-stream", NPY_TYPE)
NPY_MAGIC = b"\x93NUMPY"
_LARGEST_NPY_HEADER = 4096


async def pieces_of_array(
    body: AsyncIterator[bytes], side_px: int, patches_per_piece: int, max_patches: int, *, must_be_npy: bool = False
) -> AsyncIterator[UInt8Array]:
    """Yield the patches of an array body while it comes.

    Parameters
    ----------
    body : async iterator of bytes
        The pixels of n patches one after the other, uint8, (n, side_px, side_px, 3), RGB, C order; or the same as an .npy file (NumPy format 1 to 3).
    side_px : int
    patches_per_piece : int
        So many patches are yielded at a time, and no more bytes than that and one chunk of the body are held.
    max_patches : int
    must_be_npy : bool
        Whether bare pixels are refused; else the first bytes tell which of both it is.

    Yields
    ------
    ndarray of uint8, shape (m, side_px, side_px, 3), 1 <= m <= patches_per_piece

    Raises
    ------
    ProblemError
        The body is no such array, is empty or holds more than `max_patches`.
    """
    patch_bytes = side_px * side_px * 3
    held = bytearray()
    header_read, promised, seen = False, None, 0

    def take(count: int) -> UInt8Array:
        nonlocal seen
        seen += count
        if seen > max_patches:
            raise ProblemError("too_many_patches", f"a request may hold {max_patches} patches at most")
        piece = np.frombuffer(bytes(held[: count * patch_bytes]), np.uint8).reshape(count, side_px, side_px, 3)
        del held[: count * patch_bytes]
        return piece

    async for chunk in body:
        held += chunk
        if not header_read:
            header = _npy_header(held)
            if header is None:
                continue
            header_read = True
            if must_be_npy and not header:
                raise ProblemError("wrong_array", "the body is no .npy file; bare pixels come as application/octet-stream")
            if header:
                length, shape = header
                promised = _require_patches(shape, side_px)
                del held[:length]
        while len(held) >= patches_per_piece * patch_bytes:
            yield take(patches_per_piece)
    rest, over = divmod(len(held), patch_bytes)
    if over or not header_read:
        if not held and not seen:
            raise ProblemError("empty", "the body is empty")
        raise ProblemError("wrong_length", f"the body is not a whole number of patches of {patch_bytes} bytes, uint8 ({side_px}, {side_px}, 3)")
    if promised is not None and promised != seen + rest:
        raise ProblemError("wrong_length", f"the array promises {promised} patches and holds {seen + rest}")
    if rest:
        yield take(rest)
    elif not seen:
        raise ProblemError("empty", "the array holds no patches")


def _require_patches(shape: tuple[int, ...], side_px: int) -> int:
    if len(shape) != 4 or shape[1:] != (side_px, side_px, 3):
        raise ProblemError("wrong_array", f"the array has shape {shape}; expected (n, {side_px}, {side_px}, 3)")
    return shape[0]


def _npy_header(start: bytes | bytearray) -> tuple[int, tuple[int, ...]] | tuple[()] | None:
    """Return length and shape that the header of an .npy file states, () where this is none, None where more bytes are needed.

    Read here because NumPy's reader wants the whole file; the format is numpy.lib.format's, version 1 to 3.
    """
    if not NPY_MAGIC.startswith(bytes(start[: len(NPY_MAGIC)])):
        return ()
    if len(start) < 12:
        return None
    wide = start[6] >= 2
    (length,) = struct.unpack_from("<I" if wide else "<H", start, 8)
    begin = 12 if wide else 10
    if start[6] not in (1, 2, 3) or length > _LARGEST_NPY_HEADER:
        raise ProblemError("wrong_array", "the .npy header cannot be read")
    if len(start) < begin + length:
        return None
    try:
        stated = ast.literal_eval(bytes(start[begin : begin + length]).decode("utf-8" if start[6] == 3 else "latin-1").strip())
        shape, kind, fortran = stated["shape"], stated["descr"], stated["fortran_order"]
    except (ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError) as error:
        raise ProblemError("wrong_array", "the .npy header cannot be read") from error
    if kind not in ("|u1", "u1", "<u1", ">u1"):
        raise ProblemError("wrong_array", "the array is not uint8")
    if fortran is not False:
        raise ProblemError("wrong_array", "the array is not in C order; numpy.ascontiguousarray makes it so")
    if not isinstance(shape, tuple) or not all(type(size) is int and 0 <= size < 1 << 32 for size in shape):
        raise ProblemError("wrong_array", "the .npy header cannot be read")
    return begin + length, shape
