"""The loop in one process: what is minimised, what is recorded, when it stops, and that a restart changes nothing."""

import copy
import io
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from sentinode.augment import augment, draw
from sentinode.config import AugmentConfig
from sentinode.dataset import Patches
from sentinode.epoch_plan import EpochPlan
from sentinode.errors import TrainingError, UsageError
from sentinode.inference import network_logits
from sentinode.ingest import ResidentRows
from sentinode.learner import Learner
from sentinode.metrics import roc_auc
from sentinode.preprocess import normalise, resize, to_unit_nchw
from sentinode.training import Hooks, Interrupted, PartialEpoch, Progress, Wish, class_weight, train_epochs
from tests.sentinode.training_helpers import GRADIENT_DESCENT, PLAIN, config, network, patches, small_network, that_never_learns, train


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def make(depth: int = 1, **changes: Any) -> tuple[Learner, Any]:
    settings = config(unfreeze_depth=depth, **changes)
    return Learner(network(depth), settings), settings


def logits_of(learner: Learner, rows: Patches, settings: Any) -> torch.Tensor:
    """z of an eval-mode forward pass, (n, 2), without the code under test."""
    batch = normalise(resize(to_unit_nchw(torch.from_numpy(rows.images.copy())), settings.input_size_px), settings.mean, settings.std)
    learner.model.eval()
    with torch.inference_mode():
        return learner.model(batch)


def test_the_class_weight_is_the_ratio_of_the_rows_trained_on() -> None:
    labels = np.array([0, 0, 0, 1, 1])
    assert class_weight(labels, config()) == 1.5
    assert class_weight(labels, config(class_weight=4)) == 4.0


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_cannot_be_trained_on(label: int) -> None:
    rows = patches(12)
    only = rows.take(rows.labels == label)
    learner, settings = make()
    counts = f"{len(only)} normal and 0" if label == 0 else f"0 normal and {len(only)}"
    with pytest.raises(UsageError, match=f"training needs both classes; the rows hold {counts} metastatic patches"):
        train(learner, only, rows, settings)
    with pytest.raises(UsageError, match="both classes"):
        train(learner, only, rows, config(class_weight=2.0))


def test_only_what_is_thawed_changes() -> None:
    learner, settings = make(depth=1)
    before = state_of(learner.model)
    train(learner, patches(20), patches(10, 1), settings)
    for name, value in learner.model.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith(("fc.", "layer4.")), name


def test_the_recorded_losses_are_weighted_means_over_every_row() -> None:
    rows, val = patches(21), patches(13, 1)
    learner, settings = make(depth=0, batch_size=4, eval_batch_size=5, augment=PLAIN)
    progress = train(that_never_learns(learner), rows, val, settings)
    record = progress.history[0]
    weights = torch.tensor([1.0, class_weight(rows.labels, settings)])
    expected = [functional.cross_entropy(logits_of(learner, part, settings), torch.from_numpy(part.labels), weights) for part in (rows, val)]
    assert record["train_loss"] == pytest.approx(float(expected[0]), rel=1e-5)
    assert record["val_loss"] == pytest.approx(float(expected[1]), rel=1e-5)
    z = logits_of(learner, val, settings)
    assert record["val_roc_auc"] == roc_auc(val.labels, (z[:, 1] - z[:, 0]).numpy())
    assert (record["epoch"], record["rows"], record["learning_rate"]) == (0, 21, settings.learning_rate)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_step_follows_the_gradient_of_the_weighted_mean_of_its_augmented_rows(smoothing: float) -> None:
    rows = patches(21)
    settings = config(batch_size=8, augment=AugmentConfig(colour_jitter=0.3), unfreeze_depth=0, label_smoothing=smoothing, **GRADIENT_DESCENT)
    learner, twin = Learner(network(0), settings), network(0)
    train(learner, rows, patches(6, 1), settings)
    weights = torch.tensor([1.0, class_weight(rows.labels, settings)])
    optimiser = torch.optim.SGD(twin.fc.parameters(), lr=0.01)
    twin.eval()
    order = ResidentRows(rows, torch.device("cpu")).order(settings.seed, 0, 1, 8)
    for start in range(0, 21, 8):
        step = order[start : start + 8]
        seen = augment(to_unit_nchw(torch.from_numpy(rows.images[step])), draw(settings.seed, 0, 21)[torch.from_numpy(step)], settings.augment)
        z = twin(normalise(seen, settings.mean, settings.std))
        labels = torch.from_numpy(rows.labels[step])
        losses = functional.cross_entropy(z, labels, reduction="none", label_smoothing=smoothing)
        optimiser.zero_grad()
        ((losses * weights[labels]).sum() / weights[labels].sum()).backward()
        optimiser.step()
    for name, value in learner.model.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[name], atol=1e-6, rtol=1e-5, msg=name)
    assert not torch.equal(learner.model.state_dict()["fc.weight"], network(0).state_dict()["fc.weight"])


