"""How many tokens a call will take, learned from the calls before it."""

from __future__ import annotations

from collections.abc import Callable

from fluxibly._checks import number
from fluxibly._tokens import BYTES_A_TOKEN, bytes_of, size_of
from fluxibly.flow.verbs import discard
from fluxibly.types import Request, Usage

FIRST_OUTPUT = 256.0
"""The output tokens that are expected before any call has shown how many there are."""
_MEMORY = 50
"""About so many calls are remembered."""
_MODELS = 1000
"""The most models to remember."""


class _Learned:
    """The means of one model."""

    __slots__ = ("calls", "input_per_byte", "output")

    def __init__(self, output: float) -> None:
        self.calls = 0
        self.input_per_byte = 1 / BYTES_A_TOKEN
        self.output = output


class Estimate:
    """The tokens that a call is expected to take."""

    __slots__ = ("_learned", "input", "size", "total")

    def __init__(self, learned: _Learned, size: int, input_tokens: float, total: float) -> None:
        self._learned = learned
        self.size = size
        """The bytes of the request's texts."""
        self.input = input_tokens
        self.total = total
        """The tokens of input and output together."""

    def learn(self, usage: Usage) -> None:
        """Learn from what the whole answer has used. Threads may lose one another's updates, which does no harm to a mean."""
        learned, size, taken, output = self._learned, self.size, usage.input_tokens, usage.output_tokens
        learned.calls += 1
        weight = 1 / min(learned.calls, _MEMORY)
        if taken is not None and size:
            learned.input_per_byte += weight * (taken / size - learned.input_per_byte)
        if output is not None:
            learned.output += weight * (output - learned.output)

    def taken(self, usage: Usage | None, error: BaseException | None, text: str) -> float:
        """Return the tokens that count for an attempt, which ended with an error or without.

        What is not known of them is estimated: nothing, if it failed before output; the input, if it was cut off before
        output; after output, the input and what the text that came is worth.

        Args:
            usage: what the service has told. Of an attempt that was cut off, it may not have counted all of the output.
            text: the output that came before the error.
        """
        total = None if usage is None else usage.total_tokens
        if error is None:
            return self.total if total is None else float(total)
        if not text and total is None and isinstance(error, Exception):
            return 0.0
        usage = usage or Usage()
        input_tokens = self.input if usage.input_tokens is None else usage.input_tokens
        return input_tokens + max(bytes_of(text) / BYTES_A_TOKEN, usage.output_tokens or 0)


class Estimates:
    """The estimates of one middleware, learned for each model.

    Args:
        own: the user's function, which returns the tokens of a request. None: they are learned from usage.
        middleware: the name of its class.
        output: the output tokens to expect before any call has shown how many there are.
    """

    def __init__(self, own: Callable[[Request], float] | None, middleware: str, output: float = FIRST_OUTPUT) -> None:
        self._own = own
        self._middleware = middleware
        self._output = output
        self._models: dict[str, _Learned] = {}

    def afresh(self, request: Request, name: str) -> Estimate:
        """Forget what was learned of a model, and estimate a request."""
        self._models.pop(name, None)
        return self.of(request, name)

    def of(self, request: Request, name: str) -> Estimate:
        """Estimate a request. `name` is the model's, with its provider's.

        Raises:
            TypeError: the user's function has returned something else than a number of tokens.
        """
        learned = self._models.get(name)
        if learned is None:
            if len(self._models) >= _MODELS:
                self._models.clear()
            learned = self._models[name] = _Learned(self._output)
        size = size_of(request)
        input_tokens = size * learned.input_per_byte + 1
        if self._own is None:
            output, most = learned.output, request.max_tokens
            return Estimate(
                learned, size, input_tokens, input_tokens + (output if most is None or most > output else most)
            )
        total = self._own(request)
        if (wrong := number("estimate(request)", total, 0, unit="tokens")) is not None:
            discard(total)
            raise TypeError(f"{self._middleware}: {wrong}")
        return Estimate(learned, size, min(input_tokens, total), total)
