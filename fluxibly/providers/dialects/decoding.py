"""What the decoders of dialects share.

What an event brings that is no output waits for a chunk that has some (`PendingFields`); reasoning that a model writes into its
answer is parted from it (`InlineThinking`); and an answer that is cut off or none has its error.
"""

from __future__ import annotations

import json
from typing import Any, Final, Literal

from fluxibly.errors import ProviderError, StreamProtocolError
from fluxibly.providers.dialects.errors import error_of_payload, excerpt
from fluxibly.providers.dialects.json_values import as_object
from fluxibly.types import Chunk


class PendingFields:
    """What of a stream is no output (id, model, finish reason, usage, signed reasoning), until the next chunk.

    A chunk is then a piece of the answer, so that counts, gaps and the time to the first one mean what they say.
    """

    __slots__ = ("_fields",)

    def __init__(self) -> None:
        self._fields: dict[str, Any] = {}

    def add(self, **fields: Any) -> None:
        """Hold these; what is None says nothing, and signed reasoning adds up."""
        for name, value in fields.items():
            if name == "reasoning_parts":
                self._fields[name] = self._fields.get(name, ()) + value
            elif value is not None:
                self._fields[name] = value

    def emit(self, text: str = "", **output: Any) -> tuple[Chunk]:
        """A chunk of output, with what was held."""
        if self._fields:
            output |= self._fields
            self._fields = {}
        return (Chunk(text, **output),)

    def flush(self) -> tuple[Chunk, ...]:
        """The last chunk, if something is held."""
        return self.emit() if self._fields else ()


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


def not_an_answer(payload: object, body: bytes, service: str, lacks: str) -> ProviderError:
    """The error for JSON that is no answer of the dialect: the one that it reports, if it reports one."""
    return error_of_payload(payload, body=body, service=service) or StreamProtocolError(
        f"{service} sent JSON that is no answer of its dialect: it has no {lacks}", body=excerpt(body)
    )


def cut_off(service: str, lacks: str) -> StreamProtocolError:
    """The error for a stream that ended too soon."""
    return StreamProtocolError(f"{service}'s stream was cut off: it ended without {lacks}")


def to_json(value: object) -> str:
    """JSON text as a model would write it, for the arguments of a tool call that came as an object.

    Raises:
        StreamProtocolError: it is nested too deeply, though not by so much that it could not be read.
    """
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        raise StreamProtocolError("the arguments of a tool call are nested too deeply") from None


def arguments_text(value: Any) -> str:
    """The arguments of a tool call as JSON text. They come as an object, or as such text."""
    return value if isinstance(value, str) else to_json(as_object(value))
