"""The command `fluxibly chat`: a question, or a conversation.

`asking.py` asks one question and shows its answer, `conversation.py` is the conversation, with `reading.py` for what is typed.
`rendering.py` shows an answer while it comes, with `markdown.py`. `attachments.py`, `schemas.py` and `settings.py` read options,
and `recording.py` keeps spans.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from fluxibly.cli.chat.asking import Asker, check_text, has_terminal, question_of
from fluxibly.cli.chat.conversation import Talk
from fluxibly.cli.chat.recording import Recorder, check_installed, recorder
from fluxibly.errors import ConfigError
from fluxibly.llm import LLM
from fluxibly.messages import Message
from fluxibly.providers.local import model_path

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fluxibly.cli.turns import Conversation
    from fluxibly.config import LLMConfig
    from fluxibly.parts import ContentPart

__all__ = ["Asker", "Chat", "Recorder", "check_installed", "recorder"]


@attrs.frozen(kw_only=True)
class Chat:
    """A chat with a model.

    Args:
        asker: asks the questions.
        config: the configuration of the model.
        configure: makes a configuration of the name of a model, for `/model`.
        system: instructions for the model.
        earlier: the conversation to go on with.
        attached: what goes with the first question.
    """

    asker: Asker
    config: LLMConfig
    configure: Callable[[str], LLMConfig]
    system: str | None = None
    earlier: Conversation | None = None
    attached: Sequence[ContentPart] = ()

    def run(self, prompt: str | None) -> None:
        """Answer the prompt and what is piped in, or hold a conversation if there is neither.

        Raises:
            ConfigError: there is neither a prompt nor a terminal for a conversation, or the prompt is empty or not text.
            FluxiblyError: the call failed.
        """
        screen = self.asker.screen
        check_text(prompt)
        check_text(self.system)
        if prompt is None and screen.live and has_terminal():
            Talk(
                self.asker,
                screen,
                self.config,
                _open,
                self.configure,
                self._opening(),
                list(self.attached),
                keep_history=self.asker.log is not None,
            ).run()
            return
        question = question_of(prompt, self.attached)
        if not question:
            raise ConfigError(
                'the prompt is empty: fluxibly chat "…"'
                if prompt is not None
                else 'there is no prompt: fluxibly chat "…", or pipe a text into it'
            )
        with _open(self.config) as llm:
            conversation = llm.conversation()
            conversation.messages[:] = self._opening()
            self.asker.ask(self.config, conversation, question)

    def _opening(self) -> list[Message]:
        """Return the messages before the first question."""
        earlier = () if self.earlier is None else self.earlier.messages
        if not self.system:
            return list(earlier)
        return [Message.system(self.system), *(message for message in earlier if message.role != "system")]


def _open(config: LLMConfig) -> LLM:
    """Make the model. If it is a local one that has to be fetched, that is done now: a call's time must not include it."""
    llm = LLM(config)
    try:
        if config.framework == "local":
            model_path(config.model)
    except BaseException:
        llm.close()
        raise
    return llm
