"""The limits of one call to the local model: those of its leash, and its own in place of the configuration's."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from support.libraries import MODES, STREAM_MODES

from fluxibly import LLMConfig, Request
from fluxibly.errors import DeadlineExceeded, ProviderError, RequestTimeout, StreamStalled
from fluxibly.limits import Leash, Timeouts
from fluxibly.providers.local import AsyncLocalProvider, LocalProvider, _engine

pytest.importorskip("xllamacpp")

SHORT = 0.1
"""A limit that passes, in seconds."""
ENOUGH = 0.25
"""A limit that does not pass while the model answers at once."""
LONG = 0.3
"""Longer than both."""

Events = list[dict[str, Any]]
PROGRESS: dict[str, Any] = {"prompt_progress": {"total": 9}}


def said(text: str, reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": reason}]}


ANSWER = [said("one "), said("two", "stop")]


class Model:
    """A stand-in for a model that takes a while to load, and `gap` seconds for each event."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.server = self
        self.events: Events = ANSWER
        self.gap = 0.0
        self.loads = 0
        self.answers = 0
        self.loading = 0.0
        self.loaded = threading.Event()
        self.returned = threading.Event()
        self.over = threading.Event()

    def load(self, *_: object) -> Model:
        self.loads += 1
        time.sleep(self.loading)
        self.loaded.set()
        return self

    def handle_chat_completions(self, body: object, callback: Callable[[object], bool]) -> None:
        self.answers += 1
        for event in self.events:
            if self.over.wait(self.gap) or callback(event):
                break
        self.returned.set()


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Iterator[Model]:
    model = Model()
    monkeypatch.setattr("fluxibly.providers.local._provider.load", model.load)
    yield model
    model.over.set()


@pytest.fixture
def path(tmp_path: Path) -> str:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"GGUF")
    return str(path)


def leashed(*, deadline: float | None = None, **limits: float) -> Request:
    """Return a request under a leash. Each of its attempts begins `deadline` seconds before the deadline."""
    request = Request(model="m", messages="hi")
    request.call.clock = lambda: 100.0
    end = None if deadline is None else 100.0 + deadline
    request.call.leash = Leash(None, deadline=end, **limits, by="the test")
    return request


def limited(times: Timeouts) -> Request:
    request = Request(model="m", messages="hi")
    request.call.timeouts = times
    return request


