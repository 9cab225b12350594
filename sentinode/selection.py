"""Which of two validation figures is better: one rule for epochs of a run and for trials of a sweep."""

from typing import Literal

Metric = Literal["val_roc_auc", "val_loss"]


def is_better(value: float | None, than: float | None, metric: str) -> bool:
    """Tell whether `value` is strictly better than `than`; any figure is better than none (an AUC of scores that are not finite is none)."""
    if value is None or than is None:
        return value is not None
    return value < than if metric == "val_loss" else value > than
