"""Providers that speak OpenAI's dialects: OpenAI, and every service in `services.py`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from fluxibly._checks import is_list
from fluxibly.providers.addresses import with_address
from fluxibly.providers.dialects import model_lists
from fluxibly.providers.dialects.codec import Codec, Service
from fluxibly.providers.dialects.openai_chat import OpenAICodec
from fluxibly.providers.dialects.openai_request import Quirks
from fluxibly.providers.dialects.openai_responses import ResponsesCodec
from fluxibly.providers.http import AsyncHTTPProvider, HTTPProvider
from fluxibly.providers.services import OWN_SERVER, SERVICES, ServiceRow
from fluxibly.types import Prefill

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import httpx

    from fluxibly.config import LLMConfig
    from fluxibly.providers.dialects.batches import BatchAPI

AZURE_API_VERSION: Final = "2024-10-21"
"""The version for Azure, unless `api_base` (with `?api-version=…`) or OPENAI_API_VERSION names another version."""


def row_of(config: LLMConfig) -> ServiceRow:
    """Return the service that a configuration names; OpenAI for a user's own framework based on these classes."""
    return SERVICES.get(config.framework, SERVICES["openai"])


def service_of(row: ServiceRow, config: LLMConfig) -> Service:
    """Return the endpoint of a service for a configuration. A user's own server at `api_base` may not need a key."""
    # A key that a function gives is a token, and Azure takes a token of Entra ID as others take a key.
    is_token = row.key_by_call and callable(config.api_key)
    return Service(
        framework=row.framework,
        telemetry_name=row.telemetry_name or row.framework,
        base_url=row.base_url,
        url_var=row.url_var,
        env_var=row.env_var,
        key_required=row.key_required and not _is_users_own(row, config),
        key_by_call=row.key_by_call,
        auth_header="authorization" if is_token else row.auth_header,
        auth_prefix="Bearer " if is_token else row.auth_prefix,
        other_auth_headers=(row.auth_header,),
        prefill=_PREFILLS.get(quirks_of(row, config).get("prefill", "")),
        lists=_LISTS.get(row.framework, model_lists.OPENAI),
        batches=_BATCHES.get(row.framework),
    )


_LISTS: Final = {"azure": model_lists.AZURE, "perplexity": ()}
"""The lists of the services that differ. Perplexity's is of another API than the one that calls go to."""


def _batches_of(**settings: Any) -> Callable[[], BatchAPI]:
    def batches() -> BatchAPI:
        from fluxibly.providers.dialects.openai_batches import OpenAIBatches

        return OpenAIBatches(**settings)

    return batches


_BATCHES: Final = {
    "openai": _batches_of(),
    "openai-responses": _batches_of(endpoint="/v1/responses"),
    "groq": _batches_of(),
    "together": _batches_of(
        files="/files/upload",
        purpose="batch-api",
        upload_fields=(("file_name", "{label}.jsonl"), ("file_type", "jsonl")),
        metadata=False,
    ),
}
"""The services with OpenAI's batch API."""


_PREFILLS: Final[Mapping[str, Prefill]] = {
    "message": Prefill(),
    "prefix": Prefill(echoes=True),
    "continue_final_message": Prefill(body={"continue_final_message": True, "add_generation_prompt": False}),
}
"""The meaning of `Quirks.prefill` for middleware that goes on with a message."""


def quirks_of(row: ServiceRow, config: LLMConfig) -> dict[str, Any]:
    """Return the differences of a service's dialect for a configuration: fields of `Quirks`."""
    quirks = dict(row.quirks)
    if row.framework == "azure":
        quirks["path"] = azure_path(config.api_base or "")
    elif _is_users_own(row, config):
        quirks |= _returned_to(config.api_base or "")
    elif row.title == "OpenAI":
        quirks["max_tokens"] = "max_completion_tokens"
    return quirks | {name: tuple(value) if is_list(value) else value for name, value in config.quirks.items()}


def codec_of(row: ServiceRow, config: LLMConfig) -> Codec:
    """Return the codec of a service for a configuration."""
    quirks, title = quirks_of(row, config), row.title
    if _is_users_own(row, config):
        title = urlsplit(config.api_base or "").hostname or title
    codec = ResponsesCodec if quirks.get("path") == "/responses" else OpenAICodec
    return codec(Quirks(**quirks), title)


def _returned_to(api_base: str) -> Mapping[str, Any]:
    """Return the quirks that say what goes back to the server at an address: a known service's, or OWN_SERVER."""
    host = urlsplit(api_base).hostname
    for row in SERVICES.values():
        if row.base_url is not None and row.key_required and urlsplit(row.base_url).hostname == host:
            fields = ("reasoning_fields", "message_fields", "thinking_parts", "short_call_ids", "prefill")
            return {name: row.quirks.get(name, getattr(Quirks(), name)) for name in fields}
    return OWN_SERVER


def _is_users_own(row: ServiceRow, config: LLMConfig) -> bool:
    """Whether `openai` stands for another, compatible server here."""
    return (
        row.title == "OpenAI" and config.api_base is not None and urlsplit(config.api_base).hostname != "api.openai.com"
    )


def azure_path(api_base: str) -> str:
    """Return the path of Azure's chat completions below `api_base`.

    `api_base` is the resource's address (`https://NAME.openai.azure.com`), the address of a deployment below it, or
    the address that ends in `/openai/v1`, which needs no version.
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
    """Provider for OpenAI, for any compatible server at `config.api_base`, and for the services in `services.py`.

    `config.framework` selects the service and its dialect (chat completions or Responses). Logs and spans name the
    provider after the service ("GroqProvider").

    Args:
        config: the model to call, and the settings of calls.
        transport: carries the requests instead of fluxibly's own connections: a mock, a proxy, a recorder.

    Raises:
        ConfigError: `api_base` is not a URL.
        AuthenticationError: the API key is missing, or a header cannot hold it.
    """

    def __init__(self, config: LLMConfig, *, transport: httpx.BaseTransport | None = None) -> None:
        row = row_of(config)
        config = with_address(config, row.url_var, row.url_path)
        name = f"{row.name}Provider" if type(self) is OpenAIProvider else None
        super().__init__(codec_of(row, config), service_of(row, config), config, transport=transport, name=name)


class AsyncOpenAIProvider(AsyncHTTPProvider):
    """Asynchronous variant of `OpenAIProvider`."""

    def __init__(self, config: LLMConfig, *, transport: httpx.AsyncBaseTransport | None = None) -> None:
        row = row_of(config)
        config = with_address(config, row.url_var, row.url_path)
        name = f"{row.name}Provider" if type(self) is AsyncOpenAIProvider else None
        super().__init__(codec_of(row, config), service_of(row, config), config, transport=transport, name=name)
