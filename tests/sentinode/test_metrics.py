"""Metrics agree with scikit-learn and the seed's published matrix; intervals never say more than the data."""

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from sentinode import metrics
from sentinode.manifests import Confusion, Interval, MetricValue, OperatingPoint
from sentinode.metrics import confusion, operating_point, rates, roc_auc, roc_auc_with_intervals

NAMES = ("accuracy", "precision", "recall", "specificity", "f1", "fnr", "fpr")


def simulated(rows: int, seed: int = 0, group_size: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, probabilities and groups; rows of one group share their label and most of their score."""
    generator = np.random.default_rng(seed)
    groups = np.arange(rows) // group_size
    labels = (generator.random(groups.max() + 1) < 0.4).astype(np.int64)[groups]
    score = 1.2 * (2 * labels - 1) + generator.normal(0, 1.2, groups.max() + 1)[groups] + generator.normal(0, 0.5, rows)
    return labels, 1 / (1 + np.exp(-score)), groups.astype(np.str_)


def values_of(point: OperatingPoint) -> dict[str, MetricValue]:
    return {name: getattr(point, name) for name in NAMES}


def width(interval: Interval) -> float:
    assert interval.low is not None
    assert interval.high is not None
    return interval.high - interval.low


def test_a_consistent_published_matrix_gives_its_published_rates() -> None:
    result = rates(Confusion(tp=12_726, fn=642, fp=1_137, tn=18_499))
    assert {name: round(value or 0, 4) for name, value in result.items()} == {
        "recall": 0.9520,
        "precision": 0.9180,
        "specificity": 0.9421,
        "accuracy": 0.9461,
        "f1": 0.9347,
        "fnr": 0.0480,
        "fpr": 0.0579,
    }


@pytest.mark.parametrize("seed", range(5))
def test_rates_and_area_agree_with_scikit_learn(seed: int) -> None:
    labels, probabilities, _ = simulated(500, seed)
    threshold = 0.3 + 0.1 * seed
    said = (probabilities >= threshold).astype(int)
    counts = confusion(labels, said.astype(bool))
    assert (counts.tn, counts.fp, counts.fn, counts.tp) == tuple(sklearn_metrics.confusion_matrix(labels, said).ravel())
    result = rates(counts)
    assert result["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(labels, said))
    assert result["precision"] == pytest.approx(sklearn_metrics.precision_score(labels, said))
    assert result["recall"] == pytest.approx(sklearn_metrics.recall_score(labels, said))
    assert result["specificity"] == pytest.approx(sklearn_metrics.recall_score(labels, said, pos_label=0))
    assert result["f1"] == pytest.approx(sklearn_metrics.f1_score(labels, said))
    assert result["fnr"] == pytest.approx(1 - sklearn_metrics.recall_score(labels, said))
    assert result["fpr"] == pytest.approx(1 - sklearn_metrics.recall_score(labels, said, pos_label=0))
    assert roc_auc(labels, probabilities) == pytest.approx(sklearn_metrics.roc_auc_score(labels, probabilities))


def test_the_area_is_the_share_of_pairs_in_the_right_order() -> None:
    assert roc_auc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]) == 0.75
    assert roc_auc([0, 1], [0.5, 0.5]) == 0.5


def test_what_cannot_be_computed_is_none_and_not_nan() -> None:
    assert roc_auc([1, 1, 1], [0.1, 0.2, 0.3]) is None
    assert roc_auc([], []) is None
    assert rates(Confusion(tn=5, fp=0, fn=0, tp=0)) == {
        "accuracy": 1.0,
        "precision": None,
        "recall": None,
        "specificity": 1.0,
        "fnr": None,
        "fpr": 0.0,
        "f1": None,
    }


def test_a_probability_at_the_threshold_counts_as_positive() -> None:
    point = operating_point(np.array([0, 1]), np.array([0.5, 0.5]), np.array(["a", "b"]), 0.5, 100, 0)
    assert point.confusion == Confusion(tn=0, fp=1, fn=0, tp=1)


@pytest.mark.parametrize(("seed", "group_size"), [(0, 1), (1, 5), (2, 25)])
def test_intervals_hold_the_value_and_the_group_interval_holds_the_patch_interval(seed: int, group_size: int) -> None:
    labels, probabilities, groups = simulated(400, seed, group_size)
    area = roc_auc_with_intervals(labels, probabilities, groups, 200, seed)
    point = operating_point(labels, probabilities, groups, 0.4, 200, seed)
    for name, metric in {"auc": area, **values_of(point)}.items():
        assert metric.value is not None
        patch, group = metric.patch_interval, metric.group_interval
        assert None not in (patch.low, patch.high, group.low, group.high)
        assert 0 <= group.low <= patch.low <= metric.value <= patch.high <= group.high <= 1, name  # type: ignore[operator]


def test_groups_whose_rows_agree_widen_the_interval() -> None:
    labels, probabilities, groups = simulated(1000, 3, group_size=25)
    alone = np.arange(1000).astype(np.str_)
    clustered, independent = (operating_point(labels, probabilities, names, 0.5, 400, 0) for names in (groups, alone))
    for name in ("accuracy", "recall", "specificity"):
        assert width(values_of(clustered)[name].group_interval) > 2 * width(values_of(independent)[name].group_interval), name
        assert values_of(clustered)[name].patch_interval == values_of(independent)[name].patch_interval
    areas = [roc_auc_with_intervals(labels, probabilities, names, 200, 0) for names in (groups, alone)]
    assert width(areas[0].group_interval) > 2 * width(areas[1].group_interval)


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
    nothing = Interval(low=None, high=None)
    area = roc_auc_with_intervals(labels, probabilities, groups, 100, 0)
    assert area == MetricValue(value=None, patch_interval=nothing, group_interval=nothing)
    point = operating_point(labels, probabilities, groups, 0.5, 100, 0)
    for metric in (point.recall, point.fnr, point.precision, point.f1):
        assert metric == MetricValue(value=None, patch_interval=nothing, group_interval=nothing)
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


def test_the_bootstrap_of_the_area_equals_resampling_rows_by_hand() -> None:
    labels, scores, groups = simulated(60, 6, 3)
    area = roc_auc_with_intervals(labels, scores, groups, 300, 1)
    generator = np.random.default_rng(99)
    names = np.unique(groups)
    areas = []
    for _ in range(600):
        rows = np.concatenate([np.flatnonzero(groups == name) for name in generator.choice(names, len(names))])
        if len(set(labels[rows])) == 2:
            areas.append(sklearn_metrics.roc_auc_score(labels[rows], scores[rows]))
    low, high = np.quantile(areas, [0.025, 0.975])
    assert area.group_interval.low == pytest.approx(low, abs=0.04)
    assert area.group_interval.high == pytest.approx(high, abs=0.04)


def test_resamples_in_chunks_are_all_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_CHUNK_CELLS", 1_000)
    chunks = list(metrics._multiplicities(300, 10, np.random.default_rng(0)))
    assert list(map(len, chunks)) == [3, 3, 3, 1]
    assert all((chunk.sum(axis=1) == 300).all() for chunk in chunks)
