"""The disk is full at every stage of prepare: /dev/full stands in for a file on such a disk, which the kernel refuses as it would there."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import data_prep.prepare
from data_prep import overlap_search
from data_prep.synth import synthesize
from sentinode.config import PrepareConfig
from sentinode.dataset import PreparedDataset
from sentinode.errors import SentinodeError
from sentinode.storage import staging_path, temporary_name
from tests.data_prep.preparing import prepare

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

CONFIG = PrepareConfig(decode_block_rows=32, rows_per_shard=30, workers=1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(tmp_path_factory.mktemp("source") / "synth", 80, seed=3)


@pytest.fixture(scope="module")
def undisturbed(source: Path, ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    return prepare(CONFIG, source, tmp_path_factory.mktemp("undisturbed") / "out").manifest.fingerprint


def on_full_disk(file: str) -> Callable[[Path], Path]:
    """Like `temporary_name`, but what is written to a file whose path ends like that finds no room."""

    def name(path: Path) -> Path:
        temporary = temporary_name(path)
        if path.match(file):
            temporary.symlink_to("/dev/full")
        return temporary

    return name


def task_on_full_disk(task: Callable[..., Any], module: str, file: str) -> Callable[..., Any]:
    def run(**arguments: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(f"{module}.temporary_name", on_full_disk(file))
            return task(**arguments)

    return run


def assert_fails_and_continues(source: Path, out: Path, stage: str, undisturbed: str, full: pytest.MonkeyPatch) -> None:
    """Prepare fails with one line until `full` is undone; then it continues."""
    staging = staging_path(out)
    with pytest.raises(SentinodeError, match=rf"^{stage} failed: No space left on device \({staging}.*\); make room on that disk and run") as caught:
        prepare(CONFIG, source, out)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1
    assert not out.exists()
    assert staging.exists()
    assert [path for path in staging.rglob("*") if path.is_symlink()] == []  # other temporary files may belong to tasks that still run
    full.undo()
    assert prepare(CONFIG, source, out).manifest.fingerprint == undisturbed
    assert PreparedDataset.open(out).verify() == []
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("stage", "task", "module", "file"),
    [
        ("decode", "_decode_task", "data_prep.spool", "block-00001.pixels"),
        ("decode", "_decode_task", "data_prep.spool", "block-00001.anchors.npy"),
        ("decode", "_decode_task", "data_prep.spool", "block-00001.parquet"),
        ("overlap", "_candidates_task", "data_prep.spool", "candidates-*.npy"),
        ("verify", "_verify_task", "data_prep.spool", "overlaps-*.npy"),
        ("write", "_shard_task", "data_prep.shards", "train/part-00001.parquet"),
        ("write", "_shard_task", "sentinode.storage", "train-part-00001.parquet.json"),
    ],
)
def test_a_full_disk_ends_any_task_with_one_line_and_the_same_request_continues(
    source: Path, undisturbed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, task: str, module: str, file: str
) -> None:
    where = overlap_search if stage in ("overlap", "verify") else data_prep.prepare
    monkeypatch.setattr(where, task, task_on_full_disk(getattr(where, task), module, file))
    assert_fails_and_continues(source, tmp_path / "out", stage, undisturbed, monkeypatch)


@pytest.mark.parametrize(
    ("module", "file"),
    [
        ("data_prep.spool", "entries.parquet"),
        ("data_prep.spool", "plan.parquet"),
        ("data_prep.spool", "index.parquet"),
        ("data_prep.spool", "overlaps.parquet"),
        ("sentinode.storage", "report.html"),
        ("sentinode.storage", "dataset.json"),
    ],
)
def test_a_full_disk_ends_the_driver_with_one_line_and_the_same_request_continues(
    source: Path, undisturbed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, file: str
) -> None:
    monkeypatch.setattr(f"{module}.temporary_name", on_full_disk(file))
    assert_fails_and_continues(source, tmp_path / "out", "prepare", undisturbed, monkeypatch)


def test_a_disk_that_is_found_full_while_publishing_is_told_in_the_same_way(
    source: Path, undisturbed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Network file systems take what is written, and refuse it at fsync."""

    def refused(path: Path) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr("sentinode.storage._fsync", refused)
    with pytest.raises(SentinodeError, match=r"^prepare failed: Disk quota exceeded \(.*out.staging\); make room there and run the same command"):
        prepare(CONFIG, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert prepare(CONFIG, source, tmp_path / "out").manifest.fingerprint == undisturbed
