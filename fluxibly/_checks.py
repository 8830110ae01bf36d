"""Checks of the values that callers pass, whatever their annotations say, and the words for what is wrong with them.

The predicates take `object`: JSON, YAML and untyped callers give values of any type.
"""

from __future__ import annotations

import os
import re
import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar, cast

if TYPE_CHECKING:
    import attrs

_LARGEST = sys.float_info.max
"""The clocks work with floats, and a larger whole number is none."""


def is_mapping(value: object) -> TypeGuard[Mapping[Any, Any]]:
    """Whether `value` is a mapping."""
    return isinstance(value, Mapping)


def is_list(value: object) -> TypeGuard[list[Any]]:
    """Whether `value` is a list."""
    return isinstance(value, list)


def is_whole(value: object) -> TypeGuard[int]:
    """Whether `value` is a whole number. True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether `value` is a number. True and False are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_path(text: str) -> bool:
    """Whether the system could have a file of this name. No name has a NUL, or half a surrogate pair."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def kind_of(value: object) -> str:
    """Name the type of a value for an error message, with its article."""
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


def problem(name: str, expected: str, value: object) -> str:
    """Word what is wrong with the setting `name`. All checks use these words."""
    got = reprlib.repr(value) if value is None or isinstance(value, (str, int, float)) else kind_of(value)
    return f"{name}: expected {expected}, got {got}"


# Each check returns what is wrong with a value, or None. The caller decides whether None is a valid value.


def number(
    name: str,
    value: object,
    low: float | None = None,
    high: float | None = None,
    *,
    above: float | None = None,
    finite: bool = True,
    unit: str = "",
) -> str | None:
    """Check a number from `low` to `high`, or greater than `above`. The message names its `unit`.

    NaN is never valid where there is a bound; infinity is only if `finite` is False.
    """
    if (
        is_number(value)
        and (-_LARGEST <= value <= _LARGEST or (not finite and isinstance(value, float)))
        and (low is None or value >= low)
        and (high is None or value <= high)
        and (above is None or value > above)
    ):
        return None
    expected = "a number" + (f" of {unit}" if unit else "") + _range(low, high)
    return problem(name, expected + ("" if above is None else f" above {above:g}"), value)


def whole(name: str, value: object, low: int | None = None, high: int | None = None) -> str | None:
    """Check a whole number from `low` to `high`."""
    if is_whole(value) and (low is None or value >= low) and (high is None or value <= high):
        return None
    return problem(name, "a whole number" + _range(low, high), value)


def _range(low: float | None, high: float | None) -> str:
    if low is None:
        return "" if high is None else f" up to {high:g}"
    return f" from {low:g} up" if high is None else f" from {low:g} to {high:g}"


def truth(name: str, value: object) -> str | None:
    """Check True or False."""
    return None if isinstance(value, bool) else problem(name, "True or False", value)


def text(name: str, value: object, *, empty: bool = False) -> str | None:
    """Check a str with more than white space in it; with `empty`, any str."""
    if isinstance(value, str) and (empty or value.strip()):
        return None
    return problem(name, "a str" if empty else "a non-empty str", value)


def mapping(name: str, value: object, *, keys: type = object, values: type = object) -> str | None:
    """Check a mapping of `keys` to `values`."""
    # Never the value itself: it may hold an API key.
    if not is_mapping(value):
        return f"{name}: expected a mapping (in YAML, a table), got {kind_of(value)}"
    for key, each in value.items():
        if not isinstance(key, keys):
            return f"{name}: expected {keys.__name__} as keys, got {kind_of(key)}"
        if not isinstance(each, values):
            return f"{name}.{key}: expected a {values.__name__}, got {kind_of(each)}"
    return None


def one_of(name: str, value: object, choices: Iterable[str]) -> str | None:
    """Check that a value is one of a few strings."""
    choices = tuple(choices)
    return None if value in choices else problem(name, f"one of {', '.join(map(repr, choices))}", value)


