"""`Cache` in memory: what is answered from it, what is kept, and what is said of an answer that was."""

from __future__ import annotations

import logging
import math
import sys
import tracemalloc
from collections import OrderedDict
from fractions import Fraction

import attrs
import pytest
from hypothesis import given, settings, strategies as st
from support import powers, strategies
from support.calling import REQUEST, call, scripted
from support.meters import Meters
from support.rich import USAGE, answered, rich
from support.tracing_tools import Recorder

from fluxibly import LLM, LLMConfig, register_function
from fluxibly._logs import forget_reports
from fluxibly.errors import ConfigError, ServerError, StreamInterrupted, root_cause
from fluxibly.flow import emit, hold_back
from fluxibly.middleware import Cache, Fallback, Hedge, Logging, Retry, Tracing, Validation
from fluxibly.middleware._answers import Answer, MemoryAnswers
from fluxibly.stores import MemoryStore
from fluxibly.target import Target
from fluxibly.testing import Delay, VirtualClock, check_middleware
from fluxibly.testing.modes import MODES, run
from fluxibly.types import (
    CallRecord,
    Chunk,
    Message,
    ProviderInfo,
    Reasoning,
    Response,
    ToolCall,
    ToolCallDelta,
    Usage,
)

SKIP, REFRESH = (REQUEST.evolve(metadata={"cache": wish}) for wish in ("skip", "refresh"))
SYNC, SYNC_STREAM = (mode for mode in MODES if mode.backend is None)


@pytest.fixture(autouse=True)
def _afresh():
    forget_reports()


