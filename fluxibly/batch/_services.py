"""Rows that a provider answers in batches of its own: packed, submitted, waited for, and written.

No row is paid twice. A batch that may exist at the service is looked for until it is found, or surely does not exist; its results are
written once each, whatever stops the program meanwhile (`_submissions.py`).
"""

from __future__ import annotations

import re
import tempfile
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import aclosing
from hashlib import sha256
from itertools import islice
from logging import INFO, WARNING
from math import inf
from pathlib import Path
from secrets import token_hex
from time import monotonic, time
from typing import Any, BinaryIO, Final, Literal, NoReturn, Protocol, TypeVar, cast

import attrs

from fluxibly import _checks
from fluxibly._checks import kind_of, validator
from fluxibly._logs import log
from fluxibly.batch._asking import DISK_FULL, FULL, STOPPED
from fluxibly.batch._counting import Counted, count_line, count_rows
from fluxibly.batch._input import Row, Source
from fluxibly.batch._journal import Bitmap, Entry, Journal
from fluxibly.batch._lines import encoded, line_of
from fluxibly.batch._state import WHAT_TO_DO, State, what_changed
from fluxibly.batch._submissions import Submission, Submissions, add_row
from fluxibly.calls import Spent
from fluxibly.errors import (
    BadPrompt,
    BadRequest,
    ConfigError,
    NotFound,
    ProviderError,
    StreamProtocolError,
    error_type,
)
from fluxibly.messages import Message
from fluxibly.middleware import Cost
from fluxibly.prices import Prices
from fluxibly.providers.dialects.batches import MAX_PAGES, Pack, Problem, RemoteBatch, Result
from fluxibly.providers.http import AsyncHTTPProvider
from fluxibly.providers.http.batches import BatchClient
from fluxibly.registry import built_in_kind
from fluxibly.types import CallRecord, ProviderInfo, Request

T = TypeVar("T")
MOST_TRIES: Final = 3
"""The batches in which a row may expire, or fail in a way that may pass, until it has failed."""
_MOST_FAILURES: Final = 10
"""The times in a row that a question to the service may fail, until the run stops."""
_MOST_REFUSED: Final = 3
"""The batches in a row that the service may refuse for some of their rows, until the run stops."""
_MOST_MODELS: Final = 16
"""The most models whose rows are packed side by side."""
_MOST_HELD: Final = 5_000
"""The most failed rows that are kept in memory, until they are looked up in the input and written."""
_WRITE_AT_ONCE: Final = 500
_KEY: Final = 40
_LIMIT: Final = re.compile(r"\blimit:?\s*([0-9][0-9,]*)", re.IGNORECASE)


@attrs.frozen(kw_only=True)
class ProviderBatches:
    """How rows are answered in batches of the provider: `Batch(executor=ProviderBatches(…))`.

    Args:
        poll_every: seconds between two looks at a batch, at first. They grow to six times as many. A batch whose submission was
            not answered counts as never made if it is not found within that time.
        max_rows: the most rows of a batch; None: as many as the service takes.
        max_tokens: the most tokens of input of a batch, as they are estimated (a token for 3.5 bytes); None: no limit, until the
            service names one.

    Raises:
        ValueError: a number is out of range.
    """

    poll_every: float = attrs.field(default=10.0, validator=validator(_checks.number, above=0))
    max_rows: int | None = attrs.field(default=None, validator=attrs.validators.optional(validator(_checks.whole, 1)))
    max_tokens: int | None = attrs.field(default=None, validator=attrs.validators.optional(validator(_checks.whole, 1)))

    @property
    def longest(self) -> float:
        """The most seconds between two looks."""
        return 6 * self.poll_every


# The stack

_WITHOUT_EFFECT: Final = frozenset(
    [
        "Tracing",
        "Logging",
        "Metrics",
        "Timing",
        "StreamMeter",
        "SimulateStream",
        "Retry",
        "Hedge",
        "CircuitBreaker",
        "RateLimit",
        "Concurrency",
        "Deadline",
        "StreamTimeout",
    ]
)
"""The layers that change neither what is asked nor what is answered: they watch calls, repeat them, or have them wait."""


