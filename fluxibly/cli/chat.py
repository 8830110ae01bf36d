"""The command `fluxibly chat`: a question or a conversation, with the figures and spans of each answer."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Protocol
from uuid import uuid4

import attrs

from fluxibly._extras import pip_install
from fluxibly.cli.report import as_json, figures, media_lines, span_trees
from fluxibly.cli.screen import line_of
from fluxibly.errors import ConfigError, ContextLengthExceeded, FluxiblyError, StreamInterrupted
from fluxibly.llm import LLM
from fluxibly.messages import Message
from fluxibly.providers.local import model_path
from fluxibly.registry import find_framework
from fluxibly.types import Response

if TYPE_CHECKING:
    from pathlib import Path

    from opentelemetry.sdk.trace import ReadableSpan

    from fluxibly.cli.screen import Screen
    from fluxibly.cli.turns import Conversation, TurnLog
    from fluxibly.config import LLMConfig


STDIN = "-"


@attrs.frozen(kw_only=True)
class Chat:
    """A chat with a model. `stream=False` waits for whole answers; `as_json` prints the response instead of its text.

    `log` keeps the turns, and `earlier` is the conversation to go on with.
    """

    config: LLMConfig
    screen: Screen
    recorder: Recorder
    system: str | None = None
    stream: bool = True
    as_json: bool = False
    log: TurnLog | None = None
    earlier: Conversation | None = None

    @cached_property
    def conversation(self) -> str:
        """The id of the conversation."""
        return uuid4().hex if self.earlier is None else self.earlier.id

    def run(self, prompt: str | None) -> None:
        """Answer `prompt` ("-" reads it from standard input), or start a conversation if it is None.

        Raises:
            ConfigError: there is neither a prompt nor a terminal for a conversation, or the prompt is empty or not text.
            FluxiblyError: the provider failed.
        """
        if prompt is None and not (sys.stdin.isatty() and self.screen.live):
            raise ConfigError(
                'there is no prompt: fluxibly chat "…", or fluxibly chat - to read it from standard input'
            )
        if prompt == STDIN:
            prompt = _standard_input()
        if prompt is not None and not prompt.strip():
            raise ConfigError('the prompt is empty: fluxibly chat "…"')
        if not (_is_text(prompt) and _is_text(self.system)):
            raise ConfigError("the prompt is not text in this terminal's encoding")
        with LLM(self.config) as llm:
            if self.config.framework == "local":
                model_path(self.config.model)  # the call's time must not include a download
            if prompt is None:
                self.converse(llm)
            else:
                self.ask(llm, [*self.opening(), Message.user(prompt)])

    def opening(self) -> list[Message]:
        """Return the messages before the first question."""
        earlier = () if self.earlier is None else self.earlier.messages
        if not self.system:
            return list(earlier)
        return [Message.system(self.system), *(message for message in earlier if message.role != "system")]

    def ask(self, llm: LLM, messages: list[Message]) -> Response:
        """Return the model's response, show it, and keep the turn."""
        try:
            response = self.answer(llm, messages)
        except BaseException as error:
            self.keep(messages, error.partial if isinstance(error, StreamInterrupted) else None, error)
            raise
        spans = self.keep(messages, response)
        self.show(response, spans)
        return response

    def keep(
        self, messages: list[Message], response: Response | None, error: BaseException | None = None
    ) -> Sequence[ReadableSpan]:
        """Keep a turn, and return its spans."""
        spans = self.recorder.take()
        if self.log is not None:
            self.log.add(
                self.config, messages, conversation=self.conversation, response=response, error=error, spans=spans
            )
        return spans

    def answer(self, llm: LLM, messages: list[Message]) -> Response:
        """Return the model's response, and print its text as it arrives."""
        if not self.stream:
            response = llm.complete(messages)
            if not self.as_json:
                self.screen.write(response.text)
        else:
            with llm.stream(messages) as stream:
                for chunk in stream:
                    if not self.as_json:
                        self.screen.write(chunk.text)
            response = stream.response
        self.screen.end_line()
        return response

    def show(self, response: Response, spans: Sequence[ReadableSpan]) -> None:
        """Print the response as JSON, for scripts, or its figures and spans under the answer, for a person."""
        if self.as_json:
            self.screen.write(as_json(response) + "\n")
            return
        for line in media_lines(response):
            (self.screen.note if self.screen.live else self.screen.aside)(line)
        if response.finish_reason == "length" and not self.screen.live:  # at a terminal, the figures show it
            self.screen.aside("fluxibly: the answer was cut off at the limit of its tokens")
        self.screen.show("")
        self.screen.show(figures(response))
        for tree in span_trees(spans):
            self.screen.show("")
            self.screen.show(tree)

    def converse(self, llm: LLM) -> None:
        """Read questions and answer them until the end of input. Ctrl-C stops an answer, not the program."""
        with contextlib.suppress(ImportError):  # not on Windows, whose console edits lines itself
            importlib.import_module("readline")  # gives input() line editing and a history
        self.screen.note(f"{self.config.framework}, {self.config.model}. Ctrl-C stops an answer, Ctrl-D ends the chat.")
        history: list[Message] | None = self.opening()
        while history is not None:
            try:
                history = self.next_turn(llm, history)
            except KeyboardInterrupt:
                self.screen.write("\n")

    def next_turn(self, llm: LLM, history: list[Message]) -> list[Message] | None:
        """Read a question and answer it. Return the conversation so far, or None at the end of input."""
        self.screen.end_line()
        try:
            text = input("> ")
        except EOFError:
            self.screen.write("\n")
            return None
        return self.turn(llm, [*history, Message.user(text)]) if text.strip() else history

    def turn(self, llm: LLM, messages: list[Message]) -> list[Message]:
        """Answer the last message. Return the conversation so far, without a question that got no answer."""
        asked = messages[:-1]
        try:
            response = self.ask(llm, messages)
        except KeyboardInterrupt:
            self.screen.note("(stopped)")
            return asked
        except ContextLengthExceeded as error:
            self.screen.aside(f"fluxibly: {line_of(error)}; the conversation begins anew", "red")
            return [message for message in self.opening() if message.role == "system"]
        except FluxiblyError as error:
            self.screen.aside(f"fluxibly: {line_of(error)}", "red")
            return asked
        return [*messages, Message.assistant(response)]


