"""Rows packed into uploads, each of one model and within the limits of the service and of the user."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from secrets import token_hex
from typing import BinaryIO, Final, cast

import attrs

from fluxibly._masking import request_of_texts
from fluxibly.batch._batch_rows import BatchRows, RowsDigest
from fluxibly.batch._control import RunControl
from fluxibly.batch._outcomes import Outcomes
from fluxibly.batch._provider_batches import ProviderBatches
from fluxibly.batch._queue import QueueLimits
from fluxibly.batch._rows import Row
from fluxibly.batch._submissions import Submission, Submissions, add_row
from fluxibly.errors import BadPrompt, BadRequest
from fluxibly.providers.dialects.batches import Pack, Result
from fluxibly.providers.http.batches import BatchClient
from fluxibly.types import Request

_MOST_MODELS: Final = 16
"""The most models whose rows are packed side by side."""
_KEY: Final = 40
"""The most characters of a key."""
_CUSTOM_ID: Final = 64
"""The most characters of a `custom_id` that services take."""


class PackedBatch:
    """The rows of an upload. They stand in a file that is gone when the process is."""

    def __init__(self, pack: Pack, folder: Path, model: str) -> None:
        self.pack = pack
        self.submission = Submission(token_hex(6), [], model)
        self.file: BinaryIO = cast("BinaryIO", tempfile.TemporaryFile(dir=folder))  # noqa: SIM115  # closed by `close`
        self._digest = RowsDigest()

    def add(self, row: Row, key: str, data: bytes, separator: bytes) -> None:
        """Add a row, encoded."""
        if self.pack.rows:
            self.file.write(separator)
        self.file.write(data)
        self.pack.add(data)
        self._digest.add(row.number, key)
        submission = self.submission
        add_row(submission.rows, row.number)
        submission.named = submission.named or row.custom_id is not None
        submission.tokens = self.pack.tokens

    @property
    def digest(self) -> str:
        """The hash of the rows, as `Submission.digest`."""
        return self._digest.text

    def close(self) -> None:
        """Delete the file."""
        self.file.close()


@attrs.define(eq=False, kw_only=True)
class Packer:
    """Packs the rows that are in no batch, in passes over the input.

    Args:
        folder: for the files of uploads.
    """

    client: BatchClient
    rows: BatchRows
    outcomes: Outcomes
    submissions: Submissions
    queue: QueueLimits
    control: RunControl
    settings: ProviderBatches
    folder: Path

    _pass: Iterator[Row] | None = attrs.field(default=None, init=False)
    """The pass over the input that has not ended."""
    _is_pass_due: bool = attrs.field(default=True, init=False)
    """Whether the input has to be read once more, because rows of it are free again."""
    _by_model: dict[str, PackedBatch] = attrs.field(factory=dict[str, PackedBatch], init=False)

    @property
    def has_more(self) -> bool:
        """Whether there may be rows that are in no batch."""
        return self._is_pass_due or self._pass is not None or bool(self._by_model)

    def give_back(self, submission: Submission) -> None:
        """Have the rows of a batch packed again that are still open."""
        self.rows.give_back(submission)
        self._is_pass_due = True

    def close(self) -> None:
        """Drop what is packed and was not returned."""
        for packed in self._by_model.values():
            packed.close()

    async def next(self) -> PackedBatch | None:
        """Return the next upload; None if there are no rows, or the run has to stop."""
        from anyio.lowlevel import checkpoint  # late, to keep `import fluxibly` fast

        while True:
            if self._pass is None:
                if self._by_model:
                    return self._oldest()
                if not self._is_pass_due:
                    return None
                self._is_pass_due = False
                self._pass = self.rows.unpacked(self.submissions.open)
            for count, row in enumerate(self._pass, 1):
                if count % 100 == 0:
                    await checkpoint()
                if self.control.is_over:
                    return None
                full = self._add(row)
                if full is not None:
                    return full
            self._pass = None
            self.outcomes.lines.release()
            self.outcomes.write()

    def _oldest(self) -> PackedBatch:
        return self._by_model.pop(next(iter(self._by_model)))

    def _add(self, row: Row) -> PackedBatch | None:
        """Pack a row. Return an upload that is full."""
        key, request = "", None
        try:
            request, key = self.rows.requests.of(row)
            completed = self.rows.requests.completed(request)
            model = completed.model
            packed = self._by_model.get(model)
            data = self._encoded(packed, row, key, completed)
            fresh = self._empty_pack()
            if not fresh.fits(data):
                most = self.client.api.max_bytes
                raise BadRequest(f"expected a request of at most {most:,} bytes for a batch, got {len(data):,}")
        except Exception as error:  # noqa: BLE001  # one row harms no other
            self.outcomes.refuse(row, key, error, request or request_of_texts([row.prompt, row.settings]))
            if (reason := self.outcomes.lines.failed_alike) is not None:
                self.control.stop(reason)
            return None
        self.outcomes.lines.release()
        full = None
        if packed is not None and not packed.pack.fits(data):
            full, packed = packed, None
        elif packed is None and len(self._by_model) >= _MOST_MODELS:
            full = self._oldest()
        if packed is None:
            packed = self._by_model[model] = PackedBatch(fresh, self.folder, model)
            data = self._encoded(packed, row, key, completed)
        packed.add(row, key, data, self.client.api.separator)
        return full

    def _empty_pack(self) -> Pack:
        return Pack(self.client.api, max_rows=self.settings.max_rows, max_tokens=self.queue.max_tokens)

    def _encoded(self, packed: PackedBatch | None, row: Row, key: str, request: Request) -> bytes:
        """Return a row of an upload. Without one, it has the same size."""
        label = "0" * 12 if packed is None else packed.submission.label
        return self.client.row(custom_id_of(label, row.number, key), request)


def custom_id_of(label: str, number: int, key: str) -> str:
    """Return the `custom_id` of a row: the name of its batch, its number and its key, so that a result says all of it.

    Raises:
        BadPrompt: it would be too long.
    """
    found = f"{label}-{number}-{key}"
    if len(key) > _KEY or len(found) > _CUSTOM_ID:
        raise BadPrompt(f"expected a row below 10,000,000,000 for a batch, got {number:,}")
    return found


def row_of(result: Result, label: str) -> tuple[int | None, str]:
    """Return the row of a result and its key; None if it is none of a batch."""
    found, _, rest = result.custom_id.partition("-")
    number, _, key = rest.partition("-")
    if found != label or not (number.isascii() and number.isdigit() and len(number) <= 10):
        return None, ""
    return int(number), key
