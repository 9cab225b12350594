"""Encoders cut in stages: what trains and what is frozen, and a fast copy of what is frozen. `unfreeze_depth` means the same for all of them."""

import copy
from collections.abc import Sequence
from typing import cast

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sentinode.encoder_stages import CUTS
from sentinode.errors import ConfigError
from sentinode.timm_encoders import timm_cut
from sentinode.winograd import WinogradConv2d

STAGE_COUNT = 6
"""Stem, four stages, head."""

# Eight images of 224 px: the largest activation of a ResNet is then 26 MB. More fall out of the cache, fewer read the weights too often.
_PIXELS_AT_ONCE = 8 * 224 * 224


def stages_of(model: nn.Module, *, dropout: float = 0.0) -> list[nn.Module]:
    """Cut a network into six modules: the stem first, then four stages, the head last.

    Applied in order they compute what `model` computes. They share its parameters, each of which is in exactly one of them; their own
    state dicts have other names than the model's, which is what is stored.

    Parameters
    ----------
    model : nn.Module
        What `build_model` returns.
    dropout : float
        Share of the features before the last linear layer that the head sets to zero in train mode; 0 leaves what the encoder has of its own.

    Raises
    ------
    ConfigError
        The network is of a class whose stages are not known.
    """
    cut = next((cut for kind, cut in CUTS.items() if isinstance(model, kind)), None) or timm_cut(model)
    if cut is None:
        raise ConfigError(f"arch: {type(model).__name__} is a network whose stages are not known")
    *body, head = cut(model)
    return [*(nn.Sequential(*parts) for parts in body), _head(head, dropout)]


def set_unfreeze_depth(model: nn.Module, depth: int) -> None:
    """Let the head and `depth` more stages train; freeze the rest. Any order, repeatable.

    Frozen stages belong into eval mode, so that their BatchNorm statistics do not drift: `train_mode`, or the trunk of `split_at`.

    Raises
    ------
    ConfigError
        `depth` is not 0..5.
    """
    _check_depth(depth)
    for index, stage in enumerate(reversed(stages_of(model))):
        stage.requires_grad_(index <= depth)


def train_mode(model: nn.Module) -> None:
    """Put stages that train into train mode and frozen ones into eval mode."""
    model.eval()
    for stage in stages_of(model):
        stage.train(any(parameter.requires_grad for parameter in stage.parameters()))


def split_at(model: nn.Module, depth: int, *, dropout: float = 0.0) -> tuple[nn.Module | None, nn.Module]:
    """Return what is frozen at an unfreeze depth, in eval mode, and what trains, in train mode; the first is None at depth 5.

    `tail(trunk(x))` computes what `model(x)` computes. Both share the model's parameters, whose `requires_grad` is set here.

    Raises
    ------
    ConfigError
        `depth` is not 0..5.
    """
    set_unfreeze_depth(model, depth)
    stages = stages_of(model, dropout=dropout)
    cut = STAGE_COUNT - 1 - depth
    trunk = nn.Sequential(*stages[:cut]).eval() if cut else None
    return trunk, nn.Sequential(*stages[cut:]).train()


def head_names(model: nn.Module) -> set[str]:
    """Names, in the model's state dict, of the weights that the head holds: what another number of classes changes."""
    head = {id(parameter) for parameter in stages_of(model)[-1].parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in head}


def fast_trunk(trunk: nn.Module, *, precision: str = "fp32") -> nn.Module:
    """Return a copy of a frozen trunk that computes the same, within rounding, and fast. Call it where device and number of threads are settled.

    The copy is in eval mode and records nothing for autograd; its outputs are ordinary tensors, good as inputs of a tail that trains. BatchNorm
    is folded into the convolutions before it, and tensors have the memory format channels_last, as the output has. On one CPU thread, a few
    images at a time go through all layers, so that what a layer leaves is in the cache for the next one, and Winograd's algorithm does large
    3x3 convolutions. It does not follow later changes of `trunk`.

    Parameters
    ----------
    trunk : nn.Module
        Of `split_at`: float images (n, 3, side, side) to features.
    precision : str
        That it will run in: fp32, bf16 or fp16.
    """
    network = _fold_batch_norm(copy.deepcopy(trunk).eval())
    # Kernels for Winograd's algorithm are four times as large as the layer's own: only where they will be used.
    winograd = precision == "fp32" and torch.get_num_threads() == 1
    for name, module in list(network.named_modules()):
        if winograd and WinogradConv2d.suits(module):
            network.set_submodule(name, WinogradConv2d(cast(nn.Conv2d, module)))
    return _Frozen(network)


class _Frozen(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def train(self, mode: bool = True) -> "_Frozen":
        return super().train(False)

    # Not inference_mode: autograd refuses its tensors as inputs of a layer that trains. The two are equally fast here.
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            alone = x.device.type == "cpu" and torch.get_num_threads() == 1
            pieces = -(-x.shape[0] * x.shape[2] * x.shape[3] // _PIXELS_AT_ONCE) if alone else 1
            if pieces <= 1:
                return cast(torch.Tensor, self.network(x))
            return torch.cat([self.network(piece) for piece in x.chunk(pieces)])


def _fold_batch_norm(network: nn.Module) -> nn.Module:
    """Fold each BatchNorm whose input is a convolution's output, used nowhere else, into that convolution."""
    if not any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        return network
    try:
        graph = fx.symbolic_trace(network)
    except (fx.proxy.TraceError, TypeError, ValueError):
        return network  # its forward decides by values, which a graph cannot
    modules = dict(graph.named_modules())
    for node in list(graph.graph.nodes):
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        convolution, norm = modules[str(before.target)], modules[str(node.target)]
        if type(convolution) is nn.Conv2d and type(norm) is nn.BatchNorm2d:
            graph.set_submodule(str(before.target), fuse_conv_bn_eval(convolution, norm))
            node.replace_all_uses_with(before)
            graph.graph.erase_node(node)
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph


def _check_depth(depth: int) -> None:
    if not 0 <= depth < STAGE_COUNT:
        raise ConfigError(f"unfreeze_depth: got {depth}, expected 0 to {STAGE_COUNT - 1}")


def _head(parts: Sequence[nn.Module], dropout: float) -> nn.Module:
    """Join the parts of a head; with `dropout` before the layer that holds its weights, in the place of the encoder's own."""
    rest = [part for part in parts if dropout == 0 or not isinstance(part, nn.Dropout)]
    last = next(index for index, part in enumerate(rest) if any(True for _ in part.parameters()))
    return nn.Sequential(*rest[:last], *([nn.Dropout(dropout)] if dropout else []), _InFullPrecision(rest[last]), *rest[last + 1 :])


class _InFullPrecision(nn.Module):
    """A layer that autocast leaves alone. Logits in bf16 have 8 bits: patches would tie that validation ranks, and cross-entropy be coarse."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            return cast(torch.Tensor, self.layer(x))
        with torch.autocast(x.device.type, enabled=False):
            return cast(torch.Tensor, self.layer(x.float()))
