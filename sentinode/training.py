"""The training loop: a plain function over torch objects, with or without torch.distributed, and without Ray."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from sentinode.augment import augment, draw
from sentinode.config import TrainConfig
from sentinode.dataset import Patches
from sentinode.errors import TrainingError, UsageError
from sentinode.images import UInt8Array
from sentinode.inference import network_logits
from sentinode.metrics import roc_auc
from sentinode.model import train_mode
from sentinode.preprocess import normalise, resize, to_unit_nchw

IntArray = npt.NDArray[np.int64]

# BatchNorm in train mode needs two values per channel, which one row at 32 px does not give in the last stage.
_MIN_ROWS = 2
# Share of the free GPU memory that a resident split may take; activations need the rest.
_RESIDENT_SHARE = 0.5


@dataclass
class Progress:
    """Where a run stands after an epoch; a checkpoint holds this and the states of model, optimiser and scheduler.

    Attributes
    ----------
    epochs_done : int
    best_epoch : int or None
        0-based epoch with the best selection metric.
    best_value : float or None
        The metric there.
    history : list of dict
        One record per epoch: epoch, train_loss, val_loss, val_roc_auc, learning_rate, rows.
    improvements : int
        How often an epoch was the best so far.
    """

    epochs_done: int = 0
    best_epoch: int | None = None
    best_value: float | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    improvements: int = 0

    @property
    def improvement(self) -> int:
        """Score of the last epoch for keeping checkpoints: higher for each new best epoch, 0 for any other.

        The metric itself does not serve: equal values would leave it to chance which of their checkpoints is kept.
        """
        return self.improvements if self.best_epoch == self.epochs_done - 1 else 0

    def add(self, record: dict[str, Any], metric: str) -> None:
        """Note one epoch."""
        self.history.append(record)
        self.epochs_done = record["epoch"] + 1
        value = record[metric]
        better = value is not None and (self.best_value is None or (value < self.best_value if metric == "val_loss" else value > self.best_value))
        if better or self.best_epoch is None:
            self.best_epoch, self.best_value = record["epoch"], value
            self.improvements += 1

    def is_over(self, config: TrainConfig) -> bool:
        """Whether no further epoch is due, by count or by early stopping."""
        if self.epochs_done >= config.epochs:
            return True
        patience = config.early_stopping_patience_epochs
        return patience is not None and self.best_epoch is not None and self.epochs_done - 1 - self.best_epoch >= patience


@dataclass
class Learner:
    """A network with its optimiser and schedule.

    `network` is what forward passes go through (DDP-wrapped or not); `module` is the network itself.
    """

    network: nn.Module
    module: nn.Module
    optimiser: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.ReduceLROnPlateau

    @classmethod
    def make(cls, network: nn.Module, config: TrainConfig) -> "Learner":
        """Set up Adam over the parameters that train, and ReduceLROnPlateau on validation loss."""
        module = network.module if isinstance(network, nn.parallel.DistributedDataParallel) else network
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optimiser = torch.optim.Adam(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimiser, factor=config.lr_factor, patience=config.lr_patience_epochs, min_lr=config.lr_floor
        )
        return cls(network, module, optimiser, schedule)

    @property
    def learning_rate(self) -> float:
        """Current learning rate."""
        return float(self.optimiser.param_groups[0]["lr"])

    def state(self) -> dict[str, Any]:
        """Return what, with the weights, continues this learner exactly; tensors and plain values only."""
        return {"optimiser": self.optimiser.state_dict(), "schedule": self.schedule.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state`; the weights are loaded by the caller."""
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict(state["schedule"])


def rows_of_steps(rows: int, batch_size: int, rank: int, world_size: int, seed: int, epoch: int) -> Iterator[tuple[IntArray, IntArray]]:
    """Deal every row exactly once to the steps of one epoch.

    One permutation per (seed, epoch) is cut into steps of `batch_size * world_size` rows; each rank takes its slice. The rows of the last step
    are dealt as evenly as they go, so a rank may have none.

    Yields
    ------
    (mine, all) : ndarrays of int64
        Rows of this rank and of all ranks in one step.
    """
    order = np.random.default_rng([seed, epoch, 1]).permutation(rows)
    for start in range(0, rows, batch_size * world_size):
        step = order[start : start + batch_size * world_size]
        yield np.array_split(step, world_size)[rank], step