def test_a_last_step_of_one_row_trains_statistics_too() -> None:
    # At 32 px the last stage sees one value per channel, and BatchNorm needs two.
    learner, settings = make(depth=1, batch_size=3)
    seen: list[torch.Tensor] = []
    learner.model.get_submodule("layer4").register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    progress = train(learner, patches(7), patches(6, 1), settings)
    assert progress.history[0]["rows"] == 7
    assert all(torch.isfinite(value).all() for value in learner.model.state_dict().values() if value.is_floating_point())
    first, second = seen[2]
    assert not torch.equal(first, second), "a variance of nothing went into the statistics"


def test_validation_is_the_forward_pass_of_every_other_verb() -> None:
    learner, settings = make(depth=1)
    val = patches(11, 1)
    progress = train(learner, patches(16), val, settings)
    learner.model.eval()
    logits = network_logits(learner.model, val.images, input_size_px=32, mean=settings.mean, std=settings.std)
    assert progress.history[0]["val_roc_auc"] == roc_auc(val.labels, logits)


def test_the_network_learns_what_can_be_learnt() -> None:
    settings = config(unfreeze_depth=5, epochs=4, batch_size=16)
    learner = Learner(small_network(5, batch_norm=True), settings)
    progress = train(learner, patches(160), patches(80, 1), settings)
    assert progress.history[-1]["train_loss"] < 0.8 * progress.history[0]["train_loss"]
    assert max(record["val_roc_auc"] for record in progress.history) > 0.85


def test_the_rows_are_left_alone() -> None:
    rows, val = patches(12), patches(6, 1)
    for part in (rows, val):
        part.images.setflags(write=False)  # as they lie in shared memory
    before = rows.images.copy()
    learner, settings = make()
    train(learner, rows, val, settings)
    np.testing.assert_array_equal(rows.images, before)


class Killed(Exception):
    """The end of a process, as far as the loop can tell."""


def saved(learner: Learner, progress: Progress) -> bytes:
    buffer = io.BytesIO()
    torch.save({"weights": learner.kept.state_dict(), "learner": learner.state(), "progress": asdict(progress), "rng": torch.get_rng_state()}, buffer)
    return buffer.getvalue()


def restored(checkpoint: bytes, settings: Any) -> tuple[Learner, Progress]:
    """What a new process makes of a checkpoint; whatever it draws itself must not matter."""
    state = torch.load(io.BytesIO(checkpoint), weights_only=True)
    torch.manual_seed(987)
    learner = Learner(network(settings.unfreeze_depth, seed=987), settings)
    learner.restore(state["weights"], state["learner"])
    torch.set_rng_state(state["rng"])
    return learner, Progress(**state["progress"])


