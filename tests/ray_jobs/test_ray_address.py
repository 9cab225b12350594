"""What is said of an address where no Ray of ours answers: at once, and in one line."""

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
import ray
from ray.core.generated.gcs_service_pb2 import CheckAliveReply
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceServicer, add_NodeInfoGcsServiceServicer_to_server

from ray_jobs import ray_address
from ray_jobs.ray_address import check_ray_address
from sentinode.errors import UsageError
from tests.strangers import answering_with


@contextmanager
def head_that_says(version: str = ray.__version__, refuses: bool = False) -> Iterator[str]:
    """A server that speaks Ray's protocol as far as it is asked here."""

    class Head(NodeInfoGcsServiceServicer):  # type: ignore[misc]
        def CheckAlive(self, request: Any, context: Any) -> Any:
            if refuses:
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
            return CheckAliveReply(ray_version=version)

    server = grpc.server(ThreadPoolExecutor(1))
    add_NodeInfoGcsServiceServicer_to_server(Head(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def test_a_ray_of_our_version_that_lets_us_in_passes() -> None:
    with head_that_says() as address:
        check_ray_address(address)


def test_another_version_and_another_token_are_told_apart() -> None:
    with head_that_says("2.50.1") as address, pytest.raises(UsageError, match=f"runs Ray 2.50.1, this is Ray {ray.__version__}"):
        check_ray_address(address)
    with head_that_says(refuses=True) as address, pytest.raises(UsageError, match="refused without its token; set RAY_AUTH_MODE=token"):
        check_ray_address(address)


def test_what_is_no_ray_is_told_by_what_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()
    monkeypatch.setattr(ray_address, "_ANSWER_TIMEOUT_S", 2.0)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        with pytest.raises(UsageError, match=r"no Ray cluster can be reached there \(Connection refused\)"):
            check_ray_address(f"127.0.0.1:{probe.getsockname()[1]}")
    with answering_with(200, b"<html>") as url, pytest.raises(UsageError, match="what listens there is something else"):
        check_ray_address(url.removeprefix("http://"))
    # The kernel takes the connection, and nobody ever speaks.
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(UsageError, match=r"\(no answer\)"):
        check_ray_address(f"127.0.0.1:{silent.getsockname()[1]}")
    with pytest.raises(UsageError, match=r"RAY_ADDRESS=no-such-host\.invalid:6379: no Ray cluster can be reached there") as caught:
        check_ray_address("no-such-host.invalid:6379")
    assert "\n" not in str(caught.value)
    assert time.monotonic() - began < 20
