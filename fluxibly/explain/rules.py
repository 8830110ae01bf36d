"""The orders of layers that hurt: a table of rules, each with its reason and its cure. Users register their own."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import attrs

from fluxibly._checks import one_of, text, validator
from fluxibly._logs import logger
from fluxibly.config import LLMConfig
from fluxibly.explain.chain import Chain, Layer, config_of, targets_of
from fluxibly.providers.services import OWN_MODELS, framework_of_model
from fluxibly.registry import frameworks

_SHOWN = 4
"""The most inner layers that a finding names."""


@attrs.frozen
class Match:
    """A place where a rule applies.

    Args:
        layers: the layers that it is about, outermost first.
        what: what stands where, in words, such as "Cache (2) stands outside of Redact (3)".
    """

    layers: Sequence[Layer]
    what: str


Find: TypeAlias = Callable[[Chain], Iterable[Match]]


def _is_function(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if not callable(value):
        raise TypeError(f"Rule: {attribute.name}: expected a function of a chain, got {value!r}")


@attrs.frozen
class Rule:
    """An order of layers that hurts.

    Args:
        name: in words with hyphens.
        find: a function of the `Chain` that yields a `Match` for each place; see `outside`.
        reason: what goes wrong.
        cure: what to write instead.
        level: "warning", or "note", which is never an error.

    Raises:
        ValueError: a text is empty, or the level is unknown.
        TypeError: `find` cannot be called.
    """

    name: str = attrs.field(validator=validator(text))
    find: Find = attrs.field(validator=_is_function, repr=False)
    reason: str = attrs.field(kw_only=True, validator=validator(text))
    cure: str = attrs.field(kw_only=True, validator=validator(text))
    level: Literal["warning", "note"] = attrs.field(
        default="warning", kw_only=True, validator=validator(one_of, ("warning", "note"))
    )


@attrs.frozen
class Finding:
    """A rule that applies to a stack. Its `str` has the layers with their places, the reason and the cure."""

    rule: Rule
    layers: tuple[Layer, ...]
    what: str

    def __str__(self) -> str:
        return f"{self.rule.name}: {self.what}: {self.rule.reason}; instead: {self.rule.cure}"


def outside(
    outer: str | Iterable[str],
    inner: str | Iterable[str],
    *,
    when_outer: Callable[[Any], bool] | None = None,
    when_inner: Callable[[Any], bool] | None = None,
) -> Find:
    """Return a function that finds layers of some classes that stand outside of layers of others.

    Args:
        outer, inner: the names of built-in classes, such as "Retry".
        when_outer, when_inner: functions of a middleware that say whether it counts.
    """
    outers, inners = _names(outer), _names(inner)

    def find(chain: Chain) -> Iterator[Match]:
        behind: list[Layer] = []
        found: list[Match] = []
        for layer in reversed(chain.layers):
            if layer.kind in outers and behind and (when_outer is None or when_outer(layer.layer)):
                others = behind[::-1]
                found.append(Match((layer, *others), f"{layer} stands outside of {_listed(others)}"))
            if layer.kind in inners and (when_inner is None or when_inner(layer.layer)):
                behind.append(layer)
        yield from reversed(found)

    return find


def inside(
    inner: str | Iterable[str], outer: str | Iterable[str], *, when_outer: Callable[[Any], bool] | None = None
) -> Find:
    """Return a function that finds layers of some classes that stand inside of layers of others; as `outside`."""
    inners, outers = _names(inner), _names(outer)

    def find(chain: Chain) -> Iterator[Match]:
        around: list[Layer] = []
        for layer in chain.layers:
            if layer.kind in inners and around:
                yield Match((*around, layer), f"{layer} stands inside of {_listed(around)}")
            if layer.kind in outers and (when_outer is None or when_outer(layer.layer)):
                around.append(layer)

    return find


def _names(kinds: str | Iterable[str]) -> frozenset[str]:
    return frozenset([kinds] if isinstance(kinds, str) else kinds)


def _listed(layers: list[Layer]) -> str:
    names = [str(layer) for layer in layers[:_SHOWN]]
    if len(layers) > _SHOWN:
        names.append(f"{len(layers) - _SHOWN} more")
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


# Questions that the rules ask of a layer.


def _retries(retry: Any) -> bool:
    return bool(max(retry.max_retries, *retry.limits.values(), 0) > 0)


def _retries_usually(retry: Any) -> bool:
    """Whether a Retry has the usual rule, by which a deadline is not retried."""
    return _retries(retry) and retry.decide is None


def _sends_again(layer: Any) -> bool:
    """Whether a Retry does retry; every other layer of those that send again does."""
    return not hasattr(layer, "max_retries") or _retries(layer)


def _waits(limit: Any) -> bool:
    return bool(limit.max_wait > 0)


def _judges(validation: Any) -> bool:
    return validation.check is not None or validation.schema is not None


def _holds(layer: Any) -> bool:
    """Whether a Guard or a Validation holds the chunks of a stream back."""
    return layer.hold is True if hasattr(layer, "hold") else layer.output is not None


def _records(layer: Any) -> bool:
    """Whether a Record or a Replay writes to its file."""
    return getattr(layer, "missing", "ask") == "ask"


def _shows_content(layer: Any) -> bool:
    """Whether a Tracing or a Logging shows prompts and answers as they are."""
    if layer.redact is not None:
        return False
    if hasattr(layer, "captures"):
        return bool(layer.captures)
    return logger.isEnabledFor(logging.DEBUG)


def _several(kind: str, when: Callable[[Any], bool] | None = None) -> Find:
    """Return a function that finds the layers of a class of which there should be one."""

    def find(chain: Chain) -> Iterator[Match]:
        found = [layer for layer in chain.of(kind) if when is None or when(layer.layer)]
        if len(found) > 1:
            yield Match(found, f"{_listed(found)} stand in one stack")

    return find


def _foreign_models(chain: Chain) -> Iterator[Match]:
    asked = chain.framework
    vendor = OWN_MODELS.get(asked or "")
    if vendor is None or _asks_a_gateway(chain):
        return  # it may have the models of many vendors
    balanced = False
    for layer in chain.layers:
        for target in targets_of(layer.layer):
            owner = framework_of_model(target.to) if isinstance(target.to, str) else None
            if owner is not None and owner != vendor and not balanced and config_of(target) is None:
                yield Match((layer,), f"{layer} asks {asked} for the model {target.to!r}; write '{owner}:{target.to}'")
        balanced = balanced or layer.kind == "Balance"


def _asks_a_gateway(chain: Chain) -> bool:
    """Whether requests may go to another server than the vendor's."""
    framework = frameworks().get(chain.framework or "")
    variable = None if framework is None else framework.url_var
    own_server = chain.config is not None and chain.config.api_base is not None
    return own_server or bool(variable and os.environ.get(variable))


