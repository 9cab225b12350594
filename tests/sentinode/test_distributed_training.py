"""Two processes train as one: every row counts once and with its own weight, however unevenly the rows fall."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import multiprocessing

from sentinode.learner import Learner
from tests.sentinode.training_helpers import (
    SCENARIOS,
    VAL_ROWS,
    WORLD_SIZE,
    config,
    patches,
    run_interrupted,
    run_rank,
    run_scenario,
    small_network,
    train,
)

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank of two gloo processes ended with, per scenario. Returns only if no rank was left waiting."""
    folder: Path = tmp_path_factory.mktemp("group")
    multiprocessing.spawn(run_rank, args=(folder,), nprocs=WORLD_SIZE)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD_SIZE)]


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], atol=2e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("name", [name for name in SCENARIOS if not SCENARIOS[name]["batch_norm"] or SCENARIOS[name]["depth"] == 0])
def test_two_ranks_end_with_the_weights_of_one(ranks: list[dict[str, Any]], name: str) -> None:
    alone = run_scenario(name, 0, 1)
    start = small_network(SCENARIOS[name]["depth"], batch_norm=SCENARIOS[name]["batch_norm"]).state_dict()
    for rank in ranks:
        assert_close(rank[name]["weights"], alone["weights"])
    assert (alone["weights"]["fc.weight"] - start["fc.weight"]).abs().max() > 1e-3, "nothing was learnt, so nothing was compared"
    for key in ("train_loss", "val_loss", "val_roc_auc"):
        assert ranks[0][name]["history"][-1][key] == pytest.approx(alone["history"][-1][key], rel=1e-5)
    assert ranks[0][name]["history"][0]["rows"] == alone["history"][0]["rows"] == SCENARIOS[name]["rows"]


@pytest.mark.parametrize("name", SCENARIOS)
def test_all_ranks_agree_on_weights_and_records(ranks: list[dict[str, Any]], name: str) -> None:
    first, second = (rank[name] for rank in ranks)
    for key, value in first["weights"].items():
        assert torch.equal(value, second["weights"][key]), key
    for ours, theirs in zip(first["history"], second["history"], strict=True):
        assert {key: value for key, value in ours.items() if "seconds" not in key} == {
            key: value for key, value in theirs.items() if "seconds" not in key
        }


@pytest.mark.parametrize("name", SCENARIOS)
def test_validation_over_ranks_is_that_of_one_process(ranks: list[dict[str, Any]], name: str) -> None:
    # What rank 0 would save, validated alone on all rows.
    scenario = SCENARIOS[name]
    module = small_network(scenario["depth"], batch_norm=scenario["batch_norm"])
    module.load_state_dict(ranks[0][name]["weights"])
    settings = config(epochs=0)
    alone = train(Learner(module, settings), patches(scenario["rows"]), patches(VAL_ROWS, 1), settings).history[0]
    recorded = ranks[0][name]["history"][-1]
    assert recorded["val_loss"] == pytest.approx(alone["val_loss"], rel=1e-5)
    assert recorded["val_roc_auc"] == alone["val_roc_auc"]


def test_gradients_are_exchanged_once_a_step(ranks: list[dict[str, Any]]) -> None:
    assert [rank["exchanges"] for rank in ranks] == [2, 2]


@pytest.mark.slow
def test_three_ranks_that_go_on_end_bitwise_as_without_an_interruption(tmp_path: Path) -> None:
    # Of two numbers the sum does not depend on the order; of three it does.
    multiprocessing.spawn(run_interrupted, args=(3, tmp_path), nprocs=3)
    for rank in range(3):
        whole, resumed = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in whole.items():
            assert torch.equal(value, resumed[name]), name
