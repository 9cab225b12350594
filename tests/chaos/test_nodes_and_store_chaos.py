"""Nodes that do the work are killed while all data lie in an object store: no folder is shared, and each node has temporary files of its own."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_prep.synth import synthesize
from sentinode.bundle import Bundle
from sentinode.dataset import PreparedDataset
from sentinode.locations import locate
from tests import s3
from tests.clusters import add_node, cluster_of, node_that_runs
from tests.processes import Running, running, sentinode
from tests.ray_jobs.conftest import wait_until_all_free

pytestmark = [pytest.mark.ray, pytest.mark.chaos]

PATCHES = 600
NETWORK = ["arch=resnet18", "weights=none", "unfreeze_depth=5", "input_size_px=32", "batch_size=16", "learning_rate=1e-3"]
CPUS = 2


@pytest.fixture(scope="module")
def store(s3_server: s3.Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A bucket with patches in Kaggle's layout."""
    folder = synthesize(tmp_path_factory.mktemp("chaos") / "synth", PATCHES, seed=11)
    with s3.fresh_clients():
        bucket = s3_server.new_bucket()
        for path in folder.rglob("*.*"):
            (locate(bucket) / "source" / path.relative_to(folder).as_posix()).put_file(path)
        yield bucket


@pytest.fixture(scope="module")
def cluster(store: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A head without work and three nodes, one more than any test needs."""
    with cluster_of(nodes=3, cpus=CPUS, head_cpus=0, temporary=tmp_path_factory.mktemp("nodes")) as cluster:
        yield cluster


@pytest.fixture
def replaced(cluster: Any, tmp_path: Path) -> Iterator[None]:
    """After a test that has killed a node: everything is free, and there is another one."""
    import ray

    yield
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        wait_until_all_free(60)
    finally:
        ray.shutdown()
    add_node(cluster, CPUS, tmp_path)


@pytest.fixture(scope="module")
def dataset(cluster: Any, store: str) -> str:
    """The data set that an undisturbed run makes."""
    return _prepared(cluster, store, f"{store}/data")


@pytest.fixture(scope="module")
def bundle(cluster: Any, store: str, dataset: str) -> str:
    """The bundle that an undisturbed run makes."""
    _done(cluster, *_train(dataset, f"{store}/run"))
    return f"{store}/run/bundle"


def _done(cluster: Any, *argv: str) -> dict[str, Any]:
    done = sentinode(*argv, "--json", ray_address=cluster.address, timeout_s=400)
    assert done.returncode == 0, done.stderr
    last: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return last


def _kill(cluster: Any, what: str) -> None:
    cluster.remove_node(node_that_runs(cluster, what), allow_graceful=False)


def _ends_well(command: Running) -> None:
    assert command.process.wait(400) == 0, "".join(command.lines)


def _prepare(store: str, out: str) -> list[str]:
    return ["prepare", "--source", f"{store}/source", "--out", out, "--set", "decode_block_rows=20", "rows_per_shard=60", "workers=1"]


def _prepared(cluster: Any, store: str, out: str) -> str:
    _done(cluster, *_prepare(store, out))
    return out


def _train(data: str, out: str) -> list[str]:
    # With both CPUs of a node each, workers are on different ones.
    return ["train", "--data", data, "--out", out, "--set", *NETWORK, "epochs=6", "workers=2", f"cpus_per_worker={CPUS}"]


def test_prepare_begins_anew_on_another_node(cluster: Any, store: str, dataset: str, replaced: None) -> None:
    with running(*_prepare(store, f"{store}/again"), ray_address=cluster.address) as command:
        command.wait_for_line("decode:", 120)
        _kill(cluster, "_prepare_here")
        command.wait_for_line("the machine that prepared was lost, and its work with it; beginning again (2 of 3)", 120)
        command.wait_for_line("data set:", 300)
        _ends_well(command)
    again = PreparedDataset.open(f"{store}/again")
    assert again.verify() == []
    assert again.manifest.fingerprint == PreparedDataset.open(dataset).manifest.fingerprint


def test_prepare_on_all_nodes_goes_on_without_one(cluster: Any, store: str, dataset: str, replaced: None, tmp_path: Path) -> None:
    argv = [*_prepare(store, f"{store}/shared"), "workers=3", "--work", str(tmp_path / "work")]
    with running(*argv, ray_address=cluster.address) as command:
        command.wait_for_line("decode:", 120)
        _kill_one_that_decodes(cluster)
        command.wait_for_line("data set:", 300)
        _ends_well(command)
    assert not any("preparing on one machine" in line for line in command.lines)
    again = PreparedDataset.open(f"{store}/shared")
    assert again.verify() == []
    assert again.manifest.fingerprint == PreparedDataset.open(dataset).manifest.fingerprint


def _kill_one_that_decodes(cluster: Any) -> None:
    deadline = time.monotonic() + 60
    while True:
        # Between two tasks no process has the name of one.
        try:
            return _kill(cluster, "MapBatches")
        except AssertionError:
            assert time.monotonic() < deadline


def test_training_on_two_nodes_goes_on_on_a_third(cluster: Any, store: str, dataset: str, bundle: str, replaced: None) -> None:
    with running(*_train(dataset, f"{store}/run2"), ray_address=cluster.address) as command:
        command.wait_for_line("epoch 1/", 180)
        _kill(cluster, "RayTrainWorker")
        command.wait_for_line("training with 2 workers on cpu, continuing after epoch ", 180)
        command.wait_for_line("bundle: ", 300)
        _ends_well(command)
    assert Bundle.open(f"{store}/run2/bundle").manifest.digest == Bundle.open(bundle).manifest.digest


def test_a_driver_that_is_killed_leaves_a_run_that_another_takes_over(cluster: Any, store: str, dataset: str, bundle: str) -> None:
    with running(*_train(dataset, f"{store}/run3"), ray_address=cluster.address) as command:
        command.wait_for_line("epoch 1/", 180)
        command.process.kill()
        command.process.wait()
    with running(*_train(dataset, f"{store}/run3"), ray_address=cluster.address) as command:
        command.wait_for_line(f"{store}/run3: looking for 45 s whether another process still writes it", 60)
        command.wait_for_line("training with 2 workers on cpu, continuing ", 180)
        command.wait_for_line("bundle: ", 300)
        _ends_well(command)
    assert Bundle.open(f"{store}/run3/bundle").manifest.digest == Bundle.open(bundle).manifest.digest


def test_a_sweep_goes_on_on_another_node(cluster: Any, store: str, dataset: str, replaced: None, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep.yaml"
    base = dict(setting.split("=") for setting in NETWORK if "learning_rate" not in setting)
    base_yaml = "".join(f"  {key}: {value}\n" for key, value in base.items())
    sweep.write_text(f"space: {{learning_rate: {{grid: [0.0001, 0.001]}}}}\ntrials: 1\nbase:\n{base_yaml}  epochs: 5\n  use_gpu: false\n")
    argv = ["tune", "--data", dataset, "--config", str(sweep), "--out"]
    with running(*argv, f"{store}/sweep", ray_address=cluster.address) as command:
        command.wait_for_line("trial 00000 epoch 1", 180)
        _kill(cluster, r"ray::(Trial|ResourceTrainable)")
        command.wait_for_line("bundle: ", 300)
        _ends_well(command)
    add_node(cluster, CPUS, tmp_path)
    undisturbed = _done(cluster, *argv, f"{store}/sweep2")
    assert Bundle.open(f"{store}/sweep/bundle").manifest.digest == undisturbed["digest"]


def test_predictions_go_on_on_another_node(cluster: Any, store: str, bundle: str, replaced: None) -> None:
    argv = ["predict", "--bundle", bundle, "--source", f"{store}/source", "--set", "rows_per_part=20", "workers=2", "--out"]
    with running(*argv, f"{store}/predictions", ray_address=cluster.address) as command:
        command.wait_for_line("predict: ", 180)
        _kill(cluster, "BundleActor")
        _ends_well(command)
    whole = _done(cluster, *argv, f"{store}/predictions2")
    assert whole["rows"] == PATCHES
    first, second = (json.loads((locate(f"{store}/{name}") / "_manifest.json").read_bytes()) for name in ("predictions", "predictions2"))
    assert first["parts"] == second["parts"]


def test_an_evaluation_goes_on_on_another_node(cluster: Any, store: str, dataset: str, bundle: str, replaced: None) -> None:
    argv = ["evaluate", "--bundle", bundle, "--data", dataset, "--split", "train", "--set", "workers=2", "--out"]
    with running(*argv, f"{store}/report", ray_address=cluster.address) as command:
        command.wait_for_line("evaluate: ", 180)
        _kill(cluster, "BundleActor")
        _ends_well(command)
    undisturbed = _done(cluster, *argv, f"{store}/report2")
    report = json.loads((locate(f"{store}/report") / "report.json").read_bytes())
    assert report["roc_auc"] == undisturbed["roc_auc"]
    assert report["confusion"] == undisturbed["confusion"]
