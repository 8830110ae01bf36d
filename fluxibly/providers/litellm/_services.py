"""The services that LiteLLM asks: the service of the requested model, and the services that LiteLLM falls back to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from fluxibly.errors import BadRequest
from fluxibly.providers._libraries.services import Services
from fluxibly.providers.dialects.json_values import as_array, as_object
from fluxibly.types import CallRecord

_TELEMETRY_NAMES = {
    "azure": "azure.ai.openai",
    "bedrock": "aws.bedrock",
    "gemini": "gcp.gemini",
    "mistral": "mistral_ai",
    "vertex_ai": "gcp.vertex_ai",
    "watsonx": "ibm.watsonx.ai",
    "xai": "x_ai",
}
_ATTEMPTED = "x-litellm-attempted-fallbacks"
"""The header with the number of the entry of `fallbacks` that answered, from 1; 0 is the model that was asked first."""


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


def without_access(
    litellm: Any, fallbacks: list[Any], service: str, keywords: Mapping[str, Any], headers: Mapping[str, str]
) -> list[Any]:
    """Return LiteLLM's `fallbacks`, without the key, address and headers of `service` in fallbacks to other services.

    `headers` are those of the call, which go to every service. LiteLLM passes all keywords of the call to each fallback, except the keywords that the fallback sets itself.
    """
    kept: list[Any] = []
    for fallback in fallbacks:
        settings = _settings_of(fallback, keywords)
        other = service_of(litellm, settings["model"], settings, settings.get("api_base")) != service
        none = {"api_key": None, "api_base": None, "extra_headers": dict(headers)}
        kept.append({**none, **_changes(fallback)} if other else fallback)
    return kept


def check_long_prompts(litellm: Any, service: str, keywords: Mapping[str, Any]) -> None:
    """Refuse a fallback for long prompts if LiteLLM would send what `service` gets to another service's address.

    Raises:
        BadRequest: LiteLLM would send the key or the headers. The message names the alternatives.
    """
    model = as_object(keywords.get("context_window_fallback_dict")).get(keywords["model"])
    if model is None or "api_base" in keywords:
        return
    if service_of(litellm, model, keywords, None) != service:
        raise BadRequest(
            f"LiteLLM would send the configured key and headers to {model!r}, which is at another service: use "
            "`fallbacks`, or set the key in the environment instead of the config"
        )


def _changes(fallback: object) -> dict[str, Any]:
    return cast("dict[str, Any]", fallback) if isinstance(fallback, dict) else {"model": fallback}


def _settings_of(fallback: object, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords with which LiteLLM calls a fallback."""
    return {**keywords, **_changes(fallback)}


class Answerer:
    """The `service` that answers a call, recorded on the call. At first it is the service that is asked.

    Args:
        litellm: the library.
        services: the services of the provider.
        call: the record of the call, on which the service is recorded.
        service: the service that is asked; empty if LiteLLM does not know it.
        keywords: the keywords with which LiteLLM is called.
    """

    def __init__(
        self, litellm: Any, services: Services, call: CallRecord, service: str, keywords: Mapping[str, Any]
    ) -> None:
        self._litellm = litellm
        self._services = services
        self._call = call
        self._service = self.service = service
        self._keywords = keywords
        self._note_service(service, keywords)

    def read(self, answer: Any) -> None:
        """Record which service sent an answer or a stream, as far as LiteLLM reports it.

        The metadata of a whole answer always has the first model and address, even if a fallback answered, so it is
        not used.
        """
        hidden: Any = getattr(answer, "_hidden_params", None) or {}
        settings = self._fallback(hidden) or self._for_long_prompts(hidden, answer)
        if settings is not None:
            self._call.sent_model = settings["model"]
            self.service = self._service_of(settings)
            self._note_service(self.service, settings)

    def _fallback(self, hidden: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the keywords of the entry of `fallbacks` that answered."""
        fallbacks = as_array(self._keywords.get("fallbacks"))
        number = as_object(hidden.get("additional_headers")).get(_ATTEMPTED)
        if not isinstance(number, int) or not 0 < number <= len(fallbacks):
            return None
        return _settings_of(fallbacks[number - 1], self._keywords)

    def _for_long_prompts(self, hidden: Mapping[str, Any], answer: Any) -> dict[str, Any] | None:
        """Return the keywords of the fallback for prompts that are too long, if the answer names its service."""
        model = as_object(self._keywords.get("context_window_fallback_dict")).get(self._keywords["model"])
        if model is None:
            return None
        settings = {**self._keywords, "model": model}
        reported = hidden.get("custom_llm_provider") or getattr(answer, "custom_llm_provider", None)
        return settings if reported != self._service and reported == self._service_of(settings) else None

    def _service_of(self, settings: Mapping[str, Any]) -> str:
        return service_of(self._litellm, settings["model"], settings, settings.get("api_base"))

    def _note_service(self, service: str, settings: Mapping[str, Any]) -> None:
        if service:
            reported = self._services.at(telemetry_name(service), settings.get("api_base"))
            self._services.note(self._call, reported)
