"""Optimiser and learning-rate schedule."""

import math
from typing import Any

import torch
from torch import nn

from sentinode.config import TrainConfig
from sentinode.encoders import stages_of

_WARMUP = {"cosine": 0.05, "one_cycle": 0.3}
# As torch.optim.lr_scheduler.OneCycleLR: the rate starts at the highest / 25 and ends at that / 10,000; momentum runs against it.
_ONE_CYCLE_START = 1 / 25
_ONE_CYCLE_END = _ONE_CYCLE_START / 1e4
_ONE_CYCLE_MOMENTUM = (0.95, 0.85)


def make_optimiser(model: nn.Module, config: TrainConfig, world_size: int) -> torch.optim.Optimizer:
    """Return the configured optimiser with one parameter group per stage that ever trains, the head's first.

    The rate of the group at index i from the head is `learning_rate * stage_lr_factor ** i`, with `scale_learning_rate` times the number of workers
    and of accumulated batches.
    """
    rate = config.learning_rate * (world_size * config.accumulate_steps if config.scale_learning_rate else 1)
    groups: list[dict[str, Any]] = []
    for index, stage in enumerate(reversed(stages_of(model))):
        if index <= config.max_depth:
            groups.append({"params": list(stage.parameters()), "lr": rate * config.stage_lr_factor**index})
    for group in groups:
        group["initial_lr"] = group["lr"]
    # Fused: one pass over weights, gradients and moments; on CPU several times faster than torch's default, a loop over tensors.
    if config.optimiser == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=config.momentum, nesterov=config.momentum > 0, weight_decay=config.weight_decay, fused=True)
    kind = torch.optim.AdamW if config.optimiser == "adamw" else torch.optim.Adam
    return kind(groups, lr=rate, weight_decay=config.weight_decay, fused=True)


class Schedule:
    """Sets the rates of an optimiser: of `plateau` after each epoch, else before each step.

    `cosine`, `one_cycle` and `constant` are functions of the part of the run that is done, so they have no state and do not mind if the number of
    workers, and with it of steps, changes.
    """

    def __init__(self, optimiser: torch.optim.Optimizer, config: TrainConfig) -> None:
        self._optimiser, self._config = optimiser, config
        self._plateau = (
            torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser, factor=config.lr_factor, patience=config.lr_patience_epochs, min_lr=config.lr_floor)
            if config.schedule == "plateau"
            else None
        )

    def before_step(self, epochs_done: float) -> None:
        """Set the rates for a step after which `epochs_done` epochs, and parts of one, are done."""
        config = self._config
        if config.schedule in ("plateau", "constant"):
            return
        done = epochs_done / config.epochs
        for group in self._optimiser.param_groups:
            if config.schedule == "cosine":
                group["lr"] = cosine(done, group["initial_lr"], config.lr_floor, self._warmup())
            else:
                rate, momentum = one_cycle(done, self._warmup())
                group["lr"] = group["initial_lr"] * rate
                if "betas" in group:
                    group["betas"] = (momentum, group["betas"][1])
                elif group["momentum"] > 0:
                    group["momentum"] = momentum

    def after_epoch(self, val_loss: float) -> None:
        """Let `plateau` look at the validation loss."""
        if self._plateau is not None:
            self._plateau.step(val_loss)

    def state(self) -> dict[str, Any]:
        """Return the state, plain values; empty for schedules without one."""
        return {} if self._plateau is None else self._plateau.state_dict()

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        if self._plateau is not None:
            self._plateau.load_state_dict(state)

    def scale(self, factor: float) -> None:
        """Multiply all rates, from now on."""
        for group in self._optimiser.param_groups:
            group["lr"] *= factor
            group["initial_lr"] *= factor

    def _warmup(self) -> float:
        fraction = self._config.warmup_fraction
        return _WARMUP[self._config.schedule] if fraction is None else fraction


def cosine(done: float, highest: float, lowest: float, warmup: float) -> float:
    """Return the rate when `done` (0..1) of a run is done: linear from 0 up to `highest` within `warmup`, then half a cosine down to `lowest`.

    Loshchilov & Hutter 2017 (SGDR, equation 5, one period).
    """
    if done < warmup:
        return highest * done / warmup
    part = (done - warmup) / (1 - warmup)
    return lowest + (highest - lowest) * (1 + math.cos(math.pi * part)) / 2 if highest > lowest else highest


def one_cycle(done: float, rise: float) -> tuple[float, float]:
    """Return (rate as a part of the highest, momentum) when `done` (0..1) of a run is done (Smith & Topin 2018, as torch's OneCycleLR)."""
    high, low = _ONE_CYCLE_MOMENTUM
    if done < rise:
        part = (1 - math.cos(math.pi * done / rise)) / 2
        return _ONE_CYCLE_START + (1 - _ONE_CYCLE_START) * part, high + (low - high) * part
    part = (1 - math.cos(math.pi * (done - rise) / (1 - rise))) / 2
    return 1 + (_ONE_CYCLE_END - 1) * part, low + (high - low) * part