def _is_text(text: str | None) -> bool:
    """Whether `text` can be encoded: bytes that could not be decoded have become lone surrogates, which cannot."""
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        return False
    return True


def _standard_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError:
        raise ConfigError("standard input is not text in this terminal's encoding") from None


def check_installed(framework: str, *, spans: bool) -> None:
    """Check that the packages for a chat are installed. `spans`: whether spans go to a file or a backend.

    Raises:
        FrameworkNotRegistered: there is no such framework.
        ConfigError: packages are missing; the message has one command that installs them all.
    """
    found = find_framework(framework)
    if not spans or _sdk_installed():
        return  # the registry reports the packages that the framework alone lacks
    extras, who = ["otel"], "--trace and --otlp"
    if found.extra is not None and not found.installed:
        extras, who = [found.extra, *extras], f"the framework {framework!r}, {who}"
    raise ConfigError(f"{who} need packages that are not installed: {pip_install(*extras)}")


class Recorder(Protocol):
    """A recorder of the spans of this process, which are shown under an answer."""

    def take(self) -> Sequence[ReadableSpan]:
        """Return the spans that ended since the last call."""
        ...

    def close(self) -> str | None:
        """Export the remaining spans. Return a description of the failure, or None."""
        ...


class _NoRecorder:
    """A recorder that keeps no spans, because none are wanted or the OpenTelemetry SDK is not installed."""

    def take(self) -> Sequence[ReadableSpan]:
        return ()

    def close(self) -> str | None:
        return None


def recorder(file: Path | None = None, otlp: str | None = None, *, keep: bool = True) -> Recorder:
    """Return a recorder of the spans of this process. Without the OpenTelemetry SDK, it records nothing.

    Args:
        keep: whether the caller will `take` the spans.
        file: a file to write the spans to as well, as OTLP JSON lines.
        otlp: the URL of a backend to send the spans to, as OTLP over HTTP.

    Raises:
        ConfigError: the file cannot be written, or `otlp` is not an http:// or https:// URL.
    """
    wanted = keep or file is not None or otlp is not None
    if not wanted or not _sdk_installed():
        return _NoRecorder()
    from fluxibly.cli.spans import SDKRecorder

    return SDKRecorder(file, otlp)


def _sdk_installed() -> bool:
    return all(map(_installed, ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")))


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is not installed either
        return False
