"""The rows of the input, from the view of a provider's batches: which are open, which are at the service, which were tried in vain."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from hashlib import sha256
from itertools import islice
from typing import Final, cast

import attrs

from fluxibly.batch._input import Row, Source
from fluxibly.batch._journal import Bitmap, Journal
from fluxibly.batch._requests import Requests
from fluxibly.batch._submissions import Submission

MOST_TRIES: Final = 3
"""The batches in which a row may expire, or fail in a way that may pass, until it has failed."""


@attrs.define(eq=False)
class BatchRows:
    """Knows of each row whether it is open, in a batch that may exist, and how often it was in a batch in vain.

    Args:
        source: the input.
        requests: makes requests of rows.
        journal: has the rows with a line.
        again: the rows that are asked although they have one.
        limit: the number of rows, from the first, that are packed. Answers to others are written, too.
        once: whether rows that were in a batch in vain are left as they are, without a line.
    """

    source: Source
    requests: Requests
    journal: Journal
    again: Bitmap
    limit: float
    once: bool = False

    unwritten: set[int] = attrs.field(factory=set[int], init=False)
    """The rows whose line is about to be written."""
    _taken: Bitmap = attrs.field(factory=Bitmap, init=False)
    """The rows in batches that may exist."""
    _tries: tuple[Bitmap, ...] = attrs.field(factory=lambda: tuple(Bitmap() for _ in range(MOST_TRIES)), init=False)
    """The rows that were in one batch in vain, those that were in two, and so on."""

    # State

    def is_done(self, number: int) -> bool:
        """Return whether a row has a line that counts."""
        return number in self.journal.done and number not in self.again

    def is_open(self, number: int) -> bool:
        """Return whether a row has no line, also none that is about to be written."""
        return number not in self.unwritten and not self.is_done(number)

    def take(self, submission: Submission) -> None:
        """Note that a batch may exist."""
        for number in submission.numbers():
            self._taken.add(number)

    def give_back(self, submission: Submission) -> None:
        """Note that a batch does not exist, or has ended."""
        for number in submission.numbers():
            self._taken.discard(number)

    def tries_of(self, number: int) -> int:
        """Return the number of batches in which a row was in vain."""
        return sum(number in tried for tried in self._tries)

    def note_tries(self, numbers: Iterable[int]) -> None:
        """Note that rows were in a batch in vain."""
        for number in numbers:
            for tried in self._tries:
                if number not in tried:
                    tried.add(number)
                    break

    # The input

    def unpacked(self, submissions: Iterable[Submission]) -> Iterator[Row]:
        """Begin a pass over the input: return the rows to pack.

        Args:
            submissions: the batches that may exist.
        """
        self._taken = Bitmap()
        for each in submissions:
            self.take(each)
        return iter(cast("Iterable[Row]", self.source.rows(self._is_skipped)))

    def _is_skipped(self, number: int) -> bool:
        if number >= self.limit or number in self._taken or not self.is_open(number):
            return True
        return self.once and number in self._tries[0]

    def some(self, is_wanted: Callable[[int], bool], count: int) -> Iterator[Row]:
        """Yield some rows of the input, in order.

        Args:
            is_wanted: whether it is one of them.
            count: the number of them, at which the search ends.
        """
        rows = cast("Iterable[Row]", self.source.rows(lambda number: not is_wanted(number)))
        return islice(rows, count)

    def keys_of(self, members: Bitmap) -> dict[int, str]:
        """Return the keys that rows have now, in order."""
        return {row.number: self.requests.key_of(row) for row in self.some(members.__contains__, len(members))}

    def is_changed(self, submission: Submission) -> bool:
        """Return whether rows of a batch would be asked otherwise now."""
        digest = RowsDigest()
        for number, key in self.keys_of(submission.members()).items():
            digest.add(number, key)
        return digest.text != submission.digest


class RowsDigest:
    """A hash of rows and their keys."""

    def __init__(self) -> None:
        self._hash = sha256()

    def add(self, number: int, key: str) -> None:
        """Add a row."""
        self._hash.update(f"{number}:{key}\n".encode())

    @property
    def text(self) -> str:
        """The hash of the rows so far."""
        return self._hash.hexdigest()[:32]
