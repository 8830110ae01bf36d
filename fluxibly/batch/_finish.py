"""The outputs that are made at the end, from the journal: in order, in other formats, and without errors."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, Final, get_args

import msgspec

from fluxibly._checks import did_you_mean
from fluxibly.batch._lines import Line
from fluxibly.batch._sinks import Format, sink_of
from fluxibly.errors import ConfigError

_SUFFIXES: Final[dict[str, Format]] = {".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".pq": "parquet"}

_STARTS: Final = (b'{"row":', b'{"id":"batch_req_', b"row,custom_id,", b"row\tcustom_id\t", b"PAR1")
"""How the files of all formats begin."""
_OTHERS: Final = frozenset(
    [
        ".json",
        ".xlsx",
        ".xls",
        ".ods",
        ".xml",
        ".yaml",
        ".yml",
        ".html",
        ".arrow",
        ".feather",
        ".avro",
        ".orc",
        ".db",
        ".sqlite",
        ".zip",
        ".gz",
        ".bz2",
        ".xz",
        ".zst",
    ]
)
"""The suffixes of well-known formats that are not written. JSON lines in such a file would mislead."""


class Output:
    """The output of a batch: where it goes, in which format, and the journal that it is made from.

    Lines as they come are their own journal. Every other output is made by `finish`, whole and at once, from the journal beside
    it, which is kept: without it, a later run would ask everything again.

    Args:
        path: the file.
        format: "lines" (fluxibly's own, as JSON), "openai" (what a batch of OpenAI's returns, as JSON lines), "csv", "tsv" or
            "parquet". None: what the suffix of the path says; JSON lines if it says nothing.
        ordered: whether the rows stand in the order of the input. Without it, lines stand as they came; all other formats are in
            order anyway.
        errors: a file for the rows that failed, which the output then lacks. Its suffix says its format, too; JSON lines have
            the format of the output.

    Raises:
        ConfigError: the format does not go with the suffix, the suffix is that of another well-known format, pyarrow is missing, a folder does not exist, two files are the same, or a
            file exists that `finish` would overwrite though no batch has written it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        format: Format | None = None,  # noqa: A002  # the name of the option
        ordered: bool = False,
        errors: str | os.PathLike[str] | None = None,
    ) -> None:
        self.path = Path(path)
        self.errors = None if errors is None else Path(errors)
        if not self.path.name:  # it was "" or "."
            raise ConfigError("expected a file for the output, got the folder '.'")
        if self.errors is not None and self.errors.is_dir():
            raise ConfigError(f"errors: expected a file, got the folder {str(self.errors)!r}")
        self.format: Format = _format_of(self.path, format)
        self.ordered = ordered or self.format != "lines"
        beside = self.path.with_name(f"{self.path.name}.journal")
        self.is_made_at_end: bool = self.ordered or self.errors is not None or beside.exists()
        self.journal_path: Path = beside if self.is_made_at_end else self.path
        self._check()
        self._sinks = [sink_of(self.path, self.format)]
        if self.errors is not None:
            as_lines: Format = "openai" if self.format == "openai" else "lines"
            self._sinks.append(sink_of(self.errors, _format_of(self.errors, None, as_lines)))

    @property
    def whole(self) -> bool:
        """Whether the lines of the journal have to have the whole answers; see `line_of`."""
        return self.format == "openai"

    def _check(self) -> None:
        made = [path for path in (self.path, self.errors) if path is not None]
        for path in made:
            if not path.parent.is_dir():
                raise ConfigError(f"{path}: expected a folder {str(path.parent)!r}, got none; make it first")
        if len({os.path.realpath(path) for path in [*made, self.journal_path]}) < len(made) + self.is_made_at_end:
            raise ConfigError(
                f"errors: expected a file of its own, got {str(self.errors)!r}, which the output is written to"
            )
        if not self.is_made_at_end:
            return
        if self.journal_path.exists():
            for path in made:
                if path.exists() and not _is_made(path):
                    raise ConfigError(
                        f"{path}: expected no such file, or one that a batch has written, got another; give another file, or move it "
                        "away"
                    )
            return
        for path in made:
            if path.exists() and path.stat().st_size:
                hint = "give another file, or move it away"
                if path is self.path and _is_journal(path):
                    hint = f"it has lines of a batch: to go on with them, rename it to {self.journal_path.name}"
                raise ConfigError(
                    f"{path}: the file exists, but no batch has written it, as there is no journal {self.journal_path}; "
                    f"it would be overwritten: {hint}"
                )

    def finish(self, journal: Path | None = None) -> None:
        """Make the output from the journal, in one piece: who reads meanwhile sees the former output, or none.

        If a row has several lines, the last one counts. Rows without a line are left out. An output that is its own journal is
        left as it is.

        Args:
            journal: by default `journal_path`.

        Raises:
            OSError: it cannot be written. What was there before is left.
        """
        journal = self.journal_path if journal is None else journal
        if journal == self.path:
            return
        index = _Index(journal)
        with ExitStack() as stack, journal.open("rb", buffering=_BUFFER) as file:
            out, *errors = [stack.enter_context(sink) for sink in self._sinks]
            failures = errors[0] if errors else out
            for failed, line in index.in_order(file) if self.ordered else index.as_they_came(file):
                (failures if failed else out).write(line)
            for sink in (*errors, out):
                sink.commit()


