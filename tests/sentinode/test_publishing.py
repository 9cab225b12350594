"""A data set in an object store is complete or does not exist, whoever else writes and wherever it was interrupted."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from sentinode import publishing
from sentinode.errors import ManifestNotFoundError, SentinodeError, StorageError, UsageError
from sentinode.locations import Location, locate
from sentinode.publishing import new_root, publish, staging_of, upload_part, writing
from sentinode.storage import file_record, read_manifest_json, staging_path, write_json
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
    (staging / ".leftover.tmp").write_bytes(b"half")
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
        f"{out}: another run has published thing.json there; what this one uploaded was removed again; choose another --out"
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


def test_an_unreachable_store_is_no_missing_manifest(out: Location, flaky_s3: FlakyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SENTINODE_STORAGE_PATIENCE_S", "0")
    flaky_s3.forever = "503"
    with pytest.raises(StorageError, match="does not answer"):
        read_manifest_json(out, "thing.json", "thing", 1)


def test_a_published_manifest_is_strict_json(out: Location, tmp_path: Path) -> None:
    publish(stage(tmp_path / "staging", "parts-1", note="é"), out, "thing.json")
    assert json.loads((out / "thing.json").read_bytes())["note"] == "é"
