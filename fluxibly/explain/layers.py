"""The built-in layers: the work of each in words, and its part in the worst case of a call."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias, cast

import attrs

from fluxibly._merging import composed
from fluxibly.config import LLMConfig
from fluxibly.explain.chain import Chain, Layer, adapted, config_of, own, targets_of, template_of
from fluxibly.explain.worst import ATTEMPTS, WorstCase, at_once, in_turn
from fluxibly.registry import frameworks
from fluxibly.target import Target
from fluxibly.types import Request

NO_STREAM_LIMIT = "a stream as a whole has no limit: set Timeouts(total=…), or Deadline"
NO_KNOWN_LIMIT = "the limits of the provider are not known, which LLM.explain() knows: set Deadline"
NO_LIMIT = "the configuration has no limit: set Timeouts(total=…), or Deadline"
OWN_LIMIT = "a provider of your own keeps its own limits: set Deadline"
_TOKENS = {"max_tokens", "max_completion_tokens", "max_output_tokens", "maxOutputTokens", "maxTokens", "num_predict"}
"""The fields of a request's body that limit the output, by the words of the services."""


class Case:
    """A layer of a chain, in one mode, with the request that reaches it."""

    def __init__(self, search: Search, layer: Layer, place: int, request: Request) -> None:
        self._search = search
        self._place = place
        self.layer: Any = layer.layer
        self.by = str(layer)
        self.request = request
        self.streaming = search.streaming

    def inner(self, request: Request | None = None) -> WorstCase:
        """Return the worst case of one request to what is inside of the layer; by default the one that reached it."""
        found = self._search.of(self._place + 1, self.request if request is None else request)
        return attrs.evolve(found, by=self.by)

    def asked(self, target: Target) -> WorstCase:
        """Return the worst case of one request to a target; nothing is sent to one that cannot say what it gets."""
        request = adapted(self.request, target)
        return WorstCase(requests=0, tokens=0, by=self.by) if request is None else self.inner(request)


class Search:
    """The worst case of a chain in one mode, from the provider outwards."""

    def __init__(self, chain: Chain, *, streaming: bool) -> None:
        self.chain = chain
        self.streaming = streaming
        self._known: dict[tuple[object, ...], WorstCase] = {}

    def run(self) -> WorstCase:
        """Return the worst case of a call."""
        # With a list of what is still to be found, because a stack of a few hundred layers is too high for recursion.
        asked = [(0, template_of(self.chain.config))]
        while asked:
            place, request = asked[-1]
            try:
                found = self._found(place, request)
            except _NotKnown as inner:
                asked.append((inner.place, inner.request))
            else:
                self._known[_key(place, request)] = found
                asked.pop()
        return self.of(0, template_of(self.chain.config))

    def of(self, place: int, request: Request) -> WorstCase:
        """Return the worst case of a request that reaches the layer at a place, counted from 0.

        Raises:
            _NotKnown: it has to be found first.
        """
        found = self._known.get(_key(place, request))
        if found is None:
            raise _NotKnown(place, request)
        return found

    def _found(self, place: int, request: Request) -> WorstCase:
        if place == len(self.chain.layers):
            return self._of_provider(request)
        layer = self.chain.layers[place]
        case = Case(self, layer, place, request)
        if layer.kind is None or own(layer.layer, "worst_case") is not None:
            return _of_own(case)
        adds = LAYERS[layer.kind].adds
        return case.inner() if adds is None else adds(case)

    def _of_provider(self, request: Request) -> WorstCase:
        config, given = self.chain.config, isinstance(request.target, Target)
        if isinstance(request.target, Target):
            config = config_of(request.target)
        one = WorstCase(tokens=_most_tokens(request))
        if config is None:
            return one.without_limit(OWN_LIMIT if given else NO_KNOWN_LIMIT)
        if not _keeps_limits(config):
            return one.without_limit(OWN_LIMIT)
        limit = config.stream_total if self.streaming else config.timeouts.total
        if limit is None:
            return one.without_limit(NO_STREAM_LIMIT if self.streaming else NO_LIMIT)
        return attrs.evolve(one, waits={ATTEMPTS: limit})


class _NotKnown(Exception):
    """The worst case of a request that reaches a place has to be found first."""

    def __init__(self, place: int, request: Request) -> None:
        super().__init__()
        self.place = place
        self.request = request


def _key(place: int, request: Request) -> tuple[object, ...]:
    """Return what the worst case of a request depends on."""
    return (place, id(request.target), request.max_tokens, request.n, *_limits_in(request.extra))


def _keeps_limits(config: LLMConfig) -> bool:
    """Whether the provider keeps the limits of its configuration, as those of all built-in frameworks do."""
    framework = frameworks().get(config.framework)
    return framework is not None and bool(framework.module)


