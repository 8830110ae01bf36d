"""`check_middleware`: the check of the laws for a user's own middleware, in all modes."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Iterator, Sequence
from typing import Any

from fluxibly.errors import root_cause
from fluxibly.flow.compose import layer_name
from fluxibly.flow.effects import Middleware
from fluxibly.pipeline import Pipeline
from fluxibly.stream import Stream
from fluxibly.testing._trial import LAWS, PLENTY, SCENARIOS, Probe, Records, Scenario, Trial, Watch
from fluxibly.testing.modes import MODES, Mode, run
from fluxibly.testing.scripted import Answer, AsyncScriptedProvider, ScriptedProvider, VirtualClock
from fluxibly.types import Chunk, Request, Response

PASSING = (KeyboardInterrupt, asyncio.CancelledError)
VERBS = ("sleep: ", "perform: ", "emit: ", "ask: ", "map_chunks", "hold_back: ", "stop_when: ", "on_end: ")
"""The beginnings of errors about what a middleware writes."""
PAUSE = 86_400
"""The seconds between two calls, so that a circuit that one call has opened is closed again when the next begins."""


def check_middleware(middleware: Middleware, *, request: Request | None = None) -> None:
    """Check that a middleware keeps the laws: run it through scripted scenarios in all modes.

    Args:
        middleware: an instance, as you would put it into a stack.
        request: the request to send, if the middleware needs special values in it. By default, each scenario has a
            prompt of its own, the same in all modes, and each run a field of its own in `extra`, so that a cache does
            not answer from an earlier run.

    Raises:
        AssertionError: the middleware breaks a law. The message states the law, what was expected, what happened, in
            which scenario and mode, and what to write instead.
    """
    _Checker(middleware, request).check()


class _Checker:
    def __init__(self, middleware: Middleware, request: Request | None) -> None:
        self.middleware = middleware
        self.name = layer_name(middleware)
        self.request = request
        self.asked = 0
        self.clock = VirtualClock()
        self.watch = Watch(middleware)

    def check(self) -> None:
        Pipeline(ScriptedProvider(), [self.middleware])
        with self.watch:
            self.holds_in_all_scenarios()
        self.keeps_calls_apart()
        self.keeps_nothing_on_itself()

    def holds_in_all_scenarios(self) -> None:
        self.holds_in(SCENARIOS[0])
        for kind in PASSING:
            for when, script in (("before output", []), ("after output", ["Hello"])):
                for mode in MODES:
                    self.lets_pass(kind(), f"a {kind.__name__} {when}", script, mode)
        for scenario in SCENARIOS[1:]:
            self.holds_in(scenario)

    def holds_in(self, scenario: Scenario) -> None:
        trials = [self.run(scenario, mode) for mode in MODES if mode.streaming or scenario.stop_after is None]
        self.compare(scenario, trials)

    def fail(self, law: int, what: str, where: str, advice: str) -> AssertionError:
        return AssertionError(
            f"the middleware {self.name} breaks law {law} ({LAWS[law]}): {what} (in {where}). {advice}"
        )

    def new_request(self, about: str) -> Request:
        """Return the request of a run. Its prompt depends on the scenario alone, because a middleware may quote it."""
        self.asked += 1
        return self.request or Request(
            model="m",
            messages=f"Say hello, please, in {about}",
            metadata={"of": ["mine"]},
            extra={"user": f"u-{self.asked:04}"},
        )

    # One run

    def run(self, scenario: Scenario, mode: Mode) -> Trial:
        """Run a scenario in a mode, and check the laws that a single run can break."""
        where = f"{scenario.name}, {mode}"
        trial = self.try_out(
            scenario.name, scenario.answers(), mode, stop_after=scenario.stop_after, restarts=scenario.restarts
        )
        self.is_well_formed(trial, where)
        self.sends_nothing_twice(trial, where)
        ran, provider = trial.ran, trial.provider
        if provider.opened != provider.closed:
            raise self.fail(
                2,
                f"expected all of the provider's streams closed, got {provider.closed} closed of {provider.opened} opened",
                where,
                "Let errors and GeneratorExit pass through",
            )
        if trial.records:
            raise self.fail(
                6, trial.records[0], where, "Do not yield in `finally`, nor in `except GeneratorExit` or a bare except"
            )
        if ran.leaks:
            raise self.fail(
                5,
                f"expected the context variable {ran.leaks[0]!r} as it was before the call, got another value",
                where,
                "Reset it in a `finally`: token = var.set(…); try: …; finally: var.reset(token)",
            )
        if not trial.probe.limits_left:
            raise self.fail(
                5,
                "expected the limits of the call as they were before it (call.leash), got others",
                where,
                "Restore them in a `finally`: outer = call.leash; call.leash = Leash(outer, …); try: …; finally: call.leash = outer",
            )
        returned = trial.probe.returned
        failed = scenario.partial is not None and len(provider.requests) == 1 and mode.streaming
        if returned is not None and failed and not trial.probe.past_failure:
            raise self.fail(
                11,
                f"expected StreamInterrupted for a stream that failed after {scenario.partial!r}, got a whole answer",
                where,
                "Let StreamInterrupted pass; its attribute `partial` has the incomplete answer for the caller",
            )
        self.has_what_went_out(trial, where)
        return trial

    def has_what_went_out(self, trial: Trial, where: str) -> None:
        """Check law 3, for a stream of which output has gone out."""
        probe, returned = trial.probe, trial.probe.returned
        if returned is None:
            return
        text = "".join(probe.texts)
        if probe.output and text != returned.text:
            raise self.fail(
                3,
                f"expected a response with the text of its chunks, {text!r}, got {returned.text!r}",
                where,
                "Change the text of the chunks: response = yield from map_chunks(call_next(request), fn). Of a chunk that "
                "emit(…) lets out, the response needs the text: response.evolve(text=…)",
            )
        if (probe.output or probe.added) and probe.added != returned.added:
            raise self.fail(
                3,
                f"expected a response with the {len(probe.added)} messages of its marks in `added`, got {len(returned.added)}",
                where,
                "Return response.evolve(added=…) with the messages of every emit(Chunk(added=…)), in their order",
            )

    def try_out(self, about: str, answers: Sequence[Answer], mode: Mode, **options: Any) -> Trial:
        clock = self.clock
        clock.advance(PAUSE)
        self.watch.next_call()
        provider = (AsyncScriptedProvider if mode.backend else ScriptedProvider)(*answers, clock=clock)
        request = self.new_request(about)
        before = copy.deepcopy((dict(request.metadata), dict(request.extra), dict(request.headers)))
        probe = Probe()
        with Records() as records:
            ran = run(mode, provider, [probe, self.middleware], request, clock=clock, **options)
        if before != (request.metadata, request.extra, request.headers):
            raise self.fail(
                7,
                "expected the request unchanged, got other metadata, extra or headers",
                str(mode),
                "Pass a changed copy on: call_next(request.evolve(metadata={**request.metadata, 'key': value}))",
            )
        return Trial(mode, ran, provider, probe, records.messages)

    def is_well_formed(self, trial: Trial, where: str) -> None:
        error = None if trial.ran.error is None else root_cause(trial.ran.error)
        if isinstance(error, TypeError) and str(error).startswith(f"the middleware {self.name}"):
            raise AssertionError(f"{error} (in {where})") from error
        if isinstance(error, (TypeError, ValueError)) and str(error).startswith(VERBS):
            raise AssertionError(f"the middleware {self.name}: {error} (in {where})") from error

    def sends_nothing_twice(self, trial: Trial, where: str) -> None:
        if trial.probe.resent is not None:
            advice = (
                "Let StreamInterrupted pass: catch ProviderError, not Exception, around `yield from call_next(request)`"
            )
            if trial.probe.resent == "after an answer":
                advice = (
                    "To go on after an answer, let out a mark first: yield from emit(Chunk(added=(response.message, …))), and "
                    "return response.evolve(added=…) with the messages of all marks"
                )
            raise self.fail(
                4,
                "expected no request after output had been delivered, got another request to the provider "
                f"{trial.probe.resent}",
                where,
                advice,
            )

    # Several runs

    def compare(self, scenario: Scenario, trials: Sequence[Trial]) -> None:
        """Check law 1, except that a whole call may retry, or never see, a failure that ends a stream after output.

        After such a failure, a stream may go on where it was cut, or it was stopped before; a whole call fails.
        """
        wholes = [trial for trial in trials if not trial.mode.streaming]
        streams = [trial for trial in trials if trial.mode.streaming]
        for group in (wholes, streams):
            for trial in group[1:]:
                self.agree(scenario, group[0], trial)
        late = scenario.later or scenario.partial is not None
        if wholes and not (late and (streams[0].ran.error is not None or streams[0].probe.past_failure)):
            self.agree(scenario, wholes[0], streams[0])

    def agree(self, scenario: Scenario, one: Trial, other: Trial) -> None:
        if scenario.restarts and one.mode.streaming != other.mode.streaming:
            return  # after a restart, the whole call and the stream may differ in the output before it
        if one.outcome != other.outcome:
            advice = "Do the same in all modes: read chunks with map_chunks, and do I/O with perform"
            if _only_differs("text", one.ran.response, other.ran.response):
                advice = "The function given to map_chunks has to produce the same text wherever the chunks are cut"
            if _only_differs("added", one.ran.response, other.ran.response):
                advice = (
                    "Write emit(Chunk(added=…)) and response.evolve(added=…) for all modes alike: what is emitted in a whole "
                    "call goes nowhere"
                )
            raise self.fail(
                1,
                f"expected the same result in all modes, got {one.summary} ({one.mode}) and {other.summary} ({other.mode})",
                scenario.name,
                advice,
            )

    def lets_pass(self, error: BaseException, what: str, script: Sequence[str], mode: Mode) -> None:
        trial = self.try_out(what, [[*script, error], *["Hello, world"] * PLENTY], mode)
        where = f"{what}, {mode}"
        self.sends_nothing_twice(trial, where)
        notes: list[str] = getattr(error, "__notes__", [])
        if notes:
            raise self.fail(
                6,
                notes[0].removeprefix("fluxibly: "),
                where,
                "Catch Exception, not BaseException; in a bare except or `finally`, neither return nor yield",
            )

    def keeps_calls_apart(self) -> None:
        """Check law 8: two streams that are read in turns give the same results as each alone."""
        scripts = (["Hello", ", ", "world"], ["Good", "bye ", "moon", "!"])
        self.clock.advance(PAUSE)
        streams = [self.reader(script) for script in scripts]
        turns: list[list[object]] = [[], []]
        open_streams = [0, 1]
        while open_streams:
            for n in tuple(open_streams):
                try:
                    turns[n].append(next(streams[n]))
                except StopIteration:
                    open_streams.remove(n)
        alone: list[list[object]] = []
        for script in scripts:
            self.clock.advance(PAUSE)
            alone.append([*self.reader(script)])
        if [*map(_summed, turns)] != [*map(_summed, alone)]:
            raise self.fail(
                8,
                "expected two concurrent calls to give the same results as each alone, got other results",
                "two streams read in turns",
                "Keep what belongs to a call in local variables of __call__, or in request.call.notes",
            )

    def keeps_nothing_on_itself(self) -> None:
        """Check law 8 for state that shows in no result."""
        name = self.watch.of_a_call
        if name is not None:
            raise self.fail(
                8,
                f"expected no state of a call on the instance, got self.{name} = …, which the next call overwrites",
                "all scenarios",
                "Use a local variable, or request.call.notes for what must survive a failure; guard with a lock of the "
                "instance what calls share on purpose",
            )

    def reader(self, script: Sequence[str]) -> Iterator[object]:
        provider = ScriptedProvider(*[script] * PLENTY)
        return _read(Pipeline(provider, [self.middleware], clock=self.clock).stream(self.new_request(f"{script}")))


def _read(stream: Stream[Chunk]) -> Iterator[object]:
    """Yield a stream's events, and at the end its response or its error."""
    try:
        yield from stream
    except Exception as error:  # noqa: BLE001  # compared by its message
        yield type(error), str(error)
    else:
        yield stream.response


def _only_differs(name: str, one: Response | None, other: Response | None) -> bool:
    return one is not None and other is not None and one.evolve(**{name: getattr(other, name)}) == other


def _summed(events: Sequence[object]) -> tuple[str, object]:
    """Return a stream's whole text and its end. An answer from a cache comes in other chunks."""
    return "".join([event.text for event in events if isinstance(event, Chunk)]), events[-1]
