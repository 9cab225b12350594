"""Points of a space: drawn within it, under their conditions and constraints, the same again."""

from typing import Any

import numpy as np
import pytest

from sentinode.config import SweepConfig
from sentinode.config.expressions import Expression
from sentinode.search.point_sources import Outcome, PointSource, point_source
from sentinode.search.space import grid_points, problem, random_point

CONDITIONAL = {
    "optimiser": {"choice": ["adamw", "sgd"]},
    "learning_rate": [
        {"loguniform": [1e-5, 1e-3], "when": {"optimiser": "adamw"}},
        {"loguniform": [1e-3, 1e-1], "when": {"optimiser": "sgd"}},
    ],
    "momentum": {"uniform": [0.8, 0.99], "when": {"optimiser": ["sgd"]}},
    "batch_size": {"lograndint": [8, 256]},
}


def sweep(space: dict[str, Any], **changes: Any) -> SweepConfig:
    return SweepConfig(**{"space": space, "base": {"lr_floor": 0}} | changes)


def test_a_point_depends_on_the_seed_and_the_number_alone() -> None:
    config = sweep(CONDITIONAL)
    forwards = [random_point(config, number) for number in range(20)]
    backwards = [random_point(config, number) for number in reversed(range(20))]
    assert forwards == backwards[::-1]
    assert forwards != [random_point(sweep(CONDITIONAL, seed=1), number) for number in range(20)]


def test_conditions_decide_which_parameters_exist_and_which_range_they_have() -> None:
    points = [random_point(sweep(CONDITIONAL), number) for number in range(200)]
    assert {point["optimiser"] for point in points} == {"adamw", "sgd"}
    for point in points:
        assert ("momentum" in point) == (point["optimiser"] == "sgd")
        low, high = (1e-5, 1e-3) if point["optimiser"] == "adamw" else (1e-3, 1e-1)
        assert low <= point["learning_rate"] <= high
        assert type(point["batch_size"]) is int


def test_logarithmic_whole_numbers_reach_both_ends_and_lie_as_often_below_the_geometric_mean_as_above() -> None:
    drawn = [random_point(sweep({"batch_size": {"lograndint": [1, 64]}}), number)["batch_size"] for number in range(2000)]
    assert (min(drawn), max(drawn)) == (1, 64)
    assert np.mean(np.array(drawn) < 8) == pytest.approx(0.5, abs=0.1)


def test_every_point_meets_the_constraints() -> None:
    constraints = ["batch_size * input_size_px ** 2 <= 1.2e6", "unfreeze_depth == 5 or learning_rate < 1e-3"]
    space = {
        "batch_size": {"choice": [16, 32, 64, 128]},
        "input_size_px": {"choice": [96, 160, 224]},
        "unfreeze_depth": {"randint": [1, 5]},
        "learning_rate": {"loguniform": [1e-5, 1e-2]},
    }
    for number in range(100):
        point = random_point(sweep(space, constraints=constraints), number)
        assert point["batch_size"] * point["input_size_px"] ** 2 <= 1.2e6
        assert point["unfreeze_depth"] == 5 or point["learning_rate"] < 1e-3


def test_a_grid_has_each_combination_once_and_none_that_conditions_or_constraints_exclude() -> None:
    space = {"optimiser": {"grid": ["adamw", "sgd"]}, "momentum": {"grid": [0.8, 0.9], "when": {"optimiser": "sgd"}}, "batch_size": {"grid": [8, 16]}}
    config = sweep(space, searcher="grid", constraints=["momentum < 0.9 or batch_size == 8"])
    assert grid_points(config) == [
        {"optimiser": "adamw", "batch_size": 8},
        {"optimiser": "sgd", "batch_size": 8, "momentum": 0.8},
        {"optimiser": "sgd", "batch_size": 8, "momentum": 0.9},
        {"optimiser": "sgd", "batch_size": 16, "momentum": 0.8},
    ]
    source = point_source(config, first=[{"optimiser": "sgd", "batch_size": 16, "momentum": 0.8}])
    assert source.total == 4
    assert source.ask(0) == ({"optimiser": "sgd", "batch_size": 16, "momentum": 0.8}, "warm start")
    assert source.ask(1) == ({"optimiser": "adamw", "batch_size": 8}, "grid")
    assert source.ask(4) is None


