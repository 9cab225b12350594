"""What is fitted on validation once a network is trained: temperature and bias, then the threshold."""

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import beta

from sentinode.errors import UsageError
from sentinode.manifests import ThresholdRule
from sentinode.metrics import FloatArray, IntArray

# A separable validation set would drive the temperature to 0 and a useless network to infinity; both ends still give probabilities.
_TEMPERATURE_RANGE = (0.05, 20.0)
_BIAS_RANGE = (-10.0, 10.0)
_TAIL = 0.05


def fit_temperature_and_bias(logits: npt.ArrayLike, labels: IntArray) -> tuple[float, float]:
    """Fit probability = sigmoid(logit / temperature + bias) by maximum likelihood (Platt scaling; with bias 0, Guo et al. 2017).

    Parameters
    ----------
    logits : array of float, shape (n,)
    labels : ndarray of int64, shape (n,), 0 or 1

    Returns
    -------
    (temperature, bias)
        Temperature within 0.05..20, bias within -10..10.

    Raises
    ------
    UsageError
        A class is absent.
    """
    require_both_classes(labels)
    values = np.asarray(logits, dtype=np.float64)
    signs = 2.0 * labels - 1

    def loss_and_gradient(parameters: FloatArray) -> tuple[float, FloatArray]:
        slope, bias = np.exp(-parameters[0]), parameters[1]
        margins = signs * (values * slope + bias)
        pull = -signs * expit(-margins) / len(values)
        return float(np.logaddexp(0, -margins).mean()), np.array([-(pull * values).sum() * slope, pull.sum()])

    bounds = [tuple(np.log(_TEMPERATURE_RANGE)), _BIAS_RANGE]
    fitted = minimize(loss_and_gradient, np.zeros(2), jac=True, method="L-BFGS-B", bounds=bounds, options={"ftol": 1e-14, "gtol": 1e-10})
    return float(np.exp(fitted.x[0])), float(fitted.x[1])


def choose_threshold(
    probabilities: FloatArray, labels: IntArray, groups: npt.NDArray[np.str_], *, target_recall: float, samples: int, seed: int
) -> tuple[float, ThresholdRule]:
    """Choose the largest threshold whose validation recall has a lower 95 % bound of at least `target_recall`.

    The bound is one-sided and the lower of two: a bootstrap of whole groups, and Clopper-Pearson. If no threshold reaches the target, the largest
    one whose point recall does is taken and the rule says `reached: false`.

    Parameters
    ----------
    probabilities : ndarray of float64, shape (n,), 0..1
        Calibrated.
    labels : ndarray of int64, shape (n,), 0 or 1
    groups : ndarray of str, shape (n,)
    target_recall : float
        Above 0, below 1.
    samples : int
        Bootstrap resamples.
    seed : int

    Raises
    ------
    UsageError
        A class is absent.
    """
    require_both_classes(labels)
    order = np.argsort(-probabilities[labels == 1], kind="stable")
    positives = probabilities[labels == 1][order]
    # Thresholds worth trying are the positives' own values; of equal ones the last counts them all.
    last_of_equals = np.flatnonzero(np.append(positives[:-1] != positives[1:], True))
    found = last_of_equals + 1
    bounds = np.minimum(
        _clopper_pearson_lower(found, len(positives)),
        _group_bootstrap_lower(groups, groups[labels == 1][order], last_of_equals, samples, seed),
    )
    reaching = np.flatnonzero(bounds >= target_recall)
    reached = len(reaching) > 0
    chosen = int(reaching[0]) if reached else int(np.flatnonzero(found / len(positives) >= target_recall)[0])
    return float(positives[last_of_equals[chosen]]), ThresholdRule(target_recall=target_recall, bound=float(bounds[chosen]), reached=reached)


def _clopper_pearson_lower(found: IntArray, total: int) -> FloatArray:
    """One-sided lower 95 % bounds of found/total (Clopper & Pearson 1934)."""
    bounds: FloatArray = beta.ppf(_TAIL, found, total - found + 1)
    return bounds


def _group_bootstrap_lower(
    groups: npt.NDArray[np.str_], groups_of_positives: npt.NDArray[np.str_], columns: IntArray, samples: int, seed: int
) -> FloatArray:
    """5 % quantiles of recall over resamples of groups; `groups_of_positives` by falling probability, `columns` = where each threshold cuts."""
    names, _ = np.unique(groups, return_inverse=True)
    group_of_positive = np.searchsorted(names, groups_of_positives)
    generator = np.random.default_rng(seed)
    recalls = np.full((samples, len(columns)), np.nan)
    for sample in range(samples):
        drawn = generator.multinomial(len(names), np.full(len(names), 1 / len(names)))[group_of_positive]
        total = drawn.sum()
        if total:
            recalls[sample] = np.cumsum(drawn)[columns] / total
    bounds: FloatArray = np.nanquantile(recalls, _TAIL, axis=0, overwrite_input=True)
    return bounds


def require_both_classes(labels: IntArray) -> None:
    """Raise UsageError where a class is absent from `labels`, int64 (n,): nothing can be calibrated on such rows."""
    normal, metastatic = int((labels == 0).sum()), int((labels == 1).sum())
    if not normal or not metastatic:
        raise UsageError(f"calibration and threshold need both classes in validation; it has {normal} normal and {metastatic} metastatic rows")
