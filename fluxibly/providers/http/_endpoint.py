"""The parts of the HTTP providers that need no I/O.

An `Endpoint` is a service as a configuration reaches it. It encodes requests, decodes whole responses, and translates
errors into the errors that users catch. `_reader.py` reads bodies and streams.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping
from hashlib import sha256
from logging import WARNING
from typing import TYPE_CHECKING, BinaryIO

import httpx

from fluxibly._checks import kind_of, secrets_in, secrets_in_query
from fluxibly._logs import log
from fluxibly._masking import mask_secrets
from fluxibly.config import LLMConfig, identity_of
from fluxibly.errors import (
    AuthenticationError,
    BadRequest,
    ConfigError,
    ConnectionFailed,
    DeadlineExceeded,
    PermissionDenied,
    ProviderError,
    StreamProtocolError,
)
from fluxibly.limits import Timeouts, before_the_deadline, time_left
from fluxibly.providers.dialects.codec import Codec, Encoded, Event, Learner, Service
from fluxibly.providers.dialects.errors import ADVICE, request_id_of
from fluxibly.providers.dialects.json_values import REPAIRS, is_utf8
from fluxibly.providers.dialects.retry_after import retry_after_of
from fluxibly.providers.http._encodings import accept_encoding
from fluxibly.providers.http._exchange import (
    Authorizer,
    FileBody,
    Headers,
    Key,
    Outgoing,
    as_headers,
    header,
    rate_limits_of,
    with_header_facts,
    with_more,
)
from fluxibly.providers.http._limits import HeldLimits, LeashedLimits, Limits
from fluxibly.providers.http._network_errors import redirected, translated
from fluxibly.types import ProviderInfo, Request, Response

if TYPE_CHECKING:
    from fluxibly.providers.dialects.batches import APICall, Upload

_TARGET = re.compile(rb"[\x21-\x7e]+")
_KEPT_HEADERS = 32
"""Maximum number of different sets of headers that are kept as bytes."""
_KEPT_KEYS = 64
"""Maximum number of keys that are masked in errors."""


class Endpoint:
    """A service as an `LLMConfig` reaches it. Immutable, and shared by all calls."""

    def __init__(self, codec: Codec, service: Service, config: LLMConfig, *, name: str) -> None:
        self.codec = codec
        self.service = service
        self.url = _base_url(service, config)
        self.base_path = self.url.raw_path.partition(b"?")[0].rstrip(b"/")
        self.base_query = self.url.query
        self._given = _given_headers(config)
        self._auth_names = frozenset(("authorization", service.auth_header.lower(), *service.other_auth_headers))
        """The headers that take the place of the key, if the configuration or a call has one of them."""
        self.has_auth = self._authorize(config.headers)
        self.key: Key | None
        self.key, self._no_key = (None, None) if self.has_auth else _api_key(service, config)
        self.key_source = "headers" if self.has_auth else _key_source(service, config)
        """The key, and the error of calls without one. A function's key is None until it is asked for."""
        self._keys: tuple[str, ...] = (self.key,) if isinstance(self.key, str) else ()
        self._values = (*config.headers.values(), *secrets_in_query(str(self.url)))
        self.secrets = (*self._keys, *self._values)
        self.times: Timeouts = config.timeouts
        self.stream_total = config.stream_total
        self.host = self.url.host
        self.port = self.url.port or (443 if self.url.scheme == "https" else 80)
        self.info = ProviderInfo(
            name=name,
            framework=service.framework,
            telemetry_name=service.telemetry_name,
            server_address=self.host,
            server_port=self.port,
            identity=identity_of(service.framework, self.url, config),
            prefill=service.prefill,
        )
        self._prepared: dict[tuple[Key | None, tuple[tuple[str, str], ...]], Headers] = {}

    def limits(self, request: Request, *, stream: bool) -> Limits:
        """Return the limits of an attempt, which begins now.

        Raises:
            DeadlineExceeded: the call's deadline has passed.
        """
        call = request.call
        if call.timeouts is None:
            times, total = self.times, self.stream_total if stream else self.times.total
        else:
            times = call.timeouts
            total = times.stream_total if stream else times.total
        leash = call.leash
        if leash is None:
            return Limits(times, total=total, streaming=stream)
        deadline = time_left(leash, call.clock)
        if deadline is not None and deadline <= 0:
            late = DeadlineExceeded(f"the request was not sent {before_the_deadline(leash)}; give the call more time")
            raise self.completed_with(late, request)
        if stream and (leash.first_chunk is not None or leash.idle is not None):
            return LeashedLimits(times, leash, total=total, deadline=deadline)
        if not stream:
            return HeldLimits(times, leash, total=total, deadline=deadline)
        return Limits(times, total=total, deadline=deadline, streaming=True)

    # Requests

    def outgoing(self, request: Request, *, stream: bool) -> Outgoing:
        """Encode a request.

        Raises:
            BadRequest: the dialect does not support a parameter of the request, or a header is invalid.
        """
        try:
            encoded = self.codec.encode(request, stream=stream)
            key = self.key  # once, because another thread may set another key
            headers = self._headers(encoded, key)
            if self.authorized_by(request):
                headers, key = (
                    as_headers([pair for pair in headers.pairs if pair[0].decode() not in self._auth_names]),
                    None,
                )
            elif self._no_key is not None:
                raise self._no_key
            if request.headers:
                headers = with_more(headers, _unique(request.headers))
            target = self._target(encoded.path)
            if isinstance(key, Authorizer):
                headers = self._authorized(key, target, headers, encoded.body)
        except ProviderError as error:
            raise self.completed_with(error, request) from error.__cause__
        return Outgoing(self.url, target, headers.pairs, headers.block, encoded.body, key)

    def authorized_by(self, request: Request) -> bool:
        """Whether a request has an authorization of its own, in place of the key."""
        return bool(request.headers) and self._authorize(request.headers)

    def _authorize(self, headers: Mapping[str, str]) -> bool:
        """Whether headers take the place of the key."""
        return not self._auth_names.isdisjoint([name.lower() for name in headers])

    def _target(self, path: str) -> bytes:
        path, _, query = path.partition("?")
        try:
            target = self.base_path + b"/" + path.lstrip("/").encode("ascii")
            queries = [part for part in (self.base_query, query.encode("ascii")) if part]
        except UnicodeEncodeError:
            raise BadRequest(f"expected a path in ASCII, got {path!r}") from None
        if queries:
            target += b"?" + b"&".join(queries)
        if _TARGET.fullmatch(target) is None:
            raise BadRequest(f"expected a path without spaces and control characters, got {path!r}")
        return target

    def _authorized(self, authorizer: Authorizer, target: bytes, headers: Headers, body: bytes) -> Headers:
        """Return headers with those that authorize the request."""
        names = {name.decode(): value.decode("latin-1") for name, value in headers.pairs}
        url = f"{self.url.scheme}://{self.url.netloc.decode('ascii')}{target.decode('ascii')}"
        return with_more(headers, [header(*pair) for pair in authorizer.authorize(url, names, body).items()])

    def getting(self, url: httpx.URL) -> Outgoing:
        """Return a GET request, with the authorization of all requests.

        Raises:
            AuthenticationError: there is no key.
        """
        key, target = self._key_of_requests(), url.raw_path
        headers = self._headers_without_type(key)
        headers = with_more(headers, [(b"host", url.netloc)])
        if isinstance(key, Authorizer):
            names = {name.decode(): value.decode("latin-1") for name, value in headers.pairs}
            added = key.authorize(str(url), names, b"", method="GET")
            headers = with_more(headers, [header(*pair) for pair in added.items()])
        return Outgoing(url, target, headers.pairs, headers.block, b"", key, "GET")

    def calling(self, call: APICall) -> Outgoing:
        """Return a request of the batch API, with the authorization of all requests.

        Raises:
            AuthenticationError: there is no key.
        """
        key, target = self._key_of_requests(), self._target(call.path)
        if call.method == "GET":
            headers = self._headers_without_type(key)
        else:
            headers = self._headers(Encoded(path="", body=b""), key)
        once = call.method == "POST"
        return Outgoing(self.url, target, headers.pairs, headers.block, call.body, key, call.method, once=once)

    def uploading(self, upload: Upload, rows: BinaryIO) -> Outgoing:
        """Return the request that uploads the rows of a batch, with the authorization of all requests.

        Raises:
            AuthenticationError: there is no key.
        """
        key, target = self._key_of_requests(), self._target(upload.path)
        headers = with_more(self._headers_without_type(key), [header("content-type", upload.content_type)])
        file = FileBody(upload.head, rows, upload.tail)
        return Outgoing(self.url, target, headers.pairs, headers.block, b"", key, file=file, once=True)

    def _key_of_requests(self) -> Key | None:
        if self._no_key is not None:
            raise self._no_key
        return self.key

    def _headers_without_type(self, key: Key | None) -> Headers:
        pairs = self._headers(Encoded(path="", body=b""), key).pairs
        return as_headers([pair for pair in pairs if pair[0] != b"content-type"])

    @property
    def account(self) -> str:
        """Return a hash of the address, the key and the headers: what a service sends may depend on each of them."""
        facts = (str(self.url), self.service.auth_header, self.key, sorted(self._given))
        return sha256(repr(facts).encode()).hexdigest()[:32]

    def use_key(self, key: object) -> Key:
        """Send another key from now on, and return it. The last keys stay secret.

        Raises:
            AuthenticationError: it is no key, or is malformed.
        """
        if isinstance(key, Authorizer):
            secrets = key.secrets
        elif isinstance(key, str) and key:
            _check_key(key, "api_key", self.service)
            secrets = (key,)
        else:
            got = "an empty str" if key == "" else kind_of(key)
            raise AuthenticationError(f"api_key: expected the function to return a non-empty str, got {got}")
        # Of the same key, which may be given for each call, one is kept.
        self._keys = tuple(dict.fromkeys((*secrets, *self._keys)))[:_KEPT_KEYS]
        self.secrets = (*self._keys, *self._values)
        self.key = key
        return key

    def _headers(self, encoded: Encoded, key: Key | None) -> Headers:
        headers = self._prepared.get((key, encoded.headers))
        if headers is None:
            authority = self.url.netloc
            own = [
                (b"host", authority),
                (b"accept", b"*/*"),
                (b"accept-encoding", accept_encoding().encode("ascii")),
                (b"user-agent", b"fluxibly"),
                (b"content-type", b"application/json"),
            ]
            service = [header(*pair) for pair in self.service.headers]
            if isinstance(key, str) and key:
                value = self.service.auth_prefix + key
                service.append((self.service.auth_header.lower().encode("ascii"), value.encode("ascii")))
            headers = with_more(with_more(as_headers(own), service), [header(*pair) for pair in encoded.headers])
            headers = with_more(headers, self._given)
            if len(self._prepared) >= _KEPT_HEADERS:
                self._prepared.clear()  # a key that changes would otherwise fill it for good
            self._prepared[key, encoded.headers] = headers
        return headers

    def learn(self, request: Request, sent: bytes, error: ProviderError) -> str | None:
        """Return what the codec learned from an error, and changes if the request is sent again; see `Learner`."""
        return self.codec.learn(request, sent, error) if isinstance(self.codec, Learner) else None

    # Responses

    def refuse(self, status: int, headers: Mapping[str, str], body: bytes, request: Request) -> ProviderError:
        """Return the error of a non-2xx response."""
        if status < 400:
            return self.completed_with(redirected(status, headers), request, headers)
        error = self.codec.decode_error(status, headers, body)
        masked = _masked(body, self._secrets_of(request))
        if masked != body:
            error = _quoting(error, self.codec.decode_error(status, headers, masked))
        if error.status is None:
            error.status = status
        if isinstance(self.key, Authorizer):
            error.args = tuple(_about_credentials(arg, self.key.name) for arg in error.args)
        return self.completed_with(error, request, headers)

    def check_page(self, headers: Mapping[str, str]) -> None:
        """Raise StreamProtocolError for a web page, which comes from a wrong address or from a proxy in between."""
        if headers.get("content-type", "").lower().startswith("text/html"):
            raise StreamProtocolError(
                "expected a response from the API, got a web page (text/html): check api_base and any proxy in between",
                retryable=False,
            )

    def response(self, headers: Mapping[str, str], body: bytes) -> Response:
        """Decode the whole body of a 2xx response."""
        self.check_page(headers)
        return with_header_facts(self.decoded(body), headers)

    def _secrets_of(self, request: Request) -> tuple[str, ...]:
        """Return what is masked in the errors of a request, which may have an authorization of its own."""
        if not (request.headers or request.extra):
            return self.secrets
        return (*self.secrets, *request.headers.values(), *secrets_in(request.extra))

    def decoded(self, body: bytes) -> Response:
        """Decode a whole body. Errors quote the body with the API key masked; a response is not masked."""
        repairs = REPAIRS.count
        try:
            response = self.codec.decode(body)
            if REPAIRS.count != repairs and not is_utf8(body):
                self.log_repair()
            return response
        except ProviderError as error:
            masked = _masked(body, self.secrets)
            if masked == body:
                raise
            failure = error
        raise _quoting(failure, self._error_in(lambda: self.codec.decode(masked)))

    def log_repair(self) -> None:
        """Log that an answer had invalid UTF-8."""
        log(
            WARNING,
            "LLM answer had invalid UTF-8, replaced by U+FFFD | framework=%s, server=%s:%d",
            framework=self.service.framework,
            server=self.host,
            port=self.port,
        )

    def event_error(self, event: Event, error: ProviderError) -> ProviderError:
        """Return `error`, which an event of a stream led to, so that it quotes the event with the API key masked."""
        masked = _masked(event.data, self.secrets)
        if masked == event.data:
            return error
        decoder = self.codec.decoder()
        return _quoting(error, self._error_in(lambda: list(decoder.decode_event(Event(masked, event.name)))))

    def _error_in(self, decode: Callable[[], object]) -> ProviderError | None:
        try:
            decode()
        except ProviderError as error:
            return error
        return None

    def completed_with(
        self, error: ProviderError, request: Request, headers: Mapping[str, str] | None = None
    ) -> ProviderError:
        """Complete `error` with the service, the model and the headers' hints, and mask keys and headers. Return `error`."""
        error.provider = error.provider or self.service.framework
        if error.model is None:
            error.model = request.model
            self._name_model(error, request.model)
        if headers is not None:
            if error.request_id is None:
                error.request_id = request_id_of(headers)
            error.rate_limits = error.rate_limits or rate_limits_of(headers)
            if error.retry_after is None:
                error.retry_after = retry_after_of(headers, None, "", now=time.time())
        if secrets := self._secrets_of(request):
            error.args = tuple(mask_secrets(a, secrets) if isinstance(a, str) else a for a in error.args)
            if error.body:
                error.body = mask_secrets(error.body, secrets)
            error.code = error.code and mask_secrets(error.code, secrets)
            error.request_id = error.request_id and mask_secrets(error.request_id, secrets)
        return error

    def stopped(self, request: Request) -> ProviderError:
        """Return the error of a call whose leash was stopped."""
        return self.completed_with(
            ConnectionFailed("the call was given up elsewhere (Leash.stop)", retryable=False), request
        )

    def _name_model(self, error: ProviderError, model: str) -> None:
        """Put the service and the model at the start of the message, unless the message names them."""
        message = str(error)
        if model and model not in message:
            names_service = self.service.framework.lower() in message.lower()
            who = model if names_service else f"{self.service.framework} ({model})"
            error.args = (f"{who}: {message}" if message else who,)

    def failure(
        self, error: Exception, request: Request, limits: Limits, headers: Mapping[str, str] | None
    ) -> Exception:
        """Return the error that the caller gets for an exception. Exceptions of other origin stay as they are."""
        ours = translated(
            error, self.host, self.port, limits, framework=self.service.framework, leash=request.call.leash
        )
        return error if ours is None else self.completed_with(ours, request, headers)


