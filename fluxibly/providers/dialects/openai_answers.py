"""Answers as OpenAI's chat completions API gives them: whole, as the chunks of a stream, and as errors.

The other modules of this dialect read what services say. This one writes, for programs that are a service themselves.
"""

from __future__ import annotations

import secrets
import time
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import attrs

from fluxibly import errors
from fluxibly._checks import is_mapping
from fluxibly.aggregate import CallNumbers
from fluxibly.providers.dialects.openai_request import image_url
from fluxibly.types import (
    Audio,
    Chunk,
    Image,
    Part,
    Reasoning,
    Request,
    Response,
    Text,
    ToolCall,
    ToolCallDelta,
    Usage,
)

_FINISH_REASONS: Final[Mapping[str, str]] = {
    "stop": "stop",
    "length": "length",
    "content_filter": "content_filter",
    "tool_call": "tool_calls",
    "error": "error",
}
"""OpenAI's words for `FINISH_REASONS`. ("error" is none of its own, but any other would call half an answer whole.)"""


def finish_reason_of(response: Response) -> str:
    """Return the finish reason of an answer in OpenAI's words. Clients wait for one, so there always is one."""
    known = _FINISH_REASONS.get(response.finish_reason or "")
    return known or ("tool_calls" if response.tool_calls else "stop")


def usage_body(usage: Usage) -> dict[str, Any]:
    """Return token counts as OpenAI's `usage`, whose counts are never null."""
    return {
        "prompt_tokens": usage.input_tokens or 0,
        "completion_tokens": usage.output_tokens or 0,
        "total_tokens": usage.total_tokens or 0,
        "prompt_tokens_details": {
            "cached_tokens": usage.cached_tokens or 0,
            "cache_write_tokens": usage.cache_write_tokens or 0,
        },
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens or 0},
    }


def _new_id() -> str:
    return f"chatcmpl-{secrets.token_hex(12)}"


# Whole answers


def completion(response: Response, model: str) -> dict[str, Any]:
    """Return a whole answer as a `chat.completion`. The messages that middleware added are left out.

    Args:
        response: the answer.
        model: the model that was asked, for an answer that names none.
    """
    body: dict[str, Any] = {
        "id": response.id or _new_id(),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": response.model or model,
        "choices": [
            {
                "index": index,
                "message": _message(choice),
                "logprobs": _logprobs(choice.details),
                "finish_reason": finish_reason_of(choice),
            }
            for index, choice in enumerate((response, *response.alternatives))
        ],
    }
    if response.usage is not None:
        body["usage"] = usage_body(response.usage)
    return body


def _message(response: Response) -> dict[str, Any]:
    parts = response.parts
    texts = [part for part in parts if isinstance(part, Text)]
    refusals = [part.text for part in texts if (part.raw or {}).get("type") == "refusal"]
    text = "".join([part.text for part in texts if (part.raw or {}).get("type") != "refusal"])
    message: dict[str, Any] = {
        "role": "assistant",
        "content": text if text or not (response.tool_calls or refusals) else None,
        "refusal": "".join(refusals) or None,
    }
    if response.reasoning:
        message["reasoning_content"] = response.reasoning
    message |= _beside(parts, response.details)
    if response.tool_calls:
        message["tool_calls"] = [_call(call) for call in response.tool_calls]
    return message


def _call(call: ToolCall) -> dict[str, Any]:
    kind, fields = _described(call.raw, call.name, call.raw_arguments)
    return {"id": call.id, "type": kind, kind: fields}


def _described(raw: Mapping[str, Any] | None, name: str | None, arguments: str) -> tuple[str, dict[str, Any]]:
    """Return the type of a call, and the fields under this name."""
    custom = (raw or {}).get("type") == "custom"
    fields: dict[str, Any] = {} if name is None else {"name": name}
    fields["input" if custom else "arguments"] = arguments
    return ("custom" if custom else "function"), fields


