"""`Fallback`: after which errors it goes on, what it tells, and streams, in all modes."""

from __future__ import annotations

import gc
import logging
import re
import threading
from contextlib import AsyncExitStack, ExitStack

import pytest
from support.calling import REQUEST, call, scripted
from support.misbehaving import serve
from support.tiny import DONE, SERVICE, TinyCodec, config, event
from support.tracing_tools import Recorder, remote

from fluxibly import LLM, LLMConfig, register_function
from fluxibly.errors import (
    AuthenticationError,
    BadRequest,
    CircuitOpen,
    ConfigError,
    ConnectionFailed,
    ContentFiltered,
    ContextLengthExceeded,
    DeadlineExceeded,
    NotFound,
    Overloaded,
    PermissionDenied,
    ProviderError,
    QueueFull,
    QuotaExceeded,
    RateLimitError,
    RateLimitWait,
    RequestTimeout,
    ResponseInvalid,
    ServerError,
    StreamInterrupted,
    StreamProtocolError,
    root_cause,
)
from fluxibly.flow import hold_back
from fluxibly.middleware import Deadline, Fallback, Metrics, Retry, Validation
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.providers.http import AsyncHTTPProvider, HTTPProvider
from fluxibly.target import Target
from fluxibly.testing import Delay, VirtualClock, check_middleware
from fluxibly.testing.modes import run, run_async
from fluxibly.types import Chunk, Request, Restart

GO_ON = (
    AuthenticationError,
    CircuitOpen,
    ConnectionFailed,
    ContextLengthExceeded,
    NotFound,
    Overloaded,
    PermissionDenied,
    ProviderError,
    QueueFull,
    QuotaExceeded,
    RateLimitError,
    RateLimitWait,
    RequestTimeout,
    ServerError,
    StreamProtocolError,
)
STAY = (BadRequest, ContentFiltered, DeadlineExceeded, ValueError, ConfigError)


def models(made):
    return [request.model for request in made.provider.requests]


def holding(request, call_next):
    return (yield from hold_back(call_next(request)))


class TestWhenItGoesOn:
    @pytest.mark.parametrize("error", GO_ON, ids=lambda error: error.__name__)
    def test_errors_that_another_may_not_have(self, mode, error):
        """The next target is asked at once."""
        made = call(mode, Fallback("m-2"), error("no"), "fine")
        assert made.response.text == "fine"
        assert models(made) == ["m-1", "m-2"]
        assert made.clock.sleeps == []

    @pytest.mark.parametrize("error", STAY, ids=lambda error: error.__name__)
    def test_errors_that_are_the_request_s_own(self, mode, error):
        """They are raised as they are, without a note."""
        made = call(mode, Fallback(["m-2", "m-3"]), error("no"), "fine")
        assert type(made.ran.error) is error
        assert models(made) == ["m-1"]
        assert not hasattr(made.ran.error, "__notes__")

    def test_the_first_that_answers(self, mode):
        """Nobody is asked who is not needed."""
        assert models(call(mode, Fallback(["m-2", "m-3"]), "fine")) == ["m-1"]
        assert models(call(mode, Fallback(["m-2", "m-3"]), ServerError("a"), "fine")) == ["m-1", "m-2"]

    def test_all_in_order(self, mode):
        """The last error is raised; its notes list every failure, in order."""
        errors = [ServerError("a"), RateLimitError("b"), Overloaded("c")]
        made = call(mode, Fallback(["m-2", "m-3"]), *errors)
        assert made.ran.error is errors[-1]
        assert models(made) == ["m-1", "m-2", "m-3"]
        assert made.ran.error.__notes__ == [
            "Fallback: m-1 at scripted failed with ServerError: a",
            "Fallback: m-2 at scripted failed with RateLimitError: b",
            "Fallback: m-3 at scripted failed with Overloaded: c",
        ]

    def test_an_error_on_the_way_that_ends_it(self, mode):
        """A target may find the request bad."""
        made = call(mode, Fallback(["m-2", "m-3"]), ServerError("a"), BadRequest(), "fine")
        assert isinstance(made.ran.error, BadRequest)
        assert made.ran.error.__notes__[1] == "Fallback: m-2 at scripted failed with BadRequest"

    def test_each_target_starts_from_the_same_request(self, mode):
        """What one target sets is not left for the next."""
        made = call(
            mode,
            Fallback([Target("m-2", temperature=0.5, drop=["seed"]), "m-3"]),
            ServerError("a"),
            ServerError("b"),
            "fine",
            request=Request(model="m-1", messages="hi", seed=1, temperature=1.0),
        )
        asked = [(each.model, each.seed, each.temperature) for each in made.provider.requests]
        assert asked == [("m-1", 1, 1.0), ("m-2", None, 0.5), ("m-3", 1, 1.0)]

    def test_another_model_of_whom_an_outer_layer_chose(self, mode):
        """A name stays with the provider that was asked."""
        other = scripted(mode, ServerError("down"), "fine")
        made = call(mode, [Fallback([Target(other, model="o-1")]), Fallback("o-2")], BadRequest("no"))
        assert isinstance(made.ran.error, BadRequest)
        made = call(mode, [Fallback([Target(other, model="o-1")]), Fallback("o-2")], *[ServerError("down")] * 2)
        assert made.response.text == "fine"
        assert [request.model for request in other.requests] == ["o-1", "o-2"]

    def test_a_retry_inside_tries_each_target_again(self, mode):
        """Each has its own number of retries."""
        retry = Retry(max_retries=1, base_delay=0)
        made = call(mode, [Fallback("m-2"), retry], *[ServerError("down")] * 3, "fine")
        assert models(made) == ["m-1", "m-1", "m-2", "m-2"]

    def test_an_answer_that_validation_refuses(self, mode):
        """Is the model's, and stays its own unless `when` says otherwise."""
        refuse = Validation(empty="raise")
        assert isinstance(root_cause(call(mode, [Fallback("m-2"), refuse], [""], "fine").ran.error), ResponseInvalid)
        fallback = Fallback("m-2", when=lambda error: isinstance(error, ResponseInvalid))
        assert call(mode, [fallback, refuse], [""], "fine").response.text == "fine"


