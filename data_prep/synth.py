"""H&E-like synthetic patches in the Kaggle layout, for tests and demos: `sentinode synth --out DIR --count N [--seed S]`.

Written: `train/<id>.tif` (uncompressed, 96x96 RGB, id = SHA-1 of the pixels), `train_labels.csv` (`id,label`), `slides.csv` (`id,wsi`, for
`--slides`), `truth.csv` (where each patch was cut and how many tumour pixels it holds) and `synth.json` (the request). The label is 1 exactly where
the centre 32x32 pixels hold tumour; tumour in the outer ring alone is 0. About a fifth of the patches overlap others pixel by pixel.
"""

import csv
import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from data_prep.histology import Bank, Cluster, Stain, draw_field
from sentinode.errors import UsageError
from sentinode.storage import exclusive, local_path, publish, staging_path, write_json

SYNTH_VERSION = 1
"""Raised whenever the same count and seed would give other bytes."""
SIZE_PX = 96
CENTRE_PX = 32
POSITIVE_FRACTION = 0.4
OVERLAPPING_FRACTION = 0.2
PATCHES_PER_SLIDE = 40

_MAX_FIELD_PX = 448
_UNITS_PER_TASK = 250
_INLINE_PATCHES = 600  # below this, starting processes takes longer than drawing

UnitKind = Literal["positive", "negative", "ring", "reactive", "field"]


@dataclass(frozen=True)
class Unit:
    """What is drawn in one go: a patch, or a larger field from which several overlapping patches are cut."""

    number: int
    slide: int
    kind: UnitKind
    patches: int


@dataclass(frozen=True)
class Truth:
    """A row of truth.csv. `field` names the unit; (y, x) is the patch's origin in it."""

    id: str
    label: int
    slide: str
    field: int
    y: int
    x: int
    centre_tumour_px: int
    tumour_px: int


def synthesize(out: str | os.PathLike[str], count: int, seed: int = 42, *, processes: int | None = None) -> Path:
    """Make a folder of synthetic patches; the same count and seed give the same bytes, however many processes draw.

    Parameters
    ----------
    out : str or path
        Folder to make. A finished one of the same request is returned as it is.
    count : int
        Patches, at least 1.
    seed : int
        Decides everything, at least 0.
    processes : int, optional
        Processes that draw; default all CPUs this process may use. They are spawned, so a script that calls this needs a `__main__` guard.

    Returns
    -------
    Path
        The folder, usable as `--source` of prepare.

    Raises
    ------
    UsageError
        `count` or `seed` is out of range, or `out` holds something else.
    """
    folder = local_path(out)
    if count < 1:
        raise UsageError(f"count {count}: expected at least 1 patch")
    if seed < 0:
        raise UsageError(f"seed {seed}: expected 0 or more")
    request = {"version": SYNTH_VERSION, "count": count, "seed": seed}
    with exclusive(folder):
        if _is_finished(folder, request):
            return folder
        staging = staging_path(folder)
        shutil.rmtree(staging, ignore_errors=True)
        (staging / "train").mkdir(parents=True)
        truths = _draw_all(plan(count, seed), seed, staging / "train", processes)
        if len({truth.id for truth in truths}) != count:
            raise AssertionError(f"{count} patches were asked for, {len({truth.id for truth in truths})} distinct ones were drawn")
        truths.sort(key=lambda truth: truth.id)
        _write_csv(staging / "train_labels.csv", ("id", "label"), ((t.id, t.label) for t in truths))
        _write_csv(staging / "slides.csv", ("id", "wsi"), ((t.id, t.slide) for t in truths))
        _write_csv(staging / "truth.csv", tuple(asdict(truths[0])), (tuple(asdict(t).values()) for t in truths))
        write_json(staging / "synth.json", request)
        publish(staging, folder)
    return folder


