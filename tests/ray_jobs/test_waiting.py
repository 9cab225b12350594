"""Who waits for what others hold is told so, and nobody else is."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_prep.synth import synthesize
from ray_jobs import waiting
from ray_jobs.waiting import data_tasks_run, reserved, wait_told
from tests.conditions import wait_until
from tests.processes import running, sentinode


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(waiting, "say", lines.append)
    monkeypatch.setattr(waiting, "_SILENT_WAIT_S", 0.0)
    return lines


@contextmanager
def everything_taken(but: int = 0) -> Iterator[Callable[[], None]]:
    """Hold all CPUs but so many; yields what gives them back."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    group = placement_group([{"CPU": ray.cluster_resources()["CPU"] - but}])
    try:
        assert group.wait(60)
        yield lambda: remove_placement_group(group)
    finally:
        remove_placement_group(group)


@pytest.mark.ray
def test_what_waits_for_resources_says_so_and_goes_on_when_they_are_free(ray_session: None, free_cpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    told: list[str] = []
    with everything_taken() as give_back:

        def say(text: str) -> None:
            told.append(text)
            give_back()

        monkeypatch.setattr(waiting, "say", say)
        monkeypatch.setattr(waiting, "_SILENT_WAIT_S", 0.0)
        with reserved(2, 0, "make the bundle") as place:
            task = ray.remote(lambda: "done").options(num_cpus=2, scheduling_strategy=place)
            assert ray.get(task.remote(), timeout=60) == "done"
    assert told == ["waiting for 2 CPUs to make the bundle; the cluster's are taken"]


def watched_until(looks: int, works: Callable[[], bool]) -> None:
    """Watch until so many looks were had."""
    seen, enough = 0, threading.Event()

    def answer() -> bool:
        nonlocal seen
        seen += 1
        if seen >= looks:
            enough.set()
        return works()

    with wait_told(2, 0, "predict", answer):
        assert enough.wait(60)


def test_where_there_is_room_or_work_goes_on_nothing_is_told(told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "_has_room", lambda cpus, gpus: True)
    watched_until(5, lambda: False)
    monkeypatch.setattr(waiting, "_has_room", lambda cpus, gpus: False)
    watched_until(1, lambda: True)
    assert told == []
    watched_until(1, lambda: False)
    assert told == ["waiting for 2 CPUs to predict; the cluster's are taken"]


def test_what_cannot_be_asked_keeps_no_work_from_being_done(told: list[str]) -> None:
    def fails() -> bool:
        raise ConnectionError("no dashboard")

    watched_until(1, fails)
    assert told == []


@pytest.mark.ray
def test_data_tasks_are_seen_when_they_run_and_not_before(ray_session: None, free_cpus: None, told: list[str], tmp_path: Path) -> None:
    import ray

    def work(batch: Any) -> Any:
        (tmp_path / "began").touch()
        while not (tmp_path / "seen").exists():
            threading.Event().wait(0.05)
        return batch

    def run() -> None:
        ray.data.range(1).map_batches(work, num_cpus=1).materialize()

    thread = threading.Thread(target=run)
    with everything_taken() as give_back:
        thread.start()
        with wait_told(1, 0, "prepare", data_tasks_run):
            wait_until(lambda: bool(told))
        assert not (tmp_path / "began").exists()
        assert not data_tasks_run()
        give_back()
        wait_until(data_tasks_run)
    (tmp_path / "seen").touch()
    thread.join()
    assert told == ["waiting for 1 CPU to prepare; the cluster's are taken"]


SMALL = ["arch=resnet18", "weights=none", "input_size_px=32", "epochs=1", "batch_size=16"]


def sweep_file(folder: Path) -> Path:
    """A sweep of one small trial."""
    path = folder / "sweep.yaml"
    content = {"trials": 1, "space": {"learning_rate": {"choice": [0.001]}}, "base": yaml.safe_load("\n".join(SMALL).replace("=", ": "))}
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_verbs_on_a_cluster_that_others_use_say_so_and_go_on_when_it_is_free(ray_address: str, free_cpus: None, tmp_path: Path) -> None:
    source, data, run = synthesize(tmp_path / "source", 160, 1), tmp_path / "data", tmp_path / "run"
    sweep = ("tune", "--data", data, "--config", sweep_file(tmp_path))

    def waits(line: str, *argv: str | Path, but: int = 0) -> None:
        with everything_taken(but) as give_back, running(*argv, ray_address=ray_address) as command:
            command.wait_for_line(f"waiting for {line}", 180)
            give_back()
            assert command.process.wait(180) == 0

    waits("1 CPU to prepare the data set; the cluster's are taken", "prepare", "--source", source, "--out", data)
    done = sentinode("train", "--data", data, "--out", run, "--set", *SMALL, ray_address=ray_address)
    assert done.returncode == 0, done.stderr
    predict = ("predict", "--bundle", run / "bundle", "--source", source / "train", "--out", tmp_path / "predictions")
    waits("1 CPU to predict; the cluster's are taken", *predict)
    waits("1 CPU to evaluate; the cluster's are taken", "evaluate", "--bundle", run / "bundle", "--data", data, "--out", tmp_path / "report")
    # Of a sweep the rows have been read by then, with the CPU that was left.
    waits("2 CPUs to begin a trial; the cluster's are taken", *sweep, "--out", tmp_path / "sweep", "--set", "base.cpus_per_worker=2", but=1)
    # Of a trial of several workers the driver has begun, on a part of that CPU.
    waits("room: 2 workers with 1 CPU each", *sweep, "--out", tmp_path / "wide", "--set", "workers_per_trial=2", but=1)
