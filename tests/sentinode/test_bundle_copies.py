"""Bundles in an object store: copied, checked, and never a mixture."""

import shutil
from pathlib import Path

import pytest

from sentinode.bundle import Bundle
from sentinode.bundle_copies import local_copy
from sentinode.errors import ManifestError, ManifestNotFoundError, StorageError, UsageError
from sentinode.locations import Location, locate
from sentinode.predictor import Predictor
from sentinode.publishing import upload_folder
from sentinode.verify import verify_folder
from tests import s3
from tests.factories import make_bundle, random_patches


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for temporary files of its own."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.fixture
def stored(temporary: Path, tmp_path: Path, s3_folder: str) -> str:
    upload_folder(make_bundle(tmp_path / "bundle").path, locate(s3_folder), "bundle.json")
    return s3_folder


def test_a_bundle_in_an_object_store_answers_like_the_one_on_disk(stored: str, tmp_path: Path) -> None:
    patches = random_patches(5)
    opened = Bundle.open(stored)
    assert str(opened.where) == stored
    assert (Predictor(opened).logits(patches) == Predictor.load(tmp_path / "bundle").logits(patches)).all()


def test_it_is_copied_once_while_it_stays_the_same(stored: str, s3_server: s3.Server) -> None:
    first = Bundle.open(stored).path
    (first / "left").touch()
    assert Bundle.open(stored).path == first
    assert (first / "left").exists()
    s3_server.client().put_object(Bucket=stored.split("/")[2], Key="folder/engines/torch2/engine.json", Body=b"{}")
    assert Bundle.open(stored).path != first


def test_a_damaged_copy_is_fetched_again(stored: str) -> None:
    copy = Bundle.open(stored).path
    (copy / "model.safetensors").write_bytes(b"cleared away, and something else written")
    assert Bundle.open(stored).verify() == []
    (copy / "bundle.json").unlink()
    assert Bundle.open(stored).verify() == []


def test_an_engine_that_was_cleared_out_of_a_copy_is_fetched_again(stored: str, s3_server: s3.Server) -> None:
    for name in ("engine.json", "model.onnx"):
        s3_server.client().put_object(Bucket=stored.split("/")[2], Key=f"folder/engines/onnxruntime/{name}", Body=b"{}")
    copy = Bundle.open(stored).path
    shutil.rmtree(copy / "engines")
    assert (Bundle.open(stored).path / "engines" / "onnxruntime" / "model.onnx").exists()


def test_weights_that_are_cleared_away_while_a_bundle_is_open_are_told(stored: str) -> None:
    opened = Bundle.open(stored)
    shutil.rmtree(opened.path)
    with pytest.raises(ManifestError, match="is gone, or its copy on this machine is; run the same command again"):
        opened.read_weights()


def test_verifying_looks_at_the_store_and_leaves_copies_alone(stored: str) -> None:
    copy = Bundle.open(stored).path
    (copy / "model.safetensors").write_bytes(b"")
    assert verify_folder(stored) == ("model bundle", [])
    assert (copy / "model.safetensors").read_bytes() == b""


def test_damage_in_the_store_is_refused_and_names_the_store(stored: str, s3_server: s3.Server) -> None:
    s3_server.client().put_object(Bucket=stored.split("/")[2], Key="folder/model.safetensors", Body=b"other weights")
    with pytest.raises(ManifestError, match=rf"{stored}: model.safetensors: sha256 differs from bundle.json"):
        Bundle.open(stored)
    assert verify_folder(stored) == ("model bundle", ["model.safetensors: sha256 differs from bundle.json"])


def test_what_is_no_bundle_is_told(temporary: Path, s3_folder: str) -> None:
    with pytest.raises(ManifestNotFoundError, match=rf"not a model bundle: {s3_folder} \(no bundle.json there\)"):
        Bundle.open(s3_folder)


def test_an_engine_whose_upload_was_cut_off_does_not_count(stored: str, s3_server: s3.Server) -> None:
    s3_server.client().put_object(Bucket=stored.split("/")[2], Key="folder/engines/openvino/model.xml", Body=b"<xml/>")
    assert not (Bundle.open(stored).path / "engines").exists()


def test_nothing_else_below_the_prefix_is_fetched(stored: str, s3_server: s3.Server) -> None:
    for key in ("notes.txt", "checkpoint_1/state.pt", "members/../../outside"):
        s3_server.client().put_object(Bucket=stored.split("/")[2], Key=f"folder/{key}", Body=b"x")
    copy = Bundle.open(stored).path
    assert {path.name for path in copy.iterdir()} == {"bundle.json", "model.safetensors", "model_card.md"}
    assert not (copy.parent / "outside").exists()


def test_a_full_disk_is_told_in_one_line(stored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", stored)

    monkeypatch.setattr("sentinode.locations.Location.get_file", full)
    with pytest.raises(StorageError, match=rf"{stored}: cannot be copied to .* \(No space left on device\); make room there, or set TMPDIR"):
        local_copy(locate(stored))
    assert list(temporary_copies()) == []


def temporary_copies() -> list[Path]:
    """What lies among the copies, locks left out."""
    import tempfile

    return [path for path in Path(tempfile.gettempdir()).rglob("bundles/*") if not path.name.endswith(".lock")]


def test_an_engine_that_goes_while_a_bundle_is_copied_is_done_without(stored: str, s3_server: s3.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    client, bucket = s3_server.client(), stored.split("/")[2]
    for name in ("engine.json", "model.onnx"):
        client.put_object(Bucket=bucket, Key=f"folder/engines/onnxruntime/{name}", Body=b"{}")
    fetch_one = Location.get_file

    def as_it_is_exported_again(self: Location, target: Path) -> None:
        client.delete_object(Bucket=bucket, Key="folder/engines/onnxruntime/engine.json")
        fetch_one(self, target)

    monkeypatch.setattr(Location, "get_file", as_it_is_exported_again)
    copy = local_copy(locate(stored))
    assert (copy / "model.safetensors").is_file()
    assert not (copy / "engines").exists()


def test_a_refused_read_is_wrong_use_and_no_lack_of_room(stored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Location, target: Path) -> None:
        raise PermissionError(13, "Access Denied", str(self))

    monkeypatch.setattr(Location, "get_file", refused)
    with pytest.raises(UsageError, match=rf"^{stored}: cannot be copied to .* \(Access Denied\): {stored}/"):
        local_copy(locate(stored))


def test_a_bundle_is_not_replaced_in_a_store(stored: str, tmp_path: Path) -> None:
    from sentinode.bundle import check_replaceable

    with pytest.raises(UsageError, match="a bundle is there, and in an object store none is replaced"):
        check_replaceable(locate(stored))
    (locate(stored) / "runs" / "one" / "request.json").write_bytes(b"{}")
    with pytest.raises(UsageError, match="exists and is not a model bundle"):
        check_replaceable(locate(stored) / "runs")
    with pytest.raises(UsageError, match="name a folder in the bucket"):
        check_replaceable(locate("/".join(stored.split("/")[:3])))
    upload_folder(tmp_path / "bundle", locate(stored), "bundle.json")  # the same again is no other
    (tmp_path / "bundle" / "bundle.json").write_text("{}")
    with pytest.raises(UsageError, match="another process has published there"):
        upload_folder(tmp_path / "bundle", locate(stored), "bundle.json")
