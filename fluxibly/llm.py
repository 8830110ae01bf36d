"""`LLM` and `AsyncLLM`: a configured model behind a stack of middleware."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Generator, Iterable, Mapping
from copy import copy, deepcopy
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from fluxibly._checks import kind_of
from fluxibly._keywords import KEYWORDS, NO_SETTING, configured, no_keyword
from fluxibly._merging import composed
from fluxibly._parameters import CONFIGURED, parameter_problems
from fluxibly.config import LLMConfig
from fluxibly.errors import ConfigError, Problems, ResponseInvalid
from fluxibly.flow import Middleware
from fluxibly.flow.shown import repr_of_layer
from fluxibly.limits import Timeouts
from fluxibly.messages import Prompt
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.provider import obeys
from fluxibly.registry import check_config, default_stack, make_middleware, make_provider, read_yaml, stack_into
from fluxibly.stream import AsyncStream, Stream
from fluxibly.types import Chunk, Request, Response, Restart

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Literal, Self, Unpack

    from fluxibly._mapping import Answer
    from fluxibly._parameters import Overrides
    from fluxibly._schemas.shapes import Shape
    from fluxibly.config import Settings
    from fluxibly.conversation import AsyncConversation, Conversation
    from fluxibly.explain import Explanation


__all__ = ["LLM", "AsyncLLM", "LLMConfig", "default_stack"]

_OPENED = frozenset({"pipeline", "_pipelines_into", "_template"})
"""The attributes that a copy makes anew, because they hold open connections."""
MOST_TYPES = 256
"""The most types of `into=` whose pipelines are kept."""

_P = TypeVar("_P", Pipeline, AsyncPipeline)
_T = TypeVar("_T")


class _LLM(Generic[_P]):
    """The base of `LLM` and `AsyncLLM`: the configuration, and the construction of requests from prompts."""

    pipeline: _P

    def __init__(
        self,
        config: LLMConfig | str | None = None,
        middleware: Iterable[Middleware] | None = None,
        *,
        strict: bool = False,
        **settings: Unpack[Settings],
    ) -> None:
        for name in settings.keys() & NO_SETTING.keys():
            raise TypeError(f"{type(self).__name__} has no setting {name!r}; {NO_SETTING[name]}")
        if not isinstance(config, LLMConfig):
            config = configured(type(self).__name__, config, dict(settings), middleware)
        elif settings:
            name = next(iter(settings))
            raise TypeError(
                f"{type(self).__name__}: {name} belongs into the LLMConfig that is given: write LLMConfig(…, {name}=…), or "
                f"attrs.evolve(config, {name}=…)"
            )
        self.config: LLMConfig = config
        if isinstance(middleware, str) or not isinstance(middleware, Iterable | None):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"middleware: expected a list, like [Logging(), Retry()], got {kind_of(middleware)}")
        problems = Problems()
        problems.of(check_config, config)
        layers = config.middleware if middleware is None else list(middleware)
        layers = ["default"] if layers is None else layers
        stack = problems.of(make_middleware, layers, max_retries=config.max_retries)
        if any(getattr(layer, "targets", None) for layer in stack or ()):
            from fluxibly.target import check_targets  # late, because most programs have no targets

            problems.of(check_targets, stack or ())
        problems.check()
        self._stack = stack or ()
        self._open()
        if strict:
            self.explain().check()

    def _open(self) -> None:
        """Make what a copy has of its own: the provider and its pipelines."""
        config = self.config
        self.pipeline = self._new_pipeline()
        self._pipelines_into: dict[object, _P] = {}
        """The pipelines for the types of `into=`, which share the provider of `pipeline`."""
        self._template = Request(
            model=config.model,
            messages="-",
            **{name: getattr(config, name) for name in CONFIGURED},
            extra=dict(config.additional_params),
        )

    def _new_pipeline(self) -> _P:
        """Make the provider, and put the stack before it."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in _OPENED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        made = memo[id(self)] = copy(self)  # a configuration does not change, and one stack may serve several models
        own = {name: value for name, value in self.__getstate__().items() if name not in ("config", "_stack")}
        vars(made).update(deepcopy(own, memo))  # what a subclass keeps
        return made

    def __repr__(self) -> str:
        layers = ", ".join(map(repr_of_layer, self._stack))
        return f"{type(self).__name__}({self.config.framework!r}, {self.config.model!r}, middleware=[{layers}])"

    def explain(self) -> Explanation:
        """Return what the stack does, what a call may come to, and warnings of orders that hurt. Nothing is sent."""
        from fluxibly.explain import explain  # late, because no call needs it

        pipeline = self.pipeline
        return explain(pipeline.middleware, provider=pipeline.provider, config=self.config, info=pipeline.info)

    @classmethod
    def from_yaml(
        cls,
        file: str | Path,
        *,
        section: str = "llm",
        middleware: Iterable[Middleware] | None = None,
        strict: bool = False,
    ) -> Self:
        """Return a model that is configured by a section of a YAML file; see `LLMConfig.from_yaml`.

        Raises:
            ConfigError: it lists every problem of the settings, the framework and the middleware.
        """
        config, layers = read_yaml(file, section, middleware=middleware)
        return cls(config, layers, strict=strict)

    def request(self, prompt: Prompt, overrides: Mapping[str, Any]) -> Request:
        """Return the request for a prompt and the settings of a call.

        Raises:
            TypeError: a setting does not exist (the message suggests the nearest name), or the prompt is of a wrong
                type.
            ValueError: the prompt is empty, or a value is out of range.
        """
        if not overrides:
            return self._template.evolve(messages=prompt)
        changes = dict(overrides)
        for name in changes:
            if name not in KEYWORDS:
                raise no_keyword(name)
        problems = parameter_problems(changes)
        if problems:
            raise ConfigError("; ".join(problems), problems=tuple(problems))
        if "extra" in changes:
            changes["extra"] = composed(self.config.additional_params, changes["extra"])
        return self._template.evolve(messages=prompt, **changes)

    def prepare(self, prompt: Prompt, overrides: Mapping[str, Any], into: object = None) -> tuple[_P, Request]:
        """Return the pipeline and the request of a call. `into` is the type that the answer has to make, if any."""
        if into is None:
            return self.pipeline, self.request(prompt, overrides)
        if overrides.get("response_format") is not None:
            raise TypeError("into= and response_format= both say what the answer has to be; expected only one of them")
        request = self.request(prompt, overrides).evolve(response_format=_shape(into).response_format)
        return self._into(into), request

    def _into(self, into: object) -> _P:
        """Return the pipeline whose answers have to fit a type, which is kept."""
        try:
            found = self._pipelines_into.get(into)
        except TypeError:  # it has no hash, like a JSON Schema
            return self._made_into(into)
        if found is None:
            found = self._made_into(into)
            if len(self._pipelines_into) >= MOST_TYPES:
                self._pipelines_into.clear()
            self._pipelines_into[into] = found
        found.closed = self.pipeline.closed
        return found

    def _made_into(self, into: object) -> _P:
        return self.pipeline.with_middleware(stack_into(self._stack, into))


