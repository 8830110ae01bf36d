"""The aggregation of chunks into a response, and the conversion of a response into a chunk."""

from __future__ import annotations

from typing import Any

from fluxibly.types import Chunk, Reasoning, Response, ToolCall, ToolCallDelta


class _Call:
    __slots__ = ("arguments", "id", "index", "name", "signature")

    def __init__(self, delta: ToolCallDelta) -> None:
        self.index = delta.index
        self.id = delta.id or ""
        self.name = delta.name or ""
        self.arguments: list[str] = []
        self.signature = delta.signature


class Aggregator:
    """A collector of the chunks of one answer. `add` each chunk, and ask for the `response` at any time."""

    __slots__ = ("_calls", "_fields", "_others", "_reasoning", "_reasoning_parts", "texts")

    def __init__(self) -> None:
        self.texts: list[str] = []
        """The texts of the chunks. For a `text_only` chunk it is enough to append its text here."""
        self._reasoning: list[str] = []
        self._reasoning_parts: list[Reasoning] = []
        self._calls: list[_Call] = []
        self._fields: dict[str, Any] = {}
        self._others: dict[int, Aggregator] = {}

    @property
    def has_output(self) -> bool:
        """Whether the chunks contained text, reasoning or part of a tool call."""
        return bool(self._reasoning or self._calls or any(self.texts))

    def add(self, chunk: Chunk) -> None:
        """Add the next chunk."""
        self.texts.append(chunk.text)
        if not chunk.text_only:
            self._add_rest(chunk)

    def _add_rest(self, chunk: Chunk) -> None:
        if chunk.reasoning:
            self._reasoning.append(chunk.reasoning)
        for delta in chunk.tool_calls:
            self._add_call(delta)
        self._add_fields(chunk)
        self._reasoning_parts.extend(chunk.reasoning_parts)
        for index, other in chunk.alternatives:
            self._others.setdefault(index, Aggregator()).add(other)

    def _add_fields(self, chunk: Chunk) -> None:
        for name in ("finish_reason", "raw_finish_reason", "usage", "id", "model", "request_id", "rate_limits"):
            value = getattr(chunk, name)
            if value:
                self._fields[name] = value

    def _add_call(self, delta: ToolCallDelta) -> None:
        call = self._find(delta)
        if call is None:
            call = _Call(delta)
            self._calls.append(call)
        else:
            call.id = call.id or delta.id or ""
            call.name = call.name or delta.name or ""
            call.signature = delta.signature or call.signature
        if delta.arguments:
            call.arguments.append(delta.arguments)

    def _find(self, delta: ToolCallDelta) -> _Call | None:
        """Return the call that a fragment continues: the call with its index, else with its id, else the last call.

        A fragment with both a name and a new id begins a call whatever its index, because some services number every
        call 0.
        """
        begins = bool(delta.name and delta.id)
        for call in reversed(self._calls):
            if delta.index is not None:
                if call.index == delta.index and not (begins and call.id and call.id != delta.id):
                    return call
            elif (delta.id and call.id == delta.id) or (not delta.id and not delta.name):
                return call
        return None

    def response(self) -> Response:
        """Return the response that the chunks so far add up to."""
        return Response(
            "".join(self.texts),
            tool_calls=[
                ToolCall(
                    call.id or f"call_{n}", call.name, raw_arguments="".join(call.arguments), signature=call.signature
                )
                for n, call in enumerate(self._calls)
            ],
            reasoning="".join(self._reasoning),
            reasoning_parts=self._reasoning_parts,
            alternatives=[self._others[index].response() for index in sorted(self._others)],
            **self._fields,
        )


def as_chunk(response: Response) -> Chunk:
    """Return a whole response as one chunk, from which `Aggregator` makes the same response."""
    return Chunk(
        response.text,
        reasoning=response.reasoning,
        reasoning_parts=response.reasoning_parts,
        tool_calls=tuple(
            ToolCallDelta(
                index=index, id=call.id, name=call.name, arguments=call.raw_arguments, signature=call.signature
            )
            for index, call in enumerate(response.tool_calls)
        ),
        finish_reason=response.finish_reason,
        raw_finish_reason=response.raw_finish_reason,
        usage=response.usage,
        model=response.model,
        id=response.id,
        request_id=response.request_id,
        rate_limits=response.rate_limits or None,
        alternatives=tuple((index, as_chunk(other)) for index, other in enumerate(response.alternatives, 1)),
    )
