"""The executor of rows that a provider answers in batches of its own: packed, submitted, waited for, and written.

No row is paid twice. A batch that may exist at the service is looked for until it is found, or surely does not exist; its results are
written once each, whatever stops the program meanwhile (`_submissions.py`).
"""

from __future__ import annotations

from logging import INFO
from pathlib import Path
from typing import Literal

import attrs

from fluxibly._logs import log
from fluxibly.batch._batch_rows import BatchRows
from fluxibly.batch._collecting import Collector
from fluxibly.batch._control import BatchesReport, RetryingClient, RunControl, RunOver
from fluxibly.batch._finding import ABSENT, UNDECIDED, Finder
from fluxibly.batch._line_writer import DISK_FULL, is_disk_full
from fluxibly.batch._outcomes import Outcomes
from fluxibly.batch._packing import Packer
from fluxibly.batch._provider_batches import ProviderBatches
from fluxibly.batch._queue import QueueLimits
from fluxibly.batch._state import WHAT_TO_DO, State, what_changed
from fluxibly.batch._submissions import Submission, Submissions
from fluxibly.batch._submitting import Submitter
from fluxibly.errors import ConfigError, NotFound, ProviderError, error_type
from fluxibly.prices import Prices
from fluxibly.providers.http.batches import BatchClient
from fluxibly.types import ProviderInfo


