"""The prompts of rows that are tables of values: one of the values, or a text with values in it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final, Protocol

import msgspec

from fluxibly._checks import did_you_mean, kind_of
from fluxibly.errors import ConfigError

IDS: Final = ("custom_id", "id")
"""The columns that name a row, the first that is there."""
_PIECE: Final = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


class Prompts(Protocol):
    """Makes prompts of rows."""

    @property
    def columns(self) -> Sequence[str]:
        """The columns that are read."""
        ...

    def of(self, values: Mapping[str, object]) -> object:
        """Return the prompt of a row.

        Raises:
            KeyError: a column is missing.
            TypeError, ValueError: a value makes no prompt. The message does not quote it.
        """
        ...


class Column:
    """Prompts that are the values of a column: texts, or messages."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.columns = (name,)

    def of(self, values: Mapping[str, object]) -> object:
        """Do as `Prompts.of`."""
        value = values[self.name]
        if not isinstance(value, (str, list)):
            raise TypeError(f"{self.name}: expected a text, or a list of messages, got {kind_of(value)}")
        return value  # pyright: ignore[reportUnknownVariableType]  # `LLM.request` checks messages


class Template:
    """A text with the values of columns in it: "Summarise: {title}". `{{` and `}}` stand for braces.

    A column that is null is an empty text. Values that are no texts stand as JSON has them.

    Raises:
        ConfigError: a brace is alone, or there is no column in it.
    """

    def __init__(self, text: str) -> None:
        self._pieces: list[tuple[str, bool]] = []
        """The pieces, and whether each is the name of a column."""
        end = 0
        for found in _PIECE.finditer(text):
            self._pieces.append((text[end : found.start()], False))
            end = found.end()
            if (name := found[1]) is not None:
                self._pieces.append((name, True))
            elif len(found[0]) == 2:
                self._pieces.append((found[0][0], False))
            else:
                raise ConfigError(
                    f"template: expected a column in braces, like {{title}}, got a single {found[0]!r} at character "
                    f"{found.start() + 1}; write {found[0] * 2} for a brace"
                )
        self._pieces.append((text[end:], False))
        self.columns = tuple({name: None for name, is_column in self._pieces if is_column})
        if not self.columns:
            raise ConfigError(
                "template: expected a column in it, like {title}, got none, so all prompts would be equal"
            )

    def of(self, values: Mapping[str, object]) -> str:
        """Do as `Prompts.of`."""
        return "".join([_text(piece, values[piece]) if is_column else piece for piece, is_column in self._pieces])


def _text(name: str, value: object) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, (bytes, bytearray)):
        raise TypeError(f"{name}: expected a text, got {kind_of(value)}")
    if isinstance(value, (bool, int, float, list, dict)):
        try:
            return msgspec.json.encode(value).decode()
        except (TypeError, ValueError, OverflowError, RecursionError):
            raise ValueError(f"{name}: expected values that JSON has, got others") from None
    return str(value)  # such as a date of a Parquet file


def prompts_of(column: str | None, template: str | None) -> Prompts | None:
    """Return how prompts are made; None if nothing is said of it.

    Raises:
        ConfigError: both are given, or the template is wrong.
    """
    if column is not None and template is not None:
        raise ConfigError("column, template: expected one of them, got both")
    if template is not None:
        return Template(template)
    return None if column is None else Column(column)


def checked(prompts: Prompts | None, columns: Sequence[str], name: str) -> Prompts:
    """Return how prompts are made of these columns: as said, or of `prompt`, or of the only column.

    Args:
        prompts: what was said.
        columns: the columns that there are.
        name: the input, for errors.

    Raises:
        ConfigError: a column is missing or there twice, or it is not clear which is meant.
    """
    if prompts is None:
        others = [column for column in columns if column not in IDS]
        if "prompt" in others:
            prompts = Column("prompt")
        elif len(others) == 1:
            prompts = Column(others[0])
        else:
            raise ConfigError(
                f"{name}: expected a column 'prompt', or one column alone, got {_listed(columns)}; name one by --column, or "
                "write a --template"
            )
    for column in prompts.columns:
        if column not in columns:
            braces = "; write {{ and }} for braces" if isinstance(prompts, Template) else ""
            hint = did_you_mean(column, columns) or braces
            raise ConfigError(f"{name}: there is no column {column!r}, only {_listed(columns)}{hint}")
    for column in (*prompts.columns, *(each for each in IDS if each in columns)):
        if list(columns).count(column) > 1:
            raise ConfigError(f"{name}: expected one column {column!r}, got several")
    return prompts


def _listed(columns: Sequence[str]) -> str:
    shown = ", ".join(map(repr, columns[:20])) or "none"
    return shown if len(columns) <= 20 else f"{shown} and {len(columns) - 20} more"


def id_column(columns: Sequence[str], prompts: Prompts) -> str | None:
    """Return the column that names rows, if there is one."""
    taken = prompts.columns if isinstance(prompts, Column) else ()
    return next((name for name in IDS if name in columns and name not in taken), None)


def name_of(value: object) -> str | None:
    """Return the name of a row, from a text or a number.

    Raises:
        TypeError: it is something else.
    """
    if isinstance(value, str) or value is None:
        return value or None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    raise TypeError(f"custom_id: expected a text or a number, got {kind_of(value)}")
