from pathlib import Path

import numpy as np
import pytest

from data_prep import fingerprints
from data_prep.fingerprints import sift
from data_prep.overlap import is_overlap
from tests.data_prep.brute_force import counting_offsets
from tests.data_prep.helpers import make_spool, noise


@pytest.mark.parametrize("side", [32, 96])
def test_what_is_left_are_the_overlaps_at_every_offset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: int) -> None:
    """Patches that agree in most of their pixels, in small tiles and pieces."""
    monkeypatch.setattr(fingerprints, "_TILE_PX", 3 * (side + 1) ** 2)
    monkeypatch.setattr(fingerprints, "_PIECE", 1000)
    rng = np.random.default_rng(side)
    field = np.full((2 * side, 2 * side, 3), 255, np.uint8)
    field[rng.random(field.shape[:2]) < 0.01] = 190
    field[side - 8 : side + 8, side - 8 : side + 8] = noise(rng, 16)
    images = np.stack([field[y : y + side, x : x + side] for y, x in rng.integers(side // 4, side, (8, 2))])
    spool, _ = make_spool(tmp_path, images)
    dy, dx = counting_offsets(side)
    pairs = [(a, b) for a in range(8) for b in range(a + 1, 8)]
    first, second = (np.repeat(column, len(dy)) for column in np.array(pairs).T)
    dy, dx = np.tile(dy, len(pairs)), np.tile(dx, len(pairs))
    keep = sift(spool, first, second, dy, dx)
    sample = np.union1d(np.flatnonzero(keep), rng.integers(0, len(keep), 2000))
    expected = [is_overlap(images[first[n]], images[second[n]], int(dy[n]), int(dx[n])) for n in sample]
    assert keep[sample].tolist() == expected
    assert sum(expected) >= len(pairs)


def test_few_candidates_are_left_to_the_comparison(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    spool, _ = make_spool(tmp_path, np.stack([noise(rng) for _ in range(4)]))
    zero = np.zeros(2, np.int64)
    assert sift(spool, np.array([0, 1]), np.array([2, 3]), zero, zero).tolist() == [True, True]
    assert sift(spool, zero[:0], zero[:0], zero[:0], zero[:0]).tolist() == []