@attrs.define(eq=False, kw_only=True)
class ProviderExecutor:
    """Has rows answered by the provider's batches until there are none left, or it has to stop.

    Args:
        client: the batch API.
        info: the provider.
        rows: the rows.
        report: is kept up to date.
        path: the file of submissions.
        state: a text that differs once the input or the configuration has changed.
        changed: what happens to rows in batches that would be asked otherwise now; see `Batch`.
        settings: the user's.
        prices: finds what answers cost at the full price; None: not known.
        whole: whether lines have whole answers.
        stop_after_errors: the number of rows that stop the run if no row of a batch has an answer, and all fail alike.
        withdraws: whether all batches are cancelled. What they have answered by then is written.
    """

    client: BatchClient
    info: ProviderInfo
    rows: BatchRows
    report: BatchesReport
    path: Path
    state: str
    changed: Literal["keep", "ask"] | None
    settings: ProviderBatches
    prices: Prices | None = None
    whole: bool = False
    stop_after_errors: int = 20
    withdraws: bool = False

    _control: RunControl = attrs.field(init=False)
    _api: RetryingClient = attrs.field(init=False)
    _queue: QueueLimits = attrs.field(init=False)
    _submissions: Submissions = attrs.field(init=False)
    _outcomes: Outcomes = attrs.field(init=False)
    _packer: Packer = attrs.field(init=False)
    _submitter: Submitter = attrs.field(init=False)
    _finder: Finder = attrs.field(init=False)
    _collector: Collector = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._control = RunControl(self.report)
        self._api = RetryingClient(self.client, self.settings, self._control)
        self._queue = QueueLimits(self.settings)

    # From outside

    @property
    def is_over(self) -> bool:
        """Whether nothing more is done."""
        return self._control.is_over

    def stop(self) -> None:
        """Do nothing more. The batches go on at the service."""
        self._control.stop()

    def cancel(self) -> None:
        """Stop at once, also in the midst of an upload."""
        self._control.cancel()

    async def run(self) -> None:
        """Do all that can be done.

        Raises:
            ConfigError: the file of submissions is that of something else, or of another provider.
            OSError: a file cannot be read or written. (If the disk is full, the run stops.)
        """
        with Submissions(self.path) as submissions:
            self._build(submissions)
            try:
                self._resume()
                with self._control.scope:
                    await self._run_loop()
            except RunOver:
                pass
            except ProviderError as error:
                self._control.stop(f"{error_type(error)}: {error}")
            except OSError as error:
                if not is_disk_full(error):
                    raise
                self._control.stop(DISK_FULL)
            finally:
                self._packer.close()
                self._write_last()
                self._report_batches()
            self._report_stop()

    def _write_last(self) -> None:
        """Write the lines that are there when the run ends."""
        try:
            self._outcomes.write()
        except OSError as error:
            if not is_disk_full(error):
                raise
            self._control.stop(DISK_FULL)

    def _build(self, submissions: Submissions) -> None:
        """Make the parts that work on the file of submissions."""
        api, rows, queue, control = self._api, self.rows, self._queue, self._control
        outcomes = self._outcomes = Outcomes(
            self.info,
            rows,
            self.report,
            discount=self.client.api.discount,
            prices=self.prices,
            whole=self.whole,
            stop_after_errors=self.stop_after_errors,
        )
        self._submissions = submissions
        self._finder = Finder(client=api, submissions=submissions, control=control, settings=self.settings)
        self._packer = Packer(
            client=self.client,
            rows=rows,
            outcomes=outcomes,
            submissions=submissions,
            queue=queue,
            control=control,
            settings=self.settings,
            folder=self.path.parent,
        )
        self._submitter = Submitter(
            client=api,
            info=self.info,
            submissions=submissions,
            rows=rows,
            outcomes=outcomes,
            packer=self._packer,
            queue=queue,
            control=control,
            report=self.report,
            state=self.state,
            stop_after_errors=self.stop_after_errors,
        )
        self._collector = Collector(
            client=api,
            submissions=submissions,
            rows=rows,
            outcomes=outcomes,
            packer=self._packer,
            control=control,
            report=self.report,
            stop_after_errors=self.stop_after_errors,
        )

    # Earlier runs

    def _resume(self) -> None:
        """Drop batches that were never submitted, and check that the others belong to this run.

        Raises:
            ConfigError: they do not.
        """
        for each in self._submissions.all:
            if each.step in ("packed", "uploaded"):
                self._submissions.note(each, "dropped", why="the program ended before it was submitted")
            elif each.step == "ended" and each.tried:
                self.rows.note_tries(number for number in each.numbers() if number not in self.rows.journal.done)
        for each in self._submissions.open:
            if each.service != self.info.key:
                raise ConfigError(
                    f"{self.path}: expected batches at {self.info.key}, got one at {each.service} whose results are not all "
                    "written; go on with that provider, or give another output"
                )
            if each.state != self.state:
                self._check_changed(each)

    def _check_changed(self, submission: Submission) -> None:
        """Check that the rows of a batch would be asked alike now, if the input or the configuration has changed."""
        if self.changed == "keep" or self.withdraws or not self.rows.is_changed(submission):
            return
        if self.changed is None:
            raise ConfigError(
                f"{self.path}: rows of a batch at the service would be asked differently now, because "
                f"{what_changed(State.of_text(submission.state), State.of_text(self.state))}; {WHAT_TO_DO}"
            )
        submission.is_outdated = True

    # The loop

    async def _run_loop(self) -> None:
        if self.withdraws:
            self._control.stop_submitting("cancelled")
            for each in self._submissions.open:
                await self._withdraw(each)
        pause = self.settings.poll_every
        while not self.is_over:
            await self._submit_all()
            self._report_batches()
            if not self._submissions.open and (self._control.reason is not None or not self._packer.has_more):
                return
            if await self._look():
                pause = self.settings.poll_every
                continue
            await self._control.wait(pause)
            pause = min(1.5 * pause, self.settings.longest)

    async def _submit_all(self) -> None:
        """Submit batches as long as there are rows, and the service takes them."""
        while not self.is_over and self._control.reason is None and not self._queue.is_full:
            packed = await self._packer.next()
            if packed is None:
                return
            try:
                await self._submitter.submit(packed)
            finally:
                packed.close()
            self._report_batches()

    async def _look(self) -> bool:
        """Look at all batches. Return whether something has changed, so that more may be done at once."""
        has_changed = False
        for each in self._submissions.open:
            if self.is_over:
                return False
            if each.step == "submitting":
                has_changed = await self._look_for(each) or has_changed
            if each.step == "submitted":
                has_changed = await self._look_at(each) or has_changed
            self._report_batches()
        return has_changed

    async def _look_for(self, submission: Submission) -> bool:
        """Look for a batch whose submission was not answered. Return whether it is known now what became of it."""
        found = await self._finder.find(submission)
        if found == UNDECIDED:
            return False
        if found == ABSENT:
            self._submitter.drop(submission, "the service has no such batch")
            return True
        log(INFO, "Batch found whose submission was not answered | id=%s", id=found.id)
        self._submissions.note(submission, "submitted", id=found.id)
        if self.withdraws:
            await self._withdraw(submission)
        return True

    async def _look_at(self, submission: Submission) -> bool:
        """Look at a batch, and take what it came to. Return whether it has ended."""
        api, batch_id = self._api.api, submission.id or ""
        try:
            batch = api.read(await self._api.ask(api.status(batch_id)))
        except NotFound as error:
            reason = f"the service does not know the batch {batch_id} any more ({error_type(error)}: {error})"
            self._finder.give_up(submission, reason)
        submission.status, submission.processed = batch.status, batch.processed
        if not batch.ended:
            return False
        if batch.problems:
            self._submitter.take_problems(submission, batch)
        elif batch.processed and not batch.results:
            self._finder.give_up(submission, f"the service has no results of the batch {batch.id} any more")
        else:
            await self._collector.collect(submission, batch)
            self._submitter.note_results()
        self._queue.note_end(has_results=not batch.problems)
        return True

    async def _withdraw(self, submission: Submission) -> None:
        """Cancel a batch at the service. It still has to end."""
        if submission.id is None:
            return
        try:
            await self._api.ask(self._api.api.cancel(submission.id))
        except ProviderError as error:
            if error.status is None or error.status >= 500:
                raise
            log(INFO, "Batch could not be cancelled | id=%s: %s", id=submission.id, error_message=str(error))

    # The report

    def _report_batches(self) -> None:
        """Count the batches, and the rows at the service."""
        counts: dict[str, int] = {}
        rows = 0
        for each in self._submissions.all:
            if each.step in ("submitting", "submitted"):
                name = each.status or "submitted"
                rows += max(0, each.count - each.processed)
            elif each.step == "ended":
                name = "ended"
            else:
                continue
            counts[name] = counts.get(name, 0) + 1
        self.report.batches, self.report.in_flight = counts, rows

    def _report_stop(self) -> None:
        """Report why the run ended, if rows may be left."""
        reason, still = self._control.reason, self._submissions.open
        if reason is not None and still:
            rows = sum(each.count for each in still)
            reason += (
                f"; {len(still)} {'batch goes' if len(still) == 1 else 'batches go'} on at the service ({rows:,} "
                f"{'row' if rows == 1 else 'rows'}), and another run waits for the answers"
            )
        if reason is not None:
            self.report.stopped = reason
