"""The requests of clients: bodies of OpenAI's chat completions API as the prompts and settings of calls."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import attrs

from fluxibly._checks import is_mapping, kind_of
from fluxibly.errors import StreamProtocolError
from fluxibly.providers.dialects.json_values import read_json
from fluxibly.providers.dialects.openai_bodies import misleading, read_body

if TYPE_CHECKING:
    from starlette.requests import Request as HTTPRequest

LARGEST: Final = 32 * 1024 * 1024
"""The maximum length of a body, in bytes."""
BODY_TIME: Final = 60.0
"""Seconds in which a body has to arrive."""


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
        return _asked(value, settings)
    except (TypeError, ValueError) as error:
        raise wrong(error) from None


def wrong(error: Exception) -> Refused:
    """Return the refusal of a request with a wrong parameter. The messages of our errors begin with its path."""
    path = _PATH.match(str(error))
    return Refused(400, str(error), param=None if path is None else path[0])


_PATH: Final = re.compile(r"[\w.\[\]]+(?=: )")


def _asked(value: Mapping[str, Any], settings: Settings) -> Asked:
    body = read_body(value)
    overrides = body.settings | _model(body.model, settings)
    if not settings.pass_extra:
        _check_rest(body.rest)
    elif body.rest:
        overrides["extra"] = body.rest
    return Asked(body.messages, overrides, body.stream, body.usage)


def _model(model: object, settings: Settings) -> dict[str, str]:
    if not settings.models or model is None:
        return {}
    if not isinstance(model, str) or model not in settings.models:
        raise Refused(
            404,
            f"model: expected one of {', '.join(settings.models)}, got {str(model)[:80]!r}",
            code="model_not_found",
            param="model",
        )
    return {"model": model}


def _check_rest(rest: Mapping[str, Any]) -> None:
    """Refuse parameters whose loss would mislead the client."""
    for name, hint in misleading(rest):
        raise ValueError(f"{name}: this server does not take it{hint or '; start it with --pass-extra to pass it on'}")
