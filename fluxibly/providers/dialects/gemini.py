"""Pure codec for Gemini's dialect, `generateContent` of the Gemini API. https://ai.google.dev/api/generate-content

The dialect is one module, its responses first and its requests below, because both know the shape of each part.
"""

from __future__ import annotations

import mimetypes
import re
from base64 import b64decode
from collections.abc import Container, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, Literal
from urllib.parse import quote

import attrs

from fluxibly._formats import SchemaFormat
from fluxibly.aggregate import Aggregator
from fluxibly.errors import ContentFiltered, ProviderError, QuotaExceeded
from fluxibly.providers.dialects.codec import Encoded, Event, Framing
from fluxibly.providers.dialects.decoding import PendingFields, Pieces, arguments_text, cut_off, not_an_answer, to_json
from fluxibly.providers.dialects.encoding import (
    bad_request,
    format_of,
    media_data,
    reject_unsupported,
    sent_arguments,
    system_text,
    tool_name,
    write_json,
)
from fluxibly.providers.dialects.errors import error_of_event, error_of_payload, error_of_response, excerpt
from fluxibly.providers.dialects.json_values import as_array, as_count, as_object, as_text, read_json, sum_known
from fluxibly.providers.dialects.schemas import SchemaLearner, is_recursive, with_schema_in_words
from fluxibly.types import (
    Audio,
    Chunk,
    Document,
    Image,
    Media,
    Message,
    Opaque,
    Part,
    Reasoning,
    Request,
    Response,
    Text,
    Tool,
    ToolCall,
    ToolCallDelta,
    Usage,
    parse_arguments,
)

NAME = "Gemini"
DIALECT = "gemini"
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
class GeminiCodec(SchemaLearner):
    """Codec for `POST /models/{model}:generateContent`. It requests streams as server-sent events (`alt=sse`)."""

    @property
    def framing(self) -> Framing:
        return "sse"

    def encode(self, request: Request, /, *, stream: bool) -> Encoded:
        model = request.model if "/" in request.model else f"models/{request.model}"
        method = "streamGenerateContent" if stream else "generateContent"
        query = "?alt=sse" if stream else ""
        body = write_json(encode_body(self.with_known_form(request)), request)
        return Encoded(f"/{quote(model, errors='replace')}:{method}{query}", body)

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


