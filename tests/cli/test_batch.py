"""The command `batch` in this process: its options, its mistakes, its last lines, and the figures of a dry run."""

from __future__ import annotations

import json
import os
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.canned_server import Canned, Seen, canned_server
from support.command_line import CommandLine, Ran, command_line

pytest.importorskip("typer")
from fluxibly import LLM
from fluxibly.batch import Batch, Report
from fluxibly.cli.batch import display
from fluxibly.cli.batch.ending import with_option, without, without_secrets
from fluxibly.cli.batch.progress import total_of
from fluxibly.cli.batch.words import by_class, lasting, short
from fluxibly.cli.screen import Screen

KEY = "sk-proj-abcdefghijklmnopqrstuvwxyz0123456789"
MODEL = ("-m", "openai:gpt-4o-mini")


@pytest.fixture
def server() -> Iterator[Canned]:
    with canned_server() as found:
        yield found


@pytest.fixture
def fluxibly(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, server: Canned
) -> Iterator[CommandLine]:
    """A command line in a folder of its own, with OpenAI's service at the server."""
    monkeypatch.chdir(tmp_path)
    with command_line(tmp_path, capfd, monkeypatch) as found:
        found.set(OPENAI_API_KEY=KEY, OPENAI_BASE_URL=f"{server.url}/v1")
        yield found


def prompts(*texts: str, name: str = "in.jsonl", **settings: Any) -> str:
    """Write a file of prompts, and return its name."""
    lines = [json.dumps({"prompt": text, **settings}) + "\n" for text in texts]
    Path(name).write_text("".join(lines), encoding="utf-8")
    return name


def rows_of(path: str = "out.jsonl") -> list[dict[str, Any]]:
    """Return the lines of an output by row."""
    lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return sorted(lines, key=lambda line: line["row"])


def asked(server: Canned) -> list[str]:
    """Return the prompts that the server has got, sorted."""
    return sorted(each.body["messages"][-1]["content"] for each in server.seen)


def refusing(*texts: str, status: int = 400) -> Callable[[Seen], tuple[int, dict[str, Any]] | None]:
    """Return a function that refuses these prompts; without any, all."""

    def refuse(seen: Seen) -> tuple[int, dict[str, Any]] | None:
        if texts and seen.body["messages"][-1]["content"] not in texts:
            return None
        return status, {"error": {"message": "not this one", "type": "invalid_request_error"}}

    return refuse


def commands(ran: Ran, beginning: str) -> list[str]:
    """Return the arguments of the command in the line that begins so."""
    (line,) = [line for line in ran.lines if line.startswith(beginning)]
    program, *arguments = shlex.split(line.removeprefix(beginning))
    assert program == "fluxibly"
    return arguments


# Runs


def test_all_answered(fluxibly: CommandLine, server: Canned) -> None:
    """Each row has a line; one line says what it took; the same command again asks nothing."""
    command = ("batch", prompts("one", "two", "three"), "--out", "out.jsonl", *MODEL)
    ran = fluxibly(*command)
    assert (ran.status, ran.err) == (0, "")
    (line,) = ran.lines
    assert line.startswith("3 rows done · 33 + 15 tokens · ")
    assert line.endswith(" s")
    assert [row["text"] for row in rows_of()] == [f"You said: {text}" for text in ("one", "two", "three")]
    assert asked(server) == ["one", "three", "two"]
    ran = fluxibly(*command)
    assert (ran.status, ran.lines) == (0, ["3 rows done · nothing was left to ask"])
    assert len(server.seen) == 3


def test_settings_reach_the_service(fluxibly: CommandLine, server: Canned) -> None:
    """-s stands before each prompt that has no system message, and -o sets a parameter; a row's own wins."""
    lines = [
        {"prompt": "one", "temperature": 0.1},
        {"messages": [{"role": "system", "content": "mine"}, {"role": "user", "content": "two"}]},
    ]
    Path("in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ran = fluxibly(
        "batch",
        "in.jsonl",
        "--out",
        "out.jsonl",
        *MODEL,
        "-s",
        "Be terse.",
        "-o",
        "temperature",
        "0.7",
        "-o",
        "top_p",
        "0.5",
    )
    assert ran.status == 0
    first, second = sorted((each.body for each in server.seen), key=lambda body: body["messages"][-1]["content"])
    assert first["messages"][0] == {"role": "system", "content": "Be terse."}
    assert second["messages"][0] == {"role": "system", "content": "mine"}
    assert [body["temperature"] for body in (first, second)] == [0.1, 0.7]
    assert [body["top_p"] for body in (first, second)] == [0.5, 0.5]


