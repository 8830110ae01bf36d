"""The laws, the scenarios of `check_middleware`, and the run of a middleware through a scenario."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Literal, Self

import attrs

from fluxibly._logs import logger
from fluxibly.errors import ServerError, root_cause
from fluxibly.flow.effects import CallNext, Effect, Flow, More, Release, Send
from fluxibly.flow.relay import Relay, Turns
from fluxibly.testing.modes import Mode, Ran
from fluxibly.testing.scripted import Answer, AsyncScriptedProvider, Cut, ScriptedProvider
from fluxibly.types import Chunk, Message, Request, Response, ToolCallDelta, Usage

LAWS = {
    1: "all modes give the same result",
    2: "every opened stream is closed",
    3: "a response has the text of its chunks",
    4: "no request is sent again after output",
    5: "context variables and limits stay as they were",
    6: "KeyboardInterrupt, cancellation and GeneratorExit pass unchanged",
    7: "a request is never changed",
    8: "calls do not affect each other",
    11: "a failed or incomplete answer never passes as a whole answer, and time limits hold",
}
"""The laws that the checks can find broken, as their messages state them."""
PLENTY = 8
"""How often a middleware may send a request before the script runs out."""


@attrs.frozen
class Scenario:
    """A provider's script. `answers` makes it anew for each run, because a raised error keeps its traceback."""

    name: str
    answers: Callable[[], Sequence[Answer]]
    partial: str | None = None
    """The text that was delivered before the first answer failed; None if that does not fail after output."""
    later: bool = False
    """Whether the second answer fails after output, which only a middleware gets that asks again after a tool call."""
    stop_after: int | None = None
    restarts: bool = False


def _good() -> list[Answer]:
    return ["Hello, world"] * PLENTY


def _rich(*following: Answer) -> list[Answer]:
    """Return an answer with everything, and plain answers for a middleware that runs the tool and asks again."""
    begin = Chunk("Hello", reasoning="hm", model="m-1", id="r-1")
    call = ToolCallDelta(index=0, id="c-1", name="look", arguments='{"at": 1}')
    end = Chunk(finish_reason="tool_call", usage=Usage(input_tokens=3, output_tokens=2))
    return [[begin, Chunk(", world", reasoning="hm"), Chunk(tool_calls=(call,)), end], *following, *_good()]


def _fails_first() -> list[Answer]:
    return [ServerError("scripted failure"), *_good()]


def _fails_late() -> list[Answer]:
    return [["Hello", ServerError("scripted failure")], *_good()]


def _cut() -> list[Answer]:
    return [["Hello", Cut()], *_good()]


SCENARIOS = (
    Scenario("a plain answer", _good),
    Scenario("an answer with reasoning, a tool call and usage", _rich),
    Scenario("a failure after a tool call, before output", lambda: _rich(*_fails_first())),
    Scenario("a failure after a tool call, after output", lambda: _rich(*_fails_late()), later=True),
    Scenario("an empty answer", lambda: [[Chunk(finish_reason="stop")]] * PLENTY),
    Scenario("a failure before output", _fails_first),
    Scenario("a failure before output, again and again", lambda: [ServerError("scripted failure")] * (PLENTY * 8)),
    Scenario("a failure after output", _fails_late, partial="Hello"),
    Scenario("a failure after output, for a consumer that takes Restart", _fails_late, partial="Hello", restarts=True),
    Scenario("a stream that is cut off", _cut, partial="Hello"),
    Scenario("a consumer that closes without reading", _good, stop_after=0),
    Scenario("a consumer that leaves after one chunk", _good, stop_after=1),
)


@attrs.frozen
class Trial:
    mode: Mode
    ran: Ran
    provider: ScriptedProvider | AsyncScriptedProvider
    probe: Probe
    records: list[str]

    @property
    def outcome(self) -> object:
        """The result that has to be the same in all modes."""
        if self.ran.error is None:
            return self.ran.response
        cause = root_cause(self.ran.error)
        return type(cause), str(cause)

    @property
    def summary(self) -> str:
        """The outcome, for a message."""
        return repr(self.ran.response if self.ran.error is None else root_cause(self.ran.error))


