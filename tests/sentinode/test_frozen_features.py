"""What frozen stages make of a look is computed once and means the same wherever it is used."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sentinode.config import AugmentConfig
from sentinode.frozen_features import FeatureStore
from sentinode.ingest import ResidentRows
from sentinode.learner import Learner
from sentinode.training import Progress, train_epochs
from tests.sentinode.training_helpers import GRADIENT_DESCENT, config, network, patches

TRAIN, VAL = patches(36), patches(21, seed=1)
LOOKS = AugmentConfig(views=2)


class Counted(Learner):
    """Counts the rows that its frozen stages see."""

    seen = 0

    def trunk_features(self, inputs: torch.Tensor) -> torch.Tensor:
        self.seen += len(inputs)
        return super().trunk_features(inputs)


def trained(store: FeatureStore | None, depth: int = 0, **changes: Any) -> tuple[list[dict[str, Any]], Counted]:
    settings = config(**{"epochs": 3, "unfreeze_depth": depth, "augment": LOOKS, "early_stopping_patience_epochs": None} | changes)
    torch.manual_seed(0)
    learner, progress = Counted(network(depth), settings), Progress()
    train_epochs(learner, ResidentRows(TRAIN, "cpu"), VAL, settings, progress, features=store)
    return [{name: value for name, value in record.items() if not name.endswith("seconds")} for record in progress.history], learner


def store(folder: Path, limit_bytes: float = 1e9) -> FeatureStore:
    return FeatureStore(folder / "features", limit_bytes)


@pytest.mark.parametrize("depth", [0, 1])
def test_each_look_is_computed_once_and_the_figures_are_those_of_computing_it_each_time(tmp_path: Path, depth: int) -> None:
    # Adam's first steps show little but the gradient's sign, which rounding decides where it is small.
    kept, learner = trained(store(tmp_path), depth, **GRADIENT_DESCENT)
    assert learner.seen == 2 * len(TRAIN) + len(VAL)
    anew, _ = trained(None, depth, **GRADIENT_DESCENT)
    for one, other in zip(kept, anew, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            # Batches of another size round differently.
            assert value == pytest.approx(other[name], abs=1e-4 if name != "rows" else 0), name


def test_another_training_of_the_same_data_uses_what_is_there_and_gets_bitwise_what_it_would_make_alone(tmp_path: Path) -> None:
    alone, _ = trained(store(tmp_path / "alone"), batch_size=7)
    trained(store(tmp_path / "shared"), batch_size=16, learning_rate=1e-2)
    together, learner = trained(store(tmp_path / "shared"), batch_size=7)
    assert learner.seen == 0
    assert together == alone


def test_validation_is_bitwise_the_same_with_and_without(tmp_path: Path) -> None:
    kept, _ = trained(store(tmp_path), epochs=0, eval_batch_size=8)
    anew, _ = trained(None, epochs=0, eval_batch_size=8)
    assert kept == anew


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 7},
        {"depth": 1},
        {"input_size_px": 64},
        {"augment": AugmentConfig(views=2, colour_jitter=0.3)},
        {"mean": (0.5, 0.5, 0.5)},
        {"precision": "bf16"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_would_look_otherwise_is_computed_anew(tmp_path: Path, changes: dict[str, Any]) -> None:
    trained(store(tmp_path), epochs=1)
    before = len(list((tmp_path / "features").glob("*.npy")))
    trained(store(tmp_path), epochs=1, **changes)
    # Validation sees no augmentation and no seed.
    added = 1 if "seed" in changes or "augment" in changes else 2
    assert len(list((tmp_path / "features").glob("*.npy"))) == before + added


def test_other_weights_of_the_frozen_stages_are_another_key(tmp_path: Path) -> None:
    first, second = (Learner(network(0, seed), config(unfreeze_depth=0)) for seed in (0, 1))
    assert first.trunk_digest() != second.trunk_digest()
    assert first.trunk_digest() == Learner(network(0, 0), config(unfreeze_depth=0)).trunk_digest()


def test_what_has_no_room_is_not_kept_and_training_goes_on(tmp_path: Path) -> None:
    anew, _ = trained(None)
    without_room, learner = trained(store(tmp_path, limit_bytes=1000))
    assert without_room == anew
    assert not list((tmp_path / "features").glob("*.npy"))
    assert learner.seen > 0


def test_without_frozen_stages_or_a_finite_set_of_looks_nothing_is_kept(tmp_path: Path) -> None:
    trained(store(tmp_path), depth=5, epochs=1)
    trained(store(tmp_path), augment=AugmentConfig(), epochs=1)
    assert not (tmp_path / "features").exists()


def test_what_a_kill_left_half_written_is_not_taken_for_whole(tmp_path: Path) -> None:
    kept = store(tmp_path)

    def fails() -> Any:
        yield torch.ones(2, 3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept.get("key", 4, fails)
    assert not list((tmp_path / "features").glob("*.npy"))
    found = kept.get("key", 4, lambda: iter([torch.ones(2, 3), torch.zeros(2, 3)]))
    assert found is not None
    assert found.rows(np.array([3, 0]), torch.device("cpu")).tolist() == [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
