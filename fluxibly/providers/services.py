"""Services that speak OpenAI's dialects, a row each: the address, the key, and the differences of the dialect.

Other services do not need a row: `framework="openai"` with `api_base` reaches any compatible server. This module
imports nothing heavy, because the registry reads the rows before any provider is loaded. `openai.py` turns the rows
into providers.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, NamedTuple


class ServiceRow(NamedTuple):
    """A service that speaks a dialect of OpenAI's."""

    framework: str
    """The name in configurations."""
    name: str
    """The name in logs, which append "Provider"."""
    title: str
    """The name in error messages."""
    base_url: str | None
    """None: the user must set `api_base`."""
    env_var: str
    """The environment variable with the API key."""
    quirks: Mapping[str, Any] = MappingProxyType({})
    """Differences of the dialect: fields of `Quirks` in `dialects/openai_request.py`."""
    telemetry_name: str | None = None
    """The well-known value of `gen_ai.provider.name` (OpenTelemetry semantic conventions), if it is not `framework`."""
    key_required: bool = True
    auth_header: str = "authorization"
    auth_prefix: str = "Bearer "
    key_by_call: bool = False
    """Whether calls may have an `Authorization` header instead of a key: the tokens of Entra ID."""
    url_var: str | None = None
    """The environment variable from which the vendor's own client takes the address."""
    url_path: str = ""
    """The path that the vendor's client appends to that address."""


_TOP_K: Final = {"top_k": True}
_BOTH: Final = ("reasoning_content", "reasoning")
_OPENAI: Final[Mapping[str, Any]] = {"max_tokens": "by model", "message_fields": ("audio", "refusal")}

OWN_SERVER: Final[Mapping[str, Any]] = {
    "reasoning_fields": _BOTH,
    "message_fields": (
        "audio",
        "extra_content",
        "images",
        "provider_specific_fields",
        "reasoning_details",
        "refusal",
        "thinking_blocks",
    ),
}
"""The quirks of a server of the user's own: it takes back every field that it sent."""
_LOCAL: Final[Mapping[str, Any]] = {"top_k": True, **OWN_SERVER}

