"""HTML pages for people: self-contained, without scripts, in one style."""

import base64
from io import BytesIO

import numpy as np
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from PIL import Image

from sentinode.images import UInt8Array

LARGEST_PX = 96
"""Patches with a longer side are shown reduced to this; a page of them must stay small."""


def page_environment(package: str) -> Environment:
    """Return where the templates of a package (its folder `templates`) are rendered; `page_style.html`, the style of all pages, can be included."""
    return Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("sentinode")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def data_uri(image: UInt8Array) -> str:
    """Return a patch, uint8 (side, side, 3), RGB, as a PNG data URI of at most LARGEST_PX x LARGEST_PX pixels."""
    picture = Image.fromarray(np.ascontiguousarray(image))
    if picture.width > LARGEST_PX:
        picture = picture.resize((LARGEST_PX, LARGEST_PX), Image.Resampling.BOX)
    buffer = BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
