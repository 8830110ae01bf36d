"""The cost of fluxibly itself: a layer, the default stack and a chunk. Run with `python -m benchmarks.in_process`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator

from benchmarks.measure import interleaved, table
from fluxibly import AsyncPipeline, CallNext, Chunk, Flow, LLMConfig, Pipeline, Request, Response
from fluxibly.llm import default_stack

REQUEST = Request(model="m", messages="What is the capital of France?")
CHUNK = Chunk("tok ")
CALLS = 2_000
CHUNKS = 5_000


class Fixed:
    """A provider that does nothing, so that all remaining time is spent in the library."""

    def complete(self, request: Request) -> Response:
        return Response("Paris.")

    def stream(self, request: Request) -> Iterator[Chunk]:
        for _ in range(CHUNKS):
            yield CHUNK


class AsyncFixed:
    async def complete(self, request: Request) -> Response:
        return Response("Paris.")

    async def stream(self, request: Request) -> AsyncIterator[Chunk]:
        for _ in range(CHUNKS):
            yield CHUNK


def empty(request: Request, call_next: CallNext) -> Flow[Response]:
    return (yield from call_next(request))


def onion(depth: int, innermost: Callable[[Request], object]) -> Callable[[Request], object]:
    """Return `depth` layers as closures, for the cost of a hand-written chain of functions."""
    call = innermost
    for _ in range(depth):

        def call(request: Request, within: Callable[[Request], object] = call) -> object:
            return within(request)

    return call


def stream_onion(depth: int, innermost: Callable[[Request], Iterator[Chunk]]) -> Callable[[Request], Iterator[Chunk]]:
    """Return `depth` nested generators that pass chunks on, as hand-written stream wrappers do."""
    call = innermost
    for _ in range(depth):

        def call(request: Request, within: Callable[[Request], Iterator[Chunk]] = call) -> Iterator[Chunk]:
            yield from within(request)

    return call


def repeat(call: Callable[[Request], object]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(CALLS):
            call(REQUEST)

    return run


def drain(call: Callable[[Request], Iterator[object]]) -> Callable[[], None]:
    def run() -> None:
        for _ in call(REQUEST):
            pass

    return run


def calls() -> None:
    provider = Fixed()
    stack = default_stack(LLMConfig(framework="echo", model="m"))
    results = interleaved(
        {
            "the provider alone": repeat(provider.complete),
            "closure onion of 5": repeat(onion(5, provider.complete)),
            "pipeline, no layers": repeat(Pipeline(provider).complete),
            "pipeline, 5 empty layers": repeat(Pipeline(provider, [empty] * 5).complete),
            "pipeline, default stack": repeat(Pipeline(provider, stack).complete),
        },
        per_run=CALLS,
    )
    table("A call, sync", results, goal="5 layers <= 2 µs more, default stack <= 15 µs more")


def chunks() -> None:
    provider = Fixed()
    stack = default_stack(LLMConfig(framework="echo", model="m"))
    results = interleaved(
        {
            "the provider alone": drain(provider.stream),
            "closure onion of 5": drain(stream_onion(5, provider.stream)),
            "pipeline, no layers": drain(Pipeline(provider).stream),
            "pipeline, 5 empty layers": drain(Pipeline(provider, [empty] * 5).stream),
            "pipeline, default stack": drain(Pipeline(provider, stack).stream),
        },
        per_run=CHUNKS,
    )
    table("A streamed chunk, sync", results, goal="5 layers <= 0.5 µs more, default stack <= 1.5 µs more")


def async_chunks() -> None:
    stack = default_stack(LLMConfig(framework="echo", model="m"))
    with asyncio.Runner() as runner:

        def drain_async(call: Callable[[Request], AsyncIterator[object]]) -> Callable[[], None]:
            async def read() -> None:
                async for _ in call(REQUEST):
                    pass

            return lambda: runner.run(read())

        provider = AsyncFixed()
        results = interleaved(
            {
                "the provider alone": drain_async(provider.stream),
                "pipeline, no layers": drain_async(AsyncPipeline(provider).stream),
                "pipeline, 5 empty layers": drain_async(AsyncPipeline(provider, [empty] * 5).stream),
                "pipeline, default stack": drain_async(AsyncPipeline(provider, stack).stream),
            },
            per_run=CHUNKS,
        )
    table("A streamed chunk, async", results, goal="default stack <= 4 µs more")


def main() -> None:
    """Run all in-process benchmarks, with logging off and without a telemetry SDK."""
    logging.getLogger("fluxibly").setLevel(logging.CRITICAL + 1)
    calls()
    chunks()
    async_chunks()


if __name__ == "__main__":
    main()
