"""Small learners, and the function that two processes run together."""

import copy
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torchvision.models.resnet import BasicBlock, ResNet

from sentinode.config import AugmentConfig, TrainConfig
from sentinode.dataset import Patches
from sentinode.encoders import set_unfreeze_depth
from sentinode.ingest import ResidentRows
from sentinode.learner import Learner
from sentinode.model import build_model
from sentinode.optimisation import Schedule
from sentinode.training import Group, Hooks, Progress, train_epochs
from tests.factories import learnable_patches

PLAIN = AugmentConfig(dihedral=False, colour_jitter=0, hue_jitter=0)
WORLD_SIZE = 2


def config(**changes: Any) -> TrainConfig:
    fields = {"arch": "resnet18", "weights": "none", "input_size_px": 32, "batch_size": 8, "epochs": 1, "unfreeze_depth": 1, "learning_rate": 1e-3}
    return TrainConfig(**fields | changes)


def patches(count: int, seed: int = 0) -> Patches:
    return learnable_patches(count, seed, side_px=32)


def network(depth: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = build_model("resnet18")
    set_unfreeze_depth(model, depth)
    return model


def small_network(depth: int, *, batch_norm: bool) -> nn.Module:
    """A ResNet of 10 layers; with GroupNorm no row's output depends on the rows beside it."""
    torch.manual_seed(0)
    normalisation: Callable[..., nn.Module] = nn.BatchNorm2d if batch_norm else (lambda channels: nn.GroupNorm(8, channels))
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=2, norm_layer=normalisation)
    set_unfreeze_depth(model, depth)
    return model


def train(
    learner: Learner,
    rows: Patches,
    val: Patches,
    config: TrainConfig,
    progress: Progress | None = None,
    hooks: Hooks = Hooks(),  # noqa: B008 -- frozen
    group: Group = Group(),  # noqa: B008 -- frozen
) -> Progress:
    """Train on rows in memory and return the progress."""
    progress = progress or Progress()
    train_epochs(learner, ResidentRows(rows, group.device), val, config, progress, hooks, group)
    return progress


def that_never_learns(learner: Learner) -> Learner:
    """The same learner, its optimiser and schedule looking after a parameter that is not in the network."""
    idle = torch.optim.SGD([{"params": nn.Linear(1, 1).parameters(), "initial_lr": learner.config.learning_rate}], lr=learner.config.learning_rate)
    learner.optimiser = idle
    learner.schedule = Schedule(idle, learner.config)
    return learner


# Its steps are proportional to the gradient; Adam's first ones show its sign only.
GRADIENT_DESCENT = {"optimiser": "sgd", "momentum": 0.0, "learning_rate": 0.01}

SCENARIOS: dict[str, dict[str, Any]] = {
    "divides": {"rows": 32, "depth": 5, "batch_norm": False},
    "uneven last step": {"rows": 37, "depth": 5, "batch_norm": False},
    "a rank without rows": {"rows": 33, "depth": 5, "batch_norm": False},
    "frozen statistics": {"rows": 37, "depth": 0, "batch_norm": True},
    "statistics that train": {"rows": 33, "depth": 1, "batch_norm": True},
    "accumulated batches": {"rows": 37, "depth": 5, "batch_norm": False, "config": {"accumulate_steps": 2, "clip_norm": 0.5, "learning_rate": 0.05}},
    "thawing by and by": {"rows": 32, "depth": 0, "batch_norm": False, "config": {"epochs": 3, "unfreeze_schedule": {1: 1, 2: 5}}},
    "averaged weights": {"rows": 37, "depth": 1, "batch_norm": True, "config": {"epochs": 2, "ema_decay": 0.9}},
}
VAL_ROWS = 21


def run_scenario(name: str, rank: int, world_size: int) -> dict[str, Any]:
    """Train on steps of 16 rows, however many ranks and batches they are dealt to."""
    scenario = SCENARIOS[name]
    changes = dict(scenario.get("config", {}))
    batches_a_step = world_size * changes.get("accumulate_steps", 1)
    settings = config(batch_size=16 // batches_a_step, eval_batch_size=5, unfreeze_depth=scenario["depth"], **GRADIENT_DESCENT | changes)
    module = small_network(scenario["depth"], batch_norm=scenario["batch_norm"])
    learner = Learner(module, settings, world_size=world_size)
    progress = train(learner, patches(scenario["rows"]), patches(VAL_ROWS, 1), settings, group=Group(rank, world_size))
    return {"weights": learner.kept.state_dict(), "history": progress.history}


def exchanges(rank: int, world_size: int) -> int:
    """Return how often gradients are exchanged in two steps of three batches each."""
    settings = config(batch_size=2, unfreeze_depth=0, accumulate_steps=3)
    learner = Learner(small_network(0, batch_norm=False), settings, world_size=world_size)
    counted: list[int] = []

    def count(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        counted.append(1)
        return default_hooks.allreduce_hook(dist.group.WORLD, bucket)

    learner._tail.register_comm_hook(None, count)
    train(learner, patches(2 * 3 * 2 * world_size), patches(6, 1), settings, group=Group(rank, world_size))
    return len(counted)


def run_interrupted(rank: int, world_size: int, folder: Path) -> None:
    """One of the processes of a group that trains two epochs, and the second of them once more from a checkpoint after the first."""
    torch.set_num_threads(1)
    rendezvous = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
    settings = config(batch_size=4, unfreeze_depth=5, epochs=2)
    rows, val, group = patches(48), patches(6, 1), Group(rank, world_size)
    whole = Learner(small_network(5, batch_norm=True), settings, world_size=world_size)
    states: list[Any] = []

    def keep(now: Progress) -> None:
        states.append(copy.deepcopy((whole.kept.state_dict(), whole.state(), now)))

    train(whole, rows, val, settings, hooks=Hooks(on_epoch=keep), group=group)
    resumed = Learner(small_network(5, batch_norm=True), settings, world_size=world_size)
    weights, state, progress = states[0]
    resumed.restore(weights, state)
    train(resumed, rows, val, settings, progress, group=group)
    torch.save([whole.kept.state_dict(), resumed.kept.state_dict()], folder / f"{rank}.pt")
    dist.destroy_process_group()


def run_rank(rank: int, folder: Path) -> None:
    """One of the processes of a group: run all scenarios and save their results as <folder>/<rank>.pt."""
    torch.set_num_threads(1)
    rendezvous = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=WORLD_SIZE, timeout=timedelta(seconds=60))
    results = {name: run_scenario(name, rank, WORLD_SIZE) for name in SCENARIOS}
    torch.save(results | {"exchanges": exchanges(rank, WORLD_SIZE)}, folder / f"{rank}.pt")
    dist.destroy_process_group()
