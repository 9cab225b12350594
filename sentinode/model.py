"""The network: construction and initial weights. Its stages are in `sentinode.encoders`."""

import struct
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torchvision import models

from sentinode.encoders import set_unfreeze_depth as set_unfreeze_depth
from sentinode.encoders import train_mode as train_mode
from sentinode.errors import ConfigError, UsageError
from sentinode.storage import local_path, sha256_file

_ARCHITECTURES = {
    "resnet18": (models.resnet18, models.ResNet18_Weights.IMAGENET1K_V1),
    "resnet34": (models.resnet34, models.ResNet34_Weights.IMAGENET1K_V1),
}

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


def build_model(arch: str, *, weights: str = "none", num_classes: int = 2) -> nn.Module:
    """Build a network whose forward maps float (n, 3, side, side), normalised, to logits (n, num_classes).

    Parameters
    ----------
    arch : str
        "resnet18" or "resnet34".
    weights : str
        "none" (random, from torch's global generator), "imagenet" (torchvision's file, downloaded once into torch's cache), or the path or
        file:// URI of a .safetensors file, of a .pth state dict (read with weights_only=True) or of a bundle folder.
    num_classes : int
        Outputs of the head. A stored head of another size is replaced by a random one.

    Raises
    ------
    ConfigError
        Unknown architecture.
    UsageError
        The weights cannot be had or do not fit the architecture.
    """
    if arch not in _ARCHITECTURES:
        raise ConfigError(f"arch: got {arch!r}, expected one of {', '.join(_ARCHITECTURES)}")
    build, enum = _ARCHITECTURES[arch]
    model: nn.Module = build(weights=None, num_classes=num_classes)
    if weights == "none":
        return model
    _load_trunk(model, _read_state(_imagenet_file(enum.url) if weights == "imagenet" else local_path(weights), weights), weights)
    return model


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


def _read_state(path: Path, source: str) -> dict[str, torch.Tensor]:
    if path.is_dir():
        path = path / "model.safetensors"
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UsageError(f"weights {source}: no such file; expected imagenet, none, a .safetensors or .pth file, or a bundle folder") from error
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
    head = {name for name in own if name.startswith("fc.") and name in state and state[name].shape != own[name].shape}
    usable = {name: value for name, value in state.items() if name not in head}
    wrong = sorted(name for name in usable if name not in own or usable[name].shape != own[name].shape)
    # Files older than torch 0.4.1 do not count batches, and nothing here uses the count.
    missing = sorted(name for name in own if name not in usable and not name.startswith("fc.") and not name.endswith(".num_batches_tracked"))
    if wrong or missing:
        what = f"{wrong[0]} does not fit" if wrong else f"{missing[0]} is missing"
        raise UsageError(f"weights {source}: made for another architecture ({what})")
    try:
        model.load_state_dict(usable, strict=False)
    except RuntimeError as error:
        raise UsageError(f"weights {source}: some tensors cannot be copied, sparse or quantised ones for instance") from error


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return (all parameters, parameters that train)."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)


def state_for_storage(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights as contiguous CPU tensors, names as torchvision's."""
    return {name: value.detach().to("cpu").contiguous() for name, value in model.state_dict().items()}
