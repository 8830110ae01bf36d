"""Validation: empty answers, checks of the user's own, JSON Schemas and attrs classes, in all modes."""

from __future__ import annotations

import logging
import sys
from typing import Literal

import attrs
import pytest
from support.calling import REQUEST, call

from fluxibly._schema import parse
from fluxibly.errors import ConfigError, ResponseInvalid, ServerError, StreamInterrupted, root_cause
from fluxibly.middleware import Retry, Validation
from fluxibly.testing import Delay
from fluxibly.testing.modes import MODES
from fluxibly.types import Chunk, Message, Response, ToolCall, ToolCallDelta

STREAMS = [mode for mode in MODES if mode.streaming]
SCHEMA = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
TOOL_CALL = Chunk(tool_calls=(ToolCallDelta(index=0, id="c1", name="look", arguments="{}"),))


@attrs.frozen
class Person:
    name: str
    age: int = attrs.field(validator=attrs.validators.ge(0))
    tags: list[str] = attrs.field(factory=list)
    height: float | None = None
    active: bool = True
    kind: Literal["cat", "dog"] = "cat"


@pytest.fixture(params=MODES, ids=str)
def mode(request):
    return request.param


@pytest.fixture(params=STREAMS, ids=str)
def stream_mode(request):
    return request.param


def invalid(made):
    """The ResponseInvalid that a call ended with."""
    error = root_cause(made.ran.error)
    assert isinstance(error, ResponseInvalid)
    return error


def shorter(response):
    return None if len(response.text) < 10 else "Please be shorter."


class TestEmpty:
    @pytest.mark.parametrize("answer", [[], [""], [Chunk(reasoning="hm")]], ids=str)
    def test_by_default_a_warning(self, mode, caplog, answer):
        """The call completes, and the log tells."""
        assert call(mode, Validation(), answer).response.text == ""
        assert [(r.levelno, r.getMessage()) for r in caplog.records] == [(logging.WARNING, "LLM response is empty")]

    def test_white_space_is_empty(self, mode):
        """It has no answer in it."""
        assert invalid(call(mode, Validation(empty="raise"), [" \n"])).problem == "the answer is empty"

    def test_raise(self, mode):
        """The error has the response; nothing is asked again."""
        made = call(mode, Validation(empty="raise"), [Chunk(finish_reason="stop")])
        assert invalid(made).response.finish_reason == "stop"
        assert str(invalid(made)) == "the answer did not pass validation: the answer is empty"
        assert made.record.attempts == 1

    def test_retry(self, mode, caplog):
        """The same request again, with a line in the log for each."""
        made = call(mode, Validation(empty="retry"), [], [""], "there")
        assert made.response.text == "there"
        assert [request.messages for request in made.provider.requests] == [REQUEST.messages] * 3
        assert [record.getMessage() for record in caplog.records] == [
            f"LLM attempt failed, will retry | attempt={n}, wait=0.00s, error_type=ResponseInvalid, "
            'error_message="the answer did not pass validation: the answer is empty"'
            for n in (1, 2)
        ]

    def test_retry_is_bounded(self, mode):
        """After `max_retries` more attempts the error is raised."""
        made = call(mode, Validation(empty="retry", max_retries=1), [], [], "late")
        assert invalid(made).problem == "the answer is empty"
        assert made.record.attempts == 2

    def test_a_tool_call_is_no_empty_answer(self, mode):
        """It has something to do."""
        assert call(mode, Validation(empty="raise"), [TOOL_CALL]).response.tool_calls[0].name == "look"


class TestCheck:
    def test_none_passes(self, mode):
        """A good answer is passed on as it is."""
        assert call(mode, Validation(check=shorter), "short").response.text == "short"

    def test_a_correction_is_sent_with_the_rejected_answer(self):
        """The conversation goes on; the request of the caller is unchanged."""
        for mode in MODES:
            made = call(mode, Validation(check=shorter, hold=True), "a long-winded answer", "short")
            assert made.response.text == "short"
            assert made.provider.requests[1].messages == (
                *REQUEST.messages,
                Message.assistant("a long-winded answer"),
                Message.user("Please be shorter.\nPlease answer again, corrected."),
            )
            assert len(REQUEST.messages) == 1
            assert made.provider.requests[0].messages == REQUEST.messages

    def test_each_correction_starts_from_the_original(self):
        """Earlier rejected answers do not pile up."""
        for mode in MODES:
            made = call(mode, Validation(check=shorter, hold=True), "a first long one", "a second long one", "short")
            assert [m.text for m in made.provider.requests[2].messages][1:2] == ["a second long one"]
            assert len(made.provider.requests[2].messages) == 3

    def test_corrections_are_bounded(self):
        """The last rejected answer is on the error."""
        for mode in MODES:
            made = call(mode, Validation(check=shorter, hold=True, max_retries=1), "a long answer", "another long one")
            assert invalid(made).response.text == "another long one"
            assert invalid(made).problem == "Please be shorter."
            assert made.record.attempts == 2

    def test_a_rejected_tool_call_gets_a_result(self):
        """Services refuse a conversation in which a tool call has none."""
        for mode in MODES:
            made = call(mode, Validation(check=lambda r: "no tools" if r.tool_calls else None), [TOOL_CALL], "fine")
            if mode.streaming:
                assert invalid(made).problem == "no tools"
                continue
            asked, answer, result, correction = made.provider.requests[1].messages
            assert [m.role for m in (asked, answer, result, correction)] == ["user", "assistant", "tool", "user"]
            assert answer.tool_calls == (ToolCall("c1", "look", raw_arguments="{}"),)
            assert result.tool_call_id == "c1"

    def test_what_it_raises_reaches_the_caller(self, mode):
        """And is not asked again."""

        def check(response):
            raise PermissionError("forbidden words")

        made = call(mode, Validation(check=check), "text")
        assert isinstance(root_cause(made.ran.error), PermissionError)
        assert made.record.attempts == 1

    def test_a_bool_is_no_correction(self, mode):
        """A check that answers yes or no is told what to return."""
        made = call(mode, Validation(check=lambda response: "x" in response.text), "text")
        error = root_cause(made.ran.error)
        assert isinstance(error, TypeError)
        assert "returned a bool; it returns None for a good answer" in str(error)

    def test_it_sees_the_empty_answer_too(self, mode):
        """A warning is not the end of it."""
        seen = []
        call(mode, Validation(check=lambda response: seen.append(response.text)), [])
        assert seen == [""]


