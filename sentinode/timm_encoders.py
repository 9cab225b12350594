"""Encoders of timm, an optional library: construction, and the stages of those classes whose parts follow one another."""

import difflib
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from httpx import HTTPError
from torch import nn

from sentinode.encoder_names import TIMM_PREFIX
from sentinode.encoder_stages import Stages, at_downsampling
from sentinode.errors import ConfigError, UsageError


def timm_model(arch: str, *, imagenet: bool, num_classes: int, input_size_px: int) -> nn.Module:
    """Build a network of timm's that maps float (n, 3, side, side) to logits (n, num_classes).

    Parameters
    ----------
    arch : str
        "timm:NAME"; a tag of weights may follow the name as timm writes it ("timm:resnet18.a1_in1k").
    imagenet : bool
        Load the weights of that tag, or timm's default ones, from the cache of Hugging Face or the network.
    num_classes, input_size_px : int
        Outputs of the head and side of the images.

    Raises
    ------
    ConfigError
        timm has no such network, its stages are not known, or it does not take images of this size.
    UsageError
        timm is not installed, or the weights cannot be had.
    """
    try:
        import timm
    except ImportError as error:
        raise UsageError(f"arch {arch}: timm is not installed; pip install 'sentinode[timm]'") from error
    name = arch.removeprefix(TIMM_PREFIX)
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=1)
        raise ConfigError(f"arch: got {arch!r}, timm has no network of that name{f'; did you mean {TIMM_PREFIX}{close[0]}?' if close else ''}")
    defaults = timm.get_pretrained_cfg(name)
    sized: dict[str, Any] = {"img_size": input_size_px} if defaults is not None and defaults.fixed_input_size else {}
    make = partial(timm.create_model, name, num_classes=num_classes, **sized)
    with torch.device("meta"):  # shapes without values: nothing is computed
        try:
            model: nn.Module = make()
            model(torch.empty(2, 3, input_size_px, input_size_px))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ConfigError(f"input_size_px {input_size_px} does not fit arch {arch}: {str(error).splitlines()[0]}") from error
    if timm_cut(model) is None:
        kind = type(model).__name__
        what = f"the parts of this {kind} do" if kind in _CUTS else f"timm's {kind} does"
        raise ConfigError(f"arch {arch}: {what} not fall into known stages; most networks of {', '.join(_CUTS)} do")
    if not imagenet:
        return make()  # type: ignore[no-any-return]
    try:
        return make(pretrained=True)  # type: ignore[no-any-return]
    except (OSError, RuntimeError, HTTPError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"weights imagenet: those of {arch} are neither cached nor downloadable ({reason}); set weights to a file, a bundle or none"
        ) from error


def timm_cut(model: nn.Module) -> Callable[[Any], Stages] | None:
    """Return what cuts a network of timm's into stages; None if it is another's, or of a class or kind whose stages are not known."""
    kind = type(model)
    cut = _CUTS.get(kind.__name__) if kind.__module__.startswith("timm.models.") else None
    return cut if cut is not None and len(cut(model)) == 6 else None


def _resnet(model: Any) -> Stages:
    stem = [model.conv1, model.bn1, model.act1, model.maxpool]
    return [stem, [model.layer1], [model.layer2], [model.layer3], [model.layer4], [model.global_pool, model.fc]]


def _efficientnet(model: Any) -> Stages:
    blocks = [model.conv_stem, model.bn1, *model.blocks, model.conv_head, model.bn2]
    return [*at_downsampling(blocks), [model.global_pool, model.classifier]]


def _mobilenet_v3(model: Any) -> Stages:
    *body, last = at_downsampling([model.conv_stem, model.bn1, *model.blocks])
    return [*body, [*last, model.global_pool, model.conv_head, model.norm_head, model.act2, model.flatten], [model.classifier]]


def _convnext(model: Any) -> Stages:
    *body, last = model.stages
    hidden, head = _head_of(model.head)
    return [[model.stem], *([stage] for stage in body), [last, model.norm_pre, *hidden], head]


def _regnet(model: Any) -> Stages:
    hidden, head = _head_of(model.head)
    return [[model.stem], [model.s1], [model.s2], [model.s3], [model.s4, model.final_conv, *hidden], head]


def _swin(model: Any) -> Stages:
    *body, last = model.layers
    hidden, head = _head_of(model.head)
    return [[model.patch_embed], *([stage] for stage in body), [last, model.norm, *hidden], head]


def _head_of(head: Any) -> tuple[list[nn.Module], list[nn.Module]]:
    """What goes with stage 4 and what is the head, of timm's ClassifierHead or NormMlpClassifierHead."""
    if hasattr(head, "pre_logits"):
        return [head.global_pool, head.norm, head.flatten, head.pre_logits], [head.drop, head.fc]
    return [], [head.global_pool, head.drop, head.fc, head.flatten]


def _vit(model: Any) -> Stages:
    """A quarter of the blocks in each stage."""
    if model.attn_pool is not None or model.dynamic_img_size:
        return []
    blocks = [*model.blocks]
    edges = [len(blocks) * quarter // 4 for quarter in range(5)]
    first, second, third, fourth = (blocks[start:end] for start, end in itertools.pairwise(edges))
    stem = [_VitStem(model), model.pos_drop, model.patch_drop, model.norm_pre]
    return [stem, first, second, third, [*fourth, model.norm, _Pool(model), model.fc_norm], [model.head_drop, model.head]]


class _VitStem(nn.Module):
    """Patches, class token and registers, each at its position: (n, 3, side, side) to (n, tokens, channels)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.patch_embed = model.patch_embed
        self.cls_token = model.cls_token
        self.reg_token = model.reg_token
        self.pos_embed: nn.Parameter | None = model.pos_embed
        self.only_patches_have_positions = model.no_embed_class

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = cast(torch.Tensor, self.patch_embed(x))
        tokens = [token.expand(x.shape[0], -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        if self.pos_embed is None:
            return torch.cat([*tokens, x], 1)
        if self.only_patches_have_positions:
            return torch.cat([*tokens, x + self.pos_embed], 1)
        return torch.cat([*tokens, x], 1) + self.pos_embed


class _Pool(nn.Module):
    """From tokens to features: (n, tokens, channels) to (n, channels)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        from timm.layers import global_pool_nlc

        self.pool = partial(
            global_pool_nlc,
            pool_type=model.global_pool,
            num_prefix_tokens=model.num_prefix_tokens,
            reduce_include_prefix=model.pool_include_prefix,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pool(x)  # type: ignore[no-any-return]


_CUTS: dict[str, Callable[[Any], Stages]] = {
    "ConvNeXt": _convnext,
    "EfficientNet": _efficientnet,
    "MobileNetV3": _mobilenet_v3,
    "RegNet": _regnet,
    "ResNet": _resnet,
    "SwinTransformer": _swin,
    "VisionTransformer": _vit,
}
"""Class of timm's -> its six stages, as in `sentinode.encoder_stages`; no stages where its kind has other parts."""
