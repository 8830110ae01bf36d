"""Pure codec for Gemini's dialect, `generateContent` of the Gemini API. https://ai.google.dev/api/generate-content"""

from __future__ import annotations

import mimetypes
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal
from urllib.parse import quote

import attrs

from fluxibly.aggregate import Aggregator
from fluxibly.errors import ContentFiltered, ProviderError, QuotaExceeded
from fluxibly.providers.dialects.codec import Encoded, Event, Framing
from fluxibly.providers.dialects.decoding import PendingFields, arguments_text, cut_off, not_an_answer
from fluxibly.providers.dialects.encoding import (
    bad_request,
    image_data,
    reject_unsupported,
    sent_arguments,
    system_text,
    tool_name,
    write_json,
)
from fluxibly.providers.dialects.errors import error_of_payload, error_of_response, excerpt
from fluxibly.providers.dialects.json_values import as_array, as_count, as_object, as_text, read_json, sum_known
from fluxibly.types import (
    Chunk,
    Image,
    Message,
    Reasoning,
    Request,
    Response,
    Tool,
    ToolCallDelta,
    Usage,
    parse_arguments,
)

NAME = "Gemini"
BUDGETS = {"none": 0, "minimal": 512, "low": 1024, "medium": 8192, "high": 24_576}
"""Thinking budgets in tokens, for models before Gemini 3, which take a budget rather than an effort."""
LEVELS = ("minimal", "low", "medium", "high")
"""Thinking levels of Gemini 3 and later. Not every model supports all levels."""
NO_SIGNATURE = "skip_thought_signature_validator"
"""Google's stand-in for the signature of a call by another model, since Gemini 3 rejects calls without a signature."""

# Responses


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


@attrs.frozen
class GeminiCodec:
    """Codec for `POST /models/{model}:generateContent`. It requests streams as server-sent events (`alt=sse`)."""

    @property
    def framing(self) -> Framing:
        return "sse"

    def encode(self, request: Request, /, *, stream: bool) -> Encoded:
        model = request.model if "/" in request.model else f"models/{request.model}"
        method = "streamGenerateContent" if stream else "generateContent"
        query = "?alt=sse" if stream else ""
        body = write_json(encode_body(request), request, containers=("generationConfig", "toolConfig"))
        return Encoded(f"/{quote(model)}:{method}{query}", body)

    def decode(self, body: bytes, /) -> Response:
        raw = read_json(body)
        joined = Aggregator()
        decoder = GeminiDecoder()
        for chunk in (*decoder.take(raw, body), *decoder.rest()):
            joined.add(chunk)
        if not decoder.answered:
            raise not_an_answer(raw, body, NAME, "'candidates'")
        return joined.response().evolve(raw=raw)

    def decoder(self) -> GeminiDecoder:
        return GeminiDecoder()

    def decode_error(self, status: int, headers: Mapping[str, str], body: bytes, /) -> ProviderError:
        # A quota per minute recovers soon; a quota per day does not, and a quota of 0 never does.
        exhausted = status == 429 and (b"PerDay" in body or b'"quotaValue": "0"' in body)
        return error_of_response(status, headers, body, service=NAME, kind=QuotaExceeded if exhausted else None)


@attrs.define
class _Candidate:
    """The state of a candidate in a stream."""

    calls: int = 0
    reason: str | None = None


