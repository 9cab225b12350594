"""The folder of a run or sweep belongs to one configuration and one data set."""

import errno
import fnmatch
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentinode.bundle import Bundle
from sentinode.config import Config
from sentinode.errors import SentinodeError, StorageError, UsageError
from sentinode.storage import write_json

REQUEST_FILE = "request.json"
FEATURES_FOLDER = "features"
"""Kept outputs of frozen stages, while a run or sweep trains."""
# What a process leaves that is killed between making a folder and writing its request (`temporary_name`).
_UNFINISHED_REQUEST = f".{REQUEST_FILE}.*.tmp"
# Change how a run is carried out, not what comes out: repairs, trials at a time, who is told, and how often the state is saved (training goes on
# from a checkpoint as if there had been none). Not here: workers, cpus_per_worker, precision, compile, channels_last and eval_batch_size round
# differently, ingest and stream_window_rows order the rows differently.
_OPERATIONAL = {"max_failures", "max_concurrent_trials", "trackers", "mlflow_uri", "mlflow_experiment", "checkpoint_interval_s"}


@dataclass(frozen=True)
class RunRequest:
    """What a run folder was, or is to be, made for."""

    folder: Path
    verb: str
    config: Config
    data_fingerprint: str
    data_folds: int | None

    def _fields(self) -> dict[str, Any]:
        return {
            "verb": self.verb,
            "config": self.config.model_dump(mode="json"),
            "data_fingerprint": self.data_fingerprint,
            "data_folds": self.data_folds,
        }

    def check(self) -> None:
        """Check that the folder is free or belongs to this very request.

        Raises
        ------
        UsageError
            It holds another run, or something else.
        """
        path = self.folder / REQUEST_FILE
        if path.exists():
            try:
                difference = _difference(json.loads(path.read_text(encoding="utf-8")), self._fields())
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UsageError(f"{path}: damaged; use another --out") from error
            if difference:
                raise UsageError(f"{self.folder} belongs to another run ({difference}); use another --out, or remove it")
        elif self.folder.exists() and not (self.folder.is_dir() and all(_is_unfinished(entry) for entry in self.folder.iterdir())):
            raise UsageError(f"{self.folder} exists and is not a {self.verb} run; use another --out")

    def claim(self) -> str:
        """Make the folder, if need be, and write the request into it: from now on it belongs to this run.

        Returns
        -------
        str
            The folder's id, random and the same at every call, by which other machines know whether they see this folder (`is_run`).

        Raises
        ------
        UsageError
            The folder cannot be written.
        StorageError
            Its disk is full.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            run_id = _id_of(self.folder) or secrets.token_hex(16)
            write_json(self.folder / REQUEST_FILE, {"id": run_id, **self._fields()})
        except OSError as error:
            raise unwritable(self.folder, error) from error
        return run_id


def is_run(folder: Path, run_id: str) -> bool:
    """Tell whether the folder that this machine sees at `folder` is the one whose id is `run_id`."""
    return _id_of(folder) == run_id


def _id_of(folder: Path) -> str | None:
    try:
        return str(json.loads((folder / REQUEST_FILE).read_text(encoding="utf-8"))["id"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def not_shared(folder: Path) -> str:
    """Return what to say where another machine sees another folder, or none, at `folder`."""
    return f"{folder} is not the same folder on every node; put --out on a file system that all nodes share"


def _is_unfinished(entry: Path) -> bool:
    return fnmatch.fnmatch(entry.name, _UNFINISHED_REQUEST)


def unwritable(folder: Path, error: OSError) -> SentinodeError:
    """Return what to raise where a run's folder cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"{folder}: cannot be written ({error.strerror}); make room there and repeat the command")
    return UsageError(f"{folder}: cannot be written ({error.strerror})")


def open_finished_bundle(folder: Path) -> Bundle | None:
    """Return the run's bundle if it is there already (verified), None if not."""
    return Bundle.open(folder / "bundle") if (folder / "bundle" / "bundle.json").exists() else None


def _difference(stored: Mapping[str, Any], request: Mapping[str, Any]) -> str | None:
    # The fingerprint is of rows and splits; the same rows may have been dealt to other folds.
    for key in ("verb", "data_fingerprint", "data_folds"):
        if stored[key] != request[key]:
            return f"{key} {stored[key]}"
    old, new = _deciding(stored["config"]), _deciding(request["config"])
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            return f"{key} was {old.get(key)!r}, now {new.get(key)!r}"
    return None


def _deciding(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys that decide what comes out; those of a sweep's `base`, which all its trials share, under names of their own."""
    base = _deciding(config["base"]) if "base" in config else {}
    own = {key: value for key, value in config.items() if key not in _OPERATIONAL and key != "base"}
    return own | {f"base.{key}": value for key, value in base.items()}
