"""The redaction of answers that come in chunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from fluxibly.aggregate import continued_call
from fluxibly.middleware._redacted_messages import changed_media, changed_message, changed_values, without
from fluxibly.middleware._redacting import ArgumentsScanner, Matcher, Replacing, Scanner, redacted_arguments
from fluxibly.types import Chunk, Media, Part, Reasoning, ToolCall, ToolCallDelta

SPELLED = ("logprobs", "logprobsResult")
"""The details that spell out an answer token by token, so that a match is in none of their texts."""


class AnswerScanner:
    """The functions for `map_chunks`: `chunk`, `end` and `begin`.

    A text ends where a part of another kind stands behind it, in a stream as in a whole answer.

    Args:
        spelled: whether to keep the details that spell out the answer.
    """

    def __init__(self, matcher: Matcher, replacing: Replacing, *, spelled: bool) -> None:
        self._matcher = matcher
        self._replacing = replacing
        self._spelled = spelled
        self.begin()

    def begin(self) -> None:
        """Begin an answer, or a message."""
        self._text = Scanner(self._matcher, self._replacing)
        self._reasoning = Scanner(self._matcher, self._replacing)
        self._reasoned = False
        """Whether reasoning came last."""
        self._thinking = False
        """Whether there was reasoning since the last complete block."""
        self._calls: list[_Call] = []
        self._others: dict[int, AnswerScanner] = {}
        """The choices after the first."""

    # The whole texts of messages

    def text(self, text: str, /) -> str:
        """Return a text of its own with its changes, as if it had come in chunks."""
        if self._matcher.finds_nothing(text):
            return text
        scanner = Scanner(self._matcher, self._replacing)
        return scanner.take(text) + scanner.end()

    def arguments(self, call: ToolCall, /) -> str:
        """Return the arguments of a tool call, as text, with their changes."""
        return redacted_arguments(call, self._matcher, self._replacing)

    def reasoning(self, part: Reasoning, /) -> Reasoning:
        """Return a block of reasoning with its changes. `raw` stays, because it goes back to the service."""
        text = self.text(part.text)
        return part if text == part.text else attrs.evolve(_unsigned(part), text=text)

    # Chunks

    def chunk(self, chunk: Chunk) -> Chunk | Sequence[Chunk] | None:
        """Return what a chunk becomes."""
        if not chunk.text_only:
            return self._other(chunk)
        text = chunk.text
        if self._reasoned and text:
            self._reasoned = False
            made = Chunk(self._text.take(text), reasoning=self._reasoning.end())
            return made if made.has_output else None
        if self._text.passes(text):
            return chunk
        let_out = self._text.take(text)
        return chunk if let_out == text else Chunk(let_out) if let_out else None

    def end(self) -> Chunk | None:
        """Return what is still held back of an answer that is complete."""
        rest = Chunk(
            self._text.end(),
            reasoning=self._reasoning.end(),
            tool_calls=tuple([rest for call in self._calls for rest in call.end()]),
            alternatives=tuple(
                [(index, rest) for index, other in self._others.items() if (rest := other.end()) is not None]
            ),
        )
        return rest if rest.has_output else None

    def _other(self, chunk: Chunk) -> Chunk | Sequence[Chunk]:
        """Return what a chunk with more than text becomes."""
        if chunk.added is not None:
            added = tuple([changed_message(message, self) for message in chunk.added])
            return chunk if added == chunk.added else attrs.evolve(chunk, added=added)
        blocks = any(isinstance(part, Reasoning) for part in chunk.parts)
        completes = self._thinking or bool(chunk.reasoning)
        parts_stand = any(not isinstance(part, Reasoning) or not completes for part in chunk.parts)
        calls_begin = any(continued_call(self._calls, delta) is None for delta in chunk.tool_calls)
        before = self._text.end() if chunk.reasoning or parts_stand else ""
        reasoning = self._reasoning.take(chunk.reasoning)
        self._reasoned = self._reasoned or bool(chunk.reasoning)
        if chunk.parts or chunk.text or calls_begin:
            reasoning += self._reasoning.end()
            self._reasoned = False
        text = self._text.take(chunk.text)
        if calls_begin:
            text += self._text.end()
        self._thinking = not blocks and completes
        changes: dict[str, Any] = {
            "text": text,
            "reasoning": reasoning,
            "parts": tuple([self._part(part) for part in chunk.parts]),
            "tool_calls": tuple([made for delta in chunk.tool_calls for made in self._delta(delta)]),
            "alternatives": tuple(
                [(index, made) for index, other in chunk.alternatives for made in self._alternative(index, other)]
            ),
            "details": chunk.details and self._details(chunk.details),
        }
        if blocks:
            self._reasoning.changed = False
        made = chunk
        if any(value != getattr(chunk, name) for name, value in changes.items()):
            made = attrs.evolve(chunk, **changes)
        return [Chunk(before), made] if before else made

    def _part(self, part: Part) -> Part:
        if isinstance(part, Media):
            return changed_media(part, self.text)
        # The text of a changed block is what has gone out.
        return (
            _unsigned(attrs.evolve(part, text="")) if isinstance(part, Reasoning) and self._reasoning.changed else part
        )

    def _details(self, details: Mapping[str, Any]) -> Mapping[str, Any]:
        kept = details if self._spelled else without(details, SPELLED)
        try:
            return changed_values(kept, self.text)
        except RecursionError:  # too deep to look into
            return {}

    def _alternative(self, index: int, chunk: Chunk) -> Sequence[Chunk]:
        """Return what a chunk of another choice becomes."""
        other = self._others.get(index)
        if other is None:
            other = self._others[index] = AnswerScanner(self._matcher, self._replacing, spelled=self._spelled)
        said = "".join([part.text for part in chunk.parts if isinstance(part, Reasoning)])
        if said and not chunk.reasoning and not other._thinking:  # of the same class
            chunk = attrs.evolve(chunk, reasoning=said)  # as `map_chunks` does for the first choice
        made = other.chunk(chunk)
        return [made] if isinstance(made, Chunk) else made or ()

    # Tool calls

    def _delta(self, delta: ToolCallDelta) -> list[ToolCallDelta]:
        made: list[ToolCallDelta] = []
        call = continued_call(self._calls, delta)
        if call is None:
            # Once another call has the same number, a fragment of the first could no longer be told from its own.
            made += [rest for each in self._calls if not each.is_told_from(delta) for rest in each.end()]
            call = _Call(delta, ArgumentsScanner(self._matcher, self._replacing, delta.raw))
            self._calls.append(call)
            begins = True
        else:
            call.id = call.id or delta.id
            begins = False
        arguments = call.scanner.take(delta.arguments)
        if arguments != delta.arguments:
            delta = attrs.evolve(delta, arguments=arguments)
        says_nothing = not arguments and delta == ToolCallDelta(index=delta.index, id=delta.id)
        return made if says_nothing and not begins else [*made, delta]


class _Call:
    """A tool call that has begun."""

    def __init__(self, delta: ToolCallDelta, scanner: ArgumentsScanner) -> None:
        self.index, self.id, self.scanner = delta.index, delta.id, scanner

    def is_told_from(self, delta: ToolCallDelta) -> bool:
        """Whether a fragment of this call can be told from those of another call, which a fragment begins."""
        return bool(self.id) if self.index is None else self.index != delta.index

    def end(self) -> list[ToolCallDelta]:
        """Return the rest of the arguments."""
        rest = self.scanner.end()
        return [ToolCallDelta(index=self.index, id=self.id, arguments=rest)] if rest else []


def _unsigned(part: Reasoning) -> Reasoning:
    """Return a block with another text. With `raw` it goes back as it came; without, its signature would not fit."""
    return part if part.raw is not None else attrs.evolve(part, signature=None)
