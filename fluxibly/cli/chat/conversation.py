"""A conversation at the terminal: questions, answers, and commands that begin with a slash."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from fluxibly._checks import did_you_mean
from fluxibly.cli.chat.attachments import attachments_of, described
from fluxibly.cli.chat.reading import HOW, reader_of
from fluxibly.cli.screen import clean, line_of
from fluxibly.errors import ConfigError, ContextLengthExceeded, FluxiblyError
from fluxibly.messages import Message
from fluxibly.parts import Text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from fluxibly.cli.chat.asking import Asker
    from fluxibly.cli.screen import Screen
    from fluxibly.config import LLMConfig
    from fluxibly.conversation import Conversation
    from fluxibly.llm import LLM
    from fluxibly.parts import ContentPart


_WORD = re.compile(r"/(?P<name>[A-Za-z]\w*)(?:\s+(?P<rest>.*))?", re.DOTALL)
"""A command. A path like /etc/passwd is none."""
EXITS = ("exit", "quit", "/exit", "/quit", "/bye")


class _Over(Exception):
    """The user ends the conversation."""


@attrs.define
class Talk:
    """A conversation that the user has with a model, and the commands in it.

    Args:
        asker: asks the questions.
        screen: the terminal.
        config: the configuration of the model.
        open: makes a model of a configuration.
        configure: makes a configuration of the name of a model, for `/model`.
        messages: the messages to begin with.
        attached: what goes with the first question.
        keep_history: whether the questions are kept for the next session.
    """

    asker: Asker
    screen: Screen
    config: LLMConfig
    open: Callable[[LLMConfig], LLM]
    configure: Callable[[str], LLMConfig]
    messages: Iterable[Message]
    attached: list[ContentPart]
    keep_history: bool = False
    _llm: LLM = attrs.field(init=False)
    _conversation: Conversation = attrs.field(init=False)
    _last: tuple[int, str | list[ContentPart]] | None = attrs.field(default=None, init=False)
    """The last question, and the number of messages before it."""

    def run(self) -> None:
        """Read questions and answer them until the user ends it. Ctrl-C stops an answer, not the program."""
        self._llm = self.open(self.config)
        try:
            self._begin(self.messages)
            self.screen.note(f"{self._model}. Ctrl-C stops an answer, Ctrl-D ends the chat, /help says more.")
            for part in self.attached:
                self.screen.note(f"Attached: {described(part)}")
            reader = reader_of(self.screen, sorted(COMMANDS), keep=self.keep_history)
            while True:
                self.screen.end_line()
                try:
                    self._take(reader.read())
                except KeyboardInterrupt:
                    self.screen.end_line()
        except EOFError:
            self.screen.end_line()
        except _Over:
            pass
        finally:
            self._llm.close()

    @property
    def _model(self) -> str:
        return f"{self.config.framework}:{self.config.model}"

    def _begin(self, messages: Iterable[Message]) -> None:
        self._conversation = self._llm.conversation()
        self._conversation.messages[:] = messages

    def _take(self, text: str) -> None:
        """Carry out a command, or ask a question."""
        if not text.strip():
            return
        if text.strip().lower() in EXITS:
            raise _Over
        match = _WORD.fullmatch(text.rstrip())
        try:
            if match is None:
                self._question(text[1:] if text.startswith("//") else text)
            else:
                self._command(match["name"].lower(), (match["rest"] or "").strip())
        except (FluxiblyError, OSError, ValueError, TypeError) as error:
            self._problem(error)

    def _problem(self, error: BaseException, more: str = "") -> None:
        self.screen.aside(f"fluxibly: {line_of(error)}{more}", "red")

    # Questions

    def _question(self, text: str) -> None:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ConfigError("the question is not text in this terminal's encoding") from None
        content = [*self.attached, Text(text)] if self.attached else text
        self.attached = []
        self._ask(content)

    def _ask(self, content: str | list[ContentPart]) -> None:
        conversation = self._conversation
        self._last = (len(conversation.messages), content)
        try:
            self.asker.ask(self.config, conversation, content)
        except KeyboardInterrupt:
            self.screen.note("(stopped)")
        except ContextLengthExceeded as error:
            self._problem(error, "; the conversation begins anew")
            self._begin([message for message in conversation.messages if message.role == "system"])
            self._last = (len(self._conversation.messages), content)
        except Exception as error:  # noqa: BLE001  # an error of a provider or a tool ends the answer, not the chat
            name = "" if isinstance(error, FluxiblyError) else f"{type(error).__name__}: "
            self.screen.aside(f"fluxibly: {name}{line_of(error)}", "red")

    # Commands

    def _command(self, name: str, rest: str) -> None:
        command = COMMANDS.get(f"/{name}")
        if command is None:
            hint = did_you_mean(f"/{name}", COMMANDS) or "; /help lists them"
            self._problem(ConfigError(f"there is no command /{name}{hint} (a question that begins so: //{name})"))
            return
        command.do(self, rest)

    def show_help(self, _: str) -> None:
        width = max(len(command.form) for command in COMMANDS.values())
        for command in COMMANDS.values():
            self.screen.show(f"{command.form:<{width}}  {command.says}")
        self.screen.show(f"{'exit':<{width}}  End the chat; so does Ctrl-D. Ctrl-C stops an answer.")
        self.screen.show("")
        self.screen.show(HOW)

    def change_model(self, text: str) -> None:
        if text:
            config = self.configure(text)
            llm = self.open(config)
            messages = list(self._conversation.messages)
            self._llm.close()
            self._llm, self.config = llm, config
            self._begin(messages)
        self.screen.note(self._model)

    def change_system(self, text: str) -> None:
        messages = self._conversation.messages
        others = [message for message in messages if message.role != "system"]
        if text:
            added = [] if text == '""' else [Message.system(text)]
            moved = len(messages) - len(others) - len(added)
            messages[:] = [*added, *others]
            if self._last is not None:
                self._last = (max(0, self._last[0] - moved), self._last[1])
        said = next((message.text for message in messages if message.role == "system"), None)
        self.screen.note("There is no system message." if said is None else f"System: {said}")

    def retry(self, _: str) -> None:
        if self._last is None:
            raise ConfigError("/retry: there is no question yet")
        before, content = self._last
        del self._conversation.messages[before:]
        self._ask(content)

    def begin_anew(self, _: str) -> None:
        self._begin([message for message in self._conversation.messages if message.role == "system"])
        self._last, self.attached = None, []
        self.screen.note("A new conversation.")

    def save(self, text: str) -> None:
        if not text:
            raise ConfigError("/save: expected a file, got nothing; write /save FILE")
        file = Path(text).expanduser()
        if file.exists() and not _is_conversation(file):
            raise ConfigError(f"/save: {text} is there, and is no conversation; choose another name")
        try:
            self._conversation.save(file)
        except OSError as error:
            raise ConfigError(f"/save: {text}: {error.strerror or error}") from error
        self.screen.note(f"Saved {len(self._conversation.messages)} messages in {clean(text)}")

    def attach(self, text: str) -> None:
        if not text:
            raise ConfigError("/attach: expected a file or a URL, got nothing; write /attach FILE")
        for part in attachments_of([text]):
            self.attached.append(part)
            self.screen.note(f"Attached to the next question: {described(part)}")


def _is_conversation(file: Path) -> bool:
    try:
        return file.read_bytes()[:40].startswith(b'{"version": ')
    except OSError:
        return False


@attrs.frozen
class _Command:
    form: str
    says: str
    do: Callable[[Talk, str], None]


COMMANDS: Mapping[str, _Command] = {
    "/help": _Command("/help", "Show this.", Talk.show_help),
    "/model": _Command("/model P:M", "Ask another model from now on, such as openai:gpt-4o-mini.", Talk.change_model),
    "/system": _Command("/system TEXT", 'Set the instructions for the model; "" removes them.', Talk.change_system),
    "/retry": _Command("/retry", "Ask the last question again.", Talk.retry),
    "/attach": _Command("/attach FILE", "Send a file or a URL with the next question.", Talk.attach),
    "/save": _Command("/save FILE", "Write the conversation to a file.", Talk.save),
    "/new": _Command("/new", "Begin a new conversation.", Talk.begin_anew),
}
"""The commands of a conversation, by what the user writes."""
