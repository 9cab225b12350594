"""Small real things for tests: a data set manifest and a bundle with random weights."""

from pathlib import Path

import numpy as np
import torch

from sentinode.bundle import Bundle, write_bundle
from sentinode.config import TrainConfig
from sentinode.images import UInt8Array
from sentinode.manifests import DatasetManifest, ReferenceStatistics, SplitReport, ThresholdRule
from sentinode.model import build_model, state_for_storage


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


def make_bundle(out: Path, *, seed: int = 0, input_size_px: int = 32, threshold: float = 0.4, temperature: float = 1.3, bias: float = -0.1) -> Bundle:
    """A ResNet-18 with random weights (BatchNorm in its initial state), whose logits differ from patch to patch."""
    torch.manual_seed(seed)
    model = build_model("resnet18", weights="none")
    return write_bundle(
        out,
        state_for_storage(model),
        config=TrainConfig(arch="resnet18", weights="none", unfreeze_depth=5, input_size_px=input_size_px),
        dataset=dataset_manifest(),
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
