import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.decode import decode_block, describe, is_block_complete, read_blocks
from data_prep.rejects import Reject, rejects_table
from data_prep.sources.base import Source
from data_prep.sources.detect import open_source, reader_of
from data_prep.spool import metadata_path, pixels_path
from sentinode.config import PrepareConfig
from sentinode.dataset import REJECTED_SCHEMA
from sentinode.tissue import is_pale, tissue_fraction
from tests.data_prep.helpers import noise, sha1, write_source


def save(folder: Path, name: str, image: np.ndarray, **options: object) -> None:
    Image.fromarray(image).save(folder / "train" / f"{name}.tif", **options)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """One file for each thing that can be wrong with an image, and one good one."""
    rng = np.random.default_rng(0)
    names = ["black", "empty", "folder", "gone", "good", "pages", "pale", "size", "text", "truncated", "white", "wide"]
    folder = write_source(tmp_path / "source", {name: noise(rng) for name in names})
    train = folder / "train"
    save(folder, "black", np.full((96, 96, 3), 9, np.uint8))
    save(folder, "white", np.full((96, 96, 3), 250, np.uint8))
    save(folder, "pale", np.repeat(rng.integers(100, 200, (96, 96, 1), dtype=np.uint8), 3, axis=2))
    save(folder, "size", noise(rng, 95))
    Image.fromarray(rng.integers(0, 60000, (96, 96), dtype=np.uint16)).save(train / "wide.tif")
    Image.fromarray(noise(rng)).save(train / "pages.tif", save_all=True, append_images=[Image.fromarray(noise(rng))])
    (train / "empty.tif").write_bytes(b"")
    (train / "text.tif").write_text("not an image")
    (train / "truncated.tif").write_bytes((train / "good.tif").read_bytes()[:5000])
    (train / "gone.tif").unlink()
    (train / "gone.tif").symlink_to(train / "nowhere")
    return folder


def decode(folder: Path, work: Path, *, with_anchors: bool = False) -> Source:
    work.mkdir(exist_ok=True)
    source = open_source(PrepareConfig(), str(folder))
    decode_block(0, source.entries, reader_of(source.reader), work, 96, with_anchors=with_anchors)
    return source


def is_complete(work: Path, source: Source) -> bool:
    return is_block_complete(work, 0, 96, len(source.entries), with_anchors=True)


def test_every_defect_is_refused_with_its_reason(source: Path, tmp_path: Path) -> None:
    decode(source, tmp_path / "work")
    _, patches, rejects = read_blocks(tmp_path / "work", 1, 96)
    assert {reject.id: str(reject.reason) for reject in rejects} == {
        "black": "blank",
        "empty": "empty",
        "gone": "unreadable",
        "pages": "several_pages",
        "size": "wrong_size",
        "text": "not_an_image",
        "truncated": "truncated",
        "white": "blank",
        "wide": "wrong_mode",
    } | ({"folder": "unreadable"} if not (source / "train" / "folder.tif").is_file() else {})
    assert {found["id"]: found["pale"] for found in patches.to_pylist()} == {"folder": False, "good": False, "pale": True}


def test_what_is_stored_is_what_was_in_the_files(source: Path, tmp_path: Path) -> None:
    decode(source, tmp_path / "work")
    spool, patches, _ = read_blocks(tmp_path / "work", 1, 96)
    for found in patches.to_pylist():
        with Image.open(source / found["path"]) as image:
            expected = np.asarray(image)
        assert np.array_equal(spool.take(np.asarray([found["position"]]))[0], expected)
        assert found["pixel_sha1"] == sha1(expected)
        assert found["sums"] == expected.reshape(-1, 3).sum(axis=0, dtype=np.int64).tolist()
        assert found["sums_of_squares"] == (expected.reshape(-1, 3).astype(np.int64) ** 2).sum(axis=0).tolist()
    assert {found["id"]: found["tissue_fraction"] for found in patches.to_pylist()}["pale"] == 0


def test_figures_are_those_of_the_readable_definitions_whatever_the_batch() -> None:
    rng = np.random.default_rng(3)
    images = rng.integers(0, 256, (70, 40, 40, 3), dtype=np.uint8)
    images[::3] = 200 + images[::3] // 16
    images[5], images[6], images[7] = 3, 255, 128
    figures = describe(images)
    assert np.array_equal(figures.tissue_fraction, tissue_fraction(images))
    assert np.array_equal(figures.pale, is_pale(images))
    assert figures.blank.tolist() == [image.max() <= 10 or image.min() >= 245 for image in images]
    assert figures.blank.tolist()[5:8] == [True, True, False]
    assert len(set(figures.checksum.tolist())) == 70


@pytest.mark.parametrize("damage", ["short pixels", "no metadata", "broken metadata", "no anchors", "broken anchors"])
def test_a_damaged_block_is_decoded_again_and_a_whole_one_is_not(source: Path, tmp_path: Path, damage: str) -> None:
    for path in ("gone", "folder"):  # what cannot be read is always tried again
        (source / "train" / f"{path}.tif").unlink()
        (source / "train" / f"{path}.tif").write_bytes((source / "train" / "good.tif").read_bytes())
    work = tmp_path / "work"
    listed = decode(source, work, with_anchors=True)
    whole = {path.name: path.read_bytes() for path in work.iterdir()}
    assert is_complete(work, listed)
    kind, what = damage.split()
    path = next(path for path in work.iterdir() if what in path.name) if what != "metadata" else metadata_path(work, 0)
    if kind == "no":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size - 10)
    assert not is_complete(work, listed)
    decode(source, work, with_anchors=True)
    assert {path.name: path.read_bytes() for path in work.iterdir()} == whole


def test_a_block_with_a_file_that_could_not_be_read_is_tried_again(source: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    listed = decode(source, work, with_anchors=True)
    assert not is_complete(work, listed)
    (source / "train" / "gone.tif").unlink()
    (source / "train" / "gone.tif").write_bytes((source / "train" / "good.tif").read_bytes())
    decode_block(0, listed.entries, reader_of(listed.reader), work, 96, with_anchors=True)
    assert "gone" in read_blocks(work, 1, 96)[1]["id"].to_pylist()


def test_a_block_of_nothing_but_refused_files_is_complete(tmp_path: Path) -> None:
    work = tmp_path / "work"
    listed = decode(write_source(tmp_path / "source", {"black": np.zeros((96, 96, 3), np.uint8)}), work, with_anchors=True)
    assert is_complete(work, listed)
    assert pixels_path(work, 0).stat().st_size == 0
    spool, patches, rejects = read_blocks(work, 1, 96)
    assert (len(spool), len(patches), len(rejects)) == (0, 0, 1)


def test_the_list_of_refused_inputs_is_sorted_and_has_the_agreed_schema(tmp_path: Path) -> None:
    rejects = [Reject("missing", "b", None, "x"), Reject("missing", "a", None, "x"), Reject("blank", None, "train/\udcff.tif", "x")]
    table = rejects_table(rejects)
    assert table.schema.equals(REJECTED_SCHEMA)
    assert table["id"].to_pylist() == [None, "a", "b"]
    assert table["path"][0].as_py() == "train/?.tif"