class GeminiDecoder:
    """State of a stream. Each event is a whole response with only new content. There is no end marker."""

    __slots__ = ("_candidates", "_held", "_named", "_usage")

    done: Literal[False] = False

    def __init__(self) -> None:
        self._candidates: dict[int, _Candidate] = {}
        self._held = PendingFields()
        self._named = False
        self._usage: dict[str, Any] = {}

    @property
    def answered(self) -> bool:
        """Whether the response had a candidate."""
        return bool(self._candidates)

    def decode_event(self, event: Event, /) -> Iterable[Chunk]:
        return self.take(read_json(event.data), event.data)

    def end(self) -> Iterable[Chunk]:
        yield from self.rest()
        if not self.answered or any(candidate.reason is None for candidate in self._candidates.values()):
            raise cut_off(NAME, "a finish reason")

    def rest(self) -> Iterable[Chunk]:
        """Return the held metadata as a last chunk, if there is any."""
        return self._held.flush()

    def take(self, payload: object, body: bytes) -> Iterable[Chunk]:
        """Return the chunks of a response, or of a JSON array of responses."""
        if isinstance(payload, list):
            return (chunk for item in as_array(payload) for chunk in self._take(as_object(item), body))
        return self._take(as_object(payload), body)

    def _take(self, answer: dict[str, Any], body: bytes) -> tuple[Chunk, ...]:
        candidates = as_array(answer.get("candidates"))
        if not candidates or answer.get("error"):
            self._raise_error(answer, body)
        self._note(answer)
        text = ""
        output: dict[str, Any] = {}
        others: list[tuple[int, Chunk]] = []
        for place, item in enumerate(candidates):
            candidate = as_object(item)
            index = as_count(candidate.get("index"))
            index = place if index is None else index
            state = self._candidates.get(index) or self._candidates.setdefault(index, _Candidate())
            if index == 0:
                text, output = self._candidate(candidate, state, self._held)
                continue
            held = PendingFields()
            words, rest = self._candidate(candidate, state, held)
            others += [(index, chunk) for chunk in (held.emit(words, **rest) if words or rest else held.flush())]
        if others:
            output["alternatives"] = tuple(others)
        return self._held.emit(text, **output) if text or output else ()

    def _raise_error(self, answer: dict[str, Any], body: bytes) -> None:
        """Raise the error that a response reports, if any."""
        error = error_of_payload(answer, body=body, service=NAME)
        if error is not None:
            raise error
        feedback = as_object(answer.get("promptFeedback"))
        if as_text(feedback.get("blockReason")):
            raise _blocked(feedback, body)

    def _note(self, answer: dict[str, Any]) -> None:
        """Record the id and the model once, and each event's usage: some events have more counts than others."""
        if not self._named:
            self._named = True
            model, response_id = as_text(answer.get("modelVersion")), as_text(answer.get("responseId"))
            self._held.add(model=model or None, id=response_id or None)
        counts = as_object(answer.get("usageMetadata"))
        if counts:
            self._usage.update(counts)
            self._held.add(usage=_usage(self._usage))

    def _candidate(
        self, candidate: dict[str, Any], state: _Candidate, held: PendingFields
    ) -> tuple[str, dict[str, Any]]:
        """Return the new text and the other new output of a candidate. Its metadata goes into `held`."""
        texts: list[str] = []
        thoughts: list[str] = []
        calls: list[ToolCallDelta] = []
        for item in as_array(as_object(candidate.get("content")).get("parts")):
            part = as_object(item)
            signature = as_text(part.get("thoughtSignature")) or None
            if isinstance(part.get("functionCall"), dict):
                calls.append(_call(part["functionCall"], state.calls, signature))
                state.calls += 1
                continue
            text = as_text(part.get("text"))
            (thoughts if part.get("thought") is True else texts).append(text)
            if signature and "text" in part:
                thought = text if part.get("thought") is True else ""
                held.add(reasoning_parts=(Reasoning(text=thought, signature=signature, raw=part),))
        said = as_text(candidate.get("finishReason"))
        news = bool(said or (calls and state.reason))
        state.reason = said or state.reason
        if news:
            finish = FINISH_REASONS.get(state.reason or "", state.reason)
            finish = "tool_call" if finish == "stop" and state.calls else finish
            held.add(finish_reason=finish, raw_finish_reason=state.reason)
        output: dict[str, Any] = {}
        if calls:
            output["tool_calls"] = tuple(calls)
        if any(thoughts):
            output["reasoning"] = "".join(thoughts)
        return "".join(texts), output


def _call(call: dict[str, Any], index: int, signature: str | None) -> ToolCallDelta:
    """Return a tool call, which arrives whole."""
    return ToolCallDelta(
        index=index,
        id=as_text(call.get("id")) or f"call_{index}",
        name=as_text(call.get("name")),
        arguments=arguments_text(call.get("args")),
        signature=signature,
    )


