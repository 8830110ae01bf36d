"""`Retry`: how often for each class of errors, what a function decides, and the budget that calls share."""

from __future__ import annotations

import logging
import math
import re
import threading
from collections import Counter

import pytest
from hypothesis import given, strategies as st
from support.calling import REQUEST, call, scripted

from fluxibly import LLM, LLMConfig
from fluxibly.errors import (
    BadRequest,
    ConfigError,
    DeadlineExceeded,
    Overloaded,
    ProviderError,
    QuotaExceeded,
    RateLimitError,
    ServerError,
    StreamInterrupted,
    root_cause,
)
from fluxibly.flow import sleep
from fluxibly.limits import Leash
from fluxibly.middleware import Retry, RetryBudget
from fluxibly.registry import make_middleware
from fluxibly.testing import VirtualClock, check_middleware
from fluxibly.testing.modes import MODES, run
from fluxibly.types import Restart


class OutOfService(ServerError):
    """A subclass of a user's own."""


def attempts(mode, retry, *kinds):
    """Return the number of attempts of a call that fails with an error of each class in turn, and its error."""
    made = call(mode, retry, *[kind("no") for kind in kinds], "fine")
    return made.record.attempts, type(made.ran.error)


class TestLimits:
    @pytest.mark.parametrize(
        ("limits", "kinds", "expected"),
        [
            ({RateLimitError: 1}, [RateLimitError, RateLimitError], (2, RateLimitError)),
            ({RateLimitError: 0}, [RateLimitError], (1, RateLimitError)),
            ({ServerError: 1}, [RateLimitError] * 4, (4, RateLimitError)),
            # each class has a count of its own, and max_retries bounds all of them together
            ({RateLimitError: 2, ServerError: 2}, [RateLimitError, ServerError, RateLimitError], (4, type(None))),
            ({RateLimitError: 2, ServerError: 2}, [RateLimitError, ServerError] * 2, (4, ServerError)),
            ({RateLimitError: 1}, [ServerError, RateLimitError, RateLimitError], (3, RateLimitError)),
            # a larger number takes the place of max_retries, for its class alone
            ({RateLimitError: 5}, [RateLimitError] * 6, (6, RateLimitError)),
            ({RateLimitError: 5}, [*[RateLimitError] * 4, ServerError], (5, ServerError)),
            ({RateLimitError: 5}, [*[ServerError] * 3, *[RateLimitError] * 3], (6, RateLimitError)),
            # the nearest class counts
            ({ServerError: 0, Overloaded: 2}, [Overloaded, Overloaded], (3, type(None))),
            ({ServerError: 2, Overloaded: 0}, [Overloaded], (1, Overloaded)),
            ({ServerError: 1}, [OutOfService, ServerError], (2, ServerError)),
            ({Exception: 1}, [ServerError, RateLimitError], (2, RateLimitError)),
            # a number makes nothing retryable
            ({BadRequest: 5, QuotaExceeded: 5, ValueError: 5}, [QuotaExceeded], (1, QuotaExceeded)),
        ],
        ids=str,
    )
    def test_retries_of_each_class(self, mode, limits, kinds, expected):
        """Each retry counts towards the nearest listed class of its error; all together keep to `max_retries`."""
        assert attempts(mode, Retry(max_retries=3, base_delay=0, limits=limits), *kinds) == expected

    def test_names_of_classes(self, mode):
        """YAML names the classes of fluxibly.errors."""
        (retry,) = make_middleware([{"retry": {"limits": {"RateLimitError": 1, "ServerError": 0}, "base_delay": 0}}])
        assert retry.limits == {RateLimitError: 1, ServerError: 0}
        assert attempts(mode, retry, RateLimitError, RateLimitError) == (2, RateLimitError)

    def test_an_interrupted_stream_counts_by_its_cause(self, stream_mode):
        """The class is that of the error that interrupted the stream."""
        retry = Retry(limits={ServerError: 1}, on_interrupt="restart", base_delay=0)
        made = call(stream_mode, retry, *[["a", ServerError("no")]] * 3, restarts=True)
        assert made.record.attempts == 2
        assert isinstance(root_cause(made.ran.error), ServerError)

    def test_calls_do_not_share_their_counts(self, mode):
        """Each call begins anew."""
        retry = Retry(limits={RateLimitError: 1}, base_delay=0)
        assert [attempts(mode, retry, RateLimitError)[0] for _ in range(3)] == [2, 2, 2]

    @given(
        st.dictionaries(st.sampled_from([ServerError, Overloaded, RateLimitError, ProviderError]), st.integers(0, 4)),
        st.integers(0, 4),
        st.lists(st.sampled_from([ServerError, Overloaded, RateLimitError, OutOfService]), max_size=12),
    )
    def test_no_number_is_exceeded(self, limits, most, kinds):
        """No class has more retries than its number, and a call no more than the largest number that applies to an error."""
        retry = Retry(max_retries=most, limits=limits, base_delay=0)
        made = call(MODES[0], retry, *[kind("no") for kind in kinds], "fine")
        failed = kinds[: made.record.attempts - 1]
        nearest = [next((each for each in kind.__mro__ if each in limits), None) for kind in failed]
        for kind, number in Counter(nearest).items():
            assert kind is None or number <= limits[kind]
        for place, kind in enumerate(nearest):
            assert place < max(most, limits.get(kind, 0))
        if made.ran.error is not None:  # it gave up, and for a reason
            kind = next((each for each in type(made.ran.error).__mro__ if each in limits), None)
            alike, allowed = nearest.count(kind), limits.get(kind, most)
            assert len(failed) >= max(most, allowed) or (kind is not None and alike >= allowed)


