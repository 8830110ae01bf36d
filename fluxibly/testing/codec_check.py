"""`check_codec`: recorded streams, cut anew wherever a read could end."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator

from fluxibly.aggregate import Aggregator
from fluxibly.providers.codec import Codec
from fluxibly.providers.framing import make_framing
from fluxibly.types import Response

CUTS = 3000
"""A longer stream is cut at as many of its bytes, evenly spread."""
RANDOM_READS = 20


def check_codec(codec: Codec, streams: Iterable[bytes]) -> None:
    """Hold a codec to law 11 with recorded streams, each the bytes of a whole body.

    A stream comes to the same however its bytes are cut into reads, and one that ends early is either an error or, if
    all that matters has come, the same answer.

    Raises:
        AssertionError: it does not; the message says at which byte.
    """
    for number, stream in enumerate(streams):
        _Stream(codec, stream, f"stream {number}").check()


class _Stream:
    def __init__(self, codec: Codec, stream: bytes, name: str) -> None:
        self.codec = codec
        self.stream = stream
        self.name = name
        step = max(1, len(stream) // CUTS)
        self.cuts = range(0, len(stream), step)

    def check(self) -> None:
        whole = self.read([self.stream])
        chooser = random.Random(len(self.stream))  # noqa: S311  # not for secrets: the same cuts each time
        for reads, how in self.recut(chooser):
            got = self.read(reads)
            if got != whole:
                raise AssertionError(f"{self.name} comes to {got!r} {how}, and to {whole!r} read at once")
        if isinstance(whole, Response):
            self.check_truncated(whole)

    def recut(self, chooser: random.Random) -> Iterator[tuple[list[bytes], str]]:
        data = self.stream
        yield [data[n : n + 1] for n in range(len(data))], "read byte by byte"
        for cut in self.cuts:
            yield [data[:cut], data[cut:]], f"cut at byte {cut}"
        for seed in range(RANDOM_READS):
            ends = sorted(chooser.sample(range(len(data)), min(len(data), 2 + seed)))
            yield [data[a:b] for a, b in zip([0, *ends], [*ends, len(data)], strict=True)], f"cut at bytes {ends}"

    def check_truncated(self, whole: Response) -> None:
        for end in self.cuts:
            got = self.read([self.stream[:end]])
            if isinstance(got, Response) and _said(got) != _said(whole):
                raise AssertionError(
                    f"{self.name} ended at byte {end} passes as a whole answer, {got!r}; "
                    "end() has to raise StreamProtocolError unless the dialect's end mark has come"
                )

    def read(self, reads: Iterable[bytes]) -> Response | str:
        """What the reads come to: the response, or the error."""
        framing = make_framing(self.codec.framing)
        decoder = self.codec.decoder()
        answer = Aggregator()
        try:
            for read in reads:
                for event in framing.feed(read):
                    for chunk in decoder.decode_event(event):
                        answer.add(chunk)
                    if decoder.done:
                        break
                if decoder.done:
                    break
            if not decoder.done:
                for event in framing.close():
                    for chunk in decoder.decode_event(event):
                        answer.add(chunk)
                for chunk in decoder.end():
                    answer.add(chunk)
        except Exception as error:  # noqa: BLE001  # compared by what it says
            return f"{type(error).__name__}: {error} after {answer.response()!r}"
        return answer.response()


def _said(response: Response) -> tuple[object, ...]:
    """What makes an answer whole: not its usage, which services send last."""
    return response.text, response.reasoning, response.tool_calls, response.finish_reason
