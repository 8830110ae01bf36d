"""Middleware that bounds what calls spend, in tokens or in dollars."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import attrs

from fluxibly._checks import number, one_of, validator
from fluxibly._logs import log_decision
from fluxibly._tokens import BYTES_A_TOKEN, bytes_of
from fluxibly.calls import Spent
from fluxibly.errors import BudgetExceeded, ConfigError
from fluxibly.flow import CallNext, Flow, perform, provider_of
from fluxibly.flow.combinators import Combinator
from fluxibly.flow.effects import Effect, More
from fluxibly.flow.relay import Seen
from fluxibly.middleware._copies import Rebuilt
from fluxibly.middleware._estimates import FIRST_OUTPUT, Estimate, Estimates
from fluxibly.middleware._keys import check_word_or_function, text_of, whom, word_or_function
from fluxibly.middleware._shared import ON_STORE_ERROR, Later, OnStoreError, Shared
from fluxibly.prices import GivenPrices, Price, Prices, check_prices
from fluxibly.stores import Store, to_store
from fluxibly.stores.protocol import PARTS
from fluxibly.types import CallRecord, Chunk, ProviderInfo, Request, Response, Usage

_optional = attrs.validators.optional
Scope: TypeAlias = Literal["instance", "call"] | Callable[[Request], object]
_WORDS = ("instance", "call")
_NANO = 1_000_000_000
_FORGOTTEN = 1 - 2 / PARTS
"""The share of `per` after which a store may have forgotten a reservation, because it adds up what came at nearly one time."""
_STEP = 64
"""The tokens by which the reservation of a stream grows that runs over it."""


def _to_scope(value: Scope | str) -> Scope:
    return cast("Scope", word_or_function(value, _WORDS))


def _check_scope(name: str, value: object) -> str | None:
    return check_word_or_function(name, value, _WORDS)


def _to_store(value: Any) -> Any:
    return to_store(value, needs=("add",))


class _Limit(NamedTuple):
    """A limit of a budget. Amounts are whole numbers: tokens, or billionths of a dollar, which add up without errors."""

    unit: Literal["tokens", "dollars"]
    most: float

    def said(self, amount: float) -> str:
        """Write an amount for a message."""
        return f"{amount:.0f} tokens" if self.unit == "tokens" else f"${amount / _NANO:.6g}"


class _InCall:
    """What one budget knows of one call. The call's branches and `ask`s share it.

    Args:
        keys: the keys of the sums, one for each limit.
    """

    __slots__ = ("counted", "keys", "sums", "under_way")

    def __init__(self, keys: tuple[str, ...]) -> None:
        self.keys = keys
        self.counted = 0
        """The entries of `CallRecord.spent` that are counted."""
        self.under_way = 0
        """The attempts that hold a reservation."""
        self.sums: dict[str, float] = {}
        """What the call itself has spent, for a budget of each call."""

    def add(self, key: str, amount: float, most: float | None) -> float | None:
        """Do as `Store.add`."""
        total = self.sums.get(key, 0.0) + amount
        if amount >= 0 and most is not None and total > most:
            return None
        self.sums[key] = total
        return total


class _Use:
    """The reservation of one attempt."""

    __slots__ = ("began", "estimate", "info", "of_call", "output", "price", "request", "reserved")

    def __init__(self, request: Request, info: ProviderInfo, of_call: _InCall, estimate: Estimate) -> None:
        self.request = request
        self.info = info
        self.of_call = of_call
        self.price: Price | None = None
        self.began = request.call.clock()
        self.reserved: list[float] = []
        """The amount that is reserved of each limit."""
        self.expect(estimate)

    def expect(self, estimate: Estimate) -> None:
        """Set what the attempt is expected to take."""
        self.estimate = estimate
        self.output = estimate.total - estimate.input
        """The tokens of output that the reservation is for."""


@attrs.frozen(kw_only=True, eq=False)
class Budget(Rebuilt):
    """Middleware that bounds what calls spend. A call that would run over is refused before anything is sent.

    Every attempt reserves what it is expected to spend: its input and output are estimated, learned from the usage of
    earlier calls. When it ends, what it has spent takes the place of that. So calls at the same time exceed a budget at most
    by the error of their estimates. A stream that takes more than was reserved reserves more as it goes, and is ended if
    nothing is left. Failed attempts, losers of a race and every `ask` of the call count. Where a service does not report
    the tokens: those of an attempt that failed before output do not count, those of one that was cut off are estimated.

    Put `Budget` inside of `Cache`, so that answers from there are free, and inside of `Retry` and `Fallback`.

    Args:
        tokens: the most tokens, input and output together; None: no limit.
        cost: the most US dollars; None: no limit.
        per: the seconds that they are for, such as 86400 for a day: what was spent longer ago counts no more. None: for
            good.
        scope: what has a budget of its own: "instance" (the default: all calls through this object, or with a store of
            their own through all that share it), "call" (each call, with all its attempts), or what a function of the
            request returns, such as the user.
        prices: see `Cost`.
        unknown: what happens to a request whose model has no known price: "raise" raises `ConfigError`, "free" lets it pass
            and counts nothing for it.
        store: where the sums are: "memory" (the default: each instance has its own), "sqlite:PATH", "redis://HOST" (see
            `fluxibly.stores.RedisStore`), or a `fluxibly.stores.Store`.
        on_store_error: what happens when the store fails: "local" keeps the budget in this process until it works again,
            "raise" raises `StoreError`, "open" lets calls pass.

    Raises:
        BudgetExceeded: what is left does not cover the estimate of a call, or a stream ran over. In a stream after output,
            it is the cause of `StreamInterrupted`.
        ConfigError: neither `tokens` nor `cost` is given, or the price of a model is not known.
    """

    tokens: float | None = attrs.field(default=None, validator=_optional(validator(number, above=0)))
    cost: float | None = attrs.field(default=None, validator=_optional(validator(number, above=0)))
    per: float | None = attrs.field(default=None, validator=_optional(validator(number, above=0)))
    scope: Scope = attrs.field(default="instance", converter=_to_scope, validator=validator(_check_scope))
    prices: GivenPrices | None = attrs.field(default=None, validator=_optional(validator(check_prices)))
    unknown: Literal["raise", "free"] = attrs.field(default="raise", validator=validator(one_of, ("raise", "free")))
    store: Store = attrs.field(default=None, converter=_to_store)
    on_store_error: OnStoreError = attrs.field(default="local", validator=validator(one_of, ON_STORE_ERROR))
    counts_spent = True
    _shared: Shared = attrs.field(init=False, repr=False)
    _estimates: Estimates = attrs.field(init=False, repr=False)
    _limits: tuple[_Limit, ...] = attrs.field(init=False, repr=False)
    _prices: Prices | None = attrs.field(init=False, repr=False)
    """None: the budget is one of tokens alone."""
    _keys: tuple[str, ...] = attrs.field(init=False, repr=False)
    """The keys of the sums, unless the scope is a function."""
    _is_local: bool = attrs.field(init=False, repr=False)
    """Whether the sums are kept without I/O."""
    _note: str = attrs.field(init=False, repr=False)
    """The name of what this budget notes in the record of a call."""

    def __attrs_post_init__(self) -> None:
        if self.tokens is None and self.cost is None:
            raise ConfigError("Budget: expected tokens=… or cost=…, got neither; write Budget(cost=20, per=86400)")
        if self.scope == "call" and self.per is not None:
            raise ConfigError(
                "Budget: expected no per=… with scope='call', because a call has one budget until it ends"
            )
        limits: list[_Limit] = []
        if self.tokens is not None:
            limits.append(_Limit("tokens", self.tokens))
        if self.cost is not None:
            limits.append(_Limit("dollars", self.cost * _NANO))
        first_output = FIRST_OUTPUT if self.tokens is None else min(FIRST_OUTPUT, self.tokens / 10)
        shared = Shared(self.store, self.on_store_error, "Budget")
        free = self.unknown == "free"
        made = {
            "_shared": shared,
            "_estimates": Estimates(None, "Budget", first_output),
            "_limits": tuple(limits),
            "_prices": None if self.cost is None else Prices(self.prices, "Budget", needed=not free),
            "_is_local": shared.local or self.scope == "call",
            "_note": f"fluxibly.budget.{id(self)}",
        }
        for name, value in made.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "_keys", self._keys_of(self.scope) if isinstance(self.scope, str) else ())

    def __call__(self, request: Request, call_next: CallNext) -> Flow[Response]:
        call = request.call
        info = call.info_of(None) if request.target is None else (yield from provider_of(request))
        if call.when_spent is None:  # the layers of an `ask` are not the call's
            call.when_spent = []
        of_call = call.notes.get(self._note) or self._in_call(request, call.when_spent)
        use = _Use(request, info, of_call, self._estimates.of(request, f"{info.key}/{request.model}"))
        if self._prices is not None:
            use.price = self._prices.kept(info, request.model) or (yield from self._price(self._prices, request, info))
        ending = None if self._is_local else Later(call, self._shared, partial(self._settled, use))
        of_call.under_way += 1
        try:
            lacking = yield from self._take(use, math.ceil(use.estimate.input), math.ceil(use.output))
            if lacking is not None and self._needed(use, lacking) > lacking.most:
                # What was learned, of one long answer perhaps, would refuse all calls for good, and learn nothing new.
                use.expect(self._estimates.afresh(request, f"{info.key}/{request.model}"))
                lacking = yield from self._take(use, math.ceil(use.estimate.input), math.ceil(use.output))
            if lacking is not None:
                raise (yield from self._refusal(use, lacking))
            flow = call_next(request)
            response = yield from _Meter(self, use).over(flow) if call.streaming else flow
        except BaseException as error:
            if ending is None:
                self._settle_now(use)
            elif isinstance(error, Exception):
                yield from ending.run()
            raise
        if call.usage is not None:
            use.estimate.learn(call.usage)
        if ending is None:
            self._settle_now(use)
        else:
            yield from ending.run()
        return response

    def _in_call(self, request: Request, counts: list[Callable[[CallRecord], object]]) -> _InCall:
        """Return what this budget knows of a call that it meets for the first time."""
        call, scope = request.call, self.scope
        if isinstance(scope, str):
            keys = self._keys
        else:
            name = text_of(scope(request), "scope")
            keys = self._keys_of(f"of {len(name)} {name}")  # a name may read as if it had other words behind it
        found = call.notes[self._note] = _InCall(keys)
        counts.append(self._when_spent)
        if not self._is_local:
            Later(call, self._shared, partial(self._rest, call))
        return found

    def _keys_of(self, scope: str) -> tuple[str, ...]:
        per = "" if self.per is None else f" per {self.per:.17g}"
        return tuple([f"budget {scope}{per} {limit.unit}" for limit in self._limits])

    def _price(self, prices: Prices, request: Request, info: ProviderInfo) -> Flow[Price | None]:
        """Return the price of a request's model, or None if it counts nothing.

        Raises:
            ConfigError: it is not known.
        """
        if not prices.is_loaded and not prices.is_given(info, request.model):
            yield from perform(prices.load)
        price = prices.of(info, request.model)
        if price is None and self.unknown == "raise":
            raise ConfigError(
                f"Budget: expected a known price of {whom(request)}, found none; give it, in US dollars for a million tokens "
                f"of input and output: prices={{{request.model!r}: (0.15, 0.60)}}, or write unknown='free'"
            )
        return price

    # The sums

    def _take(self, use: _Use, taken: float, given: float) -> Flow[_Limit | None]:
        """Reserve tokens of input and of output, of each limit, all or nothing. Return the limit of which too little is left."""
        amounts = self._amounts(taken, given, use.price)
        for place, limit in enumerate(self._limits):
            if (yield from self._add(use, place, amounts[place], limit.most)) is None:
                for before in range(place):
                    yield from self._add(use, before, -amounts[before], None)
                return limit
        use.reserved = (
            [one + other for one, other in zip(use.reserved, amounts, strict=True)] if use.reserved else amounts
        )
        return None

    def _add(self, use: _Use, place: int, amount: float, most: float | None) -> Flow[float | None]:
        """Add an amount to what is spent of a limit, and return the sum. None: it would exceed `most`."""
        call = use.request.call
        if self._is_local:
            return self._add_now(call, use.of_call, place, amount, most)
        key = use.of_call.keys[place]
        total: float | None = yield from self._shared.ask(call, "add", key, amount, self.per, most=most)
        return total

    def _add_now(
        self, call: CallRecord, of_call: _InCall, place: int, amount: float, most: float | None = None
    ) -> float | None:
        key = of_call.keys[place]
        if self.scope == "call":
            return of_call.add(key, amount, most)
        total: float | None = self._shared.store.add(key, amount, self.per, call.clock(), most=most)
        return total

    def extend(self, use: _Use, output: float) -> Flow[None]:
        """Reserve more for a stream whose output has become longer than was expected.

        Raises:
            BudgetExceeded: too little is left.
        """
        for tokens in (output + _STEP, output):
            if (yield from self._take(use, 0.0, math.ceil(tokens - use.output))) is None:
                use.output = tokens
                return
        log_decision(use.request, "Budget", f"ends the stream: it ran over the budget ({self._numbers()})")
        raise BudgetExceeded(
            f"Budget ({self._numbers()}) ends a stream of {whom(use.request)} that has used up what was left; raise the "
            "budget, or ask for less with max_tokens"
        )

    def _refusal(self, use: _Use, limit: _Limit) -> Flow[BudgetExceeded]:
        place = self._limits.index(limit)
        needed = self._needed(use, limit)
        spent = yield from self._add(use, place, 0.0, None)
        left = max(0.0, limit.most - (spent or 0.0))
        why = f"it needs about {limit.said(needed)}, and {limit.said(left)} are left"
        log_decision(use.request, "Budget", f"refuses the call: {why} ({self._numbers()})")
        return BudgetExceeded(
            f"Budget ({self._numbers()}) refuses a call of {whom(use.request)}: {why}; raise the budget, or ask for less "
            "with max_tokens",
            never_fits=needed > limit.most,
        )

    def _needed(self, use: _Use, limit: _Limit) -> float:
        """Return what an attempt is expected to take of a limit."""
        amounts = self._amounts(math.ceil(use.estimate.input), math.ceil(use.output), use.price)
        return amounts[self._limits.index(limit)]

    def _numbers(self) -> str:
        given = {"tokens": self.tokens, "cost": self.cost, "per": self.per}
        said = [f"{name}={value:g}" for name, value in given.items() if value is not None]
        return ", ".join([*said, *(["for each call"] if self.scope == "call" else [])])

    # What was spent

    def _amounts(self, taken: float, given: float, price: Price | None, usage: Usage | None = None) -> list[float]:
        """Return what tokens of input and of output take of each limit. `usage` says how many of the input were cached."""
        amounts: list[float] = []
        if self.tokens is not None:
            amounts.append(taken + given)
        if self.cost is not None:
            amounts.append(0.0 if price is None else price.nano(taken, given, usage))
        return amounts

    def _uncounted(self, of_call: _InCall, spent: Sequence[Spent]) -> list[float]:
        """Return the amounts that attempts have spent since they were last counted, and count them."""
        totals = [0.0] * len(self._limits)
        for each in spent[of_call.counted :]:
            usage = each.guess or each.usage
            if usage is not None and not each.refused:
                price = None if self._prices is None else self._price_of(self._prices, each)
                amounts = self._amounts(usage.input_tokens or 0, usage.output_tokens or 0, price, usage)
                # Nothing that a provider reports gives anything back.
                totals = [one + max(other, 0.0) for one, other in zip(totals, amounts, strict=True)]
        of_call.counted = len(spent)
        return totals

    def _price_of(self, prices: Prices, spent: Spent) -> Price | None:
        """Return the price of an attempt, which may be one that was not made through this layer."""
        price = prices.of(spent.provider, spent.model, spent.answered)
        if price is None and self.unknown == "raise":
            prices.report(spent)
        return price

    def _changes(self, use: _Use) -> list[float]:
        """Return the changes of the sums that put what was spent in place of what was reserved."""
        call, of_call = use.request.call, use.of_call
        of_call.under_way -= 1
        changes = self._uncounted(of_call, call.spent)
        # What was reserved long ago is forgotten already.
        if use.reserved and (self.per is None or call.clock() - use.began < _FORGOTTEN * self.per):
            return [change - amount for change, amount in zip(changes, use.reserved, strict=True)]
        return changes

    def _settle_now(self, use: _Use) -> None:
        for place, change in enumerate(self._changes(use)):
            if change:
                self._add_now(use.request.call, use.of_call, place, change)

    def _settled(self, use: _Use) -> list[tuple[Any, ...]]:
        """Return the changes as calls of the store's methods."""
        return self._additions(use.of_call, self._changes(use))

    def _additions(self, of_call: _InCall, changes: Sequence[float]) -> list[tuple[Any, ...]]:
        return [("add", key, change, self.per) for key, change in zip(of_call.keys, changes, strict=True) if change]

    def _when_spent(self, call: CallRecord) -> None:
        """Count an attempt that was not made through this layer, such as a judge's after the answer."""
        of_call: _InCall | None = call.notes.get(self._note)
        if of_call is None or of_call.under_way or not self._is_local:
            return
        for place, amount in enumerate(self._uncounted(of_call, call.spent)):
            self._add_now(call, of_call, place, amount)

    def _rest(self, call: CallRecord) -> list[tuple[Any, ...]]:
        """Do as `_when_spent` at the end of a call, with a store that does I/O."""
        of_call: _InCall = call.notes[self._note]
        return self._additions(of_call, self._uncounted(of_call, call.spent))


