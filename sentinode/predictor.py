"""A bundle at work: patches in, decisions out. The same object evaluates, predicts and serves."""

from pathlib import Path
from typing import get_args

import numpy as np
import numpy.typing as npt

from sentinode.bundle import Bundle
from sentinode.config import Engine
from sentinode.engines import load_engine
from sentinode.errors import ManifestError, PatchError, PatchErrorCode, UsageError
from sentinode.explain import Explainer
from sentinode.images import UInt8Array
from sentinode.inference import network_logits
from sentinode.manifests import BundleManifest
from sentinode.model import build_model
from sentinode.probability import Decision, decide
from sentinode.tissue import is_pale


class Predictor:
    """A loaded bundle.

    Attributes
    ----------
    manifest : BundleManifest
    engine : str
        What runs the network (`sentinode.engines`); "torch" or one of those in the bundle, never "auto".
    device : str
        "cpu" or "cuda".
    """

    def __init__(self, bundle: Bundle, *, engine: str = "auto", device: str = "cpu") -> None:
        if engine not in get_args(Engine):
            raise UsageError(f"engine {engine}: expected one of {', '.join(get_args(Engine))}")
        self.manifest: BundleManifest = bundle.manifest
        self.device = device
        self._model = build_model(self.manifest.arch, weights="none", input_size_px=self.manifest.input_size_px)
        try:
            self._model.load_state_dict(bundle.read_weights())
        except RuntimeError as error:
            raise ManifestError(f"{bundle.path}: its weights are not those of a {self.manifest.arch}") from error
        self._model.eval().to(device)
        self.engine, self._run = load_engine(bundle, engine, device, self._model)

    @classmethod
    def load(cls, bundle: str | Path, *, engine: str = "auto", device: str = "cpu") -> "Predictor":
        """Open, verify and load a bundle; raises like `Bundle.open`."""
        return cls(Bundle.open(bundle), engine=engine, device=device)

    def logits(self, patches: UInt8Array, batch_size: int = 256) -> npt.NDArray[np.float32]:
        """Return z1 - z0.

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
        manifest = self.manifest
        return network_logits(
            self._run,
            patches,
            input_size_px=manifest.input_size_px,
            mean=manifest.mean,
            std=manifest.std,
            tta=manifest.tta,
            batch_size=batch_size,
            device=self.device,
        )

    def explainer(self) -> Explainer:
        """Return Grad-CAM of the torch network, whatever engine runs it; raises UsageError where there is none for its kind."""
        manifest = self.manifest
        return Explainer(self._model, input_size_px=manifest.input_size_px, mean=manifest.mean, std=manifest.std)

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
        )
