"""Folders and files on disk and in an object store behave alike, also while the storage fails."""

import errno
import os
import pickle
import threading
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from aiohttp import ClientPayloadError
from botocore.exceptions import ClientError, ConnectTimeoutError, IncompleteReadError, ParamValidationError, ReadTimeoutError
from fsspec.exceptions import FSTimeoutError
from s3fs.errors import translate_boto_error

from sentinode import locations
from sentinode.errors import ConfigError, StorageError
from sentinode.locations import Location, locate
from sentinode.retries import store_meaning
from tests.s3 import SECRET, FlakyServer, Server


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    return locate(tmp_path / "folder") if request.param == "local" else locate(request.getfixturevalue("s3_folder"))


def test_a_location_is_a_path_or_a_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert (locate("a").uri, locate("a").local, locate("a").is_local) == (f"{tmp_path}/a", tmp_path / "a", True)
    assert locate("file:///a/b").uri == "/a/b"
    assert locate(tmp_path) == Location(str(tmp_path))
    assert locate("s3://bucket//a/b/").uri == "s3://bucket/a/b"
    assert not locate("s3://bucket/a").is_local
    assert (locate("s3://bucket/a/b").name, locate("s3://bucket").name, locate("/a/b").name) == ("b", "", "b")
    assert str(locate("s3://bucket/a") / "train/part-0") == "s3://bucket/a/train/part-0"
    assert locate("/a") / "" == locate("/a")
    assert locate("/") / "a" == locate("/a")
    assert locate(locate("s3://bucket/a").with_name("a.rejected.parquet")).uri == "s3://bucket/a.rejected.parquet"
    assert pickle.loads(pickle.dumps(locate("s3://bucket/a"))) == locate("s3://bucket/a")  # noqa: S301
    with pytest.raises(ConfigError, match="s3:// is not supported yet for this"):
        _ = locate("s3://bucket/a").local
    with pytest.raises(ConfigError, match="name a folder or a file in it"):
        locate("s3://bucket").with_name("b")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("", "a path is empty"),
        ("s3://", "expected s3://BUCKET/FOLDER"),
        ("s3:///key", "expected s3://BUCKET/FOLDER"),
        ("http://host/data", "http:// is not supported; use a local path or one of s3://, gs://"),
        ("file://host/a", "expected file:///"),
    ],
)
def test_what_is_no_location_is_refused_in_one_line(uri: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        locate(uri)


def test_credentials_in_a_uri_are_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError) as caught:
        locate(f"s3://key:{SECRET}@bucket/a")
    assert SECRET not in str(caught.value)


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locations.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        locate("s3://bucket/a")
    assert str(caught.value) == "s3:// needs s3fs: pip install 'sentinode[s3]'"


def test_what_is_written_is_read(folder: Location) -> None:
    file = folder / "a/b [1]*?#.bin"
    assert not folder.exists()
    assert not folder.is_dir()
    assert not file.exists()
    file.write_bytes(b"123")
    assert (file.exists(), file.is_dir(), file.size(), file.read_bytes()) == (True, False, 3, b"123")
    assert (folder.exists(), folder.is_dir(), (folder / "a").is_dir()) == (True, True, True)
    file.write_bytes(b"")
    assert (file.size(), file.read_bytes()) == (0, b"")
    file.remove()
    file.remove()
    assert not file.exists()


def test_what_does_not_exist_is_said_with_its_name(folder: Location) -> None:
    (folder / "other").write_bytes(b"")
    for read in (Location.read_bytes, Location.size, Location.open_input, Location.entries):
        with pytest.raises(FileNotFoundError) as caught:
            read(folder / "none")
        assert caught.value.filename == (folder / "none").uri
        assert caught.value.errno == errno.ENOENT
    with pytest.raises(FileNotFoundError):
        folder.size()


