"""On one machine, without a cluster: what the Ray that we start listens to, where secrets are, and what is written to the home folder."""

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import psutil
import pytest

from serve.local import usable_port
from tests.factories import make_bundle
from tests.listeners import command_lines_below, known_beyond, listeners_below
from tests.processes import ROOT, Running

pytestmark = [pytest.mark.ray, pytest.mark.slow]

KEY = "an-api-key-that-nothing-may-show"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Of a user who has set nothing: an empty home, and Ray left to guard itself."""
    home = tmp_path / "home"
    home.mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MPL", "XDG_", "TORCH"))}
    return kept | {"HOME": str(home), "RAY_TMPDIR": os.environ["RAY_TMPDIR"]}


def in_home(environment: dict[str, str]) -> list[str]:
    home = Path(environment["HOME"])
    return [str(path.relative_to(home)) for path in home.rglob("*")]


def run(environment: dict[str, str], *argv: str | Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "ray_jobs.cli", *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_verbs_write_nothing_to_the_home_folder(environment: dict[str, str], tmp_path: Path) -> None:
    patches, data, out = tmp_path / "patches", tmp_path / "data", tmp_path / "run"
    quick = ["arch=resnet18", "weights=none", "input_size_px=32", "epochs=1", "batch_size=16"]
    for argv in (
        ["synth", "--out", patches, "--count", "120"],
        ["prepare", "--source", patches, "--out", data],
        ["train", "--data", data, "--out", out, "--set", *quick],
        ["evaluate", "--bundle", out / "bundle", "--data", data, "--out", tmp_path / "report", "--set", "bootstrap_samples=100", "robustness_rows=0"],
        ["verify", out / "bundle"],
        ["doctor"],
    ):
        done = run(environment, *argv)
        assert done.returncode == 0, done.stdout + done.stderr
        assert in_home(environment) == [], argv[0]


@pytest.mark.serve
def test_the_local_endpoint_is_for_this_machine_and_shows_no_secret(environment: dict[str, str], tmp_path: Path) -> None:
    # A short path: Ray puts unix sockets below it.
    with TemporaryDirectory(prefix="sn-", dir="/tmp") as folder:
        _serve_and_look(environment | {"SENTINODE_API_KEYS": KEY, "RAY_TMPDIR": folder}, make_bundle(tmp_path / "bundle").path)
    assert in_home(environment) == []


def _serve_and_look(environment: dict[str, str], bundle: Path) -> None:
    port = usable_port("127.0.0.1", 0)
    command = [sys.executable, "-m", "ray_jobs.cli", "serve", "--bundle", str(bundle), "--port", str(port), "--set", "max_replicas=1"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        server, root = Running(process), psutil.Process(process.pid)
        with command_lines_below(root) as command_lines:
            server.wait_for_line("ready: ", 240)
            assert httpx.get(f"http://127.0.0.1:{port}/v1/model", headers={"X-API-Key": KEY}, timeout=60, trust_env=False).status_code == 200
            listeners = listeners_below(root)
            tokens = {child.environ().get("RAY_AUTH_TOKEN") for child in root.children(recursive=True)}
            beyond = known_beyond(listeners)
        assert {listener.host for listener in listeners if listener.port == port} == {"127.0.0.1"}
        # The dashboard and its job server, which would run any code.
        assert {listener.host for listener in listeners - beyond if listener.kind == "dashboard"} == {"127.0.0.1"}
        assert {"raylet", "gcs_server", "worker", "our command"} <= {listener.kind for listener in beyond}
    finally:
        process.terminate()
        process.wait(120)
    (token,) = tokens - {None}
    assert token is not None
    told = {"ps": "\n".join(command_lines), "what it said": "".join(server.lines)}
    told |= {str(path): path.read_bytes().decode("latin-1") for path in Path(environment["RAY_TMPDIR"], "ray").rglob("*") if path.is_file()}
    assert [f"in {where}" for where, text in told.items() if token in text or KEY in text] == []
    assert any("gcs_server.out" in where for where in told)