def test_some_failed(fluxibly: CommandLine, server: Canned) -> None:
    """What failed is counted by class, and the line that asks it again is a command that does."""
    server.refuse = refusing("two")
    ran = fluxibly("batch", prompts("one", "two", "three"), "--out", "out.jsonl", *MODEL)
    assert ran.status == 1
    assert ran.lines[0].startswith("3 rows done, 1 failed · ")
    assert ran.lines[1:3] == ["errors: 1 BadRequest", "  BadRequest: " + rows_of()[1]["error"]["message"]]
    again = commands(ran, "ask the 1 again: ")
    assert again[-1] == "--retry-errors"
    server.refuse = None
    ran = fluxibly(*again)
    assert (ran.status, len(ran.lines)) == (0, 1)
    assert asked(server) == ["one", "three", "two", "two"]
    assert [row["text"] for row in rows_of() if row["text"]] == [
        f"You said: {text}" for text in ("one", "two", "three")
    ]


def test_all_fail_alike(fluxibly: CommandLine, server: Canned) -> None:
    """A failure that all rows share stops the batch; the command in the last lines goes on."""
    server.refuse = refusing(status=401)
    file = prompts(*map(str, range(100)))
    ran = fluxibly("batch", file, "--out", "out.jsonl", *MODEL, "--concurrency", "2", "--stop-after-errors", "5")
    assert ran.status == 75
    assert 5 <= len(server.seen) <= 7
    (count,) = [line.split()[3] for line in ran.lines if line.startswith("stopped: the first ")]
    assert f"errors: {count} AuthenticationError" in ran.lines
    (why,) = [line for line in ran.lines if line.startswith("  AuthenticationError: ")]
    assert "not this one" in why
    on = commands(ran, "go on: ")
    assert on == ["batch", file, "--out", "out.jsonl", *MODEL, "--concurrency", "2", "--stop-after-errors", "5"]
    server.refuse = None
    assert fluxibly(*on, "--retry-errors").status == 0
    assert {row["row"] for row in rows_of() if row["text"]} == set(range(100))


def test_a_second_run_tells_its_own_figures(fluxibly: CommandLine, server: Canned) -> None:
    """Rows are those of all runs; what else there is, is said to be of this run."""
    server.refuse = refusing("a", "d")
    command = ("batch", prompts(*"abcde"), "--out", "out.jsonl", *MODEL)
    fluxibly(*command, "--limit", "2")
    ran = fluxibly(*command)
    assert ran.status == 1
    assert ran.lines[0].startswith("5 rows done, 2 failed · this run: 3 asked · 22 + 10 tokens · ")
    assert ran.lines[1] == "errors of this run: 1 BadRequest"
    assert commands(ran, "ask the 2 again: ")


def test_rows_that_cannot_be_asked(fluxibly: CommandLine, server: Canned) -> None:
    """They are not offered to be asked again as they are."""
    Path("in.jsonl").write_text('{"prompt": "a"}\n{"question": 1}\n{"prompt": "b"}\n')
    ran = fluxibly("batch", "in.jsonl", "--out", "out.jsonl", *MODEL)
    assert ran.status == 1
    assert ran.lines[2].startswith("  BadPrompt: line 2: ")
    assert ran.lines[3:] == ["1 row of the input cannot be asked; mend it, then add --retry-errors"]
    prompts("a", "now", "b")
    assert fluxibly("batch", "in.jsonl", "--out", "out.jsonl", *MODEL, "--retry-errors").status == 0