def validator(check: Callable[..., str | None], *bounds: Any, **options: Any) -> Any:
    """Make an attrs validator of a check: `attrs.field(validator=validator(whole, 0))`. It raises a ValueError."""

    def validate(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
        found = check(attribute.name, value, *bounds, **options)
        if found is not None:
            raise ValueError(f"{type(instance).__name__}: {found}")

    return validate


_SECRET = re.compile(
    "key|token|secret|passw|passphrase|pwd|credential|auth|bearer|signature|cookie|header", re.IGNORECASE
)


def is_secret(name: str) -> bool:
    """Whether a setting or a header of this name has a secret value, such as `x-api-key`."""
    return _SECRET.search(name) is not None


def public_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Return the headers that are not secret, with their names in lower case."""
    return {name.lower(): value for name, value in headers.items() if not is_secret(name)}


def without_secrets(settings: object) -> object:
    """Return settings with the texts under names like `api_key` or `headers` masked."""
    return _without_secrets(settings, secret=False)


def repr_without_secrets(settings: object) -> str:
    """Return the `repr` of settings, with the texts under names like `api_key` or `headers` masked."""
    return repr(without_secrets(settings))


def shown_url(url: str) -> str:
    """Return an address without the secrets in it: a login, and values in its query under names like `api_key`."""
    # A password may contain a slash or another @.
    login, at, rest = url.rpartition("@")
    scheme = re.match(r"\w+:/*", login)
    shown = f"{scheme[0] if scheme else ''}***@{rest}" if at else url
    return _QUERY.sub(lambda match: f"{match[1]}***" if _SECRET.search(match[1]) else match[0], shown)


def secrets_in(settings: object, *, secret: bool = False) -> Iterator[str]:
    """Yield the texts that `without_secrets` masks. `secret` says that all of them are."""
    if isinstance(settings, str):
        if secret:
            yield settings
    elif is_mapping(settings):
        for name, each in settings.items():
            yield from secrets_in(each, secret=secret or is_secret(str(name)))
    elif isinstance(settings, (list, tuple)):
        for each in cast("Iterable[object]", settings):
            yield from secrets_in(each, secret=secret)


def secrets_in_query(url: str) -> list[str]:
    """Return the values in an address's query that `shown_url` masks."""
    return [match[2] for match in _QUERY.finditer(url) if _SECRET.search(match[1])]


_QUERY = re.compile(r"([?&][^=&#]*=)([^&#]*)")


def repr_of_headers(headers: object) -> str:
    """Return the `repr` of headers, with their values masked."""
    return repr(_without_secrets(headers, secret=True))


def _without_secrets(value: object, *, secret: bool) -> object:
    if is_mapping(value):
        return {
            name: _without_secrets(each, secret=secret or _SECRET.search(str(name)) is not None)
            for name, each in value.items()
        }
    if isinstance(value, (list, tuple)):
        items = [_without_secrets(each, secret=secret) for each in cast("Sequence[object]", value)]
        return tuple(items) if isinstance(value, tuple) else items
    return "***" if secret and isinstance(value, (str, bytes)) else value


T = TypeVar("T")


_OTHER_NAMES = {
    "azure_deployment": "model",
    "azure_endpoint": "api_base",
    "endpoint": "api_base",
    "extra_body": "additional_params",
    "location": "region",
    "model_kwargs": "additional_params",
    "organization": "headers",
    "stop_sequences": "stop",
    "token": "api_key",
}
"""The names that other libraries have for a setting, where they are not alike."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?`, or an empty string if no known name is near."""
    known = list(known)
    near = _OTHER_NAMES.get(name) if _OTHER_NAMES.get(name) in known else nearest(name, known)
    return "" if near is None else f"; did you mean {near!r}?"


def nearest(name: str, known: Iterable[str], least: float = 0.5) -> str | None:
    """Return the known name that is nearest, if it is alike enough: `least` is from 0 (anything) to 1 (the same)."""
    import difflib  # late, for the sake of `import fluxibly`

    near = difflib.get_close_matches(name, list(known), n=1, cutoff=least)
    return near[0] if near else None


def unknown_settings(settings: Mapping[Any, Any], names: Iterable[str], path: str = "") -> list[str]:
    """List the settings that are not among the known `names`, with the nearest name. `path` precedes them."""
    names = list(names)
    return [
        f"{path}{name}: there is no such setting{did_you_mean(name, names)}"
        if isinstance(name, str)
        else f"{path}{name}: expected the name of a setting, got {kind_of(name)} (in YAML, on, off, yes, no and "
        "numbers are no names unless they are in quotes)"
        for name in settings
        if name not in names
    ]


def suggests_names(cls: type[T]) -> type[T]:
    """Make the TypeError for an unknown keyword name the nearest known keyword, as Python itself does from 3.13."""
    init: Any = cls.__init__
    names = [name for name in init.__annotations__ if name != "return"]

    @wraps(init)
    def checked(self: object, *args: Any, **settings: Any) -> None:
        for name in settings:
            if name not in names:
                raise TypeError(f"{cls.__name__} has no {name!r}{did_you_mean(name, names)}")
        init(self, *args, **settings)

    type.__setattr__(cls, "__init__", checked)
    return cls
