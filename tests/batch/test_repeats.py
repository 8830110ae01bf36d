"""What is remembered of answers, so that equal rows are asked once."""

from __future__ import annotations

from collections import deque
from pathlib import Path

from hypothesis import given, strategies as st

from fluxibly.batch._input import Row
from fluxibly.batch._journal import Entry, Journal
from fluxibly.batch._lines import Line, encoded
from fluxibly.batch._repeats import Places, Repeats, copied

KEYS = st.integers(0, 2**160 - 1).map("{:040x}".format)


@given(st.lists(st.tuples(KEYS, st.integers(0, 2**50))), KEYS)
def test_places_are_a_table(pairs: list[tuple[str, int]], other: str) -> None:
    places, model = Places(), dict[str, int]()
    for key, offset in pairs:
        places.add(key, offset)
        model[key[:15]] = offset
    for key in [*(key for key, _ in pairs), other]:
        assert places.get(key) == model.get(key[:15])


def test_places_grow_by_few_bytes_a_key() -> None:
    places = Places()
    count = 20_000
    for number in range(count):
        places.add(f"{number * 0x9E3779B97F4A7C15 % 2**160:040x}"[::-1], number)
    assert all(
        places.get(f"{number * 0x9E3779B97F4A7C15 % 2**160:040x}"[::-1]) == number for number in range(0, count, 7)
    )
    assert 16 * len(places._hashes) <= 70 * count


def test_an_answer_is_kept_in_memory_only_until_it_is_written(tmp_path: Path) -> None:
    with Journal(tmp_path / "out") as journal:
        journal.read()
        repeats = Repeats(journal)
        key = f"{7:040x}"
        row = Row(0, None, "p", {})
        assert repeats.begin(key, row)
        assert not repeats.begin(key, row._replace(number=1, custom_id="b"))
        line = Line(0, "a", key, text="yes", attempts=2, cost=0.5, usage={"input_tokens": 1}, elapsed=1.0)
        assert [each.number for each in repeats.end(key, line)] == [1]
        assert repeats.answer(key) is line
        entries = deque([Entry(0, False, encoded(line), key)])
        journal.write(entries, lambda entry, offset: repeats.wrote(entry.key, offset))
        assert not repeats._fresh
        assert not repeats._asked
        assert repeats.answer(key) == line
        copy = copied(line, row._replace(number=1, custom_id="b"))
        assert (copy.row, copy.custom_id, copy.text, copy.attempts, copy.cost, copy.usage) == (
            1,
            "b",
            "yes",
            0,
            0.0,
            None,
        )
        assert repeats.answer(f"{8:040x}") is None


def test_a_line_that_is_not_what_was_noted_is_no_answer(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(encoded(Line(0, None, f"{1:040x}", text="no")) + b"no line")
    with Journal(path) as journal:
        repeats = Repeats(journal)
        repeats.wrote(f"{2:040x}", 0)  # the same place, another key
        assert repeats.answer(f"{2:040x}") is None
        repeats.wrote(f"{3:015x}" + "0" * 25, len(encoded(Line(0, None, f"{1:040x}", text="no"))))
        assert repeats.answer(f"{3:015x}" + "0" * 25) is None
