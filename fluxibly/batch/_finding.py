"""A batch whose submission was not answered: it is looked for at the service, until it is found or surely does not exist."""

from __future__ import annotations

from contextlib import aclosing
from time import time
from typing import Final, Literal, NoReturn

import attrs

from fluxibly.batch._control import RetryingClient, RunControl, RunOver
from fluxibly.batch._provider_batches import ProviderBatches
from fluxibly.batch._submissions import Submission, Submissions
from fluxibly.providers.dialects.batches import MAX_PAGES, RemoteBatch

ABSENT: Final = "absent"
"""The service has no such batch, and does not make it any more."""
UNDECIDED: Final = "undecided"
"""A later search may find the batch."""


@attrs.define(eq=False, kw_only=True)
class Finder:
    """Looks for batches in the service's list, the newest first."""

    client: RetryingClient
    submissions: Submissions
    control: RunControl
    settings: ProviderBatches

    async def find(self, submission: Submission) -> RemoteBatch | Literal["absent", "undecided"]:
        """Look for the batch of a submission.

        Raises:
            ProviderError: the service cannot be asked.
            RunOver: it can never be known whether there is one, or the run was stopped meanwhile.
        """
        batch, may_be = await self._search(submission)
        if batch is not None:
            return batch
        if may_be:
            submission.status = "looked for"
            return UNDECIDED
        is_recent = time() - submission.at < self.settings.longest  # the service may be about to make it
        return UNDECIDED if is_recent else ABSENT

    async def _search(self, submission: Submission) -> tuple[RemoteBatch | None, bool]:
        """Return the batch of a submission. Without one: whether a batch that has not ended may be it."""
        api, cursor, may_be = self.client.api, "", False
        known = {each.id for each in self.submissions.all}
        for _ in range(MAX_PAGES):
            batches, cursor = api.read_page(await self.client.ask(api.page(cursor)))
            for batch in batches:
                if batch.id == submission.newest or _is_before(batch, submission.since):
                    return None, may_be
                if batch.id in known:
                    continue
                verdict = api.is_lost(batch, submission.lost)
                if verdict is None:
                    verdict = await self._has_results_of(batch, submission)
                if verdict:
                    return batch, False
                may_be = may_be or verdict is None
            if not cursor:
                return None, may_be
        return self.give_up(
            submission, "the service has too many batches to find one whose submission was not answered"
        )

    async def _has_results_of(self, batch: RemoteBatch, submission: Submission) -> bool | None:
        """Return whether the results of a batch are those of a submission; None if it has none yet."""
        if not batch.ended:
            return None

        async def is_first_of_it() -> bool | None:
            for path in batch.results:
                async with aclosing(self.client.direct.results(path)) as results:
                    async for result in results:
                        return result.custom_id.startswith(f"{submission.label}-")
            return None

        found = await self.client.repeated(is_first_of_it)
        if found is None:
            self.give_up(submission, f"the results of the batch {batch.id} are gone, which may be a lost one")
        return found

    def give_up(self, submission: Submission, reason: str) -> NoReturn:
        """Stop the run, since nobody knows whether the rows of a batch were answered and paid.

        Raises:
            RunOver: always.
        """
        self.control.stop(
            f"{reason}, so it is not known what became of its {submission.count:,} rows; to have them asked again, delete the "
            f"lines with {submission.label!r} from {self.submissions.path}"
        )
        raise RunOver


def _is_before(batch: RemoteBatch, since: float | None) -> bool:
    return since is not None and batch.created_at is not None and batch.created_at < since
