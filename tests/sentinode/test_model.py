"""The network: what trains, what is frozen, and where its initial weights may come from."""

import hashlib
import pickle
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from sentinode import model as model_module
from sentinode.encoder_names import TORCHVISION_NAMES
from sentinode.encoders import head_names, set_unfreeze_depth, train_mode
from sentinode.errors import ConfigError, UsageError
from sentinode.locations import locate
from sentinode.model import build_model, count_parameters, initial_state, state_for_storage
from sentinode.publishing import upload_folder
from tests.factories import make_bundle

STAGES = (("fc",), ("layer4",), ("layer3",), ("layer2",), ("layer1",), ("conv1", "bn1"))
"""Modules of a torchvision ResNet that `unfreeze_depth` d adds at index d, from the head to the stem."""


@pytest.fixture(scope="module")
def trained() -> dict[str, torch.Tensor]:
    """The state of a ResNet-18 that no default initialisation gives."""
    torch.manual_seed(5)
    return {name: value * 1.5 + 1 if value.is_floating_point() else value + 3 for name, value in build_model("resnet18").state_dict().items()}


def refusal(weights: str | Path) -> str:
    with pytest.raises(UsageError) as caught:
        build_model("resnet18", weights=str(weights))
    message = str(caught.value)
    assert "\n" not in message
    return message


def assert_same(model: nn.Module, state: dict[str, torch.Tensor], but: tuple[str, ...] = ()) -> None:
    for name, value in model.state_dict().items():
        if name not in but:
            assert torch.equal(value, state[name]), name


@pytest.mark.parametrize(("depth", "trainable"), [(0, 1_026), (1, 13_115_394), (5, 21_285_698)])
def test_resnet34_trains_the_documented_number_of_parameters(depth: int, trainable: int) -> None:
    with torch.device("meta"):
        model = build_model("resnet34")
    set_unfreeze_depth(model, depth)
    assert count_parameters(model) == (21_285_698, trainable)


def test_each_depth_adds_one_stage_until_everything_trains() -> None:
    model = build_model("resnet18")
    for depth in range(6):
        set_unfreeze_depth(model, depth)
        training = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert training == {name for stage in STAGES[: depth + 1] for name in stage}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_depths_may_be_set_in_any_order_and_again() -> None:
    model, fresh = build_model("resnet18"), build_model("resnet18")
    for depth in (5, 0, 3, 3, 1, 4, 2):
        set_unfreeze_depth(model, depth)
        set_unfreeze_depth(fresh, depth)
        set_unfreeze_depth(fresh, depth)
        assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in fresh.parameters()]
        fresh = build_model("resnet18")


@pytest.mark.parametrize("depth", [-1, 6])
def test_a_depth_that_does_not_exist_is_refused(depth: int) -> None:
    with pytest.raises(ConfigError, match=f"unfreeze_depth: got {depth}, expected 0 to 5"):
        set_unfreeze_depth(build_model("resnet18"), depth)


@pytest.mark.parametrize("depth", [0, 1, 3, 5])
def test_statistics_of_frozen_stages_do_not_drift_while_those_that_train_do(depth: int) -> None:
    torch.manual_seed(0)
    model = build_model("resnet18")
    set_unfreeze_depth(model, depth)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.eval()
    train_mode(model)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(2):
        optimiser.zero_grad()
        model(torch.randn(4, 3, 32, 32) * 3 + 1).square().sum().backward()
        optimiser.step()
    thawed = tuple(f"{name}." for stage in STAGES[: depth + 1] for name in stage)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith(thawed), name


def test_random_weights_follow_torchs_seed() -> None:
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(build_model("resnet18").state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["conv1.weight"], states[2]["conv1.weight"])


@pytest.mark.parametrize("num_classes", [2, 5])
def test_the_network_gives_one_logit_per_class(num_classes: int) -> None:
    model = build_model("resnet18", num_classes=num_classes).eval()
    with torch.inference_mode():
        z = model(torch.randn(3, 3, 32, 32))
    assert z.shape == (3, num_classes)
    assert (z.sum(1) - 1).abs().min() > 1e-6, "these are probabilities"


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^arch: got 'resnet43', expected a classifier of torchvision.*or timm:NAME; did you mean resnet34\?$"):
        build_model("resnet43")


def test_weights_come_from_safetensors_and_from_a_state_dict(tmp_path: Path, trained: dict[str, torch.Tensor]) -> None:
    save_file(trained, tmp_path / "w.safetensors")
    torch.save(trained, tmp_path / "w.pth")
    for weights in (str(tmp_path / "w.safetensors"), str(tmp_path / "w.pth"), (tmp_path / "w.pth").as_uri()):
        assert_same(build_model("resnet18", weights=weights), trained)


