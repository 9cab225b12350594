"""A bundle at work: patches in, decisions out. The same object evaluates, predicts and serves."""

from pathlib import Path
from typing import get_args

import numpy as np
import numpy.typing as npt
from torch import nn

from sentinode.bundle import Bundle
from sentinode.colour import channel_sums, outside_colours
from sentinode.config import Engine
from sentinode.engines import choose_engine, load_engine
from sentinode.errors import ManifestError, PatchError, PatchErrorCode, UsageError
from sentinode.explain import EnsembleExplainer, Explainer
from sentinode.images import UInt8Array
from sentinode.inference import network_logits
from sentinode.locations import Location
from sentinode.manifests import BundleManifest
from sentinode.model import build_model
from sentinode.probability import Decision, calibrated_logit, decide
from sentinode.tissue import is_pale


class Predictor:
    """A loaded bundle.

    Attributes
    ----------
    manifest : BundleManifest
    engine : str
        What runs the network, or all members of an ensemble (`sentinode.engines`); "torch" or one of those in the bundle, never "auto".
    device : str
        "cpu" or "cuda".
    """

    def __init__(self, bundle: Bundle, *, engine: str = "auto", device: str = "cpu") -> None:
        if engine not in get_args(Engine):
            raise UsageError(f"engine {engine}: expected one of {', '.join(get_args(Engine))}")
        self.manifest: BundleManifest = bundle.manifest
        self.device = device
        self.engine = choose_engine(bundle, engine, device)
        self._networks = [_Network(network, self.engine, device) for network in bundle.networks()]

    @classmethod
    def load(cls, bundle: str | Path | Location, *, engine: str = "auto", device: str = "cpu") -> "Predictor":
        """Open, verify and load a bundle; raises like `Bundle.open`."""
        return cls(Bundle.open(bundle), engine=engine, device=device)

    def logits(self, patches: UInt8Array, batch_size: int = 256) -> npt.NDArray[np.float32]:
        """Return z1 - z0; of an ensemble the mean of its members' calibrated logits.

        Parameters
        ----------
        patches : ndarray of uint8, shape (n, patch_size_px, patch_size_px, 3), RGB
        batch_size : int
            Patches per forward pass.

        Returns
        -------
        ndarray of float32, shape (n,)

        Raises
        ------
        PatchError
            The patches have another shape or dtype than the bundle accepts.
        """
        side = self.manifest.patch_size_px
        if patches.dtype != np.uint8 or patches.shape[1:] != (side, side, 3):
            raise PatchError(
                PatchErrorCode.WRONG_SIZE, f"got {patches.dtype} patches of shape {patches.shape[1:]}; expected uint8 ({side}, {side}, 3)"
            )
        logits = [network.logits(patches, batch_size) for network in self._networks]
        if not self.manifest.members:
            return logits[0]
        calibrated = [
            calibrated_logit(each, network.manifest.temperature, network.manifest.bias) for each, network in zip(logits, self._networks, strict=True)
        ]
        mean: npt.NDArray[np.float32] = np.mean(calibrated, axis=0).astype(np.float32)
        return mean

    def unusual(self, patches: UInt8Array) -> npt.NDArray[np.bool_]:
        """Tell which patches, uint8 (n, side, side, 3), RGB, have colours unlike those that the bundle was validated on; bool (n,)."""
        reference, side = self.manifest.reference, self.manifest.patch_size_px
        return outside_colours(channel_sums(patches)[0], side * side, reference.patch_colour_low, reference.patch_colour_high)

    def explainer(self) -> Explainer | EnsembleExplainer:
        """Return Grad-CAM of the torch networks, whatever engine runs them; raises UsageError where there is none for their kind."""
        explainers = [network.explainer() for network in self._networks]
        return EnsembleExplainer(explainers) if self.manifest.members else explainers[0]

    def decide(self, patches: UInt8Array, batch_size: int = 256) -> list[Decision]:
        """Return one Decision per patch, in order; parameters and errors as for `logits`."""
        manifest = self.manifest
        return decide(
            self.logits(patches, batch_size),
            temperature=manifest.temperature,
            bias=manifest.bias,
            threshold=manifest.threshold,
            review=manifest.review,
            pale=is_pale(patches),
            unusual=self.unusual(patches),
        )


class _Network:
    """One loaded network: that of a bundle, or of a member."""

    def __init__(self, bundle: Bundle, engine: str, device: str) -> None:
        self.manifest = bundle.manifest
        self._device = device
        self._model = load_network(bundle).to(device)
        self._run = load_engine(bundle, engine, self._model)

    def logits(self, patches: UInt8Array, batch_size: int) -> npt.NDArray[np.float32]:
        manifest = self.manifest
        return network_logits(
            self._run,
            patches,
            input_size_px=manifest.input_size_px,
            mean=manifest.mean,
            std=manifest.std,
            tta=manifest.tta,
            batch_size=batch_size,
            device=self._device,
        )

    def unusual(self, patches: UInt8Array) -> npt.NDArray[np.bool_]:
        """Tell which patches, uint8 (n, side, side, 3), RGB, have colours unlike those that the bundle was validated on; bool (n,)."""
        reference, side = self.manifest.reference, self.manifest.patch_size_px
        return outside_colours(channel_sums(patches)[0], side * side, reference.patch_colour_low, reference.patch_colour_high)

    def explainer(self) -> Explainer:
        manifest = self.manifest
        return Explainer(self._model, input_size_px=manifest.input_size_px, mean=manifest.mean, std=manifest.std)


def load_network(bundle: Bundle) -> nn.Module:
    """Return the network of a bundle that holds weights, on the CPU, in eval mode.

    Raises
    ------
    ManifestError
        The weights changed since the bundle was opened, or are those of another architecture.
    """
    manifest = bundle.manifest
    model = build_model(manifest.arch, weights="none", input_size_px=manifest.input_size_px)
    try:
        model.load_state_dict(bundle.read_weights())
    except RuntimeError as error:
        raise ManifestError(f"{bundle.where}: its weights are not those of a {manifest.arch}") from error
    return model.eval()
