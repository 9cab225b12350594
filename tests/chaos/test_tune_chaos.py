"""A sweep is disturbed for real; what comes out must be what an undisturbed one makes: the same trials, with the same epochs and ends."""

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from ray_jobs.sweep.tune_search import SAFE_NODE_RESOURCE
from sentinode.bundle import Bundle
from sentinode.dataset import PreparedDataset
from sentinode.locations import locate
from sentinode.search.journal import JOURNAL_FILE, Journal
from tests.clusters import cluster_of, node_that_runs
from tests.factories import make_dataset
from tests.processes import Running, running, sentinode
from tests.ray_jobs.conftest import wait_until_all_free

pytestmark = [pytest.mark.ray, pytest.mark.chaos]

# What Ray calls a process that holds a trial, between its steps and in one.
TRIAL = r"ray::(Trial|ResourceTrainable)"
# One trial at a time: with several, which of them comes to a rung first is chance, and with it what is stopped there.
SWEEP = {
    "space": {"learning_rate": {"loguniform": [1e-4, 1e-2]}, "unfreeze_depth": {"choice": [4, 5]}},
    "base": {
        "arch": "resnet18",
        "weights": "none",
        "input_size_px": 32,
        "epochs": 4,
        "batch_size": 8,
        "use_gpu": False,
        "early_stopping_patience_epochs": None,
        "checkpoint_interval_s": 0.2,
    },
    "trials": 3,
    "scheduler": {"kind": "asha", "grace_period_epochs": 1, "reduction_factor": 2},
    "repeats": 1,
    "repeat_top": 1,
    "max_concurrent_trials": 1,
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    return make_dataset(tmp_path_factory.mktemp("chaos") / "data", train=201, val=41)


@pytest.fixture
def all_free(ray_session: None) -> Iterator[None]:
    yield
    wait_until_all_free(60)


@pytest.fixture(scope="module")
def undisturbed(dataset: PreparedDataset, ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a sweep made that nobody disturbed."""
    import ray

    folder = tmp_path_factory.mktemp("chaos")
    done = sentinode(*_tune(dataset, folder), ray_address=ray.get_runtime_context().gcs_address)
    assert done.returncode == 0, done.stderr
    outcome = _outcome(folder)
    assert {trial["status"] for trial in outcome["trials"]} == {"finished", "stopped"}
    return outcome


def _tune(dataset: PreparedDataset, folder: Path, **changes: Any) -> list[str | Path]:
    (folder / "sweep.yaml").write_text(yaml.safe_dump(SWEEP | changes))
    return ["tune", "--data", dataset.path, "--out", folder / "sweep", "--config", folder / "sweep.yaml"]


def _outcome(folder: Path) -> dict[str, Any]:
    """Digest of the bundle, and every trial with its epochs, without times."""
    trials = []
    for trial in Journal(locate(folder / "sweep")).trials:
        epochs = [{name: value for name, value in one.items() if not name.endswith("seconds") and name != "at"} for one in trial.epochs]
        trials.append({"point": trial.point, "seed": trial.seed, "kind": trial.kind, "status": trial.status, "epochs": epochs})
    return {"digest": Bundle.open(folder / "sweep" / "bundle").manifest.digest, "trials": trials}


def _continued(dataset: PreparedDataset, folder: Path, ray_address: str) -> dict[str, Any]:
    """Repeat the command, and return what the sweep made in the end."""
    assert not (folder / "sweep" / "bundle").exists()
    again = sentinode(*_tune(dataset, folder), ray_address=ray_address)
    assert again.returncode == 0, again.stderr
    assert "continuing the sweep" in again.stdout
    return _outcome(folder)


def _wait_for_epochs(command: Running, count: int) -> None:
    for _ in range(count):
        while "epoch" not in command.wait_for_line("trial ", 180):
            pass


def _trial_process() -> psutil.Process:
    (found,) = [process for process in psutil.Process().children(recursive=True) if re.match(TRIAL, " ".join(process.cmdline()))]
    return found


@pytest.mark.parametrize("epochs", [1, 5])
def test_a_killed_driver_is_continued_by_the_same_command(
    dataset: PreparedDataset, undisturbed: dict[str, Any], ray_address: str, tmp_path: Path, all_free: None, epochs: int
) -> None:
    with running(*_tune(dataset, tmp_path), ray_address=ray_address) as command:
        _wait_for_epochs(command, epochs)
        command.process.send_signal(signal.SIGKILL)
        command.process.wait(30)
    journal = tmp_path / "sweep" / JOURNAL_FILE
    before = journal.read_bytes()
    # And its last line is left as a kill in the middle of writing leaves it.
    journal.write_bytes(before[:-20])
    assert _continued(dataset, tmp_path, ray_address) == undisturbed
    # What had been heard of was not trained again: only the torn line is written anew.
    assert journal.read_bytes().startswith(before[:-20])


def test_sigterm_lets_trials_make_a_checkpoint_and_the_same_command_goes_on_within_the_epoch(
    dataset: PreparedDataset, undisturbed: dict[str, Any], ray_address: str, tmp_path: Path, all_free: None
) -> None:
    with running(*_tune(dataset, tmp_path), ray_address=ray_address) as command:
        _wait_for_epochs(command, 2)
        command.process.send_signal(signal.SIGTERM)
        told = command.wait_for_line("sentinode: stopped", 90)
        assert command.process.wait(90) == 3
    assert told == f"sentinode: stopped with 1 trials unfinished; repeat the command to continue in {tmp_path / 'sweep'}\n"
    assert _continued(dataset, tmp_path, ray_address) == undisturbed


def test_a_killed_trial_goes_on_in_another_process_without_being_asked(
    dataset: PreparedDataset, undisturbed: dict[str, Any], ray_address: str, tmp_path: Path, all_free: None
) -> None:
    with running(*_tune(dataset, tmp_path), ray_address=ray_address) as command:
        _wait_for_epochs(command, 2)
        _trial_process().kill()
        command.wait_for_line("trial 00000 lost its process", 60)
        command.wait_for_line("bundle: ", 240)
        assert command.process.wait(60) == 0
    assert _outcome(tmp_path) == undisturbed


def test_trials_with_two_workers_end_without_leaving_anything_taken(
    dataset: PreparedDataset, ray_address: str, tmp_path: Path, all_free: None
) -> None:
    # The second learns nothing, and is stopped at the first rung.
    space = {"learning_rate": {"grid": [3e-3, 1e-8]}}
    base = SWEEP["base"] | {"lr_floor": 0, "unfreeze_depth": 5}  # type: ignore[operator]
    changes = {"workers_per_trial": 2, "repeats": 0, "searcher": "grid", "space": space, "base": base}
    with running(*_tune(dataset, tmp_path, **changes), ray_address=ray_address) as command:
        _wait_for_epochs(command, 1)
        command.process.send_signal(signal.SIGTERM)
        command.wait_for_line("sentinode: stopped with 1 trials unfinished", 120)
        assert command.process.wait(90) == 3
    wait_until_all_free(60)
    done = sentinode(*_tune(dataset, tmp_path, **changes), ray_address=ray_address)
    assert done.returncode == 0, done.stderr
    outcome = _outcome(tmp_path)
    assert "stopped" in {trial["status"] for trial in outcome["trials"]}
    for trial in outcome["trials"]:
        assert [one["epoch"] for one in trial["epochs"]] == list(range(len(trial["epochs"])))


def test_a_trial_goes_on_on_another_node_when_its_own_is_lost(dataset: PreparedDataset, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    # No trial on the head, and a node to spare.
    with cluster_of(nodes=3, head_cpus=0) as cluster, running(*_tune(dataset, tmp_path), ray_address=cluster.address) as command:
        _wait_for_epochs(command, 1)
        cluster.remove_node(node_that_runs(cluster, TRIAL), allow_graceful=False)
        command.wait_for_line("trial 00000 lost its process", 120)
        command.wait_for_line("bundle: ", 300)
        assert command.process.wait(60) == 0
    assert _outcome(tmp_path) == undisturbed


def test_a_full_disk_is_one_line_and_the_same_command_continues(
    dataset: PreparedDataset, undisturbed: dict[str, Any], ray_address: str, tmp_path: Path, all_free: None
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if os.system(f"mount -t tmpfs -o size=250m tmpfs {small} 2>/dev/null"):
        pytest.skip("may not mount file systems here")
    try:
        (small / "filler").write_bytes(bytes(100 * 2**20))
        done = sentinode(*_tune(dataset, small), ray_address=ray_address)
        assert done.returncode == 1
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("sentinode: ")]
        assert "make room there and repeat the command" in line
        (small / "filler").unlink()
        os.system(f"mount -o remount,size=2g {small}")
        assert _continued(dataset, small, ray_address) == undisturbed
    finally:
        deadline = time.monotonic() + 30
        while os.system(f"umount {small} 2>/dev/null") and time.monotonic() < deadline:
            os.sync()


def test_rows_that_a_lost_node_held_are_read_again(dataset: PreparedDataset, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    # Rows, weights and the trial are on the one node that there is; another one comes.
    with cluster_of(nodes=1, cpus=2, head_cpus=0) as cluster, running(*_tune(dataset, tmp_path), ray_address=cluster.address) as command:
        _wait_for_epochs(command, 1)
        cluster.add_node(num_cpus=2)
        cluster.remove_node(node_that_runs(cluster, TRIAL), allow_graceful=False)
        command.wait_for_line("trial 00000 lost its process", 120)
        command.wait_for_line("bundle: ", 300)
        assert command.process.wait(60) == 0
    assert _outcome(tmp_path) == undisturbed


def test_a_driver_of_workers_stays_on_the_safe_node_when_theirs_is_lost(dataset: PreparedDataset, tmp_path: Path) -> None:
    changes = {"workers_per_trial": 2, "repeats": 0, "searcher": "grid", "space": {"learning_rate": {"grid": [3e-3]}}, "trials": 1}
    safe = {SAFE_NODE_RESOURCE: 4.0}
    with (
        cluster_of(nodes=3, head_cpus=0, head_resources=safe) as cluster,
        running(*_tune(dataset, tmp_path, **changes), ray_address=cluster.address) as command,
    ):
        _wait_for_epochs(command, 1)
        with pytest.raises(AssertionError, match="on a node beside the head"):
            node_that_runs(cluster, TRIAL)
        cluster.remove_node(node_that_runs(cluster, "RayTrainWorker"), allow_graceful=False)
        command.wait_for_line("bundle: ", 300)
        assert command.process.wait(60) == 0
    assert not any("lost its process" in line for line in command.lines)
