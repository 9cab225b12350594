from pathlib import Path

import numpy as np
import pytest

from data_prep import overlap_search
from data_prep.anchors import anchors
from data_prep.overlap_search import search_overlaps
from data_prep.spool import anchors_path
from sentinode.images import UInt8Array
from tests.data_prep.brute_force import Row, rows_of, search
from tests.data_prep.helpers import make_spool, noise


@pytest.mark.ray
def test_a_repeated_search_takes_the_files_that_are_there(ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap_search, "_ANCHORS_PER_PART", 5_000)
    monkeypatch.setattr(overlap_search, "_CANDIDATES_PER_VERIFY", 100)
    monkeypatch.setattr(overlap_search, "_SAMPLE_STEP", 4)
    field = noise(np.random.default_rng(1), 150)
    images = np.stack([field[y : y + 96, x : x + 96] for y in range(0, 50, 10) for x in range(0, 50, 10)])
    spool, blocks = make_spool(tmp_path, images)
    for number, block in enumerate(blocks):
        np.save(anchors_path(tmp_path, number), anchors(block))
    calls: list[tuple[str, int, int]] = []

    def progress(stage: str, done: int, total: int, unit: str = "patches") -> None:
        calls.append((stage, done, total))

    expected = rows_of(search(tmp_path / "direct", images))
    assert len(expected) == 300
    assert rows_of(search_overlaps(spool, tmp_path, progress, key="0a", workers=2)) == expected
    candidate_files, overlap_files = (sorted(tmp_path.glob(f"{kind}-*.npy")) for kind in ("candidates", "overlaps"))
    assert len(candidate_files) == 4
    assert len(overlap_files) > 5
    assert calls[0] == ("overlap", 0, 4)
    assert calls[-1] == ("verify", len(overlap_files), len(overlap_files))

    kept = {file: file.stat().st_mtime_ns for file in [*candidate_files[1:], *overlap_files[1:]]}
    candidate_files[0].unlink()
    overlap_files[0].unlink()
    calls.clear()
    assert rows_of(search_overlaps(spool, tmp_path, progress, key="0a")) == expected
    assert calls == [("overlap", 3, 4), ("overlap", 4, 4), ("verify", len(kept) - 3, len(kept) - 2), ("verify", len(kept) - 2, len(kept) - 2)]
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert not list(tmp_path.glob(".*"))


@pytest.mark.ray
def test_a_search_in_other_pixels_takes_no_file_of_the_one_before(ray_session: None, tmp_path: Path) -> None:
    """As many patches and blocks, but an input that could not be read has moved those behind it."""
    rng = np.random.default_rng(2)
    field = noise(rng, 150)
    before = [field[:96, :96], field[30:126, 30:126], noise(rng), noise(rng)]

    def search_again(images: list[UInt8Array], key: str) -> list[Row]:
        spool, blocks = make_spool(tmp_path, np.stack(images))
        for number, block in enumerate(blocks):
            np.save(anchors_path(tmp_path, number), anchors(block))
        return rows_of(search_overlaps(spool, tmp_path, lambda *_: None, key=key))

    assert search_again(before, "a") == [(0, 1, 30, 30)]
    assert search_again([before[3], *before[:3]], "ab") == [(1, 2, 30, 30)]
    names = [file.name for kind in ("candidates", "overlaps") for file in tmp_path.glob(f"{kind}-*")]
    assert len(names) == 2
    assert all("-ab-" in name for name in names)