def drive(mode: str, path: str, request: Request, *, timeout: float | Timeouts = 60.0, pause: float = 0) -> str:
    """Return the text of an answer in a mode. The consumer takes `pause` seconds for each chunk of a stream."""
    config = LLMConfig(framework="local", model=path, timeout=timeout)
    backend, _, streamed = mode.partition(" ")
    texts: list[str] = []
    if backend == "sync":
        provider = LocalProvider(config)
        assert provider.obeys is True
        if not streamed:
            return provider.complete(request).text
        for chunk in provider.stream(request):
            texts.append(chunk.text)
            time.sleep(pause)
        return "".join(texts)

    async def main() -> str:
        provider: Any = AsyncLocalProvider(config)
        assert provider.obeys is True
        if not streamed:
            answer = await provider.complete(request)
            return str(answer.text)
        async for chunk in provider.stream(request):
            texts.append(chunk.text)
            await anyio.sleep(pause)
        return "".join(texts)

    return anyio.run(main, backend=backend)


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=STREAM_MODES)
def stream_mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class TestDeadline:
    @pytest.mark.parametrize(
        ("events", "gap"), [([said("one ")], 10), ([PROGRESS] * 1000, 0.01), ([said("one ")] * 1000, 0.01)]
    )
    def test_it_ends_every_wait(self, model: Model, mode: str, path: str, events: Events, gap: float) -> None:
        """Whatever the model does, the call ends at its deadline."""
        model.events, model.gap = events, gap
        with pytest.raises(DeadlineExceeded, match=r"not complete before the deadline \(set by the test\)") as caught:
            drive(mode, path, leashed(deadline=SHORT))
        error = caught.value
        assert (error.phase, error.retryable, error.provider, error.model) == ("deadline", False, "local", "tiny.gguf")

    def test_that_has_passed(self, model: Model, mode: str, path: str) -> None:
        """Nothing is loaded."""
        with pytest.raises(DeadlineExceeded):
            drive(mode, path, leashed(deadline=0))
        assert model.loads == 0

    def test_while_the_model_is_loaded(self, model: Model, mode: str, path: str) -> None:
        """The call stops waiting for the model."""
        model.loading = LONG
        with pytest.raises(DeadlineExceeded):
            drive(mode, path, leashed(deadline=SHORT))
        assert model.loaded.wait(10)
        assert model.answers == 0

    def test_a_model_that_is_loaded_later(self, model: Model, path: str) -> None:
        """It serves the next call, with or without a deadline."""
        model.loading = LONG
        provider = LocalProvider(LLMConfig(framework="local", model=path))
        with pytest.raises(DeadlineExceeded):
            provider.complete(leashed(deadline=SHORT))
        assert provider.complete(leashed(deadline=60)).text == "one two"
        assert provider.complete(leashed()).text == "one two"
        assert model.loads == 1

    def test_another_model_that_is_being_loaded(self, model: Model, path: str) -> None:
        """An answer does not wait for it."""
        with _engine._loading:
            assert drive("sync", path, leashed(deadline=60)) == "one two"

    def test_a_model_that_cannot_be_loaded(self, model: Model, mode: str, path: str) -> None:
        """The error reaches the caller, also one that is a timeout."""

        def load() -> None:
            raise TimeoutError("the disk sleeps")

        model.loaded.set = load  # type: ignore[method-assign]
        with pytest.raises(TimeoutError, match="the disk sleeps"):
            drive(mode, path, leashed(deadline=60))

    def test_includes_the_time_of_the_consumer(self, model: Model, stream_mode: str, path: str) -> None:
        """A read after the deadline fails, although its event is there."""
        with pytest.raises(DeadlineExceeded):
            drive(stream_mode, path, leashed(deadline=ENOUGH), pause=LONG)


class TestChunks:
    def test_no_output(self, model: Model, stream_mode: str, path: str) -> None:
        """News of the prompt do not start the limit on the first chunk again."""
        model.events, model.gap = [PROGRESS] * 1000, 0.01
        with pytest.raises(RequestTimeout, match="the limit first_chunk of the test") as caught:
            drive(stream_mode, path, leashed(first_chunk=SHORT))
        error = caught.value
        assert (type(error), error.phase, error.retryable) == (RequestTimeout, "first_chunk", True)

    def test_no_model(self, model: Model, stream_mode: str, path: str) -> None:
        """The limit on the first chunk includes the time to load the model."""
        model.loading = LONG
        with pytest.raises(RequestTimeout) as caught:
            drive(stream_mode, path, leashed(first_chunk=SHORT))
        assert caught.value.phase == "first_chunk"
        assert model.loaded.wait(10)

    def test_no_further_chunk(self, model: Model, stream_mode: str, path: str) -> None:
        """Nor do they start the limit on later chunks again."""
        model.events, model.gap = [said("one "), *[PROGRESS] * 1000], 0.01
        with pytest.raises(StreamStalled, match="the limit idle of the test") as caught:
            drive(stream_mode, path, leashed(idle=SHORT))
        assert (caught.value.phase, caught.value.retryable) == ("idle", True)

    @pytest.mark.parametrize("limit", ["first_chunk", "idle"])
    def test_the_time_of_the_consumer_does_not_count(
        self, model: Model, stream_mode: str, path: str, limit: str
    ) -> None:
        """A consumer may take its time over each chunk."""
        model.events = [said("one "), said("two "), said("three", "stop")]
        assert drive(stream_mode, path, leashed(**{limit: ENOUGH}), pause=LONG) == "one two three"

    def test_the_first_chunk_ends_its_limit(self, model: Model, stream_mode: str, path: str) -> None:
        """The limit on the first chunk is not one on later chunks, nor the reverse."""
        model.gap = LONG
        assert drive(stream_mode, path, leashed(first_chunk=1.5 * LONG)) == "one two"
        model.events = [PROGRESS, PROGRESS, said("one", "stop")]
        assert drive(stream_mode, path, leashed(idle=ENOUGH)) == "one"

    @pytest.mark.parametrize("mode", ["sync", "asyncio", "trio"])
    def test_whole_answers_have_no_such_limits(self, model: Model, mode: str, path: str) -> None:
        """A whole answer has neither limit of a stream."""
        model.gap = LONG
        assert drive(mode, path, leashed(first_chunk=SHORT, idle=SHORT)) == "one two"


