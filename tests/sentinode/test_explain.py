"""Grad-CAM points at what decides."""

import numpy as np
import pytest
import torch

from sentinode.encoders import stages_of
from sentinode.errors import UsageError
from sentinode.explain import Explainer, overlay
from sentinode.model import build_model

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def explainer(arch: str, input_size_px: int) -> Explainer:
    torch.manual_seed(0)
    model = build_model(arch, weights="none", input_size_px=input_size_px).eval()
    return Explainer(model, input_size_px=input_size_px, mean=MEAN, std=STD)


@pytest.mark.parametrize(
    ("arch", "input_size_px", "layer"),
    [
        ("resnet18", 96, "stage 3 (6 x 6)"),
        ("resnet18", 224, "stage 4 (7 x 7)"),
        ("resnet18", 64, "stage 2 (8 x 8)"),
        ("vgg11", 96, "stage 3 (12 x 12)"),
    ],
)
def test_the_map_is_not_three_by_three(arch: str, input_size_px: int, layer: str) -> None:
    assert explainer(arch, input_size_px).layer == layer


def test_a_network_without_maps_is_refused() -> None:
    with pytest.raises(UsageError, match="no stage of this network has a map of 6 x 6"):
        explainer("vit_b_32", 64)


def test_the_map_lies_where_the_patch_has_what_decides() -> None:
    torch.manual_seed(0)
    model = build_model("resnet18", weights="none", input_size_px=96).eval()
    patches = np.full((4, 96, 96, 3), 128, np.uint8)
    corners = [(0, 0), (0, 60), (60, 0), (60, 60)]
    for patch, (y, x) in zip(patches, corners, strict=True):
        patch[y : y + 36, x : x + 36] = np.random.default_rng(0).integers(0, 255, (36, 36, 3))
    # Whatever the random network makes of the noise speaks for Metastatic.
    with torch.no_grad():
        features = torch.nn.Sequential(*stages_of(model)[:5])(torch.randn(8, 3, 96, 96)).mean((0, 2, 3))
        model.fc.weight.copy_(torch.stack([-features, features]))
    heat = Explainer(model, input_size_px=96, mean=MEAN, std=STD).maps(patches)
    assert heat.shape == (4, 96, 96)
    assert heat.dtype == np.float32
    assert heat.min() >= 0
    assert heat.max() <= 1
    for one, (y, x) in zip(heat, corners, strict=True):
        inside = np.zeros((96, 96), bool)
        inside[y : y + 36, x : x + 36] = True
        assert one[inside].mean() > 2 * one[~inside].mean()


def test_explaining_leaves_the_network_and_its_gradients_alone() -> None:
    model = build_model("resnet18", weights="none", input_size_px=96).eval()
    patches = np.random.default_rng(0).integers(0, 255, (2, 96, 96, 3), np.uint8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    explained = Explainer(model, input_size_px=96, mean=MEAN, std=STD)
    assert (explained.maps(patches) == explained.maps(patches)).all()
    assert all((value == before[name]).all() for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())


def test_the_overlay_is_a_picture_of_the_patch() -> None:
    patch = np.random.default_rng(0).integers(0, 255, (96, 96, 3), np.uint8)
    heat = np.zeros((96, 96), np.float32)
    heat[:48] = 1
    shown = overlay(patch, heat)
    assert shown.shape == patch.shape
    assert shown.dtype == np.uint8
    assert shown[:48, :, 0].mean() > shown[48:, :, 0].mean()
    assert shown[48:, :, 2].mean() > shown[:48, :, 2].mean()