class _Candidate:
    """The state of a candidate in a stream."""

    __slots__ = ("_arguments", "_details", "_held", "_said", "_thoughts", "calls", "reason")

    def __init__(self, held: PendingFields) -> None:
        self.calls = 0
        self.reason: str | None = None
        self._held = held
        self._thoughts: list[str] = []
        """The thoughts since the last complete part."""
        self._said = False
        """Whether text came since the last complete part."""
        self._arguments: dict[str, Any] | None = None
        """The arguments so far of the last call, if it will continue."""
        self._details: dict[str, Any] = {}

    def take(self, candidate: dict[str, Any]) -> Sequence[Chunk]:
        """Return the chunks of an event's new content. Metadata waits for the next chunk, and details for the end."""
        parts = as_array(as_object(candidate.get("content")).get("parts"))
        if len(parts) == 1 and not self._thoughts and candidate.keys() <= _PLAIN:
            part = as_object(parts[0])
            text = part.get("text")
            if len(part) == 1 and text and isinstance(text, str):  # as nearly always
                self._said = True
                return self._held.emit(text)
        return self._take(candidate, parts)

    def _take(self, candidate: dict[str, Any], parts: list[Any]) -> list[Chunk]:
        calls = self.calls
        pieces = Pieces()
        for part in parts:
            self._take_part(as_object(part), pieces)
        if not candidate.keys() <= _READ:
            details = _filled(candidate, without=_READ)
            with suppress(RecursionError):  # details that are nested too deeply are given up
                self._details = _joined(self._details, details)
        chunks = [chunk for piece in pieces.chunks[:-1] for chunk in self._emit(piece)]
        self._finish(as_text(candidate.get("finishReason")), called=self.calls > calls)
        return [*chunks, *self._emit(pieces.chunks[-1])] if pieces.chunks else chunks

    def rest(self) -> list[Chunk]:
        """Return what was held back until the end."""
        pieces = Pieces()
        self._end_thoughts(pieces)
        self._end_call(pieces)
        chunks = [chunk for piece in pieces.chunks for chunk in self._emit(piece)]
        self._held.add(details=self._details or None)
        return [*chunks, *self._held.flush()]

    def _emit(self, piece: dict[str, Any]) -> tuple[Chunk, ...]:
        if piece.keys() == {"parts"} and all(isinstance(part, (Reasoning, Text)) for part in piece["parts"]):
            self._held.add(**piece)  # they only complete what came before
            return ()
        return self._held.emit(**piece)

    def _finish(self, said: str, *, called: bool) -> None:
        news = said or (called and self.reason)
        self.reason = said or self.reason
        if news:
            finish = FINISH_REASONS.get(self.reason or "", self.reason)
            finish = "tool_call" if finish == "stop" and self.calls else finish
            self._held.add(finish_reason=finish, raw_finish_reason=self.reason)

    def _take_part(self, part: dict[str, Any], pieces: Pieces) -> None:
        text = part.get("text")
        if text == "" and len(part) == 1:
            return
        if isinstance(part.get("functionCall"), dict):
            self._end_thoughts(pieces)
            self._said = False
            self._take_call(part, pieces)
        elif part.get("thought") is True:
            self._said = False
            self._take_thought(part, as_text(text), pieces)
        elif isinstance(text, str):
            self._end_thoughts(pieces)
            self._take_text(part, text, pieces)
        elif part:
            self._end_thoughts(pieces)
            self._said = False
            pieces.add("parts", (_media(part) or Opaque(DIALECT, part),))

    def _take_text(self, part: dict[str, Any], text: str, pieces: Pieces) -> None:
        raw = _filled(part, without=("text", "thought")) if len(part) > 1 else None
        if raw and self._said:
            pieces.add("parts", (Text(""),))
        if text:
            pieces.add("text", text)
            self._said = True
        if raw:
            pieces.add("parts", (Text("", raw=raw),))
            self._said = False

    def _take_thought(self, part: dict[str, Any], text: str, pieces: Pieces) -> None:
        beside = _filled(part, without=("text", "thought"))
        if beside:
            self._end_thoughts(pieces)
        elif text:
            self._thoughts.append(text)
        if text:
            pieces.add("reasoning", text)
        if beside:
            signature = as_text(part.get("thoughtSignature")) or None
            pieces.add("parts", (Reasoning(text=text, signature=signature, raw=part),))

    def _end_thoughts(self, pieces: Pieces) -> None:
        """Complete the thoughts without a signature that came last."""
        if self._thoughts:
            text = "".join(self._thoughts)
            self._thoughts.clear()
            pieces.add("parts", (Reasoning(text=text, raw={"text": text, "thought": True}),))

    def _take_call(self, part: dict[str, Any], pieces: Pieces) -> None:
        """Take a call, which arrives whole, or a piece of one: a piece without a name belongs to the call before."""
        call = part["functionCall"]
        continues = self._arguments is not None and not as_text(call.get("name"))
        if not continues:
            self._end_call(pieces)
            self.calls += 1
        index = self.calls - 1
        will_continue = call.get("willContinue") is True
        if continues or will_continue or call.get("partialArgs"):
            self._arguments = _with_arguments(self._arguments or {}, call)
        if not continues:
            arguments = arguments_text(call.get("args")) if self._arguments is None else ""
            pieces.add("tool_calls", (_call(part, index, arguments),))
        elif signature := as_text(part.get("thoughtSignature")):
            pieces.add("tool_calls", (ToolCallDelta(index=index, signature=signature),))
        if not will_continue:
            self._end_call(pieces)

    def _end_call(self, pieces: Pieces) -> None:
        """Complete the call whose arguments came in pieces."""
        if self._arguments is not None:
            arguments, self._arguments = to_json(self._arguments), None
            pieces.add("tool_calls", (ToolCallDelta(index=self.calls - 1, arguments=arguments),))