def assert_same_end(whole: tuple[Learner, Progress], other: tuple[Learner, Progress]) -> None:
    for ours, theirs in zip((whole[0].model, whole[0].kept), (other[0].model, other[0].kept), strict=True):
        for name, value in ours.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[name]), name
    for ours, theirs in zip(whole[0].optimiser.state.values(), other[0].optimiser.state.values(), strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert whole[0].schedule.state() == other[0].schedule.state()
    assert [timeless(record) for record in whole[1].history] == [timeless(record) for record in other[1].history]
    assert (whole[1].best_epoch, whole[1].best_value) == (other[1].best_epoch, other[1].best_value)


VARIANTS: dict[str, dict[str, Any]] = {
    "plateau": {"lr_patience_epochs": 0, "learning_rate": 0.003},
    "one cycle, averaged, dropped out": {"schedule": "one_cycle", "optimiser": "adamw", "ema_decay": 0.8, "dropout": 0.3},
    "half precision": {"precision": "bf16", "schedule": "one_cycle"},
    "thawing, accumulated": {
        "schedule": "cosine",
        "optimiser": "sgd",
        "unfreeze_schedule": {1: 3, 3: 5},
        "accumulate_steps": 2,
        "stage_lr_factor": 0.5,
    },
}


@pytest.mark.parametrize("within_epoch", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_stopping_and_continuing_gives_bitwise_the_undisturbed_run(variant: str, within_epoch: bool) -> None:
    rows, val = patches(37), patches(15, 1)
    val = replace(val, labels=1 - val.labels)  # learning makes this worse, which sets the schedule to work
    changes: dict[str, Any] = {"depth": 2, "epochs": 4, "learning_rate": 0.01} | VARIANTS[variant]
    torch.manual_seed(5)
    undisturbed, settings = make(**changes)
    whole = train(undisturbed, rows, val, settings)

    torch.manual_seed(5)
    first, _ = make(**changes)
    checkpoints: list[bytes] = []
    wishes = iter([Wish.GO_ON] * 3 + [Wish.CHECKPOINT, Wish.GO_ON, Wish.STOP])

    def die_after_epoch(now: Progress) -> None:
        checkpoints.append(saved(first, now))
        if now.epochs_done == 2:
            raise Killed

    hooks = (
        Hooks(wish=lambda: next(wishes), on_checkpoint=lambda now: checkpoints.append(saved(first, now)))
        if within_epoch
        else Hooks(on_epoch=die_after_epoch)
    )
    with pytest.raises(Interrupted if within_epoch else Killed):
        train(first, rows, val, settings, hooks=hooks)
    # The newest, and where there is one the one before it, which is what a killed process leaves.
    for checkpoint in checkpoints[-2:]:
        resumed, progress = restored(checkpoint, settings)
        assert (progress.partial is not None) == within_epoch
        train(resumed, rows, val, settings, progress)
        assert_same_end((undisturbed, whole), (resumed, progress))
    assert len({record["learning_rate"] for record in whole.history}) > 1, "the schedule did nothing, so nothing of it was tested"


@pytest.mark.parametrize(
    ("asked", "where"),
    [
        (2, "within epoch 1, after step 2 of 3"),
        (3, "within epoch 1, after step 3 of 3"),
        (4, "after epoch 1"),
        (7, "within epoch 2, after step 3 of 3"),
    ],
)
def test_a_stop_is_obeyed_after_any_step_and_any_epoch_and_changes_nothing(asked: int, where: str) -> None:
    rows, val = patches(21), patches(6, 1)
    undisturbed, settings = make(depth=0, batch_size=8, epochs=2)
    whole = train(undisturbed, rows, val, settings)
    learner, _ = make(depth=0, batch_size=8, epochs=2)
    wishes = iter([Wish.GO_ON] * (asked - 1) + [Wish.STOP])
    checkpoints: list[bytes] = []

    def save(now: Progress) -> None:
        checkpoints.append(saved(learner, now))

    with pytest.raises(Interrupted, match=f"stopped {where}"):
        train(learner, rows, val, settings, hooks=Hooks(save, lambda: next(wishes), save))
    resumed, progress = restored(checkpoints[-1], settings)
    train(resumed, rows, val, settings, progress)
    assert_same_end((undisturbed, whole), (resumed, progress))


@pytest.mark.parametrize("schedule", ["plateau", "one_cycle", "constant"])
def test_a_rate_that_scales_with_workers_follows_their_number(schedule: str) -> None:
    learner, settings = make(depth=1, schedule=schedule, scale_learning_rate=True, stage_lr_factor=0.5, learning_rate=0.01)
    train(learner, patches(16), patches(6, 1), settings)
    state = learner.state() | {"world_size": 4}  # as a group of four would have left it
    rates = [(group["lr"], group["initial_lr"]) for group in learner.optimiser.param_groups]
    other, _ = make(depth=1, schedule=schedule, scale_learning_rate=True, stage_lr_factor=0.5, learning_rate=0.01)
    other.restore(state_of(learner.kept), copy.deepcopy(state))
    assert [(group["lr"] * 4, group["initial_lr"] * 4) for group in other.optimiser.param_groups] == [pytest.approx(pair) for pair in rates]


def test_logits_are_never_in_half_precision() -> None:
    learner, _ = make(depth=0, precision="bf16")
    learner.train_mode()
    rows = torch.rand(64, 3, 32, 32)
    trained = learner.forward(rows).detach()
    with learner.evaluating() as validating, torch.inference_mode():
        validated = validating(rows)
    for z in (trained, validated):
        assert not torch.equal(z, z.bfloat16().float())


@pytest.mark.slow
@pytest.mark.timeout(1500)  # minutes of compiling, on a machine that does nothing else
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPUs")
def test_a_compiled_network_learns_what_the_network_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    rows, val = patches(32), patches(6, 1)
    plain, compiled = (config(epochs=2, augment=PLAIN, compile=compile_it, **GRADIENT_DESCENT) for compile_it in (False, True))
    learners = [Learner(small_network(1, batch_norm=True), settings) for settings in (plain, compiled)]
    expected, found = (train(learner, rows, val, learner.config) for learner in learners)
    for one, other in zip(expected.history, found.history, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-3)
        assert one["val_loss"] == pytest.approx(other["val_loss"], rel=1e-3)
    for name, value in learners[0].kept.state_dict().items():
        torch.testing.assert_close(value, learners[1].kept.state_dict()[name], atol=1e-4, rtol=1e-3, msg=name)


def test_nobody_is_asked_once_training_is_done() -> None:
    learner, settings = make(depth=0, batch_size=8)
    asked: list[int] = []
    train(learner, patches(21), patches(6, 1), settings, hooks=Hooks(wish=lambda: asked.append(1) or Wish.GO_ON))  # type: ignore[func-returns-value]
    assert len(asked) == 3  # one for each step, none after the last epoch


class Recorded(ResidentRows):
    """Rows in memory that note which were asked for."""

    def __init__(self, rows: Patches) -> None:
        super().__init__(rows, torch.device("cpu"))
        self.asked: list[int] = []

    def batches(self, batches: Any) -> Any:
        batches = list(batches)
        self.asked += [int(row) for batch in batches for row in batch]
        return super().batches(batches)


@pytest.mark.parametrize("done", [[[2, 3]], [[3, 2], [1, 4]], [[4, 2], [2, 1]]])
def test_an_epoch_that_other_numbers_of_workers_began_trains_each_row_once(done: list[list[int]]) -> None:
    source = Recorded(patches(101))
    settings = config(unfreeze_depth=0, batch_size=4)
    order = source.order(settings.seed, 0, done[0][0], settings.batch_size)
    before = [(workers, batches) for workers, batches in done]
    trained = [
        int(row)
        for index, (workers, batches) in enumerate(before)
        for rank in range(workers)
        for step in EpochPlan(order, workers, 4, done=before[:index]).of_rank(rank)[:batches]
        for row in step.batches[0].rows
    ]
    progress = Progress(partial=PartialEpoch(done=done, sums=[[0.0, 0.0, float(len(trained))]]))
    train_epochs(Learner(network(0), settings), source, patches(6, 1), settings, progress)
    assert sorted(trained + source.asked) == list(range(101))
    assert progress.history[0]["rows"] == 101


def timeless(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if "seconds" not in key}


def test_training_stops_when_validation_no_longer_improves() -> None:
    learner, settings = make(depth=0, epochs=10, early_stopping_patience_epochs=2)
    seen = []
    hooks = Hooks(on_epoch=lambda now: seen.append(now.epochs_done))
    progress = train(that_never_learns(learner), patches(8), patches(6, 1), settings, hooks=hooks)
    # Epoch 0 is the best; after two more without a better one it is over.
    assert seen == [1, 2, 3]
    assert progress.best_epoch == 0
    train(learner, patches(8), patches(6, 1), settings, progress, Hooks(on_epoch=lambda now: pytest.fail("went on after early stopping")))


def test_a_plateau_halves_the_learning_rate_down_to_the_floor() -> None:
    learner, settings = make(
        depth=0, epochs=8, early_stopping_patience_epochs=None, lr_patience_epochs=1, lr_factor=0.5, lr_floor=3e-4, learning_rate=1e-3
    )
    progress = train(that_never_learns(learner), patches(8), patches(6, 1), settings)
    rates = [record["learning_rate"] for record in progress.history]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-3, 5e-4, 5e-4, 3e-4, 3e-4, 3e-4])