def test_a_budget_below_one_row(fluxibly: CommandLine, server: Canned) -> None:
    """It is said to be too small, and no command goes on."""
    Path("stack.yaml").write_text(
        "llm: {framework: openai, model: m, middleware: [{cost: {prices: {m: [1.0, 1.0]}}}]}", encoding="utf-8"
    )
    ran = fluxibly("batch", prompts("a"), "--out", "out.jsonl", "--config", "stack.yaml", "--budget", "0.000001")
    assert ran.status == 2
    assert ran.lines[1].startswith("stopped: a single row may cost more than the whole budget")
    assert len(ran.lines) == 2
    assert server.seen == []


@pytest.mark.parametrize("kind", ["named pipe", "/dev/fd", "/dev/stdin"])
def test_pipes(kind: str, fluxibly: CommandLine, server: Canned) -> None:
    """What is no plain file is read as a stream."""
    reading, writing = os.pipe()
    kept = os.dup(0)
    path = {"named pipe": "pipe", "/dev/fd": f"/dev/fd/{reading}", "/dev/stdin": "/dev/stdin"}[kind]
    if kind == "named pipe":
        os.mkfifo(path)

    def write() -> None:
        with open(path if kind == "named pipe" else writing, "wb") as file:  # noqa: PTH123  # a descriptor
            file.write(b'{"prompt": "one"}\n{"prompt": "two"}\n')

    thread = threading.Thread(target=write)
    thread.start()
    try:
        os.dup2(reading, 0)
        ran = fluxibly("batch", path, "--out", "out.jsonl", *MODEL)
    finally:
        os.dup2(kept, 0)
        thread.join()
        for each in (kept, reading, *([writing] if kind == "named pipe" else [])):
            os.close(each)
    assert (ran.status, ran.err) == (0, "")
    assert asked(server) == ["one", "two"]


def test_the_first_rows(fluxibly: CommandLine, server: Canned) -> None:
    """--limit answers the first rows, which is a success, and says how to go on with all."""
    file = prompts(*"abcdefgh")
    ran = fluxibly("batch", file, "--out", "out.jsonl", "--limit", "3", *MODEL)
    assert ran.status == 0
    assert ran.lines[0].startswith("3 rows done · ")
    assert asked(server) == ["a", "b", "c"]
    on = commands(ran, "go on: ")
    assert "--limit" not in on
    ran = fluxibly(*on)
    assert (ran.status, len(ran.lines)) == (0, 1)
    assert asked(server) == [*"abcdefgh"]


def test_the_commands_can_be_pasted(fluxibly: CommandLine, server: Canned) -> None:
    """Names with blanks are quoted, options before the command are kept, and keys are never printed."""
    server.refuse = refusing()
    file = prompts("one", name="my prompts.jsonl")
    Path(".env").write_text("OTHER=1\n")
    extra = json.dumps({"user_key": KEY})
    options = ("--out", "an answer.jsonl", *MODEL, "-o", "extra", extra)
    ran = fluxibly("--env-file", ".env", "batch", file, *options)
    assert ran.status == 1
    assert KEY not in ran.out + ran.err
    assert "***" in ran.out
    again = commands(ran, "ask the 1 again: ")
    assert again[:5] == ["--env-file", ".env", "batch", file, "--out"]
    assert again[-4:-2] == ["-o", "extra"]


def test_the_report_as_json(fluxibly: CommandLine, server: Canned) -> None:
    """With --json, standard output is one object, and the last lines go to standard error."""
    server.refuse = refusing("two")
    ran = fluxibly("batch", prompts("one", "two"), "--out", "out.jsonl", *MODEL, "--json")
    assert ran.status == 1
    report = json.loads(ran.out)
    assert (report["answered"], report["failed"], report["errors"]) == (1, 1, {"BadRequest": 1})
    assert set(report) == set(Report.__annotations__)
    assert "ask the 1 again: " in ran.err