class TestHits:
    def test_of_the_same_request(self, mode, later):
        """The provider is asked once, whatever the modes of the calls."""
        cache = Cache()
        first = call(mode, cache, [*["Hello", ", world"], Chunk(usage=USAGE, finish_reason="stop", model="m-2")])
        hit = call(later, cache)
        assert hit.response == first.response
        assert hit.provider.requests == []
        assert (first.response.cache_hit, hit.response.cache_hit) == (False, True)
        assert (first.record.cache_hit, hit.record.cache_hit) == (False, True)
        assert hit.response.provider == "scripted"

    def test_have_the_usage_and_cost_nothing(self, mode, later):
        """The usage is that of the answer; the call itself has taken no tokens, and no time of the first call."""
        cache = Cache()
        call(mode, cache, [Delay(9), "Hello", Chunk(usage=USAGE, request_id="r-1", rate_limits={"x": "1"})])
        hit = call(later, cache)
        assert hit.response.usage == USAGE
        assert hit.response.total_usage == Usage(input_tokens=0, output_tokens=0)
        assert (hit.record.spent, hit.record.attempts) == ([], 0)
        assert hit.response.elapsed == 0
        left_out = (hit.response.request_id, hit.response.rate_limits, hit.response.raw, hit.response.stats)
        assert left_out == (None, {}, None, None)

    def test_have_their_own_chunks(self, stream_mode):
        """A stream gets the chunks that came at first, or of a whole answer a few."""
        cache = Cache()
        first = call(stream_mode, cache, rich())
        assert [attrs.evolve(chunk) for chunk in call(stream_mode, cache).ran.events] == first.ran.events
        whole = Cache()
        call(SYNC, whole, rich())
        events = call(stream_mode, whole).ran.events
        assert len(events) < 6
        assert answered(events) == first.response

    def test_of_rich_answers(self, mode, later):
        """Reasoning with its signature, media, tool calls, alternatives and details come back."""
        plain = call(mode, [], rich()).response
        cache = Cache()
        call(mode, cache, rich())
        hit = call(later, cache)
        assert hit.response == plain
        assert (hit.response.details, hit.response.order) == (plain.details, plain.order)
        if later.streaming:
            assert answered(hit.ran.events) == plain

    @given(
        strategies.good_scripts,
        st.sampled_from(MODES),
        st.sampled_from(MODES),
        st.booleans(),
        st.sampled_from(
            [(), (strategies.shouting,), (strategies.turning,), (strategies.holding,), (strategies.heading,)]
        ),
    )
    @settings(max_examples=60)
    def test_of_any_answer(self, script, mode, later, far, inner):
        """A hit is what the first call got, and its chunks add up to it, in memory and as bytes."""
        cache = Cache(MemoryStore(), namespace="n") if far else Cache()
        layers = [cache, *[kind("inner", []) for kind in inner]]
        first = call(mode, layers, *[script] * 4)
        again = call(later, layers, *[script] * 4)
        assert again.response == first.response
        assert again.response.cache_hit == first.response.has_output
        if later.streaming and first.response.has_output:
            assert answered(again.ran.events) == first.response

    def test_of_answers_with_several_turns(self, mode, later):
        """The messages between are part of the answer."""
        wants = [Chunk("Look: ", tool_calls=(ToolCallDelta(index=0, id="c", name="look", arguments="{}"),))]
        layers = [Cache(), powers.tools({"look": lambda: "noon"})]
        first = call(mode, layers, wants, "It is noon")
        hit = call(later, layers)
        assert hit.response == first.response
        assert [message.role for message in hit.response.added] == ["assistant", "tool"]
        if later.streaming:
            assert answered(hit.ran.events) == first.response

    def test_of_parsed_answers(self, mode, later):
        @attrs.frozen
        class Person:
            name: str

        layers = [Cache(), Validation(schema=Person)]
        call(mode, layers, '{"name": "Ada"}')
        assert call(later, layers).response.parsed == Person("Ada")

    def test_belong_to_their_caller(self, mode, later):
        """Whatever a caller changes in an answer, another gets it as it was: also after the first call."""
        cache = Cache()

        def spoil(made):
            response = made.response
            response.details["sources"].append("spoilt")
            response.rate_limits["x"] = "spoilt"
            response.tool_calls[0].arguments["at"].append("spoilt")
            response.reasoning_parts[0].raw["at"].append("spoilt")
            for event in made.ran.events:
                for part in event.parts:
                    if isinstance(part, Reasoning):
                        part.raw["spoilt"] = True
            return response

        spoil(call(mode, cache, rich()))
        for _ in range(2):
            hit = call(later, cache)
            assert hit.response.details == {"sources": ["a"]}
            assert hit.response.tool_calls[0].arguments == {"at": [1]}
            assert hit.response.reasoning_parts[0].raw == {"at": [1]}
            assert hit.response.rate_limits == {}
            assert all(event.details in (None, {"sources": ["a"]}) for event in hit.ran.events)
            spoil(hit)

    def test_are_of_the_same_request_alone(self):
        """Another message, model or parameter is another request; other metadata and calls are not."""
        cache = Cache()
        call(SYNC, cache, "one")
        for other in (
            REQUEST.evolve(messages="Hm"),
            REQUEST.evolve(model="m-9"),
            REQUEST.evolve(temperature=0.5),
            REQUEST.evolve(tools=[{"name": "look"}]),
            REQUEST.evolve(extra={"user": "u"}),
            REQUEST.evolve(headers={"X-Version": "2"}),
        ):
            assert call(SYNC, cache, "other", request=other).response.text == "other"
        assert call(SYNC, cache, request=REQUEST.evolve(metadata={"user": "u"})).response.text == "one"
        assert call(SYNC, cache, request=REQUEST.evolve(headers={"x-api-key": "k"})).response.text == "one"

    def test_are_of_the_same_target_alone(self, mode):
        """A request that goes elsewhere has another key."""
        elsewhere = ProviderInfo(name="Other", framework="other")

        class Other:
            info = elsewhere

            def complete(self, request):
                return "other"

            def stream(self, request):
                yield "other"

        cache = Cache()
        other = REQUEST.evolve(target=Target(Other()))
        for _ in range(2):
            assert call(mode, cache, *([] if _ else ["one"])).response.text == "one"
            assert call(mode, cache, request=other).response.text == "other"

    def test_set_what_the_last_answer_was(self, mode):
        """In a call of several turns, the record says it of the last."""
        cache = Cache()
        seen = []

        def twice(request, call_next):
            for text in ("known", "new", "known"):
                response = yield from call_next(request.evolve(messages=text))
                seen.append(request.call.cache_hit)
                if text != "new":
                    yield from emit(Chunk(added=(response.message, Message.user("go on"))))
            return response.evolve(added=())

        call(SYNC, cache, "one", request=REQUEST.evolve(messages="known"))
        if not mode.streaming:
            call(mode, [twice, cache], "two")
            assert seen == [True, False, True]

    def test_are_said(self, mode, caplog):
        """In the log's line of the end."""
        caplog.set_level(logging.INFO, "fluxibly")
        layers = [Logging(), Cache()]
        call(mode, layers, "one")
        assert "cache_hit" not in caplog.text
        call(mode, layers)
        assert "cache_hit=True" in caplog.text

    def test_show_in_traces_and_metrics(self, mode):
        """The span says so and has no tokens of the call, and no token metric counts any."""
        recorder, meters = Recorder(), Meters()
        layers = [Tracing(tracer_provider=recorder.tracer_provider), meters.metrics(), Cache()]
        script = ["Hello", Chunk(usage=USAGE, finish_reason="stop")]
        call(mode, layers, script)
        call(mode, layers)
        first, hit = recorder.exporter.get_finished_spans()
        assert "fluxibly.cache.hit" not in first.attributes
        assert hit.attributes["fluxibly.cache.hit"] is True
        assert hit.attributes["fluxibly.attempts"] == 0
        assert not [key for key in hit.attributes if "usage" in key]
        [tokens] = [
            p for p in meters.points()["gen_ai.client.token.usage"] if p.attributes["gen_ai.token.type"] == "input"
        ]
        assert (tokens.count, tokens.sum) == (1, 3)


