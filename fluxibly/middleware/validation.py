"""Checks answers, and asks again with the problem told."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from functools import cache, lru_cache, partial
from typing import Any, Literal

import attrs

from fluxibly.combinators import hold_back
from fluxibly.effects import CallNext, Flow
from fluxibly.errors import ConfigError, ResponseInvalid
from fluxibly.guards import is_mapping
from fluxibly.logs import log, log_retry
from fluxibly.relay import OutputWatch
from fluxibly.types import Message, Request, Response

EMPTY = "the answer is empty"


def _checked_schema(instance: object, attribute: object, schema: Any) -> None:
    if schema is None or (isinstance(schema, type) and attrs.has(schema)):
        return
    if not is_mapping(schema):
        raise ConfigError(f"Validation(schema=…) is a JSON Schema (a mapping) or an attrs class, not {schema!r}")
    try:
        text = json.dumps(dict(schema))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"Validation(schema=…) is not a JSON Schema: {error}") from None
    _validator(text)


@attrs.frozen(kw_only=True)
class Validation:
    """Checks each whole answer; on request it asks the model again and says what was wrong.

    A call with `schema` returns a response whose `parsed` is the decoded JSON, or an instance of the attrs class. The
    usage is that of the last answer.

    Args:
        empty: what to do with an answer that has neither text nor tool calls: "warn" logs it, "raise" raises
            `ResponseInvalid`, "retry" asks again.
        check: gets the response, and returns None if it is good, else a correction to send to the model. What it
            raises reaches the caller.
        schema: a JSON Schema (needs `pip install 'fluxibly[schema]'`) that the text, as JSON, has to match; or an attrs
            class that cattrs has to make of it, numbers, strings and booleans each of their own type. A Markdown code
            fence around the JSON is passed over.
        max_retries: how often to ask again, over all these reasons; then `ResponseInvalid` is raised.
        hold: in a stream, hold everything back until the answer has passed. Without it a stream is checked at its
            end; it cannot be asked for again then, so a problem is raised at once (as the cause of
            `StreamInterrupted`, if text has gone out).
    """

    empty: Literal["warn", "raise", "retry"] = attrs.field(
        default="warn", validator=attrs.validators.in_(("warn", "raise", "retry"))
    )
    check: Callable[[Response], str | None] | None = attrs.field(
        default=None, validator=attrs.validators.optional(attrs.validators.is_callable())
    )
    schema: Mapping[str, Any] | type[Any] | None = attrs.field(default=None, validator=_checked_schema)
    max_retries: int = attrs.field(default=2, validator=[attrs.validators.instance_of(int), attrs.validators.ge(0)])
    hold: bool = False

    def __call__(self, request: Request, call_next: CallNext) -> Flow[Response]:
        if self.empty == "warn" and self.check is None and self.schema is None and not self.hold:
            response = yield from call_next(request)
            self.judge(response, _Verdict())
            return response
        asked = request
        for attempt in range(self.max_retries + 1):
            watch = OutputWatch() if request.call.streaming else None
            verdict = _Verdict()
            try:
                if self.hold and request.call.streaming:
                    response = yield from hold_back(call_next(asked), check=lambda r, v=verdict: self.judge(r, v))  # type: ignore[misc]
                else:
                    flow = call_next(asked)
                    response = yield from flow if watch is None else watch.over(flow)
                    self.judge(response, verdict)
            except ResponseInvalid as invalid:
                last = attempt == self.max_retries
                gone_out = watch is not None and watch.done
                if invalid is not verdict.error or not verdict.retry or last or gone_out:
                    raise
                log_retry(request, invalid, attempt, 0.0)
                asked = _corrected(request, invalid)
            else:
                return response if verdict.parsed is None else response.evolve(parsed=verdict.parsed)
        raise AssertionError("unreachable: the last round returns or raises")

    def judge(self, response: Response, verdict: _Verdict) -> None:
        """Raise `ResponseInvalid` for an answer that does not pass."""
        if not response.text.strip() and not response.tool_calls:
            if self.empty != "warn":
                raise verdict.reject(response, EMPTY, retry=self.empty == "retry")
            log(logging.WARNING, "LLM response is empty")
        if self.schema is not None and not response.tool_calls:
            try:
                verdict.parsed = parse(response.text, self.schema)
            except ConfigError:
                raise
            except ValueError as error:
                raise verdict.reject(response, str(error)) from None
        if self.check is not None:
            correction = self.check(response)
            if correction is not None and not isinstance(correction, str):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(
                    f"Validation(check=…) returned a {type(correction).__name__}; it returns None for a good answer, "
                    "else a correction (a str) to send to the model"
                )
            if correction is not None:
                raise verdict.reject(response, correction)


class _Verdict:
    """What became of one answer."""

    parsed: Any = None
    error: ResponseInvalid | None = None
    retry = True

    def reject(self, response: Response, problem: str, *, retry: bool = True) -> ResponseInvalid:
        self.retry = retry
        self.error = ResponseInvalid(
            f"the answer did not pass validation: {problem}", response=response, problem=problem
        )
        return self.error


def _corrected(request: Request, invalid: ResponseInvalid) -> Request:
    """The request with the rejected answer and its correction added; an empty answer is just asked for again.

    Services want a result for each tool call, before anything else is said.
    """
    answer = invalid.response
    if not answer.text.strip() and not answer.tool_calls:
        return request
    results = [Message.tool("not called: the answer was rejected", call) for call in answer.tool_calls]
    correction = Message.user(f"{invalid.problem}\nPlease answer again, corrected.")
    return request.evolve(messages=(*request.messages, Message.assistant(answer), *results, correction))


def parse(text: str, schema: Mapping[str, Any] | type[Any]) -> Any:
    """The JSON in `text`, checked against a JSON Schema or made into an attrs class.

    Raises:
        ValueError: it is not JSON or does not match; the message tells the model what to mend.
        ConfigError: the schema refers to what is not in it.
    """
    try:
        value: Any = json.loads(_without_fence(text), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the answer is not valid JSON: {error}") from None
    if isinstance(schema, type):
        return _structured(value, schema)
    problems = _mismatches(value, _validator(json.dumps(dict(schema))))
    if problems:
        raise ValueError(f"the answer does not match the JSON Schema: {'; '.join(problems)}")
    return value


def _mismatches(value: object, validator: Any) -> list[str]:
    from referencing.exceptions import Unresolvable

    try:
        return [f"{problem.json_path}: {problem.message}" for problem in validator.iter_errors(value)]
    except Unresolvable as error:
        raise ConfigError(f"Validation(schema=…) refers to {error.ref!r}, which is not in it") from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _structured(value: object, schema: type[Any]) -> Any:
    """The attrs class `schema` made of plain data."""
    import cattrs

    try:
        return _converter().structure(value, schema)
    except Exception as error:  # noqa: BLE001  # cattrs raises groups of whatever the class raises
        problems = cattrs.transform_error(error, path=schema.__name__, format_exception=_problem)
        raise ValueError(f"the answer does not fit {schema.__name__}: {'; '.join(problems)}") from None


def _problem(error: BaseException, kind: type | None) -> str:
    from cattrs.v import format_exception

    told = format_exception(error, kind)
    # Of a class's own validators cattrs tells only that they failed.
    return f"{told}: {error}" if kind is None and isinstance(error, ValueError) else told


@cache
def _converter() -> Any:
    """The converter of cattrs for JSON, without its leniency: bool("no") is True, and int(2.7) is 2."""
    from cattrs.preconf.json import make_converter

    converter = make_converter()
    for kind, accepted in ((bool, bool), (int, int), (float, (int, float)), (str, str)):
        converter.register_structure_hook(kind, partial(_strictly, kind, accepted))
    return converter


def _strictly(kind: type, accepted: type | tuple[type, ...], value: object, _: object) -> object:
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{kind.__name__} is due")
    return value


@lru_cache(maxsize=64)
def _validator(schema: str) -> Any:
    try:
        import jsonschema
        from jsonschema.validators import validator_for
        from referencing.jsonschema import EMPTY_REGISTRY
    except ImportError:
        raise ConfigError("Validation with a JSON Schema needs jsonschema: pip install 'fluxibly[schema]'") from None
    parsed = json.loads(schema)
    kind: Any = validator_for(parsed, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(parsed)
    except jsonschema.SchemaError as error:
        raise ConfigError(f"Validation(schema=…) is not a JSON Schema: {error.message}") from None
    return kind(parsed, registry=EMPTY_REGISTRY)  # so that no $ref is ever fetched from the network


def _without_fence(text: str) -> str:
    lines = text.strip().splitlines()
    if len(lines) >= 2 and lines[0].startswith("```") and lines[-1].strip() == "```":
        return "\n".join(lines[1:-1])
    return text
