"""The log of chats: what is kept of a turn, what is not, and what happens if the file cannot be used."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from rich.cells import cell_len
from support.readme import blocks_of

from fluxibly.cli.commands import run
from fluxibly.cli.screen import Screen
from fluxibly.cli.trace import file as trace_file
from fluxibly.cli.turns import Conversation, TurnLog, last_conversation, new_conversation, store as turn_store
from fluxibly.cli.turns.report import as_jsonl, blocks, rows
from fluxibly.cli.turns.store import Turn, TurnStore
from fluxibly.config import LLMConfig
from fluxibly.errors import ConfigError, RateLimitError
from fluxibly.types import Document, Image, Message, Opaque, Reasoning, Response, Text, ToolCall, Usage

ROOT = Path(__file__).parents[2]
START = "from fluxibly.cli import main; main()"
ECHO = LLMConfig(framework="echo", model="echo")
KEY = "sk-proj-" + "Ab1" * 10
"""It looks like a key."""
SECRET = "correct horse battery"  # noqa: S105  # what the tests look for
"""It does not look like a key."""


class Listening(Screen):
    """The output of a chat at a terminal, which remembers what goes to standard error."""

    def __init__(self) -> None:
        super().__init__()
        self.live = True
        self.said: list[str] = []

    def aside(self, text: str, style: str = "") -> None:
        self.said.append(text)


@pytest.fixture
def screen() -> Listening:
    """Return the output of a chat at a terminal."""
    return Listening()


@pytest.fixture
def log(screen: Listening) -> TurnLog:
    """Return the log of a chat, after its first line."""
    log = opened(screen)
    screen.said.clear()
    return log


@pytest.fixture
def kept() -> TurnStore:
    """Return the file of turns, which must not be damaged."""
    return TurnStore(pytest.fail)


def opened(screen: Screen, **options: Any) -> TurnLog:
    log = TurnLog.open(screen, **options)
    assert log is not None
    return log


def add(log: TurnLog, question: str = "why?", answer: str = "because", **options: Any) -> int:
    """Keep a turn of a conversation of its own, unless another is given."""
    options = {"conversation": new_conversation(), "response": Response(answer), **options}
    number = log.add(ECHO, [*options.pop("before", []), Message.user(question)], **options)
    assert number is not None
    return number


def the_turn(kept: TurnStore) -> Turn:
    turn = kept.turn(None)
    assert turn is not None
    return turn


def command(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run a command in this process, with its output in pipes."""
    capfd.readouterr()
    status = run(arguments)
    return (status, *capfd.readouterr())


