import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep.decode import decode_block, is_block_complete, read_blocks
from data_prep.labels import Entry, read_source
from data_prep.rejects import Reject, check_all, count_reasons, write_rejects
from data_prep.spool import metadata_path, pixels_path
from sentinode.dataset import REJECTED_SCHEMA
from tests.data_prep.helpers import noise, patch, sha1, write_source


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


def decode(source: Path, work: Path, *, with_anchors: bool = False) -> tuple[Entry, ...]:
    work.mkdir(exist_ok=True)
    entries = read_source(source).entries
    decode_block(0, entries, source, work, 96, with_anchors=with_anchors)
    return entries


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
    assert {found.id: found.flags for found in patches} == {"folder": (), "good": (), "pale": ("pale",)}


def test_what_is_stored_is_what_was_in_the_files(source: Path, tmp_path: Path) -> None:
    decode(source, tmp_path / "work")
    spool, patches, _ = read_blocks(tmp_path / "work", 1, 96)
    for found in patches:
        with Image.open(source / found.path) as image:
            expected = np.asarray(image)
        assert np.array_equal(spool.take(np.asarray([found.position]))[0], expected)
        assert found.pixel_sha1 == sha1(expected)
        assert found.sums == tuple(expected.reshape(-1, 3).sum(axis=0, dtype=np.int64))
        assert found.sums_of_squares == tuple((expected.reshape(-1, 3).astype(np.int64) ** 2).sum(axis=0))
    assert {found.id: found.tissue_fraction for found in patches}["pale"] == 0


@pytest.mark.parametrize("damage", ["short pixels", "no metadata", "broken metadata", "no anchors", "broken anchors"])
def test_a_damaged_block_is_decoded_again_and_a_whole_one_is_not(source: Path, tmp_path: Path, damage: str) -> None:
    work = tmp_path / "work"
    entries = decode(source, work, with_anchors=True)
    whole = {path.name: path.read_bytes() for path in work.iterdir()}
    assert not decode_block(0, entries, source, work, 96, with_anchors=True)
    kind, what = damage.split()
    path = next(path for path in work.iterdir() if what in path.name) if what != "metadata" else metadata_path(work, 0)
    if kind == "no":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size - 10)
    assert not is_block_complete(work, 0, 96, len(entries), with_anchors=True)
    assert decode_block(0, entries, source, work, 96, with_anchors=True)
    assert {path.name: path.read_bytes() for path in work.iterdir()} == whole


def test_a_block_of_nothing_but_refused_files_is_complete(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", {"black": np.zeros((96, 96, 3), np.uint8)})
    entries = decode(source, tmp_path / "work", with_anchors=True)
    assert is_block_complete(tmp_path / "work", 0, 96, len(entries), with_anchors=True)
    assert pixels_path(tmp_path / "work", 0).stat().st_size == 0
    spool, patches, rejects = read_blocks(tmp_path / "work", 1, 96)
    assert (len(spool), patches, len(rejects)) == (0, [], 1)


def test_ids_are_compared_only_where_most_are_the_sha1_of_the_pixels() -> None:
    hashed = [patch(f"{k:040x}", 0, position=k) for k in range(3)]
    named = [patch(f"name{k}", 0, position=9 + k, pixel_sha1=f"{9 + k:040x}") for k in range(2)]
    accepted, rejects = check_all([*hashed, *named], "auto")
    assert [found.id for found in accepted] == [found.id for found in hashed]
    assert count_reasons(rejects) == {"id_mismatch": 2}
    assert check_all([*hashed[:2], *named], "auto")[1] == []
    assert check_all([*hashed, *named], "never")[1] == []
    assert count_reasons(check_all([*hashed[:1], *named], "always")[1]) == {"id_mismatch": 2}


def test_of_equal_patches_the_smallest_id_stays_and_contradictions_all_go() -> None:
    same = [patch(id_, 1, pixel_sha1="p") for id_ in ("c", "a", "b")]
    contradicting = [patch("x", 0, pixel_sha1="q"), patch("z", 1, pixel_sha1="q"), patch("y", 0, pixel_sha1="q")]
    accepted, rejects = check_all([*same, *contradicting, patch("alone", 0)], "auto")
    assert [found.id for found in accepted] == ["a", "alone"]
    found = {reject.id: (str(reject.reason), reject.detail) for reject in rejects}
    assert found["b"] == found["c"] == ("duplicate_pixels", "same pixels as a, which is kept")
    assert {id_: reason for id_, (reason, _) in found.items() if id_ in "xyz"} == dict.fromkeys("xyz", "label_conflict")
    assert "x has the same pixels and label 0" in found["z"][1]
    assert "z has the same pixels and label 1" in found["x"][1]


def test_the_list_of_refused_inputs_is_sorted_and_has_the_agreed_schema(tmp_path: Path) -> None:
    rejects = [Reject("missing", "b", None, "x"), Reject("missing", "a", None, "x"), Reject("blank", None, "train/\udcff.tif", "x")]
    write_rejects(tmp_path / "rejected.parquet", rejects)
    table = pq.read_table(tmp_path / "rejected.parquet")
    assert table.schema.equals(REJECTED_SCHEMA)
    assert table["id"].to_pylist() == [None, "a", "b"]
    assert table["path"][0].as_py() == "train/?.tif"
