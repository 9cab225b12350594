"""Winograd's algorithm computes what the convolution does, where it pays, and lets the convolution work where it does not."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from sentinode.winograd import WinogradConv2d


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def convolution(channels: int = 128, made: int = 128, **options: object) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(channels, made, 3, **{"padding": 1} | options).requires_grad_(False)  # type: ignore[arg-type]


def images(rows: int, channels: int, height: int, width: int) -> torch.Tensor:
    return torch.randn(rows, channels, height, width, generator=torch.Generator().manual_seed(1)).relu()


def own_work(layer: WinogradConv2d, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test fail that would only compare the convolution with itself."""

    def refuse(x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the convolution was asked")

    monkeypatch.setattr(layer.convolution, "forward", refuse)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("height", "width"), [(28, 28), (14, 14), (16, 24), (15, 28), (31, 13)])
@pytest.mark.parametrize(("channels", "made"), [(128, 128), (128, 160), (160, 128)])
def test_it_computes_what_the_convolution_does(
    channels: int, made: int, height: int, width: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct = convolution(channels, made, bias=bias)
    x = images(11, channels, height, width)  # rows that do not divide into the pieces of work
    expected = direct.double()(x.double())
    layer = WinogradConv2d(direct.float())
    own_work(layer, monkeypatch)
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        found = layer(given)
        assert found.shape == expected.shape
        assert found.dtype == torch.float32
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("rows", [2, 3, 40])
def test_no_row_depends_on_another(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = WinogradConv2d(convolution()), images(40, 128, 28, 28)
    own_work(layer, monkeypatch)
    expected = layer(x)
    x[rows:] = torch.nan
    assert (layer(x)[:rows] - expected[:rows]).abs().max() == 0
    assert torch.allclose(layer(x[:rows]), expected[:rows], atol=1e-5)


@pytest.mark.parametrize(("rows", "side"), [(8, 7), (8, 2), (8, 1), (1, 14)])
def test_where_it_does_not_pay_the_convolution_works(rows: int, side: int) -> None:
    direct = convolution()
    x = images(rows, 128, side, side)
    assert torch.equal(WinogradConv2d(direct)(x), direct(x))


def test_with_several_threads_the_convolution_works() -> None:
    direct, x = convolution(), images(4, 128, 28, 28)
    torch.set_num_threads(2)
    assert torch.equal(WinogradConv2d(direct)(x), direct(x))


def test_in_reduced_precision_the_convolution_works() -> None:
    direct, x = convolution(), images(4, 128, 28, 28)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(WinogradConv2d(direct)(x), direct(x))


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2},
        {"padding": 0},
        {"padding": 2, "dilation": 2},
        {"groups": 2},
        {"padding_mode": "reflect"},
        {"made": 64},
        {"dtype": torch.bfloat16},
    ],
)
def test_layers_of_another_kind_are_left_alone(options: dict[str, object]) -> None:
    assert not WinogradConv2d.suits(convolution(**options))  # type: ignore[arg-type]


def test_layers_on_another_device_are_left_alone() -> None:
    assert WinogradConv2d.suits(convolution())
    assert not WinogradConv2d.suits(convolution().to("meta"))
    assert not WinogradConv2d.suits(nn.Linear(128, 128))
