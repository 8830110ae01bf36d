"""One question: it is sent, its answer is shown while it comes, and the turn is kept."""

from __future__ import annotations

import json
import os
import stat
import sys
from typing import TYPE_CHECKING, Any

import attrs

from fluxibly.cli.chat.rendering import view_of
from fluxibly.cli.report import as_json, figures, media_lines, span_trees, summary
from fluxibly.cli.screen import Screen
from fluxibly.errors import ConfigError, StreamInterrupted
from fluxibly.llm import parsed_of
from fluxibly.messages import Message
from fluxibly.parts import Text
from fluxibly.types import Chunk, Response, Restart

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from opentelemetry.sdk.trace import ReadableSpan

    from fluxibly.cli.chat.recording import Recorder
    from fluxibly.cli.turns import TurnLog
    from fluxibly.config import LLMConfig
    from fluxibly.conversation import Conversation
    from fluxibly.parts import ContentPart

STDIN = "-"


@attrs.frozen(kw_only=True)
class Asker:
    """Asks questions, and shows the answers.

    Args:
        screen: where answers go.
        recorder: the spans of the calls.
        conversation: the id under which the turns are kept.
        stream: whether to stream; else the whole answer is waited for.
        json: whether to print the response as JSON instead of its text.
        markdown: whether texts are Markdown.
        parameters: what each call has, beside what the model's configuration says.
        schema: the JSON Schema of answers. They are printed as JSON then.
        log: keeps the turns; None keeps none.
    """

    screen: Screen
    recorder: Recorder
    conversation: str
    stream: bool = True
    json: bool = False
    markdown: bool = True
    parameters: Mapping[str, Any] = attrs.field(factory=dict[str, Any])
    schema: Mapping[str, Any] | None = None
    log: TurnLog | None = None

    def ask(self, config: LLMConfig, conversation: Conversation, content: str | Sequence[ContentPart]) -> Response:
        """Ask a question of a conversation, show the answer, and keep the turn.

        Raises:
            FluxiblyError: the call failed, or the answer does not fit the schema.
            KeyboardInterrupt: the user has stopped the answer.
        """
        question = Message.user(content)
        sent = [*conversation.messages, question]
        texts: list[str] = []
        try:
            response = self._answer(conversation, question, texts)
        except BaseException as error:
            partial = error.partial if isinstance(error, StreamInterrupted) else None
            if partial is None and texts:
                partial = Response("".join(texts))
            self._keep(config, sent, partial, error)
            raise
        spans = self._keep(config, sent, response)
        self._show(response, config, spans)
        return response

    def _answer(self, conversation: Conversation, question: Message, texts: list[str]) -> Response:
        """Return the response, and show its text as it comes. `texts` gets what has come so far."""
        plain = self.schema is None and not self.json
        with view_of(self.screen, markdown=self.markdown, shown=plain) as view:
            if not self.stream or self.schema is not None:  # JSON is shown as a whole
                response = conversation.send(question, into=self.schema, **self.parameters)
                if response.added:
                    view.added(response.added)
                view.chunk(Chunk(response.text))
                return response
            with conversation.stream(question, restarts=self.screen.live, **self.parameters) as stream:
                for event in stream:
                    if isinstance(event, Restart):
                        texts.clear()
                        view.restart()
                        continue
                    if event.added:
                        texts.clear()
                        view.added(event.added)
                    texts.append(event.text)
                    view.chunk(event)
            return stream.response

    def _keep(
        self, config: LLMConfig, sent: Sequence[Message], response: Response | None, error: BaseException | None = None
    ) -> Sequence[ReadableSpan]:
        """Keep a turn, and return its spans."""
        spans = self.recorder.take()
        if self.log is not None:
            self.log.add(config, sent, conversation=self.conversation, response=response, error=error, spans=spans)
        return spans

    def _show(self, response: Response, config: LLMConfig, spans: Sequence[ReadableSpan]) -> None:
        """Print what is left of the answer, and what there is to say of it."""
        screen = self.screen
        if self.json:
            screen.write(as_json(response) + "\n")
            return
        if self.schema is not None:
            value = parsed_of(response, self.schema)
            screen.write(json.dumps(value, ensure_ascii=False, indent=2 if screen.live else None) + "\n")
        if screen.quiet:
            return
        for line in media_lines(response):
            (screen.note if screen.live else screen.aside)(line)
        if not screen.live:
            if response.finish_reason == "length":
                screen.aside("fluxibly: the answer was cut off at the limit of its tokens")
            if screen.verbose:
                screen.aside(summary(response, config))
        elif screen.verbose:
            screen.show("")
            screen.show(figures(response))
            for tree in span_trees(spans):
                screen.show("")
                screen.show(tree)
        else:
            screen.note(summary(response, config))


def question_of(prompt: str | None, attached: Sequence[ContentPart]) -> str | list[ContentPart]:
    """Return the question: what is piped in, the prompt below it, and attachments before both. "" if there is none.

    Raises:
        ConfigError: the prompt or what is piped in is not text.
    """
    piped = ""
    if prompt == STDIN or (prompt is None and not has_terminal()) or _is_piped():
        piped = _standard_input()
    parts = [piped] if prompt in (None, STDIN) else [piped.rstrip("\n"), prompt]
    text = "\n\n".join([part for part in parts if part and part.strip()])
    check_text(text)
    if not attached or not text:
        return text or list(attached)
    return [*attached, Text(text)]


def check_text(text: str | None) -> None:
    """Check that a text can be encoded: bytes that could not be decoded have become lone surrogates, which cannot.

    Raises:
        ConfigError: it cannot.
    """
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        raise ConfigError("the prompt is not text in this terminal's encoding") from None


def has_terminal() -> bool:
    """Whether standard input is a terminal, at which a person types."""
    try:
        return sys.stdin.isatty()
    except (AttributeError, ValueError):  # a program may have none, or a closed one
        return False


def _is_piped() -> bool:
    """Whether standard input is a pipe or a file. (A terminal or /dev/null is neither.)"""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):  # it is closed, or no file
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


def _standard_input() -> str:
    try:
        return sys.stdin.read()
    except (AttributeError, ValueError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise ConfigError("standard input is not text in this terminal's encoding") from None
        return ""  # there is none, or it is closed
    except OSError as error:
        raise ConfigError(f"standard input cannot be read: {error.strerror or error}") from error
