"""How learning rate, unfreeze depth or any other field of TrainConfig is searched."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from sentinode.config.base import Config, Seed
from sentinode.config.errors import describe_validation_error
from sentinode.config.paths import set_by_path
from sentinode.config.train import TrainConfig


class LogUniform(Config):
    """A value drawn uniformly in its logarithm from [low, high]."""

    loguniform: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]


class Uniform(Config):
    """A value drawn uniformly from [low, high]."""

    uniform: tuple[float, float]


class RandInt(Config):
    """A whole number drawn uniformly from low..high, both included."""

    randint: tuple[int, int]


class Choice(Config):
    """One of the listed values, drawn at random."""

    choice: Annotated[list[Any], Field(min_length=1)]


class Grid(Config):
    """Every listed value is tried."""

    grid: Annotated[list[Any], Field(min_length=1)]


Domain = LogUniform | Uniform | RandInt | Choice | Grid
DOMAIN_KINDS: dict[str, type[Config]] = {
    "loguniform": LogUniform,
    "uniform": Uniform,
    "randint": RandInt,
    "choice": Choice,
    "grid": Grid,
}


class AshaConfig(Config):
    """Asynchronous successive halving: weak trials end early."""

    kind: Literal["asha"]
    grace_period_epochs: Annotated[int, Field(ge=1)] = 1
    """Epochs that every trial gets."""
    reduction_factor: Annotated[int, Field(ge=2)] = 4
    """At each rung the best 1/this go on."""


class NoScheduler(Config):
    """Every trial runs all its epochs."""

    kind: Literal["none"] = "none"


class SweepConfig(Config):
    """A search over fields of TrainConfig."""

    space: Annotated[dict[str, Domain], Field(min_length=1)]
    """Field of TrainConfig (dots for nested ones) -> how its values are drawn."""
    base: dict[str, Any] = {}
    """Fields of TrainConfig that all trials share."""
    searcher: Literal["random", "grid"] = "random"
    """`random` draws `trials` points; `grid` tries every combination of a space made of `grid` entries only."""
    trials: Annotated[int, Field(ge=1)] = 16
    """Points drawn by `random`; each combination of `grid` entries is drawn this many times."""
    scheduler: Annotated[AshaConfig | NoScheduler, Field(discriminator="kind")] = NoScheduler()
    """What ends weak trials early."""
    metric: Literal["val_roc_auc", "val_loss"] = "val_roc_auc"
    """Validation metric that ranks epochs and trials. The test split is never read by a sweep."""
    workers_per_trial: Annotated[int, Field(ge=1)] = 1
    """DDP workers of each trial."""
    max_concurrent_trials: Annotated[int, Field(ge=1)] | None = None
    """Trials at a time; null = as many as the cluster has room for."""
    seed: Seed = 42
    """Decides the points drawn."""

    @field_validator("space", mode="before")
    @classmethod
    def _known_kinds(cls, space: Any) -> Any:
        # Without this the union would answer a typo with one complaint per kind of domain.
        if not isinstance(space, dict):
            return space
        parsed = {}
        for key, domain in space.items():
            if isinstance(domain, Config):
                parsed[key] = domain
                continue
            if not (isinstance(domain, dict) and len(domain) == 1 and next(iter(domain)) in DOMAIN_KINDS):
                raise ValueError(f"{key}: {domain!r} must be one of {', '.join(DOMAIN_KINDS)}, e.g. {{choice: [0, 1]}}")
            kind = DOMAIN_KINDS[next(iter(domain))]
            try:
                parsed[key] = kind(**domain)
            except ValidationError as error:
                raise ValueError(f"{key}: {describe_validation_error(error, kind)}") from error
        return parsed

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key, instead in (("workers", "workers_per_trial"), ("selection_metric", "metric")):
            if key in self.base or key in self.space:
                raise ValueError(f"{key} cannot be set per trial: use {instead}")
        for key in ("use_gpu", "cpus_per_worker", "max_failures"):
            if key in self.space:
                raise ValueError(f"space.{key}: the same for all trials; set it in base")
        self._check_point({}, "base")
        for key, domain in self.space.items():
            if _is_set(self.base, key):
                raise ValueError(f"base.{key}: also in space; keep one of the two")
            for other in self.space:
                if other.startswith(f"{key}."):
                    raise ValueError(f"space.{other}: a part of {key}, which is in space too; keep one of the two")
            for value in _values_to_check(domain, f"space.{key}"):
                self._check_point({key: value}, f"space.{key}")
        if self.searcher == "grid" and not all(isinstance(domain, Grid) for domain in self.space.values()):
            raise ValueError("searcher grid needs a space of grid entries only")
        return self

    def _check_point(self, point: Mapping[str, Any], where: str) -> None:
        try:
            self.train_config(point)
        except ValidationError as error:
            raise ValueError(f"{where}: {describe_validation_error(error, TrainConfig)}") from error
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def train_config(self, point: Mapping[str, Any]) -> TrainConfig:
        """Return the TrainConfig of one trial: `base`, overlaid with one point of the space.

        Raises
        ------
        pydantic.ValidationError
            A field is unknown or its value is out of bounds.
        ValueError
            A key of `point` leads through something that is not a mapping.
        """
        fields: dict[str, Any] = dict(self.base) | {"selection_metric": self.metric, "workers": self.workers_per_trial}
        for key, value in point.items():
            set_by_path(fields, key, value)
        return TrainConfig(**fields)


def _values_to_check(domain: Domain, where: str) -> list[Any]:
    """Values of a domain that must be valid, or some trial would end at its start."""
    if isinstance(domain, Choice | Grid):
        return next(iter(domain.model_dump().values()))
    low, high = next(iter(domain.model_dump().values()))
    if not low < high:
        raise ValueError(f"{where}: range {[low, high]} must run from low to high")
    # Between whole ends lie fractions, which a field of whole numbers does not take.
    return [low, high] if isinstance(domain, RandInt) else [low, high, low + (high - low) / math.pi]


def _is_set(fields: Mapping[str, Any], path: str) -> bool:
    head, _, rest = path.partition(".")
    inner = fields.get(head)
    return head in fields and (not rest or (isinstance(inner, Mapping) and _is_set(inner, rest)))
