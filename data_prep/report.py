"""The data card: report.html, one self-contained page about a prepared data set."""

import base64
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from io import BytesIO

import jinja2
import numpy as np
from PIL import Image

from data_prep.shards import Placed
from data_prep.spool import Spool
from sentinode import CLASS_NAMES, RESEARCH_USE_NOTICE
from sentinode.manifests import LEAK_MEANING, DatasetManifest

SAMPLES_PER_CLASS = 12
_SIZE_BOUNDS = (1, 2, 3, 5, 9, 17, 33, 65, 129)


def size_histogram(placed: Sequence[Placed]) -> list[tuple[str, int, int]]:
    """Return (group size as text, groups, rows) for each class of group size that occurs, smallest first."""
    sizes = Counter(item.group for item in placed)
    table = []
    for low, following in zip(_SIZE_BOUNDS, (*_SIZE_BOUNDS[1:], None), strict=True):
        inside = [size for size in sizes.values() if size >= low and (following is None or size < following)]
        if inside:
            text = f"{low} or more" if following is None else str(low) if following == low + 1 else f"{low} to {following - 1}"
            table.append((text, len(inside), sum(inside)))
    return table


def sample_images(placed: Sequence[Placed], spool: Spool) -> dict[str, list[str]]:
    """Return class name -> PNG data URIs of the first patches of that class, in the data set's own random order."""
    samples = {}
    for label, name in enumerate(CLASS_NAMES):
        chosen = [item.patch.position for item in placed if item.patch.label == label][:SAMPLES_PER_CLASS]
        uris = []
        for image in spool.take(np.asarray(chosen, np.int64)):
            buffer = BytesIO()
            Image.fromarray(image).save(buffer, format="PNG", optimize=True)
            uris.append("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode())
        samples[name] = uris
    return samples


def render_report(manifest: DatasetManifest, placed: Sequence[Placed], spool: Spool) -> str:
    """Return the page as HTML text.

    Parameters
    ----------
    manifest : DatasetManifest
        With everything but the record of the page itself.
    placed : sequence of Placed
    spool : Spool
        Where the sample patches come from.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files("data_prep") / "templates" / "report.html").read_text(encoding="utf-8"))
    rows = sum(counts.rows for counts in manifest.counts.values())
    return template.render(
        manifest=manifest,
        rows=rows,
        positive=sum(counts.metastatic for counts in manifest.counts.values()),
        flagged=Counter(flag for item in placed for flag in item.patch.flags),
        rejected=sum(manifest.rejected.values()),
        sizes=size_histogram(placed),
        samples=sample_images(placed, spool),
        leak_meaning=LEAK_MEANING[manifest.leak_level],
        notice=RESEARCH_USE_NOTICE,
    )
