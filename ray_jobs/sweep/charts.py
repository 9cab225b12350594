"""Charts of a sweep, as inline SVG without scripts; the page's style sheet gives the colours, and every fact that a colour tells is in words too."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

_STEPS = (1, 2, 2.5, 5, 10)
# Times the range of the middle 60 % of values.
_FAR = 8
# Width of a character of the labels.
_CHARACTER = 5.8
_MOST_ROWS = 40


@dataclass(frozen=True)
class Curve:
    """One trial's metric.

    Attributes
    ----------
    name : str
    points : sequence of (x, y)
        In order; x from 1.
    is_best, is_stopped : bool
    """

    name: str
    points: Sequence[tuple[float, float]]
    is_best: bool = False
    is_stopped: bool = False


@dataclass(frozen=True)
class Axis:
    """One axis of the parallel coordinates.

    Attributes
    ----------
    name : str
    places : sequence of (float or None)
        Of each line, 0 (bottom) to 1; None where the parameter does not exist.
    ticks : sequence of (float, str)
    """

    name: str
    places: Sequence[float | None]
    ticks: Sequence[tuple[float, str]]


def ticks_of(low: float, high: float, most: int = 5) -> list[float]:
    """Return round numbers within [low, high], `most` at most, two at least where low < high."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    magnitude = 10 ** math.floor(math.log10(rough))
    step = next(step * magnitude for step in _STEPS if step * magnitude >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def usual_range(values: Sequence[float]) -> tuple[float, float]:
    """Return the range of values, without what lies so far out that nothing else could be told apart: a loss that ran away."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    inner_low, inner_high = ordered[round(0.2 * (len(ordered) - 1))], ordered[round(0.8 * (len(ordered) - 1))]
    inner = inner_high - inner_low
    if inner > 0:
        # The nearest to the bound that is still within it: not the bound, which is nobody's figure.
        low = min(value for value in ordered if value >= inner_low - _FAR * inner)
        high = max(value for value in ordered if value <= inner_high + _FAR * inner)
    return low, high


def _beyond(values: Sequence[float], low: float, high: float) -> str:
    """Return what is said of figures outside the range."""
    count = sum(not low <= value <= high for value in values)
    return f"; {count} figure{'' if count == 1 else 's'} beyond the axis, drawn at its edge" if count else ""


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "\u2026"


def _svg(content: Markup, width: float, height: float, description: str, kind: str) -> Markup:
    return Markup('<svg class="chart {}" viewBox="0 0 {:.0f} {:.0f}" role="img" aria-label="{}">{}</svg>').format(
        kind, width, height, description, content
    )


def _line(style: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(style, x1, y1, x2, y2)


def _text(style: str, x: float, y: float, text: str, anchor: str = "start") -> Markup:
    return Markup('<text class="{}" text-anchor="{}" x="{:.1f}" y="{:.1f}">{}</text>').format(style, anchor, x, y, text)


def _upright(middle: float, text: str) -> Markup:
    """Name a vertical axis, at the left edge."""
    return Markup('<text class="tick" text-anchor="middle" transform="rotate(-90 11 {0:.1f})" x="11" y="{0:.1f}">{1}</text>').format(middle, text)


def learning_curves(curves: Sequence[Curve], x_axis: str, y_axis: str, description: str) -> Markup:
    """Draw one line per trial; the best one strong, stopped ones end in a cross."""
    width, height, left, top, right, bottom = 640.0, 300.0, 52.0, 10.0, 628.0, 262.0
    values = [y for curve in curves for _, y in curve.points]
    if not values:
        return Markup("")
    low, high = usual_range(values)
    x_axis += _beyond(values, low, high)
    margin = (high - low) * 0.06 or 0.01
    low, high = low - margin, high + margin
    longest = max(x for curve in curves for x, _ in curve.points)

    def place(x: float, y: float) -> tuple[float, float]:
        height_there = min(max((y - low) / (high - low), 0.0), 1.0) * (bottom - top)
        return left + (x - 1) / max(longest - 1, 1) * (right - left), bottom - height_there

    content = Markup("")
    for tick in ticks_of(low, high):
        y = place(1, tick)[1]
        content += _line("rule", left, y, right, y) + _text("tick", left - 6, y + 3.5, f"{tick:g}", "end")
    for tick in ticks_of(1, longest, 10):
        if tick == int(tick):
            content += _text("tick", place(tick, low)[0], bottom + 15, f"{tick:g}", "middle")
    for curve in sorted(curves, key=lambda curve: curve.is_best):
        placed = [place(*point) for point in curve.points]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in placed)
        style = "k1 best" if curve.is_best else "k0"
        content += Markup('<path class="{}" d="{}"><title>{}</title></path>').format(style, path, curve.name)
        x, y = placed[-1]
        if curve.is_stopped:
            content += Markup('<path class="k2 cross" d="M{0:.1f} {1:.1f}l7 7m0 -7l-7 7"/>').format(x - 3.5, y - 3.5)
        elif len(placed) == 1:
            content += Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="3"/>').format("k1" if curve.is_best else "k0", x, y)
    content += _text("tick", (left + right) / 2, bottom + 32, x_axis, "middle")
    content += _upright((top + bottom) / 2, y_axis)
    return _svg(content, width, height, description, "wide-chart")


def heat_map(
    cells: dict[tuple[int, int], tuple[float, int]],
    columns: Sequence[str],
    rows: Sequence[str],
    x_axis: str,
    y_axis: str,
    description: str,
    *,
    higher_is_better: bool,
) -> Markup:
    """Draw the best value of each combination, and of how many trials it is the best.

    Parameters
    ----------
    cells : dict of (column, row) to (value, trials)
        What is not there was not tried.
    """
    rows, columns = [_short(name, 22) for name in rows], [_short(name, 15) for name in columns]
    left = max(70.0, 32 + _CHARACTER * max(map(len, rows)))
    top, high = 8.0, 40.0
    wide = max(58.0, _CHARACTER * max(map(len, columns)) + 6, min(92.0, 560.0 / len(columns)))
    # Few cells are not drawn larger than many.
    width, bottom = max(640.0, left + wide * len(columns) + 8), top + high * len(rows)
    low, top_value = usual_range([value for value, _ in cells.values()]) if cells else (0.0, 0.0)
    span = top_value - low
    content = Markup("")
    for row, name in enumerate(rows):
        # The largest on top.
        y = bottom - high * (row + 1)
        content += _text("tick", left - 8, y + high / 2 + 4, name, "end")
        for column in range(len(columns)):
            x = left + wide * column
            if (column, row) not in cells:
                content += Markup('<rect class="untried" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(
                    x + 1, y + 1, wide - 2, high - 2
                )
                continue
            value, count = cells[column, row]
            share = min(max((value - low) / span, 0.0), 1.0) if span else 1.0 if higher_is_better else 0.0
            step = round(4 * (share if higher_is_better else 1 - share))
            content += Markup('<rect class="heat{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(
                step, x + 1, y + 1, wide - 2, high - 2
            )
            content += _text(f"on{step}", x + wide / 2, y + 18, f"{value:.4f}", "middle")
            content += _text(f"tick on{step}", x + wide / 2, y + 31, f"{count} trial{'' if count == 1 else 's'}", "middle")
    for column, name in enumerate(columns):
        content += _text("tick", left + wide * (column + 0.5), bottom + 14, name, "middle")
    content += _text("tick", left + wide * len(columns) / 2, bottom + 31, x_axis, "middle")
    content += _upright((top + bottom) / 2, _short(y_axis, max(12, int(bottom / _CHARACTER))))
    return _svg(content, width, bottom + 38, description, "wide-chart")


def parallel_coordinates(axes: Sequence[Axis], goodness: Sequence[float], names: Sequence[str], best: int | None, description: str) -> Markup:
    """Draw one line per trial over one axis per parameter; the better, the stronger; the best one in colour.

    Parameters
    ----------
    goodness : sequence of float
        Of each line, 0 (worst) to 1.
    names : sequence of str
    best : int or None
        Which line is the best trial's.
    """
    # One width for few axes; many make it wider, and it scrolls.
    gap, top, bottom = max(104.0, 500.0 / max(len(axes) - 1, 1)), 30.0, 250.0
    left = max(70.0, 14 + _CHARACTER * max(len(_short(text, 18)) for _, text in axes[0].ticks), 4 + _CHARACTER * len(axes[0].name) / 2)
    width = left + gap * (len(axes) - 1) + 66
    none_y = bottom + 22
    content, labels = Markup(""), Markup("")
    some_missing = any(place is None for axis in axes for place in axis.places)
    for number, axis in enumerate(axes):
        x = left + gap * number
        content += _line("rule strong", x, top, x, bottom)
        # Above one another by turns: names are longer than the axes are apart.
        content += _text("tick", x, top - (9 if number % 2 == 0 else 20), axis.name, "middle")
        for at, text in axis.ticks:
            y = bottom - at * (bottom - top)
            # The metric's figures stand where no lines run.
            side, anchor = (1, "start") if number == len(axes) - 1 else (-1, "end")
            content += _line("rule strong", x + 3 * side, y, x, y)
            labels += _text("tick halo", x + 6 * side, y + 3.5, _short(text, 18), anchor)
        if any(place is None for place in axis.places):
            labels += _text("tick halo", x - 6, none_y + 3.5, "not there", "end")
    for line in sorted(range(len(goodness)), key=lambda line: (line == best, goodness[line])):
        placed = [
            (left + gap * number, none_y if (place := axis.places[line]) is None else bottom - place * (bottom - top))
            for number, axis in enumerate(axes)
        ]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in placed)
        style = "k2 solid" if line == best else f"pc{round(4 * goodness[line])}"
        content += Markup('<path class="{}" d="{}"><title>{}</title></path>').format(style, path, names[line])
    # Over the lines.
    content += labels
    kind = "wide-chart" if width <= 700 else "scrolling"
    return _svg(content, width, (none_y if some_missing else bottom) + 14, description, kind)


def importance_bars(rows: Sequence[tuple[str, float, float, float]], description: str) -> Markup:
    """Draw one bar per parameter with its range: (name, share, low, high), shares 0..1."""
    left, width = 14 + 6.6 * max((len(name) for name, *_ in rows), default=0), 640.0
    # Room for the figures at the right.
    wide = width - left - 120
    content = Markup("")
    for number, (name, share, low, high) in enumerate(rows):
        y = 6 + 24 * number
        content += _text("", left - 8, y + 13, name, "end")
        content += Markup('<rect class="k1" x="{}" y="{}" width="{:.1f}" height="14"/>').format(left, y + 2, share * wide)
        content += _line("whisker", left + low * wide, y + 9, left + high * wide, y + 9)
        for end in (low, high):
            content += _line("whisker", left + end * wide, y + 5, left + end * wide, y + 13)
        content += _text("figure", left + max(share, high) * wide + 6, y + 13, f"{share:.2f} ({low:.2f} to {high:.2f})")
    return _svg(content, width, 10 + 24 * len(rows), description, "wide-chart")


def timeline(bars: Sequence[tuple[str, float, float, str]], total_s: float, description: str) -> Markup:
    """Draw one bar per trial over the wall clock: (name, from, to, status), seconds from the start; those above each other ran together.

    Each has a row of its own; of many, each takes the first row that is free.
    """
    left, right, high = 52.0, 628.0, 9.0
    scale = (right - left) / max(total_s, 1e-9)
    rows = list(range(len(bars))) if len(bars) <= _MOST_ROWS else _free_rows([(begun, ended) for _, begun, ended, _ in bars])
    bottom = 4 + (high + 3) * (max(rows, default=-1) + 1)
    unit, per_unit = ("h", 3600.0) if total_s > 7200 else ("min", 60.0) if total_s > 180 else ("s", 1.0)
    content = Markup("")
    for tick in ticks_of(0, total_s / per_unit, 8):
        x = left + tick * per_unit * scale
        content += _line("rule", x, 0, x, bottom) + _text("tick", x, bottom + 13, f"{tick:g}", "middle")
    for row, (name, begun, ended, status) in zip(rows, bars, strict=True):
        y = 4 + (high + 3) * row
        content += Markup('<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{}"><title>{}: {}</title></rect>').format(
            status, left + begun * scale, y, max((ended - begun) * scale, 1.5), high, name, status
        )
        if len(bars) <= _MOST_ROWS:
            content += _text("tick", left - 6, y + 8.5, name, "end")
    content += _text("tick", (left + right) / 2, bottom + 28, f"{unit} since the sweep began", "middle")
    return _svg(content, 640, bottom + 34, description, "wide-chart")


def _free_rows(spans: Sequence[tuple[float, float]]) -> list[int]:
    """Return a row for each (from, to), so that none lies over another."""
    rows, ends = [0] * len(spans), list[float]()
    for number in sorted(range(len(spans)), key=lambda number: spans[number]):
        begun, ended = spans[number]
        row = next((row for row, end in enumerate(ends) if end <= begun), len(ends))
        ends[row : row + 1] = [ended]
        rows[number] = row
    return rows


def front(dots: Sequence[tuple[float, float, bool, str]], x_axis: str, y_axis: str, description: str) -> Markup:
    """Draw metric against cost: (cost, value, is on the front, name)."""
    width, height, left, top, right, bottom = 640.0, 280.0, 52.0, 10.0, 628.0, 240.0
    costs, values = [cost for cost, *_ in dots], [value for _, value, *_ in dots]
    (low_x, high_x), (low_y, high_y) = usual_range(costs), usual_range(values)
    outside = sum(not (low_x <= cost <= high_x and low_y <= value <= high_y) for cost, value, *_ in dots)
    if outside:
        x_axis += f"; {outside} beyond the axes, drawn at their edge"
    pad_x, pad_y = (high_x - low_x) * 0.05 or 0.5, (high_y - low_y) * 0.08 or 0.01
    low_x, high_x, low_y, high_y = low_x - pad_x, high_x + pad_x, low_y - pad_y, high_y + pad_y

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - low_x) / (high_x - low_x), (y - low_y) / (high_y - low_y)
        return left + min(max(across, 0.0), 1.0) * (right - left), bottom - min(max(up, 0.0), 1.0) * (bottom - top)

    content = Markup("")
    for tick in ticks_of(low_y, high_y):
        y = place(low_x, tick)[1]
        content += _line("rule", left, y, right, y) + _text("tick", left - 6, y + 3.5, f"{tick:g}", "end")
    for tick in ticks_of(low_x, high_x, 8):
        content += _text("tick", place(tick, low_y)[0], bottom + 15, f"{tick:g}", "middle")
    on_front = sorted((cost, value) for cost, value, is_on, _ in dots if is_on)
    if len(on_front) > 1:
        content += Markup('<path class="k2" d="M{}"/>').format("L".join("{:.1f} {:.1f}".format(*place(*point)) for point in on_front))
    for cost, value, is_on, name in sorted(dots, key=lambda dot: dot[2]):
        x, y = place(cost, value)
        content += Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="{}"><title>{}</title></circle>').format(
            "k1" if is_on else "k0", x, y, 4 if is_on else 3, name
        )
    content += _text("tick", (left + right) / 2, bottom + 32, x_axis, "middle")
    content += _upright((top + bottom) / 2, y_axis)
    return _svg(content, width, height, description, "wide-chart")