def test_a_listing_has_sizes_and_stamps_and_tells_changes(folder: Location) -> None:
    for name, data in {"b.txt": b"12", "a/x": b"1", "a/c/y": b"", ".hidden": b"h"}.items():
        (folder / name).write_bytes(data)
    assert [(entry.name, entry.size, entry.is_dir) for entry in folder.entries()] == [(".hidden", 1, False), ("a", 0, True), ("b.txt", 2, False)]
    before = folder.entries(recursive=True)
    assert [(entry.name, entry.size, entry.is_dir) for entry in before] == [
        (".hidden", 1, False),
        ("a/c/y", 0, False),
        ("a/x", 1, False),
        ("b.txt", 2, False),
    ]
    assert all(entry.stamp for entry in before)
    (folder / "b.txt").write_bytes(b"34")
    changed = [old.name for old, new in zip(before, folder.entries(recursive=True), strict=True) if old != new]
    assert changed == ["b.txt"]
    with pytest.raises(NotADirectoryError):
        (folder / "b.txt").entries()


def test_links_are_followed_but_not_around_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x").write_bytes(b"1")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "folder" / "circle").symlink_to(tmp_path / "folder")
    (tmp_path / "folder" / "dangling").symlink_to(tmp_path / "nowhere")
    found = locate(tmp_path / "folder").entries(recursive=True)
    assert [(entry.name, entry.stamp == "unreadable") for entry in found] == [("dangling", True), ("link/x", False)]


def test_more_objects_than_one_page_are_listed_with_one_request_a_page(s3_server: Server, flaky_s3: FlakyServer) -> None:
    bucket = s3_server.new_bucket()
    s3_server.fill(bucket, (f"many/{number:04d}.tif" for number in range(1001)))
    assert len(locate(f"{bucket}/many").entries(recursive=True)) == 1001
    assert len(flaky_s3.requests) == 2


def test_folder_markers_of_other_tools_are_no_files(s3_server: Server, s3_folder: str) -> None:
    bucket, _, key = s3_folder[5:].partition("/")
    for name in ("", "a/", "a/x"):
        s3_server.client().put_object(Bucket=bucket, Key=f"{key}/{name}", Body=b"")
    assert [entry.name for entry in locate(s3_folder).entries(recursive=True)] == ["a/x"]
    assert [entry.name for entry in locate(s3_folder).entries()] == ["a"]


def test_many_objects_are_read_in_order_and_a_missing_one_is_its_own_error(s3_folder: str) -> None:
    folder = locate(s3_folder)
    names = [f"{number:03d} [x].tif" for number in range(150)]
    for name in names:
        (folder / name).write_bytes(name.encode())
    names.insert(7, "missing.tif")
    contents = folder.read_many(names)
    assert isinstance(contents[7], FileNotFoundError)
    assert [content for content in contents if isinstance(content, bytes)] == [name.encode() for name in names if name != "missing.tif"]
    assert folder.read_many([]) == []


def test_many_objects_take_one_request_each(s3_folder: str, flaky_s3: FlakyServer) -> None:
    folder = locate(s3_folder)
    for number in range(10):
        (folder / str(number)).write_bytes(b"x")
    flaky_s3.requests.clear()
    assert folder.read_many([str(number) for number in range(10)]) == [b"x"] * 10
    assert len(flaky_s3.requests) == 10


