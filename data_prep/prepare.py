"""The verb prepare: a source of patches becomes a prepared data set, or nothing.

Decoding, the overlap search and the writing of shards run as Ray Data tasks. Pixels stay on disk (a work folder that all nodes must see) and never
pass through Ray's object store; a run that was killed continues from the blocks that are there. The stages, in order:

    decode     inputs -> pixels, anchors and figures, block by block      (decode.py, anchors.py; one task a block)
    check      ids against pixels, equal pixels                           (checks.py; in the driver, figures only)
    group      overlaps -> groups                                         (overlap_search.py, grouping.py)
    deal       groups -> splits and folds, patches -> shards and rows     (splits.py, shards.py)
    write      shards, read back; index, refusals, report, manifest       (shards.py, report.py)
    publish    one rename, or parts and then one put of the manifest      (sentinode/publishing.py)
"""

import hashlib
import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from data_prep.checks import check_duplicates, check_ids
from data_prep.decode import MAY_PASS, decode_block, is_block_complete, read_blocks
from data_prep.grouping import Grouping, StrArray, group_patches, grouping_kind, leak_level, overlap_table
from data_prep.output import PrepareRequest, belongs_to, is_complete, rejected_at
from data_prep.overlap_search import search_overlaps
from data_prep.rejects import Reject, RejectReason, count_reasons, rejects_table
from data_prep.report import data_card
from data_prep.shards import PLAN_COLUMNS, class_weights, count_splits, index_of, place, training_colours, write_shard
from data_prep.sources.base import Source
from data_prep.sources.detect import reader_of
from data_prep.sources.unpack import unpack
from data_prep.splits import Dealt, deal, deal_folds
from data_prep.spool import IntArray, Spool, write_whole
from data_prep.tasks import Progress, run_tasks, what_failed, works_elsewhere
from sentinode.config import PrepareConfig
from sentinode.dataset import fingerprint
from sentinode.dataset_checks import check_records
from sentinode.errors import ManifestError, ManifestNotFoundError, RejectedInputsError, SentinodeError, UsageError
from sentinode.images import UInt8Array
from sentinode.locations import Location, locate
from sentinode.manifests import DATASET_FORMAT_VERSION, DatasetManifest, FileRecord, ShardRecord, SplitMethod, SplitReport, read_dataset_manifest
from sentinode.publishing import clean_up, new_root, note_found, publish, upload_part, writing
from sentinode.storage import canonical_json, file_record, write_json, write_text_atomic
from sentinode.versions import git_commit, library_versions

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrepareResult:
    """The outcome of `prepare`; `already_complete` where nothing had to be done."""

    path: Location
    manifest: DatasetManifest
    already_complete: bool


def prepare(request: PrepareRequest, *, progress: Progress | None = None) -> PrepareResult:
    """Make a prepared data set (DESIGN: contract 1). Ray must run already.

    Parameters
    ----------
    request : PrepareRequest
        From `data_prep.output.request_of`.
    progress : Progress, optional

    Raises
    ------
    UsageError
        The output holds something else, or another process writes it.
    RejectedInputsError
        More inputs were refused than `max_rejected_fraction` allows, or all; `<out>.rejected.parquet` lists them.
    SentinodeError
        The work failed, or Ray does not run. The same request continues it.
    """
    out, staging = request.out, request.staging
    if is_complete(request):
        _clear_up(request)
        return PrepareResult(out, read_dataset_manifest(out), already_complete=True)
    if not ray.is_initialized():
        raise SentinodeError("Ray does not run; start it with ray.init() before prepare")
    if request.work_is_private and works_elsewhere():
        raise UsageError("this Ray has several machines: name a folder that all of them see with --work")
    with writing(out, staging):
        # Asked again: another process may have finished it between the first look and the lock.
        if is_complete(request):
            return PrepareResult(out, read_dataset_manifest(out), already_complete=True)
        try:
            if not _is_finished(request):
                root = _open_staging(request)
                note_found(request.data, out, "dataset.json")
                _work(request, root, progress or _silent)
            manifest = read_dataset_manifest(request.data)
            if not out.is_local:
                _upload(manifest, request, progress or _silent)
            publish(request.data, out, "dataset.json", replace=request.overwrite)
        except OSError as error:
            raise SentinodeError(f"prepare failed: {what_failed(error, staging)}") from error
        shutil.rmtree(staging, ignore_errors=True)
        rejected_at(out).remove()
    return PrepareResult(out, manifest, already_complete=False)


