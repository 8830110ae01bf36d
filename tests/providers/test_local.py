"""The local model in this process. A small model's text is unreliable, so the tests assert only on the protocol."""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import threading
import weakref
from pathlib import Path
from typing import Annotated, Any, Literal

import anyio
import attrs
import msgspec
import pytest

from fluxibly import LLM, AsyncLLM, LLMConfig, Message, Request, Response
from fluxibly.config import Timeouts
from fluxibly.errors import BadRequest, ConfigError, ContextLengthExceeded, ProviderError, RequestTimeout, StreamStalled
from fluxibly.middleware import Logging
from fluxibly.providers.local import AsyncLocalProvider, LocalProvider, _engine
from fluxibly.providers.local._engine import QUEUE_LIMIT, Generation, Settings, settings_of
from fluxibly.providers.local._provider import LocalStream
from fluxibly.testing import check_provider
from fluxibly.types import Image

pytest.importorskip("xllamacpp")

QUESTION = "What is the capital of France?"
ENDLESS = "Count from one to one thousand. One, two, three,"


def config_of(gguf: Path, *, timeout: float | Timeouts = 60.0, **params: Any) -> LLMConfig:
    params = {"n_threads": 1, "n_ctx": 1024, **params}
    return LLMConfig(framework="local", model=str(gguf), temperature=0, timeout=timeout, additional_params=params)


@pytest.fixture(scope="module")
def config(gguf: Path) -> LLMConfig:
    """Return the configuration of the small model on a single thread."""
    return config_of(gguf)


@pytest.fixture(scope="module")
def llm(config: LLMConfig) -> LLM:
    return LLM(config, middleware=[])


def running() -> int:
    return sum(thread.name == "fluxibly-local" for thread in threading.enumerate())


def check_answer(response: Response) -> None:
    assert response.text
    assert response.finish_reason == "stop"
    assert response.usage is not None
    assert response.usage.input_tokens == 16
    assert response.usage.output_tokens
    assert response.model
    assert response.id


@pytest.mark.model
def test_whole(llm: LLM) -> None:
    """A whole response has text, usage, a finish reason, and llama.cpp's timings in `raw`."""
    response = llm.complete(QUESTION)
    check_answer(response)
    assert response.raw["timings"]["predicted_n"] == response.usage.output_tokens  # type: ignore[union-attr]


@pytest.mark.model
def test_streamed(llm: LLM) -> None:
    """A stream has many chunks, whose texts join to the text of the whole response."""
    whole = llm.complete(QUESTION)
    with llm.stream(QUESTION) as stream:
        texts = [chunk.text for chunk in stream]
    check_answer(stream.response)
    assert "".join(texts) == stream.response.text == whole.text
    assert sum(map(bool, texts)) > 2


@pytest.mark.model
def test_async(config: LLMConfig, anyio_backend: str, llm: LLM) -> None:
    """Both async modes return the same as the sync modes, on asyncio and trio."""

    async def main() -> None:
        async with AsyncLLM(config, middleware=[]) as allm:
            whole = await allm.complete(QUESTION)
            async with allm.stream(QUESTION) as stream:
                texts = [chunk.text async for chunk in stream]
        check_answer(whole)
        check_answer(stream.response)
        assert "".join(texts) == stream.response.text == whole.text == expected

    expected = llm.forward(QUESTION)
    anyio.run(main, backend=anyio_backend)


@pytest.mark.model
def test_async_cancelled(config: LLMConfig, anyio_backend: str) -> None:
    """A cancelled call stops the generation, streamed or not."""

    async def main() -> None:
        async with AsyncLLM(config, middleware=[]) as allm:
            with anyio.move_on_after(0.3) as scope:
                await allm.complete(ENDLESS)
            assert scope.cancelled_caught
            async with anyio.create_task_group() as group:

                async def read() -> None:
                    async for _ in allm.forward_stream(ENDLESS):
                        group.cancel_scope.cancel()

                group.start_soon(read)
        with anyio.fail_after(30):
            while running():  # noqa: ASYNC110  # nothing that could be awaited tells that a generation has ended
                await anyio.sleep(0.01)

    anyio.run(main, backend=anyio_backend)


