"""The outputs of batches that are made at the end."""

from __future__ import annotations

import csv
import json
import os
import resource
import sys
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from openai.types.chat import ChatCompletion

from fluxibly import LLM
from fluxibly.batch import Batch
from fluxibly.batch._finish import Output
from fluxibly.batch._input import open_input
from fluxibly.batch._lines import encoded, line_of
from fluxibly.errors import AuthenticationError, BudgetExceeded, ConfigError, ProviderError, RateLimitError
from fluxibly.types import Image, Message, Request, Response, ToolCall, Usage


def answer(row: int, text: str | None = None, **fields: Any) -> bytes:
    return encoded(
        line_of(row, f"id-{row}", "k", 0.5, response=Response(f"t{row}" if text is None else text, **fields))
    )


def failure(row: int, error: Exception | None = None) -> bytes:
    return encoded(line_of(row, f"id-{row}", "k", 0.5, error=error or ValueError("no")))


def lines_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def texts_of(path: Path) -> list[Any]:
    return [(line["row"], line["text"]) for line in lines_of(path)]


def finished(output: Output, *lines: bytes) -> None:
    """Write lines into the journal, and make the output."""
    output.journal_path.write_bytes(b"".join(lines))
    output.finish()


def names_in(folder: Path) -> list[str]:
    return sorted([path.name for path in folder.iterdir()])


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


class TestLines:
    def test_lines_as_they_come_are_their_own_journal(self, out: Path) -> None:
        """There is nothing to do at the end for lines as they come."""
        output = Output(out)
        assert (output.journal_path, output.is_made_at_end) == (out, False)
        finished(output, answer(1), answer(0))
        assert texts_of(out) == [(1, "t1"), (0, "t0")]
        assert names_in(out.parent) == [out.name]

    def test_in_order(self, out: Path) -> None:
        """`ordered` puts rows in their order, however they came; the journal stays."""
        output = Output(out, ordered=True)
        rows = [row * 1009 % 3000 for row in range(3000)]
        finished(output, *map(answer, rows))
        assert texts_of(out) == [(row, f"t{row}") for row in range(3000)]
        assert output.journal_path == out.with_name("out.jsonl.journal")
        assert names_in(out.parent) == ["out.jsonl", "out.jsonl.journal"]

    def test_errors_move_out(self, out: Path) -> None:
        """`errors` takes the lines of rows that failed; the others stand as they came."""
        errors = out.with_name("errors.jsonl")
        output = Output(out, errors=errors)
        finished(output, answer(3), failure(2), answer(1), failure(0))
        assert texts_of(out) == [(3, "t3"), (1, "t1")]
        assert [line["row"] for line in lines_of(errors)] == [2, 0]
        finished(Output(out, errors=errors, ordered=True), answer(3), failure(2), answer(1), failure(0))
        assert [row for row, _ in texts_of(out)] == [1, 3]
        assert [line["row"] for line in lines_of(errors)] == [0, 2]
        finished(Output(out, errors=errors), answer(0))
        assert errors.read_bytes() == b""

    @pytest.mark.parametrize("ordered", [True, False])
    def test_the_last_line_of_a_row_counts(self, out: Path, ordered: bool) -> None:
        """A row that was asked again has its last line alone, and a torn last line is none."""
        output = Output(out, ordered=ordered, errors=out.with_name("errors.jsonl"))
        finished(output, failure(0), answer(2, "old"), answer(1), answer(0), answer(2), failure(1), answer(5)[:-9])
        assert sorted(texts_of(out)) == [(0, "t0"), (2, "t2")]
        assert [line["row"] for line in lines_of(out.with_name("errors.jsonl"))] == [1]

    def test_rows_without_a_line(self, out: Path) -> None:
        """Rows that have no line are left out, however far apart the others are."""
        finished(Output(out, ordered=True), answer(5_000_000), answer(2))
        assert texts_of(out) == [(2, "t2"), (5_000_000, "t5000000")]

    def test_an_empty_journal(self, out: Path) -> None:
        """A batch without rows makes an empty output."""
        finished(Output(out, ordered=True))
        assert out.read_bytes() == b""

    @given(st.lists(st.tuples(st.integers(0, 9), st.booleans(), st.text(max_size=5)), max_size=30), st.booleans())
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_any_journal(self, tmp_path: Path, lines: list[tuple[int, bool, str]], ordered: bool) -> None:
        """Each row has one line, its last, in one of both files."""
        output = Output(tmp_path / "out.jsonl", ordered=ordered, errors=tmp_path / "errors.jsonl")
        finished(output, *[failure(row) if failed else answer(row, text) for row, failed, text in lines])
        last = {row: (failed, text) for row, failed, text in lines}
        answers = texts_of(tmp_path / "out.jsonl")
        assert dict(answers) == {row: text for row, (failed, text) in last.items() if not failed}
        errors = [line["row"] for line in lines_of(tmp_path / "errors.jsonl")]
        assert sorted(errors) == sorted([row for row, (failed, _) in last.items() if failed])
        assert len(answers) + len(errors) == len(last)
        if ordered:
            assert [row for row, _ in answers] == sorted([row for row, _ in answers])
            assert errors == sorted(errors)


