import pytest

from ray_jobs.checkpoints import CheckpointError
from ray_jobs.train_loop import ended
from sentinode.errors import ManifestError, StorageError, TrainingError, UsageError
from sentinode.training import Interrupted


def _raising(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(Interrupted("x"), {"stopped": "x"}), (TrainingError("x"), {"failed": "x"}), (UsageError("x"), {"usage": "x"})],
)
def test_what_all_workers_raise_together_ends_the_run_in_order(error: Exception, outcome: dict[str, str]) -> None:
    assert ended(lambda: _raising(error)) == outcome


@pytest.mark.parametrize("kind", [CheckpointError, ManifestError, StorageError, RuntimeError])
def test_what_one_worker_meets_alone_fails_it_so_that_the_others_do_not_wait_for_it(kind: type[Exception]) -> None:
    with pytest.raises(kind):
        ended(lambda: _raising(kind("x")))


def test_training_that_comes_to_its_end_has_nothing_to_say() -> None:
    assert ended(lambda: None) is None