def wait_for_end() -> None:
    """Wait until no generation is running. If it never ends, the test's own time limit fails the test."""
    for thread in threading.enumerate():
        if thread.name == "fluxibly-local":
            thread.join()


@pytest.mark.model
def test_break_stops_it(llm: LLM) -> None:
    """Leaving a stream early stops the generation."""
    with llm.stream(ENDLESS) as stream:
        next(stream)
    wait_for_end()


@pytest.mark.model
def test_dropped_stops_it(llm: LLM) -> None:
    """Dropping the iterator of a stream stops the generation."""
    texts = llm.forward_stream(ENDLESS)
    next(texts)
    del texts
    wait_for_end()


@pytest.mark.model
def test_close_from_another_thread(config: LLMConfig, caplog: pytest.LogCaptureFixture) -> None:
    """Closing a stream from another thread ends the current read and the generation. The stream counts as abandoned."""
    caplog.set_level(logging.INFO, "fluxibly")
    stream = LLM(config, [Logging()]).stream(ENDLESS)
    first = threading.Event()
    got: list[str] = []

    def read() -> None:
        for chunk in stream:
            got.append(chunk.text)
            first.set()

    reader = threading.Thread(target=read)
    reader.start()
    first.wait()
    stream.close()
    reader.join()
    wait_for_end()
    assert caplog.messages[-1].startswith("LLM streaming abandoned | ")


