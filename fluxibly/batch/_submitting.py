"""A packed batch handed to the service: its upload, its submission, and what follows from a refusal."""

from __future__ import annotations

from logging import INFO, WARNING
from typing import Any, Final

import attrs

from fluxibly._logs import log
from fluxibly.batch._batch_rows import BatchRows
from fluxibly.batch._control import BatchesReport, RetryingClient, RunControl
from fluxibly.batch._outcomes import Outcomes
from fluxibly.batch._packing import PackedBatch, Packer
from fluxibly.batch._queue import QueueLimits, is_about_queue
from fluxibly.batch._submissions import Submission, Submissions
from fluxibly.errors import BadRequest, ProviderError, error_type
from fluxibly.providers.dialects.batches import Problem, RemoteBatch
from fluxibly.types import ProviderInfo

_NOT_BEGUN: Final = "the service did not begin it"
_MOST_REFUSED: Final = 3
"""The batches in a row that the service may refuse for some of their rows, until the run stops."""


@attrs.define(eq=False, kw_only=True)
class Submitter:
    """Submits batches, and gives the rows back of those that the service does not take.

    Args:
        state: the input and the configuration, as `Submission.state`.
        stop_after_errors: the number of refused rows that stop the run if all are refused alike. 0: any number is allowed.
    """

    client: RetryingClient
    info: ProviderInfo
    submissions: Submissions
    rows: BatchRows
    outcomes: Outcomes
    packer: Packer
    queue: QueueLimits
    control: RunControl
    report: BatchesReport
    state: str
    stop_after_errors: int

    _refused: int = attrs.field(default=0, init=False)
    """The batches that the service refused for some of their rows since one came to its end."""

    async def submit(self, packed: PackedBatch) -> None:
        """Upload a batch, and submit it. Each step is in the file of submissions before it is done.

        Raises:
            ProviderError: the upload has failed, so there is no batch.
            RunOver: the run was stopped meanwhile.
        """
        client, api, submission = self.client, self.client.api, packed.submission
        submission.service, submission.state, submission.digest = self.info.key, self.state, packed.digest
        self.submissions.begin(submission)
        upload = api.upload(submission.label)
        facts: dict[str, Any] = {}
        if api.in_files:
            file = api.uploaded(await client.repeated(lambda: client.direct.upload(upload, packed.file)))
            self.submissions.note(submission, "uploaded", file=file.id, since=file.created_at)
        else:
            newest, _ = api.read_page(await client.ask(api.page("", limit=1)))
            facts = {"newest": newest[0].id, "since": newest[0].created_at} if newest else {}
        if self.control.is_over:
            return
        self.submissions.note(submission, "submitting", **facts)
        self.rows.take(submission)
        try:
            if submission.file is not None:
                body = await client.direct.ask(api.submit(submission.label, submission.file))
            else:
                body = await client.direct.upload(upload, packed.file)
            batch = api.read(body)
        except ProviderError as error:
            self._note_failure(submission, error)
            return
        self.submissions.note(submission, "submitted", id=batch.id)
        submission.status = batch.status
        self.report.notice = None
        log(INFO, "Batch submitted | id=%s, rows=%d", id=batch.id, rows=submission.count)

    def drop(self, submission: Submission, why: str) -> None:
        """Give the rows back of a batch that surely does not exist, or was never begun.

        Args:
            why: without the service's words, which may quote rows.
        """
        self.submissions.note(submission, "dropped", why=why)
        self.packer.give_back(submission)

    def note_results(self) -> None:
        """Note that a batch came to its end."""
        self._refused = 0

    def _note_failure(self, submission: Submission, error: ProviderError) -> None:
        """Note that a submission failed: surely, or in a way that leaves open whether there is a batch."""
        if error.status is None or not 400 <= error.status < 500 or error.status == 408:
            self.report.notice = "the answer to a submission was lost, so the batch is looked for"
            log(
                WARNING,
                "Batch submission was not answered, so the batch is looked for | error=%s: %s",
                error=error_type(error),
                error_message=str(error),
            )
        elif is_about_queue(error.code, str(error)) or (error.status == 429 and error.retryable):
            self._note_full_queue(submission, str(error), error.retry_after)
        else:
            self.drop(submission, error_type(error))
            self.control.stop_submitting(f"the service refused a batch: {error_type(error)}: {error}")

    def _note_full_queue(self, submission: Submission, message: str, retry_after: float | None = None) -> None:
        self.drop(submission, "the service's queue is full")
        is_empty = not self.submissions.open
        self.queue.note_refusal(submission, message, is_empty=is_empty, retry_after=retry_after)

    # Validation by the service

    def take_problems(self, submission: Submission, batch: RemoteBatch) -> None:
        """Take why the service did not begin a batch. Rows that it names have failed; the others go into another batch."""
        for problem in batch.problems:
            if is_about_queue(problem.code, problem.message):
                self._note_full_queue(submission, problem.message)
                return
        reason = _refusal(submission, batch)
        self.report.notice = reason
        log(WARNING, "Batch refused | rows=%d: %s", rows=submission.count, error_message=reason)
        self._refused += 1
        by_row = _problems_by_row(submission, batch)
        if self._is_hopeless(by_row, batch):
            self.drop(submission, _NOT_BEGUN)
            self.control.stop_submitting(reason)
            return
        for number, problem in by_row.items():
            if self.rows.is_open(number):
                error = BadRequest(problem.message or problem.code, code=problem.code or None)
                error.provider, error.model = self.info.framework, submission.model
                self.outcomes.fail(number, "", error, tries=1, elapsed=0.0)
        self.outcomes.write_failures()
        self.outcomes.write()
        self.drop(submission, _NOT_BEGUN)

    def _is_hopeless(self, by_row: dict[int, Problem], batch: RemoteBatch) -> bool:
        """Return whether other batches are likely to be refused, too."""
        are_alike = len({problem.code for problem in batch.problems}) == 1
        if are_alike and 0 < self.stop_after_errors <= len(by_row):
            return True
        return not by_row or self._refused > _MOST_REFUSED


def _problems_by_row(submission: Submission, batch: RemoteBatch) -> dict[int, Problem]:
    """Return the first problem of each row that the service names."""
    found: dict[int, Problem] = {}
    for problem in batch.problems:
        number = None if problem.line is None else submission.row_at(problem.line - 1)
        if number is not None:
            found.setdefault(number, problem)
    return found


def _refusal(submission: Submission, batch: RemoteBatch) -> str:
    """Return a sentence on why the service did not begin a batch."""
    first = batch.problems[0]
    where = ""
    if first.line is not None:
        where = f"line {first.line} (row {submission.row_at(first.line - 1)}): "
    sentence = f"the service did not begin the batch {batch.id}: {where}{first.message or first.code}"
    if len(batch.problems) > 1:
        sentence += f" (and {len(batch.problems) - 1} more)"
    return sentence
