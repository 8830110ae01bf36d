"""Chats at a real terminal: what a person types, and what stands on the screen afterwards."""

from __future__ import annotations

import re
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("pty")
from support.terminals import ANSI, Terminal, fluxibly

PROVIDER = """
import time
from fluxibly import *
class Mine:
    def __init__(self, config): self.model = config.model
    {stream}
register_llm_framework("mine", Mine)
"""
ALL = "def stream(self, request): yield '/'.join(m.text for m in request.messages)"
ME = ("chat", "--framework", "mine", "--model", "m")
Start = Callable[..., Terminal]


def provider(stream: str) -> str:
    return PROVIDER.format(stream=stream)


def ask(chat: Terminal, question: str) -> None:
    """Ask a question, once the chat is ready for it."""
    chat.wait_for_prompt()
    chat.type(f"{question}\r")


def test_one_answer(terminal: Start) -> None:
    """The answer is followed by one line: who answered, the tokens and the time."""
    chat = terminal("chat", "-m", "echo", "--no-log", "one two three")
    assert chat.end() == 0
    answer, line = chat.lines
    assert answer == "one two three"
    assert re.fullmatch(r"echo · 3 \+ 3 tokens · [\d.]+ (µs|ms|s)", line)


def test_details(terminal: Start) -> None:
    """With -v, the answer is shown with its log lines, its figures and its spans."""
    chat = terminal("chat", "-v", "-m", "echo", "--no-log", "one two three")
    assert chat.end() == 0
    lines = chat.lines
    assert lines[0].startswith("INFO    LLM streaming request started | ")
    assert "one two three" in lines
    assert any(line.startswith("INFO    LLM streaming completed | ") for line in lines)
    figures = next(number for number, line in enumerate(lines) if line.startswith("chunks "))
    assert lines[figures].split() == ["chunks", "characters", "first", "chunk", "tokens", "rate", "total"]
    assert lines[figures + 1].split()[1] == "13"
    assert re.fullmatch(r"chat echo  [\d.]+ (µs|ms|s)  completed", lines[figures + 3])
    assert len(lines) == figures + 4  # a single attempt has no span of its own
    assert "\x1b[2m" in chat.shown


def test_control_characters(terminal: Start) -> None:
    """An answer cannot move the cursor or colour the terminal; in a pipe, the answer is unchanged."""
    before = provider(r"def stream(self, request): yield 'a\x1b[31mb\x9bc'")
    for options in ((), ("--no-markdown",)):
        chat = terminal(*ME, "x", "--no-log", *options, before=before)
        assert chat.end() == 0
        assert chat.lines[0] == "a[31mbc"
        assert "\x1b[31m" not in chat.shown
    assert fluxibly(*ME, "x", before=before).stdout == "a\x1b[31mb\x9bc\n"


MARKDOWN = """# Title

Some **bold** and `code`, <b>tags</b> and
a second line.

1. one
2. two
   - inner
3. three

- other

```python
def f():
    '''Two
    lines.'''

    return 1
```

| planet | km |
|---|---|
| 地球 | 1 |
| Mars 😀 | 2 |

The end."""
SHOWN = """Title

Some bold and code, <b>tags</b> and
a second line.

 1 one
 2 two
    • inner
 3 three

 • other

def f():
    '''Two
    lines.'''

    return 1

 planet   km
 ────────────
 地球     1
 Mars 😀  2

The end."""


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_markdown(size: int, terminal: Start) -> None:
    """Blocks look the same in whatever pieces the text comes."""
    stream = f"""def stream(self, request):
        text = {MARKDOWN!r}
        for at in range(0, len(text), {size}):
            time.sleep(0.001)
            yield text[at:at + {size}]"""
    chat = terminal(*ME, "x", "-q", "--no-log", before=provider(stream), columns=80)
    assert chat.end() == 0
    assert plain(chat.lines) == plain(SHOWN.splitlines())


def plain(lines: list[str]) -> list[str]:
    """Return lines without what depends on a table's width: the emulator has an empty cell behind each wide character."""
    return [re.sub("─+", "─", re.sub(" +", " ", line).strip()) for line in lines]


