"""Checks answers, and asks again with the problem told."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Literal

import attrs

from fluxibly.combinators import OutputWatch, hold_back
from fluxibly.effects import CallNext, Flow
from fluxibly.errors import ConfigError, ResponseInvalid
from fluxibly.logs import log
from fluxibly.types import Message, Request, Response

EMPTY = "the answer is empty"


def _checked_schema(instance: object, attribute: object, schema: Any) -> None:
    if schema is None or attrs.has(schema if isinstance(schema, type) else type(None)):
        return
    if not isinstance(schema, Mapping):
        raise ConfigError(f"Validation(schema=…) is a JSON Schema (a mapping) or an attrs class, not {schema!r}")
    _validator(json.dumps(schema))


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
            class that cattrs has to make of it. A Markdown code fence around the JSON is passed over.
        max_retries: how often to ask again, over all these reasons; then `ResponseInvalid` is raised.
        hold: in a stream, hold everything back until the answer has passed. Without it a stream is checked at its
            end; it cannot be asked for again then, so a problem is raised at once (as the cause of
            `StreamInterrupted`, if text has gone out).
    """

    empty: Literal["warn", "raise", "retry"] = attrs.field(
        default="warn", validator=attrs.validators.in_(("warn", "raise", "retry"))
    )
    check: Callable[[Response], str | None] | None = None
    schema: Mapping[str, Any] | type[Any] | None = attrs.field(default=None, validator=_checked_schema)
    max_retries: int = attrs.field(default=2, validator=[attrs.validators.instance_of(int), attrs.validators.ge(0)])
    hold: bool = False

    def __call__(self, request: Request, call_next: CallNext) -> Flow[Response]:
        asked = request
        for left in range(self.max_retries, -1, -1):
            watch = OutputWatch()
            verdict = _Verdict()
            try:
                if self.hold and request.call.streaming:
                    response = yield from hold_back(call_next(asked), check=lambda r, v=verdict: self.judge(r, v))  # type: ignore[misc]
                else:
                    response = yield from watch.over(call_next(asked))
                    self.judge(response, verdict)
            except ResponseInvalid as invalid:
                if invalid is not verdict.error or not verdict.retry or not left or watch.done:
                    raise
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
        elif self.schema is not None and not response.tool_calls:
            try:
                verdict.parsed = parse(response.text, self.schema)
            except ValueError as error:
                raise verdict.reject(response, str(error)) from None
        if self.check is not None:
            correction = self.check(response)
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
    """The request with the rejected answer and its correction added; an empty answer is just asked for again."""
    if not invalid.response.has_output:
        return request
    correction = Message.user(f"{invalid.problem}\nPlease answer again, corrected.")
    return request.evolve(messages=(*request.messages, Message.assistant(invalid.response), correction))


def parse(text: str, schema: Mapping[str, Any] | type[Any]) -> Any:
    """The JSON in `text`, checked against a JSON Schema or made into an attrs class.

    Raises:
        ValueError: it is not JSON or does not match; the message tells the model what to mend.
    """
    try:
        value: Any = json.loads(_without_fence(text))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the answer is not valid JSON: {error}") from None
    if isinstance(schema, type):
        import cattrs

        try:
            return cattrs.structure(value, schema)
        except Exception as error:  # noqa: BLE001  # cattrs raises groups of whatever the class raises
            what = "; ".join(cattrs.transform_error(error, path=schema.__name__))
            raise ValueError(f"the answer does not fit {schema.__name__}: {what}") from None
    problems = [
        f"{problem.json_path}: {problem.message}" for problem in _validator(json.dumps(schema)).iter_errors(value)
    ]
    if problems:
        raise ValueError(f"the answer does not match the JSON Schema: {'; '.join(problems)}")
    return value


@lru_cache(maxsize=64)
def _validator(schema: str) -> Any:
    try:
        import jsonschema
        from jsonschema.validators import validator_for
    except ImportError:
        raise ConfigError("Validation with a JSON Schema needs jsonschema: pip install 'fluxibly[schema]'") from None
    parsed = json.loads(schema)
    kind: Any = validator_for(parsed, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(parsed)
    except jsonschema.SchemaError as error:
        raise ConfigError(f"Validation(schema=…) is not a JSON Schema: {error.message}") from None
    return kind(parsed)


def _without_fence(text: str) -> str:
    lines = text.strip().splitlines()
    if len(lines) >= 2 and lines[0].startswith("```") and lines[-1].strip() == "```":
        return "\n".join(lines[1:-1])
    return text
