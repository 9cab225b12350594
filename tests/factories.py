"""Small real things for tests: a data set manifest and a bundle with random weights."""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sentinode.bundle import Bundle, write_bundle
from sentinode.config import TrainConfig
from sentinode.dataset import INDEX_SCHEMA, Patches, PreparedDataset, fingerprint, images_to_column, row_schema
from sentinode.images import UInt8Array
from sentinode.manifests import DatasetManifest, FileRecord, ReferenceStatistics, ShardRecord, SplitCounts, SplitReport, ThresholdRule
from sentinode.model import build_model, state_for_storage
from sentinode.storage import file_record, write_json


def dataset_manifest(**changes: object) -> DatasetManifest:
    fields = dict(
        format_version=1,
        created_at="2026-01-01T00:00:00+00:00",
        source={"kind": "kaggle"},
        config={},
        counts={},
        class_weights=None,
        channel_mean=(0.7, 0.55, 0.7),
        channel_std=(0.2, 0.3, 0.2),
        patch_size_px=96,
        dtype="uint8",
        channel_order="RGB",
        spacing_um_px=0.972,
        split=SplitReport(
            method="overlap",
            seed=42,
            ratios=(0.7, 0.15, 0.15),
            folds=None,
            groups=0,
            multi_patch_groups=0,
            largest_group_rows=0,
            overlap_pairs=0,
            notes=[],
        ),
        leak_level="pixels",
        rejected={},
        shards=[],
        files=[],
        fingerprint="0" * 64,
        library_versions={},
        git_commit=None,
    )
    return DatasetManifest(**(fields | changes))


def make_bundle(
    out: Path,
    *,
    seed: int = 0,
    input_size_px: int = 32,
    threshold: float = 0.4,
    temperature: float = 1.3,
    bias: float = -0.1,
    patch_size_px: int = 96,
) -> Bundle:
    """A ResNet-18 with random weights (BatchNorm in its initial state), whose logits differ from patch to patch."""
    torch.manual_seed(seed)
    model = build_model("resnet18", weights="none")
    return write_bundle(
        out,
        state_for_storage(model),
        config=TrainConfig(arch="resnet18", weights="none", unfreeze_depth=5, input_size_px=input_size_px),
        dataset=dataset_manifest(patch_size_px=patch_size_px),
        temperature=temperature,
        bias=bias,
        threshold=threshold,
        threshold_rule=ThresholdRule(target_recall=0.95, bound=0.9, reached=False),
        metrics={"roc_auc": 0.5},
        reference=ReferenceStatistics(
            channel_mean=(0.7, 0.55, 0.7),
            channel_std=(0.2, 0.3, 0.2),
            positive_rate=0.4,
            review_rate=0.9,
            probability_deciles=[0.1 * k for k in range(1, 10)],
        ),
    )


def random_patches(count: int, seed: int = 0, side_px: int = 96) -> UInt8Array:
    """Coloured noise around a per-patch tint, uint8 (count, side, side, 3): different patches get clearly different logits."""
    generator = np.random.default_rng(seed)
    tint = generator.integers(40, 216, (count, 1, 1, 3))
    return np.clip(tint + generator.normal(0, 30, (count, side_px, side_px, 3)), 0, 255).astype(np.uint8)


def learnable_patches(count: int, seed: int = 0, side_px: int = 96) -> Patches:
    """Patches whose centre is darker where the label is 1, with enough noise that nothing is certain; pairs of rows share a group."""
    generator = np.random.default_rng(seed)
    labels = (np.arange(count) % 5 < 2).astype(np.int64)
    images = generator.normal(170, 25, (count, side_px, side_px, 3))
    quarter = side_px // 3
    images[:, quarter:-quarter, quarter:-quarter] -= (labels * 60 + generator.normal(0, 20, count)).reshape(-1, 1, 1, 1)
    ids = np.asarray([f"{seed:02d}-{row:06d}" for row in range(count)])
    groups = np.asarray([f"{seed:02d}-{row // 2:06d}" for row in range(count)])
    return Patches(ids, labels, groups, np.clip(images, 0, 255).astype(np.uint8))


def make_dataset(out: Path, *, train: int = 120, val: int = 60, test: int = 60) -> PreparedDataset:
    """A prepared data set of `learnable_patches`, written without data_prep; train and val rows have folds 0..2."""
    out.mkdir(parents=True)
    shards, index, counts = [], [], {}
    for seed, (split, rows) in enumerate({"train": train, "val": val, "test": test}.items()):
        patches = learnable_patches(rows, seed)
        name = f"{split}/part-00000.parquet"
        (out / split).mkdir()
        table = {
            "id": patches.ids.tolist(),
            "label": patches.labels.tolist(),
            "group": patches.groups.tolist(),
            "slide": [None] * rows,
            "image": images_to_column(patches.images),
        }
        pq.write_table(pa.table(table, schema=row_schema(96)), out / name)
        shards.append(ShardRecord(split=split, rows=rows, **file_record(out, name)))
        counts[split] = SplitCounts(rows=rows, normal=int((patches.labels == 0).sum()), metastatic=int(patches.labels.sum()), groups=(rows + 1) // 2)
        for row, (id_, label, group) in enumerate(zip(patches.ids, patches.labels, patches.groups, strict=True)):
            fold = None if split == "test" else int(group[-3:]) % 3
            known = {"id": str(id_), "label": int(label), "split": split, "fold": fold, "group": str(group), "shard": name, "row": row}
            index.append(dict.fromkeys(INDEX_SCHEMA.names) | known | {"pixel_sha1": hashlib.sha1(patches.images[row].tobytes()).hexdigest()})
    index_table = pa.Table.from_pylist(index, schema=INDEX_SCHEMA)
    pq.write_table(index_table, out / "index.parquet")
    split_report = dataset_manifest().split.model_copy(update={"folds": 3})
    manifest = dataset_manifest(
        counts=counts,
        shards=shards,
        files=[FileRecord(**file_record(out, "index.parquet"))],
        fingerprint=fingerprint(index_table),
        split=split_report,
    )
    write_json(out / "dataset.json", manifest.model_dump(mode="json"))
    return PreparedDataset.open(out)
