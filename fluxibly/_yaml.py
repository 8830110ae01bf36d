"""The reader for a section of a YAML file, with environment variables in it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fluxibly._checks import did_you_mean, is_list, is_mapping
from fluxibly.errors import ConfigError


def read_section(file: str | Path, section: str) -> Mapping[str, Any]:
    """Return a section of a YAML file, with `${VAR}` and `${VAR:-default}` replaced in its strings.

    Raises:
        ConfigError: the file cannot be read or parsed, the section is missing, or a variable is not set.
    """
    document = _document(Path(file))
    if document is None:
        raise ConfigError(f"{file} is empty; it needs a section `{section}:` with framework and model")
    if not is_mapping(document):
        raise ConfigError(f"{file}: expected a table with a section `{section}:`, got {_kind(document)}")
    if section not in document:
        raise ConfigError(f"{file} has no section `{section}:`{did_you_mean(section, map(str, document))}")
    table = document[section]
    if not is_mapping(table):
        raise ConfigError(f"{file}: `{section}:`: expected a table with framework and model, got {_kind(table)}")
    expansion = _Expansion()
    expanded: Mapping[str, Any] = expansion.of(table, section)
    if expansion.problems:
        raise ConfigError.of(expansion.problems)
    return expanded


def _document(file: Path) -> object:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file} is not UTF-8 text") from None
    except ValueError as error:  # the path contains a NUL
        raise ConfigError(f"cannot read {str(file)!r}: {error}") from None
    try:
        document: object = yaml.load(text, _Loader)  # noqa: S506  # _Loader is a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}"
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ConfigError(f"{file}{where}: not valid YAML: {problem}") from None
    except RecursionError:
        raise ConfigError(f"{file}: nested too deeply") from None
    except (ValueError, KeyError, AttributeError, TypeError):
        # Not errors of PyYAML's own: a value only looks like its type, as the date 2024-13-45 or `!!bool perhaps` do.
        raise ConfigError(f"{file}: a value is invalid for the type that YAML gives it; put it in quotes") from None
    return document


class _Loader(yaml.SafeLoader):
    """A `SafeLoader` that refuses a duplicate key instead of taking its last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _kind(value: object) -> str:
    return "a list" if is_list(value) else "nothing" if value is None else f"a single value ({type(value).__name__})"


_REFERENCE = re.compile(r"\$\{(?P<inside>[^}]*)(?P<end>\}?)")
_VARIABLE = re.compile(r"(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>(?:(?!\$\{).)*))?", re.DOTALL)


class _Expansion:
    """A copy of plain data with the variables in its strings replaced, and a collection of the problems with them.

    YAML's aliases let a small file describe a huge or endless structure, so each table and list is expanded only once.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.done: dict[int, Any] = {}

    def of(self, value: object, path: str) -> Any:
        if isinstance(value, str):
            return _REFERENCE.sub(lambda match: self.variable(match, path), value)
        if id(value) in self.done:
            return self.done[id(value)]
        if is_mapping(value):
            table = self.done[id(value)] = dict[Any, Any]()
            table.update({key: self.of(item, f"{path}.{key}") for key, item in value.items()})
            return table
        if is_list(value):
            items = self.done[id(value)] = list[Any]()
            items.extend(self.of(item, f"{path}[{index}]") for index, item in enumerate(value))
            return items
        return value

    def variable(self, match: re.Match[str], path: str) -> str:
        """Return the replacement for a `${…}`. As in shells, a default applies to a variable that is unset or empty."""
        variable = _VARIABLE.fullmatch(match["inside"])
        if variable is None or not match["end"]:
            self.problems.append(f"{path}: expected ${{VAR}} or ${{VAR:-default}}, got {match[0]!r}")
            return ""
        name, default = variable["name"], variable["default"]
        found = os.environ.get(name)
        if default is not None:
            return found or default
        if found is None:
            self.problems.append(
                f"{path}: the environment variable {name} is not set; set it, or write ${{{name}:-default}}"
            )
            return ""
        return found
