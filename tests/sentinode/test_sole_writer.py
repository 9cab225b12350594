"""One process at a time writes an output in an object store."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sentinode import sole_writer as module
from sentinode.errors import UsageError
from sentinode.locations import Location, locate
from sentinode.sole_writer import Holder, sole_writer
from tests.s3 import FlakyServer

WRITING = "another process is writing it"
LOST = "another process writes it now, so this one has stopped"


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_S", 0.2)
    monkeypatch.setattr(module, "SILENCE_S", 3.0)
    monkeypatch.setattr(module, "_LOOK_S", 0.1)


@pytest.fixture
def out(s3_folder: str) -> Location:
    return locate(s3_folder)


def test_on_disk_it_is_the_lock(tmp_path: Path) -> None:
    out = locate(tmp_path / "run")
    with sole_writer(out) as confirm:
        confirm()
        with pytest.raises(UsageError, match=WRITING), sole_writer(out):
            pytest.fail("two writers")


def test_while_one_works_another_is_refused_and_afterwards_it_need_not_wait(out: Location) -> None:
    told: list[str] = []
    with sole_writer(out) as confirm:
        with pytest.raises(UsageError, match=f"{out}: {WRITING}"), sole_writer(out, told.append):
            pytest.fail("two writers")
        confirm()
    assert told == [f"{out}: looking for 3 s whether another process still writes it"]
    with sole_writer(out, told.append) as confirm:
        confirm()
    assert len(told) == 1


def test_of_a_process_that_was_killed_the_output_is_taken_over(out: Location) -> None:
    code = f"""
import os
from sentinode.locations import locate
from sentinode.sole_writer import sole_writer
with sole_writer(locate({str(out)!r})):
    os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    with sole_writer(out) as confirm:
        confirm()


def test_who_was_held_up_learns_that_the_output_was_taken(out: Location) -> None:
    held_up = Holder(out, 1)
    held_up.put(create_only=True)
    held_up.confirm()
    with sole_writer(out):
        # It comes back: even its beat does not give it back what it lost.
        held_up.put()
        with pytest.raises(UsageError, match=f"^{out}: {LOST}$"):
            held_up.confirm()
    with pytest.raises(UsageError, match=LOST):
        held_up.confirm()


def test_while_the_store_could_not_be_seen_nobody_was_silent(out: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    alive = Holder(out, 1)
    alive.put(create_only=True)
    monkeypatch.setattr(module, "_SLOW_LOOK_S", 0.5)
    look, looks = module._newest, iter(range(99))

    def slow(where: Location) -> tuple[int, str] | None:
        # The second look finds the store away for longer than anybody is waited for; then the holder's beat comes through.
        if (number := next(looks)) == 1:
            threading.Event().wait(module.SILENCE_S + 0.5)
        if number == 3:
            alive.put()
        return look(where)

    monkeypatch.setattr(module, "_newest", slow)
    with pytest.raises(UsageError, match=WRITING), sole_writer(out):
        pytest.fail("two writers")
    alive.confirm()


def test_of_several_who_find_it_silent_one_takes_it(out: Location) -> None:
    Holder(out, 1).put(create_only=True)
    start, end = threading.Barrier(4), threading.Barrier(4)
    outcomes: list[str] = []

    def want() -> None:
        start.wait()
        try:
            with sole_writer(out):
                outcomes.append("took it")
                end.wait()
        except UsageError as error:
            outcomes.append(str(error))
            end.wait()

    threads = [threading.Thread(target=want) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [f"{out}: {WRITING}"] * 3 + ["took it"]


def test_a_store_that_fails_for_a_moment_takes_nothing_away(out: Location, flaky_s3: FlakyServer) -> None:
    with sole_writer(out) as confirm:
        flaky_s3.failures += ["503", "drop", "503"]
        confirm()


@pytest.fixture
def lost_answers(flaky_s3: FlakyServer) -> FlakyServer:
    flaky_s3.only = lambda method, path: method == "PUT"
    return flaky_s3


def test_a_put_whose_answer_was_lost_is_known_for_one_s_own(out: Location, lost_answers: FlakyServer) -> None:
    lost_answers.failures += ["lost"]
    with sole_writer(out) as confirm:
        confirm()


def test_a_whole_bucket_is_no_output(out: Location) -> None:
    with pytest.raises(UsageError, match="name a folder in the bucket"), sole_writer(out.parent):
        pytest.fail("a whole bucket")
