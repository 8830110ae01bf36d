"""The command `chat` that asks once: what is sent, what is printed, and mistakes."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.command_line import CommandLine, Ran, command_line
from support.terminals import environment, fluxibly as in_a_process

from fluxibly import Chunk, Message, Request, Response, registry
from fluxibly.cli.chat.schemas import schema_of
from fluxibly.cli.chat.settings import parameters_of
from fluxibly.errors import ConfigError
from fluxibly.parts import Audio, Document, Image, Media, Text, ToolCall
from fluxibly.types import Usage

pytest.importorskip("typer")
PNG = b"\x89PNG\r\n\x1a\n"
ME = ("chat", "-m", "mine:m")


class Mine:
    """A provider that keeps the requests, and answers with `answer`."""

    requests: list[Request]
    answer: Callable[[Request], Response]

    def __init__(self, config: Any) -> None:
        pass

    def complete(self, request: Request) -> Response:
        Mine.requests.append(request)
        return Mine.answer(request)

    def stream(self, request: Request) -> Iterator[Chunk]:
        Mine.requests.append(request)
        answer = Mine.answer(request)
        yield Chunk(answer.text[:2])
        yield Chunk(answer.text[2:], finish_reason="stop", usage=answer.usage)


@pytest.fixture
def fluxibly(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[CommandLine]:
    """A command line in this process, in an empty folder, with the framework `mine`."""
    monkeypatch.setattr(registry, "_frameworks", {**registry._frameworks})
    registry.register_llm_framework("mine", Mine, replace=True)
    Mine.requests = []
    Mine.answer = lambda request: Response("said", usage=Usage(input_tokens=1, output_tokens=2))
    monkeypatch.chdir(tmp_path)
    with command_line(tmp_path, capfd, monkeypatch) as found:
        yield found


def content() -> tuple[Text | Media, ...]:
    """Return the content of the last question."""
    return Mine.requests[-1].messages[-1].content


def mistake(ran: Ran, status: int = 2) -> str:
    """Return the line that says what is wrong; check that there is nothing else."""
    assert (ran.status, ran.out) == (status, "")
    assert ran.err.startswith("fluxibly: ")
    assert ran.err.count("\n") == 1
    return ran.err


def piped(*arguments: str, given: bytes) -> subprocess.CompletedProcess[bytes]:
    """Run a command of `echo` with something piped in."""
    command = [sys.executable, "-m", "fluxibly", "chat", "-m", "echo", *arguments]
    return subprocess.run(command, input=given, capture_output=True, env=environment(), timeout=100, check=False)


def test_piped_input_stands_before_the_prompt() -> None:
    """`cat file | fluxibly chat "explain"`, by `python -m fluxibly`."""
    ran = piped("explain", given=b"def f():\n    pass\n")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, b"def f():\n    pass\n\nexplain\n", b"")


def test_piped_input_alone_is_the_prompt() -> None:
    """Without a prompt it is the question itself; nothing at all is a mistake, and so is what is not text."""
    assert piped(given=b"caff\xc3\xa8\n").stdout == b"caff\xc3\xa8\n"
    assert piped("say", given=b"").stdout == b"say\n"
    ran = piped(given=b"")
    assert (ran.returncode, ran.stdout) == (2, b"")
    assert b"there is no prompt" in ran.stderr
    ran = piped("x", given=b"\xff\xfe")
    assert (ran.returncode, ran.stdout) == (2, b"")


def test_input_from_nowhere() -> None:
    """Standard input that is no pipe and no file is not read, when there is a prompt."""
    command = [sys.executable, "-m", "fluxibly", "chat", "-m", "echo", "hi"]
    ran = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, env=environment(), timeout=100, check=False
    )
    assert ran.stdout == b"hi\n"


def test_a_system_message(fluxibly: CommandLine) -> None:
    """-s stands before the question."""
    assert fluxibly(*ME, "-s", "Be brief.", "hi") == (0, "said\n", "")
    assert Mine.requests[-1].messages == (Message.system("Be brief."), Message.user("hi"))


@pytest.mark.parametrize(
    ("name", "kind", "media_type"),
    [
        ("a.png", Image, "image/png"),
        ("a.JPG", Image, "image/jpeg"),
        ("a.wav", Audio, "audio/wav"),
        ("a.mp3", Audio, "audio/mpeg"),
        ("a.pdf", Document, "application/pdf"),
    ],
)
def test_a_file_is_attached_by_its_type(name: str, kind: type[Media], media_type: str, fluxibly: CommandLine) -> None:
    """Its bytes stand before the question."""
    Path(name).write_bytes(PNG)
    assert fluxibly(*ME, "what?", "-a", name).status == 0
    part, question = content()
    assert (type(part), part.data, part.media_type) == (kind, PNG, media_type)
    assert question == Text("what?")


def test_several_attachments(fluxibly: CommandLine) -> None:
    """Text files are text with their names, and URLs are passed on as they are."""
    Path("notes.md").write_text("\ufeff# Notes\n", encoding="utf-8")
    Path("main.rs").write_text("fn main() {}", encoding="utf-8")
    url = "https://example.org/cat.png?size=1"
    assert fluxibly(*ME, "-a", "notes.md", "-a", url, "-a", "main.rs", "what?").status == 0
    assert content() == (
        Text("notes.md:\n\n# Notes\n"),
        Image(url=url, media_type="image/png"),
        Text("main.rs:\n\nfn main() {}"),
        Text("what?"),
    )
    assert fluxibly(*ME, "-a", "main.rs").status == 0, "an attachment may be the whole question"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("no-such.png", "--attach no-such.png: No such file"),
        (".", "--attach .: Is a directory"),
        ("blob", "expected one of images, audio, PDFs"),
        ("a.zip", "expected one of images, audio, PDFs"),
        ("https://example.org/cat", "cannot tell what it is from its name"),
    ],
)
def test_what_cannot_be_attached_is_a_mistake(source: str, says: str, fluxibly: CommandLine) -> None:
    """Nothing is sent."""
    Path("blob").write_bytes(b"\0\1\2")
    Path("a.zip").write_bytes(b"PK\3\4\0")
    assert says in mistake(fluxibly(*ME, "what?", "-a", source))
    assert Mine.requests == []


def test_the_short_form_of_a_schema() -> None:
    """Names with types, lists, `?` and descriptions, between commas or on lines."""
    schema = schema_of("name, age int?, tags list[str], scores float[], ok bool")
    assert schema["properties"] == {
        "name": {"type": "string"},
        "age": {"type": ["integer", "null"]},
        "tags": {"type": "array", "items": {"type": "string"}},
        "scores": {"type": "array", "items": {"type": "number"}},
        "ok": {"type": "boolean"},
    }
    assert schema["required"] == ["name", "age", "tags", "scores", "ok"]
    assert schema["additionalProperties"] is False
    lines = schema_of("name: the dog's name, if it has one\nnick?\nage int: in years\n")["properties"]
    assert lines["name"] == {"type": "string", "description": "the dog's name, if it has one"}
    assert lines["nick"] == {"type": ["string", "null"]}
    assert lines["age"] == {"type": "integer", "description": "in years"}
    assert schema_of("[name, age int]")["items"] == schema_of("name, age int")


def test_a_schema_in_json(tmp_path: Path) -> None:
    """It is a file, or the text itself."""
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(schema))
    assert schema_of(str(file)) == schema_of(json.dumps(schema)) == schema


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "got nothing"),
        ("name strr", "expected one of str, int, float, bool or list[…], got 'strr'; did you mean 'str'?"),
        ("name, name int", "'name' twice"),
        ("first name str", "got 'first name str'"),
        ("tags list[", "got"),
        ("no/such.json", "No such file"),
        ("{", "not JSON"),
        ('{"type": 7}', "--schema"),
        (",", "got no names"),
    ],
)
def test_a_wrong_schema_is_a_mistake(text: str, says: str, fluxibly: CommandLine) -> None:
    """Nothing is sent."""
    assert says in mistake(fluxibly(*ME, "x", "--schema", text))
    assert Mine.requests == []


def test_an_answer_of_a_schema_is_json(fluxibly: CommandLine) -> None:
    """It is printed on one line for programs, and on several for a person."""
    Mine.answer = lambda request: Response('```json\n{"name": "Añn", "age": 3}\n```')
    assert fluxibly(*ME, "x", "--schema", "name, age int") == (0, '{"name": "Añn", "age": 3}\n', "")
    assert Mine.requests[-1].response_format["properties"]["age"] == {"type": "integer"}
    response = json.loads(fluxibly(*ME, "x", "--schema", "name, age int", "--json").out)
    assert response["parsed"] == {"name": "Añn", "age": 3}
    shown = fluxibly.at_terminal(*ME, "x", "-q", "--no-log", "--schema", "name, age int").out
    assert shown == '{\n  "name": "Añn",\n  "age": 3\n}\n'
    Mine.answer = lambda request: Response('{"value": [{"name": "A"}, {"name": "B"}]}')
    assert json.loads(fluxibly(*ME, "x", "--schema", "[name]").out) == [{"name": "A"}, {"name": "B"}]


def test_an_answer_that_does_not_fit_is_a_failure(fluxibly: CommandLine) -> None:
    """It is asked for again, and then the status is 1."""
    Mine.answer = lambda request: Response("no JSON")
    ran = fluxibly(*ME, "x", "--schema", "name", "--log-level", "critical")
    assert "the answer did not pass validation: the answer is not valid JSON" in mistake(ran, status=1)
    assert len(Mine.requests) > 1


def test_parameters(fluxibly: CommandLine) -> None:
    """-o sets parameters of the call; a value that is JSON is read as JSON."""
    options = ["temperature", "0.5", "stop", "END", "seed", "-7", "tool_choice", "none"]
    pairs = [word for name, value in zip(options[::2], options[1::2], strict=True) for word in ("-o", name, value)]
    ran = fluxibly(*ME, "x", *pairs, "-o", "extra", '{"a": {"b": 1}}', "-o", 'extra={"a": {"c": 2}}', "-o", "top_p=1")
    assert (ran.status, ran.err) == (0, "")
    request = Mine.requests[-1]
    assert (request.temperature, request.stop, request.seed, request.top_p) == (0.5, ("END",), -7, 1)
    assert request.tool_choice == "none"
    assert request.extra == {"a": {"b": 1, "c": 2}}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("-o", "temprature", "0.5"), "there is no parameter 'temprature'; did you mean 'temperature'?"),
        (("-o", "zzz", "1"), "a service's own is -o extra '{\"zzz\": …}'"),
        (("-o", "temperature", "5"), "-o: temperature: expected a number from 0 to 2, got 5"),
        (("-o", "seed", "x", "-o", "n", "0"), "-o: seed: expected a whole number, got 'x'; -o: n: expected a whole"),
        (("-o", "extra", "1"), "-o: extra: expected"),
        (("-o", "tool_choice", "1"), "-o: tool_choice: expected"),
        (("-o", "temperature"), "write -o temperature VALUE"),
        (("-o",), "-o"),
    ],
)
def test_a_wrong_parameter_is_a_mistake(options: tuple[str, ...], says: str, fluxibly: CommandLine) -> None:
    """All problems are told at once, and nothing is sent."""
    assert says in mistake(fluxibly(*ME, "x", *options))
    assert Mine.requests == []


def test_parameters_go_into_any_configuration() -> None:
    """They come before those of a file."""
    from fluxibly import LLMConfig

    config = LLMConfig(framework="echo", model="m", temperature=1, additional_params={"a": 1})
    changed = parameters_of(["temperature=0", 'extra={"b": 2}']).configure(config)
    assert (changed.temperature, changed.additional_params) == (0, {"a": 1, "b": 2})
    with pytest.raises(ConfigError):
        parameters_of(["temperature=hot"])


WEATHER = '''
def forecast(city: str) -> str:
    """Say what the weather will be in a city."""
    return f"Rain in {city}."

def sunrise() -> str:
    """Say when the sun rises."""
    return "6:00"

number = 7
'''


def _calls_once(request: Request) -> Response:
    if request.messages[-1].role == "tool":
        return Response(f"It says: {request.messages[-1].text}")
    return Response(tool_calls=[ToolCall("1", "forecast", {"city": "Ostend"})], finish_reason="tool_call")


class Calling(Mine):
    """The same, whose stream has tool calls."""

    def stream(self, request: Request) -> Iterator[Chunk]:
        from fluxibly.types import ToolCallDelta

        answer = self.complete(request)
        for call in answer.tool_calls:
            yield Chunk(tool_calls=[ToolCallDelta(index=0, id=call.id, name=call.name, arguments=call.raw_arguments)])
        yield Chunk(answer.text, finish_reason=answer.finish_reason)


@pytest.fixture
def weather(fluxibly: CommandLine) -> CommandLine:
    """A command line whose model calls a function of a module in the current folder."""
    registry.register_llm_framework("mine", Calling, replace=True)
    Mine.answer = _calls_once
    Path("weather.py").write_text(WEATHER)
    return fluxibly


@pytest.mark.parametrize("mode", [(), ("--no-stream",)])
def test_tools(mode: tuple[str, ...], weather: CommandLine) -> None:
    """The model may call functions; a person sees the calls, and -v shows them in a pipe."""
    tools = ("--tools", "weather:forecast", "--tools", "weather:sunrise")
    assert weather(*ME, "x", *tools, *mode) == (0, "It says: Rain in Ostend.\n", "")
    assert [tool.name for tool in Mine.requests[0].tools] == ["forecast", "sunrise"]
    ran = weather(*ME, "x", *tools, *mode, "-v", "--log-level", "error")
    assert ran.err.startswith('forecast(city="Ostend") → Rain in Ostend.\n')
    shown = weather.at_terminal(*ME, "x", *tools, *mode, "--no-log", "--no-markdown").out
    assert 'forecast(city="Ostend") → Rain in Ostend.\nIt says: Rain in Ostend.\n' in shown
    response = json.loads(weather(*ME, "x", *tools, *mode, "--json").out)
    assert [message["role"] for message in response["added"]] == ["assistant", "tool"]


def test_tools_stand_in_the_stack_of_a_file(weather: CommandLine) -> None:
    """They stand outside of what sends again, and one layer has the file's functions too."""
    from fluxibly.cli.chat.settings import with_tools
    from fluxibly.config import LLMConfig
    from fluxibly.middleware import Retry, Timing, Tools

    def mine() -> str:
        """Return nothing."""
        return ""

    config = LLMConfig(framework="mine", model="m", middleware=[Timing(), Retry()])
    kinds = [type(layer) for layer in with_tools(config, ["weather:forecast"]).middleware or ()]
    assert kinds == [Timing, Tools, Retry]
    config = LLMConfig(framework="mine", model="m", middleware=[Tools([mine]), Retry()])
    tools, _ = with_tools(config, ["weather:forecast"]).middleware or ()
    assert [tool.name for tool in tools.functions] == ["mine", "forecast"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("weather", "expected module:function, got 'weather'"),
        ("weather:", "expected module:function"),
        ("nowhere:f", "cannot import 'nowhere': ModuleNotFoundError"),
        ("broken:f", "cannot import 'broken': ZeroDivisionError"),
        ("leaving:f", "cannot import 'leaving': SystemExit"),
        ("weather:forcast", "'weather' has no 'forcast'; did you mean 'forecast'?"),
        ("weather:number", "--tools: Tools: functions[0]: tool: expected a function, got an int"),
    ],
)
def test_a_wrong_tool_is_a_mistake(name: str, says: str, weather: CommandLine) -> None:
    """Nothing is sent."""
    Path("broken.py").write_text("1 / 0")
    Path("leaving.py").write_text("raise SystemExit(0)")
    assert says in mistake(weather(*ME, "x", "--tools", name))
    assert Mine.requests == []


