"""Values of metrics agree with scikit-learn, torchmetrics and a published matrix."""

import numpy as np
import pytest
import torch
import torchmetrics.functional.classification as torch_metrics
from sklearn import metrics as sklearn_metrics

from sentinode.manifests import Confusion
from sentinode.metrics import Scores, confusion, predictive_values, rates, rates_of, roc_auc
from tests.sentinode.simulated import simulated


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
        "npv": 0.9665,
        "balanced_accuracy": 0.9470,
        "mcc": 0.8892,
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
    assert result["npv"] == pytest.approx(sklearn_metrics.precision_score(labels, said, pos_label=0))
    assert result["balanced_accuracy"] == pytest.approx(sklearn_metrics.balanced_accuracy_score(labels, said))
    assert result["mcc"] == pytest.approx(sklearn_metrics.matthews_corrcoef(labels, said))
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
        "npv": 1.0,
        "f1": None,
        "balanced_accuracy": None,
        "mcc": None,
    }


def _every_value(labels: np.ndarray, logits: np.ndarray, weights: np.ndarray | None = None) -> dict[str, float]:
    lines = np.ones((1, len(labels))) if weights is None else weights[np.newaxis].astype(np.float64)
    return {name: float(value[0]) for name, value in Scores(labels, logits).values(lines).items()}


@pytest.mark.parametrize("decimals", [None, 1], ids=["distinct scores", "many ties"])
@pytest.mark.parametrize("seed", range(3))
def test_metrics_of_scores_agree_with_scikit_learn_weighted_and_with_ties(seed: int, decimals: int | None) -> None:
    labels, probabilities, _ = simulated(400, seed)
    logits = np.log(probabilities / (1 - probabilities))
    logits = logits if decimals is None else logits.round(decimals)
    probabilities = 1 / (1 + np.exp(-logits))
    weights = np.random.default_rng(seed).integers(0, 4, 400)
    for chosen in (None, weights):
        found = _every_value(labels, logits, chosen)
        assert found["roc_auc"] == pytest.approx(sklearn_metrics.roc_auc_score(labels, logits, sample_weight=chosen))
        assert found["average_precision"] == pytest.approx(sklearn_metrics.average_precision_score(labels, logits, sample_weight=chosen))
        assert found["brier"] == pytest.approx(sklearn_metrics.brier_score_loss(labels, probabilities, sample_weight=chosen))
        assert found["nll"] == pytest.approx(sklearn_metrics.log_loss(labels, probabilities, sample_weight=chosen))


@pytest.mark.parametrize("seed", range(3))
def test_metrics_agree_with_torchmetrics(seed: int) -> None:
    labels, probabilities, _ = simulated(400, seed)
    truth, scores = torch.from_numpy(labels), torch.from_numpy(probabilities)
    found = _every_value(labels, np.log(probabilities / (1 - probabilities)))
    assert found["roc_auc"] == pytest.approx(torch_metrics.binary_auroc(scores, truth).item(), abs=1e-6)
    assert found["average_precision"] == pytest.approx(torch_metrics.binary_average_precision(scores, truth).item(), abs=1e-6)
    result = rates(confusion(labels, probabilities >= 0.4))
    for name, theirs in {
        "accuracy": torch_metrics.binary_accuracy,
        "precision": torch_metrics.binary_precision,
        "recall": torch_metrics.binary_recall,
        "specificity": torch_metrics.binary_specificity,
        "f1": torch_metrics.binary_f1_score,
        "mcc": torch_metrics.binary_matthews_corrcoef,
        "npv": torch_metrics.binary_negative_predictive_value,
    }.items():
        assert result[name] == pytest.approx(theirs(scores, truth, threshold=0.4).item(), abs=1e-6), name


def test_a_weighting_without_a_class_has_no_areas() -> None:
    labels, logits = np.array([0, 0, 1]), np.array([-1.0, 0.0, 2.0])
    found = Scores(labels, logits).values(np.array([[1.0, 1.0, 0.0], [0.0, 0.0, 2.0], [0.0, 0.0, 0.0], [1.0, 0.0, 1.0]]))
    assert np.isnan(found["roc_auc"]).tolist() == [True, True, True, False]
    assert np.isnan(found["average_precision"]).tolist() == [True, True, True, False]
    assert np.isnan(found["nll"]).tolist() == [False, False, True, False]


def test_many_matrices_at_once_are_each_as_alone() -> None:
    cells = np.random.default_rng(0).integers(0, 3, (50, 4))
    together = rates_of(cells.astype(np.float64))
    for number, (tn, fp, fn, tp) in enumerate(cells.tolist()):
        alone = rates(Confusion(tn=tn, fp=fp, fn=fn, tp=tp))
        assert {name: None if np.isnan(value[number]) else value[number] for name, value in together.items()} == alone


def test_predictive_values_follow_bayes() -> None:
    # Of 1,000 patches with 1 % metastatic: 9 of 10 found, 99 of 990 called wrongly.
    ppv, npv = predictive_values(np.array(0.9), np.array(0.9), 0.01)
    assert float(ppv) == pytest.approx(9 / 108)
    assert float(npv) == pytest.approx(891 / 892)
    assert np.isnan(predictive_values(np.array(0.0), np.array(1.0), 0.1)[0])