@pytest.mark.model
def test_close_while_the_prompt_is_processed(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processing of a long prompt stops between two batches, before any output."""
    provider = LocalProvider(config_of(gguf, n_ctx=2048, n_batch=16))
    answer = provider.stream(Request(model="m", messages="word " * 1500))
    begun = threading.Event()
    start = Generation.start

    def started(generation: Generation) -> None:
        start(generation)
        begun.set()

    monkeypatch.setattr(Generation, "start", started)
    raised: list[BaseException] = []

    def read() -> None:
        try:
            next(answer)
        except ProviderError as error:
            raised.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    begun.wait()
    answer.abort()
    reader.join()
    wait_for_end()
    assert [str(error) for error in raised] == ["the stream was closed while it was being read"]


@pytest.mark.model
def test_slow_consumer(llm: LLM) -> None:
    """A consumer slower than the model gets all chunks, and the queue between them stays bounded."""
    with llm.stream("Count from one to one hundred: one, two, three,", max_tokens=QUEUE_LIMIT + 30) as stream:
        next(stream)
        generation: Generation = stream._driver.iterator._generation
        with generation._ready:
            assert generation._ready.wait_for(lambda: len(generation._events) >= QUEUE_LIMIT, 60)
        assert len(generation._events) <= QUEUE_LIMIT
        texts = [chunk.text for chunk in stream]
    assert len(texts) > QUEUE_LIMIT
    assert stream.response.finish_reason == "length"


@pytest.mark.model
def test_many_threads(llm: LLM) -> None:
    """Concurrent calls from several threads each get their answer."""
    expected = llm.forward(QUESTION)
    answers: list[str] = []
    threads = [threading.Thread(target=lambda: answers.append(llm.forward(QUESTION))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [expected] * 4


@pytest.mark.model
@pytest.mark.parametrize("kind", [LocalProvider, AsyncLocalProvider])
def test_laws(kind: type[Any], config: LLMConfig) -> None:
    """Both providers keep the laws, for answers and for failures."""
    long = Request(model="m", messages="word " * 3000)
    request = Request(model="m", messages=QUESTION, temperature=0, max_tokens=6)
    check_provider(kind(config), request, failing=[long, request.evolve(n=2)])


@pytest.mark.model
def test_parameters(llm: LLM) -> None:
    """max_tokens, stop, seed, top_k and the penalties have their effect, and extra= reaches llama.cpp."""
    short = llm.complete(QUESTION, max_tokens=2)
    assert (short.finish_reason, short.usage.output_tokens) == ("length", 2)  # type: ignore[union-attr]
    whole = llm.forward(QUESTION)
    word = whole.split()[2]
    assert word not in llm.forward(QUESTION, stop=[word])
    hot: dict[str, Any] = {"temperature": 2.0, "max_tokens": 12}
    assert llm.forward(ENDLESS, seed=1, **hot) == llm.forward(ENDLESS, seed=1, **hot)
    assert llm.forward(ENDLESS, seed=1, **hot) != llm.forward(ENDLESS, seed=2, **hot)
    assert llm.forward(QUESTION, top_k=1, temperature=2.0) == whole
    assert llm.forward(QUESTION, extra={"top_k": 1}, temperature=2.0) == whole
    assert llm.forward(QUESTION, frequency_penalty=0.5, presence_penalty=0.5, top_p=0.9)


@pytest.mark.model
def test_json(llm: LLM) -> None:
    """The answer follows a JSON schema."""
    schema = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"]}
    answer = json.loads(llm.forward(QUESTION, response_format=schema))
    assert isinstance(answer["city"], str)


@pytest.mark.model
def test_conversation(llm: LLM) -> None:
    """System, user and assistant messages all reach the model."""
    one = llm.complete(
        [Message.system("Be brief."), Message.user("Hi"), Message.assistant("Hello"), Message.user("?")], max_tokens=3
    )
    two = llm.complete("?", max_tokens=3)
    assert one.usage.input_tokens > two.usage.input_tokens  # type: ignore[union-attr, operator]


@pytest.mark.model
@pytest.mark.parametrize("streaming", [False, True])
def test_refusals(llm: LLM, streaming: bool) -> None:
    """A request that llama.cpp refuses is a BadRequest, however the library reports it, and is not retryable."""

    def call(prompt: str | list[Message], **overrides: Any) -> None:
        if streaming:
            list(llm.forward_stream(prompt, **overrides))
        else:
            llm.forward(prompt, **overrides)

    def ask(prompt: str | list[Message] = "Hi", **overrides: Any) -> ProviderError:
        with pytest.raises(ProviderError) as caught:
            call(prompt, **overrides)
        assert not caught.value.retryable
        return caught.value

    error = ask("word " * 3000)
    assert type(error) is ContextLengthExceeded
    assert "1024" in str(error)
    assert (error.provider, error.model) == ("local", "SmolLM2-135M-Instruct.Q4_1.gguf")
    assert type(ask(n=2)) is BadRequest
    error = ask(response_format={"type": "rubbish"})
    assert type(error) is BadRequest
    assert "rubbish" in str(error)
    assert type(ask(extra={"temperature": "x"})) is BadRequest
    error = ask(tools=[{"name": "f"}])
    assert type(error) is BadRequest
    assert "chat_template" in str(error)


@pytest.mark.model
def test_time_limits(gguf: Path) -> None:
    """The total time of a whole answer, the first byte and the idle time have limits, each with its own error."""
    with pytest.raises(RequestTimeout, match=r"not complete within 0\.2 s") as total:
        LLM(config_of(gguf, timeout=Timeouts(total=0.2)), middleware=[]).forward(ENDLESS)
    assert total.value.phase == "total"
    with pytest.raises(RequestTimeout, match="no output came within 1e-06 s") as first:
        list(LLM(config_of(gguf, timeout=Timeouts(first_byte=1e-6)), middleware=[]).forward_stream(ENDLESS))
    assert first.value.phase == "first_byte"
    with pytest.raises(StreamStalled, match="no further output came"):
        list(LLM(config_of(gguf, timeout=Timeouts(idle=1e-6)), middleware=[]).forward_stream(ENDLESS))
    wait_for_end()


@pytest.mark.model
def test_shared_and_freed(gguf: Path) -> None:
    """Providers with the same model and settings share it. The last to close frees it, and a later call reloads it."""
    config = config_of(gguf, n_ctx=512)
    one, two, other = LocalProvider(config), LocalProvider(config), LocalProvider(config_of(gguf, n_ctx=256))
    request = Request(model="m", messages="Hi", max_tokens=1)
    for provider in (one, two, other):
        provider.complete(request)
    wait_for_end()
    assert one._engine is two._engine
    assert one._engine is not other._engine
    engine = weakref.ref(one._engine)  # type: ignore[arg-type]
    one.close()
    assert engine() is not None
    two.close()
    gc.collect()
    assert engine() is None
    assert one.complete(request).finish_reason == "length"


@pytest.mark.model
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_freed_before_it_was_asked(gguf: Path) -> None:
    """A model can be freed right after loading, even if its own thread has not started to work."""
    for n_ctx in range(256, 512, 64):
        LocalProvider(config_of(gguf, n_ctx=n_ctx)).load()
        gc.collect()
        assert all(settings.n_ctx != n_ctx for _, settings, _ in _engine._engines)


def test_interrupted_while_it_is_loaded() -> None:
    """Ctrl-C ends the wait at once, but the model is freed only after its own thread has answered."""
    did: list[str] = []
    waits = threading.Event()

    class Library:
        class Server:
            def __init__(self, params: object) -> None:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                assert waits.wait(30)

            def handle_metrics(self) -> str:
                did.append("answered")
                return ""

            def __del__(self) -> None:
                did.append("freed")

    with pytest.raises(KeyboardInterrupt):
        _engine._start(Library, None)
    assert did == []
    waits.set()
    for thread in threading.enumerate():
        if thread.name == "fluxibly-local-load":
            thread.join()
    gc.collect()
    assert did == ["answered", "freed"]


def test_forked(llm: LLM) -> None:
    """A forked child loads the model again rather than waiting for threads that it does not have."""
    expected = llm.forward(QUESTION)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writing, llm.forward(QUESTION).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        assert answer.read() == expected
    os.waitpid(pid, 0)


def test_file_that_llama_cannot_load(tmp_path: Path) -> None:
    """The error for a file with the right magic number and rubbish after it names the file."""
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(ProviderError, match=r"could not load broken\.gguf"):
        LLM(config_of(path), middleware=[]).forward("Hi")


def test_no_such_model() -> None:
    """A model that is neither known nor a file is reported when the provider is created."""
    with pytest.raises(ConfigError, match=r"give smollm2, qwen2\.5-coder-0\.5b, or the path"):
        LLM(config_of(Path("no/such.gguf")), middleware=[])


@pytest.mark.parametrize(
    ("params", "problem"),
    [
        ({"n_ctx": "many"}, "additional_params.n_ctx: expected a whole number from 64 up, got 'many'"),
        ({"n_threads": 0}, "additional_params.n_threads: expected a whole number from 1 up, got 0"),
        ({"n_batch": True}, "additional_params.n_batch: expected a whole number from 1 up, got True"),
        ({"chat_template": ""}, "additional_params.chat_template: expected a non-empty str, got ''"),
    ],
)
def test_bad_settings(params: dict[str, Any], problem: str) -> None:
    """The error for an invalid setting has its name and its range."""
    with pytest.raises(ConfigError) as caught:
        settings_of(params)
    assert problem in str(caught.value)


def test_settings() -> None:
    """The settings come from additional_params. Tools need a template that supports them."""
    assert settings_of({"n_ctx": 512, "mirostat": 2}) == Settings(n_ctx=512)
    assert not Settings().takes_tools
    assert Settings(chat_template="model").takes_tools
    assert Settings(chat_template="{% for t in tools %}{% endfor %}").takes_tools


def test_media_are_refused(tmp_path: Path) -> None:
    """A model that reads only text refuses media, before it is loaded."""
    file = tmp_path / "some.gguf"
    file.write_bytes(b"GGUF" + bytes(20))
    request = Request(model="m", messages=Message.user(["look", Image(data=b"1", media_type="image/png")]))
    with pytest.raises(BadRequest, match=r"expected only text for the local model some\.gguf, got an Image"):
        LocalProvider(config_of(file)).complete(request)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without xllamacpp the error names what to install."""
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "xllamacpp" else find(name, *a))
    with pytest.raises(ConfigError, match=r"pip install xllamacpp"):
        LocalProvider(LLMConfig(framework="local", model="smollm2"))


