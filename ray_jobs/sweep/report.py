"""The report of a sweep: one page, made from the journal alone, at any time."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from markupsafe import Markup
from pydantic import ValidationError

from ray_jobs.sweep import charts
from ray_jobs.sweep.importance import FEWEST_TRIALS, TRUSTED_TRIALS, Importance, importances, place_of
from ray_jobs.sweep.table import describe_point
from ray_jobs.sweep.winner import Standing, standings
from ray_jobs.verb import duration_text
from sentinode import RESEARCH_USE_NOTICE
from sentinode.config import SweepConfig, TrainConfig
from sentinode.config.domains import Choice, Domain, Grid, LogRandInt, LogUniform
from sentinode.manifests import LEAK_MEANING, DatasetManifest
from sentinode.pages import page_environment
from sentinode.search.journal import TrialRecord, rank

# The leaderboard shows so many; the rest is folded away.
_SHOWN = 50
_BINS = 6
# Values that an axis shows side by side, and cells of a heat map that can be read beside each other.
_MOST_LISTED, _MOST_CELLS = 12, 16
_METRICS = {"val_roc_auc": "validation ROC-AUC", "val_loss": "validation loss"}
_COSTS = {"gflops": "GFLOP of one patch", "train_seconds": "seconds of training"}


@dataclass(frozen=True)
class SweepFacts:
    """What the page needs beside the trials.

    Attributes
    ----------
    config : SweepConfig
    dataset : DatasetManifest
    epochs : int
        Planned for a trial, for each of its folds.
    folds : list of int or None
    name : str
        Of the sweep's folder.
    best : int or None
        Number of the trial that became the bundle.
    notes : list of str
        Warnings, in words.
    """

    config: SweepConfig
    dataset: DatasetManifest
    epochs: int
    folds: list[int] | None
    name: str
    best: int | None
    notes: list[str] = field(default_factory=list)


def render(trials: list[TrialRecord], facts: SweepFacts) -> str:
    """Return the report as one self-contained HTML page."""
    environment = page_environment("ray_jobs")
    environment.filters |= {"four": _four, "duration": _duration, "value": _value, "percent": lambda share: f"{100 * share:.0f} %"}
    config = facts.config
    search = [trial for trial in trials if trial.kind == "search"]
    # What failed is never the best, whatever figure it had come to.
    ranked = sorted(rank(search, config.metric), key=lambda trial: trial.status == "failed")
    standing = standings(trials, config)
    best = next((one for one in standing if one.trial.number == facts.best), standing[0] if standing else None)
    found = importances(_comparable(search, facts), config)
    return environment.get_template("sweep.html").render(
        facts=facts,
        config=config,
        data=facts.dataset,
        leak_meaning=LEAK_MEANING[facts.dataset.leak_level],
        notice=RESEARCH_USE_NOTICE,
        metric=_METRICS[config.metric],
        cost=_COSTS.get(config.cost or ""),
        best=best,
        best_number=None if best is None else best.trial.number,
        describe=describe_point,
        counts={status: sum(trial.status == status for trial in search) for status in ("finished", "stopped", "failed", "running")},
        trials=trials,
        rows=[_row(trial, config) for trial in ranked[:_SHOWN]],
        more=[_row(trial, config) for trial in ranked[_SHOWN:]],
        steps=_steps(search, config, facts),
        repeats=_repeats(standing) if config.repeats else None,
        importances=found,
        fewest=FEWEST_TRIALS,
        trusted=TRUSTED_TRIALS,
        figured=sum(trial.value(config.metric) is not None for trial in search),
        stops=_stops(search, config, facts),
        starts=_starts(trials),
        wall_s=_wall_s(trials),
        front=_front(search, config),
        space=[(key, _words(branch)) for key in config.keys for branch in config.space[key]],
        changed=_changed(config),
        without_importance=[key for key in config.keys if key not in {one.key for one in found}],
        charts=_charts(trials, ranked, facts, found, None if best is None else best.trial.number),
    )


def _comparable(trials: list[TrialRecord], facts: SweepFacts) -> list[TrialRecord]:
    """Return trials whose figures can be compared: with folds, what they came to on the first one, since means over other numbers of folds cannot."""
    if facts.folds is None:
        return trials
    return [replace(trial, epochs=[record for record in trial.epochs if record["fold"] == facts.folds[0]]) for trial in trials]


def _four(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return "-" if value is None else str(value)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.1f} s" if seconds < 10 else duration_text(seconds)


def _row(trial: TrialRecord, config: SweepConfig) -> dict[str, Any]:
    best = trial.best(config.metric) if config.folds is None else None
    return {
        "trial": trial,
        "value": trial.value(config.metric),
        "at_epoch": None if best is None else best["epoch"] + 1,
        "by_fold": [None if (one := trial.best(config.metric, fold)) is None else one[config.metric] for fold in trial.folds],
        "epochs": len(trial.epochs),
        "planned": _planned_epochs(trial, config) * (1 if config.folds is None else max(len(trial.folds), 1)),
        "cost": None if config.cost is None else trial.cost(config.cost),
    }


def _planned_epochs(trial: TrialRecord, config: SweepConfig) -> int:
    try:
        return config.train_config(trial.point).epochs
    except ValidationError:
        # It failed for that, and has trained nothing.
        return 0


def _planned_steps(trial: TrialRecord, config: SweepConfig, facts: SweepFacts) -> float:
    """Image-steps of the trial had it not been stopped: those of its epochs so far, continued."""
    if not trial.epochs:
        return 0.0
    each = trial.image_steps / len(trial.epochs)
    return each * _planned_epochs(trial, config) * len(facts.folds or [0])


def _steps(search: list[TrialRecord], config: SweepConfig, facts: SweepFacts) -> dict[str, float]:
    used = sum(trial.image_steps for trial in search)
    saved = sum(_planned_steps(trial, config, facts) - trial.image_steps for trial in search if trial.status == "stopped")
    return {"used": used, "saved": max(0.0, saved), "share": used / (used + saved) if used else 1.0}


def _repeats(standing: list[Standing]) -> dict[str, Any] | None:
    several = [one for one in standing if len(one.values) > 1]
    if not several:
        return None
    verdict = None
    if len(several) > 1 and several[0].spread is not None and several[1].spread is not None:
        lead = abs(several[0].value - several[1].value)
        # Standard error of the difference of two means (Welch).
        error = math.sqrt(several[0].spread ** 2 / len(several[0].values) + several[1].spread ** 2 / len(several[1].values))
        verdict = {"lead": lead, "error": error, "is_shown": lead > 2 * error > 0}
    return {"rows": several, "verdict": verdict}


def _stops(search: list[TrialRecord], config: SweepConfig, facts: SweepFacts) -> list[dict[str, Any]]:
    """Return, for each epoch (with folds, fold) after which trials were stopped, how many and what it saved."""
    stopped = [trial for trial in search if trial.status == "stopped"]
    units = {trial.number: len(trial.epochs) if facts.folds is None else len(trial.folds) for trial in stopped}
    found = []
    for after in sorted(set(units.values())):
        there = [trial for trial in stopped if units[trial.number] == after]
        saved = sum(_planned_steps(trial, config, facts) - trial.image_steps for trial in there)
        values = [value for trial in there if (value := trial.value(config.metric)) is not None]
        found.append({"after": after, "trials": len(there), "saved": saved, "low": min(values, default=None), "high": max(values, default=None)})
    return found


def _starts(trials: list[TrialRecord]) -> dict[str, Any] | None:
    seconds = [start["seconds"] for trial in trials for start in trial.starts]
    if not seconds:
        return None
    trained = sum(trial.train_seconds for trial in trials)
    again = sum(len(trial.starts) - 1 for trial in trials if trial.starts)
    return {
        "count": len(seconds),
        "median": statistics.median(seconds),
        "largest": max(seconds),
        "share": sum(seconds) / (sum(seconds) + trained),
        "again": again,
    }


def _wall_s(trials: list[TrialRecord]) -> float | None:
    ends = [_last_at(trial) for trial in trials]
    return max(ends) - min(trial.begun_at for trial in trials) if trials else None


def _last_at(trial: TrialRecord) -> float:
    return trial.ended_at or max([trial.begun_at, *(record["at"] for record in trial.epochs)])


def _front(search: list[TrialRecord], config: SweepConfig) -> list[tuple[TrialRecord, float, float]]:
    """Return the trials that no other beats in both metric and cost: (trial, value, cost), cheapest first."""
    if config.cost is None:
        return []
    sign = -1 if config.metric == "val_loss" else 1
    dots = [
        (trial, value, cost)
        for trial in search
        if trial.status != "failed" and (value := trial.value(config.metric)) is not None and (cost := trial.cost(config.cost)) is not None
    ]
    found: list[tuple[TrialRecord, float, float]] = []
    for trial, value, cost in sorted(dots, key=lambda dot: (dot[2], -sign * dot[1])):
        if not found or sign * value > sign * found[-1][1]:
            found.append((trial, value, cost))
    return found


def _words(branch: Domain) -> str:
    conditions = " and ".join(f"{key} is {' or '.join(str(value) for value in values)}" for key, values in branch.when.items())
    return branch.words() + (f", where {conditions}" if conditions else "")


def _changed(config: SweepConfig) -> list[tuple[str, Any]]:
    """Return what `base` sets otherwise than TrainConfig's defaults."""
    trained, default = config.train_config({}).model_dump(mode="json"), TrainConfig().model_dump(mode="json")
    return [(key, value) for key, value in trained.items() if value != default[key] and key not in ("selection_metric", "workers")]


