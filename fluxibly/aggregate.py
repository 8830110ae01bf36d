"""The aggregation of chunks into a response, and the conversion of a response into chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, TypeVar, cast

import attrs

from fluxibly._checks import kind_of
from fluxibly.messages import Message
from fluxibly.parts import Media, Opaque, Part, Place, Reasoning, Span, Text, ToolCall, order_unless_usual
from fluxibly.types import USUAL, Chunk, Response, ToolCallDelta


class _Call:
    __slots__ = ("arguments", "id", "index", "name", "raw", "signature")

    def __init__(self, delta: ToolCallDelta) -> None:
        self.index = delta.index
        self.id = delta.id or ""
        self.name = delta.name or ""
        self.arguments: list[str] = []
        self.signature = delta.signature
        self.raw = delta.raw

    def call(self, number: int) -> ToolCall:
        return ToolCall(
            self.id or f"call_{number}",
            self.name,
            raw_arguments="".join(self.arguments),
            signature=self.signature,
            raw=self.raw,
        )


class BegunCall(Protocol):
    """A tool call of which fragments have come."""

    @property
    def index(self) -> int | None: ...
    @property
    def id(self) -> str | None: ...


_C = TypeVar("_C", bound=BegunCall)


def continued_call(calls: Sequence[_C], delta: ToolCallDelta) -> _C | None:
    """Return the call that a fragment continues: the call with its index, else with its id, else the last call.

    A fragment with both a name and a new id begins a call whatever its index, because some services number every call 0.
    """
    begins = bool(delta.name and delta.id)
    for call in reversed(calls):
        if delta.index is not None:
            if call.index == delta.index and not (begins and call.id and call.id != delta.id):
                return call
        elif (delta.id and call.id == delta.id) or (not delta.id and not delta.name):
            return call
    return None


class CallNumbers:
    """The numbers of a stream's tool calls, from 0, for those who join the fragments of a call by number alone."""

    def __init__(self) -> None:
        self._calls: list[ToolCallDelta] = []

    def of(self, delta: ToolCallDelta) -> int:
        """Return the number of the call that a fragment begins or continues."""
        call = continued_call(self._calls, delta)
        if call is None:
            self._calls.append(delta)
            return len(self._calls) - 1
        return next(number for number, begun in enumerate(self._calls) if begun is call)


class _Thought:
    """Reasoning in progress. `end` is the number of texts before the next piece, if that piece continues it."""

    __slots__ = ("end", "pieces")

    def __init__(self, piece: str, end: int) -> None:
        self.pieces = [piece]
        self.end = end


_Mark: TypeAlias = _Call | _Thought | Reasoning | Media | Opaque | Text


