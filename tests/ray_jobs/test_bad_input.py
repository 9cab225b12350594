"""What cannot work is said within half a minute, in one line: addresses where no Ray is, and storage that is not there."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.synth import synthesize
from tests import s3
from tests.factories import make_bundle
from tests.processes import ROOT
from tests.strangers import answering_with

pytestmark = pytest.mark.slow

ANSWER_S = 60
"""Half a minute, on a machine that may be busy with other work."""


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with patches and a bundle."""
    folder = tmp_path_factory.mktemp("things")
    synthesize(folder / "patches", 20, 1)
    make_bundle(folder / "bundle")
    return folder


@pytest.fixture(scope="module")
def closed_port() -> Iterator[int]:
    """A port that is taken, and at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield probe.getsockname()[1]


def refused(exit_code: int, *argv: str | Path, **variables: str) -> str:
    """Run a command that must fail soon, with one line for its error; warnings may stand before it. Return what it said."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | variables
    began = time.monotonic()
    command = [sys.executable, "-m", "ray_jobs.cli", *map(str, argv)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180)
    took_s = time.monotonic() - began
    said = done.stdout + done.stderr
    assert done.returncode == exit_code, said
    assert [line.startswith("sentinode: ") for line in done.stderr.splitlines()].count(True) == 1, said
    assert done.stderr.splitlines()[-1].startswith("sentinode: "), said
    assert "Traceback" not in said
    assert s3.SECRET not in said
    assert took_s < ANSWER_S, f"{took_s:.0f} s: {said}"
    return said


@pytest.mark.parametrize("verb", ["prepare", "predict", "serve"])
def test_a_verb_whose_ray_is_not_there(things: Path, closed_port: int, tmp_path: Path, verb: str) -> None:
    arguments: list[str | Path] = {
        "prepare": ["--source", things / "patches", "--out", tmp_path / "data"],
        "predict": ["--bundle", things / "bundle", "--source", things / "patches/train", "--out", tmp_path / "p.parquet"],
        "serve": ["--bundle", things / "bundle", "--port", "0", "--set", "auth=none"],
    }[verb]
    assert "no Ray cluster can be reached there (Connection refused)" in refused(2, verb, *arguments, RAY_ADDRESS=f"127.0.0.1:{closed_port}")
    with answering_with(200, b"<html>") as url:
        assert "what listens there is something else" in refused(2, verb, *arguments, RAY_ADDRESS=url.removeprefix("http://"))


@pytest.mark.parametrize("command", ["submit", "doctor"])
def test_a_job_server_that_is_not_there(closed_port: int, tmp_path: Path, command: str) -> None:
    arguments = ["prepare", "--source", tmp_path, "--out", tmp_path / "out"] if command == "submit" else []
    code = 2 if command == "submit" else 1
    gone = f"http://127.0.0.1:{closed_port}"
    assert f"{gone}: no Ray job server can be reached there" in refused(code, command, *arguments, "--address", gone)
    with answering_with(200, b"<html>") as url:
        assert f"{url}: what answers there is no Ray job server" in refused(code, command, *arguments, "--address", url)
    with answering_with(200, b'{"ray_version": "2.50.1"}') as url:
        assert f"{url} runs Ray 2.50.1" in refused(code, command, *arguments, "--address", url)


STORAGE = ["prepare --source", "prepare --out", "train --data", "verify", "doctor --storage"]


def _with_storage(name: str, things: Path, tmp_path: Path, uri: str) -> list[str | Path]:
    return {
        "prepare --source": ["prepare", "--source", uri, "--out", tmp_path / "data"],
        "prepare --out": ["prepare", "--source", things / "patches", "--out", uri, "--work", tmp_path / "work"],
        "train --data": ["train", "--data", uri, "--out", tmp_path / "run"],
        "verify": ["verify", uri],
        "doctor --storage": ["doctor", "--storage", uri],
    }[name]


@pytest.mark.parametrize("name", STORAGE)
def test_a_store_that_is_not_there(things: Path, closed_port: int, s3_server: s3.Server, tmp_path: Path, name: str) -> None:
    command = _with_storage(name, things, tmp_path, "s3://bucket/folder")
    assert "the storage does not answer" in refused(1, *command, AWS_ENDPOINT_URL=f"http://127.0.0.1:{closed_port}")


@pytest.mark.parametrize("name", STORAGE)
def test_a_bucket_that_is_not_there(things: Path, s3_server: s3.Server, tmp_path: Path, name: str) -> None:
    uri = "s3://no-such-bucket-of-ours/folder"
    said = refused(1 if name == "doctor --storage" else 2, *_with_storage(name, things, tmp_path, uri))
    assert uri in said
    assert "there is no such bucket" in said
