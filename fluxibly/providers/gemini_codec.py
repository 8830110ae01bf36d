"""Gemini's dialect, `generateContent` of the Gemini API, as a pure codec. https://ai.google.dev/api/generate-content"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

import attrs

from fluxibly.aggregate import Aggregator
from fluxibly.errors import ContentFiltered, ProviderError, QuotaExceeded
from fluxibly.providers.codec import Encoded, Event, Framing
from fluxibly.providers.error_reports import error_of_payload, error_of_response, excerpt
from fluxibly.providers.gemini_request import NAME, encode_body
from fluxibly.providers.held import Held
from fluxibly.providers.json_reading import array, count, read_json, string, table, total
from fluxibly.providers.wire import arguments_text, cut_off, not_an_answer, write_json
from fluxibly.types import Chunk, Reasoning, Request, Response, ToolCallDelta, Usage

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

FINISH_REASONS = {
    "STOP": "stop",
    "MAX_TOKENS": "length",
    **dict.fromkeys(
        (
            "SAFETY",
            "RECITATION",
            "LANGUAGE",
            "BLOCKLIST",
            "PROHIBITED_CONTENT",
            "SPII",
            "MODEL_ARMOR",
            "IMAGE_SAFETY",
            "IMAGE_PROHIBITED_CONTENT",
            "IMAGE_RECITATION",
        ),
        "content_filter",
    ),
    **dict.fromkeys(
        (
            "MALFORMED_FUNCTION_CALL",
            "MALFORMED_RESPONSE",
            "UNEXPECTED_TOOL_CALL",
            "TOO_MANY_TOOL_CALLS",
            "MISSING_THOUGHT_SIGNATURE",
        ),
        "error",
    ),
}


@attrs.frozen(kw_only=True)
class GeminiCodec:
    """The dialect of `POST /models/{model}:generateContent`.

    `framing` is that of streams: "sse" is asked for with `alt=sse`; "json-array" is what the service sends without.
    """

    framing: Framing = attrs.field(default="sse", validator=attrs.validators.in_(("sse", "json-array")))

    def encode(self, request: Request, /, *, stream: bool) -> Encoded:
        model = request.model if "/" in request.model else f"models/{request.model}"
        method = "streamGenerateContent" if stream else "generateContent"
        query = "?alt=sse" if stream and self.framing == "sse" else ""
        body = write_json(encode_body(request), request, containers=("generationConfig", "toolConfig"))
        return Encoded(f"/{quote(model)}:{method}{query}", body)

    def decode(self, body: bytes, /) -> Response:
        raw = read_json(body)
        joined = Aggregator()
        decoder = GeminiDecoder()
        for chunk in (*decoder.take(raw, body), *decoder.rest()):
            joined.add(chunk)
        if not decoder.answered:
            raise not_an_answer(raw, body, NAME, "candidates")
        return joined.response().evolve(raw=raw)

    def decoder(self) -> GeminiDecoder:
        return GeminiDecoder()

    def decode_error(self, status: int, headers: Mapping[str, str], body: bytes, /) -> ProviderError:
        # A minute's quota comes back; a day's does not soon, and a quota of none never.
        exhausted = status == 429 and (b"PerDay" in body or b'"quotaValue": "0"' in body)
        return error_of_response(status, headers, body, service=NAME, kind=QuotaExceeded if exhausted else None)


@attrs.define
class _Candidate:
    """What is remembered of one candidate of a stream."""

    calls: int = 0
    reason: str | None = None


class GeminiDecoder:
    """The state of one stream, whose events are whole answers with what is new. There is no end mark."""

    __slots__ = ("_candidates", "_held", "_named", "_usage")

    done: Literal[False] = False

    def __init__(self) -> None:
        self._candidates: dict[int, _Candidate] = {}
        self._held = Held()
        self._named = False
        self._usage: dict[str, Any] = {}

    @property
    def answered(self) -> bool:
        """Whether there was a candidate."""
        return bool(self._candidates)

    def decode_event(self, event: Event, /) -> Iterable[Chunk]:
        return self.take(read_json(event.data), event.data)

    def end(self) -> Iterable[Chunk]:
        yield from self.rest()
        if not self.answered or any(candidate.reason is None for candidate in self._candidates.values()):
            raise cut_off(NAME, "a finish reason")

    def rest(self) -> Iterable[Chunk]:
        """What was held."""
        return self._held.rest()

    def take(self, payload: object, body: bytes) -> Iterable[Chunk]:
        """The chunks of an answer, or of a JSON array of them."""
        if isinstance(payload, list):
            return (chunk for item in array(payload) for chunk in self._take(table(item), body))
        return self._take(table(payload), body)

    def _take(self, answer: dict[str, Any], body: bytes) -> tuple[Chunk, ...]:
        candidates = array(answer.get("candidates"))
        if not candidates or answer.get("error"):
            self._raise_error(answer, body)
        self._note(answer)
        text = ""
        output: dict[str, Any] = {}
        others: list[tuple[int, Chunk]] = []
        for place, item in enumerate(candidates):
            candidate = table(item)
            index = count(candidate.get("index"))
            index = place if index is None else index
            state = self._candidates.get(index) or self._candidates.setdefault(index, _Candidate())
            if index == 0:
                text, output = self._candidate(candidate, state, self._held)
                continue
            held = Held()
            words, rest = self._candidate(candidate, state, held)
            others += [(index, chunk) for chunk in (held.chunk(words, **rest) if words or rest else held.rest())]
        if others:
            output["alternatives"] = tuple(others)
        return self._held.chunk(text, **output) if text or output else ()

    def _raise_error(self, answer: dict[str, Any], body: bytes) -> None:
        """Raise what an answer says went wrong, if it says so."""
        error = error_of_payload(answer, body=body, service=NAME)
        if error is not None:
            raise error
        feedback = table(answer.get("promptFeedback"))
        if string(feedback.get("blockReason")):
            raise _blocked(feedback, body)

    def _note(self, answer: dict[str, Any]) -> None:
        """Note the id and the model once, and the usage: each event repeats it, some with more counts than others."""
        if not self._named:
            self._named = True
            model, response_id = string(answer.get("modelVersion")), string(answer.get("responseId"))
            self._held.put(model=model or None, id=response_id or None)
        counts = table(answer.get("usageMetadata"))
        if counts:
            self._usage.update(counts)
            self._held.put(usage=_usage(self._usage))

    def _candidate(self, candidate: dict[str, Any], state: _Candidate, held: Held) -> tuple[str, dict[str, Any]]:
        """The text of a candidate's news and its other output; what is none goes into `held`."""
        texts: list[str] = []
        thoughts: list[str] = []
        calls: list[ToolCallDelta] = []
        for item in array(table(candidate.get("content")).get("parts")):
            part = table(item)
            signature = string(part.get("thoughtSignature")) or None
            if isinstance(part.get("functionCall"), dict):
                calls.append(_call(part["functionCall"], state.calls, signature))
                state.calls += 1
                continue
            text = string(part.get("text"))
            (thoughts if part.get("thought") is True else texts).append(text)
            if signature and "text" in part:
                thought = text if part.get("thought") is True else ""
                held.put(reasoning_parts=(Reasoning(text=thought, signature=signature, raw=part),))
        said = string(candidate.get("finishReason"))
        news = bool(said or (calls and state.reason))
        state.reason = said or state.reason
        if news:
            finish = FINISH_REASONS.get(state.reason or "", state.reason)
            finish = "tool_call" if finish == "stop" and state.calls else finish
            held.put(finish_reason=finish, raw_finish_reason=state.reason)
        output: dict[str, Any] = {}
        if calls:
            output["tool_calls"] = tuple(calls)
        if any(thoughts):
            output["reasoning"] = "".join(thoughts)
        return "".join(texts), output


