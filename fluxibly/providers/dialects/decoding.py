"""Helpers that the decoders of all dialects share.

`PendingFields` holds metadata until the next chunk that has output. `Pieces` keeps the order of what comes together.
`CallIndexes` mends the numbers of tool calls. `not_an_answer` and `cut_off` build the errors for invalid and truncated
responses.
"""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Mapping
from typing import Any, Final

import attrs

from fluxibly.aggregate import merged
from fluxibly.errors import ProviderError, StreamProtocolError
from fluxibly.providers.dialects.errors import error_of_payload, excerpt
from fluxibly.providers.dialects.json_values import as_array, as_object
from fluxibly.types import Chunk, Reasoning, Text, ToolCallDelta


class PendingFields:
    """Data of a stream that is no output (id, model, finish reason, usage, completed blocks), held for the next chunk.

    Each chunk is then a piece of the answer. This keeps chunk counts, gaps and the time to first chunk meaningful.
    """

    __slots__ = ("_fields",)

    def __init__(self) -> None:
        self._fields: dict[str, Any] = {}

    def add(self, **fields: Any) -> None:
        """Hold fields for the next chunk. None values are ignored; `parts` and `details` accumulate."""
        held = self._fields
        for name, value in fields.items():
            if value is None:
                continue
            if name == "parts":
                held[name] = (*held.get(name, ()), *value)
            elif name == "details":
                held[name] = merged(held.get(name, {}), value)
            else:
                held[name] = value

    def emit(self, text: str = "", **output: Any) -> tuple[Chunk, ...]:
        """Return a chunk of output, with the held fields.

        Held parts go into a chunk of their own before reasoning, because they came before it, and a chunk's reasoning
        comes before its parts.
        """
        if not self._fields:
            return (Chunk(text, **output),)
        held, self._fields = self._fields, {}
        before = held.pop("parts", ())
        if before and output.get("reasoning"):
            return (Chunk(parts=before, **held), Chunk(text, **output))
        parts = (*before, *output.pop("parts", ()))
        return (Chunk(text, parts=parts, **output, **held),)

    def flush(self) -> tuple[Chunk, ...]:
        """Return the held fields as a last chunk, if there are any."""
        return self.emit() if self._fields else ()


class Pieces:
    """The output of an event or an answer in its order, as the fields of as few chunks as can hold it."""

    __slots__ = ("_rank", "chunks", "has_output")

    _RANKS: Final = {"reasoning": 0, "parts": 1, "text": 2, "tool_calls": 3}
    """The order of pieces within a chunk."""

    def __init__(self) -> None:
        self.chunks: list[dict[str, Any]] = []
        self.has_output = False
        """Whether there is more than blocks that complete what came before."""
        self._rank = len(self._RANKS)

    def add(self, name: str, value: Any) -> None:
        """Add a piece: a text, or a tuple of parts or of fragments of tool calls."""
        rank = self._RANKS[name]
        if rank < self._rank:
            self.chunks.append({name: value})
        else:
            fields = self.chunks[-1]
            fields[name] = fields[name] + value if name in fields else value
        self._rank = rank
        self.has_output = True

    def complete(self, part: Reasoning | Text) -> None:
        """Add a part that completes the reasoning or the text before it."""
        output = self.has_output
        self.add("parts", (part,))
        self.has_output = output


class CallIndexes:
    """The numbers of the tool calls of an answer.

    Some gateways go on with a call under another number: a fragment with a new number but neither id nor name belongs
    to the call before.
    """

    __slots__ = ("_known",)

    def __init__(self) -> None:
        self._known: list[int | None] = []

    def mended(self, delta: ToolCallDelta) -> ToolCallDelta:
        """Return a fragment with the number of the call that it belongs to."""
        known, index = self._known, delta.index
        if index in known:
            return delta
        if known and not delta.id and not delta.name:
            return delta if index is None else attrs.evolve(delta, index=known[-1])
        known.append(index)
        return delta


def not_an_answer(payload: object, body: bytes, service: str, lacks: str) -> ProviderError:
    """Return the error for JSON that is not a response of the dialect: the error that the JSON reports, if any."""
    return error_of_payload(payload, body=body, service=service) or StreamProtocolError(
        f"expected a response with {lacks} from {service}, got other JSON", body=excerpt(body)
    )


def cut_off(service: str, lacks: str) -> StreamProtocolError:
    """Return the error for a stream that ended too early."""
    return StreamProtocolError(f"{service}'s stream was cut off: it ended without {lacks}")


def join_fields(fields: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Add the fields of a piece of a block to the block: texts and lists go to the end of those that are there."""
    for name, value in more.items():
        before = fields.get(name)
        if isinstance(before, str) and isinstance(value, str):
            fields[name] = before + value
        elif isinstance(before, list) and isinstance(value, list):
            fields[name] = [*as_array(before), *as_array(value)]
        elif value is not None:
            fields[name] = value


def base64_bytes(text: str) -> bytes | None:
    """Return the bytes of base64 text; None if it is not base64."""
    try:
        return b64decode(text, validate=True)
    except ValueError:
        return None


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