class TestWhen:
    def test_it_decides_alone(self, mode):
        """Both ways."""
        asked = []

        def when(error):
            asked.append(error)
            return isinstance(error, BadRequest)

        error = BadRequest("no")
        assert call(mode, Fallback("m-2", when=when), error, "fine").response.text == "fine"
        down = ServerError("down")
        assert call(mode, Fallback("m-2", when=when), down, "fine").ran.error is down
        assert asked == [error, down]

    def test_a_deadline_that_has_passed_is_not_asked_about(self, mode):
        """No time is left for anybody."""
        fallback = Fallback("m-2", when=lambda error: True)
        made = call(mode, [Deadline(5), fallback], [Delay(9), "late"], "fine")
        assert isinstance(made.ran.error, DeadlineExceeded)
        assert models(made) == ["m-1"]

    @pytest.mark.parametrize("goes_on", [True, False])
    def test_a_deadline_further_in_is_asked_about(self, mode, goes_on):
        """As about any other error."""
        fallback = Fallback("m-2", when=lambda error: isinstance(error, DeadlineExceeded) and goes_on)
        made = call(mode, [fallback, Deadline(5)], [Delay(9), "late"], "fine")
        assert models(made) == ["m-1", "m-2"][: 1 + goes_on]

    @pytest.mark.parametrize("answer", [None, 1, "yes"])
    def test_it_returns_a_bool(self, mode, answer):
        """A coroutine, for one, would be taken for true."""
        made = call(mode, Fallback("m-2", when=lambda error: answer), ServerError("down"), "fine")
        assert isinstance(made.ran.error, TypeError)
        assert str(made.ran.error).startswith("Fallback(when=…): expected True to ask the next target, or False to")

    @pytest.mark.filterwarnings("error")
    def test_a_coroutine(self, mode):
        """It is closed, so that Python does not warn of it besides."""

        async def when(error):
            return True

        made = call(mode, Fallback("m-2", when=lambda error: error and when(error)), ServerError("down"), "fine")
        assert str(made.ran.error).endswith("got a coroutine")
        gc.collect()

    def test_the_cause_of_an_interruption(self, stream_mode):
        """`when` gets what the provider raised."""
        asked = []
        fallback = Fallback("m-2", when=lambda error: bool(asked.append(error)) or True, on_interrupt="restart")
        cause = ServerError("down")
        made = call(stream_mode, fallback, ["Hel", cause], "fine", restarts=True)
        assert made.response.text == "fine"
        assert asked == [cause]


