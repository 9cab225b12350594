"""Trackers: what a run leaves for people to look at while it goes on, TensorBoard's event files and MLflow's runs.

They are fed in the driver, each in a thread of its own, so a tracker that is slow, full or gone neither stalls nor fails the run. What a tracker
holds already it is asked itself, so a run that goes on appends to it and no epoch stands there twice.
"""

import importlib.util
import json
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, Protocol
from urllib.parse import urlsplit

import yaml

from ray_jobs.verb import say
from sentinode.config import TrainConfig
from sentinode.errors import StoppedError, UsageError, one_line
from sentinode.locations import Location
from sentinode.storage import json_bytes, local_path, temporary_folder

# How long the end of a run waits for trackers that have not written everything yet.
_CLOSE_S = 30.0
_MLFLOW_ID_FILE = "mlflow_run.json"
_EVENTS_FOLDER = "tensorboard"
_TAGS = {
    "train_loss": "loss/train",
    "val_loss": "loss/validation",
    "val_roc_auc": "roc_auc/validation",
    "learning_rate": "learning_rate",
    "images_per_s": "speed/images_per_s",
    "seconds": "speed/epoch_s",
}
"""TensorBoard's name for each number of an epoch; MLflow has the names on the left."""


@dataclass(frozen=True)
class RunFacts:
    """What a tracker says about a run beside its epochs.

    Attributes
    ----------
    name : str
    config : dict
        The effective configuration, plain values.
    facts : dict of str to str
        Data fingerprint, git commit and the like.
    """

    name: str
    config: Mapping[str, Any]
    facts: Mapping[str, str]


class Tracker(Protocol):
    """One store of one run; methods may raise anything."""

    recorded: int
    """Step of the last epoch it holds: 1 for the first, 0 for the initial weights, -1 for none."""

    def epoch(self, step: int, numbers: Mapping[str, float]) -> None:
        """Record an epoch, wholly or not at all."""

    def end(self, status: str, result: Mapping[str, float | str]) -> None:
        """Record how the run ended: finished, stopped or failed."""


def check_trackers(config: TrainConfig, folder: Location) -> None:
    """Refuse trackers that cannot work here for a run in `folder`.

    Raises
    ------
    UsageError
        `mlflow` without the extra of that name, without an address for a run in an object store, or with a password in `mlflow_uri`.
    """
    if "mlflow" not in config.trackers:
        return
    missing = [name for name in ("mlflow", "sqlalchemy", "alembic") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"trackers: mlflow needs the extra of that name (no {missing[0]} here): pip install 'sentinode[mlflow]'")
    if config.mlflow_uri and urlsplit(config.mlflow_uri).password:
        # The configuration is stored with the run and in the bundle, which is given away.
        raise UsageError("mlflow_uri holds a password; take it out and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD")
    if not folder.is_local and not config.mlflow_uri and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise UsageError(f"trackers: mlflow's own file cannot lie in an object store ({folder}); set mlflow_uri or MLFLOW_TRACKING_URI to a server's")


class Tracking:
    """The trackers of one run; `add` and `end` return at once."""

    def __init__(self, opens: Mapping[str, Callable[[], Tracker]]) -> None:
        self._feeds = [_Feed(name, open_it) for name, open_it in opens.items()]

    def add(self, record: Mapping[str, Any]) -> None:
        """Record one epoch; one that a tracker holds already is passed over."""
        for feed in self._feeds:
            feed.put(("epoch", dict(record)))

    def end(self, status: str, result: Mapping[str, float | str]) -> None:
        """Record how the run ended."""
        for feed in self._feeds:
            feed.put(("end", (status, dict(result))))

    def finish(self) -> None:
        """Let the trackers go when they have written everything, without waiting for it; `close` still may."""
        for feed in self._feeds:
            feed.put(None)

    def close(self, timeout_s: float = _CLOSE_S) -> None:
        """Wait for what is not written yet, for a bounded time."""
        deadline = time.monotonic() + timeout_s
        for feed in self._feeds:
            feed.close(max(0.0, deadline - time.monotonic()))


