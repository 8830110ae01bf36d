"""The cost of each middleware, idle and at work, and of what other libraries have for the same.

Run with `python -m benchmarks.middleware`. Everything runs in this process, without a network: what is left is the library.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import attrs

from benchmarks.in_process import CHUNK, REQUEST, Fixed
from benchmarks.measure import interleaved, left_out, table
from fluxibly import Chunk, Middleware, Pipeline, Request, Response, Target, ToolCall, Usage
from fluxibly.errors import CircuitOpen, ServerError
from fluxibly.middleware import (
    Balance,
    Budget,
    Cache,
    CircuitBreaker,
    Concurrency,
    Continue,
    Cost,
    Deadline,
    Defaults,
    ExtractReasoning,
    Fallback,
    Guard,
    Hedge,
    RateLimit,
    Record,
    Redact,
    Replay,
    Retry,
    SimulateStream,
    StreamTimeout,
    Tools,
    Validation,
)

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
CALLS = 500
CHUNKS = 5_000
PEER_CALLS = 20
NO_LIMIT = 1e12
PRICES = {"m": (1.0, 2.0)}
USAGE = Usage(input_tokens=8, output_tokens=2)
ANSWER = Response("Paris.", usage=USAGE, finish_reason="stop")
LONG = REQUEST.evolve(messages="What is the capital of France? " * 33)
"""A request with 1 KB of messages."""
SKIPPED = REQUEST.evolve(metadata={"cache": "skip"})
REFRESHED = REQUEST.evolve(metadata={"cache": "refresh"})


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


class Addresses(Obedient):
    """A provider whose answers and chunks each have an address to redact."""

    def complete(self, request: Request) -> Response:
        return ANSWER.evolve(text="Write to ada@example.com.")

    def stream(self, request: Request) -> Iterator[Chunk]:
        for _ in range(CHUNKS):
            yield Chunk("ada@example.com ")


class Sentences(Obedient):
    """A provider whose every tenth chunk ends a sentence."""

    def stream(self, request: Request) -> Iterator[Chunk]:
        for number in range(CHUNKS):
            yield CHUNK if number % 10 else Chunk("tok. ")


class Calling(Obedient):
    """A provider that calls a function, and answers with what it got."""

    def complete(self, request: Request) -> Response:
        if request.messages[-1].role == "tool":
            return ANSWER.evolve()
        return Response(tool_calls=[ToolCall("c1", "weather", raw_arguments='{"city": "Paris"}')], usage=USAGE)


class Cut(Obedient):
    """A provider whose answers need two requests."""

    def __init__(self) -> None:
        self.calls = 0

    def complete(self, request: Request) -> Response:
        self.calls += 1
        return ANSWER.evolve(finish_reason="length" if self.calls % 2 else "stop")


class Thinking(Obedient):
    """A provider that writes its reasoning into its text, and a tag in every tenth chunk."""

    def complete(self, request: Request) -> Response:
        return ANSWER.evolve(text="<think>Which country?</think>Paris.")

    def stream(self, request: Request) -> Iterator[Chunk]:
        yield Chunk("<think>")
        for _ in range(CHUNKS):
            yield CHUNK


class Json(Obedient):
    """A provider that answers with an object."""

    def complete(self, request: Request) -> Response:
        return ANSWER.evolve(text='{"city": "Paris"}')


class Words(Obedient):
    """A provider whose chunks have ten words each."""

    def stream(self, request: Request) -> Iterator[Chunk]:
        for _ in range(CHUNKS // 10):
            yield Chunk("tok " * 10)


@attrs.define
class City:
    city: str


def weather(city: str) -> str:
    """Return the weather in a city."""
    return f"{city}: sunny"


class Stack(NamedTuple):
    """A provider and the layers around it, and the request that they get."""

    layers: Sequence[Middleware]
    provider: Any = Obedient()
    request: Request = REQUEST


def passes(_: object) -> None:
    """Find nothing wrong with a request or an answer."""


def refuses(_: object) -> str:
    return "no"


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
        "Cache, skipped": Stack([Cache()], request=SKIPPED),
        "Budget": Stack([Budget(tokens=NO_LIMIT)]),
        "Cost": Stack([Cost(prices=PRICES)]),
        "Redact": Stack([Redact()]),
        "Guard, of requests": Stack([Guard(input=passes)]),
        "Defaults, all set": Stack([Defaults(temperature=0.5)], request=REQUEST.evolve(temperature=0.0)),
        "Tools, not called": Stack([Tools([weather])]),
        "Continue": Stack([Continue()]),
        "ExtractReasoning": Stack([ExtractReasoning()]),
        "SimulateStream, whole": Stack([SimulateStream(by="whole")]),
    }


WITH_EACH_CHUNK = ("Budget", "Redact", "ExtractReasoning")
"""Middleware that is idle in a call, and has to look at each chunk of a stream."""


def at_work(folder: Path) -> dict[str, Stack]:
    """Return middleware whose every call needs them. What a failed attempt costs by itself stands first.

    Args:
        folder: where recordings are written.
    """
    cache, recorded = Cache(), str(folder / "calls.jsonl")
    for layer in (cache, Record(recorded)):
        for request in (REQUEST, LONG):
            Pipeline(Obedient(), [layer]).complete(request)
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
        "without, answering": Stack([]),
        "Cache, hit": Stack([cache]),
        "Cache, hit of 1 KB": Stack([cache], request=LONG),
        "Cache, miss": Stack([Cache()], request=REFRESHED),
        "Record": Stack([Record(str(folder / "more.jsonl"))]),
        "Replay": Stack([Replay(recorded)]),
        "Budget, in dollars": Stack([Budget(cost=NO_LIMIT, prices=PRICES)]),
        "Redact, both ways": Stack([Redact()], Addresses(), REQUEST.evolve(messages="I am ada@example.com.")),
        "Guard, of answers": Stack([Guard(output=passes)]),
        "Guard, refusing": Stack([Guard(output=refuses, refusal="Sorry.")]),
        "Defaults, two": Stack([Defaults(temperature=0.5, seed=1)]),
        "Tools, one call": Stack([Tools([weather])], Calling()),
        "Continue, once": Stack([Continue()], Cut()),
        "ExtractReasoning, a tag": Stack([ExtractReasoning()], Thinking()),
        "Validation, into a class": Stack([Validation(schema=City)], Json()),
    }


def streamed(folder: Path) -> dict[str, Stack]:
    """Return middleware that has to do something with each chunk."""
    cache, recorded = Cache(), str(folder / "streams.jsonl")
    for layer in (cache, Record(recorded)):
        for _ in Pipeline(Obedient(), [layer]).stream(REQUEST):
            pass
    return {
        "without": Stack([]),
        "Cache, hit": Stack([cache]),
        "Cache, miss": Stack([Cache()], request=REFRESHED),
        "Record": Stack([Record(str(folder / "more_streams.jsonl"))]),
        "Replay": Stack([Replay(recorded)]),
        "Budget": Stack([Budget(tokens=NO_LIMIT)]),
        "Redact, nothing found": Stack([Redact()]),
        "Redact, found in each": Stack([Redact()], Addresses()),
        "Guard, of all": Stack([Guard(output=passes)]),
        "Guard, every 200": Stack([Guard(output=passes, release=200)]),
        "Guard, no sentence": Stack([Guard(output=passes, release="sentence")]),
        "Guard, sentences": Stack([Guard(output=passes, release="sentence")], Sentences()),
        "Tools, not called": Stack([Tools([weather])]),
        "Continue": Stack([Continue()]),
        "ExtractReasoning, no tag": Stack([ExtractReasoning()]),
        "ExtractReasoning, in it": Stack([ExtractReasoning()], Thinking()),
        "SimulateStream, ten words": Stack([SimulateStream()], Words()),
    }


def _refused(call: Callable[[Request], object], request: Request = REQUEST) -> None:
    try:  # noqa: SIM105  # a context manager would cost as much as the call
        call(request)
    except (ServerError, CircuitOpen):
        pass


def calls_of(stack: Stack) -> Callable[[], None]:
    complete = Pipeline(stack.provider, stack.layers).complete

    def run() -> None:
        for _ in range(CALLS):
            _refused(complete, stack.request)

    return run


def chunks_of(stack: Stack) -> Callable[[], None]:
    stream = Pipeline(stack.provider, stack.layers).stream

    def run() -> None:
        for _ in stream(stack.request):
            pass

    return run


def ours(folder: Path) -> None:
    stacks = idle()
    table(
        "A call, idle",
        interleaved({name: calls_of(stack) for name, stack in stacks.items()}, per_run=CALLS),
        goal="<= 3 µs more",
    )
    table(
        "A streamed chunk, idle",
        interleaved(
            {name: chunks_of(stack) for name, stack in stacks.items() if name not in WITH_EACH_CHUNK}, per_run=CHUNKS
        ),
        goal="<= 0.1 µs more",
    )
    table("A call, at work", interleaved({name: calls_of(s) for name, s in at_work(folder).items()}, per_run=CALLS))
    table(
        "A streamed chunk, at work",
        interleaved({name: chunks_of(stack) for name, stack in streamed(folder).items()}, per_run=CHUNKS),
        goal="<= 0.5 µs more",
    )


# Other libraries: the same with the middleware and without, so that what it takes is the difference.

PEERS = ("langchain_core", "langchain", "litellm", "pydantic_ai", "instructor")
WHOLE = ("cache, hit", "cost, alone", "parse")
"""The cases that are compared by all that they take, because nothing else is done in them."""
Pairs = dict[str, Callable[[], object]]


def _fluxibly(folder: Path) -> Pairs:
    stacks, work = idle(), at_work(folder)
    pipelines = {
        "plain": stacks["without"],
        "fallback, idle": stacks["Fallback"],
        "fallback, once": work["Fallback, once"],
        "retry, idle": stacks["Retry"],
        "rate limit": stacks["RateLimit, both"],
        "concurrency": stacks["Concurrency"],
        "cache, hit": work["Cache, hit"],
        "cost": stacks["Cost"],
        "redact": work["Redact, both ways"],
        "guard": work["Guard, of answers"],
        "tools": work["Tools, one call"],
        "parse": work["Validation, into a class"],
    }
    return {name: _call(Pipeline(stack.provider, stack.layers), stack.request) for name, stack in pipelines.items()}


def _call(pipeline: Pipeline, request: Request) -> Callable[[], object]:
    return lambda: pipeline.complete(request)


def _city() -> Any:
    """Return the class that the other libraries parse answers into."""
    from pydantic import create_model

    return create_model("City", city=(str, ...))


def _langchain_core() -> Pairs:
    from langchain_core.caches import InMemoryCache
    from langchain_core.language_models.fake_chat_models import FakeListChatModel
    from langchain_core.output_parsers import PydanticOutputParser
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
        "cache, hit": FakeListChatModel(responses=["Paris."], cache=InMemoryCache()),
        "parse": FakeListChatModel(responses=['{"city": "Paris"}']) | PydanticOutputParser(pydantic_object=_city()),
    }
    return {name: _invoke(model) for name, model in models.items()}


def _invoke(model: Any) -> Callable[[], object]:
    return lambda: model.invoke("What is the capital of France?")


def _langchain() -> Pairs:
    from langchain.agents import create_agent
    from langchain.agents.middleware import PIIMiddleware
    from langchain_core.language_models.fake_chat_models import FakeListChatModel, FakeMessagesListChatModel
    from langchain_core.messages import AIMessage

    class Calls(FakeMessagesListChatModel):
        """A model that calls a function, and then answers, and so on."""

        def bind_tools(self, *_: Any, **__: Any) -> Any:
            return self

    asks = AIMessage("", tool_calls=[{"name": "weather", "args": {"city": "Paris"}, "id": "c1"}])
    calls: Any = Calls(responses=[asks, AIMessage("Paris.")])
    model: Any = FakeListChatModel(responses=["Write to ada@example.com."])
    redact: Any = PIIMiddleware("email", apply_to_output=True)
    agents: dict[str, Any] = {
        "plain": create_agent(model),
        "redact": create_agent(model, middleware=[redact]),
        "tools": create_agent(calls, tools=[weather]),
    }
    messages = {"messages": [{"role": "user", "content": "I am ada@example.com."}]}

    def call(agent: Any) -> Callable[[], object]:
        return lambda: agent.invoke(messages)

    return {name: call(agent) for name, agent in agents.items()}


def _litellm() -> Pairs:
    import litellm
    from litellm.caching.caching import Cache as LiteLLMCache

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
    priced = {**good, "model": "openai/gpt-4o", "messages": messages}
    stored: Any = LiteLLMCache()

    def cached() -> Any:
        litellm.cache = stored  # for this call alone, because the routers would use it, too
        try:
            return litellm.completion(**priced, caching=True)
        finally:
            litellm.cache = None

    calls = {name: _route(router, messages) for name, router in routers.items()}
    answer: Any = litellm.completion(**priced)
    calls["cost, alone"] = lambda: litellm.completion_cost(completion_response=answer)
    with suppress(ImportError):  # of what its proxy needs
        cached()
        time.sleep(0.5)  # it stores an answer in another thread
        if cached()._hidden_params.get("cache_hit"):
            calls["cache, hit"] = cached
    return calls


def _route(router: Any, messages: Sequence[Mapping[str, str]]) -> Callable[[], object]:
    return lambda: router.completion(model="a", messages=messages)


def _pydantic_ai(runner: asyncio.Runner) -> Pairs:
    from pydantic_ai import Agent, PromptedOutput, direct
    from pydantic_ai.exceptions import ModelHTTPError
    from pydantic_ai.messages import ModelRequest, ModelResponse, TextPart, ToolCallPart
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

    def run(agent: Any) -> Callable[[], object]:
        return lambda: runner.run(agent.run("What is the capital of France?"))

    def calls(messages: Any, _: Any) -> ModelResponse:
        if any(part.part_kind == "tool-return" for part in messages[-1].parts):
            return answer()
        return ModelResponse(parts=[ToolCallPart("weather", {"city": "Paris"}, "c1")])

    def in_json(*_: Any) -> ModelResponse:
        return ModelResponse(parts=[TextPart('{"city": "Paris"}')])

    guarded: Any = Agent(good)
    guarded.output_validator(lambda answer: answer)
    agents = {
        "plain, by an agent": run(Agent(good)),
        "guard": run(guarded),
        "tools": run(Agent(FunctionModel(calls), tools=[weather])),
        "parse": run(Agent(FunctionModel(in_json), output_type=PromptedOutput(_city()))),
    }
    return {name: call(model) for name, model in models.items()} | agents


def _instructor() -> Pairs:
    import instructor
    from instructor.cache import AutoCache
    from openai.types.chat import ChatCompletion
    from pydantic import BaseModel, field_validator

    city = _city()

    class Checked(BaseModel):
        city: str

        @field_validator("city")
        @classmethod
        def is_fine(cls, city: str) -> str:
            return city

    message = {"role": "assistant", "content": '{"city": "Paris"}'}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    raw = ChatCompletion.model_validate(
        {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    )
    patched: Any = instructor.patch(create=lambda **_: raw, mode=instructor.Mode.JSON)
    options = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    cache = AutoCache(maxsize=128)
    return {
        "plain": lambda: patched(**options, response_model=city, max_retries=0),
        "parse": lambda: patched(**options, response_model=city, max_retries=0),
        "retry, idle": lambda: patched(**options, response_model=city, max_retries=3),
        "cache, hit": lambda: patched(**options, response_model=city, max_retries=0, cache=cache),
        "guard": lambda: patched(**options, response_model=Checked, max_retries=0),
    }


def peers(folder: Path) -> None:
    with asyncio.Runner() as runner:
        makers: dict[str, Callable[[], Pairs]] = {
            "langchain_core": _langchain_core,
            "langchain": _langchain,
            "litellm": _litellm,
            "pydantic_ai": lambda: _pydantic_ai(runner),
            "instructor": _instructor,
        }
        absent = [name for name in PEERS if importlib.util.find_spec(name) is None]
        found = {"fluxibly": _fluxibly(folder)} | {name: makers[name]() for name in PEERS if name not in absent}
        runs: dict[str, Callable[[], None]] = {}
        for library, pairs in found.items():
            runs[library] = _repeat(pairs["plain"])  # not shown: the first after another library has cold caches
            runs |= {f"{library}: {what}": _repeat(call) for what, call in pairs.items()}
        results = interleaved(runs, per_run=PEER_CALLS)

    def more_of(library: str, what: str) -> float:
        """Return what a call takes more than a plain call of the library."""
        by_agent = what in ("guard", "tools") and "plain, by an agent" in found[library]
        plain = "plain, by an agent" if by_agent else "plain"
        return results[f"{library}: {what}"] - (0 if what in WHOLE else results[f"{library}: {plain}"])

    own = {what: more_of("fluxibly", what) for what in found["fluxibly"]}
    own["cost, alone"] = own["cost"]
    print(
        "\nWhat the same costs elsewhere: a call, what it takes more than a plain call, and that as a ratio to fluxibly's"
        f"\n({' and '.join(WHOLE)}: all that it takes)"
    )
    print(f"  {'':34}  {'µs':>10}  {'more':>10}  {'ratio':>7}")
    for library, pairs in found.items():
        for what in pairs:
            name = f"{library}: {what}"
            more = more_of(library, what)
            is_noise = more < 0.1 * results[f"{library}: plain"] or own.get(what, 0) <= 0
            ratio = "" if what.startswith("plain") else "noise" if is_noise else f"{more / own[what]:.1f}"
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
    with TemporaryDirectory() as name:
        ours(Path(name))
        peers(Path(name))


if __name__ == "__main__":
    main()