def test_json_has_every_field(fluxibly: CommandLine) -> None:
    """Each key is always there."""
    response = json.loads(fluxibly(*ME, "x", "--json", "--no-stream").out)
    fields = {name for name in vars(Response()) if name not in ("reasoning_parts", "order")}
    assert fields <= set(response)
    assert (response["provider"], response["cache_hit"], response["cost"], response["added"]) == (
        "mine",
        False,
        None,
        [],
    )
    assert response["total_usage"]["output_tokens"] == 2
    assert set(json.loads(fluxibly(*ME, "x", "--json").out)) == set(response)


def test_quiet_and_verbose(fluxibly: CommandLine) -> None:
    """By default a person sees one line after an answer; -q leaves it out, and -v has figures and log lines."""
    shown = fluxibly.at_terminal(*ME, "x", "--no-log", "--no-markdown")
    assert shown.out.splitlines()[0] == "said"
    assert shown.out.splitlines()[1].startswith("m · 1 + 2 tokens · ")
    assert shown.err == ""
    assert fluxibly.at_terminal(*ME, "x", "-q", "--no-log", "--no-markdown") == (0, "said\n", "")
    details = fluxibly.at_terminal(*ME, "x", "-v", "--no-log", "--no-markdown")
    assert "characters" in details.out
    assert "LLM streaming completed" in details.err
    assert "expected --quiet or --verbose" in mistake(fluxibly(*ME, "x", "-q", "-v"))
    ran = fluxibly(*ME, "x", "-v")
    assert ran.out == "said\n"
    assert ran.err.splitlines()[-1].startswith("m · 1 + 2 tokens · ")


