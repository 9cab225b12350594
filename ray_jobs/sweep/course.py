"""The course of a sweep: which trial is next, what is heard of those that run, when it is over. Tune only carries it out (`tune_search`).

Everything that decides is in the journal, so a course that begins with the journal of an interrupted one goes on where that was: the source of points
and the rule that stops trials are told again what happened, in the order in which it did.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ray_jobs.checkpoints import epochs_saved, is_settled, keep_weights_only
from ray_jobs.sweep.progress import SweepProgress
from ray_jobs.sweep.rule import Rule, Verdict
from ray_jobs.sweep.trackers import TrialTrackers
from ray_jobs.sweep.trial import Job, trial_folder
from sentinode.config import SweepConfig
from sentinode.errors import SentinodeError, StorageError
from sentinode.locations import Location
from sentinode.search.journal import Journal, TrialRecord, rank
from sentinode.search.point_sources import Outcome, PointSource

# How long the end of a sweep waits for checkpoints that trials have begun to write, before it has them made again.
_WRITE_S = 60.0
# How often it is looked for them, at most; and when nothing else is left to be done.
_LOOK_S, _LAST_LOOKS_S = 1.0, 0.05


class Course:
    """See the module.

    Parameters
    ----------
    config : SweepConfig
    folder : Location
        The sweep's.
    journal : Journal
    source : PointSource
        New; told here what the journal knows.
    limit : int
        Trials that may run at a time.
    epochs : int
        Of a trial that is not stopped, for the rule and for what is told.
    folds : list of int or None
    seed : int
        Of the trials of the search.
    progress : SweepProgress
    trackers : TrialTrackers

    Attributes
    ----------
    stopping : bool
        Set it to begin no other trial.
    broken : SentinodeError or None
        Why no trial could go on.
    """

    def __init__(
        self,
        config: SweepConfig,
        folder: Location,
        journal: Journal,
        source: PointSource,
        *,
        limit: int,
        epochs: int,
        folds: list[int] | None,
        seed: int,
        progress: SweepProgress,
        trackers: TrialTrackers,
    ) -> None:
        self.stopping = False
        self.broken: SentinodeError | None = None
        self._config, self._folder, self._journal, self._source = config, folder, journal, source
        self._limit, self._folds, self._seed = limit, folds, seed
        self._progress, self._trackers = progress, trackers
        self._rule = Rule(config, epochs if folds is None else len(folds))
        self._live: dict[int, float] = {}
        # Numbers of trials whose first epoch since they (last) began has not been heard of.
        self._starting: set[int] = set()
        self._settled: set[int] = set()
        # Numbers of trials of which the source was told how they did until they waited.
        self._told_waiting: set[int] = set()
        self._looked = self._over_since = float("-inf")
        self._replay()
        self.settle()
        # Ended, and killed before the last checkpoint was on the disk: it is made again, since the trial may be the best.
        self._made_again = {trial.number for trial in self._unsettled()}
        self._unfinished = [
            trial
            for trial in journal.trials
            if (trial.status == "running" and trial.number not in self._rule.waiting) or trial.number in self._made_again
        ]

    def _replay(self) -> None:
        """Tell source and rule what they were told of in the journal's lifetime, in its order."""
        told = dict.fromkeys(range(len(self._journal.trials)), 0)
        for event, number in list(self._journal.events):
            trial = self._journal.trials[number]
            if trial.kind != "search":
                continue
            if event == "begin":
                self._source.begun(number, trial.point)
            elif event == "epoch":
                told[number] += 1
                self._replay_epoch(trial, told[number])
            elif event == "end":
                self._note_end(trial)

    def _replay_epoch(self, trial: TrialRecord, count: int) -> None:
        so_far = replace(trial, epochs=trial.epochs[:count], status="running")
        is_last = so_far.epochs[-1]["last"]
        verdict = Verdict.STOP if is_last else self._judge(so_far)
        if trial.status == "running" and count == len(trial.epochs) and verdict is Verdict.STOP:
            # Killed between the decision and its record.
            self._journal.end(trial.number, "finished" if is_last else "stopped")
            self._note_end(trial)

    def next_job(self) -> Job | None:
        """Return the next trial; None where there is none now.

        Raises
        ------
        StopIteration
            There will be none.
        """
        if self.stopping:
            raise StopIteration
        if len(self._live) >= self._limit:
            return None
        try:
            trial = self._next_trial()
        except SentinodeError as error:
            self._break(error)
            raise StopIteration from error
        if trial is None:
            return None
        self._live[trial.number] = time.time()
        self._starting.add(trial.number)
        self._progress.begun(trial, running=len(self._live))
        if trial.status == "running":
            return Job.of(trial)
        # Let it tell again what its checkpoints lack, at least the last epoch: it is not to train another one.
        saved = {fold: min(count, epochs_saved(trial_folder(self._folder, trial.number, fold))) for fold, count in trial.told.items()}
        last = trial.epochs[-1]["fold"]
        return replace(Job.of(trial), told=saved | {last: min(saved[last], trial.told[last] - 1)})

    def _next_trial(self) -> TrialRecord | None:
        # Now, not at the end: whole checkpoints of all trials would fill a disk.
        self.settle()
        if self._unfinished:
            return self._unfinished.pop(0)
        searched = sum(trial.kind == "search" for trial in self._journal.trials)
        if searched < self._source.total and (asked := self._source.ask(searched)) is not None:
            point, origin = asked
            return self._journal.begin(point, kind="search", origin=origin, seed=self._seed)
        number, given_up = self._rule.next_to_go_on(self._live.keys())
        for other in given_up:
            self._journal.end(other, "stopped")
            self._note_end(self._journal.trials[other])
            self._progress.ended(self._journal.trials[other], running=len(self._live))
        if number is not None:
            return self._continued(self._journal.trials[number])
        if any(self._journal.trials[number].kind == "search" for number in self._live):
            return None
        for trial, seed in self._wanted_repeats():
            if not any((other.repeats, other.seed) == (trial.number, seed) for other in self._journal.trials):
                return self._journal.begin(trial.point, kind="repeat", origin="repeat", seed=seed, repeats=trial.number)
        if self._live:
            return None
        while not self.stopping and not self._all_settled():
            # Here, since nothing else is to be done and Tune would look a second later only.
            time.sleep(_LAST_LOOKS_S)
            self._looked = float("-inf")
            self.settle()
        if lost := [trial for trial in self._unsettled() if trial.number not in self._made_again]:
            # With the process that was writing it.
            self._made_again |= {trial.number for trial in lost}
            self._over_since = float("-inf")
            self._unfinished += lost[1:]
            return lost[0]
        raise StopIteration

    def _continued(self, trial: TrialRecord) -> TrialRecord | None:
        """Return a trial that waited and goes on, once its checkpoint is on the disk; None while others can be heard of meanwhile."""
        # With the process that was writing it the checkpoint may be lost; then the last epoch is trained again.
        until = trial.epochs[-1]["at"] + _WRITE_S
        while not self.stopping and not self._is_written(trial) and time.time() < until:
            if self._live:
                return None
            time.sleep(_LAST_LOOKS_S)
        self._rule.lets_go_on(trial.number)
        return trial

    def _wanted_repeats(self) -> list[tuple[TrialRecord, int]]:
        """Return (trial, seed) of all repeats, seed by seed, so that a sweep that is cut short has as many of one trial as of another.

        Only trials that were trained to their end: a repeat is, and the figure of half a training beside it would say nothing of seeds.
        """
        ranked = rank([trial for trial in self._journal.trials if trial.kind == "search" and trial.status == "finished"], self._config.metric)
        best = [trial for trial in ranked if trial.value(self._config.metric) is not None][: self._config.repeat_top]
        return [(trial, trial.seed + 1 + number) for number in range(self._config.repeats) for trial in best]

    def hear(self, number: int, result: Mapping[str, Any]) -> bool:
        """Take an epoch in and tell whether the trial goes on."""
        trial = self._journal.trials[number]
        record, fold = json.loads(result["record"]), result["fold"]
        try:
            if number in self._starting:
                self._starting.discard(number)
                waited = time.time() - self._live[number] - record["seconds"] - record["val_seconds"]
                self._journal.start(number, max(0.0, round(waited, 3)), result.get("gflops"))
            if self._journal.knows(number, record["epoch"], fold):
                # Trained again; it was decided on then.
                last = trial.epochs[-1]
                return not result["last"] and (trial.status == "running" or (last["fold"], last["epoch"]) != (fold, record["epoch"]))
            if trial.status != "running":
                return False
            self._journal.epoch(number, record, fold, fold_over=result["fold_over"], last=result["last"])
        except SentinodeError as error:
            self._break(error)
            return False
        self._trackers.epoch(trial, fold, record)
        self._progress.epoch(trial, running=len(self._live))
        if result["last"] or self.broken:
            return False
        return trial.kind == "repeat" or self._judge(trial) is Verdict.GO_ON

    def _judge(self, trial: TrialRecord) -> Verdict:
        """Ask the rule about a trial whose last epoch is not the last that is due."""
        metric, last = self._config.metric, trial.epochs[-1]
        if self._folds is None:
            verdict = self._rule.judge(trial.number, len(trial.epochs), last.get(metric), trial.value(metric))
        elif not last["fold_over"]:
            return Verdict.GO_ON
        else:
            best = trial.best(metric, last["fold"])
            verdict = self._rule.judge(trial.number, len(trial.folds), None if best is None else best[metric], trial.value(metric))
        if verdict is Verdict.WAIT:
            self._tell_source(trial, replace(Outcome.of(trial, self._config), stopped=True))
            self._told_waiting.add(trial.number)
        return verdict

    def began_again(self, number: int) -> None:
        """Note that a trial lost its process and begins in another one."""
        self._live[number] = time.time()
        self._starting.add(number)
        self._progress.note(f"trial {self._journal.trials[number].name} lost its process and goes on in another one")

    def ended(self, number: int, result: Mapping[str, Any], error: str | None = None) -> None:
        """Note how a trial ended, from what it told last, or from the error that ended its process."""
        if self._live.pop(number, None) is None:
            return
        trial = self._journal.trials[number]
        if "broken" in result:
            self._break(StorageError(str(result["broken"])))
        if error is None and ("broken" in result or "interrupted" in result or self.broken):
            self._trackers.ended(trial, "stopped")
            return
        if trial.status != "running":
            return
        if error is None and number in self._rule.waiting:
            self._progress.waits(trial, running=len(self._live))
            return
        error = error or result.get("failed")
        finished = result.get("last") or ("record" not in result and result.get("done"))
        try:
            self._journal.end(number, "failed" if error else "finished" if finished else "stopped", error)
            if trial.kind == "search":
                self._note_end(trial)
        except SentinodeError as failure:
            self._break(failure)
        self._trackers.ended(trial, "failed" if error else "finished")
        self._progress.ended(trial, running=len(self._live))

    def _note_end(self, trial: TrialRecord) -> None:
        """Tell source and rule of a trial that has ended."""
        waited = trial.number in self._rule.waiting
        self._rule.ended(trial.number)
        if not waited:  # else it has done nothing since it was told of
            self._tell_source(trial, Outcome.of(trial, self._config))

    def _tell_source(self, trial: TrialRecord, outcome: Outcome) -> None:
        if trial.number in self._told_waiting:
            # A searcher takes what a trial has become since it was told of for another trial of the same point.
            self._source.begun(trial.number, trial.point)
        self._source.tell(trial.number, outcome)

    def _break(self, error: SentinodeError) -> None:
        """No trial could go on: begin no other, and let those that run end at their next epoch."""
        self.broken = self.broken or error
        self.stopping = True

    def _all_settled(self) -> bool:
        """Whether every ended trial has its last checkpoint on the disk, or has had the time for it."""
        now = time.monotonic()
        if self._over_since == float("-inf"):
            self._over_since = now
        return not self._unsettled() or now - self._over_since > _WRITE_S

    def _unsettled(self) -> list[TrialRecord]:
        return [trial for trial in self._journal.trials if trial.status in ("finished", "stopped") and trial.number not in self._settled]

    def settle(self) -> None:
        """Keep of each ended trial whose last checkpoint is on the disk the weights of its best epoch."""
        now = time.monotonic()
        if now - self._looked < _LOOK_S:
            return
        self._looked = now
        for trial in self._unsettled():
            if trial.number not in self._live and self._is_written(trial):
                for fold in trial.folds:
                    keep_weights_only(trial_folder(self._folder, trial.number, fold))
                self._settled.add(trial.number)

    def _is_written(self, trial: TrialRecord) -> bool:
        return all(is_settled(trial_folder(self._folder, trial.number, fold), epochs) for fold, epochs in trial.told.items())