SERVICES: Final[Mapping[str, ServiceRow]] = {
    row.framework: row
    for row in (
        ServiceRow(
            "openai",
            "OpenAI",
            "OpenAI",
            "https://api.openai.com/v1",
            "OPENAI_API_KEY",
            _OPENAI,
            url_var="OPENAI_BASE_URL",
        ),
        ServiceRow(
            "openai-responses",
            "OpenAIResponses",
            "OpenAI",
            "https://api.openai.com/v1",
            "OPENAI_API_KEY",
            {"path": "/responses"},
            telemetry_name="openai",
            url_var="OPENAI_BASE_URL",
        ),
        ServiceRow(
            "azure",
            "Azure",
            "Azure OpenAI",
            None,
            "AZURE_OPENAI_API_KEY",
            _OPENAI,
            telemetry_name="azure.ai.openai",
            auth_header="api-key",
            auth_prefix="",
            url_var="AZURE_OPENAI_ENDPOINT",
            key_by_call=True,
        ),
        ServiceRow(
            "openrouter",
            "OpenRouter",
            "OpenRouter",
            "https://openrouter.ai/api/v1",
            "OPENROUTER_API_KEY",
            {"top_k": True, "reasoning_fields": _BOTH, "message_fields": ("images", "reasoning_details")},
        ),
        ServiceRow(
            "groq",
            "Groq",
            "Groq",
            "https://api.groq.com/openai/v1",
            "GROQ_API_KEY",
            {"lacks": ("n",), "prefill": "message"},
            url_var="GROQ_BASE_URL",
            url_path="/openai/v1",
        ),
        ServiceRow(
            "mistral",
            "Mistral",
            "Mistral",
            "https://api.mistral.ai/v1",
            "MISTRAL_API_KEY",
            {
                "seed": "random_seed",
                "stream_usage": False,
                "short_call_ids": True,
                "thinking_parts": True,
                "prefill": "prefix",
            },
            telemetry_name="mistral_ai",
        ),
        ServiceRow(
            "deepseek",
            "DeepSeek",
            "DeepSeek",
            "https://api.deepseek.com",
            "DEEPSEEK_API_KEY",
            {"lacks": ("n", "seed"), "formats": ("text", "json"), "reasoning_fields": ("reasoning_content",)},
        ),
        ServiceRow(
            "moonshot",
            "Moonshot",
            "Moonshot",
            "https://api.moonshot.ai/v1",
            "MOONSHOT_API_KEY",
            {"reasoning_fields": ("reasoning_content",)},
            telemetry_name="moonshot_ai",
        ),
        ServiceRow(
            "together",
            "Together",
            "Together",
            "https://api.together.xyz/v1",
            "TOGETHER_API_KEY",
            _TOP_K,
            url_var="TOGETHER_BASE_URL",
        ),
        ServiceRow(
            "fireworks",
            "Fireworks",
            "Fireworks",
            "https://api.fireworks.ai/inference/v1",
            "FIREWORKS_API_KEY",
            _TOP_K,
            url_var="FIREWORKS_BASE_URL",
            url_path="/inference/v1",
        ),
        ServiceRow(
            "xai",
            "XAI",
            "xAI",
            "https://api.x.ai/v1",
            "XAI_API_KEY",
            {"reasoning_fields": ("reasoning_content",)},
            telemetry_name="x_ai",
        ),
        ServiceRow(
            "xai-responses",
            "XAIResponses",
            "xAI",
            "https://api.x.ai/v1",
            "XAI_API_KEY",
            {"path": "/responses"},
            telemetry_name="x_ai",
        ),
        ServiceRow(
            "zai",
            "ZAI",
            "Z.AI",
            "https://api.z.ai/api/paas/v4",
            "ZAI_API_KEY",
            {
                "lacks": ("n", "frequency_penalty", "presence_penalty"),
                "formats": ("text", "json"),
                "reasoning_fields": ("reasoning_content",),
            },
            url_var="ZAI_BASE_URL",
        ),
        ServiceRow(
            "dashscope",
            "DashScope",
            "DashScope",
            "https://dashscope-intl.aliyuncs.com/compatible-mode/v1",
            "DASHSCOPE_API_KEY",
            {"top_k": True, "lacks": ("frequency_penalty",), "reasoning_fields": ("reasoning_content",)},
        ),
        ServiceRow(
            "minimax",
            "MiniMax",
            "MiniMax",
            "https://api.minimax.io/v1",
            "MINIMAX_API_KEY",
            {
                "lacks": ("n", "seed", "frequency_penalty", "presence_penalty"),
                "formats": ("text", "json"),
                "reasoning_fields": ("reasoning_content",),
                "message_fields": ("reasoning_details",),
            },
        ),
        ServiceRow(
            "sambanova",
            "SambaNova",
            "SambaNova",
            "https://api.sambanova.ai/v1",
            "SAMBANOVA_API_KEY",
            {"top_k": True, "lacks": ("frequency_penalty", "presence_penalty"), "reasoning_fields": ("reasoning",)},
            url_var="SAMBA_NOVA_BASE_URL",
        ),
        ServiceRow(
            "github",
            "GitHub",
            "GitHub Models",
            "https://models.github.ai/inference",
            "GITHUB_TOKEN",
            {"max_tokens": "by model", "lacks": ("n",)},
        ),
        ServiceRow(
            "perplexity",
            "Perplexity",
            "Perplexity",
            "https://api.perplexity.ai",
            "PERPLEXITY_API_KEY",
            {"top_k": True, "lacks": ("seed",), "formats": ("text", "schema"), "stream_usage": False},
            url_var="PERPLEXITY_BASE_URL",
        ),
        ServiceRow(
            "cerebras",
            "Cerebras",
            "Cerebras",
            "https://api.cerebras.ai/v1",
            "CEREBRAS_API_KEY",
            url_var="CEREBRAS_BASE_URL",
            url_path="/v1",
        ),
        ServiceRow(
            "huggingface",
            "HuggingFace",
            "Hugging Face",
            "https://router.huggingface.co/v1",
            "HF_TOKEN",
        ),
        ServiceRow(
            "nvidia",
            "NVIDIA",
            "NVIDIA",
            "https://integrate.api.nvidia.com/v1",
            "NVIDIA_API_KEY",
            url_var="NVIDIA_BASE_URL",
        ),
        ServiceRow(
            "vllm",
            "VLLM",
            "vLLM",
            "http://localhost:8000/v1",
            "VLLM_API_KEY",
            {**_LOCAL, "prefill": "continue_final_message"},
            key_required=False,
        ),
        ServiceRow(
            "lmstudio",
            "LMStudio",
            "LM Studio",
            "http://localhost:1234/v1",
            "LMSTUDIO_API_KEY",
            _LOCAL,
            key_required=False,
        ),
        ServiceRow(
            "llamacpp",
            "LlamaCpp",
            "llama.cpp",
            "http://localhost:8080/v1",
            "LLAMA_API_KEY",
            {**_LOCAL, "prefill": "message"},
            key_required=False,
        ),
    )
}
"""The services, by the framework's name."""

