"""Metrics with two 95 % intervals each. Positive = class 1 = Metastatic.

The patch-wise interval treats patches as independent, which they are not, so it is too narrow: Wilson's for proportions (Wilson 1927), for other
metrics of a confusion matrix that of the posterior of its four cells under Jeffreys' prior, for metrics of scores a bootstrap of patches. The group
interval resamples whole groups (slides, or patches connected by shared pixels) and is widened to hold the patch-wise one, because a bootstrap alone
says [1, 1] when nothing went wrong in a small sample.
"""

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest

from sentinode.manifests import Interval, MetricValue, OperatingPoint, PredictiveValues
from sentinode.metrics import CELLS, PROPORTIONS, FloatArray, IntArray, Scores, confusion, predictive_values, rates_of

PREVALENCES = (0.01, 0.1, 0.4)
"""Shares of metastatic patches that predictive values are restated at: screening, a slide with a metastasis, the Kaggle set."""

_CONFIDENCE = 0.95
_JEFFREYS = 0.5
# Eight bytes each; a dozen arrays of that size at a time.
_CHUNK_CELLS = 1_000_000
_NOTHING = Interval(low=None, high=None)


def operating_point(
    labels: IntArray, probabilities: FloatArray, groups: npt.NDArray[np.str_], threshold: float, samples: int, seed: int
) -> OperatingPoint:
    """Return confusion and metrics at one threshold.

    Parameters
    ----------
    labels : ndarray of int64, shape (n,), 0 or 1
    probabilities : ndarray of float64, shape (n,), 0..1
    groups : ndarray of str, shape (n,)
        Rows of one group are resampled together.
    threshold : float
        Metastatic when probability >= threshold.
    samples : int
        Bootstrap resamples.
    seed : int
    """
    positive = probabilities >= threshold
    cells = cells_of_rows(labels, positive)
    _, group_index = np.unique(groups, return_inverse=True)
    per_group = np.zeros((group_index.max(initial=-1) + 1, len(CELLS)))
    np.add.at(per_group, group_index, cells)
    totals = per_group.sum(axis=0)
    generator = np.random.default_rng(seed)
    by_patch = generator.dirichlet(totals + _JEFFREYS, size=samples)
    by_group = np.concatenate([weights @ per_group for weights in multiplicities(len(per_group), samples, generator)])
    value, patch, group = (_with_restated(rates_of(each)) for each in (totals, by_patch, by_group))
    metrics = {
        name: metric_value(value[name], _wilson(totals, name) if name in PROPORTIONS else percentiles(patch[name]), percentiles(group[name]))
        for name in value
    }
    restated = [PredictiveValues(prevalence=share, ppv=metrics.pop(f"ppv {share}"), npv=metrics.pop(f"npv {share}")) for share in PREVALENCES]
    return OperatingPoint(threshold=threshold, confusion=confusion(labels, positive), at_prevalences=restated, **metrics)


def score_metrics(labels: IntArray, calibrated_logits: FloatArray, groups: npt.NDArray[np.str_], samples: int, seed: int) -> dict[str, MetricValue]:
    """Return the metrics of `sentinode.metrics.Scores` by name; parameters as for `Scores` and `operating_point`."""
    scores = Scores(labels, calibrated_logits)
    value = scores.values(np.ones((1, len(labels))))
    patch, group = resampled(scores.values, groups, samples, seed)
    metrics = {}
    for name in Scores.NAMES:
        interval = percentiles(patch[name])
        if name in ("roc_auc", "average_precision") and interval.low == interval.high:
            # A perfect ranking stays perfect in every resample.
            interval = _of_perfect_ranking(labels, interval) if name == "roc_auc" else _NOTHING
        metrics[name] = metric_value(value[name][0], interval, percentiles(group[name]))
    return metrics


def cells_of_rows(labels: IntArray, positive: npt.NDArray[np.bool_]) -> FloatArray:
    """Return which cell of the confusion matrix each row counts in: float64 (n, 4), a one in the column of tn, fp, fn or tp."""
    one_hot: FloatArray = np.eye(len(CELLS))[labels * 2 + positive]
    return one_hot


