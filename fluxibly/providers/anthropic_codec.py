"""Anthropic's dialect, the Messages API, as a pure codec. https://docs.claude.com/en/api/messages"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from fluxibly.providers.anthropic_request import NAME, encode_body
from fluxibly.providers.codec import Encoded, Event, Framing
from fluxibly.providers.error_reports import error_of_event, error_of_payload, error_of_response
from fluxibly.providers.held import Held
from fluxibly.providers.json_reading import array, count, read_json, string, table, total
from fluxibly.providers.wire import arguments_text, cut_off, not_an_answer, write_json
from fluxibly.types import Chunk, Reasoning, Request, Response, ToolCall, ToolCallDelta, Usage

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from fluxibly.errors import ProviderError

FINISH_REASONS = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_call",
    "refusal": "content_filter",
}
"""Others, such as pause_turn (the service wants to be asked to go on), are passed on as they are."""


@attrs.frozen
class AnthropicCodec:
    """The dialect of `POST /v1/messages`, which llama.cpp, vLLM and others serve too."""

    @property
    def framing(self) -> Framing:
        return "sse"

    def encode(self, request: Request, /, *, stream: bool) -> Encoded:
        body = encode_body(request, stream=stream)
        return Encoded("/messages", write_json(body, request, containers=("output_config",)))

    def decode(self, body: bytes, /) -> Response:
        raw = read_json(body)
        message = table(raw)
        if message.get("type") == "error":
            raise error_of_event(body, service=NAME)
        if message.get("error") or not isinstance(message.get("content"), list):
            raise not_an_answer(raw, body, NAME, "content")
        blocks = [table(block) for block in array(message["content"])]
        reasoning = [_reasoning(block) for block in blocks if block.get("type") in ("thinking", "redacted_thinking")]
        reason = string(message.get("stop_reason")) or None
        return Response(
            "".join([string(block.get("text")) for block in blocks if block.get("type") == "text"]),
            tool_calls=[
                ToolCall(
                    string(block.get("id")) or f"call_{index}",
                    string(block.get("name")),
                    raw_arguments=arguments_text(block.get("input")),
                )
                for index, block in enumerate([block for block in blocks if block.get("type") == "tool_use"])
            ],
            reasoning="".join([part.text for part in reasoning]),
            reasoning_parts=reasoning,
            finish_reason=FINISH_REASONS.get(reason or "", reason),
            raw_finish_reason=reason,
            usage=_usage(table(message.get("usage"))),
            model=string(message.get("model")) or None,
            id=string(message.get("id")) or None,
            raw=message,
        )

    def decoder(self) -> AnthropicDecoder:
        return AnthropicDecoder()

    def decode_error(self, status: int, headers: Mapping[str, str], body: bytes, /) -> ProviderError:
        return error_of_response(status, headers, body, service=NAME)


@attrs.define
class _Block:
    """A content block that is on its way: its fields as they began, and what the deltas brought since."""

    fields: dict[str, Any]
    call: int
    """Which tool call it is, if it is one."""
    texts: list[str] = attrs.Factory(list[str])
    signature: str | None = None

    @property
    def type(self) -> str:
        return string(self.fields.get("type"))


class AnthropicDecoder:
    """The state of one stream: the blocks that have begun and not ended, and the usage so far."""

    __slots__ = ("_blocks", "_calls", "_done", "_held", "_reason", "_usage")

    def __init__(self) -> None:
        self._blocks: dict[int, _Block] = {}
        self._calls = 0
        self._held = Held()
        self._usage: dict[str, Any] = {}
        self._reason: str | None = None
        self._done = False

    @property
    def done(self) -> bool:
        return self._done

    def decode_event(self, event: Event, /) -> Iterable[Chunk]:
        if (
            event.data[:1] == b"[" and event.data.strip() == b"[DONE]"
        ):  # not of this dialect, but servers of several dialects send it
            self._done = self._reason is not None
            return self._held.rest() if self._done else ()
        if event.name == "error":
            raise error_of_event(event.data, service=NAME)
        raw = read_json(event.data)
        data = table(raw)
        match data.get("type"):
            case "content_block_delta":
                return self._delta(data)
            case "content_block_start":
                return self._start(data)
            case "content_block_stop":
                return self._stop(data)
            case "message_start":
                message = table(data.get("message"))
                self._count(message)
                self._held.put(model=string(message.get("model")) or None, id=string(message.get("id")) or None)
            case "message_delta":
                self._message_delta(data)
            case "message_stop":
                self._done = True
                return self._held.rest()
            case "error":
                raise error_of_event(event.data, service=NAME)
            case kind:
                # one of no known type is passed over, unless it is an error as proxies send it
                reported = error_of_payload(raw, body=event.data, service=NAME)
                if reported is not None and (kind is None or data.get("error")):
                    raise reported
        return ()

    def end(self) -> Iterable[Chunk]:
        if not self._done:
            yield from self._held.rest()
            raise cut_off(NAME, "message_stop")

    def _start(self, data: dict[str, Any]) -> Iterable[Chunk]:
        fields = table(data.get("content_block"))
        block = self._blocks[_index(data)] = _Block(fields, self._calls)
        if block.type == "tool_use":
            self._calls += 1
            name, call_id = string(fields.get("name")), string(fields.get("id")) or f"call_{block.call}"
            return self._held.chunk(tool_calls=(ToolCallDelta(index=block.call, id=call_id, name=name),))
        text, reasoning = _shown(fields)
        return self._held.chunk(text, reasoning=reasoning) if text or reasoning else ()

    def _delta(self, data: dict[str, Any]) -> Iterable[Chunk]:
        delta = table(data.get("delta"))
        kind = delta.get("type")
        if kind == "text_delta":
            text = string(delta.get("text"))
            return self._held.chunk(text) if text else ()
        block = self._blocks.get(_index(data))
        if block is None:
            return ()
        if kind == "thinking_delta":
            text = string(delta.get("thinking"))
            block.texts.append(text)
            return self._held.chunk(reasoning=text) if text else ()
        if kind == "signature_delta":
            block.signature = (block.signature or "") + string(delta.get("signature"))
        elif kind == "input_json_delta" and block.type == "tool_use":
            text = string(delta.get("partial_json"))
            if text:
                block.texts.append(text)
                return self._held.chunk(tool_calls=(ToolCallDelta(index=block.call, arguments=text),))
        return ()

    def _stop(self, data: dict[str, Any]) -> Iterable[Chunk]:
        block = self._blocks.pop(_index(data), None)
        if block is None:
            return ()
        if block.type == "tool_use" and not block.texts and block.fields.get("input"):
            # The whole input came with the start; beside deltas, it would say everything twice.
            arguments = arguments_text(block.fields["input"])
            return self._held.chunk(tool_calls=(ToolCallDelta(index=block.call, arguments=arguments),))
        if block.type in ("thinking", "redacted_thinking"):
            raw = dict(block.fields)
            if block.texts:
                raw["thinking"] = string(raw.get("thinking")) + "".join(block.texts)
            if block.signature is not None:
                raw["signature"] = string(raw.get("signature")) + block.signature
            self._held.put(reasoning_parts=(_reasoning(raw),))
        return ()

    def _message_delta(self, data: dict[str, Any]) -> None:
        reason = string(table(data.get("delta")).get("stop_reason")) or None
        self._reason = reason or self._reason
        self._held.put(finish_reason=FINISH_REASONS.get(reason or "", reason), raw_finish_reason=reason)
        self._count(data)

    def _count(self, holder: dict[str, Any]) -> None:
        """Take in the usage of an event. It is cumulative, but later events may leave out what earlier ones said."""
        news = {name: value for name, value in table(holder.get("usage")).items() if value is not None}
        if news:
            self._usage.update(news)
            self._held.put(usage=_usage(self._usage))


def _index(data: dict[str, Any]) -> int:
    return count(data.get("index")) or 0


def _shown(block: dict[str, Any]) -> tuple[str, str]:
    """The text and the reasoning of a block."""
    kind = block.get("type")
    return (
        string(block.get("text")) if kind == "text" else "",
        string(block.get("thinking")) if kind == "thinking" else "",
    )


def _reasoning(block: dict[str, Any]) -> Reasoning:
    return Reasoning(text=_shown(block)[1], signature=string(block.get("signature")) or None, raw=block)


def _usage(counts: dict[str, Any]) -> Usage | None:
    """Usage in OpenTelemetry's sense: the service's `input_tokens` leave out what the prompt cache read and wrote."""
    if not counts:
        return None
    read, written = count(counts.get("cache_read_input_tokens")), count(counts.get("cache_creation_input_tokens"))
    return Usage(
        input_tokens=total(count(counts.get("input_tokens")), read, written),
        output_tokens=count(counts.get("output_tokens")),
        cached_tokens=read,
        cache_write_tokens=written,
        reasoning_tokens=count(table(counts.get("output_tokens_details")).get("thinking_tokens")),
    )
