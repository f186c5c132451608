"""Line charts as SVG; colours come from the page's style sheet, so that they follow its theme."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 420, 260
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 12, 40
POINTS = 240  # of a line at most; more would not show
DOTS = 12  # lines of so many points at most show each
TICKS = 5


@dataclass(frozen=True)
class Line:
    """One line: its name and its points (x, y); points without a finite y are left out."""

    name: str
    points: Sequence[tuple[float, float]]


def line_chart(
    lines: Sequence[Line],
    title: str,
    x_label: str,
    y_label: str,
    log: bool = False,
    marker: tuple[float, str] | None = None,
) -> Markup:
    """Draw lines over a common x axis that starts at the smallest x.

    Args:
        lines: at least one, with at least one point.
        title: read out in place of the picture.
        x_label: of the x axis.
        y_label: of the y axis.
        log: whether y is logarithmic; points with y of 0 or less are left out then.
        marker: an x to mark with a vertical line, and what it says.

    """
    kept = [
        [(x, y) for x, y in line.points if math.isfinite(y) and (y > 0 or not log)]
        for line in lines
    ]
    xs = [x for points in kept for x, _ in points]
    ys = [math.log10(y) if log else y for points in kept for _, y in points]
    if not xs:
        return Markup("")
    x_ticks, y_ticks = _ticks(min(xs), max(xs)), _ticks(min(ys), max(ys), whole=log)
    x_range, y_range = (min(xs), max(xs)), (min(y_ticks[0], *ys), max(y_ticks[-1], *ys))

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + _share(x, x_range) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - _share(y, y_range) * (HEIGHT - TOP - BOTTOM),
        )

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        f"<title>{escape(title)}</title>",
    ]
    for tick in y_ticks:
        _, y = at(x_range[0], tick)
        text = f"{10**tick:.0e}" if log else f"{tick:g}"
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" class="end">{text}</text>')
    for tick in x_ticks:
        x, _ = at(tick, y_range[0])
        if LEFT <= x <= WIDTH - RIGHT:
            parts.append(
                f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" class="mid">{tick:g}</text>'
            )
    if marker:
        x, _ = at(marker[0], y_range[0])
        side = "end" if x > WIDTH / 2 else "start"
        shift = -5 if side == "end" else 5
        parts.append(f'<path class="marker" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(
            f'<text x="{x + shift:.1f}" y="{TOP + 10}" class="{side}">{escape(marker[1])}</text>'
        )
    for number, points in enumerate(kept):
        step = max(1, math.ceil(len(points) / POINTS))
        thinned = [*points[:-1:step], *points[-1:]]
        path = " ".join(
            "{:.1f},{:.1f}".format(*at(x, math.log10(y) if log else y)) for x, y in thinned
        )
        parts.append(f'<polyline class="line line-{number}" points="{path}"/>')
        if len(points) <= DOTS:
            parts += [
                '<circle class="dot line-{}" cx="{:.1f}" cy="{:.1f}" r="3"/>'.format(
                    number, *at(x, math.log10(y) if log else y)
                )
                for x, y in points
            ]
    middle = TOP + (HEIGHT - TOP - BOTTOM) / 2
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" class="mid">'
        f"{escape(x_label)}</text>"
        f'<text transform="translate(12 {middle}) rotate(-90)" class="mid">{escape(y_label)}</text>'
        "</svg>"
    )
    if len(lines) > 1:
        names = "".join(
            f'<li class="line-{number}">{escape(line.name)}</li>'
            for number, line in enumerate(lines)
        )
        parts.append(f'<ul class="legend">{names}</ul>')
    # What is not a number above has been escaped.
    return Markup("".join(parts))  # noqa: S704


def _share(value: float, around: tuple[float, float]) -> float:
    low, high = around
    return (value - low) / (high - low) if high > low else 0.5


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Return about five round numbers that cover a range."""
    span = max(high - low, abs(high) * 1e-3, 1e-12)
    raw = span / TICKS
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    if whole:
        step = max(1, round(step))
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(number * step, 12) for number in range(first, last + 1)]
