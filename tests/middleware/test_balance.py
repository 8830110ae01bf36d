"""`Balance`: who is asked, who rests, and what goes on after a failure, in all modes."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
import threading
import weakref
from collections import Counter
from contextlib import suppress

import anyio
import pytest
from hypothesis import given, strategies as st
from support.calling import REQUEST, call, scripted
from support.misbehaving import serve
from support.tiny import SERVICE, TinyCodec, config, whole
from support.tracing_tools import Recorder

from fluxibly import LLM, LLMConfig, register_function
from fluxibly.errors import (
    BadRequest,
    CircuitOpen,
    ConfigError,
    ContextLengthExceeded,
    DeadlineExceeded,
    RateLimitError,
    RateLimitWait,
    ServerError,
    StreamInterrupted,
)
from fluxibly.middleware import Balance, Deadline, Fallback, RateLimit
from fluxibly.middleware.balance import EXPLORE, _in_turn, _Load, _Place
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.providers.http import HTTPProvider
from fluxibly.target import Target
from fluxibly.testing import Delay, ScriptedProvider, VirtualClock, check_middleware
from fluxibly.testing.modes import BACKENDS, Mode, run

WHOLE = Mode(streaming=False)


class Calls:
    """Calls in a mode through one `Balance`, to models "a", "b", … of one provider, in virtual time."""

    def __init__(self, mode, balance, *answers):
        self.mode = mode
        self.balance = balance
        self.clock = VirtualClock()
        self.provider = scripted(mode, *answers, clock=self.clock)

    def make(self, request=REQUEST, stack=(), **options):
        """Make a call, and return the models that it asked."""
        before = len(self.provider.requests)
        self.ran = run(self.mode, self.provider, [*stack, self.balance], request, clock=self.clock, **options)
        return "".join([asked.model for asked in self.provider.requests[before:]])

    def several(self, count, request=REQUEST):
        return "".join([self.make(request) for _ in range(count)])


def down():
    return ServerError("down")


class TestPolicies:
    def test_in_turn(self, mode):
        """Each target has its share at any time."""
        calls = Calls(mode, Balance([*"abc"], policy="round_robin"), *["fine"] * 6)
        assert calls.several(6) == "abcabc"

    def test_in_turn_by_weight(self, mode):
        """Evenly spread, and not five times the same in a row."""
        calls = Calls(mode, Balance([*"ab"], policy="round_robin", weights=[3, 1]), *["fine"] * 8)
        assert calls.several(8) in {"aabaaaba", "abaaabaa", "aaabaaab"}

    @given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=7), st.integers(1, 200))
    def test_shares(self, weights, calls):
        """After any number of calls, each has had its share by less than one."""
        places = [_Place(n, "", weight) for n, weight in enumerate(weights)]
        counts = Counter(_in_turn(places).index for _ in range(calls))
        for n, weight in enumerate(weights):
            assert abs(counts[n] - calls * weight / sum(weights)) < 1

    def test_by_chance(self, mode):
        """By weight."""
        calls = Calls(mode, Balance([*"ab"], policy="random", weights=[4, 1]), *["fine"] * 200)
        counts = Counter(calls.several(200))
        assert 120 < counts["a"] < 195

    def test_the_least_busy(self):
        """Streams that are being read count until they have ended; among equals, in turn."""
        balance = Balance([*"ab"])
        provider = ScriptedProvider(*["one two"] * 9)
        pipeline = Pipeline(provider, [balance])

        def begin():
            stream = pipeline.stream(REQUEST)
            next(stream)
            return stream

        streams = [begin() for _ in range(4)]
        models = [asked.model for asked in provider.requests]
        assert sorted(models) == ["a", "a", "b", "b"]
        for stream, model in zip(streams, models, strict=True):
            if model == "b":
                stream.close()
        streams += [begin(), begin()]
        assert [asked.model for asked in provider.requests[4:]] == ["b", "b"]
        for stream in streams:
            stream.close()
        assert busy(balance) == [0, 0]

    def test_the_least_busy_by_weight(self):
        """Three times as many calls are under way at the target of weight 3."""
        load = _Load([Target("a"), Target("b")], [3, 1], "least_busy")
        asked = Counter(load.begin(0, (), streaming=False).place for _ in range(400))
        assert asked == {0: 300, 1: 100}

    @pytest.mark.parametrize("how", ["end", "close", "drop", "unread", "error", "fail"])
    def test_a_stream_is_counted_until_it_ends(self, how):
        """However it ends."""
        balance = Balance([*"ab"])
        provider = ScriptedProvider(["one", "two", *([down()] if how == "fail" else [])])
        stream = Pipeline(provider, [balance]).stream(REQUEST)
        assert sum(busy(balance)) == 1
        if how == "end":
            list(stream)
        elif how in {"close", "drop", "error"}:
            next(stream)
            assert sum(busy(balance)) == 1
        if how == "fail":
            with pytest.raises(StreamInterrupted):
                list(stream)
        elif how == "drop":
            del stream
            gc.collect()
        elif how == "error":
            with suppress(LookupError), stream:
                raise LookupError
        elif how in {"close", "unread"}:
            stream.close()
        assert busy(balance) == [0, 0]

    def test_the_fastest(self, mode):
        """Those of which nothing is known are asked first, then that which answers soonest."""
        calls = Calls(
            mode, Balance([*"abc"], policy="fastest"), *[[Delay(n), "fine"] for n in (3, 1, 2)], *["fine"] * 9
        )
        assert sorted(calls.several(3)) == ["a", "b", "c"]
        soonest = calls.provider.requests[1].model
        assert calls.several(5) == soonest * 5

    def test_the_first_output_counts(self, stream_mode):
        """And neither the rest of the stream nor the time of the consumer."""
        slow_start = [Delay(2), "one ", "two"]
        slow_end = [Delay(1), "one ", Delay(9), "two"]
        calls = Calls(stream_mode, Balance([*"ab"], policy="fastest"), slow_start, slow_end, slow_end)
        asked = calls.several(2)
        assert calls.make(watch=lambda _: calls.clock.advance(50)) == asked[1]

    def test_whole_and_streamed_apart(self):
        """A long answer that begins soon is fast in a stream alone."""
        load = _Load([Target("a"), Target("b")], None, "fastest")
        for place, whole_answer, first_output in ((0, 9.0, 1.0), (1, 5.0, 2.0)):
            for streaming, seconds in ((False, whole_answer), (True, first_output)):
                turn = load.begin(0, {1 - place}, streaming=streaming)
                load.answered(turn, seconds, 0.0)
                load.end(turn)
        assert load.begin(0, (), streaming=False).place == 1
        assert load.begin(0, (), streaming=True).place == 0

    def test_one_that_was_slow_is_found_again(self):
        """Now and then another is asked."""
        load = _Load([Target("a"), Target("b")], None, "fastest")
        seconds = [9.0, 1.0]

        def ask():
            turn = load.begin(0, (), streaming=False)
            load.answered(turn, seconds[turn.place], 0.0)
            load.end(turn)
            return turn.place

        asked = [ask() for _ in range(EXPLORE - 1)]
        assert asked.count(0) == 1
        assert ask() == 0
        seconds[0] = 0.1
        assert [ask() for _ in range(20 * EXPLORE)][-EXPLORE // 2 :].count(0) >= EXPLORE // 2 - 1

    def test_one_that_hangs_is_not_the_fastest(self):
        """What a call has waited so far counts, also where nothing else is known."""
        load = _Load([Target("a"), Target("b")], None, "fastest")
        for _ in range(2):
            turn = load.begin(0.0, (), streaming=True)
            if turn.place == 1:
                load.answered(turn, 2.0, 0.0)
        assert load.begin(1.0, (), streaming=True).place == 0
        assert load.begin(3.0, (), streaming=True).place == 1

    def test_the_fastest_at_once(self):
        """A burst of calls, of which none is answered yet, is spread."""
        load = _Load([Target("a"), Target("b")], None, "fastest")
        asked = Counter(load.begin(0.0, (), streaming=True).place for _ in range(EXPLORE - 2))
        assert asked[0] == asked[1]


def busy(balance):
    """Return the calls under way at each target."""
    return [place.busy for place in balance._load.places]


class TestRests:
    @pytest.mark.parametrize(
        ("error", "rest"),
        [
            (ServerError("down"), 30),
            (RateLimitError("slow"), 30),
            (RateLimitError("slow", retry_after=7), 7),
            (CircuitOpen("open", retry_after=90), 90),
            (RateLimitError("slow", retry_after=86_400), 86_400),
            (RateLimitError("slow", retry_after=86_401), 30),
            (ServerError("down", retry_after=-1), 30),
            (ServerError("down", retry_after=float("nan")), 30),
            (ServerError("down", retry_after=float("inf")), 30),
        ],
        ids=lambda value: f"{value!r}"[:40],
    )
    def test_a_target_that_fails_rests(self, mode, error, rest):
        """For `cool_down` seconds, or what the service asks for. The call goes on with another."""
        calls = Calls(mode, Balance([*"ab"], policy="round_robin"), error, *["fine"] * 20)
        assert calls.make() == "ab"
        assert calls.ran.response.text == "fine"
        assert calls.several(4) == "bbbb"
        calls.clock.advance(rest - 0.1)
        assert calls.make() == "b"
        calls.clock.advance(0.2)
        assert "a" in calls.several(2)

    def test_a_stream_that_fails_after_output(self, stream_mode):
        """Its target rests, but the call cannot go on."""
        calls = Calls(stream_mode, Balance([*"ab"], policy="round_robin"), ["Hel", down()], *["fine"] * 9)
        assert calls.make() == "a"
        assert isinstance(calls.ran.error, StreamInterrupted)
        assert calls.several(3) == "bbb"

    @pytest.mark.parametrize("error", [BadRequest("no"), ValueError("no"), DeadlineExceeded("late")], ids=repr)
    def test_other_errors(self, mode, error):
        """They say nothing about the target, and are raised."""
        calls = Calls(mode, Balance([*"ab"], policy="round_robin"), error, *["fine"] * 2)
        assert calls.make() == "a"
        assert calls.ran.error is error
        assert calls.several(2) == "ba"

    def test_a_wait_that_is_too_long(self, mode):
        """A target whose limit leaves no time rests until it does, and another is asked."""
        stack = [Balance([*"ab"], policy="round_robin"), RateLimit(requests=1)]
        made = call(mode, stack, *["fine"] * 3)
        for expected in (type(None), RateLimitWait):
            ran = run(mode, made.provider, [Deadline(5), *stack], REQUEST, clock=made.clock)
            assert type(ran.error) is expected
        assert [place.rests_until for place in stack[0]._load.places] == [60, 60]

    def test_a_prompt_that_is_too_long(self, mode):
        """Another target may take it, but the first is fine for others."""
        calls = Calls(mode, Balance([*"ab"], policy="round_robin"), ContextLengthExceeded("long"), *["fine"] * 3)
        assert calls.make() == "ab"
        assert "a" in calls.several(2)

    def test_all_rest(self, mode):
        """The one whose rest ends first is asked, and is awake again if it answers."""
        errors = [RateLimitError("slow", retry_after=seconds) for seconds in (50, 20, 90)]
        calls = Calls(mode, Balance([*"abc"], policy="round_robin"), *errors, *["fine"] * 9)
        assert calls.make() == "abc"
        assert calls.several(3) == "bbb"

    def test_all_fail(self, mode):
        """Each is asked once; the last error is raised, with a note for each failure."""
        errors = [ServerError(str(n)) for n in range(3)]
        calls = Calls(mode, Balance([*"abc"], policy="round_robin"), *errors)
        assert calls.make() == "abc"
        assert calls.ran.error is errors[-1]
        assert calls.ran.error.__notes__ == [
            f"Balance: {model} at scripted failed with ServerError: {n}" for n, model in enumerate("abc")
        ]

    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize("most", [1, 2], ids=["another answers", "all fail"])
    def test_no_cycles(self, streaming, most):
        """An error refers to the frames that it went through, so none of them may keep it."""
        errors = []

        class Down(ServerError):
            def __init__(self):
                super().__init__("down")
                errors.append(weakref.ref(self))

        class Failing:
            def complete(self, request):
                if len(errors) == most:
                    return "fine"
                raise Down

            def stream(self, request):
                yield self.complete(request)

        pipeline = Pipeline(Failing(), [Balance([*"ab"])])
        gc.collect()
        gc.disable()
        try:
            with suppress(ServerError):
                list(pipeline.stream(REQUEST)) if streaming else pipeline.complete(REQUEST)
            assert [error() for error in errors] == [None] * most
        finally:
            gc.enable()

    def test_no_time_is_left(self, mode):
        """Nothing is sent after the deadline."""

        def slow(request, call_next):
            try:
                return (yield from call_next(request))
            except ServerError:
                calls.clock.advance(9)
                raise

        calls = Calls(mode, Balance([*"ab"], policy="round_robin"), down(), "late")
        calls.ran = run(mode, calls.provider, [Deadline(5), calls.balance, slow], REQUEST, clock=calls.clock)
        assert isinstance(calls.ran.error, DeadlineExceeded)
        assert len(calls.provider.requests) == 1

    def test_a_target_that_cannot_be_made(self, mode, caplog, monkeypatch):
        """Is skipped, and rests."""
        monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
        calls = Calls(mode, Balance(["anthropic:x", "b"], policy="round_robin"), *["fine"] * 2)
        assert calls.several(2) == "bb"
        assert [record.decision for record in caplog.records if record.levelname == "WARNING"] == [
            "lets x at anthropic rest for 30 s after AuthenticationError",
            "skips x at anthropic, which cannot be asked: AuthenticationError",
        ]

    def test_a_fallback_inside(self, mode):
        """Another model of whoever was chosen."""
        other = scripted(mode, down(), "fine")
        balance = Balance([Target(other, model="o-1")])
        ran = run(mode, scripted(mode), [balance, Fallback("o-2")], REQUEST)
        assert ran.response.text == "fine"
        assert [asked.model for asked in other.requests] == ["o-1", "o-2"]

    def test_a_fallback_outside(self, mode):
        """Its targets are asked themselves, and not spread over those of `Balance`."""
        other = scripted(mode, "fine")
        calls = Calls(mode, Balance([*"ab"], policy="round_robin"), down(), down())
        assert calls.make(stack=[Fallback([Target(other, model="o")])]) == "ab"
        assert calls.ran.response.text == "fine"
        assert [asked.model for asked in other.requests] == ["o"]


class TestTold:
    def test_the_log_says_who_rests_and_who_is_asked(self, mode, caplog):
        """The failure as a warning, with its error."""
        caplog.set_level("DEBUG", "fluxibly")
        Calls(mode, Balance([*"ab"], policy="round_robin"), down(), "fine").make()
        rests = 'LLM call decision | middleware=Balance, decision="lets a at scripted rest for 30 s after ServerError"'
        assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
            ("WARNING", f'{rests}, error_type=ServerError, error_message="down"'),
            ("DEBUG", 'LLM call decision | middleware=Balance, decision="asks b at scripted"'),
        ]

    def test_the_trace_names_who_answered(self, mode):
        """And has the decisions."""
        recorder = Recorder()
        calls = Calls(mode, Balance([*"ab"], policy="round_robin"), down(), "fine")
        calls.make(stack=[recorder.tracing()])
        assert calls.ran.response.provider == "scripted"
        assert recorder.call.attributes["gen_ai.response.model"] == "b"
        assert [event.attributes["fluxibly.decision.what"] for event in recorder.call.events] == [
            "lets a at scripted rest for 30 s after ServerError",
            "asks b at scripted",
        ]


class TestSticky:
    BY_USER = staticmethod(lambda request: request.metadata.get("user"))

    def asked(self, targets, users, weights=None):
        """Return the target that each user's calls ask."""
        load = _Load([Target(each) for each in targets], weights, "least_busy")
        return {user: targets[load.begin(0, (), streaming=False, key=user).place] for user in users}

    def test_a_user_stays(self, mode):
        """With the same target, though others are less busy; calls without a key are spread."""
        calls = Calls(mode, Balance([*"abc"], policy="round_robin", by=self.BY_USER), *["fine"] * 20)
        for user in ("one", "two", 3):
            assert len({calls.make(REQUEST.evolve(metadata={"user": user})) for _ in range(3)}) == 1
        assert calls.several(3) in {"abc", "bca", "cab"}

    @pytest.mark.parametrize("key", [object(), (_ for _ in ())], ids=["an object", "a generator"])
    def test_a_key_that_is_none(self, mode, key):
        """Its text is another for each call and in each process."""
        calls = Calls(mode, Balance([*"ab"], by=lambda request: key), "never")
        assert calls.make() == ""
        assert str(calls.ran.error).startswith("by: expected a key from its function, such as a str or a number, got a")

    def test_the_next_while_it_rests(self, mode):
        """And back again."""
        calls = Calls(mode, Balance([*"abc"], by=self.BY_USER), "fine", down(), *["fine"] * 20)
        request = REQUEST.evolve(metadata={"user": "one"})
        first = calls.make(request)
        failed, second = calls.make(request)
        assert failed == first
        assert calls.several(3, request) == second * 3
        calls.clock.advance(31)
        assert calls.make(request) == first

    @given(st.lists(st.sampled_from("abcdef"), min_size=2, max_size=6, unique=True), st.data())
    def test_a_target_that_goes_moves_only_its_own_keys(self, targets, data):
        """All others stay where they are, with their caches."""
        users = [f"user {n}" for n in range(200)]
        gone = data.draw(st.sampled_from(targets))
        before = self.asked(targets, users)
        after = self.asked([each for each in targets if each != gone], users)
        assert all(after[user] == target for user, target in before.items() if target != gone)

    def test_keys_are_shared_out_by_weight(self):
        """Twice the weight, twice the keys."""
        counts = Counter(self.asked("abc", [str(n) for n in range(4000)], [2, 1, 1]).values())
        assert abs(counts["a"] - 2000) < 150
        assert abs(counts["b"] - 1000) < 150

    def test_the_same_in_each_process(self):
        """Whatever Python's own hashes are."""
        code = (
            "from fluxibly.middleware.balance import _Load; from fluxibly.target import Target\n"
            "load = _Load([Target(each) for each in 'abcd'], None, 'least_busy')\n"
            "print(*(load.begin(0, (), streaming=False, key=str(n)).place for n in range(50)))"
        )
        said = {
            subprocess.run(
                [sys.executable, "-c", code],
                capture_output=True,
                text=True,
                check=True,
                env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            ).stdout
            for seed in ("1", "2")
        }
        assert len(said) == 1
        assert len(set(next(iter(said)).split())) == 4

    def test_targets_that_look_alike(self):
        """Two accounts of one service each have keys of their own."""
        accounts = [LLMConfig(framework="openai", model="m", api_key=f"sk-{n}") for n in range(2)]
        elsewhere = LLMConfig(framework="openai", model="m", api_key="sk-3", api_base="http://other/v1")
        providers = [Target(ScriptedProvider(), model=model) for model in ("x", "y")]
        load = _Load([*map(Target, [*accounts, elsewhere]), *providers], None, "least_busy")
        names = [place.name for place in load.places]
        assert len({*names}) == 5
        assert not any("sk-" in name for name in names)
        assert {load.begin(0, (), streaming=False, key=str(n)).place for n in range(99)} == {0, 1, 2, 3, 4}


