"""What the report of a sweep says is what the trials were."""

import re
from typing import Any

import pytest

from ray_jobs.sweep.charts import ticks_of, timeline, usual_range
from ray_jobs.sweep.importance import importances, place_of
from ray_jobs.sweep.report import render
from ray_jobs.sweep.table import describe_point, trials_table
from ray_jobs.sweep.winner import standings
from sentinode.config import SweepConfig, load_config
from tests.ray_jobs.sweep.sweeps import facts, large_sweep, sweep_config, trial


def text_of(page: str) -> str:
    """What a reader reads, without style and markup."""
    return " ".join(re.sub(r"<[^>]+>", " ", re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)).split())


def point(rate: float, depth: int) -> dict[str, Any]:
    return {"learning_rate": rate, "unfreeze_depth": depth}


THREE = [
    trial(0, [0.7, 0.8, 0.75, 0.78], point(1e-3, 5)),
    trial(1, [0.6], point(1e-2, 2), status="stopped"),
    trial(2, [], point(1e-5, 0), status="failed", error="weights <b>x</b>: no such file"),
]


def test_the_leaderboard_ranks_and_says_how_trials_ended() -> None:
    page = render(THREE, facts(sweep_config(), 0))
    text = text_of(page)
    assert "0.8000 2 4 of 4 finished 50 10 s" in text
    assert "0.6000 1 1 of 4 stopped" in text
    assert "1 finished, 1 stopped early, 1 failed" in text
    assert text.index("00000") < text.index("00001")
    # Errors are somebody's words.
    assert "weights &lt;b&gt;x&lt;/b&gt;: no such file" in page
    assert "judge it on the test split" in text


def test_what_stopping_saved_is_what_trials_did_not_train_on() -> None:
    text = text_of(render(THREE, facts(sweep_config(), 0)))
    # 400 and 100 patches were trained on; the stopped trial would have taken 300 more.
    assert "patches trained on 500 62 % of what trials at full length take" in text
    assert "1 1 0.6000 300 all 1 300 38 % of what the search would have taken" in text


def test_repeats_decide_and_a_lead_within_the_spread_of_seeds_is_said_to_show_nothing() -> None:
    config = sweep_config(repeats=1, repeat_top=2)
    trials = [*THREE[:1], trial(1, [0.79], point(1e-2, 2))]
    trials += [
        trial(2, [0.70], point(1e-3, 5), kind="repeat", repeats=0, seed=43),
        trial(3, [0.77], point(1e-2, 2), kind="repeat", repeats=1, seed=43),
    ]
    best = standings(trials, config)[0]
    assert (best.trial.number, best.values) == (1, [0.79, 0.77])
    text = text_of(render(trials, facts(config, 1)))
    assert "best validation ROC-AUC 0.7800 learning_rate 0.01, unfreeze_depth 2; mean of 2 seeds" in text
    assert "leads the second by 0.0300, which is within what seeds alone make" in text
    clear = [*trials[:2], trial(2, [0.50], point(1e-3, 5), kind="repeat", repeats=0, seed=43), trials[3]]
    clear[0] = trial(0, [0.51], point(1e-3, 5))
    assert "more than twice the standard error" in text_of(render(clear, facts(config, 1)))


def test_with_folds_the_mean_ranks_and_folds_are_counted() -> None:
    config = sweep_config(folds=[0, 1], base={"epochs": 2, "weights": "none"})
    trials = [
        trial(0, [0.7, 0.8, 0.6, 0.5], folds={0: 0, 1: 0, 2: 1, 3: 1}),
        trial(1, [0.9, 0.9], point(1e-2, 2), folds={0: 0, 1: 0}, status="stopped"),
    ]
    text = text_of(render(trials, facts(config, 0, epochs=2, folds=[0, 1])))
    assert "the mean over 2 folds" in text
    assert "0.7000 4 of 4 2 of 2 0.8000 0.6000 finished" in text
    # One fold's 0.9 is no mean over two.
    assert "Trials with more folds come first" in text
    assert text.count("Figures here are those of fold 0") >= 2
    assert "after fold trials stopped their validation ROC-AUC patches not trained on 1 1 0.9000 200" in text