_EMPTY: Final[tuple[object, ...]] = (None, "", [], {})
_PLAIN = frozenset({"content", "index"})
"""The fields of a candidate in most events."""
_READ = _PLAIN | {"finishReason"}
"""The fields of a candidate that the decoder reads. Other fields are details."""


class GeminiDecoder:
    """State of a stream. Each event is a whole response with only new content. There is no end marker."""

    __slots__ = ("_candidates", "_feedback", "_held", "_named", "_usage")

    done: Literal[False] = False

    def __init__(self) -> None:
        self._candidates: dict[int, _Candidate] = {}
        self._feedback: dict[str, Any] = {}
        self._held = PendingFields()
        self._named = False
        self._usage: dict[str, Any] = {}

    @property
    def answered(self) -> bool:
        """Whether the response had a candidate."""
        return bool(self._candidates)

    def decode_event(self, event: Event, /) -> Iterable[Chunk]:
        if event.name == "error":
            raise error_of_event(event.data, service=NAME)
        return self.take(read_json(event.data), event.data)

    def end(self) -> Iterable[Chunk]:
        yield from self.rest()
        if not self.answered or any(candidate.reason is None for candidate in self._candidates.values()):
            raise cut_off(NAME, "a finish reason")

    def rest(self) -> Iterable[Chunk]:
        """Return what was held back until the end: metadata, and details, which the service sends again and again."""
        self._held.add(details={"promptFeedback": self._feedback} if self._feedback else None)
        for index, candidate in self._candidates.items():
            chunks = candidate.rest()
            if index == 0:
                yield from chunks
            elif chunks:
                yield Chunk(alternatives=tuple([(index, chunk) for chunk in chunks]))
        yield from self._held.flush()

    def take(self, payload: object, body: bytes) -> Iterable[Chunk]:
        """Return the chunks of a response, or of a JSON array of responses."""
        if isinstance(payload, list):
            return (chunk for item in as_array(payload) for chunk in self._take(as_object(item), body))
        return self._take(as_object(payload), body)

    def _take(self, answer: dict[str, Any], body: bytes) -> list[Chunk]:
        candidates = as_array(answer.get("candidates"))
        if not candidates or answer.get("error"):
            self._raise_error(answer, body)
        self._note(answer)
        chunks: list[Chunk] = []
        others: list[tuple[int, Chunk]] = []
        for place, item in enumerate(candidates):
            candidate = as_object(item)
            index = as_count(candidate.get("index"))
            index = place if index is None else index
            state = self._candidates.get(index)
            if state is None:
                state = self._candidates[index] = _Candidate(self._held if index == 0 else PendingFields())
            if index == 0:
                chunks += state.take(candidate)
            else:
                others += [(index, chunk) for chunk in state.take(candidate)]
        if others:
            chunks.append(Chunk(alternatives=tuple(others)))
        return chunks

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
        if "promptFeedback" in answer:
            self._feedback = as_object(answer["promptFeedback"])


def _filled(fields: dict[str, Any], *, without: Container[str]) -> dict[str, Any]:
    """Return the fields that have a value, but for those in `without`."""
    return {name: value for name, value in fields.items() if name not in without and value not in _EMPTY}


def _rest(part: dict[str, Any], name: str, *, without: Container[str]) -> dict[str, Any]:
    """Return the fields of a part, of which the one called `name` has only the fields that are not in `without`."""
    more = _filled(as_object(part.get(name)), without=without)
    return _filled(part, without=(name,)) | ({name: more} if more else {})


def _call(part: dict[str, Any], index: int, arguments: str) -> ToolCallDelta:
    """Return a tool call. If the service sent no id, `raw` says so, and the id is made up."""
    call: dict[str, Any] = part["functionCall"]
    call_id = as_text(call.get("id"))
    raw = _rest(part, "functionCall", without=("id", "name", "args", "partialArgs", "willContinue"))
    raw.pop("thoughtSignature", None)
    if not call_id:
        raw["functionCall"] = {**raw.get("functionCall", {}), "id": None}
    return ToolCallDelta(
        index=index,
        id=call_id or f"call_{index}",
        name=as_text(call.get("name")),
        arguments=arguments,
        signature=as_text(part.get("thoughtSignature")) or None,
        raw=raw or None,
    )


