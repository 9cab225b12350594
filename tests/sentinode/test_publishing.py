"""A data set in an object store is complete or does not exist, whoever else writes and wherever it was interrupted."""

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest

from sentinode import publishing
from sentinode.errors import ManifestNotFoundError, SentinodeError, StorageError, UsageError
from sentinode.locations import Location, locate
from sentinode.publishing import clean_up, new_root, note_found, publish, staging_of, upload_part, writing
from sentinode.storage import file_record, read_manifest_json, replaced_path, staging_path, write_json
from tests.s3 import FlakyServer, Server

FILES = {"train/part-00000.parquet": b"1" * 100, "val/part-00000.parquet": b"2" * 50, "index.parquet": b"3" * 10}


@pytest.fixture
def out(s3_folder: str) -> Location:
    return locate(s3_folder)


def stage(folder: Path, root: str, files: dict[str, bytes] = FILES, **more: Any) -> Path:
    """A finished staging folder."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    write_json(folder / "thing.json", {"format_version": 1, "root": root, "shards": [file_record(folder, name) for name in files], **more})
    return folder


def published(out: Location) -> dict[str, bytes]:
    """What a reader finds: the files that the manifest names."""
    content = read_manifest_json(out, "thing.json", "thing", 1)
    return {record["path"]: (out / content["root"] / record["path"]).read_bytes() for record in content["shards"]}


def puts(server: FlakyServer) -> list[str]:
    return [request.rpartition("/")[2] for request in server.requests if request.startswith("PUT")]


def test_what_was_staged_is_published_below_a_root_of_its_own(out: Location, s3_server: Server, tmp_path: Path) -> None:
    with pytest.raises(ManifestNotFoundError, match="not a thing: s3://"):
        read_manifest_json(out, "thing.json", "thing", 1)
    staging = stage(tmp_path / "staging", "parts-1")
    for name in ("notes.txt", "train/part-00001.parquet", ".leftover.tmp", "work/block"):
        (staging / name).parent.mkdir(exist_ok=True)
        (staging / name).write_bytes(b"not listed")
    publish(staging, out, "thing.json")
    assert published(out) == FILES
    assert sorted(s3_server.keys(out.uri)) == sorted(["thing.json", *(f"parts-1/{name}" for name in FILES)])
    assert not staging.exists()


def test_a_local_output_is_published_by_a_rename(tmp_path: Path) -> None:
    out = locate(tmp_path / "out")
    staging = staging_of(out, tmp_path / "unused")
    assert staging == staging_path(tmp_path / "out")
    with writing(out, staging):
        publish(stage(staging, ""), out, "thing.json")
    assert published(out) == FILES
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_files_that_the_manifest_does_not_list_keep_a_local_folder_from_being_published(tmp_path: Path) -> None:
    out = locate(tmp_path / "out")
    staging = stage(tmp_path / "staging", "")
    for name in ("work/block-1", "work/block-2", "train/part-00001.parquet"):
        (staging / name).parent.mkdir(exist_ok=True)
        (staging / name).write_bytes(b"left over")
    (staging / "work/link").symlink_to(tmp_path)
    with pytest.raises(SentinodeError) as caught:
        publish(staging, out, "thing.json")
    assert str(caught.value) == (
        f"{staging}: train/part-00001.parquet is not listed in thing.json, so nothing was published (4 such files); "
        "remove what is left over there and repeat the command"
    )
    assert not out.exists()
    shutil.rmtree(staging / "work")
    (staging / "train/part-00001.parquet").unlink()
    publish(staging, out, "thing.json")
    assert published(out) == FILES


def test_hidden_files_and_empty_folders_do_not_go_out(tmp_path: Path) -> None:
    out = locate(tmp_path / "out")
    staging = stage(tmp_path / "staging", "")
    for name in (".uploaded/a.json", "train/.part-00000.parquet.0-1-2.tmp", "work/decoded/.nfs0001", ".b"):
        (staging / name).parent.mkdir(parents=True, exist_ok=True)
        (staging / name).write_bytes(b"note")
    publish(staging, out, "thing.json")
    assert {path.relative_to(out.local).as_posix() for path in out.local.rglob("*")} == {"thing.json", "train", "val", *FILES}


def test_what_nfs_will_not_remove_goes_out_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = locate(tmp_path / "out")
    staging = stage(tmp_path / "staging", "")
    for name in ("work/.nfs0001", ".a.tmp"):
        (staging / name).parent.mkdir(exist_ok=True)
        (staging / name).write_bytes(b"")
    unlink = Path.unlink

    def busy(path: Path, missing_ok: bool = False) -> None:
        if path.name.startswith(".nfs"):
            raise OSError(errno.EBUSY, "Device or resource busy")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", busy)
    publish(staging, out, "thing.json")
    assert published(out) == FILES
    assert {path.name for path in out.local.rglob(".*")} == {".nfs0001"}


@pytest.mark.parametrize("where", ["local", "s3"])
def test_a_listed_file_that_is_not_there_keeps_everything_from_being_published(request: pytest.FixtureRequest, tmp_path: Path, where: str) -> None:
    out = locate(tmp_path / "out" if where == "local" else request.getfixturevalue("s3_folder"))
    staging = stage(tmp_path / "staging", "" if where == "local" else "parts-1")
    (staging / "index.parquet").unlink()
    with pytest.raises(SentinodeError, match=r"index.parquet is listed in thing.json, but not there \(1 of 3 files\)"):
        publish(staging, out, "thing.json")
    assert not out.exists()


def test_a_root_is_for_object_stores(tmp_path: Path) -> None:
    with pytest.raises(SentinodeError, match=r"thing\.json: a root in it"):
        publish(stage(tmp_path / "staging", "parts-1"), locate(tmp_path / "out"), "thing.json")


def test_without_a_work_folder_the_staging_lies_where_only_this_user_may_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / f"sentinode-{os.geteuid()}"
    for _ in range(2):
        assert staging_of(locate("s3://a/data")).parent == folder
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert staging_of(locate(tmp_path / "out")) == staging_path(tmp_path / "out")


@pytest.mark.parametrize("trap", ["open", "link", "file", "of another user"])
def test_a_work_folder_that_others_laid_out_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trap: str) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    user = os.geteuid()
    if trap == "of another user":
        user += 1
        monkeypatch.setattr(os, "geteuid", lambda: user)
    folder = tmp_path / f"sentinode-{user}"
    if trap == "link":
        (tmp_path / "elsewhere").mkdir(0o700)
        folder.symlink_to(tmp_path / "elsewhere")
    elif trap == "file":
        folder.write_text("")
    else:
        folder.mkdir(0o700)
        folder.chmod(0o755 if trap == "open" else 0o700)
    with pytest.raises(UsageError, match="chmod 700" if trap == "open" else "somebody else's or a link; name another one with --work"):
        staging_of(locate("s3://a/data"))


def test_temporary_files_that_cannot_be_written_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(UsageError, match=r"cannot be used \(No such file or directory\); name another one with --work"):
        staging_of(locate("s3://a/data"))


def test_staging_folders_of_object_stores_are_told_apart_by_the_uri(tmp_path: Path) -> None:
    first, second = (staging_of(locate(f"s3://{bucket}/data"), tmp_path) for bucket in "ab")
    assert first != second
    assert first.parent == tmp_path
    assert first == staging_of(locate("s3://a/data/"), tmp_path)


def test_on_one_machine_a_second_writer_is_refused_at_once(tmp_path: Path) -> None:
    out = locate("s3://bucket/data")
    staging = staging_of(out, tmp_path)
    with writing(out, staging), pytest.raises(UsageError, match="another process is writing it"), writing(out, staging):
        pytest.fail("two writers")
    with pytest.raises(UsageError, match="s3://bucket: name a folder in the bucket"), writing(locate("s3://bucket"), staging):
        pytest.fail("a whole bucket")


def test_roots_are_unique() -> None:
    assert len({new_root() for _ in range(100)}) == 100


def test_the_manifest_is_put_last(out: Location, flaky_s3: FlakyServer, tmp_path: Path) -> None:
    publish(stage(tmp_path / "staging", "parts-1"), out, "thing.json")
    assert len(puts(flaky_s3)) == 4
    assert puts(flaky_s3)[-1] == "thing.json"


def test_a_manifest_without_a_root_is_refused(out: Location, s3_server: Server, tmp_path: Path) -> None:
    with pytest.raises(SentinodeError, match="no root in it"):
        publish(stage(tmp_path / "staging", ""), out, "thing.json")
    assert s3_server.keys(out.uri) == []


def test_of_two_runs_at_the_same_time_one_wins_and_the_other_says_so_and_leaves_nothing(
    out: Location, s3_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Both have looked and seen no manifest before either puts its own.
    barrier = threading.Barrier(2)
    upload = publishing._upload

    def upload_and_meet(*args: Any) -> None:
        upload(*args)
        barrier.wait()

    monkeypatch.setattr(publishing, "_upload", upload_and_meet)
    failures: list[BaseException] = []

    def run(number: int) -> None:
        try:
            publish(stage(tmp_path / f"staging-{number}", f"parts-{number}", {"a": str(number).encode()}), out, "thing.json")
        except UsageError as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [str(failure) for failure in failures] == [
        f"{out}: another run has published thing.json there; what this one uploaded was removed again; "
        "choose another --out, or repeat the command with --overwrite to replace it"
    ]
    assert failures[0].exit_code == 2  # type: ignore[attr-defined]
    (winner,) = published(out).values()
    assert sorted(s3_server.keys(out.uri)) == [f"parts-{winner.decode()}/a", "thing.json"]


def test_what_is_published_already_is_not_replaced_unasked(out: Location, s3_server: Server, tmp_path: Path) -> None:
    publish(stage(tmp_path / "first", "parts-1"), out, "thing.json")
    upload_part(stage(tmp_path / "second", "parts-2"), "index.parquet", out / "parts-2")
    with pytest.raises(UsageError, match="another run has published"):
        publish(tmp_path / "second", out, "thing.json")
    assert published(out) == FILES
    assert not any(key.startswith("parts-2") for key in s3_server.keys(out.uri))


def test_replacing_deletes_the_old_manifest_first_and_then_only_what_that_lists(
    out: Location, s3_server: Server, flaky_s3: FlakyServer, tmp_path: Path
) -> None:
    publish(stage(tmp_path / "first", "parts-1"), out, "thing.json")
    (out / "parts-1/notes.txt").write_bytes(b"somebody's")
    (out / "other/data").write_bytes(b"somebody's")
    flaky_s3.requests.clear()
    publish(stage(tmp_path / "second", "parts-2", {"a": b"new"}), out, "thing.json", replace=True)
    assert published(out) == {"a": b"new"}
    assert sorted(s3_server.keys(out.uri)) == ["other/data", "parts-1/notes.txt", "parts-2/a", "thing.json"]
    changes = [request for request in flaky_s3.requests if request.startswith(("PUT", "DELETE"))]
    order = [request.partition(f"/{out.name}/")[2] for request in changes]
    assert order[:3] == ["parts-2/a", "thing.json", "thing.json"]
    assert [request.partition(" ")[0] for request in changes[:3]] == ["PUT", "DELETE", "PUT"]


def test_a_manifest_that_another_run_published_since_this_one_began_is_not_replaced(out: Location, s3_server: Server, tmp_path: Path) -> None:
    publish(stage(tmp_path / "old", "parts-0", {"a": b"old"}), out, "thing.json")
    first, second = (stage(tmp_path / name, f"parts-{name}", {"a": name.encode()}) for name in ("first", "second"))
    for staging in (first, second):
        note_found(staging, out, "thing.json")
    publish(first, out, "thing.json", replace=True)
    upload_part(second, "a", out / "parts-second")
    note_found(second, out, "thing.json")  # continued after an interruption: the run began before the other had published
    with pytest.raises(UsageError, match=r"another run has published thing\.json there") as caught:
        publish(second, out, "thing.json", replace=True)
    assert caught.value.exit_code == 2
    assert published(out) == {"a": b"first"}
    assert sorted(s3_server.keys(out.uri)) == ["parts-first/a", "thing.json"]
    # Told of it, the user may say so again.
    note_found(second, out, "thing.json")
    publish(second, out, "thing.json", replace=True)
    assert published(out) == {"a": b"second"}
    assert sorted(s3_server.keys(out.uri)) == ["parts-second/a", "thing.json"]


def test_a_manifest_that_another_run_published_where_there_was_none_is_not_replaced(out: Location, tmp_path: Path) -> None:
    staging = stage(tmp_path / "first", "parts-1")
    note_found(staging, out, "thing.json")
    publish(stage(tmp_path / "second", "parts-2", {"a": b"theirs"}), out, "thing.json")
    with pytest.raises(UsageError, match="another run has published"):
        publish(staging, out, "thing.json", replace=True)
    assert published(out) == {"a": b"theirs"}


def test_a_manifest_that_is_published_during_the_upload_is_not_replaced(
    out: Location, s3_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(stage(tmp_path / "old", "parts-0", {"a": b"old"}), out, "thing.json")
    upload = publishing._upload

    def upload_while_another_publishes(*args: Any) -> None:
        monkeypatch.setattr(publishing, "_upload", upload)
        publish(stage(tmp_path / "other", "parts-1", {"a": b"theirs"}), out, "thing.json", replace=True)
        upload(*args)

    monkeypatch.setattr(publishing, "_upload", upload_while_another_publishes)
    with pytest.raises(UsageError, match="another run has published"):
        publish(stage(tmp_path / "mine", "parts-2", {"a": b"mine"}), out, "thing.json", replace=True)
    assert published(out) == {"a": b"theirs"}
    assert sorted(s3_server.keys(out.uri)) == ["parts-1/a", "thing.json"]


def test_who_deleted_the_old_manifest_and_lost_removes_its_files(
    out: Location, s3_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(stage(tmp_path / "old", "parts-0", {"a": b"old"}), out, "thing.json")
    remove = Location.remove

    def remove_and_another_publishes(location: Location) -> None:
        monkeypatch.setattr(Location, "remove", remove)
        remove(location)
        publish(stage(tmp_path / "other", "parts-1", {"a": b"theirs"}), out, "thing.json")

    monkeypatch.setattr(Location, "remove", remove_and_another_publishes)
    with pytest.raises(UsageError, match="another run has published"):
        publish(stage(tmp_path / "mine", "parts-2", {"a": b"mine"}), out, "thing.json", replace=True)
    assert published(out) == {"a": b"theirs"}
    assert sorted(s3_server.keys(out.uri)) == ["parts-1/a", "thing.json"]


def test_a_data_set_that_was_copied_up_without_a_root_is_replaced(out: Location, s3_server: Server, tmp_path: Path) -> None:
    staging = stage(tmp_path / "copied", "")
    for path in staging.rglob("*"):
        if path.is_file():
            (out / path.relative_to(staging).as_posix()).put_file(path)
    publish(stage(tmp_path / "second", "parts-2", {"a": b"new"}), out, "thing.json", replace=True)
    assert sorted(s3_server.keys(out.uri)) == ["parts-2/a", "thing.json"]


@pytest.mark.parametrize("manifest", [b"{", b"[]", b'{"root": "..", "shards": [{"path": "x"}]}', b'{"root": "", "shards": [{"path": "../x"}]}'])
def test_a_manifest_that_points_elsewhere_has_nothing_removed(out: Location, s3_server: Server, tmp_path: Path, manifest: bytes) -> None:
    (out / "thing.json").write_bytes(manifest)
    (out / "x").write_bytes(b"kept")
    publish(stage(tmp_path / "second", "parts-2", {"a": b"new"}), out, "thing.json", replace=True)
    assert sorted(s3_server.keys(out.uri)) == ["parts-2/a", "thing.json", "x"]


def test_an_interrupted_upload_continues_with_what_is_not_up(
    out: Location, flaky_s3: FlakyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SENTINODE_STORAGE_PATIENCE_S", "0")
    staging = stage(tmp_path / "staging", "parts-1")
    flaky_s3.forever, flaky_s3.only = "503", lambda method, path: method == "PUT" and "/val/" in path
    with pytest.raises(StorageError):
        publish(staging, out, "thing.json")
    with pytest.raises(ManifestNotFoundError):
        published(out)
    flaky_s3.forever = None
    flaky_s3.requests.clear()
    publish(staging, out, "thing.json")
    assert published(out) == FILES
    # Of the three files two may have been sent before the failure; whichever were are not sent again.
    assert len(puts(flaky_s3)) < 4
    assert puts(flaky_s3)[-1] == "thing.json"


def test_parts_that_tasks_have_uploaded_are_not_sent_again(out: Location, flaky_s3: FlakyServer, tmp_path: Path) -> None:
    staging = stage(tmp_path / "staging", "parts-1")
    tasks = [threading.Thread(target=upload_part, args=(staging, name, out / "parts-1")) for name in FILES]
    for task in tasks:
        task.start()
    for task in tasks:
        task.join()
    flaky_s3.requests.clear()
    publish(staging, out, "thing.json")
    assert puts(flaky_s3) == ["thing.json"]
    assert published(out) == FILES


def test_a_part_that_changed_since_or_goes_elsewhere_is_sent_again(out: Location, tmp_path: Path) -> None:
    staging = stage(tmp_path / "staging", "parts-1")
    upload_part(staging, "index.parquet", out / "parts-0")
    upload_part(staging, "index.parquet", out / "parts-1")
    stage(staging, "parts-1", FILES | {"index.parquet": b"4" * 10})
    publish(staging, out, "thing.json")
    assert published(out)["index.parquet"] == b"4" * 10


def test_a_part_that_vanished_from_the_store_is_sent_again(out: Location, tmp_path: Path) -> None:
    staging = stage(tmp_path / "staging", "parts-1")
    for name in FILES:
        upload_part(staging, name, out / "parts-1")
    (out / "parts-1/index.parquet").remove()
    (out / "parts-1/val/part-00000.parquet").write_bytes(b"cut")
    publish(staging, out, "thing.json")
    assert published(out) == FILES


@pytest.mark.parametrize("step", ["before the manifest", "after the manifest", "while removing"])
def test_replacing_continues_wherever_it_was_killed(
    out: Location, s3_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    publish(stage(tmp_path / "first", "parts-1"), out, "thing.json")
    staging = stage(tmp_path / "second", "parts-2", {"a": b"new"})

    class Killed(BaseException):
        pass

    def killed(*args: Any, **kwargs: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        where: tuple[Any, str] = {
            "before the manifest": (Location, "write_bytes"),
            "after the manifest": (publishing, "_remove_replaced"),
            "while removing": (Location, "remove_many"),
        }[step]
        patch.setattr(*where, killed)
        with pytest.raises(Killed):
            publish(staging, out, "thing.json", replace=True)
    publish(staging, out, "thing.json", replace=True)
    assert published(out) == {"a": b"new"}
    assert sorted(s3_server.keys(out.uri)) == ["parts-2/a", "thing.json"]
    assert not staging.exists()


def test_a_manifest_whose_answer_was_lost_counts_as_put(out: Location, flaky_s3: FlakyServer, tmp_path: Path) -> None:
    # The put is repeated, and refused since there is a manifest: our own.
    flaky_s3.failures, flaky_s3.only = ["lost"], lambda method, path: method == "PUT" and path.endswith("thing.json")
    publish(stage(tmp_path / "staging", "parts-1"), out, "thing.json")
    assert puts(flaky_s3).count("thing.json") == 2
    assert published(out) == FILES


def test_old_files_that_cannot_be_removed_do_not_undo_the_result(
    out: Location, flaky_s3: FlakyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    publish(stage(tmp_path / "first", "parts-1"), out, "thing.json")
    monkeypatch.setenv("SENTINODE_STORAGE_PATIENCE_S", "0")
    flaky_s3.forever, flaky_s3.only = "503", lambda method, path: method == "DELETE" and "parts-1" in path
    publish(stage(tmp_path / "second", "parts-2", {"a": b"new"}), out, "thing.json", replace=True)
    assert published(out) == {"a": b"new"}
    assert "files of the replaced data set are left" in caplog.text


def leftovers(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_clearing_up_beside_a_local_folder_takes_what_was_replaced_and_nothing_else(tmp_path: Path) -> None:
    out = locate(tmp_path / "out")
    staging = staging_of(out)
    for name in ("out", ".out.replaced", "out.old", ".other.replaced"):
        stage(tmp_path / name, "")
    stage(staging, "", {"a": b"of another run, to be continued"})
    for _ in range(2):
        clean_up(out, staging, "thing.json")
        assert leftovers(tmp_path) == {"out", "out.staging", "out.old", ".other.replaced"}


def test_clearing_up_never_takes_the_only_folder_there_is(tmp_path: Path) -> None:
    out = locate(tmp_path / "out")
    stage(tmp_path / ".out.replaced", "")
    clean_up(out, staging_of(out), "thing.json")
    assert leftovers(tmp_path) == {".out.replaced"}


def test_clearing_up_waits_for_nobody_and_disturbs_nobody(tmp_path: Path) -> None:
    out = locate(tmp_path / "out")
    for name in ("out", ".out.replaced"):
        stage(tmp_path / name, "")
    with writing(out, staging_of(out)):
        clean_up(out, staging_of(out), "thing.json")
        assert ".out.replaced" in leftovers(tmp_path)


def test_clearing_up_after_an_object_store_takes_what_was_published_and_not_other_work(out: Location, flaky_s3: FlakyServer, tmp_path: Path) -> None:
    staging = staging_of(out, tmp_path / "work")
    stage(staging, "parts-1")
    shutil.copytree(staging, tmp_path / "kept")
    publish(staging, out, "thing.json")
    flaky_s3.requests.clear()
    clean_up(out, staging, "thing.json")
    assert flaky_s3.requests == [], "nothing to clear up, nothing asked"
    shutil.copytree(tmp_path / "kept", staging)
    stage(staging.with_name(f".{staging.name}.done"), "parts-0")
    clean_up(out, staging, "thing.json")
    assert leftovers(tmp_path / "work") == set()
    stage(staging, "parts-2", {"a": b"of a run with another config"})
    (staging / "half").mkdir()
    clean_up(out, staging, "thing.json")
    assert leftovers(tmp_path / "work") == {staging.name}
    (staging / "thing.json").unlink()
    clean_up(out, staging, "thing.json")
    assert leftovers(tmp_path / "work") == {staging.name}


def test_clearing_up_does_not_fail_with_the_store(
    out: Location, flaky_s3: FlakyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SENTINODE_STORAGE_PATIENCE_S", "0")
    staging = stage(tmp_path / "staging", "parts-1")
    flaky_s3.forever = "503"
    clean_up(out, staging, "thing.json")
    assert "what an interrupted run has left is still there" in caplog.text
    assert staging.exists()


# Runs publish in a process of its own and kills that without notice: at the n-th call of one function, before it does anything or after it is done.
KILLED = """
import os, signal, sys
from pathlib import Path
from sentinode import publishing, storage
from sentinode.locations import Location, locate
staging, out, owner, name, number, when = sys.argv[1:]
publishing._CONCURRENT_UPLOADS = 1
owner = {"os": os, "Location": Location, "publishing": publishing}[owner]
action, calls = getattr(owner, name), []
def killing(*args, **named):
    calls.append(1)
    fatal = len(calls) == int(number)
    result = None if fatal and when == "before" else action(*args, **named)
    if fatal:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(owner, name, killing)