def test_an_answer_of_hundreds_of_lines(terminal: Start) -> None:
    """Each line stands there once, also when the terminal changes its size meanwhile."""
    stream = """def stream(self, request):
        import os
        for number in range(1, 151):
            yield f'{number}. item {number} with words until the line is too long for a terminal of eighty columns\\n'
            width = {30: 60, 90: 90}.get(number)
            while width not in (None, os.get_terminal_size().columns): time.sleep(0.01)
            time.sleep(0.002)
        yield '\\n```\\n'
        for number in range(1, 151):
            yield f'code {number}\\n'
            time.sleep(0.002)
        yield '```\\nThe end.'"""
    # The emulator cuts lines off when it becomes narrower, as xterm does. Most terminals wrap them.
    chat = terminal(*ME, "x", "-q", "--no-log", before=provider(stream), columns=80, XTERM_VERSION="390", TMUX="")
    chat.wait_for("item 30 ")
    chat.resize(60, 24)
    chat.wait_for("item 90 ")
    chat.resize(90, 30)
    assert chat.end() == 0
    lines = chat.lines
    assert lines[-1] == "The end."
    assert [found[1] for line in lines if (found := re.search(r"item (\d+) ", line))] == [str(n) for n in range(1, 151)]
    assert [line for line in lines if line.startswith("code")] == [f"code {n}" for n in range(1, 151)]


def test_a_block_that_is_taller_than_the_terminal(terminal: Start, tmp_path: Path) -> None:
    """Of a table that grows, the last lines are shown, and all of it in the end."""
    go_on = tmp_path / "go_on"
    stream = f"""def stream(self, request):
        import os
        yield '| n |\\n|---|\\n'
        for number in range(1, 61):
            yield '| row ' + str(number) + ' |\\n'
            time.sleep(0.01)
            while number == 45 and not os.path.exists({str(go_on)!r}):
                time.sleep(0.01)"""
    chat = terminal(*ME, "x", "-q", "--no-log", before=provider(stream), columns=80, rows=10, LINES="24")
    chat.wait_for_line("row 40")
    assert len(chat.lines) <= 10
    go_on.touch()
    assert chat.end() == 0
    assert [line.strip() for line in chat.lines if "row" in line] == [f"row {n}" for n in range(1, 61)]


TOOLS = """
from fluxibly.types import ToolCallDelta
def clock(place: str) -> str:
    "Say what time it is."
    return "noon\x1b[31m in " + place
import sys, types
sys.modules["clocks"] = types.ModuleType("clocks")
sys.modules["clocks"].clock = clock
"""


def test_marks_of_tools_and_a_new_beginning(terminal: Start, tmp_path: Path) -> None:
    """A call of a tool is a line between two messages, and an answer that begins again says so."""
    stream = """def stream(self, request):
        if request.messages[-1].role == 'tool':
            yield '**' + request.messages[-1].text + '**'
            return
        yield 'I look.'
        yield Chunk(tool_calls=[ToolCallDelta(index=0, id='1', name='clock', arguments='{"place": "Ostend"}')])
        yield Chunk(finish_reason='tool_call')"""
    chat = terminal(*ME, "x", "-q", "--no-log", "--tools", "clocks:clock", before=TOOLS + provider(stream))
    assert chat.end() == 0
    assert chat.lines == ["I look.", "noon[31m in Ostend"], "-q shows the answer alone"
    chat = terminal(*ME, "x", "--no-log", "--tools", "clocks:clock", before=TOOLS + provider(stream))
    assert chat.end() == 0
    assert chat.lines[:3] == ["I look.", 'clock(place="Ostend") → noon[31m in Ostend', "noon[31m in Ostend"]
    again = """tries = 0
    def stream(self, request):
        Mine.tries += 1
        yield f'try {Mine.tries}'
        if Mine.tries == 1: raise ProviderError('cut', retryable=True)"""
    config = tmp_path / "again.yaml"
    config.write_text("llm: {framework: mine, model: m, middleware: [retry: {on_interrupt: restart, base_delay: 0}]}")
    chat = terminal("chat", "--config", str(config), "x", "--no-log", "--log-level", "error", before=provider(again))
    assert chat.end() == 0
    assert chat.lines[-3:-1] == ["(the answer begins again)", "try 2"]


def test_a_spinner_until_the_first_chunk(terminal: Start) -> None:
    """It moves, and leaves nothing behind."""
    chat = terminal(
        *ME, "x", "-s", "s", "--no-log", before=provider("def stream(self, request): time.sleep(0.5); yield 'said'")
    )
    assert chat.end() == 0
    assert len(set(re.findall("[⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏]", chat.shown))) > 2
    assert chat.lines[0] == "said"
    assert chat.shown.rindex("\x1b[?25h") > chat.shown.rindex("\x1b[?25l"), "the cursor is there again"


