"""A network in training: what is frozen, what trains, the optimiser, the schedule, the averaged weights."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sentinode.config import TrainConfig
from sentinode.encoders import fast_trunk, split_at, train_mode
from sentinode.model import state_for_storage
from sentinode.optimisation import Schedule, make_optimiser

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Learner:
    """A network with everything that its training changes.

    The frozen stages run as a trunk without autograd, with BatchNorm folded into the convolutions; only the stages after it are wrapped for
    distributed training.

    Parameters
    ----------
    model : nn.Module
        `sentinode.model.build_model`'s; moved to `device`.
    config : TrainConfig
    device : torch.device
    world_size : int
        Of the default torch.distributed group, which must exist where it is above 1.

    Attributes
    ----------
    model : nn.Module
        The network with its weights as the optimiser left them.
    kept : nn.Module
        The network that is validated and stored: `model`, or the average of its weights.
    depth : int
        Stages after the head that train now.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, *, device: torch.device | str = "cpu", world_size: int = 1) -> None:
        self.device = torch.device(device)
        self.config, self.world_size = config, world_size
        channels_last = config.channels_last is not False
        self.model = model.to(self.device, memory_format=torch.channels_last) if channels_last else model.to(self.device)  # type: ignore[call-overload]
        if world_size > 1 and config.sync_batch_norm and self.device.type == "cuda":
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)  # type: ignore[no-untyped-call]
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.optimiser = make_optimiser(self.model, config, world_size)
        self.schedule = Schedule(self.optimiser, config)
        self._average = _averaged(self.model, config.ema_decay) if config.ema_decay else None
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self._trunk: nn.Module | None = None
        self._tail: nn.Module = model
        self.depth = -1
        self.set_depth(config.depth_at(0))

    @property
    def kept(self) -> nn.Module:
        """The network that is validated and stored."""
        module: nn.Module = self.model if self._average is None else self._average.module
        return module

    @property
    def precision(self) -> str:
        """Arithmetic of the forward pass: fp32, bf16 or fp16."""
        if self.config.precision == "auto":
            return "bf16" if self.device.type == "cuda" else "fp32"
        return self.config.precision

    @property
    def learning_rate(self) -> float:
        """Current learning rate of the head."""
        return float(self.optimiser.param_groups[0]["lr"])

    def set_depth(self, depth: int) -> None:
        """Let the head and `depth` more stages train; the others become the trunk."""
        if depth == self.depth:
            return
        self.depth = depth
        trunk, tail = split_at(self.model, depth, dropout=self.config.dropout)
        self._trunk = None if trunk is None else self._compiled(fast_trunk(trunk, precision=self.precision))
        self._trunk_sha256: str | None = None
        if self.world_size > 1:
            devices = [self.device.index] if self.device.type == "cuda" else None
            # On CPUs a run that goes on must sum gradients in the order of one that was never interrupted, which with three workers and more
            # decides the rounding. Without `find_unused_parameters` the order changes after the first step of every process.
            steady = self.device.type == "cpu"
            tail = DistributedDataParallel(tail, device_ids=devices, gradient_as_bucket_view=True, find_unused_parameters=steady)
        self._tail = self._compiled(tail)

    def _compiled(self, module: nn.Module) -> nn.Module:
        return torch.compile(module) if self.config.compile else module  # type: ignore[return-value]

    def autocast(self) -> torch.autocast:
        """Return the context of the forward pass."""
        return torch.autocast(self.device.type, dtype=_AUTOCAST.get(self.precision, torch.bfloat16), enabled=self.precision != "fp32")

    def train_mode(self) -> None:
        """Put the stages that train into train mode, frozen ones into eval mode."""
        train_mode(self.model)
        self._tail.train()  # its head has a dropout that is not the model's

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return logits, float32 (n, 2), for inputs, float (n, 3, side, side); call after `train_mode`."""
        with self.autocast():
            inputs = inputs.contiguous(memory_format=self.memory_format)
            features = inputs if self._trunk is None else self._trunk(inputs)
            z: torch.Tensor = self._tail(features)
        return z.float()

    @property
    def has_trunk(self) -> bool:
        """Whether there are frozen stages."""
        return self._trunk is not None

    def trunk_features(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return what the frozen stages, which must be there, make of inputs, float (n, 3, side, side): (n, …)."""
        assert self._trunk is not None
        with self.autocast():
            features: torch.Tensor = self._trunk(inputs.contiguous(memory_format=self.memory_format))
        return features.contiguous()

    def forward_features(self, features: torch.Tensor) -> torch.Tensor:
        """Return logits as `forward` does, from what `trunk_features` made."""
        with self.autocast():
            z: torch.Tensor = self._tail(self._as_trunk_leaves_it(features))
        return z.float()

    def _as_trunk_leaves_it(self, features: torch.Tensor) -> torch.Tensor:
        return features.contiguous(memory_format=self.memory_format) if features.ndim == 4 else features

    def trunk_digest(self) -> str:
        """Return the SHA-256 of the frozen stages' weights."""
        assert self._trunk is not None
        if self._trunk_sha256 is None:
            sha256 = hashlib.sha256()
            for name, value in self._trunk.state_dict().items():
                sha256.update(name.encode())
                sha256.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy())
            self._trunk_sha256 = sha256.hexdigest()
        return self._trunk_sha256

    def exchanging(self, *, last: bool) -> AbstractContextManager[None]:
        """Return the context of forward and backward of one batch; `last` = of this step: only then do workers exchange the sum of gradients."""
        tail = getattr(self._tail, "_orig_mod", self._tail)
        return tail.no_sync() if isinstance(tail, DistributedDataParallel) and not last else nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of `loss`."""
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        """Change the weights by the gradients, then forget these."""
        if self.config.clip_norm is not None:
            self._scaler.unscale_(self.optimiser)
            trained = [parameter for group in self.optimiser.param_groups for parameter in group["params"] if parameter.grad is not None]
            nn.utils.clip_grad_norm_(trained, self.config.clip_norm)
        self._scaler.step(self.optimiser)
        self._scaler.update()
        self.optimiser.zero_grad(set_to_none=True)
        if self._average is not None:
            self._average.update_parameters(self.model)

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """Yield the kept network in eval mode: float inputs (n, 3, side, side) to logits (n, 2), without autograd."""
        _, tail = split_at(self.kept, self.depth)
        network = tail if self._trunk is None else nn.Sequential(self._trunk, tail)
        yield _InFormat(network.eval(), self)

    @contextmanager
    def evaluating_features(self) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """As `evaluating`, from what `trunk_features` made."""
        _, tail = split_at(self.kept, self.depth)
        tail.eval()

        def logits(features: torch.Tensor) -> torch.Tensor:
            with self.autocast():
                z: torch.Tensor = tail(self._as_trunk_leaves_it(features))
            return z.float()

        yield logits

    def is_finite(self) -> bool:
        """Whether all weights are finite numbers."""
        return all(bool(torch.isfinite(parameter).all()) for parameter in self.model.parameters() if parameter.requires_grad)

    def buffers_to_share(self) -> list[torch.Tensor]:
        """Return the buffers that workers do not keep equal by themselves: BatchNorm statistics, of which rank 0's are stored."""
        return [*self.model.buffers(), *(self.kept.buffers() if self._average is not None else ())]

    def state(self) -> dict[str, Any]:
        """Return what, with the weights of `kept`, continues this learner exactly; tensors and plain values only."""
        state: dict[str, Any] = {
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state(),
            "scaler": self._scaler.state_dict(),
            "world_size": self.world_size,
        }
        if self._average is not None:
            state |= {"raw_weights": state_for_storage(self.model), "averaged_steps": int(self._average.n_averaged)}
        return state

    def restore(self, weights: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        """Continue from the weights of `kept` and from `state`."""
        self.kept.load_state_dict(weights)
        if self._average is not None:
            self.model.load_state_dict(state["raw_weights"])
            self._average.n_averaged.fill_(state["averaged_steps"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.restore(state["schedule"])
        if self.config.scale_learning_rate and state["world_size"] != self.world_size:
            self.schedule.scale(self.world_size / state["world_size"])
        self._scaler.load_state_dict(state["scaler"])
        # The trunk is a copy of stages whose weights have just changed.
        depth, self.depth = self.depth, -1
        self.set_depth(depth)


def _averaged(model: nn.Module, decay: float) -> AveragedModel:
    average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    return AveragedModel(model, multi_avg_fn=average, use_buffers=True)


class _InFormat(nn.Module):
    """A network that brings its inputs into the learner's memory format and arithmetic."""

    def __init__(self, network: nn.Module, learner: Learner) -> None:
        super().__init__()
        self._network, self._learner = network, learner

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        with self._learner.autocast():
            z: torch.Tensor = self._network(inputs.contiguous(memory_format=self._learner.memory_format))
        return z.float()