class TestPace:
    SCRIPT = (Delay(5), "one ", Delay(2), "two ", Delay(0.5), Chunk("three", finish_reason="stop"))

    def test_of_a_stream(self, stream_mode):
        """It takes the time between chunks, without the wait for the first."""
        cache = Cache(pace=True)
        call(stream_mode, cache, self.SCRIPT)
        hit = call(stream_mode, cache)
        assert hit.clock.sleeps == pytest.approx([2, 0.5])
        assert [chunk.text for chunk in hit.ran.events] == ["one ", "two ", "three"]

    def test_of_a_consumer_that_takes_its_time(self, stream_mode):
        """Its time is part of the pace."""
        cache = Cache(pace=True)
        call(stream_mode, cache, self.SCRIPT)
        clock = VirtualClock()
        provider = scripted(stream_mode)
        run(stream_mode, provider, [cache], REQUEST, clock=clock, watch=lambda _: clock.advance(1))
        assert clock.sleeps == pytest.approx([1])

    def test_of_whole_answers(self, mode):
        """A whole call does not wait, nor does a stream of what came whole, nor one of a cache without a pace."""
        for pace in (True, False):
            cache = Cache(pace=pace)
            call(SYNC_STREAM if not mode.streaming or not pace else SYNC, cache, self.SCRIPT)
            assert call(mode, cache).clock.sleeps == []