def test_conversation(terminal: Start) -> None:
    """Without a prompt, a conversation starts, which remembers earlier turns; Ctrl-D ends it."""
    chat = terminal(*ME, "--system", "S", before=provider(ALL))
    chat.wait_for("Ctrl-D ends the chat")
    ask(chat, "one")
    chat.wait_for("S/one")
    ask(chat, "")
    ask(chat, "two")
    chat.wait_for("S/one/S/one/two")
    chat.wait_for_prompt()
    chat.type("\x04")
    assert chat.end() == 0


def test_failures_in_a_conversation(terminal: Start) -> None:
    """A failure is one line, and the chat goes on without the question; a conversation that is too long begins anew."""
    stream = """def stream(self, request):
        from fluxibly.errors import ContextLengthExceeded
        last = request.messages[-1].text
        if last == 'long': raise ContextLengthExceeded('too long')
        if last == 'bad': raise ProviderError('no luck')
        if last == 'bug': raise KeyError('mine')
        yield '/'.join(m.text for m in request.messages)"""
    chat = terminal(*ME, "--no-log", before=provider(stream))
    for question, says in (
        ("one", "one"),
        ("bad", "fluxibly: no luck"),
        ("bug", "fluxibly: KeyError: 'mine'"),
        ("two", "one/one/two"),
        ("long", "the conversation begins anew"),
    ):
        ask(chat, question)
        chat.wait_for(says)
    ask(chat, "three")
    chat.wait_for_line("^three$")
    ask(chat, "exit")
    assert chat.end() == 0


def test_commands(terminal: Start, tmp_path: Path) -> None:
    """Words that begin with a slash are for the chat; one that it does not know is not sent."""
    (tmp_path / "notes.txt").write_text("high tide")
    saved, other = tmp_path / "saved.json", tmp_path / "other.txt"
    other.write_text("mine")
    # Each turn says who answered, and the question without line breaks.
    stream = "def stream(self, request): yield f\"{request.model}: {'/'.join(m.text for m in request.messages)!r}\""
    chat = terminal(*ME, "--no-log", before=provider(stream), columns=200)
    for question, says in (
        ("/help", "Alt-Enter begins a new line"),
        ("/helo", "there is no command /helo; did you mean '/help'?"),
        ("/retry", "there is no question yet"),
        ("//helo", "m: '/helo'"),
        ("/new", "A new conversation."),
        ("/etc/passwd", "m: '/etc/passwd'"),
        ("/new", "A new conversation."),
        ("/system Be brief.", "System: Be brief."),
        ("one", "m: 'Be brief./one'"),
        ("/retry", "m: 'Be brief./one'"),
        ('/system ""', "There is no system message."),
        ("/retry", "m: 'one'"),
        ("/model mine:other", "mine:other"),
        ("/model opnai:x", "did you mean 'openai:x'?"),
        ("/new", "A new conversation."),
        (f"/attach {tmp_path}/no.png", "No such file"),
        (f"/attach {tmp_path}/notes.txt", "Attached to the next question: notes.txt (21 characters of text)"),
        ("two", "other: 'notes.txt:\\n\\nhigh tidetwo'"),
        (f"/save {other}", "is no conversation"),
        ("/save", "write /save FILE"),
        (f"/save {saved}", "Saved 2 messages"),
        (f"/save {saved}", "Saved 2 messages"),
    ):
        ask(chat, question)
        chat.wait_for(says)
    ask(chat, "exit")
    assert chat.end() == 0
    assert other.read_text() == "mine"
    assert stat.S_IMODE(saved.stat().st_mode) == 0o600


def test_questions_of_several_lines(terminal: Start) -> None:
    """Alt-Enter, a backslash and quotes go on; a paste is one question, also with wide characters in it."""
    stream = "def stream(self, request): t = request.messages[-1].text; yield ascii(t) if len(t) < 100 else str(len(t))"
    chat = terminal(*ME, "--no-log", before=provider(stream), columns=200)
    chat.wait_for_prompt()
    chat.type("a\x1b\rb\\\rc\r")
    chat.wait_for(r"'a\nb\nc'")
    chat.wait_for_prompt()
    chat.type('"""\rd\re\r"""\r')
    chat.wait_for(r"'d\ne'")
    chat.wait_for_prompt()
    chat.paste("f\r\ng 漢字\r\n😀")
    chat.type("\r")
    chat.wait_for(r"'f\ng \u6f22\u5b57\n\U0001f600'")
    chat.wait_for_prompt()
    chat.paste("lines\r" * 600)
    chat.type("end\r")
    chat.wait_for_line("^3603$")
    chat.wait_for_prompt()
    chat.type("\x04")
    assert chat.end() == 0


