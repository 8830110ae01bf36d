"""The messages for a middleware whose settings are wrong: all of them, each with its path."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs

from fluxibly._checks import is_number, unknown_settings
from fluxibly._plugins import one_line
from fluxibly.errors import ConfigError


def settings_problems(
    factory: Callable[..., Any], settings: Mapping[Any, Any], path: str, error: Exception
) -> list[str]:
    """List what is wrong with the settings of a middleware that could not be made. `error` is what it raised."""
    names, required, any_name = _parameters(factory)
    if any_name:
        names = [*names, *[name for name in settings if isinstance(name, str)]]
    unknown = unknown_settings(settings, names, f"{path}.")
    missing = [f"{path}.{name}: is required" for name in required if name not in settings]
    wrong = [_at(path, names, factory, text) for text in _wrong_values(factory, settings)]
    return [*unknown, *missing, *wrong] or [_at(path, names, factory, text) for text in _messages(error)]


def example(factory: Callable[..., Any], given: object) -> str:
    """Return a table of settings, for a message to someone who has written a value in its place."""
    names = _parameters(factory)[0]
    shown = given if is_number(given) else "…"  # a text may be a secret
    return f"{{{names[0]}: {shown}}}" if names else "{}"


def _parameters(factory: Callable[..., Any]) -> tuple[list[str], list[str], bool]:
    """Return the names of a factory's settings, those without a default, and whether it takes any name."""
    import inspect

    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # a callable of C has no signature
        return [], [], True
    named = [each for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    any_name = any(each.kind is each.VAR_KEYWORD for each in parameters)
    return [each.name for each in named], [each.name for each in named if each.default is each.empty], any_name


def _wrong_values(factory: Callable[..., Any], settings: Mapping[Any, Any]) -> Iterator[str]:
    """Yield what the validators of an attrs class refuse. The class itself reports only the first."""
    if not (isinstance(factory, type) and attrs.has(factory)):
        return
    blank: Any = factory.__new__(factory)
    for field in attrs.fields(factory):
        name = field.alias or field.name
        if name in settings and field.validator is not None:
            try:
                value = settings[name] if field.converter is None else field.converter(settings[name])
                field.validator(blank, field, value)
            except (TypeError, ValueError) as error:
                messages = (text.removeprefix(f"{factory.__name__}: ") for text in _messages(error))
                yield from (text if text.startswith(name) else f"{name}: {text}" for text in messages)
            except Exception:  # noqa: BLE001, S112  # the validator needs the other fields; making the object reports it
                continue


def _messages(error: Exception) -> Sequence[str]:
    """Return the messages of an error of a factory or a validator."""
    if isinstance(error, ConfigError):
        return error.problems
    if not isinstance(error, (TypeError, ValueError, ImportError)):
        return [one_line(error)]
    arguments: tuple[object, ...] = error.args
    message = arguments[0] if len(arguments) > 1 else error  # the validators of attrs add the field and the value
    return [" ".join(str(message).split()) or type(error).__name__]


def _at(path: str, names: Sequence[str], factory: Callable[..., Any], text: str) -> str:
    """Put a message under the path of a middleware. A message that begins with a setting's name continues the path."""
    text = text.removeprefix(f"{getattr(factory, '__name__', '')}: ")
    first = re.match(r"\w+(?=[.:\[])", text)
    return f"{path}.{text}" if first and first[0] in names else f"{path}: {text}"
