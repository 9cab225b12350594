"""Tune's trainable without Tune: what one trial leaves to the next in the same process."""

from typing import Any

import pytest
import torch

from ray_jobs.checkpoints import CheckpointError
from ray_jobs.sweep.trial import Job, Trial
from sentinode.errors import TrainingError


class Training:
    """A training whose next epoch, or end, raises."""

    def __init__(self, epoch: Exception | None = None, end: Exception | None = None) -> None:
        self._epoch, self._end = epoch, end
        self.is_over = True

    def next_epoch(self) -> dict[str, Any]:
        if self._epoch is not None:
            raise self._epoch
        return {"epoch": 0}

    def close(self) -> None:
        if self._end is not None:
            raise self._end


class Sharing:
    rows = {None: None}


def trial(training: Training, monkeypatch: pytest.MonkeyPatch, number: int = 0) -> Trial:
    made = Trial.__new__(Trial)
    monkeypatch.setattr(Trial, "_open", lambda self, fold: training)
    made.setup(Job(number, {}, 42, {}).to_config(), Sharing())  # type: ignore[arg-type]
    return made


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (TrainingError("the loss is not finite"), {"done": True, "failed": "the loss is not finite"}),
        (ValueError("not ours"), {"done": True, "failed": "ValueError: not ours"}),
        (CheckpointError("no room"), {"done": True, "broken": "no room"}),
    ],
)
def test_what_goes_wrong_with_a_training_is_told_not_raised(error: Exception, told: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert trial(Training(epoch=error), monkeypatch).step() == told


def test_after_an_error_of_the_device_the_process_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(torch.AcceleratorError, match="illegal"):
        trial(Training(epoch=torch.AcceleratorError("an illegal memory access was encountered")), monkeypatch).step()


def test_a_checkpoint_that_an_ended_trial_could_not_write_is_not_the_failure_of_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(end=CheckpointError("no room"))
    process = trial(training, monkeypatch)
    assert process.step()["last"]
    assert process.reset_config(Job(1, {}, 42, {}).to_config())
    assert process.step() == {"done": True, "broken": "no room"}


def test_a_process_that_cannot_let_go_of_an_ended_trial_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    process = trial(Training(end=RuntimeError("the stream is gone")), monkeypatch)
    process.step()
    assert process.reset_config(Job(1, {}, 42, {}).to_config())
    with pytest.raises(RuntimeError, match="the stream is gone"):
        process.step()
