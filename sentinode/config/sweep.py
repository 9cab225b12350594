"""How learning rate, unfreeze depth or any other field of TrainConfig is searched."""

import difflib
import functools
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializeAsAny, TypeAdapter, ValidationError, field_serializer, field_validator, model_validator
from pydantic.fields import FieldInfo

from sentinode.config.base import Config, Seed
from sentinode.config.domains import Domain, Grid, parse_domain
from sentinode.config.errors import describe_validation_error
from sentinode.config.expressions import Expression
from sentinode.config.paths import set_by_path
from sentinode.config.train import AugmentConfig, ReviewRule, TrainConfig

Branches = tuple[SerializeAsAny[Domain], ...]
Count = Annotated[int, Field(ge=1)]

_SET_ELSEWHERE = {"workers": "workers_per_trial", "selection_metric": "metric"}
# Of the machine, or of what is written down: the same for all trials.
_NOT_SEARCHED = ("use_gpu", "cpus_per_worker", "max_failures", "checkpoint_interval_s", "trackers", "mlflow_uri", "mlflow_experiment")

_NESTED: dict[str, type[Config]] = {"augment": AugmentConfig, "review": ReviewRule}


class AshaConfig(Config):
    """Asynchronous successive halving: weak trials end early."""

    kind: Literal["asha"]
    grace_period_epochs: Count = 1
    """Epochs that every trial gets, without folds."""
    grace_period_folds: Count = 1
    """Folds that every trial gets, with folds."""
    reduction_factor: Annotated[int, Field(ge=2)] = 4
    """At each rung the best 1/this go on."""


class HalvingConfig(Config):
    """Successive halving: trials wait at a rung until all have come to it, and the best of them go on."""

    kind: Literal["halving"]
    grace_period_epochs: Count = 2
    """Epochs that every trial gets, without folds."""
    grace_period_folds: Count = 1
    """Folds that every trial gets, with folds."""
    reduction_factor: Annotated[int, Field(ge=2)] = 2
    """At each rung the best 1/this go on."""


class MedianConfig(Config):
    """The median stopping rule: a trial ends that is worse than the median of the others' running means at the same time."""

    kind: Literal["median"]
    grace_period_epochs: Count = 1
    """Epochs that every trial gets, without folds."""
    grace_period_folds: Count = 1
    """Folds that every trial gets, with folds."""
    min_trials: Count = 3
    """Other trials that must have come as far before one is ended."""


class NoScheduler(Config):
    """Every trial runs all its epochs."""

    kind: Literal["none"] = "none"


