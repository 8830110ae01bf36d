"""The journal of a batch: whole lines, whatever interrupts their writing, and one process at a time."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import Any, Self

import pytest
from hypothesis import given, strategies as st

from fluxibly.batch._journal import Bitmap, Entry, Journal, write_whole
from fluxibly.errors import ConfigError


def entry(row: int, *, failed: bool = False, size: int = 0) -> Entry:
    error = {"type": "BadRequest"} if failed else None
    line = {"row": row, "custom_id": None, "key": f"{row:040x}", "text": "x" * size, "error": error}
    return Entry(row, failed, json.dumps(line, separators=(",", ":")).encode() + b"\n", f"{row:040x}")


def write(journal: Journal, *entries: Entry) -> None:
    journal.write(deque(entries))


def opened(path: Path) -> Journal:
    journal = Journal(path)
    journal.read()
    return journal


def rows_of(path: Path) -> list[int]:
    return [json.loads(line)["row"] for line in path.read_bytes().splitlines()]


@given(st.lists(st.integers(0, 5000)), st.lists(st.integers(0, 5000)))
def test_a_bitmap_is_a_set(added: list[int], removed: list[int]) -> None:
    bitmap, model = Bitmap(), set[int]()
    for number in added:
        bitmap.add(number)
        model.add(number)
    for number in removed:
        bitmap.discard(number)
        model.discard(number)
    assert [*bitmap] == sorted(model)
    assert len(bitmap) == len(model) == len(bitmap.copy())
    assert all((number in bitmap) == (number in model) for number in {*added, *removed})


def test_a_bitmap_of_ten_million_rows_takes_a_bit_for_each() -> None:
    bitmap = Bitmap()
    bitmap.add(10_000_000)
    assert len(bitmap._bits) < 1.3e6


def test_what_is_written_is_known_to_the_next_process(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with opened(path) as journal:
        write(journal, entry(0), entry(2, failed=True))
        write(journal, entry(5))
    with opened(path) as journal:
        assert [*journal.done] == [0, 2, 5]
        assert [*journal.failed] == [2]
        assert journal.answered == 2


def test_a_file_larger_than_a_block_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with opened(path) as journal:
        write(journal, *(entry(row, size=997) for row in range(900)))
        write(journal, entry(900, size=600_000), entry(901))
    offsets: dict[int, int] = {}
    with Journal(path) as journal:
        journal.read(lambda written, offset: offsets.update({written.row: offset}))
        assert [*journal.done] == [*range(902)]
        for row in (0, 1, 450, 900, 901):
            assert json.loads(journal.line_at(offsets[row]))["row"] == row


@given(cut=st.integers(0, 400))
def test_a_torn_last_line_is_cut_off_and_what_came_before_stays(cut: int, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("torn") / "out"
    whole = b"".join(entry(row, size=row).line for row in range(4))
    path.write_bytes(whole[:cut])
    with opened(path) as journal:
        kept = whole[:cut].rpartition(b"\n")
        assert path.read_bytes() == kept[0] + kept[1]
        write(journal, entry(9))
    assert rows_of(path) == [*range(whole[:cut].count(b"\n")), 9]


def test_zeros_at_the_end_which_a_power_cut_leaves_are_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(entry(0).line + bytes(500))
    with opened(path) as journal:
        assert [*journal.done] == [0]
    assert path.read_bytes() == entry(0).line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (b'{"custom_id":"a","body":{}}\n', 1),
        (entry(0).line + b"\n", 2),
        (entry(0).line + b"row,text\n" + entry(1).line, 2),
        (entry(0).line + b'{"row":-1}\n', 2),
        (entry(0).line + b'{"row":123456789012345}\n', 2),
        (entry(0).line + b'{"row":"1"}\n', 2),
        (b"a text without an end", 1),
        (entry(0).line + b"# notes", 2),
        (b"".join(entry(row, size=3000).line for row in range(300)) + b"[]\n", 301),
        (b"PAR1\x00\x01", 1),
    ],
)
def test_a_file_of_something_else_is_refused_by_line_and_left_as_it_is(text: bytes, line: int, tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(text)
    with Journal(path) as journal, pytest.raises(ConfigError, match=rf"out, line {line}: expected a line of a batch"):
        journal.read()
    assert path.read_bytes() == text


def test_lines_that_another_program_has_written_anew_are_read(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b'{"text": "a", "error": null,  "row": 3, "more": 1}\r\n{"row": 4}\r\n')
    with opened(path) as journal:
        assert [*journal.done] == [3, 4]


# The disk


class _Disk:
    """Stands in for `os.pwrite`: it has room for some bytes, and may write less than it is asked to."""

    def __init__(self, room: int, most: int = 10**9, error: int = errno.ENOSPC) -> None:
        self.room = room
        self.most = most
        self.error = error
        self._write = os.pwrite

    def __call__(self, file: int, data: bytes, offset: int) -> int:
        size = min(len(data), self.room, self.most)
        if not size:
            raise OSError(self.error, os.strerror(self.error))
        self.room -= size
        return self._write(file, data[:size], offset)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO])
@given(room=st.integers(0, 700), most=st.integers(1, 300))
def test_lines_for_which_there_is_no_room_are_kept_and_nothing_is_half_written(
    error: int, room: int, most: int, tmp_path_factory: Any
) -> None:
    path = tmp_path_factory.mktemp("full") / "out"
    entries = [entry(row, size=20 * row) for row in range(5)]
    with opened(path) as journal, pytest.MonkeyPatch.context() as patch:
        left = deque(entries)
        patch.setattr(os, "pwrite", _Disk(room, most, error))
        total = sum(len(each.line) for each in entries)
        if room < total:
            with pytest.raises(OSError, match=os.strerror(error)):
                journal.write(left)
        else:
            journal.write(left)
        fits = 0
        for each in entries:
            fits += len(each.line)
            if fits > room:
                break
        else:
            assert not left
        written = entries[: len(entries) - len(left)]
        assert path.read_bytes() == b"".join(each.line for each in written)
        assert [*journal.done] == [each.row for each in written]
        assert len(path.read_bytes()) + (len(left[0].line) if left else 0) > min(room, total - 1)
        patch.undo()
        journal.write(left)
    assert rows_of(path) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("at", ["before", "after"])
def test_ctrl_c_within_a_write_leaves_whole_lines(at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out"
    left = deque([entry(0), entry(1)])
    real = os.pwrite

    def interrupted(file: int, data: bytes, offset: int) -> int:
        monkeypatch.setattr(os, "pwrite", real)
        if at == "after":
            real(file, data, offset)
        raise KeyboardInterrupt

    with opened(path) as journal:
        monkeypatch.setattr(os, "pwrite", interrupted)
        with pytest.raises(KeyboardInterrupt):
            journal.write(left)
        journal.write(left)
    assert rows_of(path) == [0, 1]


def test_the_disk_keeps_all_when_the_journal_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.fstat(file).st_size), real(file)))
    with opened(tmp_path / "out") as journal:
        write(journal, entry(0))
        assert not journal.is_synced
    assert synced == [len(entry(0).line)]
    with opened(tmp_path / "out"):
        pass
    assert len(synced) == 1


# One process at a time

_OPEN = """
import sys
from pathlib import Path
from fluxibly.batch._journal import Journal
from fluxibly.errors import ConfigError
for line in sys.stdin:
    try:
        journal = Journal(Path(line.strip()))
    except ConfigError as error:
        print("refused", flush=True)
    else:
        print("open", flush=True)
        sys.stdin.readline()
        journal.close()
        print("closed", flush=True)