def _beside(parts: Sequence[Part], details: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the fields of a message or a delta for images, sound, signed reasoning and annotations.

    Images and signed reasoning have no place in OpenAI's own shape; these are OpenRouter's, which `Message.from_dict` reads.
    """
    fields: dict[str, Any] = {}
    for part in parts:
        if isinstance(part, Image):
            fields.setdefault("images", []).append({"type": "image_url", "image_url": {"url": image_url(part)}})
        elif isinstance(part, Audio) and part.data is not None:
            known = {name: value for name, value in (part.raw or {}).items() if name in ("id", "expires_at")}
            sound = {"data": b64encode(part.data).decode("ascii"), "transcript": part.transcript or ""}
            fields["audio"] = {"id": "", "expires_at": 0, **known, **sound}
        elif isinstance(part, Reasoning) and part.signature:
            signed = {"type": "reasoning.text", "text": part.text, "signature": part.signature}
            fields.setdefault("reasoning_details", []).append(signed)
    notes: object = (details or {}).get("annotations")
    if notes and isinstance(notes, list):
        fields["annotations"] = notes
    return fields


def _logprobs(details: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    found: object = (details or {}).get("logprobs")
    return found if is_mapping(found) and "content" in found else None


# Streams


class ChunkWriter:
    """The chunks of a streamed answer as `chat.completion.chunk` objects: one message for each choice.

    A client of OpenAI's knows nothing of calls that middleware runs. So fragments of a call are written at once only if the
    request has a tool of this name. Others wait: a mark (`Chunk.added`) discards them, because the call has been run, and the
    end of the answer writes those that are left.

    Args:
        request: the request that is answered.
        usage: whether a last object has the token counts (and no choice), as OpenAI sends if it is asked for.
    """

    def __init__(self, request: Request, *, usage: bool = True) -> None:
        self._usage = usage
        self._tools = frozenset([tool.name for tool in request.tools])
        self._choices: dict[int, _Choice] = {}
        self._head: dict[str, Any] = {
            "id": _new_id(),
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": request.model,
        }
        self._begun = False

    def write(self, chunk: Chunk) -> Iterable[dict[str, Any]]:
        """Return the objects for a chunk."""
        if chunk.model:
            self._head["model"] = chunk.model
        if chunk.id and not self._begun:  # all objects of a stream have the same id
            self._head["id"] = chunk.id
        for index, piece in ((0, chunk), *chunk.alternatives):
            delta = self._choice(index).delta(piece)
            if delta:
                yield self._body(index, delta, logprobs=_logprobs(piece.details))

    def finish(self, response: Response) -> Iterable[dict[str, Any]]:
        """Return the objects that end a stream: the calls that have waited, the finish reason of each choice, the usage."""
        for index, whole in enumerate((response, *response.alternatives)):
            delta = self._choice(index).rest(whole)
            if delta:
                yield self._body(index, delta)
            yield self._body(index, {}, reason=finish_reason_of(whole))
        if self._usage and response.usage is not None:
            yield {**self._head, "choices": [], "usage": usage_body(response.usage)}

    def _choice(self, index: int) -> _Choice:
        found = self._choices.get(index)
        if found is None:
            found = self._choices[index] = _Choice(self._tools)
        return found

    def _body(
        self, index: int, delta: dict[str, Any], *, reason: str | None = None, logprobs: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        self._begun = True
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head, "choices": [choice]}


class _Choice:
    """The state of a choice."""

    def __init__(self, tools: frozenset[str]) -> None:
        self._tools = tools
        self._begun = False
        self._gap = ""
        """What stands before the next text, because a message ended before it."""
        self._said = False
        """Whether there was text since the last message ended."""
        self._thought: list[str] = []
        """The reasoning since the last block of it was complete."""
        self._shown = 0
        """The number of calls that were written."""
        self._begin_message()

    def _begin_message(self) -> None:
        self._numbers = CallNumbers()
        self._indexes: dict[int, int] = {}
        """The index in the stream of each call that was written."""
        self._waiting: list[tuple[int, ToolCallDelta]] = []

    def delta(self, chunk: Chunk) -> dict[str, Any]:
        """Return what a chunk adds to the message."""
        if chunk.added:
            self._gap = "\n\n" if self._said else self._gap
            self._said = False
            self._begin_message()
        delta: dict[str, Any] = {}
        if chunk.reasoning:
            delta["reasoning_content"] = chunk.reasoning
            self._thought.append(chunk.reasoning)
        if chunk.parts or chunk.details:
            delta |= _beside([self._complete(part) for part in chunk.parts], chunk.details)
        if chunk.text:
            delta["content"] = self._gap + chunk.text
            self._gap, self._said = "", True
        calls = [call for fragment in chunk.tool_calls if (call := self._take(fragment)) is not None]
        if calls:
            delta["tool_calls"] = calls
        return self._with_role(delta) if delta else delta

    def rest(self, whole: Response) -> dict[str, Any]:
        """Return what is left to write when the answer is over."""
        waiting, self._waiting = self._waiting, []
        calls = [self._write(number, fragment) for number, fragment in waiting] if whole.tool_calls else []
        if calls:
            return self._with_role({"tool_calls": calls})
        return {} if self._begun else self._with_role({"content": ""})

    def _with_role(self, delta: dict[str, Any]) -> dict[str, Any]:
        if self._begun:
            return delta
        self._begun = True
        return {"role": "assistant", "content": None, **delta}

    def _complete(self, part: Part) -> Part:
        """Return reasoning that is complete with its text, which was streamed before it."""
        if not isinstance(part, Reasoning):
            return part
        said, self._thought = "".join(self._thought), []
        return part if part.text else attrs.evolve(part, text=said)

    def _take(self, fragment: ToolCallDelta) -> dict[str, Any] | None:
        number = self._numbers.of(fragment)
        if number in self._indexes or fragment.name in self._tools:
            return self._write(number, fragment)
        self._waiting.append((number, fragment))
        return None

    def _write(self, number: int, fragment: ToolCallDelta) -> dict[str, Any]:
        kind, fields = _described(fragment.raw, fragment.name, fragment.arguments)
        index = self._indexes.get(number)
        if index is not None:
            return {"index": index, kind: fields}
        index = self._indexes[number] = self._shown
        self._shown += 1
        return {"index": index, "id": fragment.id or f"call_{index}", "type": kind, kind: fields}


# Errors


@attrs.frozen
class Failure:
    """What OpenAI's API says of an error: a status, and the `type` and the `code` of the error in the body."""

    status: int
    type: str
    code: str | None = None
    message: str | None = None
    """The message, if the error's own is not for the client."""


_BAD, _LIMIT, _SERVER = "invalid_request_error", "rate_limit_error", "server_error"
_FAILURES: Final[tuple[tuple[type[Exception], Failure], ...]] = (
    (errors.GuardRefused, Failure(400, _BAD, "content_filter")),
    (errors.ContentFiltered, Failure(400, _BAD, "content_filter")),
    (errors.ContextLengthExceeded, Failure(400, _BAD, "context_length_exceeded")),
    (errors.BadRequest, Failure(400, _BAD)),
    (errors.ConfigError, Failure(400, _BAD)),
    (errors.BudgetExceeded, Failure(429, "insufficient_quota", "insufficient_quota")),
    (errors.QuotaExceeded, Failure(429, "insufficient_quota", "insufficient_quota")),
    (errors.RateLimitError, Failure(429, _LIMIT, "rate_limit_exceeded")),
    (errors.RateLimitWait, Failure(429, _LIMIT, "rate_limit_exceeded")),
    (errors.QueueFull, Failure(429, _LIMIT, "queue_full")),
    (errors.CircuitOpen, Failure(503, _SERVER, "circuit_open")),
    (errors.Overloaded, Failure(503, _SERVER, "overloaded")),
    (errors.StoreError, Failure(503, _SERVER, "store_error")),
    (errors.DeadlineExceeded, Failure(504, _SERVER, "deadline_exceeded")),
    (errors.RequestTimeout, Failure(504, _SERVER, "timeout")),
    # Not 401, 403 or 404: the key and the model's name are those of the program that asks the service, not the client's.
    (
        errors.AuthenticationError,
        Failure(502, _SERVER, "upstream_authentication", "the model's service did not accept this server's key"),
    ),
    (
        errors.PermissionDenied,
        Failure(502, _SERVER, "upstream_permission", "the model's service does not permit this server to do so"),
    ),
    (errors.ResponseInvalid, Failure(502, _SERVER, "invalid_answer")),
    (errors.ProviderError, Failure(502, _SERVER, "upstream_error")),
    (errors.FluxiblyError, Failure(500, _SERVER)),
)
"""What is said of each class of errors. The first class that fits counts."""
INTERNAL: Final = Failure(500, _SERVER, "internal_error", "an internal error occurred")
"""Of other exceptions nothing is told: their messages are for the program's own log."""


def failure_of(error: BaseException) -> Failure:
    """Return what OpenAI's API says of an error. An interrupted stream has that of its cause."""
    cause = errors.root_cause(error)
    return next((failure for kind, failure in _FAILURES if isinstance(cause, kind)), INTERNAL)


def error_body(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """Return an error in OpenAI's shape."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
