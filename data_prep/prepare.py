"""The verb prepare: a folder of labelled patches becomes a prepared data set, or nothing.

Decoding, the overlap search and the writing of shards run as Ray Data tasks. Pixels stay on disk (a staging folder beside the output, which all nodes
must see); a run that was killed continues from the blocks that are there.
"""

import hashlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import ray

from data_prep.decode import decode_block, is_block_complete, read_blocks
from data_prep.labels import Entry
from data_prep.output import PrepareRequest, belongs_to, is_complete, rejected_path, request_of
from data_prep.overlap import Overlaps, connected_groups, find_overlaps, union
from data_prep.rejects import DecodedPatch, Reject, check_all, count_reasons, write_rejects
from data_prep.report import render_report
from data_prep.shards import Placed, channel_statistics, class_weights, count_splits, place, shard_rows, write_index, write_shard
from data_prep.splits import Dealt, deal
from data_prep.spool import Spool, anchors_path
from data_prep.tasks import Progress, run_tasks
from sentinode.config import PrepareConfig
from sentinode.dataset import fingerprint
from sentinode.errors import ManifestError, ManifestNotFoundError, RejectedInputsError, SentinodeError, UsageError
from sentinode.manifests import DATASET_FORMAT_VERSION, DatasetManifest, FileRecord, LeakLevel, ShardRecord, SplitReport, read_dataset_manifest
from sentinode.storage import canonical_json, exclusive, file_record, local_path, publish, staging_path, write_json, write_text_atomic
from sentinode.versions import git_commit, library_versions

log = logging.getLogger(__name__)

_ANCHORS_PER_JOIN = 1 << 23  # about 0.5 GB at the widest point of one task
_LEAK_LEVELS: dict[str, LeakLevel] = {"overlap": "pixels", "slide": "slide", "random": "none"}


@dataclass(frozen=True)
class PrepareResult:
    """The outcome of `prepare`; `already_complete` where nothing had to be done."""

    path: Path
    manifest: DatasetManifest
    already_complete: bool


