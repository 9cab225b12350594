from pathlib import Path

import pytest
import torch

from ray_jobs.cluster import Need, capacity, check_capacity
from ray_jobs.train import TrainResult, best_checkpoint, train
from sentinode.bundle import Bundle
from sentinode.config import TrainConfig
from sentinode.dataset import PreparedDataset
from sentinode.errors import CapacityError, TrainingError, UsageError
from tests.ray_jobs.conftest import QUICK, folder_of

pytestmark = pytest.mark.ray


def test_two_workers_end_with_a_bundle_that_verifies(trained: TrainResult, dataset: PreparedDataset) -> None:
    manifest = trained.bundle.manifest
    assert Bundle.open(trained.bundle.path).verify() == []
    assert manifest.data.fingerprint == dataset.manifest.fingerprint
    assert manifest.metrics["rows"] == dataset.manifest.counts["val"].rows
    assert manifest.training_config["workers"] == 2
    assert [record["rows"] for record in trained.history] == [dataset.manifest.counts["train"].rows] * 2


def test_the_run_keeps_the_best_and_the_last_checkpoint_only(trained: TrainResult) -> None:
    checkpoints = list(folder_of(trained).glob("checkpoint_*/model.safetensors"))
    assert 1 <= len(checkpoints) <= 2


def test_the_bundle_holds_the_weights_of_the_best_epoch(trained: TrainResult) -> None:
    kept = best_checkpoint(folder_of(trained))
    assert kept is not None
    weights, progress = kept
    stored = trained.bundle.read_weights()
    assert all(torch.equal(weights[name], stored[name]) for name in weights)
    losses = [record["val_loss"] for record in progress.history]
    assert progress.best_epoch == losses.index(min(losses))


def test_the_same_command_on_a_finished_run_answers_at_once(trained: TrainResult, dataset: PreparedDataset) -> None:
    again = train(TrainConfig(**QUICK, workers=2), dataset.path, folder_of(trained))
    assert again.already_complete
    assert again.bundle.manifest.digest == trained.bundle.manifest.digest


def test_another_config_in_the_same_folder_is_refused(trained: TrainResult, dataset: PreparedDataset) -> None:
    with pytest.raises(UsageError, match=r"learning_rate was 0\.001, now 0\.01"):
        train(TrainConfig(**(QUICK | {"learning_rate": 0.01}), workers=2), dataset.path, folder_of(trained))


@pytest.mark.slow
def test_a_run_with_the_same_seed_ends_with_the_same_digest(trained: TrainResult, dataset: PreparedDataset, tmp_path: Path, free_cpus: None) -> None:
    again = train(TrainConfig(**QUICK, workers=2), dataset.path, tmp_path / "again")
    assert again.bundle.manifest.digest == trained.bundle.manifest.digest


def test_no_epochs_make_a_bundle_of_the_initial_weights(dataset: PreparedDataset, tmp_path: Path, ray_session: None, free_cpus: None) -> None:
    from sentinode.model import build_model

    result = train(TrainConfig(**(QUICK | {"epochs": 0}), fold=1), dataset.path, tmp_path / "run")
    torch.manual_seed(42)
    expected = build_model("resnet18").state_dict()
    stored = result.bundle.read_weights()
    assert all(torch.equal(stored[name], expected[name]) for name in expected)
    assert result.bundle.manifest.data.fold == 1


def test_a_loss_that_is_not_finite_ends_the_run_in_one_line(dataset: PreparedDataset, tmp_path: Path, ray_session: None, free_cpus: None) -> None:
    with pytest.raises(TrainingError, match=r"epoch 1, step \d of 7: the training loss is not finite at learning rate 1e\+30; lower it; there is no"):
        train(TrainConfig(**(QUICK | {"learning_rate": 1e30})), dataset.path, tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"workers": 64, "use_gpu": False},
            r"train needs 65 CPUs \(64 workers x 1 \+ 1 for driver and data\); the cluster has 4 and cannot add more",
        ),
        ({"workers": 2, "use_gpu": True}, r"train needs 2 GPUs \(2 workers x 1\); the cluster has 0 and cannot add more"),
    ],
)
def test_more_than_the_cluster_has_is_refused_at_once_and_leaves_no_folder(
    settings: dict[str, object], expected: str, dataset: PreparedDataset, tmp_path: Path, ray_session: None
) -> None:
    with pytest.raises(CapacityError, match=expected):
        train(TrainConfig(**QUICK, **settings), dataset.path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_an_autoscaler_may_add_counts(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert capacity() == {"CPU": 4.0, "GPU": 0.0}
    monkeypatch.setattr("ray_jobs.cluster._configured_maximum", lambda: {"CPU": 64, "GPU": 8})
    monkeypatch.delenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", raising=False)
    check_capacity(Need(workers=8, gpus_per_worker=1), "train")
    with pytest.raises(CapacityError, match="train needs 9 GPUs"):
        check_capacity(Need(workers=9, gpus_per_worker=1), "train")


def test_a_fold_that_does_not_exist_is_refused(dataset: PreparedDataset, tmp_path: Path, ray_session: None) -> None:
    with pytest.raises(UsageError, match="no fold 7; it has folds 0 to 2"):
        train(TrainConfig(**QUICK, fold=7), dataset.path, tmp_path / "run")
