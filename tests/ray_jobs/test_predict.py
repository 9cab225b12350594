import csv
import io
import json
import shutil
import signal
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ray_jobs import predict as predict_module
from ray_jobs import predict_parts
from ray_jobs.inference import BundleActor
from ray_jobs.predict import PREDICTION_SCHEMA, PredictResult, main, predict, write_submission
from ray_jobs.predict_inputs import open_inputs
from ray_jobs.predict_parts import Slice, Work, full_batches, predict_part
from sentinode.bundle import Bundle
from sentinode.config import PredictConfig
from sentinode.dataset import PreparedDataset
from sentinode.errors import SentinodeError, StorageError, UsageError
from sentinode.images import UInt8Array
from sentinode.locations import locate
from sentinode.predictor import Predictor
from sentinode.verify import verify_folder
from tests.factories import make_bundle, random_patches
from tests.processes import Running, running
from tests.ray_jobs.conftest import wait_until_all_free


def _folder(path: Path, count: int) -> Path:
    (path / "deep").mkdir(parents=True)
    for number, patch in enumerate(random_patches(count)):
        Image.fromarray(patch).save(path / ("deep" if number % 2 else ".") / f"p{number:03d}.{'png' if number % 3 else 'tif'}")
    return path


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The parts are made in this process, by one predictor; returns the numbers of those that were."""
    made: list[int] = []

    def run_units(bundle: Bundle, units: list[int], work: Callable[[Predictor, int], pa.Table], *rest: Any) -> pa.Table:
        predictor = Predictor.load(bundle.where)
        tables = []
        for unit in units:
            tables.append(work(predictor, unit))
            made.append(unit)
        return pa.concat_tables(tables)

    class NoRay:
        def __enter__(self) -> None: ...
        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setattr(predict_module, "run_units", run_units)
    monkeypatch.setattr(predict_module, "connected", lambda *args, **options: NoRay())
    monkeypatch.setattr(predict_module, "wants_gpus", lambda *args: False)
    return made


def _rows(result: PredictResult) -> list[dict[str, Any]]:
    return [row for part in result.manifest.parts for row in pq.read_table(result.path / part.path, schema=PREDICTION_SCHEMA).to_pylist()]


def _parts(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.parquet"))}


@pytest.mark.ray
def test_every_file_is_a_row_and_unreadable_ones_say_why(ray_session: None, tmp_path: Path) -> None:
    source, bundle = _folder(tmp_path / "source", 20), make_bundle(tmp_path / "bundle")
    (source / "truncated.tif").write_bytes((source / "p000.tif").read_bytes()[:9000])
    (source / "text.png").write_text("not an image")
    (source / "empty.jpg").touch()
    (source / "slide.svs").write_text("no patch")
    (source / "gone.png").symlink_to("nowhere")
    (source / "notes.txt").write_text("ignored")
    result = predict(PredictConfig(workers=2, batch_size=7, rows_per_part=9), bundle.path, source, tmp_path / "out.parquet")
    rows = {row["id"]: row for row in _rows(result)}
    assert (result.manifest.rows, result.manifest.errors, len(rows), len(result.manifest.parts)) == (25, 5, 25, 3)
    codes = {id_: row["error"].partition(":")[0] for id_, row in rows.items() if row["error"]}
    assert codes == {
        "truncated": "truncated",
        "text": "not_an_image",
        "empty": "empty",
        "slide": "format_not_allowed",
        "gone": "unreadable",
    }
    assert rows["text"]["probability"] is None
    for number, decision in enumerate(Predictor(bundle).decide(random_patches(20))):
        row = rows[f"p{number:03d}"]
        assert row["probability"] == pytest.approx(decision.probability, abs=1e-5)
        assert (row["prediction"], row["needs_review"]) == (decision.prediction, decision.needs_review)
        assert row["model_digest"] == bundle.manifest.digest
        assert Path(row["path"]).is_file()
    assert verify_folder(tmp_path / "out.parquet") == ("folder of predictions", [])
    (tmp_path / "out.parquet" / "part-00000.parquet").write_bytes(b"")
    assert verify_folder(tmp_path / "out.parquet")[1] == ["part-00000.parquet: sha256 differs"]


def test_a_prepared_data_set_is_predicted_whole(without_ray: list[int], dataset: PreparedDataset, tmp_path: Path) -> None:
    result = predict(PredictConfig(rows_per_part=64), make_bundle(tmp_path / "bundle").path, dataset.path, tmp_path / "out.parquet")
    rows = {row["id"]: row for row in _rows(result)}
    assert sorted(rows) == sorted(dataset.index["id"].to_pylist())
    assert result.manifest.errors == 0
    assert {row["path"] for row in rows.values()} == {shard.path for shard in dataset.manifest.shards}
    val = dataset.read_split("val")
    expected = Predictor.load(tmp_path / "bundle").logits(val.images)
    np.testing.assert_allclose([rows[id_]["logit"] for id_ in val.ids.tolist()], expected, atol=1e-5)
    with pytest.raises(UsageError, match="holds patches of 96 px; the bundle accepts 64 px"):
        predict(PredictConfig(), make_bundle(tmp_path / "other", patch_size_px=64).path, dataset.path, tmp_path / "out2.parquet")


def test_an_archive_gives_what_its_folder_gives(without_ray: list[int], tmp_path: Path) -> None:
    source, bundle = _folder(tmp_path / "source", 12), make_bundle(tmp_path / "bundle").path
    (source / "text.png").write_text("not an image")
    with zipfile.ZipFile(tmp_path / "patches.zip", "w", zipfile.ZIP_DEFLATED) as archive, tarfile.open(tmp_path / "patches.tar", "w") as tar:
        for file in sorted(source.rglob("*"), reverse=True):
            if file.is_file():
                archive.write(file, file.relative_to(source))
        tar.add(source, ".")
    expected: list[dict[str, Any]] = []
    for name in ("source", "patches.zip", "patches.tar"):
        result = predict(PredictConfig(batch_size=5, rows_per_part=20), bundle, tmp_path / name, tmp_path / f"{name}.parquet")
        rows = sorted(_rows(result), key=lambda row: str(row["id"]))
        for row in rows:
            row["path"] = str(row["path"]).removeprefix(f"{tmp_path / name}/")
            row["logit"], row["probability"] = (None if row[key] is None else round(row[key], 5) for key in ("logit", "probability"))
        assert result.manifest.errors == 1
        assert rows == (expected or rows)
        expected = rows


def test_a_damaged_member_is_a_row_and_a_damaged_archive_is_refused(without_ray: list[int], tmp_path: Path) -> None:
    source, bundle = _folder(tmp_path / "source", 4), make_bundle(tmp_path / "bundle").path
    with zipfile.ZipFile(tmp_path / "patches.zip", "w") as archive:
        for file in sorted(source.rglob("*.*")):
            archive.write(file, file.name)
        offset = archive.infolist()[0].header_offset + 5000
    content = bytearray((tmp_path / "patches.zip").read_bytes())
    content[offset] ^= 255
    (tmp_path / "patches.zip").write_bytes(content)
    rows = _rows(predict(PredictConfig(), bundle, tmp_path / "patches.zip", tmp_path / "out.parquet"))
    assert [row["error"] is None for row in rows] == [False, True, True, True]
    assert rows[0]["error"].startswith("unreadable: Bad CRC-32")
    (tmp_path / "patches.zip").write_bytes(content[:5000])
    with pytest.raises(UsageError, match=r"damaged, or no \.zip/\.tar archive"):
        open_inputs(str(tmp_path / "patches.zip"))
    (tmp_path / "patches.tar.gz").touch()
    with pytest.raises(UsageError, match="compressed as a whole"):
        open_inputs(str(tmp_path / "patches.tar.gz"))


def test_hdf5_needs_no_labels(without_ray: list[int], tmp_path: Path) -> None:
    patches, bundle = random_patches(5), make_bundle(tmp_path / "bundle")
    (tmp_path / "pcam").mkdir()
    with h5py.File(tmp_path / "pcam" / "camelyonpatch_level_2_split_test_x.h5", "w") as file:
        file["x"] = patches
    result = predict(PredictConfig(batch_size=2), bundle.path, tmp_path / "pcam", tmp_path / "out.parquet")
    assert [row["id"] for row in _rows(result)] == [f"test-{row:06d}" for row in range(5)]
    np.testing.assert_allclose([row["logit"] for row in _rows(result)], Predictor(bundle).logits(patches), atol=1e-5)
    one = open_inputs(str(tmp_path / "pcam" / "camelyonpatch_level_2_split_test_x.h5"))
    assert one.table["id"].to_pylist() == [row["id"] for row in _rows(result)]
    (tmp_path / "pcam" / "one.tif").touch()
    with pytest.raises(UsageError, match="holds both HDF5 files"):
        open_inputs(str(tmp_path / "pcam"))


def test_a_table_names_inputs_and_its_labels_are_not_read(without_ray: list[int], tmp_path: Path) -> None:
    _folder(tmp_path / "source", 3)
    lines = ["path,label", "source/p000.tif,1", "source/p002.png,whatever", "source/none.png,0", ",1"]
    (tmp_path / "patches.csv").write_text("\n".join(lines) + "\n")
    rows = _rows(predict(PredictConfig(), make_bundle(tmp_path / "bundle").path, tmp_path / "patches.csv", tmp_path / "out.parquet"))
    assert {row["id"]: (row["error"] or "").partition(":")[0] for row in rows} == {"p000": "", "p002": "", "none": "missing", "": "missing"}


def test_sources_in_an_object_store_give_the_same(without_ray: list[int], s3_folder: str, tmp_path: Path) -> None:
    source, bundle = _folder(tmp_path / "kaggle" / "test", 9), make_bundle(tmp_path / "bundle").path
    with zipfile.ZipFile(tmp_path / "patches.zip", "w") as archive:
        for file in sorted(source.rglob("*.*")):
            archive.write(file, file.relative_to(tmp_path))
            (locate(s3_folder) / file.relative_to(tmp_path).as_posix()).put_file(file)
    (locate(s3_folder) / "patches.zip").put_file(tmp_path / "patches.zip")
    results = [
        predict(PredictConfig(), bundle, where, tmp_path / f"{number}.parquet")
        for number, where in enumerate((tmp_path / "kaggle", f"{s3_folder}/kaggle", f"{s3_folder}/patches.zip"))
    ]
    found = [{row["id"]: row["probability"] for row in _rows(result)} for result in results]
    assert found[1] == found[0]
    assert found[2] == pytest.approx(found[0], abs=1e-6)
    assert _rows(results[1])[0]["path"].startswith(f"{s3_folder}/kaggle/test/")


def test_a_folder_without_images_and_an_output_that_exists_are_refused(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no images"):
        predict(PredictConfig(), bundle.path, tmp_path / "empty", tmp_path / "out.parquet")
    with pytest.raises(UsageError, match="exists; remove it"):
        predict(PredictConfig(), bundle.path, tmp_path / "empty", tmp_path / "bundle")
    with pytest.raises(UsageError, match="no such folder or file"):
        predict(PredictConfig(), bundle.path, tmp_path / "nowhere", tmp_path / "out.parquet")


def _slices(sizes: list[int]) -> list[Slice]:
    ends = np.cumsum(sizes).tolist()
    return [Slice(np.full((size, 2, 2, 3), end, np.uint8), list(range(end - size, end))) for size, end in zip(sizes, ends, strict=True)]


@pytest.mark.parametrize("sizes", [[4, 4, 2], [1, 0, 3, 4, 2], [0, 0], [3, 3, 3, 1], [10]])
def test_batches_are_filled_across_what_could_be_read(sizes: list[int]) -> None:
    batches = list(full_batches(_slices(sizes), [], 4))
    assert [row for _, rows in batches for row in rows] == list(range(sum(sizes)))
    assert all(len(rows) == len(images) == 4 for images, rows in batches[:-1])
    expected = np.concatenate([piece.images for piece in _slices(sizes)])
    assert np.array_equal(np.concatenate([images for images, _ in batches] or [expected]), expected)


def test_decoding_goes_on_while_the_network_works_and_stays_a_batch_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, bundle, work = _folder(tmp_path / "source", 40), make_bundle(tmp_path / "bundle"), Work.on_disk(tmp_path / "staging", "work")
    inputs = open_inputs(str(source))
    work.data.local.mkdir(parents=True)
    pq.write_table(inputs.table, work.inputs.local)
    begun: list[int] = []
    second = threading.Event()
    original = predict_parts._read_slice

    def noted(*args: Any) -> Slice:
        begun.append(1)
        if len(begun) == 2:
            second.set()
        return original(*args)

    done: list[int] = []

    class Waiting(Predictor):
        def decide(self, patches: UInt8Array, batch_size: int = 256) -> list[Any]:
            # While the network works on the first batch, another thread takes up the second.
            assert second.wait(60)
            assert len(begun) - len(done) <= 3
            done.append(len(patches))
            return super().decide(patches, batch_size)

    monkeypatch.setattr(predict_parts, "_read_slice", noted)
    predict_part(work, inputs.reader, 8, 1, "bundle", Waiting(bundle), 0)
    assert done == [8, 8, 8, 8, 8]


def test_answers_that_are_no_numbers_name_the_bundle_and_publish_nothing(
    without_ray: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, bundle = _folder(tmp_path / "source", 3), make_bundle(tmp_path / "bundle")
    monkeypatch.setattr(Predictor, "logits", lambda self, patches, batch_size=256: np.full(len(patches), np.nan, np.float32))
    with pytest.raises(SentinodeError, match=rf"{bundle.path}: the network's answer is not a number for 3 of 3 patches"):
        predict(PredictConfig(), bundle.path, source, tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()


def test_after_a_failure_an_actor_begins_no_other_part(tmp_path: Path) -> None:
    begun: list[int] = []

    def failing(predictor: Predictor, unit: int) -> pa.Table:
        begun.append(unit)
        raise StorageError("the storage does not answer")

    actor = BundleActor(str(make_bundle(tmp_path / "bundle").path), "auto", "cpu", 1, failing)
    answers = [row for unit in (4, 5) for row in actor(pa.table({"unit": [unit]})).to_pylist()]
    assert begun == [4]
    assert [(row["unit"], row["error"], row["exit_code"]) for row in answers] == [(unit, "the storage does not answer", 1) for unit in (4, 5)]


def test_a_repeated_command_does_nothing_and_a_changed_one_is_refused(without_ray: list[int], tmp_path: Path) -> None:
    source, bundle, out = _folder(tmp_path / "source", 3), make_bundle(tmp_path / "bundle").path, tmp_path / "out.parquet"
    first = predict(PredictConfig(), bundle, source, out)
    # As if killed between the rename and the end.
    out.with_name("out.parquet.staging").mkdir()
    again = predict(PredictConfig(workers=3), bundle, source, out)
    assert (first.already_complete, again.already_complete, without_ray) == (False, True, [0])
    assert again.manifest == first.manifest
    assert not out.with_name("out.parquet.staging").exists()
    with pytest.raises(UsageError, match="other inputs, another bundle or other settings"):
        predict(PredictConfig(batch_size=2), bundle, source, out)
    (source / "new.png").write_bytes((source / "p002.png").read_bytes())
    with pytest.raises(UsageError, match="other inputs, another bundle or other settings"):
        predict(PredictConfig(), bundle, source, out)


def _fail_in_part(monkeypatch: pytest.MonkeyPatch, fatal: int) -> None:
    def failing(*args: Any) -> pa.Table:
        if args[-1] == fatal:
            raise StorageError("the storage does not answer")
        return predict_part(*args)

    monkeypatch.setattr(predict_module, "predict_part", failing)


def test_only_parts_that_are_not_whole_are_made_again(
    without_ray: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, bundle, out = _folder(tmp_path / "source", 11), make_bundle(tmp_path / "bundle").path, tmp_path / "out.parquet"
    config = PredictConfig(batch_size=2, rows_per_part=3)
    predict(config, bundle, source, tmp_path / "undisturbed.parquet")
    without_ray.clear()
    with monkeypatch.context() as patch:
        _fail_in_part(patch, 3)
        with pytest.raises(StorageError):
            predict(config, bundle, source, out)
    staging = out.with_name("out.parquet.staging")
    (data,) = staging.glob("*/data")
    assert sorted(path.name for path in data.iterdir()) == ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    # Damaged since; and one whose note was never written.
    (data / "part-00001.parquet").write_bytes(b"cut off")
    (data.parent / "part-00002.json").unlink()
    kept = (data / "part-00000.parquet").stat()
    without_ray.clear()
    result = predict(config, bundle, source, out)
    assert without_ray == [1, 2, 3]
    assert (result.predicted, result.manifest.rows) == (8, 11)
    now = (out / "part-00000.parquet").stat()
    assert (now.st_ino, now.st_mtime_ns) == (kept.st_ino, kept.st_mtime_ns)
    assert _parts(out) == _parts(tmp_path / "undisturbed.parquet")
    assert not staging.exists()
    assert "continuing: 1 of 4 parts are whole" in capsys.readouterr().out


def test_another_plan_starts_anew_and_says_so(
    without_ray: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, bundle, out = _folder(tmp_path / "source", 6), make_bundle(tmp_path / "bundle").path, tmp_path / "out.parquet"
    with monkeypatch.context() as patch:
        _fail_in_part(patch, 2)
        with pytest.raises(StorageError):
            predict(PredictConfig(rows_per_part=2), bundle, source, out)
    without_ray.clear()
    (source / "p000.tif").touch()
    predict(PredictConfig(rows_per_part=2), make_bundle(tmp_path / "other", seed=1).path, source, out)
    assert without_ray == [0, 1, 2]
    assert "starting anew" in (said := capsys.readouterr().out)
    assert "(other inputs, bundle)" in said


@pytest.fixture
def predicted(without_ray: list[int], tmp_path: Path) -> Callable[[Path], PredictResult]:
    bundle = make_bundle(tmp_path / "bundle").path
    return lambda source: predict(PredictConfig(rows_per_part=4), bundle, source, tmp_path / f"{source.name}.parquet")


def test_a_submission_has_a_line_per_input(predicted: Callable[[Path], PredictResult], tmp_path: Path) -> None:
    result = predicted(_folder(tmp_path / "source", 9))
    write_submission(result, locate(tmp_path / "submission.csv"))
    lines = list(csv.reader(io.StringIO((tmp_path / "submission.csv").read_text())))
    assert lines[0] == ["id", "label"]
    assert {id_: float(label) for id_, label in lines[1:]} == {row["id"]: row["probability"] for row in _rows(result)}
    assert len(lines) == 10


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "text.png",
            b"no image",
            r"1 of 10 inputs have no prediction, first text \(not_an_image: .*\); Kaggle wants one line per id; the predictions",
        ),
        ("p001.png", None, r"1 of 10 inputs have the id of another one, first p001;"),
    ],
)
def test_what_kaggle_would_not_take_is_not_written(
    predicted: Callable[[Path], PredictResult], tmp_path: Path, name: str, content: bytes | None, said: str
) -> None:
    source = _folder(tmp_path / "source", 9)
    (source / name).write_bytes((source / "deep" / "p001.png").read_bytes() if content is None else content)
    result = predicted(source)
    with pytest.raises(SentinodeError, match=said) as refused:
        write_submission(result, locate(tmp_path / "submission.csv"))
    assert refused.value.exit_code == 1
    assert not (tmp_path / "submission.csv").exists()
    assert verify_folder(result.path)[1] == []


def test_the_command_writes_the_submission_also_of_what_is_complete(
    without_ray: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, bundle, out = _folder(tmp_path / "source", 3), make_bundle(tmp_path / "bundle").path, tmp_path / "out.parquet"
    argv = ["--bundle", str(bundle), "--source", str(source), "--out", str(out), "--json"]
    assert main([*argv, "--submission", str(tmp_path / "nowhere" / "submission.csv")]) == 2
    assert not out.exists()
    assert main(argv) == 0
    assert main([*argv, "--submission", str(tmp_path / "submission.csv")]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    done = {"predictions": str(out), "engine": "torch", "rows": 3, "errors": 0, "already_complete": True}
    assert last == done | {"submission": str(tmp_path / "submission.csv")}
    assert len((tmp_path / "submission.csv").read_text().splitlines()) == 4


def _wait_for_notes(staging: Path, count: int, command: Running) -> None:
    deadline = time.monotonic() + 120
    while len(list(staging.glob("*/part-*.json"))) < count:
        assert command.process.poll() is None, "ended before it could be disturbed"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def _made(staging: Path) -> dict[str, tuple[int, int]]:
    """Name -> inode and time of each part that is whole."""
    (work,) = staging.glob("*")
    files = {note.stem: work / "data" / f"{note.stem}.parquet" for note in work.glob("part-*.json")}
    return {name: (file.stat().st_ino, file.stat().st_mtime_ns) for name, file in files.items()}


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize(("ends_it", "code"), [(signal.SIGKILL, -signal.SIGKILL), pytest.param(signal.SIGTERM, 3, marks=pytest.mark.chaos)])
def test_a_driver_that_was_ended_is_continued_by_the_same_command(
    ray_address: str, without_ray: list[int], tmp_path: Path, ends_it: signal.Signals, code: int
) -> None:
    source, bundle, out = tmp_path / "source", make_bundle(tmp_path / "bundle", input_size_px=96), tmp_path / "out.parquet"
    source.mkdir()
    for number, patch in enumerate(random_patches(20)):
        Image.fromarray(patch).save(source / f"{number:04d}.png")
    for number in range(20, 240):
        shutil.copy(source / f"{number % 20:04d}.png", source / f"{number:04d}.png")
    argv = ["predict", "--bundle", bundle.path, "--source", source, "--out", out, "--set", "batch_size=4", "rows_per_part=8"]
    with running(*argv, ray_address=ray_address) as command:
        _wait_for_notes(tmp_path / "out.parquet.staging", 3, command)
        command.process.send_signal(ends_it)
        assert command.process.wait(60) == code
    assert not out.exists()
    # Its actor may have gone on for a moment.
    wait_until_all_free(60)
    kept = _made(tmp_path / "out.parquet.staging")
    assert 3 <= len(kept) < 30
    result = predict(PredictConfig(batch_size=4, rows_per_part=8), bundle.path, source, out)
    assert without_ray == [unit for unit in range(30) if f"part-{unit:05d}" not in kept]
    assert {file.stem: (file.stat().st_ino, file.stat().st_mtime_ns) for file in out.glob("*.parquet")}.items() >= kept.items()
    expected = Predictor(bundle).logits(random_patches(20))
    np.testing.assert_allclose([row["logit"] for row in _rows(result)], np.tile(expected, 12), atol=1e-4)
    assert verify_folder(out)[1] == []