publishing.publish(Path(staging), locate(out), "thing.json", replace=True)
"""


def publish_killed(staging: Path, out: Location, *where: str) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(staging), str(out), *where], check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def repeat(staging: Path, out: Location) -> None:
    """What prepare does when it is called again: publish what is finished, or find the output complete."""
    if staging.exists():
        publish(staging, out, "thing.json", replace=True)
    clean_up(out, staging, "thing.json")


@pytest.mark.parametrize(
    ("where", "found"),
    [
        (("os", "rename", "1", "before"), b"old"),
        (("os", "rename", "1", "after"), None),
        (("os", "rename", "2", "before"), None),
        (("os", "rename", "2", "after"), b"new"),
    ],
)
def test_a_process_killed_while_it_publishes_to_disk_loses_nothing(tmp_path: Path, where: tuple[str, ...], found: bytes | None) -> None:
    out = locate(tmp_path / "out")
    staging = staging_of(out)
    publish(stage(staging, "", {"a": b"old"}), out, "thing.json")
    publish_killed(stage(staging, "", {"a": b"new"}), out, *where)
    if found is None:
        assert not out.exists()
        assert published(locate(replaced_path(out.local))) == {"a": b"old"}
        assert published(locate(staging)) == {"a": b"new"}
    else:
        assert published(out) == {"a": found}
    repeat(staging, out)
    assert published(out) == {"a": b"new"}
    assert leftovers(tmp_path) == {"out"}


@pytest.mark.parametrize("replacing", [False, True])
@pytest.mark.parametrize(
    ("where", "found"),
    [
        (("Location", "put_file", "2", "before"), "old"),  # between parts
        (("Location", "put_file", "3", "after"), "old"),  # all parts are up, the last one is not noted
        (("Location", "write_bytes", "1", "before"), None),  # the old manifest is deleted
        (("Location", "write_bytes", "1", "after"), "new"),
        (("publishing", "_discard", "1", "before"), "new"),
        (("os", "rename", "1", "after"), "new"),  # the staging folder has another name, and is still there
    ],
)
def test_a_process_killed_while_it_publishes_to_an_object_store_loses_nothing(
    out: Location, s3_server: Server, tmp_path: Path, where: tuple[str, ...], found: str | None, replacing: bool
) -> None:
    old = {"a": b"old"}
    staging = stage(staging_of(out, tmp_path / "work"), "parts-2")
    if replacing:
        publish(stage(tmp_path / "first", "parts-1", old), out, "thing.json")
        note_found(staging, out, "thing.json")
    publish_killed(staging, out, *where)
    if found == "new" or (found == "old" and replacing):
        assert published(out) == (FILES if found == "new" else old)
    else:
        with pytest.raises(ManifestNotFoundError):
            published(out)
    repeat(staging, out)
    assert published(out) == FILES
    assert sorted(s3_server.keys(out.uri)) == sorted(["thing.json", *(f"parts-2/{name}" for name in FILES)])
    assert leftovers(tmp_path / "work") == set()


def test_an_unreachable_store_is_no_missing_manifest(out: Location, flaky_s3: FlakyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SENTINODE_STORAGE_PATIENCE_S", "0")
    flaky_s3.forever = "503"
    with pytest.raises(StorageError, match="does not answer"):
        read_manifest_json(out, "thing.json", "thing", 1)


def test_a_published_manifest_is_strict_json(out: Location, tmp_path: Path) -> None:
    publish(stage(tmp_path / "staging", "parts-1", note="é"), out, "thing.json")
    assert json.loads((out / "thing.json").read_bytes())["note"] == "é"
