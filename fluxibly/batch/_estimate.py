"""What a batch would take, before anything is sent."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Final, Literal, Protocol

import attrs
import msgspec

from fluxibly._masking import error_message
from fluxibly._tokens import BYTES_A_TOKEN, size_of
from fluxibly.batch._input import Row, Source
from fluxibly.batch._journal import Bitmap
from fluxibly.batch._lines import Line, encoded
from fluxibly.calls import Usage
from fluxibly.errors import BadPrompt, error_type
from fluxibly.flow import Middleware
from fluxibly.llm import LLM, AsyncLLM
from fluxibly.parts import Text
from fluxibly.prices import GivenPrices, Prices
from fluxibly.types import Request


class Estimated(Protocol):
    """What is estimated: a `Batch`."""

    llm: LLM | AsyncLLM
    source: Source
    answers: Path
    limit: int | None
    retry_errors: bool
    executor: Literal["online", "provider"]


OUTPUT_GUESS: Final = 256
"""The output tokens of a row of which nothing is known."""
BATCH_PRICE: Final = Decimal("0.5")
"""What providers take for a call in one of their batches, of the price of the call."""
SHOWN: Final = 5
"""The rows of a problem that are named."""
_KINDS: Final = 50
"""The most kinds of problems that are told apart."""


@attrs.define
class Problem:
    """A problem that rows share, because of which they cannot be asked."""

    message: str
    """What is wrong with the first of them."""
    rows: int = 0
    first: list[int] = attrs.field(factory=list[int])
    """The first of them, by number, from 0."""


@attrs.define
class Estimate:
    """What a batch would take, if it ran now."""

    rows: int = 0
    """Rows that would be asked."""
    skipped: int = 0
    """Rows that have a line already."""
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
    """The time that the limits of the stack allow at the least; None: it has no limits with numbers."""
    bytes: int = 0
    """About the size of the output."""


@attrs.define
class _Model:
    rows: int = 0
    input_tokens: float = 0.0
    output_tokens: float = 0.0


class _Earlier(msgspec.Struct):
    """What is read of the line of a row that has been asked."""

    row: int
    usage: dict[str, int] | None = None
    error: msgspec.Raw | None = None


class _Done:
    """The rows that have a line, and the output tokens of those that were answered."""

    def __init__(self, journal: Path, *, retry_errors: bool) -> None:
        self.rows = Bitmap()
        self.counted = self.output_tokens = 0
        decode = msgspec.json.Decoder(_Earlier).decode
        for line in _lines(journal):
            try:
                earlier = decode(line)
            except msgspec.DecodeError:
                continue  # torn; that the file is something else is told when the batch runs
            failed = earlier.error is not None and earlier.error != b"null"
            if earlier.usage and not failed:
                self.counted += 1
                self.output_tokens += earlier.usage.get("output_tokens", 0)
            if failed and retry_errors:
                self.rows.discard(earlier.row)
            else:
                self.rows.add(earlier.row)

    @property
    def mean(self) -> float | None:
        """The output tokens of an answer; None if there are no answers."""
        return self.output_tokens / self.counted if self.counted else None


def _lines(path: Path) -> Iterator[bytes]:
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        yield from file


def estimate(batch: Estimated) -> Estimate:
    """Return what a batch would take. All rows are read, nothing is sent, and no file is made.

    Raises:
        OSError: the input or the output cannot be read.
    """
    return _Estimating(batch).run()


class _Estimating:
    def __init__(self, batch: Estimated) -> None:
        self._batch = batch
        self._llm = batch.llm
        self._done = _Done(batch.answers, retry_errors=batch.retry_errors)
        self._found = Estimate()
        self._models: dict[str, _Model] = {}
        self._problems: dict[str, Problem] = {}
        self._guessed = self._bounded = False

    def run(self) -> Estimate:
        found, batch = self._found, self._batch
        done = self._done.rows
        for row in batch.source.rows(done.__contains__):
            if batch.limit is not None and row.number >= batch.limit:
                break
            self._add(row)
        found.skipped = len(done)
        found.problems = [*self._problems.values()]
        models = self._models.values()
        found.input_tokens = round(sum(model.input_tokens for model in models))
        found.output_tokens = round(sum(model.output_tokens for model in models))
        found.output_from = self._output_from()
        self._price()
        stack = self._llm.pipeline.middleware
        found.seconds = seconds_at_least(stack, found.rows, found.input_tokens + found.output_tokens)
        found.bytes = found.rows * _bytes_of_line(self._llm.config.model) + round(found.output_tokens * BYTES_A_TOKEN)
        return found

    def _add(self, row: Row) -> None:
        request: Request | None = None
        try:
            if row.problem is not None:
                raise BadPrompt(row.problem)
            request = self._llm.request(row.prompt, row.settings)
        except Exception as error:  # noqa: BLE001  # it is the row's, as when the batch runs
            self._note_problem(row.number, error)
            return
        self._found.rows += 1
        self._found.media += _has_media(request)
        model = self._models.setdefault(request.model, _Model())
        model.rows += 1
        model.input_tokens += size_of(request) / BYTES_A_TOKEN + 1
        model.output_tokens += self._output(request)

    def _note_problem(self, number: int, error: Exception) -> None:
        message = f"{error_type(error)}: {error_message(error, ())}"
        kind = re.sub(r"\d+", "0", message)  # a place in a line makes no kind of its own
        if kind not in self._problems and len(self._problems) >= _KINDS:
            kind, message = "others", "other problems"
        problem = self._problems.setdefault(kind, Problem(message))
        problem.rows += 1
        if len(problem.first) < SHOWN:
            problem.first.append(number)

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
        if kind_is(layer, "Cost", "Budget"):
            given |= getattr(layer, "prices", None) or {}
    return given or None


def kind_is(layer: Middleware, *names: str) -> bool:
    """Whether a layer is of one of the built-in classes of these names."""
    from fluxibly.registry import built_in_kind

    return built_in_kind(layer) in names


def seconds_at_least(stack: Sequence[Middleware], rows: int, tokens: int) -> float | None:
    """Return the seconds that rows and tokens take at the rates of a stack; None if it has no rates with numbers."""
    from fluxibly.middleware import RateLimit

    found: list[float] = []
    for layer in stack:
        if isinstance(layer, RateLimit):
            found += [rows * layer.per / layer.requests] if layer.requests else []
            found += [tokens * layer.per / layer.tokens] if layer.tokens else []
    return max(found, default=None)