class TestOpenAI:
    def made(self, out: Path, *lines: bytes) -> list[Any]:
        output = Output(out, format="openai")
        assert output.whole
        finished(output, *lines)
        return lines_of(out)

    def test_answers(self, out: Path) -> None:
        """The lines are those of OpenAI's batches, and its client's types read the answers."""
        response = Response(
            "hi",
            tool_calls=[ToolCall("c1", "look", {"at": 1})],
            reasoning="Hm",
            usage=Usage(input_tokens=3, output_tokens=2, cached_tokens=1),
            model="m-2026",
            id="chatcmpl-1",
            request_id="r1",
            alternatives=[Response("ho", finish_reason="length")],
        )
        request = Request(model="m", messages="x")
        whole = [
            line_of(1, None, "k", 0, response=Response("b"), request=request, whole=True),
            line_of(0, "x", "k", 0, response=response, request=request, whole=True),
        ]
        first, second = self.made(out, *map(encoded, whole))
        assert [*first] == ["id", "custom_id", "response", "error"]
        assert (first["custom_id"], first["error"], second["custom_id"]) == ("x", None, "row-1")
        assert first["id"] != second["id"]
        assert (first["response"]["status_code"], first["response"]["request_id"]) == (200, "r1")
        body = ChatCompletion.model_validate(first["response"]["body"], strict=True)
        assert (body.id, body.model) == ("chatcmpl-1", "m-2026")
        assert [choice.message.content for choice in body.choices] == ["hi", "ho"]
        assert [choice.finish_reason for choice in body.choices] == ["tool_calls", "length"]
        (call,) = body.choices[0].message.tool_calls or ()
        assert call.type == "function"
        assert (call.id, call.function.name, call.function.arguments) == ("c1", "look", '{"at": 1}')
        assert body.usage is not None
        assert body.usage.total_tokens == 5
        assert ChatCompletion.model_validate(second["response"]["body"], strict=True).model == "m"

    def test_answers_of_a_journal_for_lines(self, out: Path) -> None:
        """A journal without whole answers makes the same of what it has."""
        usage = Usage(input_tokens=3, output_tokens=2)
        custom = ToolCall("c2", "draw", raw_arguments="a cat", raw={"type": "custom"})
        calls = [ToolCall("c1", "look", {"at": 1}), custom]
        (found,) = self.made(out, answer(0, tool_calls=calls, finish_reason="tool_call", usage=usage, model="m"))
        body = ChatCompletion.model_validate(found["response"]["body"], strict=True)
        choice = body.choices[0]
        assert (choice.message.content, choice.finish_reason, body.model) == ("t0", "tool_calls", "m")
        assert [call.type for call in choice.message.tool_calls or ()] == ["function", "custom"]
        assert body.usage is not None
        assert body.usage.prompt_tokens == 3

    @pytest.mark.parametrize(
        ("error", "status", "kind"),
        [
            (RateLimitError("slow", status=429, code="rate"), 429, "rate_limit_error"),
            (AuthenticationError("no key", status=401), 401, "invalid_request_error"),
            (ProviderError("down", status=503), 503, "server_error"),
        ],
    )
    def test_errors_of_the_service(self, out: Path, error: ProviderError, status: int, kind: str) -> None:
        """What the service refused has its status, and a body as OpenAI's errors have it."""
        (found,) = self.made(out, failure(0, error))
        assert (found["custom_id"], found["error"], found["response"]["status_code"]) == ("id-0", None, status)
        assert found["response"]["body"] == {
            "error": {"message": str(error), "type": kind, "param": None, "code": error.code}
        }

    def test_other_errors(self, out: Path) -> None:
        """What had no response has an error instead."""
        (found,) = self.made(out, failure(0, BudgetExceeded("too much")))
        assert found["response"] is None
        assert found["error"] == {"code": "BudgetExceeded", "message": "too much"}

    def test_errors_move_out(self, out: Path) -> None:
        """The file of errors has the format of the output."""
        errors = out.with_name("errors.jsonl")
        finished(Output(out, format="openai", errors=errors), answer(0), failure(1))
        assert [line["custom_id"] for line in lines_of(out)] == ["id-0"]
        assert [line["error"]["code"] for line in lines_of(errors)] == ["ValueError"]

    def test_lines_of_a_journal_with_whole_answers(self, out: Path) -> None:
        """Lines that are made of a journal with whole answers have the fields of lines alone."""
        whole = line_of(0, "x", "k", 0.5, response=Response('say "body": x'), whole=True)
        plain = line_of(0, "x", "k", 0.5, response=Response('say "body": x'))
        finished(Output(out, ordered=True), encoded(whole))
        assert out.read_bytes() == encoded(plain)


