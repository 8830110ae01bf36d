"""Code as a user writes it, which mypy and pyright check strictly: everything under "Public surface", in one file.

`test_typing.py` runs both checkers on this file, and runs the file.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, Literal, TypedDict, assert_type

import attrs

from fluxibly import (
    LLM,
    AsyncLLM,
    AsyncPipeline,
    AsyncProvider,
    CallNext,
    Chunk,
    Flow,
    FluxiblyError,
    LLMConfig,
    Message,
    Middleware,
    Pipeline,
    Provider,
    ProviderError,
    Request,
    Response,
    Restart,
    Signal,
    StreamInterrupted,
    StreamStats,
    Target,
    ToolCall,
    Usage,
    ask,
    default_stack,
    gather,
    map_chunks,
    perform,
    race,
    register_function,
    register_llm_framework,
    register_middleware,
    sleep,
    tool,
)
from fluxibly.config import Secret, Timeouts
from fluxibly.conversation import Conversation
from fluxibly.errors import (
    BadPrompt,
    BudgetExceeded,
    CircuitOpen,
    DeadlineExceeded,
    GuardRefused,
    MaxTurnsExceeded,
    NotRecorded,
    QueueFull,
    RateLimitError,
    RateLimitWait,
    ServerError,
)
from fluxibly.flow import hold_back
from fluxibly.llm import LLM as SameLLM  # noqa: N811  # LLM is a class
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
    Logging,
    Metrics,
    RateLimit,
    Record,
    Redact,
    Replay,
    Retry,
    RetryBudget,
    SimulateStream,
    StreamMeter,
    StreamTimeout,
    Timing,
    Tools,
    Tracing,
    Validation,
)
from fluxibly.stores import Entry, MemoryStore, Store
from fluxibly.target import to_targets
from fluxibly.testing import AsyncScriptedProvider, ScriptedProvider, VirtualClock
from fluxibly.tools import FunctionTool

# Middleware of the user


def timing(request: Request, call_next: CallNext) -> Flow[Response]:
    start = perf_counter()
    try:
        return (yield from call_next(request))
    finally:
        request.call.notes["seconds"] = perf_counter() - start


def shout(request: Request, call_next: CallNext) -> Flow[Response]:
    def louder(chunk: Chunk) -> Chunk:
        return attrs.evolve(chunk, text=chunk.text.upper())

    return (yield from map_chunks(call_next(request), louder))


def complete_only(request: Request, call_next: CallNext) -> Flow[Response]:
    return (yield from hold_back(call_next(request)))


@attrs.frozen(kw_only=True)
class MyFallback:
    model: str

    def __call__(self, request: Request, call_next: CallNext) -> Flow[Response]:
        try:
            return (yield from call_next(request))
        except ProviderError:
            yield from sleep(0)
            return (yield from call_next(request.evolve(model=self.model)))


@attrs.frozen(kw_only=True)
class Others:
    to: tuple[Target, ...] = attrs.field(converter=to_targets)

    @property
    def targets(self) -> tuple[Target, ...]:
        return self.to

    def __call__(self, request: Request, call_next: CallNext) -> Flow[Response]:
        for target in self.to:
            assert_type(request.evolve(target=target, temperature=0.1), Request)
            try:
                return (yield from call_next(request.evolve(target=target)))
            except ProviderError:
                request.call.notes["failed"] = target.config
        return (yield from call_next(request.evolve(target=None)))


class OwnCache:
    def __init__(self) -> None:
        self.answers: dict[str, Response] = {}

    def __call__(self, request: Request, call_next: CallNext) -> Flow[Response]:
        key = request.messages[-1].text

        def read() -> Response | None:
            return self.answers.get(key)

        async def aread() -> Response | None:
            return self.answers.get(key)

        found = yield from perform(read, aread)
        assert_type(found, Response | None)
        if found is not None:
            request.call.cache_hit = True
            return found
        response = yield from call_next(request)
        self.answers[key] = response
        return response


def hedge(request: Request, call_next: CallNext) -> Flow[Response]:
    response = yield from race(call_next, [request, request.evolve(model="other")], delay=0.5)
    assert_type(response, Response)
    return response


def informed(request: Request, call_next: CallNext) -> Flow[Response]:
    def look_up() -> int:
        return 3

    fact, answer = yield from gather(request, perform(look_up), ask(request.evolve(messages="?")))
    assert_type(fact, int)
    assert_type(answer, Response)
    numbers = yield from gather(request, *[perform(look_up) for _ in range(9)])
    assert_type(numbers, list[int])
    return (yield from call_next(request))


own: list[Middleware] = [timing, shout, complete_only, MyFallback(model="small"), OwnCache(), hedge, informed]

# Providers of the user


class Parrot:
    def __init__(self, config: LLMConfig | None = None) -> None:
        self.config = config

    def complete(self, request: Request) -> str:
        return request.messages[-1].text

    def stream(self, request: Request) -> Iterator[str]:
        for word in request.messages[-1].text.split():
            yield word + " "


class Singer:
    def stream(self, request: Request) -> Iterator[Chunk | Response]:
        yield Chunk("la ")
        yield Response("la", finish_reason="stop")


class AsyncSinger:
    async def stream(self, request: Request) -> AsyncIterator[str]:
        yield "la"


class Busy:
    def complete(self, request: Request) -> Response:
        raise ProviderError("try again", retryable=True)


class AsyncParrot:
    def __init__(self, config: LLMConfig) -> None:
        self.config = config

    async def complete(self, request: Request) -> Response:
        return Response(request.messages[-1].text, usage=Usage(input_tokens=1, output_tokens=1))

    async def stream(self, request: Request) -> AsyncIterator[Chunk]:
        for word in request.messages[-1].text.split():
            yield Chunk(text=word + " ")


provider: Provider = Parrot()
async_provider: AsyncProvider = AsyncParrot(LLMConfig(framework="parrot", model="m"))

register_llm_framework("parrot", Parrot, async_provider=AsyncParrot)
register_middleware("my_fallback", MyFallback)
register_middleware("others", Others)
register_middleware("shout", lambda: shout)


def sync_calls(config: LLMConfig) -> None:
    llm = LLM(config=config)
    assert_type(llm.forward("Hello", temperature=0.2), str)
    for text in llm.forward_stream("Count to three", max_tokens=20):
        assert_type(text, str)
    llm.forward_stream("Count").close()
    response = llm.complete([Message.system("Be brief."), Message.user("Hello")], extra={"top_k": 4}, stop=["\n"])
    assert_type(response.text, str)
    assert_type(response.tool_calls, tuple[ToolCall, ...])
    assert_type(response.usage, Usage | None)
    assert_type(response.finish_reason, str | None)
    assert_type(response.stats, StreamStats | None)
    with llm.stream([Message.user("Hi there")]) as stream:
        for chunk in stream:
            assert_type(chunk, Chunk)
    assert_type(stream.response, Response)
    if stream.response.stats is not None:
        assert_type(stream.response.stats.chunks, int)
    with llm.stream("Hi", restarts=True) as events:
        for event in events:
            assert_type(event, Chunk | Restart)
            if isinstance(event, Restart):
                print("from the beginning:", event.reason)  # noqa: T201  # as a user would write it
    llm.close()


async def async_calls(config: LLMConfig) -> None:
    async with AsyncLLM(config) as llm:
        assert_type(await llm.forward("Hello", model="other"), str)
        async for text in llm.forward_stream("Count"):
            assert_type(text, str)
        assert_type(await llm.complete("Hello"), Response)
        async with llm.stream("Hi there") as stream:
            async for chunk in stream:
                assert_type(chunk, Chunk)
        assert_type(stream.response, Response)


def first_hour(file: Path) -> None:
    llm = LLM("parrot:m", temperature=0.2, seed=1, stop=["END"], response_format="text", max_retries=0)
    LLM(framework="parrot", model="m", middleware=[Retry()], strict=True).close()
    assert_type(llm.forward([{"role": "user", "content": "Hello"}]), str)
    assert_type(llm.forward({"role": "user", "content": "Hello"}), str)
    chat = llm.conversation(system="Be brief.")
    assert_type(chat.send("Hello", temperature=0.5), Response)
    with chat.stream([Message.user("Hi"), {"role": "user", "content": "there"}]) as stream:
        for chunk in stream:
            assert_type(chunk, Chunk)
    assert_type(stream.response, Response)
    assert_type(chat.messages, list[Message])
    assert_type(chat.last_error, BaseException | None)
    chat.save(file.with_suffix(".json"))
    assert_type(llm.conversation(load=file.with_suffix(".json")), Conversation)
    assert_type(copy.copy(llm), LLM)


async def first_hour_async(file: Path) -> None:
    async with AsyncLLM("parrot:m", timeout=Timeouts(idle=5)) as llm:
        chat = llm.conversation()
        assert_type(await chat.send("Hello"), Response)
        async with chat.stream("Hi", restarts=True) as stream:
            async for event in stream:
                assert_type(event, Chunk | Restart)
        await chat.save(file.with_suffix(".json"))


def stacks(config: LLMConfig, file: Path) -> None:
    stack: list[Middleware] = [
        Logging(),
        Tracing(capture="none"),
        Metrics(),
        Timing(layers=True, record=lambda timings: print(*timings)),  # noqa: T201  # as a user would write it
        StreamMeter(),
        timing,
        Validation(empty="retry", check=lambda response: None if response.text else "Say something."),
        Retry(max_retries=5, on_interrupt="restart"),
    ]
    print(LLM(config, stack))  # noqa: T201  # as a user would write it
    LLM(config, middleware=[Logging(), Tracing(), timing, Retry(max_retries=5), StreamMeter()]).close()
    LLM(config, default_stack(config, Retry(max_retries=5), timing)).close()
    LLM(config, [*default_stack(config), timing]).close()
    SameLLM.from_yaml(file).close()
    assert_type(AsyncLLM.from_yaml(str(file)), AsyncLLM)


def tokens_of(request: Request) -> int:
    return len(request.messages)


def places_of(text: str) -> list[tuple[int, int]]:
    return [(0, 3)] if text.startswith("Ada") else []


def patience(error: Exception, attempt: int) -> float | None:
    return 0.5 if isinstance(error, RateLimitError) and attempt < 2 else None


def production(config: LLMConfig) -> None:
    shared = MemoryStore()
    budget = RetryBudget(ratio=0.1, floor=5)
    register_function("tokens_of", tokens_of)
    register_function("places_of", places_of)
    layers: list[Middleware] = [
        Deadline(30),
        Fallback(["m-2", config, Target(config, drop=["seed"])], when=lambda error: isinstance(error, ServerError)),
        Balance(["m-2", "m-3"], policy="fastest", weights=[1, 2], by=lambda request: request.model),
        Hedge("p95", to=["m-2"], at_most=2, max_share=0.2),
        Hedge(2.0),
        Retry(limits={RateLimitError: 5, "ServerError": 2}, decide=patience, budget=budget),
        CircuitBreaker(failures=3, by="provider", store=shared),
        RateLimit(requests=600, tokens=90_000, estimate=tokens_of, store=shared, on_store_error="open"),
        RateLimit(tokens=90_000, estimate="tokens_of", by="tokens_of", store="memory"),
        Concurrency(20, queue=100, store=shared),
        StreamTimeout(first_chunk=20, idle=5),
        Redact(patterns={"email": True, "ticket": r"T-\d+", "person": places_of}, restore=True),
        Redact(patterns=["email", "places_of"]),
        Defaults(temperature=0.2, stop=["\n"], headers={"x-team": "red"}),
        Continue(max_turns=2),
        ExtractReasoning(tag="reason"),
        SimulateStream(by="whole"),
        Logging(redact=Redact(incoming=False)),
        Tracing(redact=str.upper),
        Logging(redact={"patterns": ["email"]}),
    ]
    LLM(config, default_stack(config, *layers)).close()
    store: Store = shared
    assert_type(store.load("a key", 0.0), Entry | None)
    try:
        LLM(config).complete("hi")
    except (CircuitOpen, RateLimitWait, QueueFull) as error:
        assert_type(error.retry_after, float | None)
        assert_type(error.rate_limits, Mapping[str, str])
    except DeadlineExceeded:
        pass


def harmless(response: Response) -> str | None:
    return "rude" if "fool" in response.text else None


def judged(response: Response, request: Request) -> Flow[str | None]:
    answer = yield from ask(request.evolve(messages=f"Fine? {response.text}"))
    return None if answer.text == "yes" else "not fine"


def find_people(text: str) -> list[tuple[int, int]]:
    return [(0, 3)] if text.startswith("Ada") else []


def remembering(config: LLMConfig) -> None:
    personal = Redact(patterns={"email": True, "ticket": r"T-\d+", "person": find_people}, restore=True)
    layers: list[Middleware] = [
        Tracing(redact=personal),
        Logging(redact=personal),
        Logging(redact=lambda text: text.upper()),
        Cost(prices={"m": (0.15, 0.6)}),
        personal,
        Redact(patterns=["email", "key"], replace="<{name}>"),
        Cache("sqlite:answers.db", namespace="app", ttl=3600, max_bytes=10_000_000),
        Cache(namespace=lambda request: request.model, key=lambda request: request.messages[-1].text, pace=True),
        Record("calls.jsonl"),
        Replay("calls.jsonl", missing="ask"),
        Guard(input=lambda request: None, output=harmless, release="sentence"),
        Guard(output=judged, release=200),
        Guard(output=harmless, refusal="I cannot say that."),
        Budget(tokens=1000, cost=0.5, per=60, scope=lambda request: request.metadata["user"], unknown="free"),
    ]
    response = LLM(config, layers).complete("hi")
    assert_type(response.cost, Decimal | None)
    assert_type(response.cache_hit, bool)
    try:
        LLM(config).complete("hi")
    except GuardRefused as error:
        assert_type(error.reason, str)
    except (BudgetExceeded, NotRecorded):
        pass


def gate(opened: Signal) -> Middleware:
    def wait(request: Request, call_next: CallNext) -> Flow[Response]:
        assert_type((yield from sleep(1.0, until=opened)), bool)
        request.call.decide("gate", "lets the call pass")
        return (yield from call_next(request))

    return wait


def token() -> str:
    return "a token"


async def later() -> str:
    return "a token"


def access() -> None:
    LLMConfig(framework="parrot", model="m", api_key=token, headers={"x-gateway": "harbour"})
    LLMConfig(framework="parrot", model="m", api_key=later, timeout=None)
    assert_type(LLMConfig(framework="parrot", model="m", api_key=Secret("k")).fixed_key, str | None)
    try:
        LLM(LLMConfig(framework="parrot", model="m")).complete("")
    except BadPrompt as error:
        assert_type(error, BadPrompt)


def pipelines() -> None:
    request = Request(model="m", messages=[Message.user("hi")])
    assert_type(Pipeline(Parrot(), [timing]).complete(request), Response)
    Pipeline(ScriptedProvider("a fact", "hello"), own, clock=VirtualClock()).complete(request)
    AsyncPipeline(AsyncScriptedProvider("hello"), own)
    AsyncPipeline(Parrot(), own)
    assert_type(Pipeline(Singer()).complete(request).text, str)
    AsyncPipeline(AsyncSinger(), own)
    try:
        Pipeline(Busy()).complete(request)
    except StreamInterrupted as error:
        assert_type(error.partial, Response)
    except ProviderError as error:
        assert_type(error.retryable, bool)
        assert_type(error.retry_after, float | None)
    except FluxiblyError:
        raise


@attrs.frozen
class Person:
    name: str


class Book(TypedDict):
    title: str


def scripted(answers: list[str]) -> Callable[[LLMConfig], Provider]:
    def made(config: LLMConfig) -> Provider:
        return ScriptedProvider(*answers)

    return made


def structured() -> None:
    answers = ['{"name": "Ann"}', '{"name": "Ann"}', '{"value": []}', '{"value": 1}']
    register_llm_framework("names", scripted(answers))
    with LLM(LLMConfig(framework="names", model="m")) as llm:
        assert_type(llm.parse("Who?", Person), Person)
        assert_type(llm.complete("Who?", into=Person).parsed, Any)
        assert_type(llm.parse("Who?", list[Person], temperature=0.1), list[Person])
        either: object = Person | int
        assert_type(llm.parse("Who?", either), Any)
    register_llm_framework("books", scripted(['{"title": "T"}'] * 2))
    with LLM(LLMConfig(framework="books", model="m")) as llm:
        assert_type(llm.parse("Which?", Book), Book)
        with llm.stream("Which?", into=Book) as stream:
            list(stream)
            assert_type(stream.partial_parsed, Any)


async def structured_async() -> None:
    answers = ['{"name": "Ann"}', '{"value": []}', '{"value": 1}']
    register_llm_framework("async names", scripted(answers))
    async with AsyncLLM(LLMConfig(framework="async names", model="m")) as llm:
        assert_type(await llm.parse("Who?", Person), Person)
        assert_type(await llm.parse("Who?", list[Person]), list[Person])
        assert_type(await llm.parse("Who?", Person | int), Any)


def targets(config: LLMConfig) -> None:
    parrot = Target(Parrot(), model="m", drop=["seed", "stop"], temperature=0.1)
    assert_type(parrot.config, LLMConfig | None)
    request = Request(model="m", messages="hi", seed=1, target=parrot)
    Pipeline(Busy(), [Others(to=parrot)]).complete(request)
    stack = [Others(to=["parrot:m", "other", config, parrot, {"framework": "parrot", "model": "m", "drop": ["seed"]}])]
    LLM(config, stack).close()
    assert_type(to_targets("parrot:m"), tuple[Target, ...])


@tool
def get_weather(city: Annotated[str, "its English name"], unit: Literal["c", "f"] = "c") -> str:
    """Return the weather in a city."""
    return f"20 {unit} in {city}"


@tool(name="tide", description="Return when high tide is.")
async def high_tide(place: str) -> int:
    return len(place)


def untyped(**arguments: object) -> object:
    return arguments


def confirm(call: ToolCall, request: Request) -> Flow[bool]:
    answer = yield from ask(request.evolve(messages=f"May {call.name} run?"))
    return answer.text == "yes"


def tools() -> None:
    assert_type(get_weather("Rome", unit="f"), str)
    made: list[FunctionTool] = [get_weather, tool(untyped, parameters={"type": "object", "properties": {}})]
    assert_type(made[0].name, str)
    call = ToolCall("c1", "get_weather", {"city": "Rome"})
    stack = [Tools(made, approve=confirm), Tools(high_tide, max_turns=3, parallel=False)]
    pipeline = Pipeline(ScriptedProvider(Response(tool_calls=[call]), "yes", "20 degrees"), stack)
    try:
        response = pipeline.complete(Request(model="m", messages="How warm is it?"))
        assert_type(response.added, tuple[Message, ...])
    except MaxTurnsExceeded as error:
        assert_type(error.partial, Response | None)
    Pipeline(ScriptedProvider("hi")).complete(Request(model="m", messages="hi", tools=[get_weather, high_tide]))


def main(file: Path) -> None:
    config = LLMConfig(
        framework="parrot",
        model="m",
        temperature=0.2,
        timeout=Timeouts(connect=5, idle=30),
        additional_params={"top_k": 4},
        middleware=None,
    )
    file.write_text("llm: {framework: parrot, model: m, middleware: [logging, my_fallback: {model: small}, shout]}")
    sync_calls(config)
    asyncio.run(async_calls(config))
    first_hour(file)
    asyncio.run(first_hour_async(file))
    stacks(config, file)
    production(config)
    Pipeline(provider, [gate(Signal())])
    access()
    pipelines()
    targets(config)
    tools()
    structured()
    asyncio.run(structured_async())


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder) / "framework.yaml")
