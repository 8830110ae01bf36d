"""What `map_chunks` keeps of the inner response: all of it if the answer is the same, else what does not tell the old one."""

from __future__ import annotations

import attrs
import pytest

from fluxibly.flow import map_chunks
from fluxibly.middleware import Validation
from fluxibly.testing import AsyncScriptedProvider, ScriptedProvider
from fluxibly.testing.modes import run
from fluxibly.types import Chunk, Opaque, Reasoning, Request, Response, ToolCall, ToolCallDelta, Usage

REQUEST = Request(model="m", messages="hi")
ANSWER = ['{"number"', ": 1}"]


@attrs.frozen
class Answer:
    number: int


def mapping(fn, at_end=None):
    def mapped(request, call_next):
        return (yield from map_chunks(call_next(request), fn, at_end))

    return mapped


def by_letters(chunk):
    return [*map(Chunk, chunk.text), attrs.evolve(chunk, text="")]


def buffered():
    kept = []
    return mapping(lambda chunk: kept.append(chunk.text), lambda: Chunk("".join(kept)))


def answered(mode, layers, *answer):
    provider = (AsyncScriptedProvider if mode.backend else ScriptedProvider)([*answer])
    ran = run(mode, provider, layers, REQUEST)
    assert ran.error is None
    return ran.response


@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize(
    "make", [lambda: mapping(attrs.evolve), lambda: mapping(by_letters), buffered], ids=["equal", "letters", "buffered"]
)
def test_parsed_survives_equal_text(mode, make, hold):
    """What `Validation` made of the text stays, however the text is cut."""
    response = answered(mode, [make(), Validation(schema=Answer, hold=hold)], *ANSWER)
    assert response.text == '{"number": 1}'
    assert response.parsed == Answer(1)


@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize(
    ("fn", "text"),
    [
        (lambda chunk: attrs.evolve(chunk, text=chunk.text.replace("1", "2")), '{"number": 2}'),
        (lambda chunk: None, ""),
        (lambda chunk: [chunk, Chunk(" ")] if "1" in chunk.text else chunk, '{"number": 1} '),
    ],
    ids=["changed", "dropped", "added"],
)
def test_parsed_of_another_text_does_not(mode, fn, text, hold):
    """`parsed` of the old text is gone."""
    response = answered(mode, [mapping(fn), Validation(schema=Answer, hold=hold)], *ANSWER)
    assert response.text == text
    assert response.parsed is None


def test_parsed_of_the_changed_text(mode):
    """`Validation` outside of the change parses the text that goes out."""
    layers = [Validation(schema=Answer), mapping(lambda c: attrs.evolve(c, text=c.text.replace("1", "2")))]
    assert answered(mode, layers, *ANSWER).parsed == Answer(2)


RICH = (
    Chunk(reasoning="hm, "),
    Chunk(reasoning="so", model="m-1"),
    Chunk(parts=(Reasoning(text="", signature="s"),)),
    Chunk("one ", details={"logprobs": [1]}),
    Chunk(parts=(Opaque("search", {"id": 1}),)),
    Chunk("two", details={"logprobs": [2]}, alternatives=((1, Chunk("uno")),)),
    Chunk(tool_calls=(ToolCallDelta(index=0, id="c", name="look", arguments='{"at": 1}'),)),
    Chunk(finish_reason="stop", usage=Usage(output_tokens=2), id="r-1", request_id="q-1", rate_limits={"left": "1"}),
)


def noted(request, call_next):
    """Set fields that only a provider of whole answers and `Validation` set."""
    response = yield from call_next(request)
    return response.evolve(raw={"all": "of it"}, parsed="p")


@pytest.mark.parametrize("fn", [attrs.evolve, lambda chunk: [attrs.evolve(chunk)]], ids=["equal", "in a list"])
def test_all_facts_survive_equal_chunks(mode, fn):
    """Reasoning, parts, tool calls, details, alternatives and what is said of the whole answer stay as they are."""
    response = answered(mode, [mapping(fn), noted], *RICH)
    expected = answered(mode, [noted], *RICH)
    assert response == expected
    assert response.parts == expected.parts
    assert response.reasoning_parts == (Reasoning(text="hm, so", signature="s"),)
    assert response.tool_calls == (ToolCall("c", "look", {"at": 1}),)
    assert response.alternatives == (Response("uno"),)
    assert response.details == {"logprobs": [1, 2]}
    assert (response.raw, response.parsed) == ({"all": "of it"}, "p")
    assert (response.request_id, response.rate_limits, response.model) == ("q-1", {"left": "1"}, "m-1")


@pytest.mark.parametrize(
    "changes",
    [{"reasoning": ""}, {"tool_calls": ()}, {"details": None}, {"alternatives": ()}, {"parts": ()}],
    ids=lambda changes: next(iter(changes)),
)
def test_raw_goes_with_any_content(mode, changes):
    """`raw` has all of the answer, so what a redactor takes out would be in it. `parsed` depends on the text alone."""
    response = answered(mode, [mapping(lambda chunk: attrs.evolve(chunk, **changes)), noted], *RICH)
    assert response.text == "one two"
    assert response.raw is None
    assert response.parsed == "p"
    assert (response.usage, response.id, response.finish_reason) == (Usage(output_tokens=2), "r-1", "stop")
