"""Expected calibration error, the reliability diagram and the risk-coverage curve."""

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss

from sentinode.reliability import BINS, calibration_state, risk_coverage


def said(rows: int, seed: int, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Labels that come true as often as sigmoid(logit) says, and logits made too sure (temperature below 1) or too timid."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 2, rows)
    labels = (generator.random(rows) < 1 / (1 + np.exp(-logits))).astype(np.int64)
    return labels, logits / temperature


def test_the_bins_are_those_of_scikit_learns_quantiles() -> None:
    labels, logits = said(1500, 0, 0.5)
    probabilities = 1 / (1 + np.exp(-logits))
    state = calibration_state(labels, logits)
    share, mean = calibration_curve(labels, probabilities, n_bins=BINS, strategy="quantile")
    assert [bin_.rows for bin_ in state.bins] == [100] * BINS
    assert [bin_.mean_probability for bin_ in state.bins] == pytest.approx(mean)
    assert [bin_.share_metastatic for bin_ in state.bins] == pytest.approx(share)
    assert state.ece == pytest.approx(np.abs(share - mean).mean())
    assert state.brier == pytest.approx(brier_score_loss(labels, probabilities))
    assert state.nll == pytest.approx(log_loss(labels, probabilities))


def test_what_is_too_sure_has_a_larger_error_than_what_is_right() -> None:
    right, sure = (calibration_state(*said(6000, 1, temperature)) for temperature in (1.0, 0.3))
    assert right.ece < 0.02
    assert sure.ece > 0.08
    assert right.nll < sure.nll


def test_fewer_rows_than_bins_are_a_bin_each() -> None:
    state = calibration_state(np.array([0, 1, 1]), np.array([-1.0, 0.0, 1.0]))
    assert [bin_.rows for bin_ in state.bins] == [1, 1, 1]


def test_the_surest_are_decided_with_fewer_errors_and_all_of_them_as_without_the_curve() -> None:
    labels, logits = said(4000, 2, 1.0)
    probabilities = 1 / (1 + np.exp(-logits))
    points = risk_coverage(labels, probabilities, 0.2)
    assert [point.coverage for point in points] == pytest.approx(np.arange(1, 21) / 20)
    positive = probabilities >= 0.2
    assert points[-1].error == pytest.approx((positive != (labels == 1)).mean())
    assert points[-1].recall == pytest.approx(positive[labels == 1].mean())
    assert points[4].error < points[9].error < points[-1].error


def test_the_surest_row_comes_first_on_either_side_of_the_threshold() -> None:
    # 0.05 lies nearer to a threshold of 0.1 than 0.6 does on its side: 0.5 of the way down, 0.56 of the way up.
    points = risk_coverage(np.array([1, 0]), np.array([0.05, 0.6]), 0.1)
    first = points[0]
    assert (first.coverage, first.error, first.recall) == (0.5, 1.0, None)
