"""The laws, over random stacks, scripts and faults, in all modes."""

from __future__ import annotations

import strategies as s
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fluxibly.errors import StreamInterrupted, root_cause
from fluxibly.testing import AsyncScriptedProvider, ScriptedProvider, VirtualClock
from fluxibly.testing.modes import MODES, Mode, Ran, run
from fluxibly.types import Request, Restart

REQUEST = Request(model="m", messages="hi")
WHOLE = [mode for mode in MODES if not mode.streaming]
STREAMS = [mode for mode in MODES if mode.streaming]
many = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


class Case:
    """One run: its outcome, what the middleware did, and what the provider saw."""

    def __init__(self, mode: Mode, kinds, answers, **options) -> None:
        self.mode = mode
        self.log: list[str] = []
        self.clock = VirtualClock()
        kind = AsyncScriptedProvider if mode.backend else ScriptedProvider
        self.provider = kind(*(answer.make() for answer in answers), clock=self.clock)
        self.stack = s.build(kinds, self.log)
        self.ran: Ran = run(mode, self.provider, self.stack, REQUEST, clock=self.clock, **options)

    def outcome(self, *, unwrap: bool = True):
        """The response, or the error as type and text."""
        if self.ran.error is None:
            return self.ran.response
        error = root_cause(self.ran.error) if unwrap else self.ran.error
        return type(error), str(error)

    def check_ends(self) -> None:
        """Law 2: everything that began has ended, once."""
        assert self.provider.opened == self.provider.closed
        starts = sorted(line.split()[0] for line in self.log if " start" in line)
        ends = sorted(line.split()[0] for line in self.log if line.endswith(" end"))
        assert starts == ends
        assert self.ran.leaks == []


@many
@given(s.stacks, s.clean_answers)
def test_modes_agree(kinds, answers):
    """Law 1: without failures after output, all modes come to the same, and so do the middleware's events."""
    cases = [Case(mode, kinds, answers) for mode in MODES]
    first = cases[0]
    for case in cases[1:]:
        assert case.outcome() == first.outcome(), case.mode
        assert case.log == first.log, case.mode
        assert case.clock.sleeps == first.clock.sleeps, case.mode
    for case in cases:
        case.check_ends()


@many
@given(s.stacks, s.any_answers, st.booleans())
def test_modes_agree_about_failures(kinds, answers, restarts):
    """Law 1: whatever fails, streams agree with streams and whole calls with whole calls."""
    for modes in (WHOLE, STREAMS):
        cases = [Case(mode, kinds, answers, restarts=restarts) for mode in modes]
        for case in cases[1:]:
            assert case.outcome(unwrap=False) == cases[0].outcome(unwrap=False), case.mode
            assert case.log == cases[0].log, case.mode
            assert case.clock.sleeps == cases[0].clock.sleeps
            assert case.ran.events == cases[0].ran.events
        for case in cases:
            case.check_ends()
            check_stream(case)


@many
@given(s.stacks.filter(lambda kinds: not set(kinds) & set(s.HANDLING)), s.any_answers)
def test_streams_wrap_the_error_of_the_whole_call(kinds, answers):
    """Law 1: where nobody handles errors, a stream's root cause is the whole call's error."""
    cases = [Case(mode, kinds, answers) for mode in MODES]
    for case in cases[1:]:
        assert case.outcome() == cases[0].outcome(), case.mode
        assert case.log == cases[0].log, case.mode


def check_stream(case: Case) -> None:
    """Laws 3 and 4 for a stream that was read to its end."""
    ran = case.ran
    if not case.mode.streaming:
        return
    if ran.response is not None:
        assert ran.text == ran.response.text
    output = False
    for event in ran.events:
        output = False if isinstance(event, Restart) else output or event.has_output
    if ran.error is not None:
        assert isinstance(ran.error, StreamInterrupted) == output, ran.error
    if isinstance(ran.error, StreamInterrupted):
        assert ran.error.partial.text == ran.text
        assert ran.error.__cause__ is not None or "asked" in str(ran.error)


@many
@given(s.stacks, s.any_answers, st.integers(0, 4), st.sampled_from(STREAMS))
def test_early_stops(kinds, answers, stop_after, mode):
    """Law 2: a consumer that leaves at any point ends every flow, and frees the provider."""
    case = Case(mode, kinds, answers, stop_after=stop_after)
    case.check_ends()
