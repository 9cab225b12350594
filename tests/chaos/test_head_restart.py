"""The head of a cluster is killed and started again, as docs/cluster.md says: what comes back by itself, and what must be submitted again.

The head is a new machine each time, with the same address: of the old one's disk nothing is left. Its state is in a Redis outside of it, or gone.
"""

import io
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from PIL import Image

from sentinode.bundle import Bundle
from sentinode.dataset import PreparedDataset
from tests.factories import make_bundle, make_dataset, random_patches
from tests.heads import RAY, Head, HeadMachine, lasting_port, machine_for_a_head
from tests.processes import ROOT, Running, sentinode
from tests.redis_server import redis_server

pytestmark = [pytest.mark.chaos, pytest.mark.ray]

# Longer than the 60 s after which Ray's own setting ends the nodes.
AWAY_S = 75
WAIT_FOR_HEAD = {"RAY_gcs_rpc_server_reconnect_timeout_s": "600"}
EPOCHS = 12
SETTINGS = ["arch=resnet18", "weights=none", "unfreeze_depth=5", "input_size_px=32", f"epochs={EPOCHS}", "batch_size=8", "learning_rate=1e-3"]
SETTINGS += ["early_stopping_patience_epochs=null", "workers=2"]


@contextmanager
def machine_with_redis() -> Iterator[HeadMachine]:
    """A place for a head that runs no work, and keeps its state in a Redis."""
    with redis_server() as redis:
        # The code is installed on every node, as cluster.yaml does.
        environment = {"RAY_REDIS_ADDRESS": redis.address, "RAY_external_storage_namespace": "sentinode", "PYTHONPATH": str(ROOT)}
        with machine_for_a_head(0, environment | WAIT_FOR_HEAD, [f"--redis-password={redis.password}"]) as machine:
            yield machine


class Endpoint:
    """An endpoint with a proxy on the head and one on a node, and the answer to one patch, which is always the same."""

    def __init__(self, folder: Path) -> None:
        self.head_port, self.node_port = lasting_port(), lasting_port()
        patch = io.BytesIO()
        Image.fromarray(random_patches(1, seed=5)[0]).save(patch, "PNG")
        self._patch = patch.getvalue()
        config: dict[str, Any] = yaml.safe_load((ROOT / "serve/config.yaml").read_text())
        config["proxy_location"] = "EveryNode"
        config["http_options"]["port"] = self.head_port
        bundle = str(make_bundle(folder / "bundle").path)
        config["applications"][0]["args"] |= {"bundle": bundle, "auth": "none", "engine": "torch", "min_replicas": 2, "max_replicas": 2}
        self.config = folder / "config.yaml"
        self.config.write_text(yaml.safe_dump(config))

    def answer(self, port: int) -> Any:
        """The probabilities of the patch, or what came instead."""
        try:
            answer = httpx.post(f"http://127.0.0.1:{port}/predict", files={"file": ("patch.png", self._patch)}, timeout=30, trust_env=False)
            return answer.json()["probabilities"] if answer.status_code == 200 else answer.status_code
        except httpx.HTTPError as error:
            return type(error).__name__

    def wait_for(self, port: int, timeout_s: float = 240) -> Any:
        """Wait for an answer with probabilities."""
        end = time.monotonic() + timeout_s
        while not isinstance(answer := self.answer(port), dict):
            assert time.monotonic() < end, answer
        return answer


def replicas(node: "subprocess.Popen[bytes]") -> set[int]:
    return {process.pid for process in psutil.Process(node.pid).children(recursive=True) if "ray::ServeReplica" in " ".join(process.cmdline())}


