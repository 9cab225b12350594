"""A Ray head with its job server and a token, as a platform team starts one, for tests; it can be lost and started again, and nodes may join it."""

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
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx
import psutil

from tests.processes import ROOT

RAY = str(Path(sys.executable).parent / "ray")


@dataclass(frozen=True)
class Head:
    """A head that runs."""

    ray_address: str
    job_server: str
    environment: dict[str, str]
    """What a command needs to be let in: the mode and the token."""
    folder: Path
    """Of its home, and of Ray's own files, the session's logs among them."""
    process: psutil.Process | None = None
    """`ray start`, once it runs; all others of the head descend from it."""

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


@dataclass
class HeadMachine:
    """Where a head runs, in a folder of its own; killed, it is started again on the same ports."""

    folder: Path
    head: Head
    cpus: int
    extra_environment: dict[str, str] = field(default_factory=dict)
    extra_arguments: list[str] = field(default_factory=list)
    process: "subprocess.Popen[bytes] | None" = None
    starts: int = 0
    nodes: "list[subprocess.Popen[bytes]]" = field(default_factory=list)

    def start(self) -> None:
        """Start the head and wait until it takes jobs."""
        # Ray gives up after 30 s, which a machine full of other work does not always keep; so does whoever keeps a head up begin again.
        for _ in range(3):
            self.starts += 1
            self.process = self._ray_start(self._head_arguments(), "head", {})
            if _answers(self.head, self.process):
                self.head = replace(self.head, process=psutil.Process(self.process.pid))
                return
            _kill_tree(self.process)
        raise AssertionError((self.folder / "head.log").read_text())

    def _head_arguments(self) -> list[str]:
        host, port = self.head.ray_address.split(":")
        dashboard_port = self.head.job_server.rpartition(":")[2]
        # Started again it is a new machine: nothing of the old one's disk is there. The path is short, as Ray puts unix sockets below it.
        arguments = [
            "--head",
            f"--port={port}",
            f"--node-ip-address={host}",
            f"--num-cpus={self.cpus}",
            f"--temp-dir={self.folder / f'h{self.starts}'}",
        ]
        return [*arguments, "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}", *self.extra_arguments]

    def join(self, cpus: int, environment: dict[str, str] | None = None) -> "subprocess.Popen[bytes]":
        """Start one more node of the cluster, with a folder of its own."""
        name = f"n{len(self.nodes)}"
        command = [f"--address={self.head.ray_address}", "--node-ip-address=127.0.0.1", f"--num-cpus={cpus}", f"--temp-dir={self.folder / name}"]
        self.nodes.append(self._ray_start(command, name, environment or {}))
        return self.nodes[-1]

    def kill(self) -> None:
        """End the head as a power cut does: its daemons, its workers and the drivers of its jobs, and nothing else."""
        assert self.process is not None
        _kill_tree(self.process)

    def end(self) -> None:
        """End the head and the nodes."""
        for process in [*self.nodes, *([self.process] if self.process else [])]:
            _kill_tree(process)

    def _ray_start(self, arguments: list[str], name: str, extra: dict[str, str]) -> "subprocess.Popen[bytes]":
        environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_TMPDIR")}
        # The `python` of a job's command line is found as the head finds it.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment |= (
            self.head.environment | {"HOME": str(self.head.home), "PATH": path, "RAY_USAGE_STATS_ENABLED": "0"} | self.extra_environment | extra
        )
        # Else two nodes on one machine want the same port of the agent.
        command = [RAY, "start", "--block", "--num-gpus=0", "--dashboard-agent-listen-port=0", *arguments]
        with (self.folder / f"{name}.log").open("ab") as out:
            return subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)


@contextmanager
def machine_for_a_head(cpus: int = 4, environment: Mapping[str, str] | None = None, arguments: list[str] | None = None) -> Iterator[HeadMachine]:
    """A place for a head in temporary folders; what was started there is ended. `environment`: variables of all its processes."""
    with tempfile.TemporaryDirectory(prefix="sn-head-", dir="/tmp") as folder:
        guard = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        head = Head(f"127.0.0.1:{lasting_port()}", f"http://127.0.0.1:{lasting_port()}", guard, Path(folder))
        head.home.mkdir()
        machine = HeadMachine(Path(folder), head, cpus, dict(environment or {}), arguments or [])
        try:
            yield machine
        finally:
            machine.end()


@contextmanager
def head_with_token(cpus: int = 4, more: Mapping[str, str] | None = None) -> Iterator[Head]:
    """Start a head of its own, in temporary folders, and end it. `more`: variables of its environment, and so of all its processes."""
    with machine_for_a_head(cpus, more) as machine:
        machine.start()
        yield machine.head


def lasting_port() -> int:
    """A free port of localhost that is still free after its server was away for a while.

    It lies below those that Linux gives to connections (32768 and up), any of which may take it meanwhile, and above those of Ray's workers.
    """
    while True:
        port = 20000 + secrets.randbelow(12000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _kill_tree(process: "subprocess.Popen[bytes]") -> None:
    """End a node and all that it started, all at once: asked to end, it would wait half a minute for each."""
    with suppress(psutil.NoSuchProcess):
        for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()


def _answers(head: Head, process: "subprocess.Popen[bytes]") -> bool:
    """Wait until the job server takes jobs; False where the head ends before, or takes too long."""
    end, tick = time.monotonic() + 120, threading.Event()
    token = head.environment["RAY_AUTH_TOKEN"]
    while process.poll() is None and time.monotonic() < end:
        with suppress(httpx.HTTPError):
            # Not the version, which is told before jobs are taken.
            answer = httpx.get(f"{head.job_server}/api/jobs/", headers={"Authorization": f"Bearer {token}"}, timeout=10, trust_env=False)
            if answer.status_code == 200:
                return True
        tick.wait(0.2)
    return False