def multiplicities(groups: int, samples: int, generator: np.random.Generator) -> Iterator[IntArray]:
    """Yield how often each group is drawn in each resample: chunks of shape (some, groups), `samples` lines in all, one chunk in memory at a time."""
    chunk = max(1, min(samples, _CHUNK_CELLS // max(groups, 1)))
    for start in range(0, samples, chunk):
        lines = min(chunk, samples - start)
        drawn = generator.integers(groups, size=(lines, groups)) + groups * np.arange(lines)[:, np.newaxis]
        yield np.bincount(drawn.reshape(-1), minlength=lines * groups).reshape(lines, groups)


def row_weights(group_of_row: IntArray, samples: int, generator: np.random.Generator) -> Iterator[FloatArray]:
    """Yield how often each row counts in each resample of whole groups: float64 chunks of shape (some, n), `samples` lines in all."""
    groups = int(group_of_row.max(initial=-1)) + 1
    # Chunks by rows, which are at least as many as groups.
    chunk = max(1, _CHUNK_CELLS // max(len(group_of_row), 1))
    for start in range(0, samples, chunk):
        for drawn in multiplicities(groups, min(chunk, samples - start), generator):
            yield drawn[:, group_of_row].astype(np.float64)


def resampled(
    values: Callable[[FloatArray], dict[str, FloatArray]], groups: npt.NDArray[np.str_], samples: int, seed: int
) -> tuple[dict[str, FloatArray], dict[str, FloatArray]]:
    """Return metrics of resamples of patches, and of resamples of whole groups.

    Parameters
    ----------
    values : callable
        Weights of the rows, float64 (k, n), to metrics by name, each float64 (k,).
    groups : ndarray of str, shape (n,)
    samples, seed
        As for `operating_point`.

    Returns
    -------
    (dict, dict)
        Metrics by name, each float64 (samples,).
    """
    generator = np.random.default_rng(seed)
    found = []
    for index in (np.arange(len(groups)), np.unique(groups, return_inverse=True)[1]):
        parts = [values(weights) for weights in row_weights(index, samples, generator)]
        found.append({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    return found[0], found[1]


def percentiles(values: FloatArray) -> Interval:
    """Return the middle 95 % of resampled values, float64 (samples,); those that are NaN, undefined in their resample, do not count."""
    defined = values[np.isfinite(values)]
    if not len(defined):
        return _NOTHING
    low, high = np.quantile(defined, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    return Interval(low=float(low), high=float(high))


def metric_value(value: float | FloatArray, patch: Interval, group: Interval) -> MetricValue:
    """Put a value and its intervals together: both hold the value, the group interval the patch-wise one too; nothing where the value is NaN."""
    if np.isnan(value):
        return MetricValue(value=None, patch_interval=_NOTHING, group_interval=_NOTHING)
    exact = Interval(low=float(value), high=float(value))
    patch = _hull(patch, exact) if patch.low is not None else patch
    return MetricValue(value=float(value), patch_interval=patch, group_interval=_hull(patch, group, exact) if patch.low is not None else patch)


def wilson(part: float, whole: float) -> Interval:
    """Return Wilson's interval of `part` of `whole` (counts)."""
    if not whole:
        return _NOTHING
    interval = binomtest(round(part), round(whole)).proportion_ci(_CONFIDENCE, method="wilson")
    return Interval(low=float(interval.low), high=float(interval.high))


def _with_restated(values: dict[str, FloatArray]) -> dict[str, FloatArray]:
    for prevalence in PREVALENCES:
        values[f"ppv {prevalence}"], values[f"npv {prevalence}"] = predictive_values(values["recall"], values["specificity"], prevalence)
    return values


def _wilson(totals: FloatArray, name: str) -> Interval:
    by_name = dict(zip(CELLS, totals.tolist(), strict=True))
    part, whole = (sum(by_name[cell] for cell in cells) for cells in PROPORTIONS[name])
    return wilson(part, whole)


def _of_perfect_ranking(labels: IntArray, interval: Interval) -> Interval:
    """Wilson's interval of as many pairs, of one row of each class, as have no row in common: these are independent if rows are."""
    pairs = int(min((labels == 0).sum(), (labels == 1).sum()))
    return wilson(pairs if interval.high == 1 else 0, pairs)


def _hull(*intervals: Interval) -> Interval:
    lows = [interval.low for interval in intervals if interval.low is not None]
    highs = [interval.high for interval in intervals if interval.high is not None]
    return Interval(low=min(lows), high=max(highs)) if lows else _NOTHING
