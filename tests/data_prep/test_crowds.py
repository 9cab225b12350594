"""Leaving out the anchors that very many patches have loses no overlap."""

from pathlib import Path

import numpy as np
import pytest

from data_prep import overlap_search
from data_prep.anchors import MIN_SHARED_FRACTION, Anchors, anchors, places_of, window_px
from data_prep.crowds import needed
from data_prep.overlap_search import search_overlaps
from data_prep.spool import anchors_path
from sentinode.images import UInt8Array
from tests.data_prep.brute_force import Row, rows_of, search
from tests.data_prep.helpers import make_spool, noise


def speckled(rng: np.random.Generator, side: int, share: float, depth: int) -> UInt8Array:
    """Glass with specks of one colour, an area of another colour, and a square of tissue."""
    field = np.full((side, side, 3), 250, np.uint8)
    field[: side // 3, side // 2 :] -= np.uint8(30)
    field[rng.random((side, side)) < share] -= np.uint8(depth)
    y, x = rng.integers(0, side - 30, 2)
    field[y : y + 30, x : x + 30] = noise(rng, 30)
    return field


def scene(name: str, seed: int) -> UInt8Array:
    """Patches of one field, many of which overlap."""
    rng = np.random.default_rng(seed)
    field = {
        "sparse": lambda: speckled(rng, 220, 0.01, 25),
        "dense": lambda: speckled(rng, 220, 0.1, 60),
        "black": lambda: speckled(rng, 220, 0.003, 250),
        "few colours": lambda: rng.integers(0, 2, (220, 220, 3), dtype=np.uint8) * np.uint8(40),
    }[name]()
    return np.stack([field[y : y + 96, x : x + 96] for y, x in rng.integers(0, 124, (9, 2))])


@pytest.mark.parametrize("name", ["sparse", "dense", "black", "few colours"])
@pytest.mark.parametrize("seed", range(2))
def test_no_overlap_is_lost_however_few_are_a_crowd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, seed: int) -> None:
    images = scene(name, seed)
    monkeypatch.setattr("data_prep.overlap.MOST_MEMBERS", 1 << 30)
    expected = rows_of(search(tmp_path / "all", images))
    assert len(expected) >= 5
    for most in (0, 2, 8):
        monkeypatch.setattr("data_prep.overlap.MOST_MEMBERS", most)
        assert rows_of(search(tmp_path / str(most), images, part_bits=2)) == expected, most


def slowly_needed(image: UInt8Array, crowded: set[int]) -> list[tuple[int, int]]:
    """(hash, place) of the anchors with crowded hashes in a rectangle that counts and has no other anchor, tried one by one."""
    side, length = image.shape[0], window_px(image.shape[0])
    collected = Anchors(side)
    collected.add(image[None])
    many, few = [], []
    for (hashes, rows), (down, across) in zip(collected.by_direction(), ((0, 1), (1, 0)), strict=True):
        for hash_, place in zip(hashes.tolist(), places_of(rows).tolist(), strict=True):
            y, x = divmod(place, side)
            window = [tuple(image[y + k * down, x + k * across]) for k in range(length)]
            first, last = 0, length - 1
            if hash_ not in crowded:
                first -= len(set(window[:-1])) == 1
                last += len(set(window[1:])) == 1
            box = (y + first * down, x + first * across, y + last * down, x + last * across)
            (many if hash_ in crowded else few).append((box, hash_, place))
    kept = set()
    for height in range(1, side + 1):
        for width in range(1, side + 1):
            if height * width < MIN_SHARED_FRACTION * side * side:
                continue
            for top in {0, side - height}:
                for left in {0, side - width}:
                    if image[top : top + height, left : left + width].std() <= 6:
                        continue

                    def inside(box: tuple[int, int, int, int], top: int = top, left: int = left, low: int = height, right: int = width) -> bool:
                        return box[0] >= top and box[1] >= left and box[2] < top + low and box[3] < left + right

                    if not any(inside(box) for box, _, _ in few):
                        kept |= {(hash_, place) for box, hash_, place in many if inside(box)}
    return sorted(kept)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_needed_is_what_the_definition_says(seed: int) -> None:
    rng = np.random.default_rng(seed)
    images = np.full((3, 32, 32, 3), 250, np.uint8)
    images[rng.random((3, 32, 32)) < 0.02] = 120
    images[:, 20:26, 20:28] = noise(rng, 8)[:6]
    images[2, :4] = 90
    hashes = anchors(images)[0]
    values, counts = np.unique(hashes, return_counts=True)
    crowded = values[counts > 2]
    kept = 0
    for image in images:
        found = needed(image[None], crowded)
        assert sorted(zip(found[0].tolist(), places_of(found[1]).tolist(), strict=True)) == slowly_needed(image, set(crowded.tolist()))
        kept += found.shape[1]
    assert 0 < kept < np.isin(hashes, crowded).sum()
    found = needed(images, crowded)
    assert set(map(tuple, found.T.tolist())) <= set(map(tuple, anchors(images).T.tolist()))
    assert needed(images[:0], crowded).shape == (2, 0)


@pytest.mark.ray
def test_a_search_in_crowds_is_continued_too(ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.concatenate([scene("sparse", 5), scene("black", 6)])
    monkeypatch.setattr(overlap_search, "_ANCHORS_PER_PART", 2_000)
    expected = rows_of(search(tmp_path / "direct", images))
    assert len(expected) > 10
    spool, blocks = make_spool(tmp_path, images)
    for number, block in enumerate(blocks):
        np.save(anchors_path(tmp_path, number), anchors(block))
    crowds: list[int] = []

    def few_are_a_crowd(**arguments: object) -> int:  # in the processes of Ray
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("data_prep.overlap.MOST_MEMBERS", 3)
            return join_candidates(**arguments)  # type: ignore[arg-type]

    def progress(stage: str, done: int, total: int, unit: str = "patches") -> None:
        if stage == "crowds":
            crowds.append(done)

    def search_again() -> list[Row]:
        return rows_of(search_overlaps(spool, tmp_path, progress, key="0a"))

    join_candidates = overlap_search._candidates_task
    monkeypatch.setattr(overlap_search, "_candidates_task", few_are_a_crowd)
    assert search_again() == expected
    assert crowds == list(range(len(blocks) + 1))
    kinds = {file.name.partition("-")[0] for file in tmp_path.glob("*-0a-*.npy")}
    assert kinds == {"candidates", "crowded", "needed", "overlaps"}
    crowds.clear()
    (tmp_path / "needed-0a-00001.npy").unlink()
    for file in tmp_path.glob("candidates-0a-further-*"):
        file.unlink()
    assert search_again() == expected
    assert crowds == [len(blocks) - 1, len(blocks)]
    rows_of(search_overlaps(spool, tmp_path, progress, key="0b"))
    assert not list(tmp_path.glob("*-0a-*.npy"))