_BUFFER: Final = 1 << 20


class _Written(msgspec.Struct):
    """The fields of a line that the index reads."""

    row: int = -1
    error: msgspec.Raw = msgspec.Raw(b"null")


class _Index:
    """Where the last line of each row of a journal begins: eight bytes for each row."""

    def __init__(self, journal: Path) -> None:
        self._places = array("q")
        """Twice the offset of the line, and 1 more if the row failed; -1 for a row without a line."""
        places = self._places
        decode = msgspec.json.Decoder(_Written).decode
        none = array("q", [-1])
        offset = 0
        with journal.open("rb", buffering=_BUFFER) as file:
            for line in file:
                if not line.endswith(b"\n"):  # a process that was killed was writing it
                    break
                written = decode(line)
                row = written.row
                if row >= len(places):
                    places.extend(none * (row + 1 - len(places)))
                if row >= 0:
                    places[row] = 2 * offset + (bytes(written.error) != b"null")
                offset += len(line)

    def in_order(self, file: BinaryIO) -> Iterator[tuple[bool, bytes]]:
        """Yield whether a row failed, and its line, for each row in order."""
        for place in self._places:
            if place >= 0:
                file.seek(place >> 1)  # rows stand nearly in order, so this is mostly within the buffer
                yield bool(place & 1), file.readline()

    def as_they_came(self, file: BinaryIO) -> Iterator[tuple[bool, bytes]]:
        """Yield the same in the order of the journal."""
        decode = msgspec.json.Decoder(_Written).decode
        places = self._places
        offset = 0
        for line in file:
            if not line.endswith(b"\n"):
                break
            row = decode(line).row
            if row >= 0 and (place := places[row]) >> 1 == offset:
                yield bool(place & 1), line
            offset += len(line)


def _format_of(path: Path, wanted: Format | None, otherwise: Format = "lines") -> Format:
    suffix = path.suffix.lower()
    if suffix in _OTHERS:
        raise ConfigError(
            f"{path}: expected .jsonl (JSON lines), .csv, .tsv or .parquet, got {suffix}, which a batch does not write"
            f"{'; write .jsonl' if suffix == '.json' else ''}"
        )
    by_suffix = _SUFFIXES.get(suffix)
    if wanted is None:
        return by_suffix or otherwise
    if wanted not in get_args(Format):
        raise ConfigError(
            f"format: expected one of {', '.join(get_args(Format))}, got {wanted!r}{did_you_mean(str(wanted), get_args(Format))}"
        )
    if by_suffix is not None and by_suffix != wanted:
        raise ConfigError(
            f"format: expected {by_suffix!r} for the output {path.name!r}, got {wanted!r}; write another suffix"
        )
    return wanted


def _is_made(path: Path) -> bool:
    """Whether a file is empty, or begins as one that `finish` has made."""
    with path.open("rb") as file:
        start = file.read(40)
    return not start or start.startswith(_STARTS)


def _is_journal(path: Path) -> bool:
    """Whether a file begins with a line of a batch."""
    try:
        with path.open("rb") as file:
            msgspec.json.decode(file.readline(_BUFFER), type=Line)
    except (OSError, msgspec.MsgspecError, RecursionError):
        return False
    return True
