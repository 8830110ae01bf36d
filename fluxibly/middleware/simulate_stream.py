"""Middleware that lets a provider without a stream answer streamed calls."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar, Final, Literal

import attrs

from fluxibly._checks import one_of, validator
from fluxibly.aggregate import around_text
from fluxibly.flow import CallNext, Flow, map_chunks
from fluxibly.types import Chunk, Request, Response

_DENSE: Final = "\u3001-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff01-\uffef\U00020000-\U0003ffff"
"""Characters of scripts without spaces between words: Chinese and Japanese, with their punctuation."""
_ON_THEM: Final = "\u0300-\u036f\u3099\u309a\ufe00-\ufe0f\U000e0100-\U000e01ef"
"""Marks and variation selectors, which belong to the character before them."""
_WORD: Final = re.compile(rf"(?:[{_DENSE}][{_ON_THEM}]*|[^\s{_DENSE}]+)\s*")


@attrs.frozen(kw_only=True)
class SimulateStream:
    """Middleware that lets a provider without `stream` answer streamed calls, with its whole answer.

    The texts, put together, are the answer's text to the character. Everything else keeps its place: reasoning and media go out
    with the word after them, tool calls with the word before them, each in one piece. The words go out as fast as the consumer
    takes them, once the whole answer is there.

    A provider that streams is asked for its stream as ever. Its chunks of several words are let out a word at a time too, since
    some services send a sentence at a time. Nothing is held back for it, so a chunk may end within a word.

    Args:
        by: how to let the text out. "word" lets out a word at a time, with the white space after it; of Chinese and Japanese, a
            character at a time. "whole" lets out the whole answer at once.

    Raises:
        ValueError: `by` is neither.
    """

    by: Literal["word", "whole"] = attrs.field(default="word", validator=validator(one_of, ("word", "whole")))
    simulates_stream: ClassVar[bool] = True
    """Tells the pipeline to make a stream of a whole answer."""

    def __call__(self, request: Request, call_next: CallNext) -> Flow[Response]:
        if self.by == "whole" or not request.call.streaming:
            return (yield from call_next(request))
        return (yield from map_chunks(call_next(request), _by_word))


def _by_word(chunk: Chunk) -> Chunk | Sequence[Chunk]:
    """Return a chunk as several, if it has several words."""
    text = chunk.text
    if text.isascii() and len(text.split(None, 1)) < 2:  # faster than the expression
        return chunk
    words = _WORD.findall(text)
    if len(words) < 2:
        return chunk
    words[0] = text[: len(text) - sum(map(len, words))] + words[0]  # the white space before the first
    if chunk.text_only:
        return tuple(map(Chunk, words))
    before, after = around_text(chunk)
    return (Chunk(words[0], **before), *map(Chunk, words[1:-1]), Chunk(words[-1], **after))
