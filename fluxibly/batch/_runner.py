"""`Batch`: asks the rows of a file that have no answer yet, and writes what comes of them."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from pathlib import Path
from time import perf_counter
from typing import Literal

import attrs

from fluxibly._loops import run_to_end
from fluxibly._mapping import map_in_tasks
from fluxibly._noted_calls import note_call, noted_calls
from fluxibly.batch._input import Row, Source, open_input
from fluxibly.batch._journal import Journal
from fluxibly.batch._lines import Line, encoded, line_of
from fluxibly.batch._trace import traced
from fluxibly.errors import BadPrompt
from fluxibly.llm import LLM, AsyncLLM
from fluxibly.middleware._request_key import request_key
from fluxibly.pipeline import AsyncPipeline

AUTO = 1_000
"""The most calls at once where the number is found by latency."""


@attrs.define
class Report:
    """What a batch has come to. It is updated while the batch runs."""

    answered: int = 0
    """Rows with an answer, those of earlier runs included."""
    failed: int = 0
    """Rows with an error instead, those of earlier runs included."""
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
    """US dollars of this run; None: not known."""
    elapsed: float = 0.0
    """Seconds of this run."""
    errors: dict[str, int] = attrs.field(factory=dict[str, int])
    """The errors of this run, by class."""
    rate: float | None = None
    """The requests a second that a `RateLimit` allows now; None: not known."""
    places: int | None = None
    """The calls at once that a `Concurrency("auto")` allows now; None: not known."""
    stopped: str | None = None
    """Why the run ended before the last row, such as "disk full". Another run goes on. None: it did not."""


class Batch:
    """A file of prompts to be answered into another file. What is answered already is not asked again.

    Args:
        llm: the model. A `LLM` is asked by an asynchronous copy of its own.
        prompts: the input, a JSON line for each row.
        answers: the output, a JSON line for each row, as they come.
        concurrency: the most calls at once. "auto" finds it by latency.
        limit: the number of rows, from the first, that the batch is about; None: all.
        dedupe: whether equal requests are asked only once.
        budget: the most US dollars that this run may spend. It needs known prices.
        stop_after_errors: the number of rows after which the run stops if all that this run has asked so far failed alike, and in a
            way that asking again does not help. 0: never.
        retry_errors: whether rows that failed in earlier runs are asked again.
        changed: what happens to rows that have an answer if the input or the configuration is not what it was then: "keep" keeps all
            answers, "ask" asks again what would be asked otherwise now. None: nothing is done, and it is an error.
        executor: "online" asks row by row, "provider" by the batches of the provider.
        one_trace: whether the spans of all calls are in one trace. By default each call has a trace of its own, with a link to the
            span of the batch.
    """

    def __init__(
        self,
        llm: LLM | AsyncLLM,
        prompts: str | os.PathLike[str],
        answers: str | os.PathLike[str],
        *,
        concurrency: int | Literal["auto"] = "auto",
        limit: int | None = None,
        dedupe: bool = False,
        budget: float | None = None,
        stop_after_errors: int = 20,
        retry_errors: bool = False,
        changed: Literal["keep", "ask"] | None = None,
        executor: Literal["online", "provider"] = "online",
        one_trace: bool = False,
    ) -> None:
        self.llm = llm
        self.prompts = Path(prompts)
        self.answers = Path(answers)
        self.concurrency: int | Literal["auto"] = concurrency
        self.limit = limit
        self.dedupe = dedupe
        self.budget = budget
        self.stop_after_errors = stop_after_errors
        self.retry_errors = retry_errors
        self.changed = changed
        self.executor = executor
        self.one_trace = one_trace
        self.source: Source = open_input(self.prompts)
        """The input, which knows its size and the position in it."""
        self.report = Report()

    def stop(self) -> None:
        """Begin no more rows; what is in flight ends, and then `run` returns. The second time, cancel what is in flight.

        Any thread may call it, and a signal handler.
        """
        self._stops += 1

    _stops = 0

    def run(self) -> Report:
        """Do all that is left to do, and return what it came to."""
        return run_to_end(self.arun)

    async def arun(self) -> Report:
        """Do as `run`, on asyncio or trio."""
        if isinstance(self.llm, AsyncLLM):
            return await self._traced(self.llm)
        async with AsyncLLM(self.llm.config, self.llm.pipeline.middleware) as llm:
            return await self._traced(llm)

    async def _traced(self, llm: AsyncLLM) -> Report:
        with traced(llm.pipeline.middleware, self.report, one_trace=self.one_trace):
            return await self._run(llm)

    async def _run(self, llm: AsyncLLM) -> Report:
        began = perf_counter()
        source = self.source
        with Journal(self.answers) as journal:
            pipeline = llm.pipeline.with_middleware([note_call, *llm.pipeline.middleware])
            concurrency = AUTO if self.concurrency == "auto" else self.concurrency
            rows = source.rows(journal.done.__contains__)
            async with aclosing(self._lines(llm, pipeline, rows, concurrency)) as lines:
                async for line in lines:
                    journal.write([encoded(line)])
                    journal.note(line.row, failed=line.error is not None)
                    self._count(line)
            self.report.answered, self.report.failed = journal.answered, journal.failed
        self.report.elapsed = perf_counter() - began
        return self.report

    def _lines(
        self, llm: AsyncLLM, pipeline: AsyncPipeline, rows: Iterator[Row], concurrency: int
    ) -> AsyncGenerator[Line]:
        async def ask(_: int, row: Row) -> Line:
            key = ""
            began = perf_counter()
            with noted_calls() as calls:
                response = error = None
                try:
                    if row.problem is not None:
                        raise BadPrompt(row.problem)
                    request = llm.request(row.prompt, row.settings)
                    key = request_key(request, pipeline.info)
                    response = await pipeline.complete(request)
                except Exception as raised:  # noqa: BLE001  # one row harms no other
                    error = raised
            elapsed = perf_counter() - began
            call = calls[0] if calls else None
            return line_of(row.number, row.custom_id, key, elapsed, response=response, error=error, call=call)

        return map_in_tasks(rows, ask, concurrency=concurrency)

    def _count(self, line: Line) -> None:
        report = self.report
        report.asked += 1
        if line.error is not None:
            kind = line.error["type"]
            report.errors[kind] = report.errors.get(kind, 0) + 1
        if line.usage is not None:
            report.input_tokens += line.usage.get("input_tokens", 0)
            report.output_tokens += line.usage.get("output_tokens", 0)
        if line.cost is not None:
            report.cost = (report.cost or 0.0) + line.cost
