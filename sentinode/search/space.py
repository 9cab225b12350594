"""Points of a search space."""

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from pydantic import ValidationError

from sentinode.config.domains import Grid
from sentinode.config.errors import describe_validation_error
from sentinode.config.sweep import SweepConfig
from sentinode.config.train import TrainConfig

Point = dict[str, Any]

_TRIES = 2000
# Points that a configuration is checked by. All of a sweep of common size.
_CHECKED = 100


def number_of_points(config: SweepConfig) -> int:
    """Return how many trials the searcher asks for."""
    if config.searcher == "grid":
        return len(grid_points(config))
    return config.trials * (math.prod(map(len, _combined(config).values())) if config.searcher == "random" else 1)


def _combined(config: SweepConfig) -> dict[str, tuple[Any, ...]]:
    """Grid entries without conditions: the random searcher draws every combination of them equally often."""
    branches = {key: config.space[key][0] for key in config.keys if len(config.space[key]) == 1}
    return {key: branch.listed for key, branch in branches.items() if isinstance(branch, Grid) and not branch.when}


def random_point(config: SweepConfig, number: int) -> Point:
    """Return the point of trial `number`, a function of the seed and the number.

    Raises
    ------
    ValueError
        None that meets the constraints was found.
    """
    combined = _combined(config) if config.searcher == "random" else {}
    combinations = list(itertools.product(*combined.values()))
    fixed = dict(zip(combined, combinations[number % len(combinations)], strict=True))
    return draw(config, np.random.default_rng([config.seed, number]), fixed)


def draw(config: SweepConfig, generator: np.random.Generator, fixed: Mapping[str, Any] | None = None) -> Point:
    """Draw a point that meets the constraints, with some values `fixed`; ValueError where none was found."""
    for _ in range(_TRIES):
        point: Point = {}
        for key in config.keys:
            domain = config.domain(key, point)
            if domain is not None:
                point[key] = fixed[key] if fixed and key in fixed else domain.draw(generator)
        if meets(config, point):
            return point
    which = f" with {', '.join(f'{key} {value}' for key, value in fixed.items())}" if fixed else ""
    raise ValueError(f"constraints: none of {_TRIES} points{which} meets {' and '.join(map(repr, config.constraints))}")


def grid_points(config: SweepConfig) -> list[Point]:
    """Return every combination of a space of grid entries that meets the constraints, each once, the last key changing fastest."""
    return [point for point in _combinations(config, config.keys, {}) if meets(config, point)]


def _combinations(config: SweepConfig, keys: list[str], point: Point) -> Iterator[Point]:
    if not keys:
        yield point
        return
    domain = config.domain(keys[0], point)
    if domain is None:
        yield from _combinations(config, keys[1:], point)
        return
    for value in domain.listed or ():
        yield from _combinations(config, keys[1:], {**point, keys[0]: value})


def meets(config: SweepConfig, point: Mapping[str, Any]) -> bool:
    """Whether a point meets the constraints.

    Raises
    ------
    ValueError
        A constraint has no value at it, or one that is neither true nor false; or the point is no TrainConfig.
    """
    if not config.expressions:
        return True
    trained = _trained(config, point)
    for expression in config.expressions:
        value = expression(lambda name: _field(trained, name))
        if not isinstance(value, bool):
            raise ValueError(f"constraints: {expression.text!r} is {value!r} at {point}, neither true nor false")
        if not value:
            return False
    return True


def _field(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


def _trained(config: SweepConfig, point: Mapping[str, Any]) -> TrainConfig:
    """Return a point's TrainConfig, unchecked as a whole: what its fields exclude is for the constraints to exclude."""
    base = config.train_config({})
    changed: dict[str, Any] = {}
    for key, value in point.items():
        head, _, rest = key.partition(".")
        changed[head] = changed.get(head, getattr(base, head)).model_copy(update={rest: value}) if rest else value
    return base.model_copy(update=changed)


def problem(config: SweepConfig, point: Mapping[str, Any]) -> str | None:
    """Return why a point is none of the space, or cannot be trained; None where it is."""
    for key in point:
        if key not in config.space:
            return f"{key} is not in the space"
    for key in config.keys:
        domain = config.domain(key, point)
        if domain is None and key in point:
            return f"{key} does not exist there"
        if domain is not None and key not in point:
            return f"{key} is missing"
        if domain is not None and not domain.holds(point[key]):
            return f"{key} {point[key]!r} is not {domain.words()}"
    try:
        if not meets(config, point):
            return "it does not meet the constraints"
        config.train_config(point)
    except ValidationError as error:
        return describe_validation_error(error, TrainConfig)
    except ValueError as error:
        return str(error)
    return None


def check_points(config: SweepConfig) -> None:
    """Check points of a new configuration before anything starts.

    Raises
    ------
    ValueError
        There is none that meets the constraints, or one that does cannot be trained.
    """
    if config.searcher == "grid":
        points = grid_points(config)
        if not points:
            raise ValueError(f"constraints: no combination of the grid meets {' and '.join(map(repr, config.constraints))}")
    else:
        points = [random_point(config, number) for number in range(min(number_of_points(config), _CHECKED))]
    for point in points:
        if (wrong := problem(config, point)) is not None:
            raise ValueError(f"space: {point} cannot be trained: {wrong}; exclude it by a constraint or a condition (`when`)")
