"""The gate: it checks the `Host` and the token of each request, logs the request, and answers what goes wrong inside of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from hmac import compare_digest
from typing import TYPE_CHECKING, Any

from fluxibly._logs import log, one_line
from fluxibly.providers.dialects.openai_answers import INTERNAL, error_body
from fluxibly.serve._answers import json_response, refusal
from fluxibly.serve._requests import Refused

if TYPE_CHECKING:
    from starlette.exceptions import HTTPException
    from starlette.types import ASGIApp, Message as Event, Receive, Scope, Send

LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})
"""The names of this machine for itself."""


class Gate:
    """An ASGI application around another.

    Args:
        app: the other application.
        token: the bearer token that clients have to send. None: they need none.
        hosts: the names that a `Host` header may have. None: any.
    """

    def __init__(self, app: ASGIApp, token: str | None, hosts: Collection[str] | None) -> None:
        self._app = app
        self._token = None if token is None else token.encode()
        self._hosts = None if hosts is None else frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        from starlette.exceptions import HTTPException
        from starlette.requests import ClientDisconnect

        status = 0
        began = time.perf_counter()

        async def watched(event: Event) -> None:
            nonlocal status
            if event["type"] == "http.response.start":
                status = event["status"]
            await send(event)

        try:
            try:
                self._check(scope)
                # With an "app", a router raises its refusals, and does not answer them in words of its own.
                await self._app({**scope, "app": self}, receive, watched)
            except HTTPException as error:
                await _no_route(error)(scope, receive, watched)
            except Refused as refused:
                await refusal(refused)(scope, receive, watched)
            except ClientDisconnect:
                pass
            except Exception as error:
                log(logging.ERROR, "a request failed | error_type=%s", error_type=type(error).__name__)
                if status:
                    raise  # the head has gone out: the connection has to end, or the client would wait
                body = error_body(str(INTERNAL.message), INTERNAL.type, INTERNAL.code)
                await json_response(body, INTERNAL.status)(scope, receive, watched)
        finally:
            _log(scope, status, time.perf_counter() - began)

    def _check(self, scope: Scope) -> None:
        """Check that the request is from somebody who may ask.

        Raises:
            Refused: it is not.
        """
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        if self._hosts is not None:
            given = [value.decode("latin-1") for name, value in headers if name == b"host"]
            if len(given) != 1 or _name_of(given[0]) not in self._hosts:
                # A web page can make its own name resolve to this machine, and its script then has this server for its own.
                raise Refused(403, "expected a Host header with a name of this machine, got another; see --allow-host")
        if self._token is not None:
            given_token = next((value for name, value in headers if name == b"authorization"), b"")
            kind, _, token = given_token.partition(b" ")
            if kind.lower() != b"bearer" or not compare_digest(token.strip(), self._token):
                raise Refused(
                    401,
                    "expected the token of this server as the API key, got another, or none",
                    code="invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )


def _no_route(error: HTTPException) -> Any:
    what = "method for this path" if error.status_code == 405 else "path: /v1/chat/completions or /v1/models"
    body = error_body(f"expected another {what}", "invalid_request_error")
    return json_response(body, error.status_code, error.headers)


def _name_of(host: str) -> str:
    """Return the name or the address in a `Host` header, without the port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower().removesuffix(".")


def _log(scope: Scope, status: int, seconds: float) -> None:
    """Log a request, without its query, its headers and its body, which may have secrets."""
    client = scope.get("client") or ("-",)
    log(
        logging.INFO,
        "request | client=%s, method=%s, path=%s, status=%s, elapsed=%.3fs",
        client=client[0],
        method=one_line(scope["method"]),
        path=one_line(scope["path"])[:200],
        status=status or "left",
        elapsed=seconds,
    )
