"""The plot of a stream's chunks: characters over time, with the stalls marked, as an SVG with labels in HTML.

The drawing is stretched to the width of the page. Its labels are not, so that they can be read at any width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import median
from typing import TypeAlias

import attrs

from fluxibly.cli.trace.file import duration

Point: TypeAlias = tuple[float, float, int]
"""Seconds since the call began, seconds spent waiting for the chunk, characters so far."""

WIDTH, HEIGHT = 1000, 160
NOTABLE = 0.04
"""The smallest share of the whole time for which a wait is marked."""
LABEL = 24.0
"""The width of a band's label on a narrow page, in percent."""


@attrs.frozen
class Band:
    """A stretch of time to mark, in seconds since the call began."""

    kind: str
    start: float
    end: float
    text: str


def plot(points: Sequence[Point], seconds: float, *, stalled: bool = False, thinned: bool = False) -> str:
    """Draw the arrivals of a stream.

    Args:
        points: the chunks; there must be at least one chunk.
        seconds: how long the call took.
        stalled: whether the stream ended because no further chunk arrived.
        thinned: whether some chunks are left out. Then a long gap may be due to the provider or to the reader.
    """
    whole = max(seconds, points[-1][0], 1e-6)
    most = max(points[-1][2], 1)
    bands = [*_bands(points, whole, stalled=stalled, thinned=thinned)]
    marked = "".join(
        f'<rect class="{band.kind}" x="{WIDTH * band.start / whole:.1f}" y="0" '
        f'width="{WIDTH * (band.end - band.start) / whole:.1f}" height="{HEIGHT}"><title>{band.text}</title></rect>'
        for band in bands
    )
    path = f"M{WIDTH * points[0][0] / whole:.1f} {HEIGHT}"
    for at, _, characters in points:
        path += f"H{WIDTH * at / whole:.1f}V{HEIGHT - HEIGHT * characters / most:.1f}"
    path += f"H{WIDTH}"
    rug = "".join(f"M{WIDTH * at / whole:.1f} 0V1" for at, _, _ in points)
    return (
        f'<div class="plot"><div class="bands">{_labels(bands, whole)}</div>'
        f'<div class="scale"><span>{most:,}</span><span>0</span></div><div class="lines">{lines(whole)}</div>'
        f'<svg class="chunks" viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="characters over time">{marked}<path class="area" d="{path}V{HEIGHT}Z"/>'
        f'<path class="curve" d="{path}"/></svg>'
        f'<svg class="rug" viewBox="0 0 {WIDTH} 1" preserveAspectRatio="none" aria-hidden="true"><path d="{rug}"/></svg>'
        f'<div class="axis">{axis(whole)}</div></div>'
    )


def _bands(points: Sequence[Point], whole: float, *, stalled: bool, thinned: bool) -> Iterator[Band]:
    """Yield the bands to mark: the wait for the first chunk, stalls, and the time that the reader took."""
    first, last = points[0][0], points[-1][0]
    if first >= NOTABLE * whole:
        yield Band("first", 0.0, first, f"first chunk at {duration(first)}")
    usual = median([wait for _, wait, _ in points[1:]]) if len(points) > 1 else 0.0
    for (before, _, _), (at, wait, _) in pairwise(points):
        asked = max(at - wait, before)
        if wait >= NOTABLE * whole and wait >= 4 * usual:
            yield Band("stall", asked, at, f"stall {duration(wait)}")
        if asked - before >= NOTABLE * whole:
            kind = "pause" if thinned else "reader"
            yield Band(kind, before, asked, f"{kind} {duration(asked - before)}")
    if stalled and whole - last >= NOTABLE * whole:
        yield Band("stall", last, whole, f"stall {duration(whole - last)}")


def _labels(bands: Sequence[Band], whole: float) -> str:
    """Return the labels of the longest bands that fit without overlap. The other labels show as tooltips."""
    placed: list[float] = []
    labels: list[str] = []
    for band in sorted(bands, key=lambda band: band.start - band.end):
        middle = 50 * (band.start + band.end) / whole
        left = min(max(middle, LABEL / 2), 100 - LABEL / 2)
        if all(abs(left - other) >= LABEL for other in placed):
            placed.append(left)
            side = f"left:{left:.2f}%"
            if left != middle:
                side = f"{'left' if left > middle else 'right'}:0;transform:none"
            labels.append(f'<span class="{band.kind}" style="{side}">{band.text}</span>')
    return "".join(labels)


def ticks(whole: float) -> list[tuple[float, str]]:
    """Return at most six round times from 0 to `whole` (seconds), each with its label; all labels have the same unit."""
    step = 10 ** math.floor(math.log10(whole))
    step = next(step * part for part in (0.2, 0.5, 1, 2) if whole / (step * part) <= 5.5)
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if whole * scale >= 1 or unit == "µs":
            break
    digits = max(0, -math.floor(math.log10(step * scale) + 1e-9))
    return [
        (at, f"{at * scale:,.{digits}f} {unit}" if at else "0")
        for at in (step * number for number in range(int(whole / step + 1e-9) + 1))
    ]


def axis(whole: float) -> str:
    """Return the labels of a time axis, as wide as the element around them."""
    return "".join(
        f'<span style="left:{(place := 100 * at / whole):.2f}%" class="{_anchor(place)}">{text}</span>'
        for at, text in ticks(whole)
    )


def _anchor(place: float) -> str:
    return "first" if place < 1 else "last" if place > 95 else ""


def lines(whole: float) -> str:
    """Return the lines of a time axis."""
    return "".join(f'<i style="left:{100 * at / whole:.2f}%"></i>' for at, _ in ticks(whole))
