"""What tokens cost: prices that the user gives, and those of the package genai-prices.

The package has a table of its own and needs no network. It is imported when the first price is asked for.

Imports: data and its helpers. Imported by: `middleware`.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any, NamedTuple, TypeAlias, cast

import attrs

from fluxibly._checks import is_list, is_mapping, is_number, kind_of
from fluxibly._extras import pip_install
from fluxibly._logs import report_once
from fluxibly.calls import ProviderInfo, Spent, Usage
from fluxibly.errors import ConfigError

GivenPrices: TypeAlias = Mapping[str, tuple[float, float]]
"""US dollars for a million tokens of input and of output, by model."""
_FREE = Decimal(0)
_MILLION = Decimal(1_000_000)
_NANO = 1_000_000_000
_ROUNDING = 1e-6
_MOST = 1_000
"""The most models whose prices are kept."""


class FlatPrice(NamedTuple):
    """US dollars for one token. `cached` and `cache_write` are for the parts of the input that are read or written there."""

    input: Decimal
    output: Decimal
    cached: Decimal
    cache_write: Decimal
    nano_input: float
    nano_output: float
    """The same in billionths of a dollar."""

    def cost(self, usage: Usage) -> Decimal | None:
        """Return what tokens cost; None if the service did not count them all."""
        if usage.input_tokens is None or usage.output_tokens is None:
            return None
        cost = usage.input_tokens * self.input + usage.output_tokens * self.output
        if usage.cached_tokens or usage.cache_write_tokens:
            read, written = _in_cache(usage, usage.input_tokens)
            cost += read * (self.cached - self.input) + written * (self.cache_write - self.input)
        return cost

    def nano(self, taken: float, given: float, usage: Usage | None = None) -> float:
        """Return what tokens of input and of output cost, in whole billionths of a dollar, rounded up.

        Args:
            usage: says how many tokens of the input were cached.
        """
        nano = taken * self.nano_input + given * self.nano_output
        if usage is not None and (usage.cached_tokens or usage.cache_write_tokens):
            read, written = _in_cache(usage, taken)
            nano += read * float((self.cached - self.input) * _NANO)
            nano += written * float((self.cache_write - self.input) * _NANO)
        return float(math.ceil(nano - _ROUNDING))


def _in_cache(usage: Usage, taken: float) -> tuple[int, int]:
    """Return the tokens of the input that were read from a prompt cache, and those that were written to it.

    A service may report more of them than input, which would make the input cost less than nothing.
    """
    read = min(usage.cached_tokens or 0, math.ceil(taken))
    return read, min(usage.cache_write_tokens or 0, math.ceil(taken) - read)


class _LibraryPrice(NamedTuple):
    """A price that depends on more than the kind of token, such as the length of the prompt or the time of day."""

    model: str
    service: str

    def cost(self, usage: Usage) -> Decimal | None:
        """Do as `FlatPrice.cost`."""
        if usage.input_tokens is None or usage.output_tokens is None:
            return None
        if usage.cached_tokens or usage.cache_write_tokens:
            read, written = _in_cache(usage, usage.input_tokens)
            usage = attrs.evolve(usage, cached_tokens=read, cache_write_tokens=written)
        return _ask(self.model, self.service, usage)

    def nano(self, taken: float, given: float, usage: Usage | None = None) -> float:
        """Do as `FlatPrice.nano`."""
        cached, written = (None, None) if usage is None else (usage.cached_tokens, usage.cache_write_tokens)
        counts = Usage(
            input_tokens=math.ceil(taken),
            output_tokens=math.ceil(given),
            cached_tokens=cached,
            cache_write_tokens=written,
        )
        return float(math.ceil((self.cost(counts) or _FREE) * _NANO))


Price: TypeAlias = FlatPrice | _LibraryPrice


def check_prices(name: str, value: object) -> str | None:
    """Check the prices that a user gives."""
    expected = f"{name}: expected a table of models and their prices, e.g. {{'my-model': (0.15, 0.60)}}"
    if not is_mapping(value):
        return f"{expected}, got {kind_of(value)}"
    for model, pair in value.items():
        if not isinstance(model, str):
            return f"{expected}, got {kind_of(model)} as a model"
        numbers = cast("list[Any]", pair if is_list(pair) or isinstance(pair, tuple) else [])
        if len(numbers) != 2 or not all(is_number(each) and 0 <= each < math.inf for each in numbers):
            return (
                f"{name}[{model!r}]: expected two numbers from 0 up, the US dollars for a million tokens of input and of "
                f"output, got {pair!r}"
            )
    return None


class Prices:
    """The prices of models, by provider and model.

    Args:
        given: the user's own prices, which go before those of the package.
        middleware: the name of the class that asks, for messages.
        needed: whether any price must be known.

    Raises:
        ConfigError: no prices are given, and the package is not installed.
    """

    def __init__(self, given: GivenPrices | None, middleware: str, *, needed: bool = True) -> None:
        self._given = {model: _flat(*map(_decimal, pair)) for model, pair in (given or {}).items()}
        self._installed = importlib.util.find_spec("genai_prices") is not None
        self._found: dict[tuple[str, str, str | None], Price | None] = {}
        self._middleware = middleware
        if needed and not self._given and not self._installed:
            raise ConfigError(
                f"{middleware}: expected prices={{…}}, or the package that knows them: {pip_install('prices')}"
            )

    @property
    def is_loaded(self) -> bool:
        """Whether the package is imported, or is not installed."""
        return bool(_loaded) or not self._installed

    def must_load(self, spent: Iterable[Spent]) -> bool:
        """Whether the package has to be imported for the prices of attempts, which takes half a second (`load`)."""
        if self.is_loaded:
            return False
        for each in spent:
            if each.usage is not None and (each.provider.key, each.model, each.answered) not in self._found:
                return not self.is_given(each.provider, each.model, each.answered)
        return False

    def is_given(self, info: ProviderInfo, model: str, answered: str | None = None) -> bool:
        """Whether the user has given the price of a model, or there is none to look up."""
        return _service_of(info) is None or self._of_user(info, _names(info, model, answered)) is not None

    def load(self) -> None:
        """Import the package."""
        import genai_prices

        _loaded[:] = [genai_prices]

    def kept(self, info: ProviderInfo, model: str) -> Price | None:
        """Return the price of a model if it is known and has been asked for before."""
        return self._found.get((info.key, model, None))

    def of(self, info: ProviderInfo, model: str, answered: str | None = None) -> Price | None:
        """Return the price of a model, or None if it is not known.

        Args:
            info: the provider.
            model: the model that was asked for.
            answered: the model that answered, if its name is known.
        """
        key = (info.key, model, answered)
        found = self._found.get(key, _UNKNOWN)
        if found is _UNKNOWN:
            if len(self._found) >= _MOST:
                self._found.clear()
            found = self._found[key] = self._look_up(info, model, answered)
        return found  # type: ignore[return-value]

    def _look_up(self, info: ProviderInfo, model: str, answered: str | None) -> Price | None:
        names = _names(info, model, answered)
        if (given := self._of_user(info, names)) is not None:
            return given
        if self._installed and (service := _service_of(info)) is not None:
            self.load()
            for name in names:
                if (price := _price_of(name, service)) is not None:
                    return price
        return None

    def _of_user(self, info: ProviderInfo, names: Iterable[str]) -> FlatPrice | None:
        for name in names:
            for key in (f"{info.framework}:{name}", name):
                if key in self._given:
                    return self._given[key]
        return None

    def cost_of(self, spent: Spent) -> Decimal | None:
        """Return the cost of an attempt, or None if its tokens or their price are not known."""
        if spent.refused:
            return _FREE
        if spent.usage is None:
            return None
        price = self.of(spent.provider, spent.model, spent.answered)
        if price is None:
            self.report(spent)
            return None
        return price.cost(spent.usage)

    def report(self, spent: Spent) -> None:
        """Report once that the price of an attempt's model is not known."""
        report_once(
            f"price {self._middleware} {spent.provider.key} {spent.model}",
            f"{self._middleware}: the price of {spent.model} at {spent.provider.key} is not known; give it: "
            f"prices={{{spent.model!r}: (input, output)}}, in US dollars for a million tokens",
        )