def test_parquet_and_hdf5_are_read_through_an_open_file(folder: Location, tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": range(100_000)}), tmp_path / "a.parquet")
    values = np.arange(3_000_000)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = values
    for name in ("a.parquet", "a.h5"):
        (folder / name).write_bytes((tmp_path / name).read_bytes())
    with (folder / "a.parquet").open_input() as source:
        assert pq.read_table(source)["a"].to_pylist() == list(range(100_000))
    with (folder / "a.h5").open_input() as source, h5py.File(source, "r") as file:
        np.testing.assert_array_equal(file["x"][1_000_000:1_500_000], values[1_000_000:1_500_000])


def test_a_large_object_is_read_whole(s3_folder: str, tmp_path: Path) -> None:
    # Above 50 MiB objects are read, above 100 MiB written, in several requests.
    data = np.random.default_rng(0).bytes(110 << 20)
    (tmp_path / "large").write_bytes(data)
    large = locate(s3_folder) / "large"
    large.put_file(tmp_path / "large")
    assert large.read_bytes() == data


def test_of_several_creators_one_wins(folder: Location) -> None:
    (folder / "other").write_bytes(b"")
    outcomes: list[bytes | None] = []
    barrier = threading.Barrier(8)

    def create(data: bytes) -> None:
        barrier.wait()
        try:
            (folder / "manifest").write_bytes(data, create_only=True)
            outcomes.append(data)
        except FileExistsError:
            outcomes.append(None)

    threads = [threading.Thread(target=create, args=(str(number).encode(),)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count(None) == 7
    assert [(folder / "manifest").read_bytes()] == [outcome for outcome in outcomes if outcome is not None]


def test_creating_what_is_there_already_with_the_same_bytes_is_done(folder: Location) -> None:
    # So looks a put whose answer was lost, when it is repeated.
    for _ in range(2):
        (folder / "manifest").write_bytes(b"same", create_only=True)


@pytest.mark.parametrize("failure", ["503", "slow down", "drop", "cut"])
def test_a_store_that_fails_for_a_moment_is_waited_for(s3_folder: str, flaky_s3: FlakyServer, failure: str, tmp_path: Path) -> None:
    folder = locate(s3_folder)
    names = [str(number) for number in range(20)]
    for name in names:
        (folder / name).write_bytes(name.encode())
    (tmp_path / "file").write_bytes(b"file")
    reads: dict[str, Any] = {
        "read_bytes": (lambda: (folder / "7").read_bytes(), b"7"),
        "read_many": (lambda: folder.read_many(names), [name.encode() for name in names]),
        "open_input": (lambda: (folder / "12").open_input().read(), b"12"),
    }
    other: dict[str, Any] = {
        "exists": ((folder / "7").exists, True),
        "none": ((folder / "none").exists, False),
        "entries": (lambda: len(folder.entries(recursive=True)), 20),
        "write": (lambda: (folder / "7").write_bytes(b"7"), None),
        "create": (lambda: (folder / "new").write_bytes(b"new", create_only=True), None),
        "put": (lambda: (folder / "file").put_file(tmp_path / "file"), None),
        "remove": ((folder / "file").remove, None),
    }
    for what, (action, expected) in (reads if failure == "cut" else reads | other).items():
        flaky_s3.failures = [failure] * 2
        # A size has no body that could be cut off.
        flaky_s3.only = (lambda method, path: method == "GET") if failure == "cut" else None
        assert action() == expected, what
        assert flaky_s3.failures == [], what


@pytest.mark.parametrize("failure", ["503", "drop"])
def test_a_store_that_stays_down_is_one_line_within_the_patience(
    s3_folder: str, flaky_s3: FlakyServer, failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SENTINODE_STORAGE_PATIENCE_S", "0.5")
    flaky_s3.forever = failure
    folder = locate(s3_folder)
    for action in (folder.exists, folder.entries, folder.read_bytes, lambda: folder.read_many(["a"]), lambda: folder.write_bytes(b"")):
        started = time.monotonic()
        with pytest.raises(StorageError) as caught:
            action()
        assert time.monotonic() - started < 30
        assert str(caught.value).startswith(s3_folder)
        assert "the storage does not answer (" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert SECRET not in str(caught.value)


def test_a_port_where_nothing_listens_is_one_line(s3_folder: str, flaky_s3: FlakyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SENTINODE_STORAGE_PATIENCE_S", "0.5")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://someone:" + SECRET + "@127.0.0.1:9")
    with pytest.raises(StorageError, match="does not answer") as caught:
        locate(s3_folder).read_bytes()
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        ReadTimeoutError(endpoint_url="http://host/bucket"),
        ConnectTimeoutError(endpoint_url="http://host/bucket"),
        IncompleteReadError(actual_bytes=1, expected_bytes=2),
        ClientPayloadError("Response payload is not completed"),
        FSTimeoutError(),
        TimeoutError("The request timed out"),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        translate_boto_error(ClientError({"Error": {"Code": "InternalError", "Message": "We encountered an internal error."}}, "GetObject")),
        translate_boto_error(ClientError({"Error": {"Code": "502", "Message": "Bad Gateway"}}, "HeadObject")),
    ],
)
def test_what_may_pass_is_recognised_in_all_its_forms(error: Exception) -> None:
    meaning = store_meaning(error, "s3://bucket/a")
    assert isinstance(meaning, StorageError)
    assert str(meaning).startswith("s3://bucket/a: the storage does not answer (")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (translate_boto_error(ClientError({"Error": {"Code": "AccessDenied", "Message": "Access Denied"}}, "GetObject")), PermissionError),
        (translate_boto_error(ClientError({"Error": {"Code": "ExpiredToken", "Message": "The token has expired."}}, "GetObject")), PermissionError),
        (translate_boto_error(ClientError({"Error": {"Code": "NoSuchBucket", "Message": "No such bucket"}}, "GetObject")), FileNotFoundError),
        (translate_boto_error(ClientError({"Error": {"Code": "InvalidBucketName", "Message": "Invalid"}}, "GetObject")), OSError),
        (translate_boto_error(ClientError({"Error": {"Code": "NotImplemented", "Message": "If-None-Match"}}, "PutObject")), OSError),
        (ParamValidationError(report="Invalid bucket name"), OSError),
    ],
)
def test_what_will_not_pass_is_an_os_error_at_once(error: Exception, kind: type[OSError]) -> None:
    meaning = store_meaning(error, "s3://bucket/a")
    assert type(meaning) is kind
    assert meaning.filename == "s3://bucket/a"


