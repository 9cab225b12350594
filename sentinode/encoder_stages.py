"""The table of stages: how each network of torchvision falls into a stem, four stages and a head.

The stages are those of ResNet: the stem works down to half or a quarter of the side, stages 1 to 4 at a quarter, an eighth, a sixteenth and a
thirty-second of it. Networks that have no such levels are cut into comparable quarters, as their functions here say. The head is the last
layer with weights alone, so that depth 0 is a linear probe of every network; hidden layers of a classifier and a final normalisation go with
stage 4.
"""

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import nn
from torchvision import models

Stages = list[list[nn.Module]]
"""Stem, four stages, head, each as modules that are applied in order."""


def at_downsampling(blocks: Iterable[nn.Module]) -> Stages:
    """Cut a chain of blocks so that each piece begins where the side is halved."""
    pieces: Stages = [[]]
    for block in blocks:
        halves = any(
            isinstance(layer, nn.Conv2d | nn.MaxPool2d) and (layer.stride if isinstance(layer.stride, int) else layer.stride[0]) > 1
            for layer in block.modules()
        )
        if halves and pieces[-1]:
            pieces.append([])
        pieces[-1].append(block)
    return pieces


def _resnet(model: Any) -> Stages:
    stem = [model.conv1, model.bn1, model.relu, model.maxpool]
    return [stem, [model.layer1], [model.layer2], [model.layer3], [model.layer4], [model.avgpool, nn.Flatten(), model.fc]]


def _efficientnet(model: Any) -> Stages:
    return [*at_downsampling(model.features), [model.avgpool, nn.Flatten(), *model.classifier]]


def _mobilenet_v2(model: Any) -> Stages:
    return [*at_downsampling(model.features), [nn.AdaptiveAvgPool2d(1), nn.Flatten(), *model.classifier]]


def _mobilenet_v3(model: Any) -> Stages:
    *body, last = at_downsampling(model.features)
    hidden, activation, dropout, linear = model.classifier
    return [*body, [*last, model.avgpool, nn.Flatten(), hidden, activation], [dropout, linear]]


def _mnasnet(model: Any) -> Stages:
    return [*at_downsampling(model.layers), [_SpatialMean(), *model.classifier]]


def _regnet(model: Any) -> Stages:
    return [[model.stem], *([block] for block in model.trunk_output), [model.avgpool, nn.Flatten(), model.fc]]


def _densenet(model: Any) -> Stages:
    f = model.features
    return [
        [f.conv0, f.norm0, f.relu0, f.pool0],
        [f.denseblock1],
        [f.transition1, f.denseblock2],
        [f.transition2, f.denseblock3],
        [f.transition3, f.denseblock4, f.norm5],
        [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.classifier],
    ]


def _vgg(model: Any) -> Stages:
    """Blocks of convolutions between poolings: the first one is the stem."""
    stem, first, second, third, fourth, pool = at_downsampling(model.features)
    *hidden, linear = model.classifier
    return [stem, first, second, third, [*fourth, *pool, model.avgpool, nn.Flatten(), *hidden[:-1]], [hidden[-1], linear]]


def _alexnet(model: Any) -> Stages:
    """One convolution in the stem and in each stage."""
    f = model.features
    *hidden, linear = model.classifier
    return [[*f[:3]], [*f[3:6]], [*f[6:8]], [*f[8:10]], [*f[10:], model.avgpool, nn.Flatten(), *hidden], [linear]]


def _squeezenet(model: Any) -> Stages:
    """Two of the eight fire modules in each stage; a pooling goes with the fire module behind it."""
    pieces: Stages = [[]]
    fires = 0
    for index, layer in enumerate(model.features):
        ahead = next((after for after in model.features[index:] if not isinstance(after, nn.MaxPool2d)), None)
        starts = isinstance(ahead, models.squeezenet.Fire) and not isinstance(pieces[-1][-1], nn.MaxPool2d) and fires % 2 == 0
        if starts:
            pieces.append([])
        pieces[-1].append(layer)
        fires += isinstance(layer, models.squeezenet.Fire)
    return [*pieces, [*model.classifier, nn.Flatten()]]


def _shufflenet(model: Any) -> Stages:
    """No blocks at a quarter of the side: the unit that leads from there to an eighth is stage 1."""
    down, *second = model.stage2
    return [[*model.conv1, model.maxpool], [down], second, [model.stage3], [model.stage4, model.conv5], [_SpatialMean(), model.fc]]