def _blocked(feedback: dict[str, Any], body: bytes) -> ContentFiltered:
    reason = as_text(feedback["blockReason"])
    said = as_text(feedback.get("blockReasonMessage"))
    return ContentFiltered(
        f"{NAME} refused the prompt ({reason}){': ' if said else ''}{said}. "
        "Rephrase it, or set safetySettings in additional_params or extra=",
        code=reason,
        body=excerpt(body),
    )


def _usage(counts: dict[str, Any]) -> Usage:
    """Return usage in OpenTelemetry's sense: the service counts thoughts and its own tools' prompts separately."""
    thoughts = as_count(counts.get("thoughtsTokenCount"))
    return Usage(
        input_tokens=sum_known(
            as_count(counts.get("promptTokenCount")), as_count(counts.get("toolUsePromptTokenCount"))
        ),
        output_tokens=sum_known(as_count(counts.get("candidatesTokenCount")), thoughts),
        cached_tokens=as_count(counts.get("cachedContentTokenCount")),
        reasoning_tokens=thoughts,
    )


# Requests


_PARAMETERS = {
    "temperature": "temperature",
    "max_tokens": "maxOutputTokens",
    "top_p": "topP",
    "top_k": "topK",
    "frequency_penalty": "frequencyPenalty",
    "presence_penalty": "presencePenalty",
    "seed": "seed",
    "n": "candidateCount",
}
_GENERATION = re.compile(r"gemini-(\d+)")
_MADE_UP_ID = re.compile(r"call_\d{1,4}")


def encode_body(request: Request) -> dict[str, Any]:
    """Return the request body, without `extra`.

    Raises:
        BadRequest: the dialect does not support a parameter or its value.
    """
    reject_unsupported(request, NAME, ())
    body: dict[str, Any] = {"contents": _contents(request)}
    system = system_text(request, NAME)
    if system:
        body["systemInstruction"] = {"parts": [{"text": system}]}
    if request.tools:
        body["tools"] = [{"functionDeclarations": [_tool(tool) for tool in request.tools]}]
    choice = _tool_choice(request)
    if choice:
        body["toolConfig"] = {"functionCallingConfig": choice}
    config = {name: getattr(request, ours) for ours, name in _PARAMETERS.items() if getattr(request, ours) is not None}
    if request.stop:
        config["stopSequences"] = list(request.stop)
    config |= _format(request) | _thinking(request)
    if config:
        body["generationConfig"] = config
    return body


def _contents(request: Request) -> list[dict[str, Any]]:
    """Return the conversation. Results of a turn's calls share a turn, because the service compares their counts."""
    contents: list[dict[str, Any]] = []
    after_result = False
    for message in request.messages:
        if message.role == "system":
            continue
        is_result = message.role == "tool"
        if is_result:
            parts: list[dict[str, Any]] = [_result(message, request)]
        elif message.role == "assistant":
            parts = _answer(message, request)
        else:
            parts = [*_parts(message)]
        if is_result and after_result:
            contents[-1]["parts"] += parts
        elif parts:  # the service rejects turns without parts
            contents.append({"role": "model" if message.role == "assistant" else "user", "parts": parts})
        after_result = is_result
    if not contents:
        raise bad_request(request, f"expected a non-empty message besides the system messages for {NAME}, got none")
    return contents


def _parts(message: Message) -> Iterable[dict[str, Any]]:
    for part in message.content:
        if isinstance(part, Image):
            yield _image(part)
        elif part.text:
            yield {"text": part.text}


def _image(image: Image) -> dict[str, Any]:
    data = image_data(image)
    if data is not None:
        return {"inlineData": {"mimeType": data[0], "data": data[1]}}
    kind = image.media_type or mimetypes.guess_type(as_text(image.url).partition("?")[0])[0]
    return {"fileData": {"fileUri": image.url} | ({"mimeType": kind} if kind else {})}


