"""`Validation` of empty answers, by custom checks, JSON Schemas and attrs classes, in all modes."""

from __future__ import annotations

import logging
import re
import sys
from typing import Literal

import attrs
import pytest
from support.calling import REQUEST, call

from fluxibly._schemas.shapes import shape_of
from fluxibly.errors import ConfigError, ResponseInvalid, ServerError, StreamInterrupted, root_cause
from fluxibly.functions import register_function
from fluxibly.middleware import Retry, Validation
from fluxibly.registry import make_middleware
from fluxibly.testing import Delay
from fluxibly.testing.modes import MODES
from fluxibly.types import Chunk, Message, Response, ToolCall, ToolCallDelta

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


def invalid(made):
    """Return the ResponseInvalid that a call ended with."""
    error = root_cause(made.ran.error)
    assert isinstance(error, ResponseInvalid)
    return error


def shorter(response):
    return None if len(response.text) < 10 else "Please be shorter."


class TestEmpty:
    @pytest.mark.parametrize("answer", [[], [""], [Chunk(reasoning="hm")]], ids=str)
    def test_the_default_is_a_warning(self, mode, caplog, answer):
        """The call completes, and a warning is logged."""
        assert call(mode, Validation(), answer).response.text == ""
        assert [(r.levelno, r.getMessage()) for r in caplog.records] == [(logging.WARNING, "LLM response is empty")]

    def test_white_space_is_empty(self, mode):
        """An answer of only white space is empty."""
        assert invalid(call(mode, Validation(empty="raise"), [" \n"])).problem == "the answer is empty"

    def test_raise(self, mode):
        """The error has the response, and the model is not asked again."""
        made = call(mode, Validation(empty="raise"), [Chunk(finish_reason="stop")])
        assert invalid(made).response.finish_reason == "stop"
        assert str(invalid(made)) == "the answer did not pass validation: the answer is empty"
        assert made.record.attempts == 1

    def test_retry(self, mode, caplog):
        """The same request is sent again, and each retry is logged."""
        made = call(mode, Validation(empty="retry"), [], [""], "there")
        assert made.response.text == "there"
        assert [request.messages for request in made.provider.requests] == [REQUEST.messages] * 3
        assert [record.getMessage() for record in caplog.records] == [
            f"LLM attempt failed, will retry | attempt={n}, wait=0.00s, error_type=ResponseInvalid, "
            'error_message="the answer did not pass validation: the answer is empty"'
            for n in (1, 2)
        ]

    def test_retry_is_bounded(self, mode):
        """After `max_retries` more attempts, the error is raised."""
        made = call(mode, Validation(empty="retry", max_retries=1), [], [], "late")
        assert invalid(made).problem == "the answer is empty"
        assert made.record.attempts == 2

    def test_a_tool_call_is_not_an_empty_answer(self, mode):
        """An answer with a tool call but without text is valid."""
        assert call(mode, Validation(empty="raise"), [TOOL_CALL]).response.tool_calls[0].name == "look"


class TestCheck:
    def test_a_check_that_returns_none_passes(self, mode):
        """A good answer is passed on unchanged."""
        assert call(mode, Validation(check=shorter), "short").response.text == "short"

    def test_a_correction_is_sent_with_the_rejected_answer(self):
        """The model sees its rejected answer and the correction. The caller's request is unchanged."""
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

    def test_the_warning_says_what_changes(self, mode, caplog):
        """The next request has a correction, which the warning says without quoting it."""
        call(mode, Validation(check=shorter, hold=True), "a long-winded answer", "short")
        (record,) = caplog.records
        assert record.change == "adds the answer and its problem to the messages"
        assert record.getMessage().endswith(f', change="{record.change}"')

    def test_each_correction_starts_from_the_original(self):
        """Earlier rejected answers do not accumulate."""
        for mode in MODES:
            made = call(mode, Validation(check=shorter, hold=True), "a first long one", "a second long one", "short")
            assert [m.text for m in made.provider.requests[2].messages][1:2] == ["a second long one"]
            assert len(made.provider.requests[2].messages) == 3

    def test_corrections_are_bounded(self):
        """The error has the last rejected answer."""
        for mode in MODES:
            made = call(mode, Validation(check=shorter, hold=True, max_retries=1), "a long answer", "another long one")
            assert invalid(made).response.text == "another long one"
            assert invalid(made).problem == "Please be shorter."
            assert made.record.attempts == 2

    def test_a_rejected_tool_call_gets_a_result(self):
        """Services reject a conversation in which a tool call has no result."""
        for mode in MODES:
            made = call(mode, Validation(check=lambda r: "no tools" if r.tool_calls else None), [TOOL_CALL], "fine")
            if mode.streaming:
                assert invalid(made).problem == "no tools"
                continue
            asked, answer, result, correction = made.provider.requests[1].messages
            assert [m.role for m in (asked, answer, result, correction)] == ["user", "assistant", "tool", "user"]
            assert answer.tool_calls == (ToolCall("c1", "look", raw_arguments="{}"),)
            assert result.tool_call_id == "c1"

    def test_an_exception_of_the_check_reaches_the_caller(self, mode):
        """The model is not asked again."""

        def check(response):
            raise PermissionError("forbidden words")

        made = call(mode, Validation(check=check), "text")
        assert isinstance(root_cause(made.ran.error), PermissionError)
        assert made.record.attempts == 1

    def test_a_bool_is_not_a_correction(self, mode):
        """The error for a check that returns a bool explains what to return."""
        made = call(mode, Validation(check=lambda response: "x" in response.text), "text")
        error = root_cause(made.ran.error)
        assert isinstance(error, TypeError)
        assert str(error) == (
            "Validation(check=…): expected None for a good answer, or a str (a correction to send to the model), "
            "got a bool"
        )

    def test_the_check_sees_an_empty_answer_too(self, mode):
        """After the warning about an empty answer, the check still runs."""
        seen = []
        call(mode, Validation(check=lambda response: seen.append(response.text)), [])
        assert seen == [""]


