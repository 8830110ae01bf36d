"""Recorded exchanges with model services, and streams cut anew at any byte."""

from __future__ import annotations

import base64
import gzip
import json
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import attrs
import pytest

from fluxibly.aggregate import Aggregator
from fluxibly.errors import ProviderError
from fluxibly.providers.codec import Codec
from fluxibly.providers.framing import make_framing
from fluxibly.types import Response

FOLDER = Path(os.environ.get("FLUXIBLY_RECORDED") or Path(__file__).parent.parent.parent / "shared" / "recorded")
EVERY_BYTE = 3_000
"""Streams up to this many bytes are cut at every byte; longer ones at random places."""


@attrs.frozen
class Recording:
    """One recorded exchange. `body` is decompressed; `headers` have lower-case names."""

    name: str
    dialect: str
    status: int
    streaming: bool
    headers: dict[str, str]
    body: bytes
    request: Any


@cache
def load(name: str) -> Recording:
    """The recording whose file's name begins with `name` ("16-"); skips the test where there are none."""
    found = sorted(FOLDER.glob(f"{name}*.json"))
    if not found:
        pytest.skip(f"no recorded exchange {name} in the folder that FLUXIBLY_RECORDED names")
    data = json.loads(found[0].read_text())
    if data.get("response_wire_b64"):
        body = gzip.decompress(base64.b64decode(data["response_wire_b64"]))
    else:
        body = (data["response_body"] or "").encode()
    headers = {name.lower(): value for name, value in data["response_headers"].items() if isinstance(value, str)}
    request = json.loads(data["request_body"]) if data["request_body"] else None
    return Recording(found[0].stem, data["dialect"], data["status"], data["streaming"], headers, body, request)


@attrs.frozen
class Outcome:
    """What a stream came to: the response, or the part before `error`."""

    response: Response
    error: str | None = None


def decode_stream(codec: Codec, reads: Iterable[bytes]) -> Outcome:
    """What a codec makes of a stream that arrives in these reads. A ProviderError is an outcome; others pass."""
    joined = Aggregator()
    framing, decoder = make_framing(codec.framing), codec.decoder()

    def events() -> Iterator[Any]:
        for read in reads:
            yield from framing.feed(read)
        yield from framing.close()

    try:
        for event in events():
            for chunk in decoder.decode_event(event):
                joined.add(chunk)
            if decoder.done:
                break
        for chunk in decoder.end():
            joined.add(chunk)
    except ProviderError as error:
        return Outcome(joined.response(), f"{type(error).__name__}: {error}")
    return Outcome(joined.response())


def cuts(body: bytes, *, seed: int = 0) -> Iterator[Sequence[bytes]]:
    """The same bytes in other reads: in two at every byte, one byte a read, and at random places."""
    every = range(1, len(body))
    for place in every if len(body) <= EVERY_BYTE else random.Random(seed).sample(every, 100):
        yield body[:place], body[place:]
    yield [body[i : i + 1] for i in range(len(body))]
    for shuffle in range(10):
        chosen = sorted(random.Random(seed + shuffle).choices(range(len(body) + 1), k=30))
        edges = [0, *chosen, len(body)]
        yield [body[a:b] for a, b in zip(edges, edges[1:], strict=False)]


def check_recuts(codec: Codec, body: bytes) -> Outcome:
    """Check that a stream comes to the same however its bytes are cut into reads; what it comes to."""
    expected = decode_stream(codec, [body])
    for reads in cuts(body):
        assert decode_stream(codec, reads) == expected, f"another outcome when cut into {len(reads)} reads"
    return expected


def sse(*events: object, done: bool = True) -> bytes:
    """A stream of server-sent events: JSON of each, and `[DONE]`."""
    lines = [event if isinstance(event, str) else json.dumps(event) for event in events]
    return "".join(f"data: {line}\n\n" for line in [*lines, *["[DONE]"] * done]).encode()