"""


class _Other:
    """Another process, which opens journals when it is told to."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _OPEN],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )

    def tell(self, line: object = "") -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def told(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


def test_of_two_processes_one_is_refused_by_whatever_name_it_calls_the_file(tmp_path: Path) -> None:
    path = tmp_path / "out"
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("out")
    with _Other() as other:
        with opened(path) as journal:
            for name in (path, tmp_path / "folder" / ".." / "out", tmp_path / "link"):
                other.tell(name)
                assert other.told() == "refused"
            write(journal, entry(0))
            write(journal, entry(0))
            journal.compact()  # another file has the name from now on
            other.tell(path)
            assert other.told() == "refused"
        other.tell(path)
        assert other.told() == "open"
        with pytest.raises(ConfigError, match="another process is at work on this batch"):
            Journal(path)
        other.kill()  # a lock ends with its process
        opened(path).close()


def test_of_processes_that_begin_in_the_same_instant_exactly_one_goes_on(tmp_path: Path) -> None:
    with _Other() as one, _Other() as two:
        for attempt in range(20):
            path = tmp_path / f"out{attempt}"
            one.tell(path)
            two.tell(path)
            said = [one.told(), two.told()]
            assert sorted(said) == ["open", "refused"]
            winner = one if said[0] == "open" else two
            winner.tell()
            assert winner.told() == "closed"


def test_a_process_that_waited_at_the_old_file_does_not_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has opened the file before another process puts a new one in its place, and gets the lock afterwards."""
    path = tmp_path / "out"
    first = opened(path)
    write(first, entry(0), entry(0))
    real = os.open

    def opens(name: Any, *args: Any) -> int:
        file = real(name, *args)
        if Path(name) == path:
            monkeypatch.setattr(os, "open", real)
            first.compact()
            first.close()
        return file

    monkeypatch.setattr(os, "open", opens)
    with opened(path) as second:
        write(second, entry(1))
    assert rows_of(path) == [0, 1]


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        Journal(tmp_path)
    with pytest.raises(ConfigError, match="expected a file"):
        Journal(Path(os.devnull))
    with pytest.raises(FileNotFoundError):
        Journal(tmp_path / "no" / "out")
    assert not [*tmp_path.iterdir()]


# Compaction


def test_of_several_lines_of_a_row_the_last_stays(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with opened(path) as journal:
        write(journal, entry(0, failed=True), entry(1), entry(2, failed=True), entry(0), entry(2, failed=True, size=9))
        assert journal.replaced == 2
        assert (journal.answered, [*journal.failed]) == (2, [2])
        journal.compact()
        assert path.read_bytes() == entry(1).line + entry(0).line + entry(2, failed=True, size=9).line
        assert journal.replaced == 0
        write(journal, entry(3))
    with opened(path) as journal:
        assert [*journal.done] == [0, 1, 2, 3]
        assert (journal.answered, [*journal.failed], journal.replaced) == (3, [2], 0)


def test_the_mode_of_the_file_and_a_link_to_it_stay(tmp_path: Path) -> None:
    path, link = tmp_path / "out", tmp_path / "link"
    link.symlink_to(path)
    with opened(link) as journal:
        path.chmod(0o640)
        write(journal, entry(0), entry(0))
        journal.compact()
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    assert [each.name for each in sorted(tmp_path.iterdir())] == ["link", "out"]


@pytest.mark.parametrize("function", ["write", "fsync", "fchmod", "replace"])
def test_a_compaction_that_fails_leaves_the_journal_as_it_was(
    function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out"

    def fails(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    with opened(path) as journal:
        write(journal, entry(0, failed=True), entry(1), entry(0))
        journal.sync()
        before = path.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(Path if function == "replace" else os, function, fails)
            with pytest.raises(OSError, match="full"):
                journal.compact()
        assert path.read_bytes() == before
        assert [*tmp_path.iterdir()] == [path]
        write(journal, entry(2))
        journal.compact()
    assert rows_of(path) == [1, 0, 2]


_COMPACT = """
import os, signal, sys
from pathlib import Path
from fluxibly.batch._journal import Journal
def die(frame, event, what):
    global left
    if event in ("call", "c_call", "c_return", "return"):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
journal = Journal(Path(sys.argv[1]))
journal.read()
for moment in map(int, sys.argv[2].split(",")):
    pid = os.fork()
    if not pid:
        left = moment
        sys.setprofile(die)
        journal.compact()
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    print("done" if status == 0 else "killed", Path(sys.argv[1]).read_text().replace("\\n", " "), flush=True)
"""


def test_killed_at_any_moment_of_a_compaction_the_file_has_the_old_lines_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text('{"row":0}\n{"row":1}\n{"row":0,"a":1}\n')
    outcome = subprocess.run(
        [sys.executable, "-c", _COMPACT, str(path), ",".join(map(str, range(0, 400, 3)))],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    old, new = '{"row":0} {"row":1} {"row":0,"a":1}', '{"row":1} {"row":0,"a":1}'
    said = outcome.stdout.splitlines()
    assert {line.partition(" ")[2].strip() for line in said} == {old, new}
    assert any(line.startswith("killed") and line.endswith(old + " ") for line in said)
    with opened(path) as journal:  # whatever they have left beside it
        assert [*journal.done] == [0, 1]
        write(journal, entry(2), entry(2))
        journal.compact()
    assert rows_of(path) == [1, 0, 2]
    assert [*tmp_path.iterdir()] == [path]


def test_a_file_is_put_in_place_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state"
    write_whole(path, b"old")
    write_whole(path, b"newer")

    def fails(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        with pytest.raises(OSError, match="full"):
            write_whole(path, b"newest")
    assert path.read_bytes() == b"newer"
    assert [*tmp_path.iterdir()] == [path]