def _clear_up(request: PrepareRequest) -> None:
    """Remove what this request left where it was killed between publishing and the end."""
    clean_up(request.out, request.data, "dataset.json")
    if request.work.parent.exists():
        with suppress(UsageError, OSError), writing(request.out, request.staging):
            shutil.rmtree(request.work.parent)
            request.staging.rmdir()  # other work in it may be continued


def _silent(stage: str, done: int, total: int, unit: str = "patches") -> None:
    pass


def _is_finished(request: PrepareRequest) -> bool:
    """Tell whether a run was killed between writing the manifest and publishing, and what it wrote is whole."""
    try:
        manifest = read_dataset_manifest(request.data)
    except (ManifestNotFoundError, ManifestError):
        return False
    return belongs_to(manifest, request) and not check_records(request.data, [*manifest.shards, *manifest.files])


def _open_staging(request: PrepareRequest) -> str:
    """Keep what an interrupted run of the same request left, delete anything else; returns the root that the run has at its output."""
    note = request.work / "root.json"
    try:
        root = json.loads(note.read_text(encoding="utf-8"))["root"]
    except (OSError, ValueError, KeyError, TypeError):
        shutil.rmtree(request.staging, ignore_errors=True)
        request.work.mkdir(parents=True)
        request.data.mkdir()
        root = "" if request.out.is_local else new_root()
        write_json(note, {"root": root})
    else:
        log.info("continuing an interrupted run")
        for leftover in request.staging.rglob(".*.tmp"):
            leftover.unlink(missing_ok=True)
    return str(root)


