"""Values of metrics, without intervals (those are in `sentinode.intervals`). Positive = class 1 = Metastatic."""

import numpy as np
import numpy.typing as npt
from scipy.special import expit
from sklearn.metrics import confusion_matrix, roc_auc_score

from sentinode.manifests import Confusion

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

CELLS = ("tn", "fp", "fn", "tp")
"""Order of the cells of a confusion matrix, wherever they stand in an array."""

PROPORTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "accuracy": (("tn", "tp"), CELLS),
    "precision": (("tp",), ("tp", "fp")),
    "recall": (("tp",), ("tp", "fn")),
    "specificity": (("tn",), ("tn", "fp")),
    "npv": (("tn",), ("tn", "fn")),
    "fnr": (("fn",), ("tp", "fn")),
    "fpr": (("fp",), ("tn", "fp")),
}
"""Rate -> (cells counted, cells it is a share of)."""


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
    """Return the metrics of one confusion matrix by name, as `rates_of`; None where one is undefined."""
    values = rates_of(np.array([getattr(counts, cell) for cell in CELLS], np.float64))
    return {name: None if np.isnan(value) else float(value) for name, value in values.items()}


def rates_of(cells: FloatArray) -> dict[str, FloatArray]:
    """Return the metrics of many confusion matrices, NaN where a denominator is 0.

    Parameters
    ----------
    cells : ndarray of float64, shape (..., 4), 0 or more
        In the order tn, fp, fn, tp; counts or shares.

    Returns
    -------
    dict of str to ndarray of float64, shape (...)
        accuracy, precision, recall, specificity, npv, fnr, fpr, f1 and balanced_accuracy (the mean of recall and specificity), each 0..1; mcc
        (Matthews 1975), -1..1.
    """
    by_name = {name: cells[..., number] for number, name in enumerate(CELLS)}
    tn, fp, fn, tp = by_name.values()
    result = {name: _share(_sum(by_name, part), _sum(by_name, whole)) for name, (part, whole) in PROPORTIONS.items()}
    result["f1"] = _share(2 * tp, 2 * tp + fp + fn)
    result["balanced_accuracy"] = (result["recall"] + result["specificity"]) / 2
    result["mcc"] = _share(tp * tn - fp * fn, np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))
    return result


def predictive_values(recall: FloatArray, specificity: FloatArray, prevalence: float) -> tuple[FloatArray, FloatArray]:
    """Return (PPV, NPV) that recall and specificity, 0..1, have where a share `prevalence` of patches is metastatic (Bayes); NaN for 0/0."""
    sick, well = prevalence, 1 - prevalence
    ppv = _share(recall * sick, recall * sick + (1 - specificity) * well)
    npv = _share(specificity * well, specificity * well + (1 - recall) * sick)
    return ppv, npv


def _sum(cells: dict[str, FloatArray], names: tuple[str, ...]) -> FloatArray:
    total: FloatArray = np.sum([cells[name] for name in names], axis=0)
    return total


def _share(part: FloatArray, whole: FloatArray) -> FloatArray:
    result: FloatArray = np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=whole > 0)
    return result


class Scores:
    """Labels and scores of rows, ranked once, so that many weightings of the rows are quick to judge.

    Parameters
    ----------
    labels : ndarray of int64, shape (n,), 0 or 1
    calibrated_logits : ndarray of float64, shape (n,)
        logit / temperature + bias; the probability is its sigmoid.
    """

    NAMES = ("roc_auc", "average_precision", "brier", "nll")

    def __init__(self, labels: IntArray, calibrated_logits: FloatArray) -> None:
        self._order = np.argsort(-calibrated_logits, kind="stable")
        ranked = calibrated_logits[self._order]
        self._positive = (labels[self._order] == 1).astype(np.float64)
        # Rows of equal score are told from each other by no threshold: both curves step over all of them at once.
        self._ends = np.flatnonzero(np.append(ranked[:-1] != ranked[1:], True))
        self._brier = (expit(calibrated_logits) - labels) ** 2
        self._nll = np.logaddexp(0, -(2.0 * labels - 1) * calibrated_logits)

    def values(self, weights: FloatArray) -> dict[str, FloatArray]:
        """Return the metrics by name, NaN where a class has no weight.

        Parameters
        ----------
        weights : ndarray of float64, shape (k, n), 0 or more
            Each line a weighting of the rows; ones for the rows as they are.

        Returns
        -------
        dict of str to ndarray of float64, shape (k,)
            roc_auc (a tie counts one half) and average_precision (the area under the precision-recall curve in steps, as scikit-learn's), 0..1;
            brier (mean squared error of the probability), 0..1; nll (mean negative log-likelihood), nats.
        """
        ranked = weights[:, self._order]
        found = np.cumsum(ranked * self._positive, axis=1)[:, self._ends]
        said = np.cumsum(ranked, axis=1)[:, self._ends]
        positives, negatives = found[:, -1], said[:, -1] - found[:, -1]
        new_found = np.diff(found, axis=1, prepend=0)
        new_wrong = np.diff(said - found, axis=1, prepend=0)
        roc = (new_wrong * (found - new_found / 2)).sum(axis=1)
        # Before the first row that has weight nothing was said, and nothing new found.
        precision = np.divide(found, said, out=np.zeros_like(found), where=said > 0)
        total = weights.sum(axis=1)
        both = (positives > 0) & (negatives > 0)
        return {
            "roc_auc": np.where(both, _share(roc, positives * negatives), np.nan),
            "average_precision": np.where(both, _share((new_found * precision).sum(axis=1), positives), np.nan),
            "brier": _share(weights @ self._brier, total),
            "nll": _share(weights @ self._nll, total),
        }