def _charts(
    trials: list[TrialRecord], ranked: list[TrialRecord], facts: SweepFacts, found_important: list[Importance], best: int | None
) -> dict[str, Markup]:
    config = facts.config
    important = [one.key for one in found_important]
    figured = [trial for trial in ranked if trial.value(config.metric) is not None]
    whole = _comparable([trial for trial in figured if trial.status != "failed"], facts)
    found = dict.fromkeys(("heat", "parallel", "front"), Markup("")) | {"curves": _curves(figured, facts, best), "timeline": _timeline(trials)}
    bars = [(one.key, one.share, one.low, one.high) for one in found_important]
    found["importance"] = charts.importance_bars(bars, "; ".join(f"{key} {share:.2f}" for key, share, _, _ in bars))
    if (pair := _pair(config, important)) is not None and whole:
        found["heat"] = _heat(whole, config, *pair)
    if whole:
        found["parallel"] = _parallel(whole, config, best)
    if config.cost is not None and whole:
        on_front = {trial.number for trial, _, _ in _front(ranked, config)}
        dots = [
            (cost, value, trial.number in on_front, f"{trial.name}: {describe_point(trial.point)}")
            for trial in whole
            if (value := trial.value(config.metric)) is not None and (cost := trial.cost(config.cost)) is not None
        ]
        if dots:
            found["front"] = charts.front(dots, _COSTS[config.cost], _METRICS[config.metric], f"{len(dots)} trials, {len(on_front)} on the front")
    return found


