"""The providers that speak OpenAI's dialects, synchronous and asynchronous: OpenAI, and each preset under its name."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, ClassVar, Final
from urllib.parse import urlsplit

import attrs

from fluxibly.providers.http import AsyncHTTPProvider, HTTPProvider
from fluxibly.providers.openai_compatible import PRESETS, Preset

if TYPE_CHECKING:
    import httpx

    from fluxibly.config import LLMConfig
    from fluxibly.providers.dialects.codec import Codec, Service

AZURE_API_VERSION: Final = "2024-10-21"
"""What Azure is asked for unless `api_base` (with `?api-version=…`) or OPENAI_API_VERSION names another version."""


def service_of(preset: Preset, config: LLMConfig) -> Service:
    """The service of a preset. A server of the user's own at `api_base` may want no key."""
    if preset.service.framework.startswith("openai") and not _is_openai(config):
        return attrs.evolve(preset.service, key_required=False)
    return preset.service


def codec_of(preset: Preset, config: LLMConfig) -> Codec:
    """The codec of a preset's service, as one configuration reaches it."""
    quirks, title = preset.quirks, preset.title
    if preset.service.framework == "azure":
        quirks = attrs.evolve(quirks, path=azure_path(config.api_base or ""))
    elif preset.service.framework.startswith("openai"):
        if _is_openai(config):
            quirks = attrs.evolve(quirks, max_tokens="max_completion_tokens")
        else:
            title = urlsplit(config.api_base or "").hostname or title
    return preset.codec(quirks, title)


def _is_openai(config: LLMConfig) -> bool:
    return config.api_base is None or urlsplit(config.api_base).hostname == "api.openai.com"


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
    """OpenAI's chat completions, or those of any compatible server at `config.api_base`.

    Args:
        config: which model to call, and how.
        transport: what carries the requests instead of fluxibly's own connections: a mock, a proxy, a recorder.

    Raises:
        ConfigError: `api_base` is no URL.
        AuthenticationError: there is no API key, or one that no header can hold.
    """

    preset: ClassVar[Preset] = PRESETS["openai"]

    def __init__(self, config: LLMConfig, *, transport: httpx.BaseTransport | None = None) -> None:
        super().__init__(codec_of(self.preset, config), service_of(self.preset, config), config, transport=transport)


class AsyncOpenAIProvider(AsyncHTTPProvider):
    """`OpenAIProvider`, asynchronous."""

    preset: ClassVar[Preset] = PRESETS["openai"]

    def __init__(self, config: LLMConfig, *, transport: httpx.AsyncBaseTransport | None = None) -> None:
        super().__init__(codec_of(self.preset, config), service_of(self.preset, config), config, transport=transport)


class OpenAIResponsesProvider(OpenAIProvider):
    """OpenAI's Responses API, which gives a model's reasoning back to it between turns."""

    preset = PRESETS["openai-responses"]


class AsyncOpenAIResponsesProvider(AsyncOpenAIProvider):
    """`OpenAIResponsesProvider`, asynchronous."""

    preset = PRESETS["openai-responses"]


class AzureProvider(OpenAIProvider):
    """Azure OpenAI: the request's model is the name of the deployment."""

    preset = PRESETS["azure"]


class AsyncAzureProvider(AsyncOpenAIProvider):
    """`AzureProvider`, asynchronous."""

    preset = PRESETS["azure"]


class OpenRouterProvider(OpenAIProvider):
    """OpenRouter."""

    preset = PRESETS["openrouter"]


class AsyncOpenRouterProvider(AsyncOpenAIProvider):
    """`OpenRouterProvider`, asynchronous."""

    preset = PRESETS["openrouter"]


class GroqProvider(OpenAIProvider):
    """Groq."""

    preset = PRESETS["groq"]


class AsyncGroqProvider(AsyncOpenAIProvider):
    """`GroqProvider`, asynchronous."""

    preset = PRESETS["groq"]


class MistralProvider(OpenAIProvider):
    """Mistral."""

    preset = PRESETS["mistral"]


class AsyncMistralProvider(AsyncOpenAIProvider):
    """`MistralProvider`, asynchronous."""

    preset = PRESETS["mistral"]


class DeepSeekProvider(OpenAIProvider):
    """DeepSeek."""

    preset = PRESETS["deepseek"]


class AsyncDeepSeekProvider(AsyncOpenAIProvider):
    """`DeepSeekProvider`, asynchronous."""

    preset = PRESETS["deepseek"]


class MoonshotProvider(OpenAIProvider):
    """Moonshot (Kimi)."""

    preset = PRESETS["moonshot"]


class AsyncMoonshotProvider(AsyncOpenAIProvider):
    """`MoonshotProvider`, asynchronous."""

    preset = PRESETS["moonshot"]


class TogetherProvider(OpenAIProvider):
    """Together."""

    preset = PRESETS["together"]


class AsyncTogetherProvider(AsyncOpenAIProvider):
    """`TogetherProvider`, asynchronous."""

    preset = PRESETS["together"]


class FireworksProvider(OpenAIProvider):
    """Fireworks."""

    preset = PRESETS["fireworks"]


class AsyncFireworksProvider(AsyncOpenAIProvider):
    """`FireworksProvider`, asynchronous."""

    preset = PRESETS["fireworks"]


class XAIProvider(OpenAIProvider):
    """XAI (Grok)."""

    preset = PRESETS["xai"]


class AsyncXAIProvider(AsyncOpenAIProvider):
    """`XAIProvider`, asynchronous."""

    preset = PRESETS["xai"]


class PerplexityProvider(OpenAIProvider):
    """Perplexity."""

    preset = PRESETS["perplexity"]


class AsyncPerplexityProvider(AsyncOpenAIProvider):
    """`PerplexityProvider`, asynchronous."""

    preset = PRESETS["perplexity"]


class CerebrasProvider(OpenAIProvider):
    """Cerebras."""

    preset = PRESETS["cerebras"]


class AsyncCerebrasProvider(AsyncOpenAIProvider):
    """`CerebrasProvider`, asynchronous."""

    preset = PRESETS["cerebras"]


class HuggingFaceProvider(OpenAIProvider):
    """Hugging Face's router."""

    preset = PRESETS["huggingface"]


class AsyncHuggingFaceProvider(AsyncOpenAIProvider):
    """`HuggingFaceProvider`, asynchronous."""

    preset = PRESETS["huggingface"]


class NVIDIAProvider(OpenAIProvider):
    """NVIDIA's API catalogue."""

    preset = PRESETS["nvidia"]


class AsyncNVIDIAProvider(AsyncOpenAIProvider):
    """`NVIDIAProvider`, asynchronous."""

    preset = PRESETS["nvidia"]


class VLLMProvider(OpenAIProvider):
    """A vLLM server, by default this machine's."""

    preset = PRESETS["vllm"]


class AsyncVLLMProvider(AsyncOpenAIProvider):
    """`VLLMProvider`, asynchronous."""

    preset = PRESETS["vllm"]


class LMStudioProvider(OpenAIProvider):
    """LM Studio, by default this machine's."""

    preset = PRESETS["lmstudio"]


class AsyncLMStudioProvider(AsyncOpenAIProvider):
    """`LMStudioProvider`, asynchronous."""

    preset = PRESETS["lmstudio"]


class LlamaCppProvider(OpenAIProvider):
    """Llama.cpp's server, by default this machine's."""

    preset = PRESETS["llamacpp"]


class AsyncLlamaCppProvider(AsyncOpenAIProvider):
    """`LlamaCppProvider`, asynchronous."""

    preset = PRESETS["llamacpp"]
