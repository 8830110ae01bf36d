"""The inputs of batches: JSON lines, CSV, Parquet, templates and streams."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import anyio
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, strategies as st

from fluxibly import LLM
from fluxibly.batch import _text_lines
from fluxibly.batch._csv import Delimited
from fluxibly.batch._input import Row, open_input
from fluxibly.batch._jsonl import JSONLines
from fluxibly.batch._template import Template
from fluxibly.batch._text_lines import LONGEST, Splitter
from fluxibly.errors import ConfigError
from fluxibly.types import Image

CONTENT = "the garden is a secret"


def never(_: int) -> bool:
    return False


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a file, and returns its path."""

    def write(content: bytes | str | Iterable[object], name: str = "in.jsonl") -> Path:
        path = tmp_path / name
        if not isinstance(content, (bytes, str)):
            content = "".join([json.dumps(each) + "\n" for each in content])
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def rows_of(path: Path, skip: Callable[[int], bool] = never, **options: Any) -> list[Row]:
    found = open_input(path, **options).rows(skip)
    assert isinstance(found, Iterable)
    return list(found)


def problem_of(path: Path, **options: Any) -> str:
    """Return the problem of the only row."""
    (row,) = rows_of(path, **options)
    assert row.problem is not None
    return row.problem


class TestJSONLines:
    def test_fluxibly_s_own_form(self, write: Any) -> None:
        """A prompt or messages, settings beside it, and a name that is a text or a number."""
        path = write(
            [
                {"prompt": "a", "max_tokens": 5, "custom_id": "x"},
                {"messages": [{"role": "user", "content": "b"}], "custom_id": 7},
                {"prompt": "c", "id": 1.5, "model": None, "temperature": None},
            ]
        )
        assert rows_of(path) == [
            Row(0, "x", "a", {"max_tokens": 5}, None, 1),
            Row(1, "7", [{"role": "user", "content": "b"}], {}, None, 2),
            Row(2, "1.5", "c", {"temperature": None}, None, 3),
        ]

    @pytest.mark.parametrize("end", [b"\n", b"\r\n"])
    @pytest.mark.parametrize("last", [True, False])
    def test_ends_of_lines(self, write: Any, end: bytes, last: bool) -> None:
        """A byte-order mark, CRLF, blank lines and a last line without an end change nothing; blank lines do not count."""
        lines = [b'\xef\xbb\xbf{"prompt": "a"}', b"", b" \t", b'{"prompt": "b"}']
        rows = rows_of(write(end.join(lines) + (end if last else b"")))
        assert [(row.number, row.prompt, row.line) for row in rows] == [(0, "a", 1), (1, "b", 4)]

    @pytest.mark.parametrize(
        ("line", "said"),
        [
            (b"{", "expected JSON, got something else at character 3"),
            (b'{"prompt": "the garden is a secret"', "expected JSON"),
            (b'{"prompt": "the garden is a secret \xff"}', "expected UTF-8, got other bytes at 36"),
            (b'{"prompt": "the garden is a secret", "seed": NaN}', "expected JSON, got NaN"),
            (b'{"prompt": "the garden is a secret", "seed": 1e999}', "a number that is too large"),
            (b'{"prompt": "a", "seed": ' + b"1" * 5000 + b"}", "too many digits"),
            (b"[" * 100_000, "nested too deeply"),
            (b'["the garden is a secret"]', "expected a JSON object, got a list"),
            (b'"the garden is a secret"', "expected a JSON object, got a str"),
            (b"{}", "expected a prompt or messages, got neither"),
            (b'{"prompt": "a", "messages": []}', "got both"),
            (b'{"prompt": "a", "temprature": 1}', "no field 'temprature'; did you mean 'temperature'"),
            (b'{"prompt": "a", "custom_Id": 1}', "did you mean 'custom_id'"),
            (b'{"prompt": "a", "max_completion_tokens": 1}', "did you mean 'max_tokens'"),
            (b'{"prompt": "a", "headers": {"authorization": "Bearer x"}}', "a row cannot set HTTP headers"),
            (b'{"prompt": "a", "custom_id": true}', "custom_id: expected a text or a number, got a bool"),
            (b'{"prompt": "a", "' + b"k" * 1000 + b'": 1}', f"no setting '{'k' * 40}…'"),
        ],
    )
    def test_a_problem_is_the_row_s_alone(self, write: Any, line: bytes, said: str) -> None:
        """What is wrong with a line is said with its number and without its content, and the others are read."""
        rows = rows_of(write(b'{"prompt": "a"}\n\n' + line + b'\n{"prompt": "b"}\n'))
        assert [(row.number, row.prompt) for row in rows] == [(0, "a"), (1, ""), (2, "b")]
        problem = rows[1].problem
        assert problem is not None
        assert problem.startswith("line 3: ")
        assert said in problem
        assert CONTENT not in problem

    def test_half_a_surrogate_pair(self, write: Any) -> None:
        """Half of a surrogate pair, which JSON can escape and UTF-8 cannot say, becomes U+FFFD."""
        (row,) = rows_of(write([{"prompt": "a\ud800b", "custom_id": "\udc00"}]))
        assert (row.prompt, row.custom_id) == ("a\ufffdb", "\ufffd")

    def test_a_line_that_is_too_long(self, write: Any) -> None:
        """Of a line that is too long only a part is read, and it is a problem of its row alone."""
        path = write(b'{"prompt": "' + b"x" * (LONGEST + 100_000) + b'"}\n{"prompt": "b"}\n')
        source = open_input(path)
        first, second = source.rows(never)  # type: ignore[misc]
        assert first.problem == f"line 1: expected a line of at most {LONGEST} bytes, got more"
        assert (second.number, second.prompt) == (1, "b")
        assert source.position == source.size

    def test_rows_that_are_left_out(self, write: Any) -> None:
        """Rows that are left out keep their numbers, and are not even parsed."""
        path = write(b"{bad\n" * 5 + b'{"prompt": "a"}\n{bad\n')
        (row,) = rows_of(path, lambda number: number != 5)
        assert (row.number, row.prompt, row.line) == (5, "a", 6)

    def test_the_position(self, write: Any) -> None:
        """The position is that in the bytes of the input, and another pass begins anew."""
        source = open_input(write([{"prompt": "a" * 1000}] * 100))
        assert source.position == 0
        rows = iter(source.rows(never))  # type: ignore[arg-type]
        next(rows)
        assert 0 < source.position < source.size / 50  # type: ignore[operator]
        assert len([*rows]) == 99
        assert source.position == source.size
        assert len([*source.rows(never)]) == 100  # type: ignore[misc]

    def test_the_fingerprint(self, write: Any) -> None:
        """The fingerprint tells that an input has changed."""
        path = write([{"prompt": "a"}])
        before = open_input(path).fingerprint
        assert open_input(path).fingerprint == before is not None
        os.utime(path, ns=(0, 1))
        assert open_input(path).fingerprint != before
        assert open_input(write([{"prompt": "ab"}])).fingerprint != before

    def test_a_name_that_is_there_twice(self, write: Any) -> None:
        """Rows of equal names are rows of their own, known by their numbers."""
        rows = rows_of(write([{"prompt": "a", "custom_id": "x"}, {"prompt": "b", "custom_id": "x"}]))
        assert [(row.number, row.custom_id, row.prompt) for row in rows] == [(0, "x", "a"), (1, "x", "b")]

    @given(st.lists(st.text() | st.text(st.characters(categories=["Cs", "L"]))), st.sampled_from(["\n", "\r\n"]))
    def test_any_texts(self, texts: list[str], end: str) -> None:
        """Whatever texts are written as JSON lines are read as they were, but for halves of surrogate pairs."""
        lines = [json.dumps({"prompt": text, "custom_id": text}) for text in texts]
        reader = JSONLines(None)
        content = "".join([line + end for line in lines]).encode()
        rows = [reader.row(0) for line in io.BytesIO(content) if reader.add(line)]
        assert len(rows) == len(texts)
        for row, text in zip(rows, texts, strict=True):
            assert row.problem is None
            read = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            assert (row.prompt, row.custom_id) == (read, read or None)


