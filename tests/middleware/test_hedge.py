"""`Hedge`: when a further request goes out, who wins, what is learned and what is limited, in all modes."""

from __future__ import annotations

import math
import re
import threading

import anyio
import pytest
from hypothesis import given, strategies as st
from support.calling import REQUEST, scripted
from support.leftovers import eventually
from support.misbehaving import serve
from support.tiny import DONE, SERVICE, TinyCodec, config, event
from support.tracing_tools import Recorder

from fluxibly import LLM, LLMConfig
from fluxibly.errors import BadRequest, ConfigError, ServerError, StreamInterrupted
from fluxibly.flow import sleep
from fluxibly.middleware import Hedge, Retry
from fluxibly.middleware.hedge import LEAST, MODELS, RECENT, SAMPLES, _Shares, _Times
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.providers.http import AsyncHTTPProvider, HTTPProvider
from fluxibly.testing import Delay, ScriptedProvider, VirtualClock, check_middleware
from fluxibly.testing.modes import BACKENDS, MODES, run, run_async
from fluxibly.types import Chunk

STREAMS = [mode for mode in MODES if mode.streaming]


@pytest.fixture(params=MODES, ids=str)
def mode(request):
    return request.param


@pytest.fixture(params=STREAMS, ids=str)
def stream_mode(request):
    return request.param


def after(seconds, *steps):
    return [Delay(seconds), *steps]


class Calls:
    """Calls in a mode through one stack, in virtual time."""

    def __init__(self, mode, stack, *answers):
        self.mode = mode
        self.stack = stack if isinstance(stack, list) else [stack]
        self.clock = VirtualClock()
        self.provider = scripted(mode, *answers, clock=self.clock)

    def make(self, request=REQUEST, **options):
        """Make a call. Return its text, the seconds that it took, and the number of its requests."""
        before, begun = len(self.provider.requests), self.clock.now()
        self.ran = run(self.mode, self.provider, self.stack, request, clock=self.clock, **options)
        assert self.provider.opened == self.provider.closed
        text = None if self.ran.response is None else self.ran.response.text
        return self.ran.error or text, self.clock.now() - begun, len(self.provider.requests) - before

    @property
    def models(self):
        return [asked.model for asked in self.provider.requests]


def make(mode, stack, *answers, **options):
    """Make one call."""
    calls = Calls(mode, stack, *answers)
    calls.made = calls.make(**options)
    return calls


class TestSeconds:
    def test_an_answer_in_time(self, mode):
        """Needs no other request."""
        assert make(mode, Hedge(2), after(1.9, "one")).made == ("one", 1.9, 1)

    def test_a_late_answer(self, mode):
        """The same request goes out again, and the first answer wins."""
        calls = make(mode, Hedge(2), after(9, "slow"), after(1, "fast"))
        assert calls.made == ("fast", 3, 2)
        assert calls.models == ["m-1", "m-1"]

    def test_the_first_may_still_win(self, mode):
        """Though another was sent."""
        assert make(mode, Hedge(2), after(3, "one"), after(5, "two")).made == ("one", 3, 2)

    def test_other_targets_in_turn(self, mode):
        """The further requests go there, in their order, and begin again."""
        hedge = Hedge(1, to=["m-2", "m-3"], at_most=3, max_share=1)
        calls = make(mode, hedge, *[after(9, "late")] * 3, after(1, "fast"))
        assert calls.made == ("fast", 4, 4)
        assert calls.models == ["m-1", "m-2", "m-3", "m-2"]

    def test_first_output_wins(self, stream_mode):
        """And not the first chunk, nor the end."""
        first = [Chunk(model="x"), Delay(9), "slow"]
        calls = make(stream_mode, Hedge(2), first, after(1, "fa", Delay(50), "st"))
        assert calls.made == ("fast", 53, 2)

    def test_what_an_inner_layer_waits_counts(self, mode):
        """As in a queue, which the loser leaves."""
        left = []

        def queue(request, call_next):
            try:
                yield from sleep(5 if not left and request.model == "m-1" else 0)
            finally:
                left.append(request.model)
            return (yield from call_next(request))

        calls = make(mode, [Hedge(2, to="m-2"), queue], "one", "two")
        assert calls.made[1] == 2
        assert calls.models == ["m-2"]
        assert sorted(left) == ["m-1", "m-2"]


