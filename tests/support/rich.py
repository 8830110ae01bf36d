"""An answer with everything that an answer may have."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fluxibly.aggregate import Aggregator
from fluxibly.types import Chunk, Image, Reasoning, Response, ToolCallDelta, Usage

USAGE = Usage(input_tokens=3, output_tokens=2)


def answered(chunks: Iterable[Any]) -> Response:
    """Return the response that chunks add up to."""
    answer = Aggregator()
    for chunk in chunks:
        answer.add(chunk)
    return answer.response()


def rich() -> list[Any]:
    """Return its steps."""
    return [
        Chunk(reasoning="hm", model="m-2", id="r-1", request_id="req-1", rate_limits={"x": "1"}),
        Chunk(parts=(Reasoning(text="", signature="s", raw={"at": [1]}),)),
        "Hello, ",
        "world",
        Chunk(parts=(Image(data=b"png", media_type="image/png"),)),
        Chunk(tool_calls=(ToolCallDelta(index=0, id="c-1", name="look", arguments='{"at"', raw={"x": 1}),)),
        Chunk(tool_calls=(ToolCallDelta(index=0, arguments=": [1]}"),)),
        Chunk(alternatives=((1, Chunk("Hi")),)),
        Chunk(finish_reason="tool_call", raw_finish_reason="tools", usage=USAGE, details={"sources": ["a"]}),
    ]
