"""The services that LiteLLM asks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fluxibly.errors import BadRequest, ConfigError

_TELEMETRY_NAMES = {
    "azure": "azure.ai.openai",
    "bedrock": "aws.bedrock",
    "gemini": "gcp.gemini",
    "mistral": "mistral_ai",
    "vertex_ai": "gcp.vertex_ai",
    "watsonx": "ibm.watsonx.ai",
    "xai": "x_ai",
}
_FALLBACKS = ("fallbacks", "context_window_fallback_dict", "model_list", "model_fallbacks")
"""The keywords with which LiteLLM asks other models than the requested one, and its global setting."""


def telemetry_name(service: str) -> str:
    """Return `gen_ai.provider.name` for LiteLLM's name of a service."""
    return _TELEMETRY_NAMES.get(service, service)


def service_of(litellm: Any, model: str, settings: Mapping[str, Any], api_base: str | None) -> str:
    """Return LiteLLM's name for the service of a model, or an empty string if LiteLLM does not know the service."""
    given = settings.get("custom_llm_provider")
    try:
        return str(litellm.get_llm_provider(model=model, custom_llm_provider=given, api_base=api_base)[1])
    except Exception:  # noqa: BLE001  # LiteLLM's own exception, with a message of many lines
        return ""


def check_fallbacks(settings: Mapping[str, Any], path: str, kind: type[BadRequest | ConfigError]) -> None:
    """Refuse settings with which LiteLLM itself would ask other models. `path` precedes their names in the message.

    LiteLLM would send the key and the headers of one service to another, cannot stream the other's answer synchronously,
    and does not say reliably who answered.

    Raises:
        BadRequest, ConfigError: there is such a setting; `kind` is the class.
    """
    found = next((name for name in _FALLBACKS if settings.get(name) is not None), None)
    if found is not None:
        raise kind(
            f"{path}{found}: expected none of LiteLLM's own fallbacks; use the middleware "
            'Fallback(to=["provider:model", …])'
        )
