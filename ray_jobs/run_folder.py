"""The folder of a run or sweep belongs to one configuration and one data set, and to one process at a time.

`sentinode.sole_writer` keeps others out. In an object store that cannot be for certain: a process that was held up may come back after another one
has taken the run. So each process writes an id of its own into the request there, and whoever finds another id than the one it began with stops.
"""

import errno
import fnmatch
import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sentinode.bundle import Bundle
from sentinode.config import Config
from sentinode.errors import ManifestError, SentinodeError, StorageError, UsageError
from sentinode.locations import Entry, Location
from sentinode.storage import json_bytes, remove_any, temporary_folder

REQUEST_FILE = "request.json"
# What a process leaves that is killed between making a folder and writing its request (`temporary_name`).
_UNFINISHED_REQUEST = f".{REQUEST_FILE}.*.tmp"
_REMOVAL_S = 60.0
# Change how a run is carried out, not what comes out: repairs, trials at a time, who is told, and how often the state is saved (training goes on
# from a checkpoint as if there had been none). Not here: workers, cpus_per_worker, precision, compile, channels_last and eval_batch_size round
# differently, ingest and stream_window_rows order the rows differently.
_OPERATIONAL = {"max_failures", "max_concurrent_trials", "trackers", "mlflow_uri", "mlflow_experiment", "checkpoint_interval_s"}


@dataclass(frozen=True)
class RunRequest:
    """What a run folder was, or is to be, made for."""

    folder: Location
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
        if not self.folder.name:
            raise UsageError(f"{self.folder}: name a folder in the bucket")
        path = self.folder / REQUEST_FILE
        try:
            difference = _difference(json.loads(path.read_bytes().decode()), self._fields())
        except (FileNotFoundError, NotADirectoryError):
            if self.folder.exists() and not (self.folder.is_dir() and all(_is_unfinished(entry) for entry in self.folder.entries())):
                raise UsageError(f"{self.folder} exists and is not a {self.verb} run; use another --out") from None
            return
        except OSError as error:
            raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path}: damaged; use another --out") from error
        if difference:
            raise UsageError(f"{self.folder} belongs to another run ({difference}); use another --out, or remove it")

    def claim(self) -> str:
        """Make the folder, if need be, and write the request into it: from now on it belongs to this run.

        Returns
        -------
        str
            The folder's id, random, by which other machines know whether they see this folder (`problem_with`). On disk it is the same at every call;
            in an object store another one each time, by which a process that had the run before knows that it has lost it.

        Raises
        ------
        UsageError
            The folder cannot be written.
        StorageError
            Its disk is full, or the storage does not answer.
        """
        try:
            run_id = (_id_of(self.folder) if self.folder.is_local else None) or secrets.token_hex(16)
            (self.folder / REQUEST_FILE).write_bytes(json_bytes({"id": run_id, **self._fields()}))
        except OSError as error:
            raise unwritable(self.folder, error) from error
        return run_id


def problem_with(folder: Location, run_id: str) -> str | None:
    """Return None where this machine sees at `folder` the one whose id is `run_id`; else one line that says why nothing may be written there."""
    found = _id_of(folder)
    if found == run_id:
        return None
    if folder.is_local or found is None:
        return not_shared(folder)
    return f"{folder}: another process goes on with this run, so this one has stopped"


def _id_of(folder: Location) -> str | None:
    try:
        return str(json.loads((folder / REQUEST_FILE).read_bytes().decode())["id"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def not_shared(folder: Location) -> str:
    """Return what to say where another machine sees another folder, or none, at `folder`."""
    if not folder.is_local:
        return f"{folder}: its {REQUEST_FILE} is gone, or cannot be read from here"
    return f"{folder} is not the same folder on every node; put --out on a file system that all nodes share"


def _is_unfinished(entry: Entry) -> bool:
    return fnmatch.fnmatch(entry.name, _UNFINISHED_REQUEST)


def unwritable(folder: Location, error: OSError) -> SentinodeError:
    """Return what to raise where a run's folder cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"{folder}: cannot be written ({error.strerror}); make room there and repeat the command")
    return UsageError(f"{folder}: cannot be written ({error.strerror or error})")


def open_finished_bundle(folder: Location) -> Bundle | None:
    """Return the run's bundle if it is there already (verified), None if not; raises ManifestError where it is damaged."""
    bundle = folder / "bundle"
    if not (bundle / "bundle.json").exists():
        return None
    try:
        return Bundle.open(bundle)
    except ManifestError as error:
        raise ManifestError(f"{error}; remove {bundle} and repeat the command, which makes it again from the checkpoints") from error


def features_folder(folder: Location, data_fingerprint: str) -> Path:
    """Return where outputs of frozen stages are kept while a run or sweep trains: in its folder, or of one in a store on the own disk."""
    if folder.is_local:
        return folder.local / "features"
    # They may outlive the run there, and another one of the same name, on other data, must not take them for its own.
    return temporary_folder() / f"features-{hashlib.sha256(f'{folder.uri} {data_fingerprint}'.encode()).hexdigest()[:12]}"


def remove_features(folder: Location, data_fingerprint: str) -> None:
    """Remove what `features_folder` holds, for a store's on every node that answers within a minute. Ray must run."""
    if folder.is_local:
        remove_any(features_folder(folder, data_fingerprint))
        return
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    tasks = [
        _remove_here.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(folder, data_fingerprint) for node in nodes
    ]
    ray.wait(tasks, num_returns=len(tasks), timeout=_REMOVAL_S)


@ray.remote(num_cpus=0, max_retries=0)
def _remove_here(folder: Location, data_fingerprint: str) -> None:
    remove_any(features_folder(folder, data_fingerprint))


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