class TestWishes:
    def test_to_skip(self, mode):
        """Nothing is read or written."""
        cache = Cache()
        call(mode, cache, "one")
        assert call(mode, cache, "two", request=SKIP).response.text == "two"
        assert not call(mode, cache, "two", request=SKIP).record.cache_hit
        assert call(mode, cache).response.text == "one"

    def test_to_refresh(self, mode):
        """The answer is asked for, and takes the place of the old one."""
        cache = Cache()
        call(mode, cache, "one")
        made = call(mode, cache, "two", request=REFRESH)
        assert (made.response.text, made.response.cache_hit) == ("two", False)
        assert call(mode, cache).response.text == "two"

    @pytest.mark.parametrize("wish", ["no", True, 3, ["skip"]])
    def test_that_are_none(self, mode, wish):
        error = call(mode, Cache(), "one", request=REQUEST.evolve(metadata={"cache": wish})).ran.error
        assert isinstance(error, ValueError)
        assert str(error).startswith("Cache: metadata['cache']: expected 'skip' or 'refresh', got ")

    def test_that_are_not_given(self, mode):
        cache = Cache()
        call(mode, cache, "one", request=REQUEST.evolve(metadata={"cache": None}))
        assert call(mode, cache).response.text == "one"


class TestWhatIsNotKept:
    @pytest.mark.parametrize(
        "script",
        [
            [ServerError("down")],
            ["Hello", ServerError("cut")],
            ["Hello", KeyboardInterrupt()],
            ["Hello", Chunk(finish_reason="content_filter")],
            ["Hello", Chunk(finish_reason="error")],
            [Chunk(finish_reason="stop")],
            [],
        ],
        ids=["failed", "cut", "interrupted", "filtered", "an error", "empty", "nothing"],
    )
    def test_answers(self, mode, script):
        """What is not a whole answer is asked for again."""
        cache = Cache()
        call(mode, cache, script)
        assert call(mode, cache, "good").response.text == "good"
        assert call(mode, cache).response.text == "good"

    def test_streams_that_are_given_up(self, stream_mode):
        for stop_after in (0, 1, 3):
            cache = Cache()
            call(stream_mode, cache, "one two three", stop_after=stop_after)
            assert call(stream_mode, cache, "good").response.text == "good"

    def test_half_an_answer_that_a_layer_saves(self, stream_mode):
        """Though it is returned as an answer."""
        layers = [Cache(), strategies.salvaging("s", [])]
        assert call(stream_mode, layers, ["Hello", ServerError("cut")]).response.text == "Hello"
        assert call(stream_mode, layers, "good").response.text == "good"

    def test_what_a_layer_returns_in_place_of_the_chunks(self, stream_mode):
        """The driver refuses it, and nobody gets it later."""

        def other(request, call_next):
            response = yield from call_next(request)
            return response.evolve(text="Other")

        layers = [Cache(), other]
        assert isinstance(call(stream_mode, layers, "Hello").ran.error, StreamInterrupted)
        assert isinstance(call(stream_mode, layers, "Hello").ran.error, StreamInterrupted)

    def test_answers_that_are_too_large(self, mode):
        cache = Cache(max_bytes=5000)
        call(mode, cache, "x" * 6000)
        assert call(mode, cache, "other").response.text == "other"
        assert call(mode, cache).response.text == "other"
        call(mode, cache, "x" * 6000, request=REFRESH)
        assert call(mode, cache, "new").response.text == "new", "the old answer is no longer right"

    def test_answers_that_cannot_be_copied(self, mode, capsys):
        """It is said once, and the call is as it would be without a cache."""

        class Own:
            def __deepcopy__(self, memo):
                raise TypeError("no copies")

        def parsing(request, call_next):
            response = yield from call_next(request)
            return response.evolve(parsed=Own())

        for _ in range(2):
            assert isinstance(call(mode, [Cache(), parsing], "one").response.parsed, Own)
            streamed = call(mode, Cache(), ["one", Chunk(details={"own": Own()})])
            assert (streamed.ran.error, streamed.response.text) == (None, "one")
        assert capsys.readouterr().err.count("Cache: an answer cannot be kept (TypeError)") == 1

    def test_requests_without_a_key(self, mode, capsys):
        cache = Cache()
        for text in ("one", "two"):
            request = REQUEST.evolve(extra={"x": Fraction(1, 2)})
            assert call(mode, cache, text, request=request).response.text == text
        assert capsys.readouterr().err.count("such requests are not cached") == 1


