"""`ByHand` with a middleware that does several things at once."""

from __future__ import annotations

import pytest
from support.powers import hedge, informed

from fluxibly.errors import ServerError
from fluxibly.flow import gather, perform, sleep
from fluxibly.middleware import Hedge, Retry
from fluxibly.testing import ByHand
from fluxibly.types import Chunk, Request, Response

REQUEST = Request(model="m", messages="hi")


def two_at_once(request, call_next):
    one, two = yield from gather(request, perform(lambda: None), sleep(3))
    response = yield from call_next(request)
    return response.evolve(text=f"{response.text} {one} {two}")


class TestRaces:
    def test_the_second_wins(self):
        """The time until the second request passes when the test says so."""
        call = ByHand(hedge(2), REQUEST)
        (first,) = call.branches
        assert first.sent.messages == REQUEST.messages
        assert call.waits == pytest.approx(2, abs=0.1)
        call.go_on()
        assert call.waits is None
        _, second = call.branches
        call.finish(second, "hello")
        assert call.response.text == "hello"
        assert call.branches == []

    @pytest.mark.parametrize("streaming", [False, True])
    def test_a_branch_that_ends_before_it_waits(self, streaming):
        """It is refused by a layer, or answered by one, and has no stream."""

        def refuse(request, call_next):
            yield from ()
            raise ServerError("no")

        def answer(request, call_next):
            yield from ()
            return Response("kept")

        with pytest.raises(ServerError, match="no"):
            ByHand([Hedge(2), refuse], REQUEST, streaming=streaming)
        assert ByHand([Hedge(2), answer], REQUEST, streaming=streaming).response.text == "kept"

    def test_a_failure_starts_the_next(self):
        """No time has to pass then."""
        call = ByHand(hedge(2), REQUEST)
        call.finish(call.branches[0], ServerError("down"))
        call.finish(call.branches[0], "hello")
        assert call.response.text == "hello"

    def test_all_fail(self):
        """The error of the first comes out."""
        call = ByHand(hedge(2), REQUEST)
        call.finish(call.branches[0], ServerError("one"))
        with pytest.raises(ServerError, match="one"):
            call.finish(call.branches[0], ServerError("two"))

    def test_a_stream(self):
        """The first output wins, and the rest of the winner's stream follows."""
        call = ByHand(hedge(2), REQUEST, streaming=True)
        call.go_on()
        first, second = call.branches
        call.finish(first, Chunk(model="m-1"), Chunk("a"), "b")
        assert [event.text for event in call.events] == ["", "a", "b"]
        assert call.response.text == "ab"
        assert second not in call.branches

    def test_a_sleep_in_a_branch(self):
        """Each branch waits for itself."""
        call = ByHand([hedge(2), Retry(max_retries=1, base_delay=5, uniform=max)], REQUEST)
        call.go_on()
        first, second = call.branches
        call.finish(first, ServerError("down"))
        assert first.sleeps == 5
        call.finish(second, ServerError("down"))
        assert [branch.sleeps for branch in call.branches] == [5, 5]
        call.finish(second)
        call.finish(second, "hello")
        assert call.response.text == "hello"

    def test_a_race_in_a_race(self):
        """All branches are listed, those of the inner races as well."""
        call = ByHand([hedge(4), hedge(1)], REQUEST)
        call.go_on()
        assert len(call.branches) == 2
        call.finish(call.branches[1], "hello")
        assert call.response.text == "hello"

    def test_an_interrupt(self):
        """A BaseException ends the call, as in a pipeline."""
        call = ByHand(hedge(2), REQUEST)
        interrupt = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt) as caught:
            call.finish(call.branches[0], interrupt)
        assert caught.value is interrupt


class TestGathers:
    def test_in_any_order(self):
        """The call goes on when everything has ended."""
        call = ByHand(two_at_once, REQUEST)
        performing, sleeping = call.branches
        assert performing.performs is not None
        assert sleeping.sleeps == 3
        call.finish(sleeping)
        assert call.sent is None
        call.finish(performing, "read")
        call.answer("hello")
        assert call.response.text == "hello read False"

    def test_a_question(self):
        """The request of a question is answered whole, also in a stream."""
        call = ByHand(informed(lambda: "", None), REQUEST, streaming=True)
        look_up, question = call.branches
        call.finish(question, "more")
        call.finish(look_up, "fact")
        assert call.sent.messages[-1].text == "fact more"

    def test_an_error(self):
        """It gives the others up."""
        call = ByHand(two_at_once, REQUEST)
        with pytest.raises(LookupError):
            call.finish(call.branches[0], LookupError())


class TestMistakes:
    def test_a_branch_that_does_not_wait(self):
        """It has ended, or belongs to another call."""
        call, other = ByHand(two_at_once, REQUEST), ByHand(two_at_once, REQUEST)
        performing = call.branches[0]
        call.finish(performing)
        for branch in (performing, other.branches[0]):
            with pytest.raises(AssertionError, match=r"finish\(\): expected a branch of this call that waits"):
                call.finish(branch)

    def test_no_time_to_pass(self):
        """A gather has no time of its own."""
        call = ByHand(two_at_once, REQUEST)
        with pytest.raises(AssertionError, match=r"go_on\(\): expected a call that waits for time"):
            call.go_on()
