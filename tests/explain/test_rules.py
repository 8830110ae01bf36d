"""The rules of what hurts: for each, calls that show the harm, and that the recommended order does without it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry import trace
from support.canned_server import canned_server
from support.simulation import Reply, Simulation
from support.tracing_tools import Recorder

from fluxibly import LLM, LLMConfig, Message, Pipeline, Request, Response, Target, Usage
from fluxibly.errors import BudgetExceeded, CircuitOpen, FluxiblyError, ResponseInvalid, ServerError
from fluxibly.explain import all_rules
from fluxibly.middleware import (
    Balance,
    Budget,
    Cache,
    CircuitBreaker,
    Concurrency,
    Deadline,
    Defaults,
    Fallback,
    Guard,
    Hedge,
    Logging,
    RateLimit,
    Record,
    Redact,
    Replay,
    Retry,
    StreamMeter,
    Tools,
    Tracing,
    Validation,
)
from fluxibly.providers.openai import OpenAIProvider
from fluxibly.testing import Delay, ScriptedProvider, VirtualClock
from fluxibly.types import ToolCall

ADDRESS = "ada@example.org"
MAIL = Request(model="m", messages=f"Write to {ADDRESS}.")
REQUEST = Request(model="m", messages="Hello")
AT_ONCE = {"base_delay": 0.0, "max_delay": 0.0}
PROVED: dict[str, list[str]] = {}
"""The rules that have a proof, and the names of the tests."""
_compared: list[str] = []


def proves(rule: str) -> Callable[..., Any]:
    """Mark a test as the proof of a rule. It has to compare two stacks by `compare`."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        PROVED.setdefault(rule, []).append(test.__name__)

        @wraps(test)
        def proof(*args: Any, **kwargs: Any) -> None:
            _compared.clear()
            test(*args, **kwargs)
            assert rule in _compared, f"expected compare({rule!r}, …) in the proof, got none"

        return proof

    return decorate


def compare(
    rule: str, observe: Callable[[list[Any]], object], hurts: list[Any], fine: list[Any], **options: Any
) -> tuple[object, object]:
    """Return what is observed with a stack that hurts and with the recommended one. Only the first has the warning."""
    assert rule in found(hurts, **options)
    assert rule not in found(fine, **options)
    _compared.append(rule)
    return observe(hurts), observe(fine)


def found(stack: list[Any], provider: Any = None, config: LLMConfig | None = None) -> set[str]:
    """Return the names of the rules that an explanation of a stack mentions."""
    if config is not None:
        with LLM(config, stack) as llm:
            explanation = llm.explain()
    else:
        explanation = Pipeline(ScriptedProvider() if provider is None else provider, stack).explain()
    return {each.rule.name for each in (*explanation.warnings, *explanation.notes)}


class Calls:
    """Calls through a stack to a scripted provider, in virtual time."""

    def __init__(self, stack: list[Any], *answers: Any) -> None:
        self.clock = VirtualClock()
        self.provider = ScriptedProvider(*answers, clock=self.clock)
        self.pipeline = Pipeline(self.provider, stack, clock=self.clock)

    def outcome(self, request: Request = REQUEST) -> object:
        """Make a call, and return the text of its answer, or the class of its error."""
        try:
            return self.pipeline.complete(request).text
        except FluxiblyError as error:
            return type(error)

    @property
    def sent(self) -> int:
        return len(self.provider.requests)


def down(count: int) -> list[Exception]:
    return [ServerError("down") for _ in range(count)]


# What is kept and shown


@proves("cache-outside-of-redact")
def test_a_cache_with_personal_data(tmp_path):
    """The address that Redact has restored stands in the cache's file; else only the placeholder does."""

    def is_in_clear(stack: list[Any]) -> bool:
        Calls(stack, "I wrote to [email 1].").outcome(MAIL)
        files = tmp_path.glob(f"{'hurts' if isinstance(stack[0], Cache) else 'fine'}.db*")
        return ADDRESS.encode() in b"".join(file.read_bytes() for file in files)

    redact = Redact(restore=True, replace="[{name} {number}]")
    hurts, fine = (Cache(f"sqlite:{tmp_path / name}.db", namespace="n") for name in ("hurts", "fine"))
    assert compare("cache-outside-of-redact", is_in_clear, [hurts, redact], [redact, fine]) == (True, False)


