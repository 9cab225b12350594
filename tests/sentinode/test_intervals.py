"""Intervals of metrics never say more than the data."""

import numpy as np
import pytest
from scipy.stats import beta
from sklearn import metrics as sklearn_metrics

from sentinode import intervals
from sentinode.intervals import operating_point, score_metrics
from sentinode.manifests import Confusion, Interval, MetricValue, OperatingPoint
from tests.sentinode.simulated import simulated

PROPORTIONS = ("accuracy", "precision", "recall", "specificity", "npv", "fnr", "fpr")
NAMES = (*PROPORTIONS, "f1", "balanced_accuracy", "mcc")
NOTHING = Interval(low=None, high=None)


def logit(probabilities: np.ndarray) -> np.ndarray:
    return np.log(probabilities / (1 - probabilities))


def values_of(point: OperatingPoint) -> dict[str, MetricValue]:
    restated = {f"{name} {each.prevalence}": getattr(each, name) for each in point.at_prevalences for name in ("ppv", "npv")}
    return {name: getattr(point, name) for name in NAMES} | restated


def width(interval: Interval) -> float:
    assert interval.low is not None
    assert interval.high is not None
    return interval.high - interval.low


def test_a_probability_at_the_threshold_counts_as_positive() -> None:
    point = operating_point(np.array([0, 1]), np.array([0.5, 0.5]), np.array(["a", "b"]), 0.5, 100, 0)
    assert point.confusion == Confusion(tn=0, fp=1, fn=0, tp=1)


@pytest.mark.parametrize(("seed", "group_size"), [(0, 1), (1, 5), (2, 25)])
def test_intervals_hold_the_value_and_the_group_interval_holds_the_patch_interval(seed: int, group_size: int) -> None:
    labels, probabilities, groups = simulated(400, seed, group_size)
    scores = score_metrics(labels, logit(probabilities), groups, 200, seed)
    point = operating_point(labels, probabilities, groups, 0.4, 200, seed)
    for name, metric in (scores | values_of(point)).items():
        assert metric.value is not None
        patch, group = metric.patch_interval, metric.group_interval
        assert None not in (patch.low, patch.high, group.low, group.high)
        assert 0 <= group.low <= patch.low <= metric.value <= patch.high <= group.high <= 1, name  # type: ignore[operator]
        assert 0 < width(patch) < 0.5, name


def test_groups_whose_rows_agree_widen_the_interval() -> None:
    labels, probabilities, groups = simulated(1000, 3, group_size=25)
    alone = np.arange(1000).astype(np.str_)
    clustered, independent = (operating_point(labels, probabilities, names, 0.5, 400, 0) for names in (groups, alone))
    for name in ("accuracy", "recall", "specificity"):
        assert width(values_of(clustered)[name].group_interval) > 2 * width(values_of(independent)[name].group_interval), name
        assert values_of(clustered)[name].patch_interval == values_of(independent)[name].patch_interval
    clustered_scores, independent_scores = (score_metrics(labels, logit(probabilities), names, 200, 0) for names in (groups, alone))
    for name in ("roc_auc", "average_precision", "brier", "nll"):
        assert width(clustered_scores[name].group_interval) > 2 * width(independent_scores[name].group_interval), name


def test_the_patch_interval_of_a_proportion_is_wilsons() -> None:
    # Agresti and Coull's classic: 0 of 10 gives an upper bound of 0.2775.
    labels, probabilities = np.ones(10, np.int64), np.zeros(10)
    point = operating_point(labels, probabilities, np.arange(10).astype(np.str_), 0.5, 100, 0)
    assert point.recall.patch_interval.low == pytest.approx(0, abs=1e-12)
    assert point.recall.patch_interval.high == pytest.approx(0.2775, abs=1e-4)


def test_full_recall_on_a_few_positives_is_not_certain() -> None:
    labels = np.array([1] * 8 + [0] * 40)
    probabilities = np.where(labels == 1, 0.9, 0.1)
    point = operating_point(labels, probabilities, np.arange(48).astype(np.str_), 0.5, 300, 0)
    assert point.recall.value == 1
    assert point.recall.group_interval.low is not None
    assert point.recall.group_interval.low < 0.75


def test_one_class_leaves_the_others_metrics_undefined() -> None:
    labels, probabilities = np.zeros(20, np.int64), np.linspace(0, 0.4, 20)
    groups = np.arange(20).astype(np.str_)
    undefined = MetricValue(value=None, patch_interval=NOTHING, group_interval=NOTHING)
    scores = score_metrics(labels, probabilities - 5, groups, 100, 0)
    assert scores["roc_auc"] == scores["average_precision"] == undefined
    assert scores["brier"].value is not None
    point = operating_point(labels, probabilities, groups, 0.5, 100, 0)
    for metric in (point.recall, point.fnr, point.precision, point.f1, point.balanced_accuracy, point.mcc, point.at_prevalences[0].ppv):
        assert metric == undefined
    assert point.specificity.value == 1


