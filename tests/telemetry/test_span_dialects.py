"""The attributes of spans for each service: its well-known name, its tokens, and its normalised finish reasons."""

from __future__ import annotations

import json

import httpx
import pytest
from support.tracing_tools import Recorder

from fluxibly.config import LLMConfig
from fluxibly.pipeline import Pipeline
from fluxibly.providers.anthropic import AnthropicProvider
from fluxibly.providers.gemini import GeminiProvider
from fluxibly.providers.ollama import OllamaProvider
from fluxibly.providers.openai import OpenAIProvider
from fluxibly.registry import make_provider
from fluxibly.types import Request

NAMES = {
    "openai": ("openai", "api.openai.com", 443),
    "openai-responses": ("openai", "api.openai.com", 443),
    "azure": ("azure.ai.openai", "mine.openai.azure.com", 443),
    "anthropic": ("anthropic", "api.anthropic.com", 443),
    "cohere": ("cohere", "api.cohere.com", 443),
    "gemini": ("gcp.gemini", "generativelanguage.googleapis.com", 443),
    "groq": ("groq", "api.groq.com", 443),
    "mistral": ("mistral_ai", "api.mistral.ai", 443),
    "deepseek": ("deepseek", "api.deepseek.com", 443),
    "moonshot": ("moonshot_ai", "api.moonshot.ai", 443),
    "perplexity": ("perplexity", "api.perplexity.ai", 443),
    "xai": ("x_ai", "api.x.ai", 443),
    "xai-responses": ("x_ai", "api.x.ai", 443),
    "zai": ("zai", "api.z.ai", 443),
    "dashscope": ("dashscope", "dashscope-intl.aliyuncs.com", 443),
    "minimax": ("minimax", "api.minimax.io", 443),
    "sambanova": ("sambanova", "api.sambanova.ai", 443),
    "github": ("github", "models.github.ai", 443),
    "openrouter": ("openrouter", "openrouter.ai", 443),
    "ollama": ("ollama", "127.0.0.1", 11434),
    "vllm": ("vllm", "localhost", 8000),
}
"""By framework: `gen_ai.provider.name` (the value of the semantic conventions if they define it), address and port."""
OPENAI = {
    "id": "r-1",
    "model": "m-2026",
    "choices": [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"word": "life"}'}}
                ],
            },
            "finish_reason": "tool_calls",
        }
    ],
    "usage": {
        "prompt_tokens": 9,
        "completion_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 4},
        "completion_tokens_details": {"reasoning_tokens": 5},
    },
}
ANTHROPIC = {
    "id": "r-1",
    "type": "message",
    "role": "assistant",
    "model": "m-2026",
    "content": [{"type": "text", "text": "hi"}],
    "stop_reason": "max_tokens",
    "usage": {
        "input_tokens": 3,
        "cache_read_input_tokens": 4,
        "cache_creation_input_tokens": 2,
        "output_tokens": 8,
    },
}
GEMINI = {
    "responseId": "r-1",
    "modelVersion": "m-2026",
    "candidates": [{"content": {"role": "model", "parts": [{"text": "hi"}]}, "finishReason": "MAX_TOKENS"}],
    "usageMetadata": {
        "promptTokenCount": 9,
        "candidatesTokenCount": 3,
        "thoughtsTokenCount": 5,
        "cachedContentTokenCount": 4,
    },
}
OLLAMA = {
    "model": "m-2026",
    "message": {"role": "assistant", "content": "hi"},
    "done": True,
    "done_reason": "stop",
    "prompt_eval_count": 9,
    "eval_count": 8,
}
DIALECTS = {
    "openai": (OpenAIProvider, OPENAI, "tool_call", {"cache_read.input": 4, "reasoning.output": 5}),
    "anthropic": (AnthropicProvider, ANTHROPIC, "length", {"cache_read.input": 4, "cache_write.input": 2}),
    "gemini": (GeminiProvider, GEMINI, "length", {"cache_read.input": 4, "reasoning.output": 5}),
    "ollama": (OllamaProvider, OLLAMA, "stop", {}),
}


@pytest.mark.parametrize("framework", NAMES)
def test_a_service_has_its_well_known_name_and_its_address(framework):
    """The span has the port even if the address does not contain it."""
    base = "https://mine.openai.azure.com" if framework == "azure" else None
    config = LLMConfig(framework=framework, model="m", api_key="sk-1234567890", api_base=base)
    info = make_provider(config, asynchronous=False).info
    assert (info.telemetry_name, info.server_address, info.server_port) == NAMES[framework]
    assert not info.in_process


@pytest.mark.parametrize("dialect", DIALECTS)
def test_tokens_and_reasons_mean_the_same_for_every_service(dialect):
    """Input includes cached tokens, output includes reasoning tokens, and unreported counts are absent."""
    kind, body, reason, parts = DIALECTS[dialect]
    transport = httpx.MockTransport(lambda request: httpx.Response(200, content=json.dumps(body)))
    config = LLMConfig(framework=dialect, model="m", api_key="sk-1234567890")
    recorder = Recorder()
    with Pipeline(kind(config, transport=transport), [recorder.tracing()]) as pipeline:
        pipeline.complete(Request(model="m", messages="Hi"))
    given = recorder.call.attributes
    usage = {key: given[key] for key in given if key.startswith("gen_ai.usage.")}
    assert usage == {f"gen_ai.usage.{part}_tokens": count for part, count in {"input": 9, "output": 8, **parts}.items()}
    assert given["gen_ai.response.finish_reasons"] == (reason,)
    assert given["gen_ai.response.model"] == "m-2026"
