"""Answers as a cache keeps them: recorded from a stream, replayed, and kept in memory."""

from __future__ import annotations

import math
import sys
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from threading import RLock
from typing import Any, cast

import attrs

from fluxibly._threads import renew_lock_after_fork
from fluxibly.aggregate import as_chunks
from fluxibly.flow.effects import Effect, More, Release
from fluxibly.flow.relay import Watch
from fluxibly.types import CallRecord, Chunk, Response

_MUTABLE = ("details", "tool_calls", "reasoning_parts", "media", "order", "alternatives", "added", "parsed")
"""The fields of a response in which there may be something that a caller can change."""
_NOT_PLAIN = ("tool_calls", "parts", "alternatives", "added", "details")
"""The same of a chunk."""
_RESPONSE = 2000
"""The bytes that a response with its key takes in memory beside its texts, about."""
_CHUNK = 500
"""The bytes that a chunk takes with more than text."""
_STRIDE = 256
"""The chunks after which a stream is looked at whose times are not noted."""
_DEPTH = 20
"""The levels to which the size of an answer is measured."""


class Pieces:
    """The chunks of an answer as they came.

    Most of them are only text, so the texts are kept as one, with their lengths.
    """

    __slots__ = ("lengths", "others", "text", "times")

    def __init__(self, text: str, lengths: array[int], others: Sequence[Chunk], times: array[float]) -> None:
        self.text = text
        """The texts of the chunks that have nothing else."""
        self.lengths = lengths
        """The length of each of these texts; -1 stands for the next of the `others`."""
        self.others = others
        self.times = times
        """When each chunk came, in seconds from any moment on; empty if that was not noted."""

    @classmethod
    def of(cls, chunks: Sequence[Chunk], times: Sequence[float], text: str) -> Pieces:
        """Return the pieces of chunks, and of the times at which they came. `text` is that of the answer."""
        # Without a loop over all chunks, because a stream may have thousands.
        texts = [chunk.text for chunk in chunks]
        lengths = array("i", map(len, texts))
        others: list[Chunk] = []
        for number in [number for number, chunk in enumerate(chunks) if not chunk.text_only]:
            others.append(_cleaned(chunks[number]))
            lengths[number] = -1
            texts[number] = ""
        joined = "".join(texts)
        return cls(text if joined == text else joined, lengths, others, array("d", times))

    def __iter__(self) -> Iterator[Chunk]:
        """Yield chunks for one caller."""
        text, at, others = self.text, 0, iter(self.others)
        for length in self.lengths:
            if length >= 0:
                yield Chunk(text[at : at + length])
                at += length
            else:
                other = next(others)
                yield other if _is_plain(other) else deepcopy(other)

    @property
    def size(self) -> int:
        """The bytes that they take in memory, about."""
        return 12 * len(self.lengths) + sum([_CHUNK if _is_plain(chunk) else _size(chunk) for chunk in self.others])


def _is_plain(chunk: Chunk) -> bool:
    """Whether there is nothing in a chunk that a caller could change."""
    return not any(getattr(chunk, name) for name in _NOT_PLAIN)


def _cleaned(chunk: Chunk) -> Chunk:
    """Return a chunk for a cache, without what is true of one call only."""
    if chunk.request_id is not None or chunk.rate_limits is not None:
        chunk = attrs.evolve(chunk, request_id=None, rate_limits=None)
    return chunk if _is_plain(chunk) else deepcopy(chunk)


class Answer:
    """A whole answer. Each caller gets a response and chunks of its own, in which it may change what it likes."""

    __slots__ = ("_copied", "kept", "pieces")

    def __init__(self, kept: Response, pieces: Pieces | None) -> None:
        self.kept = kept
        """The response, which no caller has."""
        self.pieces = pieces
        """The chunks, if it was streamed."""
        self._copied = [name for name in _MUTABLE if getattr(kept, name)]

    @classmethod
    def of(cls, response: Response, call: CallRecord, pieces: Pieces | None) -> Answer:
        """Return the answer of a call, without what is true of that call only."""
        own: dict[str, Any] = {name: deepcopy(value) for name in _MUTABLE if (value := getattr(response, name))}
        kept = response.evolve(
            raw=None,
            stats=None,
            elapsed=None,
            cost=None,
            total_usage=None,
            request_id=None,
            rate_limits={},
            cache_hit=True,
            provider=response.provider or call.provider.telemetry_name,
            **own,
        )
        return cls(kept, pieces)

    @property
    def response(self) -> Response:
        """A response for one caller."""
        if not self._copied:
            return self.kept.evolve(details={}, rate_limits={})
        fields: dict[str, Any] = {"details": {}, "rate_limits": {}}
        for name in self._copied:
            fields[name] = deepcopy(getattr(self.kept, name))
        return self.kept.evolve(**fields)

    @property
    def size(self) -> int:
        """The bytes that it takes in memory, about."""
        size = _RESPONSE + sys.getsizeof(self.kept.text) + sys.getsizeof(self.kept.reasoning)
        for name in self._copied:
            size += _size(getattr(self.kept, name))
        if self.pieces is not None:
            size += self.pieces.size
            if self.pieces.text is not self.kept.text:
                size += sys.getsizeof(self.pieces.text)
        return size


