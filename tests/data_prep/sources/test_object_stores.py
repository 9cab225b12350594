"""Every layout in an object store gives what it gives on a disk."""

import errno
from pathlib import Path

import boto3
import numpy as np
import pytest

from data_prep.rejects import RejectReason
from data_prep.sources import files, listing, table
from data_prep.sources.base import Source, Unread
from data_prep.sources.dataset import from_dataset
from data_prep.sources.table import open_table
from data_prep.sources.unpack import unpack
from sentinode.config import PrepareConfig
from sentinode.errors import StorageError, UsageError
from sentinode.images import UInt8Array
from sentinode.locations import Location, locate
from tests.data_prep.sources.helpers import column, opened, pixels, refused, write_kaggle, write_noise
from tests.data_prep.sources.test_dataset import read_all, write_dataset
from tests.data_prep.sources.test_pcam import no_progress, write_part
from tests.s3 import FlakyServer


def upload(folder: Path, uri: str) -> str:
    for path in folder.rglob("*"):
        if path.is_file():
            (locate(uri) / path.relative_to(folder).as_posix()).put_file(path)
    return uri


def same(there: dict[str, UInt8Array | Unread], here: dict[str, UInt8Array | Unread]) -> bool:
    return there.keys() == here.keys() and all(np.array_equal(there[id_], here[id_]) for id_ in here)


def alike(there: Source, here: Source) -> bool:
    """Whether two sources have the same inputs and pixels."""
    return there.entries.equals(here.entries) and refused(there) == refused(here) and same(pixels(there), pixels(here))


