"""The network: construction and initial weights. Its stages are in `sentinode.encoders`."""

import contextlib
import re
import struct
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torchvision import models
from torchvision.models.vision_transformer import interpolate_embeddings

from sentinode.encoder_names import TIMM_PREFIX, check_arch, check_input_size
from sentinode.encoders import head_names
from sentinode.encoders import set_unfreeze_depth as set_unfreeze_depth
from sentinode.encoders import train_mode as train_mode
from sentinode.errors import ConfigError, UsageError
from sentinode.locations import Location, locate
from sentinode.storage import sha256_file, temporary_folder
from sentinode.timm_encoders import timm_model

# Names of weights in torchvision's own files that have changed since, by class: pattern and what to put for it.
_OLD_NAMES = {
    models.DenseNet: ((r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2"),),
    models.VisionTransformer: ((r"\.mlp\.linear_1\.", ".mlp.0."), (r"\.mlp\.linear_2\.", ".mlp.3.")),
}
# Auxiliary heads, which only the original training needed.
_UNUSED = {models.GoogLeNet: ("aux1.", "aux2."), models.Inception3: ("AuxLogits.",)}

# What torch's unpickler raises on damaged files, by fuzzing; there is no common base class.
_DAMAGE = (
    OSError,
    SafetensorError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    struct.error,
)


def build_model(arch: str, *, weights: str = "none", num_classes: int = 2, input_size_px: int = 224) -> nn.Module:
    """Build a network whose forward maps float (n, 3, side, side), normalised, to logits (n, num_classes).

    Parameters
    ----------
    arch : str
        A classifier of torchvision by its name there ("resnet34"), or one of timm's as "timm:NAME". State dicts have their names.
    weights : str
        "none" (random, from torch's global generator), "imagenet" (torchvision's DEFAULT weights of this network, or timm's, downloaded once
        into the cache of torch or of Hugging Face), or the path or file:// URI of a .safetensors file, of a .pth state dict (read with
        weights_only=True) or of a bundle folder.
    num_classes : int
        Outputs of the head. A stored head of another size is replaced by a random one.
    input_size_px : int
        Side of the images. Networks that learn a vector for each position get as many of them; stored ones are interpolated.

    Raises
    ------
    ConfigError
        Unknown architecture, or one that does not take images of this size.
    UsageError
        The weights cannot be had or do not fit the architecture, or timm is not installed.
    """
    try:
        check_arch(arch)
        check_input_size(arch, input_size_px)
    except ValueError as error:
        raise ConfigError(str(error) if str(error).startswith("input_size_px") else f"arch: {error}") from None
    if arch.startswith(TIMM_PREFIX):
        model = timm_model(arch, imagenet=weights == "imagenet", num_classes=num_classes, input_size_px=input_size_px)
    else:
        model = _torchvision_model(arch, num_classes, input_size_px)
    if weights == "none" or (weights == "imagenet" and arch.startswith(TIMM_PREFIX)):
        return model
    if weights == "imagenet":
        _load_trunk(model, _read_state(_imagenet_file(_imagenet_url(arch)), weights), weights)
        return model
    with _on_disk(locate(weights)) as path:
        _load_trunk(model, _read_state(path, weights), weights)
    return model


def initial_state(arch: str, weights: str, *, num_classes: int = 2, input_size_px: int = 224) -> dict[str, torch.Tensor]:
    """Return the state dict of `build_model` with the same arguments, raising like it.

    One process reads the weights and hands these tensors to others, which build the network with weights "none" and load them: no other
    machine needs the file, and all have the same random head.
    """
    return state_for_storage(build_model(arch, weights=weights, num_classes=num_classes, input_size_px=input_size_px))


def _torchvision_model(arch: str, num_classes: int, input_size_px: int) -> nn.Module:
    options: dict[str, Any] = {"num_classes": num_classes}
    if arch.startswith("vit_"):
        options["image_size"] = input_size_px
    elif arch == "maxvit_t":
        options["input_size"] = (input_size_px, input_size_px)
    elif arch in ("googlenet", "inception_v3"):
        # torchvision scales the input for its own weights alone; here a network is the same whatever it was loaded from.
        options |= {"aux_logits": False, "transform_input": True, "init_weights": True}
    elif arch.startswith("mnasnet"):
        return _MNASNet(float(arch.removeprefix("mnasnet").replace("_", ".")), **options)
    return models.get_model_builder(arch)(weights=None, **options)  # type: ignore[no-any-return]


class _MNASNet(models.MNASNet):  # type: ignore[misc]
    """MNASNet refuses a state dict whose version is not noted in it; tensors that were stored have no such notes."""

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: dict[str, Any], *rest: Any) -> None:
        super()._load_from_state_dict(state, prefix, {"version": self._version} | metadata, *rest)


def _imagenet_url(arch: str) -> str:
    """Where torchvision keeps the weights that it calls DEFAULT: the best ones that it has for a network."""
    return str(models.get_model_weights(arch).DEFAULT.url)


def _imagenet_file(url: str) -> Path:
    """Return the file that holds torchvision's weights in torch's cache, downloaded if it is not there."""
    path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[-1])
    # torchvision puts the first digits of the file's SHA-256 into its name.
    sha256_prefix = path.stem.rsplit("-", 1)[-1]
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), sha256_prefix, progress=False)
        except (OSError, HTTPException, RuntimeError) as error:
            raise UsageError(
                f"weights imagenet: {path.name} is neither cached in {path.parent} nor downloadable ({error}); "
                "put the file there, or set weights to a file, a bundle or none"
            ) from error
    if not sha256_file(path).startswith(sha256_prefix):
        raise UsageError(f"weights imagenet: {path} is damaged, its sha256 does not begin with {sha256_prefix}; delete it")
    return path


