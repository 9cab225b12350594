"""What nodes the cluster's autoscaler may still add.

Ray 2.60 has a place for that in its state, which nothing but some hosted clusters fills. So the autoscaler's own file is read, which its process on
the head names on its command line; drivers of jobs run on the head. Where it cannot be read from here, or the autoscaler runs elsewhere (in another
container, say), whoever runs the cluster says it in an environment variable.
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import yaml

from sentinode.errors import ConfigError

LIMIT_VARIABLE = "SENTINODE_CLUSTER_MAX"
"""Environment variable: the most CPUs and GPUs that the cluster has once it has grown, like `CPU=64 GPU=8`."""

KINDS = ("CPU", "GPU")


@dataclass(frozen=True)
class NodeType:
    """A kind of nodes that an autoscaler adds.

    Attributes
    ----------
    resources : dict of str to float, or None
        Of one node; None where they are known only once it has joined.
    most : int
        So many nodes of the kind may be there at a time.
    """

    resources: dict[str, float] | None
    most: int


@dataclass(frozen=True)
class Growth:
    """How far the cluster may grow.

    Attributes
    ----------
    limit : dict of str to float
        "CPU" and "GPU" -> the most that the cluster can have; infinite where that is not known.
    places : callable
        Called as places(cpus, gpus); returns how many workers with these resources, each on one node, may have room; infinite where nobody knows.
    """

    limit: dict[str, float]
    places: Callable[[float, float], float]


def places_on(node: Mapping[str, float], cpus: float, gpus: float) -> int:
    """Return how many workers with these resources a node has room for."""
    wanted = [(node.get("CPU", 0.0), cpus), (node.get("GPU", 0.0), gpus)]
    # Shares of a GPU do not add up exactly.
    return int(min((have / each + 1e-6 for have, each in wanted if each), default=0))


def growth() -> Growth | None:
    """Return how far the cluster may grow, None where it does not or that cannot be known. Ray must be initialised.

    Raises
    ------
    ConfigError
        The environment variable has another form.
    """
    if text := os.environ.get(LIMIT_VARIABLE):
        return Growth(_limit_from(text), lambda cpus, gpus: math.inf)
    from ray._private.state import state

    if told := state.get_max_resources_from_cluster_config():
        return Growth({kind: float(told.get(kind, 0.0)) for kind in KINDS}, lambda cpus, gpus: math.inf)
    config = _autoscaler_config(ray.get_runtime_context().gcs_address)
    if config is None:
        return None
    most, types = node_types(config)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    head: dict[str, float] = next((node["Resources"] for node in nodes if "node:__internal_head__" in node["Resources"]), {})
    unknown = any(each.resources is None for each in types) and len(nodes) - 1 < most
    known = [(each.resources, each.most) for each in types if each.resources is not None]
    if unknown:
        return Growth(dict.fromkeys(KINDS, math.inf), lambda cpus, gpus: math.inf)
    if not known:
        return None  # all are there, or none will come

    def places(cpus: float, gpus: float) -> float:
        return places_on(head, cpus, gpus) + _largest_sum([(places_on(resources, cpus, gpus), count) for resources, count in known], most)

    # The head counts as one of the nodes there are, not as one that may be added.
    limit = {kind: head.get(kind, 0.0) + _largest_sum([(resources.get(kind, 0.0), count) for resources, count in known], most) for kind in KINDS}
    return Growth(limit, places)


def _limit_from(text: str) -> dict[str, float]:
    try:
        given = {name: float(amount) for name, _, amount in (one.partition("=") for one in text.split())}
    except ValueError:
        given = {}
    if not given or not given.keys() <= set(KINDS) or not all(math.isfinite(amount) and amount >= 0 for amount in given.values()):
        raise ConfigError(f"{LIMIT_VARIABLE}={text}: expected amounts like CPU=64 GPU=8")
    return {kind: given.get(kind, 0.0) for kind in KINDS}


def node_types(config: dict[str, Any]) -> tuple[int, list[NodeType]]:
    """Return the most nodes beside the head, and their kinds, by an autoscaler's file as `ray up` writes it to the head.

    Kinds whose resources are not in the file count where Ray starts them by itself: for demand it starts none of which it does not know what it has.
    """
    most = int(config.get("max_workers") or 0)
    head = config.get("head_node_type")
    types = []
    for name, content in (config.get("available_node_types") or {}).items():
        resources = content.get("resources") or {}
        known = {kind: float(resources.get(kind, 0.0)) for kind in KINDS} if "CPU" in resources else None
        of_type = int(content.get("max_workers", 0 if name == head else most))
        if known is None and (config.get("provider") or {}).get("type") != "local":
            of_type = min(of_type, int(content.get("min_workers", 0)))
        if of_type > 0:
            types.append(NodeType(known, min(most, of_type)))
    return most, types


def _largest_sum(amounts: Iterable[tuple[float, int]], most: int) -> float:
    """Return the largest sum over at most `most` nodes, of (amount per node, so many nodes of the kind)."""
    total, left = 0.0, most
    for amount, count in sorted(amounts, reverse=True):
        total += amount * min(count, left)
        left -= min(count, left)
    return total


def _autoscaler_config(gcs_address: str) -> dict[str, Any] | None:
    """Read the file of the autoscaler of the cluster at an address; None where it runs on another machine, or without a file."""
    import psutil  # type: ignore[import-untyped]  # comes with Ray

    host, _, port = gcs_address.rpartition(":")
    here = {address.address for addresses in psutil.net_if_addrs().values() for address in addresses}
    if host not in here:
        return None
    for process in psutil.process_iter(["cmdline", "cwd"]):
        path = _path_on(process.info["cmdline"] or (), here, port)
        if path is not None:
            try:
                config = yaml.safe_load(Path(process.info["cwd"] or "", path).read_text(encoding="utf-8"))
            except (OSError, ValueError, yaml.YAMLError):
                continue  # of another container, whose head has the same address and port
            if isinstance(config, dict):
                return config
    return None


def _path_on(command_line: Iterable[str], here: set[str], port: str) -> str | None:
    """Return the file that a command line names, if it is that of an autoscaler whose head listens at `port` of this machine."""
    arguments = dict(one.removeprefix("--").split("=", 1) for one in command_line if one.startswith("--") and "=" in one)
    host, _, its_port = arguments.get("gcs-address", "").rpartition(":")
    # By whichever of this machine's addresses either of them calls the head.
    return os.path.expanduser(arguments["autoscaling-config"]) if "autoscaling-config" in arguments and its_port == port and host in here else None
