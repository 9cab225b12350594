"""Whether probabilities mean what they say, and what is gained by leaving the doubtful patches to a person."""

import numpy as np
from scipy.special import expit

from sentinode.intervals import wilson
from sentinode.manifests import CalibrationState, CoveragePoint, ReliabilityBin
from sentinode.metrics import FloatArray, IntArray, Scores

BINS = 15
_COVERAGES = np.arange(1, 21) / 20


def calibration_state(labels: IntArray, calibrated_logits: FloatArray) -> CalibrationState:
    """Return Brier score, NLL, ECE and the reliability diagram in 15 bins of equal numbers of rows.

    ECE is the mean over rows of |mean probability - share metastatic| of the row's bin (Naeini et al. 2015; bins of equal mass, since most
    probabilities lie at the ends). On n rows it is above 0 even for perfect probabilities, by about sqrt(15 p (1-p) / n).

    Parameters
    ----------
    labels : ndarray of int64, shape (n,), 0 or 1
    calibrated_logits : ndarray of float64, shape (n,)
        The probability is their sigmoid.
    """
    order = np.argsort(calibrated_logits, kind="stable")
    probabilities = expit(calibrated_logits)
    bins = []
    for rows in np.array_split(order, min(BINS, len(order))):
        found = int(labels[rows].sum())
        bins.append(
            ReliabilityBin(
                rows=len(rows),
                mean_probability=float(probabilities[rows].mean()),
                share_metastatic=found / len(rows),
                interval=wilson(found, len(rows)),
            )
        )
    values = Scores(labels, calibrated_logits).values(np.ones((1, len(labels))))
    ece = sum(bin_.rows * abs(bin_.mean_probability - bin_.share_metastatic) for bin_ in bins) / len(labels)
    return CalibrationState(brier=float(values["brier"][0]), nll=float(values["nll"][0]), ece=ece, bins=bins)


def risk_coverage(labels: IntArray, probabilities: FloatArray, threshold: float) -> list[CoveragePoint]:
    """Return the error of the surest part of the rows for growing parts (the risk-coverage curve, El-Yaniv & Wiener 2010).

    A row is the surer the further its probability lies from the threshold, on the scale of the side it is on: (p - t) / (1 - t) above, (t - p) / t
    below, so that both ends are equally sure.

    Parameters
    ----------
    labels : ndarray of int64, shape (n,), 0 or 1
    probabilities : ndarray of float64, shape (n,), 0..1
    threshold : float
        Metastatic when probability >= threshold; above 0, below 1.
    """
    positive = probabilities >= threshold
    sureness = np.where(positive, (probabilities - threshold) / max(1 - threshold, 1e-12), (threshold - probabilities) / max(threshold, 1e-12))
    order = np.argsort(-sureness, kind="stable")
    wrong = np.cumsum((positive != (labels == 1))[order])
    missed = np.cumsum((~positive & (labels == 1))[order])
    sick = np.cumsum((labels == 1)[order])
    points = []
    for coverage in _COVERAGES.tolist():
        rows = max(1, round(coverage * len(labels)))
        found = int(sick[rows - 1])
        points.append(
            CoveragePoint(
                coverage=rows / len(labels),
                error=float(wrong[rows - 1] / rows),
                recall=float(1 - missed[rows - 1] / found) if found else None,
            )
        )
    return points