@contextlib.contextmanager
def _on_disk(weights: Location) -> Iterator[Path]:
    """Yield the path of weights: a file or a bundle; for those in an object store of a copy, which does not outlive the block."""
    if weights.is_local:
        yield weights.local
        return
    file = weights / "model.safetensors" if weights.is_dir() else weights
    with TemporaryDirectory(prefix="weights-", dir=temporary_folder()) as folder:
        path = Path(folder, file.name)
        try:
            # What is not there is told by who reads it, as for a file on disk.
            with contextlib.suppress(FileNotFoundError):
                file.get_file(path)
        except OSError as error:
            raise UsageError(f"weights {weights}: cannot be read ({error.strerror or error})") from error
        yield path


def _read_state(path: Path, source: str) -> dict[str, torch.Tensor]:
    if path.is_dir():
        path = path / "model.safetensors"
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UsageError(
            f"weights {source}: no such file; expected imagenet, none, a .safetensors or .pth file, or a bundle (no ensemble)"
        ) from error
    except UnpicklingError as error:
        raise UsageError(f"weights {source}: refused, the file is damaged or holds more than tensors") from error
    except _DAMAGE as error:
        reason = (str(error) or "empty").splitlines()[0]
        raise UsageError(f"weights {source}: cannot be read ({type(error).__name__}: {reason})") from error
    if not isinstance(state, dict) or not all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()):
        raise UsageError(f"weights {source}: expected a state dict, a mapping of names to tensors")
    return state


def _load_trunk(model: nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    """Load everything that fits; a head of another size stays random, anything else that does not fit is an error."""
    own = model.state_dict()
    state = _as_of_today(model, state)
    may_differ = head_names(model)
    usable = {name: value for name, value in state.items() if name not in may_differ or value.shape == own[name].shape}
    wrong = sorted(name for name in usable if name not in own or usable[name].shape != own[name].shape)
    # Files older than torch 0.4.1 do not count batches, and nothing here uses the count.
    missing = sorted(name for name in own if name not in usable and name not in may_differ and not name.endswith(".num_batches_tracked"))
    if wrong or missing:
        what = f"{wrong[0]} does not fit" if wrong else f"{missing[0]} is missing"
        raise UsageError(f"weights {source}: made for another architecture ({what})")
    try:
        model.load_state_dict(usable, strict=False)
    except RuntimeError as error:
        raise UsageError(f"weights {source}: some tensors cannot be copied, sparse or quantised ones for instance") from error


def _as_of_today(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a state dict under the names that the network has now, without auxiliary heads, and with as many positions as it has."""
    renamed = {}
    for name, value in state.items():
        for pattern, replacement in _OLD_NAMES.get(type(model), ()):
            name = re.sub(pattern, replacement, name)
        if not name.startswith(_UNUSED.get(type(model), ())):
            renamed[name] = value
    positions = renamed.get("encoder.pos_embedding")
    if isinstance(model, models.VisionTransformer) and positions is not None and positions.ndim == 3 and len(positions) == 1:
        with contextlib.suppress(ValueError):  # positions that are no square: they do not fit, which is said later
            return interpolate_embeddings(model.image_size, model.patch_size, renamed)  # type: ignore[no-any-return]
    return renamed


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return (all parameters, parameters that train)."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)


def state_for_storage(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights as contiguous CPU tensors, names as torchvision's."""
    return {name: value.detach().to("cpu").contiguous() for name, value in model.state_dict().items()}