def _upload(manifest: DatasetManifest, request: PrepareRequest, progress: Progress) -> None:
    """Send everything but the manifest to the object store; what an interrupted run has sent is not sent again."""
    records = [*manifest.shards, *manifest.files]
    common = {"staging": str(request.data), "out": str(request.out), "root": manifest.root}
    tasks = [{"name": record.path, **common} for record in records]
    weights = [-(-record.bytes // 1_000_000) for record in records]
    run_tasks("upload", _upload_task, tasks, progress, where=request.data, workers=request.config.workers, weights=weights, unit="MB")


def _upload_task(name: str, staging: str, out: str, root: str) -> None:
    upload_part(Path(staging), name, locate(out) / root)


def _work(request: PrepareRequest, root: str, progress: Progress) -> None:
    """Fill the request's data folder, dataset.json last."""
    config, work, data = request.config, request.work, request.data
    (data / "dataset.json").unlink(missing_ok=True)
    # What is known without opening an image, before the hours that images take.
    _refuse_bad_source(request.source.rejects, len(request.source.entries), request)
    source = unpack(request.source, work / "unpacked", partial(progress, unit="bytes"))
    method: SplitMethod = config.split if source.is_labelled else "all"
    kind = grouping_kind(method, slides_known=source.entries["slide"].null_count == 0)
    search = kind == "pixels" and source.overlaps is None
    spool, decoded, decode_rejects = _decode(source, config, work, progress, with_anchors=search)
    patches, id_rejects = check_ids(decoded.take(pc.sort_indices(decoded, [("id", "ascending")])), config.check_ids)
    patches, twin_rejects = check_duplicates(patches, config.duplicates)
    rejects = [*source.rejects, *decode_rejects, *id_rejects, *twin_rejects]
    _refuse_bad_source(rejects, len(patches), request)

    def find() -> pa.Table:
        if source.overlaps is not None:
            return source.overlaps
        found = search_overlaps(spool, work, progress, workers=config.workers, key=_content_key(spool, decoded))
        return overlap_table(found, patches["position"].to_numpy(), np.asarray(patches["id"].to_pylist(), np.str_), config.patch_size_px)

    grouping = group_patches(patches, kind, find)
    dealt = _deal(patches, grouping, method, config)
    level, leak_notes = leak_level(method, grouping, dealt.split)
    placed = place(patches, grouping.groups, dealt.split, dealt.fold, config.seed, config.rows_per_shard)
    shards = _write_shards(placed, spool, config, work, data, progress)
    index = index_of(placed)
    write_whole(data / "index.parquet", partial(pq.write_table, index, compression="zstd"))
    refused = rejects_table(rejects)
    write_whole(data / "rejected.parquet", partial(pq.write_table, refused))
    names = ["index.parquet", "rejected.parquet"]
    if grouping.overlaps is not None:
        write_whole(data / "overlaps.parquet", partial(pq.write_table, grouping.overlaps, compression="zstd"))
        names.append("overlaps.parquet")
    counts = count_splits(placed)
    mean, std = training_colours(placed, config.patch_size_px)
    manifest = DatasetManifest(
        format_version=DATASET_FORMAT_VERSION,
        root=root,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        source={"kind": source.kind, "path": source.where, **source.files, "inputs_sha256": source.inputs_sha256},
        config=config.model_dump(mode="json"),
        counts=counts,
        class_weights=class_weights(counts),
        channel_mean=mean,
        channel_std=std,
        patch_size_px=config.patch_size_px,
        dtype="uint8",
        channel_order="RGB",
        spacing_um_px=config.spacing_um_px,
        split=_split_report(method, config, grouping, [*leak_notes, *dealt.notes]),
        leak_level=level,
        rejected=count_reasons(rejects),
        shards=shards,
        files=[FileRecord(**file_record(data, name)) for name in names],
        fingerprint=fingerprint(index),
        library_versions=library_versions(),
        git_commit=git_commit(),
    )
    write_text_atomic(data / "report.html", data_card(manifest, index, refused, grouping.overlaps, _pixels_by_id(patches, spool)))
    page = FileRecord(**file_record(data, "report.html"))
    write_json(data / "dataset.json", manifest.model_copy(update={"files": [*manifest.files, page]}).model_dump(mode="json"))


def _decode(source: Source, config: PrepareConfig, work: Path, progress: Progress, *, with_anchors: bool) -> tuple[Spool, pa.Table, list[Reject]]:
    entries = source.entries
    size, rows = config.patch_size_px, config.decode_block_rows
    counts = [min(rows, len(entries) - start) for start in range(0, len(entries), rows)]
    listed = work / "entries.parquet"
    if not listed.exists():
        write_whole(listed, partial(pq.write_table, entries, row_group_size=rows))
    missing = [block for block, count in enumerate(counts) if not is_block_complete(work, block, size, count, with_anchors=with_anchors)]
    tasks = [{"block": block, "reader": dict(source.reader), "work": str(work), "size_px": size, "with_anchors": with_anchors} for block in missing]
    weights = [counts[block] for block in missing]
    run_tasks("decode", _decode_task, tasks, progress, where=work, workers=config.workers, weights=weights, done=len(entries) - sum(weights))
    return read_blocks(work, len(counts), size)


def _content_key(spool: Spool, decoded: pa.Table) -> str:
    """Return what says that two spools hold the same pixels in the same places."""
    digest = hashlib.sha256(canonical_json(list(spool.rows)))
    digest.update(np.ascontiguousarray(decoded["checksum"].to_numpy()).tobytes())
    return digest.hexdigest()[:16]


def _decode_task(block: int, reader: dict[str, Any], work: str, size_px: int, with_anchors: bool) -> None:
    entries = pq.ParquetFile(Path(work) / "entries.parquet").read_row_group(block)
    decode_block(block, entries, reader_of(reader), Path(work), size_px, with_anchors=with_anchors)


def _refuse_bad_source(rejects: Sequence[Reject], accepted: int, request: PrepareRequest) -> None:
    """Stop where too much was refused. A dropped duplicate is no loss: its pixels are in the data set."""
    inputs, allowed = request.source.inputs, request.config.max_rejected_fraction
    lost = sum(reject.reason != RejectReason.DUPLICATE_PIXELS for reject in rejects)
    if accepted and lost <= allowed * inputs:
        return
    listed = rejected_at(request.out)
    buffer = BytesIO()
    pq.write_table(rejects_table(rejects), buffer)
    listed.write_bytes(buffer.getvalue())
    if not any(reject.reason in MAY_PASS for reject in rejects):
        # Other inputs or another config are needed to get further, and either starts afresh.
        shutil.rmtree(request.staging, ignore_errors=True)
    counts = count_reasons(rejects)
    listing = ", ".join(f"{count} {reason}" for reason, count in counts.items())
    usual = max(counts, key=lambda reason: counts[reason])
    example = next(reject.detail for reject in rejects if reject.reason == usual)
    raise RejectedInputsError(
        f"{len(rejects)} of {inputs} inputs were refused ({listing}), more than max_rejected_fraction {allowed} allows; "
        f"the first {usual}: {example}; each with its reason in {listed}"
    )


def _deal(patches: pa.Table, grouping: Grouping, method: SplitMethod, config: PrepareConfig) -> Dealt:
    if method == "all":
        return Dealt(np.full(len(patches), "all"), np.full(len(patches), -1, np.int64), [])
    labels = patches["label"].to_numpy().astype(np.int64)
    if method == "predefined":
        split: StrArray = np.asarray(patches["split"].to_pylist(), np.str_)
        fold, notes = deal_folds(labels, grouping.groups, split, config.seed, config.folds)
        return Dealt(split, fold, notes)
    dealt = deal(labels, grouping.groups, config.ratios, config.seed, config.folds)
    if "train" not in dealt.split:
        raise UsageError(f"no patch falls to train with ratios {list(config.ratios)} and {len(patches)} patches")
    return dealt


def _write_shards(placed: pa.Table, spool: Spool, config: PrepareConfig, work: Path, data: Path, progress: Progress) -> list[ShardRecord]:
    names, starts, counts = _runs(placed["shard"])
    for path in data.rglob("*.parquet"):
        # An interrupted run may have had other shards: an input that could not be read then has changed the counts.
        if path.relative_to(data).as_posix() not in names:
            path.unlink()
    write_whole(work / "plan.parquet", partial(_write_plan, placed.select(PLAN_COLUMNS), starts, counts))
    tasks = [
        {
            "number": number,
            "name": name,
            "work": str(work),
            "data": str(data),
            "spool": spool.to_json(),
            "row_group_rows": config.row_group_rows,
            "compression": config.compression,
        }
        for number, name in enumerate(names)
    ]
    records = run_tasks("write", _shard_task, tasks, progress, where=data, workers=config.workers, weights=counts)
    return [ShardRecord(**record, split=name.partition("/")[0], rows=count) for name, count, record in zip(names, counts, records, strict=True)]


def _write_plan(rows: pa.Table, starts: Sequence[int], counts: Sequence[int], path: Path) -> None:
    with pq.ParquetWriter(path, rows.schema) as writer:  # one row group a shard
        for start, count in zip(starts, counts, strict=True):
            writer.write_table(rows.slice(start, count), row_group_size=count)


def _runs(column: pa.ChunkedArray) -> tuple[list[str], list[int], list[int]]:
    """Return value, first row and length of every run of equal values."""
    runs = pc.run_end_encode(column.combine_chunks())
    ends = runs.run_ends.to_numpy().astype(np.int64)
    starts = np.concatenate([[0], ends[:-1]])
    return runs.values.to_pylist(), starts.tolist(), (ends - starts).tolist()


def _shard_task(number: int, name: str, work: str, data: str, spool: dict[str, Any], row_group_rows: int, compression: str) -> dict[str, Any]:
    """Write one shard unless an interrupted run has written this very one: its note in the work folder says from which rows."""
    folder = Path(data)
    note = Path(work) / (name.replace("/", "-") + ".json")
    rows = pq.ParquetFile(Path(work) / "plan.parquet").read_row_group(number)
    plan = hashlib.sha256(str(rows.to_pydict()).encode()).hexdigest()
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
        if found["plan"] == plan and file_record(folder, name) == found["record"]:
            return dict(found["record"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no note, or a part of one: write the shard
    record = write_shard(name, rows, Spool.from_json(spool), folder, row_group_rows=row_group_rows, compression=compression)
    write_json(note, {"plan": plan, "record": record})
    return record


def _pixels_by_id(patches: pa.Table, spool: Spool) -> Callable[[Sequence[str]], UInt8Array]:
    ids, positions = patches["id"].combine_chunks(), patches["position"].to_numpy()

    def pixels(wanted: Sequence[str]) -> UInt8Array:
        rows: IntArray = pc.index_in(pa.array(wanted, pa.string()), value_set=ids).to_numpy().astype(np.int64)
        return spool.take(positions[rows])

    return pixels


def _split_report(method: SplitMethod, config: PrepareConfig, grouping: Grouping, notes: list[str]) -> SplitReport:
    sizes = Counter(grouping.groups.tolist())
    return SplitReport(
        method=method,
        seed=config.seed,
        ratios=config.ratios,
        folds=config.folds if method != "all" else None,
        groups=len(sizes),
        multi_patch_groups=sum(size > 1 for size in sizes.values()),
        largest_group_rows=max(sizes.values()),
        overlap_pairs=None if grouping.overlaps is None else len(grouping.overlaps),
        notes=notes,
    )
