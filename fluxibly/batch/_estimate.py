"""An estimate of a batch: its rows, tokens, cost and time. Nothing is sent."""

from __future__ import annotations

import re
from array import array
from collections.abc import AsyncIterable, Iterator, Sequence
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Final, Literal, Protocol

import attrs
import msgspec

from fluxibly._loops import run_to_end
from fluxibly._masking import error_message
from fluxibly._tokens import BYTES_A_TOKEN, size_of
from fluxibly.batch._finish import Output
from fluxibly.batch._input import Row, Source
from fluxibly.batch._journal import Bitmap
from fluxibly.batch._lines import Line, encoded
from fluxibly.batch._requests import Requests
from fluxibly.batch._state import State, read_state
from fluxibly.batch._submissions import read_open
from fluxibly.calls import Usage
from fluxibly.errors import ConfigError
from fluxibly.flow import Middleware
from fluxibly.llm import LLM, AsyncLLM
from fluxibly.parts import Text
from fluxibly.prices import GivenPrices, Prices
from fluxibly.registry import built_in_kind
from fluxibly.types import Request


class Estimated(Protocol):
    """The batch to estimate: a `Batch`."""

    llm: LLM | AsyncLLM
    source: Source
    output: Output
    rpm: float | None
    tpm: float | None
    system: str | None
    limit: int | None
    retry_errors: bool
    dedupe: bool
    executor: Literal["online", "provider"]

    @property
    def batches_path(self) -> Path: ...
    @property
    def changed(self) -> str | None: ...


OUTPUT_GUESS: Final = 256
"""The output tokens of a row of which nothing is known."""
BATCH_PRICE: Final = Decimal("0.5")
"""The share of the price of a call that providers take for it in their batches."""
SHOWN: Final = 5
"""The rows of a problem that are named."""
_KINDS: Final = 50
"""The most kinds of problems that are kept apart."""


@attrs.define
class Problem:
    """A problem that rows share, because of which they cannot be asked."""

    message: str
    """The problem of the first of them."""
    rows: int = 0
    first: list[str] = attrs.field(factory=list[str])
    """Where the first of them stand, such as "line 7"."""


@attrs.define
class Estimate:
    """An estimate of a batch that would run now."""

    rows: int = 0
    """Rows that would be asked."""
    skipped: int = 0
    """Rows that have a line already, and would keep it."""
    changed: int = 0
    """Rows that have a line, and would be asked otherwise now. Under `changed="ask"` they are among `rows`, else among `skipped`."""
    submitted: int = 0
    """Rows without a line that are in batches at the provider, and are not submitted again. They are not among `rows`."""
    repeats: int = 0
    """Rows that get the answer of another with the same request, under `dedupe`. They are not among `rows`."""
    problems: list[Problem] = attrs.field(factory=list[Problem])
    """Why rows could not be asked, by kind. They would become errors, and are not among `rows`."""
    input_tokens: int = 0
    """A guess from the size of texts: 3.5 bytes a token. Media are not counted."""
    output_tokens: int = 0
    """See `output_from`."""
    output_from: str = ""
    """Where `output_tokens` comes from, in words."""
    media: int = 0
    """Rows with images, recordings or documents, whose tokens are not counted."""
    cost: float | None = None
    """US dollars; None: the price of a model is not known."""
    unpriced: list[str] = attrs.field(factory=list[str])
    """The models whose price is not known."""
    seconds: float | None = None
    """The time that the limits of the stack allow at the least; None: it has no limits with numbers, or the provider answers in
    batches of its own, within a day."""
    bytes: int = 0
    """About the size of the output."""


@attrs.define
class _Model:
    rows: int = 0
    input_tokens: float = 0.0
    output_tokens: float = 0.0


_NULL: Final = msgspec.Raw(b"null")


class _Earlier(msgspec.Struct):
    """The fields that the estimate reads of the line of a row."""

    row: int
    custom_id: str | None = None
    key: str = ""
    usage: dict[str, int] | None = None
    error: msgspec.Raw = _NULL