def class_weight(labels: IntArray, config: TrainConfig) -> float:
    """Return the weight of class 1: the configured one, or N_negative / N_positive of `labels`.

    Raises
    ------
    UsageError
        A class is absent from the rows to train on.
    """
    positive = int(labels.sum())
    if not 0 < positive < len(labels):
        raise UsageError(f"training needs both classes; the rows hold {len(labels) - positive} normal and {positive} metastatic patches")
    return (len(labels) - positive) / positive if config.class_weight == "auto" else config.class_weight


def train_epochs(
    learner: Learner,
    train: Patches,
    val: Patches,
    config: TrainConfig,
    progress: Progress,
    on_epoch: Callable[[Progress], None],
    *,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
) -> None:
    """Train until the epochs are done or early stopping fires; `on_epoch` is called on every rank after each epoch.

    With `epochs` 0 the initial network is validated once. Continuing from a `progress` and the states saved with it gives, on CPU with the same
    number of ranks, bitwise the weights of an undisturbed run.

    Parameters
    ----------
    learner : Learner
        On `device`; DDP-wrapped where world_size > 1.
    train, val : Patches
        The whole splits, the same on every rank.
    rank, world_size : int
        Of the default torch.distributed group, which must exist where world_size > 1.

    Raises
    ------
    TrainingError
        A loss is not finite.
    UsageError
        A class is absent from the training rows.
    """
    weights = torch.tensor([1.0, class_weight(train.labels, config)])
    source = _RowSource(train.images, torch.device(device))
    if config.epochs == 0 and not progress.history:
        record = _validate(learner, val, weights, config, rank, world_size, device) | {"epoch": -1, "train_loss": None}
        progress.add(record | {"learning_rate": learner.learning_rate, "rows": 0, "seconds": 0.0}, config.selection_metric)
        on_epoch(progress)
    while not progress.is_over(config):
        epoch, started = progress.epochs_done, time.monotonic()
        learning_rate = learner.learning_rate
        train_loss, rows = _train_one_epoch(learner, source, train.labels, weights, config, epoch, rank, world_size)
        if not np.isfinite(train_loss):
            raise TrainingError(f"epoch {epoch + 1}: the training loss is {train_loss} at learning rate {learning_rate:g}; lower it")
        seconds = time.monotonic() - started
        record = _validate(learner, val, weights, config, rank, world_size, device)
        learner.schedule.step(record["val_loss"])
        record |= {"epoch": epoch, "train_loss": train_loss, "learning_rate": learning_rate, "rows": rows, "seconds": seconds}
        progress.add(record, config.selection_metric)
        on_epoch(progress)


class _RowSource:
    """The training images, on the device where they fit, else in (shared) host memory."""

    def __init__(self, images: UInt8Array, device: torch.device) -> None:
        self.device = device
        self._host = images
        self._resident: torch.Tensor | None = None
        if device.type == "cuda" and images.nbytes < _RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]:
            self._resident = torch.tensor(images, device=device)

    def take(self, rows: IntArray) -> torch.Tensor:
        if self._resident is not None:
            return self._resident[torch.from_numpy(rows).to(self.device)]
        return torch.from_numpy(self._host[rows]).to(self.device, non_blocking=True)