class _Meter(Combinator):
    """A combinator that measures the output of a stream, and has more reserved when it exceeds what was expected."""

    def __init__(self, budget: Budget, use: _Use) -> None:
        super().__init__()
        self.budget = budget
        self.use = use
        self.size = 0
        self.room = use.output * BYTES_A_TOKEN

    def see(self, effect: Effect) -> Seen | Flow[Seen]:
        if type(effect) is Chunk:
            text = effect.text
            self.size += len(text) if text.isascii() else bytes_of(text)
            if not effect.text_only:
                self._add_rest(effect)
            return effect if self.size <= self.room else self._extended(effect)
        return super().see(effect)

    def see_chunk(self, effect: Chunk | More, chunk: Chunk) -> Seen:
        return effect  # a layer further in has let it out: what it cost has been seen, if it cost anything

    def _add_rest(self, chunk: Chunk) -> None:
        self.size += bytes_of(chunk.reasoning)
        for call in chunk.tool_calls:
            self.size += bytes_of(call.arguments)
        for _, other in chunk.alternatives:
            self.size += bytes_of(other.text)
            self._add_rest(other)

    def _extended(self, effect: Chunk) -> Flow[Seen]:
        yield from self.budget.extend(self.use, self.size / BYTES_A_TOKEN)
        self.room = self.use.output * BYTES_A_TOKEN
        return effect