class _Feed:
    """Gives one tracker, in a thread, what is put in; begins anew with what is left when the tracker fails."""

    def __init__(self, name: str, open_it: Callable[[], Tracker]) -> None:
        self._name, self._open = name, open_it
        self._queue: queue.SimpleQueue[tuple[str, Any] | None] = queue.SimpleQueue()
        self._told = False
        # A daemon: a tracker that hangs must not keep the program from ending.
        self._thread = threading.Thread(target=self._run, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def put(self, item: tuple[str, Any] | None) -> None:
        self._queue.put(item)

    def close(self, timeout_s: float) -> None:
        self._queue.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._tell("does not answer")

    def _run(self) -> None:
        tracker: Tracker | None = None
        left: list[tuple[str, Any]] = []
        while (item := self._queue.get()) is not None:
            left.append(item)
            try:
                if tracker is None:
                    tracker = self._open()
                while left:
                    _give(tracker, *left[0])
                    left.pop(0)
            except Exception as error:
                # Whatever a foreign library raises: what it has written is asked again when the next epoch comes.
                tracker = None
                self._tell(one_line(error))

    def _tell(self, what: str) -> None:
        if not self._told:
            self._told = True
            say(f"warning: tracker {self._name}: {what}; training goes on without it")


def _give(tracker: Tracker, kind: str, content: Any) -> None:
    if kind == "end":
        tracker.end(*content)
        return
    step = content["epoch"] + 1
    if step > tracker.recorded:
        tracker.epoch(step, _numbers(content))
        tracker.recorded = step


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    numbers = {name: float(record[name]) for name in _TAGS if record.get(name) is not None}
    if record.get("rows") and record.get("seconds"):
        numbers["images_per_s"] = record["rows"] / record["seconds"]
    return numbers


def open_trackers(config: TrainConfig, folder: Location, facts: RunFacts) -> Tracking:
    """Return the configured trackers of the run in `folder`; to be closed."""
    opens: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: EventFile(folder / _EVENTS_FOLDER, facts),
        "mlflow": lambda: MlflowRun(config, folder, facts),
    }
    return Tracking({name: opens[name] for name in config.trackers})


@contextmanager
def tracking(config: TrainConfig, folder: Location, facts: RunFacts) -> Iterator[Tracking]:
    """Yield the configured trackers of the run in `folder`; how the block ends is how the run ended, unless `end` said it before."""
    trackers = open_trackers(config, folder, facts)
    try:
        yield trackers
    except (StoppedError, KeyboardInterrupt, SystemExit):
        trackers.end("stopped", {})
        raise
    except BaseException:
        trackers.end("failed", {})
        raise
    finally:
        trackers.close()


