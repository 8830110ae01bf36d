"""The requests of clients: bodies of OpenAI's chat completions API as the prompts and settings of calls."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import attrs

from fluxibly._checks import is_list, is_mapping, kind_of
from fluxibly._dicts import Reader
from fluxibly._formats import output_format
from fluxibly.errors import StreamProtocolError
from fluxibly.providers.dialects.json_values import read_json

if TYPE_CHECKING:
    from starlette.requests import Request as HTTPRequest

LARGEST: Final = 32 * 1024 * 1024
"""The maximum length of a body, in bytes."""
BODY_TIME: Final = 60.0
"""Seconds in which a body has to arrive."""

_PASSED: Final = (
    "temperature",
    "top_p",
    "top_k",
    "frequency_penalty",
    "presence_penalty",
    "seed",
    "n",
    "reasoning_effort",
    "stop",
)
"""The parameters whose values are those of a call. `LLM.request` checks them."""
_MISLEADING: Final[Mapping[str, str]] = {
    "functions": "; write tools",
    "function_call": "; write tool_choice",
    "logit_bias": "",
    "logprobs": "",
    "top_logprobs": "",
    "audio": "",
    "web_search_options": "",
}
"""The parameters whose loss would show in the answer, each with a hint. Others that are not known are ignored."""


class Refused(Exception):
    """A request that is answered with an error before any call is made."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = dict(headers or {})


@attrs.frozen
class Settings:
    """What clients may ask for.

    Args:
        models: the models that a body may name. Empty: the model of a body is ignored.
        pass_extra: whether unknown parameters are passed on to the service.
    """

    models: Sequence[str] = ()
    pass_extra: bool = False


@attrs.frozen
class Asked:
    """A request for a chat completion: the prompt, the settings of the call, and the form of the answer."""

    messages: list[Any]
    overrides: dict[str, Any]
    stream: bool
    usage: bool
    """Whether the last object of a stream has the usage."""


async def body_of(request: HTTPRequest) -> bytes:
    """Return the body of a request.

    Raises:
        Refused: it is no JSON by its type, too large, or takes too long to arrive.
    """
    import anyio

    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        # A web page may have a browser send other types to any address, this one too, without asking first.
        got = repr(kind[:80]) if kind else "none"
        raise Refused(415, f"expected the content type application/json, got {got}")
    too_large = Refused(413, f"expected a body of at most {LARGEST} bytes, got more", code="body_too_large")
    if int(request.headers.get("content-length", 0)) > LARGEST:
        raise too_large
    body = bytearray()
    try:
        with anyio.fail_after(BODY_TIME):
            async for piece in request.stream():
                body += piece
                if len(body) > LARGEST:
                    raise too_large
    except TimeoutError:
        raise Refused(408, f"expected the body within {BODY_TIME:g} seconds, got a part of it") from None
    return bytes(body)


def read(body: bytes, settings: Settings) -> Asked:
    """Return what a body asks for.

    Raises:
        Refused: it is no request for a chat completion, or for one that cannot be had here.
    """
    try:
        value: object = read_json(body)
    except StreamProtocolError:
        raise Refused(400, "the body: expected JSON, got other text, or JSON that is nested too deeply") from None
    if not is_mapping(value):
        raise Refused(400, f"the body: expected a JSON object, got {kind_of(value)}")
    try:
        return _asked(Reader(value, ""), settings)
    except (TypeError, ValueError) as error:
        raise wrong(error) from None


def wrong(error: Exception) -> Refused:
    """Return the refusal of a request with a wrong parameter. The messages of our errors begin with its path."""
    path = _PATH.match(str(error))
    return Refused(400, str(error), param=None if path is None else path[0])


_PATH: Final = re.compile(r"[\w.\[\]]+(?=: )")


def _asked(fields: Reader, settings: Settings) -> Asked:
    messages = fields.items("messages")
    if not messages:
        raise ValueError("messages: expected a list of messages, got nothing")
    for number, message in enumerate(messages):
        Reader(message, f"messages[{number}]")  # which refuses what is no mapping
    overrides = {name: value for name in _PASSED if (value := fields.value(name)) is not None}
    overrides |= _model(fields, settings)
    limits = [fields.value(name) for name in ("max_completion_tokens", "max_tokens")]
    if limits != [None, None]:
        overrides["max_tokens"] = limits[1] if limits[0] is None else limits[0]
    if tools := fields.items("tools"):
        overrides["tools"] = [_tool(tool, f"tools[{number}]") for number, tool in enumerate(tools)]
    if (choice := _tool_choice(fields.value("tool_choice"))) is not None:
        overrides["tool_choice"] = choice
    wanted = fields.value("response_format")
    if output_format(wanted) is not None:
        overrides["response_format"] = wanted
    metadata = fields.table("metadata") or {}
    if (user := fields.text("user")) is not None:
        metadata["user"] = user
    if metadata:
        overrides["metadata"] = metadata
    stream = fields.take("stream", bool, "true or false", default=False)
    options = Reader(fields.table("stream_options") or {}, "stream_options")
    usage = options.take("include_usage", bool, "true or false", default=False)
    rest = {name: value for name, value in fields.rest().items() if value is not None}
    if not settings.pass_extra:
        _check_rest(rest)
    elif rest:
        overrides["extra"] = rest
    return Asked(messages, overrides, stream, usage)


def _model(fields: Reader, settings: Settings) -> dict[str, str]:
    model = fields.value("model")
    if not settings.models or model is None:
        return {}
    if model not in settings.models:
        raise Refused(
            404,
            f"model: expected one of {', '.join(settings.models)}, got {str(model)[:80]!r}",
            code="model_not_found",
            param="model",
        )
    return {"model": model}


def _tool(value: object, path: str) -> object:
    kind = Reader(value, path).text("type", "function")
    if kind != "function":
        raise ValueError(f"{path}.type: expected 'function', got {kind[:80]!r}")
    return value


def _tool_choice(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    choice = Reader(value, "tool_choice")
    kind = choice.text("type", "function")
    if kind != "function":
        raise ValueError(f"tool_choice.type: expected 'function', got {kind[:80]!r}")
    return Reader(choice.value("function"), "tool_choice.function").needed("name")


def _check_rest(rest: Mapping[str, Any]) -> None:
    """Refuse parameters whose loss would mislead the client."""
    for name, hint in _MISLEADING.items():
        if rest.get(name):
            raise ValueError(
                f"{name}: this server does not take it{hint or '; start it with --pass-extra to pass it on'}"
            )
    modalities: object = rest.get("modalities")
    if is_list(modalities) and modalities != ["text"]:
        raise ValueError(
            "modalities: expected ['text'], got others; start the server with --pass-extra to pass them on"
        )
