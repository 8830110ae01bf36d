"""Calls to language models through a composable chain of middleware.

The public names stand here; each is loaded when it is first asked for, so that `import fluxibly` costs next to nothing.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fluxibly._mapping import Answer
    from fluxibly.config import LLMConfig
    from fluxibly.errors import FluxiblyError, ProviderError, StreamInterrupted
    from fluxibly.flow import (
        CallNext,
        Flow,
        Middleware,
        ask,
        emit,
        gather,
        map_chunks,
        perform,
        race,
        sleep,
        stop_when,
    )
    from fluxibly.functions import register_function
    from fluxibly.llm import LLM, AsyncLLM, default_stack
    from fluxibly.pipeline import AsyncPipeline, Pipeline
    from fluxibly.provider import AsyncProvider, Provider
    from fluxibly.registry import register_llm_framework, register_middleware
    from fluxibly.signals import Signal
    from fluxibly.target import Target
    from fluxibly.tools import tool
    from fluxibly.types import (
        Audio,
        Chunk,
        Document,
        Image,
        Message,
        Request,
        Response,
        Restart,
        StreamStats,
        Tool,
        ToolCall,
        Usage,
    )

__version__ = "2.0.0.dev0"

_NAMES = {
    "_mapping": "Answer",
    "config": "LLMConfig",
    "errors": "FluxiblyError ProviderError StreamInterrupted",
    "flow": "CallNext Flow Middleware ask emit gather map_chunks perform race sleep stop_when",
    "functions": "register_function",
    "llm": "LLM AsyncLLM default_stack",
    "pipeline": "AsyncPipeline Pipeline",
    "provider": "AsyncProvider Provider",
    "registry": "register_llm_framework register_middleware",
    "signals": "Signal",
    "target": "Target",
    "tools": "tool",
    "types": "Audio Chunk Document Image Message Request Response Restart StreamStats Tool ToolCall Usage",
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names.split()}
_ROOMS = {"batch", "errors", "flow", "middleware", "providers", "sse", "stores", "telemetry", "testing"}
"""Modules that users work with: `fluxibly.errors.NotFound` needs no import of its own, and completion shows them."""
_MODULES = {*_NAMES, *_ROOMS, "aggregate", "calls", "limits", "messages", "parts", "stream"}

__all__ = [
    "LLM",
    "Answer",
    "AsyncLLM",
    "AsyncPipeline",
    "AsyncProvider",
    "Audio",
    "CallNext",
    "Chunk",
    "Document",
    "Flow",
    "FluxiblyError",
    "Image",
    "LLMConfig",
    "Message",
    "Middleware",
    "Pipeline",
    "Provider",
    "ProviderError",
    "Request",
    "Response",
    "Restart",
    "Signal",
    "StreamInterrupted",
    "StreamStats",
    "Target",
    "Tool",
    "ToolCall",
    "Usage",
    "ask",
    "default_stack",
    "emit",
    "gather",
    "map_chunks",
    "perform",
    "race",
    "register_function",
    "register_llm_framework",
    "register_middleware",
    "sleep",
    "stop_when",
    "tool",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _MODULES:
        return import_module(f"fluxibly.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'fluxibly' has no attribute {name!r}")
    value = getattr(import_module(f"fluxibly.{_MODULE_OF[name]}"), name)
    globals()[name] = value  # the next one who asks finds it without this function
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_ROOMS, *(name for name in globals() if name.startswith("__"))})