def _sdk_retries(chain: Chain) -> Iterator[Match]:
    retries = [layer for layer in chain.of("Retry") if _retries(layer.layer)]
    if not retries:
        return
    told = [*_sdk_settings(chain.config, "additional_params")]
    told += _sdk_attributes(chain.provider)
    for layer in chain.layers:
        for place, target in enumerate(targets_of(layer.layer), 1):
            found = [*_sdk_settings(config_of(target), "additional_params"), *_sdk_attributes(target.provider)]
            told += [f"target {place} of {layer} has {each}" for each in found]
    for each in told:
        yield Match(retries, f"{_listed(retries)} {'stands' if len(retries) == 1 else 'stand'} around an SDK: {each}")


_SDK_RETRIES = ("max_retries", "num_retries")
_CLIENTS = ("client", "_client", "_source")
"""The attributes of a provider that may hold an SDK's client; `_source` is that of our LangChain provider."""


def _sdk_settings(config: LLMConfig | None, path: str) -> Iterator[str]:
    if config is not None and config.framework in ("langchain", "litellm"):
        for name in _SDK_RETRIES:
            yield from _told(f"{path}.{name}", config.additional_params.get(name))


def _sdk_attributes(provider: object) -> Iterator[str]:
    # Not by `getattr`, because a property of a provider may do I/O.
    attributes: Mapping[str, object] = getattr(provider, "__dict__", {})
    holders = [("", attributes)]
    holders += [(f"{name}.", getattr(attributes.get(name), "__dict__", {})) for name in _CLIENTS]
    for path, held in holders:
        for name in _SDK_RETRIES:
            yield from _told(f"{path}{name}", held.get(name))


