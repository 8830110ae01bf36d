"""Answers as objects: `parse`, `into=` and `partial_parsed`, with every layer that has to do with them."""

from __future__ import annotations

import json
import threading
from typing import Any, TypedDict

import anyio
import attrs
import msgspec
import pydantic
import pytest
from support.powers import tools

from fluxibly import (
    LLM,
    AsyncLLM,
    Chunk,
    LLMConfig,
    StreamInterrupted,
    ToolCall,
    default_stack,
    register_llm_framework,
)
from fluxibly.errors import ConfigError, GuardRefused, ResponseInvalid, ServerError, root_cause
from fluxibly.flow import map_chunks
from fluxibly.middleware import Cache, Fallback, Guard, Logging, Redact, Retry, Validation
from fluxibly.registry import stack_into
from fluxibly.testing import AsyncScriptedProvider, ScriptedProvider
from fluxibly.testing.modes import Mode
from fluxibly.types import Response, ToolCallDelta


@attrs.frozen
class Person:
    name: str
    age: int


class Book(TypedDict):
    title: str


class City(msgspec.Struct, frozen=True):
    city: str


class Ship(pydantic.BaseModel):
    sails: int


@pytest.fixture(autouse=True)
def _registries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fluxibly.registry._frameworks", {})


ANN = '{"name": "Ann", "age": 3}'
WRONG = '{"name": "Ann", "age": "three"}'
FITTING: list[tuple[Any, str, Any]] = [
    (Person, ANN, Person("Ann", 3)),
    (Book, '{"title": "T"}', {"title": "T"}),
    (City, '{"city": "C"}', City("C")),
    (Ship, '{"sails": 2}', Ship(sails=2)),
    (list[Person], f'{{"value": [{ANN}]}}', [Person("Ann", 3)]),
    (Person | City, '{"value": {"city": "C"}}', City("C")),
    (Person | None, '{"value": null}', None),
    (int, '{"value": 0}', 0),
    ({"type": "array", "items": {"type": "integer"}}, '{"value": [1]}', [1]),
]
CALL = Chunk(tool_calls=(ToolCallDelta(index=0, id="c1", name="look", arguments="{}"),))


def scripted(*answers: Any, framework: str = "scripted") -> tuple[LLMConfig, list[Any]]:
    """Return a configuration whose providers take these answers in turn, and the providers."""
    made: list[Any] = []

    def provider(config: LLMConfig) -> ScriptedProvider:
        made.append(ScriptedProvider(*answers))
        return made[-1]

    def async_provider(config: LLMConfig) -> AsyncScriptedProvider:
        made.append(AsyncScriptedProvider(*answers))
        return made[-1]

    register_llm_framework(framework, provider, async_provider=async_provider, replace=True)
    return LLMConfig(framework=framework, model="m", max_retries=0), made


def ask(
    mode: Mode, into: Any, *answers: Any, middleware: Any = None, then: Any = None, **call: Any
) -> tuple[Response, list[Any]]:
    """Call with `into=` in a mode, and return the response and the requests that were sent.

    `then` gets the stream after each chunk.
    """
    config, made = scripted(*answers)
    seen = then or (lambda stream: None)

    def in_threads() -> Response:
        with LLM(config, middleware) as llm:
            if not mode.streaming:
                return llm.complete("Who?", into=into, **call)
            with llm.stream("Who?", into=into, **call) as stream:
                for _ in stream:
                    seen(stream)
                return stream.response

    async def in_loop() -> Response:
        async with AsyncLLM(config, middleware) as llm:
            if not mode.streaming:
                return await llm.complete("Who?", into=into, **call)
            async with llm.stream("Who?", into=into, **call) as stream:
                async for _ in stream:
                    seen(stream)
                return stream.response

    response = in_threads() if mode.backend is None else anyio.run(in_loop, backend=mode.backend)
    return response, made[0].requests


