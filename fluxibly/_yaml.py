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


def read_section(file: str | Path, section: str) -> tuple[Mapping[str, Any], list[str]]:
    """Return a section of a YAML file, with `${VAR}` and `${VAR:-default}` replaced in its strings, and its problems.

    The problems are keys that are given twice, of which the last counts, and variables that are not set, which stay as
    they are.

    Raises:
        ConfigError: the file cannot be read or parsed, or the section is missing.
    """
    document, problems = _document(Path(file))
    if document is None:
        raise ConfigError(f"{file} is empty; it needs a section `{section}:` with framework and model")
    if not is_mapping(document):
        raise ConfigError(f"{file}: expected a table with a section `{section}:`, got {_kind(document)}")
    if section not in document:
        raise ConfigError(f"{file} has no section `{section}:`{did_you_mean(section, map(str, document))}")
    table = document[section]
    if not is_mapping(table):
        raise ConfigError(f"{file}: `{section}:`: expected a table with framework and model, got {_kind(table)}")
    expansion = _Expansion(problems)
    return expansion.of(table, section), problems


def _document(file: Path) -> tuple[object, list[str]]:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file} is not UTF-8 text") from None
    except ValueError as error:  # the path contains a NUL
        raise ConfigError(f"cannot read {str(file)!r}: {error}") from None
    try:
        loader = _Loader(text)
        document: object = loader.get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}"
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        hint = "; indent with spaces" if "'\\t'" in problem else ""
        raise ConfigError(f"{file}{where}: not valid YAML: {problem}{hint}") from None
    except RecursionError:
        raise ConfigError(f"{file}: nested too deeply") from None
    except (ValueError, KeyError, AttributeError, TypeError):
        # Not errors of PyYAML's own: a value only looks like its type, as the date 2024-13-45 or `!!bool perhaps` do.
        raise ConfigError(f"{file}: a value is invalid for the type that YAML gives it; put it in quotes") from None
    return document, [f"{file}, {each}" for each in loader.duplicates]


class _Loader(yaml.SafeLoader):
    """A `SafeLoader` that notes keys that are given twice in a table."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.duplicates: list[str] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line = key.start_mark.line + 1
            if key.value in lines:
                again = f"the key {key.value!r} is given twice, here and in line {lines[key.value]}"
                self.duplicates.append(f"line {line}: not valid YAML: {again}")
            lines[key.value] = line
        return super().construct_mapping(node, deep)


def _kind(value: object) -> str:
    return "a list" if is_list(value) else "nothing" if value is None else f"a single value ({type(value).__name__})"


_REFERENCE = re.compile(r"\$\{(?P<inside>[^}]*)(?P<end>\}?)")
_VARIABLE = re.compile(r"(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>(?:(?!\$\{).)*))?", re.DOTALL)


class _Expansion:
    """A copy of plain data with the variables in its strings replaced. It adds the problems with them to `problems`.

    YAML's aliases let a small file describe a huge or endless structure, so each table and list is expanded only once.
    """

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
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
        """Return the replacement for a `${…}`; if there is none, itself. As in shells, a default applies to a variable that is unset or empty."""
        variable = _VARIABLE.fullmatch(match["inside"])
        if variable is None or not match["end"]:
            self.problems.append(f"{path}: expected ${{VAR}} or ${{VAR:-default}}, got {match[0]!r}")
            return match[0]
        name, default = variable["name"], variable["default"]
        found = os.environ.get(name)
        if default is not None:
            return found or default
        if found is None:
            self.problems.append(
                f"{path}: the environment variable {name} is not set; set it, or write ${{{name}:-default}}"
            )
            return match[0]
        return found
