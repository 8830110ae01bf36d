"""Requests in Gemini's dialect: the body of `generateContent` and `streamGenerateContent`."""

from __future__ import annotations

import mimetypes
import re
from collections.abc import Iterable, Mapping
from typing import Any

from fluxibly.providers.json_reading import string
from fluxibly.providers.wire import bad_request, image_data, refuse, sent_arguments, system_text, tool_name
from fluxibly.types import Image, Message, Request, Tool, parse_arguments

NAME = "Gemini"
BUDGETS = {"none": 0, "minimal": 512, "low": 1024, "medium": 8192, "high": 24_576}
"""Tokens to think with, for models before Gemini 3, which take a budget and no words for the effort."""
LEVELS = ("minimal", "low", "medium", "high")
"""What Gemini 3 and later take; not every model takes all."""
NO_SIGNATURE = "skip_thought_signature_validator"
"""What Google says to send with a call that another model made, since Gemini 3 refuses calls without a signature."""

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
    """The body, without `extra`.

    Raises:
        BadRequest: a parameter is one that the dialect cannot take.
    """
    refuse(request, NAME, ())
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
    """The conversation. The results of one turn's calls are one turn: the service counts them against the calls."""
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
        elif parts:  # the service refuses turns without any
            contents.append({"role": "model" if message.role == "assistant" else "user", "parts": parts})
        after_result = is_result
    if not contents:
        raise bad_request(request, f"{NAME} needs a message besides the system's, with something in it")
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
    kind = image.media_type or mimetypes.guess_type(string(image.url).partition("?")[0])[0]
    return {"fileData": {"fileUri": image.url} | ({"mimeType": kind} if kind else {})}


def _answer(message: Message, request: Request) -> list[dict[str, Any]]:
    """What the model said, with its signatures where they were: on thoughts, on texts and on calls."""
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
    """The part with a signature that stood on text: cut off the text's end again, where it is its end."""
    said = string(raw.get("text"))
    if said and texts and "thoughtSignature" not in texts[-1] and string(texts[-1].get("text")).endswith(said):
        rest = texts.pop()["text"][: -len(said)]
        return [*([{"text": rest}] if rest else []), raw]
    return [{"text": "", "thoughtSignature": raw["thoughtSignature"]}]


def _id_of(call_id: str | None) -> dict[str, str]:
    """A call's id, unless it was made up because the service gave none."""
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
    """A tool's result as the object that the service wants; a text that is none goes under `output`."""
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
    """A Gemini model's generation. A name without one ("gemini-flash-latest") is a new model's."""
    found = _GENERATION.search(model)
    return int(found[1]) if found else 3


def _thinking(request: Request) -> dict[str, Any]:
    effort = request.reasoning_effort
    if effort is None:
        return {}
    by_budget = _generation(request.model) < 3
    known: Iterable[str] = BUDGETS if by_budget else LEVELS
    if effort not in known:
        raise bad_request(request, f"{NAME} takes as reasoning_effort {', '.join(known)}, not {effort!r}")
    config: dict[str, Any] = {"thinkingBudget": BUDGETS[effort]} if by_budget else {"thinkingLevel": effort}
    return {"thinkingConfig": config | ({"includeThoughts": True} if effort != "none" else {})}
