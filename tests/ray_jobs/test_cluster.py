import socket
import time

import pytest

from ray_jobs.cluster import connected
from sentinode.errors import UsageError


def test_an_address_where_nothing_listens_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    started = time.monotonic()
    with pytest.raises(UsageError, match=rf"RAY_ADDRESS=127\.0\.0\.1:{port}: no Ray cluster can be reached there"), connected(1):
        pass
    assert time.monotonic() - started < 30


def test_what_autoscalers_may_add_is_asked_where_ray_keeps_it() -> None:
    from ray._private.state import state

    assert callable(state.get_max_resources_from_cluster_config)
