"""How the values of one parameter of a search are drawn."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, cast

import numpy as np
from pydantic import Field, SerializerFunctionWrapHandler, ValidationError, field_validator, model_serializer

from sentinode.config.base import Config
from sentinode.config.errors import describe_validation_error


class Domain(Config, ABC):
    """What every kind shares."""

    kind: ClassVar[str]

    when: dict[str, tuple[Any, ...]] = {}
    """Other parameters -> values that they must have for this one to exist; it always does where there are none."""

    @field_validator("when", mode="before")
    @classmethod
    def _lists(cls, when: Any) -> Any:
        return {key: value if isinstance(value, list | tuple) else [value] for key, value in when.items()} if isinstance(when, dict) else when

    @model_serializer(mode="wrap")
    def _without_empty(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        return {key: value for key, value in fields.items() if key != "when" or value}

    def exists(self, point: Mapping[str, Any]) -> bool:
        """Whether the conditions hold at a point, of which the parameters that are named there are decided."""
        return all(key in point and point[key] in values for key, values in self.when.items())

    @abstractmethod
    def draw(self, generator: np.random.Generator) -> Any:
        """Return a value, plain Python's."""

    @abstractmethod
    def holds(self, value: Any) -> bool:
        """Whether a value could be drawn."""

    @abstractmethod
    def ends(self) -> list[Any]:
        """Return values that must be valid, or some trial would end at its start: all of a list, the ends of a range and one between."""

    @property
    def listed(self) -> tuple[Any, ...] | None:
        """The values, where they are listed or whole numbers."""
        return None

    @abstractmethod
    def words(self) -> str:
        """Return it for people: "0.0001 to 0.01, logarithmic"."""


class _Range(Domain):
    @property
    def bounds(self) -> tuple[Any, Any]:
        """Smallest and largest value."""
        return cast(tuple[Any, Any], getattr(self, self.kind))

    def holds(self, value: Any) -> bool:
        low, high = self.bounds
        # Ends are written in decimal and drawn through logarithms.
        slack = 1e-9 * abs(high)
        return isinstance(value, int | float) and not isinstance(value, bool) and low - slack <= value <= high + slack

    def ends(self) -> list[Any]:
        low, high = self.bounds
        if not low < high:
            raise ValueError(f"range {[low, high]} must run from low to high")
        # Between whole ends lie fractions, which a field of whole numbers does not take.
        return [low, high, low + (high - low) / math.pi]

    def words(self) -> str:
        low, high = self.bounds
        return f"{low:g} to {high:g}"


class LogUniform(_Range):
    """A value drawn uniformly in its logarithm from [low, high]."""

    kind = "loguniform"

    loguniform: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]

    def draw(self, generator: np.random.Generator) -> float:
        low, high = self.bounds
        return float(min(max(math.exp(generator.uniform(math.log(low), math.log(high))), low), high))

    def words(self) -> str:
        return f"{super().words()}, logarithmic"


class Uniform(_Range):
    """A value drawn uniformly from [low, high]."""

    kind = "uniform"

    uniform: tuple[float, float]

    def draw(self, generator: np.random.Generator) -> float:
        return float(generator.uniform(*self.bounds))


class _WholeRange(_Range):
    def holds(self, value: Any) -> bool:
        return isinstance(value, int) and super().holds(value)

    def ends(self) -> list[Any]:
        return super().ends()[:2]

    @property
    def listed(self) -> tuple[Any, ...] | None:
        low, high = self.bounds
        return tuple(range(low, high + 1)) if high - low < 1000 else None

    def words(self) -> str:
        return f"{super().words()}, whole"


class RandInt(_WholeRange):
    """A whole number drawn uniformly from low..high, both included."""

    kind = "randint"

    randint: tuple[int, int]

    def draw(self, generator: np.random.Generator) -> int:
        low, high = self.bounds
        return int(generator.integers(low, high + 1))


class LogRandInt(_WholeRange):
    """A whole number from low..high, both included, drawn uniformly in its logarithm."""

    kind = "lograndint"

    lograndint: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]

    def draw(self, generator: np.random.Generator) -> int:
        low, high = self.bounds
        # Each number has the room from half below it to half above.
        drawn = round(math.exp(generator.uniform(math.log(low - 0.5), math.log(high + 0.5))))
        return int(min(max(drawn, low), high))

    def words(self) -> str:
        return f"{super().words()}, logarithmic"


class _Listed(Domain):
    @property
    def listed(self) -> tuple[Any, ...]:
        return tuple(getattr(self, self.kind))

    def draw(self, generator: np.random.Generator) -> Any:
        return self.listed[int(generator.integers(len(self.listed)))]

    def holds(self, value: Any) -> bool:
        # 1 == True, and neither means the other.
        return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in self.listed)

    def ends(self) -> list[Any]:
        return list(self.listed)

    def words(self) -> str:
        return "one of " + ", ".join(str(value) for value in self.listed)


class Choice(_Listed):
    """One of the listed values, drawn at random."""

    kind = "choice"

    choice: Annotated[list[Any], Field(min_length=1)]


class Grid(_Listed):
    """Every listed value is tried."""

    kind = "grid"

    grid: Annotated[list[Any], Field(min_length=1)]

    def words(self) -> str:
        return "each of " + ", ".join(str(value) for value in self.listed)


DOMAIN_KINDS: dict[str, type[Domain]] = {kind.kind: kind for kind in (LogUniform, Uniform, RandInt, LogRandInt, Choice, Grid)}


def parse_domain(key: str, fields: Any) -> Domain:
    """Make a domain of what stands in YAML; ValueError, one line beginning with the key.

    Without this a union would answer a typo with one complaint per kind.
    """
    if isinstance(fields, Domain):
        return fields
    kinds = [name for name in fields if name != "when"] if isinstance(fields, dict) else []
    if len(kinds) != 1 or kinds[0] not in DOMAIN_KINDS:
        raise ValueError(f"{key}: {fields!r} must be one of {', '.join(DOMAIN_KINDS)}, e.g. {{choice: [0, 1]}}")
    kind = DOMAIN_KINDS[kinds[0]]
    try:
        return kind(**fields)
    except ValidationError as error:
        raise ValueError(f"{key}: {describe_validation_error(error, kind)}") from error
