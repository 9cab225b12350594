"""What nodes the cluster's autoscaler may still add.

Ray 2.60 has a place for that in its state, which nothing but some hosted clusters fills. So the autoscaler's own file is read, which its process on
the head names on its command line; drivers of jobs run on the head. Where it cannot be read from here, or the autoscaler runs elsewhere (in another
container, say), whoever runs the cluster says it in an environment variable.
"""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
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
    types : list of NodeType
        Nodes that may be added; empty where only the limit is known.
    """

    limit: dict[str, float]
    types: list[NodeType]

    def fits_one_node(self, cpus: float, gpus: float) -> bool:
        """Tell whether a node that may be added has room for these."""
        return not self.types or any(
            kind.resources is None or (kind.resources.get("CPU", 0) >= cpus and kind.resources.get("GPU", 0) >= gpus) for kind in self.types
        )


def growth() -> Growth | None:
    """Return how far the cluster may grow, None where it does not or that cannot be known. Ray must be initialised.

    Raises
    ------
    ConfigError
        The environment variable has another form.
    """
    if text := os.environ.get(LIMIT_VARIABLE):
        return Growth(_limit_from(text), [])
    from ray._private.state import state

    if told := state.get_max_resources_from_cluster_config():
        return Growth({kind: float(told.get(kind, 0.0)) for kind in KINDS}, [])
    config = _autoscaler_config(ray.get_runtime_context().gcs_address)
    if config is None:
        return None
    most, types = node_types(config)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    head: dict[str, float] = next((node["Resources"] for node in nodes if "node:__internal_head__" in node["Resources"]), {})
    # The head counts as one of the nodes there are, not as one that may be added.
    unknown = any(kind.resources is None for kind in types) and len(nodes) - 1 < most
    limit = {kind: math.inf if unknown else head.get(kind, 0.0) + _most_of(kind, types, most) for kind in KINDS}
    return Growth(limit, types) if types else None


def _limit_from(text: str) -> dict[str, float]:
    try:
        given = {name: float(amount) for name, _, amount in (one.partition("=") for one in text.split())}
    except ValueError:
        given = {}
    if not given or not given.keys() <= set(KINDS):
        raise ConfigError(f"{LIMIT_VARIABLE}={text}: expected amounts like CPU=64 GPU=8")
    return {kind: given.get(kind, 0.0) for kind in KINDS}


def node_types(config: dict[str, Any]) -> tuple[int, list[NodeType]]:
    """Return the most nodes beside the head, and their kinds, by an autoscaler's file (defaults as in `ray.autoscaler._private.util`)."""
    most = int(config.get("max_workers") or 0)
    head = config.get("head_node_type")
    types = []
    for name, content in (config.get("available_node_types") or {}).items():
        of_type = min(most, int(content.get("max_workers", 0 if name == head else most)))
        resources = content.get("resources") or {}
        if of_type > 0:
            types.append(NodeType({kind: float(amount) for kind, amount in resources.items()} if "CPU" in resources else None, of_type))
    return most, types


def _most_of(kind: str, types: list[NodeType], most: int) -> float:
    """Return the most CPUs, or GPUs, that `most` nodes of these types can have together."""
    total, left = 0.0, most
    for amount, count in sorted(((each.resources or {}).get(kind, 0.0), each.most) for each in types)[::-1]:
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
    for process in psutil.process_iter(["cmdline"]):
        path = _path_on(process.info["cmdline"] or (), here, port)
        if path is not None:
            try:
                with open(path, encoding="utf-8") as file:
                    config = yaml.safe_load(file)
            except (OSError, ValueError, yaml.YAMLError):
                return None
            return config if isinstance(config, dict) else None
    return None


def _path_on(command_line: Iterable[str], here: set[str], port: str) -> str | None:
    """Return the file that a command line names, if it is that of an autoscaler whose head listens at `port` of this machine."""
    arguments = dict(one.removeprefix("--").split("=", 1) for one in command_line if one.startswith("--") and "=" in one)
    host, _, its_port = arguments.get("gcs-address", "").rpartition(":")
    # By whichever of this machine's addresses either of them calls the head.
    return os.path.expanduser(arguments["autoscaling-config"]) if "autoscaling-config" in arguments and its_port == port and host in here else None
