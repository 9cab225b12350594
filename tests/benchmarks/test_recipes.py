"""The comparison of recipes: same rows for each, one line a run, continued where it stopped."""

import json
from pathlib import Path

import pytest

from benchmarks import recipes
from sentinode.errors import ConfigError
from tests.factories import make_dataset

_TINY = ["arch=resnet18", "input_size_px=32", "epochs=1"]


@pytest.mark.slow
def test_recipes_are_trained_on_the_same_rows_and_runs_that_are_done_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_dataset(tmp_path / "data", train=48, val=24, test=6)
    results = tmp_path / "results.jsonl"
    common = ["--data", str(tmp_path / "data"), "--folds", "1", "--seeds", "3", "--results", str(results), "--set", *_TINY]
    assert recipes.main([*common, "--recipes", "loop"]) == 0
    assert recipes.main([*common, "--recipes", "loop", "small_data+tta=1"]) == 0
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["recipe"] for line in lines] == ["loop", "small_data+tta=1"]
    assert lines[0]["rows"] == lines[1]["rows"] > 0
    assert all(0 <= line["roc_auc"] <= 1 for line in lines)
    table = capsys.readouterr().out.splitlines()[-2:]
    assert f"{lines[1]['roc_auc'] - lines[0]['roc_auc']:+.4f}" in table[1]
    assert "+0.0000" in table[0]


def test_a_recipe_is_a_preset_with_changes() -> None:
    config = recipes.config_of("small_data+augment.rotation_deg=0+tta=4", ["epochs=3"], seed=7)
    assert (config.augment.rotation_deg, config.tta, config.epochs, config.seed) == (0, 4, 3, 7)
    assert config.ema_decay is not None
    assert recipes.config_of("loop", []).epochs == 10
    with pytest.raises(ConfigError, match="no_such"):
        recipes.config_of("small_data+no_such=1", [])
