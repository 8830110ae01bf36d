"""Helpers that the decoders of all dialects share.

`PendingFields` holds metadata until the next chunk that has output. `InlineThinking` separates the reasoning that a
model writes into its answer. `not_an_answer` and `cut_off` build the errors for invalid and truncated responses.
"""

from __future__ import annotations

import json
from typing import Any, Final, Literal

from fluxibly.errors import ProviderError, StreamProtocolError
from fluxibly.providers.dialects.errors import error_of_payload, excerpt
from fluxibly.providers.dialects.json_values import as_object
from fluxibly.types import Chunk


class PendingFields:
    """Metadata of a stream (id, model, finish reason, usage, signed reasoning), held until the next chunk with output.

    Each chunk is then a piece of the answer. This keeps chunk counts, gaps and the time to first chunk meaningful.
    """

    __slots__ = ("_fields",)

    def __init__(self) -> None:
        self._fields: dict[str, Any] = {}

    def add(self, **fields: Any) -> None:
        """Hold fields for the next chunk. None values are ignored; signed reasoning accumulates."""
        for name, value in fields.items():
            if name == "reasoning_parts":
                self._fields[name] = self._fields.get(name, ()) + value
            elif value is not None:
                self._fields[name] = value

    def emit(self, text: str = "", **output: Any) -> tuple[Chunk]:
        """Return a chunk of output, with the held fields."""
        if self._fields:
            output |= self._fields
            self._fields = {}
        return (Chunk(text, **output),)

    def flush(self) -> tuple[Chunk, ...]:
        """Return the held fields as a last chunk, if there are any."""
        return self.emit() if self._fields else ()


OPEN: Final = "<think>"
CLOSE: Final = "</think>"
LEADING: Final = 100
"""Maximum number of white-space characters before the opening tag."""


class InlineThinking:
    """A splitter that separates a streamed answer into text and reasoning, piece by piece.

    Only text between `<think>` and `</think>` at the very beginning is reasoning. Later tags are part of the answer.
    White space around the opening tag and after the closing tag is dropped. The result does not depend on where the
    pieces are cut. Reasoning without a closing tag extends to the end.
    """

    __slots__ = ("_held", "_stage", "over")

    def __init__(self) -> None:
        self._stage: Literal["before", "opened", "inside", "after"] = "before"
        self._held: str = ""
        """The end of the input so far, which may be part of a tag."""
        self.over = False
        """Whether all further input is text."""

    def split(self, piece: str) -> tuple[str, str]:
        """Return the text and the reasoning that are certain after this piece."""
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
        """Return the text and the reasoning that were held back, at the end of the input."""
        held, self._held = self._held, ""
        return ("", held) if self._stage == "inside" else (held, "")


def _begun(text: str) -> int:
    """Return how many characters at the end of a text may begin the closing tag."""
    return next((n for n in range(len(CLOSE) - 1, 0, -1) if text.endswith(CLOSE[:n])), 0)


def not_an_answer(payload: object, body: bytes, service: str, lacks: str) -> ProviderError:
    """Return the error for JSON that is not a response of the dialect: the error that the JSON reports, if any."""
    return error_of_payload(payload, body=body, service=service) or StreamProtocolError(
        f"expected a response with {lacks} from {service}, got other JSON", body=excerpt(body)
    )


def cut_off(service: str, lacks: str) -> StreamProtocolError:
    """Return the error for a stream that ended too early."""
    return StreamProtocolError(f"{service}'s stream was cut off: it ended without {lacks}")


def to_json(value: object) -> str:
    """Return JSON text as a model would write it, for tool call arguments that came as an object.

    Raises:
        StreamProtocolError: the value is nested too deeply to be written, though it could be read.
    """
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        raise StreamProtocolError("the arguments of a tool call are nested too deeply") from None


def arguments_text(value: Any) -> str:
    """Return the arguments of a tool call as JSON text. Services send an object or JSON text."""
    return value if isinstance(value, str) else to_json(as_object(value))
