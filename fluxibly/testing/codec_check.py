"""`check_codec`: recorded streams, cut anew wherever a read could end."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator

import attrs

from fluxibly.aggregate import Aggregator
from fluxibly.providers.dialects.codec import Codec, Event
from fluxibly.providers.dialects.framing import make_framing
from fluxibly.types import Chunk, Response

CUTS = 30_000
"""A longer stream is cut at as many of its bytes, evenly spread."""
ENDS = 3_000
"""A longer stream is ended at as many of its bytes, evenly spread."""
RANDOM_READS = 20


def check_codec(codec: Codec, streams: Iterable[bytes]) -> None:
    """Hold a codec to law 11 with recorded streams, each the bytes of a whole body.

    A stream comes to the same however its bytes are cut into reads, and one that ends early is either an error or, if
    all that matters has come, the same answer.

    Raises:
        AssertionError: it does not; the message says at which byte.
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
    """What a stream comes to: the response, or what came before a failure. Failures are alike if they say the same."""

    response: Response
    failure: Exception | None = attrs.field(default=None, eq=_describe)

    @property
    def error(self) -> str | None:
        """What the failure is and says."""
        return _describe(self.failure)

    def __str__(self) -> str:
        return repr(self.response) if self.failure is None else f"{self.error} after {self.response!r}"


def chunks_of(codec: Codec, reads: Iterable[bytes]) -> Iterator[Chunk]:
    """The chunks of a stream that arrives in these reads, as the HTTP shells read it."""
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
    """What a stream that arrives in these reads comes to."""
    answer = Aggregator()
    try:
        for chunk in chunks_of(codec, reads):
            answer.add(chunk)
    except Exception as error:  # noqa: BLE001  # any is an outcome
        return Outcome(answer.response(), error)
    return Outcome(answer.response())


def check_cuts(codec: Codec, stream: bytes, name: str = "the stream") -> Outcome:
    """Check that a stream comes to the same however its bytes are cut into reads; what it comes to.

    Raises:
        AssertionError: it does not; the message says at which byte.
    """
    whole = outcome_of(codec, [stream])
    for reads, how in _recuts(codec, stream):
        got = outcome_of(codec, reads)
        if got != whole:
            raise AssertionError(f"{name} comes to {got} {how}, and to {whole} read at once")
    return whole


def _recuts(codec: Codec, data: bytes) -> Iterator[tuple[list[bytes], str]]:
    """The stream in other reads, save for those of two that come to the very same events.

    A decoder sees nothing but events; and framings are so much faster that a stream can be cut at each of its bytes.
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
    """The events of a stream, and the error that ended it."""
    framing = make_framing(codec.framing)
    events: list[Event] = []
    try:
        for read in reads:
            events += framing.feed(read)
        events += framing.close()
    except Exception as error:  # noqa: BLE001  # compared by what it says
        return events, _describe(error)
    return events, None


def _spread(data: bytes, most: int) -> range:
    return range(0, len(data), max(1, len(data) // most))


def _check_ends(codec: Codec, stream: bytes, name: str, whole: Response) -> None:
    for end in _spread(stream, ENDS):
        got = outcome_of(codec, [stream[:end]])
        if got.failure is None and _said(got.response) != _said(whole):
            raise AssertionError(
                f"{name} ended at byte {end} passes as a whole answer, {got}; "
                "end() has to raise StreamProtocolError unless the dialect's end mark has come"
            )


def _said(response: Response) -> tuple[object, ...]:
    """What makes an answer whole: not its usage, which services send last."""
    return response.text, response.reasoning, response.tool_calls, response.finish_reason