def _curves(figured: list[TrialRecord], facts: SweepFacts, best: int | None) -> Markup:
    metric = facts.config.metric
    curves = []
    for trial in figured:
        points: Sequence[tuple[float, float]]
        if facts.folds is None:
            points = [(record["epoch"] + 1, record[metric]) for record in trial.epochs if record.get(metric) is not None]
        else:
            # The mean over the folds that have come so far, at each epoch.
            by_epoch: dict[int, list[float]] = {}
            for record in trial.epochs:
                if record.get(metric) is not None:
                    by_epoch.setdefault(record["epoch"], []).append(record[metric])
            points = [(epoch + 1, statistics.fmean(values)) for epoch, values in sorted(by_epoch.items())]
        name = f"{trial.name}: {describe_point(trial.point)}, {trial.status}"
        curves.append(charts.Curve(name, points, trial.number == best, trial.status == "stopped"))
    description = f"{_METRICS[metric]} of {len(curves)} trials by epoch" + "".join(
        f"; the best is {one.name}" for one in figured if one.number == best
    )
    return charts.learning_curves(curves, "epoch" if facts.folds is None else "epoch, mean over the folds", _METRICS[metric], description)


def _pair(config: SweepConfig, important: list[str]) -> tuple[str, str] | None:
    """Return the parameters of the heat map, across and up: learning rate and unfreeze depth, else the two most important."""
    if {"learning_rate", "unfreeze_depth"} <= set(config.keys):
        return "learning_rate", "unfreeze_depth"
    wanted = [*important, *(key for key in config.keys if key not in important)]
    return (wanted[0], wanted[1]) if len(wanted) > 1 else None


@dataclass(frozen=True)
class _Scale:
    """Where the values of a parameter lie: listed ones at equal distances, others along their range."""

    labels: list[str]
    listed: list[Any] | None
    low: float
    high: float
    logarithmic: bool

    @classmethod
    def of(cls, key: str, config: SweepConfig, values: list[Any]) -> "_Scale":
        branches = config.space[key]
        ends = [end for branch in branches for end in branch.ends()]
        # None, a name or a flag has no place along a range.
        numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in [*ends, *values])
        if not numeric or all(branch.listed is not None and len(branch.listed) <= _MOST_LISTED for branch in branches):
            # What the range of one entry gave stands between what another lists.
            drawn = sorted(value for value in values if isinstance(value, int | float) and not isinstance(value, bool))
            listed: list[Any] = []
            for value in [*(one for branch in branches for one in branch.listed or ()), *drawn]:
                if not _is_in(value, listed):
                    listed.append(value)
            return cls([_value(value) for value in listed], listed, 0, 0, False)
        numbers = [float(value) for value in [*ends, *values]]
        low, high = min(numbers), max(numbers)
        # Many listed numbers: by their ratio, since nobody said how they were chosen.
        logarithmic = any(isinstance(branch, LogUniform | LogRandInt) for branch in branches) or (
            all(isinstance(branch, Choice | Grid) for branch in branches) and high >= 100 * low
        )
        return cls([], None, low, high, logarithmic and low > 0)

    def place(self, value: Any) -> float:
        """Return 0..1."""
        if self.listed is not None:
            return place_of(value, self.listed) / (len(self.listed) - 1) if len(self.listed) > 1 else 0.5
        if self.high <= self.low:
            return 0.5
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (float(value) - self.low) / (self.high - self.low)

    def at(self, place: float) -> float:
        """Undo `place`, for ranges."""
        return self.low * (self.high / self.low) ** place if self.logarithmic else self.low + place * (self.high - self.low)

    def ticks(self) -> list[tuple[float, str]]:
        """Return (place, label)."""
        if self.listed is not None:
            # Of more than have room, some.
            step = math.ceil(len(self.listed) / _MOST_LISTED)
            return [(self.place(value), label) for value, label in list(zip(self.listed, self.labels, strict=True))[::step]]
        return [(place, f"{self.at(place):.3g}") for place in (0, 0.25, 0.5, 0.75, 1)]

    def bins(self) -> list[str]:
        """Return the names of the heat map's cells along it."""
        if self.listed is not None:
            return self.labels
        return [f"{self.at((number + 0.5) / _BINS):.2g}" for number in range(_BINS)]

    def bin(self, value: Any) -> int:
        """Return the cell of a value."""
        return place_of(value, self.listed) if self.listed is not None else min(_BINS - 1, int(self.place(value) * _BINS))