class TestOtherLayers:
    def test_a_retry_within_that_restarts(self, stream_mode):
        """Only the final answer is kept, with its own chunks."""
        layers = [Cache(), Retry(max_retries=1, on_interrupt="restart")]
        first = call(stream_mode, layers, ["bad ", "x", ServerError("cut")], ["go", "od"], restarts=True)
        assert first.response.text == "good"
        hit = call(stream_mode, layers)
        assert [event.text for event in hit.ran.events] == ["go", "od"]

    def test_a_retry_within_before_output(self, stream_mode):
        """What the failed attempt said of itself is no part of the answer."""
        layers = [Cache(), Retry(max_retries=1)]
        call(stream_mode, layers, [Chunk(model="m-0"), ServerError("no")], ["go", "od", Chunk(finish_reason="stop")])
        hit = call(stream_mode, layers)
        assert answered(hit.ran.events) == hit.response
        assert [event.model for event in hit.ran.events] == [None, None, None]

    def test_a_layer_within_that_answers_by_itself(self, mode, later):
        layers = [Cache(), strategies.filling("f", [])]
        call(mode, layers, [Chunk(finish_reason="stop")])
        hit = call(later, layers)
        assert (hit.response.text, hit.response.cache_hit) == ("nothing ab", True)
        if later.streaming:
            assert answered(hit.ran.events) == hit.response

    def test_one_that_continues_within(self, mode, later):
        layers = [Cache(), powers.going_on()]
        call(mode, layers, ["one ", Chunk(finish_reason="length")], ["two", Chunk(finish_reason="stop")])
        hit = call(later, layers)
        assert hit.response.text == "one two"

    def test_a_hold_back_outside(self, mode, later):
        """It holds what comes from the cache, too."""
        checked = []

        def held(request, call_next):
            return (yield from hold_back(call_next(request), check=checked.append))

        layers = [held, Cache()]
        call(mode, layers, "one two")
        assert call(later, layers).response.text == "one two"
        assert [response.text for response in checked] == ["one two"] * 2

    def test_layers_outside_that_change_chunks(self, mode, later):
        layers = [strategies.shouting("s", []), Cache()]
        assert call(mode, layers, "one two").response.text == "ONE TWO"
        assert call(later, layers).response.text == "ONE TWO"

    def test_a_fallback_within(self, mode, later):
        """The answer says who gave it, though the request is one to the first."""
        other = ProviderInfo(name="Other", framework="other", telemetry_name="the other")

        class Other:
            info = other

            def complete(self, request):
                return "other"

            def stream(self, request):
                yield "other"

        layers = [Cache(), Fallback([Target(Other())])]
        first = call(mode, layers, ServerError("down"))
        hit = call(later, layers)
        assert (first.response.provider, hit.response.provider) == ("the other", "the other")
        assert hit.response.text == "other"

    def test_a_hedge_within_and_outside(self, mode, later):
        """Outside, its two requests do not wait for each other: each is sent."""
        for layers in ([Cache(), Hedge(1, max_share=1.0)], [Hedge(1, max_share=1.0), Cache()]):
            first = call(mode, layers, [Delay(9), "slow"], [Delay(1), "fast"])
            assert first.response.text == "fast"
            assert len(first.provider.requests) == 2
            assert call(later, layers).response.text == "fast"

    def test_two_caches(self, mode, later):
        """The inner one's answer is a hit, and the outer one keeps it too."""
        inner, outer = Cache(), Cache()
        call(mode, [inner], "one")
        made = call(mode, [outer, inner])
        assert (made.response.text, made.record.cache_hit) == ("one", True)
        assert call(later, [outer]).response.text == "one"

    def test_a_failure_before_a_hit(self, stream_mode):
        """An answer from the cache, after a stream that broke, is whole."""

        def twice(request, call_next):
            try:
                return (yield from call_next(request.evolve(messages="new")))
            except StreamInterrupted:
                yield from emit(Chunk(added=(Message.assistant("bad"), Message.user("again"))))
                response = yield from call_next(request)
                return response.evolve(added=(Message.assistant("bad"), Message.user("again")))

        cache = Cache()
        call(SYNC, cache, Response("good", finish_reason="stop"))
        made = call(stream_mode, [Logging(), twice, cache], ["bad", ServerError("cut")])
        assert made.response.text == "good"

    def test_it_keeps_the_laws(self):
        """The laws of middleware hold for it, in all modes."""
        for cache in (Cache(), Cache(ttl=5, max_bytes=9000, namespace="n", pace=True, streams_wait=1.0)):
            check_middleware(cache)


