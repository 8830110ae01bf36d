"""How long another library's stream, or the local model's, may keep its reader waiting."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from fluxibly import LLMConfig
from fluxibly.config import Timeouts
from fluxibly.errors import RequestTimeout, StreamStalled
from fluxibly.providers._libraries.calls import (
    LibraryLimits,
    LibraryStream,
    LibraryTimeout,
    OpenStream,
    library_stream,
    read_timeout,
)
from fluxibly.providers._libraries.errors import ErrorTranslator
from fluxibly.types import Chunk, Request

IDLE = 0.1


def config(timeout: float | Timeouts | None) -> LLMConfig:
    return LLMConfig(framework="langchain", model="m", timeout=timeout)


def items(pieces: list[str], gap: float) -> Iterator[str]:
    """Yield pieces of a text; "" is an item without output."""
    for piece in pieces:
        time.sleep(gap)
        yield piece


def chunks(item: str) -> Iterator[Chunk]:
    if item:
        yield Chunk(item)


def explain(error: Exception, _begun: bool) -> Exception:
    return error


def read(mode: str, pieces: list[str], *, limits: LibraryLimits, gap: float = 0.02) -> list[str]:
    """Return the texts of a library's stream."""
    if mode == "sync":

        def open_stream() -> OpenStream:
            found = items(pieces, gap)
            return OpenStream(found, lambda: None, lambda: None)

        return [chunk.text for chunk in LibraryStream(open_stream, limits, chunks, tuple, explain)]

    async def aitems() -> AsyncIterator[str]:
        for piece in pieces:
            await asyncio.sleep(gap)
            yield piece

    async def aopen() -> AsyncIterator[str]:
        return aitems()

    async def main() -> list[str]:
        return [chunk.text async for chunk in library_stream(aopen, limits, chunks, tuple, explain)]

    return asyncio.run(main())


@pytest.mark.parametrize("mode", ["sync", "asyncio"])
class TestLibraries:
    def test_items_without_output_keep_a_stream_alive(self, mode: str) -> None:
        """They may take longer than the idle limit together."""
        pieces = ["one ", *[""] * 12, "two"]
        assert read(mode, pieces, limits=LibraryLimits(idle=IDLE)) == ["one ", "two"]

    def test_nothing_else(self, mode: str) -> None:
        """A wait for output ends at ten times the idle limit."""
        with pytest.raises(LibraryTimeout) as caught:
            read(mode, ["one ", *[""] * 10_000], limits=LibraryLimits(idle=IDLE / 2), gap=0.01)
        assert (caught.value.phase, caught.value.seconds, caught.value.kept_alive) == ("idle", 10 * IDLE / 2, True)

    def test_output_starts_the_wait_again(self, mode: str) -> None:
        """A long stream is no long wait."""
        pieces = ["", "", "", "x"] * 10
        assert read(mode, pieces, limits=LibraryLimits(idle=IDLE / 2), gap=0.02) == ["x"] * 10

    def test_silence(self, mode: str) -> None:
        """The next item has the idle limit."""
        with pytest.raises(LibraryTimeout) as caught:
            read(mode, ["one ", "two"], limits=LibraryLimits(first=5, idle=IDLE), gap=3 * IDLE)
        assert (caught.value.phase, caught.value.seconds, caught.value.kept_alive) == ("idle", IDLE, False)


@pytest.mark.parametrize(("kept_alive", "what"), [(True, "only keep-alives"), (False, "nothing")])
def test_the_message_says_which_limit(kept_alive: bool, what: str) -> None:
    """A stream that only kept itself alive is told from one that fell silent."""
    translate = ErrorTranslator(library="LangChain", framework="langchain")
    error = translate(LibraryTimeout("idle", 1200, kept_alive=kept_alive), "m", streamed=True)
    assert isinstance(error, StreamStalled)
    assert f"the stream sent {what} for longer than 1200 s" in str(error)


@pytest.mark.parametrize(
    ("timeout", "expected", "read"),
    [
        (None, LibraryLimits(call=600, first=610, idle=120), 600),
        (5, LibraryLimits(call=5, first=10, idle=5), 5),
        (Timeouts(idle=900), LibraryLimits(call=600, first=610, idle=900), 900),
        (Timeouts(total=30), LibraryLimits(call=30, first=610, idle=120, stream=30), 600),
        (Timeouts(total=None, first_byte=None), LibraryLimits(idle=120), None),
    ],
)
def test_what_a_configuration_means_to_a_library(
    timeout: float | Timeouts | None, expected: LibraryLimits, read: float | None
) -> None:
    """The limits of calls, and the single read timeout of the library's HTTP client."""
    assert LibraryLimits.of(config(timeout)) == expected
    assert read_timeout(config(timeout).timeouts) == read


class Generation:
    """A generation of the local model whose events take `gap` seconds each, on a clock of its own."""

    def __init__(self, clock: list[float], gap: float, events: list[dict[str, Any]]) -> None:
        self.clock, self.gap, self.events = clock, gap, events

    def start(self) -> None:
        pass

    def next_event(self, timeout: float | None) -> dict[str, Any] | None:
        if timeout is not None and timeout < self.gap:
            self.clock[0] += timeout
            raise RequestTimeout
        self.clock[0] += self.gap
        return self.events.pop(0) if self.events else None

    def stop(self) -> None:
        pass


PROGRESS = {"prompt_progress": {"total": 9}}


def said(text: str, reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": reason}]}


class TestLocal:
    def stream(self, monkeypatch: pytest.MonkeyPatch, timeouts: Timeouts, gap: float, events: list[Any]) -> Any:
        from fluxibly.providers.dialects.openai_chat import OpenAICodec
        from fluxibly.providers.local._provider import LocalProvider, LocalStream

        clock = [0.0]
        monkeypatch.setattr("fluxibly.providers.local._provider.time.monotonic", lambda: clock[0])

        class Provider:
            _alias = "tiny"
            late = LocalProvider.late

        provider: Any = Provider()
        provider.decoder = OpenAICodec(service="tiny").decoder
        provider.body, provider.load = (lambda request: {}), object
        monkeypatch.setattr(
            "fluxibly.providers.local._provider.Generation",
            lambda engine, body: Generation(clock, gap, list(events)),
        )
        return LocalStream(provider, Request(model="m", messages="hi"), timeouts, total=None), clock

    def test_a_long_prompt(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """News of the prompt keep the stream alive."""
        events = [*[PROGRESS] * 8, said("one "), *[PROGRESS] * 8, said("two", "stop")]
        stream, clock = self.stream(monkeypatch, Timeouts(idle=10), 9, events)
        assert "".join([chunk.text for chunk in stream]) == "one two"
        assert clock[0] > 150

    def test_nothing_but_news(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A wait for output ends at ten times the idle limit."""
        stream, clock = self.stream(monkeypatch, Timeouts(idle=10), 4, [said("one "), *[PROGRESS] * 1000])
        assert next(stream).text == "one "
        with pytest.raises(StreamStalled, match="only news of the prompt came within 100 s"):
            next(stream)
        assert clock[0] == 4 + 100

    def test_silence(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each event has the idle limit; the first has the limit of the first byte."""
        stream, _ = self.stream(monkeypatch, Timeouts(first_byte=30, idle=10), 20, [said("one "), said("two", "stop")])
        assert next(stream).text == "one "
        with pytest.raises(StreamStalled, match="no further output came within 10 s"):
            next(stream)
