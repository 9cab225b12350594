"""What happened in a sweep, event by event: `trials.jsonl` in its folder, a file of JSON lines that is only ever added to.

    {"event": "begin", "trial": 3, "kind": "search", "repeats": null, "seed": 42, "origin": "random", "point": {…}, "at": 1764…}
    {"event": "start", "trial": 3, "seconds": 2.1, "gflops": 1.34, "at": …}     it trains, or goes on, after so long a preparation
    {"event": "epoch", "trial": 3, "fold": null, "fold_over": false, "last": false, "record": {…}, "at": …}
    {"event": "end",   "trial": 3, "status": "stopped", "error": null, "at": …}

Everything else about a sweep is made from it: where an interrupted one goes on, trials.csv, the report. A line that a kill or a full disk left torn
is passed over by readers, and ended before the next one is written.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sentinode.errors import ManifestError, StorageError, UsageError
from sentinode.locations import Location
from sentinode.selection import is_better

JOURNAL_FILE = "trials.jsonl"

Kind = Literal["search", "repeat"]
Status = Literal["running", "finished", "stopped", "failed"]


@dataclass
class TrialRecord:
    """What is known of one trial.

    Attributes
    ----------
    number : int
        Counted from 0 in the order of beginning.
    kind : str
        `search`, or `repeat`: another seed for the configuration of an earlier trial.
    repeats : int or None
        The number of that trial.
    seed : int
        Of its training.
    origin : str
        Where its point came from: random, grid, optuna, warm start, repeat.
    point : dict of str to value
        The values drawn for it, by dotted key of TrainConfig.
    begun_at : float
        Unix time in s.
    status : str
        running (also: interrupted), finished (all epochs, or early stopping by its own patience), stopped (by the scheduler) or failed.
    error : str or None
        One line, if it failed.
    ended_at : float or None
        Unix time in s.
    epochs : list of dict
        One record per epoch in order of happening: those of `sentinode.training.Progress.history` (epoch, depth, train_loss, val_loss, val_roc_auc,
        learning_rate, rows, seconds, val_seconds) and `fold` (None without folds), `at` (unix time in s when it was reported), `fold_over` and `last`
        (whether none of the fold, of the trial, was due after it).
    starts : list of dict
        One for each time that it started: `seconds` until its first step, and `gflops` of one patch through its network.
    """

    number: int
    kind: Kind
    repeats: int | None
    seed: int
    origin: str
    point: dict[str, Any]
    begun_at: float
    status: Status = "running"
    error: str | None = None
    ended_at: float | None = None
    epochs: list[dict[str, Any]] = field(default_factory=list)
    starts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Name of its folder: `00003`."""
        return f"{self.number:05d}"

    @property
    def folds(self) -> list[int | None]:
        """Folds that have an epoch, in order; [None] without folds."""
        return list(dict.fromkeys(record["fold"] for record in self.epochs))

    @property
    def told(self) -> dict[int | None, int]:
        """Epochs by fold."""
        return {fold: sum(record["fold"] == fold for record in self.epochs) for fold in self.folds}

    def best(self, metric: str, fold: int | None = None) -> dict[str, Any] | None:
        """Return the record of the best epoch (of a fold), the first of equals; None where none has the figure."""
        best: dict[str, Any] | None = None
        for record in self.epochs:
            if record["fold"] == fold and is_better(record.get(metric), None if best is None else best[metric], metric):
                best = record
        return best

    def value(self, metric: str) -> float | None:
        """Return the figure that ranks it: that of its best epoch, with folds the mean of each fold's best so far; None where there is none."""
        best = [self.best(metric, fold) for fold in self.folds]
        values = [record[metric] for record in best if record is not None]
        return sum(values) / len(values) if values else None

    @property
    def image_steps(self) -> int:
        """Patches that it was trained on, counted in each epoch."""
        return sum(record["rows"] for record in self.epochs)

    @property
    def train_seconds(self) -> float:
        """Seconds of training and validation."""
        return float(sum(record["seconds"] + record["val_seconds"] for record in self.epochs))

    @property
    def images_per_s(self) -> float | None:
        """Patches trained on per second, without validation."""
        seconds = sum(record["seconds"] for record in self.epochs)
        return self.image_steps / seconds if seconds > 0 else None

    def cost(self, kind: Literal["gflops", "train_seconds"]) -> float | None:
        """Return the second objective: billions of floating-point operations of one patch, or seconds of training."""
        if kind == "train_seconds":
            return self.train_seconds if self.epochs else None
        return self.starts[-1].get("gflops") if self.starts else None


def rank(trials: list[TrialRecord], metric: str) -> list[TrialRecord]:
    """Return trials best first: those with most folds done, by their figure; those without one last; ties in order of beginning."""
    sign = 1 if metric == "val_loss" else -1

    def key(trial: TrialRecord) -> tuple[bool, int, float, int]:
        value = trial.value(metric)
        return (value is None, -len(trial.folds), 0.0 if value is None else sign * value, trial.number)

    return sorted(trials, key=key)


