"""The built-in middleware, a file each. A middleware holds no state of a call: the call's record does (`request.call`).

What calls share on purpose, such as the places of a limit, is in one object that the middleware holds, or in a store.

Imports: `flow`, `telemetry`, `stores`, `prices`, `target`, data and its helpers; never a provider. Imported by: `registry`, by name.
Each class is loaded when it is first asked for, because most stacks have few of them.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fluxibly.middleware.balance import Balance
    from fluxibly.middleware.budget import Budget
    from fluxibly.middleware.cache import Cache
    from fluxibly.middleware.circuit_breaker import CircuitBreaker
    from fluxibly.middleware.concurrency import Concurrency
    from fluxibly.middleware.continuation import Continue
    from fluxibly.middleware.cost import Cost
    from fluxibly.middleware.deadline import Deadline
    from fluxibly.middleware.defaults import Defaults
    from fluxibly.middleware.extract_reasoning import ExtractReasoning
    from fluxibly.middleware.fallback import Fallback
    from fluxibly.middleware.guard import Guard
    from fluxibly.middleware.hedge import Hedge
    from fluxibly.middleware.logging import Logging
    from fluxibly.middleware.metrics import Metrics
    from fluxibly.middleware.rate_limit import RateLimit
    from fluxibly.middleware.record import Record
    from fluxibly.middleware.redact import Redact
    from fluxibly.middleware.replay import Replay
    from fluxibly.middleware.retry import Retry, RetryBudget
    from fluxibly.middleware.simulate_stream import SimulateStream
    from fluxibly.middleware.stream_meter import StreamMeter
    from fluxibly.middleware.stream_timeout import StreamTimeout
    from fluxibly.middleware.timing import Timing
    from fluxibly.middleware.tools import Tools
    from fluxibly.middleware.tracing import Tracing
    from fluxibly.middleware.validation import Validation

_MODULE_OF = {
    "Balance": "balance",
    "Budget": "budget",
    "Cache": "cache",
    "CircuitBreaker": "circuit_breaker",
    "Concurrency": "concurrency",
    "Continue": "continuation",
    "Cost": "cost",
    "Deadline": "deadline",
    "Defaults": "defaults",
    "ExtractReasoning": "extract_reasoning",
    "Fallback": "fallback",
    "Guard": "guard",
    "Hedge": "hedge",
    "Logging": "logging",
    "Metrics": "metrics",
    "RateLimit": "rate_limit",
    "Record": "record",
    "Redact": "redact",
    "Replay": "replay",
    "Retry": "retry",
    "RetryBudget": "retry",
    "SimulateStream": "simulate_stream",
    "StreamMeter": "stream_meter",
    "StreamTimeout": "stream_timeout",
    "Timing": "timing",
    "Tools": "tools",
    "Tracing": "tracing",
    "Validation": "validation",
}

__all__ = [
    "Balance",
    "Budget",
    "Cache",
    "CircuitBreaker",
    "Concurrency",
    "Continue",
    "Cost",
    "Deadline",
    "Defaults",
    "ExtractReasoning",
    "Fallback",
    "Guard",
    "Hedge",
    "Logging",
    "Metrics",
    "RateLimit",
    "Record",
    "Redact",
    "Replay",
    "Retry",
    "RetryBudget",
    "SimulateStream",
    "StreamMeter",
    "StreamTimeout",
    "Timing",
    "Tools",
    "Tracing",
    "Validation",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value  # the next one who asks finds it without this function
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *globals()})
