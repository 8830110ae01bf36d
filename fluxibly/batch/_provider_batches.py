"""Decisions about a provider's batches before anything is sent: their settings, the layers that the stack may have, the prices."""

from __future__ import annotations

from collections.abc import Iterable
from logging import INFO
from typing import Any, Final

import attrs

from fluxibly import _checks
from fluxibly._checks import kind_of, validator
from fluxibly._logs import log
from fluxibly.errors import ConfigError
from fluxibly.middleware import Cost
from fluxibly.prices import Prices
from fluxibly.providers.http import AsyncHTTPProvider
from fluxibly.providers.http.batches import BatchClient
from fluxibly.registry import built_in_kind
from fluxibly.types import ProviderInfo


@attrs.frozen(kw_only=True)
class ProviderBatches:
    """How rows are answered in batches of the provider: `Batch(executor=ProviderBatches(…))`.

    Args:
        poll_every: seconds between two looks at a batch, at first. They grow to six times as many. A batch whose submission was
            not answered counts as never made if it is not found within that time.
        max_rows: the most rows of a batch; None: as many as the service takes.
        max_tokens: the most tokens of input of a batch, as they are estimated (a token for 3.5 bytes); None: no limit, until the
            service names one.

    Raises:
        ValueError: a number is out of range.
    """

    poll_every: float = attrs.field(default=10.0, validator=validator(_checks.number, above=0))
    max_rows: int | None = attrs.field(default=None, validator=attrs.validators.optional(validator(_checks.whole, 1)))
    max_tokens: int | None = attrs.field(default=None, validator=attrs.validators.optional(validator(_checks.whole, 1)))

    @property
    def longest(self) -> float:
        """The most seconds between two looks."""
        return 6 * self.poll_every


_WITHOUT_EFFECT: Final = frozenset(
    [
        "Tracing",
        "Logging",
        "Metrics",
        "Timing",
        "StreamMeter",
        "SimulateStream",
        "Retry",
        "Hedge",
        "CircuitBreaker",
        "RateLimit",
        "Concurrency",
        "Deadline",
        "StreamTimeout",
    ]
)
"""The layers that change neither what is asked nor what is answered: they watch calls, repeat them, or have them wait."""


def check_layers(stack: Iterable[object], *, goes_online: bool = False) -> None:
    """Check that a stack means the same for a batch as for calls, which pass its layers. `Cost` and `Defaults` do.

    Raises:
        ConfigError: a layer changes what is asked or answered.
    """
    idle: list[str] = []
    for layer in stack:
        name = built_in_kind(layer)
        if name in _WITHOUT_EFFECT or _only_warns(layer):
            idle.append(str(name))
        elif name not in ("Cost", "Defaults"):
            shown = name or getattr(layer, "__name__", kind_of(layer))
            raise ConfigError(
                f"{shown} cannot act on a provider's batch, whose requests pass no layers; expected a stack without it: take it "
                "out, or write executor='online'"
            )
    if idle and not goes_online:
        log(INFO, "A provider's batch passes no layers | without_effect=%s", without_effect=", ".join(idle))


def _only_warns(layer: object) -> bool:
    """Whether a layer is a `Validation` that lets every answer pass, as that of the default stack."""
    if built_in_kind(layer) != "Validation":
        return False
    checks: Any = layer
    return checks.empty == "warn" and checks.check is None and checks.schema is None


def client_of(provider: object, info: ProviderInfo) -> BatchClient:
    """Return the batch API of a provider.

    Raises:
        ConfigError: it has none that fluxibly knows.
    """
    client = provider.batches if isinstance(provider, AsyncHTTPProvider) else None
    if client is None:
        raise ConfigError(
            f"executor='provider': expected a framework with a batch API (openai, openai-responses, groq, together, anthropic), "
            f"got {info.framework}; write executor='online'"
        )
    return client


def prices_of(stack: Iterable[object], info: ProviderInfo, model: str) -> Prices | None:
    """Return the prices of a stack's `Cost`, or those of the package genai-prices; None if neither knows the model."""
    for layer in stack:
        if isinstance(layer, Cost):
            return Prices(layer.prices, "Batch")
    prices = Prices(None, "Batch", needed=False)
    return None if prices.of(info, model) is None else prices