class Journal:
    """The journal of the sweep in `folder`. In an object store, where nothing can be added to a file, the whole of it is put again with each event.

    Parameters
    ----------
    folder : Location

    Attributes
    ----------
    trials : list of TrialRecord
        By number.
    events : list of (str, int)
        What happened, to which trial, in the order in which it did; clocks may have been set back.
    problem : callable
        Asked before each event of a journal in a store: returns why this process may not write there any more, in one line, or None.

    Raises
    ------
    ManifestError
        It is there and is not a journal.
    StorageError
        It cannot be read.
    """

    def __init__(self, folder: Location) -> None:
        self.path = folder / JOURNAL_FILE
        self.problem: Callable[[], str | None] = lambda: None
        # Of a journal in a store.
        self._content = b""
        self.trials: list[TrialRecord] = []
        self.events: list[tuple[str, int]] = []
        for event in self._read():
            self._take(event)

    def begin(self, point: Mapping[str, Any], *, kind: Kind, origin: str, seed: int, repeats: int | None = None) -> TrialRecord:
        """Note that the next trial begins."""
        number = len(self.trials)
        self._add({"event": "begin", "trial": number, "kind": kind, "repeats": repeats, "seed": seed, "origin": origin, "point": dict(point)})
        return self.trials[number]

    def start(self, number: int, seconds: float, gflops: float | None) -> None:
        """Note that a trial trains from now on, after `seconds` of preparation."""
        self._add({"event": "start", "trial": number, "seconds": seconds, "gflops": gflops})

    def epoch(self, number: int, record: Mapping[str, Any], fold: int | None = None, *, fold_over: bool = False, last: bool = False) -> None:
        """Note an epoch, and whether none of the fold, of the trial, is due after it."""
        self._add({"event": "epoch", "trial": number, "fold": fold, "fold_over": fold_over, "last": last, "record": dict(record)})

    def knows(self, number: int, epoch: int, fold: int | None) -> bool:
        """Tell whether an epoch has been noted."""
        return any((record["fold"], record["epoch"]) == (fold, epoch) for record in self.trials[number].epochs)

    def end(self, number: int, status: Status, error: str | None = None) -> None:
        """Note how a trial ended."""
        self._add({"event": "end", "trial": number, "status": status, "error": error})

    def _read(self) -> Iterator[dict[str, Any]]:
        try:
            self._content = self.path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be read ({error.strerror})") from error
        lines = self._content.split(b"\n")
        for number, line in enumerate(lines, start=1):
            try:
                event = json.loads(line)
                event["event"], event["trial"], event["at"]
            except (ValueError, KeyError, TypeError) as error:
                # Torn lines end where the next event was written, or the file does. In the middle of the file anything else is damage.
                if not line or number == len(lines) or lines[number].startswith(b'{"event": "resume"'):
                    continue
                raise ManifestError(f"{self.path}, line {number}: not an event of a sweep; restore the file, or use another --out") from error
            yield event

    def _take(self, event: Mapping[str, Any]) -> None:
        kind, number = event["event"], event["trial"]
        if kind == "begin":
            if number != len(self.trials):
                raise ManifestError(f"{self.path}: trial {number} begins after {len(self.trials)} trials; restore the file, or use another --out")
            fields = {name: event[name] for name in ("kind", "repeats", "seed", "origin", "point")}
            self.trials.append(TrialRecord(number, **fields, begun_at=event["at"]))
            self.events.append((kind, number))
            return
        if kind == "resume":
            return
        if not 0 <= number < len(self.trials):
            raise ManifestError(f"{self.path}: trial {number} never began; restore the file, or use another --out")
        trial = self.trials[number]
        self.events.append((kind, number))
        if kind == "start":
            trial.starts.append({"seconds": event["seconds"], "gflops": event["gflops"]})
        elif kind == "epoch":
            ends = {name: bool(event.get(name)) for name in ("fold_over", "last")}
            trial.epochs.append({**event["record"], "fold": event["fold"], "at": event["at"], **ends})
        elif kind == "end":
            trial.status, trial.error, trial.ended_at = event["status"], event["error"], event["at"]

    def _add(self, event: dict[str, Any]) -> None:
        """Write one line and take it in, once it is on the disk."""
        event = {**event, "at": round(time.time(), 3)}
        self._append(json.dumps(event, allow_nan=False, ensure_ascii=False).encode() + b"\n")
        self._take(event)

    def _append(self, line: bytes) -> None:
        try:
            if not self.path.is_local:
                self._put(line)
                return
            with self.path.local.open("ab") as file:
                if file.tell() and not self._ends_whole():
                    # Named, so that readers know the line before it for what a kill left.
                    line = b"\n" + self._resume() + line
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be written ({error.strerror}); make room there and repeat the command") from error

    @staticmethod
    def _resume() -> bytes:
        return json.dumps({"event": "resume", "trial": -1, "at": round(time.time(), 3)}).encode() + b"\n"

    def _put(self, line: bytes) -> None:
        if problem := self.problem():
            raise UsageError(problem)
        # A line torn on a disk that the sweep was copied from.
        whole = not self._content or self._content.endswith(b"\n")
        content = self._content + (b"" if whole else b"\n" + self._resume()) + line
        self.path.write_bytes(content)
        self._content = content

    def _ends_whole(self) -> bool:
        with self.path.local.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"
