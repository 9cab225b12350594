import os
import socket
import time
from pathlib import Path

import pytest
import ray

from ray_jobs.cluster import connected, resources_text
from sentinode.errors import SentinodeError, UsageError


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


@pytest.mark.parametrize(("cpus", "gpus", "text"), [(1, 0, "1 CPU"), (2, 0, "2 CPUs"), (2, 1, "1 GPU and 2 CPUs")])
def test_resources_are_told_in_words(cpus: float, gpus: float, text: str) -> None:
    assert resources_text(cpus, gpus) == text


def test_a_ray_that_does_not_start_in_time_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        raise Exception("The current node timed out during startup. This could happen because some of the raylet failed to startup")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(SentinodeError, match="Ray did not start within its 30 s; is the machine busy"), connected(1):
        pytest.fail("connected to nothing")
    assert "RAY_ADDRESS" not in os.environ


def test_a_token_file_that_is_not_there_is_named_and_nothing_is_written_in_its_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(UsageError, match=f"^RAY_AUTH_TOKEN_PATH={tmp_path}/none: there is no such file$"), connected(1):
        pytest.fail("connected to nothing")


@pytest.mark.parametrize("before", [None, ""])
def test_a_ray_of_our_own_gets_a_token_of_its_own_also_where_the_variable_is_empty(monkeypatch: pytest.MonkeyPatch, before: str | None) -> None:
    seen: list[str] = []
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        # First set, so that what the code sets is forgotten after the test.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    if before is not None:
        monkeypatch.setenv("RAY_AUTH_TOKEN", before)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: seen.append(os.environ["RAY_AUTH_TOKEN"]))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with connected(1):
        pass
    assert len(seen[0]) == 64


def test_ray_client_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://127.0.0.1:10001")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(UsageError, match=r"^RAY_ADDRESS=ray://127\.0\.0\.1:10001: Ray Client cannot do what verbs need"), connected(1):
        pytest.fail("connected")
