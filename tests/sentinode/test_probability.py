"""From logits to what is said about a patch."""

import math
from typing import Any

import numpy as np
import pytest

from sentinode.config import ReviewRule
from sentinode.errors import SentinodeError
from sentinode.probability import Decision, calibrated_probability, decide, review_reasons

RULE = ReviewRule(below=0.85, band=0.05)
OF_THE_BUNDLE: dict[str, Any] = {"temperature": 1.0, "bias": 0.0, "threshold": 0.5, "review": RULE}


def decisions(logits: list[float], **changes: Any) -> list[Decision]:
    none = np.zeros(len(logits), bool)
    return decide(logits, pale=none, unusual=none, **OF_THE_BUNDLE | changes)


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def test_the_probability_is_the_sigmoid_of_the_scaled_and_shifted_logit() -> None:
    logits = np.linspace(-8, 8, 33)
    expected = [1 / (1 + math.exp(-(z / 1.7 - 0.3))) for z in logits]
    np.testing.assert_allclose(calibrated_probability(logits, 1.7, -0.3), expected, rtol=1e-12)


def test_extreme_logits_saturate_quietly() -> None:
    with np.errstate(all="raise"):
        assert calibrated_probability([-1e30, 0, 1e30], 0.05, 0).tolist() == [0, 0.5, 1]


def test_float32_logits_are_not_rounded_further() -> None:
    logits = np.array([0.1, -2.3], np.float32)
    assert calibrated_probability(logits, 1.3, 0.2).dtype == np.float64
    np.testing.assert_array_equal(calibrated_probability(logits, 1.3, 0.2), calibrated_probability(logits.astype(np.float64), 1.3, 0.2))


def test_a_probability_at_the_threshold_is_metastatic() -> None:
    threshold = float(calibrated_probability([0.7], 1.3, -0.1)[0])
    at, below = decisions([0.7, 0.7 - 1e-9], temperature=1.3, bias=-0.1, threshold=threshold)
    assert (at.prediction, below.prediction) == ("Metastatic", "Normal")


def test_confidence_is_the_probability_of_the_class_that_is_returned() -> None:
    normal, metastatic = decisions([logit(0.2), logit(0.4)], threshold=0.3)
    assert (normal.prediction, normal.confidence) == ("Normal", pytest.approx(0.8))
    # With a threshold below one half the returned class may be the less probable one, and says so.
    assert (metastatic.prediction, metastatic.confidence) == ("Metastatic", pytest.approx(0.4))
    assert metastatic.probability == pytest.approx(0.4)


def test_the_logit_is_passed_on_uncalibrated() -> None:
    assert [decision.logit for decision in decisions([1.25, -3.5], temperature=2.0, bias=1.0)] == [1.25, -3.5]


@pytest.mark.parametrize(
    ("probability", "threshold", "pale", "unusual", "reasons"),
    [
        (0.99, 0.5, False, False, ()),
        (0.01, 0.5, False, False, ()),
        (0.85, 0.5, False, False, ()),
        (0.849, 0.5, False, False, ("low_confidence",)),
        (0.151, 0.5, False, False, ("low_confidence",)),
        (0.149, 0.5, False, False, ()),
        (0.5, 0.5, False, False, ("low_confidence", "near_threshold")),
        (0.0625, 0.03125, False, False, ("near_threshold",)),
        (0.0625, 0.0, False, False, ()),
        (0.99, 0.5, True, False, ("no_tissue",)),
        (0.5, 0.52, True, False, ("low_confidence", "near_threshold", "no_tissue")),
        (0.99, 0.5, False, True, ("unusual_colours",)),
        (0.99, 0.5, True, True, ("no_tissue", "unusual_colours")),
    ],
)
def test_a_patch_is_flagged_with_each_reason_that_holds(
    probability: float, threshold: float, pale: bool, unusual: bool, reasons: tuple[str, ...]
) -> None:
    assert review_reasons(probability, threshold, RULE, pale, unusual) == reasons


def test_the_edge_of_the_band_belongs_to_it() -> None:
    rule = ReviewRule(below=0.5, band=0.25)
    assert review_reasons(0.75, 0.5, rule, False, False) == ("near_threshold",)
    assert review_reasons(0.25, 0.5, rule, False, False) == ("near_threshold",)
    assert review_reasons(0.7500001, 0.5, rule, False, False) == ()


def test_review_is_needed_exactly_where_a_reason_is_given() -> None:
    sure, unsure = decisions([9, 0.1])
    assert (sure.needs_review, sure.review_reasons) == (False, ())
    assert unsure.needs_review


def test_order_and_number_are_kept() -> None:
    assert decisions([]) == []
    pale, unusual = np.array([False, True, False]), np.array([False, False, True])
    result = decide([5, 6, 7], pale=pale, unusual=unusual, **OF_THE_BUNDLE)
    assert [decision.logit for decision in result] == [5, 6, 7]
    assert [decision.needs_review for decision in result] == [False, True, True]
    assert [decision.review_reasons for decision in result] == [(), ("no_tissue",), ("unusual_colours",)]
    with pytest.raises(ValueError, match="shorter"):
        decide([5, 6], pale=np.zeros(1, bool), unusual=np.zeros(2, bool), **OF_THE_BUNDLE)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_an_answer_that_is_not_a_number_is_never_called_normal(broken: float) -> None:
    with pytest.raises(SentinodeError, match="not a number for 1 of 3 patches"):
        decisions([1.0, broken, -1.0])
