"""Preparing is killed for real, at every stage; the output is absent until it is whole, and the same command ends with the same fingerprint."""

import json
import mmap
import os
import re
import resource
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
def undisturbed_at(source: Path, ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of a run that nobody disturbed."""
    import ray

    out = tmp_path_factory.mktemp("chaos") / "undisturbed"
    _prepare_again(source, out, ray.get_runtime_context().gcs_address)
    return out


@pytest.fixture(scope="module")
def undisturbed(undisturbed_at: Path) -> str:
    """Fingerprint of a run that nobody disturbed."""
    return PreparedDataset.open(undisturbed_at).manifest.fingerprint


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


class SmallDisk:
    """A file system of its own that can be filled and made larger.

    Parameters
    ----------
    folder : Path
        Where it is mounted.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def resize(self, megabytes: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={megabytes}m", self.folder], check=True)

    def leave_free(self, pages: int) -> None:
        """Fill it but for so many pages."""
        ballast = self.folder / "ballast"
        ballast.unlink(missing_ok=True)
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, (os.statvfs(self.folder).f_bavail - pages) * mmap.PAGESIZE)
        assert os.statvfs(self.folder).f_bavail == pages


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A disk of 24 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder], capture_output=True)
    if not mounted or mounted.returncode:
        pytest.skip("no right to mount a file system here")
    yield SmallDisk(folder)
    subprocess.run(["umount", "--lazy", folder], check=True)


def _assert_fails_with_one_line(source: Path, out: Path, ray_address: str, stage: str, reason: str = "No space left on device") -> None:
    failed = sentinode(*_argv(source, out), ray_address=ray_address)
    assert failed.returncode == 1, failed.stderr
    assert re.fullmatch(rf"sentinode: {stage} failed: {reason} \({out}.staging.*\); .* and run the same command again, it continues\n", failed.stderr)
    assert not out.exists()


@pytest.mark.parametrize(
    ("stage", "megabytes", "done"),
    [("decode", 24, "*/work/block-*.parquet"), ("write", 80, "*/data/*/part-*.parquet")],  # 42 MB of pixels, 21 of anchors, 42 of shards
)
def test_a_full_disk_is_one_clear_line_and_with_more_room_the_same_command_continues(
    source: Path, undisturbed: str, ray_address: str, small_disk: SmallDisk, stage: str, megabytes: int, done: str
) -> None:
    out = small_disk.folder / "out"
    small_disk.resize(megabytes)
    _assert_fails_with_one_line(source, out, ray_address, stage)
    assert any((small_disk.folder / "out.staging").glob(done)), "nothing was done before the disk was full"
    small_disk.resize(512)
    assert _prepare_again(source, out, ray_address) == undisturbed


def _pages(path: Path) -> int:
    return -(-path.stat().st_size // mmap.PAGESIZE)


def test_a_disk_that_is_full_when_all_shards_are_written_loses_nothing(
    source: Path, undisturbed_at: Path, undisturbed: str, ray_address: str, small_disk: SmallDisk
) -> None:
    out, staging = small_disk.folder / "out", small_disk.folder / "out.staging"
    small_disk.resize(512)
    with running(*_argv(source, out), ray_address=ray_address) as command:
        _wait_for(lambda: any(staging.glob("*/data/index.parquet")), command)
        command.process.send_signal(signal.SIGKILL)
        command.process.wait(30)
    (data,), (plan,) = staging.glob("*/data"), staging.glob("*/work/plan.parquet")
    before = _pages(plan)
    # One page less than is needed for it and those before it.
    for name in ("index.parquet", "rejected.parquet", "overlaps.parquet", "report.html", "dataset.json"):
        for path in (plan, *data.glob("*.*")):
            path.unlink(missing_ok=True)
        small_disk.leave_free(before + _pages(undisturbed_at / name) - 1)
        _assert_fails_with_one_line(source, out, ray_address, "prepare")
        before += _pages(undisturbed_at / name)
        written = before - _pages(plan) - sum(map(_pages, data.glob("*.*")))
        assert written == _pages(undisturbed_at / name), "another file found no room"
    (small_disk.folder / "ballast").unlink()
    assert _prepare_again(source, out, ray_address) == undisturbed


def test_a_limit_on_the_size_of_files_is_named_and_without_it_the_same_command_continues(
    source: Path, undisturbed_at: Path, undisturbed: str, ray_address: str, tmp_path: Path
) -> None:
    """The limit is the driver's, not that of Ray's workers: the report is the largest file it writes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((undisturbed_at / "report.html").stat().st_size // 2, hard))
    try:
        _assert_fails_with_one_line(source, tmp_path / "out", ray_address, "prepare", reason="File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert _prepare_again(source, tmp_path / "out", ray_address) == undisturbed


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