class SweepConfig(Config):
    """A search over fields of TrainConfig."""

    space: Annotated[dict[str, Branches], Field(min_length=1)]
    """Field of TrainConfig (dots for nested ones) -> how its values are drawn; of a list the first one whose `when` holds."""
    base: dict[str, Any] = {}
    """Fields of TrainConfig that all trials share."""
    constraints: tuple[str, ...] = ()
    """Expressions over fields of TrainConfig that every point meets, e.g. `batch_size * input_size_px ** 2 <= 3.3e6`."""
    searcher: Literal["random", "grid", "optuna"] = "random"
    """`random` draws `trials` points; `grid` tries every combination of a space made of `grid` entries only; `optuna` learns (TPE)."""
    trials: Count = 16
    """Points drawn by `random` and `optuna`; with `random` each combination of `grid` entries is drawn this many times."""
    startup_trials: Count = 8
    """`optuna`: trials drawn at random before it decides."""
    cost: Literal["gflops", "train_seconds"] | None = None
    """A second objective, as small as possible: floating-point operations of one patch through the network, billions, or seconds of training and
    validation. `optuna` then searches the front of metric against cost; the report shows it; the bundle is the best by `metric`."""
    scheduler: Annotated[AshaConfig | HalvingConfig | MedianConfig | NoScheduler, Field(discriminator="kind")] = NoScheduler()
    """What ends weak trials early."""
    metric: Literal["val_roc_auc", "val_loss"] = "val_roc_auc"
    """Validation metric that ranks epochs and trials. The test split is never read by a sweep."""
    folds: tuple[Annotated[int, Field(ge=0)], ...] | Literal["all"] | None = None
    """Folds of the data set on which each trial is trained and scored, one after the other; their mean ranks it. null = the train and val splits."""
    repeats: Annotated[int, Field(ge=0)] = 0
    """Further seeds with which the best configurations are trained when the search is over; the mean ranks them then."""
    repeat_top: Count = 3
    """How many of the best configurations that is."""
    warm_start: tuple[str, ...] = ()
    """Where to begin: best.yaml of another sweep, whose point is tried first, or the folder of one, whose best points are."""
    warm_start_trials: Count = 3
    """Points taken from each folder."""
    workers_per_trial: Count = 1
    """DDP workers of each trial."""
    gpus_per_worker: Annotated[float, Field(gt=0, le=1)] = 1.0
    """GPUs of each worker, where there are GPUs. A part of one lets trials share it; for trials of one worker, since NCCL takes no device twice."""
    max_concurrent_trials: Count | None = None
    """Trials at a time; null = as many as the cluster has room for."""
    seed: Seed = 42
    """Decides the points drawn."""

    @field_validator("space", mode="before")
    @classmethod
    def _known_kinds(cls, space: Any) -> Any:
        if not isinstance(space, dict):
            return space
        return {
            key: tuple(parse_domain(key, _as_recorded(key, one)) for one in (given if isinstance(given, list | tuple) else [given]))
            for key, given in space.items()
        }

    @field_serializer("space")
    def _as_written(self, space: dict[str, Branches]) -> dict[str, Any]:
        written = {key: [branch.model_dump() for branch in branches] for key, branches in space.items()}
        return {key: branches[0] if len(branches) == 1 else branches for key, branches in written.items()}

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key, instead in _SET_ELSEWHERE.items():
            if key in self.base or key in self.space:
                raise ValueError(f"{key} cannot be set per trial: use {instead}")
        for key in _NOT_SEARCHED:
            if key in self.space:
                raise ValueError(f"space.{key}: the same for all trials; set it in base")
        self._check_point({}, "base")
        for key, branches in self.space.items():
            if _is_set(self.base, key):
                raise ValueError(f"base.{key}: also in space; keep one of the two")
            for other in self.space:
                if other.startswith(f"{key}."):
                    raise ValueError(f"space.{other}: a part of {key}, which is in space too; keep one of the two")
            self._check_conditions(key, branches)
        _ = self.keys  # a circle of conditions
        for key, branches in self.space.items():
            for branch in branches:
                self._check_values(key, branch)
        if self.searcher == "grid" and not all(isinstance(branch, Grid) for branches in self.space.values() for branch in branches):
            other = next(key for key, branches in self.space.items() if not all(isinstance(branch, Grid) for branch in branches))
            raise ValueError(f"space.{other}: searcher grid needs a space of grid entries only")
        self._check_rest()
        self._check_constraints()
        return self

    def _check_conditions(self, key: str, branches: Branches) -> None:
        if not branches:
            raise ValueError(f"space.{key}: an empty list")
        for number, branch in enumerate(branches):
            if number < len(branches) - 1 and not branch.when:
                raise ValueError(f"space.{key}: entry {number + 1} of {len(branches)} has no `when`, so those after it are never drawn")
            for other, values in branch.when.items():
                if other not in self.space:
                    raise ValueError(f"space.{key}: when: {other} is not in space{_nearest(other, self.space)}")
                listed = [one.listed for one in self.space[other]]
                if any(some is None for some in listed):
                    raise ValueError(f"space.{key}: when: {other} must be a choice, a grid or whole numbers to be compared with")
                if not values:
                    raise ValueError(f"space.{key}: when: {other} has no values")
                for value in values:
                    if not any(one.holds(value) for one in self.space[other]):
                        raise ValueError(f"space.{key}: when: {other} is never {value!r}")

    @functools.cached_property
    def keys(self) -> list[str]:
        """The keys of the space, each after those that its conditions name.

        Raises
        ------
        ValueError
            Conditions go round in a circle.
        """
        ordered: list[str] = []
        left = dict(self.space)
        while left:
            ready = [key for key, branches in left.items() if not any(other in left for branch in branches for other in branch.when)]
            if not ready:
                raise ValueError(f"space: the conditions of {', '.join(sorted(_circle(left)))} go round in a circle")
            ordered += ready
            left = {key: branches for key, branches in left.items() if key not in ready}
        return ordered

    def domain(self, key: str, point: Mapping[str, Any]) -> Domain | None:
        """Return how the values of a parameter are drawn at a point, of which what its conditions name is decided; None where it does not exist."""
        return next((branch for branch in self.space[key] if branch.exists(point)), None)

    def _check_values(self, key: str, branch: Domain) -> None:
        """A value of a domain that is not valid would end some trial at its start."""
        try:
            values = branch.ends()
        except ValueError as error:
            raise ValueError(f"space.{key}: {error}") from error
        given = {other: some[0] for other, some in branch.when.items()}
        for value in values:
            try:
                self._check_point({**given, key: value}, f"space.{key}")
            except ValueError as error:
                # Whether two fields exclude each other depends on the rest of the point: `check_points` looks at whole ones.
                if not _is_between_fields(error.__cause__, key):
                    raise

    def _check_point(self, point: Mapping[str, Any], where: str) -> None:
        try:
            self.train_config(point)
        except ValidationError as error:
            raise ValueError(f"{where}: {describe_validation_error(error, TrainConfig)}") from error
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def _check_rest(self) -> None:
        if self.folds is not None:
            for place, fields in (("base", self.base), ("space", self.space)):
                if fields.get("fold") is not None:
                    raise ValueError(f"{place}.fold: set folds or fold, not both")
            if self.folds != "all" and (len(self.folds) < 2 or len(set(self.folds)) < len(self.folds)):
                raise ValueError(f"folds: got {list(self.folds)}, expected at least two different ones, or all")
        if not isinstance(self.scheduler, NoScheduler):
            wrong, right = ("grace_period_epochs", "grace_period_folds") if self.folds is not None else ("grace_period_folds", "grace_period_epochs")
            default = type(self.scheduler).model_fields[wrong].default
            if wrong in self.scheduler.model_fields_set and getattr(self.scheduler, wrong) != default:
                raise ValueError(f"scheduler.{wrong}: {'with' if self.folds is not None else 'without'} folds set {right}")
        if self.cost == "train_seconds" and not isinstance(self.scheduler, NoScheduler):
            raise ValueError("cost train_seconds: trials that a scheduler stops would count as cheap; use scheduler none, or cost gflops")
        if self.gpus_per_worker < 1 and self.workers_per_trial > 1:
            raise ValueError(f"gpus_per_worker: got {self.gpus_per_worker:g}, but NCCL takes no device twice: several workers need a whole one each")
        if self.repeats and "seed" in self.space:
            raise ValueError("repeats: further seeds mean nothing where seed is in space; keep one of the two")

    def _check_constraints(self) -> None:
        for expression in self.expressions:
            for name in expression.names:
                if name in _NESTED:
                    raise ValueError(f"constraints: {expression.text!r}: {name} has fields of its own; name one, e.g. {name}.{_first_of(name)}")
                if not _is_field(name):
                    raise ValueError(f"constraints: {expression.text!r}: unknown key {name}{_nearest(name, _field_names())}")
        from sentinode.search.space import check_points

        check_points(self)

    @functools.cached_property
    def expressions(self) -> list[Expression]:
        """The constraints, parsed."""
        try:
            return [Expression(text) for text in self.constraints]
        except ValueError as error:
            raise ValueError(f"constraints: {error}") from error

    @functools.cached_property
    def combinations(self) -> list[dict[str, Any]]:
        """What `random` draws equally often: the combinations of grid entries without conditions, less those that constraints over them exclude.

        Raises
        ------
        ValueError
            There are too many, or none.
        """
        from sentinode.search.space import combined

        return combined(self)

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

    def largest(self, key: str) -> Any:
        """Return the largest value that a field of numbers may have in any trial."""
        return max(self._possible(key))

    def smallest(self, key: str) -> Any:
        """Return the smallest value that a field of numbers may have in any trial."""
        return min(self._possible(key))

    def _possible(self, key: str) -> list[Any]:
        branches = self.space.get(key, ())
        values = [value for branch in branches for value in branch.ends()]
        return values if branches and not branches[-1].when else [*values, getattr(self.train_config({}), key)]