class Probe(Relay):
    """A middleware outside of the checked middleware, which observes the effects that pass."""

    def __init__(self) -> None:
        self.resent: Literal["after a failure", "after an answer"] | None = None
        """The event after which a request was sent that must not be sent any more."""
        self.limits_left = True
        """Whether the checked middleware has left the limits of the call as they were."""
        self.returned: Response | None = None
        """The response of the checked middleware, even if the driver then refused it."""
        self.past_failure = False
        """Whether a mark has passed, or an attempt was broken off: a failure of a stream need not fail the call."""
        self.restarted()

    def restarted(self) -> None:
        self.added: tuple[Message, ...] = ()
        """The messages of the marks."""
        self.turns = Turns()
        self.failed = False
        """Whether the last attempt has failed."""
        self.begin_message()

    def begin_message(self) -> None:
        self.output = False
        self.texts: list[str] = []
        """The texts of the chunks of the message under way."""

    def __call__(self, request: Request, call_next: CallNext) -> Flow[Response]:
        call = request.call
        leash = call.leash
        # In a whole call, the chunks of a middleware go nowhere, and every request may be sent.
        flow = self.over(call_next(request)) if call.streaming else call_next(request)
        try:
            self.returned = yield from flow
        finally:
            self.limits_left = call.leash is leash
        return self.returned

    def see(self, effect: Effect) -> Effect:
        if isinstance(effect, (Chunk, More)):
            self.see_chunk(effect if isinstance(effect, Chunk) else effect.chunk)
        elif isinstance(effect, Send) and not effect.request.call.nested:
            if self.turns.refuse(effect.request):
                self.resent = "after a failure" if self.failed else "after an answer"
            self.failed = False
        elif isinstance(effect, Release):
            self.failed = True
            self.past_failure = self.past_failure or effect.broken_off
        return effect

    def see_chunk(self, chunk: Chunk) -> None:
        if chunk.added is not None:
            self.past_failure = True
            self.turns.mark()
        if chunk.added:
            self.added += chunk.added
            self.begin_message()
        if chunk.has_output:
            self.output = self.turns.output = True
        self.texts.append(chunk.text)


class Watch:
    """A watch over the attributes of an object, while entered: which of them belong to one call?

    State that calls share, such as a counter or the failures that a circuit breaker has seen, is read before it is
    written, at least in some calls, because its old value matters; or a lock guards it. What each call writes before it
    reads it, the next call overwrites, also while the first is still under way.
    """

    def __init__(self, watched: object) -> None:
        self._watched: Any = watched
        self._class: Any = type(watched)
        self._written: set[str] = set()
        """The attributes that the current call has written."""
        self._of_a_call: list[str] = []
        self._shared: set[str] = set()

    @property
    def of_a_call(self) -> str | None:
        """The first attribute that holds state of one call, or None."""
        return next((name for name in self._of_a_call if name not in self._shared), None)

    def next_call(self) -> None:
        """Begin to watch another call."""
        self._written.clear()

    def read(self, name: str) -> None:
        if name not in self._written:
            self._shared.add(name)

    def write(self, name: str) -> None:
        self._written.add(name)
        own: dict[str, object] = getattr(self._watched, "__dict__", {})
        if any(map(_is_held, own.values())):
            self._shared.add(name)
        self._of_a_call.append(name)

    def __enter__(self) -> Self:
        watch, cls = self, self._class

        def __getattribute__(own: Any, name: str) -> Any:  # noqa: N807  # Python's own name
            if not name.startswith("__"):
                watch.read(name)
            return cls.__getattribute__(own, name)

        def __setattr__(own: Any, name: str, value: Any) -> None:  # noqa: N807  # Python's own name
            watch.write(name)
            cls.__setattr__(own, name, value)

        body: dict[str, Any] = {name: getattr(cls, name) for name in ("__doc__", "__module__", "__qualname__")}
        body |= {"__slots__": (), "__getattribute__": __getattribute__, "__setattr__": __setattr__}
        with suppress(TypeError):  # a function, or an object of a class that is not written in Python
            _set_class(self._watched, type(cls.__name__, (cls,), body))
        return self

    def __exit__(self, *_: object) -> None:
        if type(self._watched) is not self._class:
            _set_class(self._watched, self._class)


def _set_class(value: object, cls: type) -> None:
    object.__setattr__(value, "__class__", cls)  # a frozen class has a `__setattr__` that refuses


def _is_held(value: Any) -> bool:
    """Whether a value is a lock that is held."""
    for name in ("locked", "_is_owned"):  # an RLock has no `locked` before Python 3.14
        method = getattr(value, name, None)
        if hasattr(value, "acquire") and callable(method):
            return method() is True
    return False


class Records(logging.Handler):
    """The errors that the drivers log about a middleware, collected while entered."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "it must let it pass" in (message := record.getMessage()):
            self.messages.append(message)

    def __enter__(self) -> Self:
        logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logger.removeHandler(self)
