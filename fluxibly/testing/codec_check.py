"""`check_codec`: the check of a codec with recorded streams, cut wherever a read could end."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator

import attrs

from fluxibly.aggregate import Aggregator
from fluxibly.providers.dialects.codec import Codec, Event
from fluxibly.providers.dialects.framing import make_framing
from fluxibly.testing._trial import LAWS
from fluxibly.types import Chunk, Response

CUTS = 30_000
"""The number of bytes at which a longer stream is cut, evenly spread. A shorter stream is cut at every byte."""
ENDS = 3_000
"""The number of bytes at which a longer stream is ended, evenly spread. A shorter stream is ended at every byte."""
RANDOM_READS = 20


def check_codec(codec: Codec, streams: Iterable[bytes]) -> None:
    """Check that a codec never passes an incomplete answer as a whole answer (law 11). Each stream is a whole body.

    A stream has to give the same answer however its bytes are cut into reads. A stream that ends early has to give an
    error, unless its text, reasoning, tool calls and finish reason have arrived.

    Raises:
        AssertionError: the codec does otherwise; the message says at which byte.
    """
    for number, stream in enumerate(streams):
        name = f"stream {number}"
        whole = check_cuts(codec, stream, name)
        if whole.failure is None:
            _check_ends(codec, stream, name, whole.response)


def _describe(error: Exception | None) -> str | None:
    return None if error is None else f"{type(error).__name__}: {error}"


@attrs.frozen
class Outcome:
    """The result of a stream: a response, or its part before a failure. Failures with the same text are equal."""

    response: Response
    failure: Exception | None = attrs.field(default=None, eq=_describe)

    @property
    def error(self) -> str | None:
        """The type and the message of the failure, or None."""
        return _describe(self.failure)

    def __str__(self) -> str:
        return repr(self.response) if self.failure is None else f"{self.error} after {self.response!r}"


def chunks_of(codec: Codec, reads: Iterable[bytes]) -> Iterator[Chunk]:
    """Yield the chunks of a stream that arrives in these reads, as the HTTP shells read it."""
    framing, decoder = make_framing(codec.framing), codec.decoder()
    for read in reads:
        for event in framing.feed(read):
            yield from decoder.decode_event(event)
            if decoder.done:
                return
    for event in framing.close():
        yield from decoder.decode_event(event)
        if decoder.done:
            return
    yield from decoder.end()


def outcome_of(codec: Codec, reads: Iterable[bytes]) -> Outcome:
    """Return the outcome of a stream that arrives in these reads."""
    answer = Aggregator()
    try:
        for chunk in chunks_of(codec, reads):
            answer.add(chunk)
    except Exception as error:  # noqa: BLE001  # every error is an outcome
        return Outcome(answer.response(), error)
    return Outcome(answer.response())


def check_cuts(codec: Codec, stream: bytes, name: str = "the stream") -> Outcome:
    """Check that a stream has the same outcome however its bytes are cut into reads, and return that outcome.

    Raises:
        AssertionError: an outcome differs; the message says at which byte.
    """
    whole = outcome_of(codec, [stream])
    for reads, how in _recuts(codec, stream):
        got = outcome_of(codec, reads)
        if got != whole:
            raise AssertionError(
                f"{name}: expected the same outcome however it is read, got {whole} read at once and {got} {how}"
            )
    return whole


def _recuts(codec: Codec, data: bytes) -> Iterator[tuple[list[bytes], str]]:
    """Yield the stream in other reads, except for pairs of reads that give the very same events.

    A decoder sees only events, and framings are so much faster that a stream can be cut at each of its bytes.
    """
    yield [data[n : n + 1] for n in range(len(data))], "read byte by byte"
    chooser = random.Random(len(data))  # noqa: S311  # not for secrets: the same cuts each time
    for seed in range(RANDOM_READS):
        ends = sorted(chooser.sample(range(len(data)), min(len(data), 2 + seed)))
        yield [data[a:b] for a, b in zip([0, *ends], [*ends, len(data)], strict=True)], f"cut at bytes {ends}"
    events = _events(codec, [data])
    for cut in _spread(data, CUTS):
        reads = [data[:cut], data[cut:]]
        if _events(codec, reads) != events:
            yield reads, f"cut at byte {cut}"


def _events(codec: Codec, reads: Iterable[bytes]) -> tuple[list[Event], str | None]:
    """Return the events of a stream, and the error that ended it."""
    framing = make_framing(codec.framing)
    events: list[Event] = []
    try:
        for read in reads:
            events += framing.feed(read)
        events += framing.close()
    except Exception as error:  # noqa: BLE001  # compared by its message
        return events, _describe(error)
    return events, None


def _spread(data: bytes, most: int) -> range:
    return range(0, len(data), max(1, len(data) // most))


def _check_ends(codec: Codec, stream: bytes, name: str, whole: Response) -> None:
    for end in _spread(stream, ENDS):
        got = outcome_of(codec, [stream[:end]])
        if got.failure is None and _said(got.response) != _said(whole):
            raise AssertionError(
                f"the codec {type(codec).__name__} breaks law 11 ({LAWS[11]}): expected an error when {name} ends at "
                f"byte {end}, got {got}. end() has to raise StreamProtocolError unless the dialect's end mark has arrived"
            )


def _said(response: Response) -> tuple[object, ...]:
    """Return the parts that make an answer whole. Usage is not among them, because services send it last."""
    return response.text, response.reasoning, response.tool_calls, response.finish_reason
