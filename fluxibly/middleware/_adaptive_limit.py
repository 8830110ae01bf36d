"""How many calls at once a service answers without slowing down, found by latency. Pure state: every time is an argument.

The limit follows the gradient of latency, as Gradient2 of Netflix's concurrency-limits does (github.com/Netflix/concurrency-limits,
Apache-2.0): where calls take more than 1.5 times what they take on a service at rest, the limit falls in proportion; otherwise it rises by
its square root or a tenth, whichever is less. Three things differ, because answers of language models differ in length by a factor of a thousand. Latency is
that of the first chunk, or of a whole answer for each token. It is compared by rounds, of which the median counts: a round is the
calls that began first after the limit has changed. And the latency at rest is not a slow mean, which would follow that of a
service that is overloaded for long: it falls with every faster round, and rises only if half the limit makes nothing faster,
which is tried now and then.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from threading import RLock
from typing import Any, NamedTuple

from fluxibly._checks import is_mapping, number
from fluxibly._threads import renew_lock_after_fork
from fluxibly.stores import Entry

FIRST = 20.0
"""The limit before anything is known."""
HIGHEST = 100_000.0
_TOLERANCE = 1.5
"""Latency up to so many times that at rest does not lower the limit."""
_DOUBLES_BELOW = 1.25
"""In slow start, the limit is doubled while latency is below so many times that at rest."""
_OVERLOADED = 0.85
"""The limit is multiplied by this when the service had no room or no time for a call."""
_FEWEST, _MOST = 20, 100
"""The fewest and the most calls of a round. As many as the limit has places, between these."""
_ENDED = 0.8
"""The share of a round that has to have ended. To wait for the longest answers would make rounds as long as these."""
_SAMPLES = 5
"""The fewest latencies by which a round is judged."""
_FASTER = 0.3
"""The weight of a faster round in the latency at rest. A single one may be chance."""
_HELPED = 0.9
"""Latency has to fall to this when the limit is halved. Else it is not the load that makes calls slow."""
_MUCH_FASTER = 0.75
"""If half the limit makes calls as fast as that, the service was not at rest, and half of that is tried."""
_TRIAL_AFTER = 20
"""The slow rounds in a row after which half the limit is tried, to see whether the latency at rest still holds."""
_SHORTEST = 1e-9
QUIET = 10.0
"""The seconds after a 429 in which the limit stays as it is."""
REMEMBERED = 600.0
READ_EVERY = 1.0
"""The seconds after which the store is asked again what others have found."""
TOKENS_OF_START = 32.0
"""The time to the first token counts as that of so many tokens."""


class Begun(NamedTuple):
    """The round that a call belongs to, and when it began, to judge its latency by."""

    round: int
    number: int
    at: float


class _Trial(NamedTuple):
    """The limit and the latency with which those of half the limit are compared."""

    limit: float
    latency: float
    ends_there: bool
    """Whether the limit was halved on purpose, and not by slow answers."""


class AdaptiveLimit:
    """The limit under one key.

    Args:
        now: the time.
    """

    def __init__(self, now: float) -> None:
        self.renew_lock()
        renew_lock_after_fork(self)
        self.limit = FIRST
        self.changes = 0
        """How often it has changed, here or elsewhere."""
        self.used_at = now
        self.read_at = now
        """When the store is to be asked what others have found."""
        self.is_new = False
        """Whether something was found since it was last saved in the store."""
        self._is_doubling = True
        self._at_rest: dict[str, float] = {}
        """The latency of a service at rest, for streams and for whole answers."""
        self._trial: _Trial | None = None
        self._slow_rounds = 0
        """The rounds in a row that lowered the limit, or would have."""
        self._quiet_until = -1.0
        self._round = -1
        self._at_once = 0
        """The calls of this process that are under way."""
        self._begin()

    def renew_lock(self) -> None:
        """Make a new lock."""
        self._lock = RLock()  # reentrant, because a signal handler may close a stream

    def _begin(self, skip: int = 0) -> None:
        """Begin a round, with the calls that begin after some others, which fill the places that have been added."""
        self._round += 1
        self._skip = skip
        self._size = min(max(_FEWEST, int(self.limit)), _MOST)
        self._begun = self._ended = 0
        self._is_used = False
        self._most_at_once = self._at_once
        self._latencies: dict[str, list[float]] = {}

    @property
    def size(self) -> int:
        """The limit as a number of places."""
        return int(self.limit)

    @property
    def is_found(self) -> bool:
        """Whether the limit is one at which calls became slow, and not only how far it was tried."""
        return not self._is_doubling

    def waits(self) -> None:
        """Note that a call waits for a place. The limit rises only while calls do."""
        self._is_used = True

    def begun(self, now: float) -> Begun:
        """Note that a call begins."""
        with self._lock:
            self.used_at = now
            self._begun += 1
            self._at_once += 1
            self._most_at_once = max(self._most_at_once, self._at_once)
            return Begun(self._round, self._begun - self._skip, now)

    def ended(self, begun: Begun, kind: str, latency: float | None, now: float) -> bool:
        """Note that a call has ended. Return whether that has changed the limit.

        Args:
            kind: what its latency is compared with: that of the same kind.
            latency: None, if it says nothing about the service.
        """
        with self._lock:
            self._at_once -= 1
            if begun.round != self._round or not 0 < begun.number <= self._size:
                return False
            self._ended += 1
            if latency is not None:
                self._latencies.setdefault(kind, []).append(latency)
            return self._ended >= _ENDED * self._size and self._judge(now)

    def refused(self, now: float) -> None:
        """Note that the service has refused a call because of a rate. Concurrency is not what it objects to."""
        self._quiet_until = now + QUIET

    def overloaded(self, begun: Begun) -> bool:
        """Note that the service had no room or no time for a call. Return whether that has lowered the limit."""
        with self._lock:
            if begun.round != self._round:
                return False
            self._is_doubling = False
            self._change(self.limit * _OVERLOADED)
        return True

    def _judge(self, now: float) -> bool:
        """End a round, and let the limit follow from its latencies."""
        kind = max(self._latencies, key=lambda kind: len(self._latencies[kind]), default="")
        latencies = sorted(self._latencies.get(kind, ()))
        if len(latencies) < _SAMPLES:
            self._begin()
            return False
        latency = max(latencies[len(latencies) // 2], _SHORTEST)
        at_rest = self._at_rest.setdefault(kind, latency)
        if self._trial is not None and self.limit <= self._trial.limit / 2:
            self._end_trial(self._trial, kind, latency)
            return True
        if latency < at_rest:
            self._at_rest[kind] = at_rest = at_rest + _FASTER * (latency - at_rest)
        ratio = latency / at_rest
        matters = self._is_used or (ratio > _TOLERANCE and self._most_at_once >= self.limit / 2)
        if not matters or now < self._quiet_until:
            self._begin()
            return False
        if self._is_doubling and ratio < _DOUBLES_BELOW:
            self._change(2 * self.limit)
            return True
        gradient = min(_TOLERANCE / ratio, 1.0)
        self._slow_rounds = self._slow_rounds + 1 if gradient < 1.0 else 0
        if self._is_doubling or self._slow_rounds >= _TRIAL_AFTER:
            # The latency at rest may be that of the first limit, so a quarter is below that at which it was measured.
            self._trial = _Trial(self.limit, latency, ends_there=True)
            self._change(self.limit / (4 if self._is_doubling else 2))
            self._is_doubling = False
            return True
        if gradient == 1.0:
            self._trial = None
        elif self._trial is None:
            self._trial = _Trial(self.limit, latency, ends_there=False)
        self._change(self.limit * max(gradient, 0.5) + min(self.limit**0.5, max(1.0, self.limit / 10)))
        return True

    def _end_trial(self, trial: _Trial, kind: str, latency: float) -> None:
        """Learn what half the limit has changed, and go back to where the trial began, if that was one on purpose."""
        at_rest = self._at_rest[kind]
        self._trial, self._slow_rounds = None, 0
        if latency < at_rest or latency > _HELPED * trial.latency:
            self._at_rest[kind] = latency
        if latency < _MUCH_FASTER * at_rest:
            self._trial = _Trial(self.limit, latency, ends_there=True)  # it was not at rest, and perhaps is not now
            self._change(self.limit / 2)
        else:
            self._change(trial.limit if trial.ends_there else self.limit)

    def _change(self, limit: float) -> None:
        added = limit - self.limit
        self.limit = min(max(limit, 1.0), HIGHEST)
        self.changes += 1
        self.is_new = True
        self._begin(max(0, int(added)))

    def to_bytes(self) -> bytes:
        """Return what another process needs to go on from here."""
        self.is_new = False
        found = {"limit": self.limit, "changes": self.changes, "doubling": self._is_doubling, "at_rest": self._at_rest}
        return json.dumps(found).encode()

    def take_over(self, entry: Entry) -> None:
        """Go on from where another process is, if it has changed the limit since. What cannot be read is passed over."""
        try:
            said: Any = json.loads(entry.value)
        except (ValueError, RecursionError):
            return
        if not is_mapping(said) or any(number(name, said.get(name), 1) for name in ("limit", "changes")):
            return
        with self._lock:
            if said["changes"] <= self.changes:
                self.is_new = self.is_new or said["changes"] < self.changes
                return
            self._change(said["limit"])
            self.changes, self.is_new = int(said["changes"]), False
            self._is_doubling = said.get("doubling") is True
            self._trial = None
            self._at_rest.update(_latencies_in(said.get("at_rest")))


def _latencies_in(said: object) -> Mapping[str, float]:
    if not is_mapping(said):
        return {}
    return {str(kind): latency for kind, latency in said.items() if number("latency", latency, 0) is None}
