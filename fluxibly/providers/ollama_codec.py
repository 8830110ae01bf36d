"""Ollama's own dialects, `/api/chat` and `/api/generate`, as a pure codec. https://github.com/ollama/ollama/blob/main/docs/api.md"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal

import attrs

from fluxibly.aggregate import Aggregator
from fluxibly.errors import NotFound, ProviderError, ServerError, StreamProtocolError
from fluxibly.providers.codec import Encoded, Event, Framing
from fluxibly.providers.error_reports import Report, error_of, excerpt, read_report
from fluxibly.providers.held import Held
from fluxibly.providers.inline_thinking import InlineThinking
from fluxibly.providers.json_reading import array, count, read_json, string, table
from fluxibly.providers.ollama_request import NAME, encode_body
from fluxibly.providers.wire import arguments_text, cut_off, not_an_answer, write_json
from fluxibly.types import Chunk, Reasoning, Request, Response, ToolCallDelta, Usage

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

FINISH_REASONS = {"stop": "stop", "length": "length"}
"""Others, such as load (the model was loaded, and nothing asked of it), are passed on as they are."""

_MISSING = re.compile(r"model ['\"]?([^'\"\s]+)['\"]? (?:not found|does not exist)|pull model manifest")


@attrs.frozen(kw_only=True)
class OllamaCodec:
    """The dialect of `POST /api/chat`, or of `POST /api/generate`, which takes one message and no tools."""

    endpoint: Literal["chat", "generate"] = attrs.field(
        default="chat", validator=attrs.validators.in_(("chat", "generate"))
    )

    @property
    def framing(self) -> Framing:
        return "ndjson"

    def encode(self, request: Request, /, *, stream: bool) -> Encoded:
        body = encode_body(request, stream=stream, chat=self.endpoint == "chat")
        return Encoded(f"/api/{self.endpoint}", write_json(body, request, containers=("options",)))

    def decode(self, body: bytes, /) -> Response:
        raw = read_json(body)
        joined = Aggregator()
        decoder = OllamaDecoder()
        for chunk in decoder.take(raw, body):
            joined.add(chunk)
        answer = table(raw)
        if not isinstance(answer.get("message"), dict) and not isinstance(answer.get("response"), str):
            raise not_an_answer(raw, body, NAME, "message or response")
        if answer.get("done") is False:
            raise cut_off(NAME, "done")
        return joined.response().evolve(raw=raw)

    def decoder(self) -> OllamaDecoder:
        return OllamaDecoder()

    def decode_error(self, status: int, headers: Mapping[str, str], body: bytes, /) -> ProviderError:
        try:
            payload: object = read_json(body)
        except StreamProtocolError:
            payload = None
        report = read_report(payload) or Report(message=excerpt(body) or "")
        return _error(report, payload, body, status, headers)


class OllamaDecoder:
    """The state of one stream. Each line is an answer with what is new; the last says `done`, and how long it took."""

    __slots__ = ("_calls", "_held", "_inline", "_named", "_thinking", "done")

    def __init__(self) -> None:
        self._held = Held()
        self._named = False
        self._calls = 0
        self._thinking: list[str] = []
        self._inline = InlineThinking()
        self.done = False

    def decode_event(self, event: Event, /) -> Iterable[Chunk]:
        return self.take(read_json(event.data), event.data)

    def end(self) -> Iterable[Chunk]:
        if not self.done:
            yield from self._held.rest()
            raise cut_off(NAME, "done")

    def take(self, payload: object, body: bytes) -> Iterable[Chunk]:
        """The chunks of one line, or of a whole answer."""
        answer = table(payload)
        if answer.get("error") or not (isinstance(answer.get("message"), dict) or "response" in answer):
            report = read_report(payload)
            if report is not None:
                raise _error(report, payload, body, report.status, {})
        if not self._named:
            self._named = True
            self._held.put(model=string(answer.get("model")) or None)
        message = table(answer.get("message"))
        text = string(message.get("content")) or string(answer.get("response"))
        output: dict[str, Any] = {}
        thinking = string(message.get("thinking")) or string(answer.get("thinking"))
        if thinking:
            self._thinking.append(thinking)
        text, thought = self._inline.split(text)
        if answer.get("done") is True:
            text, thought = (before + last for before, last in zip((text, thought), self._inline.rest(), strict=True))
        if thinking or thought:
            output["reasoning"] = thinking + thought
        calls = [table(call) for call in array(message.get("tool_calls"))]
        if calls:
            output["tool_calls"] = tuple([_call(call, index) for index, call in enumerate(calls, self._calls)])
            self._calls += len(calls)
        if answer.get("done") is True:
            self._finish(answer)
        if text or output:
            return self._held.chunk(text, **output)
        return self._held.rest() if self.done else ()

    def _finish(self, answer: dict[str, Any]) -> None:
        self.done = True
        if self._thinking:
            thinking = "".join(self._thinking)
            self._held.put(reasoning_parts=(Reasoning(text=thinking, raw={"thinking": thinking}),))
        reason = string(answer.get("done_reason")) or None  # versions before 0.1.40 say none
        finish = FINISH_REASONS.get(reason or "stop", reason)
        if finish == "stop" and self._calls:
            finish = "tool_call"  # the service says "stop" for calls too
        self._held.put(finish_reason=finish, raw_finish_reason=reason, usage=_usage(answer))


def _call(call: dict[str, Any], index: int) -> ToolCallDelta:
    """A tool call, which comes whole, its arguments as an object; only newer versions give it an id."""
    function = table(call.get("function"))
    return ToolCallDelta(
        index=index,
        id=string(call.get("id")) or f"call_{index}",
        name=string(function.get("name")),
        arguments=arguments_text(function.get("arguments")),
    )


def _usage(answer: dict[str, Any]) -> Usage | None:
    read, written = count(answer.get("prompt_eval_count")), count(answer.get("eval_count"))
    return None if read is None and written is None else Usage(input_tokens=read, output_tokens=written)


def _error(
    report: Report, payload: object, body: bytes, status: int | None, headers: Mapping[str, str]
) -> ProviderError:
    """The error of a report. The service's words are all there is to tell by: it sends no codes."""
    missing = _MISSING.search(report.message) if status in (None, 404) else None
    if missing:
        pull = f"get it with: ollama pull {missing[1]}" if missing[1] else "check its name at ollama.com/library"
        return NotFound(
            f"{NAME} has no such model ({report.message}); {pull}", status=status, code=report.code, body=excerpt(body)
        )
    error = error_of(report, status=status, headers=headers, payload=payload, excerpt=excerpt(body), service=NAME)
    if isinstance(error, ServerError) and "more system memory" in report.message:
        error.retryable = False
    return error
