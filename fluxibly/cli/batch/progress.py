"""How far a batch is: rows, rate, and the time that is left."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

import attrs

from fluxibly.batch import Batch

WINDOW = 10.0
"""The seconds over which the rate is measured."""


class _Input(Protocol):
    @property
    def size(self) -> int | None: ...
    @property
    def position(self) -> int: ...


@attrs.frozen
class Figures:
    """How far a batch is."""

    done: int
    """The rows that have a line."""
    total: int | None
    """The rows in all; None if nothing is known of them."""
    is_exact: bool
    """Whether `total` was counted. Otherwise it is estimated from the bytes that were read."""
    rate: float
    """The rows a second that ended in the last seconds."""

    @property
    def share(self) -> float | None:
        """The share of the rows that is done, from 0 to 1."""
        return None if self.total is None else min(1.0, self.done / self.total) if self.total else 1.0

    @property
    def seconds_left(self) -> float | None:
        """The seconds until the last row, at the rate of the last seconds."""
        if self.total is None or not self.rate:
            return None
        return max(0, self.total - self.done) / self.rate

    def rows(self) -> str:
        """Return how many rows of how many are done."""
        if self.total is None:
            return f"{self.done:,} rows"
        return f"{self.done:,} of {'' if self.is_exact else 'about '}{self.total:,} rows"


class Progress:
    """The progress of a batch while it runs."""

    def __init__(self, batch: Batch, clock: Callable[[], float] = time.monotonic) -> None:
        self._batch = batch
        self._clock = clock
        self._asked: deque[tuple[float, int]] = deque([(clock(), 0)])
        """Times, and the rows that this run had asked then."""

    def figures(self) -> Figures:
        """Return how far the batch is now."""
        report = self._batch.report
        now, asked = self._clock(), self._asked
        while len(asked) > 1 and asked[1][0] <= now - WINDOW:
            asked.popleft()
        since, before = asked[0]
        asked.append((now, report.asked))
        rate = (report.asked - before) / (now - since) if now > since else 0.0
        done = report.answered + report.failed
        total, is_exact = total_of(self._batch.source, self._batch.reached, self._batch.limit)
        return Figures(done, None if total is None else max(total, done), is_exact, rate)


def total_of(source: _Input, reached: int, limit: int | None) -> tuple[int | None, bool]:
    """Return the rows of an input, or the first of them that a limit allows, and whether they were counted.

    Until the input was read to its end, their number follows from the share of its bytes that was read.

    Args:
        reached: the rows up to the last one that was read.
    """
    size, position = source.size, source.position
    if limit is not None and reached >= limit:
        return limit, True
    if size is not None and position >= size and (reached or not size):
        return reached, True
    if size is None or not position or not reached:
        return limit, False
    total = max(_rounded(reached * size / position), reached)
    return (total if limit is None else min(total, limit)), False


def _rounded(number: float) -> int:
    """Return a number in three digits, so that it does not change all the time."""
    return round(float(f"{number:.3g}"))
