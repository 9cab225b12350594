"""Running our own commands in tests, and waiting for what they say."""

import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def sentinode(*argv: str | Path, ray_address: str | None, timeout_s: float = 300) -> "subprocess.CompletedProcess[str]":
    """Run one command to its end, on the Ray at `ray_address` or on one of its own."""
    return subprocess.run(_command(argv), capture_output=True, text=True, timeout=timeout_s, env=_environment(ray_address), cwd=ROOT)


class Running:
    """A command that runs, and the lines it has printed so far."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.lines: list[str] = []
        self._queue: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._queue.put(line)
        self._queue.put(None)

    def wait_for_line(self, start: str, timeout_s: float) -> str:
        """Return the first line from now on that begins with `start`."""
        deadline = time.monotonic() + timeout_s
        while True:
            line = self._queue.get(timeout=max(0.1, deadline - time.monotonic()))
            assert line is not None, f"ended with {self.process.wait()} before {start!r}:\n{''.join(self.lines)}"
            self.lines.append(line)
            if line.startswith(start):
                return line


@contextmanager
def running(*argv: str | Path, ray_address: str | None) -> Iterator[Running]:
    """Start a command; it is ended with the block, however the block ends."""
    process = subprocess.Popen(
        _command(argv), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=_environment(ray_address), cwd=ROOT, start_new_session=True
    )
    try:
        yield Running(process)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def _command(argv: tuple[str | Path, ...]) -> list[str]:
    return [sys.executable, "-m", "ray_jobs.cli", *map(str, argv)]


def _environment(ray_address: str | None) -> dict[str, str]:
    environment = dict(os.environ)
    environment.pop("RAY_ADDRESS", None)
    return environment | ({"RAY_ADDRESS": ray_address} if ray_address else {})
