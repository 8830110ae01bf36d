"""The parameters that a configuration, a call, a target or a middleware may set, and the checks of their values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from fluxibly._checks import mapping, number, text, whole
from fluxibly._formats import output_format

if TYPE_CHECKING:
    from typing import Literal, TypedDict

    from fluxibly.messages import Tool

    class Parameters(TypedDict, total=False):
        """The parameters that a configuration and a call have in common."""

        model: str
        temperature: float | None
        max_tokens: int | None
        top_p: float | None
        top_k: int | None
        frequency_penalty: float | None
        presence_penalty: float | None
        stop: str | Iterable[str] | None
        seed: int | None
        n: int | None
        response_format: Literal["text", "json"] | Mapping[str, Any] | None
        reasoning_effort: str | None

    class Overrides(Parameters, total=False):
        """The settings of a call, which take precedence over the configuration. `LLM.complete` says what they mean."""

        tools: Iterable[Tool | Mapping[str, Any]] | None
        tool_choice: str | None
        extra: Mapping[str, Any]
        headers: Mapping[str, str]
        metadata: Mapping[str, Any]


def _response_format(name: str, value: object) -> str | None:
    if isinstance(value, type):
        return f"{name}: expected 'text', 'json' or a JSON Schema, got the class {value.__name__}; a call takes it as into="
    try:
        output_format(value)
    except (TypeError, ValueError) as error:
        return str(error)
    return None


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
    "response_format": _response_format,
    "reasoning_effort": partial(text, empty=True),
    "extra": mapping,
    "headers": partial(mapping, keys=str, values=str),
    "metadata": mapping,
}
"""The check of each parameter that a configuration or a call may have."""
_NEVER_NONE = ("model", "extra", "headers", "metadata")
"""The parameters for which None does not mean "not sent"."""
CONFIGURED = (
    "temperature",
    "max_tokens",
    "top_p",
    "top_k",
    "frequency_penalty",
    "presence_penalty",
    "stop",
    "seed",
    "n",
    "response_format",
    "reasoning_effort",
)
"""The parameters that a configuration may set for all calls, besides its model."""


def parameter_problems(parameters: Mapping[str, object]) -> list[str]:
    """List the problems of the parameters of a configuration or a call."""
    return [
        found
        for name, value in parameters.items()
        if name in PARAMETERS
        and (value is not None or name in _NEVER_NONE)
        and (found := PARAMETERS[name](name, value))
    ]
