"""Providers for Ollama servers, through Ollama's own API: `/api/chat`, and `/api/generate` as `ollama-generate`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import attrs

from fluxibly.errors import ConfigError
from fluxibly.providers.dialects import model_lists
from fluxibly.providers.dialects.codec import Service
from fluxibly.providers.dialects.ollama import OllamaCodec
from fluxibly.providers.http import AsyncHTTPProvider, HTTPProvider
from fluxibly.types import Prefill

if TYPE_CHECKING:
    import httpx

    from fluxibly.config import LLMConfig

SERVICE = Service(
    framework="ollama",
    telemetry_name="ollama",
    base_url="http://127.0.0.1:11434",
    env_var="OLLAMA_API_KEY",
    key_required=False,  # only ollama.com has keys
    prefill=Prefill(),
    lists=model_lists.OLLAMA,
)
HOST_ENV_VAR = "OLLAMA_HOST"
"""The server's address if `api_base` is unset: HOST, HOST:PORT or a URL, as for Ollama's own programs."""
DEFAULT_PORT = 11_434


def host_url(host: str) -> str:
    """Return the URL that a value of OLLAMA_HOST stands for.

    The default port is 11434 without a scheme, and the scheme's default port with a scheme. A listen address of a
    server (0.0.0.0), which the variable may also hold, becomes the loopback address.

    Raises:
        ConfigError: the value is not a host, host:port or HTTP URL.
    """
    host = host.strip().strip("\"'")
    scheme, found, rest = host.partition("://")
    if not found:
        scheme, rest = "http", host
    try:
        url = urlsplit(f"{scheme if scheme in ('http', 'https') else ''}://{rest}")
        port = url.port or (None if found else DEFAULT_PORT)
    except ValueError:
        url, port = urlsplit(""), None
    if not url.scheme:
        raise ConfigError(f"{HOST_ENV_VAR}: expected a host, host:port, or an http:// or https:// URL, got {host!r}")
    name = url.hostname or "127.0.0.1"
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(name, name)  # noqa: S104  # not used for listening
    name = f"[{name}]" if ":" in name else name
    return f"{scheme}://{name}{f':{port}' if port else ''}{url.path.rstrip('/')}"


def _service(endpoint: str) -> Service:
    host = os.environ.get(HOST_ENV_VAR)
    service = attrs.evolve(SERVICE, base_url=host_url(host)) if host else SERVICE
    return service if endpoint == "chat" else attrs.evolve(service, framework=f"ollama-{endpoint}", prefill=None)


def _at_root(config: LLMConfig) -> LLMConfig:
    """Return `config` with the server's root as `api_base`, if `api_base` ends with the base path of an API."""
    base = (config.api_base or "").rstrip("/")
    root = base.removesuffix("/api").removesuffix("/v1")
    return attrs.evolve(config, api_base=root) if root != base else config


class OllamaProvider(HTTPProvider):
    """Provider for Ollama's `/api/chat`. `api_base` defaults to OLLAMA_HOST, or else http://127.0.0.1:11434."""

    def __init__(self, config: LLMConfig, *, transport: httpx.BaseTransport | None = None) -> None:
        super().__init__(OllamaCodec(), _service("chat"), _at_root(config), transport=transport)


class AsyncOllamaProvider(AsyncHTTPProvider):
    """Asynchronous variant of `OllamaProvider`."""

    def __init__(self, config: LLMConfig, *, transport: httpx.AsyncBaseTransport | None = None) -> None:
        super().__init__(OllamaCodec(), _service("chat"), _at_root(config), transport=transport)


class OllamaGenerateProvider(HTTPProvider):
    """Provider for Ollama's `/api/generate`: a single user message, with system text and images, without tools."""

    def __init__(self, config: LLMConfig, *, transport: httpx.BaseTransport | None = None) -> None:
        codec = OllamaCodec(endpoint="generate")
        super().__init__(codec, _service("generate"), _at_root(config), transport=transport)


class AsyncOllamaGenerateProvider(AsyncHTTPProvider):
    """Asynchronous variant of `OllamaGenerateProvider`."""

    def __init__(self, config: LLMConfig, *, transport: httpx.AsyncBaseTransport | None = None) -> None:
        codec = OllamaCodec(endpoint="generate")
        super().__init__(codec, _service("generate"), _at_root(config), transport=transport)
