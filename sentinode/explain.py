"""Where a network looked: Grad-CAM of the difference between both logits."""

import importlib
import os
import sys
from tempfile import TemporaryDirectory
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from sentinode.config import Rgb
from sentinode.encoders import stages_of
from sentinode.errors import UsageError
from sentinode.images import UInt8Array
from sentinode.preprocess import network_input

SMALLEST_MAP = 6
"""Rows and columns that a map has at least: ResNet's last stage has 3 x 3 at 96 px, which says no more than left or right."""

_STAGES = ("the stem", "stage 1", "stage 2", "stage 3", "stage 4")


class Explainer:
    """Grad-CAM (Selvaraju et al. 2017) of one network, at the deepest stage whose map is at least 6 x 6.

    Parameters
    ----------
    model : nn.Module
        What `build_model` returns, in eval mode.
    input_size_px, mean, std
        Of the bundle.

    Attributes
    ----------
    layer : str
        Name of the stage and size of its map, for people.

    Raises
    ------
    UsageError
        No stage of the network has such a map with places in it, as none of a ViT has.
    """

    def __init__(self, model: nn.Module, *, input_size_px: int, mean: Rgb, std: Rgb) -> None:
        self._network = nn.Sequential(*stages_of(model)).eval()
        self._size_px, self._mean, self._std = input_size_px, mean, std
        self._device = next(model.parameters()).device
        self._stage, side = _deepest_map(self._network, input_size_px, self._device)
        self.layer = f"{_STAGES[self._stage]} ({side} x {side})"

    def maps(self, patches: UInt8Array) -> npt.NDArray[np.float32]:
        """Return what speaks for Metastatic in each patch.

        Parameters
        ----------
        patches : ndarray of uint8, shape (n, side, side, 3), RGB

        Returns
        -------
        ndarray of float32, shape (n, side, side), 0..1
            Each scaled to its own largest value; 0 everywhere where nothing does. Interpolated from the stage's map.
        """
        grad_cam_class = _grad_cam().GradCAM
        result = np.zeros(patches.shape[:3], np.float32)
        with grad_cam_class(model=self._network, target_layers=[self._network[self._stage]]) as grad_cam:
            for number, patch in enumerate(patches):
                inputs = network_input(torch.tensor(patch[np.newaxis], device=self._device), self._size_px, self._mean, self._std)
                heat = torch.from_numpy(grad_cam(input_tensor=inputs, targets=[_metastatic]))
                result[number] = nn.functional.interpolate(heat[None].float(), size=patch.shape[:2], mode="bilinear", antialias=True)[0, 0].numpy()
        return result


class EnsembleExplainer:
    """The mean of several networks' maps.

    Attributes
    ----------
    layer : str
        Stage and size of each kind of map, for people.
    """

    def __init__(self, explainers: list[Explainer]) -> None:
        self._explainers = explainers
        self.layer = ", ".join(dict.fromkeys(explainer.layer for explainer in explainers))

    def maps(self, patches: UInt8Array) -> npt.NDArray[np.float32]:
        """Return the mean of the networks' maps, scaled to its own largest value; parameters and result as for `Explainer.maps`."""
        mean = np.mean([explainer.maps(patches) for explainer in self._explainers], axis=0, dtype=np.float32)
        largest = mean.max(axis=(1, 2), keepdims=True)
        scaled: npt.NDArray[np.float32] = np.divide(mean, largest, out=np.zeros_like(mean), where=largest > 0)
        return scaled


def overlay(patch: UInt8Array, heat: npt.NDArray[np.float32], opacity: float = 0.4) -> UInt8Array:
    """Return a patch, uint8 (h, w, 3), RGB, under its map, float32 (h, w), 0..1: red where the map is high, blue where it is low.

    `opacity`: of the map, 0..1; 0 shows the patch alone, 1 the map alone.
    """
    _grad_cam()
    from pytorch_grad_cam.utils.image import show_cam_on_image

    shown: UInt8Array = show_cam_on_image(patch.astype(np.float32) / 255, heat, use_rgb=True, image_weight=1 - opacity)
    return shown


def _grad_cam() -> ModuleType:
    """Import pytorch-grad-cam, when it is needed; what matplotlib, which comes with it, keeps in the home folder goes into a temporary one."""
    if "matplotlib" in sys.modules or "MPLCONFIGDIR" in os.environ:
        return importlib.import_module("pytorch_grad_cam")
    with TemporaryDirectory(prefix="sentinode-") as folder:
        os.environ["MPLCONFIGDIR"] = folder
        try:
            return importlib.import_module("pytorch_grad_cam")
        finally:
            del os.environ["MPLCONFIGDIR"]


def _metastatic(z: torch.Tensor) -> torch.Tensor:
    return z[1] - z[0]


@torch.no_grad()
def _deepest_map(network: nn.Sequential, input_size_px: int, device: torch.device) -> tuple[int, int]:
    """Return the last stage before the head whose output is (n, c, k, k) with k of at least SMALLEST_MAP, and k."""
    found = None
    features = torch.zeros(1, 3, input_size_px, input_size_px, device=device)
    for number, stage in enumerate(list(network)[: len(_STAGES)]):
        features = stage(features)
        # Swin's maps have their channels last, which Grad-CAM would take for rows.
        if features.ndim == 4 and features.shape[2] == features.shape[3] >= SMALLEST_MAP:
            found = number, int(features.shape[3])
    if found is None:
        raise UsageError(f"no stage of this network has a map of {SMALLEST_MAP} x {SMALLEST_MAP} or more at {input_size_px} px: Grad-CAM needs one")
    return found