class TestDeadlines:
    def test_it_stops_when_the_time_is_up(self, mode):
        """The error says so; its notes and its cause say what failed."""
        made = call(mode, [Deadline(5), Fallback(["m-2", "m-3"])], ServerError("a"), [Delay(9), "late"])
        assert isinstance(made.ran.error, DeadlineExceeded)
        assert models(made) == ["m-1", "m-2"]
        assert made.clock.now() == 5

    def test_one_for_each_target(self, mode):
        """A target that uses up its own time leaves the rest to the next, if the user says so."""
        slow = [Delay(9), "late"]
        fallback = Fallback(["m-2", "m-3"], when=lambda error: isinstance(error, DeadlineExceeded))
        made = call(mode, [Deadline(12), fallback, Deadline(5)], slow, slow, "fine")
        assert made.response.text == "fine"
        assert made.clock.now() == 10
        made = call(mode, [Deadline(8), fallback, Deadline(5)], slow, slow, "fine")
        assert isinstance(made.ran.error, DeadlineExceeded)
        assert "set by Deadline(8)" in str(made.ran.error)
        assert (made.clock.now(), models(made)) == (8, ["m-1", "m-2"])

    def test_a_wait_that_is_too_long(self, mode):
        """The service asks for more time than is left, so another is asked at once, if the user says so."""
        busy = RateLimitError("slow down", retry_after=20)
        fallback = Fallback("m-2", when=lambda error: isinstance(error, DeadlineExceeded))
        made = call(mode, [Deadline(10), fallback, Retry()], busy, "fine")
        assert made.response.text == "fine"
        assert made.clock.now() == 0

    def test_nothing_is_asked_after_it(self, mode):
        """Though the error alone would not end it."""

        def slow(request, call_next):
            try:
                return (yield from call_next(request))
            except ServerError:
                clock.advance(9)
                raise

        clock = VirtualClock()
        provider = scripted(mode, *[ServerError("down")] * 3)
        ran = run(mode, provider, [Deadline(12), Fallback(["m-2", "m-3"]), slow], REQUEST, clock=clock)
        assert isinstance(ran.error, DeadlineExceeded)
        assert len(provider.requests) == 2
        assert isinstance(ran.error.__cause__, ServerError)
        assert [note.partition(" failed")[0] for note in ran.error.__notes__] == [
            "Fallback: m-1 at scripted",
            "Fallback: m-2 at scripted",
        ]


class TestStreams:
    def test_after_output_nobody_else_is_asked(self, stream_mode):
        """The consumer would get the answer twice."""
        made = call(stream_mode, Fallback("m-2"), ["Hel", ServerError("down")], "fine")
        assert isinstance(made.ran.error, StreamInterrupted)
        assert made.ran.error.partial.text == "Hel"
        assert models(made) == ["m-1"]

    def test_chunks_without_output(self, stream_mode):
        """They do not count."""
        made = call(stream_mode, Fallback("m-2"), [Chunk(model="x"), ServerError("down")], "fine")
        assert made.response.text == "fine"

    def test_what_is_held_back_has_not_gone_out(self, stream_mode):
        """A hold-back inside of it."""
        made = call(stream_mode, [Fallback("m-2"), holding], ["Hel", ServerError("down")], "fine")
        assert made.response.text == made.ran.text == "fine"

    def test_a_restart(self, stream_mode):
        """The consumer that takes restarts gets the whole answer of the next target."""
        fallback = Fallback(["m-2", "m-3"], on_interrupt="restart")
        made = call(stream_mode, fallback, ["Hel", ServerError("a")], ["By", ServerError("b")], "fine", restarts=True)
        events = [Chunk("Hel"), Restart("ServerError"), Chunk("By"), Restart("ServerError"), Chunk("fine")]
        assert made.ran.events == events
        assert made.response.text == "fine"

    def test_a_restart_that_nobody_takes(self, stream_mode):
        """The interruption is raised. An outer hold-back takes it."""
        fallback = Fallback("m-2", on_interrupt="restart")
        made = call(stream_mode, fallback, ["Hel", ServerError("down")], "fine")
        assert isinstance(made.ran.error, StreamInterrupted)
        made = call(stream_mode, [holding, fallback], ["Hel", ServerError("down")], "fine")
        assert made.ran.text == "fine"

    def test_no_restart_where_nobody_is_left(self, stream_mode):
        """What came so far stays valid for the consumer."""
        fallback = Fallback("m-2", on_interrupt="restart")
        made = call(stream_mode, fallback, ServerError("a"), ["Hel", ServerError("b")], restarts=True)
        assert made.ran.events == [Chunk("Hel")]
        assert isinstance(made.ran.error, StreamInterrupted)
        assert made.ran.error.__notes__ == [
            "Fallback: m-1 at scripted failed with ServerError: a",
            "Fallback: m-2 at scripted failed with ServerError: b",
        ]

    def test_an_inner_layer_that_fails_after_output(self, stream_mode):
        """Is no failure of the provider."""

        def refuses(request, call_next):
            yield from call_next(request)
            raise ServerError("after all")

        made = call(stream_mode, [Fallback("m-2", on_interrupt="restart"), refuses], "a", "b", restarts=True)
        assert models(made) == ["m-1"]


