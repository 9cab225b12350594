"""What a sweep takes from earlier ones."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from sentinode.config import SweepConfig
from sentinode.errors import ConfigError, ManifestError
from sentinode.locations import locate
from sentinode.search.journal import Journal
from sentinode.search.point_sources import point_source
from sentinode.search.warm_start import kept_warm_start, warm_start
from sentinode.storage import write_json

SPACE = {"learning_rate": {"loguniform": [1e-5, 1e-2]}, "unfreeze_depth": {"choice": [0, 1, 5]}}


def sweep(**changes: Any) -> SweepConfig:
    return SweepConfig(**{"space": SPACE, "base": {"epochs": 3}} | changes)


def earlier(folder: Path, config: SweepConfig, fingerprint: str = "f") -> Path:
    """The folder of a sweep of four trials: values .7, .9 (stopped), failed, .8."""
    folder.mkdir()
    write_json(folder / "request.json", {"id": "x", "verb": "tune", "config": config.model_dump(mode="json"), "data_fingerprint": fingerprint})
    journal = Journal(locate(folder))
    for number, (value, status) in enumerate([(0.7, "finished"), (0.9, "stopped"), (None, "failed"), (0.8, "finished")]):
        journal.begin({"learning_rate": 10.0 ** (-2 - number % 3), "unfreeze_depth": number % 2}, kind="search", origin="random", seed=42)
        if value is not None:
            journal.epoch(number, {"epoch": 0, "val_roc_auc": value, "val_loss": 1 - value, "rows": 10, "seconds": 1.0, "val_seconds": 0.1})
        journal.end(number, status, None if value else "no")  # type: ignore[arg-type]
    return folder


def test_the_point_of_a_best_yaml_is_tried_first(tmp_path: Path) -> None:
    path = tmp_path / "best.yaml"
    path.write_text(yaml.safe_dump(sweep().train_config({"learning_rate": 0.002, "unfreeze_depth": 5}).model_dump(mode="json")))
    config = sweep(warm_start=[str(path)])
    started = warm_start(config, "f")
    assert started.first == [{"learning_rate": 0.002, "unfreeze_depth": 5}]
    source = point_source(config, started.first)
    assert source.ask(0) == ({"learning_rate": 0.002, "unfreeze_depth": 5}, "warm start")
    assert source.total == 16


def test_the_best_points_of_an_earlier_sweep_are_tried_first_and_optuna_learns_from_all(tmp_path: Path) -> None:
    folder = earlier(tmp_path / "sweep", sweep())
    config = sweep(warm_start=[str(folder)], warm_start_trials=2, searcher="optuna")
    started = warm_start(config, "f")
    assert [point["learning_rate"] for point in started.first] == [1e-3, 1e-2]
    assert [(outcome.value, outcome.stopped) for _, outcome in started.known] == [(0.7, False), (0.9, True), (0.8, False)]
    assert started.notes == []
    source = point_source(config, started.first, started.known)
    assert source.ask(0) == (started.first[0], "warm start")
    assert source.ask(2) is not None


def test_what_a_sweep_began_with_is_kept_whatever_becomes_of_where_it_was_from(tmp_path: Path) -> None:
    folder, own = earlier(tmp_path / "sweep", sweep()), tmp_path / "own"
    own.mkdir()
    assert kept_warm_start(locate(own)) is None
    started = warm_start(sweep(warm_start=[str(folder)], searcher="optuna"), "f")
    started.keep(locate(own))
    warm_start(sweep(warm_start=[str(folder)], warm_start_trials=1), "f").keep(locate(own))
    assert kept_warm_start(locate(own)) == started
    assert started.known
    (own / "warm_start.json").write_text("{")
    with pytest.raises(ManifestError, match="cannot be read"):
        kept_warm_start(locate(own))


@pytest.mark.parametrize("other", ["data", "base", "metric"])
def test_figures_of_other_data_or_settings_are_not_learned_from(tmp_path: Path, other: str) -> None:
    there = sweep(**{"base": {"base": {"epochs": 5}}, "metric": {"metric": "val_loss"}}.get(other, {}))
    folder = earlier(tmp_path / "sweep", there, "g" if other == "data" else "f")
    started = warm_start(sweep(warm_start=[str(folder)], searcher="optuna"), "f")
    assert len(started.first) == 3
    assert started.known == []
    assert "does not learn from its figures" in started.notes[0]


def test_trials_outside_of_the_space_are_passed_over(tmp_path: Path) -> None:
    folder = earlier(tmp_path / "sweep", sweep())
    narrow = sweep(space={"learning_rate": {"loguniform": [5e-4, 5e-3]}, "unfreeze_depth": {"choice": [1]}}, warm_start=[str(folder)])
    assert warm_start(narrow, "f").first == [{"learning_rate": 1e-3, "unfreeze_depth": 1}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"learning_rate": 0.5}, "learning_rate 0.5 is not 1e-05 to 0.01"),
        ({"unfreeze_depth": 3}, "unfreeze_depth 3 is not one of 0, 1, 5"),
        ({"learning_rat": 0.5}, "unknown key learning_rat"),
    ],
)
def test_a_file_that_does_not_fit_is_one_line(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    path = tmp_path / "best.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=message):
        warm_start(sweep(warm_start=[str(path)]), "f")


def test_what_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: No such file"):
        warm_start(sweep(warm_start=[str(tmp_path / "none.yaml")]), "f")
    with pytest.raises(ConfigError, match="not the folder of a sweep of this version"):
        warm_start(sweep(warm_start=[str(tmp_path)]), "f")