def test_unread_stream(tmp_path: Path) -> None:
    """A stream that is never read does not load the model and closes without an error."""
    path = tmp_path / "empty.gguf"
    path.write_bytes(b"GGUF")
    answer = LocalProvider(config_of(path)).stream(Request(model="m", messages="Hi"))
    assert isinstance(answer, LocalStream)
    answer.close()
    assert list(answer) == []
    assert answer._provider._engine is None


class Pushes:
    """A stand-in for xllamacpp's server that pushes the given events."""

    def __init__(self, *events: dict[str, Any], error: Exception | None = None) -> None:
        self.events = events
        self.error = error
        self.server = self

    def handle_chat_completions(self, body: dict[str, Any], callback: Any) -> None:
        for event in self.events:
            if callback(event):
                return
        if self.error is not None:
            raise self.error


def test_generation_carries_errors() -> None:
    """An exception of the library after some events is raised to the reader, after those events."""
    engine: Any = Pushes({"n": 1}, error=ValueError("bad"))
    generation = Generation(engine, {})
    generation.start()
    assert generation.next_event(None) == {"n": 1}
    with pytest.raises(ValueError, match="bad"):
        generation.next_event(None)
    generation.join()


def test_generation_stopped_while_its_queue_is_full() -> None:
    """Stopping a generation wakes a callback that waits for an absent consumer."""
    engine: Any = Pushes(*({"n": n} for n in range(QUEUE_LIMIT * 2)))
    generation = Generation(engine, {})
    generation.start()
    generation.stop()
    generation.join()
    with pytest.raises(_engine.Stopped):
        generation.next_event(None)


