"""A Ray head with its job server and a token, as a platform team starts one, for tests."""

import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from tests.processes import ROOT


@dataclass(frozen=True)
class Head:
    """A head that runs."""

    ray_address: str
    job_server: str
    environment: dict[str, str]
    """What a command needs to be let in: the mode and the token."""
    folder: Path
    """Of Ray's own files, the session's logs among them."""
    process: psutil.Process
    """`ray start`; all others of the head descend from it."""

    @property
    def home(self) -> Path:
        """The home folder of the head, and of commands that are run here; empty to begin with."""
        return self.folder / "home"

    def environment_with(self, token: str | None = "") -> dict[str, str]:
        """Return the environment of a command that finds the head: with its token, with another, or without one."""
        chosen = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_TMPDIR")} | self.environment
        chosen |= {"RAY_API_SERVER_ADDRESS": self.job_server, "HOME": str(self.home)}
        if token is None:
            del chosen["RAY_AUTH_TOKEN"]
            chosen["RAY_AUTH_MODE"] = "disabled"
        elif token:
            chosen["RAY_AUTH_TOKEN"] = token
        return chosen

    def run(
        self, *argv: str | Path, token: str | None = "", more: Mapping[str, str] | None = None, timeout_s: float = 240
    ) -> "subprocess.CompletedProcess[str]":
        """Run a program of the environment's, like `ray`, `serve` or `sentinode`, to its end; `more`: further variables."""
        program = [sys.executable, "-m", "ray_jobs.cli"] if argv[0] == "sentinode" else [str(Path(sys.executable).parent / argv[0])]
        command = [*program, *map(str, argv[1:])]
        environment = self.environment_with(token) | dict(more or {})
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment, cwd=ROOT)


@contextmanager
def head_with_token(cpus: int = 4, more: Mapping[str, str] | None = None) -> Iterator[Head]:
    """Start a head of its own, in temporary folders, and end it. `more`: variables of its environment, and so of all its processes."""
    with tempfile.TemporaryDirectory(prefix="sn-head-", dir="/tmp") as folder, socket.socket() as one, socket.socket() as other:
        for probe in (one, other):
            probe.bind(("127.0.0.1", 0))
        port, dashboard_port = one.getsockname()[1], other.getsockname()[1]
        one.close()
        other.close()
        home = Path(folder, "home")
        home.mkdir()
        token = secrets.token_hex(32)
        guard = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
        environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_TMPDIR")}
        # The `python` of a job's command line is found as the head finds it.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment |= guard | {"HOME": str(home), "PATH": path, "RAY_USAGE_STATS_ENABLED": "0"} | dict(more or {})
        command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={port}", "--node-ip-address=127.0.0.1"]
        command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}", f"--num-cpus={cpus}", "--num-gpus=0", f"--temp-dir={folder}"]
        # Else two heads on one machine want the same port of the agent.
        command += ["--dashboard-agent-listen-port=0"]
        log = Path(folder, "head.log")
        with log.open("wb") as out:
            process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
        try:
            job_server = f"http://127.0.0.1:{dashboard_port}"
            _wait_until_it_answers(job_server, token, process, log)
            yield Head(f"127.0.0.1:{port}", job_server, guard, Path(folder), psutil.Process(process.pid))
        finally:
            # All at once: asked to end, it would wait half a minute for each.
            for one in [process, *psutil.Process(process.pid).children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
            process.wait()


def _wait_until_it_answers(job_server: str, token: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    end, tick = time.monotonic() + 90, threading.Event()
    while True:
        assert process.poll() is None, log.read_text()
        try:
            # Not the version, which is told before jobs are taken.
            answer = httpx.get(f"{job_server}/api/jobs/", headers={"Authorization": f"Bearer {token}"}, timeout=10, trust_env=False)
            if answer.status_code == 200:
                return
        except httpx.HTTPError:
            pass
        assert time.monotonic() < end, log.read_text()
        tick.wait(0.2)
