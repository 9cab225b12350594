"""A folder is complete or does not exist, and one process at a time makes it."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sentinode import storage
from sentinode.errors import ConfigError, ManifestError, ManifestNotFoundError, StorageError, UsageError
from sentinode.storage import (
    canonical_json,
    exclusive,
    file_record,
    local_path,
    publish,
    read_manifest_json,
    sha256_file,
    staging_path,
    temporary_name,
    write_json,
    write_text_atomic,
)

HOLD = """
import sys
from pathlib import Path
from sentinode.storage import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held_by_another_process(out: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def make_folder(path: Path, **files: str) -> Path:
    path.mkdir(parents=True)
    for name, content in files.items():
        (path / name).write_text(content)
    return path


def content_of(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.mark.parametrize("uri", ["s3://bucket/data", "gs://bucket/data", "hdfs://host/data", "http://host/data"])
def test_a_path_that_is_not_local_is_refused_in_one_line(uri: str) -> None:
    with pytest.raises(ConfigError) as caught:
        local_path(uri)
    assert str(caught.value) == f"{uri}: {uri.split(':')[0]}:// is not supported yet for this; use a local path or a mounted shared folder"


def test_local_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert local_path("a/b") == tmp_path / "a" / "b"
    assert local_path(Path("a")) == tmp_path / "a"
    assert local_path("file:///a/b") == Path("/a/b")
    assert local_path("~/a") == Path("/home/someone/a")
    assert local_path("~nobody-of-this-name/a") == tmp_path / "~nobody-of-this-name" / "a"


def test_an_empty_path_is_not_the_current_folder() -> None:
    with pytest.raises(ConfigError, match="a path is empty"):
        local_path("")


def test_a_file_uri_with_a_host_is_refused() -> None:
    with pytest.raises(ConfigError, match="file://host/a: expected file:///"):
        local_path("file://host/a")


def test_a_second_process_is_refused_while_the_first_writes(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with held_by_another_process(out) as process:
        with pytest.raises(UsageError, match="out: another process is writing it"), exclusive(out):
            pytest.fail("two writers")
        with exclusive(tmp_path / "new" / "other"):
            pass
        process.communicate("")
        assert process.returncode == 0
    with exclusive(out):
        pass
    assert list((tmp_path / "new").iterdir()) == []


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with held_by_another_process(out) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        with exclusive(out):
            pass


def test_the_lock_is_given_back_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="work failed"), exclusive(tmp_path / "out"):
        raise RuntimeError("work failed")
    with exclusive(tmp_path / "out"):
        pass


def test_a_lock_on_a_file_that_its_holder_has_removed_meanwhile_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The holder ends between our opening the file and locking it: the file is gone, and a third process could lock a new one.
    flock = fcntl.flock

    def holder_ends_first(file: Any, operation: int) -> None:
        (tmp_path / ".out.lock").unlink()
        flock(file, operation)

    monkeypatch.setattr(storage.fcntl, "flock", holder_ends_first)
    with pytest.raises(UsageError, match="another process is writing it"), exclusive(tmp_path / "out"):
        pytest.fail("a lock that excludes nobody")


def test_a_file_system_without_locks_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(file: Any, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(storage.fcntl, "flock", no_locks)
    with pytest.raises(UsageError, match=r"out: cannot be locked \(No locks available\)"), exclusive(tmp_path / "out"):
        pytest.fail("not locked")


@pytest.mark.parametrize("out", ["/", "/somewhere/.."])
def test_the_root_is_not_an_output(out: str) -> None:
    with pytest.raises(UsageError, match="name the folder to make"), exclusive(Path(out)):
        pytest.fail("locked")


def test_an_output_below_a_file_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"), exclusive(tmp_path / "file" / "out"):
        pytest.fail("locked")


def test_a_full_disk_is_no_wrong_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, *arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "open", full)
    message = r"out: cannot be written \(No space left on device\); make room there and run the same command again"
    with pytest.raises(StorageError, match=message) as caught, exclusive(tmp_path / "out"):
        pytest.fail("locked")
    assert caught.value.exit_code == 1


def test_publishing_replaces_the_whole_folder(tmp_path: Path) -> None:
    out = make_folder(tmp_path / "out", old="1", both="old")
    publish(make_folder(staging_path(out), new="2", both="new"), out)
    assert content_of(out) == {"new": "2", "both": "new"}
    assert list(tmp_path.iterdir()) == [out]


def test_publishing_keeps_nested_folders(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make_folder(staging_path(out) / "train", part="1")
    publish(staging_path(out), out)
    assert content_of(out / "train") == {"part": "1"}


def test_a_backup_beside_the_output_is_not_touched(tmp_path: Path) -> None:
    backups = [make_folder(tmp_path / name, kept="1") for name in ("out.old", "out.bak", "old", ".out", "out2")]
    out = make_folder(tmp_path / "out", old="1")
    publish(make_folder(staging_path(out), new="2"), out)
    assert [content_of(backup) for backup in backups] == [{"kept": "1"}] * len(backups)


def test_what_an_interrupted_publish_left_is_cleared_by_the_next(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make_folder(tmp_path / ".out.replaced", old="0")
    publish(make_folder(staging_path(out), new="2"), out)
    assert list(tmp_path.iterdir()) == [out]


def test_everything_is_on_the_disk_before_the_folder_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = make_folder(tmp_path / "out", old="1")
    staging = staging_path(out)
    make_folder(staging / "train" / "deep", part="1")
    make_folder(staging / "val", part="2")
    write_json(staging / "manifest.json", {})
    content = {staging, *staging.rglob("*")}
    steps: list[Path] = []
    fsync, rename = os.fsync, os.rename

    def noting_fsync(descriptor: int) -> None:
        fsync(descriptor)
        steps.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))

    def noting_rename(source: Path, target: Path) -> None:
        rename(source, target)
        steps.append(Path(f"{Path(source).name} -> {Path(target).name}"))

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "rename", noting_rename)
    publish(staging, out)
    assert set(steps[: len(content)]) == content
    # The folder that the names stand in comes after both renames.
    assert steps[len(content) :] == [Path("out -> .out.replaced"), Path("out.staging -> out"), tmp_path]


def test_what_nfs_keeps_of_an_open_file_may_vanish_while_publishing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make_folder(staging_path(out), manifest="1")
    (staging_path(out) / ".nfs0000a").symlink_to("gone")
    publish(staging_path(out), out)
    assert (out / "manifest").read_text() == "1"


def test_publishing_over_a_link_replaces_the_link_and_not_its_target(tmp_path: Path) -> None:
    target = make_folder(tmp_path / "elsewhere", kept="1")
    out = tmp_path / "out"
    for _ in range(2):
        if not out.exists():
            out.symlink_to(target)
        publish(make_folder(staging_path(out), new="2"), out)
        assert content_of(out) == {"new": "2"}
    assert content_of(target) == {"kept": "1"}


def test_a_crash_before_publishing_leaves_the_old_result(tmp_path: Path) -> None:
    out = make_folder(tmp_path / "out", manifest="old")
    crash = (
        "import os, sys\nfrom pathlib import Path\nfrom sentinode.storage import *\n"
        "out = Path(sys.argv[1])\nwith exclusive(out):\n"
        "    staging_path(out).mkdir()\n    (staging_path(out) / 'manifest').write_text('half')\n    os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", crash, str(out)], check=False).returncode == -signal.SIGKILL
    assert content_of(out) == {"manifest": "old"}
    with exclusive(out):
        assert content_of(staging_path(out)) == {"manifest": "half"}