_UNKNOWN = object()
_loaded: list[Any] = []


def _decimal(number: float) -> Decimal:
    return Decimal(str(number))


def _flat(
    price: Decimal, output: Decimal, cached: Decimal | None = None, cache_write: Decimal | None = None
) -> FlatPrice:
    """Return a price of dollars for a million tokens. Cached tokens cost what others do, unless they have a price."""
    cached = price if cached is None else cached
    cache_write = price if cache_write is None else cache_write
    one, other = price / _MILLION, output / _MILLION
    return FlatPrice(one, other, cached / _MILLION, cache_write / _MILLION, float(one * _NANO), float(other * _NANO))


def _names(info: ProviderInfo, model: str, answered: str | None) -> list[str]:
    """Return the names under which a model may have a price, the likeliest first."""
    names = [model]
    if info.framework in ("litellm", "langchain"):  # "openai/gpt-4o", "openai:gpt-4o"
        separator = "/" if info.framework == "litellm" else ":"
        names.append(model.partition(separator)[2])
    names.append(answered or "")
    return [name for name in dict.fromkeys(names) if name]


# The package

_SERVICES = {
    "aws.bedrock": "aws",
    "azure.ai.openai": "azure",
    "azure.ai.inference": "azure",
    "gcp.gemini": "google",
    "gcp.vertex_ai": "google",
    "gcp.gen_ai": "google",
    "mistral_ai": "mistral",
    "moonshot_ai": "moonshotai",
    "x_ai": "x-ai",
    "together_ai": "together",
    "fireworks_ai": "fireworks",
}
"""The services by their names in telemetry, where the package names them otherwise."""
_OWN = ("local", "echo", "ollama", "vllm", "lmstudio", "llamacpp", "custom", "scripted")
"""Frameworks that run models on a machine of the user's."""
_LOOPBACK = ("localhost", "127.0.0.1", "::1", "[::1]", "0.0.0.0")  # noqa: S104  # compared with, not bound