# Answers as objects


@attrs.frozen
class Described:
    name: Literal["Ann", "Bo"]
    mood: Literal["happy", "sad"]
    age: Annotated[int, msgspec.Meta(ge=0, le=120)] | None


@pytest.mark.model
def test_the_grammar_holds_the_model_to_a_type(llm: LLM) -> None:
    """The smallest model answers with an instance, because no other text is possible."""
    found = llm.parse("Ann is 34 years old and happy. Describe her.", Described, max_tokens=150)
    assert isinstance(found, Described)
    assert found.mood in ("happy", "sad")
    colours = llm.parse(
        "Name one colour.", Annotated[list[Literal["red", "green"]], msgspec.Meta(max_length=3)], max_tokens=100
    )
    assert set(colours) <= {"red", "green"}
    place = llm.parse("Where is Ann?", tuple[Literal[1, 2], Literal["here"]], max_tokens=60)
    assert place in {(1, "here"), (2, "here")}


@pytest.mark.model
def test_a_streamed_object_grows(llm: LLM) -> None:
    """`partial_parsed` grows with the text, and ends as the instance."""
    with llm.stream("Ann is 34 years old and happy. Describe her.", into=Described, max_tokens=150) as stream:
        seen = [stream.partial_parsed for _ in stream]
    assert isinstance(stream.response.parsed, Described)
    assert seen[-1] == stream.response.parsed
    assert any(isinstance(each, dict) and each.keys() == {"name"} for each in seen)
