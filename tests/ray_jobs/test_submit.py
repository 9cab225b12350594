"""Verbs as jobs: what is sent, what is refused here, and a real head with its job server and a token."""

import asyncio
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from data_prep.synth import synthesize
from ray_jobs import job_command, job_server
from ray_jobs.job_command import PACKAGES, check_command, look_for_inputs, manifest_exists, upload_folder
from ray_jobs.job_server import JobError, connect, follow, outcome, stop, submit
from ray_jobs.submit import split_arguments
from sentinode.errors import ConfigError, SentinodeError, UsageError
from sentinode.locations import Location
from tests import s3
from tests.heads import Head, head_with_token
from tests.processes import ROOT
from tests.strangers import answering_with

VERBS = ["prepare", "train", "tune"]
TRAIN = ["--data", "/d", "--out", "/o"]


@pytest.mark.parametrize(
    ("argv", "own", "of_verb"),
    [
        ("train --data d --out o", "train", "--data d --out o"),
        ("train --data d --address http://h --out o", "train --address http://h", "--data d --out o"),
        ("--address=http://h train --set epochs=3 seed=1 --detach", "--address=http://h train --detach", "--set epochs=3 seed=1"),
        ("--stop train-1", "--stop train-1", ""),
        ("--id tune tune --data d", "--id tune tune", "--data d"),
        ("train --json -v --id mine", "train --json -v --id mine", "--json -v"),
        ("train --help", "train", "--help"),
        ("--help", "--help", ""),
        ("nonsense --data d", "nonsense --data d", ""),
    ],
)
def test_our_arguments_and_the_verbs_are_told_apart(argv: str, own: str, of_verb: str) -> None:
    assert split_arguments(argv.split(), VERBS) == (own.split(), of_verb.split())


def test_a_command_is_checked_before_anything_is_sent(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="epoch"):
        check_command("train", [*TRAIN, "--set", "epoch=3"])
    with pytest.raises(SystemExit):
        check_command("train", ["--data", "/d"])
    (tmp_path / "mine.yaml").write_text("epochs: 3\n")
    for given in (["--config", str(tmp_path / "mine.yaml")], [f"--config={tmp_path / 'mine.yaml'}"]):
        command = check_command("train", ["--data", "s3://b/d", "--out", "/shared/run", *given])
        ((name, content),) = command.files.items()
        assert re.fullmatch("submitted/[0-9a-f]{12}-mine.yaml", name)
        assert content == b"epochs: 3\n"
        assert name in command.entrypoint
        assert str(tmp_path) not in command.entrypoint
        assert command.entrypoint.startswith("python -m ray_jobs.train --data s3://b/d --out /shared/run --config")
        assert command.paths == ["/shared/run"]
        assert command.arguments[-1] == "--json"


