"""A sweep is checked before any trial starts: what some trial would trip over is refused at once."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from sentinode.config import AshaConfig, LogUniform, NoScheduler, SweepConfig, TrainConfig, load_config, parse_config
from sentinode.errors import ConfigError

SPACE = {"learning_rate": {"loguniform": [1e-5, 1e-2]}}
SWEEPS = Path(__file__).parents[2] / "tune_configs"


def refusal(**fields: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(SweepConfig, fields)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("path", sorted(SWEEPS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_sweeps_that_come_with_the_program_are_valid(path: Path) -> None:
    assert load_config(SweepConfig, [path]).space


def test_a_point_of_the_space_overlays_the_base() -> None:
    sweep = parse_config(
        SweepConfig,
        {
            "space": {"learning_rate": {"loguniform": ["1e-5", "1e-2"]}, "augment.colour_jitter": {"uniform": [0, 0.5]}},
            "base": {"epochs": 2, "augment": {"hue_jitter": 0.1}},
            "workers_per_trial": 3,
            "metric": "val_loss",
        },
    )
    assert sweep.space["learning_rate"] == (LogUniform(loguniform=(1e-5, 1e-2)),)
    config = sweep.train_config({"learning_rate": 0.001, "augment.colour_jitter": 0.25})
    assert (config.learning_rate, config.epochs, config.workers, config.selection_metric) == (0.001, 2, 3, "val_loss")
    assert (config.augment.colour_jitter, config.augment.hue_jitter) == (0.25, 0.1)
    assert sweep.base["augment"] == {"hue_jitter": 0.1}


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"learning_rat": {"uniform": [0.1, 1]}}, "space.learning_rat: unknown key learning_rat; did you mean learning_rate?"),
        ({"augment.flipp": {"choice": [True]}}, "space.augment.flipp: unknown key augment.flipp; did you mean flip?"),
        ({"learning_rate": {"uniform": [1, 0.1]}}, "space.learning_rate: range [1.0, 0.1] must run from low to high"),
        ({"learning_rate": {"loguniform": [0.1, 0.1]}}, "space.learning_rate: range [0.1, 0.1] must run from low to high"),
        ({"epochs": {"randint": [5, 1]}}, "space.epochs: range [5, 1] must run from low to high"),
        ({"learning_rate": {"loguniform": [0, 1]}}, "space: learning_rate: loguniform.0: got 0, input should be greater than 0"),
        ({"learning_rate": {"uniform": [-1, 1]}}, "space.learning_rate: learning_rate: got -1.0, input should be greater than 0"),
        ({"augment.colour_jitter": {"uniform": [0, 2]}}, "space.augment.colour_jitter: augment.colour_jitter: got 2.0"),
        ({"unfreeze_depth": {"choice": [0, 9]}}, "space.unfreeze_depth: unfreeze_depth: got 9, input should be less than or equal to 5"),
        ({"unfreeze_depth": {"randint": [0, 6]}}, "space.unfreeze_depth: unfreeze_depth: got 6"),
        ({"unfreeze_depth": {"grid": []}}, "space: unfreeze_depth: grid: got []"),
        ({"unfreeze_depth": {"choise": [1]}}, "must be one of loguniform, uniform, randint, lograndint, choice, grid"),
        ({"unfreeze_depth": [0, 1]}, "must be one of loguniform, uniform, randint, lograndint, choice, grid"),
        ({"unfreeze_depth": {"choice": [1], "grid": [1]}}, "must be one of loguniform, uniform, randint, lograndint, choice, grid"),
        ({"epochs": {"choice": [True]}}, "space.epochs: epochs: got True, input should be a number"),
        ({"epochs": {"randint": [True, 5]}}, "space: epochs: randint: got [True, 5], input should be a number"),
        ({"augment.": {"grid": [{}]}}, "space.augment.: a key has an empty part"),
        ({}, "space: got {}"),
    ],
)
def test_a_space_that_no_trial_could_use_is_refused(space: dict[str, Any], message: str) -> None:
    assert message in refusal(space=space)


@pytest.mark.parametrize("kind", ["uniform", "loguniform"])
def test_a_whole_number_cannot_be_drawn_from_fractions(kind: str) -> None:
    message = refusal(space={"epochs": {kind: [1, 5]}})
    assert message.startswith("space.epochs: epochs: got ")
    assert "valid integer" in message


def test_the_grid_searcher_takes_grid_entries_only() -> None:
    assert "grid entries only" in refusal(space={"unfreeze_depth": {"choice": [0, 1]}}, searcher="grid")
    assert "grid entries only" in refusal(space={"unfreeze_depth": {"grid": [0, 1]}, **SPACE}, searcher="grid")
    assert parse_config(SweepConfig, {"space": {"unfreeze_depth": {"grid": [0, 1]}}, "searcher": "grid"}).searcher == "grid"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base": {"epoch": 3}}, "base: unknown key epoch; did you mean epochs?"),
        ({"base": {"augment": {"flipp": 1}}}, "base: unknown key augment.flipp; did you mean flip?"),
        ({"base": {"epochs": -1}}, "base: epochs: got -1"),
        ({"base": {"learning_rate": 1e-3}}, "base.learning_rate: also in space"),
        ({"base": {"workers": 2}}, "workers cannot be set per trial: use workers_per_trial"),
        ({"base": {"selection_metric": "val_loss"}}, "selection_metric cannot be set per trial: use metric"),
        ({"scheduler": {"kind": "asha", "grace_perod_epochs": 1}}, "unknown key scheduler.grace_perod_epochs; did you mean grace_period_epochs?"),
        ({"scheduler": {"kind": "none", "reduction_factor": 4}}, "unknown key scheduler.reduction_factor"),
        ({"scheduler": {"kind": "asha", "reduction_factor": 1}}, "scheduler.reduction_factor: got 1, input should be greater than or equal to 2"),
        ({"scheduler": {"kind": "hyperband"}}, "scheduler: got {'kind': 'hyperband'}"),
        ({"scheduler": "asha"}, "scheduler: got 'asha'"),
        ({"serchers": "grid"}, "unknown key serchers; did you mean searcher?"),
        ({"trials": 0}, "trials: got 0"),
        ({"base": {"cpus_per_worker": 0}}, "base: cpus_per_worker: got 0"),
        ({"metric": "test_roc_auc"}, "metric: got 'test_roc_auc'"),
    ],
)
def test_everything_around_the_space_is_as_strict(fields: dict[str, Any], message: str) -> None:
    assert refusal(space=SPACE, **fields).startswith(message)


def test_a_nested_field_may_not_be_in_base_and_space() -> None:
    space = {"augment.colour_jitter": {"grid": [0.1]}}
    assert refusal(space=space, base={"augment": {"colour_jitter": 0.2}}).startswith("base.augment.colour_jitter: also in space")
    assert parse_config(SweepConfig, {"space": space, "base": {"augment": {"hue_jitter": 0.2}}})


def test_a_mapping_and_a_part_of_it_may_not_both_be_in_the_space() -> None:
    message = refusal(space={"augment": {"grid": [{"hue_jitter": 0}]}, "augment.colour_jitter": {"grid": [0.1]}})
    assert message.startswith("space.augment.colour_jitter: a part of augment")


def test_schedulers_are_told_apart_by_their_kind() -> None:
    assert parse_config(SweepConfig, {"space": SPACE}).scheduler == NoScheduler()
    asha = parse_config(SweepConfig, {"space": SPACE, "scheduler": {"kind": "asha", "reduction_factor": 3}}).scheduler
    assert asha == AshaConfig(kind="asha", reduction_factor=3)


def test_best_yaml_of_a_trial_feeds_training_unchanged(tmp_path: Path) -> None:
    best = parse_config(SweepConfig, {"space": SPACE, "base": {"epochs": 2}}).train_config({"learning_rate": 0.00123})
    (tmp_path / "best.yaml").write_text(yaml.safe_dump(best.model_dump(mode="json")))
    assert load_config(TrainConfig, [tmp_path / "best.yaml"]) == best


SPACES = {
    "optimiser": {"choice": ["adamw", "sgd"]},
    "momentum": {"uniform": [0.8, 0.99], "when": {"optimiser": "sgd"}},
}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"space": {"momentum": {"uniform": [0.8, 0.99], "when": {"optimiser": "sgd"}}}}, "space.momentum: when: optimiser is not in space"),
        (
            {"space": {**SPACES, "momentum": {"uniform": [0.8, 0.9], "when": {"optimizer": "sgd"}}}},
            "space.momentum: when: optimizer is not in space; did you mean optimiser?",
        ),
        (
            {"space": {**SPACES, "momentum": {"uniform": [0.8, 0.9], "when": {"optimiser": "adam"}}}},
            "space.momentum: when: optimiser is never 'adam'",
        ),
        ({"space": {**SPACES, "momentum": {"uniform": [0.8, 0.9], "when": {"optimiser": []}}}}, "space.momentum: when: optimiser has no values"),
        ({"space": {**SPACES, "momentum": {"uniform": [0.8, 1.5], "when": {"optimiser": "sgd"}}}}, "space.momentum: momentum: got 1.5"),
        ({"space": {**SPACES, "dropout": {"uniform": [0, 0.5], "when": {"momentum": 0.9}}}}, "must be a choice, a grid or whole numbers"),
        ({"space": {"momentum": []}}, "space.momentum: an empty list"),
        ({"space": {"momentum": [{"uniform": [0.8, 0.9]}, {"uniform": [0.5, 0.6]}]}}, "space.momentum: entry 1 of 2 has no `when`"),
        (
            {"space": {"tta": {"choice": [1, 4], "when": {"epochs": 3}}, "epochs": {"choice": [3], "when": {"tta": 4}}}},
            "space: the conditions of epochs, tta go round in a circle",
        ),
        ({"space": {"batch_size": {"lograndint": [0, 8]}}}, "space: batch_size: lograndint.0: got 0"),
        ({"space": {"batch_size": {"lograndint": [8, 4]}}}, "space.batch_size: range [8, 4] must run from low to high"),
        (
            {"space": {"learning_rate": {"lograndint": [1, 4]}}, "constraints": ["learning_rat < 3"]},
            "unknown key learning_rat; did you mean learning_rate?",
        ),
        ({"space": SPACE, "constraints": ["__import__('os')"]}, "constraints: \"__import__('os')\": "),
        ({"space": SPACE, "constraints": ["learning_rate <"]}, "constraints: 'learning_rate <' is not an expression"),
        ({"space": SPACE, "constraints": ["learning_rate * 2"]}, "neither true nor false"),
        ({"space": SPACE, "constraints": ["learning_rate / 0 > 1"]}, "has no value"),
        ({"space": SPACE, "constraints": ["learning_rate > 1"]}, "constraints: none of 2000 points meets 'learning_rate > 1'"),
        (
            {"space": {"epochs": {"grid": [1, 2]}}, "searcher": "grid", "constraints": ["epochs > 5"]},
            "constraints: no combination of the grid meets 'epochs > 5'",
        ),
        (
            {"space": {"learning_rate": {"uniform": [1e-3, 1e-2]}, "lr_floor": {"choice": [0, 5e-3]}}},
            "lr_floor 0.005 is above learning_rate",
        ),
        ({"space": SPACE, "scheduler": {"kind": "median", "min_trials": 0}}, "scheduler.min_trials: got 0"),
        (
            {"space": SPACE, "scheduler": {"kind": "asha", "grace_period_folds": 2}},
            "scheduler.grace_period_folds: without folds set grace_period_epochs",
        ),
        (
            {"space": SPACE, "folds": "all", "scheduler": {"kind": "median", "grace_period_epochs": 2}},
            "scheduler.grace_period_epochs: with folds set grace_period_folds",
        ),
        ({"space": SPACE, "folds": [1]}, "folds: got [1], expected at least two different ones, or all"),
        ({"space": SPACE, "folds": [1, 1]}, "folds: got [1, 1], expected at least two different ones, or all"),
        ({"space": SPACE, "folds": "some"}, "folds: "),
        ({"space": SPACE, "folds": "all", "base": {"fold": 0}}, "base.fold: set folds or fold, not both"),
        ({"space": {"fold": {"choice": [0, 1]}}, "folds": "all"}, "space.fold: set folds or fold, not both"),
        ({"space": SPACE, "gpus_per_worker": 0.5, "workers_per_trial": 2}, "gpus_per_worker: got 0.5, but NCCL takes no device twice"),
        (
            {"space": SPACE, "cost": "train_seconds", "scheduler": {"kind": "asha"}},
            "cost train_seconds: trials that a scheduler stops would count as",
        ),
        ({"space": SPACE, "gpus_per_worker": 2}, "gpus_per_worker: got 2, input should be less than or equal to 1"),
        ({"space": {"seed": {"choice": [1, 2]}}, "repeats": 1}, "repeats: further seeds mean nothing where seed is in space"),
        ({"space": SPACE, "searcher": "tpe"}, "searcher: got 'tpe'"),
        ({"space": SPACE, "cost": "dollars"}, "cost: got 'dollars'"),
        ({"space": {"trackers": {"choice": [[]]}}}, "space.trackers: the same for all trials; set it in base"),
        ({"space": {"use_gpu": {"choice": [True]}}}, "space.use_gpu: the same for all trials; set it in base"),
    ],
)
def test_what_conditions_constraints_folds_and_repeats_cannot_be(fields: dict[str, Any], message: str) -> None:
    assert message in refusal(**fields)


def test_a_sweep_is_stored_as_it_was_written_and_read_again() -> None:
    space = {
        "optimiser": {"choice": ["adamw", "sgd"]},
        "learning_rate": [{"loguniform": [1e-5, 1e-3], "when": {"optimiser": ["adamw"]}}, {"loguniform": [1e-3, 1e-1]}],
    }
    sweep = parse_config(SweepConfig, {"space": space, "constraints": ["epochs > 1"], "base": {"lr_floor": 0}})
    stored = sweep.model_dump(mode="json")
    assert stored["space"] == space
    assert parse_config(SweepConfig, stored) == sweep
    assert sweep.keys == ["optimiser", "learning_rate"]


def test_the_largest_and_smallest_value_of_a_field_are_known_before_any_trial() -> None:
    sweep = parse_config(SweepConfig, {"space": {"epochs": {"randint": [3, 20]}, "unfreeze_depth": {"choice": [2, 4]}}})
    assert (sweep.largest("epochs"), sweep.smallest("unfreeze_depth"), sweep.largest("batch_size")) == (20, 2, 32)
    conditional = {"optimiser": {"choice": ["adam", "sgd"]}, "epochs": {"choice": [5], "when": {"optimiser": "sgd"}}}
    assert parse_config(SweepConfig, {"space": conditional}).largest("epochs") == 15
