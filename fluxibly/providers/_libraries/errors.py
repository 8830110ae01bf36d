"""The exceptions of other libraries (openai, anthropic, httpx, LangChain, LiteLLM) as fluxibly's errors.

They are recognized by their attributes (a status, a response, a decoded body) and by the names of their classes, so
that no library has to be imported. fluxibly's errors are never chained to them, because they may quote an API key.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, cast

import attrs

from fluxibly import errors
from fluxibly._masking import mask_secrets
from fluxibly.errors import FluxiblyError, Phase, ProviderError
from fluxibly.limits import before_the_deadline, who_limits
from fluxibly.providers._libraries.calls import LibraryTimeout
from fluxibly.providers.dialects.errors import Report, error_of, error_of_payload, error_of_response

_TIMEOUTS: Final = {"APITimeoutError", "TimeoutException", "ModelTimeoutError", "TimeoutError"}
_CONNECTIONS: Final = {"APIConnectionError", "TransportError", "ModelConnectionError", "ConnectionError"}
_UNREADABLE: Final = {
    "APIResponseValidationError",
    "AttributeError",
    "DecodingError",
    "JSONDecodeError",
    "LookupError",
    "UnicodeDecodeError",
    "ValidationError",
}
_WORDS: Final = {
    "ContentPolicyViolationError": "content_filter",
    "ContextOverflowError": "context_length_exceeded",
    "ContextWindowExceededError": "context_length_exceeded",
}
_QUOTED: Final = re.compile(r"""["'](?:code|type)["']: ?["']([\w.-]+)["']""")
"""The codes and types in a body that LiteLLM quotes in its message, and keeps nowhere else."""
_NOTHING_CAME: Final = ("No generation", "Unexpected response type", "Response missing", "Received response with null")


@attrs.frozen(kw_only=True)
class ErrorTranslator:
    """A translator of a library's exceptions. `library` is the library's name, `framework` fluxibly's name for it."""

    library: str
    framework: str
    secrets: tuple[str, ...] = ()

    def __call__(
        self, error: Exception, model: str, *, streamed: bool = False, more_secrets: Iterable[str] = ()
    ) -> Exception:
        """Return the exception that the caller gets for `error`. `streamed` says whether part of a stream had arrived.

        An exception of no known library (a user's own chat model may raise anything) is returned unchanged, unless it
        quotes a secret.
        """
        secrets = (*self.secrets, *more_secrets)
        ours = _translated(error, self.library, streamed=streamed)
        if ours is None:
            shown = repr(error)
            if mask_secrets(shown, secrets) == shown:
                return error
            text = f"{self.library} failed with {type(error).__name__}: {error}"
            return ProviderError(mask_secrets(text, secrets))
        if isinstance(ours, ProviderError):
            ours.provider = ours.provider or self.framework
            ours.model = ours.model or model
            ours.args = tuple(mask_secrets(each, secrets) if isinstance(each, str) else each for each in ours.args)
            ours.body = None if ours.body is None else mask_secrets(ours.body, secrets)
            ours.code = None if ours.code is None else mask_secrets(ours.code, secrets)
        return ours


def _translated(error: Exception, library: str, *, streamed: bool) -> Exception | None:
    if isinstance(error, FluxiblyError):
        return error
    if isinstance(error, LibraryTimeout):
        return _passed(error, library, streamed=streamed)
    causes: list[BaseException] = []
    while isinstance(inner := getattr(error, "original_exception", None), Exception):
        causes += [*_reasons(error)][1:]  # LiteLLM's MidStreamFallbackError itself adds no information
        error = inner
    reasons = [*_reasons(error), *causes]
    names = {kind.__name__ for reason in reasons for kind in type(reason).__mro__}
    own_names = {kind.__name__ for kind in type(error).__mro__}
    if own_names & _TIMEOUTS or (names & _TIMEOUTS and own_names & _CONNECTIONS):
        phase: Phase = "connect" if "ConnectTimeout" in names else "idle" if streamed else "first_byte"
        return _late(phase, "the configured time", library, streamed=streamed)
    if "RemoteProtocolError" in names and (streamed or "incomplete" in _texts(reasons)):
        return errors.StreamProtocolError(
            f"the answer to {library} was cut off: the connection closed before it was complete"
        )
    if own_names & _CONNECTIONS:
        for reason in reasons:
            # LiteLLM calls an error in a stream a lost connection
            if getattr(reason, "body", None) and (reported := _reported(reason, names, library)) is not None:
                return reported
        return errors.ConnectionFailed(
            f"{library} could not reach the service, or lost the connection: {_innermost(error)}. "
            "Check the network and api_base."
        )
    for reason in reasons:
        reported = _reported(reason, names, library)
        if reported is not None:
            return reported
    return _misused(error, own_names, library)


