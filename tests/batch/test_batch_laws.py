"""The laws of batches, with random rows, errors, and moments at which a run ends.

1. Nothing lost: at the end every row has exactly one line, whatever stopped runs before.
2. Nothing asked twice: a row with a line is not asked again.
6. Bounded: memory does not grow with the rows.
7. One row harms no other.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from support.batches import CountedModel, Files

from fluxibly.errors import BadRequest, ContentFiltered

TEXTS = st.text(min_size=1, max_size=40).filter(str.strip)


@pytest.fixture
def folders() -> Iterator[Any]:
    """A function that returns a new folder."""
    with TemporaryDirectory() as parent:
        numbers = iter(range(10**6))

        def folder() -> Files:
            made = Path(parent) / str(next(numbers))
            made.mkdir()
            return Files(made)

        yield folder


def reply(prompt: str) -> str | Exception:
    """Fail for some prompts, in several ways."""
    kind = sum(map(ord, prompt)) % 7
    if kind == 0:
        return BadRequest(f"cannot answer {prompt}", status=400)
    if kind == 1:
        return ContentFiltered("no")
    if kind == 2:
        return RuntimeError(prompt)
    return prompt[::-1]


@given(rows=st.lists(TEXTS | st.fixed_dictionaries({"prompt": TEXTS, "custom_id": TEXTS}), max_size=12), data=st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])  # it makes a folder each time
def test_whatever_stood_in_the_file_when_a_run_was_cut_off_the_next_ones_reach_the_end(
    rows: list[Any], data: st.DataObject, folders: Any
) -> None:
    files = folders()
    files.write(rows)
    model = CountedModel(reply)
    files.batch(model.llm(), concurrency=3, stop_after_errors=0).run()
    whole = files.answers.read_bytes()
    assert files.rows() == [*range(len(rows))]
    for share in data.draw(st.lists(st.fractions(0, 1, max_denominator=997), max_size=3), "where the file is cut"):
        cut = int(share * len(whole))
        files.answers.write_bytes(whole[:cut])
        left = whole[:cut].count(b"\n")
        before = model.calls
        report = files.batch(model.llm(), concurrency=3, stop_after_errors=0).run()
        assert model.calls - before == report.asked == len(rows) - left  # law 2
        assert files.rows() == [*range(len(rows))]  # law 1
        assert report.answered + report.failed == len(rows)
        whole = files.answers.read_bytes()
    for line, row in zip(files.lines(), rows, strict=True):  # law 7
        prompt = row if isinstance(row, str) else row["prompt"]
        expected = reply(prompt)
        if isinstance(expected, str):
            assert (line["text"], line["error"]) == (expected.encode(errors="replace").decode(), None)
        else:
            assert line["error"]["type"] == type(expected).__name__
        assert line["custom_id"] == (None if isinstance(row, str) else row["custom_id"])


@given(
    kinds=st.lists(st.sampled_from(["answer", "fail", "mended"]), min_size=1, max_size=10),
    stops=st.lists(st.integers(1, 10), max_size=3),
    dedupe=st.booleans(),
    at_once=st.integers(1, 4),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])  # it makes a folder each time
def test_runs_that_are_stopped_and_errors_that_are_asked_again_leave_one_line_a_row(
    kinds: list[str], stops: list[int], dedupe: bool, at_once: int, folders: Any
) -> None:
    files = folders()
    prompts = [f"{kind} {number % 5}" for number, kind in enumerate(kinds)]
    files.write(prompts)
    is_mended = False
    model = CountedModel()
    options: dict[str, Any] = {"concurrency": at_once, "dedupe": dedupe, "stop_after_errors": 0}
    batch = files.batch(model.llm(), **options)
    stop_at = 0

    def answer(prompt: str) -> str | Exception:
        if model.calls == stop_at:
            batch.stop()
        failed = prompt.startswith("fail") or (prompt.startswith("mended") and not is_mended)
        return BadRequest("no") if failed else prompt

    model.reply = answer
    done = 0
    for number, stop in enumerate(stops):
        batch = files.batch(model.llm(), **options, retry_errors=number == 2)
        stop_at = model.calls + stop
        report = batch.run()
        assert report.answered + report.failed >= done  # nothing that was there is lost
        done = report.answered + report.failed
    stop_at = -1
    is_mended = True
    batch = files.batch(model.llm(), **options)
    batch.run()
    assert files.rows() == [*range(len(prompts))]
    calls = model.calls
    batch = files.batch(model.llm(), **options, retry_errors=True)
    failed = [line["row"] for line in files.lines() if line["error"]]
    report = batch.run()
    assert model.calls - calls <= len(failed)
    assert (model.calls - calls == len(failed)) or dedupe
    assert files.rows() == [*range(len(prompts))]
    assert [line["row"] for line in files.lines() if line["error"]] == [
        number for number, prompt in enumerate(prompts) if prompt.startswith("fail")
    ]
    assert report.failed == sum(prompt.startswith("fail") for prompt in prompts)


# Law 6

in_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="it needs Linux's /proc")
_MEMORY = """
import sys
from pathlib import Path
from fluxibly import AsyncLLM
from fluxibly.batch import Batch
import logging
logging.disable(logging.CRITICAL)
folder, rows = Path(sys.argv[1]), int(sys.argv[2])
with open(folder / "prompts.jsonl", "w") as file:
    for number in range(rows):
        file.write('{"prompt": "row %d, with a few words in it"}\\n' % number)
for _ in range(2):
    report = Batch(AsyncLLM("echo:m", []), folder / "prompts.jsonl", folder / "answers.jsonl", concurrency=100).run()
assert (report.answered, report.skipped) == (rows, rows)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def most_memory(folder: Path, rows: int) -> float:
    """Return the most memory that a batch and its resumption take, in MB."""
    folder.mkdir()
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", _MEMORY, str(folder), str(rows)]
    outcome = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    return int(outcome.stdout) / 1024


@in_proc
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    few, many = most_memory(tmp_path / "few", 2_000), most_memory(tmp_path / "many", 40_000)
    assert many < few + 5  # 38,000 lines alone are 10 MB
    assert many < 150


@pytest.mark.skipif(not os.environ.get("FLUXIBLY_MILLION"), reason="a million rows take minutes: FLUXIBLY_MILLION=1")
@in_proc
@pytest.mark.timeout(1200)
def test_a_million_rows_take_at_most_150_mb(tmp_path: Path) -> None:
    assert most_memory(tmp_path / "million", 1_000_000) < 150
