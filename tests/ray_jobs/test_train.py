import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ray_jobs.checkpoints import Saved, best_and_last
from ray_jobs.cluster import Need, capacity, check_capacity
from ray_jobs.run_folder import RunRequest
from ray_jobs.train import TrainResult, _finish, best_checkpoint, describe_epoch, initial_weights, main, resolve_gpus, train
from sentinode.bundle import Bundle
from sentinode.config import TrainConfig
from sentinode.dataset import PreparedDataset
from sentinode.errors import CapacityError, TrainingError, UsageError
from sentinode.locations import locate
from sentinode.model import build_model
from sentinode.training import Progress
from tests.factories import make_dataset
from tests.processes import running, sentinode
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
    kept = best_checkpoint(locate(folder_of(trained)))
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


def test_another_data_set_in_the_same_folder_is_refused(trained: TrainResult, tmp_path: Path) -> None:
    other = make_dataset(tmp_path / "data", train=20, val=10)
    with pytest.raises(UsageError, match=r"belongs to another run \(data_fingerprint "):
        train(TrainConfig(**QUICK, workers=2), other.path, folder_of(trained))


def test_tensorboard_shows_each_epoch_once(trained: TrainResult) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder_of(trained) / "tensorboard")).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("loss/validation")]
    assert losses == [(record["epoch"] + 1, pytest.approx(record["val_loss"])) for record in trained.history]
    facts = events.Tensors("run/text_summary")[0].tensor_proto.string_val[0].decode()
    assert trained.bundle.manifest.data.fingerprint in facts


def test_mlflow_without_its_extra_ends_with_code_2_before_ray_is_started(
    dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("ray_jobs.train.connected", lambda *_, **__: pytest.fail("Ray was started"))
    assert main(["--data", str(dataset.path), "--out", str(tmp_path / "run"), "--set", "weights=none", "trackers=[mlflow]"]) == 2
    assert "pip install 'sentinode[mlflow]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_with_the_same_seed_and_a_checkpoint_after_every_step_ends_with_the_same_digest(
    trained: TrainResult, dataset: PreparedDataset, tmp_path: Path, free_cpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = TrainConfig(**QUICK, workers=2, checkpoint_interval_s=1e-3, trackers=("mlflow",))
    again = train(config, dataset.path, tmp_path / "again")
    assert again.bundle.manifest.digest == trained.bundle.manifest.digest
    assert 1 <= len(list(folder_of(again).glob("checkpoint_*/"))) <= 2
    # An epoch has four steps; only the number still tells that there were more checkpoints than epochs.
    assert max(int(path.name.split("_")[1]) for path in folder_of(again).glob("checkpoint_*/")) > 2
    client = MlflowClient(tracking_uri=f"sqlite:///{folder_of(again)}/mlflow.db")
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "val_loss")] == [1, 2]
    assert run.data.tags["sentinode.bundle_digest"] == again.bundle.manifest.digest


@pytest.mark.slow
def test_a_run_that_streams_its_rows_counts_each_once(dataset: PreparedDataset, tmp_path: Path, ray_session: None, free_cpus: None) -> None:
    config = TrainConfig(**QUICK, workers=2, ingest="stream", stream_window_rows=16, fold=0)
    result = train(config, dataset.path, tmp_path / "run")
    validated = result.bundle.manifest.metrics["rows"]
    both = dataset.manifest.counts["train"].rows + dataset.manifest.counts["val"].rows
    assert [record["rows"] for record in result.history] == [both - validated] * 2