def _told(name: str, value: object) -> Iterator[str]:
    if isinstance(value, int) and value > 0:
        yield f"{name}={value}"


_ATTEMPTS = ("Retry", "Hedge", "Fallback", "Balance")
"""The layers that send a request several times, or elsewhere."""

_BUILT_IN = (
    Rule(
        "cache-outside-of-redact",
        outside("Cache", "Redact"),
        reason="what Redact restores stands in the cache in clear, and requests that differ only in what it replaces are asked "
        "anew",
        cure="put Cache inside of Redact",
    ),
    Rule(
        "record-outside-of-redact",
        outside(("Record", "Replay"), "Redact", when_outer=_records),
        reason="what Redact replaces stands in the recording in clear",
        cure="put Record and Replay inside of Redact",
    ),
    Rule(
        "content-outside-of-redact",
        outside(("Tracing", "Logging"), "Redact", when_outer=_shows_content),
        reason="spans with captured content, and log lines at DEBUG, show what Redact replaces or has restored",
        cure="pass redact=Redact(…) to the layer, too; or capture nothing, and log from INFO up",
    ),
    Rule(
        "budget-outside-of-cache",
        outside("Budget", "Cache"),
        reason="hits, which are free, are refused when the budget is spent",
        cure="put Budget inside of Cache",
    ),
    Rule(
        "limit-outside-of-cache",
        outside(("RateLimit", "Concurrency", "CircuitBreaker"), "Cache"),
        reason="hits, which ask nobody, wait for the limit or are refused",
        cure="put the limit inside of Cache",
    ),
    Rule(
        "cache-inside-of-validation",
        inside("Cache", "Validation", when_outer=_judges),
        reason="an answer that does not pass stays in the cache, and is given to every later call",
        cure="put Cache outside of Validation",
    ),
    Rule(
        "defaults-inside-of-cache",
        inside("Defaults", "Cache"),
        reason="the key of the cache lacks the defaults, so others get an answer to other parameters",
        cure="put Defaults outside of Cache",
    ),
    Rule(
        "fallback-inside-of-retry",
        inside(("Fallback", "Balance"), "Retry", when_outer=_retries),
        reason="a blip of one target sends the call to the next, and each retry asks all targets again",
        cure="put Retry inside, so that each target is tried again before the next is asked",
    ),
    Rule(
        "tools-inside-of-attempts",
        inside("Tools", _ATTEMPTS, when_outer=_sends_again),
        reason="an error in a later turn begins all turns again, and the functions run twice",
        cure="put Tools outside",
    ),
    Rule(
        "tools-inside-of-guard",
        inside("Tools", "Guard", when_outer=lambda guard: guard.output is not None),
        reason="the functions run on arguments that were not checked",
        cure="put Tools outside of Guard",
    ),
    Rule(
        "tools-inside-of-redact",
        inside("Tools", "Redact", when_outer=lambda redact: redact.outgoing),
        reason="the results of the functions leave as they are",
        cure="put Tools outside of Redact",
    ),
    Rule(
        "several-tools",
        _several("Tools"),
        reason="where an answer calls functions of both, only those of the outer one run, and the model is told that the others "
        "do not exist",
        cure="give all functions to one Tools",
    ),
    Rule(
        "rate-limit-outside-of-attempts",
        outside("RateLimit", _ATTEMPTS, when_inner=_sends_again),
        reason="several attempts count as one request, and those of other targets at the wrong provider",
        cure="put RateLimit inside, where it sees each attempt",
    ),
    Rule(
        "concurrency-outside-of-attempts",
        outside("Concurrency", _ATTEMPTS, when_inner=_sends_again),
        reason="a place is for one call: it is kept while Retry waits, and has several attempts of Hedge in it or those at "
        "another target",
        cure="put Concurrency inside, where it sees each attempt",
    ),
    Rule(
        "budget-outside-of-attempts",
        outside("Budget", _ATTEMPTS, when_inner=_sends_again),
        reason="only the first attempt asks whether enough is left, at the price of the pipeline's own model; those that "
        "follow are sent anyway",
        cure="put Budget inside, where it sees each attempt",
    ),
    Rule(
        "circuit-breaker-outside-of-attempts",
        outside("CircuitBreaker", _ATTEMPTS, when_inner=_sends_again),
        reason="failed attempts go uncounted, so a provider that is down is asked on and on",
        cure="put CircuitBreaker inside, where it sees each attempt",
    ),
    Rule(
        "concurrency-outside-of-rate-limit",
        outside("Concurrency", "RateLimit", when_inner=_waits),
        reason="calls that wait for the rate hold the places of calls that could run",
        cure="put Concurrency inside of RateLimit",
    ),
    Rule(
        "deadline-inside-of-retry",
        inside("Deadline", "Retry", when_outer=_retries_usually),
        reason="each attempt gets the time anew, so a call takes longer than that; and one that is late is not retried",
        cure="put Deadline outside; to bound each attempt, set Timeouts",
    ),
    Rule(
        "several-retries",
        _several("Retry", _retries),
        reason="their attempts multiply, in an outage most of all",
        cure="keep one Retry; limits= counts the errors of a class apart",
    ),
    Rule(
        "several-tracings",
        _several("Tracing"),
        reason="each makes a span of the call with its tokens, which count twice",
        cure="keep the outermost Tracing",
    ),
    Rule(
        "logging-outside-of-tracing",
        outside("Logging", "Tracing"),
        reason="the lines of a call do not have the ids of its trace",
        cure="put Logging inside of Tracing",
    ),
    Rule(
        "sdk-retries",
        _sdk_retries,
        reason="its retries multiply those of Retry, which sees neither their errors nor their waits",
        cure="leave the setting out, or set it to 0",
    ),
    Rule(
        "foreign-model",
        _foreign_models,
        reason="a model without a framework is asked for at the provider that is asked already, which does not have it",
        cure="name the framework before a colon, as in 'anthropic:claude-sonnet-4-5'",
    ),
    Rule(
        "meter-outside-of-hold-back",
        outside("StreamMeter", ("Guard", "Validation"), when_inner=_holds),
        reason="it measures the chunks as they are let out, and not as the provider sends them",
        cure="put a StreamMeter inside, if the provider's speed is what you want to know",
        level="note",
    ),
)

