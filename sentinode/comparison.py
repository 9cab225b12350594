"""Two bundles on the same patches: differences of their metrics, paired."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import expit
from scipy.stats import norm, rankdata

from sentinode.intervals import cells_of_rows, metric_value, percentiles, resampled
from sentinode.manifests import DelongTest, Interval, MetricValue
from sentinode.metrics import FloatArray, IntArray, Scores, rates_of

_TWO_SIDED_95 = float(norm.ppf(0.975))


@dataclass(frozen=True)
class Judged:
    """What one bundle says of the rows.

    Attributes
    ----------
    calibrated_logits : ndarray of float64, shape (n,)
        logit / temperature + bias of the bundle.
    threshold : float
        Of the bundle, 0..1.
    """

    calibrated_logits: FloatArray
    threshold: float


def differences(labels: IntArray, ours: Judged, theirs: Judged, groups: npt.NDArray[np.str_], samples: int, seed: int) -> dict[str, MetricValue]:
    """Return each metric of `ours` minus that of `theirs`, with intervals of the difference.

    Both are judged on the same resamples, so that what makes a resample easy or hard for both does not count. Rates are at each bundle's own
    threshold.

    Parameters
    ----------
    labels : ndarray of int64, shape (n,), 0 or 1
    ours, theirs : Judged
        Of the same rows in the same order.
    groups : ndarray of str, shape (n,)
        Rows of one group are resampled together.
    samples : int
        Bootstrap resamples.
    seed : int

    Returns
    -------
    dict of str to MetricValue
        By the names of `sentinode.metrics.Scores` and `rates_of`.
    """
    sides = [
        (Scores(labels, side.calibrated_logits), cells_of_rows(labels, expit(side.calibrated_logits) >= side.threshold)) for side in (ours, theirs)
    ]

    def difference(weights: FloatArray) -> dict[str, FloatArray]:
        first, second = (scores.values(weights) | rates_of(weights @ cells) for scores, cells in sides)
        return {name: first[name] - second[name] for name in first}

    value = difference(np.ones((1, len(labels))))
    patch, group = resampled(difference, groups, samples, seed)
    return {name: metric_value(value[name][0], percentiles(patch[name]), percentiles(group[name])) for name in value}


def delong(labels: IntArray, first: FloatArray, second: FloatArray) -> DelongTest | None:
    """Test whether two ROC-AUCs on the same rows differ (DeLong et al. 1988, by midranks after Sun & Xu 2014); rows count as independent.

    Parameters
    ----------
    labels : ndarray of int64, shape (n,), 0 or 1
    first, second : ndarray of float64, shape (n,)
        Scores.

    Returns
    -------
    DelongTest or None
        None where a class has fewer than two rows. Where both rank all pairs alike there is no variance: the p-value is 1.
    """
    positive = labels == 1
    sick, well = int(positive.sum()), int((~positive).sum())
    if min(sick, well) < 2:
        return None
    # Share of the other class that each row is ranked right against.
    of_sick, of_well = [], []
    for scores in (first, second):
        ranks = rankdata(scores)
        of_sick.append((ranks[positive] - rankdata(scores[positive])) / well)
        of_well.append(1 - (ranks[~positive] - rankdata(scores[~positive])) / sick)
    difference = float(of_sick[0].mean() - of_sick[1].mean())
    variance = (of_sick[0] - of_sick[1]).var(ddof=1) / sick + (of_well[0] - of_well[1]).var(ddof=1) / well
    error = float(np.sqrt(variance))
    p_value = float(2 * norm.sf(abs(difference) / error)) if error > 0 else 1.0
    reach = _TWO_SIDED_95 * error
    return DelongTest(difference=difference, interval=Interval(low=difference - reach, high=difference + reach), p_value=p_value)
