"""The lines of a batch's journal, and of its output as they come."""

from __future__ import annotations

import reprlib
from typing import Any

import msgspec

from fluxibly._checks import is_mapping
from fluxibly._dicts import part_to_dict
from fluxibly._masking import error_message
from fluxibly.calls import Usage
from fluxibly.errors import ProviderError, error_type, root_cause
from fluxibly.providers.dialects.json_values import without_lone_surrogates
from fluxibly.providers.dialects.openai_answers import completion
from fluxibly.types import CallRecord, Request, Response


class Line(msgspec.Struct):
    """The answer or the error of a row. All lines have all fields, so that readers of tables need no special cases."""

    row: int
    """The place of the row in the input, from 0."""
    custom_id: str | None
    key: str
    """A hash of what was asked, equal for equal requests."""
    text: str | None = None
    """The text of the answer. None: there is no answer."""
    tool_calls: list[dict[str, Any]] | None = None
    """The calls of tools in the answer, each with `id`, `name` and `arguments` (the model's JSON text)."""
    finish_reason: str | None = None
    usage: dict[str, int] | None = None
    """The tokens of all attempts, as far as the service counted them. `Usage` says what the names mean."""
    cost: float | None = None
    """US dollars for all attempts. None: not known."""
    model: str | None = None
    """The model that answered."""
    attempts: int = 0
    elapsed: float = 0.0
    """Seconds from the first attempt to the end, waits for limits included."""
    error: dict[str, Any] | None = None
    """Why there is no answer: `type` (the class of the error), `message`, `retryable`, and what the service said: `status`,
    `code`, `request_id`."""


class WholeLine(Line):
    """A line that has the whole answer too, for outputs that show more of it."""

    body: Any = None
    """The answer as a `chat.completion` of OpenAI's. None: there is no answer."""
    request_id: str | None = None
    """The service's id of the request."""


def line_of(
    row: int,
    custom_id: str | None,
    key: str,
    elapsed: float,
    *,
    response: Response | None = None,
    error: BaseException | None = None,
    call: CallRecord | None = None,
    request: Request | None = None,
    where: str = "",
    whole: bool = False,
) -> Line:
    """Return the line of a row that was answered, or that failed.

    Args:
        row: the number of the row.
        custom_id: its name in the input.
        key: the key of the request; empty if the row made none.
        elapsed: seconds from the first attempt to the end.
        response: the answer.
        error: what the call raised. Texts of the request are masked in its message.
        call: the record of the call. Without it, the tokens and the model are those of the response.
        request: what was asked; None if the row made no request.
        where: where the row stands in the input, for the message of an error that is about the row itself.
        whole: whether the line has to have the whole answer (`Output.whole`).
    """
    line = WholeLine(row, custom_id, key) if whole else Line(row, custom_id, key)
    line.elapsed = round(elapsed, 3)
    usage = None
    if call is not None:
        line.attempts = call.attempts
        spent = call.spent
        usage = spent[0].usage if len(spent) == 1 else Usage.sum([each.usage for each in spent])
        line.cost = None if call.cost is None else float(call.cost)
        line.model = call.model
    if response is not None:
        line.text = response.text
        line.finish_reason = response.finish_reason
        if response.tool_calls:
            line.tool_calls = [_described_call(part_to_dict(tool_call)) for tool_call in response.tool_calls]
        if response.model is not None:
            line.model = response.model
        if call is None:
            usage = response.usage
        if isinstance(line, WholeLine):
            model = "" if request is None else request.model
            line.body = completion(response, model)
            line.request_id = response.request_id
    if usage is not None:
        line.usage = _counts(usage)
    if error is not None:
        if request is not None and call is not None:
            request = request.evolve(call=call)
        line.error = described_error(error, request)
        if where and not line.error["message"].startswith(f"{where}: "):
            line.error["message"] = f"{where}: {line.error['message']}"
    return line


def described_error(error: BaseException, request: Request | None = None) -> dict[str, Any]:
    """Return what a line says of an error. Texts of the request are masked in its message."""
    cause = root_cause(error)
    said = cause if isinstance(cause, ProviderError) else None
    return {
        "type": error_type(error),
        "message": error_message(error, () if request is None else (request,)),
        "retryable": said is not None and said.retryable,
        "status": None if said is None else said.status,
        "code": None if said is None else said.code,
        "request_id": None if said is None else said.request_id,
    }


def _described_call(fields: dict[str, Any]) -> dict[str, Any]:
    del fields["type"]
    return fields


def _counts(usage: Usage) -> dict[str, int]:
    counts: dict[str, int] = {}
    if (tokens := usage.input_tokens) is not None:
        counts["input_tokens"] = tokens
    if (tokens := usage.output_tokens) is not None:
        counts["output_tokens"] = tokens
    if (tokens := usage.cached_tokens) is not None:
        counts["cached_tokens"] = tokens
    if (tokens := usage.cache_write_tokens) is not None:
        counts["cache_write_tokens"] = tokens
    if (tokens := usage.reasoning_tokens) is not None:
        counts["reasoning_tokens"] = tokens
    return counts


_encode = msgspec.json.Encoder().encode


def encoded(value: msgspec.Struct) -> bytes:
    """Return a line as it is written, with its end.

    Whatever an answer holds, there is a line: half of a surrogate pair becomes U+FFFD, since UTF-8 has no bytes for it, a value
    that JSON does not have becomes a text, and one that is nested too deeply becomes null.
    """
    try:
        return _encode(value) + b"\n"
    except (TypeError, ValueError, OverflowError, RecursionError):
        return _encoded_leniently(value)


def _encoded_leniently(value: msgspec.Struct) -> bytes:
    return _encode({name: _lenient(getattr(value, name)) for name in value.__struct_fields__}) + b"\n"


def _lenient(value: object) -> object:
    """Return a value as JSON has it, with its shape; None if it is nested too deeply."""
    try:
        return msgspec.Raw(_encode(without_lone_surrogates(msgspec.to_builtins(value, enc_hook=_shown))))
    except (TypeError, ValueError, OverflowError, RecursionError):
        return None


def _shown(value: object) -> object:
    return dict(value) if is_mapping(value) else reprlib.repr(value)