class TestFailures:
    def test_a_failure_sends_nothing(self, mode):
        """That is for Retry and Fallback."""
        error = BadRequest("no")
        calls = make(mode, Hedge(2, at_most=3, max_share=1), after(1, error), "never")
        assert calls.made == (error, 1, 1)

    def test_a_failure_while_another_is_under_way(self, mode):
        """That one may still answer."""
        calls = make(mode, Hedge(2), after(3, ServerError("down")), after(3, "fine"))
        assert calls.made == ("fine", 5, 2)

    def test_all_fail(self, mode):
        """The error of the first is raised, whichever came first."""
        first = ServerError("first")
        calls = make(mode, Hedge(2), after(9, first), after(1, ServerError("second")))
        assert calls.made == (first, 9, 2)

    def test_a_further_request_that_fails(self, mode):
        """The next follows at its time, and not at once."""
        hedge = Hedge(2, at_most=2, max_share=1)
        calls = make(mode, hedge, after(9, "late"), ServerError("down"), after(1, "fast"))
        assert calls.made == ("fast", 5, 3)

    def test_all_that_were_sent_have_failed(self, mode):
        """No further request goes out."""
        first = ServerError("first")
        hedge = Hedge(2, at_most=2, max_share=1)
        calls = make(mode, hedge, after(3, first), after(0.5, ServerError("second")), "never")
        assert calls.made == (first, 3, 2)

    def test_a_retry_inside(self, mode):
        """Each request has its own retries, and what they wait counts."""
        retry = Retry(max_retries=1, base_delay=4, uniform=max)
        calls = make(mode, [Hedge(2), retry], ServerError("down"), after(1, "fast"))
        assert calls.made == ("fast", 3, 2)

    def test_an_interruption_after_output(self, stream_mode):
        """Is the winner's, and nothing is sent again."""
        calls = make(stream_mode, Hedge(2), ["a", Delay(5), ServerError("down")])
        assert isinstance(calls.made[0], StreamInterrupted)
        assert calls.made[2] == 1

    def test_a_target_that_cannot_be_made(self, mode, monkeypatch, caplog):
        """Is logged, and the first goes on."""
        monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
        assert make(mode, Hedge(2, to="anthropic:x"), after(3, "one")).made == ("one", 3, 1)
        (record,) = caplog.records
        assert record.decision == "does not ask x at anthropic, which cannot be asked: AuthenticationError"