def test_a_failed_write_leaves_the_old_text_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    write_text_atomic(path, "old")

    def disk_full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space"):
        write_text_atomic(path, "new")
    assert content_of(tmp_path) == {"a.txt": "old"}


def test_temporary_names_differ_also_between_processes_of_the_same_id_on_two_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 1)
    names = {temporary_name(tmp_path / "a.parquet") for _ in range(100)}
    hosts = set()
    for host in ("pod-1", "pod-2"):
        monkeypatch.setattr(os, "uname", lambda host=host: SimpleNamespace(nodename=host))
        hosts.add(temporary_name(tmp_path / "a.parquet").name.split(".")[3].split("-")[0])
    assert len(names) == 100
    assert len(hosts) == 2
    # What prepare looks for when it clears up after a killed run.
    assert all(name.parent == tmp_path and name.match(".*.tmp") and name.name.startswith(".a.parquet.") for name in names)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [1, {"b": float("-inf")}]}])
def test_json_never_holds_a_value_that_is_not_a_number(tmp_path: Path, value: object) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"value": value})
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(value)
    assert list(tmp_path.iterdir()) == []


def test_json_is_written_whole_and_readable(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"µ": [1.5, None], "a": "é"})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"µ": [1.5, None], "a": "é"}


def test_canonical_json_does_not_depend_on_the_order_of_keys() -> None:
    assert canonical_json({"b": 1, "a": {"d": [1.0], "c": None}}) == canonical_json({"a": {"c": None, "d": [1.0]}, "b": 1})
    assert canonical_json({"b": 1}) != canonical_json({"b": 1.5})


def read(folder: Path) -> dict[str, Any]:
    return read_manifest_json(folder, "thing.json", "thing", newest=3)


@pytest.mark.parametrize("where", ["", "no/such/folder", "a-file"])
def test_a_folder_without_a_manifest_is_named_with_what_it_is_not(tmp_path: Path, where: str) -> None:
    (tmp_path / "a-file").write_text("")
    with pytest.raises(ManifestNotFoundError) as caught:
        read(tmp_path / where)
    assert str(caught.value) == f"not a thing: {tmp_path / where} (no thing.json there)"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as JSON"),
        (b'{"format_version": 3', "cannot be read as JSON"),
        (b"\xff\xfe{}", "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b"[3]", "no format_version"),
        (b"3", "no format_version"),
        (b"{}", "no format_version"),
        (b'{"format_version": "3"}', "no format_version"),
        (b'{"format_version": true}', "no format_version"),
        (b'{"format_version": 4}', "format version 4 is newer than 3, the newest this program reads; upgrade sentinode"),
        (b'{"format_version": 1}', "format version 1 is older than 2, the oldest this program reads; make it again"),
        (b'{"format_version": -3}', "format version -3 is older than 2"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "thing.json").write_bytes(content)
    with pytest.raises(ManifestError) as caught:
        read(tmp_path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "thing.json"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("version", [2, 3])
def test_this_format_and_the_one_before_are_read(tmp_path: Path, version: int) -> None:
    write_json(tmp_path / "thing.json", {"format_version": version, "a": 1})
    assert read(tmp_path) == {"format_version": version, "a": 1}


def test_there_never_was_a_format_zero(tmp_path: Path) -> None:
    write_json(tmp_path / "thing.json", {"format_version": 0})
    with pytest.raises(ManifestError, match="format version 0 is older than 1"):
        read_manifest_json(tmp_path, "thing.json", "thing", newest=1)


def test_a_manifest_that_is_a_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "thing.json").mkdir()
    with pytest.raises(ManifestError, match="cannot be read"):
        read(tmp_path)


def test_records_hold_size_and_checksum_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"abc")
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_file(tmp_path / "a.bin") == sha256
    assert file_record(tmp_path, "a.bin") == {"path": "a.bin", "bytes": 3, "sha256": sha256}