def _train_one_epoch(
    learner: Learner, source: _RowSource, labels: IntArray, weights: torch.Tensor, config: TrainConfig, epoch: int, rank: int, world_size: int
) -> tuple[float, int]:
    """Return the mean weighted loss over all rows of all ranks, and how many rows were trained on."""
    train_mode(learner.module)
    device = source.device
    draws = draw(config.seed, epoch, len(labels))
    row_weights = weights.numpy()[labels]
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    rows = 0
    for mine, step in rows_of_steps(len(labels), config.batch_size, rank, world_size, config.seed, epoch):
        weight = torch.from_numpy(row_weights[mine])
        # A rank with too few rows borrows some at weight zero: every rank must take part in the step. Not its own again, whose variance is 0.
        borrowed = ((mine if len(mine) else step)[-1] + 1 + np.arange(_MIN_ROWS - len(mine))) % len(labels)
        padded = np.concatenate([mine, borrowed])
        weight = functional.pad(weight, (0, len(padded) - len(mine))).to(device)
        patches = augment(to_unit_nchw(source.take(padded)), draws[torch.from_numpy(padded)].to(device), config.augment)
        inputs = normalise(resize(patches, config.input_size_px), config.mean, config.std)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=_uses_bf16(config, device)):
            if device.type == "cuda":
                inputs = inputs.contiguous(memory_format=torch.channels_last)
            z = learner.network(inputs)
        losses = functional.cross_entropy(z.float(), torch.from_numpy(labels[padded]).to(device), reduction="none")
        weighted = (losses * weight).sum()
        # DDP averages over ranks; the sum over all rows divided by the sum of all weights is wanted, and every rank knows the latter.
        learner.optimiser.zero_grad(set_to_none=True)
        scaled = weighted * (world_size / float(row_weights[step].sum()))
        scaled.backward()  # type: ignore[no-untyped-call]
        learner.optimiser.step()
        totals += torch.stack([weighted.detach().double(), weight.sum().double()])
        rows += len(mine)
    counted = torch.tensor([float(rows)], dtype=torch.float64, device=device)
    if world_size > 1:
        dist.all_reduce(totals)
        dist.all_reduce(counted)
    return float(totals[0] / totals[1]), int(counted.item())


def _uses_bf16(config: TrainConfig, device: torch.device) -> bool:
    return config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")


def _validate(
    learner: Learner, val: Patches, weights: torch.Tensor, config: TrainConfig, rank: int, world_size: int, device: torch.device | str
) -> dict[str, Any]:
    """Return val_loss (weighted, finite) and val_roc_auc over every validation row exactly once; the same on every rank."""
    learner.module.eval()
    if world_size > 1:
        # DDP copies rank 0's BatchNorm statistics before each step but not after the last one; rank 0's are what is saved.
        for buffer in learner.module.buffers():
            dist.broadcast(buffer, 0)
    mine = network_logits(
        learner.module,
        val.images[rank::world_size],
        input_size_px=config.input_size_px,
        mean=config.mean,
        std=config.std,
        batch_size=config.eval_batch_size,
        device=device,
    )
    logits = _gather_interleaved(mine, len(val), rank, world_size, device)
    # Cross-entropy of two classes as a function of z1 - z0: softplus(-d) for class 1, softplus(d) for class 0.
    losses = np.logaddexp(0, np.where(val.labels == 1, -logits, logits))
    row_weights = weights.numpy().astype(np.float64)[val.labels]
    loss = float((losses * row_weights).sum() / row_weights.sum())
    if not np.isfinite(loss):
        raise TrainingError(f"the validation loss is {loss} at learning rate {learner.learning_rate:g}; lower it")
    return {"val_loss": loss, "val_roc_auc": roc_auc(val.labels, logits) if np.isfinite(logits).all() else None}


def _gather_interleaved(mine: npt.NDArray[np.float32], rows: int, rank: int, world_size: int, device: torch.device | str) -> npt.NDArray[np.float64]:
    """Put together what rank r holds for the rows r, r + world_size, …"""
    result = np.empty(rows, np.float64)
    if world_size == 1:
        result[:] = mine
        return result
    longest = -(-rows // world_size)
    padded = torch.zeros(longest, device=device)
    padded[: len(mine)] = torch.from_numpy(mine).to(device)
    parts = [torch.zeros_like(padded) for _ in range(world_size)]
    dist.all_gather(parts, padded)
    for other, part in enumerate(parts):
        own = result[other::world_size]
        own[:] = part.cpu().numpy()[: len(own)]
    return result
