"""The contenders over HTTP: bare httpx, fluxibly and the installed peers, each called as its users call it."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, NamedTuple

import httpx

from fluxibly import LLM, AsyncLLM, LLMConfig

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
PROMPT = "What is the capital of France?"
PEERS = ("openai", "langchain_openai", "litellm", "pydantic_ai", "any_llm")

Call = Callable[[], object]
AsyncCall = Callable[[], Awaitable[object]]


class Contender(NamedTuple):
    """A contender's whole call, and its stream of the pieces of an answer."""

    whole: Call
    stream: Callable[[], Iterator[object]]


def absent() -> list[str]:
    """Return the peers that are not installed."""
    return [name for name in PEERS if importlib.util.find_spec(name) is None]


def contenders(url: str, prompt: str = PROMPT) -> dict[str, Contender]:
    """Return the installed contenders by name. The first is bare httpx."""
    found = {"bare httpx": _httpx(url, prompt), "fluxibly": _fluxibly(url, prompt)}
    missing = absent()
    makers = (_openai, _langchain, _litellm, _pydantic_ai, _any_llm)
    for name, make in zip(PEERS, makers, strict=True):
        if name not in missing:
            found[name.replace("_", "-")] = make(url, prompt)
    return found


def _messages(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def _httpx(url: str, prompt: str) -> Contender:
    client = httpx.Client()
    body = {"model": "m", "messages": _messages(prompt)}

    def stream() -> Iterator[object]:
        with client.stream("POST", f"{url}/chat/completions", json={**body, "stream": True}) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    yield json.loads(line[6:])

    return Contender(lambda: client.post(f"{url}/chat/completions", json=body).json(), stream)


def _config(url: str) -> LLMConfig:
    return LLMConfig(framework="openai", model="m", api_base=url, api_key="k")


def _fluxibly(url: str, prompt: str) -> Contender:
    llm = LLM(_config(url))
    return Contender(lambda: llm.forward(prompt), lambda: llm.forward_stream(prompt))


def _openai(url: str, prompt: str) -> Contender:
    import openai

    create: Any = openai.OpenAI(base_url=url, api_key="k", max_retries=0).chat.completions.create
    messages = _messages(prompt)
    return Contender(
        lambda: create(model="m", messages=messages),
        lambda: iter(create(model="m", messages=messages, stream=True)),
    )


def _langchain(url: str, prompt: str) -> Contender:
    from langchain_openai import ChatOpenAI

    chat: Any = ChatOpenAI(model="m", base_url=url, api_key="k", max_retries=0)  # type: ignore[arg-type]
    return Contender(lambda: chat.invoke(prompt), lambda: chat.stream(prompt))


def _litellm(url: str, prompt: str) -> Contender:
    import litellm

    complete: Any = litellm.completion
    options = {"model": "openai/m", "messages": _messages(prompt), "api_base": url, "api_key": "k"}
    return Contender(lambda: complete(**options), lambda: iter(complete(**options, stream=True)))


def _pydantic_model(url: str, prompt: str) -> tuple[Any, Any]:
    import openai
    from pydantic_ai.messages import ModelRequest
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    sdk = openai.AsyncOpenAI(base_url=url, api_key="k", max_retries=0)  # the cached client is bound to one event loop
    model = OpenAIChatModel("m", provider=OpenAIProvider(openai_client=sdk))
    return model, [ModelRequest.user_text_prompt(prompt)]


def _pydantic_ai(url: str, prompt: str) -> Contender:
    from pydantic_ai import direct

    model, messages = _pydantic_model(url, prompt)

    def stream() -> Iterator[object]:
        with direct.model_request_stream_sync(model, messages) as pieces:
            yield from pieces

    return Contender(lambda: direct.model_request_sync(model, messages), stream)


def _any_llm(url: str, prompt: str) -> Contender:
    from any_llm import AnyLLM

    # Kept, because the function `any_llm.completion` makes a new client for each call.
    complete: Any = AnyLLM.create("openai", api_base=url, api_key="k").completion
    options = {"model": "m", "messages": _messages(prompt)}
    return Contender(lambda: complete(**options), lambda: iter(complete(**options, stream=True)))


@asynccontextmanager
async def async_contenders(url: str) -> AsyncIterator[dict[str, AsyncCall]]:
    """Yield whole calls on the running event loop, by name. The first is httpx."""
    body = {"model": "m", "messages": _messages(PROMPT)}
    missing = absent()
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(httpx.AsyncClient(timeout=60))
        llm = await stack.enter_async_context(AsyncLLM(_config(url)))
        found: dict[str, AsyncCall] = {
            "httpx.AsyncClient": lambda: client.post(f"{url}/chat/completions", json=body),
            "fluxibly": lambda: llm.forward(PROMPT),
        }
        if "openai" not in missing:
            import openai

            sdk = await stack.enter_async_context(openai.AsyncOpenAI(base_url=url, api_key="k", max_retries=0))
            create: Any = sdk.chat.completions.create
            found["openai"] = lambda: create(**body)
        if "langchain_openai" not in missing:
            from langchain_openai import ChatOpenAI

            chat: Any = ChatOpenAI(model="m", base_url=url, api_key="k", max_retries=0)  # type: ignore[arg-type]
            found["langchain-openai"] = lambda: chat.ainvoke(PROMPT)
        if "litellm" not in missing:
            import litellm

            complete: Any = litellm.acompletion
            found["litellm"] = lambda: complete(**{**body, "model": "openai/m"}, api_base=url, api_key="k")
        if "pydantic_ai" not in missing:
            from pydantic_ai import direct

            model, messages = _pydantic_model(url, PROMPT)
            found["pydantic-ai"] = lambda: direct.model_request(model, messages)
        if "any_llm" not in missing:
            from any_llm import AnyLLM

            any_complete: Any = AnyLLM.create("openai", api_base=url, api_key="k").acompletion
            found["any-llm"] = lambda: any_complete(**body)
        yield found
        await asyncio.sleep(0)  # lets callbacks that the contenders have scheduled run before the loop ends
