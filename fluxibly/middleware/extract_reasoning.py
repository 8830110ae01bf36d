"""Middleware that moves reasoning which a model writes into its text."""

from __future__ import annotations

import re
from collections.abc import Sequence

import attrs

from fluxibly._checks import problem
from fluxibly._inline_thinking import TAG, InlineThinking
from fluxibly.aggregate import around_text, rewritten
from fluxibly.errors import ConfigError
from fluxibly.flow import CallNext, Flow, map_chunks
from fluxibly.types import Chunk, Message, Reasoning, Request, Response

_TAG = re.compile(r"[A-Za-z_][A-Za-z0-9_.:-]*")


def _check_tag(instance: object, attribute: object, tag: object) -> None:
    if not isinstance(tag, str) or not _TAG.fullmatch(tag):
        expected = "the name of a tag without brackets, such as 'think': a letter, then letters, digits and _ . : -"
        raise ConfigError(f"ExtractReasoning: {problem('tag', expected, tag)}")


@attrs.frozen(kw_only=True)
class ExtractReasoning:
    """Middleware that moves reasoning which a model writes into its text, as `<think>…</think>`, to `reasoning`.

    Only a tag at the beginning of an answer is moved, after at most 100 characters of white space; later tags are part of the
    answer. White space around the opening tag and after the closing tag is dropped. Without a closing tag, all of the answer is
    reasoning. A closing tag alone is text, because what comes before it in a stream is out before the tag is seen. For a model
    whose template opens the tag, set the quirk `thinks_first` of its server.

    A stream goes on as it comes: only what may be part of a tag is held back. Reasoning that the service itself keeps apart
    stays, and the extracted text follows it. Each message (`Chunk.added`) and each of several choices (`n`) begins anew. The
    extracted reasoning is not sent back to the model.

    The codecs of OpenAI's dialect and of Ollama already do so for the tag `think`. This middleware is for other tags and for
    other providers.

    Args:
        tag: the name of the tag, without brackets. Letters count as they are written, in upper or lower case.

    Raises:
        ConfigError: `tag` cannot be the name of a tag.
    """

    tag: str = attrs.field(default=TAG, validator=_check_tag)

    def __call__(self, request: Request, call_next: CallNext) -> Flow[Response]:
        if request.call.streaming:
            flow = call_next(request)
        else:
            response = yield from call_next(request)
            if not _is_written(f"<{self.tag}>", response):
                return response
            flow = _returning(response)
        splitter = _Splitter(self.tag)
        return (yield from map_chunks(flow, splitter.take, splitter.rest, at_restart=splitter.begin))


def _is_written(opening: str, response: Response) -> bool:
    """Whether the opening tag stands in a text of the response."""
    return (
        opening in response.text
        or any(opening in other.text for other in response.alternatives)
        or any(opening in message.text for message in response.added)
    )


def _returning(response: Response) -> Flow[Response]:
    yield from ()
    return response


class _Splitter:
    """The state of a message: where each of its choices stands."""

    def __init__(self, tag: str) -> None:
        self.tag = tag
        self.begin()

    def begin(self) -> None:
        """Begin a message."""
        self.first = InlineThinking(self.tag)
        self.others: dict[int, InlineThinking] = {}

    def take(self, chunk: Chunk) -> Chunk | Sequence[Chunk]:
        """Return what is certain after a chunk: the chunk itself if nothing changes."""
        if chunk.text_only and self.first.over:
            return chunk
        if chunk.added:
            return attrs.evolve(chunk, added=tuple(map(self._apart, chunk.added)))
        if chunk.alternatives:
            others = [
                (index, piece)
                for index, other in chunk.alternatives
                for piece in _split(self.others.setdefault(index, InlineThinking(self.tag)), other)
            ]
            chunk = attrs.evolve(chunk, alternatives=tuple(others))
        pieces = _split(self.first, chunk)
        return pieces[0] if len(pieces) == 1 else pieces

    def rest(self) -> Sequence[Chunk]:
        """Return what was held back, at the end of a message."""
        text, thought = self.first.rest()
        others: list[tuple[int, Chunk]] = []
        for index, inline in self.others.items():
            other_text, other_thought = inline.rest()
            if other_text or other_thought:
                others.append((index, Chunk(other_text, reasoning=other_thought)))
        return (Chunk(text, reasoning=thought, alternatives=tuple(others)),) if text or thought or others else ()

    def _apart(self, message: Message) -> Message:
        """Return a message of the conversation as it came in the stream."""
        if message.role != "assistant" or f"<{self.tag}>" not in message.text:
            return message
        splitter = _Splitter(self.tag)
        answer = rewritten(message.parts, splitter.take, splitter.rest)
        return attrs.evolve(answer.message, name=message.name)


def _split(inline: InlineThinking, chunk: Chunk) -> Sequence[Chunk]:
    """Return the chunks that take the place of a chunk of one choice."""
    if inline.over or (chunk.text_only and not chunk.text):
        return (chunk,)
    if chunk.text_only:
        text, thought = inline.split(chunk.text)
        if text == chunk.text:
            return (chunk,)
        return (Chunk(text, reasoning=thought),) if text or thought else ()
    pieces: list[Chunk] = []
    # Reasoning in `parts` completes what was streamed before the text.
    if chunk.reasoning or not all(isinstance(part, Reasoning) for part in chunk.parts):
        held = inline.interrupt()
        if held:
            pieces.append(Chunk(held))
    text, thought = inline.split(chunk.text) if chunk.text else ("", "")
    if chunk.tool_calls:
        text += inline.interrupt()
    if text == chunk.text and not thought:
        return (*pieces, chunk)
    before, after = around_text(chunk)
    if thought and (chunk.reasoning or chunk.parts):
        pieces.append(Chunk(**before))
        before = {}
    return (*pieces, Chunk(text, **{**before, "reasoning": thought or chunk.reasoning}, **after))