BODY: Mapping[str, Any] = {
    "model": "gpt-4o-mini",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is it?"},
                {"type": "image_url", "image_url": {"url": "https://x.example/y.png", "detail": "low"}},
            ],
        },
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "a cat"},
    ],
    "max_completion_tokens": 50,
    "temperature": 0.5,
    "tools": [{"type": "function", "function": {"name": "look", "description": "Looks", "parameters": {}}}],
    "tool_choice": {"type": "function", "function": {"name": "look"}},
    "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}},
    "logit_bias": {"50256": -100},
    "stream": False,
    "user": "ann",
}


def of_openai(**changes: Any) -> dict[str, Any]:
    line = {"custom_id": "r1", "method": "POST", "url": "/v1/chat/completions", "body": BODY}
    return {name: value for name, value in {**line, **changes}.items() if value is not None}


class TestOpenAIsLines:
    def test_a_line_makes_a_request(self, write: Any) -> None:
        """A line with tools, an image and a schema makes a request with all of that; unknown parameters are `extra`."""
        (row,) = rows_of(write([of_openai()]))
        assert (row.problem, row.custom_id) == (None, "r1")
        request = LLM("echo:mine").request(row.prompt, row.settings)
        assert request.model == "mine"  # not that of the body
        assert (request.max_tokens, request.temperature, request.tool_choice) == (50, 0.5, "look")
        assert [tool.name for tool in request.tools] == ["look"]
        assert request.extra == {"logit_bias": {"50256": -100}}
        assert request.metadata == {"user": "ann"}
        assert request.response_format == BODY["response_format"]
        image = request.messages[1].content[1]
        assert isinstance(image, Image)
        assert (image.url, image.detail) == ("https://x.example/y.png", "low")
        assert request.messages[2].tool_calls[0].arguments == {"at": 1}
        assert [message.role for message in request.messages] == ["system", "user", "assistant", "tool"]

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"method": "GET"}, "method: expected 'POST'"),
            ({"url": "/v1/embeddings"}, "url: expected '/v1/chat/completions'"),
            ({"body": [CONTENT]}, "body: expected an object, got a list"),
            ({"body": {}}, "body.messages: expected a list of messages"),
            ({"body": {"messages": [CONTENT]}}, "body.messages[0]: expected a mapping, got a str"),
            ({"body": {"messages": [{}], "tools": [{"type": "web"}]}}, "body.tools[0].type"),
            ({"temperature": 1}, "no field 'temperature'; write it into the body"),
        ],
    )
    def test_problems(self, write: Any, changes: dict[str, Any], said: str) -> None:
        """What is wrong with a line is said with its path."""
        problem = problem_of(write([of_openai(**changes)]))
        assert said in problem
        assert CONTENT not in problem

    @pytest.mark.parametrize("url", ["/v1/chat/completions", "https://api.example/v1/chat/completions", None])
    def test_other_addresses(self, write: Any, url: str | None) -> None:
        """The address may be whole, or missing, as may the method."""
        (row,) = rows_of(write([of_openai(url=url, method=None)]))
        assert row.problem is None