def test_the_front_holds_what_no_other_trial_beats_in_both() -> None:
    config = sweep_config(cost="gflops")
    trials = [trial(0, [0.7]), trial(1, [0.8], point(1e-2, 2)), trial(2, [0.75], point(1e-4, 2)), trial(3, [0.9], point(1e-4, 1))]
    text = text_of(render(trials, facts(config, 3)))
    table = text[text.index("Trials on the line") : text.index(" Time finished")]
    assert [name for name in ("00000", "00001", "00002", "00003") if name in table] == ["00000", "00001", "00003"]


def test_the_heat_map_shows_the_best_of_each_cell_and_what_was_not_tried() -> None:
    config = SweepConfig(space={"learning_rate": {"grid": [1e-3, 1e-2]}, "unfreeze_depth": {"grid": [0, 5]}}, base={"weights": "none"})
    trials = [trial(0, [0.7], point(1e-3, 5)), trial(1, [0.8], point(1e-3, 5)), trial(2, [0.6], point(1e-2, 0))]
    page = render(trials, facts(config, 1))
    assert "best validation ROC-AUC by learning_rate and unfreeze_depth: 0.001, 5: 0.8000; 0.01, 0: 0.6000" in page
    assert page.count('class="untried"') == 2
    assert "2 trials" in page


@pytest.mark.parametrize(("count", "metric"), [(0, "val_roc_auc"), (1, "val_loss"), (3, "val_roc_auc"), (5, "val_loss"), (60, "val_roc_auc")])
def test_any_number_of_trials_makes_a_page(count: int, metric: str) -> None:
    config = sweep_config(metric=metric, trials=100)
    trials = large_sweep(config, count)
    page = render(trials, facts(config, None, epochs=8))
    assert count > 5 or page == render(trials, facts(config, None, epochs=8))
    assert "http" not in page.replace("http-equiv", "")
    assert "<script" not in page


def test_conditions_branches_and_odd_values_make_a_page() -> None:
    config = load_config(SweepConfig, ["tune_configs/optuna_full.yaml"])
    trials = large_sweep(config, 12)
    text = text_of(render(trials, facts(config, 0, epochs=15)))
    assert "0.8 to 0.99, where optimiser is sgd" in text
    assert "batch_size * input_size_px ** 2 &lt;= 3.3e6" in text or "batch_size * input_size_px ** 2 <= 3.3e6" in text
    odd = SweepConfig(space={"early_stopping_patience_epochs": {"choice": [None, 3]}, "augment.dihedral": {"choice": [True, False]}})
    points = [{"early_stopping_patience_epochs": None, "augment.dihedral": True}, {"early_stopping_patience_epochs": 3, "augment.dihedral": False}]
    assert "augment.dihedral" in render([trial(number, [0.7], one) for number, one in enumerate(points)], facts(odd, 0))


def test_the_parameter_that_decides_is_the_important_one() -> None:
    config = sweep_config(trials=40)
    trials = [one for one in large_sweep(config, 40) if one.status == "finished"]
    for one in trials:
        for record in one.epochs:
            record["val_roc_auc"] = 0.5 + 0.08 * one.point["unfreeze_depth"]
    found = importances(trials, config)
    assert found[0].key == "unfreeze_depth"
    assert found[0].low > 0.8
    assert sum(one.share for one in found) == pytest.approx(1)
    assert importances(trials[:3], config) == []


def test_the_table_has_a_row_per_epoch_and_one_for_a_trial_without() -> None:
    table = trials_table(THREE, sweep_config())
    assert list(table["trial"]) == ["00000"] * 4 + ["00001", "00002"]
    assert list(table["best"].dropna()) == [False, True, False, False, True]
    assert list(table["epoch"].dropna()) == [1, 2, 3, 4, 1]
    assert list(table["image_steps"].dropna()) == [100, 200, 300, 400, 100]
    assert table["images_per_s"].dropna().unique().tolist() == [50.0]
    assert table["checkpoint"].dropna().unique().tolist() == ["trials/00000", "trials/00001"]
    assert table["config.unfreeze_depth"].tolist() == [5, 5, 5, 5, 2, 0]
    assert table["error"].dropna().tolist() == ["weights <b>x</b>: no such file"]
    assert table["begun_at"][0] == "1970-01-01T00:16:40.000+00:00"


