import numpy as np
import pytest

from data_prep.splits import TOLERANCE, deal, deal_groups, straddling

RATIOS = (0.7, 0.15, 0.15)


def population(seed: int, single: int = 3000, grouped: int = 150) -> tuple[np.ndarray, np.ndarray]:
    """Mostly lone patches of mixed label, and groups up to 60 that are mostly tumour, as in the real set."""
    rng = np.random.default_rng(seed)
    labels, groups = [], []
    sizes = [1] * single + [int(min(60, 1 + rng.geometric(0.25))) for _ in range(grouped)]
    for number, size in enumerate(sizes):
        for _ in range(size):
            labels.append(int(rng.random() < (0.36 if size == 1 else 0.7)))
            groups.append(f"{number:05d}-0")
    return np.asarray(labels, np.int64), np.asarray(groups)


@pytest.mark.parametrize("seed", range(4))
def test_no_group_straddles_and_every_split_looks_like_the_whole(seed: int) -> None:
    labels, groups = population(seed)
    dealt = deal(labels, groups, RATIOS, seed, folds=5)
    assert dealt.notes == []
    assert straddling(groups, dealt.split) == []
    _, member, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    grouped = sizes[member] > 1
    for name, ratio in zip(("train", "val", "test"), RATIOS, strict=True):
        inside = dealt.split == name
        assert abs(inside.mean() - ratio) < TOLERANCE
        assert abs(labels[inside].mean() - labels.mean()) < TOLERANCE
        assert abs(grouped[inside].mean() - grouped.mean()) < TOLERANCE
    assert ((dealt.fold == -1) == (dealt.split == "test")).all()
    assert straddling(groups, dealt.fold.astype(str)) == []
    for number in range(5):
        assert abs(labels[dealt.fold == number].mean() - labels[dealt.fold >= 0].mean()) < TOLERANCE


def test_dealing_does_not_depend_on_the_order_of_patches() -> None:
    labels, groups = population(1)
    order = np.random.default_rng(0).permutation(len(labels))
    straight, shuffled = deal(labels, groups, RATIOS, 42, folds=3), deal(labels[order], groups[order], RATIOS, 42, folds=3)
    assert np.array_equal(shuffled.split, straight.split[order])
    assert np.array_equal(shuffled.fold, straight.fold[order])


def test_another_seed_deals_otherwise() -> None:
    labels, groups = population(1)
    assert not np.array_equal(deal(labels, groups, RATIOS, 1).split, deal(labels, groups, RATIOS, 2).split)


def test_a_split_that_cannot_be_even_is_explained() -> None:
    labels = np.arange(100) % 2
    groups = np.asarray(["000"] * 50 + [f"{k:03d}" for k in range(50, 100)])
    notes = deal(labels, groups, RATIOS, 42).notes
    assert any("in groups of 8 or more" in note and "the largest of 51 groups holds 50.0% of 100 rows" in note for note in notes)
    assert "split test: group 000 alone (50 rows) is larger than its share of 15 rows" in notes


def test_a_group_with_patches_in_two_splits_is_named() -> None:
    assert straddling(np.asarray(["a", "b", "a", "c", "b"]), np.asarray(["train", "val", "test", "val", "val"])) == ["a"]


def test_a_share_of_zero_gets_nothing() -> None:
    dealt = deal_groups({f"{k}": (1, 1) for k in range(50)}, (0.8, 0.2, 0.0), 42)
    assert set(dealt.values()) == {0, 1}
    assert sum(share == 0 for share in dealt.values()) == 40


def test_empty_splits_of_a_tiny_set_are_explained() -> None:
    notes = deal(np.asarray([1]), np.asarray(["a"]), RATIOS, 42).notes
    assert any(note.startswith("split val is empty") for note in notes)
