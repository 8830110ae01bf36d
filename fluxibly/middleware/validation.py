"""Middleware that checks answers, and asks the model again with a description of the problem."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import attrs

from fluxibly._checks import kind_of, one_of, validator, whole
from fluxibly._logs import log, log_retry
from fluxibly.errors import ConfigError, ResponseInvalid
from fluxibly.flow import CallNext, Flow, hold_back
from fluxibly.flow.relay import OutputWatch
from fluxibly.functions import check_function, to_function
from fluxibly.middleware._copies import Rebuilt
from fluxibly.types import Message, Reasoning, Request, Response, Text

if TYPE_CHECKING:
    from fluxibly._schemas.shapes import Shape

EMPTY = "the answer is empty"


Check: TypeAlias = Callable[[Response], str | None]


def _to_check(value: Check | str | None) -> Check | None:
    return to_function(value)


@attrs.frozen(kw_only=True)
class Validation(Rebuilt):
    """Middleware that checks each complete answer, and optionally asks the model again with a correction.

    With `schema`, the response's `parsed` is the decoded JSON or an instance of the type. The schema is not sent:
    `llm.complete(…, into=Person)` sends and checks it. The usage is that of the last answer.

    Args:
        empty: how to handle an answer with neither text nor tool calls: "warn" logs it, "raise" raises
            `ResponseInvalid`, "retry" asks again.
        check: a function that receives the response, and returns None if the response is good, or else a correction to
            send to the model. An exception that it raises reaches the caller. In YAML, its registered name.
        schema: a JSON Schema that the text, parsed as JSON, must match (needs jsonschema), or a type whose instance it must
            make: an attrs class, a dataclass, a TypedDict, a msgspec Struct, a pydantic model, a list or a union of these.
            Numbers, strings and booleans are not converted to one another. A Markdown code fence around the JSON is ignored.
            A value that is not an object may also be the property `value` of one.
        max_retries: how often to ask again, for all reasons together. After that, `ResponseInvalid` is raised.
        hold: hold a stream back until the answer has passed. Without `hold`, a stream is checked at its end. By then it
            is too late to ask again, so a problem is raised at once (as the cause of `StreamInterrupted`, if text has
            gone out).
    """

    empty: Literal["warn", "raise", "retry"] = attrs.field(
        default="warn", validator=validator(one_of, ("warn", "raise", "retry"))
    )
    check: Check | None = attrs.field(
        default=None, converter=_to_check, validator=attrs.validators.optional(validator(check_function))
    )
    schema: Any = attrs.field(default=None)
    max_retries: int = attrs.field(default=2, validator=validator(whole, 0))
    hold: bool = False
    _shape: Shape | None = attrs.field(init=False, repr=False, eq=False, default=None)

    def __attrs_post_init__(self) -> None:
        if self.schema is not None:
            from fluxibly._schemas.shapes import shape_of  # late, because most stacks have no schema

            object.__setattr__(self, "_shape", shape_of(self.schema, "Validation(schema=…)"))

    @property
    def shape(self) -> Shape | None:
        """The shape that answers have to have; None: any."""
        return self._shape

    def __call__(self, request: Request, call_next: CallNext) -> Flow[Response]:
        if self.empty == "warn" and self.check is None and self._shape is None and not self.hold:
            response = yield from call_next(request)
            self.judge(response, _Verdict())
            return response
        asked = request
        for attempt in range(self.max_retries + 1):
            watch = OutputWatch() if request.call.streaming else None
            verdict = _Verdict()
            try:
                if self.hold and watch is not None:
                    held = hold_back(call_next(asked), check=lambda r, v=verdict: self.judge(r, v))  # type: ignore[misc]
                    response = yield from watch.over(held)
                else:
                    flow = call_next(asked)
                    response = yield from flow if watch is None else watch.over(flow)
                    self.judge(response, verdict)
            except ResponseInvalid as invalid:
                last = attempt == self.max_retries
                gone_out = watch is not None and watch.done
                if invalid is not verdict.error or not verdict.retry or last or gone_out:
                    raise
                asked = _corrected(request, invalid)
                change = "" if asked is request else "adds the answer and its problem to the messages"
                log_retry(request, invalid, attempt, 0.0, change=change)
            else:
                return response if verdict.parsed is None else response.evolve(parsed=verdict.parsed)
        raise AssertionError("unreachable: the last round returns or raises")

    def judge(self, response: Response, verdict: _Verdict) -> None:
        """Raise `ResponseInvalid` if the answer does not pass."""
        if _is_empty(response):
            if self.empty != "warn":
                raise verdict.reject(response, EMPTY, retry=self.empty == "retry")
            log(logging.WARNING, "LLM response is empty")
        if self._shape is not None and not response.tool_calls:
            try:
                verdict.parsed = self._shape.parse(response.text)
            except ConfigError:
                raise
            except ValueError as error:
                raise verdict.reject(response, str(error)) from None
        if self.check is not None:
            correction = self.check(response)
            if correction is not None and not isinstance(correction, str):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(
                    "Validation(check=…): expected None for a good answer, or a str (a correction to send to the "
                    f"model), got {kind_of(correction)}"
                )
            if correction is not None:
                raise verdict.reject(response, correction)


class _Verdict:
    """The result of checking one answer."""

    parsed: Any = None
    error: ResponseInvalid | None = None
    retry = True

    def reject(self, response: Response, problem: str, *, retry: bool = True) -> ResponseInvalid:
        self.retry = retry
        self.error = ResponseInvalid(
            f"the answer did not pass validation: {problem}", response=response, problem=problem
        )
        return self.error


def _is_empty(response: Response) -> bool:
    """Whether an answer has neither text nor tool calls, media or opaque parts. Reasoning alone is no answer."""
    if response.text.strip() or response.tool_calls:
        return False
    return all(isinstance(part, (Text, Reasoning)) for part in response.parts)


def _corrected(request: Request, invalid: ResponseInvalid) -> Request:
    """Return the request with the rejected answer and its correction added, or unchanged if the answer was empty.

    Each tool call gets a result, because services require the results before any other message.
    """
    answer = invalid.response
    if _is_empty(answer):
        return request
    results = [Message.tool("not called: the answer was rejected", call) for call in answer.tool_calls]
    correction = Message.user(f"{invalid.problem}\nPlease answer again, corrected.")
    return request.evolve(messages=(*request.messages, Message.assistant(answer), *results, correction))
