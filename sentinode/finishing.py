"""From the best weights of a run to a bundle: calibrate, choose the threshold, describe validation."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sentinode.bundle import Bundle, write_bundle
from sentinode.calibration import choose_threshold, fit_temperature_and_bias, require_both_classes
from sentinode.config import Rgb, TrainConfig
from sentinode.dataset import Patches
from sentinode.errors import TrainingError
from sentinode.images import UInt8Array
from sentinode.inference import network_logits
from sentinode.manifests import DatasetManifest, ReferenceStatistics
from sentinode.metrics import confusion, rates, roc_auc
from sentinode.model import build_model
from sentinode.probability import calibrated_probability, decide
from sentinode.tissue import is_pale

# 32,000 patches at once would take 7 GB as floating-point numbers, after hours of training.
_ROWS_AT_ONCE = 512


def split_calibration(val: Patches, fraction: float, seed: int) -> tuple[Patches, Patches]:
    """Return the validation rows that choose the epoch and those that calibrate; with `fraction` 0 both are all rows.

    Whole groups go one way or the other, by a seeded hash of the group.

    Raises
    ------
    UsageError
        A class is absent from either: said before training, since nothing could be made of its result.
    """
    if fraction == 0:
        require_both_classes(val.labels)
        return val, val
    names, index = np.unique(val.groups, return_inverse=True)
    position = np.array([int.from_bytes(hashlib.sha256(f"{seed}:calibration:{name}".encode()).digest()[:8]) / 2**64 for name in names])
    held_out = (position < fraction)[index]
    choosing, calibrating = val.take(~held_out), val.take(held_out)
    require_both_classes(choosing.labels)
    require_both_classes(calibrating.labels)
    return choosing, calibrating


def finish_bundle(
    weights: dict[str, torch.Tensor],
    calibration: Patches,
    config: TrainConfig,
    dataset: DatasetManifest,
    out: str | Path,
    *,
    name: str,
    device: str = "cpu",
) -> Bundle:
    """Fit temperature, bias and threshold on validation rows and write the bundle.

    Parameters
    ----------
    weights : dict of str to tensor
        State dict of the network.
    calibration : Patches
        Validation rows that calibrate and choose the threshold.
    config, dataset
        What the network was trained with and on.
    out : str or Path
        The bundle's folder.
    name : str
        The bundle's name.

    Raises
    ------
    TrainingError
        The network's logits are not finite.
    UsageError
        A class is absent from `calibration`.
    """
    model = build_model(config.arch, weights="none", input_size_px=config.input_size_px)
    model.load_state_dict(weights)
    model.eval().to(device)
    logits = network_logits(
        model,
        calibration.images,
        input_size_px=config.input_size_px,
        mean=config.mean,
        std=config.std,
        tta=config.tta,
        batch_size=config.eval_batch_size,
        device=device,
    )
    if not np.isfinite(logits).all():
        raise TrainingError("the network's outputs are not finite; lower learning_rate")
    temperature, bias = fit_temperature_and_bias(logits, calibration.labels)
    probabilities = calibrated_probability(logits, temperature, bias)
    threshold, rule = choose_threshold(
        probabilities,
        calibration.labels,
        calibration.groups,
        target_recall=config.target_recall,
        samples=config.bootstrap_samples,
        seed=config.seed,
    )
    decisions = decide(logits, temperature=temperature, bias=bias, threshold=threshold, review=config.review, pale=_pale(calibration.images))
    counts = confusion(calibration.labels, probabilities >= threshold)
    metrics: dict[str, Any] = {
        "rows": len(calibration),
        "roc_auc": roc_auc(calibration.labels, logits),
        **rates(counts),
        "confusion": counts.model_dump(),
    }
    channel_mean, channel_std = channel_statistics(calibration.images)
    return write_bundle(
        out,
        weights,
        config=config,
        dataset=dataset,
        temperature=temperature,
        bias=bias,
        threshold=threshold,
        threshold_rule=rule,
        metrics=metrics,
        reference=ReferenceStatistics(
            channel_mean=channel_mean,
            channel_std=channel_std,
            positive_rate=float((probabilities >= threshold).mean()),
            review_rate=float(np.mean([decision.needs_review for decision in decisions])),
            probability_deciles=np.quantile(probabilities, np.arange(1, 10) / 10).tolist(),
        ),
        name=name,
    )


def _pale(images: UInt8Array) -> npt.NDArray[np.bool_]:
    return np.concatenate([is_pale(images[start : start + _ROWS_AT_ONCE]) for start in range(0, len(images), _ROWS_AT_ONCE)])


def channel_statistics(images: UInt8Array) -> tuple[Rgb, Rgb]:
    """Return mean and standard deviation of each channel, scale 0..1, over all pixels of uint8 images (n, h, w, 3), exact and in little memory."""
    counts = np.zeros((3, 256), np.int64)
    for start in range(0, len(images), _ROWS_AT_ONCE):
        for channel in range(3):
            counts[channel] += np.bincount(images[start : start + _ROWS_AT_ONCE, ..., channel].reshape(-1), minlength=256)
    values, shares = np.arange(256) / 255, counts / counts.sum(axis=1, keepdims=True)
    means = shares @ values
    return _rgb(means), _rgb(np.sqrt((shares * (values - means[:, np.newaxis]) ** 2).sum(axis=1)))


def _rgb(values: npt.NDArray[np.float64]) -> Rgb:
    red, green, blue = values.tolist()
    return red, green, blue