def _quoting(error: ProviderError, masked: ProviderError | None) -> ProviderError:
    """Return `error` with the texts of the error that the `masked` body makes. (A header may be a word like "context".)"""
    if masked is not None:
        error.args, error.body = masked.args, masked.body
    return error


def _about_credentials(message: str, name: str) -> str:
    """Return the message of an error with advice about credentials in place of advice about a key."""
    message = message.replace(ADVICE[AuthenticationError], f"Check the {name}: they may have expired.")
    return message.replace(ADVICE[PermissionDenied], f"Check what the owner of the {name} may use.")


def _masked(data: bytes, secrets: tuple[str, ...]) -> bytes:
    """Return `data` with secrets masked. An excerpt could cut a secret in two, and half a secret is not found."""
    return mask_secrets(data.decode("latin-1"), secrets).encode("latin-1") if secrets else data


_ENDPOINTS = ("/chat/completions", "/responses", "/messages", "/api/chat", "/api/generate")
"""The paths at the end of the addresses that services document. The codecs append them to `api_base`."""


def _base_url(service: Service, config: LLMConfig) -> httpx.URL:
    base = config.api_base or service.base_url
    if not base:
        also = f", or {service.url_var}," if service.url_var else ""
        raise ConfigError(f"{service.framework} has no default address: set api_base{also} to the server's base URL")
    try:
        url = httpx.URL(base)
        named = url.host  # decodes punycode, which may be invalid
    except (httpx.InvalidURL, UnicodeError) as error:
        raise ConfigError(f"api_base: expected a valid URL ({error})") from None
    if url.scheme not in ("http", "https") or not named:
        raise ConfigError("api_base: expected an http:// or https:// URL with a host")
    if url.userinfo:
        raise ConfigError("api_base: expected a URL without a user name and password; set the key as api_key")
    for ending in _ENDPOINTS:
        if url.path.rstrip("/").endswith(ending):
            raise ConfigError(f"api_base: expected the address without {ending}, which is appended to it")
    return url


