"""Spaces that people write and that are easily misread: numbers that YAML takes for texts, mappings as values, fields that exclude each other."""

import builtins
import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from sentinode.config import SweepConfig, load_config, parse_config
from sentinode.config.expressions import Expression
from sentinode.errors import ConfigError, UsageError
from sentinode.search.point_sources import Outcome, PointSource, point_source
from sentinode.search.space import grid_points, number_of_points, random_point
from sentinode.search.warm_start import warm_start


def sweep(space: dict[str, Any], **changes: Any) -> SweepConfig:
    return parse_config(SweepConfig, {"space": space} | changes)


def test_a_listed_number_that_yaml_takes_for_a_text_is_a_number(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(
        "space:\n  learning_rate: {grid: [1e-4, 1e-3]}\n  momentum: {choice: [0.8, 0.9], when: {learning_rate: 1e-3}}\n"
        "constraints: [learning_rate < 1]\n"
    )
    config = load_config(SweepConfig, [tmp_path / "sweep.yaml"])
    assert {type(random_point(config, number)["learning_rate"]) for number in range(4)} == {float}
    assert [("momentum" in random_point(config, number)) for number in range(2)] == [False, True]
    assert config.model_dump(mode="json")["space"]["learning_rate"] == {"grid": [1e-4, 1e-3]}


def test_a_text_stays_one_where_the_field_takes_texts() -> None:
    config = sweep({"weights": {"choice": ["1e5", "none"]}})
    assert config.space["weights"][0].listed == ("1e5", "none")


def test_mappings_as_values_are_the_same_after_the_journal() -> None:
    config = sweep({"unfreeze_schedule": {"choice": [{}, {5: 3}, {5: 4}]}}, searcher="optuna", trials=3)
    assert SweepConfig(**json.loads(json.dumps(config.model_dump(mode="json")))) == config
    source, again = point_source(config), point_source(config)
    for number in range(3):
        asked = source.ask(number)
        assert asked is not None
        again.begun(number, json.loads(json.dumps(asked[0])))
    assert config.train_config({"unfreeze_schedule": {"5": 3}}).max_depth == 3


def test_a_constraint_reaches_into_a_mapping_that_is_drawn_as_a_whole() -> None:
    choices = [{"colour_jitter": 0.3}, {"hue_jitter": 0.1}]
    config = sweep({"augment": {"choice": choices}}, constraints=["augment.colour_jitter < 0.2"])
    assert {json.dumps(random_point(config, number)) for number in range(20)} == {'{"augment": {"hue_jitter": 0.1}}'}


def test_fields_that_exclude_each_other_are_judged_at_whole_points() -> None:
    rates = {"learning_rate": {"loguniform": [1e-7, 1e-2]}}
    with pytest.raises(ConfigError, match=r"space: \{'learning_rate': 1e-07\} cannot be trained: lr_floor 1e-06 is above .*; exclude it by"):
        sweep(rates)
    assert sweep(rates, constraints=["learning_rate >= lr_floor"])
    assert sweep({**rates, "lr_floor": {"uniform": [0, 1e-8]}})
    assert sweep({**rates, "schedule": {"choice": ["one_cycle", "constant"]}})


def test_an_end_that_chance_would_not_come_to_is_looked_at() -> None:
    # Rates below lr_floor are drawn once in a hundred thousand times.
    with pytest.raises(ConfigError, match="cannot be trained: lr_floor"):
        sweep({"learning_rate": {"uniform": [0.9e-6, 1e-2]}}, trials=1)


def test_combinations_of_grid_entries_that_constraints_exclude_are_left_out() -> None:
    space = {"arch": {"grid": ["resnet18", "resnet50"]}, "batch_size": {"grid": [16, 128, 128]}, "learning_rate": {"loguniform": [1e-5, 1e-2]}}
    config = sweep(space, constraints=["arch == 'resnet18' or batch_size == 16", "learning_rate < 1e-3"], trials=2)
    assert number_of_points(config) == 6
    drawn = [tuple(random_point(config, number)[key] for key in ("arch", "batch_size")) for number in range(6)]
    assert drawn == [("resnet18", 16), ("resnet18", 128), ("resnet50", 16)] * 2
    with pytest.raises(ConfigError, match="no combination of the grid entries meets 'batch_size > 500'"):
        sweep(space, constraints=["batch_size > 500"])


def test_a_value_that_is_listed_twice_is_one_point_of_a_grid() -> None:
    assert grid_points(sweep({"epochs": {"grid": [1, 1, 2]}}, searcher="grid")) == [{"epochs": 1}, {"epochs": 2}]


@pytest.mark.parametrize("searcher", ["random", "grid"])
def test_a_grid_of_millions_is_refused_at_once(searcher: str) -> None:
    keys = ("epochs", "batch_size", "accumulate_steps", "eval_batch_size", "seed", "stream_window_rows", "lr_patience_epochs")
    begun = time.perf_counter()
    with pytest.raises(ConfigError, match="space: more than 10000 combinations of grid entries"):
        sweep({key: {"grid": list(range(1, 9))} for key in keys}, searcher=searcher)
    assert time.perf_counter() - begun < 5


def test_a_circle_of_conditions_is_named_without_what_hangs_on_it() -> None:
    space = {
        "dropout": {"uniform": [0, 0.5], "when": {"tta": 4}},
        "tta": {"choice": [1, 4], "when": {"epochs": 3}},
        "epochs": {"choice": [3], "when": {"tta": 4}},
    }
    with pytest.raises(ConfigError, match="the conditions of epochs, tta go round in a circle"):
        sweep(space)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arch == 'resnet18' or 'resnet34'", "\"'resnet34'\" between and/or is neither true nor false"),
        ("epochs > 1 and 3", "'3' between and/or is neither true nor false"),
        ("epochs > 1 or epochs * 2", "'epochs * 2' between and/or is neither true nor false"),
        ("epochs and arch == 'x'", "has no value (15 is neither true nor false) at {"),
        ("not epochs", "has no value (15 is neither true nor false) at {"),
        ("epochs / 0 > 1", "constraints: 'epochs / 0 > 1' has no value (division by zero) at {"),
        ("augment == 1", "augment has fields of its own; name one, e.g. augment.dihedral"),
    ],
)
def test_a_constraint_that_would_mean_something_else_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        sweep({"batch_size": {"choice": [8, 16]}}, constraints=[text])
    assert message in str(caught.value)
    assert str(caught.value).startswith("constraints: ")
    assert "\n" not in str(caught.value)


