"""The stack of a batch: the user's own, with what many calls at once need."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any, Protocol

from fluxibly._extras import pip_install
from fluxibly.errors import ConfigError
from fluxibly.flow import CallNext, Flow, Middleware, sleep
from fluxibly.middleware import Budget, Concurrency, Cost, RateLimit
from fluxibly.prices import GivenPrices, Prices
from fluxibly.types import CallRecord, ProviderInfo, Request, Response

FOREVER = 1e9
"""The seconds for which a row waits for its turn: about thirty years."""
AT_ONCE = 1_000
"""The most rows at once where the number is found by latency."""


class Watching(Protocol):
    """The task that asks a row. It watches the attempts."""

    def begins(self, call: CallRecord, /) -> bool:
        """Note that an attempt begins, and return True. If none may, its task is cancelled already."""
        ...

    def ends(self, error: BaseException | None, /) -> None:
        """Note that an attempt has ended, with an error or an answer."""
        ...


watching: ContextVar[Watching] = ContextVar("watching")
"""The task that asks a row in this context."""


def _watch(request: Request, call_next: CallNext) -> Flow[Response]:
    """Watch the attempts of a call. It stands inside of all layers, so what waits for its turn is not here yet."""
    asker = watching.get()
    while not asker.begins(request.call):
        yield from sleep(1.0)  # here the cancellation arrives
    try:
        response = yield from call_next(request)
    except BaseException as error:
        asker.ends(error)
        raise
    asker.ends(None)
    return response


def stack_for(
    stack: Iterable[Middleware],
    info: ProviderInfo,
    model: str,
    *,
    adapts: bool,
    budget: float | None = None,
    requests: float | None = None,
    tokens: float | None = None,
) -> list[Middleware]:
    """Return the stack of a batch.

    What it adds stands innermost, so that each attempt of a `Retry` waits for its turn: a `Budget`; a `RateLimit`, which finds the
    rate unless it is given; and a `Concurrency` that finds how many calls at once are best. What the user's stack has already is
    not added, except for limits that are given. `Cost` is added outermost if prices are known. A model in this process has no rate.

    Args:
        adapts: whether the number of calls at once is to be found.
        budget: US dollars.
        requests, tokens: a minute.

    Raises:
        ConfigError: there is a budget, and the price of the model is not known.
    """
    layers = list(stack)
    has_rate, has_concurrency = _has(layers, RateLimit), _has(layers, Concurrency)
    prices = next((layer.prices for layer in layers if isinstance(layer, Cost)), None)
    if budget is not None and not _is_known(prices, info, model):
        install = "" if _has_prices() else f"; or write {pip_install('prices')}, which knows those of many services"
        raise ConfigError(
            f"budget: expected a known price of {model!r}, found none; give it to Cost in the stack, in US dollars for a million "
            f"tokens of input and of output: Cost(prices={{{model!r}: (0.15, 0.60)}}), in YAML "
            f"cost: {{prices: {{{model!r}: [0.15, 0.60]}}}}{install}"
        )
    if not _has(layers, Cost) and (budget is not None or (_has_prices() and _is_known(None, info, model))):
        layers.insert(0, Cost())
    if budget is not None:
        layers.append(Budget(cost=budget, prices=prices))
    if requests is not None or tokens is not None:
        layers.append(RateLimit(requests=requests, tokens=tokens, max_wait=FOREVER))
    elif not (has_rate or info.in_process):
        layers.append(RateLimit(max_wait=FOREVER))
    if adapts and not (has_concurrency or info.in_process):
        layers.append(Concurrency("auto", queue=10 * AT_ONCE, max_wait=FOREVER))
    return [*layers, _watch]


def limits_in_force(stack: Iterable[Middleware], at_once: int) -> tuple[float | None, int | None]:
    """Return the requests a second and the calls at once that the layers of a stack allow now, as far as that is known.

    Args:
        at_once: the most calls at once of the batch.
    """
    layers = list(stack)
    rates = [layer.rate_now() for layer in layers if isinstance(layer, RateLimit)]
    places = [layer.places_now() for layer in layers if isinstance(layer, Concurrency)]
    return (
        min([rate for rate in rates if rate is not None], default=None),
        min([min(number, at_once) for number in places if number is not None], default=None),
    )


def stops_all(stack: Iterable[Middleware]) -> bool:
    """Return whether a budget of the stack is one for all calls, so that no row can be asked once it is used up."""
    return any(isinstance(layer, Budget) and layer.scope == "instance" for layer in stack)


def _has(layers: Iterable[Middleware], kind: type[Any]) -> bool:
    return any(isinstance(layer, kind) for layer in layers)


def _has_prices() -> bool:
    return importlib.util.find_spec("genai_prices") is not None


def _is_known(given: GivenPrices | None, info: ProviderInfo, model: str) -> bool:
    """Return whether the price of a model is known. It imports genai-prices only for a service that is in there."""
    return Prices(given, "Batch", needed=False).of(info, model) is not None
