"""Helpers for the tests of LangChain and LiteLLM: calls through the real libraries to the canned server."""

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
    # pydantic warns of LiteLLM's own types when it builds their validators at the first call, and when it dumps them
    pytest.mark.filterwarnings("ignore:Item '.*' on TypedDict class:UserWarning"),
    pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning"),
    # LiteLLM's streams read fields of its own that pydantic deprecates
    pytest.mark.filterwarnings("ignore:Accessing the 'model_:DeprecationWarning"),
]


def ask(mode: str, provider: Any, async_provider: Any, request: Any) -> Any:
    """Return the response to a request in a mode of `MODES`; `provider` and `async_provider` create the providers."""
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
    """A framework that builds on another library. It is imported on first use, because the import takes seconds."""

    framework: str
    prefix: str
    class_name: str
    models: tuple[str, str]

    @property
    def providers(self) -> tuple[Any, Any]:
        """The synchronous and the asynchronous provider class."""
        module = importlib.import_module(f"fluxibly.providers.{self.framework}")
        return getattr(module, self.class_name), getattr(module, "Async" + self.class_name)

    def config(self, server: Canned, model: str, **settings: Any) -> LLMConfig:
        base = server.url + ("" if "claude" in model else "/v1")
        return LLMConfig(**{"framework": self.framework, "model": model, "api_key": KEY, "api_base": base, **settings})

    def call(self, mode: str, settings: LLMConfig, **request: Any) -> Any:
        """Return the response in a mode, and close the providers."""
        asked = Request(**{"model": settings.model, "messages": "hello there", **request})
        provider, async_provider = self.providers
        return ask(mode, lambda: provider(settings), lambda: async_provider(settings), asked)

    def failure(self, mode: str, settings: LLMConfig, **request: Any) -> BaseException:
        """Return the provider's error after checking that neither its traceback nor its attributes contain the key."""
        with pytest.raises((ProviderError, StreamInterrupted)) as caught:
            self.call(mode, settings, **request)
        assert KEY not in "".join(traceback.format_exception(caught.value))
        assert KEY not in repr(vars(caught.value))
        return errors.root_cause(caught.value)


LANGCHAIN = Library("langchain", ":", "LangChainProvider", ("openai:gpt-4o", "anthropic:claude-test"))
LITELLM = Library("litellm", "/", "LiteLLMProvider", ("openai/gpt-4o", "anthropic/claude-sonnet-4-5"))


@attrs.frozen
class Case:
    """A library and a model."""

    library: Library
    model: str

    def __str__(self) -> str:
        return f"{self.library.framework} {self.model.partition(self.library.prefix)[0]}"

    def config(self, server: Canned, **settings: Any) -> LLMConfig:
        return self.library.config(server, self.model, **settings)


def cases(part: str) -> list[Any]:
    """Return each library with each model whose name contains `part`, skipped if the library is not installed."""
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
    """Return the key of the last request, from OpenAI's header or Anthropic's."""
    headers = server.last.headers
    return headers.get("authorization", headers.get("x-api-key", "")).removeprefix("Bearer ")