def test_weights_come_from_a_bundle(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", seed=9)
    assert_same(build_model("resnet18", weights=str(bundle.path)), bundle.read_weights())


@pytest.mark.parametrize("new_format", [True, False])
def test_files_from_before_torch_counted_batches_are_read(tmp_path: Path, trained: dict[str, torch.Tensor], new_format: bool) -> None:
    old = {name: value for name, value in trained.items() if not name.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "w.pth", _use_new_zipfile_serialization=new_format)
    model = build_model("resnet18", weights=str(tmp_path / "w.pth"))
    assert_same(model, trained, but=tuple(trained.keys() - old.keys()))


def test_a_head_for_other_classes_is_replaced_by_a_random_one(tmp_path: Path, trained: dict[str, torch.Tensor]) -> None:
    thousand = trained | {"fc.weight": torch.ones(1000, 512), "fc.bias": torch.ones(1000)}
    save_file(thousand, tmp_path / "w.safetensors")
    torch.manual_seed(3)
    model = build_model("resnet18", weights=str(tmp_path / "w.safetensors"))
    assert_same(model, trained, but=("fc.weight", "fc.bias"))
    torch.manual_seed(3)
    assert_same(model, build_model("resnet18").state_dict(), but=tuple(name for name in trained if not name.startswith("fc.")))


def test_weights_without_a_head_are_enough(tmp_path: Path, trained: dict[str, torch.Tensor]) -> None:
    save_file({name: value for name, value in trained.items() if not name.startswith("fc.")}, tmp_path / "w.safetensors")
    assert_same(build_model("resnet18", weights=str(tmp_path / "w.safetensors")), trained, but=("fc.weight", "fc.bias"))


def test_weights_of_another_architecture_are_refused(tmp_path: Path, trained: dict[str, torch.Tensor]) -> None:
    with torch.device("meta"):
        larger = build_model("resnet34").state_dict()
    torch.save({name: torch.zeros(value.shape, dtype=value.dtype) for name, value in larger.items()}, tmp_path / "34.pth")
    assert "made for another architecture (layer1.2.bn1.bias does not fit)" in refusal(tmp_path / "34.pth")
    save_file({name: value for name, value in trained.items() if name != "layer2.0.conv1.weight"}, tmp_path / "part.safetensors")
    assert "made for another architecture (layer2.0.conv1.weight is missing)" in refusal(tmp_path / "part.safetensors")
    save_file({f"module.{name}": value for name, value in trained.items()}, tmp_path / "ddp.safetensors")
    assert "module.bn1.bias does not fit" in refusal(tmp_path / "ddp.safetensors")


@pytest.mark.parametrize(
    ("arch", "side"),
    [
        *(("squeezenet1_1", 32), ("densenet121", 32), ("googlenet", 32), ("mnasnet0_5", 32), ("mobilenet_v2", 32), ("mobilenet_v3_small", 32)),
        *(("regnet_x_400mf", 32), ("shufflenet_v2_x0_5", 32), ("efficientnet_b0", 32), ("convnext_tiny", 32), ("swin_t", 32)),
        *(("inception_v3", 75), ("maxvit_t", 224), ("vit_b_32", 32), ("alexnet", 63)),
    ],
)
def test_each_family_takes_its_weights_but_for_a_head_of_another_size(arch: str, side: int) -> None:
    torch.manual_seed(1)
    stored = build_model(arch, num_classes=3, input_size_px=side).state_dict()
    plain = {name: value + 1 for name, value in stored.items()}  # as read from a file: without the notes on versions
    model = build_model(arch, input_size_px=side)
    model_module._load_trunk(model, dict(plain), "w")
    assert_same(model, plain, but=tuple(head_names(model)))
    assert 0 < len(head_names(model)) <= 2
    with pytest.raises(UsageError, match=r"^weights w: made for another architecture \(\S+ is missing\)$"):
        model_module._load_trunk(model, dict(list(plain.items())[1:]), "w")


def test_a_stored_state_of_each_family_can_be_loaded_back_as_it_is() -> None:
    """MNASNet refuses a state whose version is not noted, which no file of ours notes."""
    model = build_model("mnasnet0_5")
    again = build_model("mnasnet0_5")
    again.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    assert_same(again, model.state_dict())


def test_the_old_names_in_files_of_densenet_are_known() -> None:
    stored = build_model("densenet121").state_dict()
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", name): value + 1 for name, value in stored.items()}
    assert sum(name not in stored for name in old) > 100
    model = build_model("densenet121")
    model_module._load_trunk(model, old, "w")
    assert_same(model, {name: value + 1 for name, value in stored.items()})


def test_the_old_names_in_files_of_vit_are_known_and_positions_are_interpolated() -> None:
    stored = build_model("vit_b_32", input_size_px=96).state_dict()
    grid = torch.arange(9.0).view(3, 3).flatten()
    stored["encoder.pos_embedding"] = torch.cat([torch.tensor([-1.0]), grid]).view(1, 10, 1).expand(-1, -1, 768).clone()
    old = {name.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2."): value for name, value in stored.items()}
    assert sum(name not in stored for name in old) == 48
    model = build_model("vit_b_32", input_size_px=160)
    model_module._load_trunk(model, old, "w")
    assert_same(model, stored, but=("encoder.pos_embedding",))
    positions = model.state_dict()["encoder.pos_embedding"][0, :, 0]
    assert positions[0] == -1, "the class token has no position"
    square = positions[1:].view(5, 5)
    assert torch.allclose(square[::4, ::4], torch.tensor([[0.0, 2.0], [6.0, 8.0]]), atol=1e-5), "corners stay"
    assert torch.allclose(square[2, 2], torch.tensor(4.0), atol=1e-5)
    assert (square.diff(dim=0) > 0).all()
    assert (square.diff(dim=1) > 0).all()


def test_positions_that_are_no_square_do_not_fit() -> None:
    model = build_model("vit_b_32", input_size_px=64)
    state = model.state_dict() | {"encoder.pos_embedding": torch.zeros(1, 8, 768)}
    with pytest.raises(UsageError, match=r"made for another architecture \(encoder.pos_embedding does not fit\)"):
        model_module._load_trunk(model, state, "w")


@pytest.mark.parametrize(("arch", "auxiliary"), [("googlenet", ["aux1.fc1.weight", "aux2.conv.bn.bias"]), ("inception_v3", ["AuxLogits.fc.bias"])])
def test_auxiliary_heads_in_files_are_left_out(arch: str, auxiliary: list[str]) -> None:
    model = build_model(arch)
    state = {name: value + 1 for name, value in model.state_dict().items()}
    model_module._load_trunk(model, state | {name: torch.zeros(1) for name in auxiliary}, "w")
    assert_same(model, state)
    assert isinstance(model.train()(torch.randn(2, 3, 96, 96)), torch.Tensor)


def test_the_inception_networks_scale_their_input_whatever_their_weights() -> None:
    assert all(build_model(arch).transform_input for arch in ("googlenet", "inception_v3"))


def test_the_initial_state_is_what_the_network_is_built_with(tmp_path: Path, trained: dict[str, torch.Tensor]) -> None:
    save_file({name: value for name, value in trained.items() if not name.startswith("fc.")}, tmp_path / "w.safetensors")
    torch.manual_seed(4)
    state = initial_state("resnet18", str(tmp_path / "w.safetensors"))
    torch.manual_seed(4)
    assert_same(build_model("resnet18", weights=str(tmp_path / "w.safetensors")), state)
    other = build_model("resnet18")
    other.load_state_dict(state)
    assert_same(other, state)


class Payload:
    """What runs when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))], ids=["torch", "pickle"])
def test_a_file_with_code_in_it_is_refused_and_nothing_runs(tmp_path: Path, save: Any) -> None:
    save({"conv1.weight": Payload(tmp_path / "ran")}, tmp_path / "w.pth")
    assert "refused, the file is damaged or holds more than tensors" in refusal(tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("weights", ["no/such.pth", "no/such.safetensors", "no/such-bundle", "Imagenet", "empty-folder"])
def test_weights_that_are_not_there_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty-folder").mkdir()
    assert refusal(weights) == f"weights {weights}: no such file; expected imagenet, none, a .safetensors or .pth file, or a bundle (no ensemble)"


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello world", b"\0" * 100, b"PK\x03\x04" + b"\0" * 50, b"\x80\x02}q\x00."])
def test_weights_that_are_something_else_are_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert refusal(tmp_path / name).startswith(f"weights {tmp_path / name}: ")


@pytest.mark.parametrize("content", [[1], {"state_dict": {"a": torch.zeros(1)}}, {0: torch.zeros(1), "a": torch.zeros(1)}])
def test_only_a_mapping_of_names_to_tensors_is_a_state_dict(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "w.pth")
    assert "expected a state dict" in refusal(tmp_path / "w.pth")


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_sparse_tensors_are_one_line(tmp_path: Path, trained: dict[str, torch.Tensor]) -> None:
    torch.save(trained | {"fc.weight": trained["fc.weight"].to_sparse()}, tmp_path / "w.pth")
    assert "cannot be copied" in refusal(tmp_path / "w.pth")


def read_or_refused(path: Path) -> dict[str, torch.Tensor] | str:
    try:
        return model_module._read_state(path, "w")
    except UsageError as error:
        return str(error)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("new_format", [True, False])
def test_damaged_weights_never_end_in_a_traceback(tmp_path: Path, new_format: bool) -> None:
    torch.save({"a": torch.arange(4.0), "b": torch.zeros(2, 2)}, tmp_path / "w.pth", _use_new_zipfile_serialization=new_format)
    data = (tmp_path / "w.pth").read_bytes()
    outcomes = []
    for place in torch.randint(len(data), (200,), generator=torch.Generator().manual_seed(0)).tolist():
        (tmp_path / "d.pth").write_bytes(data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :])
        outcomes.append(read_or_refused(tmp_path / "d.pth"))
        (tmp_path / "d.pth").write_bytes(data[:place])
        outcomes.append(read_or_refused(tmp_path / "d.pth"))
    messages = [outcome for outcome in outcomes if isinstance(outcome, str)]
    assert len(messages) > 200
    assert all(message.startswith("weights w: ") and "\n" not in message for message in messages)


@pytest.fixture
def torch_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of torch's, and no network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return tmp_path / "hub" / "checkpoints"


def pretend_imagenet_file(monkeypatch: pytest.MonkeyPatch, digest: str) -> str:
    """Make torchvision's weights a file whose name carries this digest, as its real files' names do."""
    url = f"https://download.invalid/models/resnet18-{digest[:8]}.pth"
    monkeypatch.setattr(model_module, "_imagenet_url", lambda arch: url)
    return url.rsplit("/", 1)[-1]


def test_imagenet_weights_come_from_torchs_cache(torch_home: Path, monkeypatch: pytest.MonkeyPatch, trained: dict[str, torch.Tensor]) -> None:
    thousand = trained | {"fc.weight": torch.ones(1000, 512), "fc.bias": torch.ones(1000)}
    torch_home.mkdir(parents=True)
    torch.save(thousand, torch_home / "made.pth")
    digest = hashlib.sha256((torch_home / "made.pth").read_bytes()).hexdigest()
    (torch_home / "made.pth").rename(torch_home / pretend_imagenet_file(monkeypatch, digest))
    model = build_model("resnet18", weights="imagenet")
    assert_same(model, trained, but=("fc.weight", "fc.bias"))
    assert model.state_dict()["fc.weight"].shape == (2, 512)


def test_offline_without_the_file_says_where_to_put_it(torch_home: Path) -> None:
    message = refusal("imagenet")
    assert message.startswith(f"weights imagenet: resnet18-f37072fd.pth is neither cached in {torch_home} nor downloadable (")
    assert message.endswith("put the file there, or set weights to a file, a bundle or none")


def test_a_cached_file_that_is_not_the_published_one_is_refused_unread(torch_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch_home.mkdir(parents=True)
    name = pretend_imagenet_file(monkeypatch, "0" * 64)
    torch.save({"conv1.weight": Payload(torch_home / "ran")}, torch_home / name)
    assert "is damaged, its sha256 does not begin with 00000000; delete it" in refusal("imagenet")
    assert not (torch_home / "ran").exists()


@pytest.mark.parametrize("arch", TORCHVISION_NAMES)
def test_torchvisions_names_carry_the_digest_that_is_checked(arch: str) -> None:
    digest = model_module._imagenet_url(arch).rsplit("-", 1)[-1].removesuffix(".pth")
    assert len(digest) >= 8
    assert set(digest) <= set("0123456789abcdef")


def test_stored_weights_are_plain_tensors_on_the_cpu() -> None:
    model = build_model("resnet18").to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    state = state_for_storage(model)
    assert list(state) == list(models.resnet18(num_classes=2).state_dict())
    assert all(value.is_contiguous() and not value.requires_grad and value.device.type == "cpu" for value in state.values())
    assert_same(model, state)


def test_weights_come_from_an_object_store_too(s3_folder: str, tmp_path: Path) -> None:
    state = build_model("resnet18", weights="none").state_dict()
    save_file(state, tmp_path / "own.safetensors")
    (locate(s3_folder) / "own.safetensors").put_file(tmp_path / "own.safetensors")
    loaded = build_model("resnet18", weights=f"{s3_folder}/own.safetensors").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())
    bundle = make_bundle(tmp_path / "bundle")
    upload_folder(bundle.path, locate(s3_folder) / "bundle", "bundle.json")
    again = build_model("resnet18", weights=f"{s3_folder}/bundle").state_dict()
    assert all(torch.equal(again[name], value) for name, value in bundle.read_weights().items())
    with pytest.raises(UsageError, match=rf"weights {s3_folder}/none.pth: no such file"):
        build_model("resnet18", weights=f"{s3_folder}/none.pth")
