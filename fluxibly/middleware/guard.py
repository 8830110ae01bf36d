"""Middleware that lets pass only what has been checked."""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial
from typing import Any, Literal, TypeAlias

import attrs

from fluxibly._checks import is_whole, kind_of, problem, text
from fluxibly._logs import log_decision
from fluxibly.errors import ConfigError, GuardRefused
from fluxibly.flow import CallNext, Flow
from fluxibly.flow.combinators import effects_of
from fluxibly.flow.relay import is_flow
from fluxibly.flow.verbs import discard
from fluxibly.functions import arity, check_function, to_function
from fluxibly.middleware._borders import Borders, Lengths, Sentences
from fluxibly.middleware._copies import Rebuilt
from fluxibly.middleware._keys import name_of_provider, whom
from fluxibly.middleware._releasing import check_whole, release_checked
from fluxibly.types import Message, Request, Response

Verdict: TypeAlias = Generator[Any, Any, str | None] | str | None
"""None to pass, or the reason to refuse; or a flow that returns one of these."""
InputCheck: TypeAlias = Callable[[Request], Verdict]
OutputCheck: TypeAlias = Callable[[Response], Verdict] | Callable[[Response, Request], Verdict]


def _to_input(value: InputCheck | str | None) -> InputCheck | None:
    return to_function(value)


def _to_output(value: OutputCheck | str | None) -> OutputCheck | None:
    return to_function(value)


def _release_problem(name: str, value: object) -> str | None:
    if value in ("all", "sentence") or (is_whole(value) and value >= 1):
        return None
    return problem(name, "'all', 'sentence' or a number of characters of at least 1", value)