@proves("cache-outside-of-redact")
def test_a_cache_that_tells_people_apart():
    """Requests that are equal without their addresses are asked anew; else one answer serves both."""

    def sent(stack: list[Any]) -> int:
        calls = Calls(stack, "Done.", "Done.")
        for name in ("ada", "bob"):
            calls.outcome(REQUEST.evolve(messages=f"Write to {name}@example.org."))
        return calls.sent

    assert compare("cache-outside-of-redact", sent, [Cache(), Redact()], [Redact(), Cache()]) == (2, 1)


@pytest.mark.parametrize("kind", [Record, lambda file: Replay(file, missing="ask")], ids=["Record", "Replay"])
@proves("record-outside-of-redact")
def test_a_recording_with_personal_data(kind, tmp_path):
    """The address stands in the recording; else only the name of its pattern does."""

    def is_in_clear(stack: list[Any]) -> bool:
        Calls(stack, "Done.").outcome(MAIL)
        (layer,) = (layer for layer in stack if isinstance(layer, (Record, Replay)))
        return ADDRESS in Path(layer.file).read_text(encoding="utf-8")

    hurts, fine = [kind(tmp_path / "hurts.jsonl"), Redact()], [Redact(), kind(tmp_path / "fine.jsonl")]
    assert compare("record-outside-of-redact", is_in_clear, hurts, fine) == (True, False)


@proves("content-outside-of-redact")
def test_spans_with_personal_data():
    """The span has the address that Redact has restored, unless it is redacted for the span, too."""
    recorder = Recorder()
    redact = Redact(restore=True, replace="[{name} {number}]")

    def is_in_clear(stack: list[Any]) -> bool:
        recorder.exporter.clear()
        Calls(stack, "I wrote to [email 1].").outcome(MAIL)
        return ADDRESS in str([dict(span.attributes or {}) for span in recorder.spans])

    hurts = [recorder.tracing(capture="span"), redact]
    fine = [recorder.tracing(capture="span", redact=Redact()), redact]
    assert compare("content-outside-of-redact", is_in_clear, hurts, fine) == (True, False)


@proves("content-outside-of-redact")
def test_log_lines_with_personal_data(caplog):
    """The previews at DEBUG have the address, unless they are redacted, too."""
    caplog.set_level(logging.DEBUG, "fluxibly")

    def is_in_clear(stack: list[Any]) -> bool:
        caplog.clear()
        Calls(stack, "Done.").outcome(MAIL)
        return ADDRESS in caplog.text

    hurts, fine = [Logging(), Redact()], [Logging(redact=Redact()), Redact()]
    assert compare("content-outside-of-redact", is_in_clear, hurts, fine) == (True, False)


def test_content_that_is_not_shown_is_no_harm(monkeypatch):
    """Without capture, and from INFO up, there is no warning; with either there is, wherever it is set."""
    logger = logging.getLogger("fluxibly")
    monkeypatch.setattr(logger, "level", logging.INFO)
    logger.manager._clear_cache()  # type: ignore[attr-defined]
    assert not found([Tracing(), Logging(), Redact()])
    monkeypatch.setenv("OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT", "SPAN_ONLY")
    assert found([Tracing(), Redact()]) == {"content-outside-of-redact"}
    assert not found([Redact(), Tracing()])
    assert not found([Tracing(capture="none"), Redact()])
    monkeypatch.delenv("OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT")
    monkeypatch.setattr("fluxibly.telemetry._content._by_default", ["event"])
    assert found([Tracing(), Redact()]) == {"content-outside-of-redact"}
    assert not found([Tracing(tracer_provider=trace.NoOpTracerProvider()), Redact()])


@proves("budget-outside-of-cache")
def test_a_hit_that_the_budget_refuses():
    """An answer that is there already is refused, because the budget is spent."""

    def second(stack: list[Any]) -> object:
        calls = Calls(stack, Response("Paris.", usage=Usage(input_tokens=900, output_tokens=95)))
        calls.outcome()
        return calls.outcome()

    hurts, fine = [Budget(tokens=1000), Cache()], [Cache(), Budget(tokens=1000)]
    assert compare("budget-outside-of-cache", second, hurts, fine) == (BudgetExceeded, "Paris.")


