import csv
import html
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep.output import PrepareRequest, is_complete, rejected_at, request_of
from data_prep.prepare import prepare as run
from data_prep.synth import synthesize
from data_prep.tasks import run_tasks
from sentinode.config import PrepareConfig
from sentinode.dataset import INDEX_SCHEMA, REJECTED_SCHEMA, PreparedDataset, row_schema
from sentinode.errors import RejectedInputsError, SentinodeError, UsageError
from sentinode.locations import locate
from sentinode.manifests import LEAK_MEANING
from sentinode.storage import staging_path
from tests.data_prep.helpers import write_source
from tests.data_prep.preparing import killed_at, prepare

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

CONFIG = PrepareConfig(decode_block_rows=64, rows_per_shard=50, row_group_rows=16, folds=3)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(tmp_path_factory.mktemp("source") / "synth", 200, seed=7)


@pytest.fixture(scope="module")
def prepared(source: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> PreparedDataset:
    out = tmp_path_factory.mktemp("prepared") / "out"
    assert not prepare(CONFIG, source, out).already_complete
    return PreparedDataset.open(out)


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Path:
    """A source that a test may damage."""
    return Path(shutil.copytree(source, tmp_path / "source"))


def broken_task() -> None:
    raise ZeroDivisionError("a mistake in the program")


class Recorder:
    """Progress that remembers what each stage had to do and began with."""

    def __init__(self) -> None:
        self.totals: dict[str, int] = {}
        self.done_before: dict[str, int] = {}

    def __call__(self, stage: str, done: int, total: int, unit: str = "patches") -> None:
        self.done_before.setdefault(stage, done)
        self.totals[stage] = total


def test_the_data_set_is_whole_and_nothing_else_is_left(prepared: PreparedDataset) -> None:
    assert prepared.verify() == []
    assert sorted(path.name for path in prepared.path.iterdir()) == [
        "dataset.json",
        "index.parquet",
        "overlaps.parquet",
        "rejected.parquet",
        "report.html",
        "test",
        "train",
        "val",
    ]
    assert [path.name for path in prepared.path.parent.iterdir()] == ["out"]
    counts = prepared.manifest.counts
    assert sum(split.rows for split in counts.values()) == 200
    assert [shard.rows for shard in prepared.manifest.shards if shard.split == "train"][:-1] == [50] * ((counts["train"].rows - 1) // 50)
    assert prepared.manifest.leak_level == "pixels"
    assert "patches of one slide may stand in several splits" in LEAK_MEANING[prepared.manifest.leak_level]
    assert LEAK_MEANING["pixels"] in html.unescape((prepared.path / "report.html").read_text())
    assert prepared.manifest.class_weights == {"normal": 1.0, "metastatic": counts["train"].normal / counts["train"].metastatic}


def test_bare_pyarrow_reads_the_pixels_of_the_source(prepared: PreparedDataset, source: Path) -> None:
    for shard in prepared.manifest.shards:
        file = pq.ParquetFile(prepared.path / shard.path)
        assert file.schema_arrow.equals(row_schema(96), check_metadata=False)
        assert json.loads(file.schema_arrow.field("image").metadata[b"shape"]) == [96, 96, 3]
        assert file.metadata.row_group(0).num_rows == min(16, shard.rows)
        for row in file.read().to_pylist():
            with Image.open(source / "train" / f"{row['id']}.tif") as image:
                assert row["image"] == image.tobytes()


def test_the_index_agrees_with_the_shards_and_the_labels(prepared: PreparedDataset, source: Path) -> None:
    assert prepared.index.schema.equals(INDEX_SCHEMA)
    rows = prepared.index.to_pylist()
    assert [row["id"] for row in rows] == sorted(row["id"] for row in rows)
    with (source / "train_labels.csv").open() as file:
        labels = {row["id"]: int(row["label"]) for row in csv.DictReader(file)}
    assert {row["id"]: row["label"] for row in rows} == labels
    assert all((row["fold"] is None) == (row["split"] == "test") for row in rows)
    shards = {shard.path: prepared.read_shard(shard) for shard in prepared.manifest.shards}
    for row in rows:
        shard = shards[row["shard"]]
        assert (shard.ids[row["row"]], shard.labels[row["row"]], shard.groups[row["row"]]) == (row["id"], row["label"], row["group"])
        assert row["shard"].startswith(row["split"] + "/")
        assert row["id"] == row["pixel_sha1"]
        assert (source / row["source_path"]).is_file()


def test_overlapping_patches_never_straddle_a_split(prepared: PreparedDataset, source: Path) -> None:
    with (source / "truth.csv").open() as file:
        field = {row["id"]: row["field"] for row in csv.DictReader(file)}
    rows = prepared.index.to_pylist()
    for key in ("group", "field"):
        split_of: dict[str, str] = {}
        for row in rows:
            name = row["group"] if key == "group" else field[row["id"]]
            assert split_of.setdefault(name, row["split"]) == row["split"]
    assert {row["group"] for row in rows} == {min(r["id"] for r in rows if field[r["id"]] == name) for name in set(field.values())}


def test_channel_statistics_are_those_of_the_training_pixels(prepared: PreparedDataset) -> None:
    pixels = prepared.read_split("train").images.reshape(-1, 3).astype(np.float64) / 255
    np.testing.assert_allclose(prepared.manifest.channel_mean, pixels.mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(prepared.manifest.channel_std, pixels.std(axis=0), rtol=1e-9)


def test_the_fingerprint_follows_neither_blocks_nor_order_nor_place(prepared: PreparedDataset, copy: Path, tmp_path: Path) -> None:
    lines = (copy / "train_labels.csv").read_text().splitlines()
    (copy / "train_labels.csv").write_text("\n".join([lines[0], *reversed(lines[1:])]))
    changed = CONFIG.model_copy(update={"decode_block_rows": 17, "rows_per_shard": 4096, "compression": "zstd", "workers": 1})
    assert prepare(changed, copy, tmp_path / "out").manifest.fingerprint == prepared.manifest.fingerprint
    other = CONFIG.model_copy(update={"seed": 1})
    assert prepare(other, copy, tmp_path / "other").manifest.fingerprint != prepared.manifest.fingerprint


def test_a_finished_output_is_left_alone_and_another_request_needs_overwrite(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = prepare(CONFIG, source, out).manifest
    again = prepare(CONFIG, source, out)
    assert again.already_complete
    assert again.manifest == first
    other = CONFIG.model_copy(update={"seed": 1})
    with pytest.raises(UsageError, match=r"another config \(seed\).*--overwrite"):
        prepare(other, source, out)
    replaced = prepare(other, source, out, overwrite=True)
    assert not replaced.already_complete
    assert PreparedDataset.open(out).manifest == replaced.manifest
    (out / "val" / "part-00000.parquet").unlink()
    with pytest.raises(UsageError, match=r"val/part-00000.parquet is missing or damaged.*--overwrite"):
        is_complete(request_of(other, source, out))


def test_other_inputs_need_overwrite(copy: Path, tmp_path: Path) -> None:
    prepare(CONFIG, copy, tmp_path / "out")
    with (copy / "train_labels.csv").open("a") as file:
        file.write("\n")
    with pytest.raises(UsageError, match=r"other inputs.*--overwrite"):
        prepare(CONFIG, copy, tmp_path / "out")


@pytest.mark.parametrize("stage", ["_deal", "index_of", "publish"])
def test_a_killed_run_continues_where_it_was(prepared: PreparedDataset, source: Path, tmp_path: Path, stage: str) -> None:
    out = tmp_path / "out"
    killed_at(stage, CONFIG, source, out)
    assert not out.exists()
    blocks = sorted(staging_path(out).glob("*/work/block-*.parquet"))
    if blocks:
        blocks[0].unlink()  # as if the kill had come before the first block was done
    recorder = Recorder()
    result = prepare(CONFIG, source, out, progress=recorder)
    assert recorder.done_before.get("decode") == (None if stage == "publish" else 200 - 64)
    assert result.manifest.fingerprint == prepared.manifest.fingerprint
    assert [shard.sha256 for shard in result.manifest.shards] == [shard.sha256 for shard in prepared.manifest.shards]
    assert PreparedDataset.open(out).verify() == []
    assert not staging_path(out).exists()


def test_what_another_request_left_behind_is_not_continued(source: Path, tmp_path: Path) -> None:
    work = staging_path(tmp_path / "out") / "0123456789abcdef" / "work"
    work.mkdir(parents=True)
    (work / "root.json").write_text('{"root": ""}')
    (work / "block-00000.parquet").write_text("old")
    recorder = Recorder()
    prepare(CONFIG, source, tmp_path / "out", progress=recorder)
    assert recorder.done_before["decode"] == 0


def test_too_many_refused_inputs_fail_the_run_and_leave_the_list(copy: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for path in sorted((copy / "train").iterdir())[:3]:
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(RejectedInputsError, match=r"3 of 200 inputs were refused \(3 truncated\)"):
        prepare(CONFIG, copy, out)
    assert not out.exists()
    assert not staging_path(out).exists()
    table = pq.read_table(rejected_at(locate(out)).local)
    assert table.schema.equals(REJECTED_SCHEMA)
    assert table["reason"].to_pylist() == ["truncated"] * 3
    result = prepare(CONFIG.model_copy(update={"max_rejected_fraction": 0.05}), copy, out)
    assert result.manifest.rejected == {"truncated": 3}
    assert sum(counts.rows for counts in result.manifest.counts.values()) == 197
    assert not rejected_at(locate(out)).exists()


def test_what_is_known_to_be_refused_fails_the_run_before_an_image_is_read(copy: Path, tmp_path: Path) -> None:
    lines = (copy / "train_labels.csv").read_text().splitlines()
    (copy / "train_labels.csv").write_text("\n".join([*lines[:-5], *(line[:-1] + "tumour" for line in lines[-5:])]))
    recorder = Recorder()
    message = (
        r"5 of 200 inputs were refused \(5 bad_label\), more than .*; the first bad_label: line 197 has label 'tumour'; expected 0 or 1; each with"
    )
    with pytest.raises(RejectedInputsError, match=message):
        prepare(CONFIG, copy, tmp_path / "out", progress=recorder)
    assert recorder.totals == {}
    assert pq.read_table(rejected_at(locate(tmp_path / "out")).local)["reason"].to_pylist() == ["bad_label"] * 5


def test_a_source_without_any_good_patch_fails(copy: Path, tmp_path: Path) -> None:
    for path in (copy / "train").iterdir():
        path.write_bytes(b"II*\0")
    with pytest.raises(RejectedInputsError, match=r"200 of 200 inputs were refused \(200 truncated\)"):
        prepare(PrepareConfig(max_rejected_fraction=1), copy, tmp_path / "out")


def test_splitting_by_slide_keeps_slides_together(source: Path, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"split": "slide"})
    manifest = prepare(config, source, tmp_path / "out", slides=source / "slides.csv").manifest
    rows = PreparedDataset.open(tmp_path / "out").index.to_pylist()
    assert manifest.leak_level == "slide"
    assert manifest.split.overlap_pairs is None
    assert all(row["group"] == row["slide"] for row in rows)
    assert len({(row["slide"], row["split"]) for row in rows}) == len({row["slide"] for row in rows})


def test_a_random_split_carries_its_warning(source: Path, tmp_path: Path) -> None:
    manifest = prepare(CONFIG.model_copy(update={"split": "random"}), source, tmp_path / "out").manifest
    assert manifest.leak_level == "none"
    assert "too good" in LEAK_MEANING[manifest.leak_level]
    assert manifest.split.groups == 200


def test_pixels_that_change_on_disk_after_decoding_stop_the_run(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flip_a_bit(placed: object, spool: object, *rest: object) -> list[object]:
        path = spool.files[0]  # type: ignore[attr-defined]
        data = bytearray(path.read_bytes())
        data[100] ^= 1
        path.write_bytes(data)
        return write_shards(placed, spool, *rest)  # type: ignore[arg-type, return-value]

    from data_prep.prepare import _write_shards as write_shards

    monkeypatch.setattr("data_prep.prepare._write_shards", flip_a_bit)
    with pytest.raises(SentinodeError, match="decoded pixels on disk have changed"):
        prepare(CONFIG, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_mistake_inside_a_task_is_named_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(SentinodeError, match=r"^stage failed: ZeroDivisionError: a mistake in the program$"):
        run_tasks("stage", broken_task, [{}], Recorder(), where=tmp_path)


def test_an_input_that_becomes_readable_between_two_runs_is_searched_for_overlaps_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every later patch has another place in the spool then: nothing of the first search may be used."""
    rng = np.random.default_rng(1)
    field = rng.integers(0, 256, (96, 96 + 40 * 30, 3), dtype=np.uint8)
    patches = {f"{number:02d}": np.ascontiguousarray(field[:, 40 * number : 40 * number + 96]) for number in range(30)}
    folder = write_source(tmp_path / "source", patches)
    missing = folder / "train" / "00.tif"
    content, away = missing.read_bytes(), tmp_path / "elsewhere.tif"
    missing.unlink()
    missing.symlink_to(away)
    config = PrepareConfig(decode_block_rows=8, max_rejected_fraction=0.5)
    killed_at("_deal", config, folder, tmp_path / "out")
    away.write_bytes(content)
    request = request_of(config, folder, tmp_path / "out")
    # As an object of a table that comes late, or a file server that is back: the listing is as it was.
    (left,) = request.staging.iterdir()
    monkeypatch.setattr(PrepareRequest, "key", left.name)
    manifest = run(request).manifest
    assert manifest.rejected == {}
    assert manifest.split.overlap_pairs == 29 + 28
    index = PreparedDataset.open(tmp_path / "out").index
    assert set(index["group"].to_pylist()) == {"00"}


def test_inputs_that_are_all_refused_before_decoding_leave_the_list(copy: Path, tmp_path: Path) -> None:
    lines = (copy / "train_labels.csv").read_text().splitlines()
    (copy / "train_labels.csv").write_text("\n".join([lines[0], *(line for line in lines[1:] for _ in range(2))]))
    with pytest.raises(RejectedInputsError, match="400 duplicate_id"):
        prepare(PrepareConfig(max_rejected_fraction=1), copy, tmp_path / "out")
    assert len(pq.read_table(rejected_at(locate(tmp_path / "out")).local)) == 400


def test_a_refused_run_keeps_its_work_where_inputs_may_become_readable(copy: Path, tmp_path: Path) -> None:
    victim = next((copy / "train").iterdir())
    content = victim.read_bytes()
    victim.unlink()
    victim.symlink_to(tmp_path / "gone.tif")
    config = CONFIG.model_copy(update={"max_rejected_fraction": 0.0})
    with pytest.raises(RejectedInputsError, match="1 unreadable"):
        prepare(config, copy, tmp_path / "out")
    assert any(staging_path(tmp_path / "out").glob("*/work/block-*.parquet"))
    victim.unlink()
    victim.write_bytes(content)
    assert prepare(config, copy, tmp_path / "out").manifest.rejected == {}


def test_what_is_left_by_a_kill_after_publishing_is_cleared_up_by_the_same_command(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("data_prep.prepare.shutil.rmtree", lambda *arguments, **named: None)
        killed_at("rejected_at", CONFIG, source, tmp_path / "out")
    assert staging_path(tmp_path / "out").exists()
    assert prepare(CONFIG, source, tmp_path / "out").already_complete
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_finished_staging_folder_that_was_damaged_is_not_published(source: Path, tmp_path: Path) -> None:
    killed_at("publish", CONFIG, source, tmp_path / "out")
    (shard,) = staging_path(tmp_path / "out").glob("*/data/train/part-00000.parquet")
    shard.write_bytes(b"")  # the machine lost its power before the disk had it
    prepare(CONFIG, source, tmp_path / "out")
    assert PreparedDataset.open(tmp_path / "out").verify() == []