class Aggregator:
    """A collector of the chunks of one answer. `add` each chunk, and ask for the `response` at any time."""

    __slots__ = ("_calls", "_details", "_fields", "_marks", "_others", "_reasoning", "added", "texts")

    def __init__(self) -> None:
        self.added: tuple[Message, ...] = ()
        """The messages of the marks so far (`Chunk.added`)."""
        self.begin_message()

    def begin_message(self) -> None:
        """Begin a new message, which the chunks so far do not belong to."""
        self.texts: list[str] = []
        """The texts of the chunks. For a `text_only` chunk it is enough to append its text here."""
        self._reasoning: list[str] = []
        self._calls: list[_Call] = []
        self._marks: list[tuple[int, _Mark]] = []
        """The parts besides text, in order, each with the number of texts before it."""
        self._fields: dict[str, Any] = {}
        self._details: dict[str, Any] = {}
        self._others: dict[int, Aggregator] = {}

    @property
    def has_output(self) -> bool:
        """Whether the chunks contained text, reasoning, part of a tool call, media or an opaque part."""
        return bool(
            any(self._reasoning)
            or any(not isinstance(mark, (Reasoning, Text)) for _, mark in self._marks)
            or any(self.texts)
            or any(other.has_output for other in self._others.values())
        )

    def add(self, chunk: Chunk) -> None:
        """Add the next chunk. After a mark with messages (`Chunk.added`) the response is that of the new message."""
        if chunk.added:
            self.added += chunk.added
            self.begin_message()
        elif chunk.added is not None:  # the message goes on, so it has not ended
            self._fields.pop("finish_reason", None)
            self._fields.pop("raw_finish_reason", None)
        self.texts.append(chunk.text)
        if not chunk.text_only:
            self._add_rest(chunk)

    def _add_rest(self, chunk: Chunk) -> None:
        before = len(self.texts) - 1
        if chunk.reasoning:
            self._reasoning.append(chunk.reasoning)
            self._think(chunk.reasoning, before)
        claimed = any(isinstance(part, Reasoning) and part.text for part in chunk.parts)
        for part in chunk.parts:
            if not isinstance(part, Reasoning):
                self._add_part(part, before)
            elif not self._complete(part, claimed=claimed):
                self._marks.append((before, part))
                self._reasoning.append(part.text)
        for delta in chunk.tool_calls:
            self._add_call(delta)
        self._add_fields(chunk)
        if chunk.details:
            _extend(self._details, chunk.details, DEPTH)
        for index, other in chunk.alternatives:
            self._others.setdefault(index, Aggregator()).add(other)

    def _add_fields(self, chunk: Chunk) -> None:
        for name in ("finish_reason", "raw_finish_reason", "usage", "id", "model", "request_id", "rate_limits"):
            value = getattr(chunk, name)
            if value:
                self._fields[name] = value

    def _think(self, piece: str, before: int) -> None:
        mark = self._marks[-1][1] if self._marks else None
        if isinstance(mark, _Thought) and not any(self.texts[mark.end : before]):
            mark.pieces.append(piece)
            mark.end = before
        else:
            self._marks.append((before, _Thought(piece, before)))

    def _complete(self, part: Reasoning, *, claimed: bool) -> bool:
        """Put completed reasoning into the place where it was streamed. Return whether there is such a place.

        The text is what was streamed. One chunk may have the reasoning of several parts: if the part's own text is only
        the beginning, the rest stays for the next part, and a part without text takes none that others have `claimed`.
        """
        for number in reversed(range(len(self._marks))):
            place, mark = self._marks[number]
            if isinstance(mark, Reasoning):
                break
            if isinstance(mark, _Thought):
                said = "".join(mark.pieces)
                begins = said.startswith(part.text) and (part.text or claimed)
                rest = said[len(part.text) :] if begins else ""
                done = part if rest or part.text == said else attrs.evolve(part, text=said)
                left = [(place, _Thought(rest, mark.end))] if rest else []
                self._marks[number : number + 1] = [(place, done), *left]
                return True
        return False

    def _add_part(self, part: Part, before: int) -> None:
        if isinstance(part, Text):
            if part.text:
                raise ValueError("a Chunk's parts: expected an empty Text, got one with text; put it into text=")
        elif not isinstance(part, (Media, Opaque)):
            raise TypeError(
                "a Chunk's parts: expected Reasoning, Image, Audio, Document, Opaque or an empty Text, "
                f"got {kind_of(part)}; put text into text=, and tool calls into tool_calls="
            )
        self._marks.append((before, part))

    def _add_call(self, delta: ToolCallDelta) -> None:
        call = continued_call(self._calls, delta)
        if call is None:
            call = _Call(delta)
            self._calls.append(call)
            self._marks.append((len(self.texts), call))
        else:
            call.id = call.id or delta.id or ""
            call.name = call.name or delta.name or ""
            call.signature = delta.signature or call.signature
            if delta.raw is not None:
                call.raw = delta.raw if call.raw is None else {**call.raw, **delta.raw}
        if delta.arguments:
            call.arguments.append(delta.arguments)

    def join_texts(self) -> None:
        """Join the last texts, so that a `response` after every few chunks does not take longer and longer."""
        start = 0
        if self._marks:
            start, mark = self._marks[-1]
            start = mark.end if isinstance(mark, _Thought) else start
        self.texts[start:] = ["".join(self.texts[start:])]

    def response(self) -> Response:
        """Return the response that the chunks so far add up to."""
        fields: dict[str, Any] = dict(self._fields)
        if self._marks:
            fields |= self._arranged()
        if self._details:
            fields["details"] = _copied(self._details, DEPTH)
        if self._others:
            fields["alternatives"] = [self._others[index].response() for index in sorted(self._others)]
        if self.added:
            fields["added"] = self.added
        return Response("".join(self.texts), reasoning="".join(self._reasoning), **fields)

    def _arranged(self) -> dict[str, Any]:
        """Return the parts besides text, by kind, and their order."""
        order: list[Place] = []
        thoughts: list[Reasoning] = []
        media: list[Media] = []
        calls: list[ToolCall] = []
        at = 0
        for place, mark in (*self._marks, (len(self.texts), None)):
            said = sum(map(len, self.texts[at:place]))
            at = max(at, place)
            if isinstance(mark, Text):
                if said or mark.raw is not None:
                    order.append(Span(said, mark.raw))
                continue
            if said:
                order.append(Span(said))
            if isinstance(mark, _Call):
                calls.append(mark.call(len(calls)))
                order.append("tool_call")
            elif isinstance(mark, Media):
                media.append(mark)
                order.append("media")
            elif isinstance(mark, Opaque):
                order.append(mark)
            elif mark is not None:
                thoughts.append(Reasoning(text="".join(mark.pieces)) if isinstance(mark, _Thought) else mark)
                order.append("reasoning")
        arranged = order_unless_usual(order, USUAL)
        plain = len(thoughts) == 1 and any(isinstance(mark, _Thought) for _, mark in self._marks)
        return {
            "tool_calls": calls,
            "reasoning_parts": () if plain else thoughts,
            "media": media,
            "order": arranged,
        }


