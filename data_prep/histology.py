"""Drawing lymph-node-like tissue in H&E colours: a bank of nuclei and textures, and fields composed from it.

Not a model of disease. It only has to look enough like the real thing that every stage of the pipeline meets what it will meet: stain variation
between slides, crowded small nuclei, larger pale ones where the label is 1, confusers where it is not, glass, sensor noise.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from sentinode.images import UInt8Array

FloatArray = npt.NDArray[np.float32]

# Optical density per unit of stain in R, G, B (Ruifrok and Johnston's vectors, rounded).
_HAEMATOXYLIN = np.array([0.65, 0.70, 0.29], np.float32)
_EOSIN = np.array([0.10, 0.95, 0.28], np.float32)
_TEXTURE_PX = 512
_MARGIN_PX = 10

NucleusKind = Literal["lymphocyte", "reactive", "stroma", "tumour"]


@dataclass(frozen=True)
class Stain:
    """How one slide was stained and scanned.

    Attributes
    ----------
    haematoxylin, eosin : ndarray of float32, shape (3,)
        Optical density per unit of stain, RGB.
    background : ndarray of float32, shape (3,)
        Colour of glass, RGB, 0..255.
    noise : float
        Standard deviation of the sensor noise, 8-bit steps.
    """

    haematoxylin: FloatArray
    eosin: FloatArray
    background: FloatArray
    noise: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Stain":
        """Draw the stain of one slide."""
        haematoxylin = _HAEMATOXYLIN * rng.normal(1, 0.06, 3) * rng.uniform(0.8, 1.2)
        eosin = _EOSIN * rng.normal(1, 0.06, 3) * rng.uniform(0.75, 1.25)
        background = rng.uniform(232, 248) + rng.normal(0, 2, 3)
        return cls(haematoxylin.astype(np.float32), eosin.astype(np.float32), background.astype(np.float32), float(rng.uniform(2.0, 3.5)))


@dataclass(frozen=True)
class Cluster:
    """A patch of crowded nuclei: centre (y, x) and radius in pixels of the field."""

    kind: Literal["reactive", "tumour"]
    y: float
    x: float
    radius: float


@dataclass(frozen=True)
class Bank:
    """Pre-drawn nuclei per kind, as (coverage 0..1, haematoxylin density) of equal odd sides, and smooth textures in 0..1."""

    nuclei: dict[str, list[tuple[FloatArray, FloatArray]]]
    textures: list[FloatArray]

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Bank":
        """Draw 64 nuclei of each kind and 8 textures."""
        shapes: dict[NucleusKind, tuple[tuple[float, float], tuple[float, float], float, float]] = {
            # radius px, haematoxylin density, roughness of the outline, elongation. 1 px is about 1 um.
            "lymphocyte": ((2.9, 4.0), (1.15, 1.65), 0.05, 1.15),
            "reactive": ((4.0, 5.8), (0.75, 1.25), 0.09, 1.3),
            "stroma": ((2.2, 3.0), (0.9, 1.3), 0.06, 2.8),
            "tumour": ((4.3, 7.2), (0.65, 1.2), 0.14, 1.5),
        }
        nuclei: dict[str, list[tuple[FloatArray, FloatArray]]] = {}
        for kind, (radii, densities, roughness, elongation) in shapes.items():
            nuclei[kind] = [
                _nucleus(rng, rng.uniform(*radii), rng.uniform(*densities), roughness, rng.uniform(1, elongation), kind) for _ in range(64)
            ]
        return cls(nuclei, [_texture(rng, sigma) for sigma in (3, 3, 6, 6, 12, 12, 24, 24)])


def _nucleus(
    rng: np.random.Generator, radius: float, density: float, roughness: float, elongation: float, kind: NucleusKind
) -> tuple[FloatArray, FloatArray]:
    half = int(np.ceil(radius * elongation * 1.4)) + 1
    y, x = np.mgrid[-half : half + 1, -half : half + 1].astype(np.float32)
    turn = rng.uniform(0, 2 * np.pi)
    u, v = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    angle, distance = np.arctan2(v, u / elongation), np.hypot(u / np.sqrt(elongation), v * np.sqrt(elongation))
    outline = radius * (1 + sum(rng.normal(0, roughness / wave) * np.cos(wave * angle + rng.uniform(0, 6.3)) for wave in (2, 3, 4, 5)))
    coverage = np.clip(outline - distance + 0.5, 0, 1)
    chromatin = 1 + ndimage.gaussian_filter(rng.normal(0, 1, coverage.shape), 1.0) * (0.9 if kind in ("tumour", "reactive") else 0.35)
    if kind in ("tumour", "reactive"):  # open chromatin: a dark rim, and a nucleolus or two
        chromatin += 0.35 * np.clip(1 - np.abs(outline - distance - 0.8), 0, 1)
        for _ in range(rng.integers(1, 3) if kind == "tumour" else rng.integers(0, 2)):
            spot = np.hypot(y - rng.normal(0, radius / 3), x - rng.normal(0, radius / 3))
            chromatin += 0.8 * np.clip(1.9 - spot, 0, 1)
    return coverage.astype(np.float32), (density * np.clip(chromatin, 0.3, 2.2)).astype(np.float32)


def _texture(rng: np.random.Generator, sigma: float) -> FloatArray:
    smooth = ndimage.gaussian_filter(rng.normal(0, 1, (_TEXTURE_PX, _TEXTURE_PX)), sigma, mode="wrap")
    scaled: FloatArray = ((smooth - smooth.min()) / (smooth.max() - smooth.min())).astype(np.float32)
    return scaled


def draw_field(
    bank: Bank, rng: np.random.Generator, stain: Stain, height: int, width: int, clusters: list[Cluster]
) -> tuple[UInt8Array, npt.NDArray[np.bool_]]:
    """Draw one field of tissue.

    Parameters
    ----------
    bank : Bank
    rng : numpy.random.Generator
        Decides everything that `clusters` and `stain` do not.
    stain : Stain
    height, width : int
        Size in pixels, at most 512 each.
    clusters : list of Cluster
        Where crowded large nuclei displace the lymphocytes.

    Returns
    -------
    ndarray of uint8, shape (height, width, 3), RGB, and ndarray of bool, shape (height, width)
        The picture, and which of its pixels lie in a tumour nucleus.
    """
    fine, coarse = (_crop(rng, bank.textures[rng.integers(low, low + 4)], height, width) for low in (0, 4))
    eosin = (0.22 + 0.35 * fine + 0.25 * coarse) * np.float32(rng.uniform(0.6, 1.2))
    haematoxylin = 0.08 + 0.12 * coarse
    tumour = np.zeros((height, width), np.bool_)
    canvas = (haematoxylin, eosin, tumour)
    spacing = rng.uniform(8.0, 13.0)
    for y, x in _scatter(rng, height, width, spacing):
        if not any(np.hypot(y - c.y, x - c.x) < c.radius for c in clusters):
            _paste(bank, rng, canvas, "stroma" if rng.random() < 0.12 else "lymphocyte", y, x)
    for cluster in clusters:
        crowding = rng.uniform(8.5, 12.0)
        for y, x in _scatter(rng, height, width, crowding):
            if np.hypot(y - cluster.y, x - cluster.x) < cluster.radius:
                _paste(bank, rng, canvas, cluster.kind, y, x)
    if rng.random() < 0.12:  # a tear, or the border of the section
        glass = np.clip((_crop(rng, bank.textures[rng.integers(6, 8)], height, width) - rng.uniform(0.6, 0.8)) * 12, 0, 1)
        glass[tumour] = 0
        eosin *= 1 - glass
        haematoxylin *= 1 - glass
    density = haematoxylin[..., None] * stain.haematoxylin + eosin[..., None] * stain.eosin
    picture = stain.background * np.exp(-density) + stain.noise * rng.standard_normal((height, width, 3), np.float32)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8), tumour


def _crop(rng: np.random.Generator, texture: FloatArray, height: int, width: int) -> FloatArray:
    y, x = rng.integers(0, _TEXTURE_PX - height + 1), rng.integers(0, _TEXTURE_PX - width + 1)
    return texture[y : y + height, x : x + width]


def _scatter(rng: np.random.Generator, height: int, width: int, spacing: float) -> npt.NDArray[np.float64]:
    """Return jittered grid points that reach beyond the border, (n, 2), rows and columns."""
    rows, columns = (np.arange(-_MARGIN_PX, length + _MARGIN_PX, spacing) for length in (height, width))
    grid = np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1).reshape(-1, 2)
    points: npt.NDArray[np.float64] = grid + rng.uniform(-0.42 * spacing, 0.42 * spacing, grid.shape)
    return points


def _paste(
    bank: Bank,
    rng: np.random.Generator,
    canvas: tuple[FloatArray, FloatArray, npt.NDArray[np.bool_]],
    kind: NucleusKind,
    y: float,
    x: float,
) -> None:
    """Draw one nucleus, clipped at the border: it hides the cytoplasm below it."""
    haematoxylin, eosin, tumour = canvas
    coverage, chromatin = bank.nuclei[kind][rng.integers(64)]
    half = coverage.shape[0] // 2
    top, left = round(y) - half, round(x) - half
    y0, x0 = max(top, 0), max(left, 0)
    y1, x1 = min(top + coverage.shape[0], haematoxylin.shape[0]), min(left + coverage.shape[1], haematoxylin.shape[1])
    if y0 >= y1 or x0 >= x1:
        return
    inside = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
    where = (slice(y0, y1), slice(x0, x1))
    cover = coverage[inside]
    haematoxylin[where] += cover * (chromatin[inside] - haematoxylin[where])
    eosin[where] *= 1 - 0.7 * cover
    if kind == "tumour":
        tumour[where] |= cover > 0.5
