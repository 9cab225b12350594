from types import SimpleNamespace
from typing import Any

import pytest

from ray_jobs.failures import training_error
from sentinode.errors import SentinodeError, StorageError, TrainingError
from sentinode.locations import locate

RUN = locate("/runs/run7")


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


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands for the callback's `time`; sleeping makes it later."""
    now = SimpleNamespace(seconds=100.0)
    now.monotonic = lambda: now.seconds
    now.sleep = lambda seconds: setattr(now, "seconds", now.seconds + seconds)
    monkeypatch.setattr("ray_jobs.train_callback.time", now)
    return now


def test_waiting_for_room_is_told_once_and_by_then_nobody_is_left_who_hears_a_wish(clock: SimpleNamespace) -> None:
    from ray.train import WorkerGroupError
    from ray.train.v2._internal.execution.controller.state import RestartingState, RunningState, SchedulingState

    from ray_jobs.train_callback import TellOfWaiting

    log = _Log()
    ended = []
    log.workers_ended = SimpleNamespace(remote=lambda: ended.append(clock.seconds))
    callback = TellOfWaiting(log, "2 workers with 1 CPU each")
    running, failed, found = RunningState(), RestartingState(WorkerGroupError("gone", {})), SchedulingState(SimpleNamespace())
    clock.seconds += 5000
    for before, now in ((found, running), (running, RunningState()), (running, failed), (failed, failed), (failed, found), (found, running)):
        callback.after_controller_state_update(before, now)
    assert ended == [5100.0]
    assert log.records == []
    callback.after_controller_state_update(running, failed)
    for _ in range(100):
        callback.after_controller_state_update(failed, failed)
    assert log.records == [{"kind": "waiting", "text": "waiting for room: 2 workers with 1 CPU each"}]
    # It does not ask without a pause.
    assert clock.seconds > 5140
    callback.after_controller_state_update(failed, running)
    callback.after_controller_state_update(running, failed)
    assert len(ended) == 3
    clock.seconds += 60
    callback.after_controller_state_update(failed, failed)
    assert len(log.records) == 2


def test_waiting_for_room_to_begin_is_told_too(clock: SimpleNamespace) -> None:
    from ray.train.v2._internal.execution.controller.state import InitializingState

    from ray_jobs.train_callback import TellOfWaiting

    log = _Log()
    callback, state = TellOfWaiting(log, "1 worker with 1 GPU and 2 CPUs each"), InitializingState()
    for _ in range(100):
        callback.after_controller_state_update(state, state)
    assert [record["text"] for record in log.records] == ["waiting for room: 1 worker with 1 GPU and 2 CPUs each"]


@pytest.mark.parametrize(("failures", "told"), [(1, ["1 of 2"]), (3, ["1 of 2", "2 of 2"])])
def test_failures_are_told_as_long_as_they_are_repaired(failures: int, told: list[str]) -> None:
    from ray_jobs.train_callback import TellDriver

    log = _Log()
    callback = TellDriver(log, max_failures=2)
    for _ in range(failures):
        callback.after_exception(None, {1: SentinodeError("gone")})
    assert [record["text"] for record in log.records] == [f"a worker failed, {count} that are repaired: gone" for count in told]
