"""What a stream waited for: its first chunk, stalls, and its reader."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import median
from typing import Literal, TypeAlias

import attrs

from fluxibly.cli.trace.file import TracedSpan, duration
from fluxibly.telemetry import semconv

Point: TypeAlias = tuple[float, float, int]
"""Seconds since the call began, seconds spent waiting for the chunk, characters so far."""

NOTABLE = 0.04
"""The smallest share of the whole time for which a wait is marked."""


@attrs.frozen
class Band:
    """A stretch of time to mark, in seconds since the call began. A `pause` may be the stream's or its reader's."""

    kind: Literal["first", "stall", "reader", "pause"]
    start: float
    end: float
    text: str


def waits_of(span: TracedSpan) -> list[Band]:
    """Return the notable waits of a call; none if it was not streamed."""
    points = span.arrivals
    if points:
        whole = max(span.seconds, points[-1][0], 1e-6)
        return [*bands(points, whole, stalled=span.outcome == "stalled", thinned=is_thinned(span))]
    first = span.first_chunk
    return [_first(first)] if first is not None and first >= NOTABLE * span.seconds else []


def is_thinned(span: TracedSpan) -> bool:
    """Whether only some of the chunks are recorded."""
    return bool(len(span.arrivals) < span.attributes.get(semconv.STREAM_CHUNKS, 0))


def bands(points: Sequence[Point], whole: float, *, stalled: bool, thinned: bool) -> Iterator[Band]:
    """Yield the waits for the first chunk, for later chunks (stalls), and for the reader.

    Args:
        points: the chunks; there must be at least one.
        whole: how long the call took, in seconds.
        stalled: whether the stream ended because no further chunk arrived.
        thinned: whether some chunks are left out. Then a long gap may be due to the provider or to the reader.
    """
    first, last = points[0][0], points[-1][0]
    if first >= NOTABLE * whole:
        yield _first(first)
    usual = median([wait for _, wait, _ in points[1:]]) if len(points) > 1 else 0.0
    for (before, _, _), (at, wait, _) in pairwise(points):
        asked = max(at - wait, before)
        if wait >= NOTABLE * whole and wait >= 4 * usual:
            yield Band("stall", asked, at, f"stall {duration(wait)}")
        if asked - before >= NOTABLE * whole:
            kind: Literal["pause", "reader"] = "pause" if thinned else "reader"
            yield Band(kind, before, asked, f"{kind} {duration(asked - before)}")
    if stalled and whole - last >= NOTABLE * whole:
        yield Band("stall", last, whole, f"stall {duration(whole - last)}")


def _first(seconds: float) -> Band:
    return Band("first", 0.0, seconds, f"first chunk after {duration(seconds)}")
