"""Providers for Anthropic's models, and for every server that speaks the Messages API (llama.cpp, vLLM, …)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import attrs

from fluxibly.providers.addresses import with_address
from fluxibly.providers.dialects import model_lists
from fluxibly.providers.dialects.anthropic import PREFILL, AnthropicCodec
from fluxibly.providers.dialects.codec import Service
from fluxibly.providers.http import AsyncHTTPProvider, HTTPProvider

if TYPE_CHECKING:
    import httpx

    from fluxibly.config import LLMConfig
    from fluxibly.providers.dialects.batches import BatchAPI


def _batches() -> BatchAPI:
    from fluxibly.providers.dialects.anthropic_batches import AnthropicBatches

    return AnthropicBatches()


SERVICE = Service(
    framework="anthropic",
    telemetry_name="anthropic",
    base_url="https://api.anthropic.com/v1",
    env_var="ANTHROPIC_API_KEY",
    auth_header="x-api-key",
    auth_prefix="",
    headers=(("anthropic-version", "2023-06-01"),),
    prefill=PREFILL,
    lists=model_lists.ANTHROPIC,
    batches=_batches,
)


URL_VAR = "ANTHROPIC_BASE_URL"
TOKEN_VAR = "ANTHROPIC_AUTH_TOKEN"  # noqa: S105  # the name of a variable
"""The environment variable with a gateway's token, if ANTHROPIC_API_KEY is unset, as for Anthropic's own clients."""


def _service_of(config: LLMConfig) -> Service:
    if config.api_key is None and not os.environ.get(SERVICE.env_var or "") and os.environ.get(TOKEN_VAR):
        return attrs.evolve(SERVICE, env_var=TOKEN_VAR, auth_header="authorization", auth_prefix="Bearer ")
    return SERVICE


def _with_version(config: LLMConfig) -> LLMConfig:
    """Return `config` with `/v1` at the end of `api_base`, because Anthropic's own clients take it without `/v1`."""
    config = with_address(config, URL_VAR)
    base = (config.api_base or "").rstrip("/")
    return attrs.evolve(config, api_base=f"{base}/v1") if base and not base.endswith("/v1") else config


class AnthropicProvider(HTTPProvider):
    """Provider for Anthropic's Messages API.

    The service requires `max_tokens`. If the request has no `max_tokens`, 4,096 is sent (more for models that think,
    see `dialects/anthropic.py`). `api_base` is the address with or without `/v1`.
    """

    def __init__(self, config: LLMConfig, *, transport: httpx.BaseTransport | None = None) -> None:
        super().__init__(AnthropicCodec(), _service_of(config), _with_version(config), transport=transport)


class AsyncAnthropicProvider(AsyncHTTPProvider):
    """Asynchronous variant of `AnthropicProvider`."""

    def __init__(self, config: LLMConfig, *, transport: httpx.AsyncBaseTransport | None = None) -> None:
        super().__init__(AnthropicCodec(), _service_of(config), _with_version(config), transport=transport)
