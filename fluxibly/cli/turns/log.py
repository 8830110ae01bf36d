"""`TurnLog`: what `fluxibly chat` writes its turns to. Whatever goes wrong with the file, the chat goes on."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from uuid import uuid4

import attrs

from fluxibly.cli.turns.masking import Masking
from fluxibly.cli.turns.store import Conversation, Kept, LogError, TurnStore, off_path
from fluxibly.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

    from fluxibly.cli.screen import Screen
    from fluxibly.config import LLMConfig
    from fluxibly.messages import Message
    from fluxibly.types import Response

T = TypeVar("T")


def new_conversation() -> str:
    """Return the id of a new conversation."""
    return uuid4().hex


def is_off() -> bool:
    """Whether `fluxibly logs off` was the last word."""
    return off_path().exists()


def last_conversation(screen: Screen) -> Conversation | None:
    """Return the conversation that the last turn belongs to; None if nothing is kept, or the file cannot be read.

    Its messages are what the next question is added to: with the system message and the last answer, and without
    questions that got no answer. It does not matter whether turns are kept now.
    """
    return _attempt(
        screen, "the last conversation cannot be read", lambda: TurnStore(_warn_on(screen)).last_conversation()
    )


@attrs.define
class TurnLog:
    """A log of the turns of a chat. `open` makes one; none of its methods raises."""

    _screen: Screen
    _store: TurnStore
    _config_file: Path | None
    _reported: bool = attrs.field(default=False, init=False)

    @classmethod
    def open(cls, screen: Screen, *, wanted: bool | None = None, config_file: Path | None = None) -> TurnLog | None:
        """Return the log of this chat; None if its turns are not to be kept, or cannot be.

        The first time, a line on standard error says where turns are kept, and how to turn that off.

        Args:
            wanted: True for `--log`, False for `--no-log`; None keeps turns at a terminal, unless `fluxibly logs off`.
            config_file: the configuration file of the chat, which is noted with its turns.
        """
        if wanted is False or (wanted is None and not screen.live):
            return None

        def made() -> TurnLog | None:
            if wanted is None and is_off():
                return None
            store = TurnStore(_warn_on(screen))
            if store.create():
                screen.aside(f"Logged in {shown_path(store.path)} (off: --no-log, fluxibly logs off)", "dim")
            return cls(screen, store, config_file)

        return _attempt(screen, "this chat is not logged", made)

    def add(
        self,
        config: LLMConfig,
        messages: Sequence[Message],
        *,
        conversation: str,
        response: Response | None = None,
        error: BaseException | None = None,
        goes_on: bool | None = None,
        spans: Sequence[ReadableSpan] = (),
        elapsed: float | None = None,
    ) -> int | None:
        """Keep a turn. Return its id; None if it could not be kept, which is said once.

        Args:
            config: the configuration that answered: its framework and model are kept, and its keys masked.
            messages: all messages that were sent, from the system message to the question. What earlier turns have
                sent is not kept twice.
            conversation: the id of the conversation; see `new_conversation` and `Conversation.id`.
            response: the answer, whole or as far as it came; None if there is none.
            error: why there is no whole answer; a KeyboardInterrupt if the user has stopped it.
            goes_on: whether `response` belongs to the conversation that `chat --continue` goes on with. None: if there
                is no error.
            spans: the spans of the turn.
            elapsed: seconds; None takes the response's.
        """
        try:
            masking = Masking.of(config)
            kept = Kept.of(
                config,
                messages,
                masking,
                conversation=conversation,
                config_file=self._config_file,
                time=time.time(),
                response=response,
                error=error,
                goes_on=goes_on,
                spans=spans,
                elapsed=elapsed,
            )
            return self._store.add(kept)
        except Exception as problem:  # noqa: BLE001  # a turn that cannot be kept must not end the chat
            if not self._reported:
                self._reported = True
                self._screen.aside(f"fluxibly: the turn is not logged: {reason(problem)}", "dim")
            return None


def shown_path(path: Path) -> str:
    """Return a path as a person writes it, with "~" for the home directory."""
    home = os.path.expanduser("~")  # noqa: PTH111  # Path.home() raises if there is none
    return f"~{os.sep}{path.relative_to(home)}" if path.is_relative_to(home) and home != "/" else str(path)


def reason(error: BaseException) -> str:
    """Return why the file could not be read or written, on one line and without the content of a turn."""
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
    if isinstance(error, (sqlite3.Error, LogError, ConfigError)):
        return str(error)
    return type(error).__name__


def _warn_on(screen: Screen) -> Callable[[str], None]:
    return lambda text: screen.aside(f"fluxibly: {text}", "yellow")


def _attempt(screen: Screen, what: str, work: Callable[[], T]) -> T | None:
    """Do some work with the file. Say so and return None if that fails."""
    try:
        return work()
    except Exception as problem:  # noqa: BLE001  # the chat goes on
        screen.aside(f"fluxibly: {what}: {reason(problem)}", "dim")
        return None
