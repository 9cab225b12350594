"""The right to write an output: on disk a lock, in an object store, which has none, an object that its holder puts anew every few seconds.

    s3://lab/runs/.first.owner/000003.json     {"holder": …, "beat": 17, "released": false}, for s3://lab/runs/first

Whoever wants the output looks at the newest object for a while. If it changes, somebody is at work there. If not, its holder has gone, and the next
number is put, only if it is not there: of several who want it one gets it. Clocks are not compared. A holder that was only held up, and comes back,
finds the newer number when it asks (`Holder.confirm`).
"""

import json
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from sentinode.errors import SentinodeError, StorageError, UsageError
from sentinode.locations import Location
from sentinode.storage import exclusive

log = logging.getLogger(__name__)

BEAT_S = 5.0
"""How often a holder puts its object."""
SILENCE_S = 45.0
"""After so long without a change, in a store that answers, a holder has gone. More than a stall of a busy machine, or a repeated request, takes."""
_LOOK_S = 1.0
_SLOW_LOOK_S = 10.0
"""A look that took longer says nothing of the holder: its beats did not get through to the store either."""


class Holder:
    """Who has the right to write an output in an object store.

    Parameters
    ----------
    out : Location
    number : int
        Of its object.
    """

    def __init__(self, out: Location, number: int) -> None:
        self._out, self._number = out, number
        self._id = secrets.token_hex(8)
        self._beat = 0

    def confirm(self) -> None:
        """Return while nobody else has taken the right.

        Raises
        ------
        UsageError
            Another process has taken it.
        StorageError
            The storage does not answer.
        """
        newest = _newest(self._out)
        if newest is not None and newest[0] > self._number:
            raise UsageError(f"{self._out}: another process writes it now, so this one has stopped")

    def put(self, *, create_only: bool = False, released: bool = False) -> None:
        """Show that this process lives, or that it has ended."""
        self._beat += 1
        content = {"holder": self._id, "beat": self._beat, "released": released}
        _place(self._out, self._number).write_bytes(json.dumps(content).encode(), create_only=create_only)


@contextmanager
def sole_writer(out: Location, tell: Callable[[str], None] = log.info) -> Iterator[Callable[[], None]]:
    """Hold the right to write `out` while the block runs.

    Parameters
    ----------
    out : Location
    tell : callable
        Told, in a line, what is waited for.

    Yields
    ------
    callable
        Returns while the right is held, and raises UsageError once it is lost: call it before what cannot be undone. Never lost on disk.

    Raises
    ------
    UsageError
        Another process has it, or this one may not write there.
    StorageError
        The storage does not answer.
    """
    if out.is_local:
        with exclusive(out.local):
            yield lambda: None
        return
    if not out.name:
        raise UsageError(f"{out}: name a folder in the bucket")
    try:
        holder = _take(out, tell)
    except FileNotFoundError as error:
        raise UsageError(f"{out}: there is no such bucket; make it first") from error
    except OSError as error:
        raise UsageError(f"{out}: cannot be written ({error.strerror or error})") from error
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(holder, ended), name="sole-writer", daemon=True)
    beating.start()
    try:
        yield holder.confirm
    finally:
        ended.set()
        beating.join()
        # Whoever comes next need not wait; where this fails it waits.
        with suppress(SentinodeError, OSError):
            holder.confirm()
            holder.put(released=True)


def _beat(holder: Holder, ended: threading.Event) -> None:
    while not ended.wait(BEAT_S):
        # The next one may get through; what is lost meanwhile is found when it is asked for.
        with suppress(StorageError, OSError):
            holder.put()


def _take(out: Location, tell: Callable[[str], None]) -> Holder:
    newest = _newest(out)
    if newest is not None and not _is_released(out, newest[0]):
        tell(f"{out}: looking for {SILENCE_S:.0f} s whether another process still writes it")
        silent_s = 0.0
        while silent_s < SILENCE_S:
            began = time.monotonic()
            time.sleep(_LOOK_S)
            if _newest(out) != newest:
                raise UsageError(f"{out}: another process is writing it")
            took_s = time.monotonic() - began
            silent_s = silent_s + took_s if took_s < _SLOW_LOOK_S else 0.0
    holder = Holder(out, (newest[0] if newest else 0) + 1)
    try:
        holder.put(create_only=True)
    except FileExistsError as error:
        raise UsageError(f"{out}: another process is writing it") from error
    if newest is not None:
        with suppress(StorageError, OSError):
            _place(out, newest[0]).remove()
    return holder


def _place(out: Location, number: int) -> Location:
    return out.with_name(f".{out.name}.owner") / f"{number:06d}.json"


def _newest(out: Location) -> tuple[int, str] | None:
    """Return number and stamp of the newest object; None where nobody ever wrote here."""
    try:
        entries = out.with_name(f".{out.name}.owner").entries()
    except FileNotFoundError:
        return None
    found = [(int(stem), entry.stamp) for entry in entries if (stem := entry.name.removesuffix(".json")).isdigit()]
    return max(found, default=None)


def _is_released(out: Location, number: int) -> bool:
    try:
        return bool(json.loads(_place(out, number).read_bytes())["released"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False
