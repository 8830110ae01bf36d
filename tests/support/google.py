"""A loopback server in the place of Google: its tokens, its metadata, and Vertex AI."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import parse_qs

import attrs

from support.anthropic import finish, start, text_block
from support.dialects import sse
from support.gemini import answer

TOKEN = "ya29.token-0123456789"  # noqa: S105  # it opens nothing
REFRESH_TOKEN = "1//refresh-0123456789"  # noqa: S105  # nor does this
CLIENT_SECRET = "GOCSPX-0123456789"  # noqa: S105  # nor does this
ACCOUNT = "runner@harbour.iam.gserviceaccount.com"
SCOPE = "https://www.googleapis.com/auth/cloud-platform"
JSON, EVENTS = "application/json; charset=UTF-8", "text/event-stream"
VARIABLES = (
    *("ANTHROPIC_VERTEX_PROJECT_ID", "CLOUD_ML_REGION", "GEMINI_API_KEY", "GOOGLE_API_KEY"),
    *("GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_CLOUD_LOCATION", "GOOGLE_CLOUD_PROJECT", "GOOGLE_CLOUD_QUOTA_PROJECT"),
    *("GCLOUD_PROJECT", "GOOGLE_VERTEX_BASE_URL", "GCE_METADATA_HOST", "GCE_METADATA_IP", "NO_GCE_CHECK"),
)
"""The environment variables that Google's clients and fluxibly read."""

WHOLE = answer({"text": "Hello é"}, reason="STOP", modelVersion="gemini-x", responseId="r1")
STREAM = sse(answer({"text": "Hel"}, modelVersion="gemini-x", responseId="r1"), answer({"text": "lo é"}, reason="STOP"))
CLAUDE = {
    "type": "message",
    "id": "msg_1",
    "role": "assistant",
    "model": "claude-x",
    "content": [{"type": "text", "text": "Hello é"}],
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "usage": {"input_tokens": 3, "output_tokens": 2},
}
CLAUDE_STREAM = sse(start(input_tokens=3), *text_block("Hel", "lo é"), *finish("end_turn", output_tokens=2))


@attrs.frozen
class Seen:
    """A received request. `target` is its path and query; header names are in lower case."""

    method: str
    target: str
    headers: dict[str, str]
    data: bytes

    @property
    def body(self) -> Any:
        return json.loads(self.data)

    @property
    def form(self) -> dict[str, str]:
        """The fields of a URL-encoded body."""
        return {name: values[0] for name, values in parse_qs(self.data.decode()).items()}


Reply: TypeAlias = tuple[int, str, bytes]
"""A status, a content type and a body."""
Rule: TypeAlias = Callable[[Seen], Reply | None]
"""The answer of a server; None cuts the connection off."""


@attrs.define
class Google:
    """The settings of a server, and what it has seen.

    `reply` answers calls of models; `token_reply` answers requests for tokens, in place of a new token. `expires_in` is
    the lifetime of tokens. While `held` is set, requests for tokens wait for `released`.
    """

    url: str = ""
    seen: list[Seen] = attrs.Factory(list)
    """The calls of models."""
    asked: list[Seen] = attrs.Factory(list)
    """The requests for tokens."""
    reply: Rule | None = None
    token_reply: Rule | None = None
    expires_in: Any = 3600
    held: bool = False
    waiting: threading.Event = attrs.Factory(threading.Event)
    released: threading.Event = attrs.Factory(threading.Event)

    @property
    def bearers(self) -> list[str]:
        """The numbers of the tokens with which models were called."""
        return [seen.headers["authorization"].removeprefix(f"Bearer {TOKEN}-") for seen in self.seen]


@contextmanager
def google() -> Iterator[Google]:
    """Run a server on a free port of the loopback interface."""
    state = Google()

    class Handler(_Handler):
        google = state

    with _Server(("127.0.0.1", 0), Handler) as server:
        state.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield state
        finally:
            state.released.set()
            server.shutdown()
            thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 50  # a test makes many calls at once


