"""Small sources, and spools."""

import csv
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep.spool import Spool
from sentinode.images import UInt8Array


def noise(rng: np.random.Generator, side: int = 96) -> UInt8Array:
    """A patch that is like no other, neither blank nor pale."""
    return rng.integers(0, 256, (side, side, 3), dtype=np.uint8)


def sha1(pixels: UInt8Array) -> str:
    return hashlib.sha1(np.ascontiguousarray(pixels).tobytes()).hexdigest()


def write_source(folder: Path, patches: dict[str, UInt8Array], labels: dict[str, int] | None = None) -> Path:
    """Write `train/<id>.tif` and `train_labels.csv`; labels alternate where none are given."""
    (folder / "train").mkdir(parents=True)
    lines = ["id,label"]
    for number, (id_, pixels) in enumerate(patches.items()):
        Image.fromarray(pixels).save(folder / "train" / f"{id_}.tif")
        lines.append(f"{id_},{labels[id_] if labels else number % 2}")
    (folder / "train_labels.csv").write_text("\n".join(lines) + "\n")
    return folder


def make_spool(folder: Path, images: UInt8Array, block_rows: int = 7) -> tuple[Spool, list[UInt8Array]]:
    """Write images as a spool of several blocks; returns it and the images of each block."""
    blocks = [images[start : start + block_rows] for start in range(0, len(images), block_rows)]
    files = []
    for number, block in enumerate(blocks):
        files.append(folder / f"{number}.pixels")
        block.tofile(files[-1])
    return Spool(tuple(files), tuple(map(len, blocks)), images.shape[1]), blocks


def write_table(folder: Path, rows: list[dict[str, Any]], images: list[UInt8Array]) -> Path:
    """Write `images` as PNG and a table that names them."""
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:03d}.png")
    with (folder / "patches.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["path", "label", *rows[0]])
        writer.writeheader()
        writer.writerows({"path": f"{number:03d}.png", "label": number % 2, **row} for number, row in enumerate(rows))
    return folder / "patches.csv"
