"""Encoders: stages that mean the same for every network, and the fast copy of a frozen trunk."""

import pytest
import torch
from torch import nn

from sentinode.encoders import fast_trunk, split_at, stages_of
from sentinode.errors import ConfigError
from sentinode.model import build_model


def lived_in(arch: str, **options: object) -> nn.Module:
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
    return model.eval()


def patches(side: int = 64, rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, 3, side, side, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("arch", ["resnet18", "resnet34"])
def test_stages_in_order_are_the_network(arch: str) -> None:
    model, x = lived_in(arch), patches()
    with torch.inference_mode():
        expected = model(x)
        for stage in stages_of(model):
            x = stage(x)
    assert torch.equal(x, expected)


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
def test_the_fast_trunk_computes_what_the_trunk_does(depth: int) -> None:
    model, x = lived_in("resnet18"), patches()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trunk, tail = split_at(model, depth)
    assert trunk is not None
    fast, expected = fast_trunk(trunk), trunk(x)
    found = fast(x)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    assert not found.requires_grad
    tail(found).sum().backward()
    assert all(parameter.grad is not None for parameter in tail.parameters())
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items() if "running" not in name and "batches" not in name)
    assert all(parameter.is_contiguous() for parameter in trunk.parameters())


def test_a_fast_trunk_stays_in_eval_mode() -> None:
    trunk, _ = split_at(lived_in("resnet18"), 1)
    assert trunk is not None
    assert not any(module.training for module in fast_trunk(trunk).train().modules())


def test_the_head_drops_features_in_train_mode_alone() -> None:
    model, features = lived_in("resnet18"), torch.ones(64, 512, 2, 2)
    head = stages_of(model, dropout=0.5)[-1]
    assert torch.equal(head.eval()(features), stages_of(model)[-1](features))
    assert torch.equal(head.eval()(features), head(features))
    assert not torch.equal(head.train()(features), head(features))
    assert torch.equal(stages_of(model)[-1].train()(features), head.eval()(features))
    assert list(model.state_dict()) == list(build_model("resnet18").state_dict())


def test_a_network_of_an_unknown_class_is_refused() -> None:
    with pytest.raises(ConfigError, match="arch: Linear is a network whose stages are not known"):
        stages_of(nn.Linear(1, 1))
