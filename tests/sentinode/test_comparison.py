"""Two bundles on the same patches: paired differences and DeLong's test."""

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from sentinode.comparison import Judged, delong, differences
from sentinode.intervals import score_metrics
from sentinode.metrics import confusion, rates
from tests.sentinode.simulated import simulated


def two_models(rows: int, seed: int, gap: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Labels, groups and logits of two models whose errors are mostly the same; the first is better by `gap`."""
    generator = np.random.default_rng(seed)
    labels, probabilities, groups = simulated(rows, seed, 3)
    shared = np.log(probabilities / (1 - probabilities))
    first = shared + generator.normal(0, 0.3, rows) + gap * (2 * labels - 1)
    return labels, groups, first, shared + generator.normal(0, 0.3, rows)


def test_a_difference_is_that_of_the_values_and_its_interval_is_narrower_than_either_ones() -> None:
    labels, groups, first, second = two_models(600, 0, 0.5)
    found = differences(labels, Judged(first, 0.4), Judged(second, 0.6), groups, 400, 0)
    assert found["roc_auc"].value == pytest.approx(roc_auc_score(labels, first) - roc_auc_score(labels, second))
    ours = rates(confusion(labels, 1 / (1 + np.exp(-first)) >= 0.4))
    theirs = rates(confusion(labels, 1 / (1 + np.exp(-second)) >= 0.6))
    for name in ("recall", "specificity", "mcc"):
        assert found[name].value == pytest.approx((ours[name] or 0) - (theirs[name] or 0))
    paired = found["roc_auc"].group_interval
    alone = score_metrics(labels, first, groups, 400, 0)["roc_auc"].group_interval
    assert paired.low is not None
    assert paired.high is not None
    assert alone.low is not None
    assert alone.high is not None
    assert paired.low > 0
    assert paired.high - paired.low < 0.8 * (alone.high - alone.low)


def test_a_bundle_does_not_differ_from_itself() -> None:
    labels, groups, first, _ = two_models(300, 1, 0.5)
    found = differences(labels, Judged(first, 0.4), Judged(first, 0.4), groups, 100, 0)
    for metric in found.values():
        assert (metric.value, metric.group_interval.low, metric.group_interval.high) == (0, 0, 0)
    test = delong(labels, first, first)
    assert test is not None
    assert (test.difference, test.p_value) == (0, 1)


def test_delong_is_its_definition_with_all_pairs_written_out() -> None:
    labels, _, first, second = two_models(80, 2, 0.4)
    first, second = first.round(1), second.round(1)  # with ties
    sick, well = labels == 1, labels == 0
    kernels = [(scores[sick][:, None] > scores[well]) + 0.5 * (scores[sick][:, None] == scores[well]) for scores in (first, second)]
    of_sick = np.cov(*[kernel.mean(axis=1) for kernel in kernels])
    of_well = np.cov(*[kernel.mean(axis=0) for kernel in kernels])
    covariance = of_sick / sick.sum() + of_well / well.sum()
    error = np.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    difference = kernels[0].mean() - kernels[1].mean()
    test = delong(labels, first, second)
    assert test is not None
    assert test.difference == pytest.approx(difference)
    assert test.p_value == pytest.approx(2 * norm.sf(abs(difference) / error))
    assert test.interval.low == pytest.approx(difference - 1.959964 * error)
    assert test.difference == pytest.approx(roc_auc_score(labels, first) - roc_auc_score(labels, second))


def test_delong_rejects_as_often_as_it_says_where_nothing_differs() -> None:
    tests = [delong(labels, first, second) for labels, _, first, second in (two_models(240, seed, 0.0) for seed in range(200))]
    rejected = sum(test is not None and test.p_value < 0.05 for test in tests)
    assert 2 <= rejected <= 22


def test_a_class_of_one_row_has_no_variance_to_test_with() -> None:
    assert delong(np.array([0, 0, 1]), np.array([0.1, 0.2, 0.3]), np.array([0.3, 0.2, 0.1])) is None