class TestTimeouts:
    def test_longer(self, model: Model, mode: str, path: str) -> None:
        """A call may take longer than the configuration says."""
        model.gap = LONG
        configured = Timeouts(first_byte=SHORT, idle=SHORT, total=SHORT)
        assert drive(mode, path, limited(Timeouts()), timeout=configured) == "one two"

    @pytest.mark.parametrize(
        ("times", "phase"),
        [
            (Timeouts(first_byte=SHORT), "first_byte"),
            (Timeouts(first_byte=None, total=SHORT), "total"),
        ],
    )
    def test_shorter(self, model: Model, mode: str, path: str, times: Timeouts, phase: str) -> None:
        """A call may have less time than the configuration says."""
        model.gap = 10
        with pytest.raises(RequestTimeout) as caught:
            drive(mode, path, limited(times))
        assert (type(caught.value), caught.value.phase) == (RequestTimeout, phase)


class TestLeash:
    """A call whose leash is stopped in another thread ends soon. (Streams have `abort`.)"""

    @pytest.fixture(params=["sync", "asyncio", "trio"])
    def backend(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @pytest.mark.parametrize(("events", "gap"), [([said("one ")], 10), ([said("one ")] * 1000, 0.01)])
    def test_it_ends_a_whole_answer(self, model: Model, backend: str, path: str, events: Events, gap: float) -> None:
        """The caller stops waiting, and the model stops before the next token."""
        model.events, model.gap = events, gap
        request = leashed()
        stop_later(request)
        began = time.monotonic()
        with pytest.raises(ProviderError, match="closed while it was being read") as caught:
            drive(backend, path, request)
        assert (caught.value.provider, caught.value.retryable) == ("local", False)
        assert time.monotonic() - began < 2
        if gap < 1:
            assert model.returned.wait(2)

    def test_it_ends_the_wait_for_the_model(self, model: Model, backend: str, path: str) -> None:
        """The model is loaded for a later call."""
        model.loading = 1.0
        request = leashed()
        stop_later(request)
        began = time.monotonic()
        with pytest.raises(ProviderError, match="closed while it was being read"):
            drive(backend, path, request)
        assert time.monotonic() - began < 0.9
        assert model.loaded.wait(10)
        assert model.answers == 0

    def test_before_the_call(self, model: Model, backend: str, path: str) -> None:
        """Nothing is loaded or generated."""
        request = leashed()
        request.call.leash.stop()  # type: ignore[union-attr]
        with pytest.raises(ProviderError, match="closed while it was being read"):
            drive(backend, path, request)
        assert (model.loads, model.answers) == (0, 0)

    def test_after_the_call(self, model: Model, backend: str, path: str) -> None:
        """A late stop finds nothing to end."""
        request = leashed()
        assert drive(backend, path, request) == "one two"
        request.call.leash.stop()  # type: ignore[union-attr]
        assert drive(backend, path, leashed()) == "one two"

    @pytest.mark.parametrize("when", ["before", "while it is loaded"])
    def test_a_stream_that_is_aborted(self, model: Model, path: str, when: str) -> None:
        """A stream ends at once when it is aborted before its first read, or while the model is loaded."""
        model.loading = 1.0
        stream = LocalProvider(LLMConfig(framework="local", model=path)).stream(leashed())
        began = time.monotonic()
        if when == "before":
            stream.abort()
            assert list(stream) == []
            assert model.loads == 0
            return
        threading.Timer(SHORT, stream.abort).start()
        with pytest.raises(ProviderError, match="closed while it was being read"):
            next(stream)
        assert time.monotonic() - began < 0.9
        assert model.loaded.wait(10)
        assert model.answers == 0


def stop_later(request: Request) -> None:
    """Stop the leash of a request soon, from another thread."""
    leash = request.call.leash
    assert leash is not None
    threading.Timer(SHORT, leash.stop).start()