@proves("limit-outside-of-cache")
def test_a_hit_that_waits_for_the_rate():
    """A hit waits a minute for a request that is never sent."""

    def waited(stack: list[Any]) -> float:
        calls = Calls(stack, "Paris.")
        calls.outcome()
        calls.outcome()
        return calls.clock.now()

    hurts, fine = [RateLimit(requests=1), Cache()], [Cache(), RateLimit(requests=1)]
    assert compare("limit-outside-of-cache", waited, hurts, fine) == (60, 0)


@proves("limit-outside-of-cache")
def test_a_hit_that_the_circuit_refuses():
    """A hit is refused while the provider is down, though it is not needed."""

    def third(stack: list[Any]) -> object:
        calls = Calls(stack, "Paris.", *down(1))
        calls.outcome()
        calls.outcome(REQUEST.evolve(messages="Another question"))
        return calls.outcome()

    hurts, fine = [CircuitBreaker(failures=1), Cache()], [Cache(), CircuitBreaker(failures=1)]
    assert compare("limit-outside-of-cache", third, hurts, fine) == (CircuitOpen, "Paris.")


@proves("limit-outside-of-cache")
def test_a_hit_that_waits_for_a_place():
    """A hit waits until another call has ended."""

    def waited(stack: list[Any]) -> float:
        simulation = Simulation(stack, Reply(latency=10.0))
        simulation.call(REQUEST)
        simulation.run()
        begun = simulation.now
        simulation.call(Request(model="m", messages="A long question"))
        hit = simulation.call(REQUEST)
        simulation.run()
        return (hit.ended_at or 0.0) - begun

    hurts, fine = [Concurrency(1), Cache()], [Cache(), Concurrency(1)]
    assert compare("limit-outside-of-cache", waited, hurts, fine) == (10, 0)


@proves("cache-inside-of-validation")
def test_a_bad_answer_that_stays():
    """The answer that did not pass is given to the next call, too, which could have a good one."""

    def second(stack: list[Any]) -> object:
        calls = Calls(stack, "bad", "good")
        calls.outcome()
        return calls.outcome()

    judge = Validation(check=lambda response: "be good" if response.text == "bad" else None, max_retries=0)
    hurts, fine = [judge, Cache()], [Cache(), judge]
    assert compare("cache-inside-of-validation", second, hurts, fine) == (ResponseInvalid, "good")


@proves("defaults-inside-of-cache")
def test_an_answer_to_other_parameters(tmp_path):
    """A program with other defaults gets the answer of the first from the cache that they share."""

    def second(stack: list[Any]) -> object:
        first, *_ = (layer for layer in stack if isinstance(layer, Cache))
        Calls(stack, "in JSON").outcome()
        others = [Cache(first.store, namespace="n") if layer is first else Defaults(seed=2) for layer in stack]
        return Calls(others, "in prose").outcome()

    hurts, fine = (Cache(f"sqlite:{tmp_path / name}.db", namespace="n") for name in ("hurts", "fine"))
    made = compare("defaults-inside-of-cache", second, [hurts, Defaults(seed=1)], [Defaults(seed=1), fine])
    assert made == ("in JSON", "in prose")


# Tools

CALL = Response(tool_calls=[ToolCall(id="1", name="pay", arguments={"whom": "ada"})], finish_reason="tool_call")


class Payments:
    """A function that must not run twice, with what it was called with."""

    def __init__(self, result: str = "paid") -> None:
        self.made: list[str] = []
        self.result = result

    def tools(self) -> Tools:
        def pay(whom: str) -> str:
            """Pay somebody."""
            self.made.append(whom)
            return self.result

        return Tools([pay])


@pytest.mark.parametrize("kind", ["Retry", "Fallback", "Balance"])
@proves("tools-inside-of-attempts")
def test_a_function_that_runs_twice(kind):
    """The second turn fails, and all begins again: the function runs twice. Else only the turn begins again."""
    payments = Payments()

    def times(stack: list[Any]) -> int:
        payments.made.clear()
        assert (
            Calls(stack, CALL, *down(1), *([CALL] if isinstance(stack[1], Tools) else []), "Done.").outcome() == "Done."
        )
        return len(payments.made)

    hurts, fine = [SEVERAL[kind](), payments.tools()], [payments.tools(), SEVERAL[kind]()]
    assert compare("tools-inside-of-attempts", times, hurts, fine) == (2, 1)