class TestSchemas:
    @pytest.mark.parametrize(
        "text", ['{"age": 3}', ' {"age": 3}\n', '```json\n{"age": 3}\n```', '```\n{"age": 3}\n```\n'], ids=repr
    )
    def test_json_schema(self, mode, text):
        """`parsed` is the decoded JSON. A code fence is ignored, and the text is unchanged."""
        response = call(mode, Validation(schema=SCHEMA), [text]).response
        assert response.parsed == {"age": 3}
        assert response.text == text

    def test_attrs_class(self, mode):
        """`parsed` is an instance of the class."""
        response = call(mode, Validation(schema=Person), ['{"name": "Ann", ', '"age": 3, "height": 1}']).response
        assert response.parsed == Person("Ann", 3, height=1)

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("not json", "the answer is not valid JSON: "),
            ("", "the answer is not valid JSON: "),
            ('{"name": "Ann", "age": NaN}', "the answer is not valid JSON: NaN is not a JSON value"),
            ("[" * 100_000, "the answer is not valid JSON: "),
            ("[1]", "the answer does not fit Person: "),
            ("null", "the answer does not fit Person: "),
            ('{"name": "Ann"}', "$.age: it is missing"),
            (
                '{"name": 5, "age": "x"}',
                "$.name: expected a string, got an integer; $.age: expected an integer, got a string",
            ),
            ('{"name": "Ann", "age": 2.7}', "$.age: expected an integer, got a number"),
            ('{"name": "Ann", "age": true}', "$.age: expected an integer, got a boolean"),
            ('{"name": "Ann", "age": 3, "active": "no"}', "$.active: expected a boolean, got a string"),
            ('{"name": "Ann", "age": 3, "tags": [1]}', "$.tags[0]: expected a string, got an integer"),
            ('{"name": "Ann", "age": 3, "kind": "cow"}', '$.kind: expected one of "cat", "dog", got "cow"'),
            ('{"name": "Ann", "age": -3}', "'age' must be >= 0: -3"),
        ],
    )
    def test_an_answer_that_does_not_fit_a_class(self, text, problem):
        """The problem names the field and the expected value, so that the model can correct it."""
        with pytest.raises(ValueError, match=re.escape(problem)):
            shape_of(Person).parse(text)

    def test_an_answer_that_does_not_match_a_schema(self):
        """The problem names each mismatch with its path."""
        schema = {"type": "array", "items": SCHEMA}
        with pytest.raises(ValueError, match="does not match the JSON Schema") as caught:
            shape_of(schema).parse('[{"age": "x"}, {}]')
        assert str(caught.value) == (
            "the answer does not match the JSON Schema: $[0].age: 'x' is not of type 'integer'; "
            "$[1]: 'age' is a required property"
        )

    def test_a_wrong_answer_is_asked_for_again_with_the_problem(self):
        """The model is asked again up to `max_retries` times."""
        for mode in MODES:
            made = call(mode, Validation(schema=SCHEMA, hold=True), "three", '{"age": "3"}', '{"age": 3}')
            assert made.response.parsed == {"age": 3}
            assert "'3' is not of type 'integer'" in made.provider.requests[2].messages[-1].text

    def test_an_empty_answer_does_not_match(self, mode):
        """An empty answer cannot be parsed, so the model is asked again."""
        made = call(mode, Validation(schema=SCHEMA), [], '{"age": 3}')
        assert made.response.parsed == {"age": 3}
        assert made.provider.requests[1].messages == REQUEST.messages

    def test_tool_calls_pass(self, mode):
        """An answer with tool calls is not checked, because the model has not given its final answer yet."""
        made = call(mode, Validation(schema=SCHEMA), [TOOL_CALL])
        assert made.response.parsed is None
        assert made.response.tool_calls[0].name == "look"

    def test_the_check_comes_after_the_schema(self, mode):
        """The check does not run on an answer that cannot be parsed."""
        made = call(mode, Validation(schema=SCHEMA, check=lambda r: 1 / 0, max_retries=0), "no json")
        assert "not valid JSON" in invalid(made).problem


