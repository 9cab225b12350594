"""Training is disturbed for real; what comes out must be bitwise what an undisturbed run makes, and every epoch must have been the same."""

import os
import re
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from ray_jobs.checkpoints import best_and_last
from sentinode.bundle import Bundle
from sentinode.dataset import PreparedDataset
from sentinode.locations import locate
from tests.factories import make_dataset
from tests.processes import Running, running, sentinode

pytestmark = [pytest.mark.ray, pytest.mark.chaos]

# So many that a run is far from its end when it is disturbed in the second one, however fast the machine: an epoch is told up to a second late.
EPOCHS = 10
SETTINGS = [
    *["arch=resnet18", "weights=none", "unfreeze_depth=5", "input_size_px=32", f"epochs={EPOCHS}", "batch_size=8", "learning_rate=1e-3"],
    *["ema_decay=0.9", "dropout=0.2", "workers=2", "early_stopping_patience_epochs=null"],
]
# A checkpoint of this run: the weights, their average and Adam's two moments.
CHECKPOINT_MIB = 180


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    return make_dataset(tmp_path_factory.mktemp("chaos") / "data", train=201, val=41)


@pytest.fixture(scope="module")
def undisturbed(dataset: PreparedDataset, ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run made that nobody disturbed."""
    import ray

    out = tmp_path_factory.mktemp("chaos") / "undisturbed"
    done = sentinode(*_train(dataset, out), ray_address=ray.get_runtime_context().gcs_address)
    assert done.returncode == 0, done.stderr
    return _outcome(out)


def _train(dataset: PreparedDataset, out: Path) -> list[str | Path]:
    return ["train", "--data", dataset.path, "--out", out, "--set", *SETTINGS]


def _outcome(out: Path) -> dict[str, Any]:
    """Digest of the bundle, and the numbers of every epoch, without times."""
    _, last = best_and_last(locate(out))
    assert last is not None
    history = [{name: value for name, value in record.items() if not name.endswith("seconds")} for record in last.progress.history]
    assert len(history) == EPOCHS
    return {"digest": Bundle.open(out / "bundle").manifest.digest, "history": history}


def _continued(dataset: PreparedDataset, out: Path, ray_address: str) -> dict[str, Any]:
    """Repeat the command, and return what the run made in the end."""
    assert not (out / "bundle").exists()
    again = sentinode(*_train(dataset, out), ray_address=ray_address)
    assert again.returncode == 0, again.stderr
    assert "epoch 1/" not in again.stdout
    assert re.search(r", continuing (after|within) epoch \d", again.stdout)
    return _outcome(out)


def _workers(command: Running) -> list[psutil.Process]:
    found = [process for process in psutil.Process().children(recursive=True) if "RayTrainWorker" in " ".join(process.cmdline())]
    assert len(found) == 2
    return found


def test_a_killed_driver_is_continued_by_the_same_command(
    dataset: PreparedDataset, undisturbed: dict[str, Any], ray_address: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with running(*_train(dataset, out), ray_address=ray_address) as command:
        command.wait_for_line("epoch 2/", 180)
        command.process.send_signal(signal.SIGKILL)
        command.process.wait(30)
    # Ray's own notes as they are left by a kill while it writes them, which it does in place.
    notes = out / "checkpoint_manager_snapshot.json"
    notes.write_bytes(notes.read_bytes()[:100])
    assert _continued(dataset, out, ray_address) == undisturbed


def test_sigterm_within_an_epoch_ends_with_code_3_and_the_same_command_continues_within_it(
    dataset: PreparedDataset, undisturbed: dict[str, Any], ray_address: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    # A signal may come between two epochs; it is followed by one more then.
    for _ in range(EPOCHS // 2):
        with running(*_train(dataset, out), ray_address=ray_address) as command:
            command.wait_for_line("epoch ", 180)
            command.process.send_signal(signal.SIGTERM)
            told = command.wait_for_line("sentinode: stopped", 90)
            assert command.process.wait(90) == 3
        assert re.match(rf"sentinode: stopped (within|after) epoch \d+.*; repeat the command to continue from there \({out}\)", told)
        _, last = best_and_last(locate(out))
        assert last is not None
        if last.progress.partial is not None:
            break
    assert re.match(r"sentinode: stopped within epoch \d+, after step \d+ of 13;", told)
    assert _continued(dataset, out, ray_address) == undisturbed


def test_a_killed_worker_is_replaced_without_being_asked(
    dataset: PreparedDataset, undisturbed: dict[str, Any], ray_address: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with running(*_train(dataset, out), ray_address=ray_address) as command:
        command.wait_for_line("epoch 2/", 180)
        _workers(command)[1].kill()
        command.wait_for_line("a worker failed, 1 of 3 that are repaired", 60)
        command.wait_for_line("training with 2 workers on cpu, continuing after epoch ", 120)
        command.wait_for_line("bundle: ", 240)
        assert command.process.wait(60) == 0
    assert _outcome(out) == undisturbed
    epochs = [line.split("/")[0] for line in command.lines if line.startswith("epoch ")]
    assert epochs == [f"epoch {number + 1}" for number in range(EPOCHS)]


def test_a_checkpoint_that_could_not_be_written_is_made_again(
    dataset: PreparedDataset, undisturbed: dict[str, Any], ray_address: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with running(*_train(dataset, out), ray_address=ray_address) as command:
        command.wait_for_line("epoch 1/", 180)
        for worker in _workers(command):
            # No right to mount a file system is needed for this one: the next large file fails after its first mebibyte.
            resource.prlimit(worker.pid, resource.RLIMIT_FSIZE, (2**20, 2**20))
        told = command.wait_for_line("a worker failed, 1 of 3 that are repaired", 120)
        command.wait_for_line("bundle: ", 240)
        assert command.process.wait(60) == 0
    assert f"{out}: a checkpoint cannot be written (File too large)" in told
    assert _outcome(out) == undisturbed
    assert len(list(out.glob("checkpoint_*/"))) <= 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with room for one checkpoint and a half, that can be made larger."""
    folder = tmp_path / "disk"
    folder.mkdir()
    size = f"size={CHECKPOINT_MIB * 3 // 2}m"
    mounted = shutil.which("mount") and subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder], capture_output=True)
    if not mounted or mounted.returncode:
        pytest.skip("no right to mount a file system here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_loses_nothing_is_one_clear_line_and_with_more_room_the_same_command_continues(
    dataset: PreparedDataset, undisturbed: dict[str, Any], ray_address: str, small_disk: Path
) -> None:
    out = small_disk / "run"
    failed = sentinode(*_train(dataset, out), ray_address=ray_address)
    assert failed.returncode == 1
    (line,) = failed.stderr.splitlines()
    assert line.startswith(f"sentinode: {out}: no room for a checkpoint (")
    assert "make room there and repeat the command; the last good checkpoint is " in line
    assert line.endswith("after epoch 1")
    assert "No space left on device" in failed.stdout
    _, last = best_and_last(locate(out))
    assert last is not None
    assert sum(path.stat().st_size for path in last.path.iterdir()) > CHECKPOINT_MIB * 2**20 * 0.9
    subprocess.run(["mount", "-o", f"remount,size={CHECKPOINT_MIB * 4}m", small_disk], check=True)
    assert _continued(dataset, out, ray_address) == undisturbed
    assert os.path.ismount(small_disk)
