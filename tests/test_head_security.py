"""A cluster as a platform team runs it: the endpoint deployed to a head with a token, what strangers get, what listens, and where secrets are."""

import json
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml

from data_prep.synth import synthesize
from sentinode.predictor import Predictor
from serve.auth import new_key
from serve.check import check_serve_file
from serve.local import usable_port
from tests import s3
from tests.factories import make_bundle, random_patches
from tests.heads import Head, head_with_token
from tests.listeners import BEYOND_THIS_MACHINE, command_lines_below, known_beyond, listeners_below
from tests.processes import ROOT
from tests.serve.patch_files import encode

pytestmark = [pytest.mark.ray, pytest.mark.serve, pytest.mark.slow, pytest.mark.timeout(1200)]

KEY = "an-api-key-that-nothing-may-show"
REFUSAL_S = 60
"""Half a minute, on a machine that may be busy with other work."""


@dataclass(frozen=True)
class Endpoint:
    """Our application on the head."""

    url: str
    config: Path
    bundle: Path
    command_lines: set[str]
    """Of all the head's processes so far."""


@pytest.fixture(scope="module")
def head(s3_server: s3.Server) -> Iterator[Head]:
    with head_with_token(more=s3_server.environment | {"SENTINODE_API_KEYS": KEY}) as head:
        yield head


