"""The chunks of an answer that LangChain streams, as fluxibly's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

from langchain_core.messages import AIMessageChunk
from langchain_core.messages.base import merge_content

from fluxibly.providers.dialects.decoding import CallIndexes, PendingFields
from fluxibly.providers.langchain._blocks import (
    blocks_of,
    call_delta,
    details_of,
    growing_field,
    is_call,
    is_thought,
    part_of,
    reasoning_text,
)
from fluxibly.providers.langchain._messages import fields_of, metadata_of
from fluxibly.types import Chunk, Text


class MessageReader:
    """A reader of the messages of a stream. `dialect` names the integration of the chat model.

    A block is complete when the next one begins. What is no output (metadata, completed blocks) waits for the next
    piece of output.
    """

    def __init__(self, dialect: str) -> None:
        self._dialect = dialect
        self._held = PendingFields()
        self._details: dict[str, Any] = {}
        self._open: _OpenBlock | None = None
        self._called = False
        self._indexes = CallIndexes()
        self.finished = False
        """Whether a finish reason has arrived."""

    def read(self, message: AIMessageChunk) -> list[Chunk]:
        """Return the chunks of a message: one for each piece of output."""
        chunks: list[Chunk] = []
        calls: list[Mapping[str, Any]] = [dict(call) for call in message.tool_call_chunks]
        self._called = self._called or bool(calls)
        self._note(message)
        for block in blocks_of(message):
            chunks += self._take(block)
            if calls and self._open is not None and is_call(self._open.fields):
                mine = [call for call in calls if _stands_in(call, block)]
                calls = [call for call in calls if call not in mine]
                chunks += self._calls(mine, message, block)
        if calls:
            self._close()
            chunks += self._calls(calls, message)
        return chunks

    def end(self) -> Iterable[Chunk]:
        """Return what is left at the end of the stream."""
        self._close()
        self._held.add(details=self._details or None)
        return self._held.flush()

    def _note(self, message: AIMessageChunk) -> None:
        """Hold the metadata of a message."""
        if not (message.response_metadata or message.usage_metadata or message.id):
            return
        fields = fields_of(message, called=self._called)
        self.finished = self.finished or fields["raw_finish_reason"] is not None
        self._held.add(**{name: value or None for name, value in fields.items()})
        details = metadata_of(message)
        if "logprobs" in details:
            self._held.add(details={"logprobs": details.pop("logprobs")})
        self._details.update(details)  # services repeat these with every chunk

    def _take(self, block: dict[str, Any]) -> Iterable[Chunk]:
        """Take a block, or a piece of one, and return its output."""
        if self._open is None or not self._open.add(block):
            self._begin(block)
        if found := details_of(block):
            self._held.add(details=found)
        if is_thought(block):
            thought = reasoning_text(block)
            return self._held.emit(reasoning=thought) if thought else ()
        text = block.get("text") if block.get("type") == "text" else block.get("refusal")
        return self._held.emit(text) if isinstance(text, str) and text else ()

    def _begin(self, block: dict[str, Any]) -> None:
        bare = self._close()
        if bare and block.get("type") in ("text", "refusal"):
            self._held.add(parts=(Text(""),))
        self._open = _OpenBlock(block)

    def _close(self) -> bool:
        """Complete the open block. Return whether it is a text without fields, which only another text ends."""
        block, self._open = self._open, None
        if block is None or is_call(block.fields):
            return False
        part = part_of(block.whole(), self._dialect)
        if isinstance(part, Text):
            if part.raw is None:
                return True
            part = Text("", raw=part.raw)
        if part is not None:
            self._held.add(parts=(part,))
        return False

    def _calls(
        self, calls: Iterable[Mapping[str, Any]], message: AIMessageChunk, block: dict[str, Any] | None = None
    ) -> Iterable[Chunk]:
        """Return the chunk of fragments of tool calls. `block` is the block that they stand in."""
        begun = block if block is not None and is_call(block) else None
        deltas = [
            self._indexes.mended(call_delta(call, begun if call.get("id") else None, message, self._dialect))
            for call in calls
        ]
        return self._held.emit(tool_calls=tuple(deltas)) if deltas else ()


def _stands_in(call: Mapping[str, Any], block: Mapping[str, Any]) -> bool:
    """Whether a fragment of a tool call is the one of a block. LangChain's common form numbers blocks differently."""
    if call.get("id"):
        return call["id"] in (block.get("id"), block.get("call_id"))
    return call.get("index") == block.get("index")


_BARE = frozenset(("type", "index"))


class _OpenBlock:
    """A block whose pieces are still arriving. They are merged as LangChain merges them."""

    def __init__(self, block: dict[str, Any]) -> None:
        self._grows: str | None = None
        self._grown: list[str] = []
        self.fields = self._without_text(block)
        """The block without its growing text."""

    def _without_text(self, piece: dict[str, Any]) -> dict[str, Any]:
        """Keep the growing text of a piece, and return its other fields."""
        name = growing_field(piece)
        if name is None:
            return piece
        self._grows = name
        self._grown.append(piece[name])
        return {key: value for key, value in piece.items() if key != name}

    def add(self, piece: dict[str, Any]) -> bool:
        """Add a piece. Return False, and change nothing, if it begins another block."""
        if piece.get("index") != self.fields.get("index"):
            return False
        if "index" not in piece and (self._grows is None or growing_field(piece) != self._grows):
            return False  # an integration that does not number its blocks sends only texts in pieces
        if is_call(self.fields):  # its pieces are in the message's `tool_call_chunks`
            return True
        name = growing_field(piece)
        more = {key: value for key, value in piece.items() if key != name}
        if not more.keys() <= _BARE:
            try:
                joined = merge_content([{"index": 0, **self.fields}], [{"index": 0, **more}])
            except TypeError:
                return False
            if len(joined) > 1:
                return False
            self.fields = cast("dict[str, Any]", joined[0])
        self._without_text(piece)
        return True

    def whole(self) -> dict[str, Any]:
        """Return the block with all of its text."""
        return self.fields if self._grows is None else {**self.fields, self._grows: "".join(self._grown)}
