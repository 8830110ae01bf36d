"""Configuration: `LLMConfig`, and how it is read from YAML and the environment."""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import attrs

from fluxibly.errors import ConfigError


class Secret:
    """An API key that shows itself only when asked: `reveal()`. It compares equal to the str it holds."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """The key itself."""
        return self._value

    def __repr__(self) -> str:
        return "Secret('***')"

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Secret):
            return self._value == other._value
        return self._value == other if isinstance(other, str) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._value)

    def __bool__(self) -> bool:
        return bool(self._value)


@attrs.frozen
class Timeouts:
    """Time limits in seconds, each on its own; None is no limit.

    Args:
        connect: to connect, TLS included.
        first_byte: from the request's last byte to the answer's first.
        idle: between two reads of an answer's body.
        total: for a whole attempt, connecting to last byte. A stream has none unless it is given here.
    """

    connect: float | None = None
    first_byte: float | None = None
    idle: float | None = None
    total: float | None = None


def _secret(value: object) -> object:
    return Secret(value) if isinstance(value, str) else value


@attrs.frozen(kw_only=True)
class LLMConfig:
    """Which model to call, and how.

    Parameters that are None are not sent. `timeout` is in seconds: a number bounds connecting, the first byte, the
    idle time between chunks, and each whole attempt of a call that is not streamed (see `Timeouts` to set each).
    `max_retries` counts those after the first attempt. `additional_params` go into the provider's request body as they
    are. `middleware` None is the default stack. `api_key` None is the provider's environment variable.

    Raises:
        ConfigError: it lists all that is wrong, each with its path and range.
    """

    framework: str
    model: str
    temperature: float | None = None
    max_tokens: int | None = None
    top_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    api_key: Secret | None = attrs.field(
        default=None, converter=cast("Callable[[Secret | str | None], Secret | None]", _secret)
    )
    api_base: str | None = None
    timeout: float | Timeouts = 60.0
    max_retries: int = 3
    additional_params: Mapping[str, Any] = attrs.field(factory=dict[str, Any])
    middleware: Sequence[Any] | None = None

    def __attrs_post_init__(self) -> None:
        raise_problems(problems_of(self))

    @property
    def timeouts(self) -> Timeouts:
        """`timeout` with each limit spelled out; `total` is for calls that are not streamed."""
        if isinstance(self.timeout, Timeouts):
            return self.timeout
        return Timeouts(self.timeout, self.timeout, self.timeout, self.timeout)