@pytest.fixture(scope="module")
def endpoint(head: Head, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """The shipped config, deployed with the token; only the port and the bundle are another."""
    folder = tmp_path_factory.mktemp("deployed")
    bundle = make_bundle(folder / "bundle").path
    config = yaml.safe_load((ROOT / "serve/config.yaml").read_text())
    port = usable_port("127.0.0.1", 0)
    config["http_options"]["port"] = port
    config["applications"][0]["args"] |= {"bundle": str(bundle), "max_replicas": 1}
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    check_serve_file(file)
    with command_lines_below(head.process) as seen:
        deployed = head.run("serve", "deploy", file, "--address", head.job_server)
        assert deployed.returncode == 0, deployed.stdout + deployed.stderr
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(url, 180)
        yield Endpoint(url, file, bundle, seen)


def _wait_until_ready(url: str, deadline_s: float) -> None:
    end, poll = time.monotonic() + deadline_s, threading.Event()
    while True:
        try:
            if httpx.get(f"{url}/readyz", timeout=30, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        assert time.monotonic() < end, "not ready in time"
        poll.wait(0.2)


def predict(url: str, key: str | None) -> httpx.Response:
    files = {"file": ("p.tif", encode(random_patches(1)[0], "TIFF"))}
    return httpx.post(f"{url}/predict", files=files, headers={"X-API-Key": key} if key else {}, timeout=60, trust_env=False)


def test_what_is_deployed_with_the_token_answers(head: Head, endpoint: Endpoint) -> None:
    status = head.run("serve", "status", "--address", head.job_server)
    assert status.returncode == 0
    assert "RUNNING" in status.stdout
    expected = Predictor.load(endpoint.bundle).decide(random_patches(1))[0].probability
    assert predict(endpoint.url, KEY).raise_for_status().json()["probabilities"]["Metastatic"] == pytest.approx(expected, abs=1e-5)
    # Ray's token is no key of the endpoint's.
    for key in (None, "wrong", head.environment["RAY_AUTH_TOKEN"]):
        assert predict(endpoint.url, key).status_code == 401


def test_a_key_that_was_taken_out_of_the_file_is_refused_once_another_revision_is_deployed(head: Head, endpoint: Endpoint, tmp_path: Path) -> None:
    (key, line), keys = new_key("viewer"), tmp_path / "keys"
    config = yaml.safe_load(endpoint.config.read_text())

    def deploy(revision: str, content: str) -> None:
        keys.write_text(content)
        config["applications"][0]["args"] |= {"api_keys_file": str(keys), "revision": revision}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        deployed = head.run("serve", "deploy", tmp_path / "config.yaml", "--address", head.job_server)
        assert deployed.returncode == 0, deployed.stdout + deployed.stderr

    try:
        deploy("1", f"{line}\n")
        _wait_for_answer(endpoint.url, key, 200)
        deploy("2", "# nobody any more\n")
        _wait_for_answer(endpoint.url, key, 401)
        assert predict(endpoint.url, KEY).status_code == 200
    finally:
        head.run("serve", "deploy", endpoint.config, "--address", head.job_server)
        _wait_for_answer(endpoint.url, KEY, 200)


def _wait_for_answer(url: str, key: str, status: int, deadline_s: float = 180) -> None:
    end, poll = time.monotonic() + deadline_s, threading.Event()
    while predict(url, key).status_code != status:
        assert time.monotonic() < end, f"never {status}"
        poll.wait(0.2)


STRANGERS = [
    "serve deploy",
    "serve status",
    "serve shutdown",
    "ray job submit",
    "sentinode submit",
    "sentinode doctor",
    "sentinode predict",
    "driver",
]


@pytest.mark.parametrize("token", [None, "wrong" * 16], ids=["without a token", "with a wrong one"])
@pytest.mark.parametrize("name", STRANGERS)
def test_a_stranger_is_refused(head: Head, endpoint: Endpoint, tmp_path: Path, name: str, token: str | None) -> None:
    source = synthesize(tmp_path / "source", 8, 1)
    predicting = ["predict", "--bundle", endpoint.bundle, "--source", source / "train", "--out", tmp_path / "out.parquet"]
    command = {
        "serve deploy": ["serve", "deploy", endpoint.config, "--address", head.job_server],
        "serve status": ["serve", "status", "--address", head.job_server],
        "serve shutdown": ["serve", "shutdown", "--yes", "--address", head.job_server],
        "ray job submit": ["ray", "job", "submit", "--", "python", "-c", f"open('{tmp_path}/ran', 'w')"],
        "sentinode submit": ["sentinode", "submit", *predicting],
        "sentinode doctor": ["sentinode", "doctor", "--address", head.job_server],
        # As a driver: RAY_ADDRESS names the head.
        "sentinode predict": ["sentinode", *predicting],
        "driver": [sys.executable, "-c", f"import ray; ray.init(); open('{tmp_path}/ran', 'w')"],
    }[name]
    began = time.monotonic()
    refused = head.run(*command, token=token, more={"RAY_ADDRESS": head.ray_address} if name in ("driver", "sentinode predict") else None)
    took_s = time.monotonic() - began
    said = refused.stdout + refused.stderr
    # Ray's own `serve shutdown` ends with 0 although it was refused.
    assert refused.returncode != 0 or (name == "serve shutdown" and "Unable to shutdown Serve" in said), said
    assert took_s < REFUSAL_S, said
    assert "oken" in said
    if name.startswith("sentinode"):
        assert refused.stderr.count("\n") == 1, said
        assert "Traceback" not in said
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out.parquet").exists()
    # What a message shows is not what was offered.
    assert "wrong" * 16 not in said
    assert httpx.get(f"{endpoint.url}/readyz", timeout=60, trust_env=False).status_code == 200


def test_what_other_machines_could_reach_is_rays_own_and_known(head: Head, endpoint: Endpoint) -> None:
    listeners = listeners_below(head.process)
    ours = {head.job_server.rpartition(":")[2], endpoint.url.rpartition(":")[2]}
    assert {listener.host for listener in listeners if str(listener.port) in ours} == {"127.0.0.1"}
    beyond = known_beyond(listeners)
    # The list holds nothing that is not there.
    assert {listener.kind for listener in beyond} == set(BEYOND_THIS_MACHINE) - {"our command"}


SHOWN_BY_THE_DASHBOARD = [
    "api/jobs/",
    "api/serve/applications/",
    "api/v0/actors?detail=1",
    "api/v0/workers?detail=1",
    "api/v0/runtime_envs?detail=1",
    "nodes?view=summary",
]


def test_secrets_are_in_no_command_line_log_result_or_answer(head: Head, endpoint: Endpoint, s3_server: s3.Server, tmp_path: Path) -> None:
    secrets = {"the API key": KEY, "Ray's token": head.environment["RAY_AUTH_TOKEN"], "the store's secret": s3.SECRET}
    bucket = s3_server.new_bucket()
    source = synthesize(tmp_path / "source", 120, 1)
    run, quick = tmp_path / "run", ["arch=resnet18", "weights=none", "input_size_px=32", "epochs=0"]
    road = [
        ["prepare", "--source", source, "--out", f"{bucket}/data", "--work", tmp_path / "work"],
        ["train", "--data", f"{bucket}/data", "--out", run, "--set", *quick],
        ["evaluate", "--bundle", run / "bundle", "--data", f"{bucket}/data", "--out", tmp_path / "report", "--set", "robustness_rows=0"],
        ["predict", "--bundle", run / "bundle", "--source", source / "train", "--out", tmp_path / "p.parquet"],
    ]
    told = {}
    for command in road:
        done = head.run("sentinode", "submit", *command, "-v")
        assert done.returncode == 0, done.stdout + done.stderr
        told[f"submit {command[0]} -v"] = done.stdout + done.stderr
    assert predict(endpoint.url, KEY).status_code == 200
    # Not through `sentinode submit`, which would look first.
    failing = ["python", "-m", "ray_jobs.prepare", "--source", "s3://no-such-bucket-of-ours/a", "--out", tmp_path / "none", "-v"]
    missing = head.run("ray", "job", "submit", "--working-dir", ROOT, "--", *failing)
    assert missing.returncode != 0
    assert "there is no such bucket" in missing.stdout
    told["a bucket that is not there"] = missing.stdout + missing.stderr
    for line in (["ray", "job", "list"], ["ray", "status"], ["serve", "config", "-a", head.job_server], ["serve", "status", "-a", head.job_server]):
        done = head.run(*line, more={"RAY_ADDRESS": head.ray_address} if line[1] == "status" else None)
        assert done.returncode == 0, done.stdout + done.stderr
        told[" ".join(line[:3])] = done.stdout + done.stderr
    bearer = {"Authorization": f"Bearer {head.environment['RAY_AUTH_TOKEN']}"}
    for path in SHOWN_BY_THE_DASHBOARD:
        answer = httpx.get(f"{head.job_server}/{path}", headers=bearer, timeout=60, trust_env=False)
        assert answer.status_code == 200, (path, answer.text[:300])
        told[path] = answer.text
    assert len(json.loads(told["api/jobs/"])) >= len(road) + 1
    assert "build_app" in told["serve config -a"]
    told["ps"] = "\n".join(endpoint.command_lines)
    assert "-m ray_jobs.train" in told["ps"]
    for folder in (head.folder, run, tmp_path / "work", tmp_path / "report", tmp_path / "p.parquet"):
        told |= {str(path): path.read_bytes().decode("latin-1") for path in folder.rglob("*") if path.is_file()}
    for key in s3_server.keys(bucket):
        told[f"{bucket}/{key}"] = s3_server.client().get_object(Bucket=bucket.removeprefix("s3://"), Key=key)["Body"].read().decode("latin-1")
    leaks = [f"{name} is in {where}" for where, text in told.items() for name, secret in secrets.items() if secret in text]
    assert leaks == []
    assert len(told) > 100


def test_a_job_left_to_itself_and_everything_before_wrote_nothing_home(head: Head, endpoint: Endpoint, tmp_path: Path) -> None:
    source = synthesize(tmp_path / "source", 40, 1)
    detached = head.run("sentinode", "submit", "prepare", "--source", source, "--out", tmp_path / "data", "--detach", "--json")
    assert detached.returncode == 0, detached.stderr
    followed = head.run("sentinode", "submit", "prepare", "--source", source, "--out", tmp_path / "data")
    assert followed.returncode == 0, followed.stdout + followed.stderr
    assert [str(path.relative_to(head.home)) for path in head.home.rglob("*")] == []


def test_a_bundle_that_is_not_there_is_told_in_the_status(head: Head, endpoint: Endpoint, tmp_path: Path) -> None:
    """The last one: what it deploys takes the endpoint's place."""
    config = yaml.safe_load(endpoint.config.read_text())
    config["applications"][0]["args"]["bundle"] = str(tmp_path / "nowhere")
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    # What Serve says here is only that it was asked.
    assert head.run("serve", "deploy", file, "--address", head.job_server).returncode == 0
    end, poll = time.monotonic() + 120, threading.Event()
    while "DEPLOY_FAILED" not in (told := head.run("serve", "status", "--address", head.job_server).stdout):
        assert time.monotonic() < end, told
        poll.wait(0.5)
    assert f"not a model bundle: {tmp_path}/nowhere" in told
    assert "Traceback" not in told
