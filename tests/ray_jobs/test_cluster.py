import os
import socket
import time

import pytest
import ray

from ray_jobs.cluster import connected, reserved, resources_text
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


@pytest.mark.ray
def test_what_waits_for_resources_says_so_and_goes_on_when_they_are_free(ray_session: None, free_cpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    everything = placement_group([{"CPU": ray.cluster_resources()["CPU"]}])
    assert everything.wait(60)
    told: list[str] = []

    def say(text: str) -> None:
        told.append(text)
        remove_placement_group(everything)

    monkeypatch.setattr("ray_jobs.cluster.say", say)
    monkeypatch.setattr("ray_jobs.cluster._SILENT_WAIT_S", 0.0)
    with reserved(2, 0, "make the bundle") as place:
        task = ray.remote(lambda: "done").options(num_cpus=2, scheduling_strategy=place)
        assert ray.get(task.remote(), timeout=60) == "done"
    assert told == ["waiting for 2 CPUs to make the bundle; the cluster's are taken"]


def test_a_ray_that_does_not_start_in_time_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        raise Exception("The current node timed out during startup. This could happen because some of the raylet failed to startup")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(SentinodeError, match="Ray did not start within its 30 s; is the machine busy"), connected(1):
        pytest.fail("connected to nothing")
    assert "RAY_ADDRESS" not in os.environ
