"""Curves as inline SVG: numbers over steps, with their standard errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 1100, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 14, 34
NUM_TICKS = 5
HEADROOM = 0.06  # of the height, above and below all points

Scale = Callable[[float], float]


@dataclass(frozen=True)
class Curve:
    """Points (step, value) by rising step. `errors` are drawn as bars: one for each point, or none at all.

    `kind` names its look in the style sheet: "held-out" or "training".
    """

    name: str
    points: Sequence[tuple[float, float]]
    errors: Sequence[float] = ()
    kind: str = "held-out"


def draw_curves(curves: Sequence[Curve], label: str) -> str:
    """An SVG element of curves over one pair of axes, from step 0; empty without a point.

    Raises: ValueError for a number that is not finite.
    """
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return ""
    lows, highs = zip(*map(_find_range, curves), strict=True)
    low, high = min(lows), max(highs)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"the values of {label} go from {low} to {high}: they must be finite")
    margin = HEADROOM * (high - low) or HEADROOM * abs(high) or 1.0
    last = max(1, *(curve.points[-1][0] for curve in curves))
    x = _scale(0, last, LEFT, WIDTH - RIGHT)
    y = _scale(low - margin, high + margin, HEIGHT - BOTTOM, TOP)
    parts = [*_draw_axes(x, y, last, (low - margin, high + margin))]
    for curve in sorted(curves, key=lambda curve: curve.kind == "held-out"):
        parts += _draw_curve(curve, x, y)
    opening = f'<svg class="curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
    return "\n".join([opening, *parts, "</svg>"])


def choose_ticks(low: float, high: float, count: int) -> list[float]:
    """At most `count` + 1 round numbers from `low` to `high`: multiples of 1, 2 or 5 times a power of ten."""
    least = (high - low) / count
    power = 10.0 ** math.floor(math.log10(least))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least * (1 - 1e-9))
    first, end = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, end + 1)]


def _find_range(curve: Curve) -> tuple[float, float]:
    errors = curve.errors or [0.0] * len(curve.points)
    values = [(value - error, value + error) for (_, value), error in zip(curve.points, errors, strict=True)]
    return min(low for low, _ in values), max(high for _, high in values)


def _scale(low: float, high: float, start: float, end: float) -> Scale:
    return lambda value: round(start + (value - low) / (high - low) * (end - start), 2)


def _draw_axes(x: Scale, y: Scale, last: float, bounds: tuple[float, float]) -> list[str]:
    parts = []
    for value in choose_ticks(*bounds, NUM_TICKS):
        parts.append(f'<path class="grid" d="M{LEFT} {y(value)}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(value) + 4}" text-anchor="end">{value:.4g}</text>')
    steps = [step for step in choose_ticks(0, last, 2 * NUM_TICKS) if step == int(step)]
    for step in steps:
        parts.append(f'<text x="{x(step)}" y="{HEIGHT - 12}" text-anchor="middle">{step:g}</text>')
    return parts


def _draw_curve(curve: Curve, x: Scale, y: Scale) -> list[str]:
    path = " ".join(f"{x(step)},{y(value)}" for step, value in curve.points)
    parts = [f'<polyline class="{curve.kind}" points="{path}"><title>{escape(curve.name)}</title></polyline>']
    for (step, value), error in zip(curve.points, curve.errors, strict=False):
        bar = f"M{x(step)} {y(value - error)}V{y(value + error)}"
        said = escape(f"{curve.name}, step {step:g}: {value:.4f} ± {error:.4f}")
        dot = f'cx="{x(step)}" cy="{y(value)}" r="4"'
        parts.append(f'<path class="{curve.kind}" d="{bar}"/>')
        parts.append(f'<circle class="{curve.kind}" {dot}><title>{said}</title></circle>')
    return parts