def test_truth_and_lists_mean_what_they_mean_in_python() -> None:
    assert Expression("augment.flip or not augment.dihedral")({"augment.flip": False, "augment.dihedral": False}.__getitem__) is True
    assert Expression("min([3, epochs]) == 2 and max((1, 2)) == 2")(lambda name: 2) is True
    with pytest.raises(ValueError, match="has no value"):
        Expression("min(1) == 1")(lambda name: 2)


def test_a_point_that_rounding_carried_past_an_end_is_learned_from_as_that_end() -> None:
    config = sweep({"learning_rate": {"loguniform": [1e-5, 1e-2]}}, searcher="optuna")
    first = {"learning_rate": 1e-2 * (1 + 1e-10)}
    assert point_source(config, [first]).ask(0) == (first, "warm start")


def side_by_side(source: PointSource, begun: list[dict[str, Any]], numbers: range) -> list[dict[str, Any]]:
    """Three trials at a time, the second of them ending first; `begun` is replayed."""
    points, running = [], []
    for number in numbers:
        if number < len(begun):
            point = begun[number]
            source.begun(number, point)
        else:
            asked = source.ask(number)
            assert asked is not None
            point = asked[0]
        points.append(point)
        running.append((number, point))
        if len(running) == 3:
            ended, at = running.pop(1)
            value = None if ended % 5 == 4 else 0.9 - at["dropout"]
            source.tell(ended, Outcome(value, None, (0.5, 0.6), stopped=ended % 3 == 1))
    return points


def test_a_study_made_anew_asks_the_same_while_trials_run_and_some_fail() -> None:
    space = {"dropout": {"uniform": [0, 0.5]}, "optimiser": {"choice": ["adam", "sgd"]}, "epochs": {"randint": [1, 9]}}
    config = sweep(space, searcher="optuna", trials=30, startup_trials=4, constraints=["epochs > 2 or dropout < 0.2"])
    undisturbed = side_by_side(point_source(config), [], range(30))
    assert side_by_side(point_source(config), undisturbed[:17], range(30)) == undisturbed


def test_without_optuna_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    config, real = sweep({"dropout": {"uniform": [0, 0.5]}}, searcher="optuna"), builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "optuna":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match="pip install optuna"):
        point_source(config)


def test_a_yaml_to_begin_with_names_itself_when_it_is_wrong_and_gives_values_as_the_space_lists_them(tmp_path: Path) -> None:
    space = {"augment": {"choice": [{"hue_jitter": 0.1}, {}]}, "mean": {"choice": [[0.5, 0.5, 0.5], [0.7, 0.5, 0.7]]}}
    config = sweep(space, warm_start=[str(tmp_path / "best.yaml")])
    best = config.train_config({"augment": {"hue_jitter": 0.1}, "mean": [0.7, 0.5, 0.7]})
    (tmp_path / "best.yaml").write_text(yaml.safe_dump(best.model_dump(mode="json")))
    assert warm_start(config, "f").first == [{"augment": {"hue_jitter": 0.1}, "mean": [0.7, 0.5, 0.7]}]
    (tmp_path / "best.yaml").write_text("learning_rat: 1\n")
    with pytest.raises(ConfigError, match=r"warm_start .*best\.yaml: unknown key learning_rat"):
        warm_start(config, "f")