def test_questions_are_there_in_the_next_session(terminal: Start, log_path: Path) -> None:
    """In a file that is the user's own; with --no-log there is none."""
    file = log_path.with_name("chat-history")
    chat = terminal(*ME, "--no-log", before=provider(ALL))
    ask(chat, "secret")
    chat.wait_for_line("^secret$")
    ask(chat, "exit")
    assert chat.end() == 0
    assert not file.exists()
    for keys in ("first", "\x1b[A"):  # the key goes back in history
        chat = terminal(*ME, before=provider(ALL))
        ask(chat, keys)
        chat.wait_for_line("^first$")
        ask(chat, "\x04")
        assert chat.end() == 0
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert "secret" not in file.read_text()


def test_ctrl_c(terminal: Start) -> None:
    """It stops the answer and not the program, at whatever stage; at the prompt, what was typed is given up."""
    stream = """def stream(self, request):
        if request.messages[-1].text != 'slow': time.sleep(60)
        for number in range(600):
            yield f'word{number} '
            time.sleep(0.1)"""
    chat = terminal(*ME, "--no-log", before=provider(stream))
    chat.wait_for_prompt()
    chat.type("given up\x03")
    ask(chat, "slow")
    chat.wait_for("word3")
    chat.type("\x03")
    chat.wait_for("(stopped)")
    ask(chat, "silent")
    chat.wait_for_line("[⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏]")
    chat.type("\x03")
    chat.wait_for("(stopped)")
    chat.wait_for_prompt()
    chat.type("\x04")
    assert chat.end() == 0
    assert "Traceback" not in chat.shown
    chat = terminal(*ME, "slow", "--no-log", before=provider(stream))
    chat.wait_for("word3")
    chat.type("\x03")
    assert chat.end() == 130
    assert "Traceback" not in chat.shown
    assert chat.shown.rindex("\x1b[?25h") > chat.shown.rindex("\x1b[?25l"), "the cursor is there again"


def test_a_terminal_that_cannot_move_its_cursor(terminal: Start) -> None:
    """The text is written as it is, and questions are read line by line."""
    stream = "def stream(self, request): yield '**' + ascii(request.messages[-1].text) + '**'"
    chat = terminal(*ME, "--no-log", before=provider(stream), TERM="dumb")
    chat.wait_for("> ")
    chat.type("one\n")
    chat.wait_for("**'one'**")
    chat.wait_for("> ")
    chat.type("two\nthree\n")  # a paste
    chat.wait_for(r"**'two\nthree'**")
    chat.wait_for("> ")
    chat.type("four\\\n")
    chat.wait_for("  ")
    chat.type("five\n")
    chat.wait_for(r"**'four\nfive'**")
    chat.wait_for("> ")
    chat.type("\x03\n")  # input() may miss a signal while it prepares to wait; the newline wakes it
    chat.wait_for("> ")
    chat.type("\x04")
    assert chat.end() == 0
    assert not ANSI.search(chat.shown)


LONG = "Count from one to one thousand. One, two, three,"
"""A prompt whose answer, with temperature 0, does not end by itself."""


@pytest.mark.model
def test_the_local_model(terminal: Start, yaml: Path, gguf: Path) -> None:
    """Ctrl-C stops its answer, and the next question is answered."""
    yaml.write_text(f"llm: {{framework: local, model: {gguf}, temperature: 0, additional_params: {{n_threads: 1}}}}")
    chat = terminal("chat", "--no-log", "--config", str(yaml))
    ask(chat, LONG)
    chat.wait_for_line("^One, two")
    chat.type("\x03")
    chat.wait_for("(stopped)")
    ask(chat, "What is the capital of France?")
    chat.wait_for("tokens · ")
    ask(chat, "exit")
    assert chat.end() == 0
    assert any("Paris" in line for line in chat.lines)
