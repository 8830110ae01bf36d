"""Rows that ask the same are asked once."""

from __future__ import annotations

from array import array
from typing import Any

import msgspec

from fluxibly.batch._input import Row
from fluxibly.batch._journal import Journal, Written
from fluxibly.batch._lines import Line, WholeLine

MOST_FOLLOWERS = 10_000
"""The most rows that may be put off until the answer to another row is there."""


class Places:
    """Where the line of each key begins, in about 32 bytes a key: a table with open addressing."""

    def __init__(self) -> None:
        self._count = 0
        self._make(1 << 10)

    def _make(self, size: int) -> None:
        self._mask = size - 1
        self._hashes = array("Q", bytes(8 * size))
        self._places = array("Q", bytes(8 * size))
        """The offset and 1, or 0 where there is nothing."""

    def add(self, key: str, offset: int) -> None:
        if 2 * self._count > self._mask:
            hashes, places = self._hashes, self._places
            self._make(2 * len(hashes))
            for hashed, place in zip(hashes, places, strict=True):
                if place:
                    self._put(hashed, place)
        self._count += self._put(_hash(key), offset + 1)

    def _put(self, hashed: int, place: int) -> bool:
        """Return whether the key is new."""
        at = hashed & self._mask
        while self._places[at] and self._hashes[at] != hashed:
            at = (at + 1) & self._mask
        is_new = not self._places[at]
        self._hashes[at], self._places[at] = hashed, place
        return is_new

    def get(self, key: str) -> int | None:
        """Return where the line begins; None: there is none. Keys that have 60 bits in common count as equal."""
        hashed = _hash(key)
        at = hashed & self._mask
        while place := self._places[at]:
            if self._hashes[at] == hashed:
                return place - 1
            at = (at + 1) & self._mask
        return None


def _hash(key: str) -> int:
    try:
        return int(key[:15], 16)
    except ValueError:
        return 1  # a key that we do not make


class Repeats:
    """The answers by key, and the rows that wait for one. An answer serves all equal rows, a failure only its own.

    Args:
        journal: where the answers are.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._places = Places()
        self._asked: dict[str, list[Row]] = {}
        """The keys that are being asked, with the rows that wait for their answer."""
        self._fresh: dict[str, Line] = {}
        """The answers that are not in the journal yet."""
        self.followers = 0
        """The rows that wait for an answer."""

    def read(self, written: Written, offset: int) -> None:
        """Note what stands in the journal."""
        if written.error is None and written.key:
            self._places.add(written.key, offset)

    def wrote(self, key: str, offset: int) -> None:
        """Note where the answer to a key has been written."""
        self._places.add(key, offset)
        self._fresh.pop(key, None)

    def answer(self, key: str) -> Line | None:
        """Return the line of an equal row that is answered."""
        if key in self._fresh:
            return self._fresh[key]
        place = self._places.get(key)
        if place is None:
            return None
        line = self._journal.line_at(place)
        try:
            found: Line = _decode_whole(line) if b'"body":' in line else _decode(line)
        except msgspec.MsgspecError:
            return None
        return found if found.key == key and found.error is None else None

    def is_asked(self, key: str) -> bool:
        """Return whether an equal row is being asked."""
        return key in self._asked

    def begin(self, key: str, row: Row) -> bool:
        """Return whether a row is to be asked. If not, an equal one is being asked, and this one waits for the answer."""
        waiting = self._asked.get(key)
        if waiting is None:
            self._asked[key] = []
            return True
        waiting.append(row)
        self.followers += 1
        return False

    def end(self, key: str, line: Line | None) -> list[Row]:
        """Note what came of a row, and return those that wait for it.

        Args:
            line: the answer; None: there is none.
        """
        rows = self._asked.pop(key)
        self.followers -= len(rows)
        if line is not None:
            self._fresh[key] = line
        return rows


def copied(line: Line, row: Row) -> Line:
    """Return the line of a row that was answered by the answer to an equal row, at no cost."""
    changes: dict[str, Any] = {
        "row": row.number,
        "custom_id": row.custom_id,
        "attempts": 0,
        "cost": 0.0,
        "usage": None,
        "elapsed": 0.0,
    }
    return msgspec.structs.replace(line, **changes)


_decode = msgspec.json.Decoder(Line).decode
_decode_whole = msgspec.json.Decoder(WholeLine).decode