def _most_tokens(request: Request) -> int | None:
    """Return the most tokens of output of one request. `additional_params` win, as they do in the body."""
    limits = [*_limits_in(request.extra)]
    limit = limits[-1] if limits else request.max_tokens
    return None if limit is None else limit * (request.n or 1)


def _limits_in(body: Mapping[str, Any], depth: int = 0) -> Iterator[int]:
    for name, value in body.items():
        if name in _TOKENS and isinstance(value, int) and value > 0:
            yield value
        elif isinstance(value, Mapping) and depth < 2:
            yield from _limits_in(cast("Mapping[str, Any]", value), depth + 1)


def _of_own(case: Case) -> WorstCase:
    """Return the worst case of a layer of the user's own: what it says itself, or else that of one request."""
    inner = case.inner()
    tell = own(case.layer, "worst_case")
    if tell is None:
        return inner.besides(f"what {case.by} sends")
    try:
        told = tell(inner)
    except Exception as error:  # noqa: BLE001  # a user's method may raise anything
        return inner.besides(f"what {case.by} sends (its worst_case raises {type(error).__name__})")
    return told if isinstance(told, WorstCase) else inner.besides(f"what {case.by} sends")


# The part of each layer in the worst case.


def _retry(case: Case) -> WorstCase:
    retry, inner = case.layer, case.inner()
    retries: int = max(retry.max_retries, *retry.limits.values(), 0)
    wait = math.fsum(_longest_backoff(retry, retries))
    worst = inner.repeated(1 + retries, "attempts").waiting(wait)
    if retry.total_time is not None and retry.total_time + inner.seconds < worst.seconds:
        # The last attempt begins before `total_time` has passed.
        worst = attrs.evolve(worst, waits=inner.waits).waiting(retry.total_time)
    return worst if retry.decide is None else worst.besides(f"the waits that decide= of {case.by} says")


def _longest_backoff(retry: Any, retries: int) -> Iterator[float]:
    for attempt in range(retries):
        backoff = min(retry.max_delay, retry.base_delay * 2.0 ** min(attempt, 60))
        yield max(backoff, retry.max_retry_after)  # a service may ask for any wait up to that


def _fallback(case: Case) -> WorstCase:
    return in_turn([case.inner(), *map(case.asked, targets_of(case.layer))], "targets")


def _balance(case: Case) -> WorstCase:
    if case.request.target is not None:  # a request that has a target passes
        return case.inner()
    return in_turn(map(case.asked, targets_of(case.layer)), "targets")


def _hedge(case: Case) -> WorstCase:
    hedge = case.layer
    # The first further request in a hundred calls is always allowed.
    extra: int = hedge.at_most if hedge.max_share == 1 else min(hedge.at_most, max(1, int(hedge.max_share * 100)))
    targets = targets_of(hedge)
    others = [case.asked(targets[place % len(targets)]) if targets else case.inner() for place in range(extra)]
    apart = math.inf if isinstance(hedge.after, str) else float(hedge.after)
    return at_once([case.inner(), *others], "requests", apart)


def _validation(case: Case) -> WorstCase:
    validation, inner = case.layer, case.inner()
    judges = validation.check is not None or validation.schema is not None
    asks_again = validation.empty == "retry" or (judges and (validation.hold or not case.streaming))
    return inner.repeated(1 + validation.max_retries, "answers") if asks_again else inner


def _tools(case: Case) -> WorstCase:
    worst = case.inner().repeated(case.layer.max_turns, "turns")
    return worst.without_limit(f"the functions of {case.by} take their own time: set Deadline")


def _continue(case: Case) -> WorstCase:
    return case.inner().repeated(case.layer.max_turns, "turns")


def _defaults(case: Case) -> WorstCase:
    request, parameters = case.request, case.layer.parameters
    changes = {
        name: parameters[name] for name in ("max_tokens", "n") if name in parameters and getattr(request, name) is None
    }
    if "extra" in parameters:
        changes["extra"] = composed(parameters["extra"], request.extra)
    return case.inner(request.evolve(**changes) if changes else None)


def _cache(case: Case) -> WorstCase:
    cache, inner = case.layer, case.inner()
    worst = inner.waiting(cache.streams_wait)
    return worst if case.streaming else worst.besides(f"the wait of {case.by} for equal calls under way")


def _replay(case: Case) -> WorstCase:
    if case.layer.missing == "ask":
        return case.inner()
    return WorstCase(requests=0, tokens=0, formula=f"none, because {case.by} answers", by=case.by)


def _guard(case: Case) -> WorstCase:
    functions = [case.layer.input, case.layer.output]
    asks = any(map(inspect.isgeneratorfunction, functions))
    return case.inner().besides(f"what the functions of {case.by} ask and wait for") if asks else case.inner()


def _queue(case: Case) -> WorstCase:
    return case.inner().waiting(case.layer.max_wait)


def _deadline(case: Case) -> WorstCase:
    return case.inner().within(case.layer.seconds)


