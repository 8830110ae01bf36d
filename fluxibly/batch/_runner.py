"""`Batch`: asks the rows of a file that have no answer yet, and writes what comes of them."""

from __future__ import annotations

import math
import os
from collections.abc import AsyncIterable, Callable, Iterable, Sequence
from contextlib import closing
from copy import copy
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Literal

import attrs

from fluxibly._checks import kind_of, number, one_of, whole
from fluxibly._loops import from_anywhere, run_to_end
from fluxibly.batch._asking import Asking
from fluxibly.batch._batch_rows import BatchRows
from fluxibly.batch._counting import count_rows
from fluxibly.batch._estimate import Estimate, estimate
from fluxibly.batch._finish import Output
from fluxibly.batch._input import Row, Source, open_input
from fluxibly.batch._journal import Bitmap, Journal, Written
from fluxibly.batch._line_writer import DISK_FULL, is_disk_full
from fluxibly.batch._provider_batches import ProviderBatches, check_layers, client_of, prices_of
from fluxibly.batch._repeats import Repeats
from fluxibly.batch._requests import Requests
from fluxibly.batch._services import ProviderExecutor
from fluxibly.batch._stack import AT_ONCE, limits_in_force, stack_for, stops_all
from fluxibly.batch._state import WHAT_TO_DO, Changes, Keys, Names, State, read_state, what_changed, write_state
from fluxibly.batch._submissions import read_open
from fluxibly.batch._trace import traced
from fluxibly.errors import ConfigError
from fluxibly.flow import Middleware
from fluxibly.llm import LLM, AsyncLLM
from fluxibly.pipeline import AsyncPipeline


@attrs.define
class Report:
    """The counts of a batch. They change while it runs."""

    answered: int = 0
    """Rows with an answer, those of earlier runs included."""
    failed: int = 0
    """Rows with an error instead, those of earlier runs included."""
    unaskable: int = 0
    """Those of the failed rows that could not be asked as they stand in the input, such as rows that cannot be read."""
    skipped: int = 0
    """Rows that had a line when this run began."""
    asked: int = 0
    """Rows that this run has asked, and that have ended."""
    in_flight: int = 0
    """Rows that are being asked."""
    input_tokens: int = 0
    """Tokens of this run."""
    output_tokens: int = 0
    cost: float | None = None
    """US dollars of this run, as far as they are known; None: they are not for any row."""
    elapsed: float = 0.0
    """Seconds of this run."""
    errors: dict[str, int] = attrs.field(factory=dict[str, int])
    """The errors of this run, by class."""
    first_errors: dict[str, str] = attrs.field(factory=dict[str, str])
    """The message of the first error of each class, on one line, without quotes from the request."""
    rate: float | None = None
    """The requests a second that a `RateLimit` allows now; None: no limit was met yet."""
    places: int | None = None
    """The calls at once that a `Concurrency("auto")` allows now, as far as the batch needs them; None: not found yet."""
    batches: dict[str, int] = attrs.field(factory=dict[str, int])
    """The batches at the provider, by their state: in the service's words, or "ended" when their answers are written."""
    notice: str | None = None
    """News of batches at the provider that the user should read at once, such as a refusal."""
    stopped: str | None = None
    """Why the run ended before the last row, such as "disk full". Another run goes on. None: it did not."""
    is_stuck: bool = False
    """Whether another run would stop at the same place, because a single row may cost more than the whole budget."""


