"""`Defaults`: parameters that a request leaves open are set, and what it sets wins, in all modes."""

from __future__ import annotations

import pickle
import threading

import pytest
from hypothesis import given, settings, strategies as st
from support.calling import REQUEST, call, scripted

from fluxibly import LLM, LLMConfig, Target
from fluxibly.errors import ConfigError, ServerError
from fluxibly.middleware import Defaults, Fallback, Retry
from fluxibly.pipeline import Pipeline
from fluxibly.registry import make_middleware
from fluxibly.testing import ScriptedProvider, check_middleware
from fluxibly.testing.modes import MODES
from fluxibly.types import Message, Request, Response, Tool

LOOK = Tool("look")
ALL = {
    "temperature": 0.5,
    "max_tokens": 7,
    "top_p": 0.5,
    "top_k": 3,
    "frequency_penalty": 1,
    "presence_penalty": -1,
    "stop": ("\n",),
    "seed": 4,
    "n": 2,
    "tools": (LOOK,),
    "tool_choice": "look",
    "response_format": "json",
    "reasoning_effort": "low",
    "extra": {"user": "me"},
    "headers": {"x-a": "1"},
    "metadata": {"team": "red"},
}


def sent(defaults, request=REQUEST):
    """Return the request that a provider gets."""
    provider = ScriptedProvider("ok")
    Pipeline(provider, [defaults]).complete(request)
    return provider.requests[0]


class TestOpenParameters:
    def test_they_are_set(self, mode):
        """Every parameter that the request leaves open."""
        made = call(mode, Defaults(**ALL), "ok")
        (request,) = made.provider.requests
        assert {name: getattr(request, name) for name in ALL} == ALL
        assert (request.model, request.messages) == (REQUEST.model, REQUEST.messages)

    def test_what_the_request_sets_wins(self, mode):
        """Also what is false."""
        own = {
            "temperature": 0,
            "seed": 0,
            "stop": ["a"],
            "tools": [Tool("other")],
            "tool_choice": "",
            "response_format": "text",
        }
        request = REQUEST.evolve(**own)
        made = call(mode, Defaults(**{name: ALL[name] for name in own}), "ok", request=request)
        assert all(getattr(made.provider.requests[0], name) == getattr(request, name) for name in own)

    def test_the_caller_keeps_its_request(self, mode):
        call(mode, Defaults(**ALL), "ok")
        assert REQUEST.temperature is None
        assert REQUEST.extra == REQUEST.headers == REQUEST.metadata == {}

    def test_every_attempt_has_them(self, mode):
        """Of every target too; a target's own parameters win."""
        other = scripted(mode, "two")
        stack = [Defaults(temperature=0.1, top_p=0.5), Fallback(Target(other, temperature=1)), Retry(max_retries=1)]
        made = call(mode, stack, ServerError("down"), ServerError("down"))
        got = [(request.temperature, request.top_p) for request in (*made.provider.requests, *other.requests)]
        assert got == [(0.1, 0.5), (0.1, 0.5), (1, 0.5)]

    def test_nothing_to_set(self):
        """The request is passed on as it is."""
        passed = []

        def note(request, call_next):
            passed.append(request)
            return (yield from call_next(request))

        Pipeline(ScriptedProvider("ok"), [note, Defaults(), Defaults(seed=None), Defaults(seed=1), note]).complete(
            REQUEST.evolve(seed=3)
        )
        assert passed[0] is passed[1]


class TestTables:
    def test_they_are_merged_beneath_the_requests_own(self, mode):
        """Key by key, as `additional_params` are: a table within, a null that removes, and tools that are added."""
        defaults = Defaults(
            extra={"a": 1, "b": {"c": 1, "d": 1}, "e": 1, "tools": [{"type": "search"}]},
            metadata={"a": {"b": 1}, "c": 1},
        )
        request = REQUEST.evolve(
            extra={"a": 2, "b": {"d": 2}, "e": None, "tools": [{"type": "code"}]}, metadata={"a": {"d": 2}}
        )
        (got,) = call(mode, defaults, "ok", request=request).provider.requests
        assert got.extra == {
            "a": 2,
            "b": {"c": 1, "d": 2},
            "e": None,
            "tools": [{"type": "search"}, {"type": "code"}],
        }
        assert got.metadata == {"a": {"b": 1, "d": 2}, "c": 1}

    def test_headers_of_the_same_name_in_any_case(self):
        request = REQUEST.evolve(headers={"X-Team": "mine", "z": "3"})
        got = sent(Defaults(headers={"x-team": "all", "y": "2"}), request).headers
        assert got == {"y": "2", "X-Team": "mine", "z": "3"}

    def test_the_configuration_is_the_requests_own(self):
        """Its parameters and `additional_params` win over defaults."""
        config = LLMConfig(framework="echo", model="any", temperature=1, additional_params={"user": "config"})
        got = []

        def answer(request, call_next):
            got.append(request)
            yield from ()
            return Response("ok")

        with LLM(config, [Defaults(temperature=0, top_p=0.5, extra={"user": "default", "k": 1}), answer]) as llm:
            llm.complete("Hi")
        assert (got[0].temperature, got[0].top_p, got[0].extra) == (1, 0.5, {"user": "config", "k": 1})

    def test_callers_keep_their_tables(self):
        """Neither the default nor what a request gets is the caller's own table."""
        extra = {"a": 1}
        defaults = Defaults(extra=extra)
        extra["a"] = 2
        got = sent(defaults).extra
        assert got == {"a": 1}
        got["a"] = 3
        assert sent(defaults).extra == {"a": 1}