def test_a_mistake_in_the_program_is_not_taken_for_a_storage_that_fails() -> None:
    error = KeyError("a")
    assert store_meaning(error, "s3://bucket/a") is error


def test_missing_credentials_are_said_and_not_waited_for(s3_folder: str, flaky_s3: FlakyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(PermissionError, match="no usable credentials found"):
        locate(s3_folder).read_bytes()
    with pytest.raises(PermissionError, match="no usable credentials found"):
        locate(s3_folder).read_many(["a"])


def test_a_patience_that_is_no_number_is_refused(s3_folder: str, flaky_s3: FlakyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SENTINODE_STORAGE_PATIENCE_S", "long")
    flaky_s3.forever = "drop"
    with pytest.raises(ConfigError, match="SENTINODE_STORAGE_PATIENCE_S=long: expected a number of seconds"):
        locate(s3_folder).read_bytes()


def failing(times: int, number: int) -> Any:
    """Stands for Path.read_bytes: fails so many times with this errno."""
    remaining = [number] * times

    def read(path: Path) -> bytes:
        if remaining:
            raise OSError(remaining.pop(), os.strerror(number), str(path))
        return b"content"

    return read


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN])
def test_a_file_server_that_fails_for_a_moment_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(Path, "read_bytes", failing(3, number))
    assert locate(tmp_path / "a").read_bytes() == b"content"


def test_a_file_server_that_stays_away_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_bytes", failing(100, errno.ESTALE))
    with pytest.raises(StorageError, match=r"a: cannot be read or written \(Stale file handle\); repeat the command"):
        locate(tmp_path / "a").read_bytes()


def test_refused_access_is_a_permission_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_bytes", failing(1, errno.EACCES))
    with pytest.raises(PermissionError):
        locate(tmp_path / "a").read_bytes()


@pytest.mark.parametrize("condition", [{"Condition": "If-None-Match"}, {}])
def test_a_put_refused_because_the_object_is_there_means_that_whatever_the_store_says_of_it(condition: dict[str, str]) -> None:
    refused = ClientError({"Error": {"Code": "PreconditionFailed", "Message": "…"} | condition}, "PutObject")
    translated = translate_boto_error(refused)
    translated.__cause__ = refused
    for error in (refused, translated):
        assert isinstance(store_meaning(error, "s3://bucket/key"), FileExistsError)


def test_a_local_one_goes_wherever_a_path_does_and_others_say_why_not(tmp_path: Path) -> None:
    assert Path(locate(tmp_path)) == tmp_path
    with pytest.raises(ConfigError, match="s3:// is not supported yet for this"):
        os.fspath(locate("s3://bucket/key"))
