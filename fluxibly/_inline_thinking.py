"""Reasoning that a model writes into its answer: the codecs and `ExtractReasoning` separate it."""

from __future__ import annotations

from typing import Final, Literal

TAG: Final = "think"
"""The tag that most models write."""
LEADING: Final = 100
"""Maximum number of white-space characters before the opening tag."""


class InlineThinking:
    """A splitter that separates a streamed answer into text and reasoning, piece by piece.

    Only text between `<think>` and `</think>` (or another tag) at the very beginning is reasoning. Later tags are part of
    the answer.
    White space around the opening tag and after the closing tag is dropped. The result does not depend on where the
    pieces are cut. Reasoning without a closing tag extends to the end. `markup` is all that was taken out of the text.

    Args:
        tag: the name of the tag.
        opened: whether the answer begins inside of the tags, because the prompt ended with the opening one. The model
            may repeat it. Without this, a closing tag alone is text: what comes before it in a stream is already out.
    """

    __slots__ = ("_close", "_held", "_open", "_opened", "_stage", "_taken", "over")

    def __init__(self, tag: str = TAG, *, opened: bool = False) -> None:
        self._open = f"<{tag}>"
        self._close = f"</{tag}>"
        self._opened = opened
        self._stage: Literal["before", "opened", "inside", "after"] = "before"
        self._held: str = ""
        """The end of the input so far, which may be part of a tag."""
        self._taken: list[str] = []
        """The input before the text."""
        self.over = False
        """Whether all further input is text."""

    def split(self, piece: str) -> tuple[str, str]:
        """Return the text and the reasoning that are certain after this piece."""
        if self.over:
            return piece, ""
        self._taken.append(piece)
        held = self._held + piece
        thought = self._held = ""
        if self._stage == "before":
            start = held.lstrip()
            may_begin = len(held) - len(start) <= LEADING
            if may_begin and self._open.startswith(start):
                self._held = held
                return "", ""
            if may_begin and start.startswith(self._open):
                start = start[len(self._open) :]
            elif not self._opened:
                self.over = True
                self._taken.clear()
                return held, ""
            self._stage, held = "opened", start
        if self._stage == "opened":
            held = held.lstrip()
            if not held:
                return "", ""
            self._stage = "inside"
        if self._stage == "inside":
            thought, tag, held = held.partition(self._close)
            if not tag:
                cut = len(thought) - _begun(thought, self._close)
                self._held = thought[cut:]
                return "", thought[:cut]
            self._stage = "after"
        text = held.lstrip()
        if text:
            self.over = True
            self._taken = ["".join(self._taken).removesuffix(text)]
        return text, thought

    def rest(self) -> tuple[str, str]:
        """Return the text and the reasoning that were held back, at the end of the input."""
        held, self._held = self._held, ""
        if self._opened and self._stage == "before" and held.strip():
            self._stage = "inside"  # less than an opening tag is reasoning
        return ("", held) if self._stage == "inside" else (held, "")

    def interrupt(self) -> str:
        """Return the text that was held back, because something else follows it.

        What comes later is text. Only reasoning that has begun goes on, and an answer that has not begun begins later.
        """
        if self._stage in ("opened", "inside") or not self._taken:
            return ""
        held, self._held = self._held, ""
        self.over = True
        return held

    @property
    def markup(self) -> str:
        """The reasoning as the model wrote it, with its tags and the white space around them; "" if there was none.

        It is complete once the input is over, or at its end.
        """
        return "" if self._stage == "before" else "".join(self._taken)


def _begun(text: str, tag: str) -> int:
    """Return how many characters at the end of a text may begin the closing tag."""
    if tag[0] not in text[1 - len(tag) :]:  # nearly always
        return 0
    return next((n for n in range(len(tag) - 1, 0, -1) if text.endswith(tag[:n])), 0)