class TestSettings:
    @pytest.mark.parametrize(
        ("wrong", "problem"),
        [
            ({"temprature": 1}, "temprature: there is no such setting; did you mean 'temperature'?"),
            ({"model": "m"}, "model: expected a parameter that a request may leave open"),
            ({"messages": "Hi"}, "messages: expected a parameter that a request may leave open"),
            ({"target": "x"}, "target: there is no such setting"),
            ({"temperature": 3}, "temperature: expected a number from 0 to 2, got 3"),
            ({"max_tokens": 0}, "max_tokens: expected a whole number from 1 up, got 0"),
            ({"stop": 5}, "stop: expected a str or a sequence of str, got an int"),
            ({"stop": ["a", 5]}, "stop: expected a str or a sequence of str, got an int in the sequence"),
            ({"tools": "look"}, "tools: expected a sequence of Tool"),
            ({"tools": [{}]}, "tools: a tool given as a mapping needs a 'name'"),
            (
                {"response_format": "yaml"},
                "response_format: expected 'text', 'json' or a JSON Schema (a mapping), got 'yaml'",
            ),
            ({"headers": {"a": 1}}, "headers.a: expected a str, got an int"),
            ({"headers": None}, "headers: expected a mapping (in YAML, a table), got None"),
        ],
    )
    def test_a_wrong_one(self, wrong, problem):
        """Each is a ConfigError that says what is expected, from code and from YAML, where it has its path."""
        with pytest.raises(ConfigError) as caught:
            Defaults(**wrong)
        assert str(caught.value).startswith(problem)
        with pytest.raises(ConfigError) as caught:
            make_middleware([{"defaults": wrong}])
        assert str(caught.value).startswith(f"middleware[0].defaults.{problem}")

    def test_all_problems_at_once(self):
        with pytest.raises(ConfigError) as caught:
            Defaults(temprature=1, temperature=3, model="m", stop=5)
        assert [each.partition(":")[0] for each in caught.value.problems] == [
            "model",
            "temprature",
            "temperature",
            "stop",
        ]

    def test_a_name_that_is_none(self):
        """YAML makes True of `on`."""
        with pytest.raises(ConfigError, match=r"defaults\.True: expected the name of a setting, got a bool"):
            make_middleware([{"defaults": {True: 1}}])

    def test_in_yaml(self, tmp_path):
        file = tmp_path / "framework.yaml"
        file.write_text(
            "llm:\n  framework: echo\n  model: any\n  middleware:\n"
            '    - defaults: {temperature: 0.2, stop: ["\\n"], headers: {x-team: red}}\n'
        )
        with LLM.from_yaml(file) as llm:
            assert llm.pipeline.middleware == (Defaults(temperature=0.2, stop=["\n"], headers={"x-team": "red"}),)

    def test_secrets_are_masked(self):
        """A header's value never shows, nor what has a secret's name, in the `repr` or in an error."""
        defaults = Defaults(
            temperature=0.2,
            headers={"x-team": "4711"},
            extra={"api_key": "4711", "user": "me"},
            metadata={"token": "4711"},
        )
        assert repr(defaults) == (
            "Defaults(temperature=0.2, headers={'x-team': '***'}, extra={'api_key': '***', 'user': 'me'}, "
            "metadata={'token': '***'})"
        )
        with pytest.raises(ConfigError) as caught:
            Defaults(headers={"a": "4711", "b": 4711}, temperature="hot")
        assert "4711" not in str(caught.value)

    def test_it_is_frozen_and_goes_through_pickle(self):
        defaults = Defaults(**ALL)
        with pytest.raises(AttributeError):
            defaults.parameters = {}
        again = pickle.loads(pickle.dumps(defaults))  # noqa: S301  # our own
        assert again == defaults
        got = sent(again)
        assert {name: getattr(got, name) for name in ALL} == ALL


def test_keeps_the_laws():
    check_middleware(Defaults(temperature=0.2, stop=["\n"], extra={"a": {"b": 1}}, metadata={"c": 1}))


values = {name: st.sampled_from([value, None]) for name, value in ALL.items() if not isinstance(value, dict)}


@settings(max_examples=50)
@given(st.fixed_dictionaries({}, optional=values), st.fixed_dictionaries({}, optional=values), st.sampled_from(MODES))
def test_each_parameter_is_the_requests_or_else_the_default(defaults, own, mode):
    request = Request(model="m", messages=[Message.user("Hi")], **own)
    made = call(mode, Defaults(**defaults), "ok", request=request)
    (got,) = made.provider.requests
    for name in values:
        default = Request(model="m", messages="-")
        mine = getattr(request, name)
        expected = mine if mine not in (None, ()) else defaults.get(name)
        assert getattr(got, name) == (getattr(default, name) if expected is None else expected)


def test_many_threads_share_one():
    """Every call has the defaults and its own parameters."""
    defaults = Defaults(temperature=0.5, extra={"k": 1})
    wrong = []

    def work(number):
        got = sent(defaults, Request(model="m", messages="Hi", seed=number, extra={"n": number}))
        if (got.temperature, got.seed, got.extra) != (0.5, number, {"k": 1, "n": number}):
            wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
