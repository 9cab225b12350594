from pathlib import Path

import pandas as pd
import pytest
import yaml

from ray_jobs.cli import main as sentinode
from ray_jobs.sweep_report import TrialSummary, rank
from ray_jobs.tune import tune
from sentinode.bundle import Bundle
from sentinode.config import SweepConfig, TrainConfig, load_config
from sentinode.dataset import PreparedDataset
from sentinode.errors import CapacityError, UsageError
from tests.ray_jobs.conftest import QUICK

TUNE_CONFIGS = Path(__file__).parents[2] / "tune_configs"


def _trial(name: str, value: float | None) -> TrialSummary:
    return TrialSummary(name, {}, [], None, value, None)


def test_ranking_puts_the_best_first_and_failures_last() -> None:
    trials = [_trial("a", 0.7), _trial("b", None), _trial("d", 0.9), _trial("c", 0.9)]
    assert [trial.trial_id for trial in rank(trials, "val_roc_auc")] == ["c", "d", "a", "b"]
    assert [trial.trial_id for trial in rank(trials, "val_loss")] == ["a", "c", "d", "b"]


@pytest.mark.parametrize("path", sorted(TUNE_CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_sweep_is_valid(path: Path) -> None:
    load_config(SweepConfig, [path])


def test_the_shipped_asha_sweep_searches_what_it_promises() -> None:
    config = load_config(SweepConfig, [TUNE_CONFIGS / "lr_depth_asha.yaml"])
    assert {key: domain.model_dump() for key, domain in config.space.items()} == {
        "learning_rate": {"loguniform": (1e-5, 1e-2)},
        "unfreeze_depth": {"choice": [0, 1, 2, 3, 4, 5]},
    }
    assert config.scheduler.kind == "asha"


@pytest.mark.ray
def test_a_sweep_survives_a_failing_trial_frees_everything_and_is_not_repeated(
    ray_session: None, dataset: PreparedDataset, tmp_path: Path, free_cpus: None, capsys: pytest.CaptureFixture[str]
) -> None:
    config = SweepConfig(
        space={"weights": {"grid": ["none", str(tmp_path / "none.safetensors")]}, "learning_rate": {"loguniform": [1e-4, 1e-2]}},
        base={key: value for key, value in QUICK.items() if key not in ("weights", "learning_rate")} | {"max_failures": 0},
        trials=1,
        scheduler={"kind": "asha", "grace_period_epochs": 1, "reduction_factor": 2},
        max_concurrent_trials=2,
    )
    result = tune(config, dataset.path, tmp_path / "sweep")
    assert Bundle.open(tmp_path / "sweep" / "bundle").manifest.digest == result.bundle.manifest.digest
    table = pd.read_csv(tmp_path / "sweep" / "trials.csv")
    assert table["trial"].nunique() == 2
    assert "no such file" in str(table[table["error"].notna()]["error"].iloc[0])
    best = load_config(TrainConfig, [tmp_path / "sweep" / "best.yaml"])
    assert best.model_dump(mode="json") == result.bundle.manifest.training_config
    assert result.trials[0].value == max(record["val_roc_auc"] for record in result.trials[0].history)
    assert result.trials[0].trial_id in (tmp_path / "sweep" / "report.html").read_text()

    again = tune(config, dataset.path, tmp_path / "sweep")
    assert again.already_complete
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert sentinode(["tune", "--data", str(dataset.path), "--out", str(tmp_path / "sweep"), "--config", str(file)]) == 0
    assert f"already complete: {tmp_path / 'sweep'}" in capsys.readouterr().out
    with pytest.raises(UsageError, match="seed was 42, now 1"):
        tune(config.model_copy(update={"seed": 1}), dataset.path, tmp_path / "sweep")


@pytest.mark.ray
def test_a_trial_larger_than_the_cluster_is_refused_at_once(ray_session: None, dataset: PreparedDataset, tmp_path: Path) -> None:
    config = SweepConfig(space={"learning_rate": {"loguniform": [1e-4, 1e-2]}}, base={"weights": "none", "use_gpu": False}, workers_per_trial=9)
    with pytest.raises(CapacityError, match=r"tune \(one trial\) needs 10 CPUs"):
        tune(config, dataset.path, tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()
