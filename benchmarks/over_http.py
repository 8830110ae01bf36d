"""Calls over HTTP to a local server, compared with the installed peers. Run with `python -m benchmarks.over_http`.

fluxibly runs with its full default stack, logs to a file, and sends spans to the SDK's batch processor. Times are the
client's CPU time, and contenders take turns. The first line of each table is bare httpx, whose ratio is 1.
"""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import json
import logging
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from time import perf_counter, process_time

from benchmarks.measure import left_out, table
from benchmarks.peers import PROMPT, AsyncCall, Call, absent, async_contenders, contenders
from benchmarks.server import CHUNKS, WHOLE

FIRST = "one-word"  # asks the server for a stream of one word
ROUNDS = 9
CALLS = 60
AT_ONCE = 200


@contextmanager
def server(seconds: float = 0.0) -> Iterator[str]:
    """Run a server in its own process, and yield its base URL. A whole answer takes that many seconds."""
    command = [sys.executable, "-m", "benchmarks.server", f"{seconds}"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # noqa: S603  # ours
    assert process.stdout is not None  # noqa: S101  # for type checkers; it is a pipe
    try:
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}/v1"
    finally:
        process.terminate()
        process.wait()


def set_up_telemetry() -> None:
    """Send logs to a file and spans to the SDK's batch processor, for the same cost as in production."""
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

    class Nowhere(SpanExporter):
        def export(self, spans: object) -> SpanExportResult:
            return SpanExportResult.SUCCESS

    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(Nowhere()))
    trace.set_tracer_provider(provider)
    handler = logging.FileHandler(tempfile.mkstemp(suffix=".log")[1])
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("fluxibly")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def timed(calls: dict[str, Call], per_run: int, repeat: int) -> dict[str, float]:
    """Return the median microseconds of CPU time per unit of work. The contenders take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(3):
            call()
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = process_time()
            for _ in range(repeat):
                call()
            times[name].append((process_time() - start) / repeat / per_run * 1e6)
    return {name: statistics.median(values) for name, values in times.items()}


def raw_socket(url: str) -> Callable[[bool, str], None]:
    """Return a call over a keep-alive connection without an HTTP client, which shows the limit of the server."""
    host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
    sock = socket.create_connection((host, int(port)))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def call(stream: bool, prompt: str) -> None:
        body = json.dumps({"model": "m", "messages": [{"role": "user", "content": prompt}], "stream": stream}).encode()
        sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        seen = b""
        while not (seen.endswith(b"0\r\n\r\n") if stream else seen.endswith(b"}}")):
            seen = seen[-8:] + sock.recv(65536)

    return call


@asynccontextmanager
async def raw_streams(url: str) -> AsyncIterator[AsyncCall]:
    """Yield a call like that of `raw_socket`, but on an event loop, with one connection for each concurrent call."""
    host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": PROMPT}]}).encode()
    request = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def call() -> None:
        reader, writer = idle.pop() if idle else await asyncio.open_connection(host, int(port))
        writer.write(request)
        await reader.readexactly(len(WHOLE))
        idle.append((reader, writer))

    yield call
    for _, writer in idle:
        writer.close()


def whole_calls(url: str) -> None:
    raw = raw_socket(url)
    calls: dict[str, Call] = {name: contender.whole for name, contender in contenders(url).items()}
    calls["raw socket (the ceiling)"] = lambda: raw(False, PROMPT)
    table("A whole call, CPU time", timed(calls, 1, CALLS), goal="fluxibly <= 0.85")


def streamed_chunks(url: str) -> None:
    def drain(stream: Callable[[], Iterator[object]]) -> Call:
        def run() -> None:
            for _ in stream():
                pass

        return run

    raw = raw_socket(url)
    calls = {name: drain(contender.stream) for name, contender in contenders(url).items()}
    calls["raw socket (the ceiling)"] = lambda: raw(True, PROMPT)
    table(f"A streamed chunk ({CHUNKS} a stream), CPU time", timed(calls, CHUNKS, 3), goal="fluxibly <= 0.65")


def first_chunks(url: str) -> None:
    """Print the time from the call to the first piece. The rest of the short stream is not timed."""
    streams = {name: contender.stream for name, contender in contenders(url, FIRST).items()}
    times: dict[str, list[float]] = {name: [] for name in streams}
    for _ in range(ROUNDS):
        for name, stream in streams.items():
            for _ in range(20):  # consecutive, so that the threads of one contender do not run in another's time
                start = process_time()
                pieces = stream()
                next(iter(pieces))
                times[name].append((process_time() - start) * 1e6)
                for _ in pieces:
                    pass
    table("To the first chunk, CPU time", {n: statistics.median(v) for n, v in times.items()}, goal="fluxibly <= 0.85")


def at_once(url: str) -> None:
    """Print the calls per second with 200 concurrent calls on one event loop."""
    rates: dict[str, list[float]] = {}

    async def one_round() -> None:
        # Each round uses new clients, because httpx closes connections that are idle for 5 s, as they would be during
        # the turns of the other contenders.
        async with async_contenders(url) as calls, raw_streams(url) as raw:
            calls["asyncio's streams (the ceiling)"] = raw
            for name, call in calls.items():
                await asyncio.gather(*(call() for _ in range(AT_ONCE)))
                start = perf_counter()
                for _ in range(2):
                    await asyncio.gather(*(call() for _ in range(AT_ONCE)))
                rates.setdefault(name, []).append(2 * AT_ONCE / (perf_counter() - start))

    async def rounds() -> None:
        for _ in range(3):  # on one event loop, because some peers keep clients that are bound to their event loop
            await one_round()

    gc.collect()
    gc.freeze()  # excludes the imports of the other tables' contenders from the collector's work
    asyncio.run(rounds())
    gc.unfreeze()
    table(
        f"{AT_ONCE} calls at once on one event loop",
        {name: statistics.median(values) for name, values in rates.items()},
        unit="calls/s",
        goal="fluxibly >= 3",
    )
    if importlib.util.find_spec("sniffio"):
        print("  sniffio is installed here, which spares httpx.AsyncClient a quarter of its time or more.")


def main() -> None:
    """Run all benchmarks over HTTP."""
    set_up_telemetry()
    with server() as url:
        whole_calls(url)
        streamed_chunks(url)
        first_chunks(url)
        at_once(url)
    left_out(absent())


if __name__ == "__main__":
    main()