@pytest.mark.serve
@pytest.mark.timeout(1200)
def test_an_endpoint_goes_on_without_its_head_and_comes_back_with_it(tmp_path: Path) -> None:
    endpoint = Endpoint(tmp_path)
    with machine_with_redis() as machine:
        machine.start()
        # Two proxies on one machine need two ports.
        node = machine.join(4, {"RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(endpoint.node_port)})
        command = [str(Path(RAY).with_name("serve")), "deploy", str(endpoint.config), "--address", machine.head.job_server]
        subprocess.run(command, env=dict(os.environ) | machine.head.environment, check=True, capture_output=True, timeout=120)
        expected = endpoint.wait_for(endpoint.head_port)
        assert endpoint.wait_for(endpoint.node_port) == expected
        before = replicas(node)
        assert len(before) == 2

        machine.kill()
        killed_at, answers = time.monotonic(), []
        assert not isinstance(endpoint.answer(endpoint.head_port), dict)
        while time.monotonic() - killed_at < AWAY_S:
            answers.append(endpoint.answer(endpoint.node_port))
        started_at = time.monotonic()
        machine.start()
        answers_at = time.monotonic()
        while (back := endpoint.answer(endpoint.head_port)) != expected:
            assert not isinstance(back, dict), "another answer than before"
            assert time.monotonic() - answers_at < 240, back
            answers.append(endpoint.answer(endpoint.node_port))
        back_at = time.monotonic()
        lost = [one for one in answers if one != expected]
        print(f"head away for {answers_at - killed_at:.0f} s: {len(answers)} answers of the node's proxy, {len(lost)} of them no answer or another")
        print(f"started in {answers_at - started_at:.1f} s, its proxy answers {back_at - answers_at:.1f} s later")
        # Who asked the node has not seen it.
        assert lost == []
        assert node.poll() is None
        assert replicas(node) == before


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    return make_dataset(tmp_path_factory.mktemp("restart") / "data", train=201, val=41)


@pytest.fixture(scope="module")
def undisturbed(dataset: PreparedDataset, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digest of the bundle of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    done = sentinode("train", "--data", dataset.path, "--out", out, "--set", *SETTINGS, ray_address=None)
    assert done.returncode == 0, done.stderr
    return Bundle.open(out / "bundle").manifest.digest


@contextmanager
def submitting(head: Head, dataset: PreparedDataset, out: Path) -> Iterator[Running]:
    """The one command, submitted; it is killed with the block, which its job does not feel."""
    command = [sys.executable, "-m", "ray_jobs.cli", "submit", "train", "--data", str(dataset.path), "--out", str(out), "--set", *SETTINGS]
    environment = dict(os.environ) | head.environment | {"RAY_API_SERVER_ADDRESS": head.job_server}
    process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield Running(process)
    finally:
        process.kill()
        process.wait()


def kill_driver(machine: HeadMachine, out: Path) -> None:
    assert machine.process is not None
    (driver,) = [
        process
        for process in psutil.Process(machine.process.pid).children(recursive=True)
        if process.cmdline()[1:3] == ["-m", "ray_jobs.train"] and str(out) in process.cmdline()
    ]
    driver.kill()


def jobs(head: Head) -> dict[str, str]:
    token = head.environment["RAY_AUTH_TOKEN"]
    answer = httpx.get(f"{head.job_server}/api/jobs/", headers={"Authorization": f"Bearer {token}"}, timeout=30, trust_env=False)
    return {job["submission_id"]: job["status"] for job in answer.json() if job["submission_id"]}


@pytest.mark.timeout(1800)
def test_a_run_that_loses_its_driver_its_follower_and_its_head_ends_as_an_undisturbed_one(
    dataset: PreparedDataset, undisturbed: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with machine_with_redis() as machine:
        machine.start()
        machine.join(3)
        with submitting(machine.head, dataset, out) as command:
            name = command.wait_for_line("submitted: ", 120).split()[1]
            command.wait_for_line("epoch 2/", 240)
            kill_driver(machine, out)
            killed_at = time.monotonic()
            command.wait_for_line(f"sentinode: {name} was killed by signal 9; submitted again, it continues", 60)
            print(f"driver killed: told after {time.monotonic() - killed_at:.1f} s")
            assert command.process.wait(60) == 1
        with submitting(machine.head, dataset, out) as command:
            command.wait_for_line(f"submitted: {name}-2", 120)
        with submitting(machine.head, dataset, out) as command:
            command.wait_for_line(f"already there: {name}-2", 120)
            command.wait_for_line("training with 2 workers on cpu, continuing after epoch ", 240)
            command.wait_for_line("epoch ", 120)
            machine.kill()
            machine.start()
            answers_at = time.monotonic()
            command.wait_for_line(f"sentinode: {name}-2 was lost with the node of its driver; submitted again, it continues", 120)
            print(f"head killed: told {time.monotonic() - answers_at:.1f} s after it answered again")
            assert command.process.wait(60) == 1
        with submitting(machine.head, dataset, out) as command:
            command.wait_for_line(f"submitted: {name}-3", 120)
            command.wait_for_line("training with 2 workers on cpu, continuing after epoch ", 300)
            command.wait_for_line("bundle: ", 300)
            assert command.process.wait(60) == 0
        # Ray has seen by now that nobody works on the second.
        assert jobs(machine.head) == {name: "FAILED", f"{name}-2": "FAILED", f"{name}-3": "SUCCEEDED"}
    assert Bundle.open(out / "bundle").manifest.digest == undisturbed


@pytest.mark.timeout(1200)
def test_without_redis_a_new_head_knows_no_job_and_the_same_command_continues(dataset: PreparedDataset, undisturbed: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with machine_for_a_head(0) as machine:
        machine.start()
        node = machine.join(3, WAIT_FOR_HEAD)
        with submitting(machine.head, dataset, out) as command:
            name = command.wait_for_line("submitted: ", 120).split()[1]
            command.wait_for_line("epoch 2/", 240)
            machine.kill()
            machine.start()
            command.wait_for_line(f"sentinode: {name} was lost: the cluster does not know it any more; submitted again, it continues", 120)
            assert command.process.wait(60) == 1
        # It belongs to the cluster that is gone, and ends itself.
        assert node.wait(120) != 0
        machine.join(3)
        with submitting(machine.head, dataset, out) as command:
            command.wait_for_line(f"submitted: {name}", 120)
            command.wait_for_line("training with 2 workers on cpu, continuing after epoch ", 300)
            command.wait_for_line("bundle: ", 300)
            assert command.process.wait(60) == 0
    assert Bundle.open(out / "bundle").manifest.digest == undisturbed
