"""What the terminal shows of a sweep while it runs."""

from collections.abc import Callable

from ray_jobs.sweep.table import describe_point
from ray_jobs.verb import duration_text
from sentinode.search.journal import Journal, TrialRecord, rank


class SweepProgress:
    """Tells of each epoch of each trial, and how far the sweep is.

    Parameters
    ----------
    metric : str
    journal : Journal
    total : int
        Trials of the whole sweep, repeats too.
    epochs : int
        Of a trial that is not stopped, over all its folds.
    limit : int
        Trials that may run at a time.
    say : callable
        Shows one line.
    estimates : bool
        Whether to tell how long the rest may take.
    """

    def __init__(
        self, metric: str, journal: Journal, total: int, epochs: int, limit: int, say: Callable[[str], None], *, estimates: bool = True
    ) -> None:
        self._metric, self._journal, self._total, self._epochs, self._limit, self._say = metric, journal, total, epochs, limit, say
        self._estimates = estimates

    def note(self, text: str) -> None:
        """Show a line."""
        self._say(text)

    def begun(self, trial: TrialRecord, running: int) -> None:
        """Show that a trial begins, or goes on."""
        what = f"goes on after epoch {len(trial.epochs)}" if trial.epochs else "begins"
        if trial.status != "running":
            what = "makes its last checkpoint again, which was cut off"
        why = {"repeat": f", seed {trial.seed} for trial {trial.repeats or 0:05d}"}.get(trial.kind, "")
        self._say(f"trial {trial.name} {what}: {describe_point(trial.point)}{why}")

    def epoch(self, trial: TrialRecord, running: int) -> None:
        """Show the epoch that a trial told of last."""
        record = trial.epochs[-1]
        value = record.get(self._metric)
        fold = "" if record["fold"] is None else f"fold {record['fold']}, "
        best = next(iter(rank([other for other in self._journal.trials if other.kind == "search" and other.status != "failed"], self._metric)), None)
        best_value = None if best is None else best.value(self._metric)
        mean = trial.value(self._metric)
        mean_text = f" (mean of {len(trial.folds)} folds {mean:.4f})" if fold and mean is not None and len(trial.folds) > 1 else ""
        figure = "-" if value is None else f"{value:.4f}"
        standing = "" if best is None or best_value is None else f", best so far {best_value:.4f}" + ("" if best is trial else f" by {best.name}")
        self._say(f"trial {trial.name} {fold}epoch {record['epoch'] + 1}: {self._metric} {figure}{mean_text}{standing}  [{self.standing(running)}]")

    def waits(self, trial: TrialRecord, running: int) -> None:
        """Show that a trial waits for others."""
        self._say(f"trial {trial.name} waits after epoch {len(trial.epochs)} until the others have come as far  [{self.standing(running)}]")

    def ended(self, trial: TrialRecord, running: int) -> None:
        """Show how a trial ended where that is not its planned end."""
        if trial.status == "failed":
            self._say(f"trial {trial.name} failed, the sweep goes on: {trial.error}  [{self.standing(running)}]")
        elif trial.status == "stopped":
            self._say(f"trial {trial.name} stopped early, after epoch {len(trial.epochs)} of {self._epochs}  [{self.standing(running)}]")

    def standing(self, running: int) -> str:
        """Return "2 running, 5 of 16 done, 3 of them stopped early, about 12 min left"."""
        ended = [trial for trial in self._journal.trials if trial.status != "running"]
        parts = [f"{running} running", f"{len(ended)} of {self._total} done"]
        for status, words in (("stopped", "stopped early"), ("failed", "failed")):
            if count := sum(trial.status == status for trial in ended):
                parts.append(f"{count} of them {words}")
        left_s = self._seconds_left(ended)
        return ", ".join(parts if left_s is None else [*parts, f"about {duration_text(left_s)} left"])

    def _seconds_left(self, ended: list[TrialRecord]) -> float | None:
        """Estimate from what trials have taken so far, those that were stopped too."""
        if not self._estimates:
            return None
        running = [trial for trial in self._journal.trials if trial.status == "running" and trial.epochs]
        if ended:
            each = sum(_taken(trial) for trial in ended) / len(ended)
        elif running:
            each = sum(_taken(trial) * self._epochs / len(trial.epochs) for trial in running) / len(running)
        else:
            return None
        begun = len(self._journal.trials)
        left = (self._total - begun) * each + sum(max(0.0, each - _taken(trial)) for trial in running)
        return float(left / self._limit)


def _taken(trial: TrialRecord) -> float:
    """Seconds of training, validation and preparation."""
    return trial.train_seconds + float(sum(start["seconds"] for start in trial.starts))
