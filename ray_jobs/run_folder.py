"""The folder of a run or sweep belongs to one configuration and one data set."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sentinode.bundle import Bundle
from sentinode.config import Config
from sentinode.errors import UsageError
from sentinode.storage import write_json

REQUEST_FILE = "request.json"
# Change how a run is carried out, not what comes out.
_OPERATIONAL = {"max_failures", "max_concurrent_trials"}


def claim_run(folder: Path, verb: str, config: Config, fingerprint: str) -> None:
    """Make the folder, or check that it belongs to this very request.

    Raises
    ------
    UsageError
        It holds another run, or something else.
    """
    request = {"verb": verb, "config": config.model_dump(mode="json"), "data_fingerprint": fingerprint}
    path = folder / REQUEST_FILE
    if path.exists():
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            difference = _difference(stored, request)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path}: damaged; use another --out") from error
        if difference:
            raise UsageError(f"{folder} belongs to another run ({difference}); use another --out, or remove it")
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists and is not a {verb} run; use another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, request)
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written ({error.strerror})") from error


def open_finished_bundle(folder: Path) -> Bundle | None:
    """Return the run's bundle if it is there already (verified), None if not."""
    return Bundle.open(folder / "bundle") if (folder / "bundle" / "bundle.json").exists() else None


def _difference(stored: Mapping[str, Any], request: Mapping[str, Any]) -> str | None:
    for key in ("verb", "data_fingerprint"):
        if stored[key] != request[key]:
            return f"{key} {stored[key]}"
    old, new = stored["config"], request["config"]
    for key in sorted((old.keys() | new.keys()) - _OPERATIONAL):
        if old.get(key) != new.get(key):
            return f"{key} was {old.get(key)!r}, now {new.get(key)!r}"
    return None