@pytest.mark.slow
def test_no_epochs_make_a_bundle_of_the_initial_weights_which_the_driver_alone_reads(
    dataset: PreparedDataset, tmp_path: Path, ray_session: None, free_cpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(7)
    # A head of another size is replaced by a random one; everything else is the file's.
    stored = build_model("resnet18", num_classes=5).state_dict()
    save_file(stored, tmp_path / "weights.safetensors")
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(**(QUICK | {"epochs": 0, "weights": "weights.safetensors"}), fold=1)
    result = train(config, dataset.path, tmp_path / "run")
    weights = result.bundle.read_weights()
    assert all(torch.equal(weights[name], stored[name]) for name in stored if not name.startswith("fc."))
    assert torch.equal(weights["fc.weight"], initial_weights(config)["fc.weight"])
    assert result.bundle.manifest.data.fold == 1


def test_a_loss_that_is_not_finite_ends_the_run_in_one_line(dataset: PreparedDataset, tmp_path: Path, ray_session: None, free_cpus: None) -> None:
    told = r"epoch 1, step \d of \d: the training loss is not finite at learning rate 1e\+30; lower it; there is no"
    with pytest.raises(TrainingError, match=told):
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
    monkeypatch.setenv("SENTINODE_CLUSTER_MAX", "CPU=64 GPU=8")
    # Set first, so that it is as it was again afterwards.
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "")
    monkeypatch.delenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S")
    check_capacity(Need(workers=8, gpus_per_worker=1), "train")
    with pytest.raises(CapacityError, match="train needs 9 GPUs"):
        check_capacity(Need(workers=9, gpus_per_worker=1), "train")


