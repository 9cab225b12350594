import numpy as np
import pytest

from data_prep.splits import TOLERANCE, deal, deal_groups
from tests.data_prep.helpers import patch

RATIOS = (0.7, 0.15, 0.15)


def population(seed: int, single: int = 3000, grouped: int = 150) -> tuple[list, list[str]]:
    """Mostly lone patches of mixed label, and groups up to 60 that are mostly tumour, as in the real set."""
    rng = np.random.default_rng(seed)
    patches, groups = [], []
    sizes = [1] * single + [int(min(60, 1 + rng.geometric(0.25))) for _ in range(grouped)]
    for number, size in enumerate(sizes):
        for member in range(size):
            label = int(rng.random() < (0.36 if size == 1 else 0.7))
            patches.append(patch(f"{number:05d}-{member}", label))
            groups.append(f"{number:05d}-0")
    return patches, groups


@pytest.mark.parametrize("seed", range(4))
def test_no_group_straddles_and_every_split_looks_like_the_whole(seed: int) -> None:
    patches, groups = population(seed)
    dealt = deal(patches, groups, RATIOS, seed, folds=5)
    assert dealt.notes == []
    labels = np.asarray([p.label for p in patches])
    multi = np.asarray([groups.count(g) > 1 for g in dict.fromkeys(groups)])
    is_multi = dict(zip(dict.fromkeys(groups), multi, strict=True))
    grouped = np.asarray([is_multi[g] for g in groups])
    split = np.asarray([dealt.split[g] for g in groups])
    for name, ratio in zip(("train", "val", "test"), RATIOS, strict=True):
        inside = split == name
        assert abs(inside.mean() - ratio) < TOLERANCE
        assert abs(labels[inside].mean() - labels.mean()) < TOLERANCE
        assert abs(grouped[inside].mean() - grouped.mean()) < TOLERANCE
    fold = np.asarray([dealt.fold.get(g, -1) for g in groups])
    assert ((fold == -1) == (split == "test")).all()
    for number in range(5):
        assert abs(labels[fold == number].mean() - labels[fold >= 0].mean()) < TOLERANCE


def test_dealing_does_not_depend_on_the_order_of_patches() -> None:
    patches, groups = population(1)
    order = np.random.default_rng(0).permutation(len(patches))
    shuffled = deal([patches[k] for k in order], [groups[k] for k in order], RATIOS, 42, folds=3)
    assert shuffled == deal(patches, groups, RATIOS, 42, folds=3)


def test_another_seed_deals_otherwise() -> None:
    patches, groups = population(1)
    assert deal(patches, groups, RATIOS, 1).split != deal(patches, groups, RATIOS, 2).split


def test_a_split_that_cannot_be_even_is_explained() -> None:
    patches = [patch(f"{k:03d}", k % 2) for k in range(100)]
    groups = ["000"] * 50 + [p.id for p in patches[50:]]
    notes = deal(patches, groups, RATIOS, 42).notes
    assert any("in groups of 8 or more" in note and "the largest of 51 groups holds 50.0% of 100 rows" in note for note in notes)


def test_a_share_of_zero_gets_nothing() -> None:
    dealt = deal_groups({f"{k}": (1, 1) for k in range(50)}, (0.8, 0.2, 0.0), 42)
    assert set(dealt.values()) == {0, 1}
    assert sum(share == 0 for share in dealt.values()) == 40


def test_empty_splits_of_a_tiny_set_are_explained() -> None:
    notes = deal([patch("a", 1)], ["a"], RATIOS, 42).notes
    assert any(note.startswith("split val is empty") for note in notes)
