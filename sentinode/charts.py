"""Charts as inline SVG without scripts. Each is drawn for a column of about 340 px; classes of the page's style sheet give the colours."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH = 340
_LEFT, _RIGHT = 78, 92  # room for names and for figures beside horizontal bars
_PLOT = (38, 8, WIDTH - 8, 132)  # left, top, right, bottom of a histogram
_STEPS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


@dataclass(frozen=True)
class Series:
    """One distribution of a histogram.

    Attributes
    ----------
    style : str
        Class of the style sheet.
    shares : sequence of float
        Height of each bin, 0..1; all bins have one width.
    filled : bool
        Whether the area below is filled, or only its outline drawn.
    """

    style: str
    shares: Sequence[float]
    filled: bool = False


def stacked_bars(rows: Sequence[tuple[str, Sequence[tuple[str, float]], str]], description: str, mark: float | None = None) -> Markup:
    """Draw one horizontal bar per row, each as long as the others.

    Parameters
    ----------
    rows : sequence of (name, parts, figure)
        `parts`: (class of the style sheet, share 0..1) from left to right; `figure`: the text at the right end.
    description : str
        What a reader who cannot see the chart is told.
    mark : float, optional
        Share at which a line across all bars is drawn.
    """
    span = WIDTH - _LEFT - _RIGHT
    content = Markup("")
    for number, (name, parts, figure) in enumerate(rows):
        y = 6 + 26 * number
        content += Markup('<text x="0" y="{}">{}</text>').format(y + 14, name)
        x = float(_LEFT)
        for style, share in parts:
            content += Markup('<rect class="{}" x="{:.1f}" y="{}" width="{:.1f}" height="18"/>').format(style, x, y, share * span)
            x += share * span
        content += Markup('<text x="{}" y="{}">{}</text>').format(WIDTH - _RIGHT + 8, y + 14, figure)
    height = 6 + 26 * len(rows)
    if mark is not None:
        content += Markup('<line class="mark" x1="{0:.1f}" x2="{0:.1f}" y1="2" y2="{1}"/>').format(_LEFT + mark * span, height - 4)
    return _svg(content, height, description)


def paired_bars(rows: Sequence[tuple[str, Sequence[tuple[str, float, str]]]], description: str) -> Markup:
    """Draw horizontal bars from a common start, one or several below each other per row.

    Parameters
    ----------
    rows : sequence of (name, bars)
        `bars`: (class of the style sheet, share 0..1, figure at the right end).
    description : str
        What a reader who cannot see the chart is told.
    """
    span = WIDTH - _LEFT - _RIGHT
    content = Markup("")
    y = 4
    for name, bars in rows:
        content += Markup('<text x="0" y="{}">{}</text>').format(y + 7 * len(bars) + 4, name)
        for style, share, figure in bars:
            width = max(share * span, 0.8 if share else 0)
            content += Markup('<rect class="{}" x="{}" y="{}" width="{:.1f}" height="11"/>').format(style, _LEFT, y, width)
            content += Markup('<text class="figure" x="{:.1f}" y="{}">{}</text>').format(_LEFT + width + 5, y + 10, figure)
            y += 14
        y += 6
    return _svg(content, y, description)


def histogram(series: Sequence[Series], ticks: Sequence[tuple[float, str]], description: str, axis: str) -> Markup:
    """Draw distributions over one another, as steps, from 0 up.

    Parameters
    ----------
    series : sequence of Series
    ticks : sequence of (float, str)
        Position 0..1 along the horizontal axis, and its text.
    description : str
        What a reader who cannot see the chart is told.
    axis : str
        Name of the horizontal axis.
    """
    left, top, right, bottom = _PLOT
    peak = max((share for one in series for share in one.shares), default=0.0) or 1.0
    step = next((step for step in _STEPS if peak / step <= 4), 1.0)
    lines = math.ceil(peak / step - 1e-9)
    scale = (bottom - top) / (lines * step)
    content = Markup("")
    for number in range(lines + 1):
        y = bottom - number * step * scale
        content += Markup('<line class="rule" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(left, right, y, y)
        content += Markup('<text class="tick" text-anchor="end" x="{}" y="{:.1f}">{:g}&nbsp;%</text>').format(
            left - 4, y + 3.5, round(100 * number * step, 4)
        )
    for one in series:
        wide = (right - left) / max(len(one.shares), 1)
        points = [f"M{left} {bottom}"]
        for number, share in enumerate(one.shares):
            points.append(f"V{bottom - share * scale:.1f}H{left + (number + 1) * wide:.1f}")
        points.append(f"V{bottom}")
        content += Markup('<path class="{} {}" d="{}"/>').format(one.style, "area" if one.filled else "outline", "".join(points))
    for position, text in ticks:
        anchor = "start" if position <= 0 else "end" if position >= 1 else "middle"
        content += Markup('<text class="tick" text-anchor="{}" x="{:.1f}" y="{}">{}</text>').format(
            anchor, left + position * (right - left), bottom + 13, text
        )
    content += Markup('<text class="tick" text-anchor="middle" x="{:.1f}" y="{}">{}</text>').format((left + right) / 2, bottom + 27, axis)
    return _svg(content, bottom + 32, description)


@dataclass(frozen=True)
class Line:
    """One line of a plot.

    Attributes
    ----------
    style : str
        Class of the style sheet.
    points : sequence of (x, y)
        Within the plot's ranges, in drawing order.
    stepped : bool
        Whether y holds until the next x, instead of a straight line to it.
    """

    style: str
    points: Sequence[tuple[float, float]]
    stepped: bool = False


def plot(
    lines: Sequence[Line],
    description: str,
    x_axis: str,
    y_axis: str,
    *,
    dots: Sequence[tuple[float, float, str]] = (),
    bars: Sequence[tuple[float, float, float]] = (),
    mark_x: float | None = None,
    y_top: float = 1.0,
) -> Markup:
    """Draw lines over the unit square, or up to `y_top`.

    Parameters
    ----------
    lines : sequence of Line
    description : str
        What a reader who cannot see the chart is told.
    x_axis, y_axis : str
        What they show.
    dots : sequence of (x, y, class of the style sheet)
    bars : sequence of (x, low, high)
        Vertical intervals.
    mark_x : float, optional
        Where a vertical line is drawn.
    y_top : float
        Largest y, above 0.
    """
    left, top, right, bottom = 40, 8, WIDTH - 40, 228
    wide, high = right - left, bottom - top

    def place(x: float, y: float) -> tuple[float, float]:
        return left + x * wide, bottom - min(y / y_top, 1.0) * high

    content = Markup("")
    for number in range(5):
        x, y = place(number / 4, number * y_top / 4)
        content += Markup('<line class="rule" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(left, right, y, y)
        content += Markup('<text class="tick" text-anchor="end" x="{}" y="{:.1f}">{:g}</text>').format(left - 5, y + 3.5, number * y_top / 4)
        content += Markup('<text class="tick" text-anchor="middle" x="{:.1f}" y="{}">{:g}</text>').format(x, bottom + 14, number / 4)
    if mark_x is not None:
        content += Markup('<line class="mark" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>').format(place(mark_x, 0)[0], top, bottom)
    for x_value, low, high_value in bars:
        (x, lower), (_, upper) = place(x_value, low), place(x_value, high_value)
        content += Markup('<line class="rule strong" x1="{0:.1f}" x2="{0:.1f}" y1="{1:.1f}" y2="{2:.1f}"/>').format(x, lower, upper)
    for line in lines:
        path, before = [], None
        for x, y in (place(*point) for point in line.points):
            if before is None:
                path.append(f"M{x:.1f} {y:.1f}")
            else:
                path.append(f"H{x:.1f}V{y:.1f}" if line.stepped else f"L{x:.1f} {y:.1f}")
            before = x
        content += Markup('<path class="{}" d="{}"/>').format(line.style, "".join(path))
    for x_value, y_value, style in dots:
        content += Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="3"/>').format(style, *place(x_value, y_value))
    content += Markup('<text class="tick" text-anchor="middle" x="{:.1f}" y="{}">{}</text>').format((left + right) / 2, bottom + 29, x_axis)
    middle = (top + bottom) / 2
    content += Markup('<text class="tick" text-anchor="middle" transform="rotate(-90 9 {0:.1f})" x="9" y="{0:.1f}">{1}</text>').format(middle, y_axis)
    return _svg(content, bottom + 34, description)


def _svg(content: Markup, height: float, description: str) -> Markup:
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(WIDTH, height, description, content)