def partials(mode: Mode, into: Any, *answers: Any, **settings: Any) -> list[Any]:
    """Return `partial_parsed` after each chunk."""
    found: list[Any] = []
    ask(mode, into, *answers, then=lambda stream: found.append(stream.partial_parsed), **settings)
    return found


class TestParse:
    @pytest.mark.parametrize(("into", "text", "made"), FITTING, ids=lambda each: str(each)[:40])
    def test_every_kind_of_type(self, into: Any, text: str, made: Any) -> None:
        """`parse` returns the instance, and the service gets the type's schema."""
        config, providers = scripted(text, text)
        with LLM(config) as llm:
            assert llm.parse("Who?", into) == made
            assert llm.complete("Who?", into=into).parsed == made
        (first, second) = providers[0].requests
        assert first.response_format == second.response_format
        assert first.response_format["type"] == "object"

        async def main() -> Any:
            async with AsyncLLM(config) as llm:
                return await llm.parse("Who?", into)

        for backend in ("asyncio", "trio"):
            assert anyio.run(main, backend=backend) == made

    def test_the_response_has_the_instance(self, mode: Mode) -> None:
        """`into=` makes `response.parsed`, whole and streamed."""
        response, requests = ask(mode, Person, [ANN[:9], ANN[9:]])
        assert response.parsed == Person("Ann", 3)
        assert response.text == ANN
        assert len(requests) == 1

    def test_a_wrong_answer_is_asked_for_again(self) -> None:
        """The model is told what was wrong, twice at most, and then the caller is."""
        config, providers = scripted(WRONG, "no JSON", ANN)
        with LLM(config) as llm:
            assert llm.parse("Who?", Person) == Person("Ann", 3)
        problems = [request.messages[-1].text for request in providers[0].requests[1:]]
        assert problems[0].startswith("the answer does not fit Person: $.age: expected an integer, got a string\n")
        assert problems[1].startswith("the answer is not valid JSON: ")
        config, providers = scripted(WRONG, WRONG, WRONG)
        with LLM(config) as llm, pytest.raises(ResponseInvalid) as caught:
            llm.parse("Who?", Person)
        assert caught.value.response.text == WRONG
        assert len(providers[0].requests) == 3

    def test_tools_are_no_answer(self, mode: Mode) -> None:
        """Tool calls end the check: `parsed` is None, and `parse` raises."""
        response, requests = ask(mode, Person, [CALL])
        assert response.parsed is None
        assert response.tool_calls == (ToolCall("c1", "look", {}),)
        assert len(requests) == 1
        config, _ = scripted([CALL])
        with LLM(config) as llm, pytest.raises(ResponseInvalid, match="the model called tools, and gave no answer"):
            llm.parse("Who?", Person)

    def test_what_cannot_be_asked_for(self) -> None:
        """A type without a schema, and a second format, are refused before anything is sent, in every mode."""
        config, providers = scripted(ANN)
        both: Any = {"into": Person, "response_format": "json"}
        with LLM(config) as llm:
            for wrong in (complex, "Person", 5):
                for call in (llm.complete, llm.stream):
                    with pytest.raises(ConfigError, match=r"^into: "):
                        call("Who?", into=wrong)
                with pytest.raises(ConfigError, match=r"^into: "):
                    llm.parse("Who?", wrong)
            with pytest.raises(ConfigError, match=r"^into: .* got None"):
                llm.parse("Who?", None)
            for call in (llm.complete, llm.stream):
                with pytest.raises(TypeError, match="into= and response_format= both say"):
                    call("Who?", **both)
            with pytest.raises(TypeError, match="into= and response_format= both say"):
                llm.parse("Who?", Person, response_format="json")
        assert not providers[0].requests

        async def main() -> None:
            async with AsyncLLM(config) as llm:
                with pytest.raises(ConfigError, match=r"^into: "):
                    await llm.parse("Who?", complex)
                with pytest.raises(TypeError, match="into= and response_format="):
                    await llm.complete("Who?", **both)
                with pytest.raises(TypeError, match="into= and response_format="):
                    llm.stream("Who?", **both)

        anyio.run(main)

    def test_other_settings_are_passed_on(self, mode: Mode) -> None:
        """`timeout=` and overrides work beside `into=`."""
        _, (request,) = ask(mode, Person, ANN, timeout=5, temperature=0.5, n=2)
        assert (request.temperature, request.n) == (0.5, 2)
        assert request.response_format["title"] == "Person"

    def test_a_closed_llm(self) -> None:
        """A closed LLM takes no more calls, with a type that it has seen and with another."""
        config, _ = scripted(ANN, ANN)
        llm = LLM(config)
        llm.parse("Who?", Person)
        llm.close()
        for into in (Person, City):
            with pytest.raises(RuntimeError, match="closed"):
                llm.parse("Who?", into)

    def test_threads_parse_into_different_types(self) -> None:
        """A hundred threads with one LLM get instances of the type that each asked for."""

        class Answering:
            name = "answering"

            def complete(self, request: Any) -> str:
                (field,) = request.response_format["properties"]
                return json.dumps({field: 1})

        register_llm_framework("answering", lambda config: Answering(), replace=True)
        kinds = [attrs.make_class(f"Kind{n}", {f"f{n}": attrs.field(type=int)}) for n in range(20)]
        found: list[bool] = []
        with LLM(LLMConfig(framework="answering", model="m")) as llm:

            def run(n: int) -> None:
                kind = kinds[n % 20]
                found.append(all(llm.parse("Who?", kind) == kind(1) for _ in range(5)))

            threads = [threading.Thread(target=run, args=(n,)) for n in range(100)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert found == [True] * 100

    def test_many_types(self) -> None:
        """The pipelines of types are kept for a while, and not for good."""
        config, _ = scripted(*(['{"a": 1}'] * 300))
        with LLM(config, []) as llm:
            for n in range(300):
                kind = attrs.make_class(f"Kind{n}", {"a": attrs.field(type=int)})
                assert llm.parse("Who?", kind) == kind(1)
            assert len(llm._pipelines_into) <= 256


class TestStacks:
    def test_where_it_is_added(self) -> None:
        """Without a Validation, one is added outside of Fallback, Retry and whatever else belongs inside of it."""
        fallback = Fallback("echo:b")
        kinds = [type(layer).__name__ for layer in stack_into([Logging(), fallback, Retry()], Person)]
        assert kinds == ["Logging", "Validation", "Fallback", "Retry"]
        assert [type(layer).__name__ for layer in stack_into([], Person)] == ["Validation"]
        assert [type(layer).__name__ for layer in stack_into([Logging()], Person)] == ["Logging", "Validation"]

        def mine(request: Any, call_next: Any) -> Any:
            return call_next(request)

        assert [getattr(layer, "__name__", type(layer).__name__) for layer in stack_into([mine, Retry()], Person)] == [
            "mine",
            "Validation",
            "Retry",
        ]

    def test_a_validation_keeps_its_settings(self) -> None:
        """`check`, `max_retries`, `hold` and `empty` are those of the stack's Validation; of two, the outermost is it."""

        def check(response: Response) -> str | None:
            return None if response.parsed is None or "Ann" in response.text else "Ann is expected."

        outer, inner = Validation(check=check, max_retries=1, hold=True), Validation(empty="raise")
        changed = stack_into([outer, inner, Retry()], Person)
        assert changed[0] == Validation(check=check, max_retries=1, hold=True, schema=Person)
        assert changed[1] is inner
        config, providers = scripted('{"name": "Bo", "age": 3}', WRONG, ANN)
        with (
            LLM(
                config, [Validation(check=lambda r: None if "Ann" in r.text else "Ann, please.", max_retries=1)]
            ) as llm,
            pytest.raises(ResponseInvalid, match="expected an integer"),
        ):
            llm.parse("Who?", Person)
        assert providers[0].requests[1].messages[-1].text.startswith("Ann, please.")

    def test_a_schema_of_the_stack_gives_way(self, mode: Mode) -> None:
        """`into=` takes precedence over the schema of the stack's Validation, whose calls without it go on as before."""
        response, _ = ask(mode, Person, ANN, middleware=[Validation(schema=City)])
        assert response.parsed == Person("Ann", 3)

    def test_the_default_stack_and_retries(self, mode: Mode) -> None:
        """A failed attempt is sent again by Retry, and a wrong answer is asked for again by Validation."""
        config, _ = scripted()
        response, requests = ask(
            mode, Person, ServerError("busy"), ANN, middleware=[Retry(max_retries=1, base_delay=0)]
        )
        assert response.parsed == Person("Ann", 3)
        assert len(requests) == 2
        assert [type(layer).__name__ for layer in default_stack(config)].count("Validation") == 1

    def test_a_fallback_sends_each_service_its_own_form(self) -> None:
        """The request has the schema, and the other target gets it too; a wrong answer is no reason to fall back."""
        config, first = scripted(ServerError("busy"), ANN)
        _, second = scripted(ANN, framework="scripted2")
        fallback = Fallback("scripted2:b")
        with LLM(config, [fallback]) as llm:
            assert llm.parse("Who?", Person) == Person("Ann", 3)
        assert second[0].requests[0].response_format == first[0].requests[0].response_format
        config, first = scripted(WRONG, WRONG, WRONG)
        _, second = scripted(ANN, framework="scripted2")
        with LLM(config, [Fallback("scripted2:b")]) as llm, pytest.raises(ResponseInvalid):
            llm.parse("Who?", Person)
        assert not second or not second[0].requests

    def test_a_cache_parses_again(self) -> None:
        """A hit has an instance of its own, and another schema is another key."""
        for stack in ([Cache()], [Cache(), Validation()], [Validation(), Cache()]):
            config, made = scripted(ANN, ANN, '{"city": "C"}')
            with LLM(config, stack) as llm:
                first, second = llm.parse("Who?", Person), llm.parse("Who?", Person)
                assert first == second == Person("Ann", 3)
                assert len(made[0].requests) == 1
                assert llm.parse("Who?", Person | City) == Person("Ann", 3)
                assert len(made[0].requests) == 2

    def test_a_redactor_restores(self) -> None:
        """What was redacted on its way to the service is back in the instance, whichever layer is outside."""
        redact = Redact(restore=True)
        for stack in ([redact], [Validation(), redact], [redact, Validation()]):
            config, made = scripted('{"name": "[email_1]", "age": 3}')
            with LLM(config, stack) as llm:
                assert llm.parse("Who is ann@example.com?", Person) == Person("ann@example.com", 3)
            assert made[0].requests[0].messages[-1].text == "Who is [email_1]?"

    @pytest.mark.parametrize("guard", ["outside", "inside"])
    def test_a_guard_refuses(self, guard: str) -> None:
        """The refusal of a guard is no answer, and is not asked for again."""
        refusing = Guard(output=lambda response: "no names" if "Ann" in response.text else None)
        config, made = scripted(ANN, ANN)
        stack: list[Any] = [refusing, Validation()] if guard == "outside" else [Validation(), refusing]
        with LLM(config, stack) as llm, pytest.raises(GuardRefused):
            llm.parse("Who?", Person)
        assert len(made[0].requests) == 1

    def test_parsed_survives_layers_that_change_nothing(self, mode: Mode) -> None:
        """A layer outside that maps chunks keeps the instance, unless it changes the text."""

        def same(request: Any, call_next: Any) -> Any:
            return map_chunks(call_next(request), lambda chunk: chunk)

        response, _ = ask(mode, Person, ANN, middleware=[same, Validation()])
        assert response.parsed == Person("Ann", 3)


class TestStreams:
    def test_the_value_grows(self, stream_mode: Mode) -> None:
        """`partial_parsed` is plain until it fits, and then an instance; it is the response's in the end."""
        found = partials(stream_mode, Person, ['{"name"', ': "An', 'n", "age": 3', "}"])
        assert found == [{}, {"name": "An"}, {"name": "Ann"}, Person("Ann", 3)]

    def test_a_list_grows(self, stream_mode: Mode) -> None:
        """Items are instances as soon as they fit."""
        found = partials(stream_mode, list[Person], ['{"value": [', ANN, ", " + ANN[:12], ANN[12:], "]}"])
        ann = Person("Ann", 3)
        assert found == [[], [ann], [ann], [ann, ann], [ann, ann]]

    def test_a_validation_of_the_stack(self) -> None:
        """Without `into=`, it is the schema of the stack's Validation that counts; without any, it is None."""
        for stack, expected in (([Validation(schema=Person)], Person("Ann", 3)), ([Validation()], None), ([], None)):
            config, _ = scripted(ANN)
            with LLM(config, stack) as llm, llm.stream("Who?") as stream:
                assert stream.partial_parsed is None
                list(stream)
                assert stream.partial_parsed == expected

    def test_a_wrong_answer_raises_at_the_end(self, stream_mode: Mode) -> None:
        """A stream is not held back, so it is too late to ask again."""
        with pytest.raises(StreamInterrupted) as caught:
            ask(stream_mode, Person, WRONG, ANN)
        assert isinstance(root_cause(caught.value), ResponseInvalid)

    def test_a_held_stream_asks_again(self, stream_mode: Mode) -> None:
        """`Validation(hold=True)` lets nothing of a wrong answer out, and asks again."""
        texts: list[str] = []
        response, requests = ask(
            stream_mode,
            Person,
            [WRONG[:8], WRONG[8:]],
            [ANN[:8], ANN[8:]],
            middleware=[Validation(hold=True)],
            then=lambda stream: texts.append(stream.partial_parsed),
        )
        assert response.parsed == Person("Ann", 3)
        assert texts[-1] == Person("Ann", 3)
        assert len(requests) == 2

    def test_an_answer_that_brings_nothing_is_asked_for_again(self, stream_mode: Mode) -> None:
        """A stream of which nothing has gone out can be asked for again, without being held."""
        response, requests = ask(stream_mode, Person, [Chunk(finish_reason="stop")], ANN)
        assert response.parsed == Person("Ann", 3)
        assert len(requests) == 2

    def test_a_restart_begins_anew(self, stream_mode: Mode) -> None:
        """What came before a Restart does not count."""
        found: list[Any] = []
        ask(
            stream_mode,
            Person,
            ['{"name": "Old", "age": 9, ', ServerError("gone")],
            ['{"name": "Ann"', ', "age": 3}'],
            middleware=[Retry(max_retries=1, base_delay=0, on_interrupt="restart")],
            restarts=True,
            then=lambda stream: found.append(stream.partial_parsed),
        )
        assert found[0] == Person("Old", 9)
        assert found[-2:] == [{"name": "Ann"}, Person("Ann", 3)]

    def test_a_turn_begins_anew(self, stream_mode: Mode) -> None:
        """After a turn with tools, the value is that of the message under way."""
        loop = tools({"look": lambda: "seen"})
        found: list[Any] = []
        response, _ = ask(
            stream_mode,
            Person,
            ["Let me see.", CALL],
            [ANN[:14], ANN[14:]],
            middleware=[loop, Validation()],
            then=lambda stream: found.append(stream.partial_parsed),
        )
        assert response.parsed == Person("Ann", 3)
        assert found[-2:] == [{"name": "Ann"}, Person("Ann", 3)]