class TestAtOnce:
    """One instance for many threads and tasks."""

    def test_many_threads(self):
        """100 calls at once are 25 for each of four targets."""
        balance = Balance([Target(model, temperature=0) for model in "abcd"])
        together = threading.Barrier(100)
        counts = Counter()
        lock = threading.Lock()
        seen = []

        class Slow:
            def complete(self, request):
                with lock:
                    counts[request.model] += 1
                together.wait(20)
                seen.append(busy(balance))
                together.wait(20)
                return "fine"

        pipeline = Pipeline(Slow(), [balance])
        threads = [threading.Thread(target=pipeline.complete, args=(REQUEST,)) for _ in range(100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert counts == dict.fromkeys("abcd", 25)
        assert seen == [[25] * 4] * 100
        assert busy(balance) == [0] * 4

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_many_tasks(self, backend):
        """1,000 calls at once, of which some fail, are cancelled or are left."""
        balance = Balance([*"abcd"], cool_down=0)
        waiting = 0

        async def main():
            go, full = anyio.Event(), {1000: anyio.Event(), 1100: anyio.Event()}

            class Slow:
                async def complete(self, request):
                    nonlocal waiting
                    waiting += 1
                    if waiting in full:
                        full[waiting].set()
                    await go.wait()
                    if request.metadata["n"] % 5 == 0 and request.model in "ab":
                        raise ServerError("down")
                    return "fine"

                async def stream(self, request):
                    yield await self.complete(request)
                    yield "more"

            pipeline = AsyncPipeline(Slow(), [balance])

            async def ask(n):
                request = REQUEST.evolve(metadata={"n": n})
                if n % 2:
                    async with pipeline.stream(request) as stream:
                        async for _ in stream:
                            if n % 3 == 0:
                                break
                else:
                    await pipeline.complete(request)

            async with anyio.create_task_group() as group:
                for n in range(1000):
                    group.start_soon(ask, n)
                await full[1000].wait()
                assert busy(balance) == [250] * 4
                scopes = [anyio.CancelScope() for _ in range(100)]

                async def cancelled(scope):
                    with scope:
                        await ask(1)

                for scope in scopes:
                    group.start_soon(cancelled, scope)
                await full[1100].wait()
                assert busy(balance) == [275] * 4
                for scope in scopes:
                    scope.cancel()
                await anyio.sleep(0.05)
                assert sum(busy(balance)) == 1000
                go.set()

        anyio.run(main, backend=backend)
        assert busy(balance) == [0] * 4


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "problem"),
        [
            ({"to": []}, "to: expected at least one target, got none"),
            (
                {"policy": "fast"},
                "Balance: policy: expected one of 'round_robin', 'random', 'least_busy', 'fastest', got 'fast'",
            ),
            ({"weights": [1]}, "Balance: weights: expected as many numbers as targets (2), got 1"),
            ({"weights": [1, 0]}, "Balance: weights[1]: expected a number above 0, got 0"),
            ({"weights": [1, float("inf")]}, "Balance: weights[1]: expected a number above 0, got inf"),
            ({"weights": 2}, "Balance: weights: expected a list of numbers, one for each target, got 2"),
            ({"cool_down": -1}, "Balance: cool_down: expected a number of seconds from 0 up, got -1"),
            ({"by": 5}, "Balance: by: expected a function, got an int"),
        ],
        ids=str,
    )
    def test_bad_settings(self, settings, problem):
        """The error names the setting."""
        with pytest.raises(ValueError, match=re.escape(problem)):
            Balance(**{"to": ["a", "b"], **settings})

    def test_in_a_file(self, tmp_path):
        """All problems at once, and a function by its name."""
        register_function("user", TestSticky.BY_USER)
        file = tmp_path / "framework.yaml"
        head = "llm:\n  framework: echo\n  model: m\n  middleware:\n"
        file.write_text(f"{head}    - balance: {{to: [a, b], weights: [2, 1], policy: fastest, by: user}}\n")
        with LLM.from_yaml(file) as llm:
            (balance,) = llm.pipeline.middleware
            assert (balance.weights, balance.by) == ((2, 1), TestSticky.BY_USER)
        file.write_text(f"{head}    - balance: {{to: [a, b], weights: [2, x], policy: fast, by: usr, cool_down: no}}\n")
        with pytest.raises(ConfigError) as caught:
            LLM.from_yaml(file)
        path = "llm.middleware[0].balance"
        assert [problem.partition(" Registered")[0] for problem in caught.value.problems] == [
            f"{path}.policy: expected one of 'round_robin', 'random', 'least_busy', 'fastest', got 'fast'",
            f"{path}.weights[1]: expected a number above 0, got 'x'",
            f"{path}.cool_down: expected a number of seconds from 0 up, got False",
            f"{path}.by: function 'usr' not registered; did you mean 'user'?",
        ]

    def test_weights_of_any_size(self):
        """Neither their sum nor a quotient overflows."""
        for policy in ("round_robin", "random", "least_busy", "fastest"):
            load = _Load([Target("a"), Target("b")], [1.7e308, 5e-324], policy)
            assert {load.begin(0, (), streaming=False).place for _ in range(9)} <= {0, 1}

    def test_its_repr(self):
        """Shows its settings, and not what it has learned."""
        assert repr(Balance(["a", "b"], weights=[2, 1])) == (
            "Balance(to=(Target('a'), Target('b')), policy='least_busy', weights=(2, 1), cool_down=30.0, by=None)"
        )

    @pytest.mark.parametrize("policy", ["round_robin", "random", "least_busy", "fastest"])
    def test_it_keeps_the_laws(self, policy):
        """In all modes."""
        check_middleware(Balance(["m-1", "m-2"], policy=policy))

    def test_it_keeps_the_laws_where_it_is_sticky(self):
        """As above."""
        check_middleware(Balance(["m-1", "m-2"], by=lambda request: request.messages[-1].text))

    def test_its_targets_are_checked_early(self):
        """When the LLM is made."""
        with pytest.raises(ConfigError, match=r"Balance\.targets\[1\]: anthropic needs an API key"):
            LLM(LLMConfig(framework="echo", model="m"), [Balance(["m", "anthropic:claude-x"])])


def test_a_server_that_is_killed():
    """While its calls are under way: each goes on with the other server, and no later call asks the first."""
    killed = threading.Event()

    def dies(peer, _):
        killed.wait(5)
        peer.reset()

    with serve(dies) as first, serve(whole) as second:
        providers = [HTTPProvider(TinyCodec(), SERVICE, config(each.url)) for each in (first, second)]
        balance = Balance([Target(each) for each in providers], policy="round_robin")
        texts = []
        with Pipeline(providers[0], [balance]) as pipeline:
            threads = [threading.Thread(target=lambda: texts.append(pipeline.complete(REQUEST).text)) for _ in range(8)]
            for thread in threads:
                thread.start()
            while len(first.requests) < 4:
                threads[0].join(0.01)
            killed.set()
            for thread in threads:
                thread.join(10)
            asked = len(first.requests)
            assert pipeline.complete(REQUEST).text == REQUEST.messages[0].text
        providers[1].close()
        assert texts == [REQUEST.messages[0].text] * 8
        assert len(first.requests) == asked
        assert busy(balance) == [0, 0]
