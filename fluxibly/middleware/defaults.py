"""Middleware that sets parameters which a request leaves open."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs

from fluxibly._checks import repr_of_headers, repr_without_secrets, unknown_settings
from fluxibly._merging import composed
from fluxibly._parameters import parameter_problems
from fluxibly.errors import ConfigError
from fluxibly.flow import CallNext, Flow
from fluxibly.messages import to_stop, to_tools
from fluxibly.types import Request, Response, replaced, with_headers

_NAMES = [field.name for field in attrs.fields(Request) if field.name not in ("model", "messages", "target", "call")]
_NEVER_OPEN = {
    "model": "a request always has one; set it in the LLMConfig or the call, or write Target(…) in a Fallback",
    "messages": "a request always has some; to add to them, write a middleware that calls request.evolve(messages=…)",
}
"""The fields of a request that are never open, and what to write instead."""
_CONVERTERS: Mapping[str, Callable[[Any], Any]] = {"stop": to_stop, "tools": to_tools}
_REPRS: Mapping[str, Callable[[Any], str]] = {
    "extra": repr_without_secrets,
    "headers": repr_of_headers,
    "metadata": repr_without_secrets,
}
"""How the tables are shown. A request's own tables are merged over these."""


@attrs.frozen(init=False, repr=False)
class Defaults:
    r"""Middleware that sets parameters which a request leaves open: those that are None, and `stop` and `tools` if empty.

    For example, `Defaults(temperature=0.2, stop=["\n"])`. A value that the request sets always wins. The settings of the `LLMConfig`
    are part of each request, so they win too.

    The tables `extra`, `headers` and `metadata` are merged with the request's own, key by key, as `additional_params` are: a
    None in the request's `extra` removes a key. Names of headers may be in any case. The default `tools` are used only if the
    request has none.

    Args:
        parameters: the parameters of `Request`, except `model` and `messages`. None sets no default.

    Raises:
        ConfigError: it lists every unknown name, with the nearest one, and every value that is wrong.
    """

    parameters: Mapping[str, Any]

    def __init__(self, **parameters: Any) -> None:
        problems = [
            f"{name}: expected a parameter that a request may leave open, but {_NEVER_OPEN[name]}"
            for name in _NEVER_OPEN
            if name in parameters
        ]
        problems += unknown_settings({name: None for name in parameters if name not in _NEVER_OPEN}, _NAMES)
        known = {name: value for name, value in parameters.items() if name in _NAMES}
        problems += parameter_problems(known)
        found: dict[str, Any] = {}
        for name, value in known.items():
            try:
                found[name] = _CONVERTERS[name](value) if name in _CONVERTERS else value
            except (TypeError, ValueError) as error:
                text = str(error)
                problems.append(text if text.startswith(name) else f"{name}: {text}")
        if problems:
            raise ConfigError.of(problems)
        copied = {name: dict(value) if name in _REPRS else value for name, value in found.items() if value is not None}
        object.__setattr__(self, "parameters", copied)

    def __repr__(self) -> str:
        shown = [f"{name}={_REPRS.get(name, repr)(value)}" for name, value in self.parameters.items()]
        return f"Defaults({', '.join(shown)})"

    def __call__(self, request: Request, call_next: CallNext) -> Flow[Response]:
        return (yield from call_next(self.completed(request)))

    def completed(self, request: Request) -> Request:
        """Return a request with the defaults of what it leaves open."""
        given = request.__dict__
        changes: dict[str, Any] = {}
        for name, default in self.parameters.items():
            value = given[name]
            if name in _REPRS:
                changes[name] = with_headers(default, value) if name == "headers" else composed(default, value)
            elif value is None or value == ():
                changes[name] = default
        return replaced(request, changes) if changes else request
