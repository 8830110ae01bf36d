"""Answers as bytes, for stores: two lines of JSON, the response and its chunks. A whole call reads the first alone."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable
from typing import Any

from fluxibly._checks import is_list, is_number, is_whole
from fluxibly._dicts import Reader
from fluxibly.middleware._answers import Answer, Pieces
from fluxibly.types import Chunk, Response

VERSION = 1
"""The form of the bytes. Another one is not read."""


def to_bytes(answer: Answer) -> bytes:
    """Return an answer as bytes. What `Validation` has parsed is only marked, unless it is JSON.

    Raises:
        TypeError: something in it is not JSON.
    """
    response = answer.kept.to_dict()
    parsed = answer.kept.parsed is not None and "parsed" not in response
    pieces = answer.pieces
    chunks: Any = None
    if pieces is not None:
        chunks = {
            "text": None if pieces.text == answer.kept.text else pieces.text,
            "lengths": pieces.lengths.tolist(),
            "others": [chunk.to_dict() for chunk in pieces.others],
            "times": [round(at - pieces.times[0], 6) for at in pieces.times],
        }
    return _written([VERSION, response, parsed]) + b"\n" + _written(chunks)


def from_bytes(stored: bytes, *, streamed: bool, parse: Callable[[str], Any]) -> Answer:
    """Return the answer that `to_bytes` wrote.

    Args:
        streamed: whether its chunks are needed.
        parse: parses the text again, if what was parsed is not JSON.

    Raises:
        ValueError: the bytes are damaged, or of another version.
    """
    first, _, second = stored.partition(b"\n")
    head = _read(first)
    if not is_list(head) or len(head) != 3 or head[0] != VERSION:
        raise ValueError(f"expected an answer of version {VERSION}")
    response = Response.from_dict(head[1])
    if head[2] is True:
        response = response.evolve(parsed=parse(response.text))
    return Answer(response, _pieces(_read(second), response.text) if streamed else None)


def _written(value: object) -> bytes:
    # A text may have half a surrogate pair, and a number may be infinite: other writers of JSON refuse or change them.
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="surrogatepass")


def _read(line: bytes) -> Any:
    return json.loads(line.decode(errors="surrogatepass"))


def _pieces(value: Any, text: str) -> Pieces | None:
    if value is None:
        return None
    fields = Reader(value, "chunks")
    own = fields.text("text")
    lengths, times = fields.items("lengths"), fields.items("times")
    others = [Chunk.from_dict(other) for other in fields.items("others")]
    texts = text if own is None else own
    is_complete = (
        all(map(is_whole, lengths))
        and all(map(is_number, times))
        and len(times) in (0, len(lengths))
        and sum([length for length in lengths if length > 0]) == len(texts)
        and len([length for length in lengths if length < 0]) == len(others)
    )
    if not is_complete:
        raise ValueError("chunks: expected lengths that are those of the texts")
    return Pieces(texts, array("i", lengths), others, array("d", times))