class TestColumns:
    def test_a_template_of_fields(self, write: Any) -> None:
        """A template makes prompts of the fields of objects. Values that are no texts stand as in JSON, null is empty."""
        path = write([{"id": 3, "title": "T", "n": 1.5, "tags": ["a", None], "none": None, "is": True}])
        template = "{{{title}}} {n} {tags} [{none}] {is} {title}"
        (row,) = rows_of(path, template=template)
        assert row == Row(0, "3", '{T} 1.5 ["a",null] [] true T', {}, None, 1)

    def test_a_column_of_objects(self, write: Any) -> None:
        """A field with a text or with messages is the prompt, and all other fields are left alone."""
        path = write(
            [{"q": "a", "temprature": 1, "custom_id": "x"}, {"q": [{"role": "user", "content": "b"}]}, {"q": 5}]
        )
        first, second, third = rows_of(path, column="q")
        assert first == Row(0, "x", "a", {}, None, 1)
        assert second.prompt == [{"role": "user", "content": "b"}]
        assert third.problem == "line 3: q: expected a text, or a list of messages, got an int"

    def test_a_field_that_a_later_row_lacks(self, write: Any) -> None:
        """A field that only some rows have is a problem of the others."""
        rows = rows_of(write([{"q": "a"}, {"r": "b"}]), column="q")
        assert [row.problem for row in rows] == [None, "line 2: there is no field 'q'"]

    @pytest.mark.parametrize(
        ("template", "said"),
        [
            ("{titel}", "there is no column 'titel', only 'title', 'text', 'id'; did you mean 'title'"),
            ('{"a": 1} {title}', "there is no column '\"a\": 1'.*; write {{ and }} for braces"),
            ("{title.__class__}", "there is no column 'title.__class__'"),
            ("{title!r:>10}", "there is no column"),
            ("{0}", "there is no column '0'"),
            ("{title", "got a single '{' at character 1; write {{ for a brace"),
            ("a } {title}", "got a single '}' at character 3"),
            ("no column", "all prompts would be equal"),
        ],
    )
    @pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
    def test_templates_that_are_wrong(self, write: Any, template: str, said: str, kind: str, tmp_path: Path) -> None:
        """What is wrong with a template is an error before anything is sent. It runs nothing."""
        if kind == "csv":
            path = write("title,text,id\na,b,c\n", "in.csv")
        elif kind == "jsonl":
            path = write([{"title": "a", "text": "b", "id": "c"}])
        else:
            path = tmp_path / "in.parquet"
            pq.write_table(pa.table({"title": ["a"], "text": ["b"], "id": ["c"]}), path)
        with pytest.raises(ConfigError, match=said):
            open_input(path, template=template)

    @given(st.text(st.characters(exclude_categories=["Cs"])))
    def test_any_template(self, text: str) -> None:
        """Text without braces stands as it is, doubled braces are braces, and the values are not looked into."""
        template = Template(text.replace("{", "{{").replace("}", "}}") + "{x}")
        assert template.of({"x": "{y} {{"}) == text + "{y} {{"

    def test_both(self, write: Any) -> None:
        """A column and a template exclude each other."""
        with pytest.raises(ConfigError, match="expected one of them, got both"):
            open_input(write([{}]), column="a", template="{a}")


