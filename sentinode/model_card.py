"""The model card: bundle.json told to people."""

from typing import Any

from sentinode import RESEARCH_USE_NOTICE
from sentinode.manifests import LEAK_MEANING

_SETTINGS = ("weights", "unfreeze_depth", "epochs", "optimiser", "learning_rate", "fold", "seed")


def model_card(manifest: dict[str, Any]) -> str:
    """Return the card of a bundle, Markdown, from the JSON form of its manifest."""
    rule, data, metrics = manifest["threshold_rule"], manifest["data"], manifest["metrics"]
    reached = (
        "reached."
        if rule["reached"]
        else "NOT reached, with too few or too hard validation patches. The threshold is therefore the largest whose validation recall itself "
        f"is at least {rule['target_recall']}; look at the specificity below, which may be low."
    )
    config = manifest["training_config"]
    validation = "validation" if config.get("fold") is None else f"fold {config['fold']}, on which this run validated"
    settings = ", ".join(f"{name} {config[name]}" for name in _SETTINGS if config.get(name) is not None)
    rows = "\n".join(f"| {name} | {_cell(value)} |" for name, value in metrics.items() if not isinstance(value, dict | list))
    return f"""# {manifest["name"]} {manifest["version"]}

> {RESEARCH_USE_NOTICE}

A {manifest["arch"]} that tells whether the centre 32x32 pixels of a lymph-node H&E patch hold metastatic tissue.

| | |
|---|---|
| digest | `{manifest["digest"]}` |
| licence | {manifest["licence"]} |
| made | {manifest["created_at"]} |
| input | {manifest["patch_size_px"]}x{manifest["patch_size_px"]} pixels, 8-bit RGB, {manifest["spacing_um_px"] or "unknown"} um/px; \
the network sees {manifest["input_size_px"]}x{manifest["input_size_px"]} |
| decision | {manifest["class_names"][1]} when the calibrated probability is at least {manifest["threshold"]:.6g} |
| calibration | sigmoid(logit / {manifest["temperature"]:.6g} + {manifest["bias"]:.6g}), fitted on {validation} |
| training | {settings} |

## How the threshold was chosen

The largest threshold whose validation recall has a lower 95 % bound of at least {rule["target_recall"]}; the bound is the lower of a group \
bootstrap and Clopper-Pearson, one-sided. Here the bound is {rule["bound"]:.4f}: {reached}

## Data

Fingerprint `{data["fingerprint"]}`, split by {data["split_method"]}. {LEAK_MEANING[data["leak_level"]]}
{"".join(f"{chr(10)}- {note}" for note in data["notes"])}

## On validation

Validation chose the epoch, the calibration and the threshold, so these figures are optimistic; see `sentinode evaluate` for the test split.

| metric | value |
|---|---|
{rows}

## Limits

Positive predictive value depends on prevalence: at a prevalence of 1 % most positives of any such model are false. Other scanners, stains, \
tissues and magnifications than the training set's were not tried. A probability is about one patch, not about a slide or a patient.
"""


def _cell(value: Any) -> str:
    return "not defined" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