class TestDecide:
    @pytest.mark.parametrize(
        ("error", "says", "waits"),
        [
            (ServerError, None, [0.5]),
            (BadRequest, None, []),
            (BadRequest, True, [0.5]),
            (ValueError, True, [0.5]),
            (ServerError, False, []),
            (ServerError, 7, [7]),
            (BadRequest, 2.5, [2.5]),
            (QuotaExceeded, 0, [0]),
        ],
        ids=str,
    )
    def test_what_it_says(self, mode, error, says, waits):
        """None is the usual rule, True and a number retry any error, and False none."""
        made = call(mode, Retry(decide=lambda error, attempt: says, uniform=max), error("no"), "fine")
        assert (made.clock.sleeps, made.record.attempts) == (waits, 1 + len(waits))
        assert (made.ran.error is None) == bool(waits)

    def test_what_it_is_asked(self, mode):
        """It gets the error, and the number of the attempt from 0; after the last retry it is not asked."""
        asked, errors = [], [ServerError("a"), BadRequest("b"), RateLimitError("c")]

        def decide(error, attempt):
            asked.append((error, attempt))
            return 1

        made = call(mode, Retry(decide=decide, max_retries=2), *errors)
        assert made.ran.error is errors[2]
        assert asked == [(errors[0], 0), (errors[1], 1)]

    def test_it_gets_the_cause_of_an_interruption(self, stream_mode):
        """Where a stream may start over, it decides by the error that interrupted it."""
        asked, cause = [], BadRequest("no")
        retry = Retry(decide=lambda *given: asked.append(given) or True, on_interrupt="restart", base_delay=0)
        made = call(stream_mode, retry, ["a", cause], ["b"], restarts=True)
        assert made.ran.events[1] == Restart("BadRequest")
        assert made.response.text == "b"
        assert asked == [(cause, 0)]

    @pytest.mark.parametrize("says", [True, 0, 3])
    def test_nothing_is_sent_again_after_output(self, stream_mode, says):
        """No decision delivers output twice."""
        made = call(stream_mode, Retry(decide=lambda error, attempt: says), ["a", ServerError("no")], ["b"])
        assert isinstance(made.ran.error, StreamInterrupted)
        assert (made.record.attempts, made.clock.sleeps) == (1, [])

    def test_an_error_of_a_layer_after_output(self, stream_mode):
        """Nor does it where a layer inside fails once output has gone out."""

        def refuses(request, call_next):
            yield from call_next(request)
            raise ServerError("after all")

        made = call(stream_mode, [Retry(decide=lambda *_: True), refuses], ["a"], ["b"], restarts=True)
        assert made.record.attempts == 1

    @pytest.mark.parametrize(
        ("settings", "attempts"),
        [({"max_retries": 2}, 3), ({"limits": {BadRequest: 1}}, 2), ({"total_time": 5}, 3), ({"max_retries": 0}, 1)],
        ids=str,
    )
    @pytest.mark.parametrize("says", [True, 2])
    def test_other_settings_bound_it(self, mode, settings, attempts, says):
        """However it decides, the numbers and the time of the other settings hold."""
        retry = Retry(**{"decide": lambda *_: says, "base_delay": 2, "max_delay": 2, "uniform": max, **settings})
        made = call(mode, retry, *[BadRequest("no") for _ in range(9)])
        assert (made.record.attempts, type(made.ran.error)) == (attempts, BadRequest)

    def test_the_deadline_bounds_it(self, mode):
        """No wait that it sets ends after the deadline of the call."""

        def limited(request, call_next):
            outer = request.call.leash
            request.call.leash = Leash(outer, deadline=request.call.clock() + 5)
            try:
                return (yield from call_next(request))
            finally:
                request.call.leash = outer

        made = call(mode, [limited, Retry(decide=lambda *_: 2)], *[BadRequest("no") for _ in range(9)])
        assert isinstance(made.ran.error, DeadlineExceeded)
        assert (made.record.attempts, made.clock.sleeps) == (3, [2, 2])

    def test_true_follows_the_wait_of_the_service(self, mode):
        """The usual wait is what the service asked for, if that is not too long."""
        retry = Retry(decide=lambda *_: True)
        made = call(mode, retry, QuotaExceeded("no", retry_after=9), QuotaExceeded("no", retry_after=99), "never")
        assert (made.clock.sleeps, made.record.attempts) == ([9], 2)

    @pytest.mark.parametrize(
        "says", ["yes", -1, -0.5, math.nan, math.inf, 10**400, [], {}, ServerError], ids=lambda says: repr(says)[:9]
    )
    def test_anything_else_is_an_error(self, mode, says):
        """The error names Retry and what it expects; the error of the attempt is its context."""
        made = call(mode, Retry(decide=lambda *_: says), ServerError("no"), "fine")
        error = made.ran.error
        assert type(error) is TypeError
        assert str(error).startswith(
            "Retry: decide: expected True, False, None or a number of seconds from 0 up from its function, got "
        )
        assert isinstance(error.__context__, ServerError)
        assert made.record.attempts == 1

    def test_a_coroutine_function(self, mode):
        """It would need to be awaited. One that shows only in the call is closed, so that Python does not warn of it."""

        async def decide(error, attempt):
            return True

        with pytest.raises(ValueError, match="Retry: decide: expected a plain function, got an async function"):
            Retry(decide=decide)
        made = call(
            mode, Retry(decide=lambda error, attempt: error and decide(error, attempt)), ServerError("no"), "fine"
        )
        assert str(made.ran.error).endswith("got a coroutine")

    def test_its_own_error_reaches_the_caller(self, mode):
        """A mistake in the function is not hidden."""
        made = call(mode, Retry(decide=lambda error, attempt: error.nothing), ServerError("no"), "fine")
        assert isinstance(made.ran.error, AttributeError)


