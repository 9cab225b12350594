"""Encoders of timm: the same stages, sizes and weights as torchvision's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sentinode.encoders import fast_trunk, head_names, split_at, stages_of
from sentinode.errors import ConfigError, UsageError
from sentinode.model import build_model

timm = pytest.importorskip("timm")

# A small network of each class and each kind of head, and the side that it is tried at.
SMALL = {
    "convnext_atto": 32,
    "efficientnet_lite0": 32,
    "mobilenetv3_small_050": 32,
    "mobilenetv4_conv_small": 32,
    "regnetx_002": 32,
    "resnet18.a1_in1k": 32,
    "swin_tiny_patch4_window7_224": 56,
    "test_convnext": 32,
    "test_resnet": 32,
    "vit_tiny_patch16_224": 48,
    "deit3_small_patch16_224": 48,
    "vit_small_patch14_reg4_dinov2": 56,
}


def refusal(name: str, **options: object) -> str:
    with pytest.raises((ConfigError, UsageError)) as caught:
        build_model(f"timm:{name}", **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("name", "side"), SMALL.items())
def test_stages_in_order_are_the_network(name: str, side: int) -> None:
    torch.manual_seed(0)
    model = build_model(f"timm:{name}", input_size_px=side).eval()
    stages, x = stages_of(model), torch.randn(2, 3, side, side)
    parameters = [id(parameter) for stage in stages for parameter in stage.parameters()]
    assert sorted(parameters) == sorted(id(parameter) for parameter in model.parameters())
    assert all(any(True for _ in stage.parameters()) for stage in stages)
    assert len(head_names(model)) == 2
    trunk, tail = split_at(model, 1)
    assert trunk is not None
    model.eval()
    with torch.no_grad():
        expected = model(x.clone())
        assert expected.std() > 0
        assert torch.equal(tail(trunk(x.clone())), expected)
        features = trunk(x.clone())
        assert (fast_trunk(trunk)(x.clone()) - features).abs().max() <= 1e-4 * features.abs().max()


def test_a_name_that_timm_does_not_have_is_refused() -> None:
    assert refusal("resnet81") == "arch: got 'timm:resnet81', timm has no network of that name; did you mean timm:resnet18?"


def test_a_network_without_known_stages_is_refused() -> None:
    assert refusal("densenet121").startswith("arch timm:densenet121: timm's DenseNet does not fall into known stages; most networks of ConvNeXt, ")
    assert "the parts of this VisionTransformer do not fall into known stages" in refusal("vit_base_patch16_siglip_224")


def test_a_size_that_does_not_fit_is_one_line() -> None:
    assert refusal("test_vit2", input_size_px=100).startswith("input_size_px 100 does not fit arch timm:test_vit2: ")


def test_timm_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert refusal("resnet18") == "arch timm:resnet18: timm is not installed; pip install 'sentinode[timm]'"


def test_weights_come_from_a_file_and_a_head_for_other_classes_is_replaced(tmp_path: Path) -> None:
    stored = build_model("timm:test_resnet", num_classes=7).state_dict()
    save_file(stored, tmp_path / "w.safetensors")
    model = build_model("timm:test_resnet", weights=str(tmp_path / "w.safetensors"))
    for name, value in model.state_dict().items():
        assert torch.equal(value, stored[name]) != (name in head_names(model)), name


def test_imagenet_weights_come_from_hugging_faces_cache_alone_when_offline(tmp_path: Path) -> None:
    """In a process of its own: huggingface_hub reads where its cache is when it is imported."""
    repository, revision = timm.get_pretrained_cfg("test_resnet").hf_hub_id, "0" * 40
    folder = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
    (folder / "snapshots" / revision).mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(revision)
    stored = timm.create_model("test_resnet").state_dict()
    save_file(stored, folder / "snapshots" / revision / "model.safetensors")
    save_file(stored, tmp_path / "stored.safetensors")
    code = (
        "import torch\n"
        "from safetensors.torch import load_file\n"
        "from sentinode.errors import UsageError\n"
        "from sentinode.model import build_model\n"
        "stored = load_file('stored.safetensors')\n"
        "model = build_model('timm:test_resnet', weights='imagenet', input_size_px=64)\n"
        "differ = [name for name, value in model.state_dict().items() if value.shape != stored[name].shape or not torch.equal(value, stored[name])]\n"
        "assert differ == ['fc.weight', 'fc.bias'], differ\n"
        "try:\n"
        "    build_model('timm:test_convnext', weights='imagenet', input_size_px=64)\n"
        "except UsageError as error:\n"
        "    print(error)\n"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    (line,) = run.stdout.splitlines()
    assert line.startswith("weights imagenet: those of timm:test_convnext are neither cached nor downloadable (")
    assert line.endswith("; set weights to a file, a bundle or none")
