"""Jobs read from an object store and write to it what they read and write on disk."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ray_jobs.checkpoints import saved_checkpoints
from ray_jobs.evaluate import _check_replaceable, _publish, evaluate
from ray_jobs.predict import _open_work_in_store, _plan, predict
from ray_jobs.predict_inputs import open_inputs
from ray_jobs.predict_parts import PartNote, Work
from ray_jobs.tracking import recorded_steps
from ray_jobs.train import TrainResult, train
from ray_jobs.tune import tune
from sentinode.bundle import Bundle
from sentinode.config import EvaluateConfig, PredictConfig, SweepConfig, TrainConfig, load_config
from sentinode.dataset import PreparedDataset
from sentinode.errors import UsageError
from sentinode.locations import Location, locate
from sentinode.publishing import publish
from sentinode.storage import json_bytes, write_json
from sentinode.verify import verify_folder
from tests.factories import make_bundle
from tests.ray_jobs.conftest import QUICK

pytestmark = pytest.mark.ray


@pytest.fixture
def in_store(dataset: PreparedDataset, s3_folder: str, tmp_path: Path) -> str:
    staging = Path(shutil.copytree(dataset.path, tmp_path / "staging"))
    write_json(staging / "dataset.json", dataset.manifest.model_copy(update={"root": "parts-1", "format_version": 2}).model_dump(mode="json"))
    publish(staging, locate(s3_folder), "dataset.json")
    return s3_folder


@pytest.mark.slow
def test_a_model_is_evaluated_on_a_data_set_in_an_object_store(ray_session: None, dataset: PreparedDataset, in_store: str, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle").path
    report = evaluate(EvaluateConfig(), bundle, in_store, tmp_path / "report").report
    assert report.data["path"] == in_store
    assert report.roc_auc == evaluate(EvaluateConfig(), bundle, dataset.location.local, tmp_path / "same").report.roc_auc


@pytest.mark.slow
def test_a_model_is_trained_on_a_data_set_in_an_object_store(ray_session: None, free_cpus: None, in_store: str, tmp_path: Path) -> None:
    config = TrainConfig(arch="resnet18", weights="none", input_size_px=32, epochs=0)
    assert not train(config, in_store, tmp_path / "run").already_complete


def test_a_report_that_is_replaced_never_has_a_page_beside_figures_of_another(s3_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target = locate(s3_folder) / "report"

    def report(auc: float) -> Any:
        return SimpleNamespace(model_dump=lambda mode: {"roc_auc": auc})

    _publish(report(0.8), "old", target)
    write = Location.write_bytes

    def killed(self: Location, content: bytes, **options: Any) -> None:
        if self.name == "report.json":
            raise KeyboardInterrupt
        write(self, content, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Location, "write_bytes", killed)
        with pytest.raises(KeyboardInterrupt):
            _publish(report(0.9), "new", target)
    assert not (target / "report.json").exists()
    _check_replaceable(target)
    _publish(report(0.9), "new", target)
    assert json.loads((target / "report.json").read_bytes()) == {"roc_auc": 0.9}


@pytest.mark.parametrize("verb", ["train", "tune"])
def test_who_was_held_up_before_it_began_leaves_the_run_to_who_took_it_over(
    ray_session: None, free_cpus: None, dataset: PreparedDataset, s3_folder: str, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    run = f"{s3_folder}/run"

    def held_up(*_: object) -> None:
        # Meanwhile another process found it silent, and took the right.
        (locate(s3_folder) / ".run.owner/000002.json").write_bytes(b"{}")

    monkeypatch.setattr(f"ray_jobs.{verb}.load_rows", held_up)
    begin = {
        "train": lambda: train(TrainConfig(**QUICK), dataset.path, run),
        "tune": lambda: tune(load_config(SweepConfig, ["tune_configs/smoke.yaml"]), dataset.path, run),
    }
    with pytest.raises(UsageError, match=rf"^{run}: another process writes it now, so this one has stopped$"):
        begin[verb]()
    assert not locate(run).exists()


@pytest.mark.slow
def test_a_run_in_an_object_store_is_that_on_disk(ray_session: None, free_cpus: None, in_store: str, trained: TrainResult) -> None:
    out = f"{in_store}/run"
    result = train(TrainConfig(**QUICK, workers=2), in_store, out)
    assert result.bundle.manifest.digest == trained.bundle.manifest.digest
    assert str(result.bundle.where) == f"{out}/bundle"
    assert verify_folder(f"{out}/bundle") == ("model bundle", [])
    # Two checkpoints at most, events, nothing of what was on the way.
    kept = {entry.name for entry in locate(out).entries() if not entry.name.startswith(".")}
    assert {name.split("_")[0] for name in kept} == {"bundle", "checkpoint", "request.json", "tensorboard"}
    assert 1 <= len(saved_checkpoints(locate(out))) <= 2
    assert recorded_steps(locate(out) / "tensorboard") == {1, 2}
    assert train(TrainConfig(**QUICK, workers=2), in_store, out).already_complete


@pytest.mark.slow
def test_a_sweep_in_an_object_store_is_that_on_disk(
    ray_session: None, free_cpus: None, dataset: PreparedDataset, in_store: str, tmp_path: Path
) -> None:
    base = {key: value for key, value in QUICK.items() if key != "learning_rate"} | {"use_gpu": False}
    config = SweepConfig(space={"learning_rate": {"grid": [1e-4, 1e-3]}}, base=base, trials=1)
    stored, same = tune(config, in_store, f"{in_store}/sweep"), tune(config, dataset.path, tmp_path / "sweep")
    assert stored.bundle.manifest.digest == same.bundle.manifest.digest
    assert [trial.epochs[-1]["val_loss"] for trial in stored.trials] == [trial.epochs[-1]["val_loss"] for trial in same.trials]
    assert {"trials.csv", "best.yaml", "report.html", "trials.jsonl"} <= {entry.name for entry in locate(f"{in_store}/sweep").entries()}
    again = train(load_config(TrainConfig, [f"{in_store}/sweep/best.yaml"]), in_store, f"{in_store}/again")
    assert again.bundle.manifest.digest == stored.bundle.manifest.digest


@pytest.mark.slow
def test_patches_of_a_data_set_in_an_object_store_are_predicted(ray_session: None, dataset: PreparedDataset, in_store: str, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle").path
    predicted, same = (
        predict(PredictConfig(), bundle, source, tmp_path / name) for source, name in ((in_store, "stored"), (dataset.location.local, "same"))
    )
    assert predicted.manifest.source == in_store
    assert [part.sha256 for part in predicted.manifest.parts] == [part.sha256 for part in same.manifest.parts]


@pytest.mark.slow
def test_an_interrupted_prediction_in_an_object_store_continues(
    ray_session: None, free_cpus: None, dataset: PreparedDataset, s3_folder: str, tmp_path: Path
) -> None:
    bundle, out = make_bundle(tmp_path / "bundle").path, f"{s3_folder}/predictions"
    source, config = dataset.location.local, PredictConfig(rows_per_part=20)
    parts = len(predict(config, bundle, source, tmp_path / "same").manifest.parts)
    whole = predict(config, bundle, source, out)
    assert verify_folder(out) == ("folder of predictions", [])
    assert not (locate(out) / "_work").exists()
    # As a kill leaves it: plan and all notes but one, no manifest.
    work = Work.in_store(locate(out))
    _open_work_in_store(locate(out), _plan(config, Bundle.open(bundle), open_inputs(str(source))), open_inputs(str(source)), config)
    for number, part in enumerate(whole.manifest.parts[1:], start=1):
        note = PartNote(part=part, errors=0, engine="torch", device="cpu")
        work.note(number).write_bytes(json_bytes(note.model_dump(mode="json")))
    (locate(out) / "_manifest.json").remove()
    with pytest.raises(UsageError, match=r"holds unfinished work of another command \(other rows_per_part\); remove it or use another --out"):
        predict(PredictConfig(rows_per_part=30), bundle, source, out)
    again = predict(config, bundle, source, out)
    assert again.predicted == 20
    assert len(again.manifest.parts) == parts
    assert [part.sha256 for part in again.manifest.parts] == [part.sha256 for part in whole.manifest.parts]
    assert predict(config, bundle, source, out).already_complete


def test_predictions_killed_before_their_plan_was_written_begin_anew(
    ray_session: None, free_cpus: None, dataset: PreparedDataset, s3_folder: str, tmp_path: Path
) -> None:
    (locate(s3_folder) / "out" / "_work" / "inputs.parquet").write_bytes(b"half of it")
    bundle = make_bundle(tmp_path / "bundle").path
    assert predict(PredictConfig(), bundle, dataset.location.local, f"{s3_folder}/out").manifest.rows == len(dataset.index)
    (locate(s3_folder) / "else" / "part-00000.parquet").write_bytes(b"somebody's")
    with pytest.raises(UsageError, match="exists; remove it or use another --out"):
        predict(PredictConfig(), bundle, dataset.location.local, f"{s3_folder}/else")


def test_a_report_whose_writing_was_cut_off_is_made_by_the_same_command(s3_folder: str) -> None:
    target = locate(s3_folder) / "report"
    (target / "report.html").write_bytes(b"<html>")
    _check_replaceable(target)
    (target / "notes.txt").write_bytes(b"somebody's")
    with pytest.raises(UsageError, match="exists and is not a report"):
        _check_replaceable(target)