class TestTold:
    def test_each_step_is_logged(self, mode, caplog):
        """As a warning with the error, whose quotes from the prompt are masked."""
        call(mode, Fallback("m-2"), ServerError("cannot answer: What is the capital of France?"), "fine")
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert record.getMessage() == (
            'LLM call decision | middleware=Fallback, decision="asks m-2 at scripted after ServerError", '
            'error_type=ServerError, error_message="cannot answer: […]"'
        )

    def test_a_stream_that_starts_over_says_so(self, stream_mode, caplog):
        """The consumer's output so far is void."""
        call(stream_mode, Fallback("m-2", on_interrupt="restart"), ["a", ServerError("b")], "c", restarts=True)
        assert caplog.records[0].decision == "asks m-2 at scripted after ServerError, and starts the stream over"

    def test_the_notes_are_masked(self, mode):
        """They go into logs with the traceback."""
        quoting = ServerError("cannot answer: What is the capital of France?")
        made = call(mode, Fallback("m-2"), quoting, ServerError("down"))
        assert made.ran.error.__notes__[0] == "Fallback: m-1 at scripted failed with ServerError: cannot answer: […]"

    def test_one_error_again_and_again(self, mode):
        """A provider may raise the same object each time. Its notes stay those of one call."""
        error = ServerError("down")
        for _ in range(3):
            call(mode, Fallback(["m-2", "m-2"]), error, error, error)
        assert error.__notes__ == [
            f"Fallback: {model} at scripted failed with ServerError: down" for model in ("m-1", "m-2", "m-2")
        ]

    def test_the_trace_names_who_answered(self, mode):
        """The call's span has the provider and the model that answered, the attempts theirs, and the decision."""
        recorder = Recorder()
        target = Target(scripted(mode, "fine"), model="m-2")
        ran = run(
            mode,
            remote(mode, ServerError("down")),
            [recorder.tracing(), Metrics(), Fallback([target])],
            REQUEST,
        )
        assert ran.response.provider == "scripted"
        span = recorder.call
        assert span.attributes["gen_ai.provider.name"] == "scripted"
        assert span.attributes["gen_ai.response.model"] == "m-2"
        asked = [each.attributes["fluxibly.attempt.provider"] for each in recorder.attempts]
        assert asked == ["openai", "scripted"]
        (decision,) = [event for event in span.events if event.name == "fluxibly.decision"]
        assert "asks m-2 at scripted after ServerError" in decision.attributes.values()


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "problem"),
        [
            ({"to": []}, "to: expected at least one target, got none"),
            ({"to": 5}, "to: expected a list of models, tables or Targets, got an int"),
            ({"to": ["m", " "]}, "to[1]: expected"),
            ({"to": "m", "when": 5}, "Fallback: when: expected a function, got an int"),
            ({"to": "m", "on_interrupt": "go"}, "Fallback: on_interrupt: expected one of 'raise', 'restart', got 'go'"),
        ],
        ids=str,
    )
    def test_bad_settings(self, settings, problem):
        """The error names the setting."""
        with pytest.raises(ValueError, match=re.escape(problem)):
            Fallback(**settings)

    def test_an_async_function(self):
        """`when` answers at once."""

        async def when(error):
            return True

        with pytest.raises(
            ValueError, match="Fallback: when: expected a plain function, got an async function; write def"
        ):
            Fallback("m", when=when)

    def test_in_a_file(self, tmp_path):
        """The targets, and a function by its registered name."""

        def only_down(error):
            return isinstance(error, ServerError)

        register_function("only_down", only_down)
        file = tmp_path / "framework.yaml"
        head = "llm:\n  framework: echo\n  model: m\n  middleware:\n"
        file.write_text(f"{head}    - fallback: {{to: [m-2], when: only_down, on_interrupt: restart}}\n")
        with LLM.from_yaml(file) as llm:
            (fallback,) = llm.pipeline.middleware
            assert fallback.when is only_down
            assert fallback.on_interrupt == "restart"
        file.write_text(f"{head}    - fallback: {{to: [], when: only_dwn, on_interrupt: go}}\n")
        with pytest.raises(ConfigError) as caught:
            LLM.from_yaml(file)
        path = "llm.middleware[0].fallback"
        assert [problem.partition(" Registered")[0] for problem in caught.value.problems] == [
            f"{path}.to: expected at least one target, got none",
            f"{path}.when: function 'only_dwn' not registered; did you mean 'only_down'?",
            f"{path}.on_interrupt: expected one of 'raise', 'restart', got 'go'",
        ]

    def test_its_repr(self):
        """Shows its settings."""
        assert repr(Fallback(["m-2", "anthropic:x"])) == (
            "Fallback(to=(Target('m-2'), Target('anthropic:x')), when=None, on_interrupt='raise')"
        )

    @pytest.mark.parametrize(
        "settings", [{}, {"on_interrupt": "restart"}, {"when": lambda error: True}], ids=[*map(str, range(3))]
    )
    def test_it_keeps_the_laws(self, settings):
        """In all modes."""
        check_middleware(Fallback(["m-2", "m-3"], **settings))

    def test_its_targets_are_checked_early(self):
        """When the LLM is made."""
        with pytest.raises(ConfigError, match=r"Fallback\.targets\[0\]: anthropic needs an API key"):
            LLM(LLMConfig(framework="echo", model="m"), [Fallback("anthropic:claude-x")])


