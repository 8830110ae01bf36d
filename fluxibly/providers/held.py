"""Chunks as pieces of the answer: what an event brings that is no output waits for one that brings some."""

from __future__ import annotations

from typing import Any

from fluxibly.types import Chunk


class Held:
    """What of a stream is no output (id, model, finish reason, usage, signed reasoning), until the next chunk.

    A chunk is then a piece of the answer, so that counts, gaps and the time to the first one mean what they say.
    """

    __slots__ = ("_fields",)

    def __init__(self) -> None:
        self._fields: dict[str, Any] = {}

    def put(self, **fields: Any) -> None:
        """Hold these; what is None says nothing, and signed reasoning adds up."""
        for name, value in fields.items():
            if name == "reasoning_parts":
                self._fields[name] = self._fields.get(name, ()) + value
            elif value is not None:
                self._fields[name] = value

    def chunk(self, text: str = "", **output: Any) -> tuple[Chunk]:
        """A chunk of output, with what was held."""
        if self._fields:
            output |= self._fields
            self._fields = {}
        return (Chunk(text, **output),)

    def rest(self) -> tuple[Chunk, ...]:
        """The last chunk, if something is held."""
        return self.chunk() if self._fields else ()
