"""A training that is one process's own is the training that `train` does, epoch for epoch, and lets itself be interrupted anywhere."""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ray_jobs.checkpoints import CheckpointError, best_and_last, is_settled, keep_weights_only, saved_checkpoints
from ray_jobs.run_folder import REQUEST_FILE
from ray_jobs.sweep import lone_training
from ray_jobs.sweep.lone_training import LoneTraining
from sentinode.config import TrainConfig
from sentinode.dataset import Patches
from sentinode.ingest import ResidentRows
from sentinode.learner import Learner
from sentinode.locations import locate
from sentinode.model import build_model, initial_state
from sentinode.storage import write_json
from sentinode.training import Interrupted, Progress, Wish
from tests.sentinode.training_helpers import config, patches, train

TRAIN, VAL = patches(40), patches(21, seed=1)


@dataclass(frozen=True)
class Rows:
    """What trainings ask of LoadedRows."""

    ingest: str = "resident"

    def source(self, config: TrainConfig, device: torch.device) -> ResidentRows:
        return ResidentRows(TRAIN, device)

    def validation(self, config: TrainConfig) -> Patches:
        return VAL


def settings(**changes: Any) -> TrainConfig:
    return config(epochs=3, unfreeze_depth=1, selection_metric="val_roc_auc", dropout=0.2, early_stopping_patience_epochs=None, **changes)


def initial() -> dict[str, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return initial_state("resnet18", "none", input_size_px=32)


def training(folder: Path, told: int = 0, **changes: Any) -> LoneTraining:
    folder.mkdir(exist_ok=True)
    write_json(folder / REQUEST_FILE, {"id": "x"})
    return LoneTraining(settings(**changes), locate(folder), "x", Rows(), initial, use_gpu=False, told=told)  # type: ignore[arg-type]


def numbers(record: dict[str, Any] | None) -> dict[str, Any]:
    assert record is not None
    return {name: value for name, value in record.items() if not name.endswith("seconds")}


@pytest.fixture(scope="module")
def undisturbed() -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """History and weights of the loop alone, as a worker of `train` runs it."""
    lone_training.set_up_worker(1)
    torch.manual_seed(int(np.random.SeedSequence([42, 0]).generate_state(1)[0]))
    model = build_model("resnet18", weights="none", input_size_px=32)
    model.load_state_dict(initial())
    learner = Learner(model, settings())
    progress = train(learner, TRAIN, VAL, settings(), Progress())
    return [numbers(record) for record in progress.history], {name: value.clone() for name, value in learner.kept.state_dict().items()}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    _, last = best_and_last(locate(folder))
    assert last is not None
    return last.weights()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_an_epoch_at_a_time_is_bitwise_the_loop_in_one_go(tmp_path: Path, undisturbed: Any) -> None:
    history, weights = undisturbed
    lone = training(tmp_path / "run")
    for number, expected in enumerate(history):
        assert not lone.is_over
        assert numbers(lone.next_epoch()) == expected, number
    assert lone.is_over
    assert lone.next_epoch() is None
    lone.close()
    assert same(weights_of(tmp_path / "run"), weights)
    # The best and the newest.
    assert 1 <= len(saved_checkpoints(locate(tmp_path / "run"))) <= 2


@pytest.mark.slow
def test_one_that_begins_again_after_any_epoch_tells_what_was_not_told_and_ends_the_same(tmp_path: Path, undisturbed: Any) -> None:
    history, weights = undisturbed
    # Also where more was told than a checkpoint knows of.
    for trained, told in ((1, 1), (2, 2), (2, 1), (3, 2), (3, 0), (1, 2)):
        folder = tmp_path / f"{trained}{told}"
        first = training(folder)
        for _ in range(trained):
            first.next_epoch()
        first.close()
        again = training(folder, told)
        assert [numbers(record) for record in iter(again.next_epoch, None)] == history[told:]
        again.close()
        assert same(weights_of(folder), weights)


# Five steps an epoch, and a look after each.
@pytest.mark.parametrize("step", [1, 7, 12])
def test_a_wish_to_stop_leaves_a_checkpoint_within_the_epoch(tmp_path: Path, undisturbed: Any, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    history, weights = undisturbed
    steps = itertools.count(1)

    class Impatient(lone_training.Wishes):
        def __call__(self) -> Wish:
            return Wish.STOP if next(steps) == step else Wish.GO_ON

    with monkeypatch.context() as patch:
        patch.setattr(lone_training, "Wishes", Impatient)
        lone = training(tmp_path / "run")
        told = [lone.next_epoch() for _ in range((step - 1) // 5)]
        with pytest.raises(Interrupted, match="within epoch"):
            lone.next_epoch()
        lone.close()
    assert best_and_last(locate(tmp_path / "run"))[1].progress.partial is not None  # type: ignore[union-attr]
    again = training(tmp_path / "run", len(told))
    assert [numbers(record) for record in iter(again.next_epoch, None)] == history[len(told) :]
    again.close()
    assert same(weights_of(tmp_path / "run"), weights)


def test_of_a_run_that_nobody_goes_on_with_the_best_weights_are_left(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    lone = training(folder)
    while lone.next_epoch():
        pass
    lone.close()
    best, _ = best_and_last(locate(folder))
    assert best is not None
    assert is_settled(locate(folder), 3)
    assert not is_settled(locate(folder), 4)
    expected = best.weights()
    keep_weights_only(locate(folder))
    kept, last = best_and_last(locate(folder))
    assert kept is not None
    assert kept is last
    assert kept.is_weights_only
    assert same(kept.weights(), expected)
    assert sorted(entry.name for entry in kept.path.entries()) == ["checkpoint.json", "model.safetensors"]
    keep_weights_only(locate(folder))
    assert same(best_and_last(locate(folder))[0].weights(), expected)  # type: ignore[union-attr]


def test_a_checkpoint_that_cannot_be_written_is_told_at_the_next_one_or_at_the_end(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    lone = training(folder)
    (folder / REQUEST_FILE).unlink()  # as if what was mounted there had gone
    lone.next_epoch()
    with pytest.raises(CheckpointError, match="not the same folder"):
        lone.close()
