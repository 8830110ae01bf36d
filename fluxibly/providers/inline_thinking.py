"""Reasoning that a model writes into its answer, as models do behind vLLM, llama.cpp, Ollama and others."""

from __future__ import annotations

from typing import Final, Literal

OPEN: Final = "<think>"
CLOSE: Final = "</think>"
LEADING: Final = 100
"""Characters of white space that may stand before the opening tag."""


class InlineThinking:
    """Parts an answer's text, piece by piece, into what is said and what was thought.

    Only what stands between `<think>` and `</think>` at the very beginning is reasoning: further on, the tags are part
    of the answer. White space before the answer, the tags' own included, is dropped, and at the beginning of the
    reasoning; wherever the pieces are cut, the result is the same. Reasoning that is not closed goes on to the end.
    """

    __slots__ = ("_held", "_stage", "over")

    def __init__(self) -> None:
        self._stage: Literal["before", "opened", "inside", "after"] = "before"
        self._held: str = ""
        """The end of what came, which may be a part of a tag."""
        self.over = False
        """Whether all that comes from here on is text."""

    def split(self, piece: str) -> tuple[str, str]:
        """The text and the reasoning that are certain with this piece."""
        if self.over:
            return piece, ""
        held = self._held + piece
        thought = self._held = ""
        if self._stage == "before":
            start = held.lstrip()
            may_begin = len(held) - len(start) <= LEADING
            if may_begin and OPEN.startswith(start):
                self._held = held
                return "", ""
            if not (may_begin and start.startswith(OPEN)):
                self.over = True
                return held, ""
            self._stage, held = "opened", start[len(OPEN) :]
        if self._stage == "opened":
            held = held.lstrip()
            if not held:
                return "", ""
            self._stage = "inside"
        if self._stage == "inside":
            thought, tag, held = held.partition(CLOSE)
            if not tag:
                cut = len(thought) - _begun(thought)
                self._held = thought[cut:]
                return "", thought[:cut]
            self._stage = "after"
        text = held.lstrip()
        self.over = bool(text)
        return text, thought

    def rest(self) -> tuple[str, str]:
        """The text and the reasoning that were held back, when nothing more comes."""
        held, self._held = self._held, ""
        return ("", held) if self._stage == "inside" else (held, "")


def _begun(text: str) -> int:
    """How many characters at the end of a text may be the beginning of the closing tag."""
    return next((n for n in range(len(CLOSE) - 1, 0, -1) if text.endswith(CLOSE[:n])), 0)
