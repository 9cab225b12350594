"""The report of an evaluation as a page for people."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup

from sentinode.charts import Line, Series, histogram, plot
from sentinode.manifests import Calibration, CurvePoint, EvaluationReport
from sentinode.metrics import FloatArray, IntArray
from sentinode.pages import page_environment

METRICS = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "recall": "recall (sensitivity)",
    "specificity": "specificity",
    "precision": "precision (PPV)",
    "npv": "NPV",
    "f1": "F1",
    "mcc": "Matthews correlation",
    "fnr": "false negative rate",
    "fpr": "false positive rate",
}
"""Fields of an OperatingPoint -> how the page calls them, in the page's order."""

SCORES = {"roc_auc": "ROC-AUC", "average_precision": "average precision (AUPRC)", "brier": "Brier score", "nll": "negative log-likelihood, nats"}

_BINS = 40
_SCORE_TICKS = [(share / 4, f"{share / 4:g}") for share in range(5)]


@dataclass(frozen=True)
class Example:
    """A patch that was decided wrongly.

    Attributes
    ----------
    id : str
    probability : float
        Of Metastatic, 0..1.
    picture : str
        PNG data URI.
    overlay : str or None
        The same under its Grad-CAM; None where the network has none.
    """

    id: str
    probability: float
    picture: str
    overlay: str | None


@dataclass(frozen=True)
class Pictures:
    """What the page shows beside figures; not in report.json.

    Attributes
    ----------
    labels : ndarray of int64, shape (n,), 0 or 1
    probabilities : ndarray of float64, shape (n,), 0..1
    missed, false_alarms : list of Example
        Worst first.
    explained_layer : str
        Where the overlays come from.
    """

    labels: IntArray
    probabilities: FloatArray
    missed: list[Example] = field(default_factory=list)
    false_alarms: list[Example] = field(default_factory=list)
    explained_layer: str = ""


def render(report: EvaluationReport, pictures: Pictures | None = None) -> str:
    """Return the report as one self-contained HTML page without scripts."""
    environment = page_environment("ray_jobs")
    environment.filters |= {"four": _four, "interval": _interval, "percent": _percent, "signed": _signed}
    return environment.get_template("report.html").render(
        report=report, pictures=pictures, metrics=METRICS, scores=SCORES, score_values=_score_values(report), charts=_charts(report, pictures)
    )


def _score_values(report: EvaluationReport) -> dict[str, Any]:
    return {"roc_auc": report.roc_auc_intervals, "average_precision": report.average_precision, "brier": report.brier, "nll": report.nll}


def _charts(report: EvaluationReport, pictures: Pictures | None) -> dict[str, Markup]:
    charts = {"reliability": _reliability(report.calibration), "risk_coverage": _risk_coverage(report)}
    if report.curve:
        at = report.at_threshold
        charts["roc"] = plot(
            [Line("k0", [(0, 0), (1, 1)]), Line("k1", [(1 - point.specificity, point.recall) for point in report.curve])],
            f"ROC curve, area {_four(report.roc_auc)}",
            "1 - specificity",
            "recall",
            dots=[(1 - (at.specificity.value or 0), at.recall.value or 0, "")],
        )
        said = [point for point in report.curve if point.precision is not None]
        charts["precision_recall"] = plot(
            [
                Line("k0", [(0, report.data["prevalence"]), (1, report.data["prevalence"])]),
                Line("k1", [(point.recall, point.precision or 0.0) for point in said]),
            ],
            f"Precision over recall, average precision {_four(report.average_precision.value)}",
            "recall",
            "precision",
            dots=[(at.recall.value or 0, at.precision.value or 0, "")],
        )
        charts["thresholds"] = _thresholds(report.curve, at.threshold)
    if pictures is not None:
        charts["scores"] = _scores(pictures)
    return charts


def _thresholds(points: list[CurvePoint], threshold: float) -> Markup:
    known = [(point.threshold, point) for point in reversed(points) if point.threshold is not None]
    return plot(
        [
            Line("k1", [(value, point.recall) for value, point in known]),
            Line("k2", [(value, point.specificity) for value, point in known]),
            Line("k3", [(value, point.precision or 0.0) for value, point in known]),
        ],
        f"Recall, specificity and precision over the threshold; the bundle's is {threshold:.4f}",
        "threshold",
        "",
        mark_x=threshold,
    )


def _reliability(calibration: Calibration) -> Markup:
    before = [(bin_.mean_probability, bin_.share_metastatic) for bin_ in calibration.before.bins]
    after = [(bin_.mean_probability, bin_.share_metastatic) for bin_ in calibration.after.bins]
    intervals = [
        (bin_.mean_probability, bin_.interval.low, bin_.interval.high)
        for bin_ in calibration.after.bins
        if bin_.interval.low is not None and bin_.interval.high is not None
    ]
    return plot(
        [Line("k0", [(0, 0), (1, 1)]), Line("k2", before), Line("k1", after)],
        f"Reliability: expected calibration error {calibration.before.ece:.4f} before and {calibration.after.ece:.4f} after calibration",
        "mean probability",
        "share metastatic",
        bars=intervals,
        dots=[(x, y, "k1") for x, y in after],
    )


def _risk_coverage(report: EvaluationReport) -> Markup:
    points = report.review.risk_coverage
    top = next((step for step in (0.05, 0.1, 0.2, 0.5) if step >= max(point.error for point in points)), 1.0)
    description = f"Error rate of the surest part of the patches; {points[-1].error:.4f} of all of them"
    line = Line("k1", [(point.coverage, point.error) for point in points])
    return plot([line], description, "share of patches decided", "error rate", y_top=top, mark_x=1 - report.review.flagged)


def _scores(pictures: Pictures) -> Markup:
    series = []
    for label, style in ((0, "normal"), (1, "metastatic")):
        chosen = pictures.probabilities[pictures.labels == label]
        counts, _ = np.histogram(chosen, _BINS, (0, 1))
        series.append(Series(style, (counts / max(len(chosen), 1)).tolist()))
    return histogram(series, _SCORE_TICKS, "Probability of Metastatic, by class", "probability of Metastatic")


def _four(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.4f}"


def _signed(value: float | None) -> str:
    return "not defined" if value is None else f"{value:+.4f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _interval(value: Any) -> str:
    return "not defined" if value.low is None else f"{value.low:.4f} to {value.high:.4f}"