def _call(call: dict[str, Any], index: int, signature: str | None) -> ToolCallDelta:
    """A tool call, which comes whole."""
    return ToolCallDelta(
        index=index,
        id=string(call.get("id")) or f"call_{index}",
        name=string(call.get("name")),
        arguments=arguments_text(call.get("args")),
        signature=signature,
    )


def _blocked(feedback: dict[str, Any], body: bytes) -> ContentFiltered:
    reason = string(feedback["blockReason"])
    said = string(feedback.get("blockReasonMessage"))
    return ContentFiltered(
        f"{NAME} refused the prompt ({reason}){': ' if said else ''}{said}. "
        "Rephrase it, or set safetySettings in additional_params or extra=",
        code=reason,
        body=excerpt(body),
    )


def _usage(counts: dict[str, Any]) -> Usage:
    """Usage in OpenTelemetry's sense: the service counts thoughts, and prompts of its own tools, apart."""
    thoughts = count(counts.get("thoughtsTokenCount"))
    return Usage(
        input_tokens=total(count(counts.get("promptTokenCount")), count(counts.get("toolUsePromptTokenCount"))),
        output_tokens=total(count(counts.get("candidatesTokenCount")), thoughts),
        cached_tokens=count(counts.get("cachedContentTokenCount")),
        reasoning_tokens=thoughts,
    )