ALIASES: Final[Mapping[str, str]] = {
    alias: framework
    for framework, aliases in {
        "openai": "gpt chatgpt oai openaiapi openaichat openaicompatible",
        "openai-responses": "responses responsesapi",
        "azure": "azureopenai azureai azureaifoundry aoai microsoft",
        "anthropic": "claude anthropicai",
        "gemini": "google googleai googlegemini googlegenai googlegenerativeai googleaistudio genai",
        "huggingface": "hf huggingfacehub",
        "together": "togetherai",
        "mistral": "mistralai",
        "fireworks": "fireworksai",
        "perplexity": "perplexityai pplx sonar",
        "moonshot": "kimi moonshotai",
        "xai": "grok",
        "zai": "glm zhipu zhipuai bigmodel",
        "minimax": "minimaxai",
        "sambanova": "sambanovacloud",
        "github": "githubmodels",
        "nvidia": "nim nvidianim",
        "groq": "groqcloud",
        "llamacpp": "llamaserver llamacppserver",
        "local": "gguf xllamacpp smollm2",
        "bedrock": "aws amazon amazonbedrock awsbedrock",
        "vertex": "vertexai googlevertex googlevertexai gcp",
        "cohere": "cohereai",
        "dashscope": "qwen alibaba alibabacloud aliyun tongyi modelstudio bailian",
    }.items()
    for alias in aliases.split()
}
"""Other names that users try for a service: in small letters, without spaces and punctuation."""
MODEL_FAMILIES: Final = frozenset({"glm", "gguf", "kimi", "qwen", "smollm2"})
"""The names in `ALIASES` that Ollama's models have too: "qwen:7b" is a model with a tag, and no "framework:model"."""

_MODEL_NAMES: Final[Mapping[str, str]] = {
    "gpt-": "openai",
    "chatgpt-": "openai",
    "o1": "openai",
    "o3": "openai",
    "o4": "openai",
    "claude-": "anthropic",
    "gemini-": "gemini",
    "mistral-": "mistral",
    "deepseek-": "deepseek",
    "grok-": "xai",
}
"""How the names of models begin that one vendor is known by, and the framework of that vendor."""


def framework_of_model(name: str) -> str | None:
    """Return the framework whose vendor a bare name of a model is known by, such as "anthropic" for "claude-sonnet-4-5"."""
    return next((framework for begins, framework in _MODEL_NAMES.items() if name.startswith(begins)), None)


OWN_MODELS: Final[Mapping[str, str]] = {
    "anthropic": "anthropic",
    "cohere": "cohere",
    "deepseek": "deepseek",
    "echo": "echo",
    "gemini": "gemini",
    "minimax": "minimax",
    "mistral": "mistral",
    "moonshot": "moonshot",
    "openai": "openai",
    "openai-responses": "openai",
    "perplexity": "perplexity",
    "xai": "xai",
    "xai-responses": "xai",
    "zai": "zai",
}
"""The frameworks that have the models of one vendor alone, and the vendor's framework. Others serve the models of many."""