DEPTH = 8
"""The levels of details that are merged. What lies deeper is replaced as a whole."""


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Return JSON objects merged: tables key by key, lists appended, and of other values the new one."""
    both: dict[str, Any] = _copied(old, DEPTH)
    _extend(both, new, DEPTH)
    return both


def _extend(own: dict[str, Any], new: Mapping[str, Any], depth: int) -> None:
    """Merge details in place, because they may grow with every chunk. `own` has its own tables and lists."""
    for key, value in new.items():
        before = own.get(key)
        if depth > 1 and isinstance(before, dict) and isinstance(value, Mapping):
            _extend(cast("dict[str, Any]", before), cast("Mapping[str, Any]", value), depth - 1)
        elif depth > 1 and isinstance(before, list) and isinstance(value, list):
            before.extend(value)  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
        else:
            own[key] = _copied(value, depth - 1)


def _copied(value: Any, depth: int) -> Any:
    """Return tables, to a depth, and the lists in them as new ones. The items of lists stay the same."""
    if depth and isinstance(value, Mapping):
        return {key: _copied(item, depth - 1) for key, item in cast("Mapping[str, Any]", value).items()}
    return [*value] if depth and isinstance(value, list) else value  # pyright: ignore[reportUnknownVariableType]


def chunks_of(parts: Iterable[Part]) -> list[Chunk]:
    """Return parts in their order as few chunks, from which `Aggregator` makes the same parts."""
    pieces = [_Piece()]
    calls = 0
    before: Text | None = None
    """The text that the next part stands after."""
    given = list(parts)
    bare = _bare(given)
    for number, part in enumerate(given):
        rank = 1 if isinstance(part, Text) else 2 if isinstance(part, ToolCall) else 0
        if before is not None and (rank == 1 or before.raw is not None):
            pieces.append(_Piece(Text("", raw=before.raw)))
        said = part.text if isinstance(part, Reasoning) else ""
        if rank < pieces[-1].rank or (said and pieces[-1].parts):  # a chunk's reasoning stands before its parts
            pieces.append(_Piece())
        piece = pieces[-1]
        piece.rank, before = rank, None
        if isinstance(part, Text):
            piece.text, before = part.text, part
        elif isinstance(part, ToolCall):
            piece.calls.append(_delta(part, calls))
            calls += 1
        else:
            piece.reasoning += said
            if number not in bare:
                piece.parts.append(part)
    if before is not None and before.raw is not None:
        pieces.append(_Piece(Text("", raw=before.raw)))
    return [piece.chunk() for piece in pieces]


def _bare(parts: Sequence[Part]) -> set[int]:
    """Return the numbers of the reasoning that is only text, and needs no part to complete it.

    It needs one if more reasoning follows at once, or if the next has no text, and would take its place.
    """
    bare: set[int] = set()
    following: Part | None = None
    thought: Reasoning | None = None
    for number in reversed(range(len(parts))):
        part = parts[number]
        if isinstance(part, Reasoning):
            alone = not isinstance(following, Reasoning) and (thought is None or thought.text != "")
            if alone and part.text and part == Reasoning(text=part.text):
                bare.add(number)
            thought = part
        following = part
    return bare


class _Piece:
    """A chunk in the making. `rank` is that of its last part: 0 for its `parts`, 1 for its text, 2 for its tool calls."""

    __slots__ = ("calls", "parts", "rank", "reasoning", "text")

    def __init__(self, *parts: Part) -> None:
        self.rank = 0
        self.text = self.reasoning = ""
        self.parts = [*parts]
        self.calls: list[ToolCallDelta] = []

    def chunk(self) -> Chunk:
        return Chunk(self.text, reasoning=self.reasoning, parts=tuple(self.parts), tool_calls=tuple(self.calls))


def _delta(call: ToolCall, index: int) -> ToolCallDelta:
    return ToolCallDelta(
        index=index, id=call.id, name=call.name, arguments=call.raw_arguments, signature=call.signature, raw=call.raw
    )


def as_chunk(response: Response) -> Chunk:
    """Return a whole response as one chunk. If its parts have an order of their own, the chunk does not have it.

    The messages in `response.added` are the chunk's mark.
    """
    return Chunk(
        response.text,
        reasoning=response.reasoning,
        parts=(*response.reasoning_parts, *response.media, *response.opaque),
        tool_calls=tuple([_delta(call, index) for index, call in enumerate(response.tool_calls)]),
        **_fields(response),
    )


def as_chunks(response: Response) -> list[Chunk]:
    """Return a whole response as chunks from which `Aggregator` makes the same response: as one, if it can be.

    Several blocks of reasoning need several chunks, so that each stays with its signature if a middleware changes it.
    """
    if response.order is None and sum([part.text != "" for part in response.reasoning_parts]) < 2:
        return [as_chunk(response)]
    *first, last = chunks_of(response.parts)
    fields = _fields(response)
    mark = [Chunk(added=fields.pop("added"))] if response.added else []
    return [*mark, *first, attrs.evolve(last, **fields)]


def rewritten(
    parts: Iterable[Part], take: Callable[[Chunk], Chunk | Sequence[Chunk]], rest: Callable[[], Sequence[Chunk]]
) -> Response:
    """Return the response of a message's parts as `take` changes their chunks, followed by what `rest` returns."""
    answer = Aggregator()
    for chunk in as_chunks(Response.from_parts(parts)):
        pieces = take(chunk)
        for piece in (pieces,) if isinstance(pieces, Chunk) else pieces:
            answer.add(piece)
    for piece in rest():
        answer.add(piece)
    return answer.response()


