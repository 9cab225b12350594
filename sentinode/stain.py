"""Haematoxylin and eosin: colours as amounts of stain, and augmentation there."""

import functools

import torch

# Absorbance of haematoxylin, eosin and DAB in R, G, B, each of length 1. Source: Ruifrok & Johnston, Quantification of histochemical staining by
# color deconvolution, Anal Quant Cytol Histol 23:291-299 (2001). Tissue stained with H&E has no DAB: the third is what the first two leave over.
RGB_OF_STAINS = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))
_FLOOR = 1 / 255
# Mean optical density below which a pixel counts as glass. Source: Macenko et al., A method for normalizing histology slides, ISBI 2009 (beta).
_GLASS_DENSITY = 0.15


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
    stains, inverse = _matrices(batch.device, batch.dtype)
    # The new density less the old one, as a matrix on the old: pixels are multiplied by exp of its negative, so that no change is none to the last
    # bit, black included.
    change = (inverse @ ((scale - 1).unsqueeze(2) * stains)).mT
    density = batch.clamp(min=_FLOOR).log_().neg_()
    red, green, blue = density.unbind(1)
    tissue = (red + green).add_(blue).mul_(1 / (3 * _GLASS_DENSITY)).clamp_(max=1).unsqueeze(1)
    more = torch.bmm(change, density.flatten(2)).view(batch.shape).addcmul_(tissue, (shift @ stains)[:, :, None, None])
    return more.neg_().exp_().mul_(batch).clamp_(max=1)


@functools.lru_cache(maxsize=8)
def _matrices(device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the absorbance of the stains, (3 stains, 3 channels), and its inverse."""
    stains = torch.tensor(RGB_OF_STAINS, dtype=torch.float64)
    return stains.to(device, dtype), torch.linalg.inv(stains).to(device, dtype)
