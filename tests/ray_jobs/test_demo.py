"""How the demo hands signals on to the command that it runs. What it shows: tests/test_demo.py."""

import os
import signal
import subprocess
import sys

import pytest

from tests.processes import ROOT

# Ends in order half a second after the first signal; a second one would end it at once.
_COMMAND = """
import signal, sys, time
def stop(*_):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    time.sleep(0.5)
    print("ended in order", flush=True)
    sys.exit(CODE)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
print("ready", flush=True)
time.sleep(60)
"""
_DEMO = "import sys; from ray_jobs.demo import run_to_its_end; sys.exit(run_to_its_end([sys.executable, '-c', sys.argv[1]]))"


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("code", [3, 0])
def test_a_signal_stops_the_command_in_order_and_then_the_demo(signum: signal.Signals, code: int) -> None:
    command = [sys.executable, "-c", _DEMO, _COMMAND.replace("CODE", str(code))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True) as demo:
        assert demo.stdout is not None
        assert demo.stdout.readline() == "ready\n"
        # As a terminal sends Ctrl-C: to all of its processes at the same time.
        os.killpg(demo.pid, signum)
        assert demo.stdout.read() == "ended in order\n"
        assert demo.wait(60) == 3


@pytest.mark.parametrize(("ends", "code"), [("sys.exit(2)", 2), ("pass", 0), ("os.kill(os.getpid(), 9)", 137)])
def test_the_demo_ends_as_its_command_did(ends: str, code: int) -> None:
    done = subprocess.run([sys.executable, "-c", _DEMO, f"import os, sys; {ends}"], cwd=ROOT, timeout=60)
    assert done.returncode == code
