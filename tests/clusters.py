"""Clusters of several nodes on this machine, for tests: the nodes are Ray's own, each with its daemons and its workers."""

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import psutil
import pytest


@contextmanager
def cluster_of(
    nodes: int, cpus: int = 1, head_cpus: int = 1, temporary: Path | None = None, head_resources: dict[str, float] | None = None
) -> Iterator[Any]:
    """A cluster of a head and some more nodes with `cpus` each; with `temporary` each has a folder for temporary files of its own below it."""
    import ray.util
    from ray.cluster_utils import Cluster

    with socket.socket() as one, socket.socket() as other:
        for probe in (one, other):
            probe.bind(("127.0.0.1", 0))
        port, dashboard_port = one.getsockname()[1], other.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        # Its processes must not take another Ray of this machine for theirs.
        patch.setenv("RAY_ADDRESS", f"{ray.util.get_node_ip_address()}:{port}")
        dashboard = {"include_dashboard": True, "dashboard_port": dashboard_port}
        head = {"num_cpus": head_cpus, "resources": head_resources or {}, "gcs_server_port": port, **dashboard}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            for _ in range(nodes):
                add_node(cluster, cpus, temporary)
            yield cluster
        finally:
            cluster.shutdown()


def add_node(cluster: Any, cpus: int, temporary: Path | None = None) -> Any:
    """Add a node to a cluster, with a folder for temporary files of its own below `temporary`."""
    if temporary is None:
        return cluster.add_node(num_cpus=cpus)
    folder = Path(mkdtemp(prefix="node-", dir=temporary))
    return cluster.add_node(num_cpus=cpus, env_vars={"TMPDIR": str(folder)})


def node_that_runs(cluster: Any, what: str) -> Any:
    """A node, not the head, that has a process whose command line holds the pattern `what`."""
    for node in cluster.worker_nodes:
        (raylet,) = node.all_processes["raylet"]
        with suppress(psutil.NoSuchProcess):
            if any(re.search(what, " ".join(process.cmdline())) for process in psutil.Process(raylet.process.pid).children(recursive=True)):
                return node
    raise AssertionError(f"no {what} on a node beside the head")