Adds: TypeAlias = Callable[[Case], WorstCase]


@attrs.frozen
class About:
    """A kind of layer in words, and what it adds to the worst case."""

    whole: str
    """Its work on a whole answer, in words."""
    stream: str = ""
    """Its work on a stream, in words; empty if that is the same."""
    adds: Adds | None = attrs.field(default=None, kw_only=True)
    """A function that returns the worst case with the layer; None: the layer sends nothing and waits for nothing."""


LAYERS: Mapping[str, About] = {
    "Tracing": About(
        "records a span of the call, and of each attempt if there are several",
        "the same, and when the chunks came",
    ),
    "Logging": About("logs the start and the end of the call"),
    "Metrics": About(
        "records the duration and the tokens of the call",
        "the same, and the time to the first chunk and between chunks",
    ),
    "Timing": About("notes the times of the call and of its attempts"),
    "StreamMeter": About("nothing", "measures the chunks: how many, how fast, how evenly"),
    "Cost": About("adds up what the attempts cost"),
    "Deadline": About(
        "ends everything inside of it when the time is up",
        "the same, with the time that the consumer takes",
        adds=_deadline,
    ),
    "Defaults": About("sets the parameters that the request leaves open", adds=_defaults),
    "Tools": About(
        "runs the functions that the model calls, and asks again with their results",
        "the same after each streamed message",
        adds=_tools,
    ),
    "Continue": About(
        "asks for the rest of an answer that was cut at its limit of tokens",
        "the same, and the rest follows in the stream",
        adds=_continue,
    ),
    "Redact": About(
        "replaces what its patterns find in the request and the answer",
        "the same, and holds back what may become a match",
    ),
    "Cache": About(
        "answers an equal request from its store; equal calls at once send one request",
        "the same, with the chunks that came at first",
        adds=_cache,
    ),
    "Record": About("appends the exchange to its file", "the same, with the times of the chunks"),
    "Replay": About("answers from its file", "the same, with the recorded chunks", adds=_replay),
    "Guard": About(
        "checks the request and the answer before they pass",
        "holds the chunks back until they are checked",
        adds=_guard,
    ),
    "Validation": About(
        "checks the answer, and may ask again with the problem told",
        "checks the answer at its end; only held back may it ask again",
        adds=_validation,
    ),
    "ExtractReasoning": About(
        "moves the reasoning in the text to where reasoning belongs",
        "the same, and holds back what may become a tag",
    ),
    "Fallback": About(
        "asks the next target after an error",
        "asks the next target after an error before output",
        adds=_fallback,
    ),
    "Balance": About(
        "asks one of its targets, and the others after an error",
        "asks one of its targets, and the others after an error before output",
        adds=_balance,
    ),
    "Hedge": About(
        "sends a late request again; the first whole answer wins",
        "sends a late request again; the first output wins",
        adds=_hedge,
    ),
    "Retry": About(
        "sends the request again after an error that may pass",
        "sends the request again after an error before output",
        adds=_retry,
    ),
    "CircuitBreaker": About("refuses calls while the provider is down"),
    "Budget": About(
        "refuses an attempt for which too little is left",
        "the same, and ends a stream that runs over",
    ),
    "RateLimit": About("lets the attempt wait for its turn under the rate", adds=_queue),
    "Concurrency": About(
        "lets the attempt wait for a place",
        "the same; a stream has its place until it ends",
        adds=_queue,
    ),
    "StreamTimeout": About("nothing", "ends a stream whose chunks are late"),
    "SimulateStream": About("nothing", "cuts a whole answer into chunks where the provider cannot stream"),
}
"""The built-in layers, by the names of their classes."""


def about(layer: Layer) -> About:
    """Return what a layer does, in words: of one of your own, what it says itself.

    A layer says it by a method `describe()`, which returns a str, or one for whole answers and one for streams. Otherwise it is
    the first line of its docstring.
    """
    tell = own(layer.layer, "describe")
    if tell is None and layer.kind is not None:
        return LAYERS[layer.kind]
    try:
        told: object = None if tell is None else tell()
        if isinstance(told, str):
            return About(told)
        if isinstance(told, tuple):
            whole, stream = cast("tuple[object, object]", told)
            return About(str(whole), str(stream))
        return About(_first_line(layer.layer))
    except Exception as error:  # noqa: BLE001  # a user's method may raise anything
        return About(f"(its description raises {type(error).__name__})")


def _first_line(layer: Any) -> str:
    of = getattr(layer, "func", layer)  # of a partial
    # Of an object it is its class's; but attrs and dataclasses give no docstring, or one with the fields.
    text: object = of.__doc__ if hasattr(of, "__qualname__") else type(of).__doc__
    lines = inspect.cleandoc(text).strip().splitlines() if isinstance(text, str) else []
    return lines[0] if lines else "a layer of your own"
