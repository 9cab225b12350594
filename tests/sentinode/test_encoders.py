"""Encoders: stages that mean the same for every network, and the fast copy of a frozen trunk."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision import models
from torchvision.models import regnet

from sentinode import encoders
from sentinode.encoder_names import TORCHVISION_NAMES, check_arch, check_input_size
from sentinode.encoder_stages import CUTS
from sentinode.encoders import fast_trunk, head_names, set_unfreeze_depth, split_at, stages_of, train_mode
from sentinode.errors import ConfigError
from sentinode.model import build_model, count_parameters
from sentinode.winograd import WinogradConv2d

# One small network of each class of torchvision's, and of each class whose blocks differ from it, with the smallest side that it takes.
FAMILIES = {
    "alexnet": 63,
    "convnext_tiny": 32,
    "densenet121": 32,
    "efficientnet_b0": 32,
    "efficientnet_v2_s": 32,
    "googlenet": 32,
    "inception_v3": 75,
    "maxvit_t": 224,
    "mnasnet0_5": 32,
    "mobilenet_v2": 32,
    "mobilenet_v3_small": 32,
    "regnet_y_400mf": 32,
    "resnet18": 32,
    "resnext50_32x4d": 32,
    "shufflenet_v2_x0_5": 32,
    "squeezenet1_0": 32,
    "squeezenet1_1": 32,
    "swin_t": 32,
    "swin_v2_t": 32,
    "vgg11_bn": 32,
    "vit_b_32": 32,
}


def lived_in(arch: str, **options: int) -> nn.Module:
    """A network whose normalisation layers are not in their initial state, in eval mode."""
    torch.manual_seed(1)
    model = build_model(arch, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.1)
                module.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
        # Some heads begin at zero, or end in a ReLU: then any features could give the same logits.
        for parameter in stages_of(model)[-1].parameters():
            parameter.uniform_(0, 0.1)
    return model.eval()


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def patches(side: int = 64, rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, 3, side, side, generator=torch.Generator().manual_seed(7))


def on_meta(arch: str, side: int, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A network without values. RegNet works out its widths with tensors, so those need some."""
    widths = regnet.BlockParams.from_init_params

    def with_values(*args: object, **options: object) -> object:
        with torch.device("cpu"):
            return widths(*args, **options)

    monkeypatch.setattr(regnet.BlockParams, "from_init_params", with_values)
    with torch.device("meta"):
        return build_model(arch, input_size_px=side)


def test_the_names_are_torchvisions() -> None:
    assert set(TORCHVISION_NAMES) == set(models.list_models(module=models))


def test_each_class_of_networks_has_one_small_one_here(monkeypatch: pytest.MonkeyPatch) -> None:
    small = [on_meta(arch, side, monkeypatch) for arch, side in FAMILIES.items()]
    assert all(any(isinstance(model, kind) for model in small) for kind in CUTS)