@pytest.mark.parametrize(
    ("verb", "arguments", "said"),
    [
        ("train", "--data {bucket}/run --out /o", "not a prepared data set: {bucket}/run (no dataset.json there)"),
        ("evaluate", "--bundle {bucket}/run --data {bucket}/data --out /o", "not a model bundle: {bucket}/run (no bundle.json there)"),
        ("ensemble", "--bundles {bucket}/run/bundle {bucket}/run --data {bucket}/data --out /o", "not a model bundle: {bucket}/run (no "),
        ("prepare", "--from {none}/data --out /o", "not a prepared data set: {none}/data (there is no such bucket)"),
        ("prepare", "--source {none}/a --out /o", "--source {none}/a: there is no such bucket"),
        ("prepare", "--source {bucket}/none --out /o", "--source {bucket}/none: nothing is there"),
        ("train", "--data {bucket}/data --out {none}/run", "--out {none}/run: there is no such bucket"),
        ("evaluate", "--bundle {bucket}/run/bundle --data {bucket}/data --out {bucket}/report", ""),
    ],
)
def test_what_is_not_in_the_store_is_said_before_anything_is_sent(
    s3_server: s3.Server, verb: str, arguments: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with s3.fresh_clients():
        bucket = s3_server.new_bucket()
        names = {"bucket": bucket, "none": "s3://no-such-bucket-of-ours"}
        s3_server.fill(bucket, ["data/dataset.json", "run/bundle/bundle.json"])
        look_for_inputs(check_command(verb, arguments.format(**names).split()))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == bool(said)
    if said:
        # No more than a warning: the cluster may see another store by that name.
        assert lines[0].startswith(f"warning: {said.format(**names)}")
        assert lines[0].endswith(", as seen from this machine")


def test_a_store_that_no_machine_knows_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^ftp://host/data: ftp:// is not supported"):
        look_for_inputs(check_command("train", ["--data", "ftp://host/data", "--out", "/o"]))


def test_a_store_that_only_the_cluster_reaches_is_no_mistake(
    s3_server: s3.Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = check_command("train", ["--data", "s3://bucket/data", "--out", "s3://bucket/run"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("SENTINODE_STORAGE_PATIENCE_S", "0")
    with s3.fresh_clients():
        look_for_inputs(command)
    told = capsys.readouterr().out
    assert told.startswith("not looked at from here: s3://bucket/data")
    assert told.count("\n") == 1


def test_a_path_that_only_this_folder_gives_a_meaning_is_refused(tmp_path: Path) -> None:
    for wrong in ("run", "./run", "../run", "file://run"):
        with pytest.raises(UsageError, match=rf"^{wrong}: a job does not run in this folder"):
            check_command("train", ["--data", "/d", "--out", wrong])
    command = check_command("train", ["--data", f"file://{tmp_path}/data", "--out", f"{tmp_path}/run"])
    assert command.paths == [f"file://{tmp_path}/data", f"{tmp_path}/run"]
    assert command.inputs == {"--data": []}


def test_what_was_made_and_cannot_be_looked_at_is_a_success(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(self: Location) -> bool:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Location, "exists", refused)
    for out in ("/o", "s3://bucket/run"):
        assert manifest_exists(check_command("train", ["--data", "/d", "--out", out])) is None
        assert capsys.readouterr().out.startswith(f"{out}: cannot be looked at from here")


def test_the_same_command_has_the_same_id(tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("epochs: 3\n")
    arguments = [*TRAIN, "--config", str(config)]
    first = check_command("train", arguments).submission_id
    assert first == check_command("train", arguments).submission_id
    assert first.startswith("train-")
    assert first != check_command("train", ["--data", "/d", "--out", "/other", "--config", str(config)]).submission_id
    config.write_text("epochs: 4\n")
    assert first != check_command("train", arguments).submission_id


def test_the_upload_is_our_code_and_small() -> None:
    with upload_folder({"submitted/mine.yaml": b"epochs: 3\n"}) as folder:
        assert {path.name for path in folder.iterdir()} == {*PACKAGES, "submitted"}
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert (folder / "submitted/mine.yaml").read_text() == "epochs: 3\n"
        assert not [path for path in files if path.suffix in (".pyc", ".safetensors", ".parquet")]
        assert sum(path.stat().st_size for path in files) < 4 * 2**20
        # Enough to run from, with nothing of ours installed.
        text = subprocess.run([sys.executable, "-m", "ray_jobs.train", "--help"], cwd=folder, capture_output=True, text=True, check=True).stdout
        assert "--data" in text
    assert not folder.exists()


def test_what_is_too_big_to_send_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_command, "LARGEST_UPLOAD_BYTES", 4 * 2**20)
    with (
        pytest.raises(UsageError, match=r"the upload has .* the largest: submitted/huge\.yaml \(5\.0 MiB\)"),
        upload_folder({"submitted/huge.yaml": bytes(5 * 2**20)}),
    ):
        pass


@pytest.fixture(autouse=True)
def address_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    # `connect` sets it, which then belongs to the process.
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")


@pytest.mark.parametrize("address", ["127.0.0.1:8265", "ftp://h", "http://", "nonsense"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(UsageError, match="expected the address of a job server"):
        connect(address)


def test_a_server_that_is_none_is_told_from_one_that_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_server, "_ANSWER_TIMEOUT_S", 1.0)
    with pytest.raises(UsageError, match="no Ray job server can be reached there"):
        connect("http://127.0.0.1:9")
    with answering_with(200, b"<html>", delay_s=20) as address, pytest.raises(UsageError, match="no Ray job server can be reached there"):
        connect(address)
    for status, body in ((200, b"<html>"), (200, b"{}"), (404, b""), (500, b"")):
        with answering_with(status, body) as address, pytest.raises(UsageError, match="what answers there is no Ray job server"):
            connect(address)
    for status in (401, 403):
        with answering_with(status, b"") as address, pytest.raises(UsageError, match="refused without its token"):
            connect(address)
    ours = json.dumps({"ray_version": ray.__version__}).encode()
    with (
        answering_with(500, b"starting", version=ours) as address,
        pytest.raises(SentinodeError, match=r"the job server answers with an error \(.*500.*\); repeat the command") as caught,
    ):
        connect(address)
    assert caught.value.exit_code == 1
    with answering_with(200, json.dumps({"ray_version": "2.50.1"}).encode()) as address, pytest.raises(UsageError) as caught:
        connect(address)
    assert "2.50.1" in str(caught.value)
    assert ray.__version__ in str(caught.value)


class FakeJobs:
    """A job server's client whose answers are given: the jobs it knows, one list for each time it is asked, and what each look at the log brings."""

    _address = "http://127.0.0.1:9"

    def __init__(self, jobs: list[list[SimpleNamespace] | Exception], logs: list[list[str | Exception | None]] | None = None) -> None:
        self._jobs, self._logs = jobs, logs or []
        self.submitted: list[str] = []

    def _next(self) -> list[SimpleNamespace]:
        # The last answer stays.
        answer = self._jobs.pop(0) if len(self._jobs) > 1 else self._jobs[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def list_jobs(self) -> list[SimpleNamespace]:
        return self._next()

    def get_job_info(self, submission_id: str) -> SimpleNamespace:
        return next(one for one in self._next() if one.submission_id == submission_id)

    def stop_job(self, submission_id: str) -> None:
        pass

    def time_s(self) -> float:
        return time.time()

    log: "str | Exception" = ""

    def get_job_logs(self, submission_id: str) -> str:
        if isinstance(self.log, Exception):
            raise self.log
        return self.log

    def submit_job(self, *, submission_id: str, **options: Any) -> None:
        self.submitted.append(submission_id)

    async def tail_job_logs(self, submission_id: str) -> AsyncIterator[str]:
        for chunk in self._logs.pop(0) if self._logs else []:
            if isinstance(chunk, Exception):
                raise chunk
            if chunk is None:
                await asyncio.Event().wait()
            else:
                yield chunk


def job(status: str, name: str = "mine", **changes: Any) -> SimpleNamespace:
    facts = {
        "entrypoint": check_command("train", TRAIN).entrypoint,
        "driver_node_id": "n",
        "start_time": time.time() * 1000,
        "driver_exit_code": None,
        "message": None,
    }
    return SimpleNamespace(submission_id=name, status=SimpleNamespace(value=status), **facts | changes)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is waited for long, and the driver's node is there."""
    for name in ("_POLL_S", "_SILENT_S", "_LOST_TIMEOUT_S", "_STOP_TIMEOUT_S"):
        monkeypatch.setattr(job_server, name, 0.05)
    monkeypatch.setattr(job_server, "get_node", lambda *_, **__: SimpleNamespace(state="ALIVE"))


@pytest.mark.parametrize("node", [None, SimpleNamespace(state="DEAD")])
def test_a_job_whose_node_is_gone_is_lost_whatever_ray_says(quick: None, node: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_server, "get_node", lambda *_, **__: node)
    with pytest.raises(JobError, match="mine was lost with the node of its driver; submitted again, it continues"):
        follow(FakeJobs([[job("RUNNING")]]), "mine")
    command = check_command("train", TRAIN)
    client = FakeJobs([[job("RUNNING", command.submission_id)]])
    assert submit(client, command) == (f"{command.submission_id}-2", True)
    assert client.submitted == [f"{command.submission_id}-2"]


def test_a_job_that_runs_is_not_submitted_twice(quick: None) -> None:
    command = check_command("train", TRAIN)
    client = FakeJobs([[job("FAILED", command.submission_id), job("RUNNING", f"{command.submission_id}-2")]])
    assert submit(client, command) == (f"{command.submission_id}-2", False)
    assert client.submitted == []


def test_a_later_attempt_is_one_above_the_last_whatever_was_deleted(quick: None) -> None:
    command = check_command("train", TRAIN)
    client = FakeJobs([[job("FAILED", f"{command.submission_id}-2"), job("FAILED", f"{command.submission_id}-7")]])
    assert submit(client, command) == (f"{command.submission_id}-8", True)


def test_a_job_of_another_command_is_never_taken_for_ours(quick: None) -> None:
    command = check_command("train", TRAIN)
    theirs = job("RUNNING", "nightly-2", entrypoint="python other.py")
    assert submit(FakeJobs([[theirs]]), command, "nightly") == ("nightly-3", True)
    assert submit(FakeJobs([[theirs, job("SUCCEEDED", "nightly")]]), command, "nightly") == ("nightly", False)
    with pytest.raises(UsageError, match=r"^nightly: is the id of another command \(python other.py\); choose another --id$"):
        submit(FakeJobs([[job("SUCCEEDED", "nightly", entrypoint="python other.py")]]), command, "nightly")


def test_the_same_name_with_another_configuration_in_the_file_is_another_command(quick: None, tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("epochs: 3\n")
    before = check_command("train", [*TRAIN, "--config", str(config)])
    done = job("SUCCEEDED", "nightly", entrypoint=before.entrypoint)
    assert submit(FakeJobs([[done]]), before, "nightly") == ("nightly", False)
    config.write_text("epochs: 300\n")
    with pytest.raises(UsageError, match="nightly: is the id of another command"):
        submit(FakeJobs([[done]]), check_command("train", [*TRAIN, "--config", str(config)]), "nightly")


def test_a_job_that_a_lost_head_never_started_is_lost(quick: None) -> None:
    old = time.time() * 1000 - 3_600_000
    with pytest.raises(JobError, match="mine was lost"):
        follow(FakeJobs([[job("PENDING", driver_node_id=None, start_time=old)]]), "mine")
    # One that waits for its environment is not.
    client = FakeJobs([[job("PENDING", driver_node_id=None)], [job("SUCCEEDED")]])
    assert follow(client, "mine").status.value == "SUCCEEDED"


def test_a_job_that_the_cluster_does_not_know_any_more_is_lost(quick: None) -> None:
    with pytest.raises(JobError, match="mine was lost: the cluster does not know it any more"):
        follow(FakeJobs([[job("RUNNING", "another")]]), "mine")


def test_a_log_is_told_once_however_often_it_breaks_off_or_is_silent(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    logs: list[list[str | Exception | None]] = [["one\n", RuntimeError("closed")], ["one\ntw", None], ["one\n", "two\nthree\n"]]
    client = FakeJobs([[job("RUNNING")], [job("RUNNING")], [job("SUCCEEDED")]], logs)
    assert follow(client, "mine").status.value == "SUCCEEDED"
    assert capsys.readouterr().out == "one\ntwo\nthree\n"


@pytest.mark.parametrize("status", ["SUCCEEDED", "FAILED"])
def test_the_line_for_programs_is_not_for_people_but_of_a_failure_everything_is(quick: None, capsys: pytest.CaptureFixture[str], status: str) -> None:
    # Cut anywhere, a line in between that only looks like it, and read again from the start.
    logs: list[list[str | Exception | None]] = [
        ["one\n{two", "}\nthree", "\n", RuntimeError("closed")],
        ["one\n{two}\nthree\n{", '"bundle": ', None],
        ['one\n{two}\nthree\n{"bundle": "b"}\n'],
    ]
    client = FakeJobs([[job("RUNNING")], [job("RUNNING")], [job(status)]], logs)
    assert follow(client, "mine").status.value == status
    assert capsys.readouterr().out == "one\n{two}\nthree\n" + ('{"bundle": "b"}\n' if status == "FAILED" else "")


def test_a_job_server_that_comes_back_is_followed_on(quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(job_server, "_LOST_TIMEOUT_S", 30)
    away: list[list[SimpleNamespace] | Exception] = [ConnectionError(), RuntimeError("status code 500")]
    assert follow(FakeJobs([*away, [job("RUNNING")], [job("SUCCEEDED")]]), "mine").status.value == "SUCCEEDED"
    assert capsys.readouterr().out.splitlines() == ["the job server does not answer; asking again for 30 s", "the job server answers again"]


def test_a_job_server_that_stays_away_is_waited_for_so_long_and_no_longer(quick: None) -> None:
    with pytest.raises(SentinodeError, match="does not answer any more; mine may go on"):
        follow(FakeJobs([ConnectionError()]), "mine")


def test_ages_of_jobs_go_by_the_server_s_clock(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two hours behind this machine's.
    now_s = time.time() - 7200
    monkeypatch.setattr(FakeJobs, "time_s", lambda self: now_s)
    client = FakeJobs([[job("PENDING", driver_node_id=None, start_time=now_s * 1000)], [job("SUCCEEDED")]])
    assert follow(client, "mine").status.value == "SUCCEEDED"


def test_the_server_s_clock_is_read_from_its_answers() -> None:
    with answering_with(200, json.dumps({"ray_version": ray.__version__}).encode()) as address:
        assert abs(job_server.Jobs(address).time_s() - time.time()) < 60


@pytest.mark.parametrize("log", ["", "  \n", ConnectionError(), RuntimeError("status code 500")])
def test_a_success_whose_log_is_gone_is_known_by_what_it_made(log: "str | Exception", tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = check_command("train", ["--data", "/d", "--out", str(tmp_path / "run")])
    client = FakeJobs([[]])
    client.log = log
    with pytest.raises(JobError, match="mine has succeeded, but its log, and with it its result, cannot be had any more"):
        outcome(client, command, "mine", job("SUCCEEDED"))
    (tmp_path / "run" / "bundle").mkdir(parents=True)
    with pytest.raises(JobError, match=r"Ray calls mine a success, but .* has no bundle/bundle\.json"):
        outcome(client, command, "mine", job("SUCCEEDED"))
    (tmp_path / "run" / "bundle" / "bundle.json").touch()
    assert outcome(client, command, "mine", job("SUCCEEDED")) is None
    assert capsys.readouterr().out.splitlines()[-1] == "the log of mine, and with it what it told of its result, is gone; what it made is there"
    client.log = 'epoch 1\n{"bundle": "b"}\n'
    assert outcome(client, command, "mine", job("SUCCEEDED")) == {"bundle": "b"}
    client.log = "epoch 1\n"
    with pytest.raises(JobError, match="did not end with its result"):
        outcome(client, command, "mine", job("SUCCEEDED"))


@pytest.mark.parametrize("code", [-9, 137])
def test_a_driver_that_was_killed_is_told_from_one_that_failed(code: int) -> None:
    command = check_command("train", TRAIN)
    with pytest.raises(JobError, match="mine was killed by signal 9; submitted again, it continues") as caught:
        outcome(FakeJobs([[]]), command, "mine", job("FAILED", driver_exit_code=code))
    assert caught.value.exit_code == 1


def test_a_job_that_does_not_stop_is_not_waited_for_for_ever(quick: None) -> None:
    with pytest.raises(SentinodeError, match="mine was told to stop, but goes on"):
        stop(FakeJobs([[job("RUNNING")]]), "mine")


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with head_with_token() as head:
        yield head


@pytest.mark.slow
@pytest.mark.ray
def test_a_verb_runs_as_a_job_and_its_exit_code_is_ours(head: Head, tmp_path: Path) -> None:
    source = synthesize(tmp_path / "source", 120, 1)
    prepare = ("submit", "prepare", "--source", source, "--out", tmp_path / "data")
    done = head.run("sentinode", *prepare, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["submission_id"].startswith("prepare-")
    assert (tmp_path / "data/dataset.json").is_file()
    # Again: a new attempt, of a verb that finds it done.
    again = head.run("sentinode", *prepare)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"submitted: {told['submission_id']}-2" in again.stdout
    assert "already complete" in again.stdout
    # What only the cluster can know is the job's to refuse, with its own code.
    refused = head.run("sentinode", "submit", "prepare", "--source", tmp_path / "nowhere", "--out", tmp_path / "other")
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert "failed with exit code 2" in refused.stderr
    # And what can be known here is refused here.
    wrong = head.run("sentinode", "submit", "train", *TRAIN, "--set", "epoch=3")
    assert wrong.returncode == 2
    assert "submitted" not in wrong.stdout


@pytest.mark.ray
@pytest.mark.parametrize("token", [None, "wrong" * 16])
def test_without_the_token_nothing_is_taken(head: Head, token: str | None, tmp_path: Path) -> None:
    began = time.monotonic()
    refused = head.run("sentinode", "submit", "prepare", "--source", tmp_path, "--out", tmp_path / "data", token=token)
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert "token" in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert time.monotonic() - began < 30


@pytest.mark.slow
@pytest.mark.ray
def test_ctrl_c_detaches_and_stop_stops(head: Head, tmp_path: Path) -> None:
    source = synthesize(tmp_path / "source", 120, 1)
    assert head.run("sentinode", "submit", "prepare", "--source", source, "--out", tmp_path / "data").returncode == 0
    # Far from its end whenever it is stopped: it would end early by itself on a machine that is slow to start the commands below.
    sets = (
        "epochs=5000",
        "early_stopping_patience_epochs=null",
        "arch=resnet18",
        "weights=none",
        "unfreeze_depth=5",
        "input_size_px=32",
        "batch_size=8",
    )
    train = ("submit", "train", "--data", tmp_path / "data", "--out", tmp_path / "run", "--set", *sets)
    command = [sys.executable, "-m", "ray_jobs.cli", *map(str, train)]
    following = subprocess.Popen(
        command, env=head.environment_with(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert following.stdout is not None
    lines = iter(following.stdout.readline, "")
    name = next(line for line in lines if line.startswith("submitted: ")).split()[1]
    next(line for line in lines if line.startswith("epoch 1"))
    following.send_signal(signal.SIGINT)
    _, error = following.communicate(timeout=60)
    assert following.returncode == 3
    assert f"detached; {name} goes on" in error
    # The same command again follows the job that runs; it is not a second one.
    again = head.run("sentinode", *train, "--detach")
    assert again.returncode == 0, again.stderr
    assert f"already there: {name}" in again.stdout
    stopped = head.run("sentinode", "submit", "--stop", name)
    assert stopped.returncode == 0, stopped.stderr
    assert f"{name}: stopped" in stopped.stdout
    assert list((tmp_path / "run").glob("checkpoint_*"))
    unknown = head.run("sentinode", "submit", "--stop", "nothing-1")
    assert unknown.returncode == 2
    assert "there is no such job" in unknown.stderr