_lock = threading.Lock()
_rules: dict[str, Rule] = {rule.name: rule for rule in _BUILT_IN}


def all_rules() -> Mapping[str, Rule]:
    """Return all rules by their names: the built-in ones, and those that were registered."""
    with _lock:
        return dict(_rules)


def register_rule(rule: Rule, *, replace: bool = False) -> None:
    """Add a rule, which every explanation from now on applies.

    Args:
        replace: take the place of a rule with the same name.

    Raises:
        ValueError: there is a rule with this name.
        TypeError: it is no `Rule`.
    """
    if not isinstance(rule, Rule):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers may be untyped
        raise TypeError(f"register_rule: expected a Rule, got {rule!r}; write Rule('name', find, reason=…, cure=…)")
    with _lock:
        if rule.name in _rules and not replace:
            raise ValueError(f"the rule {rule.name!r} exists already; pass replace=True to take its place")
        _rules[rule.name] = rule


def findings(chain: Chain) -> Iterator[Finding]:
    """Yield what the rules find in a chain. One that raises is found itself, as a note."""
    for rule in all_rules().values():
        try:
            found = [*rule.find(chain)]
        except Exception as error:  # noqa: BLE001  # a user's function may raise anything
            broken = Rule(
                rule.name, rule.find, reason="it could not be applied", cure="correct its function", level="note"
            )
            yield Finding(broken, (), f"the rule raises {type(error).__name__}")
            continue
        for match in found:
            yield Finding(rule, tuple(match.layers), chain.clean(match.what))