def prepare(
    config: PrepareConfig,
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    labels: str | os.PathLike[str] | None = None,
    slides: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> PrepareResult:
    """Make a prepared data set (DESIGN: contract 1) of a source in the Kaggle layout. Ray must run already.

    Parameters
    ----------
    config : PrepareConfig
    source : str or path
        Folder with `train_labels.csv` and `train/*.tif`.
    out : str or path
        Folder to make.
    labels, slides : str or path, optional
        CSV files `id,label` and `id,wsi`.
    overwrite : bool
        Replace a prepared data set that is at `out`.
    progress : callable, optional
        Called as progress(stage, done, total).

    Raises
    ------
    UsageError
        Inputs are missing, or `out` holds something else.
    RejectedInputsError
        More inputs were refused than `max_rejected_fraction` allows, or all; `<out>.rejected.parquet` lists them.
    SentinodeError
        The work failed, or Ray does not run.
    """
    folder = local_path(out)
    request = request_of(config, source, labels=labels, slides=slides)
    if is_complete(request, folder, overwrite=overwrite):
        return PrepareResult(folder, read_dataset_manifest(folder), already_complete=True)
    if not ray.is_initialized():
        raise SentinodeError("Ray does not run; start it with ray.init() before prepare")
    with exclusive(folder):
        # Asked again: another process may have finished it between the first look and the lock.
        if is_complete(request, folder, overwrite=overwrite):
            return PrepareResult(folder, read_dataset_manifest(folder), already_complete=True)
        staging = staging_path(folder)
        if not _is_finished(staging, request):
            _open_staging(staging, request)
            _work(request, staging, folder, progress or (lambda stage, done, total: None))
        manifest = read_dataset_manifest(staging)
        shutil.rmtree(staging / "work", ignore_errors=True)
        publish(staging, folder)
        rejected_path(folder).unlink(missing_ok=True)
    return PrepareResult(folder, manifest, already_complete=False)


def _is_finished(staging: Path, request: PrepareRequest) -> bool:
    """Tell whether a run was killed between writing the manifest and publishing."""
    try:
        return belongs_to(read_dataset_manifest(staging), request)
    except (ManifestNotFoundError, ManifestError):
        return False


def _open_staging(staging: Path, request: PrepareRequest) -> None:
    """Keep what an interrupted run of the same request left, delete anything else."""
    note = staging / "work" / "request.json"
    try:
        same = json.loads(note.read_text(encoding="utf-8")) == request.as_json()
    except (OSError, ValueError):
        same = False
    if not same:
        shutil.rmtree(staging, ignore_errors=True)
        note.parent.mkdir(parents=True)
        write_json(note, request.as_json())
    else:
        log.info("continuing an interrupted run")
        for leftover in staging.rglob(".*.tmp"):
            leftover.unlink(missing_ok=True)


def _work(request: PrepareRequest, staging: Path, out: Path, progress: Progress) -> None:
    """Fill the staging folder, dataset.json last."""
    config, source, work = request.config, request.source, staging / "work"
    spool, decoded, decode_rejects = _decode(request, work, progress)
    accepted, late_rejects = check_all(decoded, config.check_ids)
    rejects = [*source.rejects, *decode_rejects, *late_rejects]
    _refuse_bad_source(rejects, len(accepted), source.inputs, config, staging, out)
    groups, overlap_pairs = _group(accepted, spool, config, work, progress)
    dealt = deal(accepted, groups, config.ratios, config.seed, config.folds)
    if "train" not in dealt.split.values():
        raise UsageError(f"no patch falls to train with ratios {list(config.ratios)} and {len(accepted)} patches")
    placed = place(accepted, groups, dealt.split, dealt.fold, config.seed, config.rows_per_shard)
    shards = _write_shards(placed, spool, config, staging, progress)
    index = write_index(staging / "index.parquet", placed)
    write_rejects(staging / "rejected.parquet", rejects)
    counts = count_splits(placed)
    mean, std = channel_statistics(placed, config.patch_size_px)
    manifest = DatasetManifest(
        format_version=DATASET_FORMAT_VERSION,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        source={
            "kind": "kaggle",
            "path": str(source.folder),
            "labels": str(source.labels),
            "slides": str(source.slides) if source.slides else None,
            "inputs_sha256": source.inputs_sha256,
        },
        config=config.model_dump(mode="json"),
        counts=counts,
        class_weights=class_weights(counts),
        channel_mean=mean,
        channel_std=std,
        patch_size_px=config.patch_size_px,
        dtype="uint8",
        channel_order="RGB",
        spacing_um_px=config.spacing_um_px,
        split=_split_report(config, groups, overlap_pairs, dealt),
        leak_level=_LEAK_LEVELS[config.split],
        rejected=count_reasons(rejects),
        shards=shards,
        files=[FileRecord(**file_record(staging, name)) for name in ("index.parquet", "rejected.parquet")],
        fingerprint=fingerprint(index),
        library_versions=library_versions(),
        git_commit=git_commit(),
    )
    write_text_atomic(staging / "report.html", render_report(manifest, placed, spool))
    page = FileRecord(**file_record(staging, "report.html"))
    write_json(staging / "dataset.json", manifest.model_copy(update={"files": [*manifest.files, page]}).model_dump(mode="json"))


def _decode(request: PrepareRequest, work: Path, progress: Progress) -> tuple[Spool, list[DecodedPatch], list[Reject]]:
    config, entries = request.config, request.source.entries
    size, with_anchors = config.patch_size_px, config.split == "overlap"
    blocks = [entries[start : start + config.decode_block_rows] for start in range(0, len(entries), config.decode_block_rows)]
    tasks = [
        {
            "block": number,
            "entries": [asdict(entry) for entry in block],
            "source": str(request.source.folder),
            "work": str(work),
            "size_px": size,
            "with_anchors": with_anchors,
        }
        for number, block in enumerate(blocks)
        if not is_block_complete(work, number, size, len(block), with_anchors=with_anchors)
    ]
    run_tasks("decode", _decode_task, tasks, progress)
    return read_blocks(work, len(blocks), size)


def _decode_task(block: int, entries: list[dict[str, Any]], source: str, work: str, size_px: int, with_anchors: bool) -> bool:
    return decode_block(block, [Entry(**entry) for entry in entries], Path(source), Path(work), size_px, with_anchors=with_anchors)


def _refuse_bad_source(rejects: list[Reject], accepted: int, inputs: int, config: PrepareConfig, staging: Path, out: Path) -> None:
    if accepted and len(rejects) <= config.max_rejected_fraction * inputs:
        return
    write_rejects(rejected_path(out), rejects)
    # Other inputs or another config are needed to get further, and either starts afresh.
    shutil.rmtree(staging, ignore_errors=True)
    counts = ", ".join(f"{count} {reason}" for reason, count in count_reasons(rejects).items())
    raise RejectedInputsError(
        f"{len(rejects)} of {inputs} inputs were refused ({counts}), more than max_rejected_fraction {config.max_rejected_fraction} allows; "
        f"each with its reason in {rejected_path(out)}"
    )


def _group(patches: Sequence[DecodedPatch], spool: Spool, config: PrepareConfig, work: Path, progress: Progress) -> tuple[list[str], int | None]:
    """Return the group of each patch, and how many pairs overlap where that was searched for. `patches` are sorted by id."""
    if config.split == "random":
        return [patch.id for patch in patches], None
    if config.split == "slide":
        return [patch.slide or patch.id for patch in patches], None
    blocks = len(spool.rows)
    anchors = sum(np.load(anchors_path(work, block), mmap_mode="r").shape[1] for block in range(blocks))
    parts = max(1, -(-anchors // _ANCHORS_PER_JOIN))
    tasks = [{"work": str(work), **_spool_arguments(spool), "part": part, "parts": parts} for part in range(parts)]
    overlaps = union(_as_overlaps(rows) for rows in run_tasks("overlap", _overlap_task, tasks, progress))
    # Refused patches glue nothing: they are not in the data set. Numbered by id, the smallest member of a group has its smallest id.
    rank = {patch.position: number for number, patch in enumerate(patches)}
    pairs = [(rank[a], rank[b]) for a, b in overlaps.pairs if a in rank and b in rank]
    return [patches[smallest].id for smallest in connected_groups(len(patches), pairs).tolist()], len(pairs)


def _overlap_task(work: str, files: list[str], counts: list[int], size_px: int, part: int, parts: int) -> list[list[int]]:
    spool = Spool(tuple(map(Path, files)), tuple(counts), size_px)
    anchor_files = [anchors_path(Path(work), block) for block in range(len(files))]
    return [list(row) for row in find_overlaps(spool, anchor_files, part, parts).rows()]


def _as_overlaps(rows: list[list[int]]) -> Overlaps:
    columns = np.asarray(rows, np.int64).reshape(-1, 4)
    return Overlaps(columns[:, 0], columns[:, 1], columns[:, 2], columns[:, 3])


def _spool_arguments(spool: Spool) -> dict[str, Any]:
    return {"files": [str(path) for path in spool.files], "counts": list(spool.rows), "size_px": spool.size_px}


def _write_shards(placed: Sequence[Placed], spool: Spool, config: PrepareConfig, staging: Path, progress: Progress) -> list[ShardRecord]:
    tasks = [
        {
            "name": name,
            "rows": rows,
            "staging": str(staging),
            "row_group_rows": config.row_group_rows,
            "compression": config.compression,
            **_spool_arguments(spool),
        }
        for name, rows in shard_rows(placed).items()
    ]
    records = run_tasks("write", _shard_task, tasks, progress)
    return [ShardRecord(**record, split=task["name"].partition("/")[0], rows=len(task["rows"])) for task, record in zip(tasks, records, strict=True)]


def _shard_task(
    name: str, rows: list[dict[str, Any]], staging: str, row_group_rows: int, compression: str, files: list[str], counts: list[int], size_px: int
) -> dict[str, Any]:
    """Write one shard unless an interrupted run has written this very one: its note beside the spool says from which rows."""
    note = Path(staging) / "work" / (name.replace("/", "-") + ".json")
    plan = hashlib.sha256(canonical_json(rows)).hexdigest()
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
        if found["plan"] == plan and file_record(Path(staging), name) == found["record"]:
            return dict(found["record"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no note, or a part of one: write the shard
    spool = Spool(tuple(map(Path, files)), tuple(counts), size_px)
    record = write_shard(name, rows, spool, Path(staging), row_group_rows=row_group_rows, compression=compression)
    write_json(note, {"plan": plan, "record": record})
    return record


def _split_report(config: PrepareConfig, groups: Sequence[str], overlap_pairs: int | None, dealt: Dealt) -> SplitReport:
    sizes = Counter(groups)
    return SplitReport(
        method=config.split,
        seed=config.seed,
        ratios=config.ratios,
        folds=config.folds,
        groups=len(sizes),
        multi_patch_groups=sum(size > 1 for size in sizes.values()),
        largest_group_rows=max(sizes.values()),
        overlap_pairs=overlap_pairs,
        notes=dealt.notes,
    )
