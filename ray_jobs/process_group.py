"""How the workers of one training find each other: at the addresses of their nodes, whatever the names of their machines resolve to."""

import os
from dataclasses import dataclass
from typing import Any

from ray.train.torch import TorchConfig

_Backend: Any = TorchConfig().backend_cls


class _BackendAtNodeAddresses(_Backend):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(use_node_address)
        super().on_start(worker_group, backend_config)


@dataclass
class TorchConfigAtNodeAddresses(TorchConfig):  # type: ignore[misc]
    """Ray Train's own, where Gloo listens at the address by which Ray knows the node.

    Gloo itself takes the address that the machine's name has. On Debian and Ubuntu, installed the usual way, that is 127.0.1.1, which no other
    machine reaches. (NCCL avoids the loopback by itself.)
    """

    @property
    def backend_cls(self) -> Any:
        return _BackendAtNodeAddresses


def use_node_address() -> None:
    """Tell Gloo, in this process, which interface has the node's address; what the environment says already stays."""
    import psutil  # type: ignore[import-untyped]  # comes with Ray
    import ray.util

    address = ray.util.get_node_ip_address()
    for interface, addresses in psutil.net_if_addrs().items():
        if any(each.address == address for each in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
