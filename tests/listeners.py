"""Which processes listen where."""

import os
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from ipaddress import ip_address

import grpc
import httpx
import psutil

_KINDS = {
    r"gcs_server": "gcs_server",
    r"/raylet/raylet": "raylet",
    r"ray/dashboard/dashboard\.py|^ray-dashboard-": "dashboard",
    r"ray::DashboardAgent|ray/dashboard/agent\.py": "dashboard agent",
    r"ray::RuntimeEnvAgent|runtime_env/agent/main\.py": "runtime env agent",
    r"autoscaler/.*monitor\.py": "monitor",
    r"ray\.util\.client\.server": "ray client server",
    r"ray::ProxyActor": "serve proxy",
    r"ray::|default_worker\.py": "worker",
    r"ray_jobs": "our command",
}


BEYOND_THIS_MACHINE = {
    "gcs_server": "refused",
    "raylet": "refused",
    "worker": "refused",
    "serve proxy": "refused",
    "dashboard": "refused",
    "dashboard agent": "refused",
    "runtime env agent": "refused",
    "ray client server": "refused",
    "our command": "refused",
    "monitor": "measures",
}
"""What listens where other machines may reach it (all of it Ray's own; in our command the part that is a driver), and what a stranger gets there.

docs/security.md has the same table.
"""
OPEN_MEASURES = {"dashboard", "dashboard agent", "monitor"}
"""Those of which one port shows Prometheus's measures to everyone."""


@dataclass(frozen=True)
class Listener:
    """One listening socket."""

    kind: str
    """What the process is, or its command line where that is not known."""
    host: str
    port: int

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches it."""
        address = ip_address(self.host)
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def kind_of(command_line: str) -> str:
    """Return what a process is."""
    return next((kind for pattern, kind in _KINDS.items() if re.search(pattern, command_line)), command_line.strip())


def listeners_below(root: psutil.Process) -> set[Listener]:
    """Return the listening sockets of a process and all that descend from it, but for those that they have from us."""
    ours = {connection.laddr for connection in psutil.Process(os.getpid()).net_connections("tcp") if connection.status == psutil.CONN_LISTEN}
    found = set()
    for process in [root, *root.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            kind = kind_of(" ".join(process.cmdline()))
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN and connection.laddr not in ours:
                    found.add(Listener(kind, connection.laddr.ip, connection.laddr.port))
    return found


@contextmanager
def command_lines_below(root: psutil.Process) -> Iterator[set[str]]:
    """Note the command line of a process and of all that descend from it, as `ps` shows them, until the block ends."""
    seen: set[str] = set()
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.1):
            with suppress(psutil.NoSuchProcess):
                for process in [root, *root.children(recursive=True)]:
                    with suppress(psutil.NoSuchProcess):
                        seen.add(" ".join(process.cmdline()))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


_METHODS = [
    "/ray.rpc.NodeInfoGcsService/CheckAlive",
    "/ray.rpc.NodeManagerService/GetNodeStats",
    "/ray.rpc.ObjectManagerService/Pull",
    "/ray.rpc.CoreWorkerService/GetCoreWorkerStats",
    "/ray.rpc.ReporterService/HealthCheck",
    "/ray.rpc.RayletDriver/ClusterInfo",
    "/ray.serve.ASGIService/HandleRequest",
]
"""One of each of Ray's services that a port may have."""


def answer_without_token(listener: Listener) -> str:
    """Return what a stranger gets from a port: "refused" where it asks for the token, "measures" for Prometheus's text, else what it said."""
    host = {"0.0.0.0": "127.0.0.1", "::": "127.0.0.1"}.get(listener.host, listener.host.removeprefix("::ffff:"))
    with suppress(httpx.RemoteProtocolError):  # no HTTP/1, so gRPC
        answer = httpx.get(f"http://{host}:{listener.port}/api/jobs/", timeout=20, trust_env=False)
        if answer.text.startswith("# HELP"):
            return "measures"
        return "refused" if answer.status_code in (401, 403) else f"HTTP {answer.status_code}: {answer.text[:200]}"
    said = []
    with grpc.insecure_channel(f"{host}:{listener.port}") as channel:
        for method in _METHODS:
            try:
                channel.unary_unary(method)(b"", timeout=20)
                return f"{method} was answered"
            except grpc.RpcError as error:
                if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                    return "refused"
                said.append(error.code().name)
    return f"gRPC: {said}"


def known_beyond(listeners: Iterable[Listener]) -> set[Listener]:
    """Return those of the listeners that other machines may reach, after each was found in the list and asked what it tells a stranger."""
    beyond = {listener: answer_without_token(listener) for listener in listeners if not listener.is_local}
    print(*sorted(f"{answer:10} {listener}" for listener, answer in beyond.items()), sep="\n")
    for listener, answer in beyond.items():
        assert listener.kind in BEYOND_THIS_MACHINE, f"unknown: {listener}, {answer}; docs/security.md has the table"
        assert answer == BEYOND_THIS_MACHINE[listener.kind] or (answer == "measures" and listener.kind in OPEN_MEASURES), f"{listener}: {answer}"
    return set(beyond)