def _service_of(info: ProviderInfo) -> str | None:
    """Return the name that the package has for a provider; None for a machine of the user's own, which has no price."""
    if info.in_process or info.framework in _OWN or info.server_address in _LOOPBACK:
        return None
    return _SERVICES.get(info.telemetry_name, info.telemetry_name)


def _price_of(model: str, service: str) -> Price | None:
    """Return the package's price of a model: as numbers, if the price is nothing but these."""
    if _ask(model, service, Usage(input_tokens=1, output_tokens=1)) is None:
        return None
    if (flat := _flat_price_of(model, service)) is not None and all(
        flat.cost(usage) == _ask(model, service, usage) for usage in _PROBES
    ):
        return flat
    return _LibraryPrice(model, service)


_PROBES = tuple(
    Usage(input_tokens=3 * size, output_tokens=2 * size, cached_tokens=cached * size, cache_write_tokens=write * size)
    for size in (10, 40_000, 700_000)
    for cached, write in ((0, 0), (1, 0), (0, 1), (1, 1))
)
"""Usages that a price of four numbers counts as the package does, and any other price does not."""


def _flat_price_of(model: str, service: str) -> FlatPrice | None:
    found = _calculated(model, service, Usage(input_tokens=1, output_tokens=1))
    if found is None or isinstance(found.model.prices, list):  # these depend on the time
        return None
    prices = [
        getattr(found.model_price, f"{name}_mtok", None) for name in ("input", "output", "cache_read", "cache_write")
    ]
    if any(price is not None and not isinstance(price, Decimal) for price in prices):
        return None
    of_input, of_output, cached, write = prices
    return _flat(of_input or _FREE, of_output or _FREE, cached, write)


def _ask(model: str, service: str, usage: Usage) -> Decimal | None:
    found = _calculated(model, service, usage)
    return None if found is None else found.total_price


def _calculated(model: str, service: str, usage: Usage) -> Any:
    """Return the package's calculation, or None if it does not know the model, or cannot count such tokens."""
    package = _loaded[0]
    counts = {
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
        "cache_read_tokens": usage.cached_tokens or None,
        "cache_write_tokens": usage.cache_write_tokens or None,
    }
    known = {name: count for name, count in counts.items() if count is not None}
    try:
        return package.calc_price(package.Usage(**known), model, provider_id=service)
    except (LookupError, ValueError):
        return None
