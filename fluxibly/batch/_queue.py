"""The service's queue of batches: when it is full, the next submission waits, or is smaller."""

from __future__ import annotations

import re
from logging import WARNING
from math import inf
from time import monotonic
from typing import Final

from fluxibly._logs import log
from fluxibly.batch._provider_batches import ProviderBatches
from fluxibly.batch._submissions import Submission

_LIMIT: Final = re.compile(r"\blimit:?\s*([0-9][0-9,]*)", re.IGNORECASE)
_MOST_PAUSE: Final = 30
"""The most pauses that a submission waits for a queue without a batch of ours, in the longest times between two looks."""


def is_about_queue(code: str | None, message: str) -> bool:
    """Return whether a service refused a batch because its queue is full."""
    return code == "token_limit_exceeded" or "enqueued token" in message.lower()


class QueueLimits:
    """Keeps the limits of the service's queue, as far as refusals have shown them."""

    def __init__(self, settings: ProviderBatches) -> None:
        self.max_tokens: float | None = settings.max_tokens
        """The most tokens of input of a batch; None: not known."""
        self._longest = settings.longest
        self._full_until = 0.0
        """The monotonic time until which the queue counts as full. inf: until a batch has ended."""
        self._refusals = 0
        """The times that it was full since a batch last came to its end."""

    @property
    def is_full(self) -> bool:
        """Whether a submission would be in vain."""
        return monotonic() < self._full_until

    def note_refusal(
        self, submission: Submission, message: str, *, is_empty: bool, retry_after: float | None = None
    ) -> None:
        """Note that the queue had no room for a batch.

        Args:
            message: the service's, which may name its limit.
            is_empty: whether no batch of this run is in the queue.
            retry_after: the seconds to wait, if the service names them.
        """
        found = _LIMIT.search(message)
        limit = None if found is None else float(found[1].replace(",", ""))
        if is_empty:
            self._lower_tokens(min(limit or inf, submission.tokens / 2))
        elif limit is not None and submission.tokens > limit:
            self._lower_tokens(limit)
        pause = max(retry_after or 0.0, min(2**self._refusals, _MOST_PAUSE) * self._longest)
        self._refusals += 1
        self._full_until = monotonic() + pause if is_empty or retry_after is not None else inf
        log(
            WARNING,
            "Batch queue of the service is full, waits | rows=%d: %s",
            rows=submission.count,
            error_message=message,
        )

    def _lower_tokens(self, limit: float) -> None:
        self.max_tokens = limit if self.max_tokens is None else min(limit, self.max_tokens)

    def note_end(self, *, has_results: bool) -> None:
        """Note that a batch has left the queue.

        Args:
            has_results: whether the service has worked on it.
        """
        if has_results:
            self._refusals = 0
        if self._full_until == inf:
            self._full_until = 0.0