def test_a_run_goes_on_on_what_it_was_begun_on_whatever_there_is_now(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(**QUICK, workers=2)

    def begun_on(device: str) -> Saved:
        return Saved(Path("/runs/run7/checkpoint_000001_a"), 1, 2, "resident", device, Progress())

    assert not resolve_gpus(config, 2, None, "train")
    with pytest.raises(CapacityError, match=r"train, begun on GPUs, needs 2 GPUs \(2 workers x 1\); the cluster has 0 and cannot add more"):
        resolve_gpus(config, 2, begun_on("cuda"), "train")
    monkeypatch.setenv("SENTINODE_CLUSTER_MAX", "CPU=64 GPU=8")
    assert resolve_gpus(config, 2, None, "train")
    assert not resolve_gpus(config, 2, begun_on("cpu"), "train")


@pytest.mark.parametrize(("settings", "named"), [({"precision": "fp16"}, "precision fp16"), ({"sync_batch_norm": True}, "sync_batch_norm")])
def test_what_needs_gpus_is_refused_where_auto_finds_none(
    settings: dict[str, object], named: str, dataset: PreparedDataset, tmp_path: Path, ray_session: None
) -> None:
    with pytest.raises(UsageError, match=f"{named} needs GPUs, of which use_gpu auto found too few"):
        train(TrainConfig(**QUICK, **settings), dataset.path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_ray_of_our_own_has_room_for_all_cpus_of_all_workers(dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class _Started(Exception):
        pass

    def connected(need_cpus: float, **_: object) -> None:
        raise _Started(need_cpus)

    monkeypatch.setattr("ray_jobs.train.connected", connected)
    with pytest.raises(_Started, match=r"^6$"):
        train(TrainConfig(**QUICK, workers=2, cpus_per_worker=3), dataset.path, tmp_path / "run")


@pytest.mark.slow
def test_workers_that_see_another_folder_touch_nothing_there_and_end_the_run_at_once(
    dataset: PreparedDataset, tmp_path: Path, ray_session: None, free_cpus: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    claim = RunRequest.claim

    def claimed_elsewhere(request: RunRequest) -> str:
        claim(request)
        # Of an unrelated run: the driver looked at a folder of its own, where there was none.
        (request.folder / "checkpoint_000007_a").local.mkdir()
        return "0" * 32

    monkeypatch.setattr(RunRequest, "claim", claimed_elsewhere)
    monkeypatch.setattr("ray_jobs.trainer.tidy", lambda folder: None)
    with pytest.raises(UsageError, match=r"run is not the same folder on every node; put --out on a file system that all nodes share"):
        train(TrainConfig(**QUICK, workers=2), dataset.path, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint_000007_a").exists()
    assert "a worker failed" not in capsys.readouterr().out


def test_no_bundle_is_written_where_the_run_s_folder_is_not(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not the same folder on every node"):
        _finish._function({}, None, TrainConfig(), None, locate(tmp_path / "bundle"), "0" * 32, "run", "cpu")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_run_that_goes_on_needs_no_initial_weights(dataset: PreparedDataset, tmp_path: Path, ray_session: None, free_cpus: None) -> None:
    weights = tmp_path / "weights.safetensors"
    save_file(build_model("resnet18").state_dict(), weights)
    config = TrainConfig(**(QUICK | {"epochs": 0, "weights": str(weights)}))
    digest = train(config, dataset.path, tmp_path / "run").bundle.manifest.digest
    shutil.rmtree(tmp_path / "run" / "bundle")
    weights.unlink()
    assert train(config, dataset.path, tmp_path / "run").bundle.manifest.digest == digest


def test_a_fold_that_does_not_exist_is_refused(dataset: PreparedDataset, tmp_path: Path, ray_session: None) -> None:
    with pytest.raises(UsageError, match="no fold 7; it has folds 0 to 2"):
        train(TrainConfig(**QUICK, fold=7), dataset.path, tmp_path / "run")
    # The command put right may use the same folder.
    assert not (tmp_path / "run").exists()


def test_a_class_that_validation_lacks_is_told_before_training(tmp_path: Path, ray_session: None) -> None:
    data = make_dataset(tmp_path / "data", train=20, val=1)
    with pytest.raises(UsageError, match="both classes in validation"):
        train(TrainConfig(**QUICK), data.path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("ingest", ["resident", "stream"])
def test_a_class_that_the_rows_to_train_on_lack_is_told_before_training(ingest: str, tmp_path: Path, ray_session: None) -> None:
    data = make_dataset(tmp_path / "data", train=2, val=20)
    with pytest.raises(UsageError, match="training needs both classes; the rows hold 0 normal and 2 metastatic patches"):
        train(TrainConfig(**QUICK, ingest=ingest), data.path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "epoch 2/5  loss 0.6000  val loss 0.5000  val AUC 0.9000  lr 0.0003  50 images/s  33 s left"),
        ({"improvement": 2}, "epoch 2/5  loss 0.6000  val loss 0.5000  val AUC 0.9000  lr 0.0003  50 images/s  33 s left  best so far"),
        ({"seconds": 1000.0}, "epoch 2/5  loss 0.6000  val loss 0.5000  val AUC 0.9000  lr 0.0003  0 images/s  50 min left"),
        ({"seconds": 10000.0, "val_roc_auc": None}, "epoch 2/5  loss 0.6000  val loss 0.5000  val AUC -  lr 0.0003  0 images/s  8.3 h left"),
        ({"epoch": -1}, "initial weights: val loss 0.5000  val AUC 0.9000"),
    ],
)
def test_an_epoch_is_a_line_for_people(changes: dict[str, object], line: str) -> None:
    numbers = {"train_loss": 0.6, "val_loss": 0.5, "val_roc_auc": 0.9, "learning_rate": 3e-4, "rows": 500, "seconds": 10.0, "val_seconds": 1.0}
    assert describe_epoch({"epoch": 1, "improvement": 0, **numbers, **changes}, TrainConfig(epochs=5)) == line


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_on_gpus_is_stopped_within_an_epoch_and_goes_on(dataset: PreparedDataset, tmp_path: Path) -> None:
    workers = min(2, torch.cuda.device_count())
    settings = [
        *(f"{name}={value}" for name, value in QUICK.items()),
        "epochs=20",
        "early_stopping_patience_epochs=null",
        "ema_decay=0.9",
        "dropout=0.2",
    ]
    argv = ["train", "--data", dataset.path, "--out", tmp_path / "run", "--set", *settings, "use_gpu=true", f"workers={workers}"]
    # Processes of their own: the Ray that tests share has no GPUs.
    with running(*argv, ray_address=None) as command:
        assert " on cuda" in command.wait_for_line(f"training with {workers} worker", 300)
        command.wait_for_line("epoch 1/", 300)
        command.process.send_signal(signal.SIGTERM)
        assert command.process.wait(120) == 3
    again = sentinode(*argv, ray_address=None)
    assert again.returncode == 0, again.stderr
    assert " on cuda, continuing " in again.stdout
    _, last = best_and_last(locate(tmp_path / "run"))
    assert last is not None
    assert [record["rows"] for record in last.progress.history] == [dataset.manifest.counts["train"].rows] * 20