class _Done:
    """The rows that have a line, and the output tokens of those that were answered.

    Args:
        journal: where the lines are. It may not exist.
        retry_errors: whether rows that failed are to be asked again.

    Raises:
        ConfigError: the file has something else than lines of a batch.
        OSError: it cannot be read.
    """

    def __init__(self, journal: Path, *, retry_errors: bool) -> None:
        self.rows = Bitmap()
        self.counted = self.output_tokens = 0
        self._journal = journal
        self._keys = array("Q")
        """What stands for the key of each row."""
        for earlier in self._lines():
            row, failed = earlier.row, bytes(earlier.error) != b"null"
            if earlier.usage and not failed:
                self.counted += 1
                self.output_tokens += earlier.usage.get("output_tokens", 0)
            if row >= len(self._keys):
                self._keys.extend([0] * max(row + 1 - len(self._keys), len(self._keys) // 8, 1024))
            self._keys[row] = short_key(earlier.key)
            if failed and retry_errors:
                self.rows.discard(row)
            else:
                self.rows.add(row)

    def _lines(self) -> Iterator[_Earlier]:
        decode = msgspec.json.Decoder(_Earlier).decode
        try:
            file = self._journal.open("rb")
        except FileNotFoundError:
            return
        with file:
            for number, line in enumerate(file, 1):
                try:
                    yield decode(line)
                except msgspec.DecodeError:
                    if line.endswith(b"\n"):
                        raise ConfigError(
                            f"{self._journal}, line {number}: expected a line of a batch's output, got something else; "
                            "give another output"
                        ) from None

    @property
    def mean(self) -> float | None:
        """The output tokens of an answer; None if there are no answers."""
        return self.output_tokens / self.counted if self.counted else None

    def differs(self, row: int, key: str) -> bool:
        """Whether a row that has a line was asked otherwise than with this key."""
        return self._keys[row] != short_key(key)

    def names(self) -> dict[str, int]:
        """Return the rows that have a line by their `custom_id`."""
        return {each.custom_id: each.row for each in self._lines() if each.custom_id is not None}

    def answered(self) -> set[int]:
        """Return what stands for the keys of the requests that have an answer."""
        return {short_key(each.key) for each in self._lines() if bytes(each.error) == b"null"}


def short_key(key: str) -> int:
    """Return a number of eight bytes that stands for a key."""
    try:
        return int(key[:16] or "0", 16)
    except ValueError:
        return 1  # a key that no batch makes


def estimate(batch: Estimated) -> Estimate:
    """Return what a batch would take. All rows are read, nothing is sent, and no file is made.

    Raises:
        ConfigError: the input cannot be read as a whole, or the output is something else's.
        OSError: the input or the output cannot be read.
    """
    return _Estimating(batch).run()


class _Estimating:
    def __init__(self, batch: Estimated) -> None:
        self._batch = batch
        self._llm = batch.llm
        self._requests = Requests(batch.llm, batch.system)
        journal = batch.output.journal_path
        self._done = _Done(journal, retry_errors=batch.retry_errors)
        self._asked: set[int] | None = self._done.answered() if batch.dedupe else None
        """What stands for the requests that have been counted, or answered, if equal ones are asked once."""
        now = State(batch.source.fingerprint, self._requests.settings)
        self._may_differ = bool(self._done.rows) and not batch.source.is_stream and read_state(journal) != now
        self._submitted = _rows_at_provider(batch)
        self._found = Estimate()
        self._models: dict[str, _Model] = {}
        self._problems: dict[str, Problem] = {}
        self._guessed = self._bounded = False

    def run(self) -> Estimate:
        found, batch = self._found, self._batch
        done = self._done.rows
        known = self._done.names() if batch.source.is_stream and done else None
        rows = batch.source.rows(_no_row if self._may_differ else done.__contains__, known)
        if isinstance(rows, AsyncIterable):
            run_to_end(partial(self._add_later, rows))
        else:
            for row in rows:
                if not self._add(row):
                    break
        found.skipped = len(done) - (found.changed if batch.changed == "ask" else 0)
        found.problems = [*self._problems.values()]
        models = self._models.values()
        found.input_tokens = round(sum(model.input_tokens for model in models))
        found.output_tokens = round(sum(model.output_tokens for model in models))
        found.output_from = self._output_from()
        self._price()
        found.seconds = self._seconds()
        found.bytes = found.rows * _bytes_of_line(self._llm.config.model) + round(found.output_tokens * BYTES_A_TOKEN)
        return found

    async def _add_later(self, rows: AsyncIterable[Row]) -> None:
        async for row in rows:
            if not self._add(row):
                break

    def _add(self, row: Row) -> bool:
        """Count a row. Return whether there may be more."""
        limit = self._batch.limit
        if limit is not None and row.number >= limit:
            return False
        try:
            request, key = self._requests.of(row)
        except Exception as error:  # noqa: BLE001  # it is the row's, as when the batch runs
            if row.number not in self._done.rows:
                self._note_problem(row, error)
            return True
        if row.number in self._done.rows:
            if not self._done.differs(row.number, key):
                return True
            self._found.changed += 1
            if self._batch.changed != "ask":
                return True
        if row.number in self._submitted:
            self._found.submitted += 1
            return True
        if self._asked is not None:
            if short_key(key) in self._asked:
                self._found.repeats += 1
                return True
            self._asked.add(short_key(key))
        self._found.rows += 1
        self._found.media += _has_media(request)
        model = self._models.setdefault(request.model, _Model())
        model.rows += 1
        model.input_tokens += size_of(request) / BYTES_A_TOKEN + 1
        model.output_tokens += self._output(request)
        return True

    def _note_problem(self, row: Row, error: Exception) -> None:
        message = error_message(error, ()).removeprefix(f"{row.where}: ")
        kind = re.sub(r"\d+", "0", message)  # a place in a line makes no kind of its own
        if kind not in self._problems and len(self._problems) >= _KINDS:
            kind, message = "others", "other problems"
        problem = self._problems.setdefault(kind, Problem(message))
        problem.rows += 1
        if len(problem.first) < SHOWN:
            problem.first.append(row.where)

    def _output(self, request: Request) -> float:
        """Return the output tokens to expect: at most `max_tokens`, and else as many as earlier answers had."""
        most, mean = request.max_tokens, self._done.mean
        if mean is None:
            self._bounded |= most is not None
            self._guessed |= most is None
            each = float(OUTPUT_GUESS if most is None else most)
        else:
            each = mean if most is None else min(mean, most)
        return each * (request.n or 1)

    def _output_from(self) -> str:
        mean = self._done.mean
        if mean is not None:
            return f"{mean:.0f} a row, as in the {self._done.counted:,} answers that are there"
        guess = f"a guess of {OUTPUT_GUESS} a row"
        return " or ".join(["at most: max_tokens"] * self._bounded + [guess] * self._guessed)

    def _price(self) -> None:
        """Find the cost. A price that depends on the size of a call is that of a mean row."""
        found, info = self._found, self._llm.pipeline.info
        prices = Prices(_given_prices(self._llm.pipeline.middleware), "Batch", needed=False)
        cost = Decimal(0)
        for name, model in self._models.items():
            price = prices.of(info, name)
            mean = Usage(
                input_tokens=round(model.input_tokens / model.rows),
                output_tokens=round(model.output_tokens / model.rows),
            )
            of_row = None if price is None else price.cost(mean)
            if of_row is None:
                found.unpriced.append(name)
            else:
                cost += of_row * model.rows
        if not found.unpriced and self._models:
            found.cost = float(cost * (BATCH_PRICE if self._batch.executor == "provider" else 1))

    def _seconds(self) -> float | None:
        """Return the seconds that the rows take at the rates that are given; None if there are none."""
        from fluxibly.middleware import RateLimit

        if self._batch.executor == "provider":
            return None
        rows, tokens = self._found.rows, self._found.input_tokens + self._found.output_tokens
        rates = [(rows, self._batch.rpm, 60.0), (tokens, self._batch.tpm, 60.0)]
        for layer in self._llm.pipeline.middleware:
            if isinstance(layer, RateLimit):
                rates += [(rows, layer.requests, layer.per), (tokens, layer.tokens, layer.per)]
        return max((count * per / rate for count, rate, per in rates if rate is not None), default=None)


def _rows_at_provider(batch: Estimated) -> Bitmap:
    found = Bitmap()
    for submission in read_open(batch.batches_path):
        for number in submission.numbers():
            found.add(number)
    return found


def _no_row(_: int) -> bool:
    return False


def _has_media(request: Request) -> bool:
    return any(not isinstance(part, Text) for message in request.messages for part in message.content)


def _bytes_of_line(model: str) -> int:
    """Return about the bytes of a line, without the text of its answer."""
    usage = {"input_tokens": 1_000, "output_tokens": 1_000}
    return len(
        encoded(Line(1_000_000, None, "0" * 32, "", finish_reason="stop", usage=usage, model=model, elapsed=1.234))
    )


def _given_prices(stack: Sequence[Middleware]) -> GivenPrices | None:
    """Return the prices that the layers of a stack were given."""
    given: dict[str, tuple[float, float]] = {}
    for layer in stack:
        if built_in_kind(layer) in ("Cost", "Budget"):
            given |= getattr(layer, "prices", None) or {}
    return given or None