class TestSchemas:
    @pytest.mark.parametrize(
        "text", ['{"age": 3}', ' {"age": 3}\n', '```json\n{"age": 3}\n```', '```\n{"age": 3}\n```\n'], ids=repr
    )
    def test_json_schema(self, mode, text):
        """`parsed` is the decoded JSON; a code fence is passed over; the text stays as it was."""
        response = call(mode, Validation(schema=SCHEMA), [text]).response
        assert response.parsed == {"age": 3}
        assert response.text == text

    def test_attrs_class(self, mode):
        """`parsed` is an instance of it."""
        response = call(mode, Validation(schema=Person), ['{"name": "Ann", ', '"age": 3, "height": 1}']).response
        assert response.parsed == Person("Ann", 3, height=1)

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("not json", "the answer is not valid JSON: "),
            ("", "the answer is not valid JSON: "),
            ('{"name": "Ann", "age": NaN}', "the answer is not valid JSON: NaN is no JSON value"),
            ("[" * 100_000, "the answer is not valid JSON: "),
            ("[1]", "the answer does not fit Person: "),
            ("null", "the answer does not fit Person: "),
            ('{"name": "Ann"}', "required field missing @ Person.age"),
            (
                '{"name": 5, "age": "x"}',
                "expected str @ Person.name; invalid value for type, expected int @ Person.age",
            ),
            ('{"name": "Ann", "age": 2.7}', "expected int @ Person.age"),
            ('{"name": "Ann", "age": true}', "expected int @ Person.age"),
            ('{"name": "Ann", "age": 3, "active": "no"}', "expected bool @ Person.active"),
            ('{"name": "Ann", "age": 3, "tags": [1]}', "expected str @ Person.tags[0]"),
            ('{"name": "Ann", "age": 3, "kind": "cow"}', "@ Person.kind"),
            ('{"name": "Ann", "age": -3}', "'age' must be >= 0: -3"),
        ],
    )
    def test_what_does_not_fit_a_class(self, text, problem):
        """The problem names the field and what is due, for the model to mend."""
        with pytest.raises(ValueError) as caught:
            parse(text, Person)
        assert problem in str(caught.value)

    def test_what_does_not_match_a_schema(self):
        """Each mismatch with its path."""
        schema = {"type": "array", "items": SCHEMA}
        with pytest.raises(ValueError) as caught:
            parse('[{"age": "x"}, {}]', schema)
        assert str(caught.value) == (
            "the answer does not match the JSON Schema: $[0].age: 'x' is not of type 'integer'; "
            "$[1]: 'age' is a required property"
        )

    def test_a_wrong_answer_is_asked_for_again_with_the_problem(self):
        """As often as `max_retries` says."""
        for mode in MODES:
            made = call(mode, Validation(schema=SCHEMA, hold=True), "three", '{"age": "3"}', '{"age": 3}')
            assert made.response.parsed == {"age": 3}
            assert "'3' is not of type 'integer'" in made.provider.requests[2].messages[-1].text

    def test_an_empty_answer_does_not_match(self, mode):
        """Nothing cannot be parsed; it is asked for again."""
        made = call(mode, Validation(schema=SCHEMA), [], '{"age": 3}')
        assert made.response.parsed == {"age": 3}
        assert made.provider.requests[1].messages == REQUEST.messages

    def test_tool_calls_pass(self, mode):
        """The model has not answered yet."""
        made = call(mode, Validation(schema=SCHEMA), [TOOL_CALL])
        assert made.response.parsed is None
        assert made.response.tool_calls[0].name == "look"

    def test_the_check_comes_after_the_schema(self, mode):
        """It need not parse again what cannot be parsed."""
        made = call(mode, Validation(schema=SCHEMA, check=lambda r: 1 / 0, max_retries=0), "no json")
        assert "not valid JSON" in invalid(made).problem


