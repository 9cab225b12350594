import pytest

from ray_jobs.trainer import checkpoint_interval_s, room_text
from sentinode.config import TrainConfig


@pytest.mark.parametrize(
    ("workers", "set_to", "expected"),
    [(2, 600, 600), (2, None, None), ((1, 4), 600, 60), ((1, 4), 5, 5), ((1, 4), None, None)],
)
def test_workers_that_come_and_go_lose_a_minute_s_work_at_most(workers: int | tuple[int, int], set_to: float | None, expected: float | None) -> None:
    assert checkpoint_interval_s(TrainConfig(workers=workers, checkpoint_interval_s=set_to)) == expected


def test_the_room_that_a_run_needs_is_told_in_words() -> None:
    assert room_text(TrainConfig(workers=(2, 4), cpus_per_worker=3), use_gpu=True) == "2 workers with 1 GPU and 3 CPUs each"
    assert room_text(TrainConfig(), use_gpu=False) == "1 worker with 1 CPU each"
