"""A sweep's progress in the terminal, and whether it came to its end."""

from collections.abc import Callable, Mapping
from typing import Any

from ray.tune import Callback

from ray_jobs.sweep_report import describe_point


class SweepProgress(Callback):  # type: ignore[misc]
    """Tells of each epoch of each trial.

    Attributes
    ----------
    unfinished : int
        Trials that had neither ended nor failed when the sweep did; 0 unless it was interrupted.
    """

    def __init__(self, metric: str, total: int, say: Callable[[str], None]) -> None:
        self.unfinished = 0
        self._metric = metric
        self._total = total
        self._say = say
        self._best: float | None = None

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Mapping[str, Any], **info: Any) -> None:
        """Show one epoch."""
        value = result.get(self._metric)
        if value is None:
            return
        better = self._best is None or (value < self._best if self._metric == "val_loss" else value > self._best)
        if better:
            self._best = value
        done = sum(other.is_finished() for other in trials)
        self._say(
            f"trial {trial.trial_id} ({describe_point(trial.config)}) epoch {result['epoch'] + 1}: "
            f"{self._metric} {value:.4f}{'  best so far' if better else ''}  [{done} of {self._total} trials done]"
        )

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Show a failure; the sweep goes on."""
        self._say(f"trial {trial.trial_id} failed; the sweep goes on")

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """Note what is left."""
        self.unfinished = sum(not trial.is_finished() for trial in trials)