class TestPercentiles:
    def test_nothing_before_enough_samples(self, mode):
        """Then the percentile of the times so far."""
        calls = Calls(mode, Hedge("p95"), *[after(n / 10, "fine") for n in range(1, LEAST + 1)])
        for n in range(1, LEAST + 1):
            text, seconds, requests = calls.make()
            assert (text, requests) == ("fine", 1)
            assert math.isclose(seconds, n / 10)
        calls.provider._answers.extend([after(99, "slow"), after(0.5, "fast")])
        text, seconds, requests = calls.make()
        assert (text, requests) == ("fast", 2)
        assert math.isclose(seconds, 1.9 + 0.5)

    def test_times_are_of_a_provider_and_model(self, mode):
        """What one model takes says nothing about another."""
        calls = Calls(mode, Hedge("p50"), *["fine"] * LEAST, after(9, "late"))
        for _ in range(LEAST):
            calls.make()
        assert calls.make(REQUEST.evolve(model="other")) == ("late", 9, 1)

    def test_whole_and_streamed_apart(self):
        """First output of a stream, the end of a whole answer."""
        hedge = Hedge("p50")
        clock = VirtualClock()
        provider = ScriptedProvider(*[after(1, "a", Delay(4), "b")] * 2 * LEAST, clock=clock)
        pipeline = Pipeline(provider, [hedge], clock=clock)
        for _ in range(LEAST):
            assert pipeline.complete(REQUEST).text == "ab"
            clock.advance(3)
            stream = pipeline.stream(REQUEST)
            clock.advance(7)  # the consumer's time, before it asks for anything
            for _ in stream:
                clock.advance(5)
        (key,) = hedge._times._samples[0]
        assert hedge._times.percentile(key, streaming=False) == 5
        assert hedge._times.percentile(key, streaming=True) == 1

    def test_the_time_of_a_loser_counts(self, mode):
        """Or the times of the quick ones alone would make the percentile smaller and smaller."""
        hedge = Hedge("p50", max_share=1)
        calls = Calls(mode, hedge, *[after(1, "fine")] * LEAST, *[after(9, "slow"), after(0.5, "fast")] * LEAST)
        for _ in range(2 * LEAST):
            calls.make()
        (sample,) = hedge._times._samples[mode.streaming].values()
        assert [*sample.seconds].count(0.5) == LEAST
        assert sum(math.isclose(seconds, 1.5) for seconds in sample.seconds) == LEAST

    def test_failures_and_calls_that_are_left_teach_nothing(self, mode):
        """An error is often quick."""
        hedge = Hedge("p50")
        calls = Calls(mode, hedge, ServerError("down"), *[[Chunk(model="x"), "one two"]] * 2)
        calls.make()
        if mode.streaming:
            calls.make(stop_after=0)
            calls.make(stop_after=1)
        assert hedge._times._samples == ({}, {})

    @given(st.lists(st.floats(0.01, 1e6), min_size=LEAST, max_size=3 * SAMPLES), st.integers(50, 99))
    def test_the_percentile(self, seconds, percent):
        """Is one of the last times, as many of which are below it as it says, at the last time that it was computed."""
        times = _Times(percent)
        for each in seconds:
            times.add("k", each, streaming=False)
        computed = len(seconds) - len(seconds) % LEAST
        last = sorted(seconds[max(0, computed - SAMPLES) : computed])
        value = times.percentile("k", streaming=False)
        assert value == last[math.ceil(percent / 100 * len(last)) - 1]
        assert times.percentile("k", streaming=True) is None

    def test_memory_is_bounded(self):
        """Whatever models the requests name: the oldest are forgotten."""
        times = _Times(50)
        for n in range(3 * MODELS):
            times.add(f"k{n}", 1.0, streaming=False)
        assert len(times._samples[0]) == MODELS
        for _ in range(9 * SAMPLES):
            times.add("k", 1.0, streaming=False)
        assert len(times._samples[0]["k"].seconds) == SAMPLES


class TestShare:
    def test_a_tenth_of_the_calls(self, mode):
        """The first is always allowed, then the share of the calls so far."""
        late = [after(9, "slow"), after(1, "fast")]
        calls = Calls(mode, Hedge(2), *late, *[after(3, "one")] * 18, *late, after(3, "one"))
        assert [calls.make()[2] for _ in range(21)] == [2, *[1] * 18, 2, 1]

    @pytest.mark.parametrize("share", [0, 0.05, 0.5, 1])
    def test_never_more(self, share):
        """In any hundred calls in a row, except for the first."""
        shares = _Shares(share)
        sent = []
        for _ in range(1000):
            shares.begin()
            sent.append(shares.take())
        most = max(sum(sent[n : n + RECENT]) for n in range(1000 - RECENT))
        assert most == max(1, share * RECENT)

    def test_it_is_told(self, mode, caplog):
        """Once for each request that is not sent."""
        caplog.set_level("DEBUG", "fluxibly")
        calls = Calls(mode, Hedge(2), after(9, "slow"), after(1, "fast"), after(3, "one"))
        calls.make()
        assert calls.make() == ("one", 3, 1)
        assert [record.decision for record in caplog.records] == [
            "asks m-1 at scripted, too, because nothing has come in 2 s",
            "takes the answer of m-1 at scripted",
            "sends no other request, though nothing has come in 2 s: 10% of the last 100 calls had one",
        ]

    def test_a_refused_request_leaves_the_error_of_the_first(self, mode):
        """Nobody sees that another was not sent."""
        error = ServerError("down")
        calls = Calls(mode, Hedge(2), after(9, "slow"), after(1, "fast"), after(3, error))
        calls.make()
        assert calls.make() == (error, 3, 1)
        assert not hasattr(error, "__notes__")


