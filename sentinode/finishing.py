"""What is fitted to validation rows once a network is trained, or an ensemble combined: calibration, threshold, and what stands on the card."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sentinode.bundle import Bundle, write_bundle
from sentinode.calibration import choose_threshold, fit_temperature_and_bias, require_both_classes
from sentinode.colour import Int64Array, channel_statistics, channel_sums, colour_range, outside_colours
from sentinode.config import ReviewRule, TrainConfig
from sentinode.dataset import Patches
from sentinode.errors import TrainingError
from sentinode.images import UInt8Array
from sentinode.inference import network_logits
from sentinode.intervals import operating_point, score_metrics
from sentinode.locations import Location
from sentinode.manifests import DatasetManifest, ReferenceStatistics, ThresholdRule
from sentinode.metrics import FloatArray, IntArray
from sentinode.model import build_model
from sentinode.probability import calibrated_logit, calibrated_probability, decide
from sentinode.tissue import is_pale

CARD_METRICS = ("recall", "specificity", "precision", "npv", "f1", "mcc", "balanced_accuracy", "accuracy")
"""At the bundle's threshold, in this order."""

# 32,000 patches at once would take 7 GB as floating-point numbers, after hours of training.
_ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class Looks:
    """What of patches' pixels goes into a bundle.

    Attributes
    ----------
    pale : ndarray of bool, shape (n,)
    sums, sums_of_squares : ndarray of int64, shape (n, 3)
        As `sentinode.colour.channel_sums`.
    pixels_per_patch : int
    """

    pale: npt.NDArray[np.bool_]
    sums: Int64Array
    sums_of_squares: Int64Array
    pixels_per_patch: int

    @classmethod
    def of(cls, images: UInt8Array) -> "Looks":
        """Look at patches, uint8 (n, side, side, 3), some hundred at a time."""
        chunks = [images[start : start + _ROWS_AT_ONCE] for start in range(0, len(images), _ROWS_AT_ONCE)]
        sums, squares = zip(*(channel_sums(chunk) for chunk in chunks), strict=True)
        return cls(np.concatenate([is_pale(chunk) for chunk in chunks]), np.concatenate(sums), np.concatenate(squares), images[0, ..., 0].size)


@dataclass(frozen=True)
class Fitted:
    """What `fit` found; the arguments of the same names of `write_bundle`."""

    temperature: float
    bias: float
    threshold: float
    threshold_rule: ThresholdRule
    metrics: dict[str, Any]
    reference: ReferenceStatistics

    def fields(self) -> dict[str, Any]:
        """Return them by name."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


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
    out: str | Path | Location,
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
    out : str or Path or Location
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
    fitted = fit(
        logits.astype(np.float64),
        calibration.labels,
        calibration.groups,
        Looks.of(calibration.images),
        target_recall=config.target_recall,
        review=config.review,
        samples=config.bootstrap_samples,
        seed=config.seed,
    )
    return write_bundle(out, weights, config=config, dataset=dataset, name=name, **fitted.fields())


def fit(
    logits: FloatArray,
    labels: IntArray,
    groups: npt.NDArray[np.str_],
    looks: Looks,
    *,
    target_recall: float,
    review: ReviewRule,
    samples: int,
    seed: int,
) -> Fitted:
    """Fit calibration and threshold to rows that calibrate, and describe the same rows as the bundle decides about them.

    Parameters
    ----------
    logits : ndarray of float64, shape (n,), finite
        z1 - z0, not calibrated.
    labels : ndarray of int64, shape (n,), 0 or 1
    groups : ndarray of str, shape (n,)
    looks : Looks
        Of the same rows.
    target_recall, review, samples, seed
        `target_recall`, `review`, `bootstrap_samples` and `seed` of the configuration.

    Raises
    ------
    UsageError
        A class is absent.
    """
    temperature, bias = fit_temperature_and_bias(logits, labels)
    probabilities = calibrated_probability(logits, temperature, bias)
    threshold, rule = choose_threshold(probabilities, labels, groups, target_recall=target_recall, samples=samples, seed=seed)
    low, high = colour_range(looks.sums, looks.pixels_per_patch)
    unusual = outside_colours(looks.sums, looks.pixels_per_patch, low, high)
    decisions = decide(logits, temperature=temperature, bias=bias, threshold=threshold, review=review, pale=looks.pale, unusual=unusual)
    point = operating_point(labels, probabilities, groups, threshold, samples, seed)
    values = {name: getattr(point, name) for name in CARD_METRICS}
    values |= score_metrics(labels, calibrated_logit(logits, temperature, bias), groups, samples, seed)
    channel_mean, channel_std = channel_statistics(looks.sums, looks.sums_of_squares, looks.pixels_per_patch)
    return Fitted(
        temperature=temperature,
        bias=bias,
        threshold=threshold,
        threshold_rule=rule,
        metrics={
            "rows": len(labels),
            "groups": len(np.unique(groups)),
            **{name: value.value for name, value in values.items()},
            "confusion": point.confusion.model_dump(),
            "group_intervals": {name: [value.group_interval.low, value.group_interval.high] for name, value in values.items()},
            "at_prevalences": [each.model_dump(mode="json") for each in point.at_prevalences],
        },
        reference=ReferenceStatistics(
            channel_mean=channel_mean,
            channel_std=channel_std,
            positive_rate=float((probabilities >= threshold).mean()),
            review_rate=float(np.mean([decision.needs_review for decision in decisions])),
            probability_deciles=np.quantile(probabilities, np.arange(1, 10) / 10).tolist(),
            patch_colour_low=low,
            patch_colour_high=high,
        ),
    )
