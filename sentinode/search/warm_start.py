"""What a sweep takes from earlier ones: points to try first, and outcomes to learn from."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import ValidationError

from sentinode.config import SweepConfig, parse_config, read_yaml_mapping
from sentinode.config.paths import set_by_path
from sentinode.config.train import TrainConfig
from sentinode.errors import ConfigError, ManifestError
from sentinode.locations import Location, locate
from sentinode.search.journal import Journal, rank
from sentinode.search.point_sources import Outcome
from sentinode.search.space import Point, problem
from sentinode.storage import json_bytes

_REQUEST_FILE = "request.json"
_TAKEN_FILE = "warm_start.json"


@dataclass(frozen=True)
class WarmStart:
    """See the module.

    Attributes
    ----------
    first : list of Point
    known : list of (Point, Outcome)
    notes : list of str
        What people should know about it.
    """

    first: list[Point] = field(default_factory=list)
    known: list[tuple[Point, Outcome]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def keep(self, folder: Location) -> None:
        """Write it into a sweep's folder: the sweep goes on with it, whatever becomes of what it was read from."""
        if not (folder / _TAKEN_FILE).exists():
            (folder / _TAKEN_FILE).write_bytes(json_bytes(asdict(self)))


def kept_warm_start(folder: Location) -> WarmStart | None:
    """Return what `WarmStart.keep` wrote, None where nothing is; raises ManifestError where it is damaged."""
    path = folder / _TAKEN_FILE
    try:
        kept = json.loads(path.read_bytes().decode())
        known = [(point, Outcome(**outcome | {"by_step": tuple(outcome["by_step"])})) for point, outcome in kept["known"]]
        return WarmStart(kept["first"], known, kept["notes"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ManifestError(f"{path}: cannot be read; restore the file, or use another --out") from error


def warm_start(config: SweepConfig, data_fingerprint: str) -> WarmStart:
    """Read what `config.warm_start` names.

    Raises
    ------
    ConfigError
        A file is missing, damaged, or holds a point that is none of the space.
    """
    found = WarmStart()
    for text in config.warm_start:
        path = locate(text)
        if path.is_dir():
            _take_sweep(found, path, config, data_fingerprint)
        else:
            _add(found, _point_of_yaml(path, config))
    return found


def _add(found: WarmStart, point: Point) -> None:
    if point not in found.first:
        found.first.append(point)


def _point_of_yaml(path: Location, config: SweepConfig) -> Point:
    fields = read_yaml_mapping(path)
    try:
        trained = parse_config(TrainConfig, fields)
    except ConfigError as error:
        raise ConfigError(f"warm_start {path}: {error}") from error
    point: Point = {}
    for key in config.keys:
        domain = config.domain(key, point)
        if domain is not None:
            value = _field(trained, key)
            # A mapping or a list is written in the space as a person writes it, without defaults.
            point[key] = next((one for one in domain.listed or () if _means(key, one, value)), value)
    if wrong := problem(config, point):
        raise ConfigError(f"warm_start {path}: {wrong}")
    return point


def _field(trained: TrainConfig, key: str) -> Any:
    value: Any = trained
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _means(key: str, listed: Any, value: Any) -> bool:
    """Whether a listed value is what a configuration holds."""
    if not isinstance(listed, dict | list):
        return False
    fields: dict[str, Any] = {}
    set_by_path(fields, key, listed)
    try:
        return bool(_field(TrainConfig(**fields), key) == value)
    except ValidationError:
        return False


def _take_sweep(found: WarmStart, folder: Location, config: SweepConfig, data_fingerprint: str) -> None:
    try:
        request = json.loads((folder / _REQUEST_FILE).read_bytes().decode())
        earlier = SweepConfig(**request["config"])
        same_data = request["data_fingerprint"] == data_fingerprint
        trials = [trial for trial in Journal(folder).trials if trial.kind == "search"]
    except (OSError, ValueError, KeyError, TypeError, ManifestError, ValidationError) as error:
        raise ConfigError(
            f"warm_start {folder}: not the folder of a sweep of this version (expected {_REQUEST_FILE} and the journal there)"
        ) from error
    usable = [trial for trial in trials if problem(config, trial.point) is None]
    best = [trial for trial in rank(usable, config.metric) if trial.status != "failed" and trial.value(config.metric) is not None]
    for trial in best[: config.warm_start_trials]:
        _add(found, dict(trial.point))
    if not best:
        found.notes.append(f"warm_start {folder}: none of its {len(trials)} trials lies in this space and has a figure")
    if config.searcher != "optuna":
        return
    same = same_data and earlier.metric == config.metric and earlier.folds == config.folds and earlier.train_config({}) == config.train_config({})
    if not same:
        found.notes.append(
            f"warm_start {folder}: other data, base, metric or folds, so optuna tries its best points but does not learn from its figures"
        )
        return
    found.known.extend((dict(trial.point), Outcome.of(trial, config)) for trial in usable if trial.status in ("finished", "stopped"))
