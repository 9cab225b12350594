"""Waiting for conditions, not for time."""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(found: Callable[[], T | None], timeout_s: float = 60, story: Callable[[], str] = lambda: "", *, every_s: float = 0.1) -> T:
    """Return what `found` returns once that is true of it; fail with `story` where it never is."""
    end, tick = time.monotonic() + timeout_s, threading.Event()
    while not (result := found()):
        assert time.monotonic() < end, f"waited for {timeout_s:g} s: {story()}"
        tick.wait(every_s)
    return result
