"""The limits of calls as data: `Leash`, the waits of a stream, and what `timeout=` of a call sets."""

from __future__ import annotations

import functools
import gc
import math
import threading

import pytest

from fluxibly.config import LLMConfig
from fluxibly.errors import ConfigError
from fluxibly.limits import ChunkWaits, Leash, Timeouts, time_left, timeouts_of_call
from fluxibly.middleware import Deadline


def limits_of(leash):
    return leash.deadline, leash.first_chunk, leash.idle


class TestLeash:
    def test_without_limits(self):
        """A limit that nobody set is None."""
        assert limits_of(Leash()) == limits_of(Leash(Leash())) == (None, None, None)

    def test_the_smaller_limit_counts(self):
        """A leash within a leash has the smaller of each two limits, whichever is further out."""
        one, other = {"deadline": 5.0, "first_chunk": 3.0}, {"deadline": 9.0, "first_chunk": 2.0, "idle": 4.0}
        assert limits_of(Leash(Leash(**one), **other)) == (5.0, 2.0, 4.0)
        assert limits_of(Leash(Leash(**other), **one)) == (5.0, 2.0, 4.0)

    def test_an_outer_leash_keeps_its_limits(self):
        """A middleware within does not change the leash further out."""
        outer = Leash(deadline=5.0)
        Leash(outer, deadline=1.0, idle=1.0)
        assert limits_of(outer) == (5.0, None, None)

    def test_a_deadline_is_a_time(self):
        """A deadline may lie before the clock's zero, or never come."""
        assert Leash(deadline=-3.0).deadline == -3.0
        assert Leash(Leash(deadline=math.inf), deadline=7).deadline == 7

    @pytest.mark.parametrize(
        ("limits", "problems"),
        [
            ({"deadline": "5"}, ("deadline: expected a time of call.clock, such as call.clock() + 5, got '5'",)),
            ({"deadline": True}, ("deadline: expected a time of call.clock, such as call.clock() + 5, got True",)),
            ({"deadline": math.nan}, ("deadline: expected a time of call.clock, such as call.clock() + 5, got nan",)),
            ({"deadline": -math.inf}, ("deadline: expected a time of call.clock, such as call.clock() + 5, got -inf",)),
            ({"first_chunk": 0}, ("first_chunk: expected a number of seconds above 0, got 0",)),
            ({"idle": math.inf}, ("idle: expected a number of seconds above 0, got inf",)),
            (
                {"deadline": [], "first_chunk": -1, "idle": "1"},
                (
                    "deadline: expected a time of call.clock, such as call.clock() + 5, got a list",
                    "first_chunk: expected a number of seconds above 0, got -1",
                    "idle: expected a number of seconds above 0, got '1'",
                ),
            ),
        ],
        ids=repr,
    )
    def test_wrong_limits(self, limits, problems):
        """An error lists each wrong limit."""
        with pytest.raises(ConfigError) as caught:
            Leash(**limits)
        assert caught.value.problems == problems

    def test_who_set_a_limit(self):
        """Of each limit, it is whoever set the stricter one; a middleware is named by its repr."""
        outer = Leash(deadline=9, first_chunk=2, by="outer")
        leash = Leash(outer, deadline=5, first_chunk=3, idle=1, by=Deadline(5))
        phases = ("deadline", "first_chunk", "idle")
        assert [leash.set_by(phase) for phase in phases] == ["Deadline(5)", "outer", "Deadline(5)"]
        assert [Leash.apart(leash).set_by(phase) for phase in phases] == [leash.set_by(phase) for phase in phases]
        assert [Leash(leash, deadline=1).set_by(phase) for phase in phases] == [None, "outer", "Deadline(5)"]
        assert Leash(Leash(idle=3, by="outer"), idle=3, by="inner").set_by("idle") == "outer"
        assert leash.set_by("total") is None

    def test_its_repr(self):
        """A leash shows its limits."""
        assert repr(Leash(deadline=1.5, idle=2)) == "Leash(deadline=1.5, first_chunk=None, idle=2)"


