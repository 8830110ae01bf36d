"""OpenAI, and every service in `services.py`: the providers that speak OpenAI's dialects."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from fluxibly.providers.dialects.codec import Codec, Service
from fluxibly.providers.dialects.openai_chat import OpenAICodec
from fluxibly.providers.dialects.openai_request import Quirks
from fluxibly.providers.dialects.openai_responses import ResponsesCodec
from fluxibly.providers.http import AsyncHTTPProvider, HTTPProvider
from fluxibly.providers.services import SERVICES, ServiceRow

if TYPE_CHECKING:
    import httpx

    from fluxibly.config import LLMConfig

AZURE_API_VERSION: Final = "2024-10-21"
"""What Azure is asked for unless `api_base` (with `?api-version=…`) or OPENAI_API_VERSION names another version."""


def row_of(config: LLMConfig) -> ServiceRow:
    """The service that a configuration names; OpenAI's for a framework of the user's own that stands on these classes."""
    return SERVICES.get(config.framework, SERVICES["openai"])


def service_of(row: ServiceRow, config: LLMConfig) -> Service:
    """Where a service is, as one configuration reaches it. A server of the user's own at `api_base` may want no key."""
    return Service(
        framework=row.framework,
        telemetry_name=row.telemetry_name or row.framework,
        base_url=row.base_url,
        env_var=row.env_var,
        key_required=row.key_required and not _is_users_own(row, config),
        auth_header=row.auth_header,
        auth_prefix=row.auth_prefix,
    )


def codec_of(row: ServiceRow, config: LLMConfig) -> Codec:
    """The codec of a service, as one configuration reaches it."""
    quirks, title = dict(row.quirks), row.title
    if row.framework == "azure":
        quirks["path"] = azure_path(config.api_base or "")
    elif _is_users_own(row, config):
        title = urlsplit(config.api_base or "").hostname or title
    elif row.title == "OpenAI":
        quirks["max_tokens"] = "max_completion_tokens"
    codec = ResponsesCodec if row.framework == "openai-responses" else OpenAICodec
    return codec(Quirks(**quirks), title)


def _is_users_own(row: ServiceRow, config: LLMConfig) -> bool:
    """Whether `openai` is the name of another server here, one that is compatible."""
    return (
        row.title == "OpenAI" and config.api_base is not None and urlsplit(config.api_base).hostname != "api.openai.com"
    )


def azure_path(api_base: str) -> str:
    """Where Azure's chat completions are below `api_base`.

    That is the resource's address (`https://NAME.openai.azure.com`), the address of a deployment below it, or the one
    that ends in `/openai/v1`, which needs no version.
    """
    base = urlsplit(api_base)
    path = "/chat/completions"
    if base.path.rstrip("/").endswith("/v1"):
        return path
    if "/deployments/" not in base.path:
        path = ("" if base.path.rstrip("/").endswith("/openai") else "/openai") + "/deployments/{model}" + path
    if "api-version=" in base.query:
        return path
    return f"{path}?api-version={os.environ.get('OPENAI_API_VERSION') or AZURE_API_VERSION}"


class OpenAIProvider(HTTPProvider):
    """OpenAI's chat completions, those of any compatible server at `config.api_base`, or a service of `services.py`.

    Which service, and in which of OpenAI's dialects, is said by `config.framework`; logs and spans name the provider
    after it ("GroqProvider").

    Args:
        config: which model to call, and how.
        transport: what carries the requests instead of fluxibly's own connections: a mock, a proxy, a recorder.

    Raises:
        ConfigError: `api_base` is no URL.
        AuthenticationError: there is no API key, or one that no header can hold.
    """

    def __init__(self, config: LLMConfig, *, transport: httpx.BaseTransport | None = None) -> None:
        row = row_of(config)
        name = f"{row.name}Provider" if type(self) is OpenAIProvider else None
        super().__init__(codec_of(row, config), service_of(row, config), config, transport=transport, name=name)


class AsyncOpenAIProvider(AsyncHTTPProvider):
    """`OpenAIProvider`, asynchronous."""

    def __init__(self, config: LLMConfig, *, transport: httpx.AsyncBaseTransport | None = None) -> None:
        row = row_of(config)
        name = f"{row.name}Provider" if type(self) is AsyncOpenAIProvider else None
        super().__init__(codec_of(row, config), service_of(row, config), config, transport=transport, name=name)
