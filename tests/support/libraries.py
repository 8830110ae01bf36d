"""What the tests of LangChain and LiteLLM share: calls through either, on the real libraries, to the canned server."""

from __future__ import annotations

import importlib
import traceback
from importlib.util import find_spec
from typing import Any

import anyio
import attrs
import pytest

from fluxibly import AsyncPipeline, LLMConfig, Pipeline, ProviderError, Request, StreamInterrupted, errors
from fluxibly.messages import Tool
from support.canned_server import Canned

KEY = "sk-secret-0123456789abcdef"
WEATHER = Tool("weather", "The weather of a city.", {"type": "object", "properties": {"city": {"type": "string"}}})
MODES = ("sync", "sync stream", "asyncio", "asyncio stream", "trio", "trio stream")
STREAM_MODES = tuple(mode for mode in MODES if "stream" in mode)

LITELLM_WARNS = [
    # LiteLLM's own types, when pydantic builds their validators at the first call, and when they are dumped
    pytest.mark.filterwarnings("ignore:Item '.*' on TypedDict class:UserWarning"),
    pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning"),
    # its streams, which look at fields of its own that pydantic is to drop
    pytest.mark.filterwarnings("ignore:Accessing the 'model_:DeprecationWarning"),
]


def ask(mode: str, provider: Any, async_provider: Any, request: Any) -> Any:
    """The response to a request in one of the modes; `provider` and `async_provider` make the providers."""
    backend, _, streamed = mode.partition(" ")
    if backend == "sync":
        pipeline = Pipeline(provider())
        try:
            if not streamed:
                return pipeline.complete(request)
            with pipeline.stream(request) as stream:
                for _ in stream:
                    pass
            return stream.response
        finally:
            pipeline.close()

    async def run() -> Any:
        async with AsyncPipeline(async_provider()) as pipeline:
            if not streamed:
                return await pipeline.complete(request)
            async with pipeline.stream(request) as stream:
                async for _ in stream:
                    pass
            return stream.response

    return anyio.run(run, backend=backend)


@attrs.frozen
class Library:
    """A framework that stands on another library. It is imported when it is used: that takes seconds."""

    framework: str
    prefix: str
    class_name: str
    models: tuple[str, str]

    @property
    def providers(self) -> tuple[Any, Any]:
        """The two classes, for sync and async."""
        module = importlib.import_module(f"fluxibly.providers.{self.framework}")
        return getattr(module, self.class_name), getattr(module, "Async" + self.class_name)

    def config(self, server: Canned, model: str, **settings: Any) -> LLMConfig:
        base = server.url + ("" if "claude" in model else "/v1")
        return LLMConfig(**{"framework": self.framework, "model": model, "api_key": KEY, "api_base": base, **settings})

    def call(self, mode: str, settings: LLMConfig, **request: Any) -> Any:
        """The response in a mode; the providers are closed."""
        asked = Request(**{"model": settings.model, "messages": "hello there", **request})
        provider, async_provider = self.providers
        return ask(mode, lambda: provider(settings), lambda: async_provider(settings), asked)

    def failure(self, mode: str, settings: LLMConfig, **request: Any) -> BaseException:
        """The provider's error, and the assurance that the key is in none of what is printed of it."""
        with pytest.raises((ProviderError, StreamInterrupted)) as caught:
            self.call(mode, settings, **request)
        assert KEY not in "".join(traceback.format_exception(caught.value))
        assert KEY not in repr(vars(caught.value))
        return errors.root_cause(caught.value)


LANGCHAIN = Library("langchain", ":", "LangChainProvider", ("openai:gpt-4o", "anthropic:claude-test"))
LITELLM = Library("litellm", "/", "LiteLLMProvider", ("openai/gpt-4o", "anthropic/claude-sonnet-4-5"))


@attrs.frozen
class Case:
    """A library with one of its models."""

    library: Library
    model: str

    def __str__(self) -> str:
        return f"{self.library.framework} {self.model.partition(self.library.prefix)[0]}"

    def config(self, server: Canned, **settings: Any) -> LLMConfig:
        return self.library.config(server, self.model, **settings)


def cases(part: str) -> list[Any]:
    """Each library with each model that has `part` in its name; skipped where the library is not installed."""
    needs = {"langchain": ("langchain", "langchain_openai", "langchain_anthropic"), "litellm": ("litellm",)}
    found: list[Any] = []
    for library in (LANGCHAIN, LITELLM):
        missing = [name for name in needs[library.framework] if find_spec(name) is None]
        marks = [pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")]
        marks += LITELLM_WARNS if library is LITELLM else []
        chosen = [Case(library, model) for model in library.models if part in model]
        found += [pytest.param(case, marks=marks, id=str(case)) for case in chosen]
    return found


def sent_key(server: Canned) -> str:
    """The key of the last request, in OpenAI's header or in Anthropic's."""
    headers = server.last.headers
    return headers.get("authorization", headers.get("x-api-key", "")).removeprefix("Bearer ")