def test_without_epochs_the_initial_network_is_validated_once() -> None:
    learner, settings = make(depth=1, epochs=0)
    before = state_of(learner.model)
    calls: list[Progress] = []
    progress = Progress()
    for _ in range(2):
        train(learner, patches(10), patches(8, 1), settings, progress, Hooks(on_epoch=lambda now: calls.append(copy.deepcopy(now))))
    assert len(calls) == 1
    assert (progress.epochs_done, progress.best_epoch) == (0, -1)
    assert timeless(progress.history[0]).keys() == {"epoch", "depth", "train_loss", "val_loss", "val_roc_auc", "learning_rate", "rows"}
    assert (progress.history[0]["epoch"], progress.history[0]["train_loss"], progress.history[0]["rows"]) == (-1, None, 0)
    assert all(torch.equal(value, before[name]) for name, value in learner.model.state_dict().items())


def test_a_training_loss_that_is_not_finite_ends_the_run_at_its_step() -> None:
    learner, settings = make(depth=1, learning_rate=1e30)
    with pytest.raises(TrainingError, match=r"epoch 1, step 2 of 3: the training loss is not finite at learning rate 1e\+30; lower it"):
        train(learner, patches(24), patches(6, 1), settings, hooks=Hooks(on_checkpoint=lambda now: pytest.fail("a checkpoint of nothing finite")))


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_a_validation_loss_that_is_not_finite_ends_the_run_before_it_is_recorded() -> None:
    learner, settings = make(depth=5)
    learner.model.get_submodule("bn1").running_var.fill_(-1e9)  # train mode does not look at it
    progress = Progress()
    with pytest.raises(TrainingError, match=r"epoch 1: the validation loss is nan at learning rate 0\.001; lower it"):
        train(learner, patches(16), patches(6, 1), settings, progress)
    assert progress == Progress()


