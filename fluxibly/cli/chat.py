"""The command `fluxibly chat`: one question, or a conversation, with its figures and its spans."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import attrs

from fluxibly._extras import pip_install
from fluxibly.cli.report import as_json, figures, span_trees
from fluxibly.cli.screen import line_of
from fluxibly.errors import ConfigError, ContextLengthExceeded, FluxiblyError
from fluxibly.llm import LLM
from fluxibly.messages import Message
from fluxibly.providers.local import model_path
from fluxibly.registry import find_framework
from fluxibly.types import Response

if TYPE_CHECKING:
    from pathlib import Path

    from opentelemetry.sdk.trace import ReadableSpan

    from fluxibly.cli.screen import Screen
    from fluxibly.config import LLMConfig


STDIN = "-"


@attrs.frozen(kw_only=True)
class Chat:
    """What a chat needs. `stream` False waits for whole answers; `as_json` prints the response instead of its text."""

    config: LLMConfig
    screen: Screen
    recorder: Recorder
    system: str | None = None
    stream: bool = True
    as_json: bool = False

    def run(self, prompt: str | None) -> None:
        """Answer `prompt` ("-": standard input), or converse if there is none.

        Raises:
            ConfigError: there is neither a prompt nor a terminal to converse at.
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
                model_path(self.config.model)  # the time that a download takes is not the call's
            if prompt is None:
                self.converse(llm)
            else:
                self.show(self.answer(llm, [*self.opening(), Message.user(prompt)]))

    def opening(self) -> list[Message]:
        """What every conversation begins with."""
        return [Message.system(self.system)] if self.system else []

    def answer(self, llm: LLM, messages: list[Message]) -> Response:
        """The model's answer; its text is on the screen as soon as it is there."""
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

    def show(self, response: Response) -> None:
        """What goes under an answer: for a script the response as JSON, for a person its figures and spans."""
        spans = self.recorder.take()
        if self.as_json:
            self.screen.write(as_json(response) + "\n")
            return
        if response.finish_reason == "length" and not self.screen.live:  # the figures have it too
            self.screen.aside("fluxibly: the answer was cut off at the limit of its tokens")
        self.screen.show("")
        self.screen.show(figures(response))
        for tree in span_trees(spans):
            self.screen.show("")
            self.screen.show(tree)

    def converse(self, llm: LLM) -> None:
        """Ask and answer until the end of input. Ctrl-C stops an answer, not the program."""
        with contextlib.suppress(ImportError):  # Windows has its own
            importlib.import_module("readline")  # gives input() its line editing and history
        self.screen.note(f"{self.config.framework}, {self.config.model}. Ctrl-C stops an answer, Ctrl-D ends the chat.")
        history: list[Message] | None = self.opening()
        while history is not None:
            try:
                history = self.next_turn(llm, history)
            except KeyboardInterrupt:
                self.screen.write("\n")

    def next_turn(self, llm: LLM, history: list[Message]) -> list[Message] | None:
        """Ask for a question and answer it; what the conversation is then, None at the end of input."""
        self.screen.end_line()
        try:
            text = input("> ")
        except EOFError:
            self.screen.write("\n")
            return None
        return self.turn(llm, [*history, Message.user(text)]) if text.strip() else history

    def turn(self, llm: LLM, messages: list[Message]) -> list[Message]:
        """One question and its answer; what the conversation is then. A question without an answer is not in it."""
        asked = messages[:-1]
        try:
            response = self.answer(llm, messages)
            self.show(response)
        except KeyboardInterrupt:
            self.recorder.take()
            self.screen.note("(stopped)")
            return asked
        except ContextLengthExceeded as error:
            self.recorder.take()
            self.screen.aside(f"fluxibly: {line_of(error)}; the conversation begins anew", "red")
            return self.opening()
        except FluxiblyError as error:
            self.recorder.take()
            self.screen.aside(f"fluxibly: {line_of(error)}", "red")
            return asked
        return [*messages, Message.assistant(response)]


def _is_text(text: str | None) -> bool:
    """Whether there is no half of a character in it: bytes that could not be decoded become such."""
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
    """Check that what a chat needs is installed. `spans`: they are to go to a file or a backend.

    Raises:
        FrameworkNotRegistered: there is no such framework.
        ConfigError: packages are missing; one command installs them all.
    """
    found = find_framework(framework)
    missing = [found.extra] if found.extra is not None and not found.installed else []
    who = [f"the framework {framework!r}"] if missing else []
    if spans and not _sdk_installed():
        missing.append("otel")
        who.append("--trace and --otlp")
    if missing:
        verb = "needs" if who == [f"the framework {framework!r}"] else "need"
        raise ConfigError(f"{', '.join(who)} {verb} packages that are not installed: {pip_install(*missing)}")


class Recorder(Protocol):
    """Keeps the spans of this process, to be shown."""

    def take(self) -> Sequence[ReadableSpan]:
        """The spans that ended since the last time."""
        ...

    def close(self) -> str | None:
        """Send what is left; what went wrong with it, if anything did."""
        ...


class _NoRecorder:
    """Records nothing: what there is without the OpenTelemetry SDK."""

    def take(self) -> Sequence[ReadableSpan]:
        return ()

    def close(self) -> str | None:
        return None


def recorder(file: Path | None = None, otlp: str | None = None, *, keep: bool = True) -> Recorder:
    """A recorder of the spans of this process, where the OpenTelemetry SDK is installed.

    Args:
        keep: whether anyone will `take` them.
        file: where to write them too, as OTLP JSON lines.
        otlp: the address of a backend, to which they are sent as OTLP over HTTP.

    Raises:
        ConfigError: the file cannot be written, or the address is none.
    """
    if not keep and file is None and otlp is None:
        return _NoRecorder()
    if _sdk_installed():
        from fluxibly.cli.spans import SDKRecorder

        return SDKRecorder(file, otlp)
    return _NoRecorder()


def _sdk_installed() -> bool:
    return all(map(_installed, ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")))


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it is in
        return False