def test_the_trace_names_who_answered(mode):
    """The call's span has the decisions, and each attempt has its own."""
    recorder = Recorder()
    calls = make(mode, [recorder.tracing(), Hedge(2, to="m-2")], after(9, "slow"), after(1, Chunk("fast", model="m-2")))
    assert calls.ran.response.model == "m-2"
    assert recorder.call.attributes["gen_ai.response.model"] == "m-2"
    assert [each.attributes["fluxibly.attempt.model"] for each in recorder.attempts] == ["m-1", "m-2"]
    assert [event.attributes["fluxibly.decision.what"] for event in recorder.call.events] == [
        "asks m-2 at scripted, too, because nothing has come in 2 s",
        "takes the answer of m-2 at scripted",
    ]


def test_many_threads():
    """100 at once share the times and the share, and lose none."""
    hedge = Hedge("p50")

    class Fine:
        def complete(self, request):
            return "fine"

    pipeline = Pipeline(Fine(), [hedge])
    threads = [threading.Thread(target=pipeline.complete, args=(REQUEST,)) for _ in range(LEAST - 1)]
    shared = _Shares(0.5)
    taken = []

    def take():
        for _ in range(100):
            shared.begin()
            taken.append(shared.take())

    threads += [threading.Thread(target=take) for _ in range(80)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    (sample,) = hedge._times._samples[0].values()
    assert (len(sample.seconds), sample.left) == (LEAST - 1, 1)
    assert len(taken) == 8000
    assert shared._sum == sum(shared._recent) <= RECENT / 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_tasks(backend):
    """1,000 calls at once, each slow: at most a tenth of them sends another request."""
    hedge = Hedge(0.05)
    asked = 0

    class Slow:
        async def complete(self, request):
            nonlocal asked
            asked += 1
            await anyio.sleep(0.3)
            return "fine"

    async def main():
        pipeline = AsyncPipeline(Slow(), [hedge])
        async with anyio.create_task_group() as group:
            for _ in range(1000):
                group.start_soon(pipeline.complete, REQUEST)

    anyio.run(main, backend=backend)
    assert 1000 < asked <= 1000 + RECENT * 0.1 + 1
    assert hedge._shares._sum == sum(hedge._shares._recent)


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "problem"),
        [
            ({"after": 0}, "Hedge: after: expected a number of seconds above 0, got 0"),
            ({"after": math.inf}, "Hedge: after: expected a number of seconds above 0, got inf"),
            ({"after": "p49"}, 'Hedge: after: expected seconds, or one of "p50" to "p99", got \'p49\''),
            ({"after": "2s"}, 'Hedge: after: expected seconds, or one of "p50" to "p99", got \'2s\''),
            ({"after": None}, "Hedge: after: expected a number of seconds above 0, got None"),
            ({"after": 2, "to": []}, "to: expected at least one target, got none"),
            ({"after": 2, "at_most": 0}, "Hedge: at_most: expected a whole number from 1 to 100, got 0"),
            ({"after": 2, "at_most": 10**9}, "Hedge: at_most: expected a whole number from 1 to 100, got 1000000000"),
            ({"after": 2, "max_share": 1.1}, "Hedge: max_share: expected a number from 0 to 1, got 1.1"),
        ],
        ids=str,
    )
    def test_bad_settings(self, settings, problem):
        """The error names the setting."""
        with pytest.raises(ValueError, match=re.escape(problem)):
            Hedge(**settings)

    def test_in_a_file(self, tmp_path):
        """All problems at once."""
        file = tmp_path / "framework.yaml"
        head = "llm:\n  framework: echo\n  model: m\n  middleware:\n"
        file.write_text(f"{head}    - hedge: {{after: p95, to: [m-2], at_most: 2, max_share: 0.2}}\n")
        with LLM.from_yaml(file) as llm:
            assert repr(llm.pipeline.middleware[0]) == (
                "Hedge(after='p95', to=(Target('m-2'),), at_most=2, max_share=0.2)"
            )
        file.write_text(f"{head}    - hedge: {{after: p100, to: [], at_most: 0, max_share: 2}}\n")
        with pytest.raises(ConfigError) as caught:
            LLM.from_yaml(file)
        path = "llm.middleware[0].hedge"
        assert caught.value.problems == (
            f'{path}.after: expected seconds, or one of "p50" to "p99", got \'p100\'',
            f"{path}.to: expected at least one target, got none",
            f"{path}.at_most: expected a whole number from 1 to 100, got 0",
            f"{path}.max_share: expected a number from 0 to 1, got 2",
        )

    @pytest.mark.parametrize(
        "hedge",
        [Hedge(2), Hedge("p50"), Hedge(0.5, to=["m-2"], at_most=3, max_share=1)],
        ids=lambda each: f"{each}"[:9],
    )
    def test_it_keeps_the_laws(self, hedge):
        """In all modes, and also once it has learned something."""
        check_middleware(hedge)
        check_middleware(hedge)

    def test_its_targets_are_checked_early(self):
        """When the LLM is made."""
        with pytest.raises(ConfigError, match=r"Hedge\.targets\[0\]: anthropic needs an API key"):
            LLM(LLMConfig(framework="echo", model="m"), [Hedge(2, to="anthropic:claude-x")])
        assert Hedge(2).targets == ()


