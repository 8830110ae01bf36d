"""The lines of rows that are answered in a provider's batches: answers, failures, and requests that cannot be sent."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from fluxibly.batch._batch_rows import BatchRows
from fluxibly.batch._counting import Counted
from fluxibly.batch._journal import Entry
from fluxibly.batch._line_writer import LineWriter
from fluxibly.batch._lines import line_of
from fluxibly.batch._rows import Row
from fluxibly.calls import Spent
from fluxibly.errors import ProviderError, error_type
from fluxibly.prices import Prices
from fluxibly.types import CallRecord, ProviderInfo, Request, Response

_MOST_HELD: Final = 5_000
"""The most failures in memory, until they are looked up in the input and written."""
_WRITE_AT_ONCE: Final = 500
"""The lines that are written together."""


class _Failure(NamedTuple):
    key: str
    error: ProviderError
    tries: int
    elapsed: float


class Outcomes:
    """Makes the lines of rows and has them written, many at a time.

    Args:
        info: the provider.
        rows: the rows. Their journal gets the lines.
        report: gets the counts.
        discount: the part of the full price that a batch saves.
        prices: finds what answers cost at the full price; None: not known.
        whole: whether lines have whole answers.
        stop_after_errors: the number of first rows that stop the run if none of them can be sent, and all fail alike. 0: never.
    """

    def __init__(
        self,
        info: ProviderInfo,
        rows: BatchRows,
        report: Counted,
        *,
        discount: float,
        prices: Prices | None,
        whole: bool,
        stop_after_errors: int,
    ) -> None:
        self.lines = LineWriter(rows.journal, report, stop_after_errors=stop_after_errors, wrote=self._wrote)
        self._info = info
        self._rows = rows
        self._journal = rows.journal
        self._discount = discount
        self._prices = prices
        self._whole = whole
        self._failures: dict[int, _Failure] = {}

    def awaits(self, number: int, *, is_answer: bool) -> bool:
        """Return whether a result is the first for its row. An answer comes in place of a failure, which was to be asked again."""
        if number in self._failures or number in self._rows.unwritten:
            return False
        return not self._rows.is_done(number) or (is_answer and number in self._journal.failed)

    def has_failed(self, number: int) -> bool:
        """Return whether a row has a failure that is not written yet."""
        return number in self._failures

    # A row

    def answer(
        self,
        number: int,
        custom_id: str | None,
        key: str,
        response: Response,
        *,
        elapsed: float,
        tries: int,
        model: str,
    ) -> None:
        """Take an answer.

        Args:
            custom_id: the name of the row in the input.
            elapsed: the seconds that the batch has taken.
            tries: the batches that the row has been in.
            model: the model that was asked for.
        """
        spent = Spent(self._info, model, response.usage, response.model)
        call = self._call(tries)
        call.model = response.model
        call.spent.append(spent)
        if self._prices is not None and (cost := self._prices.cost_of(spent)) is not None:
            call.cost = cost * (100 - round(100 * self._discount)) / 100
        self._add(number, custom_id, key, elapsed, response=response, call=call)

    def refuse(self, row: Row, key: str, error: Exception, request: Request) -> None:
        """Take the failure of a row that cannot be sent.

        Args:
            request: the request, or one of the texts of a row that makes none. The message does not quote it.
        """
        where = "" if key else row.where
        self._add(
            row.number, row.custom_id, key, failed_as=error_type(error), error=error, request=request, where=where
        )

    def fail(self, number: int, key: str, error: ProviderError, *, tries: int, elapsed: float) -> None:
        """Take a failure. Its line is made by `write_failures`, or when there are many."""
        self._failures[number] = _Failure(key, error, tries, elapsed)
        if len(self._failures) >= _MOST_HELD:
            self.write_failures()

    def write_failures(self) -> None:
        """Make the lines of failures. Their requests are read from the input, so that the messages do not quote them."""
        failures = self._failures
        if not failures:
            return
        for row in self._rows.some(failures.__contains__, len(failures)):
            key, error, tries, elapsed = failures.pop(row.number)
            try:
                request, own_key = self._rows.requests.of(row)
            except Exception:  # noqa: BLE001  # the row has changed since, and what it was is not known
                request, own_key, error = None, "", _without_message(error)
            call = self._call(tries)
            self._add(row.number, row.custom_id, key or own_key, elapsed, error=error, call=call, request=request)
        for number, (key, error, tries, elapsed) in list(failures.items()):  # the input has become shorter
            self._add(number, None, key, elapsed, error=_without_message(error), call=self._call(tries))
        failures.clear()

    def write(self) -> None:
        """Write the lines that are there, and have the disk keep them.

        Raises:
            OSError: there is no room for them.
        """
        self.lines.write()
        if not self._journal.is_synced:
            self._journal.sync()

    # Lines

    def _call(self, tries: int) -> CallRecord:
        """Return the record of a call that was never made, for the line of its row."""
        call = CallRecord()
        call.attempts, call.provider = tries, self._info
        return call

    def _add(
        self,
        number: int,
        custom_id: str | None,
        key: str,
        elapsed: float = 0.0,
        *,
        failed_as: str | None = None,
        **outcome: Any,
    ) -> None:
        line = line_of(number, custom_id, key, elapsed, whole=self._whole, **outcome)
        self._rows.unwritten.add(number)
        self.lines.add(line, failed_as)
        if len(self.lines) >= _WRITE_AT_ONCE:
            self.write()

    def _wrote(self, entry: Entry, _: int) -> None:
        self._rows.unwritten.discard(entry.row)
        self._rows.again.discard(entry.row)


def _without_message(error: ProviderError) -> ProviderError:
    """Return an error without the service's message, which may quote a request that is not known any more."""
    return type(error)(
        "the service's message is left out", retryable=error.retryable, status=error.status, code=error.code
    )