def _size(value: object, depth: int = _DEPTH) -> int:
    """Return the bytes that a value takes in memory with all that is in it, about."""
    size = sys.getsizeof(value)
    if depth == 0 or isinstance(value, (str, bytes, int, float)):
        return size
    if isinstance(value, Mapping):
        items = cast("Mapping[object, object]", value)
        return size + sum([_size(key, depth - 1) + _size(item, depth - 1) for key, item in items.items()])
    if isinstance(value, (list, tuple, set, frozenset)):
        return size + sum([_size(item, depth - 1) for item in cast("Sequence[object]", value)])
    names = [field.name for field in attrs.fields(cast("Any", type(value)))] if attrs.has(type(value)) else ()
    held = [getattr(value, name) for name in names] or [*getattr(value, "__dict__", {}).values()]
    return size + sum([_size(item, depth - 1) for item in held])


class TextChanged(Exception):
    """A layer has changed the text of an answer after it was streamed."""


class Recorder(Watch):
    """A relay that keeps the chunks of the answer that passes.

    Args:
        most: the bytes of text from which on an answer is not kept.
        timed: whether to note when each chunk comes.
    """

    def __init__(self, call: CallRecord, most: float, *, timed: bool) -> None:
        super().__init__(call)
        self._timed = timed
        if not timed:
            self.left = self.stride = _STRIDE
        self._most = most
        self._begin()

    def _begin(self) -> None:
        self._came: list[Chunk] = []
        self._times: list[float] = []
        self._mark = 0
        """The number of chunks up to the last mark that has begun a message."""
        self._too_long = False

    def restarted(self) -> None:
        super().restarted()
        self._begin()

    def take(self, lengths: Sequence[int]) -> None:
        self._too_long = self._too_long or self.characters + sum(lengths) > self._most
        if self._too_long:
            self._came.clear()
            self._times.clear()
        else:
            self._came += self.chunks
            if self._timed:
                self._times += self.arrived

    def see(self, effect: Effect) -> Effect:
        if type(effect) is Release and effect.request.call.streaming:
            self._forget_failure()
        super().see(effect)
        if type(effect) is More and effect.chunk.added:
            self.flush()
            self._mark = len(self._came)
        return effect

    def _forget_failure(self) -> None:
        """Forget what an attempt that has failed said, unless it had output: it does not belong to the next answer."""
        self.flush()
        if not _has_output(self._came[self._mark :]):
            del self._came[self._mark :], self._times[self._mark :]

    def pieces(self, response: Response) -> Pieces | None:
        """Return the chunks of the answer: those that have passed, and after them what of the response has not.

        Returns:
            None, if they would be too long.

        Raises:
            TextChanged: the text of the response is not that of the chunks.
            Exception: what a user's class in a chunk raises when it is copied.
        """
        self.flush()
        came, times, mark = self._came, self._times, self._mark
        if self._too_long or not came:
            return None
        said = came[max(0, mark - 1) :]  # the chunk of a mark may have a part of the message that it begins
        if _has_output(said):
            if "".join([chunk.text for chunk in said]) != response.text:
                raise TextChanged
        elif response.has_output:  # its last message comes whole, with the response
            rest = as_chunks(response.evolve(added=()))
            came, times = [*came[:mark], *rest], [*times[:mark], *times[-1:] * len(rest)]
        return Pieces.of(came, times, response.text)


def _has_output(chunks: Sequence[Chunk]) -> bool:
    return any(chunk.has_output for chunk in chunks)


class MemoryAnswers:
    """The answers that one cache keeps in memory. Those that were not used for longest are forgotten first."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._answers: OrderedDict[str, tuple[Answer, float, int]] = OrderedDict()
        """Each answer, until when it is kept, and its size."""
        self._taken = 0
        self.renew_lock()
        renew_lock_after_fork(self)

    def renew_lock(self) -> None:
        """Make a new lock. Another thread may have been about to count what it had changed."""
        self._lock = RLock()  # reentrant, because a signal handler may close a stream
        self._taken = sum([size for _, _, size in self._answers.values()])

    def load(self, key: str, now: float) -> Answer | None:
        """Return an answer, or None."""
        with self._lock:
            found = self._answers.get(key)
            if found is None or now >= found[1]:
                return None
            self._answers.move_to_end(key)
            return found[0]

    def save(self, key: str, answer: Answer, seconds: float | None, now: float) -> None:
        """Keep an answer for a number of seconds (None: for good), unless it is too large."""
        size = answer.size + sys.getsizeof(key)
        with self._lock:
            self._forget(key)
            if size <= self.max_bytes:
                self._answers[key] = (answer, math.inf if seconds is None else now + seconds, size)
                self._taken += size
            while self._taken > self.max_bytes:
                self._forget(next(iter(self._answers)))

    def _forget(self, key: str) -> None:
        found = self._answers.pop(key, None)
        if found is not None:
            self._taken -= found[2]