class Batch:
    """A file of prompts to be answered into another file. What is answered already is not asked again.

    Every answer is a line, written when it is there. So whatever ends a run, another run of the same batch goes on: only rows that
    were in flight when a process was killed are asked twice. At the end each row has one line: an answer, or an error.

    To the stack of the model it adds, innermost, what it lacks: a `RateLimit` that finds the rate, and a `Concurrency` that finds how
    many calls at once are best. A row that is refused for its rate waits, and so do all while the service answers nobody; see
    `stopped`. Errors are lines, and end nothing.

    Args:
        llm: the model. A `LLM` is asked by an asynchronous copy of its own.
        prompts: the input: a file, or a source of rows.
        answers: the output: a file of JSON lines, in the order in which they come; or an `Output` of another form.
        system: instructions for the model, before each prompt that has no system message.
        concurrency: the most calls at once. "auto" finds it by latency, up to 1,000.
        rpm, tpm: the most requests and tokens a minute, at least those that the service allows. None: they are found.
        limit: the number of rows, from the first, that the batch is about; None: all.
        dedupe: whether equal requests are asked only once. The others get the same answer, at no cost. Takes about 40 bytes a row.
        budget: the most US dollars that this run may spend. It needs known prices.
        stop_after_errors: the number of rows after which the run stops if they are the first of the batch, and all fail alike and in a
            way that asking again does not help. They get no line then. Nor do fewer, if they are all rows of the run, and the error is
            about the service: its key, its model, its address. Once a row was answered, rows that fail stop nothing. 0: never.
        retry_errors: whether rows that failed in earlier runs are asked again.
        changed: what happens to rows that are done, but would be asked otherwise now, because the input or the configuration has
            changed: "keep" keeps their answers, "ask" asks them again. None: it is an error, before anything is sent.
        executor: "online" asks row by row. "provider" has the provider answer in batches of its own, within a day and for about half
            the price; `ProviderBatches` says more on how. No layer of the stack acts on these, so it may have none that changes
            requests or answers, but `Defaults`. What was submitted stands in a file beside the output, so that another run waits
            for it, and nothing is submitted twice.
        then: "online": rows that the provider's batches have not answered, though asking again may help, are asked row by row.
            None: they go into another batch, up to three in all.
        one_trace: whether the spans of all calls are in one trace. By default each call has a trace of its own, with a link to the
            span of the batch.

    Raises:
        ConfigError: a value is out of range.
        TypeError: the model or the input is something else.
        OSError: the input cannot be read.
    """

    def __init__(
        self,
        llm: LLM | AsyncLLM,
        prompts: str | os.PathLike[str] | Source,
        answers: str | os.PathLike[str] | Output,
        *,
        system: str | None = None,
        concurrency: int | Literal["auto"] = "auto",
        rpm: float | None = None,
        tpm: float | None = None,
        limit: int | None = None,
        dedupe: bool = False,
        budget: float | None = None,
        stop_after_errors: int = 20,
        retry_errors: bool = False,
        changed: Literal["keep", "ask"] | None = None,
        executor: Literal["online", "provider"] | ProviderBatches = "online",
        then: Literal["online"] | None = None,
        one_trace: bool = False,
    ) -> None:
        wrong = [
            None if concurrency == "auto" else whole("concurrency", concurrency, low=1),
            None if rpm is None else number("rpm", rpm, above=0),
            None if tpm is None else number("tpm", tpm, above=0),
            None if limit is None else whole("limit", limit, low=0),
            None if budget is None else number("budget", budget, above=0),
            whole("stop_after_errors", stop_after_errors, low=0),
            None if changed is None else one_of("changed", changed, ("keep", "ask")),
            None if isinstance(executor, ProviderBatches) else one_of("executor", executor, ("online", "provider")),
            None if then is None else one_of("then", then, ("online",)),
        ]
        if found := [*filter(None, wrong)]:
            raise ConfigError.of(found)
        check_types(llm, prompts)
        self.llm = llm
        self.output = answers if isinstance(answers, Output) else Output(answers)
        self.answers = self.output.path
        self.system = system
        self.concurrency: int | Literal["auto"] = concurrency
        self.rpm = rpm
        self.tpm = tpm
        self.limit = limit
        self.dedupe = dedupe
        self.budget = budget
        self.stop_after_errors = stop_after_errors
        self.retry_errors = retry_errors
        self.changed: Literal["keep", "ask"] | None = changed
        self.executor: Literal["online", "provider"] = "online" if executor == "online" else "provider"
        self.batches = ProviderBatches() if executor == "provider" else None if executor == "online" else executor
        """How the provider's batches are used; None: they are not."""
        self.then = then
        self.one_trace = one_trace
        self.source: Source = open_input(prompts) if isinstance(prompts, (str, os.PathLike)) else prompts
        """The input, which knows its size and the position in it."""
        self.reached = 0
        """The rows of the input up to the last one that was read. With the source's position and size, it says how many there are."""
        self.report = Report()
        self._stops = 0
        self._notice: Callable[[], object] = _nothing
        self._names: Names | None = None
        self._withdraws = False
        self._check_batches()

    def _check_batches(self) -> None:
        """Check what a provider's batches cannot do."""
        wrong: str | None = None
        if self.batches is None:
            wrong = (
                "then='online' is for what a provider's batches leave; add executor='provider'" if self.then else None
            )
        elif self.dedupe:
            wrong = "dedupe=True: a provider's batch asks every row; take one of the two out"
        elif self.budget is not None:
            wrong = "budget: a provider's batch is paid as a whole; set limit, or a limit at the service"
        elif self.source.is_stream:
            wrong = (
                "executor='provider' reads the input more than once, which standard input cannot be; write it to a file"
            )
        if wrong is not None:
            raise ConfigError(wrong)

    def estimate(self) -> Estimate:
        """Return what the batch would take. All rows are read, nothing is sent, and no file is made.

        Raises:
            ConfigError: the input cannot be read as a whole, the output is something else's, or rows are in batches at the
                provider, and the batch is not one of the provider.
            OSError: a file cannot be read.
        """
        if self.batches is None:
            self._check_submitted()
        return estimate(self)

    def stop(self) -> None:
        """Begin no more rows; what is in flight ends, and then `run` returns. The second time, cancel what is in flight.

        Rows that were not sent yet, or that were cancelled, have no line. Any thread may call it, and a signal handler.
        """
        self._stops += 1
        self._notice()

    def run(self) -> Report:
        """Ask all rows that are left, and return what it came to.

        Where an event loop runs already, as in a notebook, the batch runs in another thread. The model is asked by an
        asynchronous copy of its own, which is closed at the end.

        Raises:
            ConfigError: another process is at work on this batch, the output is something else's, the input or the configuration
                has changed and `changed` is not given, there is a budget and no price, or rows are in batches at the provider, and the
                batch is not one of the provider.
            OSError: a file cannot be read or written.
        """
        return run_to_end(self._run_apart)

    def cancel(self) -> Report:
        """Cancel all batches at the provider, wait until they have ended, and write what they have answered by then.

        Rows without an answer have no line; another run submits them again.

        Raises:
            ConfigError: as of `run`, or the batch is not one of the provider.
            OSError: a file cannot be read or written.
        """
        self._withdraw()
        return self.run()

    async def acancel(self) -> Report:
        """Do as `cancel`, on asyncio or trio."""
        self._withdraw()
        return await self.arun()

    def _withdraw(self) -> None:
        if self.batches is None:
            raise ConfigError(
                "cancel: expected a batch of the provider; write executor='provider' (--executor provider)"
            )
        self._withdraws = True

    async def _run_apart(self) -> Report:
        llm = self.llm
        own = copy(llm) if isinstance(llm, AsyncLLM) else AsyncLLM(llm.config, llm.pipeline.middleware)
        async with own:
            return await self._run(own)

    async def arun(self) -> Report:
        """Do as `run`, on asyncio or trio. If it is cancelled, so is what is in flight; what has ended is written.

        An `AsyncLLM` is used as it is, and stays open.
        """
        if isinstance(self.llm, AsyncLLM):
            return await self._run(self.llm)
        return await self._run_apart()

    async def _run(self, llm: AsyncLLM) -> Report:
        self.report = report = Report()
        began = perf_counter()
        with Journal(self.output.journal_path) as journal:
            self._check_files(journal)
            if self.batches is None:
                self._check_submitted()
            requests = Requests(llm, self.system)
            repeats = Repeats(journal) if self.dedupe else None
            self._names = Names() if self.source.is_stream else None
            try:
                left = await self._read(journal, requests, repeats)
            except OSError as error:
                if not is_disk_full(error):
                    raise
                report.stopped = DISK_FULL
                return report
            report.skipped = len(journal.done) - len(left.again)
            count_rows(report, journal)

            stack: Sequence[Middleware] = ()

            def each_second() -> None:
                report.elapsed = perf_counter() - began
                report.rate, report.places = limits_in_force(stack, self._most)

            async def do(work: Asking | ProviderExecutor) -> None:
                self._notice = from_anywhere(partial(self._stop_now, work))
                self._stop_now(work)
                if not work.is_over:
                    with traced(stack, report, one_trace=self.one_trace):
                        await work.run()

            try:
                if self.batches is not None:
                    stack = llm.pipeline.middleware
                    await do(self._at_provider(llm, self.batches, requests, journal, left))
                if self.batches is None or (self.then == "online" and report.stopped is None):
                    stack = self._stack(llm)
                    await do(
                        self._asking(llm.pipeline.with_middleware(stack), requests, journal, left, repeats, each_second)
                    )
            finally:
                self._notice, self._stops, self._withdraws = _nothing, 0, False
                each_second()
            if report.stopped is None:
                self._complete(journal, left)
        return report

    def _stop_now(self, work: Asking | ProviderExecutor) -> None:
        if self._stops > 1:
            work.cancel()
        elif self._stops:
            work.stop()

    @property
    def _most(self) -> int:
        """The most calls at once."""
        return AT_ONCE if self.concurrency == "auto" else self.concurrency

    def _stack(self, llm: AsyncLLM) -> list[Middleware]:
        return stack_for(
            llm.pipeline.middleware,
            llm.pipeline.info,
            llm.config.model,
            adapts=self.concurrency == "auto",
            budget=self.budget,
            requests=self.rpm,
            tokens=self.tpm,
        )

    def _asking(  # noqa: PLR0917  # what a run has made
        self,
        pipeline: AsyncPipeline,
        requests: Requests,
        journal: Journal,
        left: _Left,
        repeats: Repeats | None,
        each_second: Callable[[], object],
    ) -> Asking:
        return Asking(
            rows=self._rows(journal, left.again),
            limit=math.inf if self.limit is None else self.limit,
            requests=requests,
            pipeline=pipeline,
            journal=journal,
            report=self.report,
            concurrency=self._most,
            whole=self.output.whole,
            repeats=repeats,
            stops_at_budget=stops_all(pipeline.middleware),
            stop_after_errors=self.stop_after_errors,
            is_told_to_stop=lambda: self._stops > 0,
            each_second=each_second,
            was_answered=left.was_answered,
        )

    def _at_provider(
        self, llm: AsyncLLM, batches: ProviderBatches, requests: Requests, journal: Journal, left: _Left
    ) -> ProviderExecutor:
        client = client_of(llm.pipeline.provider, llm.pipeline.info)
        check_layers(llm.pipeline.middleware, goes_online=self.then == "online")

        state = left.state
        return ProviderExecutor(
            client=client,
            info=llm.pipeline.info,
            rows=BatchRows(
                self.source,
                requests,
                journal,
                left.again,
                limit=math.inf if self.limit is None else self.limit,
                once=self.then == "online",
            ),
            report=self.report,
            path=self.batches_path,
            state=str(state),
            changed=self.changed,
            settings=batches,
            prices=prices_of(llm.pipeline.middleware, llm.pipeline.info, llm.config.model),
            whole=self.output.whole,
            stop_after_errors=self.stop_after_errors,
            withdraws=self._withdraws,
        )

    # What is done, and what is not

    @property
    def batches_path(self) -> Path:
        """The file that says which batches were submitted to the provider. All links to an output share it."""
        path = Path(os.path.realpath(self.answers))
        return path.with_name(f"{path.name}.batches")

    def _check_submitted(self) -> None:
        """Check that no row which would be asked is in a batch at the provider, where it is paid, too.

        Raises:
            ConfigError: one may be.
        """
        batches = read_open(self.batches_path)
        if batches:
            count, rows = len(batches), sum(each.count for each in batches)
            raise ConfigError(
                f"{self.batches_path}: {count} {'batch' if count == 1 else 'batches'} with {rows:,} {'row' if rows == 1 else 'rows'} "
                f"{'is' if count == 1 else 'are'} at the service; expected executor='provider' (--executor provider) to take the "
                "answers, or cancel() (--executor provider --cancel) first"
            )

    def _check_files(self, journal: Journal) -> None:
        path = path_of_source(self.source)
        for written in (journal.path, self.output.path, self.output.errors):
            if path is not None and written is not None and written.exists() and path.samefile(written):
                raise ConfigError(f"{path}: expected another file for the answers than for the prompts")

    async def _read(self, journal: Journal, requests: Requests, repeats: Repeats | None) -> _Left:
        """Read the journal, and return what of it is to be done again."""
        from anyio.lowlevel import checkpoint  # late, to keep `import fluxibly` fast

        now, then = State(self.source.fingerprint, requests.settings), read_state(journal.path)
        is_stream = self.source.is_stream
        keys = None if is_stream or now == then else Keys()
        readers = [each.read for each in (keys, repeats, self._names) if each is not None]
        journal.read(partial(_read_each, readers) if readers else None)
        left = _Left(now, journal.failed.copy() if self.retry_errors else Bitmap())
        left.was_answered = journal.answered > 0 and then is not None and then.settings == now.settings
        if is_stream:
            # Its rows are known only when they are asked, so what has changed are all, or none.
            if journal.done and (then is None or then.settings != now.settings):
                self._check_changed(
                    len(journal.done), journal, what_changed(then and State(now.input, then.settings), now)
                )
                if self.changed == "ask":
                    left.again = journal.done.copy()
        elif journal.done and keys is not None:
            changes = Changes(journal, keys, left.again)
            with closing(changes.check(self.source, requests.key_of)) as checking:
                for _ in checking:
                    await checkpoint()
                    if self._stops:
                        return left
            if changes.changed:
                self._check_changed(len(changes.changed), journal, what_changed(then, now))
            if self.changed == "ask" and changes.changed:
                left.rows = changes.rows
                for row in changes.changed:
                    left.again.add(row)
        left.is_asked_again = self.changed == "ask" and bool(left.again)
        if now != then:
            write_state(journal.path, State(now.input) if left.is_asked_again else now)
        return left

    def _check_changed(self, changed: int, journal: Journal, why: str) -> None:
        if self.changed is None:
            raise ConfigError(
                f"{journal.path}: {changed} of the {len(journal.done)} rows that are done would be asked differently now, "
                f"because {why}; {WHAT_TO_DO}"
            )

    def _rows(self, journal: Journal, again: Bitmap) -> Iterable[Row] | AsyncIterable[Row]:
        """Return the rows that are to be asked, and perhaps some after the last."""
        done = journal.done

        def is_done(number: int) -> bool:
            self.reached = number + 1
            return number in done and number not in again

        known = None if self._names is None or not done else self._names.numbers
        return self.source.rows(is_done, known)

    def _complete(self, journal: Journal, left: _Left) -> None:
        """Do what is left to do when all rows are done."""
        try:
            rows = left.rows
            if journal.replaced or rows is not None:
                journal.compact(lambda row: rows is None or row < rows)
                count_rows(self.report, journal)
            if left.is_asked_again and self.limit is None:
                write_state(journal.path, left.state)
            journal.sync()
            self.output.finish()
        except OSError as error:
            if not is_disk_full(error):
                raise
            self.report.stopped = DISK_FULL