class TestBudget:
    def test_retries_of_many_calls(self, mode, caplog):
        """What the floor allows is retried; then the error is raised at once, with a note, and a warning is logged."""
        budget = RetryBudget(ratio=0, floor=3)
        retry = Retry(budget=budget, max_retries=2, base_delay=0)
        first = call(mode, retry, *[ServerError("no")] * 3)
        assert first.record.attempts == 3
        assert not hasattr(first.ran.error, "__notes__")
        caplog.clear()
        error = ServerError("no")
        second = call(mode, retry, ServerError("no"), error, "never")
        assert second.ran.error is error
        assert second.record.attempts == 2
        reason = "the budget of Retry is used up: RetryBudget(ratio=0, floor=3)"
        assert error.__notes__ == [f"not retried, because {reason}"]
        record = caplog.records[-1]
        assert record.levelno == logging.WARNING
        assert record.getMessage() == (
            f'LLM call decision | middleware=Retry, decision="does not retry after attempt 2: {reason}", error_type=ServerError, '
            'error_message="no"'
        )
        assert (record.middleware, record.error_type) == ("Retry", "ServerError")
        assert second.record.decisions[-1].what == f"does not retry after attempt 2: {reason}"

    def test_the_note_is_there_once(self, mode):
        """However many layers share the budget."""
        budget = RetryBudget(ratio=0, floor=0)
        made = call(mode, [Retry(budget=budget), Retry(budget=budget)], ServerError("no"))
        assert len(made.ran.error.__notes__) == 1

    def test_other_errors_take_nothing(self, mode):
        """An error that is not retried anyway has no note, and leaves the budget alone."""
        budget = RetryBudget(ratio=0, floor=1)
        made = call(mode, Retry(budget=budget), BadRequest("no"))
        assert not hasattr(made.ran.error, "__notes__")
        assert call(mode, Retry(budget=budget), ServerError("no"), "fine").response.text == "fine"

    def test_the_prompt_is_masked(self, mode, caplog):
        """The warning leaves out what the service quotes of the prompt."""
        call(mode, Retry(budget=RetryBudget(floor=0)), ServerError("cannot answer: What is the capital of France?"))
        assert "capital" not in caplog.records[0].getMessage()

    def test_it_recovers(self, mode):
        """Retries are counted for ten seconds."""
        budget = RetryBudget(ratio=0, floor=1)

        def later(request, call_next):
            yield from sleep(9.9)
            return (yield from call_next(request))

        for layers, attempts in (([], 2), ([later], 1), ([later, later], 2)):
            made = call(mode, [*layers, Retry(budget=budget, base_delay=0, max_retries=1)], *[ServerError("no")] * 2)
            assert made.record.attempts == attempts

    def test_a_restart_that_nobody_accepts_takes_nothing(self, stream_mode):
        """An interruption that is raised is no retry."""
        budget = RetryBudget(ratio=0, floor=1)
        retry = Retry(budget=budget, on_interrupt="restart", base_delay=0)
        for _ in range(3):
            made = call(stream_mode, retry, ["a", ServerError("no")], ["b"])
            assert isinstance(made.ran.error, StreamInterrupted)
            assert not hasattr(made.ran.error, "__notes__")
        assert call(stream_mode, retry, ["a", ServerError("no")], ["b"], restarts=True).response.text == "b"

    def test_no_restart_without_a_budget(self, stream_mode):
        """The consumer keeps its partial answer if nothing follows."""
        retry = Retry(budget=RetryBudget(ratio=0, floor=0), on_interrupt="restart")
        made = call(stream_mode, retry, ["a", ServerError("no")], ["b"], restarts=True)
        assert [str(event) for event in made.ran.events if isinstance(event, Restart)] == []
        assert "budget of Retry" in made.ran.error.__notes__[0]

    @given(
        st.floats(0, 2),
        st.integers(0, 5),
        st.lists(st.tuples(st.sampled_from(["call", "retry"]), st.floats(0, 4)), max_size=80),
    )
    def test_never_more_than_its_share(self, ratio, floor, steps):
        """At every retry, those of the last ten seconds are within the floor or the share of calls; and none is refused
        that would be within.
        """
        budget, now, calls, retries = RetryBudget(ratio=ratio, floor=floor), 0.0, [], []
        for step, pause in steps:
            now += pause
            if step == "call":
                budget.count(now)
                calls.append(now)
                continue
            recent, recent_calls = ([each for each in times if each > now - 10] for times in (retries, calls))
            within = len(recent) + 1 <= max(floor, ratio * len(recent_calls))
            assert budget.take(now) is within
            retries += [now] * within

    def test_threads_share_it(self):
        """Not one retry too many or too few is made when a hundred threads take at once."""
        budget, start, taken = RetryBudget(ratio=0.5, floor=10), threading.Barrier(100), []

        def work():
            start.wait()
            for _ in range(20):
                budget.count(0.0)
            start.wait()
            taken.append(sum(budget.take(0.0) for _ in range(20)))

        threads = [threading.Thread(target=work) for _ in range(100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(taken) == 1000

    def test_an_outage_is_not_multiplied(self, mode):
        """Of a hundred calls to a service that is down, the attempts are the calls and a fifth."""
        clock, retry = VirtualClock(), Retry(budget=RetryBudget(ratio=0.2, floor=10), base_delay=0)
        provider = scripted(mode, *[ServerError("down") for _ in range(400)], clock=clock)
        for _ in range(100):
            run(mode, provider, [retry], REQUEST, clock=clock)
        assert len(provider.requests) == 120

    def test_in_a_configuration(self):
        """YAML makes a budget from a table; both numbers have defaults."""
        (retry,) = make_middleware([{"retry": {"budget": {"ratio": 0.5, "floor": 4}}}])
        assert (retry.budget.ratio, retry.budget.floor) == (0.5, 4)
        assert repr(Retry(budget={}).budget) == "RetryBudget(ratio=0.2, floor=10)"

    def test_a_retry_with_a_budget_holds_the_laws(self):
        """What calls share on purpose is no state of a call."""
        check_middleware(Retry(budget=RetryBudget(), limits={ServerError: 2}, decide=lambda error, attempt: None))


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "problem"),
        [
            ({"limits": 5}, "Retry: limits: expected a table of classes of errors and numbers of retries"),
            ({"limits": None}, "Retry: limits: expected a table of classes"),
            (
                {"limits": {"RateLimitEror": 5}},
                "no error 'RateLimitEror' in fluxibly.errors; did you mean 'RateLimitError'?",
            ),
            ({"limits": {429: 5}}, "limits: expected classes of errors, or their names, as keys, got 429"),
            ({"limits": {int: 5}}, "limits: expected classes of errors"),
            ({"limits": {KeyboardInterrupt: 5}}, "limits: expected classes of errors"),
            ({"limits": {ServerError: -1}}, "limits.ServerError: expected a whole number from 0 up, got -1"),
            ({"limits": {ServerError: True}}, "limits.ServerError: expected a whole number from 0 up, got True"),
            ({"limits": {"ServerError": 1.5}}, "limits.ServerError: expected a whole number from 0 up, got 1.5"),
            ({"decide": 3}, "Retry: decide: expected a function, got an int"),
            ({"base_delay": math.inf}, "Retry: base_delay: expected a number from 0 up, got inf"),
            ({"base_delay": 10**400}, "Retry: base_delay: expected a number from 0 up, got 1000"),
            ({"budget": 5}, "budget: expected a RetryBudget(ratio=…, floor=…) or None (in YAML, a table), got 5"),
            ({"budget": {"ratio": -1}}, "budget.ratio: expected a number from 0 up, got -1"),
            ({"budget": {"floor": 1.5}}, "budget.floor: expected a whole number from 0 up, got 1.5"),
            ({"budget": {"rate": 1}}, "budget.rate: there is no such setting; did you mean 'ratio'?"),
        ],
        ids=str,
    )
    def test_bad_settings_are_refused(self, settings, problem):
        """In code and in a configuration, the error has the name of the setting and what is expected."""
        with pytest.raises(ValueError, match=re.escape(problem)):
            Retry(**settings)
        with pytest.raises(ConfigError, match=re.escape(problem.removeprefix("Retry: "))):
            make_middleware([{"retry": settings}])

    @pytest.mark.parametrize("settings", [{"ratio": math.nan}, {"ratio": True}, {"ratio": "1"}, {"floor": -1}], ids=str)
    def test_a_bad_budget(self, settings):
        """A budget has numbers from 0 up."""
        with pytest.raises(ValueError, match=r"^RetryBudget: \w+: expected a"):
            RetryBudget(**settings)

    def test_the_repr(self):
        """It shows all settings in short, the classes by their names."""
        retry = Retry(limits={RateLimitError: 5, ServerError: 2}, budget=RetryBudget())
        assert repr(retry).endswith(
            "limits={RateLimitError: 5, ServerError: 2}, decide=None, budget=RetryBudget(ratio=0.2, floor=10))"
        )

    def test_it_can_be_hashed(self):
        """As any frozen object; limits do not hinder it."""
        assert isinstance(hash(Retry(limits={ServerError: 1})), int)

    def test_in_the_stack_of_an_llm(self):
        """A layer of the default stack may have them too."""
        with LLM(LLMConfig(framework="echo", model="m"), middleware=[Retry(limits={"ServerError": 1})]) as llm:
            assert llm.complete("hi").text
