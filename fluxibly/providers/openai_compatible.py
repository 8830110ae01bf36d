"""The services that speak OpenAI's chat dialect, as data: where each is, how it wants its key, and its quirks.

A service that is not here needs no entry: `framework="openai"` with `api_base` reaches any compatible server.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import attrs

from fluxibly.providers.dialects.codec import Codec, Service
from fluxibly.providers.dialects.openai_chat import OpenAICodec
from fluxibly.providers.dialects.openai_request import Quirks
from fluxibly.providers.dialects.openai_responses import ResponsesCodec


@attrs.frozen
class Preset:
    """A service and how it differs. `title` is its name for people."""

    title: str
    service: Service
    quirks: Quirks = attrs.field(factory=Quirks)
    codec: Callable[[Quirks, str], Codec] = OpenAICodec


def _preset(
    framework: str,
    title: str,
    base_url: str | None,
    env_var: str | None,
    quirks: Quirks | None = None,
    *,
    telemetry_name: str | None = None,
    key_required: bool = True,
    auth_header: str = "authorization",
    auth_prefix: str = "Bearer ",
    codec: Callable[[Quirks, str], Codec] = OpenAICodec,
) -> Preset:
    service = Service(
        framework=framework,
        telemetry_name=telemetry_name or framework,
        base_url=base_url,
        env_var=env_var,
        key_required=key_required,
        auth_header=auth_header,
        auth_prefix=auth_prefix,
    )
    return Preset(title, service, quirks or Quirks(), codec)


_TOP_K: Final = Quirks(top_k=True)

# `telemetry_name` is a well-known value of `gen_ai.provider.name` in the OpenTelemetry semantic conventions where there
# is one, else the framework's name.
PRESETS: Final[Mapping[str, Preset]] = {
    preset.service.framework: preset
    for preset in (
        _preset("openai", "OpenAI", "https://api.openai.com/v1", "OPENAI_API_KEY", Quirks(max_tokens="by model")),
        _preset(
            "openai-responses",
            "OpenAI",
            "https://api.openai.com/v1",
            "OPENAI_API_KEY",
            Quirks(path="/responses"),
            telemetry_name="openai",
            codec=ResponsesCodec,
        ),
        _preset(
            "azure",
            "Azure OpenAI",
            None,
            "AZURE_OPENAI_API_KEY",
            Quirks(max_tokens="by model", path="/openai/deployments/{model}/chat/completions"),
            telemetry_name="azure.ai.openai",
            auth_header="api-key",
            auth_prefix="",
        ),
        _preset("openrouter", "OpenRouter", "https://openrouter.ai/api/v1", "OPENROUTER_API_KEY", _TOP_K),
        _preset("groq", "Groq", "https://api.groq.com/openai/v1", "GROQ_API_KEY", Quirks(lacks=("n",))),
        _preset(
            "mistral",
            "Mistral",
            "https://api.mistral.ai/v1",
            "MISTRAL_API_KEY",
            Quirks(seed="random_seed", stream_usage=False, short_call_ids=True),
            telemetry_name="mistral_ai",
        ),
        _preset(
            "deepseek",
            "DeepSeek",
            "https://api.deepseek.com",
            "DEEPSEEK_API_KEY",
            Quirks(lacks=("n", "seed"), formats=("text", "json"), returns_reasoning=True),
        ),
        _preset(
            "moonshot",
            "Moonshot",
            "https://api.moonshot.ai/v1",
            "MOONSHOT_API_KEY",
            Quirks(returns_reasoning=True),
            telemetry_name="moonshot_ai",
        ),
        _preset("together", "Together", "https://api.together.xyz/v1", "TOGETHER_API_KEY", _TOP_K),
        _preset("fireworks", "Fireworks", "https://api.fireworks.ai/inference/v1", "FIREWORKS_API_KEY", _TOP_K),
        _preset("xai", "xAI", "https://api.x.ai/v1", "XAI_API_KEY", telemetry_name="x_ai"),
        _preset(
            "perplexity",
            "Perplexity",
            "https://api.perplexity.ai",
            "PERPLEXITY_API_KEY",
            Quirks(top_k=True, lacks=("seed",), formats=("text", "schema"), stream_usage=False),
        ),
        _preset("cerebras", "Cerebras", "https://api.cerebras.ai/v1", "CEREBRAS_API_KEY"),
        _preset("huggingface", "Hugging Face", "https://router.huggingface.co/v1", "HF_TOKEN"),
        _preset("nvidia", "NVIDIA", "https://integrate.api.nvidia.com/v1", "NVIDIA_API_KEY"),
        _preset("vllm", "vLLM", "http://localhost:8000/v1", "VLLM_API_KEY", _TOP_K, key_required=False),
        _preset("lmstudio", "LM Studio", "http://localhost:1234/v1", "LMSTUDIO_API_KEY", _TOP_K, key_required=False),
        _preset("llamacpp", "llama.cpp", "http://localhost:8080/v1", "LLAMA_API_KEY", _TOP_K, key_required=False),
    )
}
"""By the framework's name."""