def _is_in(value: Any, listed: list[Any]) -> bool:
    return any(one == value and isinstance(one, bool) == isinstance(value, bool) for one in listed)


def _heat(figured: list[TrialRecord], config: SweepConfig, across: str, up: str) -> Markup:
    there = [trial for trial in figured if across in trial.point and up in trial.point]
    if not there:
        return Markup("")
    scales = {key: _Scale.of(key, config, [trial.point[key] for trial in there]) for key in (across, up)}
    if max(len(scale.bins()) for scale in scales.values()) > _MOST_CELLS:
        return Markup("")
    cells: dict[tuple[int, int], tuple[float, int]] = {}
    for trial in there:  # best first
        cell = scales[across].bin(trial.point[across]), scales[up].bin(trial.point[up])
        value = trial.value(config.metric)
        assert value is not None
        cells[cell] = (cells[cell][0], cells[cell][1] + 1) if cell in cells else (value, 1)
    words = across if scales[across].listed is not None else f"{across} (middle of each of {_BINS} equal parts)"
    description = f"best {_METRICS[config.metric]} by {across} and {up}: " + "; ".join(
        f"{scales[across].bins()[column]}, {scales[up].bins()[row]}: {value:.4f}" for (column, row), (value, _) in sorted(cells.items())
    )
    higher = config.metric != "val_loss"
    return charts.heat_map(cells, scales[across].bins(), scales[up].bins(), words, up, description, higher_is_better=higher)


def _parallel(figured: list[TrialRecord], config: SweepConfig, best: int | None) -> Markup:
    axes = []
    for key in config.keys:
        scale = _Scale.of(key, config, [trial.point[key] for trial in figured if key in trial.point])
        places = [scale.place(trial.point[key]) if key in trial.point else None for trial in figured]
        axes.append(charts.Axis(key.rpartition(".")[2], places, scale.ticks()))
    values = [value for trial in figured if (value := trial.value(config.metric)) is not None]
    low, high = charts.usual_range(values)
    span = high - low or 1.0
    heights = [min(max((value - low) / span, 0.0), 1.0) for value in values]
    ticks = [(place, f"{low + place * span:.4g}") for place in (0.0, 0.25, 0.5, 0.75, 1.0)]
    if min(values) < low:
        ticks[0] = (0.0, f"\u2264 {ticks[0][1]}")
    if max(values) > high:
        ticks[-1] = (1.0, f"\u2265 {ticks[-1][1]}")
    axes.append(charts.Axis(config.metric, heights, ticks))
    goodness = heights if config.metric != "val_loss" else [1 - height for height in heights]
    names = [f"{trial.name}: {describe_point(trial.point)}: {value:.4f}" for trial, value in zip(figured, values, strict=True)]
    which = next((number for number, trial in enumerate(figured) if trial.number == best), None)
    return charts.parallel_coordinates(
        axes, goodness, names, which, f"{len(figured)} trials, one line each, over {', '.join(config.keys)} and the metric"
    )


def _timeline(trials: list[TrialRecord]) -> Markup:
    if not trials:
        return Markup("")
    began = min(trial.begun_at for trial in trials)
    bars = [(trial.name, trial.begun_at - began, _last_at(trial) - began, trial.status) for trial in trials]
    total = max(end for _, _, end, _ in bars)
    return charts.timeline(bars, total, f"{len(trials)} trials over {_duration(total)}")
