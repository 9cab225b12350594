"""What a sweep does next, without Ray: trials are made up here, and Tune's part is played by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from ray_jobs.sweep import course as course_module
from ray_jobs.sweep.course import Course
from ray_jobs.sweep.progress import SweepProgress
from ray_jobs.sweep.rule import Rule, Verdict
from ray_jobs.sweep.trial import Job
from sentinode.errors import StorageError
from sentinode.locations import locate
from sentinode.search.journal import Journal
from sentinode.search.point_sources import point_source
from tests.ray_jobs.sweep.sweeps import sweep_config

GRID = {"space": {"learning_rate": {"grid": [1e-4, 1e-3, 1e-2]}}, "searcher": "grid"}


class NoTrackers:
    def epoch(self, *_: Any) -> None: ...
    def ended(self, *_: Any) -> None: ...


@pytest.fixture(autouse=True)
def everything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(course_module, "is_settled", lambda folder, epochs: True)
    monkeypatch.setattr(course_module, "keep_weights_only", lambda folder: None)
    monkeypatch.setattr(course_module, "_LOOK_S", 0)
    monkeypatch.setattr(course_module, "_LAST_LOOKS_S", 0)


def course_of(folder: Path, said: list[str] | None = None, limit: int = 1, folds: list[int] | None = None, **changes: Any) -> Course:
    config = sweep_config(**GRID | changes)
    journal, source = Journal(locate(folder)), point_source(config)
    progress = SweepProgress(
        config.metric, journal, source.total + config.repeats * config.repeat_top, 4, limit, ([] if said is None else said).append
    )
    return Course(config, locate(folder), journal, source, limit=limit, epochs=4, folds=folds, seed=42, progress=progress, trackers=NoTrackers())  # type: ignore[arg-type]


def told(epoch: int, value: float | None, *, last: bool = False, fold: int | None = None, fold_over: bool | None = None) -> dict[str, Any]:
    record = {"epoch": epoch, "val_roc_auc": value, "val_loss": 0.5, "rows": 100, "seconds": 1.0, "val_seconds": 0.1}
    return {"record": json.dumps(record), "fold": fold, "fold_over": last if fold_over is None else fold_over, "last": last, "gflops": None}


def play(course: Course, curves: dict[float, list[float]], trials: int) -> list[tuple[int, int]]:
    """Run trials one after the other, each to its end or until it is stopped; return (number, epochs) of each."""
    played = []
    for _ in range(trials):
        try:
            job = course.next_job()
        except StopIteration:
            break
        assert job is not None
        curve = curves[job.point["learning_rate"]]
        start = job.told.get(None, 0)
        result: dict[str, Any] = {"done": True}  # where nothing is left to be told
        epoch = start - 1
        for epoch in range(start, len(curve)):
            result = told(epoch, curve[epoch], last=epoch == len(curve) - 1)
            if not course.hear(job.number, result):
                break
        course.ended(job.number, result)
        played.append((job.number, epoch + 1))
    return played


CURVES = {1e-4: [0.7, 0.71, 0.72, 0.73], 1e-3: [0.8, 0.81, 0.82, 0.83], 1e-2: [0.6, 0.9, 0.9, 0.9]}
ASHA = {"scheduler": {"kind": "asha", "grace_period_epochs": 1, "reduction_factor": 2}}


def test_a_trial_that_is_worse_than_the_better_half_at_a_rung_is_stopped(tmp_path: Path) -> None:
    course = course_of(tmp_path, **ASHA)
    assert play(course, CURVES, 3) == [(0, 4), (1, 4), (2, 1)]
    assert [trial.status for trial in Journal(locate(tmp_path)).trials] == ["finished", "finished", "stopped"]
    with pytest.raises(StopIteration):
        course.next_job()


@pytest.mark.parametrize("lines", range(1, 12))
def test_a_sweep_that_was_killed_after_any_event_ends_as_an_undisturbed_one(tmp_path: Path, lines: int) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    play(course_of(whole, **ASHA, repeats=1, repeat_top=1), CURVES, 4)
    expected = [(trial.status, len(trial.epochs), trial.kind, trial.seed) for trial in Journal(locate(whole)).trials]
    killed = tmp_path / "killed"
    killed.mkdir()
    text = (whole / "trials.jsonl").read_bytes()
    (killed / "trials.jsonl").write_bytes(b"".join(text.splitlines(keepends=True)[:lines]))
    ended = sum(trial.status != "running" for trial in Journal(locate(killed)).trials)
    course = course_of(killed, **ASHA, repeats=1, repeat_top=1)
    # A trial that was stopped, and killed before that was written, is not begun again.
    ended = max(ended, sum(trial.status != "running" for trial in course._journal.trials))
    play(course, CURVES, 4 - ended)
    assert [(trial.status, len(trial.epochs), trial.kind, trial.seed) for trial in Journal(locate(killed)).trials] == expected
    assert (killed / "trials.jsonl").read_bytes().startswith(b"".join(text.splitlines(keepends=True)[:lines]))


def test_no_more_trials_are_begun_than_may_run_at_a_time_and_repeats_wait_for_the_search(tmp_path: Path) -> None:
    course = course_of(tmp_path, limit=2, repeats=2, repeat_top=1)
    first, second = course.next_job(), course.next_job()
    assert first is not None
    assert second is not None
    assert course.next_job() is None
    for job, value in ((first, 0.7), (second, 0.9)):
        course.hear(job.number, told(0, value, last=True))
        course.ended(job.number, told(0, value, last=True))
    third = course.next_job()
    assert third is not None
    # One might run, but what is to be repeated is not known yet.
    assert course.next_job() is None
    course.ended(third.number, {"done": True, "failed": "a loss is not finite"})
    repeats = [course.next_job(), course.next_job()]
    assert [(job.point, job.seed) for job in repeats if job] == [(second.point, 43), (second.point, 44)]


def test_an_epoch_that_is_told_again_after_a_node_was_lost_changes_nothing(tmp_path: Path) -> None:
    course = course_of(tmp_path, **ASHA)
    job = course.next_job()
    assert job is not None
    assert course.hear(job.number, told(0, 0.7))
    course.began_again(job.number)
    assert course.hear(job.number, told(0, 0.7))
    assert course.hear(job.number, told(1, 0.7))
    (trial,) = Journal(locate(tmp_path)).trials
    assert ([record["epoch"] for record in trial.epochs], len(trial.starts)) == ([0, 1], 2)


def test_an_interrupted_trial_stays_unfinished_and_is_the_next_one_afterwards(tmp_path: Path) -> None:
    course = course_of(tmp_path)
    job = course.next_job()
    assert job is not None
    course.hear(job.number, told(0, 0.7))
    course.stopping = True
    course.ended(job.number, {"done": True, "interrupted": True})
    with pytest.raises(StopIteration):
        course.next_job()
    again = course_of(tmp_path).next_job()
    assert again == Job(job.number, job.point, 42, {None: 1})
    assert Job.from_config(again.to_config()) == again


def test_what_no_trial_could_go_on_with_ends_the_sweep_and_fails_no_trial(tmp_path: Path) -> None:
    course = course_of(tmp_path, limit=2)
    first, second = course.next_job(), course.next_job()
    assert first is not None
    assert second is not None
    course.ended(first.number, {"done": True, "broken": "the disk is full"})
    assert isinstance(course.broken, StorageError)
    course.ended(second.number, told(0, 0.7))
    assert [trial.status for trial in Journal(locate(tmp_path)).trials] == ["running", "running"]
    with pytest.raises(StopIteration):
        course.next_job()


def test_an_ended_trial_whose_last_checkpoint_was_cut_off_makes_it_again_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play(course_of(tmp_path, **ASHA), CURVES, 3)
    before = (tmp_path / "trials.jsonl").read_bytes()
    there = {0: 4, 1: 2, 2: 1}
    monkeypatch.setattr(course_module, "is_settled", lambda folder, epochs: there[int(folder.name)] >= epochs)
    monkeypatch.setattr(course_module, "epochs_saved", lambda folder: there[int(folder.name)])
    course = course_of(tmp_path, **ASHA)
    job = course.next_job()
    assert job is not None
    assert (job.number, job.told) == (1, {None: 2})
    assert course.hear(1, told(2, 0.82))
    assert not course.hear(1, told(3, 0.83, last=True))
    course.ended(1, told(3, 0.83, last=True))
    there[1] = 4
    with pytest.raises(StopIteration):
        course.next_job()
    added = (tmp_path / "trials.jsonl").read_bytes().removeprefix(before).splitlines()
    assert [json.loads(line)["event"] for line in added] == ["start"]


def test_with_folds_a_trial_is_judged_after_each_fold_by_the_mean_so_far(tmp_path: Path) -> None:
    course = course_of(tmp_path, folds=[0, 1], scheduler={"kind": "asha", "grace_period_folds": 1, "reduction_factor": 2})
    decisions = []
    for values in ([0.8, 0.8], [0.7, 0.9], [0.9, 0.9]):
        job = course.next_job()
        assert job is not None
        goes_on = True
        for fold in (0, 1):
            if goes_on:
                course.hear(job.number, told(0, values[fold] - 0.1, fold=fold))
                result = told(1, values[fold], fold=fold, fold_over=True, last=fold == 1)
                goes_on = course.hear(job.number, result)
        course.ended(job.number, result)
        decisions.append([trial.status for trial in Journal(locate(tmp_path)).trials][-1])
    assert decisions == ["finished", "stopped", "finished"]


def test_the_median_rule_stops_what_is_worse_than_the_median_and_pauses_nothing() -> None:
    rule = Rule(sweep_config(scheduler={"kind": "median", "grace_period_epochs": 2, "min_trials": 2}), 4)
    for number, level in enumerate((0.8, 0.7)):
        assert all(rule.judge(number, epoch, level, level) is Verdict.GO_ON for epoch in (1, 2, 3, 4))
    assert rule.judge(2, 1, 0.1, 0.1) is Verdict.GO_ON
    assert rule.judge(2, 2, 0.1, 0.1) is Verdict.STOP
    assert rule.judge(3, 1, 0.9, 0.9) is Verdict.GO_ON
    assert rule.judge(3, 2, 0.9, 0.9) is Verdict.GO_ON


def test_lower_losses_are_better() -> None:
    rule = Rule(sweep_config(metric="val_loss", **ASHA), 4)
    assert rule.judge(0, 1, 0.5, 0.5) is Verdict.GO_ON
    assert rule.judge(1, 1, 0.4, 0.4) is Verdict.GO_ON
    assert rule.judge(2, 1, 0.9, 0.9) is Verdict.STOP


def test_the_terminal_tells_how_far_the_sweep_is(tmp_path: Path) -> None:
    said: list[str] = []
    course = course_of(tmp_path, said, **ASHA)
    play(course, CURVES, 3)
    assert said[0] == "trial 00000 begins: learning_rate 0.0001"
    assert said[1].startswith("trial 00000 epoch 1: val_roc_auc 0.7000, best so far 0.7000  [1 running, 0 of 3 done, about ")
    assert "val_roc_auc 0.6000, best so far 0.8300 by 00001" in said[-2]
    assert said[-1].startswith("trial 00002 stopped early, after epoch 1 of 4  [0 running, 3 of 3 done, 1 of them stopped early")


MEDIAN = {"scheduler": {"kind": "median", "grace_period_epochs": 2, "min_trials": 2}, "space": {"learning_rate": {"grid": [1e-4, 1e-3, 1e-2, 1e-1]}}}
# Of different lengths, as early stopping makes them; the last is stopped after two epochs.
UNEVEN = {1e-4: [0.9, 0.9], 1e-3: [0.8] * 5, 1e-2: [0.7, 0.85, 0.85, 0.85], 1e-1: [0.1] * 5}


@pytest.mark.parametrize("scheduler", [MEDIAN, ASHA | {"space": MEDIAN["space"]}])
def test_trials_of_different_lengths_are_judged_alike_whenever_the_sweep_was_killed(tmp_path: Path, scheduler: dict[str, Any]) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    play(course_of(whole, **scheduler), UNEVEN, 4)
    expected = [(trial.status, len(trial.epochs)) for trial in Journal(locate(whole)).trials]
    assert {status for status, _ in expected} == {"finished", "stopped"}
    text = (whole / "trials.jsonl").read_bytes().splitlines(keepends=True)
    for lines in range(1, len(text) + 1):
        killed = tmp_path / f"{lines}"
        killed.mkdir()
        (killed / "trials.jsonl").write_bytes(b"".join(text[:lines]))
        course = course_of(killed, **scheduler)
        play(course, UNEVEN, 4 - sum(trial.status != "running" for trial in course._journal.trials))
        assert [(trial.status, len(trial.epochs)) for trial in Journal(locate(killed)).trials] == expected, lines


def test_a_trial_that_was_killed_after_its_last_epoch_is_finished_not_stopped(tmp_path: Path) -> None:
    course = course_of(tmp_path, **ASHA)
    job = course.next_job()
    assert job is not None
    course.hear(job.number, told(0, 0.1, last=True))
    assert [trial.status for trial in course_of(tmp_path, **ASHA)._journal.trials] == ["finished"]


def test_an_ended_trial_whose_checkpoints_are_whole_trains_nothing_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play(course_of(tmp_path, **ASHA), CURVES, 3)
    before = (tmp_path / "trials.jsonl").read_bytes()
    # Whole, but not noted as such: killed between the two.
    monkeypatch.setattr(course_module, "is_settled", lambda folder, epochs: folder.name != "00002")
    monkeypatch.setattr(course_module, "epochs_saved", lambda folder: 1)
    course = course_of(tmp_path, **ASHA)
    job = course.next_job()
    assert job is not None
    assert (job.number, job.told) == (2, {None: 0})
    assert not course.hear(2, told(0, 0.6))
    # Nor is an epoch taken in that it was not to train.
    assert not course.hear(2, told(1, 0.99))
    course.ended(2, told(1, 0.99))
    assert [trial.status for trial in Journal(locate(tmp_path)).trials] == ["finished", "finished", "stopped"]
    assert (tmp_path / "trials.jsonl").read_bytes().count(b"0.99") == before.count(b"0.99") == 0


def test_what_runs_ends_at_its_next_epoch_when_no_trial_can_go_on(tmp_path: Path) -> None:
    course = course_of(tmp_path, limit=2)
    first, second = course.next_job(), course.next_job()
    assert first is not None
    assert second is not None
    assert course.hear(second.number, told(0, 0.7))
    course.ended(first.number, {"done": True, "broken": "the disk is full"})
    assert not course.hear(second.number, told(1, 0.8))
    assert [len(trial.epochs) for trial in Journal(locate(tmp_path)).trials] == [0, 2]


def test_only_what_was_trained_to_its_end_is_repeated(tmp_path: Path) -> None:
    course = course_of(tmp_path, **ASHA, repeats=1, repeat_top=2)
    # The last is stopped after an epoch that is better than all of the first's.
    play(course, {1e-4: [0.5] * 4, 1e-3: [0.8] * 4, 1e-2: [0.6] * 4}, 3)
    assert [trial.status for trial in Journal(locate(tmp_path)).trials] == ["finished", "finished", "stopped"]
    again = play(course, {1e-4: [0.5] * 4, 1e-3: [0.8] * 4}, 2)
    assert again == [(3, 4), (4, 4)]
    assert [trial.repeats for trial in Journal(locate(tmp_path)).trials] == [None, None, None, 1, 0]


HALVING = {"scheduler": {"kind": "halving", "grace_period_epochs": 1, "reduction_factor": 2}, "space": MEDIAN["space"]}
FOUR = {1e-4: [0.7, 0.71, 0.72, 0.73], 1e-3: [0.8, 0.81, 0.82, 0.83], 1e-2: [0.6, 0.9, 0.9, 0.9], 1e-1: [0.75, 0.95, 0.96, 0.97]}


def test_halving_trains_all_to_a_rung_before_any_goes_on(tmp_path: Path) -> None:
    course = course_of(tmp_path, **HALVING)
    # Rungs after 1 and 2 epochs: of four trials two go on, of these one.
    assert play(course, FOUR, 9) == [(0, 1), (1, 1), (2, 1), (3, 1), (1, 2), (3, 2), (3, 4)]
    assert [(trial.status, len(trial.epochs)) for trial in Journal(locate(tmp_path)).trials] == [
        ("stopped", 1),
        ("stopped", 2),
        ("stopped", 1),
        ("finished", 4),
    ]


def test_halving_ends_alike_whenever_the_sweep_was_killed(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    play(course_of(whole, **HALVING), FOUR, 9)
    expected = [(trial.status, len(trial.epochs)) for trial in Journal(locate(whole)).trials]
    text = (whole / "trials.jsonl").read_bytes().splitlines(keepends=True)
    for lines in range(1, len(text) + 1):
        killed = tmp_path / f"{lines}"
        killed.mkdir()
        (killed / "trials.jsonl").write_bytes(b"".join(text[:lines]))
        play(course_of(killed, **HALVING), FOUR, 9)
        assert [(trial.status, len(trial.epochs)) for trial in Journal(locate(killed)).trials] == expected, lines


def test_nobody_goes_on_while_others_are_on_their_way_to_the_rung_and_failures_are_not_waited_for(tmp_path: Path) -> None:
    course = course_of(tmp_path, limit=4, **HALVING)
    jobs = [course.next_job() for _ in range(4)]
    for job, value in zip(jobs[:3], (0.7, 0.8, 0.6), strict=True):
        assert job is not None
        assert not course.hear(job.number, told(0, value))
        course.ended(job.number, told(0, value))
    assert course.next_job() is None
    course.ended(3, {"done": True, "failed": "the loss is not finite"})
    # One of three.
    following = course.next_job()
    assert following is not None
    assert (following.number, following.told) == (1, {None: 1})
    assert [trial.status for trial in Journal(locate(tmp_path)).trials] == ["stopped", "running", "stopped", "failed"]


def test_optuna_hears_of_what_waits_and_of_what_becomes_of_it(tmp_path: Path) -> None:
    space = {"learning_rate": {"loguniform": [1e-5, 1e-2]}}
    settings = HALVING | {"space": space, "searcher": "optuna", "trials": 4, "startup_trials": 2}

    def run(folder: Path, course: Course) -> None:
        while True:
            try:
                job = course.next_job()
            except StopIteration:
                return
            assert job is not None
            for epoch in range(job.told.get(None, 0), 4):
                result = told(epoch, 0.5 + job.point["learning_rate"] * (epoch + 1), last=epoch == 3)
                if not course.hear(job.number, result):
                    break
            course.ended(job.number, result)

    whole = tmp_path / "whole"
    whole.mkdir()
    run(whole, course_of(whole, **settings))
    expected = [(trial.status, len(trial.epochs), trial.point) for trial in Journal(locate(whole)).trials]
    assert sorted(count for _, count, _ in expected) == [1, 1, 2, 4]
    text = (whole / "trials.jsonl").read_bytes().splitlines(keepends=True)
    for lines in range(1, len(text)):
        killed = tmp_path / f"{lines}"
        killed.mkdir()
        (killed / "trials.jsonl").write_bytes(b"".join(text[:lines]))
        run(killed, course_of(killed, **settings))
        assert [(trial.status, len(trial.epochs), trial.point) for trial in Journal(locate(killed)).trials] == expected, lines
