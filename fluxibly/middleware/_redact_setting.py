"""The setting `redact` of `Tracing` and `Logging`: what becomes of the texts that they record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from fluxibly._checks import is_mapping, unknown_settings
from fluxibly.errors import ConfigError

if TYPE_CHECKING:
    from fluxibly.middleware.redact import Redact

# All else is imported late, because most stacks redact nothing.

RedactText: TypeAlias = Callable[[str], str]


def to_redact(value: Redact | RedactText | Mapping[str, Any] | str | None) -> Redact | RedactText | None:
    """Return what the setting stands for: a table makes a `Redact`, and a str names a registered function.

    Raises:
        ConfigError: the table has a wrong setting, or no function is registered under that name.
    """
    if isinstance(value, str):
        from fluxibly.functions import find_function

        return cast("RedactText", find_function(value))
    return _redact_of(value) if is_mapping(value) else cast("Redact | RedactText | None", value)


def _redact_of(settings: Mapping[str, Any]) -> Redact:
    import attrs

    from fluxibly.middleware.redact import Redact

    problems = unknown_settings(settings, [field.name for field in attrs.fields(Redact) if field.init], "redact.")
    if not problems:
        try:
            return Redact(**settings)
        except ConfigError as error:
            problems = list(error.problems)
        except ValueError as error:  # of a validator
            problems = [str(error)]
        problems = [f"redact.{each.removeprefix('Redact: ')}" for each in problems]
    raise ConfigError.of(problems)


def check_redact(name: str, value: object) -> str | None:
    """Check what the setting stands for."""
    from fluxibly.functions import check_function
    from fluxibly.middleware.redact import Redact

    return None if isinstance(value, Redact) else check_function(name, value)


def redact_text(value: Redact | RedactText | None) -> RedactText | None:
    """Return the function for texts."""
    if value is None:
        return None
    from fluxibly.middleware.redact import Redact

    return value.text if isinstance(value, Redact) else value