def _googlenet(model: Any) -> Stages:
    m = model
    return [
        [_InceptionScale(), m.conv1, m.maxpool1],
        [m.conv2, m.conv3],
        [m.maxpool2, m.inception3a, m.inception3b],
        [m.maxpool3, m.inception4a, m.inception4b, m.inception4c, m.inception4d, m.inception4e],
        [m.maxpool4, m.inception5a, m.inception5b],
        [m.avgpool, nn.Flatten(), m.dropout, m.fc],
    ]


def _inception(model: Any) -> Stages:
    m = model
    return [
        [_InceptionScale(), m.Conv2d_1a_3x3, m.Conv2d_2a_3x3, m.Conv2d_2b_3x3],
        [m.maxpool1, m.Conv2d_3b_1x1, m.Conv2d_4a_3x3],
        [m.maxpool2, m.Mixed_5b, m.Mixed_5c, m.Mixed_5d],
        [m.Mixed_6a, m.Mixed_6b, m.Mixed_6c, m.Mixed_6d, m.Mixed_6e],
        [m.Mixed_7a, m.Mixed_7b, m.Mixed_7c],
        [m.avgpool, nn.Flatten(), m.dropout, m.fc],
    ]


def _convnext(model: Any) -> Stages:
    f = model.features
    norm, flatten, linear = model.classifier
    return [[f[0]], [f[1]], [*f[2:4]], [*f[4:6]], [*f[6:], model.avgpool, norm], [flatten, linear]]


def _swin(model: Any) -> Stages:
    f = model.features
    return [[f[0]], [f[1]], [*f[2:4]], [*f[4:6]], [*f[6:], model.norm], [model.permute, model.avgpool, model.flatten, model.head]]


def _maxvit(model: Any) -> Stages:
    *body, last = model.blocks
    *hidden, linear = model.classifier
    return [[*model.stem], *([block] for block in body), [last, *hidden], [linear]]


def _vit(model: Any) -> Stages:
    """A quarter of the encoder's layers in each stage."""
    layers = [*model.encoder.layers]
    quarter = len(layers) // 4
    quarters = [layers[start : start + quarter] for start in range(0, len(layers), quarter)]
    return [[_VitStem(model), model.encoder.dropout], *quarters[:3], [*quarters[3], model.encoder.ln], [_ClassToken(), *model.heads]]


class _VitStem(nn.Module):
    """Patches and the class token, each at its position: (n, 3, side, side) to (n, 1 + patches, channels)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.projection = model.conv_proj
        self.class_token: nn.Parameter = model.class_token
        self.positions: nn.Parameter = model.encoder.pos_embedding

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        patches = cast(torch.Tensor, self.projection(x)).flatten(2).transpose(1, 2)
        return torch.cat([self.class_token.expand(x.shape[0], -1, -1), patches], 1) + self.positions


class _ClassToken(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, 0]


class _SpatialMean(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean([2, 3])


class _InceptionScale(nn.Module):
    """From ImageNet's mean and standard deviation to 0.5 and 0.5, in the same order of operations as torchvision's `transform_input`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        channels = [(0.229, 0.485), (0.224, 0.456), (0.225, 0.406)]
        return torch.cat([x[:, [index]] * (std / 0.5) + (mean - 0.5) / 0.5 for index, (std, mean) in enumerate(channels)], 1)


CUTS: dict[type[nn.Module], Callable[[Any], Stages]] = {
    models.AlexNet: _alexnet,
    models.ConvNeXt: _convnext,
    models.DenseNet: _densenet,
    models.EfficientNet: _efficientnet,
    models.GoogLeNet: _googlenet,
    models.Inception3: _inception,
    models.MNASNet: _mnasnet,
    models.MaxVit: _maxvit,
    models.MobileNetV2: _mobilenet_v2,
    models.MobileNetV3: _mobilenet_v3,
    models.RegNet: _regnet,
    models.ResNet: _resnet,
    models.ShuffleNetV2: _shufflenet,
    models.SqueezeNet: _squeezenet,
    models.SwinTransformer: _swin,
    models.VGG: _vgg,
    models.VisionTransformer: _vit,
}
"""Model class -> its six stages, each a list of modules that are applied in order; the last one has a single layer with weights."""