def test_lines_where_there_is_no_terminal(
    fluxibly: CommandLine, server: Canned, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a terminal, standard error has a line now and then; with --quiet, none."""
    monkeypatch.setattr(display, "EVERY", 0.02)
    both = threading.Barrier(2, timeout=60)

    def slowly(_: Seen) -> None:
        both.wait()
        time.sleep(1.0)  # time for lines, though the machine is busy

    server.refuse = slowly
    ran = fluxibly("batch", prompts("one", "two"), "--out", "out.jsonl", *MODEL)
    assert "2 in flight" in ran.err
    server.refuse = None
    assert ran.err.splitlines()[0].split(" · ")[0] in ("0 rows", "0 of 2 rows")
    ran = fluxibly("batch", prompts("one", "two"), "--out", "quiet.jsonl", *MODEL, "--quiet")
    assert ran.err == ""
    assert ran.lines[0].startswith("2 rows done")


def test_nothing_in_flight_is_not_waited_for(fluxibly: CommandLine, capfd: pytest.CaptureFixture[str]) -> None:
    """Once the last row has ended, it is not said that the batch waits."""
    shown = display.Display(Batch(LLM("echo:echo"), prompts("one"), "out.jsonl"), Screen())
    shown.stop()
    assert capfd.readouterr().err == "stopping; Ctrl-C again ends now\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda each: each.name)
def test_a_signal_lets_what_is_in_flight_end(fluxibly: CommandLine, server: Canned, number: int) -> None:
    """The first signal begins no more rows; those in flight get their lines, and the handlers are as they were."""
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]

    def interrupting(_: Seen) -> None:
        if len(server.seen) == 4:
            os.kill(os.getpid(), number)

    server.refuse = interrupting
    texts = [f"row {number:02}" for number in range(50)]
    ran = fluxibly("batch", prompts(*texts), "--out", "out.jsonl", *MODEL, "--concurrency", "2")
    assert ran.status == 130
    assert "stopping: waiting for " in ran.err
    assert 4 <= len(rows_of()) == len(server.seen) <= 6
    assert any(" of about 50 rows done" in line for line in ran.lines)
    server.refuse = None
    assert fluxibly(*commands(ran, "go on: ")).status == 0
    assert asked(server) == texts
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def test_a_second_signal_cancels_what_is_in_flight(fluxibly: CommandLine, server: Canned) -> None:
    """The second signal ends the batch now. What was cancelled has no line, and is asked again."""
    gate, begun = threading.Event(), threading.Barrier(3, timeout=20)

    def held(_: Seen) -> None:
        if not gate.is_set():
            begun.wait()
            gate.wait(20)

    def interrupt_twice() -> None:
        begun.wait()
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            threading.Event().wait(0.2)

    server.refuse = held
    thread = threading.Thread(target=interrupt_twice)
    thread.start()
    ran = fluxibly("batch", prompts("one", "two", "three"), "--out", "out.jsonl", *MODEL, "--concurrency", "2")
    thread.join()
    gate.set()
    assert ran.status == 130
    assert rows_of() == []
    assert fluxibly(*commands(ran, "go on: ")).status == 0
    assert len(rows_of()) == 3


def test_signals_that_the_parent_ignores(fluxibly: CommandLine, server: Canned) -> None:
    """Under nohup, SIGHUP stays ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def hang_up(_: Seen) -> None:
        os.kill(os.getpid(), signal.SIGHUP)

    server.refuse = hang_up
    try:
        assert fluxibly("batch", prompts(*"abc"), "--out", "out.jsonl", *MODEL).status == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_traces(fluxibly: CommandLine, server: Canned) -> None:
    """--trace has the span of the batch, and a trace for each call; with --one-trace all are one. `fluxibly trace` draws both."""
    file = prompts("one", "two")
    for more, traces in (((), 3), (("--one-trace",), 1)):
        name = f"{traces}.jsonl"
        assert fluxibly("batch", file, "--out", f"out{name}", *MODEL, "--trace", name, *more).status == 0
        lines = [json.loads(line) for line in Path(name).read_text(encoding="utf-8").splitlines()]
        spans = [span for line in lines for each in line["resourceSpans"][0]["scopeSpans"] for span in each["spans"]]
        assert len(spans) == 3
        assert len({span["traceId"] for span in spans}) == traces
        drawn = fluxibly("trace", name).out
        assert drawn.count("trace ") >= 1
        assert [drawn.count(text) for text in ("fluxibly.batch", "├ chat gpt-4o-mini", "└ chat gpt-4o-mini")] == [
            1,
            1,
            1,
        ]
        from opentelemetry import trace
        from opentelemetry.util._once import Once

        trace._TRACER_PROVIDER, trace._TRACER_PROVIDER_SET_ONCE = None, Once()


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "OPENAI_API_KEY"),
        (["--concurrency", "0"], "--concurrency: expected a number of calls at once, or auto, got '0'"),
        (["--concurrency", "atuo"], "did you mean 'auto'?"),
        (["--rpm", "fast"], "--rpm: expected a number a minute, such as 3000, 50k or 1M, got 'fast'"),
        (["--tpm", "0"], "--tpm: expected a number a minute"),
        (["--tpm", "-5k"], "--tpm: expected a number a minute"),
        (["--budget", "much"], "--budget: expected US dollars, such as 20 or 0.5, got 'much'"),
        (["--budget", "0"], "--budget: expected US dollars"),
        (["--budget", "inf"], "--budget: expected US dollars"),
        (["--limit", "0"], "--limit"),
        (["--stop-after-errors", "-1"], "--stop-after-errors"),
        (["--changed", "maybe"], "--changed"),
        (["--executor", "ray"], "--executor"),
        (["--then", "online"], "add --executor provider"),
        (["--column", "a", "--template", "{a}"], "expected --column or --template, got both"),
        (["--template", "@missing.txt"], "--template @missing.txt: No such file"),
        (["--one-trace"], "add --trace FILE or --otlp URL"),
        (["--trace", "missing/trace.jsonl"], "missing/trace.jsonl"),
        (["--otlp", "ftp://x"], "http"),
        (["-o", "temprature", "1"], "did you mean 'temperature'?"),
        (["-o", "temperature", "9"], "temperature"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (["--framework", "nothing", "--model", "m"], "nothing"),
        (["--out", "missing/out.jsonl"], "the folder missing does not exist"),
        (["--out", "folder"], "expected a file, got a folder"),
        (["--out", "in.jsonl"], "expected another file than the input"),
        (["--errors", "in.jsonl"], "expected another file than the input"),
        (["--errors", "out.jsonl"], "out.jsonl"),
        (["--format", "yaml"], "--format"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes(arguments: list[str], says: str, fluxibly: CommandLine, server: Canned, tmp_path: Path) -> None:
    """A mistake is told in one line before anything is sent or made."""
    if not arguments:
        fluxibly.set(OPENAI_API_KEY="", OPENAI_BASE_URL="")
    Path("folder").mkdir()
    chosen = [] if {"--config", "--framework"} & set(arguments) else MODEL
    file = prompts("one")
    before = sorted(tmp_path.iterdir())
    out = [] if "--out" in arguments else ["--out", "out.jsonl"]
    ran = fluxibly("batch", file, *out, *chosen, *arguments)
    assert (ran.status, ran.out) == (2, ""), ran.err
    assert ran.err.startswith("fluxibly: ")
    assert ran.err.count("\n") == 1
    assert says in ran.err
    assert server.seen == []
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(("name", "says"), [("missing.jsonl", "got nothing there"), ("folder", "got a folder")])
def test_no_input(name: str, says: str, fluxibly: CommandLine) -> None:
    """An input that is no file is a mistake, and leaves no output."""
    Path("folder").mkdir()
    ran = fluxibly("batch", name, "--out", "out.jsonl", *MODEL)
    assert (ran.status, ran.out) == (2, "")
    assert says in ran.err
    assert not Path("out.jsonl").exists()


def test_no_out(fluxibly: CommandLine) -> None:
    """Without --out, one line says that it is missing."""
    ran = fluxibly("batch", prompts("one"), *MODEL)
    assert (ran.status, ran.err) == (2, "fluxibly: Missing option '--out'.\n")


def test_an_output_of_something_else(fluxibly: CommandLine, server: Canned) -> None:
    """A file that is no batch's output is not touched."""
    Path("out.jsonl").write_text("my notes\n")
    ran = fluxibly("batch", prompts("one"), "--out", "out.jsonl", *MODEL)
    assert (ran.status, ran.out) == (2, "")
    assert "out.jsonl, line 1" in ran.err
    assert Path("out.jsonl").read_text() == "my notes\n"
    assert server.seen == []


# Dry runs


def fields(ran: Ran) -> dict[str, str]:
    """Return the lines of a dry run by their first word; of several with one word, the last."""
    return {line.partition(" ")[0]: line.partition(" ")[2].strip() for line in ran.lines[:-1]}


def test_a_dry_run(fluxibly: CommandLine, server: Canned) -> None:
    """It says what would be asked, and what could not be, and neither sends nor makes anything."""
    file = prompts(*["a" * 349] * 10, max_tokens=100)
    with Path(file).open("a", encoding="utf-8") as more:
        more.write('{"no": "prompt"}\n{\n\n{"prompt": ""}\n{"prompt": "x", "temperature": 99}\n' + "[]\n" * 7)
    fluxibly.set(OPENAI_BASE_URL="")  # a service on this machine has no price
    ran = fluxibly("batch", file, "--out", "out.jsonl", *MODEL, "--dry-run", "--rpm", "1")
    assert (ran.status, ran.err) == (0, "")
    found = fields(ran)
    assert found["rows"] == "10 to ask"
    assert found["input"].startswith("1.01k tokens (a guess: 3.5 bytes a token")
    assert found["output"] == "1k tokens (at most: max_tokens)"
    assert found["cost"] == "$0.00075"  # of 0.15 and 0.60 dollars a million
    assert found["time"].startswith("10 min 0 s")
    problems = [line for line in ran.lines if line.startswith("problem")]
    assert len(problems) == 5
    assert any(line.endswith(" (line 11)") and "1 row: " in line for line in problems)
    assert any(
        line.endswith(" (line 16, line 17, line 18, line 19, line 20, …)") and "7 rows: " in line for line in problems
    )
    assert ran.lines[-1] == "nothing was sent; leave out --dry-run to run it"
    assert not Path("out.jsonl").exists()
    assert server.seen == []


def test_a_dry_run_of_what_is_left(fluxibly: CommandLine, server: Canned) -> None:
    """What has a line is left out, and the answers that are there say how long the others may be."""
    server.refuse = refusing("c")
    file = prompts(*"abcdefgh")
    command = ("batch", file, "--out", "out.jsonl", *MODEL)
    fluxibly(*command, "--limit", "3")
    content = Path("out.jsonl").read_bytes()
    found = fields(fluxibly(*command, "--dry-run"))
    assert found["rows"] == "5 to ask, 3 done already"
    assert found["output"] == "25 tokens (5 a row, as in the 2 answers that are there)"
    assert found["time"].startswith("not known: no rate is given")
    assert fields(fluxibly(*command, "--dry-run", "--retry-errors"))["rows"] == "6 to ask, 2 done already"
    assert fields(fluxibly(*command, "--dry-run", "--limit", "4"))["rows"] == "1 to ask, 3 done already"
    assert Path("out.jsonl").read_bytes() == content
    assert len(server.seen) == 3


def test_a_dry_run_after_a_change(fluxibly: CommandLine, server: Canned) -> None:
    """What would be asked differently now is told, and counts as --changed says. Nothing but lines of a batch is read."""
    command = ("batch", prompts("a", "b", "c"), "--out", "out.jsonl", *MODEL)
    fluxibly(*command)
    prompts("a", "other", "c", "d")
    dry = (*command, "--dry-run")
    found = fields(fluxibly(*dry))
    assert found["rows"] == "1 to ask, 3 done already"
    assert found["changed"] == "1 row of these would be asked differently now; add --changed keep or --changed ask"
    assert fields(fluxibly(*dry, "--changed", "keep"))["rows"] == "1 to ask, 3 done already"
    assert fields(fluxibly(*dry, "--changed", "ask"))["rows"] == "2 to ask, 2 done already"
    assert fields(fluxibly(*dry, "--changed", "ask", "-s", "Be terse."))["rows"] == "4 to ask"
    assert len(server.seen) == 3
    Path("out.jsonl").write_text("my notes\n")
    assert fluxibly(*dry).status == 2


def test_a_dry_run_with_equal_rows(fluxibly: CommandLine, server: Canned) -> None:
    """With --dedupe, rows that equal another one, or one that is answered, are not asked."""
    command = ("batch", prompts("a", "b", "a", "c", "c"), "--out", "out.jsonl", *MODEL, "--dedupe")
    assert fields(fluxibly(*command, "--dry-run"))["rows"] == "3 to ask, 2 get the answer of another"
    fluxibly(*command, "--limit", "1")
    found = fields(fluxibly(*command, "--dry-run"))
    assert found["rows"] == "2 to ask, 2 get the answer of another, 1 done already"
    assert len(server.seen) == 1


def test_a_dry_run_without_prices(fluxibly: CommandLine) -> None:
    """A price that is not known is said to be so; it is never 0. The figures are also there as JSON."""
    command = ("batch", prompts("one", "two"), "--out", "out.jsonl", "-m", "openai:my-own-model", "--dry-run")
    assert fields(fluxibly(*command))["cost"] == "not known, as is the price of my-own-model"
    found = json.loads(fluxibly(*command, "--json").out)
    assert (found["rows"], found["cost"], found["unpriced"]) == (2, None, ["my-own-model"])


def test_a_dry_run_at_the_rates_of_a_stack(fluxibly: CommandLine, yaml: Path) -> None:
    """The rates of the configuration count; --rpm takes the place of theirs."""
    yaml.write_text(
        "llm: {framework: openai, model: gpt-4o-mini, middleware: [{rate_limit: {requests: 10, per: 1, tokens: 100}}]}"
    )
    command = ("batch", prompts(*["x"] * 100, max_tokens=99), "--out", "o.jsonl", "--config", str(yaml), "--dry-run")
    assert fields(fluxibly(*command))["time"].startswith("1 min 40 s")
    assert fields(fluxibly(*command, "--rpm", "2"))["time"].startswith("50 min 0 s")


# Words


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (999.6, "1k"), (1234, "1.23k"), (300_000, "300k"), (999_999, "1M"), (1_250_000, "1.25M")],
)
def test_short_numbers(number: float, text: str) -> None:
    assert short(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (59.97, "1 min 0 s"), (192, "3 min 12 s"), (60_000, "16 h 40 min"), (200_000, "2 days 7 h")],
)
def test_times(seconds: float, text: str) -> None:
    assert lasting(seconds) == text


