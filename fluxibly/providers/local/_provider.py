"""The framework `local`: a model in this process, without a key or a network (llama.cpp through xllamacpp).

llama.cpp speaks OpenAI's dialect, so the codec is OpenAI's. Every answer is generated as a stream, even a whole
response: then Ctrl-C, a time limit or a cancellation ends it at the next token rather than the last.
"""

from __future__ import annotations

import importlib.util
import os
import threading
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import msgspec

from fluxibly._checks import kind_of
from fluxibly.aggregate import Aggregator
from fluxibly.config import KEEP_ALIVES
from fluxibly.errors import BadRequest, ProviderError, RequestTimeout, StreamStalled
from fluxibly.provider import Threaded, in_thread
from fluxibly.providers.dialects.codec import Event
from fluxibly.providers.dialects.openai_chat import ChatDecoder, OpenAICodec
from fluxibly.providers.dialects.openai_request import Quirks
from fluxibly.providers.local._engine import SETTINGS, Engine, Generation, Stopped, load, missing, settings_of
from fluxibly.providers.local._model import DEFAULT_MODEL, check_gguf, model_path, named_model
from fluxibly.types import Chunk, Media, ProviderInfo, Request, Response

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Self

    from fluxibly.config import LLMConfig, Timeouts

INFO = ProviderInfo(name="LocalProvider", framework="local", telemetry_name="local", in_process=True)
DONE = Event(b"[DONE]")


QUIRKS = Quirks(top_k=True, reasoning_fields=("reasoning_content",))
"""llama.cpp's dialect, in process."""


class LocalProvider:
    """A model in this process.

    The configuration's `model` is "smollm2" (fetched once, 93 MB) or the path of a GGUF file; `additional_params` may
    have the keys of `Settings`. The model is loaded at the first call and shared with all providers of the same model
    and settings; `close` releases it. A provider is safe to use from many threads: their calls wait for each other.

    Raises:
        ConfigError: xllamacpp is not installed, a setting is invalid, or the model does not exist.

    """

    def __init__(self, config: LLMConfig) -> None:
        if importlib.util.find_spec("xllamacpp") is None:
            raise missing()
        self.info = INFO
        self._model = config.model or DEFAULT_MODEL
        known = named_model(self._model)
        self._alias = known.name if known else check_gguf(Path(self._model).expanduser()).name
        self._settings = settings_of(config.additional_params)
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
        return LocalStream(self, request, attrs.evolve(self._timeouts, total=self._stream_total))

    def whole(self, request: Request) -> LocalStream:
        """Return an answer that is not streamed to the caller, and so has a limit on its total time."""
        return LocalStream(self, request, self._timeouts)

    def generation(self, request: Request) -> Generation:
        """Start to generate the answer, and return its generation."""
        body = self.body(request)  # a request that is refused loads no model
        generation = Generation(self._load(), body)
        generation.start()
        return generation

    def body(self, request: Request) -> dict[str, Any]:
        """Return the body of the request to llama.cpp."""
        if request.tools and not self._settings.takes_tools:
            raise BadRequest(
                f"tools: the chat template {self._settings.chat_template!r} of the local model {self._alias} does not "
                "support tools; if the model does, set additional_params: {chat_template: model}",
                provider="local",
                model=self._alias,
            )
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
        body["return_progress"] = True  # sends events during a long prompt, so that it can be cancelled
        return body

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

    def late(self, limit: float, phase: str, *, kept_alive: bool) -> RequestTimeout:
        """Return the error for a time limit that passed. `kept_alive`: the model read the prompt all the time."""
        what = {
            "idle": "only news of the prompt came" if kept_alive else "no further output came",
            "first_byte": "no output came",
        }.get(phase, "the answer was not complete")
        text = f"the local model {self._alias}: {what} within {limit:g} s; increase `timeout`, or request less"
        error = (StreamStalled if phase == "idle" else RequestTimeout)(text, provider="local", model=self._alias)
        error.phase = phase  # type: ignore[assignment]  # one of the phases
        return error

    def decoder(self) -> ChatDecoder:
        """Return a decoder for a single answer."""
        return self._codec.decoder()

    def _load(self) -> Engine:
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
    """

    def __init__(self, provider: LocalProvider, request: Request, timeouts: Timeouts) -> None:
        self.timings: Mapping[str, Any] | None = None
        """llama.cpp's own timings, once the answer is complete."""
        self._provider = provider
        self._request = request
        self._timeouts = timeouts
        self._decoder = provider.decoder()
        self._generation: Generation | None = None
        self._chunks: deque[Chunk] = deque()
        self._deadline: float | None = None
        self._limit, self._phase = timeouts.first_byte, "first_byte"
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
            self._chunks.extend(self._read())
        self._wait_end = None
        return self._chunks.popleft()

    def joined(self) -> Response:
        """Read the whole answer and return it as a response."""
        try:
            answer = Aggregator()
            for chunk in self:
                answer.add(chunk)
            return answer.response().evolve(raw={"timings": self.timings})
        finally:
            self.close()

    def close(self) -> None:
        """Stop the generation, if the answer is not complete."""
        self._over = True
        self.abort()

    def abort(self) -> None:
        """Stop the generation. A read in another thread ends at once."""
        self._stopped = True
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
        generation = self._generation = self._provider.generation(self._request)
        if self._stopped:  # stopped while the model was being loaded
            generation.stop()
        if self._timeouts.total is not None:
            self._deadline = time.monotonic() + self._timeouts.total
        return generation

    def _next_event(self, generation: Generation) -> dict[str, Any] | None:
        limit, phase = self._limit, self._phase
        kept_alive = False
        if phase == "idle" and limit is not None:
            now = time.monotonic()
            if self._wait_end is None:
                self._wait_end = now + KEEP_ALIVES * limit
            if self._wait_end - now < limit:
                limit, kept_alive = max(0.0, self._wait_end - now), True
        if self._deadline is not None:
            left = max(0.0, self._deadline - time.monotonic())
            if limit is None or left < limit:
                limit, phase = left, "total"
        try:
            event = generation.next_event(limit)
        except Stopped:
            raise ProviderError("the stream was closed while it was being read", provider="local") from None
        except RequestTimeout:
            self.close()
            stated = self._timeouts.total if phase == "total" else self._limit
            if kept_alive and phase == "idle":
                stated = KEEP_ALIVES * (stated or 0.0)
            raise self._provider.late(stated or 0.0, phase, kept_alive=kept_alive) from None
        except (ValueError, RuntimeError) as error:
            self._over = True
            raise self._provider.refusal(error) from error
        self._limit, self._phase = self._timeouts.idle, "idle"
        return event


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