class _Handler(BaseHTTPRequestHandler):
    google: Google
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Do not log requests."""

    def do_GET(self) -> None:
        seen = Seen("GET", self.path, self._headers(), b"")
        if self.path.partition("?")[0].endswith("/token"):
            self._answer(self._token(seen))
            return
        path = self.path.partition("?")[0]
        if path.endswith("/project-id"):
            self._answer((200, "text/plain", b"harbour-metadata"))
        elif path.endswith("/default/"):
            self._answer((200, JSON, json.dumps({"email": ACCOUNT, "scopes": [SCOPE]}).encode()))
        else:
            self._answer((200, "text/plain", b""))

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["content-length"]))
        seen = Seen("POST", self.path, self._headers(), data)
        if self.path == "/token":
            self._answer(self._token(seen))
            return
        self.google.seen.append(seen)
        self._answer(self.google.reply(seen) if self.google.reply else default_reply(seen))

    def _headers(self) -> dict[str, str]:
        return {name.lower(): value for name, value in self.headers.items()}

    def _token(self, seen: Seen) -> Reply | None:
        google = self.google
        google.asked.append(seen)
        number = len(google.asked)
        if google.held:
            google.waiting.set()
            google.released.wait(20)
        if google.token_reply:
            return google.token_reply(seen)
        token = {"access_token": f"{TOKEN}-{number}", "expires_in": google.expires_in, "token_type": "Bearer"}
        return 200, JSON, json.dumps(token).encode()

    def _answer(self, reply: Reply | None) -> None:
        if reply is None:
            self.close_connection = True
            return
        status, content_type, body = reply
        self.send_response(status)
        self.send_header("content-type", content_type)
        self.send_header("content-length", str(len(body)))
        self.send_header("metadata-flavor", "Google")
        with suppress(ConnectionError):  # the client has given up
            self.end_headers()
            self.wfile.write(body)


def default_reply(seen: Seen) -> Reply:
    """Return an answer in the dialect and the mode that the path asks for."""
    whole, stream = (CLAUDE, CLAUDE_STREAM) if seen.target.lower().endswith("rawpredict") else (WHOLE, STREAM)
    streaming = ":stream" in seen.target
    return (200, EVENTS, stream) if streaming else (200, JSON, json.dumps(whole).encode())


def failing(status: int, message: str, code: str) -> Callable[[Seen], Reply]:
    """Return a reply that is an error as Google writes it."""
    error = {"error": {"code": status, "message": message, "status": code}}
    return lambda _: (status, JSON, json.dumps(error).encode())


@cache
def private_key() -> tuple[str, str]:
    """Return a new RSA key as PEM, and its public half."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(65537, 2048)
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return secret.decode(), public.decode()


def service_account(folder: Path, url: str, **fields: Any) -> Path:
    """Write the file of a service account whose tokens come from a server."""
    return _file(
        folder,
        {
            "type": "service_account",
            "project_id": "harbour-account",
            "private_key_id": "k1",
            "private_key": private_key()[0],
            "client_email": ACCOUNT,
            "client_id": "1",
            "token_uri": f"{url}/token",
            **fields,
        },
    )


def authorized_user(folder: Path, **fields: Any) -> Path:
    """Write the file of a user who has logged in."""
    return _file(
        folder,
        {
            "type": "authorized_user",
            "client_id": "c1",
            "client_secret": CLIENT_SECRET,
            "refresh_token": REFRESH_TOKEN,
            **fields,
        },
    )


def _file(folder: Path, fields: dict[str, Any]) -> Path:
    file = folder / f"{fields['type']}.json"
    file.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))
    return file


def check_assertion(assertion: str) -> dict[str, Any]:
    """Return the claims of the JWT with which a service account asks for a token, once its signature and times are checked."""
    from google.auth import jwt

    claims: dict[str, Any] = jwt.decode(
        assertion, certs=private_key()[1], audience="https://oauth2.googleapis.com/token"
    )
    assert claims["exp"] - claims["iat"] <= 3600
    assert abs(claims["iat"] - time.time()) < 60
    return claims
