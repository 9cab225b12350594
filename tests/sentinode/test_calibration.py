"""Temperature, bias and threshold: checked against simulation and against an implementation too slow to be wrong."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import binomtest

from sentinode.calibration import choose_threshold, fit_temperature_and_bias
from sentinode.errors import UsageError
from sentinode.metrics import roc_auc
from sentinode.probability import calibrated_probability


def simulated(rows: int, temperature: float, bias: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels that come true as often as the calibrated probabilities say."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 3 * temperature, rows)
    return logits, (generator.random(rows) < calibrated_probability(logits, temperature, bias)).astype(np.int64)


@pytest.mark.parametrize(("temperature", "bias"), [(1.0, 0.0), (2.5, -0.7), (0.4, 1.2), (8.0, -2.0)])
def test_the_fit_recovers_what_the_logits_were_distorted_by(temperature: float, bias: float) -> None:
    logits, labels = simulated(40_000, temperature, bias)
    fitted_temperature, fitted_bias = fit_temperature_and_bias(logits, labels)
    assert fitted_temperature == pytest.approx(temperature, rel=0.05)
    assert fitted_bias == pytest.approx(bias, abs=0.06)


def test_the_fit_is_the_maximum_of_the_likelihood() -> None:
    logits, labels = simulated(300, 1.7, 0.4, seed=2)

    def loss(parameters: np.ndarray) -> float:
        probabilities = np.clip(calibrated_probability(logits, np.exp(parameters[0]), parameters[1]), 1e-12, 1 - 1e-12)
        return float(-np.mean(labels * np.log(probabilities) + (1 - labels) * np.log(1 - probabilities)))

    best = minimize(loss, np.zeros(2), method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-12})
    temperature, bias = fit_temperature_and_bias(logits, labels)
    assert (np.log(temperature), bias) == pytest.approx(tuple(best.x), abs=1e-4)


def test_a_class_weight_in_the_loss_is_undone_by_the_bias() -> None:
    # Weighting class 1 by w adds log(w) to the logits of the network that minimises the loss.
    logits, labels = simulated(40_000, 1.0, 0.0, seed=3)
    temperature, bias = fit_temperature_and_bias(logits + np.log(1.469), labels)
    assert temperature == pytest.approx(1, rel=0.05)
    assert bias == pytest.approx(-np.log(1.469), abs=0.06)


def test_calibrated_probabilities_have_the_prevalence_on_average() -> None:
    logits, labels = simulated(2_000, 3.0, 1.0, seed=4)
    assert calibrated_probability(logits, *fit_temperature_and_bias(logits, labels)).mean() == pytest.approx(labels.mean(), abs=1e-4)


@pytest.mark.parametrize(
    "logits",
    [
        np.r_[np.linspace(-9, -1, 50), np.linspace(1, 9, 50)],
        np.r_[np.linspace(1, 9, 50), np.linspace(-9, -1, 50)],
        np.r_[np.full(50, -1e4), np.full(50, 1e4)],
        np.zeros(100),
        np.full(100, 7.5),
    ],
    ids=["separable", "wrong way round", "huge", "useless", "constant"],
)
def test_degenerate_logits_still_give_probabilities(logits: np.ndarray) -> None:
    labels = np.repeat([0, 1], 50)
    temperature, bias = fit_temperature_and_bias(logits, labels)
    assert 0.05 <= temperature <= 20
    assert -10 <= bias <= 10
    probabilities = calibrated_probability(logits, temperature, bias)
    assert np.isfinite(probabilities).all()
    threshold, rule = choose_threshold(probabilities, labels, np.arange(100).astype(np.str_), target_recall=0.9, samples=100, seed=0)
    assert 0 <= threshold <= 1
    assert np.isfinite(rule.bound)


def test_calibration_keeps_the_order_and_so_the_area() -> None:
    logits, labels = simulated(3_000, 2.0, -0.5, seed=5)
    probabilities = calibrated_probability(logits, *fit_temperature_and_bias(logits, labels))
    assert roc_auc(labels, probabilities) == roc_auc(labels, logits)


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_cannot_be_calibrated(label: int) -> None:
    labels, scores = np.full(30, label), np.linspace(0, 1, 30)
    message = "needs? both classes in validation; it has " + ("30 normal and 0" if label == 0 else "0 normal and 30") + " metastatic"
    with pytest.raises(UsageError, match=message):
        fit_temperature_and_bias(scores, labels)
    with pytest.raises(UsageError, match=message):
        choose_threshold(scores, labels, scores.astype(np.str_), target_recall=0.9, samples=100, seed=0)


def slow_threshold(
    probabilities: np.ndarray, labels: np.ndarray, groups: np.ndarray, target: float, samples: int, seed: int
) -> tuple[float, float, bool]:
    """The rule word by word: try every threshold from above, resampling the rows of whole groups for each."""
    generator = np.random.default_rng(seed)
    names = sorted(set(groups.tolist()))
    draws = [dict(zip(names, generator.multinomial(len(names), np.full(len(names), 1 / len(names))), strict=True)) for _ in range(samples)]
    positives = [(probability, group) for probability, label, group in zip(probabilities, labels, groups, strict=True) if label == 1]
    bounds = {}
    recalls = {}
    for threshold in sorted(set(probabilities.tolist()), reverse=True):
        found = sum(probability >= threshold for probability, _ in positives)
        exact = binomtest(found, len(positives)).proportion_ci(0.9, method="exact").low
        resampled = []
        for draw in draws:
            total = sum(draw[group] for _, group in positives)
            if total:
                resampled.append(sum(draw[group] for probability, group in positives if probability >= threshold) / total)
        bounds[threshold] = min(exact, float(np.quantile(resampled, 0.05)))
        recalls[threshold] = found / len(positives)
    for threshold, bound in bounds.items():
        if bound >= target:
            return threshold, bound, True
    threshold = next(threshold for threshold, recall in recalls.items() if recall >= target)
    return threshold, bounds[threshold], False


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("target", [0.5, 0.8, 0.95])
def test_the_threshold_is_the_largest_whose_bound_reaches_the_target(seed: int, target: float) -> None:
    generator = np.random.default_rng(seed)
    rows = 90
    groups = generator.integers(0, 30, rows).astype(np.str_)
    labels = (generator.random(rows) < 0.4).astype(np.int64)
    probabilities = np.clip(0.3 + 0.35 * labels + generator.normal(0, 0.2, rows), 0, 1)
    if seed % 2:
        probabilities = np.round(probabilities, 1)  # many ties, across the classes too
    threshold, rule = choose_threshold(probabilities, labels, groups, target_recall=target, samples=120, seed=seed)
    expected_threshold, expected_bound, expected_reached = slow_threshold(probabilities, labels, groups, target, 120, seed)
    assert threshold == expected_threshold
    assert rule.bound == pytest.approx(expected_bound, abs=1e-9)
    assert rule.reached is expected_reached
    assert rule.target_recall == target
    assert (probabilities[labels == 1] >= threshold).mean() >= target


def test_both_outcomes_of_the_rule_are_among_the_cases_above() -> None:
    labels = np.repeat([0, 1], 400)
    probabilities = np.r_[np.linspace(0, 0.6, 400), np.linspace(0.4, 1, 400)]
    groups = np.arange(800).astype(np.str_)
    _, reached = choose_threshold(probabilities, labels, groups, target_recall=0.95, samples=200, seed=0)
    assert reached.reached
    assert reached.bound >= 0.95
    few = slice(390, 410)
    threshold, missed = choose_threshold(probabilities[few], labels[few], groups[few], target_recall=0.95, samples=200, seed=0)
    assert not missed.reached
    assert missed.bound < 0.95
    assert threshold == probabilities[few][labels[few] == 1].min()


def test_groups_that_fail_together_lower_the_bound() -> None:
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 1], 200)
    clusters = np.repeat(np.arange(20), 10)
    score = generator.normal(0, 1, 20)[clusters]
    probabilities = 1 / (1 + np.exp(-np.r_[generator.normal(-2, 1, 200), 2 + score]))
    groups = np.r_[np.arange(100, 300), clusters].astype(np.str_)
    together, _ = choose_threshold(probabilities, labels, groups, target_recall=0.8, samples=300, seed=0)
    alone, _ = choose_threshold(probabilities, labels, np.arange(400).astype(np.str_), target_recall=0.8, samples=300, seed=0)
    assert together < alone


def test_all_positives_found_is_still_bounded_by_their_number() -> None:
    probabilities, labels = np.array([0.1, 0.9, 0.9, 0.9]), np.array([0, 1, 1, 1])
    threshold, rule = choose_threshold(probabilities, labels, np.array(list("abcd")), target_recall=0.9, samples=100, seed=0)
    assert threshold == 0.9
    assert rule.bound == pytest.approx(0.05 ** (1 / 3))
    assert not rule.reached


def test_the_threshold_follows_the_seed() -> None:
    logits, labels = simulated(200, 1.0, 0.0, seed=8)
    probabilities = calibrated_probability(logits, 1, 0)
    groups = (np.arange(200) // 10).astype(np.str_)
    first = choose_threshold(probabilities, labels, groups, target_recall=0.8, samples=100, seed=1)
    assert choose_threshold(probabilities, labels, groups, target_recall=0.8, samples=100, seed=1) == first