def check_layers(stack: Iterable[object], *, goes_online: bool = False) -> None:
    """Check that a stack means the same for a batch as for calls, which pass its layers. `Cost` and `Defaults` do.

    Raises:
        ConfigError: a layer changes what is asked or answered.
    """
    idle: list[str] = []
    for layer in stack:
        name = built_in_kind(layer)
        if name in _WITHOUT_EFFECT or _only_warns(layer):
            idle.append(str(name))
        elif name not in ("Cost", "Defaults"):
            shown = name or getattr(layer, "__name__", kind_of(layer))
            raise ConfigError(
                f"{shown} cannot act on a provider's batch, whose requests pass no layers; expected a stack without it: take it "
                "out, or write executor='online'"
            )
    if idle and not goes_online:
        log(INFO, "A provider's batch passes no layers | without_effect=%s", without_effect=", ".join(idle))


def _only_warns(layer: object) -> bool:
    """Whether a layer is a `Validation` that lets every answer pass, as that of the default stack."""
    if built_in_kind(layer) != "Validation":
        return False
    checks: Any = layer
    return checks.empty == "warn" and checks.check is None and checks.schema is None


def client_of(provider: object, info: ProviderInfo) -> BatchClient:
    """Return the batch API of a provider.

    Raises:
        ConfigError: it has none that fluxibly knows.
    """
    client = provider.batches if isinstance(provider, AsyncHTTPProvider) else None
    if client is None:
        raise ConfigError(
            f"executor='provider': expected a framework with a batch API (openai, openai-responses, groq, together, anthropic), "
            f"got {info.framework}; write executor='online'"
        )
    return client


# The run


class _Requests(Protocol):
    def of(self, row: Row, /) -> tuple[Request, str]:
        """Return the request of a row, and its key. Raises any Exception if it cannot be asked."""
        ...

    def key_of(self, row: Row, /) -> str:
        """Return the key of a row; "" if it cannot be asked."""
        ...

    def completed(self, request: Request, /) -> Request:
        """Return a request with what the stack adds to it."""
        ...


class _Counted(Counted, Protocol):
    batches: dict[str, int]
    notice: str | None


class _Over(Exception):
    """The run has to stop."""


class _Packing:
    """An upload in the making: its rows stand in a file that is gone when the process is."""

    def __init__(self, pack: Pack, folder: Path, model: str) -> None:
        self.pack = pack
        self.submission = Submission(token_hex(6), [], model)
        self.digest = sha256()
        self.file: BinaryIO = cast("BinaryIO", tempfile.TemporaryFile(dir=folder))  # noqa: SIM115  # closed by `close`

    def add(self, row: Row, key: str, data: bytes, separator: bytes) -> None:
        _hash_row(self.digest, row.number, key)
        if self.pack.rows:
            self.file.write(separator)
        self.file.write(data)
        self.pack.add(data)
        add_row(self.submission.rows, row.number)
        self.submission.named = self.submission.named or row.custom_id is not None
        self.submission.tokens = self.pack.tokens

    def close(self) -> None:
        self.file.close()