def around_text(chunk: Chunk) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields of a chunk that stand before its text, and those that stand after it."""
    before = {name: getattr(chunk, name) for name in _BEFORE_TEXT}
    return before, {name: getattr(chunk, name) for name in _AFTER_TEXT}


_BEFORE_TEXT = ("reasoning", "parts", "model", "id", "request_id", "rate_limits", "added")
_AFTER_TEXT = ("tool_calls", "finish_reason", "raw_finish_reason", "usage", "alternatives", "details")


def pieces_of(item: object) -> Sequence[Chunk] | None:
    """Return the chunks that an item of a provider's stream stands for: a Chunk, a str or a Response. None: it is none."""
    if isinstance(item, Chunk):
        return (item,)
    if isinstance(item, str):
        return (Chunk(item),)
    return as_chunks(item) if isinstance(item, Response) else None


def _fields(response: Response) -> dict[str, Any]:
    """Return the fields of a chunk that say the rest of a response."""
    return {
        "finish_reason": response.finish_reason,
        "raw_finish_reason": response.raw_finish_reason,
        "usage": response.usage,
        "model": response.model,
        "id": response.id,
        "request_id": response.request_id,
        "rate_limits": response.rate_limits or None,
        "details": response.details or None,
        "added": response.added or None,
        "alternatives": tuple(
            [(index, chunk) for index, other in enumerate(response.alternatives, 1) for chunk in as_chunks(other)]
        ),
    }