def parsed_of(response: Response, into: object) -> Any:
    """Return the value that an answer was parsed into.

    Raises:
        ResponseInvalid: the answer has none.
    """
    if response.parsed is not None:
        return response.parsed
    problem = "the model called tools, and gave no answer"
    if not response.tool_calls:
        try:
            return _shape(into).parse(response.text)  # null, or a layer further out has changed the text
        except ValueError as error:
            problem = str(error)
    raise ResponseInvalid(f"the answer did not pass validation: {problem}", response=response, problem=problem)


def _shape(into: object) -> Shape:
    """Return the shape of the answers that `into=` describes.

    Raises:
        ConfigError: it describes none.
    """
    from fluxibly._schemas.shapes import shape_of  # late, because most programs parse no answers

    return shape_of(into, "into")


class LLM(_LLM[Pipeline]):
    """A language model with synchronous methods. Many threads may use it at once.

    For example, `LLM("openai:gpt-4o-mini", temperature=0.2)`, `LLM(framework="openai", model="gpt-4o-mini")` or
    `LLM(LLMConfig(…))`. A copy, also a pickled one, has the same configuration and connections of its own. (A pickle holds the
    API key if the configuration does. Keys of the environment are read anew. Functions in it have to be those of a module, because
    Python pickles no lambdas and no functions within functions.)

    Args:
        config: an `LLMConfig`, or "framework:model". A bare name that a service is known by will do: "claude-sonnet-4-5".
        middleware: the stack, outermost first; by default the configuration's stack, else the default stack.
        strict: whether the warnings of `explain()` are errors.
        settings: what `LLMConfig` takes, if no configuration is given.

    Raises:
        TypeError: there is no model, or settings are given beside an `LLMConfig`.
        FrameworkNotRegistered: the framework is unknown.
        ConfigError: an extra or a key is missing, a setting is wrong, or a middleware is unknown; with `strict`, all warnings.
    """

    def _new_pipeline(self) -> Pipeline:
        config = self.config
        return Pipeline(make_provider(config, asynchronous=False), self._stack, framework=config.framework)

    def forward(
        self, prompt: Prompt, *, timeout: float | Timeouts | None = None, **overrides: Unpack[Overrides]
    ) -> str:
        """Return the text of the model's answer to a prompt.

        Args:
            timeout: the time limits of this call; see `Pipeline.complete`.
            overrides: settings that take precedence over the configuration; `complete` lists them.

        Raises:
            FluxiblyError: the call failed. Any other exception of the provider or a middleware is raised unchanged.
        """
        return self.complete(prompt, timeout=timeout, **overrides).text

    def forward_stream(
        self, prompt: Prompt, *, timeout: float | Timeouts | None = None, **overrides: Unpack[Overrides]
    ) -> Generator[str, None, None]:
        """Return a generator of the answer's texts as they arrive. Closing the generator abandons the stream.

        Raises:
            NotImplementedError: the provider cannot stream. (The first iteration raises the provider's own errors.)
        """
        return self.stream(prompt, timeout=timeout, **overrides).texts()

    def complete(
        self,
        prompt: Prompt,
        *,
        timeout: float | Timeouts | None = None,
        into: Any = None,
        **overrides: Unpack[Overrides],
    ) -> Response:
        """Return the model's answer to a prompt as a `Response`, with usage, finish reason and all other fields.

        Args:
            timeout: the time limits of this call; see `Pipeline.complete`.
            into: the type that the answer has to make, or a JSON Schema; see `parse`. `response.parsed` is the instance. If the
                model calls tools instead, `parsed` is None.

        These keywords (`overrides`) take precedence over the configuration. None sends nothing, so that the service decides:

            model: another model of the same provider.
            temperature: from 0 (nearly always the same answer) to 2.
            max_tokens: the most tokens of the answer, from 1 up.
            top_p: from 0 to 1: only the likeliest tokens that make up this share.
            top_k: only this many of the likeliest tokens.
            frequency_penalty, presence_penalty: from -2 to 2, against repetitions.
            stop: a text or several, each of which ends the answer.
            seed: a whole number. Equal seeds give similar answers, where the service has seeds.
            n: the number of choices, from 1 up. The others are `response.alternatives`.
            tools: the `Tool`s that the model may call. To have them called, see the middleware `Tools`.
            tool_choice: "auto", "none", "required" or the name of a tool.
            response_format: "text", "json", or a JSON Schema that the answer has to follow.
            reasoning_effort: the provider's own word, such as "low" or "high".
            extra: fields of the provider's request body, sent as they are; they win over all others.
            headers: HTTP headers to send with the request.
            metadata: data of the caller's own for middleware, which is never sent.

        Raises:
            TypeError: a keyword does not exist, or the prompt is of a wrong type.
            BadPrompt: the prompt is empty.
            ConfigError: a value is out of range, or `into` describes no answers.
            ResponseInvalid: the answer does not fit `into`, even after the model was asked again.
            FluxiblyError: the call failed. Any other exception of the provider or a middleware is raised unchanged.
        """
        pipeline, request = self.prepare(prompt, overrides, into)
        return pipeline.complete(request, timeout=timeout)

    @overload
    def parse(
        self,
        prompt: Prompt,
        into: type[_T],
        *,
        timeout: float | Timeouts | None = None,
        **overrides: Unpack[Overrides],
    ) -> _T: ...
    @overload
    def parse(
        self, prompt: Prompt, into: object, *, timeout: float | Timeouts | None = None, **overrides: Unpack[Overrides]
    ) -> Any: ...
    def parse(
        self, prompt: Prompt, into: object, *, timeout: float | Timeouts | None = None, **overrides: Unpack[Overrides]
    ) -> Any:
        """Return the model's answer as an instance of a type: `ann = llm.parse("Who is Ann?", Person)`.

        The service gets the type's JSON Schema in the form that it takes. The answer is checked, and the model asked again with
        the problem if it does not fit: as often as the `Validation` of the stack says, or else twice.

        Args:
            into: an attrs class, a dataclass, a TypedDict, a msgspec Struct, a pydantic model, `list[Person]`, a union of these,
                or a JSON Schema (needs jsonschema).
            timeout: the time limits of this call; see `Pipeline.complete`.
            overrides: settings that take precedence over the configuration; `complete` lists them.

        Raises:
            ResponseInvalid: the answer does not fit, or the model called tools.
            ConfigError: `into` describes no answers.
            FluxiblyError: the call failed.
        """
        return parsed_of(self.complete(prompt, timeout=timeout, into=_shape(into).wanted, **overrides), into)

    @overload
    def stream(
        self,
        prompt: Prompt,
        *,
        restarts: Literal[False] = False,
        timeout: float | Timeouts | None = None,
        into: Any = None,
        **overrides: Unpack[Overrides],
    ) -> Stream[Chunk]: ...
    @overload
    def stream(
        self,
        prompt: Prompt,
        *,
        restarts: bool,
        timeout: float | Timeouts | None = None,
        into: Any = None,
        **overrides: Unpack[Overrides],
    ) -> Stream[Chunk | Restart]: ...
    def stream(
        self,
        prompt: Prompt,
        *,
        restarts: bool = False,
        timeout: float | Timeouts | None = None,
        into: Any = None,
        **overrides: Unpack[Overrides],
    ) -> Stream[Any]:
        """Return the model's answer as a `Stream`; see `Pipeline.stream`.

        With `into` (see `parse`), `stream.partial_parsed` is the value so far, and `stream.response.parsed` the instance. A stream is
        not held back, so an answer that does not fit raises at its end; `Validation(hold=True)` asks again.
        """
        pipeline, request = self.prepare(prompt, overrides, into)
        return pipeline.stream(request, restarts=restarts, timeout=timeout)

    def conversation(self, *, system: str | None = None, load: str | Path | None = None) -> Conversation:
        """Return a conversation, whose `send` and `stream` keep the messages of each turn.

        Args:
            system: instructions for the model, as the first message.
            load: a file that `Conversation.save` has written, to go on with.

        Raises:
            TypeError: both are given.
            OSError: the file cannot be read.
            ConfigError: the file has no conversation.
        """
        from fluxibly.conversation import Conversation, first_messages  # late, because most programs have none

        return Conversation(self.prepare, first_messages(system, load))

    def map(
        self,
        prompts: Iterable[Prompt],
        *,
        concurrency: int = 100,
        ordered: bool = False,
        timeout: float | Timeouts | None = None,
        into: Any = None,
        **overrides: Unpack[Overrides],
    ) -> Generator[Answer]:
        """Return a generator of the answers to many prompts, which asks several at once: `for answer in llm.map(prompts)`.

        A call that fails is an `Answer` with an `error`, and ends nothing. Closing the generator, Ctrl-C or an exception in the
        loop ends the calls under way. (A synchronous provider that cannot be stopped runs on in the background.)

        Args:
            prompts: any number of them, also a generator: some are read ahead, at most twice `concurrency`, in this thread.
            concurrency: the most calls at once, from 1 up. Each takes a thread.
            ordered: whether the answers come in the order of the prompts, and not as they come. Then at most ten times
                `concurrency` answers wait for a slow one.
            timeout: the time limits of each call; see `Pipeline.complete`.
            into: the type that each answer has to make; see `parse`.
            overrides: settings that take precedence over the configuration; `complete` lists them.

        Raises:
            TypeError: the prompts are not several, or a keyword does not exist.
            ConfigError: a value is out of range.
        """
        from fluxibly._mapping import (  # late, because most programs map nothing
            Answer,
            Stops,
            check_mapping,
            map_in_threads,
        )

        check_mapping(prompts, concurrency, timeout, asynchronous=False)
        pipeline, template = self.prepare("-", overrides, into)
        stops = None
        if obeys(pipeline.provider):
            stops = Stops()
            pipeline = pipeline.with_middleware((stops, *pipeline.middleware))

        def work(row: int, prompt: Prompt) -> Answer:
            try:
                return Answer(row, pipeline.complete(template.evolve(messages=prompt), timeout=timeout))
            except Exception as error:  # noqa: BLE001  # one row harms no other
                return Answer(row, error=error)

        stop = None if stops is None else stops.stop
        return map_in_threads(prompts, work, concurrency=concurrency, ordered=ordered, stop=stop)

    def close(self) -> None:
        """Close the provider's connections. A second close does nothing; a later call raises a RuntimeError."""
        self.pipeline.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncLLM(_LLM[AsyncPipeline]):
    """A language model with asynchronous methods, for asyncio and trio. It takes the same arguments as `LLM`."""

    def _new_pipeline(self) -> AsyncPipeline:
        config = self.config
        return AsyncPipeline(make_provider(config, asynchronous=True), self._stack, framework=config.framework)

    async def forward(
        self, prompt: Prompt, *, timeout: float | Timeouts | None = None, **overrides: Unpack[Overrides]
    ) -> str:
        """Return the text of the model's answer to a prompt.

        Args:
            timeout: the time limits of this call; see `Pipeline.complete`.
            overrides: settings that take precedence over the configuration; `complete` lists them.

        Raises:
            FluxiblyError: the call failed. Any other exception of the provider or a middleware is raised unchanged.
        """
        return (await self.complete(prompt, timeout=timeout, **overrides)).text

    def forward_stream(
        self, prompt: Prompt, *, timeout: float | Timeouts | None = None, **overrides: Unpack[Overrides]
    ) -> AsyncGenerator[str, None]:
        """Return a generator of the answer's texts as they arrive: `async for text in llm.forward_stream("…")`.

        Raises:
            NotImplementedError: the provider cannot stream. (The first iteration raises the provider's own errors.)
        """
        return self.stream(prompt, timeout=timeout, **overrides).texts()

    async def complete(
        self,
        prompt: Prompt,
        *,
        timeout: float | Timeouts | None = None,
        into: Any = None,
        **overrides: Unpack[Overrides],
    ) -> Response:
        """Return the model's answer to a prompt as a `Response`; see `LLM.complete`."""
        pipeline, request = self.prepare(prompt, overrides, into)
        return await pipeline.complete(request, timeout=timeout)

    @overload
    async def parse(
        self,
        prompt: Prompt,
        into: type[_T],
        *,
        timeout: float | Timeouts | None = None,
        **overrides: Unpack[Overrides],
    ) -> _T: ...
    @overload
    async def parse(
        self, prompt: Prompt, into: object, *, timeout: float | Timeouts | None = None, **overrides: Unpack[Overrides]
    ) -> Any: ...
    async def parse(
        self, prompt: Prompt, into: object, *, timeout: float | Timeouts | None = None, **overrides: Unpack[Overrides]
    ) -> Any:
        """Return the model's answer as an instance of a type: `await llm.parse("Who is Ann?", Person)`; see `LLM.parse`."""
        wanted = _shape(into).wanted
        return parsed_of(await self.complete(prompt, timeout=timeout, into=wanted, **overrides), into)

    @overload
    def stream(
        self,
        prompt: Prompt,
        *,
        restarts: Literal[False] = False,
        timeout: float | Timeouts | None = None,
        into: Any = None,
        **overrides: Unpack[Overrides],
    ) -> AsyncStream[Chunk]: ...
    @overload
    def stream(
        self,
        prompt: Prompt,
        *,
        restarts: bool,
        timeout: float | Timeouts | None = None,
        into: Any = None,
        **overrides: Unpack[Overrides],
    ) -> AsyncStream[Chunk | Restart]: ...
    def stream(
        self,
        prompt: Prompt,
        *,
        restarts: bool = False,
        timeout: float | Timeouts | None = None,
        into: Any = None,
        **overrides: Unpack[Overrides],
    ) -> AsyncStream[Any]:
        """Return the model's answer as an `AsyncStream`, for `async with`; see `AsyncPipeline.stream` and `LLM.stream`."""
        pipeline, request = self.prepare(prompt, overrides, into)
        return pipeline.stream(request, restarts=restarts, timeout=timeout)

    def conversation(self, *, system: str | None = None, load: str | Path | None = None) -> AsyncConversation:
        """Return a conversation with asynchronous `send` and `stream`; see `LLM.conversation`."""
        from fluxibly.conversation import AsyncConversation, first_messages  # late, as there

        return AsyncConversation(self.prepare, first_messages(system, load))

    def map(
        self,
        prompts: Iterable[Prompt] | AsyncIterable[Prompt],
        *,
        concurrency: int = 100,
        ordered: bool = False,
        timeout: float | Timeouts | None = None,
        into: Any = None,
        **overrides: Unpack[Overrides],
    ) -> AsyncGenerator[Answer]:
        """Return a generator of the answers to many prompts: `async for answer in llm.map(prompts)`; see `LLM.map`.

        Closing it, or cancelling the task that reads it, cancels the calls under way. `contextlib.aclosing` closes it in time
        when a loop is left early.

        Args:
            prompts: they may also come from an asynchronous generator.
        """
        from fluxibly._mapping import Answer, check_mapping, map_in_tasks  # late, as there

        check_mapping(prompts, concurrency, timeout, asynchronous=True)
        pipeline, template = self.prepare("-", overrides, into)

        async def work(row: int, prompt: Prompt) -> Answer:
            try:
                return Answer(row, await pipeline.complete(template.evolve(messages=prompt), timeout=timeout))
            except Exception as error:  # noqa: BLE001  # one row harms no other
                return Answer(row, error=error)

        return map_in_tasks(prompts, work, concurrency=concurrency, ordered=ordered)

    async def aclose(self) -> None:
        """Close the provider's connections. A second close does nothing; a later call raises a RuntimeError."""
        await self.pipeline.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
