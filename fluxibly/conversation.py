"""Conversations: messages that are kept in order, and grow by a turn with each answer.

`llm.conversation(…)` makes them. A conversation adds nothing to its calls: what it sends is its messages and the prompt.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from errno import EINVAL, EISDIR
from pathlib import Path
from tempfile import mkstemp
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, cast, overload
from weakref import ref

from fluxibly._abandoned import end_pending
from fluxibly._checks import is_list, is_mapping, kind_of
from fluxibly.errors import ConfigError
from fluxibly.messages import Message, Prompt, to_messages
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.stream import AsyncStream, Event, Stream
from fluxibly.types import Chunk, Request, Response, Restart

if TYPE_CHECKING:
    from typing import Unpack

    from fluxibly._drivers.streams import StreamDriver
    from fluxibly._parameters import Overrides
    from fluxibly.limits import Timeouts

_P_co = TypeVar("_P_co", covariant=True)


class Prepare(Protocol[_P_co]):
    """The method `prepare` of an `LLM` or an `AsyncLLM`: the pipeline and the request of a call."""

    def __call__(self, prompt: Prompt, overrides: Mapping[str, Any], into: object, /) -> tuple[_P_co, Request]: ...


class _Turn:
    """A turn under way: the messages of its prompt, and the answer that is expected."""

    def __init__(self, conversation: _Conversation, messages: tuple[Message, ...]) -> None:
        self.conversation = conversation
        self.messages = messages
        self.driver: StreamDriver | None = None
        """The driver of the turn's stream; None for a turn whose answer comes whole."""

    def follow(self, driver: StreamDriver) -> None:
        """Note the stream of the turn, whose end counts even if nobody is there to note it."""
        self.driver = driver
        self.conversation.streamed = self

    def settle(self) -> None:
        """Note the end of a stream that the consumer reads no further."""
        driver = self.driver
        if driver is not None and driver.ended:
            if driver.response is not None:  # the consumer has left at the last chunk, or is about to note the end
                self.complete(driver.response)
            else:
                self.fail(GeneratorExit("the stream was left before its end"))

    def complete(self, response: Response) -> None:
        """Keep the prompt and its answer, unless the turn is over already."""
        self.conversation.over(self, None, [*self.messages, *response.added, response.message])

    def fail(self, error: BaseException) -> None:
        """Note why there is no answer."""
        self.conversation.over(self, error)

    def interrupt(self, error: BaseException) -> None:
        """Note that reading the stream has raised. A second reader's RuntimeError ends nothing: the first one reads on."""
        if not isinstance(error, RuntimeError) or (self.driver is not None and self.driver.ended):
            self.fail(error)