def test_a_validation_split_of_one_class_has_no_area_but_a_loss() -> None:
    learner, settings = make(depth=0)
    val = patches(10, 1)
    record = train(learner, patches(12), val.take(val.labels == 0), settings).history[0]
    assert record["val_roc_auc"] is None
    assert math.isfinite(record["val_loss"])


def record(epoch: int, **values: Any) -> dict[str, Any]:
    return {"epoch": epoch, "val_loss": 1.0, "val_roc_auc": 0.5} | values


def test_the_best_epoch_has_the_smallest_loss_or_the_largest_area() -> None:
    for metric, values, best in (
        ("val_loss", [3.0, 1.0, 2.0, 1.0], 1),
        ("val_roc_auc", [0.6, 0.9, 0.8, 0.9], 1),
        ("val_roc_auc", [None, 0.7, None], 1),
        ("val_roc_auc", [None, None], 0),
    ):
        progress = Progress()
        for epoch, value in enumerate(values):
            progress.add(record(epoch, **{metric: value}), metric)
        assert (progress.best_epoch, progress.best_value) == (best, values[best])
        assert progress.epochs_done == len(values)


def test_each_new_best_epoch_scores_above_all_before_it_and_any_other_scores_nothing() -> None:
    progress, scores = Progress(), []
    for epoch, value in enumerate([3.0, 1.0, 2.0, 1.0, 0.5]):
        progress.add(record(epoch, val_loss=value), "val_loss")
        scores.append(progress.improvement)
    assert scores == [1, 2, 0, 0, 3]


def test_a_run_is_over_by_count_or_by_patience() -> None:
    assert not Progress(epochs_done=2, best_epoch=1).is_over(config(epochs=3))
    assert Progress(epochs_done=3, best_epoch=2).is_over(config(epochs=3))
    patient = config(epochs=100, early_stopping_patience_epochs=3)
    assert not Progress(epochs_done=4, best_epoch=1).is_over(patient)
    assert Progress(epochs_done=5, best_epoch=1).is_over(patient)
    assert not Progress(epochs_done=50, best_epoch=1).is_over(config(epochs=100, early_stopping_patience_epochs=None))


@pytest.mark.parametrize("values", [[1.0, 1.0, 0.99], [0.5, 0.7, 0.7, 0.7], [0.9, None, 0.9], [None, None]])
def test_the_best_epoch_alone_has_the_highest_score_for_being_kept(values: list[float | None]) -> None:
    progress, scores = Progress(), []
    for epoch, value in enumerate(values):
        progress.add({"epoch": epoch, "val_roc_auc": value}, "val_roc_auc")
        scores.append(progress.improvement)
    assert [epoch for epoch, score in enumerate(scores) if score == max(scores)] == [progress.best_epoch]
