"""The plot of a stream's chunks: characters over time, with the stalls marked, as an SVG."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from statistics import median
from typing import TypeAlias

from fluxibly.trace_file import duration

Point: TypeAlias = tuple[float, float, int]
"""Seconds since the call began, seconds that the chunk was waited for, characters so far."""

_Scale: TypeAlias = Callable[[float], float]

WIDTH, HEIGHT = 1000, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 22, 38
NOTABLE = 0.04
"""The share of the whole time from which a wait is marked."""


def plot(points: Sequence[Point], seconds: float) -> str:
    """An SVG of the arrivals of a stream that took so many seconds in all."""
    whole = max(seconds, points[-1][0], 1e-6)
    most = max(points[-1][2], 1)

    def x(at: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * at / whole

    def y(characters: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * characters / most

    floor = y(0)
    shapes = [*_grid(whole, most, x, y)]
    for kind, start, end, text in _bands(points, whole):
        shapes.append(
            f'<rect class="{kind}" x="{x(start):.1f}" y="{TOP}" width="{x(end) - x(start):.1f}" '
            f'height="{floor - TOP:.1f}"/>'
        )
        shapes.append(
            f'<text class="{kind if kind != "first" else ""}" x="{(x(start) + x(end)) / 2:.1f}" '
            f'y="{TOP - 7}" text-anchor="middle">{text}</text>'
        )
    path = f"M{x(points[0][0]):.1f} {floor:.1f}"
    for at, _, characters in points:
        path += f"H{x(at):.1f}V{y(characters):.1f}"
    shapes.append(f'<path class="area" d="{path}V{floor:.1f}Z"/><path class="curve" d="{path}"/>')
    rug = "".join(f"M{x(at):.1f} {floor + 4:.1f}v6" for at, _, _ in points)
    shapes.append(f'<path class="rug" d="{rug}"/>')
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="chunk arrivals">{"".join(shapes)}</svg>'


def _grid(whole: float, most: int, x: _Scale, y: _Scale) -> Iterator[str]:
    for share in (0.0, 0.5, 1.0):
        at = y(most * share)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        yield f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{most * share:.0f}</text>'
    for step in range(5):
        anchor = "start" if step == 0 else "end" if step == 4 else "middle"
        at = whole * step / 4
        yield f'<text x="{x(at):.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{duration(at) if step else "0"}</text>'


def _bands(points: Sequence[Point], whole: float) -> Iterator[tuple[str, float, float, str]]:
    """What to mark: the wait for the first chunk, stalls, and the times that the reader took."""
    first = points[0][0]
    if first >= NOTABLE * whole:
        yield "first", 0.0, first, f"first chunk {duration(first)}"
    usual = median([wait for _, wait, _ in points[1:]]) if len(points) > 1 else 0.0
    for (before, _, _), (at, wait, _) in pairwise(points):
        asked = max(at - wait, before)
        if wait >= NOTABLE * whole and wait >= 4 * usual:
            yield "stall", asked, at, f"stall {duration(wait)}"
        if asked - before >= NOTABLE * whole:
            yield "reader", before, asked, f"reader {duration(asked - before)}"
