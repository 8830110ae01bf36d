"""The command `trace`: its exit status, and what it says."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import webbrowser

import pytest
from support.readme import ROOT, blocks
from support.trace_files import span, write

pytest.importorskip("typer")


@pytest.fixture
def trace(capfd):
    """Return a function that runs the command in this process, and returns its exit status and its output."""
    from fluxibly.cli.commands import run

    def call(*arguments):
        status = run(("trace", *map(str, arguments)))
        return status, *capfd.readouterr()

    return call


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "trace.jsonl", span("chat m"))


@pytest.fixture
def opened(monkeypatch):
    """Return the addresses that were opened in a browser; the test may set what the browser returns."""
    found = []
    monkeypatch.setattr(webbrowser, "open", lambda address: found.append(address) or True)
    return found


def test_a_page_is_written_and_named(trace, file, tmp_path, opened):
    """--html says where the page is, and opens nothing."""
    out = tmp_path / "page.html"
    assert trace(file, "--html", out) == (0, f"wrote {out}\n", "")
    assert "chat m" in out.read_text()
    assert opened == []


def test_a_page_is_opened(trace, file, tmp_path, opened):
    """--open opens the page that --html names."""
    out = tmp_path / "my page.html"
    assert trace(file, "--html", out, "--open") == (0, f"wrote {out}\n", "")
    assert opened == [out.as_uri()]


def test_a_page_without_a_name_is_beside_the_file(trace, file, opened):
    """--open alone writes the page beside the file, and says where."""
    out = file.with_name("trace.jsonl.html")
    assert trace(file, "--open") == (0, f"wrote {out}\n", "")
    assert opened == [out.as_uri()]
    assert trace(file, "--open")[0] == 0


def test_without_a_browser_the_address_is_said(trace, file, monkeypatch):
    """The page is there, but it could not be opened."""
    monkeypatch.setattr(webbrowser, "open", lambda address: False)
    status, out, error = trace(file, "--open")
    assert status == 1
    assert out.startswith("wrote ")
    assert error.startswith("fluxibly: --open: no browser could be started; open file:///")


def mistake(result, says):
    status, out, error = result
    assert (status, out, error.count("\n")) == (2, "", 1)
    assert error.startswith("fluxibly: ")
    assert says in error


def test_mistakes(trace, file, tmp_path, opened):
    """A file that is not there, an output that cannot be written, and options that make no sense are mistakes."""
    mistake(trace(tmp_path / "none.jsonl"), "none.jsonl: No such file")
    mistake(trace(tmp_path / "none.jsonl", "--open"), "none.jsonl: No such file")
    mistake(trace(file, "--html", tmp_path / "no" / "page.html"), "page.html: No such file or directory; name another")
    mistake(trace(file, "--html", tmp_path), "Is a directory")
    before = file.read_bytes()
    mistake(trace(file, "--html", file), "expected another file than the trace itself")
    mistake(trace(file, "--html", tmp_path / "." / file.name), "expected another file than the trace itself")
    assert file.read_bytes() == before
    mistake(trace(file, "--messages", "--html", tmp_path / "page.html"), "--messages is for the terminal")
    assert not (tmp_path / "page.html").exists()
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    mistake(trace(empty), "has no spans in it; write one with `fluxibly chat --trace FILE`")
    mistake(trace(empty, "--html", tmp_path / "page.html"), "has no spans in it")
    assert opened == []


def test_the_commands_of_the_page_about_traces_run(tmp_path, monkeypatch, trace, opened):
    """The commands in docs/traces.md work as a reader types them, one after the other."""
    commands = [
        shlex.split(line)
        for code in blocks("text", ROOT / "docs" / "traces.md")
        for line in code.splitlines()
        if line.startswith("fluxibly ")
    ]
    assert [words[1] for words in commands] == ["chat", *["trace"] * 4]
    monkeypatch.chdir(tmp_path)
    chat = [sys.executable, "-c", "from fluxibly.cli import main; main()", *commands[0][1:]]
    subprocess.run(chat, check=True, timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)
    outputs = [trace(*words[2:]) for words in commands[1:]]
    assert [status for status, _, _ in outputs] == [0] * 4
    assert "Name three colours." not in outputs[0][1]
    assert outputs[1][1].count("Name three colours.") == 2
    assert [out for _, out, _ in outputs[2:]] == ["wrote trace.html\n", "wrote trace.jsonl.html\n"]
    assert opened == [(tmp_path / "trace.jsonl.html").as_uri()]
