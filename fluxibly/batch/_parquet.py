"""Rows of Parquet files, a batch of them in memory at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from fluxibly.batch._rows import InFile, Row, bad_row
from fluxibly.batch._sinks import pyarrow_for
from fluxibly.batch._template import Prompts, checked, id_column, name_of
from fluxibly.errors import ConfigError

_AT_ONCE: Final = 1024


class ParquetFile(InFile):
    """A Parquet file. Its rows are those of one pass, without columns that nobody needs.

    Args:
        path: the file.
        prompts: how prompts are made. None: of the column `prompt`, or of the only one.

    Raises:
        ConfigError: pyarrow is missing, the file is no Parquet, or a column is missing.
        OSError: the file cannot be read.
    """

    def __init__(self, path: Path, prompts: Prompts | None) -> None:
        super().__init__(path)
        self.position = 0
        self._arrow, self._parquet = pyarrow_for(path)
        with self._open() as file:
            columns: list[str] = file.schema_arrow.names
        self._prompts = checked(prompts, columns, str(path))
        self._id = id_column(columns, self._prompts)
        self._columns = [*self._prompts.columns, *([] if self._id is None else [self._id])]

    def _open(self) -> Any:
        self.path.open("rb").close()  # whose error names the file
        try:
            return self._parquet.ParquetFile(self.path, pre_buffer=False)
        except self._arrow.ArrowInvalid:
            raise ConfigError(f"{self.path}: expected a Parquet file, got something else") from None

    def rows(self, skip: Callable[[int], bool], known: Mapping[str, int] | None = None) -> Iterator[Row]:
        """Do as `Source.rows`."""
        self.position = number = 0
        size = self.size
        with self._open() as file:
            rows = file.metadata.num_rows
            for group in range(file.num_row_groups):
                last = number + file.metadata.row_group(group).num_rows
                if all(map(skip, range(number, last))):
                    number = last
                    continue
                for batch in file.iter_batches(_AT_ONCE, row_groups=[group], columns=self._columns, use_threads=False):
                    wanted = [index for index in range(batch.num_rows) if not skip(number + index)]
                    for index, values in zip(wanted, batch.take(wanted).to_pylist() if wanted else (), strict=True):
                        self.position = size * (number + index) // rows
                        yield self._row(number + index, values)
                    number += batch.num_rows
            self.position = size

    def _row(self, number: int, values: dict[str, Any]) -> Row:
        custom_id = None
        try:
            custom_id = None if self._id is None else name_of(values[self._id])
            return Row(number, custom_id, self._prompts.of(values), {})
        except (TypeError, ValueError) as error:
            return bad_row(number, None, str(error), custom_id)
