from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ray_jobs.failures import training_error
from sentinode.errors import SentinodeError, StorageError, TrainingError

RUN = Path("/runs/run7")


def _raised_in_workers(**errors: Exception) -> Exception:
    """What Ray Train raises when the workers' functions have raised these."""
    from ray.train import WorkerGroupError
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

    wrapped = {int(rank[1:]): UserExceptionWithTraceback(error, f"Traceback …\n{error}") for rank, error in errors.items()}
    return WorkerGroupError("both failed", wrapped)


def test_an_error_of_our_own_comes_back_as_itself_whatever_it_did_to_the_other_workers() -> None:
    ours = StorageError("the store does not answer")
    assert training_error(_raised_in_workers(r0=RuntimeError("Connection closed by peer"), r1=ours), RUN) is ours


def test_any_other_error_is_one_line_that_names_the_run() -> None:
    error = training_error(_raised_in_workers(r0=RuntimeError("first line\nCUDA out of memory")), RUN)
    assert type(error) is TrainingError
    assert str(error) == "training failed: CUDA out of memory (checkpoints so far in /runs/run7; -v shows the traceback)"


def test_what_the_controller_could_not_do_is_told_as_well() -> None:
    from ray.train import ControllerError

    error = training_error(ControllerError(OSError(28, "No space left on device")), RUN)
    assert str(error).startswith("training failed: [Errno 28] No space left on device (checkpoints so far in /runs/run7")


class _Log:
    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.add = SimpleNamespace(remote=self.records.append)


def test_epochs_are_told_and_checkpoints_within_one_are_not() -> None:
    from ray_jobs.train_callback import TellDriver

    log = _Log()
    callback = TellDriver(log, max_failures=3)
    callback.after_report(None, [{"epoch": 0, "val_loss": 0.5}, {"epoch": 0}], None)
    callback.after_report(None, [{"number": 2, "epochs_done": 1, "improvement": 0}] * 2, None)
    assert log.records == [{"kind": "epoch", "epoch": 0, "val_loss": 0.5}]


@pytest.mark.parametrize(("failures", "told"), [(1, ["1 of 2"]), (3, ["1 of 2", "2 of 2"])])
def test_failures_are_told_as_long_as_they_are_repaired(failures: int, told: list[str]) -> None:
    from ray_jobs.train_callback import TellDriver

    log = _Log()
    callback = TellDriver(log, max_failures=2)
    for _ in range(failures):
        callback.after_exception(None, {1: SentinodeError("gone")})
    assert [record["text"] for record in log.records] == [f"a worker failed, {count} that are repaired: gone" for count in told]
