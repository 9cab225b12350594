"""JPEG's loss on a batch of patches, on their device: what compressing and decoding leave of the pixels, without the bytes between.

Baseline JPEG as libjpeg does it by default: JFIF colours, chroma at half the resolution (4:2:0), the standard tables scaled by quality.
"""

import functools
import math

import torch
from torch.nn import functional

# ITU-T T.81 (1992), Annex K, tables K.1 (luminance) and K.2 (chrominance), row by row.
LUMINANCE_TABLE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMINANCE_TABLE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
)
# JFIF 1.02: rows Y, Cb, Cr of R, G, B, and back.
_TO_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
_TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136, -0.714136), (1.0, 1.772, 0.0))


def compress(batch: torch.Tensor, quality: torch.Tensor) -> torch.Tensor:
    """Return what is left of patches after JPEG.

    Not differentiable. Sides that are no multiple of 16 are continued by their last pixels meanwhile, as encoders do.

    Parameters
    ----------
    batch : float tensor, shape (n, 3, h, w), 0..1, RGB
        Rounded to 8 bits first.
    quality : float tensor, shape (n,), 1..100, whole numbers
        As in libjpeg, one for each patch.

    Returns
    -------
    float tensor of the same shape, multiples of 1/255 in 0..1
    """
    height, width = batch.shape[-2:]
    pixels = (batch * 255).round_()
    if height % 16 or width % 16:
        pixels = functional.pad(pixels, (0, -width % 16, 0, -height % 16), mode="replicate")
    tables = quantisation_tables(quality)
    # Samples are 8 bits wherever JPEG has them so; here around 0, as its transform wants them.
    planes = _mixed(_TO_YCBCR, pixels)
    planes[:, 0] -= 128
    planes = _samples(planes)
    luminance = _samples(_quantised(planes[:, :1], tables[:, 0]))
    # Means of 2x2, halves going down and up in turns: libjpeg, jcsample.c. Rounding otherwise doubles the mean difference from it.
    sums = planes[:, 1:, ::2] + planes[:, 1:, 1::2]
    sums = sums[..., ::2] + sums[..., 1::2]
    sums[..., ::2] += 1
    sums[..., 1::2] += 2
    chrominance = _samples(_quantised(sums.mul_(0.25).floor_(), tables[:, 1]))
    # Weights 9, 3, 3, 1 of the nearest four: libjpeg's "fancy upsampling".
    chrominance = _samples(functional.interpolate(chrominance, scale_factor=2, mode="bilinear", align_corners=False))
    result = _mixed(_TO_RGB, torch.cat([luminance + 128, chrominance], 1)).round_().clamp_(0, 255).div_(255)
    return result[..., :height, :width]


def quantisation_tables(quality: torch.Tensor) -> torch.Tensor:
    """Return the steps of luminance and chrominance, float (n, 2, 64), whole numbers 1..255, scaled from the standard tables as libjpeg does.

    Source: jcparam.c of libjpeg, jpeg_quality_scaling and jpeg_add_quant_table. `quality`: float (n,), 1..100, whole numbers.
    """
    percent = torch.where(quality < 50, (5000 / quality).floor(), 200 - 2 * quality)
    standard = torch.stack([_constant(table, quality.device, quality.dtype).flatten() for table in (LUMINANCE_TABLE, CHROMINANCE_TABLE)])
    return ((percent[:, None, None] * standard + 50) / 100).floor_().clamp_(1, 255)


def _mixed(matrix: tuple[tuple[float, ...], ...], planes: torch.Tensor) -> torch.Tensor:
    """Return planes (n, 3, h, w) that are weighted sums of the given ones."""
    return (_constant(matrix, planes.device, planes.dtype) @ planes.flatten(2)).view(planes.shape)


def _samples(planes: torch.Tensor) -> torch.Tensor:
    """Round to -128..127, in place."""
    return planes.round_().clamp_(-128, 127)


def _quantised(planes: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Round the cosine transform of each 8x8 block of (n, c, h, w) to multiples of `steps` (n, 64), and transform back."""
    n, c, height, width = planes.shape
    transform = _cosine_transform(planes.device, planes.dtype)
    down, across = height // 8, width // 8
    blocks = planes.reshape(n, c, down, 8, across, 8).transpose(3, 4).reshape(n, c * down * across, 64)
    steps = steps.unsqueeze(1)
    rounded = (blocks @ transform.T).div_(steps).round_().mul_(steps)
    return (rounded @ transform).view(n, c, down, across, 8, 8).transpose(3, 4).reshape(n, c, height, width)


@functools.lru_cache(maxsize=16)
def _constant(rows: tuple[tuple[float, ...], ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(rows, device=device, dtype=dtype)


@functools.lru_cache(maxsize=8)
def _cosine_transform(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return the orthonormal two-dimensional DCT-II of an 8x8 block as a matrix, (64, 64): T.81, A.3.3."""
    position = torch.arange(8, dtype=torch.float64)
    lines = torch.cos((2 * position + 1) * position.unsqueeze(1) * (math.pi / 16)) / 2
    lines[0] /= math.sqrt(2)
    return torch.kron(lines, lines).to(device, dtype)
