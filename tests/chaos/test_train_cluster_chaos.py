"""Nodes of a cluster come and go while a run is trained on them. The nodes are Ray's own, on this machine: each has its daemons and its workers."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from ray_jobs.checkpoints import best_and_last
from sentinode.bundle import Bundle
from sentinode.dataset import PreparedDataset
from sentinode.locations import locate
from tests.clusters import cluster_of, node_that_runs
from tests.factories import make_dataset
from tests.processes import ROOT, Running, running, sentinode

pytestmark = [pytest.mark.ray, pytest.mark.chaos]

# So many that a run is far from its end when it is disturbed in the first ones, however fast the machine: an epoch is told up to a second late.
EPOCHS = 8
SETTINGS = ["arch=resnet18", "weights=none", "unfreeze_depth=5", "input_size_px=32", f"epochs={EPOCHS}", "batch_size=8", "learning_rate=1e-3"]
SETTINGS += ["early_stopping_patience_epochs=null"]
ROWS = 201


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    return make_dataset(tmp_path_factory.mktemp("chaos") / "data", train=ROWS, val=41)


def _train(dataset: PreparedDataset, out: Path, workers: str) -> list[str | Path]:
    return ["train", "--data", dataset.path, "--out", out, "--set", *SETTINGS, f"workers={workers}"]


def _history(out: Path) -> list[dict[str, Any]]:
    _, last = best_and_last(locate(out))
    assert last is not None
    return [{name: value for name, value in record.items() if not name.endswith("seconds")} for record in last.progress.history]


def test_a_killed_node_is_replaced_by_another_and_the_result_is_the_same(dataset: PreparedDataset, tmp_path: Path) -> None:
    # Two workers, three nodes beside the head: one to spare.
    with cluster_of(nodes=3) as cluster:
        done = sentinode(*_train(dataset, tmp_path / "undisturbed", "2"), ray_address=cluster.address)
        assert done.returncode == 0, done.stderr
        with running(*_train(dataset, tmp_path / "run", "2"), ray_address=cluster.address) as command:
            command.wait_for_line("epoch 1/", 180)
            cluster.remove_node(node_that_runs(cluster, "RayTrainWorker"), allow_graceful=False)
            command.wait_for_line("training with 2 workers on cpu, continuing after epoch ", 180)
            command.wait_for_line("bundle: ", 240)
            assert command.process.wait(60) == 0
    assert _history(tmp_path / "run") == _history(tmp_path / "undisturbed")
    digests = [Bundle.open(tmp_path / name / "bundle").manifest.digest for name in ("run", "undisturbed")]
    assert digests[0] == digests[1]


@contextmanager
def _elastic(argv: list[str | Path], address: str) -> Iterator[Running]:
    """The command, looking for room every second instead of every minute."""
    script = "import sys, ray_jobs.train as train, ray_jobs.trainer as trainer; trainer._RESIZE_CHECK_S = 1.0; sys.exit(train.main(sys.argv[2:]))"
    command, environment = [sys.executable, "-c", script, *map(str, argv)], dict(os.environ) | {"RAY_ADDRESS": address}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment)
    try:
        yield Running(process)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def _wait_until_within_an_epoch(out: Path) -> None:
    """Wait until the newest checkpoint that Ray has noted lies within an epoch."""
    deadline = time.monotonic() + 60
    while True:
        assert time.monotonic() < deadline
        with suppress(OSError, ValueError):  # while Ray writes its notes
            if "epoch" not in json.loads((out / "checkpoint_manager_snapshot.json").read_text())["latest_checkpoint_result"]["metrics"]:
                return
        time.sleep(0.01)


def test_an_elastic_run_goes_on_with_fewer_and_with_more_workers(dataset: PreparedDataset, tmp_path: Path) -> None:
    # Checkpoints within epochs, so that rows which two workers have not had are left to one, and the other way round. That each is trained on once
    # is a test of the core's; here the counts must come out right. The run does not end by itself: nodes take their time.
    argv = [*_train(dataset, tmp_path / "run", "[1,2]"), "epochs=1000", "checkpoint_interval_s=0.3"]
    with cluster_of(nodes=1) as cluster, _elastic(argv, cluster.address) as command:
        command.wait_for_line("training with 2 workers on cpu", 180)
        command.wait_for_line("epoch 1/", 180)
        _wait_until_within_an_epoch(tmp_path / "run")
        cluster.remove_node(node_that_runs(cluster, "RayTrainWorker"), allow_graceful=False)
        command.wait_for_line("training with 1 worker on cpu, continuing ", 180)
        command.wait_for_line("epoch ", 180)
        cluster.add_node(num_cpus=1)
        command.wait_for_line("training with 2 workers on cpu, continuing ", 180)
        command.wait_for_line("epoch ", 180)
        command.process.send_signal(signal.SIGTERM)
        command.wait_for_line("sentinode: stopped ", 90)
        assert command.process.wait(60) == 3
    history = _history(tmp_path / "run")
    assert [(record["epoch"], record["rows"]) for record in history] == [(epoch, ROWS) for epoch in range(len(history))]
    assert any(", continuing within epoch " in line for line in command.lines)


def test_an_elastic_run_without_room_says_so_and_ends_at_once_when_it_is_told_to(dataset: PreparedDataset, tmp_path: Path) -> None:
    argv = [*_train(dataset, tmp_path / "run", "[2,3]"), "epochs=1000"]
    with cluster_of(nodes=2) as cluster, _elastic(argv, cluster.address) as command:
        command.wait_for_line("epoch 1/", 240)
        # The head's CPU is left, which is room for one.
        for node in list(cluster.worker_nodes):
            cluster.remove_node(node, allow_graceful=False)
        command.wait_for_line("waiting for room: 2 workers with 1 CPU each", 180)
        command.process.send_signal(signal.SIGTERM)
        # Not the two minutes that a checkpoint may take.
        command.wait_for_line("sentinode: stopped", 45)
        assert command.process.wait(60) == 3
    assert best_and_last(locate(tmp_path / "run"))[1] is not None