def _is_set(fields: Mapping[str, Any], path: str) -> bool:
    head, _, rest = path.partition(".")
    inner = fields.get(head)
    return head in fields and (not rest or (isinstance(inner, Mapping) and _is_set(inner, rest)))


def _circle(left: Mapping[str, Branches]) -> list[str]:
    """The keys of one circle among keys each of which has a condition on another of them."""
    way = [next(iter(left))]
    while way[-1] not in way[:-1]:
        way.append(next(other for branch in left[way[-1]] for other in branch.when if other in left))
    return way[way.index(way[-1]) : -1]


def _is_between_fields(error: BaseException | None, key: str) -> bool:
    """Whether pydantic complains of nothing but fields that exclude each other, and not of the value of `key` itself."""
    own = tuple(key.split("."))
    return isinstance(error, ValidationError) and all(
        problem["type"] == "value_error" and problem["loc"][: len(own)] != own for problem in error.errors(include_url=False)
    )


def _as_recorded(key: str, fields: Any) -> Any:
    """Listed values, and those of conditions, as the journal gives them back: JSON's, and numbers where the field takes numbers."""
    if not isinstance(fields, dict):
        return fields
    recorded = dict(fields)
    for kind in {"choice", "grid"} & fields.keys():
        if isinstance(fields[kind], list | tuple):
            recorded[kind] = [_value_as_recorded(key, value) for value in fields[kind]]
    if isinstance(fields.get("when"), dict):
        recorded["when"] = {
            other: [_value_as_recorded(str(other), value) for value in (some if isinstance(some, list | tuple) else [some])]
            for other, some in fields["when"].items()
        }
    return recorded


def _value_as_recorded(key: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _value_as_recorded("", inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_value_as_recorded("", inner) for inner in value]
    field = _field(key) if isinstance(value, str) else None
    if field is None:
        return value
    try:
        # YAML takes 1e-5, without a dot, for a text; neither constraints nor charts would.
        read = TypeAdapter(field.rebuild_annotation()).validate_python(value)
    except ValidationError:
        return value
    return read if isinstance(read, int | float) else value


def _field(key: str) -> FieldInfo | None:
    head, _, rest = key.partition(".")
    return _NESTED[head].model_fields.get(rest) if rest and head in _NESTED else TrainConfig.model_fields.get(key)


def _first_of(name: str) -> str:
    return next(iter(_NESTED[name].model_fields))


def _field_names() -> list[str]:
    return [*TrainConfig.model_fields, *(f"{key}.{name}" for key, model in _NESTED.items() for name in model.model_fields)]


def _is_field(name: str) -> bool:
    return name in _field_names()


def _nearest(name: str, among: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(among), n=1)
    return f"; did you mean {close[0]}?" if close else ""