_STEP = re.compile(r"""\.([^.\[\]]+)|\[(\d{1,9})\]|\['([^']*)'\]|\["([^"]*)"\]""")
"""A step of a JSON path: `.name`, `[0]` or `['name']`."""


def _with_arguments(arguments: dict[str, Any], call: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call with those of a piece of it, each of which came with a JSON path."""
    arguments = arguments | as_object(call.get("args"))
    for item in as_array(call.get("partialArgs")):
        piece = as_object(item)
        found = _STEP.finditer(as_text(piece.get("jsonPath")))
        steps = [int(step[2]) if step[2] else step[1] or step[3] or step[4] or "" for step in found]
        value = next((piece[name] for name in ("stringValue", "numberValue", "boolValue") if name in piece), None)
        if 0 < len(steps) < 100:  # none is deeper
            arguments = as_object(_entered(arguments, steps, value))
    return arguments


def _entered(holder: Any, steps: Sequence[str | int], value: Any) -> Any:
    """Return a JSON value with another value entered at a path. A text continues the text that is there."""
    if not steps:
        return holder + value if isinstance(holder, str) and isinstance(value, str) else value
    step, rest = steps[0], steps[1:]
    if isinstance(step, int):
        items = as_array(holder)
        items[step : step + 1] = [_entered(items[step] if step < len(items) else None, rest, value)]
        return items
    fields = as_object(holder)
    fields[step] = _entered(fields.get(step), rest, value)
    return fields


def _media(part: dict[str, Any]) -> Media | None:
    """Return the image, audio or document that a part is; None for another part, or for data that is not base64."""
    name = "inlineData" if isinstance(part.get("inlineData"), dict) else "fileData"
    fields = as_object(part.get(name))
    data, url, media_type = (as_text(fields.get(key)) for key in ("data", "fileUri", "mimeType"))
    raw = _rest(part, name, without=("data", "fileUri", "mimeType")) or None
    major = media_type.lower().partition("/")[0]
    kind = Image if major == "image" else Audio if major == "audio" else Document
    try:
        if url:
            return kind(url=url, media_type=media_type or None, raw=raw)
        if not data or not media_type:
            return None
        standard = data.replace("-", "+").replace("_", "/")
        return kind(data=b64decode(standard, validate=True), media_type=media_type, raw=raw)
    except ValueError:
        return None


def _joined(old: Any, new: Any) -> Any:
    """Return the details of two events. The service repeats some lists from event to event, and continues others."""
    before, after = as_object(old), as_object(new)
    if before and after:
        shared = (before.keys() & after.keys()) - {"safetyRatings"}
        return before | after | {name: _joined(before[name], after[name]) for name in shared}
    items, more = as_array(old), as_array(new)
    return [*items, *more] if items and more and more[: len(items)] != items else new


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
_BESIDE = frozenset(
    {
        "audioMetadata",
        "audioTranscription",
        "documentMetadata",
        "fileData",
        "functionCall",
        "inlineData",
        "mediaProcessing",
        "mediaResolution",
        "partMetadata",
        "speechMetadata",
        "spreadsheetMetadata",
        "thoughtSignature",
        "videoMetadata",
    }
)
"""The fields of this dialect in a part's `raw`, by which `raw` is known from that of another dialect."""


def encode_body(request: Request) -> dict[str, Any]:
    """Return the request body, without `extra`.

    Raises:
        BadRequest: the dialect does not support a parameter or its value.
    """
    reject_unsupported(request, NAME, ())
    request, output = _format(request)
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
    config |= output | _thinking(request)
    if config:
        body["generationConfig"] = config
    return body


def _contents(request: Request) -> list[dict[str, Any]]:
    """Return the conversation. Results of a turn's calls share a turn, because the service compares their counts."""
    contents: list[dict[str, Any]] = []
    calls: dict[str, ToolCall] = {}
    after_result = False
    for message in request.messages:
        if message.role == "system":
            continue
        is_result = message.role == "tool"
        if is_result:
            parts = [_result(message, calls.get(message.tool_call_id or ""), request)]
        else:
            parts = [encoded for part in message.parts for encoded in _part(part)]
            calls |= {call.id: call for call in message.tool_calls}
        if message.role == "assistant" and _generation(request.model) >= 3:
            _sign(parts)
        if is_result and after_result:
            contents[-1]["parts"] += parts
        elif parts:  # the service rejects turns without parts
            contents.append({"role": "model" if message.role == "assistant" else "user", "parts": parts})
        after_result = is_result
    if not contents:
        raise bad_request(request, f"expected a non-empty message besides the system messages for {NAME}, got none")
    return contents


def _part(part: Part) -> Iterable[dict[str, Any]]:
    """Yield a part as the service takes it; nothing for white space, or for what only another dialect can read."""
    if isinstance(part, Text):
        beside = _beside(part)
        if beside or part.text.strip():
            yield {"text": part.text, **beside}
    elif isinstance(part, ToolCall):
        yield _call_part(part)
    elif isinstance(part, Media):
        yield _media_part(part)
    elif isinstance(part, Reasoning):
        if part.raw is not None and part.raw.get("thought") is True:
            yield dict(part.raw)
    elif part.dialect == DIALECT:
        yield dict(part.raw)


def _beside(part: Text | Media | ToolCall) -> dict[str, Any]:
    """Return the fields that the service sent beside a part; none if the part came from another dialect."""
    raw = part.raw or {}
    return {} if _BESIDE.isdisjoint(raw) else dict(raw)


def _call_part(call: ToolCall) -> dict[str, Any]:
    beside = _beside(call)
    more = {name: value for name, value in beside.get("functionCall", {}).items() if name != "id"}
    part = {**beside, "functionCall": {**more, "name": call.name, "args": sent_arguments(call), **_id_of(call)}}
    return part | ({"thoughtSignature": call.signature} if call.signature else {})


def _media_part(media: Media) -> dict[str, Any]:
    data = media_data(media)
    beside = _beside(media)
    if data is not None:
        fields = {**beside.get("inlineData", {}), "mimeType": data[0], "data": data[1]}
        return {**beside, "inlineData": fields}
    kind = media.media_type or mimetypes.guess_type(as_text(media.url).partition("?")[0])[0]
    fields = {**beside.get("fileData", {}), "fileUri": media.url} | ({"mimeType": kind} if kind else {})
    return {**beside, "fileData": fields}


def _sign(parts: Iterable[dict[str, Any]]) -> None:
    """Sign the first call of another model's turn with Google's stand-in."""
    calls = [part for part in parts if "functionCall" in part]
    if calls and not any("thoughtSignature" in part for part in parts):
        calls[0]["thoughtSignature"] = NO_SIGNATURE


def _id_of(call: ToolCall) -> dict[str, str]:
    """Return the id of a call as a field; nothing if the service sent the call without an id."""
    sent = _beside(call).get("functionCall", {})
    return {} if "id" in sent or not call.id else {"id": call.id}


def _result(message: Message, call: ToolCall | None, request: Request) -> dict[str, Any]:
    """Return a tool's result. It has an id if the call has one."""
    response: dict[str, Any] = {
        "name": tool_name(message, request, NAME),
        "response": {"error": message.text} if message.is_error else _as_object(message.text),
    }
    if call is not None:
        response |= _id_of(call)
    elif message.tool_call_id:
        response["id"] = message.tool_call_id
    media = [_media_part(part) for part in message.content if isinstance(part, Media)]
    if media:
        response["parts"] = media
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


def _format(request: Request) -> tuple[Request, dict[str, Any]]:
    """Return the fields for `response_format`, and the request to encode, which tells the model some schemas in words.

    The service unrolls a schema that holds itself to some depth, and only where it is not required. Before Gemini 2 it takes
    no JSON Schema.
    """
    wanted = format_of(request)
    if wanted is None:
        return request, {}
    if not isinstance(wanted, SchemaFormat):
        return request, {"responseMimeType": "application/json" if wanted == "json" else "text/plain"}
    if _generation(request.model) < 2 or is_recursive(wanted.schema):
        return with_schema_in_words(request, wanted.schema), {"responseMimeType": "application/json"}
    return request, {"responseMimeType": "application/json", "responseJsonSchema": wanted.schema}


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
