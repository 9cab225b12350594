import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from ray_jobs.tracking import EventFile, RunFacts, Tracking, check_trackers, recorded_steps, store_uri, tracking
from sentinode.config import TrainConfig
from sentinode.errors import StoppedError, UsageError
from sentinode.locations import locate

HERE = locate("/run")
FACTS = RunFacts("run7", TrainConfig(learning_rate=3e-4).model_dump(mode="json"), {"data_fingerprint": "f" * 64, "git_commit": "c" * 40})


def _record(epoch: int, loss: float = 0.5) -> dict[str, Any]:
    numbers = {"train_loss": loss, "val_loss": loss / 2, "val_roc_auc": 0.9, "learning_rate": 1e-3, "rows": 200, "seconds": 4.0}
    return {"epoch": epoch, **numbers}


def _follow(folder: Path, epochs: list[int], trackers: tuple[str, ...] = ("tensorboard",)) -> None:
    with tracking(TrainConfig(trackers=trackers), locate(folder), FACTS) as run:
        for epoch in epochs:
            run.add(_record(epoch, loss=1 / (epoch + 2)))
        run.end("finished", {"bundle_digest": "d" * 64})


def _scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [(event.step, pytest.approx(event.value)) for event in events.Scalars(tag)]


def _texts(folder: Path) -> dict[str, str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {tag: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}


def test_event_files_hold_every_epoch_the_configuration_the_fingerprint_and_the_commit(tmp_path: Path) -> None:
    _follow(tmp_path, [0, 1, 2])
    assert _scalars(tmp_path, "loss/train") == [(1, 1 / 2), (2, 1 / 3), (3, 1 / 4)]
    assert _scalars(tmp_path, "speed/images_per_s") == [(1, 50), (2, 50), (3, 50)]
    assert [step for step, _ in _scalars(tmp_path, "roc_auc/validation")] == [1, 2, 3]
    texts = _texts(tmp_path)
    assert "learning_rate: 0.0003" in texts["config/text_summary"]
    assert "f" * 64 in texts["run/text_summary"]
    assert "c" * 40 in texts["run/text_summary"]
    assert "d" * 64 in texts["end/text_summary"]


def test_a_run_that_goes_on_appends_and_repeats_no_epoch(tmp_path: Path) -> None:
    _follow(tmp_path, [0, 1])
    _follow(tmp_path, [0, 1, 2])
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    assert _scalars(tmp_path, "loss/train") == [(1, 1 / 2), (2, 1 / 3), (3, 1 / 4)]


def test_a_record_torn_by_a_kill_is_written_anew(tmp_path: Path) -> None:
    events = EventFile(locate(tmp_path / "tensorboard"), FACTS)
    for step in (1, 2):
        events.epoch(step, {"val_loss": 0.5, "train_loss": 1 / (step + 1)})
    (path,) = (tmp_path / "tensorboard").iterdir()
    path.write_bytes(path.read_bytes()[:-3])
    assert recorded_steps(locate(tmp_path / "tensorboard")) == {1}
    _follow(tmp_path, [0, 1, 2])
    assert _scalars(tmp_path, "loss/train") == [(1, 1 / 2), (2, 1 / 3), (3, 1 / 4)]


@pytest.mark.parametrize(("error", "status"), [(StoppedError("x"), "stopped"), (ValueError("x"), "failed")])
def test_how_a_run_ended_is_recorded(error: Exception, status: str, tmp_path: Path) -> None:
    with pytest.raises(type(error)), tracking(TrainConfig(), locate(tmp_path), FACTS):
        raise error
    assert f"status: {status}" in _texts(tmp_path)["end/text_summary"]


def _refused(*_: object) -> None:
    raise AssertionError("a request for each value")


@pytest.fixture(scope="module")
def mlflow_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """(run folder, current folder and home) of a run that MLflow was told of in two parts."""
    folder, elsewhere = tmp_path_factory.mktemp("mlflow") / "run", tmp_path_factory.mktemp("elsewhere")
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("HOME", str(elsewhere))
        patch.chdir(elsewhere)
        for one_by_one in ("log_param", "set_tag"):
            patch.setattr(f"mlflow.MlflowClient.{one_by_one}", _refused)
        # As if the first process had been killed after it made the run: the note has no id.
        _follow(folder, [0, 1], ("mlflow",))
        note = folder / "mlflow_run.json"
        note.write_text(note.read_text().replace('"run_id"', '"lost"'))
        _follow(folder, [0, 1, 2], ("mlflow",))
        yield folder, elsewhere


def test_mlflow_needs_no_server_and_writes_nowhere_but_into_the_run_s_folder(mlflow_run: tuple[Path, Path]) -> None:
    folder, elsewhere = mlflow_run
    assert (folder / "mlflow.db").exists()
    assert list(elsewhere.iterdir()) == []


def test_mlflow_holds_one_run_with_each_epoch_once_the_configuration_the_fingerprint_and_the_commit(mlflow_run: tuple[Path, Path]) -> None:
    from mlflow import MlflowClient

    folder, _ = mlflow_run
    client = MlflowClient(tracking_uri=store_uri(TrainConfig(), locate(folder)))
    experiment = client.get_experiment_by_name("sentinode")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "train_loss")] == [
        (1, 1 / 2),
        (2, 1 / 3),
        (3, 1 / 4),
    ]
    assert run.info.status == "FINISHED"
    assert run.data.params["learning_rate"] == "0.0003"
    assert run.data.params["augment.dihedral"] == "True"
    assert run.data.tags["sentinode.data_fingerprint"] == "f" * 64
    assert run.data.tags["mlflow.source.git.commit"] == "c" * 40
    assert run.data.tags["sentinode.bundle_digest"] == "d" * 64
    assert run.info.run_name == "run7"
    assert run.info.run_id in (folder / "mlflow_run.json").read_text()


