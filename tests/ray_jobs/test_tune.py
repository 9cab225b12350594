from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from ray_jobs.cli import main as sentinode
from ray_jobs.train import train
from ray_jobs.tune import tune
from sentinode.bundle import Bundle
from sentinode.config import SweepConfig, TrainConfig, load_config
from sentinode.dataset import PreparedDataset
from sentinode.errors import CapacityError, UsageError
from sentinode.locations import locate
from sentinode.search.journal import Journal
from tests.ray_jobs.conftest import QUICK, wait_until_all_free

TUNE_CONFIGS = Path(__file__).parents[2] / "tune_configs"
BASE = {key: value for key, value in QUICK.items() if key not in ("weights", "learning_rate")} | {"use_gpu": False}


@pytest.mark.parametrize("path", sorted(TUNE_CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_sweep_is_valid_and_writes_every_key(path: Path) -> None:
    load_config(SweepConfig, [path])
    written = yaml.safe_load(path.read_text())
    assert set(SweepConfig.model_fields) - set(written) == set()


def test_the_shipped_asha_sweep_searches_what_it_promises() -> None:
    config = load_config(SweepConfig, [TUNE_CONFIGS / "lr_depth_asha.yaml"])
    assert config.model_dump()["space"] == {
        "learning_rate": {"loguniform": (1e-5, 1e-2)},
        "unfreeze_depth": {"choice": [0, 1, 2, 3, 4, 5]},
    }
    assert config.scheduler.kind == "asha"


@pytest.fixture(scope="module")
def swept(ray_session: None, dataset: PreparedDataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[SweepConfig, Path, Any]:
    """A sweep of which one trial fails, its best repeated, shared by the tests that only read it."""
    folder = tmp_path_factory.mktemp("sweep")
    config = SweepConfig(
        space={"weights": {"grid": ["none", str(folder / "none.safetensors")]}, "learning_rate": {"loguniform": [1e-4, 1e-2]}},
        base=BASE,
        trials=2,
        scheduler={"kind": "asha", "grace_period_epochs": 1, "reduction_factor": 2},
        repeats=1,
        repeat_top=1,
        max_concurrent_trials=2,
    )
    result = tune(config, dataset.path, folder / "sweep")
    wait_until_all_free(60)
    return config, folder / "sweep", result


@pytest.mark.ray
def test_a_sweep_survives_failing_trials_and_tells_of_every_epoch(swept: Any) -> None:
    _, folder, result = swept
    assert Bundle.open(folder / "bundle").manifest.digest == result.bundle.manifest.digest
    table = pd.read_csv(folder / "trials.csv", dtype={"trial": str, "repeats": str})
    assert [trial.status for trial in result.trials].count("failed") == 2
    assert sorted(table["trial"].unique()) == ["00000", "00001", "00002", "00003", "00004"]
    assert table[table["error"].notna()]["error"].str.contains("no such file").sum() == 2
    repeat = table[table["kind"] == "repeat"]
    best = result.standings[0]
    assert (set(repeat["repeats"]), set(repeat["seed"])) == ({best.trial.name}, {43})
    assert best.value == pytest.approx((best.trial.value("val_roc_auc") + result.trials[4].value("val_roc_auc")) / 2)
    assert best.trial.name in (folder / "report.html").read_text()
    finished = [trial for trial in result.trials if trial.status == "finished"]
    assert all(len(trial.epochs) == 2 for trial in finished)
    assert (table["rows"].dropna() == 97).all()
    # TensorBoard's files and a checkpoint of the best epoch's weights, without what nobody goes on with.
    trial_folder = folder / "trials" / best.trial.name
    assert list((trial_folder / "tensorboard").iterdir())
    (checkpoint,) = trial_folder.glob("checkpoint_*/")
    assert sorted(path.name for path in checkpoint.iterdir()) == ["checkpoint.json", "model.safetensors"]


@pytest.mark.ray
def test_a_finished_sweep_is_not_repeated_and_another_one_is_refused(
    swept: Any, dataset: PreparedDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, folder, result = swept
    again = tune(config, dataset.path, folder)
    assert again.already_complete
    assert again.standings[0].trial == result.standings[0].trial
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert sentinode(["tune", "--data", str(dataset.path), "--out", str(folder), "--config", str(file)]) == 0
    assert f"already complete: {folder}" in capsys.readouterr().out
    with pytest.raises(UsageError, match="seed was 42, now 1"):
        tune(config.model_copy(update={"seed": 1}), dataset.path, folder)


@pytest.mark.slow
@pytest.mark.ray
def test_training_best_yaml_again_makes_the_very_bundle(swept: Any, dataset: PreparedDataset, tmp_path: Path) -> None:
    _, folder, result = swept
    config = load_config(TrainConfig, [folder / "best.yaml"])
    assert config.model_dump(mode="json") == result.bundle.manifest.training_config
    again = train(config, dataset.path, tmp_path / "run")
    assert again.bundle.manifest.digest == result.bundle.manifest.digest


@pytest.mark.ray
@pytest.mark.slow
def test_with_folds_each_trial_is_scored_on_all_of_them_and_the_bundle_is_trained_on_the_train_split(
    ray_session: None, dataset: PreparedDataset, tmp_path: Path, free_cpus: None
) -> None:
    config = SweepConfig(
        space={"learning_rate": {"grid": [1e-3, 3e-3]}},
        base=BASE | {"weights": "none", "epochs": 1},
        searcher="grid",
        folds="all",
        scheduler={"kind": "asha", "grace_period_folds": 1, "reduction_factor": 2},
        max_concurrent_trials=1,
    )
    result = tune(config, dataset.path, tmp_path / "sweep")
    first, second = result.trials
    assert [record["fold"] for record in first.epochs] == [0, 1, 2]
    assert (first.status, second.status) in {("finished", "finished"), ("finished", "stopped")}
    assert first.value("val_roc_auc") == pytest.approx(sum(record["val_roc_auc"] for record in first.epochs) / 3)
    # Each row but those of a fold, and never one of the test split.
    assert sum(record["rows"] for record in first.epochs) == 2 * (97 + 41)
    assert result.bundle.manifest.training_config["fold"] is None
    # A fold of a sweep is the fold of `train`.
    alone = train(config.train_config({"learning_rate": 1e-3}).model_copy(update={"fold": 1}), dataset.path, tmp_path / "run")
    assert alone.history[0]["val_roc_auc"] == first.epochs[1]["val_roc_auc"]
    with pytest.raises(UsageError, match=r"folds \(0, 7\): .* has folds 0 to 2"):
        tune(config.model_copy(update={"folds": (0, 7)}), dataset.path, tmp_path / "other")


@pytest.mark.ray
@pytest.mark.slow
def test_trials_with_two_workers_end_in_order_when_they_are_stopped(
    ray_session: None, dataset: PreparedDataset, tmp_path: Path, free_cpus: None
) -> None:
    config = SweepConfig(
        space={"learning_rate": {"grid": [3e-3, 1e-7]}},
        base=BASE | {"weights": "none", "epochs": 3, "lr_floor": 0},
        searcher="grid",
        scheduler={"kind": "asha", "grace_period_epochs": 1, "reduction_factor": 2},
        workers_per_trial=2,
        max_concurrent_trials=1,
    )
    result = tune(config, dataset.path, tmp_path / "sweep")
    assert [(trial.status, len(trial.epochs)) for trial in Journal(locate(tmp_path / "sweep")).trials] == [("finished", 3), ("stopped", 1)]
    assert result.bundle.manifest.training_config["workers"] == 2
    # Stopped at its first epoch, it has begun no second one.
    assert [path.name.split("_")[1] for path in (tmp_path / "sweep" / "trials" / "00001").glob("checkpoint_*/")] == ["000001"]


@pytest.mark.ray
def test_a_trial_larger_than_the_cluster_is_refused_at_once(ray_session: None, dataset: PreparedDataset, tmp_path: Path) -> None:
    config = SweepConfig(space={"learning_rate": {"loguniform": [1e-4, 1e-2]}}, base={"weights": "none", "use_gpu": False}, workers_per_trial=9)
    with pytest.raises(CapacityError, match=r"tune \(one trial\) needs 10 CPUs"):
        tune(config, dataset.path, tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()
