"""Providers for Google's Gemini models, through the Gemini API."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

import attrs

from fluxibly.providers.addresses import with_address
from fluxibly.providers.dialects import model_lists
from fluxibly.providers.dialects.codec import Service
from fluxibly.providers.dialects.gemini import GeminiCodec
from fluxibly.providers.http import AsyncHTTPProvider, HTTPProvider

if TYPE_CHECKING:
    import httpx

    from fluxibly.config import LLMConfig

SERVICE = Service(
    framework="gemini",
    telemetry_name="gcp.gemini",
    base_url="https://generativelanguage.googleapis.com/v1beta",
    env_var="GEMINI_API_KEY",
    auth_header="x-goog-api-key",  # a key in the URL would end up in logs
    auth_prefix="",
    lists=model_lists.GEMINI,
)
OTHER_ENV_VAR = "GOOGLE_API_KEY"
"""The environment variable of the key if GEMINI_API_KEY is unset, as for Google's own clients."""
URL_VAR = "GOOGLE_GEMINI_BASE_URL"
"""The environment variable with the address, as for Google's own clients."""

_VERSION = re.compile(r"/v\d+\w*/?$")


def _service() -> Service:
    if not os.environ.get(SERVICE.env_var or "") and os.environ.get(OTHER_ENV_VAR):
        return attrs.evolve(SERVICE, env_var=OTHER_ENV_VAR)
    return SERVICE


def _with_version(config: LLMConfig) -> LLMConfig:
    """Return `config` with `/v1beta` at the end of `api_base`, unless `api_base` names a version."""
    config = with_address(config, URL_VAR)
    base = config.api_base
    if base is None or _VERSION.search(base):
        return config
    return attrs.evolve(config, api_base=f"{base.rstrip('/')}/v1beta")


class GeminiProvider(HTTPProvider):
    """Provider for the Gemini API. `api_base` is the address with or without the version (`/v1beta`)."""

    def __init__(self, config: LLMConfig, *, transport: httpx.BaseTransport | None = None) -> None:
        super().__init__(GeminiCodec(), _service(), _with_version(config), transport=transport)


class AsyncGeminiProvider(AsyncHTTPProvider):
    """Asynchronous variant of `GeminiProvider`."""

    def __init__(self, config: LLMConfig, *, transport: httpx.AsyncBaseTransport | None = None) -> None:
        super().__init__(GeminiCodec(), _service(), _with_version(config), transport=transport)
