"""Haematoxylin and eosin: colours as amounts of stain, and augmentation there."""

import torch

# Absorbance of haematoxylin, eosin and DAB in R, G, B, each of length 1. Source: Ruifrok & Johnston, Quantification of histochemical staining by
# color deconvolution, Anal Quant Cytol Histol 23:291-299 (2001). Tissue stained with H&E has no DAB: the third is what the first two leave over.
RGB_OF_STAINS = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))
# Its inverse, written out: torch.linalg.inv costs a synchronisation on a GPU. Rows R, G, B, columns the stains.
STAINS_OF_RGB = (
    (1.8779827368521353, -1.0076786862855645, -0.5561158181996246),
    (-0.06590806222356332, 1.1347303724996625, -0.1355217986283712),
    (-0.6019073634392891, -0.4804141884970579, 1.5735880719641926),
)
_FLOOR = 1 / 255
# Mean optical density below which a pixel counts as glass. Source: Macenko et al., A method for normalizing histology slides, ISBI 2009 (beta).
_GLASS_DENSITY = 0.15


def optical_density(batch: torch.Tensor) -> torch.Tensor:
    """Return -ln(intensity) of float patches 0..1; 0 is clear glass, and what is darker than 1/255 counts as that."""
    return batch.clamp(min=_FLOOR).log_().neg_()


def jitter_stains(batch: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Scale and shift the amount of each stain.

    Source: Tellez et al., Whole-slide mitosis detection in H&E breast histology using PHH3 as a reference to train distilled stain-invariant
    convolutional networks, IEEE TMI 37:2126-2136 (2018). Differently from there the shift fades where there is no tissue (optical density below
    0.15), so that glass stays as it is.

    Parameters
    ----------
    batch : float tensor, shape (n, 3, h, w), 0..1, RGB
    scale : float tensor, shape (n, 3)
        Factors of haematoxylin, eosin and residual; 1 changes nothing.
    shift : float tensor, shape (n, 3)
        What is added to each, in units of optical density; 0 changes nothing.

    Returns
    -------
    float tensor of the same shape, 0..1
    """
    stains = batch.new_tensor(RGB_OF_STAINS)
    # Density' - density, as a matrix on the density: pixels are multiplied by exp(-that), so that no change is none to the last bit, black included.
    change = batch.new_tensor(STAINS_OF_RGB) @ ((scale - 1).unsqueeze(2) * stains)
    density = optical_density(batch)
    tissue = (density.mean(1, keepdim=True) / _GLASS_DENSITY).clamp_(max=1)
    delta = torch.einsum("nij,nihw->njhw", change, density) + tissue * (shift @ stains)[:, :, None, None]
    return delta.neg_().exp_().mul_(batch).clamp_(max=1)
