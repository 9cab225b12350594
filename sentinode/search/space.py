"""Points of a search space."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import ValidationError

from sentinode.config.base import Config
from sentinode.config.domains import Grid
from sentinode.config.errors import describe_validation_error
from sentinode.config.expressions import Expression
from sentinode.config.sweep import SweepConfig
from sentinode.config.train import TrainConfig

Point = dict[str, Any]

_TRIES = 2000
# Points that a configuration is checked by. All of a sweep of common size.
_CHECKED = 100
# Points that are checked for each end of a range and each listed value.
_CHECKED_AT_END = 5
# More combinations of grid entries than this are no search but a slip of the pen; they are all looked at before a sweep starts.
_MOST_COMBINATIONS = 10_000


def number_of_points(config: SweepConfig) -> int:
    """Return how many trials the searcher asks for."""
    if config.searcher == "grid":
        return len(grid_points(config))
    return config.trials * (len(config.combinations) if config.searcher == "random" else 1)


def combined(config: SweepConfig) -> list[Point]:
    """Return what `SweepConfig.combinations` holds."""
    branches = {key: config.space[key][0] for key in config.keys if len(config.space[key]) == 1}
    listed = {key: _unique(branch.listed) for key, branch in branches.items() if isinstance(branch, Grid) and not branch.when}
    if math.prod(map(len, listed.values())) > _MOST_COMBINATIONS:
        raise ValueError(_too_many())
    # Constraints over other parameters too are met by drawing those again.
    drawn = [key for key in config.keys if key not in listed]
    decided = [one for one in config.expressions if not any(_is_within(name, key) for name in one.names for key in drawn)]
    points = [dict(zip(listed, values, strict=True)) for values in itertools.product(*listed.values())]
    possible = [point for point in points if _meets(config, point, decided)]
    if not possible:
        raise ValueError(f"constraints: no combination of the grid entries meets {' and '.join(repr(one.text) for one in decided)}")
    return possible


def _is_within(name: str, key: str) -> bool:
    return name == key or name.startswith(f"{key}.")


def _too_many() -> str:
    return f"space: more than {_MOST_COMBINATIONS} combinations of grid entries; make some of them choice, or shorter"


def _unique(values: Sequence[Any]) -> list[Any]:
    return [value for number, value in enumerate(values) if value not in values[:number]]


def random_point(config: SweepConfig, number: int) -> Point:
    """Return the point of trial `number`, a function of the seed and the number.

    Raises
    ------
    ValueError
        None that meets the constraints was found.
    """
    fixed = config.combinations[number % len(config.combinations)] if config.searcher == "random" else {}
    return draw(config, np.random.default_rng([config.seed, number]), fixed)


def draw(config: SweepConfig, generator: np.random.Generator, fixed: Mapping[str, Any] | None = None) -> Point:
    """Draw a point that meets the constraints, with some values `fixed`; ValueError where none was found."""
    for _ in range(_TRIES):
        point = _drawn(config, generator, fixed or {})
        if meets(config, point):
            return point
    which = f" with {', '.join(f'{key} {value}' for key, value in fixed.items())}" if fixed else ""
    raise ValueError(f"constraints: none of {_TRIES} points{which} meets {' and '.join(map(repr, config.constraints))}")


def _drawn(config: SweepConfig, generator: np.random.Generator, fixed: Mapping[str, Any]) -> Point:
    point: Point = {}
    for key in config.keys:
        domain = config.domain(key, point)
        if domain is not None:
            point[key] = fixed[key] if key in fixed else domain.draw(generator)
    return point


def grid_points(config: SweepConfig) -> list[Point]:
    """Return every combination of a space of grid entries that meets the constraints, each once, the last key changing fastest.

    Raises
    ------
    ValueError
        There are too many.
    """
    points = list(itertools.islice(_combinations(config, config.keys, {}), _MOST_COMBINATIONS + 1))
    if len(points) > _MOST_COMBINATIONS:
        raise ValueError(_too_many())
    return [point for point in points if meets(config, point)]


def _combinations(config: SweepConfig, keys: list[str], point: Point) -> Iterator[Point]:
    if not keys:
        yield point
        return
    domain = config.domain(keys[0], point)
    if domain is None:
        yield from _combinations(config, keys[1:], point)
        return
    for value in _unique(domain.listed or ()):
        yield from _combinations(config, keys[1:], {**point, keys[0]: value})


def meets(config: SweepConfig, point: Mapping[str, Any]) -> bool:
    """Whether a point meets the constraints.

    Raises
    ------
    ValueError
        A constraint has no value at it, or one that is neither true nor false; or the point is no TrainConfig.
    """
    return _meets(config, point, config.expressions)


def _meets(config: SweepConfig, point: Mapping[str, Any], expressions: Sequence[Expression]) -> bool:
    if not expressions:
        return True
    trained = _trained(config, point)
    for expression in expressions:
        try:
            value = expression(lambda name: _field(trained, name))
        except ValueError as error:
            raise ValueError(f"constraints: {error} at {point}") from error
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
        old = changed.get(head, getattr(base, head))
        if rest:
            changed[head] = old.model_copy(update={rest: value})
        else:
            changed[head] = type(old)(**value) if isinstance(old, Config) else value
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
        # The ends first: what they are refused for says more than a value between.
        points = [*_at_ends(config), *(random_point(config, number) for number in range(min(number_of_points(config), _CHECKED)))]
    for point in points:
        if (wrong := problem(config, point)) is not None:
            raise ValueError(f"space: {point} cannot be trained: {wrong}; exclude it by a constraint or a condition (`when`)")


def _at_ends(config: SweepConfig) -> Iterator[Point]:
    """Yield points that meet the constraints with each end of a range and each listed value, where a few draws come to one."""
    generator = np.random.default_rng([config.seed, 0])
    for key in config.keys:
        for branch in config.space[key]:
            for value in branch.ends():
                fixed = {**{other: some[0] for other, some in branch.when.items()}, key: value}
                for _ in range(_CHECKED_AT_END):
                    point = _drawn(config, generator, fixed)
                    domains = {name: config.domain(name, point) for name in fixed}
                    # Another branch may apply, to which these values mean nothing.
                    applies = domains[key] is branch and all(domain is not None and domain.holds(fixed[name]) for name, domain in domains.items())
                    if applies and meets(config, point):
                        yield point