def test_going_on_with_the_last_conversation(fluxibly: CommandLine) -> None:
    """-c sends what was said before, to the model that was asked before."""
    assert fluxibly(*ME, "-s", "Be brief.", "one", "--log").status == 0
    assert fluxibly("chat", "-c", "two", "--log") == (0, "said\n", "")
    texts = [message.text for message in Mine.requests[-1].messages]
    assert texts == ["Be brief.", "one", "said", "two"]
    assert Mine.requests[-1].model == "m"


@pytest.mark.parametrize(
    "command",
    [(), ("chat",), ("explain",), ("frameworks",), ("doctor",), ("models",), ("trace",), ("logs",), ("logs", "search")],
)
def test_each_help_has_examples(command: tuple[str, ...], fluxibly: CommandLine) -> None:
    """-h is --help, and it ends with lines that can be typed."""
    ran = fluxibly(*command, "-h")
    assert ran.status == 0
    assert ran == fluxibly(*command, "--help")
    examples = ran.out.partition("  Examples:\n")[2].splitlines()
    assert examples
    assert all("fluxibly " in line and len(line) <= 80 for line in examples)


def test_short_version(fluxibly: CommandLine) -> None:
    """-V is --version."""
    assert fluxibly("-V") == fluxibly("--version")


def test_completion() -> None:
    """A shell completes commands, options, and how the names of models begin."""
    asked = {"_FLUXIBLY_COMPLETE": "complete_bash", "COMP_WORDS": "fluxibly chat -m local:", "COMP_CWORD": "3"}
    ran = in_a_process(env=asked)
    assert ran.returncode == 0, ran.stderr
    assert "local:smollm2" in ran.stdout


def test_the_local_model_is_the_default(fluxibly: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing set up, it answers; without its package, one command is named that installs it."""
    from fluxibly.cli.commands.options import config_of

    config = config_of(None, None, None)
    assert (config.framework, config.model) == ("local", "smollm2")
    assert config_of(None, None, "smollm2") == config_of(None, None, "local") == config
    assert config_of(None, None, "local:x.gguf").model == config_of(None, None, "x.gguf").model == "x.gguf"
    assert config_of(None, None, "ollama:mistral:7b").model == "mistral:7b"
    assert config_of(None, None, "gpt-4o-mini").framework == "openai"


def test_a_closed_standard_input(fluxibly: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program without standard input can ask, and is told that it cannot talk."""
    monkeypatch.setattr("sys.stdin", None)
    assert fluxibly(*ME, "x").out == "said\n"
    assert "there is no prompt" in mistake(fluxibly(*ME))
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr("sys.stdin", closed)
    assert fluxibly(*ME, "x").out == "said\n"