class _Conversation:
    """The base of `Conversation` and `AsyncConversation`."""

    def __init__(self, messages: Iterable[Message]) -> None:
        self._messages: list[Message] = list(messages)
        self._rest()

    def _rest(self) -> None:
        """Set what a copy has of its own: no turn is under way."""
        self._turn: ref[_Turn] | None = None
        """The turn under way. It is weak: Ctrl-C may end a turn at any line, and a turn that nobody has any more is over."""
        self.streamed: _Turn | None = None
        """The turn under way, if it has a stream."""
        self._error: BaseException | None = None
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        of_turn = ("_turn", "streamed", "_error", "_lock")
        return {name: value for name, value in vars(self).items() if name not in of_turn} | {
            "_messages": [*self._messages]
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._rest()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {len(self.messages)} messages>"

    @property
    def messages(self) -> list[Message]:
        """The conversation so far. You may change the list between two turns, for instance to shorten it."""
        return self._messages

    @messages.setter
    def messages(self, messages: Iterable[Message | Mapping[str, Any]]) -> None:
        self._messages = _read_messages(messages)

    @property
    def last_error(self) -> BaseException | None:
        """Why the last turn has left the messages as they were: its error, or a GeneratorExit if its stream was given up.

        None: the last turn was completed, or is under way.
        """
        with self._lock:
            self._settle()
            return self._error

    def _settle(self) -> None:
        """Note the end of a turn that has ended by itself."""
        if self._turn is None:
            return
        turn = self._turn()
        if turn is not None:
            turn.settle()
        else:
            self._turn, self._error = None, GeneratorExit("the turn was interrupted")

    def begin(self, prompt: Prompt) -> tuple[_Turn, Prompt]:
        """Begin a turn, and return it with the messages to send.

        Raises:
            RuntimeError: another turn is under way.
        """
        added = to_messages(prompt)
        end_pending()  # a stream that was dropped has ended
        with self._lock:
            self._settle()
            if self._turn is not None:
                raise RuntimeError(
                    "a turn of this conversation is under way: read its stream to the end, or close it, before the next"
                )
            self._error = None
            turn = _Turn(self, added)
            self._turn = ref(turn)
        return turn, [*self.messages, *added]

    def over(self, turn: _Turn, error: BaseException | None, messages: Iterable[Message] = ()) -> None:
        """Note the end of a turn, and keep its messages. A second end of a turn changes nothing."""
        with self._lock:
            if self._turn is not None and self._turn() is turn:
                self._messages += messages
                self._turn = self.streamed = None
                self._error = error

    def _save(self, file: str | Path) -> None:
        """Write the messages to a file, which is replaced as a whole."""
        messages = _read_messages(self._messages)  # dicts may have been put into the list
        lines = ",\n".join(json.dumps(message.to_dict(), ensure_ascii=False) for message in messages)
        target = Path(os.path.realpath(file))  # a link stays a link
        if target.exists() and not target.is_file():  # a device or a pipe would be replaced
            raise OSError(EISDIR if target.is_dir() else EINVAL, "expected a file to write or replace", os.fspath(file))
        try:
            _replace(target, f'{{"version": {_VERSION}, "messages": [\n{lines}\n]}}\n')
        except OSError as error:
            # The name is the caller's, and not that of the temporary file.
            raise OSError(error.errno, error.strerror, os.fspath(file)) from error


class Conversation(_Conversation):
    """A conversation with an `LLM`. One turn runs at a time.

    A turn that fails, is cancelled, or whose stream is left before its end, leaves the messages as they were.
    """

    def __init__(self, prepare: Prepare[Pipeline], messages: Iterable[Message] = ()) -> None:
        super().__init__(messages)
        self._prepare = prepare

    def send(
        self,
        prompt: Prompt,
        *,
        timeout: float | Timeouts | None = None,
        into: Any = None,
        **overrides: Unpack[Overrides],
    ) -> Response:
        """Say something, and return the model's answer. It takes what `LLM.complete` takes.

        Then `messages` has grown by the prompt, by what was added on the way to the answer (calls of tools and their results),
        and by the answer.

        Raises:
            RuntimeError: another turn is under way.
            FluxiblyError: the call failed.
        """
        turn, messages = self.begin(prompt)
        try:
            pipeline, request = self._prepare(messages, overrides, into)
            response = pipeline.complete(request, timeout=timeout)
        except BaseException as error:
            turn.fail(error)
            raise
        turn.complete(response)
        return response

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
        """Say something, and return the answer as a `Stream`; see `LLM.stream`. The messages grow when it has been read to its end."""
        turn, messages = self.begin(prompt)
        try:
            pipeline, request = self._prepare(messages, overrides, into)
            driver = pipeline.open_stream(request, restarts=restarts, timeout=timeout)
            stream = _TurnStream[Any](driver)
            stream.turn = turn
            turn.follow(driver)
        except BaseException as error:
            turn.fail(error)
            raise
        return stream

    def save(self, file: str | Path) -> None:
        """Write the messages to a JSON file, with mode 600. The file is replaced as a whole.

        `llm.conversation(load=file)` goes on with it. It holds what was said in clear, and no settings of the model.

        Raises:
            OSError: the file cannot be written.
            TypeError: a message has content that is not JSON.
        """
        self._save(file)


class AsyncConversation(_Conversation):
    """A `Conversation` with an `AsyncLLM`, for asyncio and trio."""

    def __init__(self, prepare: Prepare[AsyncPipeline], messages: Iterable[Message] = ()) -> None:
        super().__init__(messages)
        self._prepare = prepare

    async def send(
        self,
        prompt: Prompt,
        *,
        timeout: float | Timeouts | None = None,
        into: Any = None,
        **overrides: Unpack[Overrides],
    ) -> Response:
        """Say something, and return the model's answer; see `Conversation.send`."""
        turn, messages = self.begin(prompt)
        try:
            pipeline, request = self._prepare(messages, overrides, into)
            response = await pipeline.complete(request, timeout=timeout)
        except BaseException as error:
            turn.fail(error)
            raise
        turn.complete(response)
        return response

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
        """Say something, and return the answer as an `AsyncStream`, for `async with`; see `Conversation.stream`."""
        turn, messages = self.begin(prompt)
        try:
            pipeline, request = self._prepare(messages, overrides, into)
            driver = pipeline.open_stream(request, restarts=restarts, timeout=timeout)
            stream = _AsyncTurnStream[Any](driver)
            stream.turn = turn
            turn.follow(driver)
        except BaseException as error:
            turn.fail(error)
            raise
        return stream

    async def save(self, file: str | Path) -> None:
        """Write the messages to a JSON file, with mode 600; see `Conversation.save`."""
        from anyio.to_thread import run_sync

        await run_sync(self._save, file)


class _TurnStream(Stream[Event]):
    """The stream of a turn, which ends the turn."""

    __slots__ = ("turn",)
    turn: _Turn

    def __iter__(self) -> Iterator[Event]:
        try:
            yield from super().__iter__()
        except GeneratorExit:  # the iterator was dropped, and the stream can be read on
            raise
        except BaseException as error:
            self.turn.interrupt(error)
            raise
        if self._driver.response is not None:
            self.turn.complete(self._driver.response)


class _AsyncTurnStream(AsyncStream[Event]):
    """The stream of a turn, which ends the turn."""

    __slots__ = ("turn",)
    turn: _Turn

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        try:
            return await super().__anext__()
        except StopAsyncIteration:
            if self._driver.response is not None:
                self.turn.complete(self._driver.response)
            raise
        except BaseException as error:
            self.turn.interrupt(error)
            raise


# Files

_VERSION = 1


def _replace(target: Path, text: str) -> None:
    # The mode of a temporary file is 600, and nobody ever sees half a conversation.
    handle, name = mkstemp(dir=target.parent, prefix=".conversation.")
    try:
        # UTF-8 has no half of a surrogate pair, but JSON has an escape for it, which is the same as Python's.
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as written:
            written.write(text)
            written.flush()
            os.fsync(handle)
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _read_messages(messages: object) -> list[Message]:
    """Return messages as a new list. Those in OpenAI's shape are read.

    Raises:
        TypeError: it is no list of messages. The message says what to write.
        ValueError: a dict is no message.
    """
    if not isinstance(messages, Iterable) or isinstance(messages, (str, bytes, Mapping)):
        raise TypeError(f"messages: expected a list, like [Message.user(…)], got {kind_of(messages)}")  # pyright: ignore[reportUnknownArgumentType]
    found = [Message.from_dict(each) if is_mapping(each) else each for each in cast("Iterable[object]", messages)]
    for each in found:
        if not isinstance(each, Message):
            raise TypeError(f"messages: expected a Message, got {kind_of(each)}; write Message.user(…)")
    return cast("list[Message]", found)


def first_messages(system: str | None, load: str | Path | None) -> list[Message]:
    """Return the messages that a conversation begins with.

    Raises:
        TypeError: both are given, or `system` is no text.
        OSError: the file cannot be read.
        ConfigError: the file has no conversation.
    """
    if load is None:
        if system is not None and not isinstance(system, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"conversation: system: expected a str, got {kind_of(system)}")
        return [Message.system(system)] if system else []
    if system is not None:
        raise TypeError("conversation: expected system= or load=, got both: the file has the system message")
    if not isinstance(load, (str, os.PathLike)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"conversation: load: expected a file, got {kind_of(load)}; to go on with messages, set chat.messages"
        )
    return _loaded(Path(load))


def _loaded(file: Path) -> list[Message]:
    try:
        found: object = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{file}: expected a conversation as save() writes it, got a file that is not JSON"
        ) from error
    version: object = found.get("version") if is_mapping(found) else None
    if isinstance(version, int) and version > _VERSION:
        raise ConfigError(
            f"{file}: a newer fluxibly has written this conversation (version {version}); update fluxibly"
        )
    messages: object = found.get("messages") if is_mapping(found) else found  # a list of messages is read too
    if not is_list(messages):
        raise ConfigError(f"{file}: expected a conversation as save() writes it, got {kind_of(found)} without messages")
    try:
        return [Message.from_dict(cast("Mapping[str, Any]", each)) for each in messages]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{file}: {error}") from error