class EventFile:
    """TensorBoard's event files in one folder: one more for each process that writes there.

    An epoch is one record, so it is there wholly or, where the process was killed while writing, not at all: a torn record is passed over by readers.
    In an object store, where nothing can be added to a file, the whole of it, some kilobytes, is put again with each epoch.
    """

    def __init__(self, folder: Location, facts: RunFacts) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event = Event
        before = recorded_steps(folder)
        self.recorded = max(before, default=-1)
        host = os.uname().nodename
        self._place = folder / f"events.out.tfevents.{time.time_ns() // 1000:017d}.{host}.{os.getpid()}"
        self._file = _opened(self._place) if folder.is_local else BytesIO()
        self._records = RecordWriter(self._file)
        self._write(self._event(wall_time=time.time(), file_version="brain.Event:2"))
        if not before:
            self._text("config", yaml.safe_dump(dict(facts.config), sort_keys=False))
            self._text("run", yaml.safe_dump(dict(facts.facts), sort_keys=False))

    def epoch(self, step: int, numbers: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=_TAGS[name], simple_value=value) for name, value in numbers.items()]
        self._write(self._event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def end(self, status: str, result: Mapping[str, float | str]) -> None:
        self._text("end", yaml.safe_dump({"status": status, **result}, sort_keys=False), step=max(0, self.recorded))

    def _text(self, tag: str, text: str, step: int = 0) -> None:
        from torch.utils.tensorboard.summary import text as text_summary

        # Markdown, where four spaces make a block that is shown as it is.
        block = "\n".join(f"    {line}" for line in text.splitlines())
        self._write(self._event(wall_time=time.time(), step=step, summary=text_summary(tag, block)))  # type: ignore[no-untyped-call]

    def _write(self, event: Any) -> None:
        self._records.write(event.SerializeToString())
        self._records.flush()
        if isinstance(self._file, BytesIO):
            self._place.write_bytes(self._file.getvalue())


def _opened(place: Location) -> BinaryIO:
    place.local.parent.mkdir(parents=True, exist_ok=True)
    return place.local.open("xb")


def recorded_steps(folder: Location) -> set[int]:
    """Return the steps of the epochs that TensorBoard's event files in `folder` hold."""
    try:
        names = [entry.name for entry in folder.entries() if entry.name.startswith("events.out.tfevents.")]
    except FileNotFoundError:
        return set()
    if folder.is_local:
        return {step for name in names for step in _steps_in((folder / name).local)}
    with TemporaryDirectory(prefix="events-", dir=temporary_folder()) as copies:
        for name in names:
            (folder / name).get_file(Path(copies, name))
        return {step for name in names for step in _steps_in(Path(copies, name))}


def _steps_in(path: Path) -> Iterator[int]:
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    for event in LegacyEventFileLoader(str(path)).Load():
        if any(value.tag == _TAGS["val_loss"] for value in event.summary.value):
            yield event.step


class MlflowRun:
    """One run in MLflow; its id is kept in the run's folder."""

    def __init__(self, config: TrainConfig, folder: Location, facts: RunFacts) -> None:
        # MLflow tells its makers about its use, sets up logging and tries for minutes to reach a server, unless told not to before it is imported.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_CONFIGURE_LOGGING", "false")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient(tracking_uri=store_uri(config, folder))
        self.run_id = self._find_or_create(config.mlflow_experiment, folder, facts)
        run = self._client.get_run(self.run_id)
        if not run.data.params:
            # In one request, as what a run that goes on takes for all of them must not be a part.
            self._client.log_batch(self.run_id, params=[Param(name, value) for name, value in _flat(facts.config).items()])
        if run.info.status != "RUNNING":
            self._client.update_run(self.run_id, status="RUNNING")
        steps = [metric.step for metric in self._client.get_metric_history(self.run_id, "val_loss")]
        self.recorded = max(steps, default=-1)

    def _find_or_create(self, experiment: str, folder: Location, facts: RunFacts) -> str:
        """Return the id of this folder's run, also where a process was killed between making it and noting its id."""

        note = folder / _MLFLOW_ID_FILE
        known: dict[str, str] = json.loads(note.read_bytes()) if note.exists() else {}
        if not known:
            known = {"key": secrets.token_hex(16)}
            note.write_bytes(json_bytes(known))
        found = self._client.get_experiment_by_name(experiment)
        if found is None:
            # Nothing of ours goes there, but MLflow's own choice for files would be the current folder.
            files = (folder / "mlflow_files").local.as_uri() if folder.is_local and _is_local(self._client.tracking_uri) else None
            experiment_id = self._client.create_experiment(experiment, artifact_location=files)
        else:
            experiment_id = found.experiment_id
        runs = self._client.search_runs([experiment_id], f"tags.`sentinode.key` = '{known['key']}'")
        if runs:
            run_id = str(runs[0].info.run_id)
        else:
            tags = {
                "sentinode.key": known["key"],
                "mlflow.runName": facts.name,
                **{f"sentinode.{name}": value for name, value in facts.facts.items()},
            }
            if "git_commit" in facts.facts:
                tags["mlflow.source.git.commit"] = facts.facts["git_commit"]
            run_id = str(self._client.create_run(experiment_id, tags=tags).info.run_id)
        if known.get("run_id") != run_id:
            note.write_bytes(json_bytes({"key": known["key"], "run_id": run_id}))
        return run_id

    def epoch(self, step: int, numbers: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        self._client.log_batch(self.run_id, metrics=[Metric(name, value, now_ms, step) for name, value in numbers.items()])

    def end(self, status: str, result: Mapping[str, float | str]) -> None:
        from mlflow.entities import RunTag

        self._client.log_batch(self.run_id, tags=[RunTag(f"sentinode.{name}", str(value)) for name, value in result.items()])
        self._client.set_terminated(self.run_id, status={"finished": "FINISHED", "stopped": "KILLED"}.get(status, "FAILED"))


def store_uri(config: TrainConfig, folder: Location) -> str:
    """Return the MLflow store: `mlflow_uri`, MLFLOW_TRACKING_URI or a SQLite file in the run's folder; a path means such a file too."""
    uri = config.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI") or str(folder / "mlflow.db")
    return f"sqlite:///{local_path(uri)}" if "://" not in uri and not uri.startswith("databricks") else uri


def _is_local(uri: str) -> bool:
    return uri.startswith(("sqlite:", "file:"))


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in config.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {prefix + name: str(value)}
    return flat