def test_kaggle(tmp_path: Path, s3_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_OBJECTS_PER_BATCH", 16)
    write_kaggle(tmp_path / "k", [f"p{row:03d}" for row in range(40)])
    (tmp_path / "k" / "train_labels.csv").open("a").write("gone,1\n")
    slides = tmp_path / "k" / "slides.csv"
    slides.write_text("id,wsi\np001,s1\n")
    there = opened(upload(tmp_path / "k", s3_folder), slides=f"{s3_folder}/slides.csv")
    assert alike(there, opened(tmp_path / "k", slides=slides))
    assert there.files == {"labels": f"{s3_folder}/train_labels.csv", "slides": f"{s3_folder}/slides.csv"}
    assert refused(there) == [("missing", "gone")]
    again = opened(s3_folder, slides=f"{s3_folder}/slides.csv").inputs_sha256
    (locate(s3_folder) / "train/p000.tif").write_bytes(b"changed")
    assert there.inputs_sha256 == again != opened(s3_folder, slides=f"{s3_folder}/slides.csv").inputs_sha256


def test_class_folders_and_unlabelled_images(tmp_path: Path, s3_folder: str) -> None:
    for seed, name in enumerate(("normal/a.tif", "normal/in/b.png", "metastatic/c.tif", "elsewhere/d.tif")):
        write_noise(tmp_path / "c" / name, seed)
    upload(tmp_path / "c", s3_folder)
    assert alike(opened(s3_folder), opened(tmp_path / "c"))
    assert alike(opened(s3_folder, source="unlabelled"), opened(tmp_path / "c", source="unlabelled"))


def test_a_table_may_name_images_in_several_places(tmp_path: Path, s3_folder: str) -> None:
    images = {name: write_noise(tmp_path / f"{name}.tif", seed) for seed, name in enumerate("abcd")}
    for name in "abc":
        (locate(s3_folder) / f"in/{name}.tif").put_file(tmp_path / f"{name}.tif")
    lines = ["path,label", "in/a.tif,0", f"{s3_folder}/in/b.tif,1", "in/c.tif,1", f"{tmp_path}/d.tif,0", "in/gone.tif,0"]
    (locate(s3_folder) / "table.csv").write_bytes("\n".join(lines).encode())
    read = opened(f"{s3_folder}/table.csv")
    assert column(read, "id") == ["a", "b", "c", "d", "gone"]
    found = pixels(read)
    assert found.pop("gone") == Unread(RejectReason.MISSING, "No such file or directory")
    assert same(found, dict(images))


def test_the_digest_of_a_table_follows_its_objects_wherever_they_lie(
    tmp_path: Path, s3_folder: str, flaky_s3: FlakyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"f{number}/in/a{number}.tif" for number in range(4)]
    for seed, name in enumerate(names):
        write_noise(tmp_path / name, seed)
    upload(tmp_path, s3_folder)
    where = tmp_path / "table.csv"
    where.write_text("\n".join(["path,label", *(f"{s3_folder}/{name},0" for name in names), f"{s3_folder}/f0/gone.tif,1"]))

    def listings() -> list[str]:
        return [request for request in flaky_s3.requests if request.startswith("GET")]

    before = opened(where).inputs_sha256
    assert len(listings()) == 5  # f0, and in below each of the four
    flaky_s3.requests.clear()
    monkeypatch.setattr(table, "_MAX_LISTINGS", 3)
    assert opened(where).inputs_sha256 == before
    assert len(listings()) == 1
    (locate(s3_folder) / names[2]).write_bytes(b"another")
    changed = opened(where).inputs_sha256
    (locate(s3_folder) / "f0/gone.tif").write_bytes(b"there")
    assert len({before, changed, opened(where).inputs_sha256}) == 3
    where.write_text(f"path,label\n{s3_folder}/no/a.tif,0\n{s3_folder}/no/b.tif,1\n")
    with pytest.raises(UsageError, match="none of the 2 files that it names exists"):
        opened(where)


def test_a_folder_of_objects_that_may_not_be_listed_is_named(tmp_path: Path, s3_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Location, *, recursive: bool) -> None:
        raise PermissionError(errno.EACCES, "Access Denied", str(folder))

    (tmp_path / "table.csv").write_text(f"path,label\n{s3_folder}/in/a.tif,0\n")
    monkeypatch.setattr(Location, "entries", refuse)
    with pytest.raises(UsageError, match=rf"{s3_folder}/in: cannot be listed, which tells whether its objects have changed \(Access Denied\)"):
        open_table(PrepareConfig(), locate(tmp_path / "table.csv"))


def test_a_large_object_is_refused_by_its_listing_and_never_fetched(
    tmp_path: Path, s3_folder: str, flaky_s3: FlakyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (listing, table):
        monkeypatch.setattr(module, "MAX_FILE_BYTES", 30_000)
    for name in ("normal/a.tif", "metastatic/b.tif"):
        write_noise(tmp_path / "c" / name)
    (tmp_path / "c" / "normal" / "slide.tif").write_bytes(b"II*\0" * 10_000)
    upload(tmp_path / "c", s3_folder)
    lines = ["path,label", "normal/a.tif,0", "normal/slide.tif,0"]
    (locate(s3_folder) / "table.csv").write_bytes("\n".join(lines).encode())
    for source in (opened(s3_folder), opened(s3_folder, source="unlabelled"), opened(f"{s3_folder}/table.csv")):
        assert [(str(reject.reason), reject.path) for reject in source.rejects] == [("unreadable", "normal/slide.tif")]
        assert source.rejects[0].detail.startswith("40000 bytes; a patch has fewer than ")
        flaky_s3.requests.clear()
        pixels(source)
        assert not any("slide.tif" in request for request in flaky_s3.requests)


def test_an_objects_name_is_never_taken_for_another_place(tmp_path: Path, s3_folder: str, flaky_s3: FlakyServer) -> None:
    image = write_noise(tmp_path / "a.tif")
    outside = tmp_path / "outside.tif"
    write_noise(outside, 1)
    for name in ("http://169.254.169.254/x.tif", f"file://{outside}", "a//b.tif", "a.tif"):
        client_put(s3_folder, name, (tmp_path / "a.tif").read_bytes())
    client_put(s3_folder, str(outside), (tmp_path / "a.tif").read_bytes())
    read = opened(s3_folder, source="unlabelled")
    assert refused(read) == [("unreadable", str(outside).removesuffix(".tif"))]
    found = pixels(read)
    assert sorted(found) == ["a", "a//b", f"file://{outside}".removesuffix(".tif"), "http://169.254.169.254/x"]
    assert all(np.array_equal(one, image) for one in found.values())


def client_put(folder: str, name: str, content: bytes) -> None:
    """Put an object under a name that our own code would tidy up."""
    bucket, _, prefix = folder.removeprefix("s3://").partition("/")
    boto3.client("s3").put_object(Bucket=bucket, Key=f"{prefix}/{name}", Body=content)


@pytest.mark.parametrize("packed", [False, True])
def test_pcam(tmp_path: Path, s3_folder: str, packed: bool) -> None:
    for seed, name in enumerate(("test", "train")):
        write_part(tmp_path / "p", name, 3 + seed, seed=seed, packed=packed)
    upload(tmp_path / "p", s3_folder)
    there, here = (unpack(opened(where), tmp_path / str(number), no_progress) for number, where in enumerate((s3_folder, tmp_path / "p")))
    assert alike(there, here)


def test_a_prepared_data_set(tmp_path: Path, s3_folder: str) -> None:
    expected = write_dataset(tmp_path / "d")
    upload(tmp_path / "d", s3_folder)
    assert same(dict(read_all(s3_folder)), dict(expected))
    assert from_dataset(s3_folder).inputs_sha256 == from_dataset(str(tmp_path / "d")).inputs_sha256


def test_a_place_with_nothing_in_it_is_named(s3_folder: str) -> None:
    with pytest.raises(UsageError, match=rf"source {s3_folder}: no such folder or file"):
        opened(s3_folder)


def test_failures_that_pass_go_unnoticed_and_others_stop_the_run(
    tmp_path: Path, s3_folder: str, flaky_s3: FlakyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_kaggle(tmp_path / "k", ["a", "b", "c"])
    upload(tmp_path / "k", s3_folder)
    write_part(tmp_path / "p", "test", 3)
    upload(tmp_path / "p", f"{s3_folder}/p")
    monkeypatch.setenv("SENTINODE_STORAGE_PATIENCE_S", "3")
    flaky_s3.failures = ["503", "drop"]
    images, hdf5 = opened(s3_folder), opened(f"{s3_folder}/p")
    flaky_s3.failures = ["503", "drop", "slow down"]
    assert alike(images, opened(tmp_path / "k"))
    flaky_s3.failures = ["503", "drop"]
    assert alike(hdf5, opened(tmp_path / "p"))
    monkeypatch.setenv("SENTINODE_STORAGE_PATIENCE_S", "0.5")
    flaky_s3.forever = "503"
    for source in (images, hdf5):
        with pytest.raises(StorageError, match="the storage does not answer"):
            pixels(source)
