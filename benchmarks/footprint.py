"""The import time of fluxibly, and the memory of an open stream. Run with `python -m benchmarks.footprint`."""

from __future__ import annotations

import importlib.util
import statistics
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from time import perf_counter

from benchmarks.measure import left_out, table
from fluxibly import Chunk, LLMConfig, Pipeline, Request, Response
from fluxibly.llm import default_stack

PEERS = ("httpx", "openai", "anthropic", "langchain_openai", "litellm")
ROUNDS = 7
STREAMS = 1_000
READ = 20
"""The number of chunks that are read from each stream before its memory is measured."""


def imports() -> None:
    """Print the milliseconds that an import takes in a fresh interpreter. The packages take turns."""
    programs = {"bare Python": "pass", "fluxibly": "import fluxibly", "LLM": "from fluxibly import LLM"}
    missing = [name for name in PEERS if importlib.util.find_spec(name) is None]
    programs |= {name: f"import {name}" for name in PEERS if name not in missing}
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(ROUNDS):
        for name, program in programs.items():
            start = perf_counter()
            subprocess.run([sys.executable, "-c", program], check=True, env={"LITELLM_LOCAL_MODEL_COST_MAP": "True"})  # noqa: S603  # a program from above
            times[name].append((perf_counter() - start) * 1e3)
    table(
        "Import",
        {n: statistics.median(v) for n, v in times.items()},
        unit="ms",
        goal="LLM <= 0.7 of what httpx takes more",
    )
    left_out(missing)


class Endless:
    def complete(self, request: Request) -> Response:
        return Response("x")

    def stream(self, request: Request) -> Iterator[Chunk]:
        while True:
            yield Chunk("four")


def memory() -> None:
    """Print the bytes that an open stream through the default stack holds beyond those of the provider."""
    request = Request(model="m", messages="hi")
    provider = Endless()

    def weigh(make: object) -> float:
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        streams = [make() for _ in range(STREAMS)]  # type: ignore[operator]
        for stream in streams:
            for _ in range(READ):
                next(stream)
        held = (tracemalloc.get_traced_memory()[0] - before) / STREAMS
        tracemalloc.stop()
        for stream in streams:
            stream.close()
        return held

    stack = default_stack(LLMConfig(framework="echo", model="m"))
    empty, full = Pipeline(provider), Pipeline(provider, stack)
    results = {
        "the provider alone": weigh(lambda: provider.stream(request)),
        "pipeline, no layers": weigh(lambda: empty.stream(request)),
        "pipeline, default stack": weigh(lambda: full.stream(request)),
    }
    table(f"An open stream, {READ} chunks read", results, unit="bytes", goal="<= 10,240 bytes more")


def main() -> None:
    """Run the benchmarks of import time and memory."""
    import logging

    logging.getLogger("fluxibly").setLevel(logging.CRITICAL + 1)
    imports()
    memory()


if __name__ == "__main__":
    main()
