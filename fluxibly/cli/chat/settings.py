"""What the options of `chat` add to a configuration: parameters, and tools."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from fluxibly._checks import did_you_mean, is_mapping
from fluxibly._merging import composed
from fluxibly._parameters import CONFIGURED, parameter_problems
from fluxibly.cli.screen import line_of
from fluxibly.config import LLMConfig
from fluxibly.errors import ConfigError
from fluxibly.middleware import Tools
from fluxibly.registry import make_middleware, stack_with

EXTRA = "extra"
TOOL_CHOICE = "tool_choice"
NAMES = (*CONFIGURED, TOOL_CHOICE, "timeout", EXTRA)
"""The parameters of a call that `-o` takes."""


@attrs.frozen
class Parameters:
    """The parameters of `-o`: the changes of a configuration, and what only a call has."""

    configured: Mapping[str, Any]
    extra: Mapping[str, Any]
    call: Mapping[str, Any]

    def configure(self, config: LLMConfig) -> LLMConfig:
        """Return the configuration with the parameters."""
        return attrs.evolve(config, **self.configured, additional_params=composed(config.additional_params, self.extra))


def parameters_of(options: Iterable[str]) -> Parameters:
    """Return the parameters of `-o NAME=VALUE`. A value that is JSON is read as JSON.

    Raises:
        ConfigError: it lists each name that no parameter has, with the nearest one, and each wrong value.
    """
    given: dict[str, Any] = {}
    problems: list[str] = []
    for option in options:
        name, equals, text = option.partition("=")
        if name not in NAMES:
            own = f"; a call has {', '.join(NAMES)}; a service's own is -o {EXTRA} '{{\"{name}\": …}}'"
            problems.append(f"there is no parameter {name!r}{did_you_mean(name, NAMES) or own}")
        elif not equals:
            problems.append(f"{name}: expected a value, got nothing; write -o {name} VALUE")
        else:
            value = _value(text)
            merged = name == EXTRA and is_mapping(value) and is_mapping(given.get(EXTRA))
            given[name] = composed(given[EXTRA], value) if merged else value
    extra = given.pop(EXTRA, {})
    call = {TOOL_CHOICE: given.pop(TOOL_CHOICE)} if TOOL_CHOICE in given else {}
    problems += parameter_problems({EXTRA: extra, **call})
    try:
        LLMConfig(framework="any", model="any", **given)
    except ConfigError as error:
        problems += error.problems or (str(error),)
    if problems:
        raise ConfigError.of([f"-o: {each}" for each in problems])
    return Parameters(given, extra, call)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def with_tools(config: LLMConfig, names: Sequence[str]) -> LLMConfig:
    """Return a configuration with a stack that has `Tools` of these functions, at the place that suits it.

    Args:
        names: functions as `module:function`. The modules are imported, from the current folder too.

    Raises:
        ConfigError: a module cannot be imported, has no such function, or the function cannot be a tool.
    """
    if not names:
        return config
    functions = [_function(name) for name in names]
    try:
        tools = Tools(functions)
    except ConfigError as error:
        raise ConfigError(f"--tools: {error}") from None
    layers = ["default"] if config.middleware is None else config.middleware
    stack = make_middleware(layers, max_retries=config.max_retries)
    for number, layer in enumerate(stack):
        if isinstance(layer, Tools):  # the file's: one layer has to know all functions that an answer may call
            both = attrs.evolve(layer, functions=(*layer.functions, *tools.functions))
            return attrs.evolve(config, middleware=(*stack[:number], both, *stack[number + 1 :]))
    return attrs.evolve(config, middleware=stack_with(stack, tools))


def _function(name: str) -> Any:
    module, colon, path = name.partition(":")
    if not (module and colon and path):
        raise ConfigError(f"--tools: expected module:function, got {name!r}")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)  # as `python -m` does
    try:
        found: Any = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"--tools: cannot import {module!r}: {type(error).__name__}: {line_of(error)}") from error
    for part in path.split("."):
        if not hasattr(found, part):
            known = [each for each in dir(found) if not each.startswith("_")]
            raise ConfigError(f"--tools: {module!r} has no {path!r}{did_you_mean(part, known)}")
        found = getattr(found, part)
    return found  # `Tools` says if it is no function
