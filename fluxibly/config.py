"""Configuration: `LLMConfig`, and how it is read from YAML and the environment."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import attrs

from fluxibly.errors import ConfigError
from fluxibly.guards import is_list, is_mapping
from fluxibly.suggest import did_you_mean

if TYPE_CHECKING:
    from pathlib import Path


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

    def __attrs_post_init__(self) -> None:
        for name in ("connect", "first_byte", "idle", "total"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and value > 0):
                raise ConfigError(f"timeout.{name}: {value!r} is not a number of seconds above 0")


def _secret(value: Secret | str | None) -> Secret | None:
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
    api_key: Secret | None = attrs.field(default=None, converter=_secret)
    api_base: str | None = None
    timeout: float | Timeouts = 60.0
    max_retries: int = 3
    additional_params: Mapping[str, Any] = attrs.field(factory=dict[str, Any])
    middleware: Sequence[Any] | None = None

    def __attrs_post_init__(self) -> None:
        problems = list(_problems(self))
        if problems:
            raise ConfigError(_listed(problems), problems=tuple(problems))

    @property
    def timeouts(self) -> Timeouts:
        """`timeout` with each limit spelled out; `total` is for calls that are not streamed."""
        if isinstance(self.timeout, Timeouts):
            return self.timeout
        return Timeouts(self.timeout, self.timeout, self.timeout, self.timeout)

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any], *, path: str = "") -> LLMConfig:
        """A configuration out of plain data, as YAML and JSON have it. `path` goes before the names in messages.

        Numbers may be given as strings (they are, where they come from environment variables).

        Raises:
            ConfigError: it lists all that is wrong.
        """
        names = [field.name for field in attrs.fields(cls)]
        problems = [
            f"{path}{name}: there is no such setting{did_you_mean(str(name), names)}"
            for name in settings
            if name not in names
        ]
        problems += [f"{path}{name}: is required" for name in ("framework", "model") if settings.get(name) is None]
        known: dict[str, Any] = {}
        for name, value in settings.items():
            if name in names and value is not None:
                try:
                    known[name] = _read(name, value)
                except ConfigError as error:
                    problems += [f"{path}{problem}" for problem in error.problems]
        try:
            config = cls(**cast("dict[str, Any]", {"framework": "-", "model": "-", **known}))
        except ConfigError as error:
            problems += [f"{path}{problem}" for problem in error.problems]
            raise ConfigError(_listed(problems), problems=tuple(problems)) from None
        if problems:
            raise ConfigError(_listed(problems), problems=tuple(problems))
        return config

    @classmethod
    def from_yaml(cls, file: str | Path, *, section: str = "llm") -> LLMConfig:
        """The configuration in a section of a YAML file.

        `${VAR}` and `${VAR:-default}` in strings are replaced by environment variables, after parsing.

        Raises:
            ConfigError: the file cannot be read or parsed, lacks the section, or holds bad settings.
        """
        return cls.from_mapping(read_section(file, section), path=f"{section}.")


_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, 2),
    "top_p": (0, 1),
    "frequency_penalty": (-2, 2),
    "presence_penalty": (-2, 2),
}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _problems(config: LLMConfig) -> list[str]:
    """Everything that is wrong with a configuration."""
    problems: list[str] = []
    for name in ("framework", "model"):
        value: Any = getattr(config, name)
        if not isinstance(value, str) or not value.strip():
            problems.append(f"{name}: {value!r} is not a name (a non-empty str)")
    problems += parameter_problems({name: getattr(config, name) for name in (*_RANGES, "max_tokens")})
    if not isinstance(config.timeout, Timeouts) and not (_is_number(config.timeout) and config.timeout > 0):
        problems.append(f"timeout: {config.timeout!r} is not a number of seconds above 0, nor Timeouts(...)")
    if not _is_whole(config.max_retries) or config.max_retries < 0:
        problems.append(f"max_retries: {config.max_retries!r} is not a whole number from 0 up")
    if config.api_key is not None and not isinstance(config.api_key, Secret):  # pyright: ignore[reportUnnecessaryIsInstance]
        problems.append(f"api_key: a str is due, not a {type(config.api_key).__name__}")
    base: Any = config.api_base
    if base is not None and not (isinstance(base, str) and re.match(r"https?://[^/\s]+", base)):
        problems.append(f"api_base: {base!r} is not an http:// or https:// URL")
    if not isinstance(config.additional_params, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        problems.append("additional_params: a table (a mapping) is due")
    layers: Any = config.middleware
    if layers is not None and (isinstance(layers, (str, Mapping)) or not isinstance(layers, Sequence)):
        problems.append("middleware: a list is due")
    return problems


def parameter_problems(parameters: Mapping[str, object]) -> list[str]:
    """What is wrong with the sampling parameters of a configuration or a call; None is always right."""
    problems: list[str] = []
    for name, value in parameters.items():
        if value is None:
            continue
        if name in _RANGES:
            low, high = _RANGES[name]
            if not _is_number(value) or not low <= cast("float", value) <= high:
                problems.append(f"{name}: {value!r} is not a number from {low:g} to {high:g}")
        elif name == "max_tokens" and (not _is_whole(value) or cast("int", value) < 1):
            problems.append(f"max_tokens: {value!r} is not a whole number from 1 up")
    return problems


def _listed(problems: Sequence[str]) -> str:
    return (
        problems[0] if len(problems) == 1 else "several settings are wrong:\n" + "\n".join(f"- {p}" for p in problems)
    )


def _read(name: str, value: Any) -> Any:
    """A setting as plain data gives it; what does not fit is left for validation to tell of."""
    if name == "timeout" and isinstance(value, Mapping):
        return _timeouts(cast("Mapping[str, Any]", value))
    if isinstance(value, str) and name in (*_RANGES, "timeout", "max_tokens", "max_retries"):
        try:
            return int(value) if name in ("max_tokens", "max_retries") else float(value)
        except ValueError:
            return value
    return value


def _timeouts(table: Mapping[str, Any]) -> Timeouts:
    import cattrs

    names = [field.name for field in attrs.fields(Timeouts)]
    for name in table:
        if name not in names:
            raise ConfigError(f"timeout.{name}: there is no such setting{did_you_mean(str(name), names)}")
    try:
        return cattrs.structure(table, Timeouts)
    except ConfigError:
        raise
    except Exception as error:  # noqa: BLE001  # cattrs raises groups of whatever the fields raise
        problems = tuple(cattrs.transform_error(error, path="timeout"))
        raise ConfigError(_listed(problems), problems=problems) from None


def read_section(file: str | Path, section: str) -> Mapping[str, Any]:
    """A section of a YAML file, with environment variables expanded.

    Raises:
        ConfigError: see `LLMConfig.from_yaml`.
    """
    from pathlib import Path

    import yaml

    try:
        document: object = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file} is not UTF-8 text") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{file}{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    except RecursionError:
        raise ConfigError(f"{file}: nested too deeply") from None
    if document is None:
        raise ConfigError(f"{file} is empty; it needs a section `{section}:` with framework and model")
    if not is_mapping(document):
        raise ConfigError(
            f"{file}: a table is due at the top, with a section `{section}:`, not a {_yaml_kind(document)}"
        )
    if section not in document:
        raise ConfigError(f"{file} has no section `{section}:`{did_you_mean(section, map(str, document))}")
    table: object = document[section]
    if not is_mapping(table):
        raise ConfigError(f"{file}: `{section}:` is a table with framework and model, not a {_yaml_kind(table)}")
    problems: list[str] = []
    expanded = _expand(table, section, problems)
    if problems:
        raise ConfigError(_listed(problems), problems=tuple(problems))
    return cast("Mapping[str, Any]", expanded)


def _yaml_kind(value: object) -> str:
    return (
        "list" if isinstance(value, list) else "nothing" if value is None else f"single value ({type(value).__name__})"
    )


_VARIABLE = re.compile(r"\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^}]*))?\}")


def _expand(value: object, path: str, problems: list[str]) -> Any:
    """`value` with the environment variables in its strings replaced; unset ones are added to `problems`."""
    if isinstance(value, str):

        def replace(match: re.Match[str]) -> str:
            found = os.environ.get(match["name"]) or match["default"]
            if found is None:
                problems.append(
                    f"{path}: the environment variable {match['name']} is not set; "
                    f"set it, or write ${{{match['name']}:-default}}"
                )
                return ""
            return found

        return _VARIABLE.sub(replace, value)
    if is_mapping(value):
        return {key: _expand(item, f"{path}.{key}", problems) for key, item in value.items()}
    if is_list(value):
        return [_expand(item, f"{path}[{index}]", problems) for index, item in enumerate(value)]
    return value
