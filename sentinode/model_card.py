"""The model card: bundle.json told to people."""

from typing import Any

from sentinode import RESEARCH_USE_NOTICE
from sentinode.manifests import CALIBRATION_MEANING, LEAK_MEANING

_SETTINGS = ("weights", "unfreeze_depth", "epochs", "optimiser", "learning_rate", "fold", "seed")
_NAMES = {
    "roc_auc": "ROC-AUC",
    "average_precision": "average precision (AUPRC)",
    "brier": "Brier score",
    "nll": "negative log-likelihood, nats",
    "recall": "recall (sensitivity) at the threshold",
    "specificity": "specificity at the threshold",
    "precision": "precision (PPV) at the threshold",
    "npv": "NPV at the threshold",
    "f1": "F1 at the threshold",
    "mcc": "Matthews correlation at the threshold",
    "balanced_accuracy": "balanced accuracy at the threshold",
    "accuracy": "accuracy at the threshold",
}


def model_card(manifest: dict[str, Any]) -> str:
    """Return the card of a bundle, Markdown, from the JSON form of its manifest.

    It does not tell when: whoever makes the same bundle again, after a node was lost, makes the same bytes.
    """
    rule, data, metrics = manifest["threshold_rule"], manifest["data"], manifest["metrics"]
    reached = (
        "reached."
        if rule["reached"]
        else "NOT reached, with too few or too hard validation patches. The threshold is therefore the largest whose validation recall itself "
        f"is at least {rule['target_recall']}; look at the specificity below, which may be low."
    )
    return f"""# {manifest["name"]} {manifest["version"]}

> {RESEARCH_USE_NOTICE}

{_what(manifest)} that tells whether the centre 32x32 pixels of a lymph-node H&E patch hold metastatic tissue.

| | |
|---|---|
| digest | `{manifest["digest"]}` |
| licence | {manifest["licence"]} |
| input | {manifest["patch_size_px"]}x{manifest["patch_size_px"]} pixels, 8-bit RGB, {manifest["spacing_um_px"] or "unknown"} um/px; \
{_seen(manifest)} |
| decision | {manifest["class_names"][1]} when the calibrated probability is at least {manifest["threshold"]:.6g} |
| calibration | sigmoid(logit / {manifest["temperature"]:.6g} + {manifest["bias"]:.6g}), fitted on {_fitted_on(manifest)} |
| review | flagged for a human: probability of the decision below {manifest["review"]["below"]:g}, or within {manifest["review"]["band"]:g} of the \
threshold, or no tissue |
| training | {_training(manifest)} |

## Intended use

Research on patches of digitised H&E sections of lymph nodes, like those it was trained on: comparing methods, ranking patches for a human to \
look at, teaching. A human decides. Not for diagnosis, not for deciding about a patient, not for other tissues or stains.

## How the threshold was chosen

The largest threshold whose validation recall has a lower 95 % bound of at least {rule["target_recall"]}; the bound is the lower of a group \
bootstrap and Clopper-Pearson, one-sided. Here the bound is {rule["bound"]:.4f}: {reached}

{CALIBRATION_MEANING[manifest["calibration_rows"]]}

## Data

Fingerprint `{data["fingerprint"]}`, split by {data["split_method"]}. {LEAK_MEANING[data["leak_level"]]}
{"".join(f"{chr(10)}- {note}" for note in data["notes"])}

## On validation

{_optimism(manifest)} See `sentinode evaluate` for the test split.

{_table(metrics)}

## Prevalence

Predictive values depend on how many of the patches looked at are metastatic, and validation holds more of them than a slide does. What recall and \
specificity above mean elsewhere:

{_prevalences(metrics)}

## Limits

At a prevalence of 1 % most positives of any such model are false. Other scanners, stains, \
tissues and magnifications than the training set's were not tried. A probability is about one patch, not about a slide or a patient.
"""


def _what(manifest: dict[str, Any]) -> str:
    members = manifest["members"]
    return f"An ensemble of {len(members)} networks, in `members/` with a card each," if members else f"A {manifest['arch']}"


def _seen(manifest: dict[str, Any]) -> str:
    return "resized for each network" if manifest["members"] else f"the network sees {manifest['input_size_px']}x{manifest['input_size_px']}"


def _fitted_on(manifest: dict[str, Any]) -> str:
    if manifest["members"]:
        return "the mean of the members' calibrated logits"
    fold = manifest["training_config"].get("fold")
    return "validation" if fold is None else f"fold {fold}, on which this run validated"


def _training(manifest: dict[str, Any]) -> str:
    if manifest["members"]:
        return "members " + ", ".join(f"`{digest[:12]}`" for digest in manifest["members"])
    config = manifest["training_config"]
    return ", ".join(f"{name} {config[name]}" for name in _SETTINGS if config.get(name) is not None)


def _optimism(manifest: dict[str, Any]) -> str:
    chosen = "the epoch of each member, the calibration" if manifest["members"] else "the epoch, the calibration"
    return f"Validation chose {chosen} and the threshold, so these figures are optimistic."


def _table(metrics: dict[str, Any]) -> str:
    intervals = metrics.get("group_intervals", {})
    rows = [f"| {name} | {metrics[name]} | |" for name in ("rows", "groups") if name in metrics]
    rows += [f"| {text} | {_cell(metrics[name])} | {_interval(intervals.get(name))} |" for name, text in _NAMES.items() if name in metrics]
    return "\n".join(["| metric | value | 95 %, groups resampled |", "|---|---|---|", *rows])


def _prevalences(metrics: dict[str, Any]) -> str:
    rows = [
        f"| {100 * at['prevalence']:g} % | {_cell(at['ppv']['value'])} ({_of(at['ppv'])}) | {_cell(at['npv']['value'])} ({_of(at['npv'])}) |"
        for at in metrics.get("at_prevalences", [])
    ]
    return "\n".join(["| metastatic patches | PPV (95 %) | NPV (95 %) |", "|---|---|---|", *rows]) if rows else "Not measured."


def _of(value: dict[str, Any]) -> str:
    interval = value["group_interval"]
    return _interval([interval["low"], interval["high"]])


def _cell(value: Any) -> str:
    return "not defined" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def _interval(bounds: list[float | None] | None) -> str:
    return "not defined" if bounds is None or None in bounds else f"{bounds[0]:.4f} to {bounds[1]:.4f}"
