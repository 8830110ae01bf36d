"""Providers for Anthropic's models, and for every server that speaks the Messages API (llama.cpp, vLLM, …)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from fluxibly.providers.dialects.anthropic import AnthropicCodec
from fluxibly.providers.dialects.codec import Service
from fluxibly.providers.http import AsyncHTTPProvider, HTTPProvider

if TYPE_CHECKING:
    import httpx

    from fluxibly.config import LLMConfig

SERVICE = Service(
    framework="anthropic",
    telemetry_name="anthropic",
    base_url="https://api.anthropic.com/v1",
    env_var="ANTHROPIC_API_KEY",
    auth_header="x-api-key",
    auth_prefix="",
    headers=(("anthropic-version", "2023-06-01"),),
)


def _with_version(config: LLMConfig) -> LLMConfig:
    """Return `config` with `/v1` at the end of `api_base`, because Anthropic's own clients take it without `/v1`."""
    base = (config.api_base or "").rstrip("/")
    return attrs.evolve(config, api_base=f"{base}/v1") if base and not base.endswith("/v1") else config


class AnthropicProvider(HTTPProvider):
    """Provider for Anthropic's Messages API.

    The service requires `max_tokens`. If the request has no `max_tokens`, 4,096 is sent (more for models that think,
    see `dialects/anthropic.py`). `api_base` is the address with or without `/v1`.
    """

    def __init__(self, config: LLMConfig, *, transport: httpx.BaseTransport | None = None) -> None:
        super().__init__(AnthropicCodec(), SERVICE, _with_version(config), transport=transport)


class AsyncAnthropicProvider(AsyncHTTPProvider):
    """Asynchronous variant of `AnthropicProvider`."""

    def __init__(self, config: LLMConfig, *, transport: httpx.AsyncBaseTransport | None = None) -> None:
        super().__init__(AnthropicCodec(), SERVICE, _with_version(config), transport=transport)