def _checked(check: Callable[..., str | None], *, optional: bool = True, **options: Any) -> Any:
    """Make a validator that raises a ConfigError. `optional` says whether None is valid."""

    def validate(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
        if optional and value is None:
            return
        if (found := check(attribute.name, value, **options)) is not None:
            raise ConfigError(f"Guard: {found}")

    return validate


@attrs.frozen(kw_only=True)
class Guard(Rebuilt):
    """Middleware that lets pass only what has been checked, and refuses the rest.

    `input` and `output` return None to pass, or the reason to refuse, a str. They may be generator functions, which ask a
    model (`ask`) or a service (`perform`) first. What they raise goes to the caller, and nothing passes. An answer has its
    text, reasoning, tool calls, media and other choices (`alternatives`), and none of these goes out unchecked.

    With `release` "sentence" or a number, the response so far has the text up to a border exactly, and the reasoning and
    media before it. They go out once it has passed. At the end of a message the whole response is checked, and only then
    its tool calls, what stands behind them, and everything else goes out. A whole answer passes the same checks in the
    same order. A sentence ends at . ! ? … before white space, at the stops of Chinese and Japanese before anything, and at
    the end of a line; closing quotes and brackets belong to it.

    Args:
        input: takes each request before it is sent.
        output: takes the response so far. A function with a second parameter without a default takes the request, too, for
            `ask(request.evolve(messages=…), target=judge)`.
        release: when a stream is checked and let out: "all" at the end of each message, "sentence" also after each
            sentence, a number after every so many characters.
        refusal: the text that answers in place of what is refused, with the finish reason "content_filter"; only with
            release="all". Without it, `GuardRefused` is raised.

    Raises:
        GuardRefused: the request or the answer was refused. A refused request was not sent. In a stream of which output
            has gone out, it is the cause of `StreamInterrupted`.
        TypeError: a function returned something else than None or a reason.
        ConfigError: neither `input` nor `output` is given, one of them is an async function, or a setting is wrong.
    """

    input: InputCheck | None = attrs.field(
        default=None, converter=_to_input, validator=_checked(check_function, flows=True)
    )
    output: OutputCheck | None = attrs.field(
        default=None, converter=_to_output, validator=_checked(check_function, flows=True)
    )
    release: Literal["all", "sentence"] | int = attrs.field(
        default="all", validator=_checked(_release_problem, optional=False)
    )
    refusal: str | None = attrs.field(default=None, validator=_checked(text))
    _takes_request: bool = attrs.field(init=False, repr=False, eq=False)
    """Whether `output` takes the request, too."""
    _borders: Callable[[], Borders] | None = attrs.field(init=False, repr=False, eq=False)

    def __attrs_post_init__(self) -> None:
        if self.input is None and self.output is None:
            raise ConfigError("Guard: expected input=… or output=…, got neither; write Guard(output=function)")
        if self.refusal is not None and self.release != "all":
            raise ConfigError(
                f"Guard: refusal: expected release='all', because a text cannot take the place of what has gone out; got "
                f"release={self.release!r}"
            )
        if self.input is not None:
            _arity("input", self.input, most=1, takes="the request")
        borders: Callable[[], Borders] | None = Sentences
        if self.release != "sentence":
            borders = None if self.release == "all" else partial(Lengths, self.release)
        object.__setattr__(self, "_borders", borders)
        takes = "the response, or the response and the request"
        both = self.output is not None and _arity("output", self.output, most=2, takes=takes) == 2
        object.__setattr__(self, "_takes_request", both)

    def __call__(self, request: Request, call_next: CallNext) -> Flow[Response]:
        if self.input is not None:
            found = self.input(request)
            reason = None if found is None else (yield from _reason("input", found))
            if reason is not None:
                log_decision(request, "Guard", "refuses the request")
                if self.refusal is not None:
                    return Response(self.refusal, finish_reason="content_filter")
                raise GuardRefused(f"Guard refused the request to {whom(request)}: {reason}", reason=reason)
        if self.output is None:
            return (yield from call_next(request))
        checks = _Checks(self.output, request, takes_request=self._takes_request)
        try:
            if request.call.streaming:
                return (yield from release_checked(call_next(request), checks, self._borders))
            response = yield from call_next(request)
            yield from check_whole(response, checks, self._borders)
        except GuardRefused as error:
            if self.refusal is None or error is not checks.refused:
                raise
        else:
            return response
        # Outside of the `except`, because an error of the consumer would have the refusal as its context.
        return checks.answer(self.refusal)


class _Checks:
    """The checks of one call's answer."""

    def __init__(self, output: Callable[..., Verdict], request: Request, *, takes_request: bool) -> None:
        self.output = output
        self.arguments = (request,) if takes_request else ()
        self.request = request
        self.added: tuple[Message, ...] = ()
        self.refused: GuardRefused | None = None
        self.response = Response()
        """The response that was checked last."""

    def check(self, response: Response) -> Flow[None]:
        self.response = response
        try:
            found = self.output(response, *self.arguments)
            reason = None if found is None else (yield from _reason("output", found))
            if reason is not None:
                raise self._refuse(reason)
        except Exception:
            # A reason may quote the answer, and what is logged of an error is masked against these messages.
            call = self.request.call
            said = [Message.assistant(each) for each in (response, *response.alternatives)]
            call.sent_messages = (*call.sent_messages, *said)
            raise

    def _refuse(self, reason: str) -> GuardRefused:
        call = self.request.call
        log_decision(self.request, "Guard", "refuses the answer")
        whose = f"{call.sent_model or self.request.model} at {name_of_provider(call.provider)}"
        self.refused = GuardRefused(f"Guard refused the answer of {whose}: {reason}", reason=reason)
        return self.refused

    def answer(self, refusal: str) -> Response:
        """Return a response with the refusal in place of what was refused."""
        refused = self.response
        facts = {
            name: getattr(refused, name) for name in ("usage", "model", "id", "request_id", "rate_limits", "provider")
        }
        return Response(refusal, finish_reason="content_filter", added=self.added, **facts)


def _reason(name: str, found: object) -> Flow[str | None]:
    """Return the reason that a function has returned, or None. Whatever else it is must not be taken for a pass."""
    if is_flow(found):
        found = yield from effects_of(found, f"Guard({name}=…): expected the function to yield only from")
    if found is None or (isinstance(found, str) and found.strip()):
        return found
    discard(found)
    got = repr(found) if isinstance(found, (bool, str)) else kind_of(found)
    raise TypeError(
        f"Guard({name}=…): expected None to pass, or the reason to refuse (a str that is not empty), got {got}; to wait for "
        "something, write a generator function: result = yield from perform(call, acall)"
    )


def _arity(name: str, function: Callable[..., Any], *, most: int, takes: str) -> int:
    """Return how many arguments a function takes; see `arity`."""
    try:
        return arity(name, function, most=most, takes=takes)
    except ConfigError as error:
        raise ConfigError(f"Guard: {error}") from None
