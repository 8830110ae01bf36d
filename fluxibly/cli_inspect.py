"""What `fluxibly explain` and `fluxibly frameworks` list."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import attrs

from fluxibly.flow.compose import layer_name
from fluxibly.llm import default_stack
from fluxibly.registry import find_framework, frameworks, make_middleware

if TYPE_CHECKING:
    from fluxibly.config import LLMConfig
    from fluxibly.registry import Framework


def stack_rows(config: LLMConfig) -> Iterator[tuple[str, str, str]]:
    """A row for each layer, outermost first, and one for the provider.

    Raises:
        FrameworkNotRegistered: the configuration's framework is unknown.
        ConfigError: a middleware is.
    """
    find_framework(config.framework)
    stack = default_stack(config) if config.middleware is None else make_middleware(config.middleware)
    for number, layer in enumerate(stack, 1):
        yield str(number), layer_name(layer), _settings(layer)
    settings = {name: getattr(config, name) for name in ("framework", "model", "temperature", "max_tokens")}
    told = ", ".join(f"{name}={value}" for name, value in settings.items() if value is not None)
    yield str(len(stack) + 1), "(provider)", told


def _settings(layer: object) -> str:
    """A middleware's settings as its repr has them."""
    kind = type(layer)
    if not attrs.has(kind):
        return ""
    shown: list[str] = []
    for field in attrs.fields(kind):
        if field.repr and field.init:
            write = field.repr if callable(field.repr) else repr
            shown.append(f"{field.name.lstrip('_')}={write(getattr(layer, field.name))}")
    return ", ".join(shown)


def framework_rows() -> Iterator[tuple[str, str, str]]:
    """A row for each framework: its name, whether it can be used, and what is missing."""
    for framework in frameworks().values():
        missing = missing_of(framework)
        yield framework.name, "ready" if missing is None else "not ready", missing or ""


def missing_of(framework: Framework) -> str | None:
    """What to do before a framework can be used, if anything."""
    if not framework.installed:
        return f"pip install 'fluxibly[{framework.extra}]'"
    if framework.env_var is not None and not os.environ.get(framework.env_var):
        return f"set {framework.env_var}"
    return None