class TestStreams:
    def test_hold_delivers_nothing_before_it_passed(self, stream_mode):
        """The consumer sees only the answer that is good, in its chunks."""
        made = call(stream_mode, Validation(check=shorter, hold=True), ["a long", " answer"], ["sho", "rt"])
        assert made.ran.events == [Chunk("sho"), Chunk("rt")]
        assert made.response.text == "short"

    def test_hold_and_nothing_passes(self, stream_mode):
        """The error is no interruption, since nothing has gone out."""
        made = call(stream_mode, Validation(check=shorter, hold=True, max_retries=0), ["a long", " answer"])
        assert made.ran.events == []
        assert isinstance(made.ran.error, ResponseInvalid)

    def test_without_hold_a_problem_comes_at_the_end(self, stream_mode):
        """As the cause of StreamInterrupted; it cannot be asked for again."""
        made = call(stream_mode, Validation(check=shorter), ["a long", " answer"], "short")
        assert made.ran.events == [Chunk("a long"), Chunk(" answer")]
        assert isinstance(made.ran.error, StreamInterrupted)
        assert made.ran.error.partial.text == "a long answer"
        assert invalid(made).problem == "Please be shorter."
        assert made.record.attempts == 1

    def test_a_failure_while_holding_is_the_provider_s(self, stream_mode):
        """An outer Retry may try it again."""
        validation = Validation(check=shorter, hold=True)
        retry = Retry(base_delay=0)
        made = call(stream_mode, [retry, validation], ["a", ServerError("down")], ["b", Delay(1), "c"])
        assert made.response.text == made.ran.text == "bc"

    def test_chunks_are_not_delayed_without_hold(self, stream_mode):
        """The consumer may stop at the first one."""
        made = call(stream_mode, Validation(check=shorter), ["one", KeyboardInterrupt()], stop_after=1)
        assert made.ran.events == [Chunk("one")]
        assert made.ran.error is None


def test_the_error_of_an_inner_one_is_not_retried(mode):
    """Two in a stack: each asks again for its own reasons only."""
    inner = Validation(check=lambda r: "inner says no", max_retries=0)
    made = call(mode, [Validation(empty="retry"), inner], "text")
    assert invalid(made).problem == "inner says no"
    assert made.record.attempts == 1


class TestSettings:
    @pytest.mark.parametrize(
        ("schema", "problem"),
        [
            ({"type": "objekt"}, "is not a JSON Schema: 'objekt' is not valid"),
            ({"a": {1, 2}}, "is not a JSON Schema: "),
            ("object", "is a JSON Schema (a mapping) or an attrs class, not 'object'"),
            (int, "is a JSON Schema (a mapping) or an attrs class, not <class 'int'>"),
        ],
        ids=str,
    )
    def test_a_wrong_schema_is_refused(self, schema, problem):
        """When it is made."""
        with pytest.raises(ConfigError) as caught:
            Validation(schema=schema)
        assert problem in str(caught.value)

    @pytest.mark.parametrize("settings", [{"empty": "ignore"}, {"max_retries": -1}, {"max_retries": "x"}, {"check": 5}])
    def test_bad_ones_are_refused(self, settings):
        """Likewise."""
        with pytest.raises((ValueError, TypeError)) as caught:
            Validation(**settings)
        assert next(iter(settings)) in str(caught.value)

    def test_references_stay_inside_the_schema(self, mode):
        """Those within it are followed; nothing is ever fetched."""
        own = {"$ref": "#/$defs/n", "$defs": {"n": {"type": "integer"}}}
        assert call(mode, Validation(schema=own), "3").response.parsed == 3
        made = call(mode, Validation(schema={"$ref": "http://127.0.0.1:9/schema.json"}), "3")
        error = root_cause(made.ran.error)
        assert isinstance(error, ConfigError)
        assert str(error) == "Validation(schema=…) refers to 'http://127.0.0.1:9/schema.json', which is not in it"

    def test_without_jsonschema_the_extra_is_named(self, monkeypatch):
        """With the command that installs it."""
        monkeypatch.setitem(sys.modules, "jsonschema", None)
        with pytest.raises(ConfigError, match=r"pip install jsonschema"):
            Validation(schema={"type": "object", "title": "not seen before"})

    def test_an_attrs_class_needs_no_extra(self, monkeypatch):
        """Only JSON Schemas need jsonschema."""
        monkeypatch.setitem(sys.modules, "jsonschema", None)
        assert parse('{"name": "Ann", "age": 3}', Person) == Person("Ann", 3)


def test_the_response_is_otherwise_the_provider_s(mode):
    """Only `parsed` is added."""
    response = Response("3", finish_reason="stop", model="m-2", id="r1")
    got = call(mode, Validation(schema={"type": "integer"}), response).response
    assert (got.parsed, got.model, got.id, got.finish_reason) == (3, "m-2", "r1", "stop")