class TestOverHTTP:
    def ask(self, mode, url, hedge):
        kind = AsyncHTTPProvider if mode.backend else HTTPProvider
        provider = kind(TinyCodec(), SERVICE, config(url))

        def go():
            with Pipeline(provider, [hedge]) as pipeline:
                if not mode.streaming:
                    return pipeline.complete(REQUEST).text
                with pipeline.stream(REQUEST) as stream:
                    return "".join([chunk.text for chunk in stream])

        async def ago():
            async with AsyncPipeline(provider, [hedge]) as pipeline:
                if not mode.streaming:
                    return (await pipeline.complete(REQUEST)).text
                async with pipeline.stream(REQUEST) as stream:
                    return "".join([chunk.text async for chunk in stream])

        return go() if mode.backend is None else run_async(ago, mode.backend)

    @staticmethod
    def answer(peer, request, text):
        if not request.json["stream"]:
            peer.answer({"text": text})
            return
        peer.begin_stream()
        for piece in (event(text), DONE, ""):
            peer.chunk(piece)

    def test_a_server_that_hangs_once(self, mode):
        """The second request wins, and the connection of the first is closed at once."""
        ended = threading.Event()

        def script(peer, request):
            if len(peer.server.requests) == 1:
                peer.wait_for_end()
                ended.set()
            else:
                self.answer(peer, request, "second")

        with serve(script) as server:
            assert self.ask(mode, server.url, Hedge(0.05)) == "second"
            eventually(ended.is_set)
            assert len(server.requests) == 2

    def test_a_server_that_refuses(self, mode):
        """Gets one request only."""
        with serve(lambda peer, _: peer.answer("no", status="500 Down")) as server:
            with pytest.raises(ServerError):
                self.ask(mode, server.url, Hedge(5))
            assert len(server.requests) == 1