class TestKeys:
    def test_of_a_user(self, mode):
        """Requests with the same text are the same, in the same namespace."""
        cache = Cache(key=lambda request: request.metadata["of"], namespace=lambda request: request.metadata["who"])

        def ask(of, who, *answers):
            request = REQUEST.evolve(messages=f"{of} {who} {answers}", metadata={"of": of, "who": who})
            return call(mode, cache, *answers, request=request).response.text

        assert ask("a", "x", "one") == "one"
        assert ask("a", "x") == "one"
        assert ask("b", "x", "two") == "two"
        assert ask("a", "y", "three") == "three"
        assert ask("a y", "1", "four") == "four"
        assert ask("1 a", "y", "five") == "five"

    @pytest.mark.parametrize("value", [None, 3, "", b"x"])
    @pytest.mark.parametrize("name", ["key", "namespace"])
    def test_that_are_none(self, mode, name, value):
        """A function that gives everybody the same by mistake would mix up tenants."""
        error = call(mode, Cache(**{name: lambda _: value}), "one").ran.error
        assert isinstance(error, TypeError)
        assert str(error).startswith(f"Cache: {name}: expected a non-empty str from its function, got ")

    def test_of_a_namespace(self, mode):
        memory = Cache(namespace="one")
        call(mode, memory, "one")
        assert call(mode, memory).response.text == "one"

    def test_in_yaml(self):
        """A function has the name under which it is registered; a namespace is what it says."""
        register_function("by user", lambda request: request.metadata["user"])
        register_function("literal", lambda request: "never asked")
        settings = {"key": "by user", "namespace": "literal", "ttl": 5, "streams_wait": 2}
        config = LLMConfig(framework="echo", model="m", middleware=[{"cache": settings}, "cache"])
        with LLM(config) as llm:
            first, second = llm.pipeline.middleware
        assert callable(first.key)
        assert (first.namespace, second.store) == ("literal", "memory")
        with pytest.raises(ConfigError, match="function 'unknown' not registered"):
            LLM(LLMConfig(framework="echo", model="m", middleware=[{"cache": {"key": "unknown"}}]))

    def test_of_a_store_that_others_have(self, tmp_path):
        """It needs a namespace, and the error says why and what to write."""
        for store in (f"sqlite:{tmp_path / 'a.db'}", MemoryStore()):
            with pytest.raises(ConfigError) as caught:
                Cache(store)
            for words in ("has no API key", 'namespace="my-app"', 'namespace="shared"', "lambda request"):
                assert words in str(caught.value)

    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ({"ttl": 0}, "Cache: ttl: expected a number above 0, got 0"),
            ({"max_bytes": 1.5}, "Cache: max_bytes: expected a whole number from 1 up, got 1.5"),
            ({"namespace": ""}, "Cache: namespace: expected a non-empty str or a function of the request, got ''"),
            ({"namespace": 3}, "Cache: namespace: expected a str or a function of the request, got 3"),
            ({"pace": 1}, "Cache: pace: expected True or False, got 1"),
            ({"streams_wait": -1}, "Cache: streams_wait: expected a number from 0 up, got -1"),
            ({"key": 3}, "Cache: key: expected a function, got an int"),
        ],
    )
    def test_of_wrong_settings(self, settings, said):
        with pytest.raises(ValueError, match="Cache") as caught:
            Cache(**settings)
        assert str(caught.value) == said

    def test_of_a_store_with_its_own_size(self):
        with pytest.raises(ConfigError, match="max_bytes: expected none with a store of your own"):
            Cache(MemoryStore(), namespace="n", max_bytes=5)

    def test_the_settings_show(self):
        expected = "Cache(store='memory', ttl=5, max_bytes=None, namespace='n', key=None, pace=True, streams_wait=0.0)"
        assert repr(Cache(ttl=5, namespace="n", pace=True)) == expected


