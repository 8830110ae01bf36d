"""Providers for Cohere's models, and for every server that speaks version 2 of its Chat API (vLLM, …)."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import attrs

from fluxibly.providers.addresses import refuse_path, with_address
from fluxibly.providers.dialects import model_lists
from fluxibly.providers.dialects.codec import Service
from fluxibly.providers.dialects.cohere import CohereCodec
from fluxibly.providers.http import AsyncHTTPProvider, HTTPProvider

if TYPE_CHECKING:
    import httpx

    from fluxibly.config import LLMConfig

SERVICE = Service(
    framework="cohere",
    telemetry_name="cohere",
    base_url="https://api.cohere.com/v2",
    env_var="CO_API_KEY",
    lists=model_lists.COHERE,
)
OTHER_ENV_VAR = "COHERE_API_KEY"
"""The environment variable of the key if CO_API_KEY is unset, as for Cohere's own client."""
URL_VAR = "CO_API_URL"
"""The environment variable with the address, as for Cohere's own client."""
_ENDPOINT = re.compile(r"(?<=/v[12])/chat/?$|^/chat/?$")


def _service() -> Service:
    if not os.environ.get(SERVICE.env_var or "") and os.environ.get(OTHER_ENV_VAR):
        return attrs.evolve(SERVICE, env_var=OTHER_ENV_VAR)
    return SERVICE


def _with_version(config: LLMConfig) -> LLMConfig:
    """Return `config` with `/v2` at the end of `api_base`. Cohere's own `/v1` gives way to it, as in Cohere's client."""
    config = with_address(config, URL_VAR)
    refuse_path(config, _ENDPOINT)
    base = (config.api_base or "").rstrip("/")
    if not base or base.endswith("/v2"):
        return config
    url = urlsplit(base)
    if url.path == "/v1" and (url.hostname or "").endswith((".cohere.com", ".cohere.ai")):
        base = base.removesuffix("/v1")
    return attrs.evolve(config, api_base=f"{base}/v2")


class CohereProvider(HTTPProvider):
    """Provider for Cohere's Chat API. `api_base` is the address with or without the version (`/v2`)."""

    def __init__(self, config: LLMConfig, *, transport: httpx.BaseTransport | None = None) -> None:
        super().__init__(CohereCodec(), _service(), _with_version(config), transport=transport)


class AsyncCohereProvider(AsyncHTTPProvider):
    """Asynchronous variant of `CohereProvider`."""

    def __init__(self, config: LLMConfig, *, transport: httpx.AsyncBaseTransport | None = None) -> None:
        super().__init__(CohereCodec(), _service(), _with_version(config), transport=transport)