@proves("tools-inside-of-attempts")
def test_a_function_that_runs_for_each_request_of_a_race():
    """A second loop begins while the first is slow, and each runs the function; else the winner's call runs alone."""
    payments = Payments()

    def times(stack: list[Any]) -> int:
        payments.made.clear()
        clock = VirtualClock()

        class Slow(ScriptedProvider):
            def complete(self, request: Request) -> Response:
                clock.sleep(5.0)
                return Response("Done.") if request.messages[-1].role == "tool" else CALL

        Pipeline(Slow(), stack, clock=clock).complete(REQUEST)
        return len(payments.made)

    hurts, fine = [Hedge(1.0, max_share=1), payments.tools()], [payments.tools(), Hedge(1.0, max_share=1)]
    assert compare("tools-inside-of-attempts", times, hurts, fine) == (2, 1)


@proves("tools-inside-of-guard")
def test_a_function_with_arguments_that_were_not_checked():
    """The function has run before the guard sees anything; else the guard refuses its call."""
    payments = Payments()

    def made(stack: list[Any]) -> list[str]:
        payments.made.clear()
        Calls(stack, CALL, "Done.").outcome()
        return [*payments.made]

    guard = Guard(output=lambda response: "no payments" if response.tool_calls else None)
    hurts, fine = [guard, payments.tools()], [payments.tools(), guard]
    assert compare("tools-inside-of-guard", made, hurts, fine) == (["ada"], [])


@proves("tools-inside-of-redact")
def test_a_result_that_leaves_as_it_is():
    """The model's service gets the address in the function's result; else the name of its pattern."""

    def is_sent(stack: list[Any]) -> bool:
        calls = Calls(stack, CALL, "Done.")
        assert calls.outcome() == "Done."
        return ADDRESS in str(calls.provider.requests[-1].messages)

    tools = Payments(f"paid to {ADDRESS}").tools()
    assert compare("tools-inside-of-redact", is_sent, [Redact(), tools], [tools, Redact()]) == (True, False)


@proves("several-tools")
def test_functions_that_do_not_exist():
    """Of an answer that calls two functions, one runs; else both."""
    ran: list[str] = []

    def one() -> str:
        ran.append("one")
        return "done"

    def two() -> str:
        ran.append("two")
        return "done"

    def functions(stack: list[Any]) -> list[str]:
        ran.clear()
        both = [ToolCall(id=name, name=name, arguments={}) for name in ("one", "two")]
        Calls(stack, Response(tool_calls=both, finish_reason="tool_call"), "Done.").outcome()
        return sorted(ran)

    hurts, fine = [Tools([one]), Tools([two])], [Tools([one, two])]
    assert compare("several-tools", functions, hurts, fine) == (["one"], ["one", "two"])


# Attempts


def others(*answers: Any) -> Target:
    return Target(ScriptedProvider(*answers), model="other")


@pytest.mark.parametrize("kind", [Fallback, Balance])
@proves("fallback-inside-of-retry")
def test_a_blip_sends_the_call_elsewhere(kind):
    """After one failure the second target answers; else the first does, at its second attempt."""

    def answered(stack: list[Any]) -> object:
        return Calls(stack, *down(1), "first").outcome()

    def stack(*, retry_outside: bool) -> list[Any]:
        other = others("second")
        router = Fallback(to=[other]) if kind is Fallback else Balance(to=["m", other], policy="round_robin")
        layers = [Retry(max_retries=1, **AT_ONCE), router]
        return layers if retry_outside else layers[::-1]

    made = compare("fallback-inside-of-retry", answered, stack(retry_outside=True), stack(retry_outside=False))
    assert made == ("second", "first")


SEVERAL = {
    "Retry": lambda: Retry(max_retries=3, **AT_ONCE),
    "Hedge": lambda: Hedge(1.0, at_most=3, max_share=1),
    "Fallback": lambda: Fallback(to=["m-2", "m-3", "m-4"]),
    "Balance": lambda: Balance(to=["m-1", "m-2", "m-3", "m-4"], cool_down=0),
}
"""The layers that send four requests to a provider that is down."""


