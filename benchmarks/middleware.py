"""The cost of each middleware, idle and at work, and of what other libraries have for the same.

Run with `python -m benchmarks.middleware`. Everything runs in this process, without a network: what is left is the library.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.in_process import CHUNK, REQUEST, Fixed
from benchmarks.measure import interleaved, left_out, table
from fluxibly import Chunk, Middleware, Pipeline, Request, Response, Target, Usage
from fluxibly.errors import CircuitOpen, ServerError
from fluxibly.middleware import (
    Balance,
    CircuitBreaker,
    Concurrency,
    Deadline,
    Fallback,
    Hedge,
    RateLimit,
    Retry,
    StreamTimeout,
)

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
CALLS = 500
CHUNKS = 5_000
PEER_CALLS = 20
NO_LIMIT = 1e12
ANSWER = Response("Paris.", usage=Usage(input_tokens=8, output_tokens=2))


class Obedient(Fixed):
    """A provider that keeps the limits of a call by itself, as those over HTTP do."""

    obeys = True

    def complete(self, request: Request) -> Response:
        return ANSWER.evolve()

    def stream(self, request: Request) -> Iterator[Chunk]:
        for _ in range(CHUNKS):
            yield CHUNK


class EverySecond(Obedient):
    """A provider whose every second call fails."""

    def __init__(self) -> None:
        self.calls = 0

    def complete(self, request: Request) -> Response:
        self.calls += 1
        if self.calls % 2:
            raise ServerError("down")
        return ANSWER.evolve()


class Down(Obedient):
    """A provider whose every call fails."""

    def complete(self, request: Request) -> Response:
        raise ServerError("down")


class Stack(NamedTuple):
    """A provider and the layers around it."""

    layers: Sequence[Middleware]
    provider: Any = Obedient()


def idle() -> dict[str, Stack]:
    """Return each middleware as it is when nothing happens."""
    other = Target(Obedient())
    return {
        "without": Stack([]),
        "Fallback": Stack([Fallback([other])]),
        "Balance, two models": Stack([Balance(["one", "other"])]),
        "Retry": Stack([Retry()]),
        "Deadline": Stack([Deadline(60)]),
        "StreamTimeout": Stack([StreamTimeout(first_chunk=30, idle=10)]),
        "CircuitBreaker": Stack([CircuitBreaker()]),
        "RateLimit, requests": Stack([RateLimit(requests=NO_LIMIT)]),
        "RateLimit, both": Stack([RateLimit(requests=NO_LIMIT, tokens=NO_LIMIT)]),
        "Concurrency": Stack([Concurrency(100)]),
    }


def at_work() -> dict[str, Stack]:
    """Return middleware whose every call needs them. What a failed attempt costs by itself stands first."""
    other = Target(Obedient())
    opened = CircuitBreaker(failures=1, open_for=86_400)
    _refused(Pipeline(Down(), [opened]).complete)
    return {
        "without, failing": Stack([], Down()),
        "Fallback, once": Stack([Fallback([other])], Down()),
        "Balance, to the next": Stack([Balance([Target(Down()), other], policy="round_robin", cool_down=0.000_001)]),
        "Retry, once": Stack([Retry(base_delay=0)], EverySecond()),
        "CircuitBreaker, open": Stack([opened], Down()),
        "Hedge, one branch": Stack([Hedge(60.0)]),
    }


def _refused(call: Callable[[Request], object]) -> None:
    try:  # noqa: SIM105  # a context manager would cost as much as the call
        call(REQUEST)
    except (ServerError, CircuitOpen):
        pass


def calls_of(stack: Stack) -> Callable[[], None]:
    complete = Pipeline(stack.provider, stack.layers).complete

    def run() -> None:
        for _ in range(CALLS):
            _refused(complete)

    return run


def chunks_of(stack: Stack) -> Callable[[], None]:
    stream = Pipeline(stack.provider, stack.layers).stream

    def run() -> None:
        for _ in stream(REQUEST):
            pass

    return run


def ours() -> None:
    stacks = idle()
    table(
        "A call, idle",
        interleaved({name: calls_of(stack) for name, stack in stacks.items()}, per_run=CALLS),
        goal="<= 3 µs more",
    )
    table(
        "A streamed chunk, idle",
        interleaved({name: chunks_of(stack) for name, stack in stacks.items()}, per_run=CHUNKS),
        goal="<= 0.1 µs more",
    )
    table("A call, at work", interleaved({name: calls_of(s) for name, s in at_work().items()}, per_run=CALLS))


# Other libraries: the same with the middleware and without, so that what it takes is the difference.

PEERS = ("langchain_core", "litellm", "pydantic_ai", "instructor")
Pairs = dict[str, Callable[[], object]]


def _fluxibly() -> Pairs:
    stacks, work = idle(), at_work()
    pipelines = {
        "plain": stacks["without"],
        "fallback, idle": stacks["Fallback"],
        "fallback, once": work["Fallback, once"],
        "retry, idle": stacks["Retry"],
        "rate limit": stacks["RateLimit, both"],
        "concurrency": stacks["Concurrency"],
    }
    return {name: _call(Pipeline(stack.provider, stack.layers)) for name, stack in pipelines.items()}


def _call(pipeline: Pipeline) -> Callable[[], object]:
    return lambda: pipeline.complete(REQUEST)


def _langchain() -> Pairs:
    from langchain_core.language_models.fake_chat_models import FakeListChatModel
    from langchain_core.rate_limiters import InMemoryRateLimiter

    class Failing(FakeListChatModel):
        def _call(self, *_: Any, **__: Any) -> str:
            raise ConnectionError("down")

    plain: Any = FakeListChatModel(responses=["Paris."])
    failing: Any = Failing(responses=["Paris."])
    limiter = InMemoryRateLimiter(requests_per_second=NO_LIMIT, max_bucket_size=NO_LIMIT)
    limited: Any = FakeListChatModel(responses=["Paris."], rate_limiter=limiter)
    models = {
        "plain": plain,
        "fallback, idle": plain.with_fallbacks([plain]),
        "fallback, once": failing.with_fallbacks([plain]),
        "retry, idle": plain.with_retry(),
        "rate limit": limited,
    }
    return {name: _invoke(model) for name, model in models.items()}


def _invoke(model: Any) -> Callable[[], object]:
    return lambda: model.invoke("What is the capital of France?")


def _litellm() -> Pairs:
    import litellm

    litellm.suppress_debug_info = True
    logging.getLogger("LiteLLM Router").setLevel(logging.CRITICAL)
    good = {"model": "openai/m", "api_key": "k", "mock_response": "Paris."}
    bad = {**good, "mock_response": Exception("down")}
    limited = {**good, "rpm": int(NO_LIMIT), "tpm": int(NO_LIMIT)}
    two = [{"model_name": "a", "litellm_params": good}, {"model_name": "b", "litellm_params": good}]
    routers = {
        "plain": litellm.Router(model_list=two[:1], num_retries=0),
        "fallback, idle": litellm.Router(model_list=two, fallbacks=[{"a": ["b"]}], num_retries=0),
        "fallback, once": litellm.Router(
            model_list=[{"model_name": "a", "litellm_params": bad}, two[1]],
            fallbacks=[{"a": ["b"]}],
            num_retries=0,
            allowed_fails=10**9,
        ),
        "retry, idle": litellm.Router(model_list=two[:1], num_retries=3),
        "rate limit": litellm.Router(
            model_list=[{"model_name": "a", "litellm_params": limited}],
            routing_strategy="usage-based-routing-v2",
            num_retries=0,
        ),
    }
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    return {name: _route(router, messages) for name, router in routers.items()}


def _route(router: Any, messages: Sequence[Mapping[str, str]]) -> Callable[[], object]:
    return lambda: router.completion(model="a", messages=messages)


def _pydantic_ai(runner: asyncio.Runner) -> Pairs:
    from pydantic_ai import direct
    from pydantic_ai.exceptions import ModelHTTPError
    from pydantic_ai.messages import ModelRequest, ModelResponse, TextPart
    from pydantic_ai.models.concurrency import ConcurrencyLimitedModel
    from pydantic_ai.models.fallback import FallbackModel
    from pydantic_ai.models.function import FunctionModel

    def answer(*_: Any) -> ModelResponse:
        return ModelResponse(parts=[TextPart("Paris.")])

    def down(*_: Any) -> ModelResponse:
        raise ModelHTTPError(503, "m", None)

    good, bad = FunctionModel(answer), FunctionModel(down)
    models: dict[str, Any] = {
        "plain": good,
        "fallback, idle": FallbackModel(good, good),
        "fallback, once": FallbackModel(bad, good),
        "concurrency": ConcurrencyLimitedModel(good, limiter=100),
    }
    messages: Any = [ModelRequest.user_text_prompt("What is the capital of France?")]

    def call(model: Any) -> Callable[[], object]:
        return lambda: runner.run(direct.model_request(model, messages))

    return {name: call(model) for name, model in models.items()}


def _instructor() -> Pairs:
    import instructor
    from openai.types.chat import ChatCompletion
    from pydantic import BaseModel

    class City(BaseModel):
        city: str

    message = {"role": "assistant", "content": '{"city": "Paris"}'}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    raw = ChatCompletion.model_validate(
        {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    )
    patched: Any = instructor.patch(create=lambda **_: raw, mode=instructor.Mode.JSON)
    options = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "response_model": City}
    return {
        "plain": lambda: patched(**options, max_retries=0),
        "retry, idle": lambda: patched(**options, max_retries=3),
    }


def peers() -> None:
    with asyncio.Runner() as runner:
        makers: dict[str, Callable[[], Pairs]] = {
            "langchain_core": _langchain,
            "litellm": _litellm,
            "pydantic_ai": lambda: _pydantic_ai(runner),
            "instructor": _instructor,
        }
        absent = [name for name in PEERS if importlib.util.find_spec(name) is None]
        found = {"fluxibly": _fluxibly()} | {name: makers[name]() for name in PEERS if name not in absent}
        runs: dict[str, Callable[[], None]] = {}
        for library, pairs in found.items():
            runs[library] = _repeat(pairs["plain"])  # not shown: the first after another library has cold caches
            runs |= {f"{library}: {what}": _repeat(call) for what, call in pairs.items()}
        results = interleaved(runs, per_run=PEER_CALLS)
    own = {what: results[f"fluxibly: {what}"] - results["fluxibly: plain"] for what in found["fluxibly"]}
    print(
        "\nWhat the same costs elsewhere: a call, what it takes more than a plain call, and that as a ratio to fluxibly's"
    )
    print(f"  {'':34}  {'µs':>10}  {'more':>10}  {'ratio':>7}")
    for library, pairs in found.items():
        for what in pairs:
            name = f"{library}: {what}"
            more = results[name] - results[f"{library}: plain"]
            is_noise = abs(more) < 0.1 * results[f"{library}: plain"] or own.get(what, 0) <= 0
            ratio = "" if what == "plain" else "noise" if is_noise else f"{more / own[what]:.1f}"
            print(f"  {name:34}  {results[name]:10.1f}  {more:10.1f}  {ratio:>7}")
    left_out(absent)


def _repeat(call: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(PEER_CALLS):
            call()

    return run


def main() -> None:
    """Run all benchmarks of middleware, with logging off and without a telemetry SDK."""
    logging.getLogger("fluxibly").setLevel(logging.CRITICAL + 1)
    ours()
    peers()


if __name__ == "__main__":
    main()
