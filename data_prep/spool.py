"""Decoded pixels on disk between the stages: one raw file of uint8 per decode block, read through memory maps."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sentinode.images import UInt8Array
from sentinode.storage import temporary_name

IntArray = npt.NDArray[np.int64]


def pixels_path(work: Path, block: int) -> Path:
    """Raw pixels of a block's decoded patches: uint8, RGB, HWC, one patch after the other."""
    return work / f"block-{block:05d}.pixels"


def anchors_path(work: Path, block: int) -> Path:
    """Overlap anchors of a block (`overlap.anchors`), as .npy."""
    return work / f"block-{block:05d}.anchors.npy"


def metadata_path(work: Path, block: int) -> Path:
    """Parquet file with one row per input of a block (`decode.DECODED_SCHEMA`); written last, so its presence says that the block is complete."""
    return work / f"block-{block:05d}.parquet"


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, then rename it: a file under its own name is whole."""
    temporary = temporary_name(path)
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_array(path: Path, array: npt.NDArray[np.uint64]) -> None:
    """Write an array as .npy, whole or not at all."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
            # Not np.save: its error on a full disk ("300 requested and 62 written") does not say that the disk is full.
            file.write(np.ascontiguousarray(array).data)

    write_whole(path, write)


def checksums(images: UInt8Array) -> npt.NDArray[np.uint64]:
    """Return a checksum of each patch, uint8 (n, side, side, 3) -> uint64 (n,): the sum of its bytes, eight at a time, modulo 2^64.

    It tells a patch from a page of zeros and from any other patch that may lie in its place, for a fifth of what a SHA-1 costs.
    """
    flat = images.reshape(len(images), images[0].size if len(images) else 0)
    whole = flat.shape[1] // 8 * 8
    sums: npt.NDArray[np.uint64] = np.ascontiguousarray(flat[:, :whole]).view(np.uint64).sum(axis=1, dtype=np.uint64)
    sums += flat[:, whole:].sum(axis=1, dtype=np.uint64)
    return sums


@dataclass(frozen=True)
class Spool:
    """All decoded patches as one sequence, blocks one after the other.

    Attributes
    ----------
    files : tuple of Path
        One raw file per block.
    rows : tuple of int
        Patches in each of them.
    size_px : int
        Side of the patches.
    """

    files: tuple[Path, ...]
    rows: tuple[int, ...]
    size_px: int
    _maps: dict[int, UInt8Array] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return sum(self.rows)

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` makes an equal spool of."""
        return {"files": [str(path) for path in self.files], "rows": list(self.rows), "size_px": self.size_px}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Spool":
        """Make a spool of what `to_json` returned."""
        return cls(tuple(map(Path, content["files"])), tuple(content["rows"]), content["size_px"])

    @property
    def starts(self) -> IntArray:
        """Position of each block's first patch, int64 (blocks + 1,); the last entry is the number of patches."""
        return np.concatenate([[0], np.cumsum(self.rows, dtype=np.int64)]).astype(np.int64)

    def block(self, index: int) -> UInt8Array:
        """Return one block as a read-only map, uint8 (rows, size_px, size_px, 3), RGB."""
        if index not in self._maps:
            shape = (self.rows[index], self.size_px, self.size_px, 3)
            self._maps[index] = np.memmap(self.files[index], np.uint8, "r", shape=shape) if self.rows[index] else np.empty(shape, np.uint8)
        return self._maps[index]

    def take(self, positions: IntArray) -> UInt8Array:
        """Return copies of the patches at `positions`, int64 (n,), in that order: uint8 (n, size_px, size_px, 3), RGB."""
        result = np.empty((len(positions), self.size_px, self.size_px, 3), np.uint8)
        for index, chosen, local in self._by_block(positions):
            result[chosen] = self.block(index)[local]
        return result

    def pixels(self, positions: IntArray, y: IntArray, x: IntArray) -> UInt8Array:
        """Return single pixels, uint8 (n, 3), RGB: of patch `positions[k]` the one at row `y[k]`, column `x[k]`."""
        result = np.empty((len(positions), 3), np.uint8)
        for index, chosen, local in self._by_block(positions):
            result[chosen] = self.block(index)[local, y[chosen], x[chosen]]
        return result

    def _by_block(self, positions: IntArray) -> Sequence[tuple[int, IntArray, IntArray]]:
        starts = self.starts
        order = np.argsort(positions, kind="stable")
        bounds = np.searchsorted(positions[order], starts)
        parts = []
        for index in range(len(self.rows)):
            chosen = order[bounds[index] : bounds[index + 1]]
            if len(chosen):
                parts.append((index, chosen, positions[chosen] - starts[index]))
        return parts
