"""Models that an Ollama server runs, through its own API: `/api/chat`, and `/api/generate` as `ollama-generate`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import attrs

from fluxibly.errors import ConfigError
from fluxibly.providers.dialects.codec import Service
from fluxibly.providers.dialects.ollama import OllamaCodec
from fluxibly.providers.http import AsyncHTTPProvider, HTTPProvider

if TYPE_CHECKING:
    import httpx

    from fluxibly.config import LLMConfig

SERVICE = Service(
    framework="ollama",
    telemetry_name="ollama",
    base_url="http://127.0.0.1:11434",
    env_var="OLLAMA_API_KEY",
    key_required=False,  # only ollama.com has keys
)
HOST_ENV_VAR = "OLLAMA_HOST"
"""Where the server is, if `api_base` does not say: HOST, HOST:PORT or a URL, as for Ollama's own programs."""
DEFAULT_PORT = 11_434


def host_url(host: str) -> str:
    """The URL that a value of OLLAMA_HOST stands for.

    Without a scheme the port is 11434 unless it says another; with one it is the scheme's. An address for servers to
    listen at (0.0.0.0), which the variable may hold too, becomes the loopback address.

    Raises:
        ConfigError: it stands for none.
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
        raise ConfigError(f"{HOST_ENV_VAR} is {host!r}; it should be a host, host:port, or an http:// or https:// URL")
    name = url.hostname or "127.0.0.1"
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(name, name)  # noqa: S104  # nothing listens there
    name = f"[{name}]" if ":" in name else name
    return f"{scheme}://{name}{f':{port}' if port else ''}{url.path.rstrip('/')}"


def _service(endpoint: str) -> Service:
    host = os.environ.get(HOST_ENV_VAR)
    service = attrs.evolve(SERVICE, base_url=host_url(host)) if host else SERVICE
    return service if endpoint == "chat" else attrs.evolve(service, framework=f"ollama-{endpoint}")


def _at_root(config: LLMConfig) -> LLMConfig:
    """`config` with `api_base` at the server's root, where it is the base of one of its APIs."""
    base = (config.api_base or "").rstrip("/")
    root = base.removesuffix("/api").removesuffix("/v1")
    return attrs.evolve(config, api_base=root) if root != base else config


class OllamaProvider(HTTPProvider):
    """Ollama's `/api/chat`. `api_base` None is what OLLAMA_HOST says, or http://127.0.0.1:11434."""

    def __init__(self, config: LLMConfig, *, transport: httpx.BaseTransport | None = None) -> None:
        super().__init__(OllamaCodec(), _service("chat"), _at_root(config), transport=transport)


class AsyncOllamaProvider(AsyncHTTPProvider):
    """`OllamaProvider`, asynchronous."""

    def __init__(self, config: LLMConfig, *, transport: httpx.AsyncBaseTransport | None = None) -> None:
        super().__init__(OllamaCodec(), _service("chat"), _at_root(config), transport=transport)


class OllamaGenerateProvider(HTTPProvider):
    """Ollama's `/api/generate`, which takes one user message, with system text and images, and no tools."""

    def __init__(self, config: LLMConfig, *, transport: httpx.BaseTransport | None = None) -> None:
        codec = OllamaCodec(endpoint="generate")
        super().__init__(codec, _service("generate"), _at_root(config), transport=transport)


class AsyncOllamaGenerateProvider(AsyncHTTPProvider):
    """`OllamaGenerateProvider`, asynchronous."""

    def __init__(self, config: LLMConfig, *, transport: httpx.AsyncBaseTransport | None = None) -> None:
        codec = OllamaCodec(endpoint="generate")
        super().__init__(codec, _service("generate"), _at_root(config), transport=transport)