def test_random_draws_each_combination_of_grid_entries_equally_often() -> None:
    config = sweep({"unfreeze_depth": {"grid": [0, 5]}, "learning_rate": {"loguniform": [1e-4, 1e-2]}}, trials=3)
    source = point_source(config)
    asked = [source.ask(number) for number in range(source.total)]
    assert [point["unfreeze_depth"] for point, _ in asked if point] == [0, 5] * 3  # type: ignore[misc]
    assert source.ask(6) is None
    # Those tried first stand in the place of none.
    first = [{"unfreeze_depth": 0, "learning_rate": 1e-3}]
    source = point_source(config, first)
    assert source.ask(0) == (first[0], "warm start")
    assert [source.ask(number + 1)[0] for number in range(6)] == [point for point, _ in asked if point]  # type: ignore[index, misc]
    assert source.ask(7) is None


@pytest.mark.parametrize(
    ("point", "wrong"),
    [
        ({"optimiser": "adamw", "learning_rate": 1e-4, "batch_size": 8}, None),
        ({"optimiser": "adamw", "learning_rate": 0.05, "batch_size": 8}, "learning_rate 0.05 is not 1e-05 to 0.001, logarithmic"),
        ({"optimiser": "adamw", "learning_rate": 1e-4, "batch_size": 8, "momentum": 0.9}, "momentum does not exist there"),
        ({"optimiser": "sgd", "learning_rate": 1e-2, "batch_size": 8}, "momentum is missing"),
        ({"optimiser": "adam", "learning_rate": 1e-4, "batch_size": 8}, "optimiser 'adam' is not one of adamw, sgd"),
        ({"optimiser": "adamw", "learning_rate": 1e-4, "batch_size": 8.5}, "batch_size 8.5 is not 8 to 256, whole, logarithmic"),
        ({"optimiser": "adamw", "learning_rate": 1e-4, "batch_size": 8, "epochs": 3}, "epochs is not in the space"),
    ],
)
def test_why_a_point_is_none_of_the_space(point: dict[str, Any], wrong: str | None) -> None:
    if wrong is None:
        assert problem(sweep(CONDITIONAL), point) is None
    else:
        assert wrong.replace(", whole, logarithmic", ", whole") in str(problem(sweep(CONDITIONAL), point))


def score(point: dict[str, Any]) -> float:
    return 1 - (np.log10(point["learning_rate"]) + 3.2) ** 2 / 10 + (0.1 if point["optimiser"] == "adamw" else 0)


def played(source: PointSource, numbers: range) -> list[dict[str, Any]]:
    points = []
    for number in numbers:
        asked = source.ask(number)
        assert asked is not None
        points.append(asked[0])
        source.tell(number, Outcome(score(asked[0]), None, (0.5, score(asked[0])), stopped=number % 3 == 1))
    return points


def test_optuna_comes_nearer_to_the_optimum_than_chance() -> None:
    learned = played(point_source(sweep(CONDITIONAL, searcher="optuna", trials=40)), range(40))
    chance = [random_point(sweep(CONDITIONAL), number) for number in range(40)]
    assert np.mean([score(point) for point in learned[20:]]) > np.mean([score(point) for point in chance[20:]]) + 0.05