def failing(count: int) -> list[Any]:
    return [[Delay(5.0), ServerError("down")] for _ in range(count)]


@pytest.mark.parametrize("kind", SEVERAL)
@proves("rate-limit-outside-of-attempts")
def test_requests_that_no_rate_counts(kind):
    """One request a minute is allowed, and four are sent; else one is."""

    def sent(stack: list[Any]) -> int:
        calls = Calls(stack, *failing(4))
        calls.outcome()
        assert calls.clock.now() < 60
        return calls.sent

    def limit() -> RateLimit:
        return RateLimit(requests=1, by="provider", max_wait=0)

    several = SEVERAL[kind]
    hurts, fine = [limit(), several()], [several(), limit()]
    assert compare("rate-limit-outside-of-attempts", sent, hurts, fine) == (4, 1)


@proves("concurrency-outside-of-attempts")
def test_a_place_with_several_requests():
    """One request at once is allowed, and four are under way; else one is."""

    def most(stack: list[Any]) -> int:
        simulation = Simulation(stack, Reply(latency=10.0))
        simulation.call(REQUEST)
        simulation.run()
        return len([at for at, _ in simulation.sent if at < 10])

    hurts, fine = [Concurrency(1), SEVERAL["Hedge"]()], [SEVERAL["Hedge"](), Concurrency(1)]
    assert compare("concurrency-outside-of-attempts", most, hurts, fine) == (4, 1)


@proves("concurrency-outside-of-attempts")
def test_a_place_that_is_kept_while_nothing_runs():
    """A call waits while another call's Retry does nothing but wait."""

    def sent_at(stack: list[Any]) -> float:
        simulation = Simulation(
            stack, lambda call: Reply(0.0, "fine" if call.number or len(call.sent_at) > 1 else ServerError("down"))
        )
        simulation.call(REQUEST)
        second = simulation.call(REQUEST)
        simulation.run()
        return second.sent_at[0]

    retry = Retry(max_retries=1, base_delay=30.0, max_delay=30.0, uniform=max)
    hurts, fine = [Concurrency(1), retry], [retry, Concurrency(1)]
    assert compare("concurrency-outside-of-attempts", sent_at, hurts, fine) == (30, 0)


@pytest.mark.parametrize("kind", ["Fallback", "Balance"])
@proves("concurrency-outside-of-attempts")
def test_a_place_at_the_wrong_model(kind):
    """A call waits for the end of one that is at another model, which has places of its own."""

    def sent_at(stack: list[Any]) -> float:
        def reply(call: Any) -> Reply:
            first_fails = kind == "Fallback" and call.number == 0 and len(call.sent_at) == 1
            return Reply(0.0, ServerError("down")) if first_fails else Reply(10.0)

        simulation = Simulation(stack, reply)
        simulation.call(REQUEST)
        second = simulation.call(REQUEST)
        simulation.run()
        return second.sent_at[0]

    def router() -> Any:
        return Fallback(to=["m-2"]) if kind == "Fallback" else Balance(to=["m-1", "m-2"], policy="round_robin")

    hurts, fine = [Concurrency(1), router()], [router(), Concurrency(1)]
    assert compare("concurrency-outside-of-attempts", sent_at, hurts, fine) == (10, 0)


LONG = Request(model="m", messages="word " * 420)
"""A request of some 600 tokens: one fits into a budget of 1,000, and two do not."""


@proves("budget-outside-of-attempts")
def test_requests_that_no_budget_covers():
    """There is enough left for one request, and two are sent; else one is."""

    def sent(stack: list[Any]) -> int:
        calls = Calls(stack, [Delay(5.0), "late"], [Delay(5.0), "late"])
        calls.outcome(LONG)
        return calls.sent

    hurts, fine = [Budget(tokens=1000), Hedge(1.0)], [Hedge(1.0), Budget(tokens=1000)]
    assert compare("budget-outside-of-attempts", sent, hurts, fine) == (2, 1)