def test_ticks_are_round_and_within() -> None:
    assert ticks_of(0.713, 0.94) == [0.75, 0.8, 0.85, 0.9]
    assert ticks_of(5, 5) == [5]
    for low, high in ((0, 1), (0.8999, 0.9001), (1, 1000), (-3, 7)):
        found = ticks_of(low, high)
        assert 2 <= len(found) <= 7
        assert all(low <= tick <= high for tick in found)


def test_points_are_told_briefly() -> None:
    assert describe_point({"unfreeze_depth": 2, "learning_rate": 0.00032123}) == "learning_rate 0.000321, unfreeze_depth 2"


def test_values_without_a_place_on_a_range_stand_beside_those_that_have_one() -> None:
    space = {
        "optimiser": {"choice": ["sgd", "adamw"]},
        "class_weight": [{"choice": ["auto"], "when": {"optimiser": "sgd"}}, {"uniform": [0.5, 4]}],
        "early_stopping_patience_epochs": [{"choice": [None], "when": {"optimiser": "sgd"}}, {"randint": [1, 30]}],
    }
    config = sweep_config(space=space)
    text = text_of(render(large_sweep(config, 12), facts(config, 0, epochs=8)))
    assert "auto" in text[text.index("All parameters") :]


def test_many_listed_values_take_no_longer_than_few() -> None:
    # As categories, of which Optuna makes a column each, 16 values took five minutes.
    config = sweep_config(space={"learning_rate": {"grid": [10 ** (-5 + step / 8) for step in range(24)]}, "unfreeze_depth": {"grid": [0, 5]}})
    found = importances([one for one in large_sweep(config, 40) if one.status == "finished"], config)
    assert [one.key for one in found] == ["learning_rate", "unfreeze_depth"]
    page = text_of(render(large_sweep(config, 40), facts(config, 0, epochs=8)))
    # Their ratio is large, so the cells are equal parts of the logarithm.
    assert "1.7e-05" in page


def test_what_failed_is_not_the_best_whatever_it_had_come_to() -> None:
    trials = [trial(0, [0.7], point(1e-3, 5)), trial(1, [0.95], point(1e-3, 5), status="failed", error="the process was killed")]
    page = render(trials, facts(sweep_config(), None))
    text = text_of(page)
    assert "best validation ROC-AUC 0.7000" in text
    assert text.index("00000 0.7000") < text.index("00001 0.9500")
    # Nor in the heat map; and the best is marked before there is a bundle.
    assert ", 5: 0.7000" in page
    assert page.count('<tr class="best">') == 1
    only = [trial(0, [0.7], status="failed", error="the process was killed")]
    assert "best validation ROC-AUC - " in text_of(render(only, facts(sweep_config(cost="gflops"), None)))


def test_a_loss_that_ran_away_leaves_the_others_apart() -> None:
    assert usual_range([0.2, 0.21, 0.22, 0.23, 0.24, 0.25, 1e6]) == (0.2, 0.25)
    assert usual_range([0.5, 0.9]) == (0.5, 0.9)
    assert usual_range([0.5]) == (0.5, 0.5)
    config = sweep_config(metric="val_loss")
    trials = large_sweep(config, 12)
    trials[3].epochs[-1]["val_loss"] = 1e6
    for record in trials[3].epochs[:-1]:
        record["val_loss"] = 1e6
    page = render(trials, facts(config, 0, epochs=8))
    assert "8 figures beyond the axis, drawn at its edge" in page
    assert "\u2265 0.2018" in page


def test_the_timeline_of_many_trials_is_as_high_as_trials_ran_together() -> None:
    bars = [(f"{number:05d}", 10.0 * number, 10.0 * number + 15.0, "finished") for number in range(100)]
    assert set(re.findall(r'<rect [^>]*y="([0-9.]+)"', timeline(bars, 1005.0, ""))) == {"4.0", "16.0"}


def test_one_and_true_are_two_values() -> None:
    assert [place_of(value, [1, True, None]) for value in (1, True, None)] == [0, 1, 2]
