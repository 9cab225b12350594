"""The Ray that a verb runs on: a local one it starts itself, the one named by RAY_ADDRESS, or the one a job was submitted to."""

import logging
import math
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import AuthenticationError

from ray_jobs.autoscaling import KINDS, LIMIT_VARIABLE, Growth, growth, places_on
from ray_jobs.ray_address import check_ray_address, missing_token_file, refused
from sentinode.errors import CapacityError, SentinodeError, UsageError

_LOCALHOST = "127.0.0.1"
_START_TIMEOUT_S = 60
# A cloud node takes minutes to boot and pull its image; Ray Train's own 60 s would give up on every cold start.
_AUTOSCALED_START_TIMEOUT_S = 900


@dataclass(frozen=True)
class Need:
    """What one verb occupies at a time.

    Attributes
    ----------
    workers : int
        Processes that must run together (DDP workers, inference actors).
    cpus_per_worker : float
    gpus_per_worker : float
    other_cpus : float
        CPUs beside the workers: drivers and data tasks.
    """

    workers: int
    cpus_per_worker: float = 1
    gpus_per_worker: float = 0
    other_cpus: float = 1

    @property
    def cpus(self) -> float:
        """All CPUs."""
        return self.workers * self.cpus_per_worker + self.other_cpus

    @property
    def gpus(self) -> float:
        """All GPUs."""
        return self.workers * self.gpus_per_worker


@contextmanager
def connected(need_cpus: float, *, verbose: bool = False) -> Iterator[None]:
    """Be connected to Ray inside the block; what is started here is stopped at its end.

    A Ray that we start has its dashboard on localhost, asks for a token of its own (nothing is written to the user's home) and has at least
    `need_cpus + 2` logical CPUs, so that driver, workers and ingest fit on a small machine.

    Raises
    ------
    UsageError
        RAY_ADDRESS names a cluster that cannot be reached, or RAY_AUTH_TOKEN_PATH no file.
    """
    if ray.is_initialized():
        yield
        return
    noise: dict[str, Any] = {"log_to_driver": verbose, "logging_level": logging.INFO if verbose else logging.ERROR}
    address = os.environ.get("RAY_ADDRESS")
    if address:
        if address.startswith("ray://"):
            raise UsageError(f"RAY_ADDRESS={address}: Ray Client cannot do what verbs need; name the head as HOST:6379, or use `sentinode submit`")
        if _is_host_and_port(address):  # else `auto`: Ray's to resolve
            check_ray_address(address)
        try:
            with _standard_error_kept(verbose), signal_handlers_kept():
                ray.init(address=address, **noise)
        except AuthenticationError as error:
            raise refused(address) from error
        except (ConnectionError, TimeoutError, RuntimeError, ValueError) as error:
            raise UsageError(f"RAY_ADDRESS={address}: no Ray cluster can be reached there ({_first_line(error)})") from error
    else:
        _start_local(need_cpus, verbose, noise)
    try:
        yield
    finally:
        ray.shutdown()
        if not address:
            del os.environ["RAY_ADDRESS"]


def _is_host_and_port(address: str) -> bool:
    host, separator, port = address.rpartition(":")
    return bool(separator) and port.isdigit() and "/" not in host