@pytest.mark.parametrize("kind", ["Retry", "Fallback"])
@proves("budget-outside-of-attempts")
def test_a_stream_begun_again_without_a_budget(kind):
    """What came before the stream broke has used the budget up, and the request is sent again; else it is refused."""

    def sent(stack: list[Any]) -> int:
        calls = Calls(stack, ["word " * 1000, *down(1)], ["again"])
        stream = calls.pipeline.stream(REQUEST, restarts=True)
        try:
            for _ in stream:
                pass
        except FluxiblyError:
            pass
        finally:
            stream.close()
        return calls.sent

    def again() -> Any:
        if kind == "Retry":
            return Retry(max_retries=1, on_interrupt="restart", **AT_ONCE)
        return Fallback(to=["m-2"], on_interrupt="restart")

    hurts, fine = [Budget(tokens=1500), again()], [again(), Budget(tokens=1500)]
    assert compare("budget-outside-of-attempts", sent, hurts, fine) == (2, 1)


@proves("budget-outside-of-attempts")
def test_a_target_at_another_price():
    """The dear model is asked, because the cheap one would fit; else it is refused."""

    def sent(stack: list[Any]) -> int:
        calls = Calls(stack, "dear")
        calls.outcome(LONG)
        return calls.sent

    def budget() -> Budget:
        return Budget(cost=0.01, prices={"m": (1, 1), "dear": (1000, 1000)})

    hurts, fine = [budget(), Balance(to=["dear"])], [Balance(to=["dear"]), budget()]
    assert compare("budget-outside-of-attempts", sent, hurts, fine) == (1, 0)


@pytest.mark.parametrize(("kind", "many"), [("Retry", 16), ("Hedge", 16), ("Fallback", 16), ("Balance", 16)])
@proves("circuit-breaker-outside-of-attempts")
def test_a_circuit_that_opens_late(kind, many):
    """Four failures open the circuit, and it takes sixteen requests until it knows of four; else four."""

    def sent(stack: list[Any]) -> int:
        calls = Calls(stack, *failing(40))
        for _ in range(10):
            calls.outcome()
        return calls.sent

    def breaker() -> CircuitBreaker:
        return CircuitBreaker(failures=4, within=1000, open_for=1000, by="provider")

    hurts, fine = [breaker(), SEVERAL[kind]()], [SEVERAL[kind](), breaker()]
    assert compare("circuit-breaker-outside-of-attempts", sent, hurts, fine) == (many, 4)


@proves("circuit-breaker-outside-of-attempts")
def test_a_circuit_that_never_opens():
    """The provider is down, and asked by every call, because the fallback answers."""

    def sent(stack: list[Any]) -> int:
        calls = Calls(stack, *down(10))
        for _ in range(10):
            assert calls.outcome() == "fine"
        return calls.sent

    def fallback() -> Fallback:
        return Fallback(to=[others(*["fine"] * 10)])

    hurts, fine = [CircuitBreaker(failures=4), fallback()], [fallback(), CircuitBreaker(failures=4)]
    assert compare("circuit-breaker-outside-of-attempts", sent, hurts, fine) == (10, 4)


@proves("concurrency-outside-of-rate-limit")
def test_a_place_for_a_call_that_may_not_run():
    """A call to another model waits for a place that a call holds which waits for its rate."""

    def sent_at(stack: list[Any]) -> float:
        simulation = Simulation(stack, Reply(latency=0.0))
        for _ in range(2):
            simulation.call(REQUEST)
        other = simulation.call(REQUEST.evolve(model="other"))
        simulation.run()
        return other.sent_at[0]

    def places() -> Concurrency:
        return Concurrency(1, by="provider", max_wait=1000)

    hurts, fine = [places(), RateLimit(requests=1)], [RateLimit(requests=1), places()]
    assert compare("concurrency-outside-of-rate-limit", sent_at, hurts, fine) == (60, 0)
    assert not found([Concurrency(1), RateLimit(requests=1, max_wait=0)])


@proves("deadline-inside-of-retry")
def test_a_deadline_that_begins_anew():
    """A call with a deadline of ten seconds takes forty; else ten."""

    def took(stack: list[Any]) -> float:
        calls = Calls(stack, *[[Delay(9.9), ServerError("down")] for _ in range(4)])
        calls.outcome()
        return calls.clock.now()

    retry = Retry(max_retries=3, **AT_ONCE)
    hurt, fine = compare("deadline-inside-of-retry", took, [retry, Deadline(10)], [Deadline(10), retry])
    assert (hurt, fine) == (pytest.approx(39.6), pytest.approx(10))
    assert not found([Retry(decide=lambda error, attempt: True), Deadline(10)])


