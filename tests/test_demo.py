"""`make demo` as a new user runs it, on a Ray of its own."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests.processes import ROOT


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_demo_runs_twice_writes_nothing_home_and_leaves_nothing_running(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(home), "RAY_TMPDIR": os.environ["RAY_TMPDIR"], "SENTINODE_TEST_DEMO": str(tmp_path)}
    command = [sys.executable, "-m", "ray_jobs.demo", "--out", str(tmp_path / "demo")]
    first = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    assert first.stdout.count('"prediction":') == 4
    assert "nothing was left running" in first.stdout
    assert not _still_running(tmp_path)
    assert not (home / ".ray").exists()
    second = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert second.returncode == 0, second.stderr[-3000:]
    assert second.stdout.count("already complete") == 3
    assert not _still_running(tmp_path)


def _still_running(marker: Path) -> list[str]:
    """Processes that were started with the environment of this test, wherever they have gone since; Ray's may take seconds to end."""
    deadline, poll = time.monotonic() + 30, threading.Event()
    while (found := _started_with(marker)) and time.monotonic() < deadline:
        poll.wait(0.5)
    return found


def _started_with(marker: Path) -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("SENTINODE_TEST_DEMO") == str(marker):
                found.append(" ".join(process.cmdline()))
        except (psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found
