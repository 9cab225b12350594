"""Small learners, and the function that two processes run together."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from sentinode.config import AugmentConfig, TrainConfig
from sentinode.dataset import Patches
from sentinode.model import build_model, set_unfreeze_depth
from sentinode.training import Learner, Progress, train_epochs
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


def train(learner: Learner, rows: Patches, val: Patches, config: TrainConfig, progress: Progress | None = None, **where: Any) -> Progress:
    """Train and return the progress; `where` = rank and world_size."""
    progress = progress or Progress()
    train_epochs(learner, rows, val, config, progress, lambda now: None, **where)
    return progress


def with_gradient_descent(learner: Learner) -> Learner:
    """Plain gradient descent, whose steps are proportional to the gradient; Adam's first ones show its sign only."""
    parameters = [parameter for parameter in learner.module.parameters() if parameter.requires_grad]
    learner.optimiser = torch.optim.SGD(parameters, lr=0.01)
    learner.schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(learner.optimiser)
    return learner


SCENARIOS: dict[str, dict[str, Any]] = {
    "divides": {"rows": 32, "depth": 5, "batch_norm": False},
    "uneven last step": {"rows": 37, "depth": 5, "batch_norm": False},
    "a rank without rows": {"rows": 33, "depth": 5, "batch_norm": False},
    "frozen statistics": {"rows": 37, "depth": 0, "batch_norm": True},
    "statistics that train": {"rows": 33, "depth": 1, "batch_norm": True},
}
VAL_ROWS = 21


def run_scenario(name: str, rank: int, world_size: int) -> dict[str, Any]:
    """Train one epoch on steps of 16 rows, however many ranks they are dealt to."""
    scenario = SCENARIOS[name]
    module = small_network(scenario["depth"], batch_norm=scenario["batch_norm"])
    settings = config(batch_size=16 // world_size, eval_batch_size=5)
    distributed = nn.parallel.DistributedDataParallel(module) if world_size > 1 else module
    learner = with_gradient_descent(Learner.make(distributed, settings))
    progress = train(learner, patches(scenario["rows"]), patches(VAL_ROWS, 1), settings, rank=rank, world_size=world_size)
    return {"weights": module.state_dict(), "history": progress.history}


def run_rank(rank: int, folder: Path) -> None:
    """One of the processes of a group: run all scenarios and save their results as <folder>/<rank>.pt."""
    torch.set_num_threads(1)
    rendezvous = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=WORLD_SIZE, timeout=timedelta(seconds=60))
    torch.save({name: run_scenario(name, rank, WORLD_SIZE) for name in SCENARIOS}, folder / f"{rank}.pt")
    dist.destroy_process_group()
