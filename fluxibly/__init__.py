"""Calls to language models through a composable chain of middleware."""

from fluxibly.config import LLMConfig
from fluxibly.errors import FluxiblyError, ProviderError, StreamInterrupted
from fluxibly.flow import CallNext, Flow, Middleware, map_chunks, perform, sleep
from fluxibly.llm import LLM, AsyncLLM
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.provider import AsyncProvider, Provider
from fluxibly.registry import register_llm_framework, register_middleware
from fluxibly.types import Chunk, Message, Request, Response, Restart, StreamStats, ToolCall, Usage

__all__ = [
    "LLM",
    "AsyncLLM",
    "AsyncPipeline",
    "AsyncProvider",
    "CallNext",
    "Chunk",
    "Flow",
    "FluxiblyError",
    "LLMConfig",
    "Message",
    "Middleware",
    "Pipeline",
    "Provider",
    "ProviderError",
    "Request",
    "Response",
    "Restart",
    "StreamInterrupted",
    "StreamStats",
    "ToolCall",
    "Usage",
    "map_chunks",
    "perform",
    "register_llm_framework",
    "register_middleware",
    "sleep",
]
