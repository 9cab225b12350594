import pytest

from sentinode.flops import gflops_per_patch


def test_a_resnet18_is_as_much_work_as_is_published() -> None:
    # torchvision's documentation: 1.814 billion multiply-adds at 224 px with 1,000 classes; the head of two saves half a million of them.
    assert gflops_per_patch("resnet18", 224) == pytest.approx(2 * 1.814, rel=0.005)


def test_views_multiply_the_work_and_smaller_inputs_lessen_it() -> None:
    one = gflops_per_patch("resnet18", 96)
    assert gflops_per_patch("resnet18", 96, tta=4) == pytest.approx(4 * one)
    assert one == pytest.approx(gflops_per_patch("resnet18", 224) * (96 / 224) ** 2, rel=0.01)