def test_a_study_that_is_made_anew_asks_what_an_undisturbed_one_asks() -> None:
    config = sweep(CONDITIONAL, searcher="optuna", trials=24, constraints=["batch_size < 200"])
    undisturbed = played(point_source(config), range(24))
    again = point_source(config)
    for number, point in enumerate(undisturbed[:15]):
        again.begun(number, point)
        again.tell(number, Outcome(score(point), None, (0.5, score(point)), stopped=number % 3 == 1))
    assert played(again, range(15, 24)) == undisturbed[15:]


def test_optuna_searches_two_objectives_and_survives_failures() -> None:
    config = sweep({"input_size_px": {"choice": [96, 128, 224]}, "dropout": {"uniform": [0, 0.5]}}, searcher="optuna", trials=30, cost="gflops")
    source = point_source(config)
    for number in range(30):
        asked = source.ask(number)
        assert asked is not None
        point = asked[0]
        value = None if number % 7 == 3 else 0.9 - point["dropout"]
        source.tell(number, Outcome(value, point["input_size_px"] / 100, (), stopped=False))
    assert source.ask(30) is None


def test_optuna_does_not_try_a_point_twice_while_there_are_others() -> None:
    config = sweep(
        {"unfreeze_depth": {"choice": [0, 1, 2, 3]}, "optimiser": {"choice": ["adam", "sgd"]}}, searcher="optuna", trials=8, startup_trials=2
    )
    source = point_source(config)
    points = []
    for number in range(8):
        asked = source.ask(number)
        assert asked is not None
        points.append(asked[0])
        source.tell(number, Outcome(0.5 + 0.1 * asked[0]["unfreeze_depth"], None, (), stopped=False))
    assert len({tuple(point.items()) for point in points}) == 8


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "().__class__",
        "batch_size.__class__",
        "open('x')",
        "[x for x in range(3)]",
        "lambda: 1",
        "batch_size if epochs else 1",
        "f'{batch_size}'",
        "batch_size[0]",
        "min(batch_size, key=abs)",
        "batch_size; epochs",
        "batch_size = 3",
        "1 <",
        "",
        "(" * 60 + "1" + ")" * 60 + " + " * 10,
        "-" * 100 + "1",
        "1" * 501,
        "batch_size @ 2",
        "batch_size & 2",
        "b'x'",
        "1j",
        "{1: 2}",
    ],
)
def test_nothing_but_arithmetic_and_comparisons_is_understood(text: str) -> None:
    def lookup(name: str) -> int:
        if name in ("batch_size", "epochs"):
            return 32
        raise AssertionError(f"looked up {name}")

    if text == "batch_size.__class__":
        # Taken for the name of a field, of which there is none: a sweep refuses it.
        with pytest.raises(AssertionError, match=r"looked up batch_size\.__class__"):
            Expression(text)(lookup)
        return
    with pytest.raises(ValueError, match=r"^[^\n]*$"):
        Expression(text)


@pytest.mark.parametrize("text", ["9 ** 9 ** 9", "1 / 0", "'a' * 5", "[1] * 5", "1 + None", "True + 1", "batch_size < 'a'", "10 ** 400", "abs(1, 2)"])
def test_what_has_no_value_is_one_line(text: str) -> None:
    with pytest.raises(ValueError, match="has no value"):
        Expression(text)(lambda name: 32)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("batch_size * input_size_px ** 2 <= 3.3e6", True),
        ("not (batch_size > 16 and arch in ['resnet18', 'resnet34'])", False),
        ("1 < batch_size < 16", False),
        ("max(batch_size, 64) // 10 % 4 - min(3, 1) == 1", True),
        ("clip_norm == None or -batch_size < 0", True),
        ("arch not in ('resnet50',)", True),
        ("augment.colour_jitter + 0.1 < 0.3", True),
    ],
)
def test_expressions_mean_what_they_mean_in_python(text: str, value: bool) -> None:
    fields = {"batch_size": 32, "input_size_px": 224, "arch": "resnet34", "clip_norm": None, "augment.colour_jitter": 0.1}
    assert Expression(text)(fields.__getitem__) is value
