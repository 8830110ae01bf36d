"""Answers as bytes, for stores: two lines of JSON, the response and its chunks. A whole call reads the first alone."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Mapping
from typing import Any

import attrs

from fluxibly._checks import is_list, is_number, is_whole
from fluxibly._dicts import Reader, numbers, part_from_dict, part_to_dict, plain
from fluxibly.middleware._answers import Answer, Pieces
from fluxibly.types import Chunk, Message, Response, ToolCallDelta, Usage

VERSION = 1
"""The form of the bytes. Another one is not read."""
_WORDS = ("text", "reasoning", "finish_reason", "raw_finish_reason", "model", "id")
"""The fields of a chunk that are a str."""


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
            "others": [chunk_to_dict(chunk) for chunk in pieces.others],
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
    others = [chunk_from_dict(other, f"others[{number}]") for number, other in enumerate(fields.items("others"))]
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


def chunk_to_dict(chunk: Chunk) -> dict[str, Any]:
    """Return a chunk as JSON values, without what is true of one call only: `chunk_from_dict` makes the same chunk.

    Raises:
        TypeError: something in it is not JSON.
    """
    found: dict[str, Any] = {name: value for name in _WORDS if (value := getattr(chunk, name))}
    if chunk.usage is not None:
        found["usage"] = {name: value for name, value in attrs.asdict(chunk.usage).items() if value is not None}
    if chunk.tool_calls:
        found["tool_calls"] = [_set_fields(delta) for delta in chunk.tool_calls]
    if chunk.parts:
        found["parts"] = [part_to_dict(part) for part in chunk.parts]
    if chunk.alternatives:
        found["alternatives"] = [[index, chunk_to_dict(other)] for index, other in chunk.alternatives]
    if chunk.added is not None:
        found["added"] = [message.to_dict() for message in chunk.added]
    if chunk.details:
        found["details"] = plain(chunk.details, chunk)
    return found


def _set_fields(delta: ToolCallDelta) -> Any:
    fields = attrs.asdict(delta, recurse=False)
    return plain({name: value for name, value in fields.items() if value not in (None, "")}, delta)


def chunk_from_dict(value: Any, path: str) -> Chunk:
    """Return the chunk of a mapping that `chunk_to_dict` made.

    Raises:
        ValueError: a field is unknown or of the wrong type. The error names its path.
    """
    fields = Reader(value, path)
    found: dict[str, Any] = {name: text for name in _WORDS if (text := fields.text(name)) is not None}
    usage, added = fields.table("usage"), fields.value("added")
    if usage is not None:
        found["usage"] = numbers(usage, Usage, fields.at("usage"))
    if added is not None:
        found["added"] = tuple([Message.from_dict(message) for message in added])
    found["tool_calls"] = tuple([_delta(delta, fields.at("tool_calls")) for delta in fields.items("tool_calls")])
    found["parts"] = tuple([part_from_dict(part, fields.at("parts")) for part in fields.items("parts")])
    found["alternatives"] = tuple(
        [(index, chunk_from_dict(other, fields.at("alternatives"))) for index, other in fields.items("alternatives")]
    )
    found["details"] = fields.table("details")
    fields.done(())
    return Chunk(**found)


def _delta(value: Mapping[str, Any], path: str) -> ToolCallDelta:
    fields = Reader(value, path)
    index = fields.take("index", int, "a whole number")
    found = {name: fields.text(name) for name in ("id", "name", "signature")}
    delta = ToolCallDelta(index=index, arguments=fields.text("arguments", ""), raw=fields.table("raw"), **found)
    fields.done(())
    return delta
