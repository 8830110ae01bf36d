"""The results of a batch that has ended: answers are written, failures too, and rows without either are given back."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import aclosing
from functools import partial
from logging import INFO, WARNING
from time import time

import attrs

from fluxibly._logs import log
from fluxibly.batch._batch_rows import MOST_TRIES, BatchRows
from fluxibly.batch._control import BatchesReport, RetryingClient, RunControl
from fluxibly.batch._journal import Bitmap
from fluxibly.batch._outcomes import Outcomes
from fluxibly.batch._packing import Packer, row_of
from fluxibly.batch._submissions import Submission, Submissions
from fluxibly.errors import ProviderError, StreamProtocolError
from fluxibly.messages import Message
from fluxibly.providers.dialects.batches import RemoteBatch, Result
from fluxibly.types import Request


@attrs.frozen
class _Ended:
    """A batch that has ended, and what is needed to read its results."""

    submission: Submission
    batch: RemoteBatch
    members: Bitmap
    """The rows whose results are taken."""
    names: Mapping[int, str | None]
    """The `custom_id`s of rows that have some in the input."""
    elapsed: float
    """The seconds from its submission to its end."""


@attrs.define(eq=False, kw_only=True)
class Collector:
    """Writes what has become of the rows of batches.

    Args:
        stop_after_errors: the number of rows that stop the run if no row of a batch has an answer, and all fail alike. 0: never.
    """

    client: RetryingClient
    submissions: Submissions
    rows: BatchRows
    outcomes: Outcomes
    packer: Packer
    control: RunControl
    report: BatchesReport
    stop_after_errors: int

    async def collect(self, submission: Submission, batch: RemoteBatch) -> None:
        """Write the results of a batch that has ended.

        Raises:
            ProviderError: the results cannot be read.
            RunOver: the run was stopped meanwhile.
            OSError: they cannot be written.
        """
        members = submission.members()
        names = self._names_of(members) if submission.named else {}
        if submission.is_outdated:
            await self._leave_out_changed(submission, batch, members)
        ended = _Ended(submission, batch, members, names, _elapsed(submission, batch))
        counted = self.report.asked, sum(self.report.errors.values())
        for path in batch.results:
            await self.client.repeated(partial(self._take_results, path, ended))
        left = self._fail_without_result(ended)
        self.outcomes.write_failures()
        self.outcomes.write()
        self._note_end(submission, batch, left)
        self._check_alike(*counted)

    # The results

    def _names_of(self, members: Bitmap) -> dict[int, str | None]:
        """Return the `custom_id`s that rows have in the input."""
        return {row.number: row.custom_id for row in self.rows.some(members.__contains__, len(members))}

    async def _leave_out_changed(self, submission: Submission, batch: RemoteBatch, members: Bitmap) -> None:
        """Take the rows out of a batch that would be asked otherwise now. Their answers are not written."""
        keys = self.rows.keys_of(members)

        async def read(path: str) -> None:
            async with aclosing(self.client.direct.results(path)) as results:
                async for result in results:
                    number, key = row_of(result, submission.label)
                    if number is not None and keys.get(number) != key:
                        members.discard(number)

        for path in batch.results:
            await self.client.repeated(partial(read, path))

    async def _take_results(self, path: str, ended: _Ended) -> None:
        """Take the results in a file. If it is read again, those that are taken already are passed over."""
        asked = Request(model=ended.submission.model, messages=(Message.user("-"),))
        foreign = 0
        async with aclosing(self.client.direct.results(path)) as results:
            async for result in results:
                number, key = row_of(result, ended.submission.label)
                if number is None or number not in ended.members:
                    foreign += 1
                elif self.outcomes.awaits(number, is_answer=result.fate == "answered"):
                    self._take(number, key, result, asked, ended)
        if foreign:
            log(
                WARNING,
                "Batch has results of unknown rows, which are left out | id=%s, results=%d",
                id=ended.submission.id,
                results=foreign,
            )

    def _take(self, number: int, key: str, result: Result, asked: Request, ended: _Ended) -> None:
        """Take the result of a row: an answer, or a failure. A failure that may pass is left for another batch."""
        tries = self.rows.tries_of(number) + 1
        try:
            response = self.client.direct.answer(result, asked)
        except ProviderError as error:
            may_pass = error.retryable and (self.rows.once or tries < MOST_TRIES)
            if not may_pass and result.fate != "cancelled":
                error.body = None
                self.outcomes.fail(number, key, error, tries=tries, elapsed=ended.elapsed)
            return
        name, model = ended.names.get(number), ended.submission.model
        self.outcomes.answer(number, name, key, response, elapsed=ended.elapsed, tries=tries, model=model)

    # The end

    def _fail_without_result(self, ended: _Ended) -> int:
        """Let rows fail that have had no result in too many batches. Return how many others are open."""
        left = 0
        for number in ended.submission.numbers():
            if not self.rows.is_open(number) or self.outcomes.has_failed(number):
                continue
            counts = number in ended.members and not ended.batch.cancelled and not self.rows.once
            if counts and self.rows.tries_of(number) + 1 >= MOST_TRIES:
                missing = StreamProtocolError("the batch has ended without a result for this row")
                self.outcomes.fail(number, "", missing, tries=MOST_TRIES, elapsed=ended.elapsed)
            else:
                left += 1
        return left

    def _note_end(self, submission: Submission, batch: RemoteBatch, left: int) -> None:
        """Note that all results of a batch are written, and give back the rows that are left."""
        submission.tried = not batch.cancelled
        self.submissions.note(submission, "ended", tried=submission.tried, why=batch.status)
        log(INFO, "Batch ended | id=%s, status=%s, rows_left=%d", id=batch.id, status=batch.status, rows_left=left)
        if submission.tried:
            self.rows.note_tries(filter(self.rows.is_open, submission.numbers()))
        if left:
            self.packer.give_back(submission)
            if batch.cancelled:
                self.control.stop_submitting(
                    f"the batch {batch.id} was cancelled, and {left:,} of its rows have no answer"
                )

    def _check_alike(self, asked_before: int, failed_before: int) -> None:
        """Submit nothing more if all rows of a batch have failed alike.

        Args:
            asked_before: the rows that were asked before this batch.
            failed_before: those of them that failed.
        """
        asked = self.report.asked - asked_before
        if self.stop_after_errors and asked >= self.stop_after_errors and len(self.report.errors) == 1:
            kind, failures = next(iter(self.report.errors.items()))
            if failures - failed_before == asked:
                self.control.stop_submitting(f"all {asked:,} rows of a batch failed alike: {kind}")


def _elapsed(submission: Submission, batch: RemoteBatch) -> float:
    began = submission.at if batch.created_at is None else batch.created_at
    return float(max(0.0, (time() if batch.ended_at is None else batch.ended_at) - began))