class _Tracker:
    """Fails, or hangs, as told."""

    def __init__(self, failures: int = 0, hang: threading.Event | None = None) -> None:
        self.recorded, self.steps, self._failures, self._hang = -1, list[int](), failures, hang

    def epoch(self, step: int, numbers: Mapping[str, float]) -> None:
        if self._hang is not None:
            self._hang.wait()
        if self._failures:
            self._failures -= 1
            raise ConnectionError("gone\nfor a while")
        self.steps.append(step)

    def end(self, status: str, result: Mapping[str, float | str]) -> None:
        self.steps.append(-1)


def test_a_tracker_that_fails_is_told_of_once_and_gets_the_missing_epochs_when_it_is_back(capsys: pytest.CaptureFixture[str]) -> None:
    tracker = _Tracker(failures=2)
    run = Tracking({"mlflow": lambda: tracker})
    for epoch in range(4):
        run.add(_record(epoch))
    run.end("finished", {})
    run.close(30)
    assert tracker.steps == [1, 2, 3, 4, -1]
    assert capsys.readouterr().out.splitlines() == ["warning: tracker mlflow: for a while; training goes on without it"]


def test_a_tracker_that_hangs_holds_nobody_up(capsys: pytest.CaptureFixture[str]) -> None:
    hang = threading.Event()
    stuck, other = _Tracker(hang=hang), _Tracker()
    run = Tracking({"mlflow": lambda: stuck, "tensorboard": lambda: other})
    run.add(_record(0))
    run.close(0.5)
    assert "warning: tracker mlflow: does not answer" in capsys.readouterr().out
    assert other.steps == [1]
    hang.set()


def test_mlflow_without_its_extra_is_wrong_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_trackers(TrainConfig(), HERE)
    with pytest.raises(UsageError, match=r"pip install 'sentinode\[mlflow\]'"):
        check_trackers(TrainConfig(trackers=("mlflow",)), HERE)


def test_a_password_in_the_uri_is_refused_without_being_repeated() -> None:
    with pytest.raises(UsageError, match="MLFLOW_TRACKING_PASSWORD") as raised:
        check_trackers(TrainConfig(trackers=("mlflow",), mlflow_uri="https://me:secret@server"), HERE)
    assert "secret" not in str(raised.value)


def test_the_store_is_the_configured_one_then_the_environment_s_then_a_file_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert store_uri(TrainConfig(mlflow_uri=str(tmp_path / "all.db")), locate(tmp_path)) == f"sqlite:///{tmp_path}/all.db"
    assert store_uri(TrainConfig(), locate(tmp_path)) == "http://server:5000"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert store_uri(TrainConfig(), locate(tmp_path)) == f"sqlite:///{tmp_path}/mlflow.db"
