"""The lines of rows that have ended: counted in the report, held back while all rows fail alike, and written to the journal."""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable
from typing import Final

from fluxibly.batch._counting import Counted, count_line, count_rows
from fluxibly.batch._journal import Entry, Journal
from fluxibly.batch._lines import Line, encoded

DISK_FULL: Final = "disk full"


def is_disk_full(error: OSError) -> bool:
    """Return whether a write failed because there is no room."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class LineWriter:
    """Takes lines of rows, counts them, and writes them.

    The first lines are held back as long as all rows fail alike: then the reason is hardly in the rows.

    Args:
        journal: gets the lines.
        report: gets the counts.
        stop_after_errors: the number of first rows that stop the run if all fail alike. 0: never.
        wrote: is called with each line that is written, and the number of the byte at which it begins.
    """

    def __init__(
        self,
        journal: Journal,
        report: Counted,
        *,
        stop_after_errors: int,
        wrote: Callable[[Entry, int], object] | None = None,
    ) -> None:
        self.failed_alike: str | None = None
        """Why the run has to stop: as many first rows as are allowed have failed alike. Their lines are never written."""
        self._journal = journal
        self._report = report
        self._stop_after_errors = stop_after_errors
        self._wrote = wrote
        self._entries = deque[Entry]()
        self._held: list[Entry] | None = [] if stop_after_errors else None
        """The lines of the first rows. None: not all have failed alike."""
        self.held_error = ""
        """The error of the rows whose lines are held back."""

    @property
    def held(self) -> int:
        """The number of lines that are held back."""
        return len(self._held or ())

    def __len__(self) -> int:
        """Return the number of lines that can be written."""
        return len(self._entries)

    def add(self, line: Line, error: str | None = None) -> None:
        """Take the line of a row.

        Args:
            error: the error of a row that would fail again, by which rows are compared. None: the row is answered, may be answered
                another time, or is none of the first.
        """
        self._report.asked += line.attempts > 0
        count_line(self._report, line)
        entry = Entry(line.row, line.error is not None, encoded(line), line.key)
        held = self._held
        if held is not None:
            if error is not None and (not held or error == self.held_error):
                self.held_error = error
                held.append(entry)
                if len(held) >= self._stop_after_errors:  # those in flight may follow
                    self.failed_alike = f"the first {len(held)} rows all failed alike: {error}"
                return
            self.release()
        self._entries.append(entry)

    def release(self) -> None:
        """Hold no lines back any more, except those that stop the run."""
        if self._held is not None and self.failed_alike is None:
            self._entries.extend(self._held)
            self._held = None

    def write(self) -> None:
        """Write the lines, except those that are held back.

        Raises:
            OSError: there is no room for all. Those that are left can be written later.
        """
        try:
            if self._entries:
                self._journal.write(self._entries, self._wrote)
        finally:
            count_rows(self._report, self._journal)
