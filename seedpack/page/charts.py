"""Charts as SVG that follows the page's colours and width."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

WIDTH, LEFT, BOTTOM, TOP = 640, 64, 34, 10
Points = Sequence[tuple[float, float]]


def bars(parts: Mapping[str, float], unit: str) -> str:
    """Return horizontal bars, one for each label, with their values at the end."""
    row, label, most = 26, 190, max(parts.values(), default=0) or 1
    lines = []
    for number, (name, value) in enumerate(parts.items()):
        y, width = row * number, (WIDTH - label - 110) * value / most
        lines.append(
            f'<text x="{label - 8}" y="{y + 17}" class="end">{html.escape(name)}</text>'
            f'<rect x="{label}" y="{y + 4}" width="{width:.1f}" height="16" class="bar"/>'
            f'<text x="{label + width + 6:.1f}" y="{y + 17}">{_short(value)}{html.escape(unit)}</text>'
        )
    return _svg(row * len(parts), "".join(lines))


def lines(series: Mapping[str, Points], x_label: str, y_label: str, *, log: bool = False, legend: bool = True) -> str:
    """Return lines over one pair of axes; with `log` by the logarithm of y, which leaves out what is not positive."""
    height = 260
    series = {name: [(x, y) for x, y in points if y > 0 or not log] for name, points in series.items()}
    every = [point for points in series.values() for point in points]
    if not every:
        return ""
    xs, ys = [x for x, _ in every], [math.log10(y) if log else y for _, y in every]
    x0, x1, y0, y1 = min(xs), max(xs), min(ys) if log else min(0.0, *ys), max(ys)
    x1, y1 = x1 + (x1 == x0), y1 + (y1 == y0)
    if log:
        y0, y1 = math.floor(y0), math.ceil(y1)

    def place(x: float, y: float) -> tuple[float, float]:
        y = math.log10(y) if log else y
        across = LEFT + (WIDTH - LEFT - 12) * (x - x0) / (x1 - x0)
        return across, height - BOTTOM - (height - BOTTOM - TOP) * (y - y0) / (y1 - y0)

    drawn = [_axes(height, (x0, x1), (y0, y1), x_label, y_label, log)]
    for number, (name, points) in enumerate(series.items()):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
        drawn.append(
            f'<polyline points="{path}" class="line s{number % 6}"><title>{html.escape(name)}</title></polyline>'
        )
    keys = "".join(f'<span class="key s{i % 6}">{html.escape(name)}</span>' for i, name in enumerate(series))
    return _svg(height, "".join(drawn)) + (f'<p class="keys">{keys}</p>' if legend and len(series) > 1 else "")


def grid(rows: Mapping[str, Mapping[int, float]], unit: str) -> str:
    """Return a map of values by row and column, darker where they are higher.

    Args:
        rows: values by column, by the row's label.
        unit: of the values.
    """
    low, high = (pick(value for values in rows.values() for value in values.values()) for pick in (min, max))
    columns = sorted({column for values in rows.values() for column in values})
    label, cell = 150, 18
    wide = max(6.0, min(28.0, (WIDTH - label - 10) / max(1, len(columns))))
    drawn = []
    for number, (name, values) in enumerate(rows.items()):
        drawn.append(f'<text x="{label - 8}" y="{cell * number + 13}" class="end">{html.escape(name)}</text>')
        for place, column in enumerate(columns):
            if column in values:
                share = (values[column] - low) / (high - low) if high > low else 0.5
                said = f"{name}, {column}: {_short(values[column])}{unit}"
                drawn.append(
                    f'<rect x="{label + wide * place:.1f}" y="{cell * number + 1}" width="{wide - 1:.1f}" height="{cell - 2}" class="bar" '
                    f'fill-opacity="{0.08 + 0.92 * min(1, max(0, share)):.2f}"><title>{html.escape(said)}</title></rect>'
                )
    bottom = cell * len(rows)
    for place in range(0, len(columns), max(1, len(columns) // 10)):
        drawn.append(f'<text x="{label + wide * place:.1f}" y="{bottom + 14}">{columns[place]}</text>')
    scale = f"lightest {_short(low)}{unit}, darkest {_short(high)}{unit}; across: the layer's number"
    return _svg(bottom + 20, "".join(drawn)) + f'<p class="keys">{html.escape(scale)}</p>'


def _axes(height: float, x: tuple[float, float], y: tuple[float, float], x_label: str, y_label: str, log: bool) -> str:
    bottom, drawn = height - BOTTOM, []
    for value in _ticks(*y, whole=log):
        at = bottom - (bottom - TOP) * (value - y[0]) / (y[1] - y[0])
        drawn.append(
            f'<line x1="{LEFT}" x2="{WIDTH - 12}" y1="{at:.1f}" y2="{at:.1f}" class="rule"/>'
            f'<text x="{LEFT - 6}" y="{at + 4:.1f}" class="end">{_short(10**value if log else value)}</text>'
        )
    for value in _ticks(*x):
        across = LEFT + (WIDTH - LEFT - 12) * (value - x[0]) / (x[1] - x[0])
        drawn.append(f'<text x="{across:.1f}" y="{bottom + 15}" class="mid">{_short(value)}</text>')
    drawn.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{height - 4}" class="mid">{html.escape(x_label)}</text>')
    turned = f'transform="translate(12 {bottom / 2}) rotate(-90)"'
    return "".join(drawn) + f'<text {turned} class="mid">{html.escape(y_label)}</text>'


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Return some round numbers between two.

    >>> _ticks(0, 29), _ticks(-3, 0, whole=True)
    ([0, 10, 20], [-3, -2, -1, 0])
    """
    rough = (high - low) / 5
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * times for times in (1, 2, 5, 10) if unit * times >= rough)
    step = max(1, round(step)) if whole else step
    return [round(step * i, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _svg(height: float, inside: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img">{inside}</svg>'


def _short(value: float) -> str:
    """Return a number in few characters.

    >>> _short(1234567), _short(0.01234), _short(3)
    ('1,234,567', '0.0123', '3')
    """
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"