@pytest.mark.parametrize("arch", TORCHVISION_NAMES)
def test_every_parameter_is_in_exactly_one_of_six_stages(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = on_meta(arch, 224, monkeypatch)
    stages = [{id(parameter) for parameter in stage.parameters()} for stage in stages_of(model)]
    assert len(stages) == 6
    assert all(stages), "a stage without weights"
    assert sum(map(len, stages)) == len(set.union(*stages)) == sum(1 for _ in model.parameters())
    assert set.union(*stages) == {id(parameter) for parameter in model.parameters()}
    assert len(head_names(model)) <= 2, "more than one layer"
    counts = []
    for depth in range(6):
        set_unfreeze_depth(model, depth)
        counts.append(count_parameters(model)[1])
    assert counts == sorted(set(counts))
    assert counts[-1] == count_parameters(model)[0]


@pytest.mark.parametrize(
    ("arch", "stages"),
    [
        ("resnet34", [9_536, 221_952, 1_116_416, 6_822_400, 13_114_368, 1_026]),
        ("efficientnet_b0", [2_376, 16_714, 46_640, 786_078, 3_155_740, 2_562]),
        ("convnext_tiny", [4_896, 237_888, 992_256, 11_112_960, 15_472_128, 1_538]),
        ("vit_b_16", [742_656, 21_263_616, 21_263_616, 21_263_616, 21_265_152, 1_538]),
    ],
)
def test_the_documented_stages(arch: str, stages: list[int]) -> None:
    with torch.device("meta"):
        model = build_model(arch)
    assert [sum(parameter.numel() for parameter in stage.parameters()) for stage in stages_of(model)] == stages


@pytest.mark.parametrize("arch", [arch for arch in FAMILIES if not arch.startswith(("alexnet", "squeezenet", "vgg", "vit"))])
def test_stages_work_at_the_sides_that_they_are_named_after(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(2, 3, 224, 224, device="meta")
    sides = []
    for stage in stages_of(on_meta(arch, 224, monkeypatch))[:5]:
        x = stage(x)
        channels_last = arch.startswith("swin")
        sides.append(x.shape[1 if channels_last else 2] if x.ndim == 4 else None)
    stem, *stages = sides
    assert stem in (112, 109, 56)
    # A classifier's hidden layer, in stage 4, leaves no sides. Inception pads nothing, so that its sides are a little smaller.
    expected = {"inception_v3": [52, 25, 12, 5], "shufflenet_v2_x0_5": [28, 28, 14, 7]}.get(arch, [56, 28, 14, 7])
    assert [found for found in stages if found not in (None, 1)] == expected[: 4 - sum(found in (None, 1) for found in stages)]


@pytest.fixture(scope="module", params=FAMILIES.items(), ids=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[nn.Module, int]:
    """A small network and the side of its images; built once for the tests of one class."""
    arch, side = request.param
    return lived_in(arch, input_size_px=side), side


def test_stages_in_order_are_the_network(family: tuple[nn.Module, int]) -> None:
    model, x = family[0].eval(), patches(family[1])
    with torch.inference_mode():
        expected = model(x.clone())
        assert expected.std() > 1e-4
        y = x.clone()
        for stage in stages_of(model):
            y = stage(y)
        assert torch.equal(y, expected)
        trunk, _ = split_at(model, 1)
        assert trunk is not None
        features, found = trunk(x.clone()), fast_trunk(trunk)(x.clone())
        assert (found - features).abs().max() <= 1e-4 * features.abs().max()


def test_trunk_and_tail_train_as_the_network_with_frozen_stages_does(family: tuple[nn.Module, int]) -> None:
    model, x = family[0], patches(family[1], rows=2)
    set_unfreeze_depth(model, 1)
    train_mode(model)
    torch.manual_seed(3)  # of dropout and stochastic depth
    expected = model(x.clone())
    trunk, tail = split_at(model, 1)
    assert trunk is not None
    torch.manual_seed(3)
    assert torch.equal(tail(trunk(x.clone())), expected)
    model.zero_grad(set_to_none=True)
    tail(fast_trunk(trunk)(x.clone())).square().sum().backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("depth", range(6))
def test_trunk_and_tail_are_the_network_cut_in_two(depth: int) -> None:
    model, x = lived_in("resnet18"), patches(rows=4)
    expected = model(x)
    trunk, tail = split_at(model, depth)
    assert tail.training
    if depth == 5:
        assert trunk is None
    else:
        assert trunk is not None
        assert not any(module.training for module in trunk.modules())
        assert not any(parameter.requires_grad for parameter in trunk.parameters())
        x = trunk(x)
    assert torch.equal(tail.eval()(x), expected)
    assert {id(p) for p in tail.parameters()} == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("depth", range(5))
def test_the_fast_trunk_leaves_the_trunk_alone(depth: int) -> None:
    model, x = lived_in("resnet18"), patches()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trunk, _ = split_at(model, depth)
    assert trunk is not None
    fast, expected = fast_trunk(trunk), trunk(x)
    found = fast(x)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    assert not found.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.is_contiguous() for parameter in trunk.parameters())
    assert torch.equal(trunk(x), expected)


@pytest.mark.usefixtures("one_thread")
def test_the_fast_trunk_takes_few_images_at_a_time_and_loses_none(monkeypatch: pytest.MonkeyPatch) -> None:
    trunk, _ = split_at(lived_in("resnet18"), 1)
    assert trunk is not None
    x = patches(rows=7)
    expected = trunk(x)
    fast = fast_trunk(trunk)
    seen = []
    fast.get_submodule("network").register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    for at_once, pieces in ((7, [7]), (3, [3, 3, 1]), (1, [1] * 7), (0.5, [1] * 7)):
        monkeypatch.setattr(encoders, "_PIXELS_AT_ONCE", int(at_once * 64 * 64))
        seen.clear()
        assert (fast(x) - expected).abs().max() <= 1e-4 * expected.abs().max()
        assert seen == pieces


@pytest.mark.usefixtures("one_thread")
def test_large_convolutions_of_a_fast_trunk_are_winograds() -> None:
    trunk, _ = split_at(lived_in("resnet18"), 1)
    assert trunk is not None
    fast = fast_trunk(trunk)
    assert sum(isinstance(module, WinogradConv2d) for module in fast.modules()) == 6  # of layer2 and layer3; two halve the side
    x = patches(224, rows=3)
    expected = trunk(x)
    assert (fast(x) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_batch_norm_that_reads_a_sum_is_left_as_it_is() -> None:
    """DenseNet normalises what it has concatenated; only half of its BatchNorms follow a convolution."""
    trunk, _ = split_at(lived_in("densenet121"), 1)
    assert trunk is not None
    norms, left = (sum(isinstance(module, nn.BatchNorm2d) for module in network.modules()) for network in (trunk, fast_trunk(trunk)))
    assert 0 < left < norms


def test_a_fast_trunk_stays_in_eval_mode() -> None:
    trunk, _ = split_at(lived_in("resnet18"), 1)
    assert trunk is not None
    assert not any(module.training for module in fast_trunk(trunk).train().modules())


@pytest.mark.parametrize("arch", ["resnet18", "efficientnet_b0", "squeezenet1_1", "convnext_tiny", "swin_t", "vit_b_32"])
def test_the_head_drops_features_in_train_mode_alone(arch: str) -> None:
    model, x = lived_in(arch, input_size_px=32), patches(32, rows=16)
    with torch.no_grad():
        for stage in stages_of(model)[:-1]:
            x = stage(x)
    plain, head = stages_of(model)[-1].eval(), stages_of(model, dropout=0.5)[-1]
    assert [layer.p for layer in head.modules() if isinstance(layer, nn.Dropout)] == [0.5]
    assert torch.equal(head.eval()(x), plain(x))
    head.train()
    assert not torch.equal(head(x), head(x))


def test_without_dropout_of_ones_own_the_encoders_stays() -> None:
    assert [layer.p for layer in stages_of(build_model("efficientnet_b0"))[-1].modules() if isinstance(layer, nn.Dropout)] == [0.2]


def test_a_network_of_an_unknown_class_is_refused() -> None:
    with pytest.raises(ConfigError, match="arch: Linear is a network whose stages are not known"):
        stages_of(nn.Linear(1, 1))


@pytest.mark.parametrize("arch", ["", "resnet", "ResNet34", "timm:", "timm:a/b", "timm:hf-hub:a", "vgg20", "resnet34 "])
def test_a_name_that_cannot_be_an_encoders_is_one_line(arch: str) -> None:
    with pytest.raises(ValueError, match=r"expected a classifier of torchvision, resnet34 for instance, or timm:NAME") as caught:
        check_arch(arch)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("arch", "side"), FAMILIES.items())
def test_the_smallest_image_that_is_allowed_is_the_smallest_that_works(arch: str, side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check_input_size(arch, side)
    model = on_meta(arch, side, monkeypatch).eval()
    assert model(torch.empty(2, 3, side, side, device="meta")).shape == (2, 2)
    if arch in ("alexnet", "inception_v3"):  # all others are held to what the configuration allows, or to a multiple
        with pytest.raises(ValueError, match=rf"^input_size_px {side - 1} is too small for arch {arch}: it takes {side} px or more$"):
            check_input_size(arch, side - 1)
        with pytest.raises((RuntimeError, ValueError)):
            model(torch.empty(2, 3, side - 1, side - 1, device="meta"))


@pytest.mark.parametrize("side", [96, 192, 225])
def test_maxvit_takes_multiples_of_224_px_alone(side: int) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match="not divisible by partition size"):
        models.maxvit_t(input_size=(side, side))


@pytest.mark.parametrize(("arch", "side"), [("vit_b_16", 100), ("vit_h_14", 96), ("maxvit_t", 96), ("inception_v3", 64)])
def test_a_size_that_does_not_fit_is_one_line(arch: str, side: int) -> None:
    with pytest.raises(ConfigError, match=rf"^input_size_px {side} .* arch {arch}: it takes \w+ [^\n]+$"):
        build_model(arch, input_size_px=side)


def test_configuration_needs_no_torch(tmp_path: Path) -> None:
    code = "import sys, sentinode.config; assert not {'torch', 'torchvision', 'timm', 'ray'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
