"""What the providers that stand on another library (LangChain, LiteLLM) make of a configuration.

Such a library sends the requests itself, so the limits of `Timeouts` are held from outside (`foreign_calls`).
"""

from __future__ import annotations

import time

import attrs

from fluxibly.config import LLMConfig, Timeouts
from fluxibly.errors import AuthenticationError, Phase
from fluxibly.providers.foreign_services import server_of
from fluxibly.types import ProviderInfo


class TimeIsUp(Exception):  # it never leaves the providers
    """A limit of ours has passed; `phase` says which."""

    def __init__(self, phase: Phase, seconds: float) -> None:
        super().__init__(phase, seconds)
        self.phase: Phase = phase
        self.seconds = seconds


@attrs.frozen(kw_only=True)
class Limits:
    """How long to wait for a library, in seconds: for a whole call, a stream's first chunk, each next, and all of it."""

    call: float | None = None
    first: float | None = None
    idle: float | None = None
    stream: float | None = None

    @classmethod
    def of(cls, config: LLMConfig) -> Limits:
        limits = config.timeouts
        first = None if limits.first_byte is None or limits.connect is None else limits.first_byte + limits.connect
        stream = limits.total if isinstance(config.timeout, Timeouts) else None
        return cls(call=limits.total, first=first, idle=limits.idle, stream=stream)

    def next(self, *, first: bool, started: float) -> tuple[float | None, TimeIsUp]:
        """How long a stream's next chunk may take, and what to raise after that."""
        step = self.first if first else self.idle
        phase: Phase = "first_byte" if first else "idle"
        if self.stream is not None:
            left = started + self.stream - time.monotonic()
            if step is None or left < step:
                return max(left, 0.0), TimeIsUp("total", self.stream)
        return step, TimeIsUp(phase, step or 0.0)


def read_timeout(timeouts: Timeouts) -> float | None:
    """For an HTTP client with one limit on reads: it has to be the longer of those on the first byte and on idling."""
    if timeouts.first_byte is None or timeouts.idle is None:
        return None
    return max(timeouts.first_byte, timeouts.idle)


def checked_key(config: LLMConfig) -> str | None:
    """The configuration's API key, if there is one.

    Raises:
        AuthenticationError: it cannot be sent in a header. The message does not show it.
    """
    key = None if config.api_key is None else config.api_key.reveal()
    if key is not None and (not key.isascii() or not key.isprintable() or key != key.strip()):
        raise AuthenticationError(
            "the API key in api_key has white space around it, control characters (a newline, perhaps) or characters "
            "outside of ASCII",
            provider=config.framework,
        )
    return key or None


def info_of(config: LLMConfig | None, *, name: str, framework: str, telemetry_name: str) -> ProviderInfo:
    """Who a provider is. The server is told only if the configuration names one."""
    address, port = server_of(config.api_base if config is not None else None)
    return ProviderInfo(
        name=name,
        framework=framework,
        telemetry_name=telemetry_name,
        server_address=address,
        server_port=port,
    )
