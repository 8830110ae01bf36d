"""Middleware that finds what a call has cost."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal

import attrs

from fluxibly._checks import validator
from fluxibly.calls import Spent
from fluxibly.flow import CallNext, Flow, perform
from fluxibly.middleware._copies import Rebuilt
from fluxibly.prices import GivenPrices, Prices, check_prices
from fluxibly.types import CallRecord, ProviderInfo, Request, Response

_optional = attrs.validators.optional


@attrs.frozen(kw_only=True, eq=False)
class Cost(Rebuilt):
    """Middleware that finds the price of a call: `response.cost`, in US dollars.

    It counts every attempt of the call, also those that failed and those of an `ask`, each at the price of its own model.
    An attempt that the service refused with an HTTP status costs nothing, and neither does an answer from a cache. The cost
    is None if an attempt's tokens or their price are not known; the price that is missing is reported once.

    The log line of the call's end, the span (`fluxibly.cost`) and the metric `fluxibly.cost` have it as well. Put `Cost`
    inside of `Tracing`, `Logging` and `Metrics`, and outside of everything that asks again.

    Args:
        prices: US dollars for a million tokens, by model: `{"my-model": (0.15, 0.60)}` for input and output. A model of one
            provider is `"groq:my-model"`. Other models have the list prices of the package genai-prices (the extra
            `prices`), which is imported when the first price is asked for, and needs no network. Models on a machine of your
            own have no list price.

    Raises:
        ConfigError: no prices are given, and genai-prices is not installed.
    """

    prices: GivenPrices | None = attrs.field(default=None, validator=_optional(validator(check_prices)))
    _prices: Prices = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "_prices", Prices(self.prices, "Cost"))

    def __call__(self, request: Request, call_next: CallNext) -> Flow[Response]:
        call = request.call
        before = len(call.spent) if call.nested else 0  # an `ask` shares the list with its call
        try:
            response = yield from call_next(request)
        except BaseException as error:
            spent = call.spent[before:]
            if not self._prices.must_load(spent):
                self._count(call, spent)
            elif isinstance(error, Exception):
                yield from perform(self._prices.load)
                self._count(call, spent)
            raise  # a call that is given up cannot wait for the prices, so its cost is not known
        spent = call.spent[before:] if before else call.spent
        if self._prices.must_load(spent):
            yield from perform(self._prices.load)
        self._count(call, spent)
        return response

    def _count(self, call: CallRecord, spent: Sequence[Spent]) -> None:
        """Find the cost of attempts, and keep it in the record of their call."""
        if len(spent) == 1:  # as nearly always
            only = spent[0]
            call.cost = cost = self._prices.cost_of(only)
            call.costs = {} if cost is None else {(only.provider, only.model): cost}
            return
        costs: dict[tuple[ProviderInfo, str], Decimal] = {}
        total: Decimal | None = Decimal(0)
        for each in spent:
            cost = self._prices.cost_of(each)
            if cost is None:
                total = None
            else:
                where = (each.provider, each.model)
                costs[where] = costs.get(where, Decimal(0)) + cost
            if total is not None and cost is not None:
                total += cost
        call.cost, call.costs = total, costs