def _passed(error: LibraryTimeout, library: str, *, streamed: bool) -> ProviderError:
    """Return the error for a time limit of fluxibly."""
    if error.phase == "deadline":
        return errors.DeadlineExceeded(
            f"the answer (through {library}) was not complete {before_the_deadline(error.leash)}; give the call more time"
        )
    if error.strict:
        kind = errors.StreamStalled if error.phase == "idle" else errors.RequestTimeout
        what = "chunk" if error.phase == "idle" else "output"
        late = kind(
            f"the stream sent no {what} for longer than {error.seconds:g} s (the {error.phase} limit of "
            f"{who_limits(error.leash, error.phase)}, through {library}); try again, or increase the limit"
        )
        late.phase = error.phase
        return late
    return _late(error.phase, f"{error.seconds:g} s", library, streamed=streamed, kept_alive=error.kept_alive)


def _late(phase: Phase, limit: str, library: str, *, streamed: bool, kept_alive: bool = False) -> ProviderError:
    kind = errors.StreamStalled if phase == "idle" and streamed else errors.RequestTimeout
    what = {
        "connect": "connecting took longer",
        "first_byte": "no answer came for longer",
        "idle": f"the stream sent {'only keep-alives' if kept_alive else 'nothing'} for longer",
        "total": "the call took longer",
    }[phase]
    late = kind(f"{what} than {limit} (the {phase} timeout, through {library}); try again, or increase the timeout")
    late.phase = phase
    return late


def _reasons(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and its causes, the outermost first."""
    seen: set[int] = set()
    reason: object = error
    while isinstance(reason, BaseException) and id(reason) not in seen:
        seen.add(id(reason))
        yield reason
        reason = reason.__cause__ or reason.__context__


def _texts(reasons: Iterable[BaseException]) -> str:
    return " ".join(str(reason) for reason in reasons)


def _innermost(error: BaseException) -> str:
    """Return the type and the message of an exception's first cause, or of the exception itself."""
    while error.__cause__ is not None and str(error.__cause__):
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


def _reported(error: BaseException, names: Iterable[str], library: str) -> ProviderError | None:
    """Return the error for an exception that carries a service's answer."""
    status: object = getattr(error, "status_code", None)
    body: object = getattr(error, "body", None)
    word = next((_WORDS[name] for name in names if name in _WORDS), None)
    if isinstance(status, int) and status >= 300:
        response = getattr(error, "response", None)
        headers = _headers(getattr(error, "litellm_response_headers", None) or getattr(response, "headers", None))
        content = _content(response)
        if content and word is None:
            return error_of_response(status, headers, content, service=f"the service (through {library})")
        named = (word, getattr(error, "code", None), getattr(error, "type", None))
        quoted = [each for each in _QUOTED.findall(str(error)[:4_000]) if each != "error"]
        words = [str(each).lower() for each in (*named, *quoted) if each]
        report = Report(message=str(error), status=status, code=words[0] if words else None, words=tuple(words))
        return error_of(report, status=status, headers=headers, service=f"the service (through {library})")
    if body is None and isinstance(error, ValueError) and error.args and isinstance(error.args[0], dict):
        body = cast("object", error.args[0])  # langchain-openai raises this for an error in a 200 response
    if body:
        whole = cast("dict[str, Any]", body) if isinstance(body, dict) else {}
        payload: dict[str, Any] = whole if "error" in whole else {"error": body}
        return error_of_payload(payload, body=_json(payload), service=f"the service (through {library})")
    if any(kind.__name__ == "APIError" for kind in type(error).__mro__):
        return errors.ServerError(f"the service (through {library}) answered with an error: {error}")
    return None


def _json(payload: object) -> bytes:
    return json.dumps(payload, default=str).encode()


def _headers(headers: object) -> dict[str, str]:
    items = cast("Mapping[str, object]", headers).items() if isinstance(headers, Mapping) else ()
    return {name.lower().removeprefix("llm_provider-"): str(value) for name, value in items}


def _content(response: Any) -> bytes:
    """Return the body of an httpx response, or no bytes if it was not read."""
    try:
        content: object = response.content
    except Exception:  # noqa: BLE001  # httpx.ResponseNotRead, or not an httpx response
        return b""
    return content if isinstance(content, bytes) else b""


def _misused(error: Exception, names: set[str], library: str) -> Exception | None:
    """Return the error for a failure of the library itself: to read an answer, or to send a request."""
    text = str(error)
    if isinstance(error, TypeError) and "unexpected keyword argument" in text:
        return errors.BadRequest(f"{library} cannot pass on a parameter: {text}")
    if names & _UNREADABLE or isinstance(error, TypeError) or text.startswith(_NOTHING_CAME):
        return errors.StreamProtocolError(
            f"{library} could not read the service's answer ({type(error).__name__}): {text[:500]}"
        )
    if isinstance(error, ValueError):
        return errors.BadRequest(f"{library} refuses the request: {text}")
    return None
