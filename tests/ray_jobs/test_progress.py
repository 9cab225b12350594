import time

import pytest

from ray_jobs.progress import ProgressLog

pytestmark = pytest.mark.ray


def test_nobody_hears_a_wish_to_stop_once_the_workers_have_ended(ray_session: None) -> None:
    import ray

    log = ProgressLog.remote()  # type: ignore[attr-defined]
    asks = log.stop_requested.remote()
    # An asynchronous actor takes two calls in any order: the wish may come before the question.
    deadline = time.monotonic() + 30
    while not ray.get(log.request_stop.remote()):
        assert time.monotonic() < deadline
    assert ray.get(asks)
    ray.get(log.workers_ended.remote())
    assert not ray.get(log.request_stop.remote())
    # The wish itself holds: workers that start anew hear it at once.
    assert ray.get(log.stop_requested.remote())
    assert ray.get(log.request_stop.remote())
    ray.kill(log)