class TestCSV:
    def test_values_in_quotes(self, write: Any) -> None:
        """Quotes hold delimiters, quotes and ends of lines, as in RFC 4180; `id` names rows, and blank lines do not count."""
        text = '\ufeffid,prompt\r\n1,"a, ""b""\r\nc"\r\n\r\n,d\r\n'
        rows = rows_of(write(text, "in.csv"))
        assert rows == [Row(0, "1", 'a, "b"\r\nc', {}, None, 2), Row(1, None, "d", {}, None, 5)]

    def test_which_column(self, write: Any) -> None:
        """The prompt is the column that is named, `prompt`, or the only one beside the names."""
        assert rows_of(write("q,r\na,b\n", "in.csv"), column="r")[0].prompt == "b"
        assert rows_of(write("q,prompt\na,b\n", "in.csv"))[0].prompt == "b"
        assert rows_of(write("custom_id,id,q\nx,y,b\n", "in.csv"))[0][:3] == (0, "x", "b")
        assert rows_of(write("id\nx\n", "in.csv"), column="id")[0][:3] == (0, None, "x")
        with pytest.raises(ConfigError, match="got 'q', 'r'; name one by --column"):
            open_input(write("q,r\na,b\n", "in.csv"))
        with pytest.raises(ConfigError, match="there is no column 's', only 'q', 'r'"):
            open_input(write("q,r\na,b\n", "in.csv"), column="s")
        with pytest.raises(ConfigError, match="expected one column 'q', got several"):
            open_input(write("q,q\na,b\n", "in.csv"), column="q")

    def test_tabs(self, write: Any) -> None:
        """The suffix .tsv stands for tabs."""
        assert rows_of(write("q\tr\na,b\tc\n", "in.TSV"), template="{q} {r}")[0].prompt == "a,b c"

    @pytest.mark.parametrize("content", ["", "\n\n", "\ufeff"])
    def test_no_header(self, write: Any, content: str) -> None:
        """A file without a header is an error; one with nothing else has no rows."""
        with pytest.raises(ConfigError, match="expected a header"):
            open_input(write(content, "in.csv"))
        assert rows_of(write("q", "in.csv")) == []

    def test_problems(self, write: Any) -> None:
        """A row with other bytes, too many values or text behind a quote is a problem of its own."""
        lines = [b"q,r", b"\xffsecret,b", b"a", b'"secret"a,b', b"a\rb,c", b"good,b"]
        *bad, good = rows_of(write(b"\n".join(lines), "in.csv"), column="q")
        assert [row.problem for row in bad] == [
            "line 2: expected UTF-8, got other bytes",
            "line 3: expected 2 values, as in the header, got 1",
            "line 4: expected CSV as in RFC 4180, got other text (',' expected after '\"')",
            "line 5: expected CSV as in RFC 4180, got other text (a carriage return outside of quotes)",
        ]
        assert (good.number, good.prompt) == (4, "good")

    def test_a_quote_without_an_end(self, write: Any) -> None:
        """A quote without an end takes all that follows, and the problem has the line where it begins."""
        first, second = rows_of(write('q\na\n"b\nc\nd\n', "in.csv"))
        assert first.prompt == "a"
        assert second.problem == "line 3: expected the end of a quote, got the end of the input"
        assert second.number == 1

    def test_a_quote_within_a_value(self, write: Any) -> None:
        """A quote in the midst of a value that has none at its beginning is a quote, and nothing else."""
        assert [row.prompt for row in rows_of(write('q\n5" disk\nb\n', "in.csv"))] == ['5" disk', "b"]

    def test_a_long_value(self, write: Any) -> None:
        """A value may be longer than the module's own limit of 128 KB, and have many lines, without taking for ever."""
        value = 'a ""quote"" in a line\n' * 50_000
        (row,) = rows_of(write(f'q\n"{value}"\n', "in.csv"))
        assert row.prompt == value.replace('""', '"')

    def test_rows_that_are_left_out(self, write: Any) -> None:
        """Rows that are left out keep their numbers, also those with lines in quotes."""
        path = write('q\n"a\nb"\nc\n"d"\ne\n', "in.csv")
        assert [(row.number, row.prompt) for row in rows_of(path, lambda number: number in (0, 2))] == [
            (1, "c"),
            (3, "e"),
        ]

    @given(st.lists(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=2, max_size=2)))
    def test_any_values(self, values: list[list[str]]) -> None:
        """Whatever Python's module writes is read as it was."""
        file = io.StringIO()
        csv.writer(file).writerows([["q", "r"], *values])
        assert read_csv(file.getvalue().encode()) == values

    @given(st.text(st.sampled_from('",\n\r ab')).map(str.encode))
    def test_any_text(self, text: bytes) -> None:
        """Whatever the text, each row is read or has a problem."""
        assert all(isinstance(row, str) or len(row) == 2 for row in read_csv(b"q,r\n" + text))


