"""The parameters that a configuration, a call, a target or a middleware may set, and the checks of their values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from fluxibly._checks import mapping, number, text, whole

PARAMETERS: Mapping[str, Callable[[str, object], str | None]] = {
    "model": text,
    "temperature": partial(number, low=0, high=2),
    "max_tokens": partial(whole, low=1),
    "top_p": partial(number, low=0, high=1),
    "top_k": whole,
    "frequency_penalty": partial(number, low=-2, high=2),
    "presence_penalty": partial(number, low=-2, high=2),
    "seed": whole,
    "n": partial(whole, low=1),
    "tool_choice": partial(text, empty=True),
    "reasoning_effort": partial(text, empty=True),
    "extra": mapping,
    "headers": partial(mapping, keys=str, values=str),
    "metadata": mapping,
}
"""The check of each parameter that a configuration or a call may have."""
_NEVER_NONE = ("model", "extra", "headers", "metadata")
"""The parameters for which None does not mean "not sent"."""


def parameter_problems(parameters: Mapping[str, object]) -> list[str]:
    """List the problems of the parameters of a configuration or a call."""
    return [
        found
        for name, value in parameters.items()
        if name in PARAMETERS
        and (value is not None or name in _NEVER_NONE)
        and (found := PARAMETERS[name](name, value))
    ]