class TestStreams:
    def test_hold_delivers_nothing_before_the_answer_has_passed(self, stream_mode):
        """The consumer sees only the chunks of the good answer."""
        made = call(stream_mode, Validation(check=shorter, hold=True), ["a long", " answer"], ["sho", "rt"])
        assert made.ran.events == [Chunk("sho"), Chunk("rt")]
        assert made.response.text == "short"

    def test_hold_when_no_answer_passes(self, stream_mode):
        """The error is not a StreamInterrupted, because nothing has gone out."""
        made = call(stream_mode, Validation(check=shorter, hold=True, max_retries=0), ["a long", " answer"])
        assert made.ran.events == []
        assert isinstance(made.ran.error, ResponseInvalid)

    def test_without_hold_a_problem_comes_at_the_end(self, stream_mode):
        """The problem is the cause of StreamInterrupted, because it is too late to ask again."""
        made = call(stream_mode, Validation(check=shorter), ["a long", " answer"], "short")
        assert made.ran.events == [Chunk("a long"), Chunk(" answer")]
        assert isinstance(made.ran.error, StreamInterrupted)
        assert made.ran.error.partial.text == "a long answer"
        assert invalid(made).problem == "Please be shorter."
        assert made.record.attempts == 1

    def test_a_failure_while_holding_is_the_provider_s(self, stream_mode):
        """An outer Retry may retry a failure of the provider."""
        validation = Validation(check=shorter, hold=True)
        retry = Retry(base_delay=0)
        made = call(stream_mode, [retry, validation], ["a", ServerError("down")], ["b", Delay(1), "c"])
        assert made.response.text == made.ran.text == "bc"

    def test_chunks_are_not_delayed_without_hold(self, stream_mode):
        """The consumer gets the first chunk before the second is read."""
        made = call(stream_mode, Validation(check=shorter), ["one", KeyboardInterrupt()], stop_after=1)
        assert made.ran.events == [Chunk("one")]
        assert made.ran.error is None


def test_the_error_of_an_inner_validation_is_not_retried(mode):
    """In a stack of two, each asks again only for its own reasons."""
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
            ("object", "or a JSON Schema, got 'object'"),
            (complex, "Validation(schema=…): complex has no JSON Schema: expected an attrs class"),
        ],
        ids=str,
    )
    def test_a_wrong_schema_is_refused(self, schema, problem):
        """The constructor raises an error that names the problem."""
        with pytest.raises(ConfigError) as caught:
            Validation(schema=schema)
        assert problem in str(caught.value)

    @pytest.mark.parametrize("settings", [{"empty": "ignore"}, {"max_retries": -1}, {"max_retries": "x"}, {"check": 5}])
    def test_bad_settings_are_refused(self, settings):
        """The constructor raises an error that names the setting."""
        with pytest.raises((ValueError, TypeError)) as caught:
            Validation(**settings)
        assert next(iter(settings)) in str(caught.value)

    def test_references_stay_inside_the_schema(self, mode):
        """References within the schema are followed, and nothing is ever fetched."""
        own = {"$ref": "#/$defs/n", "$defs": {"n": {"type": "integer"}}}
        assert call(mode, Validation(schema=own), "3").response.parsed == 3
        made = call(mode, Validation(schema={"$ref": "http://127.0.0.1:9/schema.json"}), "3")
        error = root_cause(made.ran.error)
        assert isinstance(error, ConfigError)
        assert str(error) == "the JSON Schema refers to 'http://127.0.0.1:9/schema.json', which is not in it"

    def test_without_jsonschema_the_extra_is_named(self, monkeypatch):
        """The error has the command that installs jsonschema."""
        monkeypatch.setitem(sys.modules, "jsonschema", None)
        with pytest.raises(ConfigError, match=r"pip install jsonschema"):
            Validation(schema={"type": "object", "title": "not seen before"})

    def test_an_attrs_class_needs_no_extra(self, monkeypatch):
        """Only a JSON Schema needs jsonschema."""
        monkeypatch.setitem(sys.modules, "jsonschema", None)
        assert shape_of(Person).parse('{"name": "Ann", "age": 3}') == Person("Ann", 3)


def test_the_response_is_otherwise_the_provider_s(mode):
    """Validation adds only `parsed`."""
    response = Response("3", finish_reason="stop", model="m-2", id="r1")
    got = call(mode, Validation(schema={"type": "integer"}), response).response
    assert (got.parsed, got.model, got.id, got.finish_reason) == (3, "m-2", "r1", "stop")


def test_yaml_names_the_check():
    """A configuration names a registered function."""
    register_function("shorter_please", shorter, replace=True)
    (layer,) = make_middleware([{"validation": {"check": "shorter_please"}}])
    assert layer.check is shorter
    with pytest.raises(ConfigError, match=r"validation\.check: function 'shorter_plea' not registered; did you mean"):
        make_middleware([{"validation": {"check": "shorter_plea"}}])
