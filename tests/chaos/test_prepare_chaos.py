"""Preparing is killed for real, at every stage; the output is absent until it is whole, and the same command ends with the same fingerprint."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from data_prep.synth import synthesize
from sentinode.dataset import PreparedDataset
from tests.processes import Running, running, sentinode

pytestmark = [pytest.mark.ray, pytest.mark.chaos]

PATCHES = 1500
SETTINGS = ["decode_block_rows=100", "rows_per_shard=100", "workers=1"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(tmp_path_factory.mktemp("chaos") / "synth", PATCHES, seed=11)


@pytest.fixture(scope="module")
def undisturbed(source: Path, ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Fingerprint of a run that nobody disturbed."""
    import ray

    return _prepare_again(source, tmp_path_factory.mktemp("chaos") / "undisturbed", ray.get_runtime_context().gcs_address)


def _argv(source: Path, out: Path) -> list[str | Path]:
    return ["prepare", "--source", source, "--out", out, "--json", "--set", *SETTINGS]


def _prepare_again(source: Path, out: Path, ray_address: str) -> str:
    done = sentinode(*_argv(source, out), ray_address=ray_address)
    assert done.returncode == 0, done.stderr
    assert PreparedDataset.open(out).verify() == []
    assert not out.with_name(out.name + ".staging").exists()
    return str(json.loads(done.stdout.splitlines()[-1])["fingerprint"])


def _wait_for(condition: Callable[[], bool], command: Running, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert command.process.poll() is None, "ended before it could be disturbed"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def _kill_tasks() -> bool:
    """Kill every process that is in the middle of a task; between two tasks there may be none."""
    killed = False
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if "MapBatches" in " ".join(process.cmdline()):
                process.kill()
                killed = True
    return killed


@pytest.mark.parametrize(
    "reached", ["*/work/block-00004.parquet", "*/work/candidates*", "*/work/plan.parquet", "*/data/*/part-00003.parquet", "*/data/index.parquet"]
)
def test_a_killed_driver_is_continued_by_the_same_command(source: Path, undisturbed: str, ray_address: str, tmp_path: Path, reached: str) -> None:
    out, staging = tmp_path / "out", tmp_path / "out.staging"
    with running(*_argv(source, out), ray_address=ray_address) as command:
        _wait_for(lambda: any(staging.glob(reached)), command)
        command.process.send_signal(signal.SIGKILL)
        command.process.wait(30)
    assert not out.exists()
    assert _prepare_again(source, out, ray_address) == undisturbed


def test_a_killed_worker_is_replaced_without_being_asked(source: Path, undisturbed: str, ray_address: str, tmp_path: Path) -> None:
    out, staging = tmp_path / "out", tmp_path / "out.staging"
    with running(*_argv(source, out), ray_address=ray_address) as command:
        _wait_for(lambda: any(staging.glob("*/work/block-00002.parquet")), command)
        _wait_for(_kill_tasks, command)
        command.wait_for_line("data set: ", 240)
        assert command.process.wait(60) == 0
    assert PreparedDataset.open(out).manifest.fingerprint == undisturbed


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own that can be filled and made larger."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder], capture_output=True)
    if not mounted or mounted.returncode:
        pytest.skip("no right to mount a file system here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_is_one_clear_line_and_with_more_room_the_same_command_continues(
    source: Path, undisturbed: str, ray_address: str, small_disk: Path
) -> None:
    out = small_disk / "out"
    failed = sentinode(*_argv(source, out), ray_address=ray_address)
    assert failed.returncode == 1
    assert failed.stderr.count("No space left on device") == 1
    assert "run the same command again" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not out.exists()
    subprocess.run(["mount", "-o", "remount,size=512m", small_disk], check=True)
    before = {path.name for path in (small_disk / "out.staging").glob("*/work/block-*.parquet")}
    assert before, "no block was done before the disk was full"
    assert _prepare_again(source, out, ray_address) == undisturbed


def test_a_damaged_spool_is_noticed_before_anything_is_published(source: Path, ray_address: str, tmp_path: Path) -> None:
    out, staging = tmp_path / "out", tmp_path / "out.staging"
    with running(*_argv(source, out), ray_address=ray_address) as command:
        _wait_for(lambda: any(staging.glob("*/work/plan.parquet")), command)
        command.process.send_signal(signal.SIGKILL)
        command.process.wait(30)
    for path in staging.glob("*/data/*/part-*.parquet"):
        path.unlink()
    (pixels,) = staging.glob("*/work/block-00001.pixels")
    with pixels.open("r+b") as file:  # a page that the disk lost
        file.seek(50_000)
        file.write(bytes(4096))
    failed = sentinode(*_argv(source, out), ray_address=ray_address)
    assert failed.returncode == 1
    assert "decoded pixels on disk have changed" in failed.stderr
    assert not out.exists()
    assert os.path.exists(staging)