def fluxibly(*arguments: str, before: str = "", given: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own, with its output in pipes."""
    return subprocess.run(
        [sys.executable, "-c", f"{before}\n{START}", *arguments],
        input=given,
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=100,
        check=False,
    )


def at_terminal(*arguments: str, keys: bytes = b"") -> str:
    """Run a command at a terminal of 80 columns, and return all that it shows."""
    pty = pytest.importorskip("pty")
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", START, *arguments],
        stdin=child,
        stdout=child,
        stderr=child,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80", "TERM": "xterm"},
        start_new_session=True,
    )
    os.close(child)
    os.write(parent, keys)
    shown = b""
    try:
        while more := os.read(parent, 4096):
            shown += more
    except OSError:  # raised by Linux when the other side has closed
        pass
    os.close(parent)
    process.wait(60)
    return shown.decode()


class TestWhatIsKept:
    raws = st.none() | st.dictionaries(st.sampled_from(["a", "b"]), st.integers() | st.text(max_size=3), min_size=1)
    words = st.text(min_size=1, max_size=5)
    strings = st.text(st.characters(codec=None), min_size=1, max_size=5)
    """Also with halves of surrogate pairs, as a service may send them."""
    answers = st.lists(
        st.one_of(
            st.builds(Text, strings, raw=raws),
            st.builds(Reasoning, text=words, signature=st.none() | words, raw=raws),
            st.builds(ToolCall, words, words, st.dictionaries(words, st.integers()), signature=st.none() | words),
            st.builds(Image, data=st.binary(max_size=9), media_type=st.just("image/png")),
            st.builds(Opaque, st.just("anthropic"), st.just({"type": "thing", "list": [1, None]})),
        ),
        max_size=5,
    )
    questions = st.lists(
        st.one_of(
            st.builds(Message.system, words),
            st.builds(Message.user, strings),
            st.builds(lambda data: Message.user(["see", Document(data=data, media_type="text/plain")]), st.binary()),
            st.builds(Message.assistant, answers),
            st.builds(lambda text: Message.tool(text, "c1", name="f"), words),
        ),
        min_size=1,
        max_size=5,
    )

    @settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(questions, answers)
    def test_is_what_went_in(self, messages, parts):
        """Messages and the response come out of the file and of an export as they went in."""
        response = Response.from_parts(parts, usage=Usage(input_tokens=3), finish_reason="stop", model="m")
        assert opened(Screen(), wanted=True).add(ECHO, messages, conversation="c", response=response, elapsed=1.5)
        turn = the_turn(TurnStore(pytest.fail))
        exported = json.loads(as_jsonl(turn))
        conversation = last_conversation(Screen())
        assert [Message.from_dict(message) for message in exported["messages"]] == messages
        assert Response.from_dict(exported["response"]) == response
        assert (exported["elapsed"], exported["conversation"], exported["error"]) == (1.5, "c", None)
        assert conversation is not None
        assert conversation.messages == (*messages, response.message)

    def test_each_message_is_kept_once(self, log, kept, log_path):
        """A conversation of many turns takes no more room than its messages, though each turn sends all before it."""
        history = [Message.system("be brief")]
        for number in range(20):
            history.append(Message.user(f"question {number}"))
            log.add(ECHO, history, conversation="c", response=Response(f"answer {number}"))
            history.append(Message.assistant(f"answer {number}"))
        with closing(sqlite3.connect(log_path)) as db:
            assert db.execute("SELECT count(*) FROM messages").fetchone() == (len(history) - 1,)
        assert [Message.from_dict(each) for each in the_turn(kept).messages] == history[:-1]

    def test_a_failed_turn(self, log, kept):
        """A turn that failed has the error, without a second line, and what had come of the answer."""
        add(log, answer="half an", error=RateLimitError("slow\ndown"))
        turn = the_turn(kept)
        assert (turn.error_type, turn.error, turn.answer) == ("RateLimitError", "slow down", "half an")

    def test_a_response_that_is_not_json(self, log, kept, screen):
        """A turn that cannot be kept is reported once, and the chat goes on."""
        for _ in range(2):
            assert (
                log.add(ECHO, [Message.user("x")], conversation="c", response=Response(details={"": object()})) is None
            )
        assert screen.said == ["fluxibly: the turn is not logged: TypeError"]
        assert kept.turns() == []

    def test_spans_are_drawn(self, log, kept, tmp_path, capfd):
        """The spans of a turn come out of an export as fluxibly trace reads them."""
        add(log, "without spans")
        add(log, spans=spans_of("chat m", {"gen_ai.request.model": "m"}))
        file = tmp_path / "spans.jsonl"
        assert command(capfd, "logs", "export", "--trace", str(file)) == (0, "", "")
        [span] = trace_file.read(file).roots
        assert (span.name, span.attributes) == ("chat m", {"gen_ai.request.model": "m"})

    @pytest.mark.parametrize("as_url", [False, True])
    def test_large_media_are_not_kept(self, log, log_path, as_url):
        """In place of large media there is a text that says what they were, and the conversation can go on."""
        data = os.urandom(1_500_000)
        url = f"data:image/png;base64,{b64encode(data).decode()}"
        image = Image(url=url) if as_url else Image(data=data, media_type="image/png")
        log.add(ECHO, [Message.user(["what is", image])], conversation="c", response=Response("a cat"))
        assert log_path.stat().st_size < 200_000
        conversation = last_conversation(Screen())
        assert conversation is not None
        question = conversation.messages[0].text
        assert question.startswith("what is[image/png, 1500000 bytes, sha256 ")

    def test_large_content_in_fields_of_a_service(self, log, log_path):
        """Large base64 in an opaque part is not kept either."""
        part = Opaque("openai", {"type": "image_generation_call", "result": b64encode(os.urandom(2_000_000)).decode()})
        log.add(ECHO, [Message.user("draw")], conversation="c", response=Response.from_parts([part]))
        assert log_path.stat().st_size < 200_000


def spans_of(name: str, attributes: dict[str, str]) -> Sequence[Any]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    provider.get_tracer("t").start_span(name, attributes=attributes).end()
    return exporter.get_finished_spans()


class TestKeys:
    @pytest.mark.parametrize(
        "case",
        [
            ({"api_key": SECRET}, {}),
            ({"headers": {"X-Api-Key": SECRET}}, {}),
            ({"headers": {"Authorization": f"Bearer {SECRET}"}}, {}),
            ({"api_base": f"https://me:{SECRET.replace(' ', '-')}@x.test"}, {}),
            ({}, {"ANTHROPIC_API_KEY": SECRET}),
            ({}, {"AWS_SECRET_ACCESS_KEY": SECRET}),
            ({}, {}),
        ],
        ids=["key", "header", "scheme", "login", "variable", "AWS", "pattern"],
    )
    def test_are_not_in_the_file(self, log, kept, monkeypatch, case):
        """A key is masked wherever it stands: in messages, tools, answers, spans, errors and documents."""
        config, variables = case
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        key = KEY if not config and not variables else SECRET
        if "api_base" in config:
            key = SECRET.replace(" ", "-")
        text = f"use {key}, or {key!r}"
        call = ToolCall("c1", "f", {"key": text, text: [text]})
        messages = [
            Message.system(text),
            Message.user([text, Document(data=text.encode(), media_type="text/plain", name=text)]),
            Message.assistant(text, tool_calls=[call]),
            Message.tool(text, call),
            Message.user(["see", Document(url=f"data:text/plain;base64,{b64encode(text.encode()).decode()}")]),
        ]
        response = Response.from_parts(
            [Reasoning(text=text), Text(text, raw={"note": text}), call], details={"d": text}
        )
        settings = LLMConfig(framework="echo", model=f"m {text}", **config)
        spans = spans_of(f"chat {text}", {"gen_ai.input.messages": json.dumps([text])})
        log.add(settings, messages, conversation="c", response=response, error=ValueError(text), spans=spans)
        content = kept.path.read_bytes()
        assert b"***" in content
        for form in (key, b64encode(text.encode()).decode()):
            assert form.encode() not in content
        assert b64encode(b"use ***, or '***'").decode() in json.dumps(the_turn(kept).messages)

    def test_words_are_kept(self, log, kept):
        """What only resembles a key is kept, such as words with hyphens."""
        add(log, text := "sk-learn is a task-oriented-library-of-python at 1f0e8a3b9c")
        assert the_turn(kept).prompt == text


class TestContinue:
    def test_goes_on_with_the_last_answer(self, log):
        """The last conversation is that of the last answer: with the system message, and with the calls of tools."""
        call = ToolCall("c1", "f", {"x": 1})
        added = (Message.assistant(tool_calls=[call]), Message.tool("2", call))
        before = [Message.system("be brief")]
        add(log, "old")
        add(log, "new", before=before, conversation="c", response=Response("done", added=added))
        add(log, "failed", conversation="d", response=None, error=RateLimitError("no"))
        add(log, "stopped", conversation="e", response=Response("hal"), error=KeyboardInterrupt())
        found = last_conversation(Screen())
        assert found == Conversation(
            id="c",
            framework="echo",
            model="echo",
            config_file=None,
            messages=(*before, Message.user("new"), *added, Message.assistant("done")),
        )

    def test_a_stopped_answer_can_belong_to_it(self, log):
        """An answer that was stopped belongs to the conversation if the chat says so."""
        add(log, answer="hal", error=KeyboardInterrupt(), goes_on=True)
        found = last_conversation(Screen())
        assert found is not None
        assert found.messages[-1] == Message.assistant("hal")

    def test_nothing_to_go_on_with(self, capfd):
        """Without a conversation, --continue is a mistake, and makes no file."""
        result = command(capfd, "chat", "--continue", "and?")
        assert result == (2, "", "fluxibly: --continue: there is no conversation to go on with\n")

    def test_of_the_command(self, kept):
        """Chat -c sends the earlier messages, to the same model; a message system in the first is still there."""
        assert fluxibly("chat", "--log", "--framework", "echo", "--system", "be brief", "one").returncode == 0
        assert fluxibly("chat", "--log", "-c", "two").stdout == "two\n"
        first, second = kept.whole_turns()
        assert first.conversation == second.conversation
        said = [(message["role"], message["content"]) for message in second.messages]
        assert said == [("system", "be brief"), ("user", "one"), ("assistant", "one"), ("user", "two")]
        assert trace_of(first) != trace_of(second)

    def test_the_settings(self, tmp_path):
        """A conversation goes on with its own configuration, so that it does not reach another service."""
        file = tmp_path / "mine.yaml"
        file.touch()
        ours = Conversation(id="c", framework="openai", model="m", config_file=file, messages=())
        other = tmp_path / "other.yaml"
        assert ours.settings(None, None, None) == (file, "openai", "m")
        assert ours.settings(None, None, "n") == (file, "openai", "n")
        assert ours.settings(None, "echo", None) == (None, "echo", None)
        assert ours.settings(other, None, None) == (other, None, None)
        file.unlink()
        with pytest.raises(ConfigError, match="is gone; give --config"):
            ours.settings(None, None, None)


def trace_of(turn: Turn) -> str:
    assert turn.spans is not None
    return str(json.loads(turn.spans)["resourceSpans"][0]["scopeSpans"][0]["spans"][0]["traceId"])


class TestWhetherTurnsAreKept:
    def test_at_a_terminal(self, kept, log_path):
        """At a terminal turns are kept, and the first time a line says where, and how to turn it off."""
        chat = ("chat", "--framework", "echo", "hello")
        shown = " ".join(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", at_terminal(*chat)).split())  # it may be wrapped
        assert f"Logged in {log_path} (off: --no-log, fluxibly logs off)" in shown
        assert "Logged in" not in at_terminal(*chat)
        assert [turn.prompt for turn in kept.turns()] == ["hello", "hello"]

    def test_in_a_pipe(self, kept, log_path):
        """Without a terminal nothing is kept, and nothing is written, unless --log asks for it."""
        assert fluxibly("chat", "--framework", "echo", "one").stderr == ""
        assert not log_path.parent.exists()
        assert fluxibly("chat", "--framework", "echo", "--log", "two").stdout == "two\n"
        assert [turn.prompt for turn in kept.turns()] == ["two"]

    def test_off_and_on(self, screen, capfd):
        """Logs off turns it off until logs on, but not for --log; --no-log always counts."""
        assert command(capfd, "logs", "off")[0] == 0
        assert TurnLog.open(screen) is None
        assert TurnLog.open(screen, wanted=True) is not None
        assert "off" in command(capfd, "logs", "status")[1]
        assert command(capfd, "logs", "on")[0] == 0
        assert TurnLog.open(screen) is not None
        assert TurnLog.open(screen, wanted=False) is None

    def test_no_platformdirs(self, screen, monkeypatch):
        """Without platformdirs, the chat goes on, and a line says what to install."""
        monkeypatch.setitem(sys.modules, "platformdirs", None)
        assert TurnLog.open(screen) is None
        [said] = screen.said
        assert said.startswith("fluxibly: this chat is not logged: the log needs packages")


def execute(path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute(statement)
        db.commit()


def replaced_by_another(path: Path) -> None:
    path.unlink()
    execute(path, "CREATE TABLE t (x)")


BROKEN: dict[str, Callable[[Path], object]] = {
    "garbage": lambda path: path.write_bytes(b"this is no database " * 1000),
    "header": lambda path: path.write_bytes(b"SQLite format 3\0" + b"\xff" * 5000),
    "middle": lambda path: path.write_bytes(path.read_bytes()[:4096] + b"\xff" * 60_000),
    "cut": lambda path: os.truncate(path, 5000),
    "another program's": replaced_by_another,
    "another schema": lambda path: execute(path, "DROP TABLE turns"),
}


class TestTheFile:
    def test_is_for_its_owner_alone(self, screen, log_path):
        """Only the owner may read the file, its folder and its journal, whatever the umask, and whoever made them."""
        before = os.umask(0)
        try:
            log_path.parent.mkdir(parents=True, mode=0o755)
            log_path.touch(0o644)
            log = opened(screen)
            with closing(sqlite3.connect(log_path, isolation_level=None)) as db:
                db.execute("BEGIN IMMEDIATE")
                db.execute("INSERT INTO messages (chain, body) VALUES ('', '')")
                modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in log_path.parent.iterdir()}
                db.execute("ROLLBACK")
        finally:
            os.umask(before)
        assert modes == {"logs.db": 0o600, "logs.db-journal": 0o600}
        assert stat.S_IMODE(log_path.parent.stat().st_mode) == 0o700
        add(log)

    def test_two_chats_write_at_once(self, kept):
        """Two processes write at once, and every turn is there."""
        code = """if True:
            from fluxibly.cli.screen import Screen
            from fluxibly.cli.turns import TurnLog, new_conversation
            from fluxibly import LLMConfig, Message, Response
            log = TurnLog.open(Screen(), wanted=True)
            for number in range(25):
                log.add(LLMConfig(framework="echo", model="echo"), [Message.user(f"q {number}")], conversation="c",
                    response=Response("yes"))
        """
        writers = [
            subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}) for _ in "12"
        ]
        assert [writer.wait(60) for writer in writers] == [0, 0]
        assert sorted(turn.prompt for turn in kept.turns()) == sorted([f"q {n}" for n in range(25)] * 2)
        assert len(kept.search(["q"])) == 50

    def test_a_killed_chat(self, screen, kept):
        """After kill -9 in the middle of a write, what was written is there, and the next turn is written."""
        code = """if True:
            from fluxibly.cli.screen import Screen
            from fluxibly.cli.turns import TurnLog
            from fluxibly import LLMConfig, Message, Response
            log = TurnLog.open(Screen(), wanted=True)
            number = 0
            while True:
                number += 1
                log.add(LLMConfig(framework="echo", model="echo"), [Message.user(f"{number} " + "word " * 50_000)],
                    conversation="c", response=Response("yes " * 50_000))
                print(number, flush=True)
        """
        written = 0
        for pause in (0.0, 0.013):
            with subprocess.Popen(
                [sys.executable, "-c", code],
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                text=True,
            ) as writer:
                assert writer.stdout is not None
                writer.stdout.readline()
                time.sleep(pause)
                writer.send_signal(signal.SIGKILL)
                written += 1 + len(writer.stdout.readlines())
            turns = list(kept.whole_turns())
            assert len(turns) in (written, written + 1)  # killed after the write, before it was told
            written = len(turns)
            assert all(Response.from_dict(turn.response or {}).text == "yes " * 50_000 for turn in turns)
        add(opened(screen), "after")
        assert the_turn(kept).prompt == "after"

    @pytest.mark.parametrize("damage", BROKEN.values(), ids=BROKEN)
    def test_a_broken_file_is_set_aside(self, screen, log_path, kept, damage):
        """A broken file is set aside with a line, as it is, and the turn is written to a new one."""
        log = opened(screen)
        for number in range(20):
            add(log, f"lost {number}", "word " * 500)
        damage(log_path)
        broken = log_path.read_bytes()
        screen.said.clear()
        add(log, "kept")
        add(log, "kept too")
        assert [turn.prompt for turn in kept.turns()] == ["kept", "kept too"]
        [aside] = kept.broken()
        assert aside.read_bytes() == broken
        [said] = screen.said
        assert said.endswith(f"; it is now {aside.name}, and a new log begins")

    def test_a_broken_file_is_read(self, screen, log_path, capfd):
        """The commands and --continue set a broken file aside, too."""
        log_path.parent.mkdir(parents=True)
        for arguments in (("logs",), ("logs", "search", "x"), ("logs", "export", "--jsonl", "-")):
            log_path.write_bytes(b"garbage " * 999)
            status, out, err = command(capfd, *arguments)
            assert (status, out, err.count("\n")) == (0, "", 1)
            assert "is damaged; it is now logs.db.broken-" in err
        log_path.write_bytes(b"garbage " * 999)
        assert last_conversation(screen) is None

    def test_an_empty_file(self, log_path, log, kept):
        """A file that was emptied is filled again."""
        os.truncate(log_path, 0)
        add(log)
        assert len(kept.turns()) == 1
        assert kept.broken() == []

    def test_a_deleted_folder(self, log_path, log, kept):
        """A folder that was deleted is made again."""
        log_path.unlink()
        log_path.parent.rmdir()
        add(log)
        assert len(kept.turns()) == 1

    def test_a_newer_file(self, screen, log_path, capfd):
        """A file of a newer fluxibly is left as it is, and nothing is logged."""
        add(opened(screen))
        execute(log_path, f"PRAGMA user_version = {turn_store.VERSION + 1}")
        before = log_path.read_bytes()
        screen.said.clear()
        assert TurnLog.open(screen) is None
        assert screen.said == [f"fluxibly: this chat is not logged: a newer fluxibly has written {log_path}"]
        assert log_path.read_bytes() == before
        status, _, err = command(capfd, "logs")
        assert (status, err) == (1, f"fluxibly: a newer fluxibly has written {log_path}\n")

    def test_a_locked_file(self, log, log_path, kept, screen, monkeypatch):
        """While another program locks the file, turns are not kept, which is said once; after that they are."""
        monkeypatch.setattr(turn_store, "BUSY", 0.05)
        with closing(sqlite3.connect(log_path, isolation_level=None)) as db:
            db.execute("BEGIN EXCLUSIVE")
            for _ in range(2):
                assert log.add(ECHO, [Message.user("x")], conversation="c") is None
        assert screen.said == ["fluxibly: the turn is not logged: database is locked"]
        add(log)
        assert len(kept.turns()) == 1

    @pytest.mark.skipif(sys.platform != "linux", reason="/proc is a folder in which nobody can write")
    def test_a_folder_that_cannot_be_written(self, screen, monkeypatch):
        """Where nothing can be written, the chat goes on with a line."""
        monkeypatch.setenv("XDG_DATA_HOME", "/proc")
        assert TurnLog.open(screen) is None
        [said] = screen.said
        assert said.startswith("fluxibly: this chat is not logged: /proc/fluxibly: ")
        assert last_conversation(screen) is None

    @pytest.mark.skipif(not hasattr(os, "geteuid"), reason="there are no permissions")
    def test_a_folder_that_may_not_be_written(self, log, log_path):
        """In a folder that is only readable, the log is read, and not written."""
        add(log, "there before")
        result = as_nobody(log_path, "chat", "--framework", "echo", "--log", "hi")
        assert (result.returncode, result.stdout) == (0, "hi\n")
        assert "not logged" in result.stderr
        assert "there before" in as_nobody(log_path, "logs", "search", "there").stdout

    def test_a_full_disk(self, log, kept, log_path):
        """On a full disk, the turn is not kept, and those before it are."""
        add(log, "before")
        limit = log_path.stat().st_size + 8192
        before = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
        result = fluxibly("chat", "--framework", "echo", "--log", "-", before=before, given="long " * 20_000)
        assert (result.returncode, len(result.stdout)) == (0, 100_001)
        assert result.stderr.startswith("fluxibly: the turn is not logged: ")
        assert result.stderr.count("\n") == 1
        assert [turn.prompt for turn in kept.turns()] == ["before"]
        add(log, "after")


NO_CAPABILITIES = """
import ctypes
ctypes.CDLL(None).capset(ctypes.byref((ctypes.c_uint32 * 2)(0x20080522, 0)), ctypes.byref((ctypes.c_uint32 * 6)()))
"""


def as_nobody(log_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a user who may read the log, but not write it: as root, without root's privileges over files."""
    log_path.chmod(0o444)
    log_path.parent.chmod(0o555)
    before = ""
    if os.geteuid() == 0:
        # The capabilities by which root passes over permissions (capabilities(7)) are dropped.
        before = NO_CAPABILITIES
    try:
        return fluxibly(*arguments, before=before)
    finally:
        log_path.parent.chmod(0o700)
        log_path.chmod(0o600)


class TestSearch:
    @pytest.mark.parametrize(
        "words",
        [
            '"',
            "*",
            "NEAR(",
            "-x",
            "AND",
            'a"b',
            "(",
            ":",
            "^",
            "%",
            "_",
            "\\",
            "a OR",
            "col:x",
            "'",
            "日本",
            "naïve",
            "Straße",
        ],
    )
    @pytest.mark.parametrize("full_text", [True, False])
    def test_no_word_is_an_operator(self, log, kept, monkeypatch, words, full_text):
        """Whatever a word is made of, the turns that have it are found, and no others."""
        monkeypatch.setattr(turn_store, "has_full_text", lambda db: full_text)
        found = add(log, f"before {words} after これは日本語です")
        add(log, "something else, before, after, without signs")
        assert [turn.id for turn in kept.search([words])] == [found]
        assert [turn.id for turn in kept.search(["after", words])] == [found]

    def test_all_words_must_be_there(self, log, kept):
        """All words must be in the question or the answer; a word may be the beginning of one, in any case."""
        found = add(log, "What is the Capital of France?", "It is Paris.")
        add(log, "What is the capital of Spain?", "It is Madrid.")
        assert [turn.id for turn in kept.search(["capi", "PARIS"])] == [found]
        assert len(kept.search(["capital of"])) == 2
        assert len(kept.search(["capital"], 1)) == 1
        assert kept.search(["madrid", "paris"]) == []

    def test_turns_without_an_index(self, log, kept, monkeypatch):
        """Turns that were written by an SQLite without full-text search are found by another."""
        with monkeypatch.context() as patch:
            patch.setattr(turn_store, "has_full_text", lambda db: False)
            found = add(log, "the naïve approach")
        assert [turn.id for turn in kept.search(["naive"])] == [found]
        again = add(log, "another naïve approach")
        assert [turn.id for turn in kept.search(["naive"])] == [found, again]

    def test_ten_thousand_turns(self, log, kept, log_path):
        """A log of 10,000 turns is listed and searched at once."""
        add(log, "the needle")
        with closing(sqlite3.connect(log_path)) as db:
            names = "conversation, time, framework, model, message, goes_on"
            numbers = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 10000)"
            texts = "'question ' || i, 'some words of the answer ' || i"
            db.execute(f"INSERT INTO turns ({names}, prompt, answer) {numbers} SELECT {names}, {texts} FROM turns, n")  # noqa: S608
            db.commit()
        assert len(kept.search(["question", "9999"])) == 1  # makes the index
        began = time.perf_counter()
        assert [turn.prompt for turn in kept.search(["needle"])] == ["the needle"]
        assert len(kept.search(["words", "answer"], 10)) == 10
        assert [turn.id for turn in kept.turns(2)] == [10_000, 10_001]
        assert kept.count() == 10_001
        assert time.perf_counter() - began < 2


