"""What a provider may do to a middleware that is checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs

from fluxibly.errors import ServerError
from fluxibly.testing.scripted import Answer, Cut
from fluxibly.types import Chunk, ToolCallDelta, Usage

PLENTY = 8
"""How often a middleware may ask again before the script runs out."""


@attrs.frozen
class Scenario:
    """What the provider does. `answers` makes it anew for each run, because a raised error remembers where it was."""

    name: str
    answers: Callable[[], Sequence[Answer]]
    partial: str | None = None
    """The text that went out before the provider failed, if it did."""
    stop_after: int | None = None
    restarts: bool = False


def _good() -> list[Answer]:
    return ["Hello, world"] * PLENTY


def _rich() -> list[Answer]:
    end = Chunk(finish_reason="stop", usage=Usage(input_tokens=3, output_tokens=2), model="m-1", id="r-1")
    call = ToolCallDelta(index=0, id="c-1", name="look", arguments='{"at": 1}')
    return [["Hello", Chunk(", world", reasoning="hm"), Chunk(tool_calls=(call,)), end]] * PLENTY


def _fails_first() -> list[Answer]:
    return [ServerError("scripted failure"), *_good()]


def _fails_late() -> list[Answer]:
    return [["Hello", ServerError("scripted failure")], *_good()]


def _cut() -> list[Answer]:
    return [["Hello", Cut()], *_good()]


SCENARIOS = (
    Scenario("a plain answer", _good),
    Scenario("an answer with reasoning, a tool call and usage", _rich),
    Scenario("an empty answer", lambda: [[Chunk(finish_reason="stop")]] * PLENTY),
    Scenario("a failure before output", _fails_first),
    Scenario("a failure before output, again and again", lambda: [ServerError("scripted failure")] * (PLENTY * 8)),
    Scenario("a failure after output", _fails_late, partial="Hello"),
    Scenario("a failure after output, for a consumer that takes Restart", _fails_late, partial="Hello", restarts=True),
    Scenario("a stream that is cut off", _cut, partial="Hello"),
    Scenario("a consumer that closes without reading", _good, stop_after=0),
    Scenario("a consumer that leaves after one chunk", _good, stop_after=1),
)