class TestStop:
    """`stop` ends what waits under a leash, and what begins to wait later."""

    def test_what_is_held(self):
        """Each `end` that is held is called, and none that was released."""
        ended: list[str] = []
        leash = Leash()
        ends = {name: functools.partial(ended.append, name) for name in "abc"}
        for end in ends.values():
            leash.hold(end)
        leash.release(ends["b"])
        assert leash.stopped is False
        leash.stop()
        assert leash.stopped is True
        assert ended == ["a", "c"]

    def test_what_begins_later(self):
        """An `end` that is held after the stop is called at once."""
        ended: list[str] = []
        leash = Leash()
        leash.stop()
        leash.hold(lambda: ended.append("late"))
        assert ended == ["late"]

    def test_twice_held(self):
        """Two waits may have the same `end`: to release one leaves the other."""
        ended: list[str] = []
        leash = Leash()
        end = functools.partial(ended.append, "one")
        leash.hold(end)
        leash.hold(end)
        leash.release(end)
        leash.stop()
        assert ended == ["one"]

    def test_a_bound_method_is_released_by_its_name(self):
        """Each look-up of a method is another object, and means the same `end`."""
        ended: list[str] = []

        class Wait:
            def end(self):
                ended.append("ended")

        leash, wait = Leash(), Wait()
        leash.hold(wait.end)
        leash.release(wait.end)
        leash.release(wait.end)  # of no effect
        leash.stop()
        assert ended == []

    def test_leashes_within(self):
        """The leashes of middleware within a branch are stopped with the branch's, whichever `stop` is called."""
        ended: list[str] = []
        outer = Leash()
        inner = Leash(Leash(outer, idle=1), deadline=5)
        inner.hold(lambda: ended.append("inner"))
        outer.stop()
        assert ended == ["inner"]
        assert inner.stopped
        again = Leash()
        Leash(again).stop()
        assert again.stopped

    def test_apart(self):
        """A leash apart has the limits, and is stopped for itself; the leashes within it are stopped with it."""
        outer = Leash(deadline=5.0, first_chunk=2.0, idle=3.0)
        one, other = Leash.apart(Leash(outer)), Leash.apart(outer)
        assert limits_of(one) == limits_of(other) == (5.0, 2.0, 3.0)
        within = Leash(one, deadline=1.0)
        assert limits_of(within) == (1.0, 2.0, 3.0)
        one.stop()
        assert (one.stopped, within.stopped, other.stopped, outer.stopped) == (True, True, False, False)
        outer.stop()
        assert not other.stopped
        assert limits_of(Leash.apart(None)) == (None, None, None)

    def test_an_end_that_fails(self):
        """All others are ended before the first error is raised."""
        ended: list[str] = []

        def fail():
            raise OSError("it failed")

        leash = Leash()
        for end in (fail, functools.partial(ended.append, "last")):
            leash.hold(end)
        with pytest.raises(OSError, match="it failed"):
            leash.stop()
        assert ended == ["last"]

    def test_no_stop_is_lost(self):
        """However `stop` and `hold` of two threads meet, the end is called."""
        for _ in range(500):
            leash, over, start = Leash(), threading.Event(), threading.Barrier(3)

            def stop(leash=leash, start=start):
                start.wait()
                leash.stop()

            threads = [threading.Thread(target=stop) for _ in range(2)]
            for thread in threads:
                thread.start()
            start.wait()
            leash.hold(over.set)
            assert over.wait(5)
            for thread in threads:
                thread.join()

    def test_it_is_no_circle(self):
        """A leash is freed without the garbage collector: it does not refer to itself."""
        leash = Leash()
        assert leash not in gc.get_referents(leash)
        assert leash not in gc.get_referents(Leash.apart(leash))


class TestTimeLeft:
    @pytest.mark.parametrize(
        ("leash", "left"),
        [
            (None, None),
            (Leash(idle=1), None),
            (Leash(deadline=math.inf), None),
            (Leash(deadline=7), 4),
            (Leash(deadline=1), -2),
        ],
        ids=repr,
    )
    def test_the_time_left(self, leash, left):
        """The time until a deadline is negative after it, and None if it never comes."""
        assert time_left(leash, lambda: 3.0) == left


class TestChunkWaits:
    def test_the_first_limit_is_for_all_waits_until_output(self):
        """A chunk without output does not end the wait for output, and the consumer's time is no wait."""
        waits = ChunkWaits(Leash(first_chunk=5))
        assert (waits.end(10.0), waits.phase, waits.limit) == (15.0, "first_chunk", 5)
        assert waits.end(12.0) == 15.0  # the same wait
        waits.came(13.0, output=False)
        assert waits.end(100.0) == 102.0

    def test_the_second_limit_is_for_each_wait_after_it(self):
        """After output each wait begins anew."""
        waits = ChunkWaits(Leash(first_chunk=5, idle=2))
        waits.end(0.0)
        waits.came(4.0, output=True)
        assert (waits.end(50.0), waits.phase, waits.limit) == (52.0, "idle", 2)
        waits.came(51.0, output=False)
        assert waits.end(60.0) == 62.0

    def test_without_limits(self):
        """No wait ends where no limit is set, and `idle` does not apply before output."""
        waits = ChunkWaits(Leash(idle=2))
        assert waits.end(0.0) is None
        waits.came(9.0, output=False)
        assert waits.end(9.0) is None
        waits.came(10.0, output=True)
        assert waits.end(11.0) == 13.0


class TestTimeoutOfACall:
    def test_a_number_for_a_whole_call(self):
        """A number bounds connecting, the first byte, idling, and each attempt."""
        assert timeouts_of_call(3, streaming=False) == Timeouts(3, 3, 3, 3)

    def test_a_number_for_a_stream(self):
        """A number does not bound a stream as a whole."""
        times = timeouts_of_call(3, streaming=True)
        assert times == Timeouts(3, 3, 3)
        assert times.stream_total is None

    @pytest.mark.parametrize("streaming", [False, True])
    def test_timeouts_are_taken_as_they_are(self, streaming):
        """`Timeouts` say everything themselves."""
        times = Timeouts(1, None, 2, total=None)
        assert timeouts_of_call(times, streaming=streaming) is times

    @pytest.mark.parametrize("timeout", [0, -1, math.nan, math.inf, "3", True, [3]], ids=repr)
    def test_wrong_timeouts(self, timeout):
        """Neither a configuration nor a call takes anything else, and both say so in the same words."""
        with pytest.raises(ConfigError) as in_the_configuration:
            LLMConfig(framework="echo", model="m", timeout=timeout)
        with pytest.raises(ConfigError) as in_the_call:
            timeouts_of_call(timeout, streaming=False)
        assert str(in_the_call.value) == str(in_the_configuration.value)
        assert str(in_the_call.value).startswith("timeout: expected a number of seconds above 0, got ")


@pytest.mark.parametrize("value", [5, "5", None], ids=repr)
def test_what_is_no_leash_and_no_function(value):
    """The message says what was expected."""
    with pytest.raises(TypeError, match=r"Leash\.hold: expected a function, got"):
        Leash().hold(value)
    if value is not None:
        for make in (Leash, Leash.apart):
            with pytest.raises(TypeError, match=r"Leash: expected a Leash or None, got .*; write Leash\(call\.leash, "):
                make(value)