class Both:
    """Prompts that are the values of the columns q and r."""

    columns = ("q", "r")

    def of(self, values: Mapping[str, object]) -> object:
        return [values["q"], values["r"]]


def read_csv(content: bytes) -> list[Any]:
    """Return the values of the rows of CSV with the columns q and r, or their problems."""
    reader = Delimited(Both(), ",", "in.csv")
    found: list[Row] = []
    for line in io.BytesIO(content):
        if reader.add(line):
            found.append(reader.row(len(found)))
    if reader.end():
        found.append(reader.row(len(found)))
    assert [row.number for row in found] == [*range(len(found))]
    return [row.problem or row.prompt for row in found]


class TestParquet:
    def test_rows(self, tmp_path: Path) -> None:
        """Rows of all groups are read, with their names, without columns that nobody needs."""
        path = tmp_path / "in.parquet"
        table = pa.table({"custom_id": [*range(10)], "prompt": [f"p{n}" for n in range(10)], "junk": [None] * 10})
        pq.write_table(table, path, row_group_size=3)
        source = open_input(path)
        rows = [*source.rows(never)]  # type: ignore[misc]
        assert rows == [Row(n, str(n), f"p{n}", {}) for n in range(10)]
        assert source.position == source.size
        left = rows_of(path, lambda number: number < 4 or number == 7)
        assert [row.number for row in left] == [4, 5, 6, 8, 9]
        assert [row.prompt for row in left] == [f"p{row.number}" for row in left]

    def test_values(self, tmp_path: Path) -> None:
        """A column may hold messages. Null and bytes are problems of their rows; in templates, null is empty."""
        path = tmp_path / "in.parquet"
        messages = [[{"role": "user", "content": "a", "name": None}], None]
        pq.write_table(pa.table({"m": messages, "b": [b"secret", None], "n": [1, None]}), path)
        first, second = rows_of(path, column="m")
        assert LLM("echo:x").request(first.prompt, {}).messages[0].text == "a"
        assert second.problem == "row 1: m: expected a text, or a list of messages, got None"
        assert [row.prompt for row in rows_of(path, template="<{n}>")] == ["<1>", "<>"]
        first, second = rows_of(path, template="<{b}>")
        assert (first.problem, second.prompt) == ("row 0: b: expected a text, got a bytes", "<>")

    def test_no_parquet(self, write: Any) -> None:
        """A file that is no Parquet is an error, and so is a column that is missing."""
        with pytest.raises(ConfigError, match="expected a Parquet file, got something else"):
            open_input(write("hello", "in.parquet"))
        with pytest.raises(FileNotFoundError):
            open_input(Path("/nowhere/in.parquet"))

    def test_pyarrow_is_missing(self, write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without pyarrow, the error has the command that installs it."""
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(ConfigError, match="Parquet needs pyarrow, which is not installed: pip install pyarrow"):
            open_input(write("hello", "in.parquet"))


class TestWholeInputs:
    @pytest.mark.parametrize(
        ("content", "said"),
        [
            ('{"prompt": "a"}'.encode("utf-16"), "expected UTF-8, got UTF-16"),
            (gzip.compress(b'{"prompt": "a"}', mtime=0), "gzip has compressed; write `zcat"),
            (b"PAR1xxxx", "a Parquet file; give it the suffix .parquet"),
        ],
    )
    @pytest.mark.parametrize("name", ["in.jsonl", "in.csv"])
    def test_what_is_no_text(self, write: Any, content: bytes, said: str, name: str) -> None:
        """What is no UTF-8 at all is an error before anything is sent."""
        with pytest.raises(ConfigError, match=said):
            open_input(write(content, name))

    def test_what_is_no_file(self, tmp_path: Path) -> None:
        """A folder, a missing file and an unknown format are errors."""
        with pytest.raises(ConfigError, match="expected a file, got a folder"):
            open_input(tmp_path)
        with pytest.raises(FileNotFoundError):
            open_input(tmp_path / "nothing")
        with pytest.raises(ConfigError, match="got 'jsnl'; did you mean 'jsonl'"):
            open_input(tmp_path / "x", format="jsnl")  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="expected a file, got a stream"):
            open_input("-", format="parquet")

    def test_the_format_can_be_said(self, write: Any) -> None:
        """The format that is said counts, whatever the suffix says."""
        assert rows_of(write("q\na\n", "in.jsonl"), format="csv")[0].prompt == "a"

    def test_an_empty_input(self, write: Any) -> None:
        """An empty input has no rows."""
        assert rows_of(write("")) == []
        assert rows_of(write("\n\n"), template="{a}") == []


async def all_of(source: Any, skip: Callable[[int], bool] = never, known: Mapping[str, int] | None = None) -> list[Row]:
    return [row async for row in source.rows(skip, known)]


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    """A named pipe."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    return path


def fill(pipe: Path, *pieces: bytes) -> None:
    """Write pieces into a pipe, from a thread."""

    def write() -> None:
        with pipe.open("wb", buffering=0) as file:
            for piece in pieces:
                file.write(piece)

    threading.Thread(target=write, daemon=True).start()


@pytest.mark.anyio
class TestStreams:
    @pytest.mark.parametrize("kind", ["jsonl", "csv"])
    async def test_rows(self, pipe: Path, kind: Any) -> None:
        """Rows of a pipe are those of a file with its content, wherever its pieces end."""
        text = '\ufeff{"prompt": "é"}\r\n\n{"prompt": "b"}' if kind == "jsonl" else '\ufeffprompt\r\né\n\n"b"'
        data = text.encode()
        fill(pipe, *[data[at : at + 1] for at in range(len(data))])
        source = open_input(pipe, format=kind)
        rows = await all_of(source)
        assert [(row.number, row.prompt) for row in rows] == [(0, "é"), (1, "b")]
        assert (source.is_stream, source.size, source.fingerprint) == (True, None, None)
        assert source.position == len(data)

    async def test_others_go_on(self, pipe: Path) -> None:
        """While a stream is silent, other tasks go on, and the wait can be cancelled."""
        writer = os.open(pipe, os.O_RDWR)
        try:
            rows = aiter(open_input(pipe).rows(never))  # type: ignore[arg-type]
            os.write(writer, b'{"prompt": "a"}\n')
            assert (await anext(rows)).prompt == "a"
            with anyio.move_on_after(0.05) as scope:
                await anext(rows)
            assert scope.cancelled_caught
        finally:
            os.close(writer)

    async def test_a_stream_that_is_gone_on_with(self, pipe: Path) -> None:
        """Rows are found by their names, in whatever order; a new row has a number that no other has."""
        names = ["b", "new", "a", "c", "d"]
        fill(pipe, "".join([json.dumps({"prompt": name, "custom_id": name}) + "\n" for name in names]).encode())
        known = {"a": 0, "b": 1, "c": 2}
        rows = await all_of(open_input(pipe), {0, 1}.__contains__, known)  # c has failed, and is asked again
        assert [(row.number, row.custom_id) for row in rows] == [(3, "new"), (2, "c"), (4, "d")]

    async def test_rows_without_names(self, pipe: Path) -> None:
        """A stream whose rows have no names cannot be gone on with."""
        fill(pipe, b'{"prompt": "a"}\n')
        with pytest.raises(ConfigError, match="line 1: expected a custom_id"):
            await all_of(open_input(pipe), never, {"a": 0})

    async def test_equal_names(self, pipe: Path) -> None:
        """Nobody can tell which of two rows with one name is done, so none of them is left out silently."""
        fill(pipe, b'{"prompt": "x", "custom_id": "a"}\n{"prompt": "y", "custom_id": "a"}\n')
        with pytest.raises(ConfigError, match="line 2: expected a custom_id that no earlier row has"):
            await all_of(open_input(pipe), never, {"a": 0})

    async def test_a_header_that_is_wrong(self, pipe: Path) -> None:
        """What is wrong with a whole stream is an error before its first row."""
        fill(pipe, b"a,b\n1,2\n")
        with pytest.raises(ConfigError, match="name one by --column"):
            await all_of(open_input(pipe, format="csv"))


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("kind", ["pipe", "file", "nothing"])
def test_standard_input(write: Any, backend: str, kind: str) -> None:
    """`-` is standard input, be it a pipe, a file or /dev/null."""
    code = f"""
import anyio
from fluxibly.batch._input import open_input
async def main():
    print([row.prompt async for row in open_input("-").rows(lambda _: False)])
anyio.run(main, backend={backend!r})
"""
    lines = b"" if kind == "nothing" else b'{"prompt": "a"}\n{"prompt": "b"}'
    with (Path(os.devnull) if kind == "nothing" else write(lines)).open("rb") as file:
        run: dict[str, Any] = {"input": lines} if kind == "pipe" else {"stdin": file}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, **run)
    assert done.stdout.decode().strip() == ("[]" if kind == "nothing" else "['a', 'b']")


@given(st.lists(st.binary()), st.integers(min_value=1, max_value=8))
def test_pieces_make_lines(pieces: list[bytes], longest: int) -> None:
    """However bytes are cut into pieces, their lines are the same; of long lines, the beginnings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_text_lines, "LONGEST", longest)
        splitter = Splitter()
        found = [line for piece in pieces for line in splitter.feed(piece)] + [*splitter.end()]
    expected = [line[: longest + 1] for line in io.BytesIO(b"".join(pieces))]
    assert found == expected
