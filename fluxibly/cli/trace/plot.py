"""The plot of a stream's chunks: characters over time, with the stalls marked, as an SVG with labels in HTML.

The drawing is stretched to the width of the page. Its labels are not, so that they can be read at any width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from fluxibly.cli.trace.waits import Band, Point, bands

WIDTH, HEIGHT = 1000, 160
LETTER, NARROW_LETTER = 1.1, 2.2
"""The width of a label's letter in percent of the plot, on a page of 700 pixels, and on one of 400."""


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
    marks = [*bands(points, whole, stalled=stalled, thinned=thinned)]
    marked = "".join(
        f'<rect class="{band.kind}" x="{WIDTH * band.start / whole:.1f}" y="0" '
        f'width="{WIDTH * (band.end - band.start) / whole:.1f}" height="{HEIGHT}"><title>{band.text}</title></rect>'
        for band in marks
    )
    start, path, rug = _paths(points, whole, most)
    curve = f"M{start} {HEIGHT}{path}"
    return (
        f'<div class="plot"><div class="bands">{_labels(marks, whole)}</div>'
        f'<div class="scale"><span>{most:,}</span><span>0</span></div><div class="lines">{lines(whole)}</div>'
        f'<svg class="chunks" viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="characters over time">{marked}<path class="area" d="{curve}V{HEIGHT}Z"/>'
        f'<path class="curve" d="{curve}"/></svg>'
        f'<svg class="rug" viewBox="0 0 {WIDTH} 1" preserveAspectRatio="none" aria-hidden="true"><path d="{rug}"/></svg>'
        f'<div class="axis">{axis(whole)}</div></div>'
    )


def _paths(points: Sequence[Point], whole: float, most: int) -> tuple[int, str, str]:
    """Return where the curve begins, the curve, and the rug: steps to whole units, because a page may have many plots."""
    curve: list[str] = []
    rug: list[str] = []
    start = x = round(WIDTH * points[0][0] / whole)
    y = HEIGHT
    rug_at = 0
    for at, _, characters in points:
        right, up = round(WIDTH * at / whole) - x, y - round(HEIGHT * (1 - characters / most))
        x, y = x + right, y - up
        curve.append((f"h{right}" if right else "") + (f"v{-up}" if up else ""))
        if right or not rug:
            rug.append(f"m{x - rug_at} 0v1m0-1")
            rug_at = x
    return start, "".join([*curve, f"H{WIDTH}"]), "M0 0" + "".join(rug)


def _labels(marks: Sequence[Band], whole: float) -> str:
    """Return the labels of the longest bands that fit without overlap. The other labels show as tooltips."""
    placed: list[tuple[float, float]] = []
    placed_narrow: list[tuple[float, float]] = []
    labels: list[str] = []
    for band in sorted(marks, key=lambda band: band.start - band.end):
        middle = 50 * (band.start + band.end) / whole
        if not _place(middle, LETTER * len(band.text), placed):
            continue
        narrow = "" if _place(middle, NARROW_LETTER * len(band.text), placed_narrow) else " wide"
        width = LETTER * len(band.text)
        side = f"left:{middle:.2f}%"
        if not width / 2 <= middle <= 100 - width / 2:
            side = f"{'left' if middle < 50 else 'right'}:0;transform:none"
        labels.append(f'<span class="{band.kind}{narrow}" style="{side}">{band.text}</span>')
    return "".join(labels)


def _place(middle: float, width: float, placed: list[tuple[float, float]]) -> bool:
    """Place a label of this width around `middle`, within the plot, unless it would overlap another. All in percent."""
    left = min(max(middle - width / 2, 0), 100 - width)
    if any(left < other_right and other_left < left + width for other_left, other_right in placed):
        return False
    placed.append((left, left + width))
    return True


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