class TestMemory:
    def test_is_the_default(self):
        """Also where nothing is given for it, as in other layers."""
        assert Cache(None).store == Cache(store=None).store == Cache().store == "memory"

    def answer(self, length):
        return Answer.of(Response("x" * length), CallRecord(), None)

    @given(
        st.lists(
            st.one_of(
                st.tuples(
                    st.just("save"), st.sampled_from("abcdef"), st.integers(0, 9000), st.none() | st.integers(1, 9)
                ),
                st.tuples(st.just("load"), st.sampled_from("abcdef")),
                st.tuples(st.just("pass"), st.integers(1, 5)),
            ),
            max_size=50,
        )
    )
    @settings(max_examples=60)
    def test_has_what_was_used_last(self, steps):
        """What is over is not given, and never more is kept than may be; a plain model agrees about each."""
        kept, model, now = MemoryAnswers(12_000), OrderedDict(), 0.0
        size_of = {}
        for step, what, *more in steps:
            if step == "save":
                length, seconds = more
                answer = self.answer(length)
                size_of[length] = answer.size + sys.getsizeof(what)
                kept.save(what, answer, seconds, now)
                model.pop(what, None)
                model[what] = (length, math.inf if seconds is None else now + seconds)
                while sum(size_of[length] for length, _ in model.values()) > 12_000:
                    model.popitem(last=False)
                if size_of[length] > 12_000:
                    model.pop(what, None)
            elif step == "load":
                found, expected = kept.load(what, now), model.get(what)
                if expected is None or expected[1] <= now:
                    assert found is None
                else:
                    assert len(found.response.text) == expected[0]
                    model.move_to_end(what)
            else:
                now += what
            assert kept._taken == sum(size for _, _, size in kept._answers.values()) <= 12_000

    def test_ttl(self, mode, later):
        """An answer is kept for so long, from when it came."""
        cache = Cache(ttl=10)
        clock = VirtualClock()

        def ask(mode, *answers):
            return run(mode, scripted(mode, *answers, clock=clock), [cache], REQUEST, clock=clock).response

        ask(mode, [Delay(5), "one"])
        clock.advance(9.5)
        assert ask(later).text == "one"
        clock.advance(0.5)
        assert ask(later, "two").text == "two"

    def test_is_measured(self):
        """What an answer takes is near what it is said to take."""

        def answers():
            for number in range(60):
                yield (
                    number,
                    Response(
                        f"{number:05} " * 500,
                        tool_calls=[ToolCall("c", "look", {"at": ["x" * 100] * 10})],
                        details={"sources": [{"url": f"https://x.test/{number}/{n}"} for n in range(20)]},
                    ),
                )

        tracemalloc.start()
        kept = MemoryAnswers(10**9)
        before = tracemalloc.get_traced_memory()[0]
        for number, response in answers():
            kept.save(f"{number}", Answer.of(response, CallRecord(), None), None, 0.0)
        taken = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        assert 0.5 < kept._taken / taken < 2


def test_errors_pass(mode):
    """An error is that of the provider, and the next call asks again."""
    cache = Cache()
    error = call(mode, cache, ServerError("down")).ran.error
    assert isinstance(root_cause(error), ServerError)
    assert call(mode, cache, "fine").response.text == "fine"
