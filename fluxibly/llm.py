"""`LLM` and `AsyncLLM`: a configured model behind a stack of middleware."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict, overload

from fluxibly._checks import did_you_mean
from fluxibly.config import LLMConfig, parameter_problems
from fluxibly.errors import ConfigError
from fluxibly.flow import Middleware
from fluxibly.messages import Message, Tool
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.registry import make_middleware, make_provider
from fluxibly.stream import AsyncStream, Stream
from fluxibly.types import Chunk, Request, Response, Restart

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Self, Unpack

__all__ = ["LLM", "AsyncLLM", "LLMConfig"]

Prompt: TypeAlias = str | Message | Sequence[Message]


class Overrides(TypedDict, total=False):
    """What a call may set for itself; see `Request` for what each means. It wins over the configuration."""

    model: str
    temperature: float | None
    max_tokens: int | None
    top_p: float | None
    top_k: int | None
    frequency_penalty: float | None
    presence_penalty: float | None
    stop: str | Iterable[str] | None
    seed: int | None
    n: int | None
    tools: Iterable[Tool | Mapping[str, Any]] | None
    tool_choice: str | None
    response_format: Literal["text", "json"] | Mapping[str, Any] | None
    reasoning_effort: str | None
    extra: Mapping[str, Any]
    headers: Mapping[str, str]
    metadata: Mapping[str, Any]


_OVERRIDES = frozenset(Overrides.__annotations__)
_FROM_CONFIG = ("model", "temperature", "max_tokens", "top_p", "frequency_penalty", "presence_penalty")


def default_stack(config: LLMConfig) -> tuple[Middleware, ...]:
    """The middleware of a configuration that names none, outermost first."""
    from fluxibly.middleware import Logging, Metrics, Retry, StreamMeter, Timing, Tracing, Validation

    return (
        Logging(),
        Tracing(),
        Metrics(),
        Timing(),
        StreamMeter(),
        Validation(),
        Retry(max_retries=config.max_retries),
    )


class _LLM:
    """What `LLM` and `AsyncLLM` share: the configuration, and how a request is made of a prompt."""

    def __init__(self, config: LLMConfig, middleware: Iterable[Middleware] | None = None) -> None:
        if not isinstance(config, LLMConfig):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"{type(self).__name__} takes an LLMConfig, not a {type(config).__name__}")
        self.config = config
        if isinstance(middleware, str) or not isinstance(middleware, Iterable | None):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"middleware is a list, like [Logging(), Retry()], not a {type(middleware).__name__}")
        if middleware is not None:
            self._stack = make_middleware(list(middleware))
        elif config.middleware is not None:
            self._stack = make_middleware(config.middleware)
        else:
            self._stack = default_stack(config)
        self._template = Request(
            model=config.model,
            messages="-",
            **{name: getattr(config, name) for name in _FROM_CONFIG[1:]},
            extra=dict(config.additional_params),
        )

    def __repr__(self) -> str:
        layers = ", ".join(map(repr, self._stack))
        return f"{type(self).__name__}({self.config.framework!r}, {self.config.model!r}, middleware=[{layers}])"

    @classmethod
    def from_yaml(
        cls, file: str | Path, *, section: str = "llm", middleware: Iterable[Middleware] | None = None
    ) -> Self:
        """Configure it from a section of a YAML file; see `LLMConfig.from_yaml`."""
        return cls(LLMConfig.from_yaml(file, section=section), middleware)

    def request(self, prompt: Prompt, overrides: Mapping[str, Any]) -> Request:
        """The request that a prompt and a call's own settings come to.

        Raises:
            TypeError: an override that there is not (the nearest one is named), or a prompt of the wrong type.
            ValueError: an empty prompt, or a value out of its range.
        """
        if not overrides:
            return self._template.evolve(messages=prompt)
        changes = dict(overrides)
        for name in changes:
            if name not in _OVERRIDES:
                hint = "; it is for stream()" if name == "restarts" else did_you_mean(name, _OVERRIDES)
                raise TypeError(f"a call takes no {name!r}{hint}; provider parameters go in extra=")
        problems = parameter_problems(changes)
        if problems:
            raise ConfigError("; ".join(problems), problems=tuple(problems))
        if "extra" in changes:
            changes["extra"] = {**self.config.additional_params, **changes["extra"]}
        return self._template.evolve(messages=prompt, **changes)


class LLM(_LLM):
    """A language model, called synchronously. Safe for use from many threads at once.

    Args:
        config: which model, and how.
        middleware: the stack, outermost first; by default the configuration's, else the default stack.

    Raises:
        FrameworkNotRegistered: the configuration's framework is unknown.
        ConfigError: an extra or a key is missing, or a middleware unknown.
    """

    def __init__(self, config: LLMConfig, middleware: Iterable[Middleware] | None = None) -> None:
        super().__init__(config, middleware)
        self.pipeline = Pipeline(make_provider(config, asynchronous=False), self._stack, framework=config.framework)

    def forward(self, prompt: Prompt, **overrides: Unpack[Overrides]) -> str:
        """The model's answer to a prompt, as text.

        Raises:
            FluxiblyError: or whatever the provider or a middleware raised.
        """
        return self.complete(prompt, **overrides).text

    def forward_stream(self, prompt: Prompt, **overrides: Unpack[Overrides]) -> Generator[str, None, None]:
        """The model's answer, text by text as it comes. Closing the generator gives the stream up.

        Raises:
            NotImplementedError: the provider cannot stream. (A provider's errors come at the first iteration.)
        """
        return self.stream(prompt, **overrides).texts()

    def complete(self, prompt: Prompt, **overrides: Unpack[Overrides]) -> Response:
        """The model's answer to a prompt, with all that is known of it."""
        return self.pipeline.complete(self.request(prompt, overrides))

    @overload
    def stream(
        self, prompt: Prompt, *, restarts: Literal[False] = False, **overrides: Unpack[Overrides]
    ) -> Stream[Chunk]: ...
    @overload
    def stream(self, prompt: Prompt, *, restarts: bool, **overrides: Unpack[Overrides]) -> Stream[Chunk | Restart]: ...
    def stream(self, prompt: Prompt, *, restarts: bool = False, **overrides: Unpack[Overrides]) -> Stream[Any]:
        """The model's answer as a `Stream`; see `Pipeline.stream`."""
        return self.pipeline.stream(self.request(prompt, overrides), restarts=restarts)

    def close(self) -> None:
        """Close the provider's connections. Twice is fine; a call after it is a RuntimeError."""
        self.pipeline.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncLLM(_LLM):
    """A language model, called from coroutines, on asyncio or trio. Takes what `LLM` takes, middleware included."""

    def __init__(self, config: LLMConfig, middleware: Iterable[Middleware] | None = None) -> None:
        super().__init__(config, middleware)
        self.pipeline = AsyncPipeline(make_provider(config, asynchronous=True), self._stack, framework=config.framework)

    async def forward(self, prompt: Prompt, **overrides: Unpack[Overrides]) -> str:
        """The model's answer to a prompt, as text.

        Raises:
            FluxiblyError: or whatever the provider or a middleware raised.
        """
        return (await self.complete(prompt, **overrides)).text

    def forward_stream(self, prompt: Prompt, **overrides: Unpack[Overrides]) -> AsyncGenerator[str, None]:
        """The model's answer, text by text as it comes: `async for text in llm.forward_stream("…")`.

        Raises:
            NotImplementedError: the provider cannot stream. (A provider's errors come at the first iteration.)
        """
        return self.stream(prompt, **overrides).texts()

    async def complete(self, prompt: Prompt, **overrides: Unpack[Overrides]) -> Response:
        """The model's answer to a prompt, with all that is known of it."""
        return await self.pipeline.complete(self.request(prompt, overrides))

    @overload
    def stream(
        self, prompt: Prompt, *, restarts: Literal[False] = False, **overrides: Unpack[Overrides]
    ) -> AsyncStream[Chunk]: ...
    @overload
    def stream(
        self, prompt: Prompt, *, restarts: bool, **overrides: Unpack[Overrides]
    ) -> AsyncStream[Chunk | Restart]: ...
    def stream(self, prompt: Prompt, *, restarts: bool = False, **overrides: Unpack[Overrides]) -> AsyncStream[Any]:
        """The model's answer as an `AsyncStream`, for `async with`; see `AsyncPipeline.stream`."""
        return self.pipeline.stream(self.request(prompt, overrides), restarts=restarts)

    async def aclose(self) -> None:
        """Close the provider's connections. Twice is fine; a call after it is a RuntimeError."""
        await self.pipeline.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
