"""Whether a run at a provider's batches goes on, and questions to the service that are repeated while it does."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from logging import WARNING
from typing import Any, Final, Protocol, TypeVar

from fluxibly._logs import log
from fluxibly.batch._asking import STOPPED
from fluxibly.batch._counting import Counted
from fluxibly.batch._provider_batches import ProviderBatches
from fluxibly.errors import ProviderError, error_type
from fluxibly.providers.dialects.batches import APICall, BatchAPI
from fluxibly.providers.http.batches import BatchClient

T = TypeVar("T")
_MOST_FAILURES: Final = 10
"""The times in a row that a question to the service may fail, until the run stops."""


class BatchesReport(Counted, Protocol):
    """The parts of a `Report` about a provider's batches."""

    in_flight: int
    batches: dict[str, int]
    notice: str | None
    stopped: str | None


class RunOver(Exception):
    """The run has been stopped."""


class RunControl:
    """Whether a run goes on. It ends at once (`stop`), or when all batches have ended (`stop_submitting`)."""

    def __init__(self, report: BatchesReport) -> None:
        import anyio  # late, to keep `import fluxibly` fast

        self.is_over = False
        """Whether nothing more is done."""
        self.reason: str | None = None
        """Why no more batches are submitted. None: they are."""
        self.scope = anyio.CancelScope()
        """The scope of all that the run does."""
        self._report = report
        self._stopped: Any = anyio.Event()

    def stop(self, reason: str = STOPPED) -> None:
        """Do nothing more. The batches go on at the service."""
        if not self.is_over:
            self.is_over = True
            self.reason = reason if self.reason is None else f"{self.reason}; {reason}"
            self._stopped.set()

    def stop_submitting(self, reason: str) -> None:
        """Submit nothing more."""
        if self.reason is None:
            self.reason = self._report.notice = reason
            log(WARNING, "Batches are not submitted any more: %s", error_message=reason)

    def cancel(self) -> None:
        """Stop, also in the midst of a request."""
        self.stop()
        self.scope.cancel()

    async def wait(self, seconds: float) -> None:
        """Wait. A stop ends the wait."""
        import anyio  # late, as above

        with anyio.move_on_after(seconds):
            await self._stopped.wait()


class RetryingClient:
    """Repeats questions to the service until they succeed. A request that makes a batch is sent once: by `direct`.

    Args:
        direct: the client that repeats nothing.
    """

    def __init__(self, direct: BatchClient, settings: ProviderBatches, control: RunControl) -> None:
        self.direct = direct
        self._settings = settings
        self._control = control

    @property
    def api(self) -> BatchAPI:
        """The dialect of the service."""
        return self.direct.api

    async def ask(self, call: APICall) -> bytes:
        """Send a request that may be repeated, and return the body of its answer. Raises as `repeated`."""
        return await self.repeated(lambda: self.direct.ask(call))

    async def repeated(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Do what may be done more than once, until it succeeds.

        Raises:
            ProviderError: a repetition does not help, or has not helped.
            RunOver: the run was stopped meanwhile.
        """
        pause = self._settings.poll_every
        for failures in range(1, _MOST_FAILURES + 1):
            try:
                return await ask()
            except ProviderError as error:
                if not error.retryable or failures == _MOST_FAILURES:
                    raise
                wait = max(pause, error.retry_after or 0.0)
                log(
                    WARNING,
                    "Batch API failed, asks again | error=%s, wait=%.1fs, failures=%d: %s",
                    error=error_type(error),
                    wait=wait,
                    failures=failures,
                    error_message=str(error),
                )
            await self._control.wait(wait)
            if self._control.is_over:
                raise RunOver
            pause = min(2 * pause, self._settings.longest)
        raise AssertionError("unreachable: the last failure is raised")
