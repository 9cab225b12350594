"""Pictures of patches for a page: PNG data URIs, the centre that a label is about, and two patches that share pixels."""

from markupsafe import Markup

from sentinode.images import UInt8Array
from sentinode.pages import LARGEST_PX, data_uri

CENTRE_PX = 32
"""Side of the centre square that a label is about."""


def centre_picture(image: UInt8Array, description: str) -> Markup:
    """Draw one patch, uint8 (side, side, 3), RGB, with its centre outlined."""
    side = image.shape[0]
    start = (side - CENTRE_PX) / 2
    content = _image(image, "", 0, 0) + (_outline(start, start, CENTRE_PX, CENTRE_PX, "shared") if side > CENTRE_PX else Markup(""))
    return _svg(content, side, side, side, description)


def pair_pictures(first: UInt8Array, second: UInt8Array, dy_px: int, dx_px: int) -> tuple[Markup, Markup, Markup]:
    """Draw two patches that share pixels, the common part outlined, and the field that they make together.

    Parameters
    ----------
    first, second : ndarray of uint8, shape (side, side, 3), RGB
    dy_px, dx_px : int
        Place of `second`'s first pixel in `first`: down and to the right.

    Returns
    -------
    tuple of Markup
        The first patch, the second, and both pasted at their offset. The third shows the images of the other two again and needs them on its page.
    """
    side = first.shape[0]
    height, width = side - abs(dy_px), side - abs(dx_px)
    pictures = []
    for image, name, down, across, text in ((first, "pair-first", dy_px, dx_px, "First"), (second, "pair-second", -dy_px, -dx_px, "Second")):
        content = _image(image, name, 0, 0) + _outline(max(across, 0), max(down, 0), width, height, "shared")
        pictures.append(_svg(content, side, side, side, f"{text} patch of the pair, the common part outlined"))
    (ay, ax), (by, bx) = (max(-dy_px, 0), max(-dx_px, 0)), (max(dy_px, 0), max(dx_px, 0))
    field = Markup('<use href="#pair-second" x="{}" y="{}"/><use href="#pair-first" x="{}" y="{}"/>').format(bx, by, ax, ay)
    field += _outline(ax, ay, side, side, "edge") + _outline(bx, by, side, side, "edge")
    field += _outline(max(ax, bx), max(ay, by), width, height, "shared")
    both = _svg(field, side + abs(dx_px), side + abs(dy_px), side, "Both patches pasted into one field at their offset, the common part outlined")
    return pictures[0], pictures[1], both


def _image(image: UInt8Array, name: str, x: float, y: float) -> Markup:
    side = image.shape[0]
    mark = Markup(' id="{}"').format(name) if name else Markup("")
    return Markup('<image{} x="{}" y="{}" width="{}" height="{}" href="{}"/>').format(mark, x, y, side, side, data_uri(image))


def _outline(x: float, y: float, width: float, height: float, style: str) -> Markup:
    """Draw a rectangle just inside its area: dark over light, so that it shows on any stain."""
    box = Markup('x="{:g}" y="{:g}" width="{:g}" height="{:g}"').format(x + 0.5, y + 0.5, width - 1, height - 1)
    return Markup('<rect class="{0} under" {1}/><rect class="{0} over" {1}/>').format(style, box)


def _svg(content: Markup, width: float, height: float, side: float, description: str) -> Markup:
    """Two screen pixels a pixel at LARGEST_PX; narrow screens shrink it."""
    scale = 2 * LARGEST_PX / side
    return Markup('<svg class="picture" viewBox="0 0 {0:g} {1:g}" style="width:{2:.0f}px" role="img" aria-label="{3}">{4}</svg>').format(
        width, height, width * scale, description, content
    )