def test_intervals_follow_the_seed_and_not_the_order_of_rows_within_groups() -> None:
    labels, probabilities, groups = simulated(200, 4, 4)
    first = operating_point(labels, probabilities, groups, 0.5, 100, 7)
    assert operating_point(labels, probabilities, groups, 0.5, 100, 7) == first
    assert operating_point(labels, probabilities, groups, 0.5, 100, 8) != first
    order = np.random.default_rng(0).permutation(200)
    assert operating_point(labels[order], probabilities[order], groups[order], 0.5, 100, 7) == first


def test_the_group_bootstrap_is_that_of_whole_groups() -> None:
    # Two groups, one all right and one all wrong: resamples have accuracy 0, one half or 1.
    labels = np.array([0] * 50 + [1] * 50)
    probabilities = np.zeros(100)
    groups = np.array(["right"] * 50 + ["wrong"] * 50)
    accuracy = operating_point(labels, probabilities, groups, 0.5, 500, 0).accuracy
    assert accuracy.value == 0.5
    assert accuracy.group_interval == Interval(low=0, high=1)
    assert 0.39 < (accuracy.patch_interval.low or 0) < 0.41


def test_the_bootstrap_of_scores_equals_resampling_rows_by_hand() -> None:
    labels, probabilities, groups = simulated(60, 6, 3)
    scores = score_metrics(labels, logit(probabilities), groups, 600, 1)
    generator = np.random.default_rng(99)
    names = np.unique(groups)
    by_hand: dict[str, list[float]] = {"roc_auc": [], "average_precision": [], "brier": [], "nll": []}
    for _ in range(600):
        rows = np.concatenate([np.flatnonzero(groups == name) for name in generator.choice(names, len(names))])
        if len(set(labels[rows])) == 2:
            by_hand["roc_auc"].append(sklearn_metrics.roc_auc_score(labels[rows], probabilities[rows]))
            by_hand["average_precision"].append(sklearn_metrics.average_precision_score(labels[rows], probabilities[rows]))
            by_hand["brier"].append(sklearn_metrics.brier_score_loss(labels[rows], probabilities[rows]))
            by_hand["nll"].append(sklearn_metrics.log_loss(labels[rows], probabilities[rows]))
    for name, values in by_hand.items():
        low, high = np.quantile(values, [0.025, 0.975])
        assert scores[name].group_interval.low == pytest.approx(low, abs=0.06), name
        assert scores[name].group_interval.high == pytest.approx(high, abs=0.06), name


def test_a_metric_without_a_formula_of_its_own_has_the_interval_of_jeffreys_prior() -> None:
    # Balanced accuracy of one class that is surely right is that of the other: half of a Beta distribution, moved.
    labels = np.array([1] * 30 + [0] * 3000)
    probabilities = np.where(labels == 1, 0.9, 0.1)
    probabilities[:6] = 0.1
    interval = operating_point(labels, probabilities, np.arange(3030).astype(np.str_), 0.5, 4000, 0).balanced_accuracy.patch_interval
    low, high = beta.ppf([0.025, 0.975], 24.5, 6.5)
    assert interval.low == pytest.approx((low + 1) / 2, abs=0.01)
    assert interval.high == pytest.approx((high + 1) / 2, abs=0.01)


def test_a_perfect_ranking_of_a_few_patches_is_not_certain() -> None:
    labels = np.array([1] * 8 + [0] * 40)
    scores = score_metrics(labels, np.where(labels == 1, 2.0, -2.0), np.arange(48).astype(np.str_), 300, 0)
    area = scores["roc_auc"]
    assert area.value == 1
    # Wilson's bound of 8 of 8: eight pairs without a row in common.
    assert area.patch_interval.low == pytest.approx(0.6756, abs=1e-4)
    assert area.group_interval.low == area.patch_interval.low
    # Nothing is known of the area under precision and recall then, and nothing is claimed.
    assert scores["average_precision"] == MetricValue(value=1.0, patch_interval=NOTHING, group_interval=NOTHING)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    # A binormal ROC curve one standard deviation apart has the area 0.7602.
    held = 0
    for seed in range(100):
        generator = np.random.default_rng(seed)
        labels = generator.integers(0, 2, 150)
        scores = generator.normal(labels, 1.0)
        interval = score_metrics(labels, scores, np.arange(150).astype(np.str_), 200, seed)["roc_auc"].group_interval
        assert interval.low is not None
        assert interval.high is not None
        held += interval.low <= 0.7602 <= interval.high
    assert 88 <= held <= 100


def test_resamples_in_chunks_are_all_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "_CHUNK_CELLS", 1_000)
    chunks = list(intervals.multiplicities(300, 10, np.random.default_rng(0)))
    assert list(map(len, chunks)) == [3, 3, 3, 1]
    assert all((chunk.sum(axis=1) == 300).all() for chunk in chunks)


def test_resamples_of_rows_follow_their_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "_CHUNK_CELLS", 100)
    groups = np.array([0, 0, 1, 2, 2, 2])
    chunks = list(intervals.row_weights(groups, 40, np.random.default_rng(0)))
    weights = np.concatenate(chunks)
    assert len(chunks) > 1
    assert weights.shape == (40, 6)
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, [0, 2, 3]].sum(axis=1) == 3).all()