class TestCommands:
    HOSTILE = "\x1b[31mred\x1b]0;title\x07\x9b2J\x00\u202eback\rover\n"

    def test_the_list_in_80_columns(self, log, kept):
        """At a terminal, each turn has two lines of at most 80 columns, in which nothing controls the terminal."""
        model = LLMConfig(framework="echo", model="a-model-with-a-very-long-name-" * 4)
        usage = Usage(input_tokens=123456, output_tokens=654321)
        for question, answer in [
            ("short", "short"),
            ("long " * 99, "long " * 99),
            ("日本語" * 99, "x"),
            (self.HOSTILE, "y"),
        ]:
            messages = [Message.user(question)]
            log.add(model, messages, conversation="c", response=Response(answer, usage=usage, elapsed=86399.0))
        log.add(ECHO, [Message.user("why?")], conversation="c", error=RateLimitError(self.HOSTILE * 9))
        lines = [line.plain for line in blocks(kept.turns(), 80)]
        assert len(lines) == 10
        assert all(cell_len(line) <= 80 for line in lines)
        assert not set("\x1b\x07\x9b\x00\u202e\r\n").intersection("".join(lines))
        assert "123456 → 654321" in lines[0]
        assert lines[1].split() == ["short", "→", "short"]
        assert "RateLimitError: [31mred" in lines[9]

    def test_the_list_in_a_pipe(self, log, capfd):
        """In a pipe, each turn is a line of fields with tabs between them, the newest last."""
        add(log, "one\ttwo\nthree", "answer", response=Response("answer", usage=Usage(input_tokens=3), elapsed=1.5))
        add(log, "next")
        status, out, err = command(capfd, "logs")
        first, second = [line.split("\t") for line in out.splitlines()]
        assert (status, err) == (0, "")
        assert first[0] == "1"
        assert first[2:] == ["echo", "3", "", "1.500", "one two three", "answer"]
        assert second[0] == "2"
        assert command(capfd, "logs", "-n", "1")[1].startswith("2\t")
        assert len(list(rows([]))) == 0

    def test_show(self, log, capfd):
        """Show has all of a turn: the figures, the messages, reasoning, tools, and the answer. No character is an order."""
        call = ToolCall("c1", "look", {"where": "here"})
        response = Response.from_parts(
            [Reasoning(text="let me see"), Text(f"it is {self.HOSTILE}"), call],
            usage=Usage(input_tokens=3, output_tokens=4),
            added=(Message.assistant(tool_calls=[call]), Message.tool("found", call)),
            model="echo-2",
            elapsed=2.5,
        )
        image = Image(data=b"1234", media_type="image/png")
        before = [Message.system("be brief"), Message.user([self.HOSTILE, image])]
        add(log, "what?", before=before, response=response)
        status, out, _ = command(capfd, "logs", "show")
        assert status == 0
        for part in (
            "# Turn 1",
            "- answered by: echo-2",
            "- tokens: input 3, output 4",
            "- duration: 2.50 s",
            "## system\n\nbe brief",
            "[image/png, 4 bytes]",
            "## user\n\nwhat?",
            '- calls look: {"where": "here"}',
            "## tool look\n\nfound",
            "## answer\n\n> let me see",
        ):
            assert part in out
        assert not set("\x1b\x07\x9b\x00\u202e\r").intersection(out)
        assert command(capfd, "logs", "show", "1")[1] == out
        assert command(capfd, "logs", "show", "7") == (
            2,
            "",
            "fluxibly: there is no turn 7; `fluxibly logs` lists them\n",
        )

    def test_export(self, log, kept, capfd, tmp_path):
        """Export writes whole turns to a file for its owner alone, and overwrites none without --force."""
        for number in range(3):
            add(log, f"question {number}")
        file = tmp_path / "turns.jsonl"
        assert command(capfd, "logs", "export", "--jsonl", str(file)) == (0, "", "")
        assert file.read_text("utf-8") == "".join([as_jsonl(turn) + "\n" for turn in kept.whole_turns()])
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert (
            command(capfd, "logs", "export", "-n", "1", "--jsonl", "-")[1]
            == file.read_text("utf-8").splitlines(True)[2]
        )
        status, _, err = command(capfd, "logs", "export", "--jsonl", str(file))
        assert (status, err) == (2, f"fluxibly: {file} exists; --force overwrites it\n")
        assert command(capfd, "logs", "export", "-n", "1", "--force", "--jsonl", str(file))[0] == 0
        assert file.read_text("utf-8").count("\n") == 1
        assert [each.name for each in tmp_path.iterdir()] == ["turns.jsonl"]

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            ((), "expected --jsonl FILE or --trace FILE, got neither"),
            (("--jsonl", "-", "--trace", "-"), "expected two files"),
            (("--jsonl", "/nowhere/at/all"), "cannot write /nowhere/at/all: No such file or directory"),
            (("--jsonl", "-", "-n", "0"), "'--count'"),
        ],
    )
    def test_mistakes_of_export(self, log, capfd, arguments, says):
        """A wrong option is a mistake of the user's, in one line."""
        add(log)
        status, out, err = command(capfd, "logs", "export", *arguments)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert says in err

    def test_purge(self, log, kept, capfd, log_path):
        """Purge leaves nothing of the turns on the disk, nor of files that were set aside. Ids are not used again."""
        log_path.with_name("logs.db.broken-20200101-000000").write_text("wombat")
        add(log, "the wombat")
        add(log, "another wombat")
        status, _, err = command(capfd, "logs", "purge")
        assert (status, len(kept.turns())) == (2, 2)
        assert "--yes deletes all turns without asking" in err
        assert command(capfd, "logs", "purge", "--yes")[0] == 0
        assert kept.turns() == []
        assert b"wombat" not in b"".join([file.read_bytes() for file in log_path.parent.iterdir()])
        assert add(log, "next") == 3

    @pytest.mark.parametrize(("keys", "left"), [(b"n\n", 1), (b"y\n", 0)])
    def test_purge_asks(self, log, kept, keys, left):
        """At a terminal, purge asks first."""
        add(log)
        assert "Delete 1 turn in " in at_terminal("logs", "purge", keys=keys)
        assert len(kept.turns()) == left

    def test_nothing_is_there(self, capfd, log_path):
        """Without a log, the commands say so, and make no file."""
        for arguments in (("logs",), ("logs", "search", "x"), ("logs", "purge", "--yes"), ("logs", "on")):
            assert command(capfd, *arguments) == (0, "", "")
        assert command(capfd, "logs", "path") == (0, f"{log_path}\n", "")
        assert command(capfd, "logs", "show")[0] == 2
        assert not log_path.exists()

    def test_the_page(self, log, capfd, monkeypatch, tmp_path):
        """The commands of the page run in their order, and print what they are for."""
        monkeypatch.chdir(tmp_path)
        add(log, "What is the capital of France?", spans=spans_of("chat echo", {}))
        lines = [shlex.split(line, comments=True)[1:] for code in blocks_of_page() for line in code.splitlines()]
        assert ["logs", "search", "capital of France"] in lines
        for arguments in lines:
            if arguments[0] == "chat":
                assert fluxibly(*arguments, "--log").stdout == "And of Spain?\n"
                continue
            status, out, err = command(capfd, *arguments)
            assert (status, err) == (0, "")
            assert out or arguments[1] in {"export", "off", "on", "purge"}


def blocks_of_page() -> list[str]:
    return [code for kind, code in blocks_of(ROOT / "docs" / "logs.md") if kind == "text"]
