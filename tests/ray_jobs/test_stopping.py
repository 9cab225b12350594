"""Without Ray: the actor and Ray's waiting are stood for by what they answer."""

import queue
import signal
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from ray_jobs import stopping
from ray_jobs.stopping import StopOnSignal, Wishes
from sentinode.training import Wish


class _Calls:
    """An actor whose methods note that they were called."""

    def __init__(self, *methods: str) -> None:
        self.called: list[str] = []
        self.aborted = threading.Event()
        for method in methods:
            setattr(self, method, SimpleNamespace(remote=lambda method=method: self._call(method)))

    def _call(self, method: str) -> str:
        self.called.append(method)
        if method == "abort":
            self.aborted.set()
        return method


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `ray.get` answers for each call; an exception is raised."""
    known: dict[str, Any] = {"request_stop": True}

    def get(ref: str, timeout: float | None = None) -> Any:
        if isinstance(known[ref], Exception):
            raise known[ref]
        return known[ref]

    monkeypatch.setattr("ray.get", get)
    monkeypatch.setattr("ray.wait", lambda refs, timeout: (refs, []) if known.get("asked") else ([], refs))
    return known


@pytest.fixture
def make(answers: dict[str, Any]) -> Iterator[Callable[[], tuple[StopOnSignal, _Calls, _Calls]]]:
    before = signal.getsignal(signal.SIGINT)
    made: list[StopOnSignal] = []

    def build() -> tuple[StopOnSignal, _Calls, _Calls]:
        log, controller = _Calls("request_stop"), _Calls("abort")
        stop = StopOnSignal(log)
        stop.install(controller)
        made.append(stop)
        return stop, log, controller

    yield build
    for stop in made:
        stop.over()
    signal.signal(signal.SIGINT, before)


Make = Callable[[], tuple[StopOnSignal, _Calls, _Calls]]


def test_the_first_signal_asks_for_a_checkpoint_and_aborts_nothing(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    stop, log, controller = make()
    signal.raise_signal(signal.SIGINT)
    assert stop.requested
    assert not controller.aborted.wait(0.2)
    assert log.called == ["request_stop"]
    assert "a checkpoint is made first" in capsys.readouterr().out


def test_the_second_signal_stops_at_once(make: Make) -> None:
    _, _, controller = make()
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)
    assert controller.aborted.wait(10)


@pytest.mark.parametrize("answer", [False, ray.exceptions.GetTimeoutError("busy")])
def test_where_no_worker_trains_yet_nothing_is_waited_for(answer: Any, make: Make, answers: dict[str, Any]) -> None:
    answers["request_stop"] = answer
    stop, _, controller = make()
    signal.raise_signal(signal.SIGINT)
    assert controller.aborted.wait(10)
    stop.over()


def test_workers_that_do_not_stop_are_not_waited_for_for_ever(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "_CHECKPOINT_WAIT_S", 0.05)
    stop, _, controller = make()
    signal.raise_signal(signal.SIGINT)
    assert controller.aborted.wait(10)
    stop.over()


def test_a_controller_that_does_not_answer_is_killed(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    killed: queue.Queue[Any] = queue.Queue()
    monkeypatch.setattr("ray.kill", killed.put)
    monkeypatch.setattr(stopping, "_CHECKPOINT_WAIT_S", 0.05)
    monkeypatch.setattr(stopping, "_ABORT_WAIT_S", 0.05)
    _, _, controller = make()
    signal.raise_signal(signal.SIGINT)
    assert killed.get(timeout=10) is controller


def test_rank_0_hears_the_wish_to_stop_and_the_others_leave_it_to_it(answers: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "_ASK_EVERY_S", 0.0)
    log = _Calls("stop_requested")
    wishes = [Wishes(log, rank, None) for rank in range(2)]
    assert log.called == ["stop_requested"]
    assert [wish() for wish in wishes] == [Wish.GO_ON, Wish.GO_ON]
    answers |= {"asked": True, "stop_requested": True}
    assert [wish() for wish in wishes] == [Wish.STOP, Wish.GO_ON]


def test_a_log_that_is_gone_stops_nobody(answers: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "_ASK_EVERY_S", 0.0)
    answers |= {"asked": True, "stop_requested": ray.exceptions.RayActorError()}
    wishes = Wishes(_Calls("stop_requested"), 0, None)
    assert [wishes() for _ in range(3)] == [Wish.GO_ON] * 3


def test_a_checkpoint_is_wished_when_the_last_one_is_long_ago(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    wishes = Wishes(None, 0, 60.0)
    now = 159.0
    assert wishes() is Wish.GO_ON
    now = 160.0
    assert wishes() is Wish.CHECKPOINT
    wishes.saved()
    assert wishes() is Wish.GO_ON
    assert Wishes(None, 0, None)() is Wish.GO_ON


def test_ray_lets_us_take_the_place_of_its_handler() -> None:
    from ray.train.torch import TorchTrainer

    assert callable(TorchTrainer._register_sigint_handler)
