"""What the tests of all layouts ask of a source."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.sources.base import ENTRY_SCHEMA, Source, Unread
from data_prep.sources.detect import open_source, reader_of
from sentinode.config import PrepareConfig
from sentinode.images import UInt8Array, decode_patch


def opened(where: Path | str, *, labels: Path | str | None = None, slides: Path | str | None = None, **config: object) -> Source:
    """Open a source as prepare does; what comes back keeps the promises of the interface."""
    source = open_source(
        PrepareConfig(**config), str(where), labels=None if labels is None else str(labels), slides=None if slides is None else str(slides)
    )
    assert source.entries.schema.equals(ENTRY_SCHEMA)
    ids = column(source, "id")
    assert len(set(ids)) == len(ids)
    return source


def column(source: Source, name: str) -> list[object]:
    values: list[object] = source.entries[name].to_pylist()
    return values


def rows(source: Source, *names: str) -> list[tuple[object, ...]]:
    """Entries as tuples of the named columns."""
    return list(zip(*(column(source, name) for name in names), strict=True))


def refused(source: Source) -> list[tuple[str, str | None]]:
    """Reason and id of each refused input, sorted."""
    return sorted((str(reject.reason), reject.id) for reject in source.rejects)


def pixels(source: Source) -> dict[str, UInt8Array | Unread]:
    """What the source's reader gives for each id, decoded."""
    found: dict[str, UInt8Array | Unread] = {}
    reader = reader_of(json.loads(json.dumps(source.reader)))
    for id_, content in zip(column(source, "id"), reader.read(source.entries), strict=True):
        found[str(id_)] = decode_patch(content, size_px=None) if isinstance(content, bytes) else content
    return found


def write_image(path: Path, image: UInt8Array) -> Path:
    """Write an image in the format that its suffix names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return path


def write_noise(path: Path, seed: int = 0) -> UInt8Array:
    """Write a patch of noise; returns its pixels."""
    image = np.random.default_rng(seed).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    write_image(path, image)
    return image


def write_kaggle(folder: Path, ids: list[str]) -> dict[str, UInt8Array]:
    """Write `train/<id>.tif` and `train_labels.csv` with alternating labels; returns the pixels."""
    images = {id_: write_noise(folder / "train" / f"{id_}.tif", seed) for seed, id_ in enumerate(ids)}
    (folder / "train_labels.csv").write_text("id,label\n" + "".join(f"{id_},{number % 2}\n" for number, id_ in enumerate(ids)))
    return images