@attrs.define(eq=False)
class AtProvider:
    """Has rows answered by the provider's batches until there are none left, or it has to stop.

    Args:
        client: the batch API.
        info: the provider.
        requests: makes requests of rows.
        source: the rows.
        is_done: whether a row has a line, and is not to be asked again.
        limit: the number of rows, from the first, that are to be asked. Answers to others are written, too.
        journal: takes the lines.
        report: counts meanwhile.
        path: the file of submissions.
        state: tells whether the input and the configuration are what they were.
        changed: what happens to rows in batches that would be asked otherwise now; see `Batch`.
        settings: the user's.
        prices: finds what answers cost at the full price; None: not known.
        whole: whether lines have whole answers.
        stop_after_errors: the number of rows that stop the run if no row of a batch has an answer, and all fail alike.
        once: whether rows that expired, or failed in a way that may pass, are left as they are, without a line.
        withdraws: whether all batches are cancelled. What they have answered by then is written.
        wrote: is called with the number of each row that gets a line.
    """

    client: BatchClient
    info: ProviderInfo
    requests: _Requests
    source: Source
    is_done: Callable[[int], bool]
    limit: float
    journal: Journal
    report: _Counted
    path: Path
    state: str
    changed: Literal["keep", "ask"] | None
    settings: ProviderBatches
    prices: Prices | None = None
    whole: bool = False
    stop_after_errors: int = 20
    once: bool = False
    withdraws: bool = False
    wrote: Callable[[int], object] = lambda _: None

    is_over: bool = attrs.field(default=False, init=False)
    """Whether nothing more is done."""
    _why: str | None = attrs.field(default=None, init=False)
    """Why no more batches are submitted."""
    _submissions: Submissions = attrs.field(init=False)
    _rows: Iterator[Row] | None = attrs.field(default=None, init=False)
    _packings: dict[str, _Packing] = attrs.field(factory=dict[str, _Packing], init=False)
    _is_pass_due: bool = attrs.field(default=True, init=False)
    """Whether the input has to be read once more, because rows of it are free again."""
    _taken: Bitmap = attrs.field(factory=Bitmap, init=False)
    """The rows in batches that may exist."""
    _tries: tuple[Bitmap, ...] = attrs.field(factory=lambda: tuple(Bitmap() for _ in range(MOST_TRIES)), init=False)
    """The rows that were in one batch in vain, those that were in two, and so on."""
    _max_tokens: float | None = attrs.field(default=None, init=False)
    _full_until: float = attrs.field(default=0.0, init=False)
    """The monotonic time before which nothing is submitted, because the service's queue is full."""
    _full: int = attrs.field(default=0, init=False)
    """The times that it was full since it last took a batch to the end."""
    _refused: int = attrs.field(default=0, init=False)
    _has_packed: bool = attrs.field(default=False, init=False)
    """Whether a row of this run could be sent, or more have failed than are held back."""
    _entries: deque[Entry] = attrs.field(factory=deque[Entry], init=False)
    _buffered: set[int] = attrs.field(factory=set[int], init=False)
    _failed: dict[int, tuple[str, ProviderError, int, float]] = attrs.field(
        factory=dict[int, tuple[str, ProviderError, int, float]], init=False
    )
    """The failed rows of a batch that are not written yet: the key, the error, the attempts and the seconds."""
    _has_changed: set[str] = attrs.field(factory=set[str], init=False)
    """The batches with rows that would be asked otherwise now, and are to be."""
    _stopping: Any = attrs.field(default=None, init=False)
    _scope: Any = attrs.field(default=None, init=False)

    # From outside

    def stop(self, why: str = STOPPED) -> None:
        """Do nothing more. The batches go on at the service."""
        if not self.is_over:
            self.is_over = True
            self._why = why if self._why is None else f"{self._why}; {why}"
            if self._stopping is not None:
                self._stopping.set()

    def cancel(self) -> None:
        """Stop at once, also in the midst of an upload."""
        self.stop()
        if self._scope is not None:
            self._scope.cancel()

    async def run(self) -> None:
        """Do all that can be done.

        Raises:
            ConfigError: the file of submissions is that of something else, or of another provider.
            OSError: a file cannot be read or written. (If the disk is full, the run stops.)
        """
        import anyio  # late, to keep `import fluxibly` fast

        self._stopping = anyio.Event()
        if self.is_over:
            self._stopping.set()
        self._max_tokens = self.settings.max_tokens
        with Submissions(self.path) as self._submissions:
            try:
                self._resume()
                with anyio.CancelScope() as self._scope:
                    await self._go()
            except _Over:
                pass
            except ProviderError as error:
                self.stop(_told(error))
            except OSError as error:
                if error.errno not in FULL:
                    raise
                self.stop(DISK_FULL)
            finally:
                for packing in self._packings.values():
                    packing.close()
                self._tell()
            self._conclude()

    # The loop

    def _resume(self) -> None:
        for each in self._submissions.all:
            if each.step in ("packed", "uploaded"):
                self._submissions.note(each, "dropped", why="the program ended before it was submitted")
            elif each.step == "ended" and each.tried:
                self._note_tries(number for number in each.numbers() if number not in self.journal.done)
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
        if self.changed == "keep" or self.withdraws:
            return
        members, found = _members(submission), sha256()
        for number, key in self._keys_of(members).items():
            _hash_row(found, number, key)
        if found.hexdigest()[:32] == submission.digest:
            return
        if self.changed is None:
            raise ConfigError(
                f"{self.path}: rows of a batch at the service would be asked differently now, because "
                f"{what_changed(State.of_text(submission.state), State.of_text(self.state))}; {WHAT_TO_DO}"
            )
        self._has_changed.add(submission.label)

    def _keys_of(self, members: Bitmap) -> dict[int, str]:
        """Return the keys that rows have now, in their order."""
        return {row.number: self.requests.key_of(row) for row in self._only(members.__contains__, len(members))}

    def _only(self, is_wanted: Callable[[int], bool], count: int) -> Iterator[Row]:
        """Yield some rows of the input. `count`: how many there are at most."""
        rows = cast("Iterable[Row]", self.source.rows(lambda number: not is_wanted(number)))
        return islice(rows, count)

    async def _go(self) -> None:
        if self.withdraws:
            self._halt("cancelled")
            for each in self._submissions.open:
                await self._withdraw(each)
        pause = self.settings.poll_every
        while not self.is_over:
            await self._submit_all()
            self._tell()
            if not self._submissions.open and (self._why is not None or not self._has_more):
                return
            if await self._look():
                pause = self.settings.poll_every
                continue
            await self._wait(pause)
            pause = min(1.5 * pause, self.settings.longest)

    @property
    def _has_more(self) -> bool:
        """Whether there may be rows that are in no batch."""
        return self._is_pass_due or self._rows is not None or bool(self._packings)

    def _halt(self, why: str) -> None:
        """Submit nothing more. The run ends when all batches have."""
        if self._why is None:
            self._why = self.report.notice = why
            log(WARNING, "Batches are not submitted any more: %s", error_message=why)

    def _conclude(self) -> None:
        """Say why the run ended, if rows are left."""
        still = self._submissions.open
        if self._why is None:
            return
        self.report.stopped = self._why
        if still:
            rows = sum(each.count for each in still)
            self.report.stopped += (
                f"; {len(still)} {'batch goes' if len(still) == 1 else 'batches go'} on at the service ({rows:,} "
                f"{'row' if rows == 1 else 'rows'}), and another run waits for the answers"
            )

    def _tell(self) -> None:
        """Count the batches and the rows at the service."""
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

    async def _wait(self, seconds: float) -> None:
        """Wait, or until the run has to stop."""
        import anyio  # late, as above

        with anyio.move_on_after(seconds):
            await self._stopping.wait()

    async def _steadily(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Do what may be done more than once, until it succeeds.

        Raises:
            ProviderError: asking again does not help, or has not.
        """
        pause = self.settings.poll_every
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
            await self._wait(wait)
            if self.is_over:
                raise _Over
            pause = min(2 * pause, self.settings.longest)
        raise AssertionError("unreachable: the last failure is raised")

    # Packing

    async def _pack(self) -> _Packing | None:
        """Return the next upload; None if there are no rows, or the run has to stop."""
        from anyio.lowlevel import checkpoint  # late, as above

        while True:
            if self._rows is None:
                if self._packings:
                    return self._packings.pop(next(iter(self._packings)))
                if not self._is_pass_due:
                    return None
                self._is_pass_due = False
                self._taken = Bitmap()
                for each in self._submissions.open:
                    for number in each.numbers():
                        self._taken.add(number)
                self._rows = iter(cast("Iterable[Row]", self.source.rows(self._is_skipped)))
            for count, row in enumerate(self._rows, 1):
                if count % 100 == 0:
                    await checkpoint()
                if self.is_over:
                    return None
                packing = self._add(row)
                if packing is not None:
                    return packing
            self._rows = None
            self._write()

    def _is_skipped(self, number: int) -> bool:
        if number >= self.limit or number in self._taken or not self._is_open(number):
            return True
        return self.once and number in self._tries[0]

    def _is_open(self, number: int) -> bool:
        """Whether a row has no line yet, also none that is about to be written."""
        return number not in self._buffered and not self.is_done(number)

    def _add(self, row: Row) -> _Packing | None:
        """Pack a row. Return an upload that is full."""
        key, request, api = "", None, self.client.api
        try:
            request, key = self.requests.of(row)
            model = self.requests.completed(request).model
            packing = self._packings.get(model)
            custom_id = _id_of(packing, row.number, key)
            data = self.client.row(custom_id, self.requests.completed(request))
            fresh = Pack(api, max_rows=self.settings.max_rows, max_tokens=self._max_tokens)
            if not fresh.fits(data):
                raise BadRequest(
                    f"expected a request of at most {api.max_bytes:,} bytes for a batch, got {len(data):,}"
                )
        except Exception as error:  # noqa: BLE001  # one row harms no other
            where = "" if key else row.where
            self._finish(row.number, row.custom_id, key, error=error, request=request, where=where)
            self._check_first(error)
            return None
        self._has_packed = True
        full = None
        if packing is not None and not packing.pack.fits(data):
            full = packing
            packing = None
        elif packing is None and len(self._packings) >= _MOST_MODELS:
            full = self._packings.pop(next(iter(self._packings)))
        if packing is None:
            packing = self._packings[model] = _Packing(fresh, self.path.parent, model)
            data = self.client.row(_id_of(packing, row.number, key), self.requests.completed(request))
        packing.add(row, key, data, api.separator)
        return full

    def _check_first(self, error: Exception) -> None:
        """Stop if the first rows of the run all fail alike before they are sent. They get no line then."""
        count = len(self._entries)
        if self._has_packed or not self.stop_after_errors or count != self.report.asked:
            self._has_packed = True
        elif count >= self.stop_after_errors and self.report.errors == {error_type(error): count}:
            self._entries.clear()
            self._buffered.clear()
            self.report.asked = 0
            self.stop(f"the first {count} rows all failed alike: {error_type(error)}")

    # Submitting

    async def _submit_all(self) -> None:
        while not self.is_over and self._why is None and monotonic() >= self._full_until:
            packing = await self._pack()
            if packing is None:
                return
            try:
                await self._submit(packing)
            finally:
                packing.close()
            self._tell()

    async def _submit(self, packing: _Packing) -> None:
        api, client, submission = self.client.api, self.client, packing.submission
        submission.service, submission.state = self.info.key, self.state
        submission.digest = packing.digest.hexdigest()[:32]
        self._submissions.begin(submission)
        upload = api.upload(submission.label)
        facts: dict[str, Any] = {}
        if api.in_files:
            file = api.uploaded(await self._steadily(lambda: client.upload(upload, packing.file)))
            self._submissions.note(submission, "uploaded", file=file.id, since=file.created_at)
        else:
            newest, _ = api.read_page(await self._steadily(lambda: client.ask(api.page("", limit=1))))
            facts = {"newest": newest[0].id, "since": newest[0].created_at} if newest else {}
        if self.is_over:
            return
        self._submissions.note(submission, "submitting", **facts)
        for number in submission.numbers():
            self._taken.add(number)
        try:
            if submission.file is not None:
                body = await client.ask(api.submit(submission.label, submission.file))
            else:
                body = await client.upload(upload, packing.file)
            batch = api.read(body)
        except ProviderError as error:
            self._note_failure(submission, error)
            return
        self._submissions.note(submission, "submitted", id=batch.id)
        submission.status = batch.status
        self.report.notice = None
        log(INFO, "Batch submitted | id=%s, rows=%d", id=batch.id, rows=submission.count)

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
            return
        if self._is_about_queue(error.code, str(error)) or (error.status == 429 and error.retryable):
            self._queue_is_full(submission, str(error), error.retry_after)
        else:
            self._drop(submission, str(error))
            self._halt(f"the service refused a batch: {_told(error)}")

    def _drop(self, submission: Submission, why: str) -> None:
        """Give the rows back of a batch that surely does not exist, or was never begun."""
        self._submissions.note(submission, "dropped", why=why[:500])
        self._free(submission)

    def _free(self, submission: Submission) -> None:
        for number in submission.numbers():
            self._taken.discard(number)
        self._is_pass_due = True

    @staticmethod
    def _is_about_queue(code: str | None, message: str) -> bool:
        return code == "token_limit_exceeded" or "enqueued token" in message.lower()

    def _queue_is_full(self, submission: Submission, message: str, retry_after: float | None = None) -> None:
        """Wait before the next submission, and make it smaller if that may be the reason."""
        self._drop(submission, message)
        found = _LIMIT.search(message)
        told = None if found is None else float(found[1].replace(",", ""))
        if not self._submissions.open:
            most = min(told or inf, submission.tokens / 2)
            self._max_tokens = most if self._max_tokens is None else min(most, self._max_tokens)
        elif told is not None and submission.tokens > told:
            self._max_tokens = told if self._max_tokens is None else min(told, self._max_tokens)
        pause = max(retry_after or 0.0, min(2**self._full, 30) * self.settings.longest)
        self._full += 1
        self._full_until = inf if self._submissions.open and retry_after is None else monotonic() + pause
        log(
            WARNING,
            "Batch queue of the service is full, waits | rows=%d: %s",
            rows=submission.count,
            error_message=message,
        )

    # Looking

    async def _look(self) -> bool:
        """Look at all batches. Return whether something has changed, so that more may be done at once."""
        changed = False
        for each in self._submissions.open:
            if self.is_over:
                return False
            if each.step == "submitting":
                changed = await self._look_for(each) or changed
            if each.step == "submitted":
                changed = await self._look_at(each) or changed
            self._tell()
        return changed

    async def _look_at(self, submission: Submission) -> bool:
        api, batch_id = self.client.api, submission.id or ""
        try:
            batch = api.read(await self._steadily(lambda: self.client.ask(api.status(batch_id))))
        except NotFound as error:
            self._doubt(submission, f"the service does not know the batch {batch_id} any more ({_told(error)})")
        submission.status, submission.processed = batch.status, batch.processed
        if not batch.ended:
            return False
        if batch.problems:
            self._take_problems(submission, batch)
        else:
            await self._collect(submission, batch)
        if self._full_until == inf:
            self._full_until = 0.0
        return True

    def _doubt(self, submission: Submission, why: str) -> NoReturn:
        """Stop, since nobody can tell whether rows were answered and paid.

        Raises:
            _Over: always.
        """
        self.stop(
            f"{why}, so it is not known what became of its {submission.count:,} rows; to have them asked again, delete the lines "
            f"with {submission.label!r} from {self.path}"
        )
        raise _Over

    async def _look_for(self, submission: Submission) -> bool:
        """Look for a batch whose submission was not answered. Return whether it is known now what became of it."""
        batch, may_be = await self._find(submission)
        if batch is not None:
            log(INFO, "Batch found whose submission was not answered | id=%s", id=batch.id)
            self._submissions.note(submission, "submitted", id=batch.id)
            if self.withdraws:
                await self._withdraw(submission)
            return True
        if may_be:
            submission.status = "looked for"
            return False
        if time() - submission.at < self.settings.longest:
            return False  # the service may be about to make it
        self._drop(submission, "the service has no such batch")
        return True

    async def _find(self, submission: Submission) -> tuple[RemoteBatch | None, bool]:
        """Return the batch of a submission. Without one: whether a batch that has not ended may be it."""
        api, cursor, may_be = self.client.api, "", False
        known = {each.id for each in self._submissions.all}
        for _ in range(MAX_PAGES):
            page = api.page(cursor)
            batches, cursor = api.read_page(await self._steadily(lambda page=page: self.client.ask(page)))  # type: ignore[misc]
            for batch in batches:
                if batch.id == submission.newest or _is_before(batch, submission.since):
                    return None, may_be
                if batch.id in known:
                    continue
                verdict = api.is_lost(batch, submission.lost)
                if verdict is None:
                    verdict = await self._has_ids_of(batch, submission)
                if verdict:
                    return batch, False
                may_be = may_be or verdict is None
            if not cursor:
                return None, may_be
        return self._doubt(submission, "the service has too many batches to find one whose submission was not answered")

    async def _has_ids_of(self, batch: RemoteBatch, submission: Submission) -> bool | None:
        """Return whether the results of a batch are those of a submission; None if it has none yet."""
        if not batch.ended:
            return None

        async def first() -> bool | None:
            for path in batch.results:
                async with aclosing(self.client.results(path)) as results:
                    async for result in results:
                        return result.custom_id.startswith(f"{submission.label}-")
            return None

        found = await self._steadily(first)
        if found is None:
            self._doubt(submission, f"the results of the batch {batch.id} are gone, which may be a lost one")
        return found

    async def _withdraw(self, submission: Submission) -> None:
        """Cancel a batch at the service. It still has to end."""
        if submission.id is None:
            return
        call = self.client.api.cancel(submission.id)
        try:
            await self._steadily(lambda: self.client.ask(call))
        except ProviderError as error:
            if error.status is None or error.status >= 500:
                raise
            log(INFO, "Batch could not be cancelled | id=%s: %s", id=submission.id, error_message=str(error))

    # Results

    async def _collect(self, submission: Submission, batch: RemoteBatch) -> None:
        """Write what has become of the rows of a batch that has ended."""
        members = _members(submission)
        names = (
            {row.number: row.custom_id for row in self._only(members.__contains__, len(members))}
            if submission.named
            else {}
        )
        if submission.label in self._has_changed:
            keys = self._keys_of(members)
            for path in batch.results:
                await self._steadily(lambda path=path: self._leave_out_changed(path, submission, members, keys))  # type: ignore[misc]
        began = submission.at if batch.created_at is None else batch.created_at
        elapsed = float(max(0.0, (time() if batch.ended_at is None else batch.ended_at) - began))
        counted = self.report.asked, sum(self.report.errors.values())
        for path in batch.results:
            await self._steadily(lambda path=path: self._take(path, submission, members, names, elapsed))  # type: ignore[misc]
        left = 0
        for number in submission.numbers():
            if not self._is_open(number) or number in self._failed:
                continue
            if number in members and not batch.cancelled and not self.once and self._tries_of(number) + 1 >= MOST_TRIES:
                missing = StreamProtocolError("the batch has ended without a result for this row")
                self._failed[number] = ("", missing, MOST_TRIES, elapsed)
            else:
                left += 1
        self._write_failed()
        self._write()
        submission.tried = not batch.cancelled
        self._submissions.note(submission, "ended", tried=submission.tried, why=batch.status)
        self._full, self._refused = 0, 0
        log(INFO, "Batch ended | id=%s, status=%s, rows_left=%d", id=batch.id, status=batch.status, rows_left=left)
        if submission.tried:
            self._note_tries(filter(self._is_open, submission.numbers()))
        if left:
            self._free(submission)
            if batch.cancelled:
                self._halt(f"the batch {batch.id} was cancelled, and {left:,} of its rows have no answer")
        asked = self.report.asked - counted[0]
        if self.stop_after_errors and asked >= self.stop_after_errors and len(self.report.errors) == 1:
            kind, failures = next(iter(self.report.errors.items()))
            if failures - counted[1] == asked:
                self._halt(f"all {asked:,} rows of a batch failed alike: {kind}")

    async def _leave_out_changed(
        self, path: str, submission: Submission, members: Bitmap, keys: dict[int, str]
    ) -> None:
        """Take the rows out of a batch that would be asked otherwise now. Their answers are not written."""
        async with aclosing(self.client.results(path)) as results:
            async for result in results:
                number, key = _row_of(result, submission.label)
                if number is not None and keys.get(number) != key:
                    members.discard(number)

    async def _take(
        self, path: str, submission: Submission, members: Bitmap, names: dict[int, str | None], elapsed: float
    ) -> None:
        """Write the answers in a file of results, and keep the failures."""
        asked = Request(model=submission.model, messages=(Message.user("-"),))
        foreign = 0
        async with aclosing(self.client.results(path)) as results:
            async for result in results:
                number, key = _row_of(result, submission.label)
                if number is None or number not in members:
                    foreign += 1
                elif self._awaits(number, result):
                    tries = self._tries_of(number) + 1
                    try:
                        response = self.client.answer(result, asked)
                    except ProviderError as error:
                        may_pass = error.retryable and (self.once or tries < MOST_TRIES)
                        if not may_pass and result.fate != "cancelled":
                            error.body = None
                            self._failed[number] = (key, error, tries, elapsed)
                            if len(self._failed) >= _MOST_HELD:
                                self._write_failed()
                        continue
                    spent = Spent(self.info, submission.model, response.usage, response.model)
                    call = self._call(tries, spent, response.model)
                    self._finish(number, names.get(number), key, elapsed, response=response, call=call)
        if foreign:
            log(
                WARNING,
                "Batch has results of unknown rows, which are left out | id=%s, results=%d",
                id=submission.id,
                results=foreign,
            )

    def _awaits(self, number: int, result: Result) -> bool:
        """Whether a result is the first for its row. An answer comes in place of a failure, which was to be asked again."""
        if number in self._failed or number in self._buffered:
            return False
        return not self.is_done(number) or (result.fate == "answered" and number in self.journal.failed)

    def _call(self, tries: int, spent: Spent | None = None, model: str | None = None) -> CallRecord:
        """Return the record of a call that was never made, for the line of its row."""
        call = CallRecord()
        call.attempts, call.provider, call.model = tries, self.info, model
        if spent is not None:
            call.spent.append(spent)
            if self.prices is not None and (cost := self.prices.cost_of(spent)) is not None:
                call.cost = cost * (100 - round(100 * self.client.api.discount)) / 100
        return call

    def _write_failed(self) -> None:
        """Write the lines of failed rows. Their requests are needed, so that the messages do not quote them."""
        failed = self._failed
        if not failed:
            return
        for row in self._only(failed.__contains__, len(failed)):
            key, error, tries, elapsed = failed.pop(row.number)
            try:
                request, own_key = self.requests.of(row)
            except Exception:  # noqa: BLE001  # the row has changed since, and what it was is not known
                request, own_key, error = None, "", _without_words(error)
            line_key = key or own_key
            call = self._call(tries)
            self._finish(row.number, row.custom_id, line_key, elapsed, error=error, call=call, request=request)
        for number, (key, error, tries, elapsed) in list(failed.items()):  # the input has become shorter
            self._finish(number, None, key, elapsed, error=_without_words(error), call=self._call(tries))
        failed.clear()

    def _take_problems(self, submission: Submission, batch: RemoteBatch) -> None:
        """Take why the service did not begin a batch. Rows that it names have failed; the others go into another batch."""
        for problem in batch.problems:
            if self._is_about_queue(problem.code, problem.message):
                self._queue_is_full(submission, problem.message)
                return
        rows: dict[int, Problem] = {}
        for problem in batch.problems:
            number = None if problem.line is None else submission.row_at(problem.line - 1)
            if number is not None:
                rows.setdefault(number, problem)
        first = batch.problems[0]
        where = ""
        if first.line is not None:
            where = f"line {first.line} (row {submission.row_at(first.line - 1)}): "
        told = f"the service did not begin the batch {batch.id}: {where}{first.message or first.code}"
        if len(batch.problems) > 1:
            told += f" (and {len(batch.problems) - 1} more)"
        self.report.notice = told
        log(WARNING, "Batch refused | rows=%d: %s", rows=submission.count, error_message=told)
        self._refused += 1
        alike = len({problem.code for problem in batch.problems}) == 1
        if not rows or (alike and 0 < self.stop_after_errors <= len(rows)) or self._refused > _MOST_REFUSED:
            self._drop(submission, told)
            self._halt(told)
            return
        for number, problem in rows.items():
            if self._is_open(number):
                error = BadRequest(problem.message or problem.code, code=problem.code or None)
                error.provider, error.model = self.info.framework, submission.model
                self._failed[number] = ("", error, 1, 0.0)
        self._write_failed()
        self._write()
        self._drop(submission, told)

    # Lines

    def _tries_of(self, number: int) -> int:
        """Return the number of batches in which a row was in vain."""
        return sum(number in tried for tried in self._tries)

    def _note_tries(self, numbers: Iterable[int]) -> None:
        """Note that rows were in a batch in vain."""
        for number in numbers:
            for tried in self._tries:
                if number not in tried:
                    tried.add(number)
                    break

    def _finish(self, number: int, custom_id: str | None, key: str, elapsed: float = 0.0, **outcome: Any) -> None:
        line = line_of(number, custom_id, key, elapsed, whole=self.whole, **outcome)
        self.report.asked += 1
        count_line(self.report, line)
        self._buffered.add(number)
        self._entries.append(Entry(number, line.error is not None, encoded(line), key))
        if len(self._entries) >= _WRITE_AT_ONCE:
            self._write()

    def _write(self) -> None:
        """Write the lines that are there."""
        if not self._entries:
            return
        self.journal.write(self._entries, lambda entry, _: self.wrote(entry.row))
        self.journal.sync()
        self._buffered.clear()
        count_rows(self.report, self.journal)


def prices_of(stack: Iterable[object], info: ProviderInfo, model: str) -> Prices | None:
    """Return the prices of a stack's `Cost`, or those of the package genai-prices; None if neither knows the model."""
    for layer in stack:
        if isinstance(layer, Cost):
            return Prices(layer.prices, "Batch")
    prices = Prices(None, "Batch", needed=False)
    return None if prices.of(info, model) is None else prices


def _members(submission: Submission) -> Bitmap:
    members = Bitmap()
    for number in submission.numbers():
        members.add(number)
    return members


def _hash_row(digest: Any, number: int, key: str) -> None:
    digest.update(f"{number}:{key}\n".encode())


def _id_of(packing: _Packing | None, number: int, key: str) -> str:
    """Return the `custom_id` of a row: the name of its batch, its number and its key, so that a result says all of it.

    Raises:
        BadPrompt: it would be too long.
    """
    label = "0" * 12 if packing is None else packing.submission.label
    found = f"{label}-{number}-{key}"
    if len(key) > _KEY or len(found) > 64:  # what services take
        raise BadPrompt(f"expected a row below 10,000,000,000 for a batch, got {number:,}")
    return found


def _row_of(result: Result, label: str) -> tuple[int | None, str]:
    """Return the row of a result and its key; None if it is none of a batch."""
    found, _, rest = result.custom_id.partition("-")
    number, _, key = rest.partition("-")
    if found != label or not (number.isascii() and number.isdigit() and len(number) <= 10):
        return None, ""
    return int(number), key


def _is_before(batch: RemoteBatch, since: float | None) -> bool:
    return since is not None and batch.created_at is not None and batch.created_at < since


def _without_words(error: ProviderError) -> ProviderError:
    """Return an error without the service's message, which may quote a request that is not known any more."""
    return type(error)(
        "the service's message is left out", retryable=error.retryable, status=error.status, code=error.code
    )


def _told(error: ProviderError) -> str:
    return f"{error_type(error)}: {error}"