def test_errors_by_class() -> None:
    """The most frequent come first, and those beyond the fourth are summed."""
    errors = {"A": 1, "B": 5000, "C": 2, "D": 2, "E": 1, "F": 1}
    assert by_class(errors) == "5,000 B, 2 C, 2 D, 1 A, 2 others"


class Input:
    def __init__(self, size: int | None, position: int) -> None:
        self.size, self.position = size, position


@pytest.mark.parametrize(
    ("source", "limit", "total"),
    [
        (Input(1000, 1000), None, (50, True)),
        (Input(1000, 500), None, (100, False)),
        (Input(98765, 50), None, (98_800, False)),
        (Input(1000, 500), 70, (70, False)),
        (Input(1000, 500), 50, (50, True)),
        (Input(1000, 500), 40, (40, True)),
        (Input(1000, 1000), 70, (50, True)),
        (Input(1000, 0), None, (None, False)),
        (Input(None, 500), None, (None, False)),
        (Input(None, 500), 70, (70, False)),
    ],
)
def test_the_number_of_rows(source: Input, limit: int | None, total: tuple[int | None, bool]) -> None:
    """The rows in all follow from the bytes that were read, until all are. Here 50 rows were read."""
    assert total_of(source, 50, limit) == total


def test_arguments() -> None:
    """Options are taken out with their values, and added before a --; addresses lose their keys."""
    assert without(["batch", "--limit", "3", "x", "--limit=4", "--limited"], "--limit") == ["batch", "x", "--limited"]
    assert with_option(["batch", "--", "x"], "--retry-errors") == ["batch", "--retry-errors", "--", "x"]
    assert (
        without_secrets("https://me:pass@x.test:1/v1?api_key=other&b=1") == "https://me:***@x.test:1/v1?api_key=***&b=1"
    )
    assert without_secrets("What is at https://[x?") == "What is at https://[x?"
    assert with_option(["--retry-errors", "x"], "--retry-errors") == ["--retry-errors", "x"]