@attrs.define
class _Left:
    """The rows that are asked again."""

    state: State
    again: Bitmap
    rows: int | None = None
    """The number of rows that the input has now, if it has changed and the rows that have are asked again."""
    was_answered: bool = False
    """Whether there are answers, and of the present settings."""
    is_asked_again: bool = False
    """Whether rows that have changed are among them, so that not all answers belong to one state until the end."""


def _nothing() -> None:
    """Do nothing, where there is no run to stop."""


def _read_each(readers: Sequence[Callable[[Written, int], object]], written: Written, offset: int) -> None:
    for read in readers:
        read(written, offset)


def check_types(llm: object, prompts: object) -> None:
    """Check that a model and an input are such.

    Raises:
        TypeError: they are something else.
    """
    if not isinstance(llm, (LLM, AsyncLLM)):
        hint = f"; write LLM({llm!r})" if isinstance(llm, str) else ""
        raise TypeError(f"llm: expected an LLM or an AsyncLLM, got {kind_of(llm)}{hint}")
    if not isinstance(prompts, (str, os.PathLike)) and not callable(getattr(prompts, "rows", None)):
        raise TypeError(
            f"prompts: expected a file, or a source such as open_input(…) returns, got {kind_of(prompts)}; for prompts in memory, "
            "write llm.map(prompts)"
        )


def path_of_source(source: Source) -> Path | None:
    """Return the file that a source reads; None: it reads none."""
    path: object = getattr(source, "path", None)
    return path if isinstance(path, Path) else None
