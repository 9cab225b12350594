"""From logits to a decision: pure functions that train, evaluate, predict and serve all call, so they cannot disagree."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from sentinode import CLASS_NAMES
from sentinode.config import ReviewRule
from sentinode.errors import SentinodeError

FloatArray = npt.NDArray[np.float64]

LOW_CONFIDENCE = "low_confidence"
NEAR_THRESHOLD = "near_threshold"
NO_TISSUE = "no_tissue"
UNUSUAL_COLOURS = "unusual_colours"


@dataclass(frozen=True)
class Decision:
    """What is said about one patch.

    Attributes
    ----------
    logit : float
        z1 - z0, uncalibrated.
    probability : float
        Calibrated probability of class 1 (Metastatic), 0..1.
    prediction : str
        "Normal" or "Metastatic".
    confidence : float
        Probability of the class returned, 0..1. Below one half where the threshold is not at one half.
    review_reasons : tuple of str
        Why a human should look; empty if nothing fired.
    """

    logit: float
    probability: float
    prediction: str
    confidence: float
    review_reasons: tuple[str, ...]

    @property
    def needs_review(self) -> bool:
        """Whether any reason fired."""
        return bool(self.review_reasons)


def calibrated_probability(logits: npt.ArrayLike, temperature: float, bias: float) -> FloatArray:
    """Return sigmoid(logit / temperature + bias), float64 in 0..1, of the shape of `logits`."""
    result: FloatArray = expit(calibrated_logit(logits, temperature, bias))
    return result


def calibrated_logit(logits: npt.ArrayLike, temperature: float, bias: float) -> FloatArray:
    """Return logit / temperature + bias, float64, of the shape of `logits`."""
    result: FloatArray = np.asarray(logits, dtype=np.float64) / temperature + bias
    return result


def decide(
    logits: npt.ArrayLike,
    *,
    temperature: float,
    bias: float,
    threshold: float,
    review: ReviewRule,
    pale: npt.NDArray[np.bool_],
    unusual: npt.NDArray[np.bool_],
) -> list[Decision]:
    """Decide about patches.

    Parameters
    ----------
    logits : array of float, shape (n,)
        z1 - z0.
    temperature, bias, threshold, review
        Of the bundle.
    pale : ndarray of bool, shape (n,)
        `sentinode.tissue.is_pale` of the patches.
    unusual : ndarray of bool, shape (n,)
        `sentinode.colour.outside_colours` of the patches.

    Returns
    -------
    list of Decision, length n

    Raises
    ------
    SentinodeError
        A logit is not finite. NaN is below every threshold and would come out as Normal.
    """
    values = np.asarray(logits, dtype=np.float64)
    if not np.isfinite(values).all():
        raise SentinodeError(f"the network's answer is not a number for {np.count_nonzero(~np.isfinite(values))} of {len(values)} patches")
    probabilities = calibrated_probability(values, temperature, bias)
    decisions = []
    for logit, probability, no_tissue, is_unusual in zip(values.tolist(), probabilities.tolist(), pale.tolist(), unusual.tolist(), strict=True):
        positive = probability >= threshold
        decisions.append(
            Decision(
                logit=logit,
                probability=probability,
                prediction=CLASS_NAMES[positive],
                confidence=probability if positive else 1 - probability,
                review_reasons=review_reasons(probability, threshold, review, no_tissue, is_unusual),
            )
        )
    return decisions


def review_reasons(probability: float, threshold: float, review: ReviewRule, no_tissue: bool, unusual_colours: bool) -> tuple[str, ...]:
    """Return why one prediction should be seen by a human, in a fixed order."""
    fired = {
        LOW_CONFIDENCE: max(probability, 1 - probability) < review.below,
        NEAR_THRESHOLD: abs(probability - threshold) <= review.band,
        NO_TISSUE: no_tissue,
        UNUSUAL_COLOURS: unusual_colours,
    }
    return tuple(reason for reason, fires in fired.items() if fires)