def _answer(message: Message, request: Request) -> list[dict[str, Any]]:
    """Return the parts of a model's turn, with signatures where they were: on thoughts, on texts and on calls."""
    raws = [dict(part.raw) for part in message.reasoning if part.raw is not None and "thoughtSignature" in part.raw]
    parts = [raw for raw in raws if raw.get("thought")]
    texts = list(_parts(message))
    for raw in raws:
        if not raw.get("thought"):
            texts += _signed_text(texts, raw)
    parts += texts
    for index, call in enumerate(message.tool_calls):
        part: dict[str, Any] = {"functionCall": {"name": call.name, "args": sent_arguments(call)} | _id_of(call.id)}
        signature = call.signature or (NO_SIGNATURE if index == 0 and _generation(request.model) >= 3 else None)
        if signature:
            part["thoughtSignature"] = signature
        parts.append(part)
    return parts


def _signed_text(texts: list[dict[str, Any]], raw: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the parts for a signature on text. If the last of `texts` ends with the signed text, split it off."""
    said = as_text(raw.get("text"))
    if said and texts and "thoughtSignature" not in texts[-1] and as_text(texts[-1].get("text")).endswith(said):
        rest = texts.pop()["text"][: -len(said)]
        return [*([{"text": rest}] if rest else []), raw]
    return [{"text": "", "thoughtSignature": raw["thoughtSignature"]}]


def _id_of(call_id: str | None) -> dict[str, str]:
    """Return a call's id, unless the decoder generated it because the service sent no id."""
    return {} if not call_id or _MADE_UP_ID.fullmatch(call_id) else {"id": call_id}


def _result(message: Message, request: Request) -> dict[str, Any]:
    response: dict[str, Any] = {
        "name": tool_name(message, request, NAME),
        "response": _as_object(message.text),
        **_id_of(message.tool_call_id),
    }
    images = [_image(part) for part in message.content if isinstance(part, Image)]
    if images:
        response["parts"] = images
    return {"functionResponse": response}


def _as_object(text: str) -> dict[str, Any]:
    """Return a tool's result as the object that the service expects. Text that is not an object goes under `output`."""
    if text.lstrip().startswith("{"):
        arguments, problem = parse_arguments(text)
        if problem is None:
            return arguments
    return {"output": text}


def _tool(tool: Tool) -> dict[str, Any]:
    encoded: dict[str, Any] = {"name": tool.name, "parametersJsonSchema": tool.parameters}
    if tool.description:
        encoded["description"] = tool.description
    return encoded


def _tool_choice(request: Request) -> dict[str, Any]:
    choice = request.tool_choice
    if choice is None or choice == "auto":
        if any(tool.strict for tool in request.tools):
            return {"mode": "VALIDATED"}
        return {"mode": "AUTO"} if choice else {}
    if choice in ("none", "required"):
        return {"mode": "NONE" if choice == "none" else "ANY"}
    return {"mode": "ANY", "allowedFunctionNames": [choice]}


def _format(request: Request) -> dict[str, Any]:
    wanted = request.response_format
    if wanted is None:
        return {}
    if isinstance(wanted, Mapping):
        return {"responseMimeType": "application/json", "responseJsonSchema": wanted}
    return {"responseMimeType": "application/json" if wanted == "json" else "text/plain"}


def _generation(model: str) -> int:
    """Return a Gemini model's generation. A name without a number ("gemini-flash-latest") belongs to a new model."""
    found = _GENERATION.search(model)
    return int(found[1]) if found else 3


def _thinking(request: Request) -> dict[str, Any]:
    effort = request.reasoning_effort
    if effort is None:
        return {}
    by_budget = _generation(request.model) < 3
    known: Iterable[str] = BUDGETS if by_budget else LEVELS
    if effort not in known:
        raise bad_request(request, f"reasoning_effort: expected one of {', '.join(known)} for {NAME}, got {effort!r}")
    config: dict[str, Any] = {"thinkingBudget": BUDGETS[effort]} if by_budget else {"thinkingLevel": effort}
    return {"thinkingConfig": config | ({"includeThoughts": True} if effort != "none" else {})}
