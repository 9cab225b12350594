"""Optimisers per stage, and schedules beside torch's own."""

from typing import Any

import pytest
import torch
from torch import nn

from sentinode.optimisation import Schedule, cosine, make_optimiser, one_cycle
from tests.sentinode.training_helpers import config, network


@pytest.mark.parametrize(("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_the_configured_optimiser(name: str, kind: type[torch.optim.Optimizer]) -> None:
    optimiser = make_optimiser(network(2), config(optimiser=name, unfreeze_depth=2, weight_decay=0.01, momentum=0.8), 1)
    assert type(optimiser) is kind
    assert {group["weight_decay"] for group in optimiser.param_groups} == {0.01}
    if name == "sgd":
        assert {(group["momentum"], group["nesterov"]) for group in optimiser.param_groups} == {(0.8, True)}


def test_each_stage_further_from_the_head_learns_more_slowly() -> None:
    model = network(1)
    optimiser = make_optimiser(model, config(epochs=3, learning_rate=0.1, stage_lr_factor=0.5, unfreeze_schedule={2: 3}), 1)
    assert [group["lr"] for group in optimiser.param_groups] == pytest.approx([0.1, 0.05, 0.025, 0.0125])
    names = ["fc", "layer4", "layer3", "layer2"]
    for name, group in zip(names, optimiser.param_groups, strict=True):
        expected = list(model.get_submodule(name).parameters())
        assert len(expected) == len(group["params"])
        assert all(one is other for one, other in zip(expected, group["params"], strict=True)), name


def test_linear_scaling_counts_workers_and_accumulated_batches() -> None:
    scaled = config(learning_rate=0.01, scale_learning_rate=True, accumulate_steps=3)
    assert make_optimiser(network(1), scaled, 4).param_groups[0]["lr"] == pytest.approx(0.12)
    assert make_optimiser(network(1), config(learning_rate=0.01, accumulate_steps=3), 4).param_groups[0]["lr"] == 0.01


def rates(settings: Any, steps: int) -> list[tuple[float, float]]:
    """(rate, momentum) of each step of a run."""
    optimiser = make_optimiser(network(0), settings, 1)
    schedule = Schedule(optimiser, settings)
    seen = []
    for step in range(settings.epochs * steps):
        schedule.before_step((step + 1) / steps)
        group = optimiser.param_groups[0]
        seen.append((group["lr"], group["betas"][0] if "betas" in group else group["momentum"]))
    return seen


def optimiser_of_torch(name: str, rate: float) -> torch.optim.Optimizer:
    parameters = nn.Linear(1, 1).parameters()
    return torch.optim.SGD(parameters, rate, momentum=0.9) if name == "sgd" else torch.optim.AdamW(parameters, rate)


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
@pytest.mark.parametrize("rise", [None, 0.1])
def test_one_cycle_is_that_of_torch(optimiser: str, rise: float | None) -> None:
    epochs, steps = 4, 7
    reference = optimiser_of_torch(optimiser, 0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(reference, 0.01, total_steps=epochs * steps + 1, pct_start=0.3 if rise is None else rise)
    # torch's phases end at whole steps: pct_start * total_steps - 1.
    settings = config(
        optimiser=optimiser,
        schedule="one_cycle",
        learning_rate=0.01,
        epochs=epochs,
        warmup_fraction=((0.3 if rise is None else rise) * (epochs * steps + 1) - 1) / (epochs * steps),
    )
    for rate, momentum in rates(settings, steps):
        reference.step()
        schedule.step()
        group = reference.param_groups[0]
        assert rate == pytest.approx(group["lr"], rel=1e-6)
        assert momentum == pytest.approx(group["betas"][0] if "betas" in group else group["momentum"], rel=1e-6)


def test_cosine_after_its_warm_up_is_that_of_torch() -> None:
    epochs, steps = 5, 4
    reference = optimiser_of_torch("sgd", 0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(reference, T_max=epochs * steps, eta_min=1e-5)
    for rate, _ in rates(config(schedule="cosine", learning_rate=0.01, lr_floor=1e-5, epochs=epochs, warmup_fraction=0.0), steps):
        reference.step()
        schedule.step()
        assert rate == pytest.approx(reference.param_groups[0]["lr"], rel=1e-6)


def test_warm_up_rises_linearly_to_the_highest_rate() -> None:
    assert [cosine(done, 1.0, 0.0, 0.2) for done in (0.05, 0.1, 0.2)] == pytest.approx([0.25, 0.5, 1.0])
    assert cosine(1.0, 1.0, 0.125, 0.2) == pytest.approx(0.125)
    assert cosine(0.6, 1.0, 2.0, 0.2) == 1.0, "a floor above the rate leaves the rate"
    assert one_cycle(0.0, 0.3) == pytest.approx((1 / 25, 0.95))
    assert one_cycle(0.3, 0.3) == pytest.approx((1.0, 0.85))


def test_a_constant_rate_stays() -> None:
    assert set(rates(config(schedule="constant", epochs=2), 3)) == {(1e-3, 0.9)}