def _start_local(need_cpus: float, verbose: bool, noise: dict[str, Any]) -> None:
    if os.environ.get("RAY_AUTH_MODE", "token") == "token":
        if missing := missing_token_file():
            raise UsageError(missing)
        if not os.environ.get("RAY_AUTH_TOKEN") and not os.environ.get("RAY_AUTH_TOKEN_PATH"):
            # Else Ray, which turns token authentication on by itself, would take a cluster's token from the user's home, or write one there.
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    # It speaks of a cluster.
    os.environ.pop(LIMIT_VARIABLE, None)
    # Ray warns on the terminal when four times this many of its processes start at once; a small sweep does.
    # Ray would tell its makers which libraries are used here, and on what.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(max(4, os.cpu_count() or 1)))
    # Every process of this Ray must know which Ray it belongs to. Left alone, Ray Train's clean-up asks the newest one on the machine whether its
    # run is alive, and takes the workers of a run away when it is told of no such run. So the address is settled, and told, before the start.
    port = _free_port()
    os.environ |= {"RAY_GCS_SERVER_PORT": str(port), "RAY_ADDRESS": f"{_LOCALHOST}:{port}"}
    try:
        with _standard_error_kept(verbose), signal_handlers_kept():
            ray.init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, math.ceil(need_cpus) + 2),
                # Needed: Ray Train frees the workers of a stopped trial through the dashboard's state API.
                include_dashboard=True,
                dashboard_host=_LOCALHOST,
                _node_ip_address=_LOCALHOST,
                **noise,
            )
    except BaseException as error:
        del os.environ["RAY_ADDRESS"]
        # Ray 2.60 gives a node 30 s, which cannot be set, and raises a bare Exception.
        if isinstance(error, Exception) and "timed out during startup" in str(error):
            raise SentinodeError(
                "Ray did not start within its 30 s; is the machine busy with other work? Repeat the command, or set RAY_ADDRESS to a Ray that runs"
            ) from error
        raise
    finally:
        del os.environ["RAY_GCS_SERVER_PORT"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_LOCALHOST, 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def signal_handlers_kept() -> Iterator[None]:
    """Put the handlers of SIGINT and SIGTERM back after the block.

    Ray leaves its own behind: `ray.init()` one that exits with code 15 and no word, Ray Train one that exits with 0, Tune one that ignores the first
    Ctrl-C.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def _standard_error_kept(verbose: bool) -> Iterator[None]:
    """Hold back what Ray's C++ core writes to standard error while it starts; told after all if the start fails, or with `verbose`."""
    if verbose:
        yield
        return
    sys.stderr.flush()
    original = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(original, held.read())
            raise
        finally:
            os.dup2(original, 2)
            os.close(original)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def capacity() -> dict[str, float]:
    """Return the CPUs and GPUs that the cluster has, or can grow to where it scales by itself; infinite where only nodes to come know."""
    return _largest(growth())


def _largest(more: Growth | None) -> dict[str, float]:
    now = ray.cluster_resources()
    return {kind: max(now.get(kind, 0.0), more.limit[kind] if more else 0.0) for kind in KINDS}


def known_capacity() -> dict[str, float]:
    """Return the capacity without what is not known of nodes that have not joined yet."""
    now = ray.cluster_resources()
    return {kind: amount if math.isfinite(amount) else now.get(kind, 0.0) for kind, amount in capacity().items()}


def wants_gpus(use_gpu: bool | str, workers: int) -> bool:
    """Resolve `use_gpu`: as set, or for `auto` whether the cluster can give one GPU to each of `workers`.

    Nodes of which nobody knows what they have, since they have not joined, are not waited for with `auto`: they may have none.
    """
    return known_capacity()["GPU"] >= workers if use_gpu == "auto" else bool(use_gpu)


def check_capacity(need: Need, verb: str) -> None:
    """Refuse at once what could only wait for ever, and set how long Ray Train may wait for workers.

    Raises
    ------
    CapacityError
        More CPUs or GPUs than the cluster has and can add.
    """
    more = growth()
    have = _largest(more)
    for kind, wanted in (("CPU", need.cpus), ("GPU", need.gpus)):
        if wanted > have[kind]:
            per_worker = need.cpus_per_worker if kind == "CPU" else need.gpus_per_worker
            beside = f" + {need.other_cpus:g} for driver and data" if kind == "CPU" else ""
            raise CapacityError(
                f"{verb} needs {wanted:g} {kind}s ({need.workers} workers x {per_worker:g}{beside}); "
                f"the cluster has {have[kind]:g} and cannot add more"
            )
    _check_places(need, more, verb)
    start_timeout_s = _START_TIMEOUT_S if more is None else _AUTOSCALED_START_TIMEOUT_S
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(start_timeout_s))


def _check_places(need: Need, more: Growth | None, verb: str) -> None:
    """Each worker must fit one node, however much the nodes have together."""
    there = sum(places_on(node["Resources"], need.cpus_per_worker, need.gpus_per_worker) for node in ray.nodes() if node["Alive"])
    places = max(there, more.places(need.cpus_per_worker, need.gpus_per_worker) if more else 0)
    if places < need.workers:
        size = resources_text(need.cpus_per_worker, need.gpus_per_worker)
        how_many = f"only {places:g} of {need.workers} workers" if places else "no worker"
        raise CapacityError(f"{verb}: {how_many} of {size} each would have room, since each must fit one node")


def resources_text(cpus: float, gpus: float) -> str:
    """Return resources in words: "1 GPU and 2 CPUs"."""
    kinds = [f"{amount:g} {kind}{'' if amount == 1 else 's'}" for amount, kind in ((gpus, "GPU"), (cpus, "CPU")) if amount]
    return " and ".join(kinds)
