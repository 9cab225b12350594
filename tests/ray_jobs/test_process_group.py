"""At which address the workers of one training listen for each other; that two machines then find each other shows tests/test_ray_up.py."""

import os
import socket

import psutil
import pytest

from ray_jobs.process_group import use_node_address


@pytest.fixture(autouse=True)
def environment_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")


def test_gloo_takes_the_interface_that_has_the_nodes_address(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, addresses in psutil.net_if_addrs().items():
        for each in addresses:
            if each.family == socket.AF_INET:
                monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
                monkeypatch.setattr("ray.util.get_node_ip_address", lambda address=each.address: address)
                use_node_address()
                assert os.environ["GLOO_SOCKET_IFNAME"] == name


def test_what_the_environment_says_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "chosen0")
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "127.0.0.1")
    use_node_address()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "chosen0"


def test_an_address_of_no_interface_leaves_gloo_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "192.0.2.255")
    use_node_address()
    assert "GLOO_SOCKET_IFNAME" not in os.environ