@proves("several-retries")
def test_attempts_that_multiply():
    """A provider that is down gets sixteen requests for one call; else four."""

    def sent(stack: list[Any]) -> int:
        calls = Calls(stack, *down(16))
        calls.outcome()
        return calls.sent

    retry = Retry(max_retries=3, **AT_ONCE)
    assert compare("several-retries", sent, [retry, retry], [retry]) == (16, 4)
    assert not found([retry, Retry(max_retries=0)])


# Telemetry


@proves("several-tracings")
def test_tokens_that_count_twice():
    """The spans of one call have its ten tokens twice."""
    recorder = Recorder()

    def tokens(stack: list[Any]) -> int:
        recorder.exporter.clear()
        Calls(stack, Response("Paris.", usage=Usage(input_tokens=10, output_tokens=1))).outcome()
        return sum(span.attributes["gen_ai.usage.input_tokens"] for span in recorder.spans if span.attributes)

    hurts, fine = [recorder.tracing(), recorder.tracing()], [recorder.tracing()]
    assert compare("several-tracings", tokens, hurts, fine) == (20, 10)


@proves("logging-outside-of-tracing")
def test_lines_without_the_ids_of_the_trace(caplog):
    """No span is current while the lines of the call are logged; else the call's is."""
    caplog.set_level(logging.INFO, "fluxibly")
    recorder = Recorder()
    within: list[bool] = []

    class Noting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            within.append(trace.get_current_span().get_span_context().is_valid)

    def has_ids(stack: list[Any]) -> list[bool]:
        within.clear()
        Calls(stack, "Paris.").outcome()
        return [*within]

    handler = Noting()
    logging.getLogger("fluxibly").addHandler(handler)
    try:
        hurts, fine = [Logging(), recorder.tracing()], [recorder.tracing(), Logging()]
        made = compare("logging-outside-of-tracing", has_ids, hurts, fine)
    finally:
        logging.getLogger("fluxibly").removeHandler(handler)
    assert made == ([False, False], [True, True])


@proves("meter-outside-of-hold-back")
def test_a_meter_that_measures_the_guard():
    """The chunks come a second apart, and the meter says that they come at once."""

    def gap(stack: list[Any]) -> float | None:
        calls = Calls(stack, ["a ", Delay(1.0), "b ", Delay(1.0), "c"])
        with calls.pipeline.stream(REQUEST) as stream:
            for _ in stream:
                pass
        stats = stream.response.stats
        return None if stats is None else stats.gap_max

    for holds in (Guard(output=lambda response: None), Validation(hold=True)):
        assert compare("meter-outside-of-hold-back", gap, [StreamMeter(), holds], [holds, StreamMeter()]) == (0, 1)
    explanation = Pipeline(ScriptedProvider(), [StreamMeter(), Validation(hold=True)]).explain()
    assert not explanation.warnings


# Providers


class Client:
    """An SDK's client that sends a request again by itself."""

    def __init__(self, max_retries: int) -> None:
        self.max_retries = max_retries
        self.sent = 0

    def ask(self) -> None:
        self.sent += 1 + self.max_retries
        raise ServerError("down")


class Wrapping:
    """A provider around such a client."""

    def __init__(self, max_retries: int) -> None:
        self.client = Client(max_retries)

    def complete(self, request: Request) -> Response:
        self.client.ask()
        raise AssertionError("unreachable: the client raises")


@proves("sdk-retries")
def test_retries_of_a_client():
    """Four attempts send twelve requests, because the client of the provider retries, too."""
    retry = Retry(max_retries=3, **AT_ONCE)
    hurts, fine = Wrapping(2), Wrapping(0)
    for provider, count in ((hurts, 12), (fine, 4)):
        assert ("sdk-retries" in found([retry], provider)) is (provider is hurts)
        with pytest.raises(ServerError):
            Pipeline(provider, [retry], clock=VirtualClock()).complete(REQUEST)
        assert provider.client.sent == count
    _compared.append("sdk-retries")
    assert "sdk-retries" in found([Fallback(to=[Target(hurts)]), retry])