def _unique(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    """Return headers as bytes. Of a name that is given twice, in different case, the last counts."""
    return list(dict([header(*pair) for pair in headers.items()]).items())


def _given_headers(config: LLMConfig) -> list[tuple[bytes, bytes]]:
    """Return the configuration's headers as bytes.

    Raises:
        ConfigError: a header cannot be sent. The message never shows its value.
    """
    try:
        return _unique(config.headers)
    except BadRequest as error:
        raise ConfigError(f"headers: {error}") from None


def _api_key(service: Service, config: LLMConfig) -> tuple[str | None, AuthenticationError | None]:
    """Return the API key, and the error of calls that have no authorization of their own either.

    Raises:
        AuthenticationError: the key is missing or malformed. The message never shows the key.
    """
    if callable(config.api_key):
        return None, None
    source, key = "api_key", config.fixed_key
    if not key and service.env_var:
        source = f"the environment variable {service.env_var}"
        key = os.environ.get(service.env_var)
    if not key:
        if not service.key_required:
            return None, None
        how = f"set {source}, or api_key in the config" if service.env_var else "set api_key in the config"
        missing = AuthenticationError(
            f"{service.framework} needs an API key: {how} (or an Authorization header in headers)",
            provider=service.framework,
        )
        if service.key_by_call:
            return None, missing
        raise missing
    _check_key(key, source, service)
    return key, None


def _key_source(service: Service, config: LLMConfig) -> str | None:
    """Return "api_key", or the environment variable that has the key; None if there is no key."""
    if config.api_key:
        return "api_key"
    return service.env_var if service.env_var and os.environ.get(service.env_var) else None


def _check_key(key: str, source: str, service: Service) -> None:
    """Raise AuthenticationError for a key that a header cannot carry."""
    if key.lower().startswith("bearer "):
        problem = "begins with 'Bearer', which belongs to the header and not to the key"
    elif key != key.strip():
        problem = "begins or ends with white space (perhaps a newline from a file)"
    elif not key.isascii():
        problem = "has characters outside ASCII"
    elif not key.isprintable():
        problem = "has control characters (perhaps a newline)"
    else:
        return
    raise AuthenticationError(f"the API key in {source} {problem}", provider=service.framework)