def _is_finished(folder: Path, request: dict[str, int]) -> bool:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        found = json.loads((folder / "synth.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UsageError(f"{folder}: exists and is not a folder of synthetic patches; choose another --out") from None
    if found != request:
        raise UsageError(f"{folder}: holds synthetic patches of another request ({_told(found)}; not {_told(request)}); choose another --out")
    return True


def _told(request: Any) -> str:
    return ", ".join(f"{key} {value}" for key, value in request.items()) if isinstance(request, dict) else str(request)


def plan(count: int, seed: int) -> list[Unit]:
    """Return what is drawn for `count` patches: independent patches and fields, with exact shares of each kind."""
    rng = np.random.default_rng([seed, 0])
    slides = max(1, round(count / PATCHES_PER_SLIDE))
    grouped, sizes = 0, []
    while grouped + 2 <= round(count * OVERLAPPING_FRACTION):
        size = int(rng.integers(12, 25)) if rng.random() < 0.03 else int(2 + min(rng.geometric(0.4) - 1, 6))
        size = min(size, round(count * OVERLAPPING_FRACTION) - grouped)
        if size < 2:
            break
        sizes.append(size)
        grouped += size
    single = count - grouped
    positive = round(single * POSITIVE_FRACTION)
    ring = round((single - positive) * 0.2)
    reactive = round((single - positive) * 0.25)
    shares: list[tuple[UnitKind, int]] = [
        ("positive", positive),
        ("ring", ring),
        ("reactive", reactive),
        ("negative", single - positive - ring - reactive),
    ]
    kinds = [kind for kind, number in shares for _ in range(number)]
    order = rng.permutation(single)
    units = [Unit(number, 0, "field", size) for number, size in enumerate(sizes)]
    units += [Unit(len(sizes) + k, 0, kinds[order[k]], 1) for k in range(single)]
    return [Unit(unit.number, int(rng.integers(slides)), unit.kind, unit.patches) for unit in units]


def _draw_all(units: list[Unit], seed: int, folder: Path, processes: int | None) -> list[Truth]:
    tasks = [units[start : start + _UNITS_PER_TASK] for start in range(0, len(units), _UNITS_PER_TASK)]
    workers = processes or len(os.sched_getaffinity(0))
    if workers == 1 or sum(unit.patches for unit in units) <= _INLINE_PATCHES:
        return [truth for task in tasks for truth in _draw_units(task, seed, folder)]
    # Spawned, not forked: a fork of a process that runs Ray or torch threads can hang.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        results = [pool.submit(_draw_units, task, seed, folder) for task in tasks]
        return [truth for result in results for truth in result.result()]


@lru_cache(maxsize=1)
def _bank(seed: int) -> Bank:
    return Bank.draw(np.random.default_rng([seed, 1]))


def _draw_units(units: list[Unit], seed: int, folder: Path) -> list[Truth]:
    truths = []
    for unit in units:
        # One generator per unit, so that the division among processes decides nothing.
        rng = np.random.default_rng([seed, 2, unit.number])
        stain = Stain.draw(np.random.default_rng([seed, 3, unit.slide]))
        truths += _draw_unit(unit, _bank(seed), rng, stain, folder)
    return truths


def _draw_unit(unit: Unit, bank: Bank, rng: np.random.Generator, stain: Stain, folder: Path) -> list[Truth]:
    origins = _origins(rng, unit.patches)
    height, width = (max(origin[axis] for origin in origins) + SIZE_PX for axis in (0, 1))
    picture, tumour = draw_field(bank, rng, stain, height, width, _clusters(unit, rng, height, width))
    truths = []
    border = (SIZE_PX - CENTRE_PX) // 2
    for y, x in origins:
        pixels = np.ascontiguousarray(picture[y : y + SIZE_PX, x : x + SIZE_PX])
        mask = tumour[y : y + SIZE_PX, x : x + SIZE_PX]
        centre = int(mask[border:-border, border:-border].sum())
        name = hashlib.sha1(pixels.tobytes(), usedforsecurity=False).hexdigest()
        Image.fromarray(pixels).save(folder / f"{name}.tif", format="TIFF")
        truths.append(Truth(name, int(centre > 0), f"synthetic_{unit.slide:04d}", unit.number, y, x, centre, int(mask.sum())))
    return truths


def _origins(rng: np.random.Generator, patches: int) -> list[tuple[int, int]]:
    """Place patches so that each overlaps an earlier one by at least a tenth; no two at the same place; the smallest origin is (0, 0)."""
    origins = [(0, 0)]
    while len(origins) < patches:
        y, x = origins[rng.integers(len(origins))]
        dy, dx = (int(v) for v in rng.integers(-80, 81, 2))
        if (SIZE_PX - abs(dy)) * (SIZE_PX - abs(dx)) < 0.1 * SIZE_PX**2 or (y + dy, x + dx) in origins:
            continue
        grown = [*origins, (y + dy, x + dx)]
        if all(max(o[axis] for o in grown) - min(o[axis] for o in grown) + SIZE_PX <= _MAX_FIELD_PX for axis in (0, 1)):
            origins = grown
    top, left = (min(o[axis] for o in origins) for axis in (0, 1))
    return [(y - top, x - left) for y, x in origins]


def _clusters(unit: Unit, rng: np.random.Generator, height: int, width: int) -> list[Cluster]:
    middle = SIZE_PX / 2
    if unit.kind == "field":
        if rng.random() < 0.4:
            return []
        return [Cluster("tumour", rng.uniform(0.2, 0.8) * height, rng.uniform(0.2, 0.8) * width, rng.uniform(0.2, 0.45) * max(height, width))]
    if unit.kind == "positive":
        y, x = middle + rng.uniform(-12, 12, 2)
        return [Cluster("tumour", y, x, rng.uniform(16, 50))]
    if unit.kind == "reactive":
        y, x = middle + rng.uniform(-16, 16, 2)
        return [Cluster("reactive", y, x, rng.uniform(16, 45))]
    if unit.kind == "ring":
        # Close to a corner, and far enough from the centre square (half a diagonal of 23 px) that no nucleus (12 px at most) reaches it.
        down, across = rng.choice([-1, 1], 2) * rng.uniform(42, 50, 2)
        return [Cluster("tumour", middle + down, middle + across, rng.uniform(16, np.hypot(down, across) - 23 - 12))]
    return []


def _write_csv(path: Path, header: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