COLUMNS = [
    "row",
    "custom_id",
    "key",
    "text",
    "tool_calls",
    "finish_reason",
    "input_tokens",
    "output_tokens",
    "cached_tokens",
    "cache_write_tokens",
    "reasoning_tokens",
    "cost",
    "model",
    "attempts",
    "elapsed",
    "error",
    "error_message",
    "error_status",
]


class TestTables:
    def lines(self) -> list[bytes]:
        usage = Usage(input_tokens=3, output_tokens=2, reasoning_tokens=1)
        calls = [ToolCall("c1", "look", {"at": 1})]
        return [
            failure(2, RateLimitError("slow", status=429)),
            answer(1, 'a, "b"\r\nc\0', usage=usage, tool_calls=calls, model="m"),
            answer(0, ""),
        ]

    def test_parquet(self, tmp_path: Path) -> None:
        """Parquet has the fields of lines as columns of fixed types, in the order of rows."""
        out = tmp_path / "out.parquet"
        finished(Output(out), *self.lines())
        table = pq.read_table(out)
        assert table.column_names == COLUMNS
        first, second, third = table.to_pylist()
        assert (first["row"], first["text"], first["input_tokens"]) == (0, "", None)
        assert second["text"] == 'a, "b"\r\nc\0'
        assert (second["input_tokens"], second["output_tokens"], second["reasoning_tokens"]) == (3, 2, 1)
        assert json.loads(second["tool_calls"]) == [{"id": "c1", "name": "look", "arguments": '{"at": 1}'}]
        assert (third["error"], third["error_message"], third["error_status"]) == ("RateLimitError", "slow", 429)
        finished(Output(tmp_path / "other.parquet"), answer(0))
        assert pq.read_schema(tmp_path / "other.parquet") == table.schema

    @pytest.mark.parametrize("suffix", ["csv", "tsv"])
    def test_csv(self, tmp_path: Path, suffix: str) -> None:
        """CSV has the same columns; what is null is empty."""
        out = tmp_path / f"out.{suffix}"
        finished(Output(out), *self.lines())
        with out.open(newline="", encoding="utf-8") as file:
            first, second, third = csv.DictReader(file, delimiter="," if suffix == "csv" else "\t")
        assert [*first] == COLUMNS
        assert (first["row"], first["text"], first["input_tokens"]) == ("0", "", "")
        assert second["text"] == 'a, "b"\r\nc\0'
        assert third["error"] == "RateLimitError"

    def test_errors_have_the_format_of_their_suffix(self, tmp_path: Path) -> None:
        """The files of answers and of errors may have different formats."""
        finished(Output(tmp_path / "out.parquet", errors=tmp_path / "errors.csv"), *self.lines())
        assert pq.read_table(tmp_path / "out.parquet")["row"].to_pylist() == [0, 1]
        assert "RateLimitError" in (tmp_path / "errors.csv").read_text()

    def test_no_rows(self, tmp_path: Path) -> None:
        """A batch without rows makes a table without rows."""
        finished(Output(tmp_path / "out.parquet"))
        assert pq.read_table(tmp_path / "out.parquet").num_rows == 0

    def test_many_rows(self, tmp_path: Path) -> None:
        """Rows come in groups, of which one is in memory."""
        lines = [answer(row) for row in range(12_000)]
        finished(Output(tmp_path / "out.parquet"), *lines)
        file = pq.ParquetFile(tmp_path / "out.parquet")
        assert (file.metadata.num_rows, file.num_row_groups) == (12_000, 2)

    def test_pyarrow_is_missing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without pyarrow, the error comes before anything is sent, and has the command that installs it."""
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(ConfigError, match="Parquet needs pyarrow, which is not installed: pip install pyarrow"):
            Output(tmp_path / "out.parquet")


class TestRoundTrip:
    @given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), max_size=8))
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
    def test_any_content(self, tmp_path: Path, texts: list[str]) -> None:
        """Whatever rows hold, an echo of them comes out as it went in, through all formats."""
        llm = LLM("echo:x", middleware=[])
        write_inputs(tmp_path, texts)
        for suffix, read in READERS.items():
            source = open_input(tmp_path / f"in.{suffix}")
            output = Output(tmp_path / f"out.{suffix}", ordered=True)
            with output.journal_path.open("wb") as journal:
                for row in source.rows(lambda _: False):  # type: ignore[union-attr]
                    assert row.problem is None
                    response = llm.complete(row.prompt, **row.settings)
                    journal.write(encoded(line_of(row.number, row.custom_id, "k", 0, response=response)))
            output.finish()
            assert read(output.path) == [(text, str(number)) for number, text in enumerate(texts)]


def write_inputs(folder: Path, texts: list[str]) -> None:
    rows = [{"prompt": text, "custom_id": str(number)} for number, text in enumerate(texts)]
    (folder / "in.jsonl").write_text("".join([json.dumps(row) + "\n" for row in rows]))
    with (folder / "in.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["prompt", "custom_id"])
        writer.writeheader()
        writer.writerows(rows)
    schema = pa.schema([("prompt", pa.string()), ("custom_id", pa.string())])
    pq.write_table(pa.Table.from_pylist(rows, schema), folder / "in.parquet")


def read_csv(path: Path) -> list[tuple[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return [(row["text"], row["custom_id"]) for row in csv.DictReader(file)]


READERS: dict[str, Callable[[Path], list[tuple[str, str]]]] = {
    "jsonl": lambda path: [(line["text"], line["custom_id"]) for line in lines_of(path)],
    "csv": read_csv,
    "parquet": lambda path: [(row["text"], row["custom_id"]) for row in pq.read_table(path).to_pylist()],
}


class TestFiles:
    def test_a_failure_leaves_what_was_there(self, out: Path) -> None:
        """An output that cannot be written leaves the former one, and nothing else."""
        output = Output(out, ordered=True)
        finished(output, answer(0))
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        output.journal_path.write_bytes(answer(0, "x" * 1_000_000) * 2 + answer(1, "x" * 1_000_000))
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                output.finish()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert texts_of(out) == [(0, "t0")]
        assert names_in(out.parent) == ["out.jsonl", "out.jsonl.journal"]

    def test_what_a_killed_process_has_left(self, out: Path) -> None:
        """The part that a killed process has left is written over."""
        out.with_name(".out.jsonl.partial").write_text("half a line")
        finished(Output(out, ordered=True), answer(0))
        assert texts_of(out) == [(0, "t0")]
        assert names_in(out.parent) == ["out.jsonl", "out.jsonl.journal"]

    def test_a_link_stays_a_link(self, out: Path, tmp_path: Path) -> None:
        """An output that is a link replaces the file that the link leads to."""
        (tmp_path / "folder").mkdir()
        out.symlink_to(tmp_path / "folder" / "real.jsonl")
        finished(Output(out, ordered=True), answer(0))
        assert out.is_symlink()
        assert texts_of(tmp_path / "folder" / "real.jsonl") == [(0, "t0")]

    def test_a_journal_that_is_there_is_used(self, out: Path) -> None:
        """Once there is a journal beside the output, the output is made from it, whatever is asked for."""
        finished(Output(out, ordered=True, errors=out.with_name("e.jsonl")), answer(1), failure(2), answer(0))
        output = Output(out)
        assert output.journal_path == out.with_name("out.jsonl.journal")
        output.finish()
        assert [line["row"] for line in lines_of(out)] == [1, 2, 0]

    def test_lines_that_are_there_are_not_lost(self, out: Path) -> None:
        """Lines that would be asked and paid again are not written over; the error says how to go on."""
        finished(Output(out), answer(0))
        with pytest.raises(ConfigError, match=r"to go on with them, rename it to out\.jsonl\.journal"):
            Output(out, ordered=True)
        out.rename(out.with_name("out.jsonl.journal"))
        Output(out, ordered=True).finish()
        assert texts_of(out) == [(0, "t0")]

    @pytest.mark.parametrize("name", ["out.csv", "errors.jsonl"])
    def test_files_of_others(self, tmp_path: Path, name: str) -> None:
        """A file that no batch has written is not written over."""
        (tmp_path / name).write_text("precious")
        with pytest.raises(ConfigError, match=rf"{name}: the file exists, but no batch has written it"):
            Output(tmp_path / "out.csv", errors=tmp_path / "errors.jsonl")
        assert (tmp_path / name).read_text() == "precious"

    @pytest.mark.parametrize("name", ["notes.txt", "notes.csv", "notes.parquet"])
    def test_files_of_others_beside_a_journal(self, out: Path, name: str) -> None:
        """A journal says nothing about a file that no batch has written."""
        notes = out.with_name(name)
        notes.write_text("mine")
        finished(Output(out, ordered=True), answer(0), failure(1))
        with pytest.raises(ConfigError, match="expected no such file, or one that a batch has written"):
            Output(out, ordered=True, errors=notes)
        assert notes.read_text() == "mine"

    @pytest.mark.parametrize("name", ["e.jsonl", "e.csv", "e.tsv", "e.parquet"])
    def test_files_of_batches_are_written_again(self, out: Path, name: str) -> None:
        errors = out.with_name(name)
        finished(Output(out, format="openai", errors=errors), answer(0), failure(1))
        before = errors.read_bytes()
        Output(out, format="openai", errors=errors).finish()
        assert errors.read_bytes() == before
        Output(out, ordered=True, errors=errors).finish()

    @pytest.mark.parametrize("path", ["", "."])
    def test_a_folder(self, tmp_path: Path, path: str) -> None:
        with pytest.raises(ConfigError, match="expected a file for the output, got the folder"):
            Output(path)
        with pytest.raises(ConfigError, match="errors: expected a file, got the folder"):
            Output(tmp_path / "out.jsonl", errors=path)

    @pytest.mark.parametrize("name", ["out.xlsx", "out.json", "out.jsonl.gz", "OUT.XLS"])
    def test_a_format_that_is_not_written(self, tmp_path: Path, name: str) -> None:
        """JSON lines do not go into a file that is named like another well-known format."""
        says = r"expected \.jsonl \(JSON lines\), \.csv, \.tsv or \.parquet, got \."
        with pytest.raises(ConfigError, match=says):
            Output(tmp_path / name)
        with pytest.raises(ConfigError, match=says):
            Output(tmp_path / "out.csv", errors=tmp_path / name)
        for fine in ("out", "out.txt", "out.ndjson"):
            assert Output(tmp_path / fine).format == "lines"

    def test_a_folder_that_does_not_exist(self, tmp_path: Path) -> None:
        """A folder that does not exist is an error before anything is sent, and not at the end."""
        with pytest.raises(ConfigError, match="make it first"):
            Output(tmp_path / "out.csv", errors=tmp_path / "nowhere" / "errors.csv")

    @pytest.mark.parametrize("errors", ["out.jsonl", "./out.jsonl", "out.jsonl.journal"])
    def test_files_that_are_the_same(self, out: Path, errors: str) -> None:
        """Answers, errors and the journal are files of their own."""
        with pytest.raises(ConfigError, match="expected a file of its own"):
            Output(out, errors=out.parent / errors)

    @pytest.mark.parametrize(
        ("name", "wanted", "said"),
        [
            ("out.csv", "openai", "expected 'csv' for the output 'out.csv', got 'openai'"),
            ("out.jsonl", "opnai", "did you mean 'openai'"),
        ],
    )
    def test_formats_that_do_not_exist(self, tmp_path: Path, name: str, wanted: Any, said: str) -> None:
        """A format that is none, or is not that of the suffix, is an error."""
        with pytest.raises(ConfigError, match=said):
            Output(tmp_path / name, format=wanted)

    @pytest.mark.parametrize(
        ("name", "most"), [("out.csv", 5_000_000), ("out.jsonl", 5_000_000), ("out.parquet", 45_000_000)]
    )
    def test_memory(self, tmp_path: Path, name: str, most: int) -> None:
        """Memory does not grow with the answers."""
        output = Output(tmp_path / name, ordered=True)
        output.journal_path.write_bytes(b"".join([answer(row, "x" * 100_000) for row in range(600)]))
        tracemalloc.start()
        try:
            output.finish()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < most  # of 60 MB; Parquet keeps 16 MB and copies of it


class TestBatches:
    def test_csv_to_parquet(self, tmp_path: Path) -> None:
        """A table of prompts makes a table of answers, also in several runs."""
        (tmp_path / "in.csv").write_text('id,title\na,"One, two"\nb,Three\n')
        for limit in (1, None):
            source = open_input(tmp_path / "in.csv", template="Title: {title}")
            report = Batch(LLM("echo:x"), source, Output(tmp_path / "out.parquet"), limit=limit).run()
        assert (report.answered, report.asked) == (2, 1)
        rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
        assert [(row["row"], row["custom_id"], row["text"]) for row in rows] == [
            (0, "a", "Title: One, two"),
            (1, "b", "Title: Three"),
        ]

    def test_openai_to_openai(self, tmp_path: Path) -> None:
        """A file for OpenAI's batches makes what OpenAI's batches return; what the model cannot do is an error of its row."""
        bodies: list[dict[str, Any]] = [
            {"model": "gpt-4o", "messages": [{"role": "user", "content": "hello"}]},
            {"model": "gpt-4o", "messages": [{"role": "user", "content": "the garden is a secret"}], "n": 2},
            {"model": "gpt-4o"},
        ]
        rows = [
            {"custom_id": f"r{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            for number, body in enumerate(bodies)
        ]
        (tmp_path / "in.jsonl").write_text("".join([json.dumps(row) + "\n" for row in rows]))
        output = Output(tmp_path / "out.jsonl", format="openai")
        report = Batch(LLM("echo:mine"), tmp_path / "in.jsonl", output, stop_after_errors=0).run()
        assert (report.answered, report.failed) == (1, 2)
        first, second, third = lines_of(output.path)
        body = ChatCompletion.model_validate(first["response"]["body"], strict=True)
        assert (first["custom_id"], body.model, body.choices[0].message.content) == ("r0", "mine", "hello")
        assert (second["custom_id"], second["error"]["code"]) == ("r1", "BadRequest")
        assert third["error"]["message"] == "line 3: body.messages: expected a list of messages, got nothing"
        assert "garden" not in output.journal_path.read_text()

    def test_a_stream(self, tmp_path: Path) -> None:
        """A batch of a stream goes on where it was, by the names of its rows."""
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        for names in ("ab", "abc"):
            lines = "".join([json.dumps({"prompt": f"prompt {name}", "custom_id": name}) + "\n" for name in names])
            writer = threading.Thread(target=pipe.write_text, args=(lines,), daemon=True)
            writer.start()
            report = Batch(LLM("echo:x"), open_input(pipe), tmp_path / "out.jsonl").run()
            writer.join()
        assert (report.answered, report.asked) == (3, 1)
        assert sorted(texts_of(tmp_path / "out.jsonl")) == [(0, "prompt a"), (1, "prompt b"), (2, "prompt c")]


def test_pictures_and_thoughts(tmp_path: Path) -> None:
    """What only a whole answer has comes out in OpenAI's format, in the shape that `Message.from_dict` reads."""
    response = Response("a cat", reasoning="Hm", media=[Image(url="https://x.example/y.png")])
    line = line_of(0, "x", "k", 0, response=response, request=Request(model="m", messages="x"), whole=True)
    output = Output(tmp_path / "out.jsonl", format="openai")
    finished(output, encoded(line))
    (found,) = lines_of(output.path)
    fields = found["response"]["body"]["choices"][0]["message"]
    message = Message.from_dict({name: value for name, value in fields.items() if value is not None})
    assert (message.text, message.reasoning[0].text) == ("a cat", "Hm")
    assert any(isinstance(part, Image) for part in message.content)