@pytest.mark.skipif(find_spec("litellm") is None, reason="needs LiteLLM")
@pytest.mark.filterwarnings("ignore")
@proves("sdk-retries")
def test_retries_of_litellm():
    """A server that is down gets more requests than there are attempts."""
    counts = []
    for retries in ({"num_retries": 2}, {}):
        with canned_server() as server:
            server.fail = (503, '{"error": {"message": "down"}}', {})
            config = LLMConfig(
                framework="litellm",
                model="openai/m",
                api_key="sk-test",
                api_base=f"{server.url}/v1",
                additional_params=retries,
            )
            retry = Retry(max_retries=1, **AT_ONCE)
            with LLM(config, [retry]) as llm:
                assert ("sdk-retries" in {each.rule.name for each in llm.explain().warnings}) is bool(retries)
                with pytest.raises(FluxiblyError):
                    llm.complete("Hello")
            counts.append(len(server.seen))
    _compared.append("sdk-retries")
    assert counts[0] > counts[1] == 2


@pytest.mark.skipif(find_spec("langchain_openai") is None, reason="needs langchain-openai")
@proves("sdk-retries")
def test_retries_of_a_chat_model():
    """A chat model of LangChain retries by its SDK, unless it is told not to."""
    from langchain_openai import ChatOpenAI

    from fluxibly.providers.langchain import LangChainProvider

    for retries, count in ((1, 4), (0, 2)):
        with canned_server() as server:
            server.fail = (503, '{"error": {"message": "down"}}', {})
            chat_model = ChatOpenAI(model="m", api_key="sk-test", base_url=f"{server.url}/v1", max_retries=retries)
            with Pipeline(LangChainProvider.wrap(chat_model), [Retry(max_retries=1, **AT_ONCE)]) as pipeline:
                assert ("sdk-retries" in {each.rule.name for each in pipeline.explain().warnings}) is bool(retries)
                with pytest.raises(FluxiblyError):
                    pipeline.complete(REQUEST)
            assert len(server.seen) == count
    _compared.append("sdk-retries")


@proves("foreign-model")
def test_a_model_at_the_wrong_vendor(monkeypatch):
    """OpenAI is asked for Anthropic's model, which it does not have; else Anthropic is."""
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    asked: list[str] = []

    def openai(request: httpx.Request) -> httpx.Response:
        model = json.loads(request.content)["model"]
        asked.append(f"{model} at {request.url.host}")
        status = 503 if model == "gpt-4o" else 404
        return httpx.Response(status, json={"error": {"message": "no"}})

    config = LLMConfig(framework="openai", model="gpt-4o", api_key="sk-test")

    def provider() -> OpenAIProvider:
        return OpenAIProvider(config, transport=httpx.MockTransport(openai))

    def outcome(stack: list[Any]) -> object:
        with Pipeline(provider(), stack) as pipeline:
            try:
                return pipeline.complete(Request(model="gpt-4o", messages=[Message.user("Hello")])).provider
            except FluxiblyError as error:
                return type(error).__name__

    with canned_server() as server:
        monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-test")
        monkeypatch.setenv("ANTHROPIC_BASE_URL", server.url)
        hurts, fine = [Fallback(to=["claude-sonnet-4-5"])], [Fallback(to=["anthropic:claude-sonnet-4-5"])]
        made = compare("foreign-model", outcome, hurts, fine, provider=provider())
        assert server.last.body["model"] == "claude-sonnet-4-5"
    assert made == ("NotFound", "anthropic")
    assert asked == ["gpt-4o at api.openai.com", "claude-sonnet-4-5 at api.openai.com", "gpt-4o at api.openai.com"]


# The table


def test_every_rule_is_proved():
    """Each rule has a test that shows its harm, and each such test is of a rule."""
    assert set(PROVED) == set(all_rules())


def test_every_rule_says_what_to_do():
    """Each row has a reason and a cure, which fit into one sentence."""
    for rule in all_rules().values():
        assert rule.reason[0].islower() or rule.reason.startswith("Retry")
        assert not rule.reason.endswith(".")
        assert not rule.cure.endswith(".")
