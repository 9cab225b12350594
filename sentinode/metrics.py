"""Metrics of predictions and their 95 % intervals. Positive = class 1 = Metastatic.

Two intervals stand beside every value. The patch-wise one treats patches as independent: Wilson's for proportions, a bootstrap of patches for
F1 and ROC-AUC. The group one resamples whole groups (slides, or patches connected by shared pixels) and is widened to hold the patch-wise one,
because a bootstrap alone says [1, 1] when nothing went wrong in a small sample.
"""

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix, roc_auc_score

from sentinode.manifests import Confusion, Interval, MetricValue, OperatingPoint

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

_CONFIDENCE = 0.95
# Eight bytes each.
_CHUNK_CELLS = 20_000_000
_CELLS = ("tn", "fp", "fn", "tp")

# Rate -> (cells counted, cells it is a share of).
_PROPORTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "accuracy": (("tn", "tp"), _CELLS),
    "precision": (("tp",), ("tp", "fp")),
    "recall": (("tp",), ("tp", "fn")),
    "specificity": (("tn",), ("tn", "fp")),
    "fnr": (("fn",), ("tp", "fn")),
    "fpr": (("fp",), ("tn", "fp")),
}


def roc_auc(labels: npt.ArrayLike, scores: npt.ArrayLike) -> float | None:
    """Return the area under the ROC curve, 0..1; None where a class is absent. `labels`: 0/1, shape (n,); `scores`: float, shape (n,)."""
    if len(np.unique(np.asarray(labels))) < 2:
        return None
    return float(roc_auc_score(labels, scores))


def confusion(labels: npt.ArrayLike, positive: npt.ArrayLike) -> Confusion:
    """Count decisions. `labels`: 0/1, shape (n,); `positive`: bool, shape (n,), True where Metastatic was said."""
    tn, fp, fn, tp = confusion_matrix(labels, np.asarray(positive).astype(int), labels=[0, 1]).ravel().tolist()
    return Confusion(tn=tn, fp=fp, fn=fn, tp=tp)


def rates(counts: Confusion) -> dict[str, float | None]:
    """Return accuracy, precision, recall, specificity, fnr, fpr and f1, each 0..1 and None where its denominator is 0."""
    cells = counts.model_dump()
    result: dict[str, float | None] = {}
    for name, (part, whole) in _PROPORTIONS.items():
        total = sum(cells[cell] for cell in whole)
        result[name] = sum(cells[cell] for cell in part) / total if total else None
    denominator = 2 * counts.tp + counts.fp + counts.fn
    result["f1"] = 2 * counts.tp / denominator if denominator else None
    return result


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
    counts = confusion(labels, positive)
    values = rates(counts)
    cell_of_row = labels * 2 + positive  # tn, fp, fn, tp
    _, group_index = np.unique(groups, return_inverse=True)
    per_group = np.zeros((group_index.max(initial=-1) + 1, 4), dtype=np.int64)
    np.add.at(per_group, (group_index, cell_of_row), 1)
    generator = np.random.default_rng(seed)
    totals = per_group.sum(axis=0)
    by_patch = generator.multinomial(totals.sum(), totals / totals.sum(), size=samples)
    by_group = np.concatenate([weights @ per_group for weights in _multiplicities(len(per_group), samples, generator)])
    patch_rates, group_rates = _rates_of_samples(by_patch), _rates_of_samples(by_group)
    metrics = {}
    for name, value in values.items():
        patch = _percentiles(patch_rates[name]) if name == "f1" else _wilson(counts, name)
        metrics[name] = MetricValue(value=value, patch_interval=patch, group_interval=_envelope(patch, _percentiles(group_rates[name])))
    return OperatingPoint(threshold=threshold, confusion=counts, **metrics)


def roc_auc_with_intervals(labels: IntArray, scores: FloatArray, groups: npt.NDArray[np.str_], samples: int, seed: int) -> MetricValue:
    """Return ROC-AUC with both intervals; parameters as for `operating_point`."""
    value = roc_auc(labels, scores)
    if value is None:
        nothing = Interval(low=None, high=None)
        return MetricValue(value=None, patch_interval=nothing, group_interval=nothing)
    generator = np.random.default_rng(seed)

    def resampled(index: IntArray) -> FloatArray:
        areas = []
        for weights in _multiplicities(index.max() + 1, samples, generator):
            for weight in weights:
                per_row = weight[index]
                drawn = per_row > 0
                both = len(np.unique(labels[drawn])) == 2
                areas.append(roc_auc_score(labels[drawn], scores[drawn], sample_weight=per_row[drawn]) if both else np.nan)
        return np.asarray(areas)

    patch = _percentiles(resampled(np.arange(len(labels))))
    _, group_index = np.unique(groups, return_inverse=True)
    return MetricValue(value=value, patch_interval=patch, group_interval=_envelope(patch, _percentiles(resampled(group_index))))


def _multiplicities(groups: int, samples: int, generator: np.random.Generator) -> Iterator[IntArray]:
    """How often each group is drawn in each resample: chunks of shape (some, groups), `samples` rows in all, one chunk in memory at a time."""
    chunk = max(1, min(samples, _CHUNK_CELLS // max(groups, 1)))
    for start in range(0, samples, chunk):
        yield generator.multinomial(groups, np.full(groups, 1 / groups), size=min(chunk, samples - start))


def _rates_of_samples(cells: IntArray) -> dict[str, FloatArray]:
    """The rates of many confusion matrices, shape (samples, 4) in the order tn, fp, fn, tp; NaN where a denominator is 0."""
    by_name = {name: cells[:, k].astype(np.float64) for k, name in enumerate(_CELLS)}

    def share(part: FloatArray, whole: FloatArray) -> FloatArray:
        result: FloatArray = np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)
        return result

    shares = {name: share(_sum(by_name, part), _sum(by_name, whole)) for name, (part, whole) in _PROPORTIONS.items()}
    shares["f1"] = share(2 * by_name["tp"], 2 * by_name["tp"] + by_name["fp"] + by_name["fn"])
    return shares


def _sum(cells: dict[str, FloatArray], names: tuple[str, ...]) -> FloatArray:
    total: FloatArray = np.sum([cells[name] for name in names], axis=0)
    return total


def _percentiles(values: FloatArray) -> Interval:
    defined = values[np.isfinite(values)]
    if not len(defined):
        return Interval(low=None, high=None)
    low, high = np.quantile(defined, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    return Interval(low=float(low), high=float(high))


def _wilson(counts: Confusion, name: str) -> Interval:
    cells = counts.model_dump()
    part, whole = (sum(cells[cell] for cell in side) for side in _PROPORTIONS[name])
    if not whole:
        return Interval(low=None, high=None)
    interval = binomtest(part, whole).proportion_ci(_CONFIDENCE, method="wilson")
    return Interval(low=float(interval.low), high=float(interval.high))


def _envelope(first: Interval, second: Interval) -> Interval:
    def pick(choose: Callable[..., float], a: float | None, b: float | None) -> float | None:
        known = [value for value in (a, b) if value is not None]
        return choose(known) if known else None

    return Interval(low=pick(min, first.low, second.low), high=pick(max, first.high, second.high))