class TestOverHTTP:
    """Real servers: one that is gone, one that hangs, one that breaks off."""

    def ask(self, mode, *urls, timeout=5.0):
        """Ask the server at the first address, and fall back to the others."""
        kind = AsyncHTTPProvider if mode.backend else HTTPProvider
        own, *others = [kind(TinyCodec(), SERVICE, config(url, timeout=timeout)) for url in urls]
        stack = [Fallback([Target(other) for other in others])]

        def go():
            with ExitStack() as closing, Pipeline(own, stack) as pipeline:
                for other in others:
                    closing.callback(other.close)
                if not mode.streaming:
                    return pipeline.complete(REQUEST).text
                with pipeline.stream(REQUEST) as stream:
                    return "".join([chunk.text for chunk in stream])

        async def ago():
            async with AsyncExitStack() as closing, AsyncPipeline(own, stack) as pipeline:
                for other in others:
                    closing.push_async_callback(other.aclose)
                if not mode.streaming:
                    return (await pipeline.complete(REQUEST)).text
                async with pipeline.stream(REQUEST) as stream:
                    return "".join([chunk.text async for chunk in stream])

        return go() if mode.backend is None else run_async(ago, mode.backend)

    @staticmethod
    def answers(peer, request):
        if not request.json["stream"]:
            peer.answer({"text": "from the other"})
            return
        peer.begin_stream()
        for piece in (event("from "), event("the other"), DONE, ""):
            peer.chunk(piece)

    def test_a_server_that_is_gone(self, mode):
        """Nothing listens at its address any more."""
        with serve(self.answers) as gone:
            pass
        with serve(self.answers) as other:
            assert self.ask(mode, gone.url, other.url) == "from the other"

    def test_a_server_that_is_killed(self, mode):
        """Its connections are reset when the request has come."""
        with serve(lambda peer, _: peer.reset()) as killed, serve(self.answers) as other:
            assert self.ask(mode, killed.url, other.url) == "from the other"
            assert len(other.requests) == 1

    def test_a_server_that_hangs(self, mode):
        """The time limit of the first ends its attempt, and the connection is closed."""
        ended = threading.Event()

        def hangs(peer, _):
            peer.wait_for_end()
            ended.set()

        with serve(hangs) as silent, serve(self.answers) as other:
            assert self.ask(mode, silent.url, other.url, timeout=0.3) == "from the other"
            assert ended.wait(5)

    def test_a_server_that_streams_half(self, stream_mode):
        """Its output has gone out, so no other is asked."""

        def half(peer, _):
            peer.begin_stream()
            peer.chunk(event("from "))
            peer.close()

        with serve(half) as broken, serve(self.answers) as other:
            with pytest.raises(StreamInterrupted) as caught:
                self.ask(stream_mode, broken.url, other.url)
            assert caught.value.partial.text == "from "
            assert other.requests == []
