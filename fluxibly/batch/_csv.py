"""Rows of CSV, as in RFC 4180: with a header, and with ends of lines within quotes."""

from __future__ import annotations

import csv
from collections.abc import Sequence

from fluxibly.batch._rows import Row, bad_row
from fluxibly.batch._template import Prompts, checked, id_column, name_of
from fluxibly.batch._text_lines import LONGEST
from fluxibly.errors import ConfigError


class Delimited:
    """Reads rows of lines, one by one. The first row is the header.

    Args:
        prompts: how prompts are made. None: of the column `prompt`, or of the only one.
        delimiter: what stands between values.
        name: the input, for errors.
    """

    def __init__(self, prompts: Prompts | None, delimiter: str, name: str) -> None:
        self._wanted = prompts
        self._delimiter = delimiter
        self._name = name
        self.header: Sequence[str] | None = None
        """The names of the columns, once they were read."""
        self._number = 0
        self._held: list[str] = []
        """The lines of the row that has begun."""
        self._size = 0
        self._began = 1
        """The line where the row began that has ended last."""
        self._lines: list[str] = []
        """The lines of that row."""
        self._values: list[str] | None = None
        """Its values, if they were needed to find its end."""
        self._problem: str | None = None
        if csv.field_size_limit() < LONGEST:
            csv.field_size_limit(LONGEST)  # the process's: the module has no other, and 128 KB are too few for a prompt

    def add(self, line: bytes) -> bool:
        """Take a line. Return whether it ends a row, which `row` then returns.

        Raises:
            ConfigError: it ends the header, which is wrong.
        """
        self._number += 1
        is_inside = bool(self._held)
        if not is_inside:
            if line.isspace():
                return False
            self._began, self._size, self._values, self._problem = self._number, 0, None, None
        self._size += len(line)
        if self._size > LONGEST:
            self._problem = f"expected a row of at most {LONGEST} bytes, got more, or a quote without an end"
            self._held.clear()
            return self._ends()
        try:
            self._held.append(line.decode())
        except UnicodeDecodeError:
            self._problem = "expected UTF-8, got other bytes"
            self._held.append(line.decode(errors="replace"))
        if b'"' not in line:
            return not is_inside and self._ends()
        if is_inside and b'"' not in line.replace(b'""', b""):  # so a long value is not parsed with each of its lines
            return False
        return self._parse(self._held) and self._ends()

    def _parse(self, lines: list[str]) -> bool:
        """Parse lines. Return whether they are a whole row."""
        try:
            self._values = next(csv.reader(lines, delimiter=self._delimiter, strict=True))
        except csv.Error as error:
            problem = str(error)
            if "unexpected end" in problem:
                return False
            if "new-line" in problem:
                problem = "a carriage return outside of quotes"
            self._problem = self._problem or f"expected CSV as in RFC 4180, got other text ({problem})"
        return True

    def _parsed(self) -> list[str] | None:
        """Return the values of the row that has ended; None if there is a problem."""
        if self._values is None and self._problem is None:
            self._parse(self._lines)
        return self._values if self._problem is None else None

    def _ends(self) -> bool:
        self._lines, self._held = self._held, []
        if self.header is None:
            self._begin()
            return False
        return True

    def _begin(self) -> None:
        values = self._parsed()
        if values is None:
            raise ConfigError(f"{self._name}, line {self._began}: {self._problem}")
        self.header = values
        self._prompts = checked(self._wanted, self.header, self._name)
        self._id = id_column(self.header, self._prompts)

    def end(self) -> bool:
        """Note that there are no more lines. Return whether that ends a row.

        Raises:
            ConfigError: there is no header.
        """
        if self._held:
            self._problem = "expected the end of a quote, got the end of the input"
            return self._ends()
        if self.header is None:
            raise ConfigError(f"{self._name}: expected a header with the names of the columns, got nothing")
        return False

    def row(self, number: int) -> Row:
        """Return the row that has ended."""
        values, header = self._parsed(), self.header or ()
        if values is None:
            return bad_row(number, self._began, str(self._problem))
        if len(values) != len(header):
            return bad_row(number, self._began, f"expected {len(header)} values, as in the header, got {len(values)}")
        fields = dict(zip(header, values, strict=True))
        custom_id = None if self._id is None else name_of(fields[self._id])
        try:
            return Row(number, custom_id, self._prompts.of(fields), {}, None, self._began)
        except (TypeError, ValueError) as error:
            return bad_row(number, self._began, str(error), custom_id)
