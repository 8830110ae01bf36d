"""`Record`: what stands in the file, what never does, and that a call goes on whatever becomes of the file."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import anyio
import pytest
from support.calling import REQUEST, call

from fluxibly import LLM, Target, ask, emit, race, stop_when
from fluxibly._checks import kind_of
from fluxibly._logs import forget_reports
from fluxibly.errors import (
    ConfigError,
    GuardRefused,
    RateLimitError,
    RequestTimeout,
    ResponseInvalid,
    ServerError,
    StreamInterrupted,
)
from fluxibly.flow import hold_back
from fluxibly.middleware import Deadline, Fallback, Record, Replay, Retry, Validation
from fluxibly.middleware._recording import RecordingFile, encoded
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.testing import AsyncScriptedProvider, Delay, ScriptedProvider, check_middleware
from fluxibly.testing.modes import BACKENDS, MODES, run_async
from fluxibly.types import Chunk, Image, Message, Opaque, Reasoning, Request, Response, Tool, ToolCallDelta, Usage


def lines(file):
    return [json.loads(line) for line in file.read_bytes().splitlines()] if file.exists() else []


def short(line):
    """Return what a line says of what came."""
    return {name: value for name, value in line.items() if name not in ("version", "key", "request")}


class TestWhatStandsThere:
    def test_in_all_modes(self, mode, file):
        """A line has the request, and the chunks with their times, or the whole answer."""
        script = [Delay(0.12), "Hel", Delay(0.0304), "lo", Chunk(finish_reason="stop", usage=Usage(output_tokens=2))]
        made = call(mode, Record(file), script)
        assert made.response.text == "Hello"
        (line,) = lines(file)
        assert line["version"] == 1
        assert len(line["key"]) == 40
        assert line["request"] == {
            "provider": "scripted",
            "model": "m-1",
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
        }
        if mode.streaming:
            end = {"finish_reason": "stop", "usage": {"output_tokens": 2}}
            assert short(line) == {"chunks": [[0.12, "Hel"], [0.15, "lo"], [0.15, end]]}
        else:
            whole = {"text": "Hello", "finish_reason": "stop", "usage": {"output_tokens": 2}}
            assert short(line) == {"answer": whole}

    def test_the_line_as_it_is_written(self, file):
        """A person can read it: a fixed order, no nulls, and letters as they are."""
        request = Request(
            model="m",
            messages=[
                Message.system("Sei höflich"),
                Message.user(["was ist das?", Image(data=b"png", media_type="image/png")]),
            ],
            temperature=0,
            stop=["\n"],
            tools=[Tool("look", "Looks.")],
            response_format={"type": "object", "default": None},
            extra={"user": "u-1", "nested": {"api_key": "sk-hidden"}},
            headers={"X-Trace": "7", "Authorization": "Bearer sk-hidden", "X-Api-Key": "sk-hidden"},
            metadata={"of": "mine"},
        )
        Pipeline(ScriptedProvider("Ein ☃"), [Record(file)]).complete(request)
        text = file.read_text(encoding="utf-8")
        key = json.loads(text)["key"]
        assert text == (
            '{"version": 1, "key": "' + key + '", "request": {"provider": "scripted", "model": "m", "messages": '
            '[{"role": "system", "content": "Sei höflich"}, {"role": "user", "content": [{"type": "text", "text": '
            '"was ist das?"}, {"type": "image", "data": "cG5n", "media_type": "image/png"}]}], "tools": [{"name": "look", '
            '"description": "Looks.", "parameters": {"type": "object", "properties": {}}}], "temperature": 0, "stop": '
            '["\\n"], "response_format": {"type": "object", "default": null}, "extra": {"user": "u-1", "nested": '
            '{"api_key": "***"}}, "headers": {"x-trace": "7"}}, "answer": {"text": "Ein ☃"}}\n'
        )

    def test_the_same_calls_give_the_same_lines(self, tmp_path):
        """So that a recording that is made again differs only where the answers do."""
        for name in ("one", "two"):
            pipeline = Pipeline(ScriptedProvider("a", ServerError("b"), "c"), [Record(tmp_path / name)])
            for number in range(3):
                with suppress(ServerError):
                    pipeline.complete(REQUEST.evolve(seed=number))
        assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()

    def test_half_a_surrogate_pair(self, file):
        """It cannot be written in UTF-8, so the line is in ASCII."""
        Pipeline(ScriptedProvider("\ud83d ö"), [Record(file)]).complete(REQUEST)
        assert b"\\ud83d \\u00f6" in file.read_bytes()
        assert Pipeline(ScriptedProvider(), [Replay(file)]).complete(REQUEST).text == "\ud83d ö"

    @pytest.mark.parametrize("mode", [mode for mode in MODES if mode.streaming], ids=str)
    def test_parts_of_a_stream(self, mode, file):
        """Tool calls, signed reasoning, media and opaque parts have tables of what they set."""
        chunks = [
            Chunk(reasoning="hm"),
            Chunk(parts=(Reasoning(signature="S"), Image(data=b"png", media_type="image/png"))),
            Chunk("x", parts=(Opaque("gemini", {"type": "code", "list": [None]}),), details={"cites": ["u"]}),
            Chunk(tool_calls=(ToolCallDelta(index=0, id="c", name="f", arguments="{}"),)),
            Chunk(alternatives=((1, Chunk("other")),)),
        ]
        call(mode, Record(file), chunks)
        found = [chunk for _, chunk in short(lines(file)[0])["chunks"]]
        assert found == [
            {"reasoning": "hm"},
            {
                "parts": [
                    {"type": "reasoning", "signature": "S"},
                    {"type": "image", "data": "cG5n", "media_type": "image/png"},
                ]
            },
            {
                "text": "x",
                "parts": [{"type": "opaque", "dialect": "gemini", "raw": {"type": "code", "list": [None]}}],
                "details": {"cites": ["u"]},
            },
            {"tool_calls": [{"index": 0, "id": "c", "name": "f", "arguments": "{}"}]},
            {"alternatives": [[1, {"text": "other"}]]},
        ]

    def test_an_error(self, mode, file):
        """Its class and fields; in a stream after the chunks before it. The message is masked as in logs."""
        error = RateLimitError(
            "429: What is the capital of France? Too many",
            status=429,
            code="slow_down",
            retry_after=2.5,
            request_id="r-1",
            rate_limits={"x-ratelimit-limit": "3"},
            provider="scripted",
        )
        call(mode, Record(file), ["Par", error])
        (line,) = lines(file)
        said = {
            "class": "RateLimitError",
            "message": "429: […] Too many",
            **({"interrupted": True} if mode.streaming else {}),
            "status": 429,
            "code": "slow_down",
            "retryable": True,
            "retry_after": 2.5,
            "provider": "scripted",
            "request_id": "r-1",
            "rate_limits": {"x-ratelimit-limit": "3"},
        }
        assert short(line) == ({"chunks": [[0.0, "Par"]]} if mode.streaming else {}) | {"error": said}
        assert [*line["error"]] == [*said]

    def test_a_stream_that_is_left(self, stream_mode, file):
        """What came stands there, marked."""
        call(stream_mode, Record(file), ["a", "b", "c"], stop_after=2)
        assert [short(line) for line in lines(file)] == [{"chunks": [[0.0, "a"], [0.0, "b"]], "ended": "abandoned"}]

    def test_a_call_that_is_cancelled(self, mode, file):
        """As a stream that is left; a whole call has nothing to show."""
        call(mode, Record(file), ["a", asyncio.CancelledError()])
        found = [{"chunks": [[0.0, "a"]], "ended": "cancelled"}] if mode.streaming else []
        assert [short(line) for line in lines(file)] == found

    def test_where_nothing_came_there_is_no_line(self, stream_mode, file):
        """Also if there was a chunk without output: nobody has missed anything, as with the loser of a race."""
        call(stream_mode, Record(file), ["a"], stop_after=0)
        call(stream_mode, Record(file), [Chunk(model="m"), "a"], stop_after=1)
        call(stream_mode, Record(file), [Chunk(model="m"), asyncio.CancelledError()])
        assert lines(file) == []

    def test_a_task_that_is_cancelled(self, file):
        """A real cancellation, while the provider is at work: the line is written all the same."""

        async def main():
            provider = AsyncScriptedProvider()
            begun = anyio.Event()

            async def stream(request):
                yield "a"
                begun.set()
                await anyio.sleep_forever()

            provider.stream = stream
            async with anyio.create_task_group() as group:

                async def read():
                    async for _ in AsyncPipeline(provider, [Record(file)]).stream(REQUEST):
                        pass

                group.start_soon(read)
                await begun.wait()
                group.cancel_scope.cancel()

        for backend in BACKENDS:
            run_async(main, backend)
        assert [short(line)["ended"] for line in lines(file)] == ["cancelled"] * len(BACKENDS)


class TestInAStack:
    def test_outside_of_retry(self, mode, file):
        """What comes of the call."""
        call(mode, [Record(file), Retry()], ServerError("down"), "up")
        assert [[*short(line)] for line in lines(file)] == [["chunks"] if mode.streaming else ["answer"]]

    def test_inside_of_retry(self, mode, file):
        """Each attempt."""
        call(mode, [Retry(), Record(file)], ServerError("down"), "up")
        assert [[*short(line)] for line in lines(file)] == [["error"], ["chunks"] if mode.streaming else ["answer"]]

    def test_what_a_failed_attempt_said_before_output(self, stream_mode, file):
        """It does not belong to the answer of the next attempt."""
        call(
            stream_mode,
            [Record(file), Retry()],
            [Chunk(model="m-9", id="1"), ServerError("down")],
            [Chunk(id="2"), "up"],
        )
        assert short(lines(file)[0]) == {
            "chunks": [[pytest.approx(0, abs=1), {"id": "2"}], [pytest.approx(0, abs=1), "up"]]
        }

    def test_a_restart(self, stream_mode, file):
        """The chunks before it are void. A `Record` inside of it has both attempts."""
        outer, inner = Record(file), Record(file.with_name("inner"))
        stack = [outer, Retry(on_interrupt="restart"), inner]
        made = call(stream_mode, stack, ["Par", ServerError("down")], "Lyon", restarts=True)
        assert made.response.text == "Lyon"
        assert [[text for _, text in short(line)["chunks"]] for line in lines(file)] == [["Lyon"]]
        found = [[text for _, text in short(line)["chunks"]] for line in lines(file.with_name("inner"))]
        assert found == [["Par"], ["Lyon"]]

    def test_a_restart_that_nobody_takes(self, stream_mode, file):
        """The call has failed after its output."""
        call(stream_mode, [Record(file), Retry(on_interrupt="restart")], ["Par", ServerError("down")], "Lyon")
        line = short(lines(file)[0])
        assert (line["chunks"], line["error"]["class"], len(lines(file))) == ([[0.0, "Par"]], "ServerError", 1)

    def test_an_answer_that_a_layer_changed(self, mode, file):
        """What the chunks do not say stands beside them."""

        def annotate(request, call_next):
            response = yield from call_next(request)
            return response.evolve(id="mine", parsed={"a": [1]})

        call(mode, [Record(file), annotate], "hi")
        found = short(lines(file)[0])
        assert found["answer"] == {"text": "hi", "id": "mine", "parsed": {"a": [1]}}
        assert ("chunks" in found) == mode.streaming

    def test_an_answer_that_was_not_streamed(self, stream_mode, file):
        """As an inner cache returns it: it is whole."""

        def hit(request, call_next):
            return Response("from a cache", finish_reason="stop")
            yield

        call(stream_mode, [Record(file), hit])
        assert short(lines(file)[0]) == {"answer": {"text": "from a cache", "finish_reason": "stop"}}

    def test_marks(self, mode, file):
        """The messages of a turn stand where it was, or in the whole answer."""
        turn = (Message.assistant("one"), Message.user("more"))

        def turns(request, call_next):
            first = yield from call_next(request)
            yield from emit(Chunk(added=turn))
            second = yield from call_next(request.evolve(messages=(*request.messages, *turn)))
            assert first.text
            return second.evolve(added=turn)

        call(mode, [Record(file), turns], "one", "two")
        added = [{"role": "assistant", "content": "one"}, {"role": "user", "content": "more"}]
        if mode.streaming:
            assert short(lines(file)[0]) == {"chunks": [[0.0, "one"], [0.0, {"added": added}], [0.0, "two"]]}
        else:
            assert short(lines(file)[0]) == {"answer": {"text": "two", "added": added}}

    def test_a_stream_that_a_layer_stops(self, stream_mode, file):
        """The attempt is abandoned there."""

        def first(request, call_next):
            return (yield from stop_when(call_next(request), lambda chunk: chunk.text == "b"))

        outer = file.with_name("outer")
        call(stream_mode, [Record(outer), first, Record(file)], ["a", "b", "c"])
        assert short(lines(file)[0]) == {"chunks": [[0.0, "a"], [0.0, "b"]], "ended": "abandoned"}
        assert short(lines(outer)[0])["answer"] == {"text": "ab", "finish_reason": "stop"}

    def test_a_hold_back_that_fails(self, stream_mode, file):
        """Nothing has gone out, so the error is recorded without chunks."""

        def held(request, call_next):
            return (yield from hold_back(call_next(request)))

        call(stream_mode, [Record(file), held], ["a", ServerError("down")])
        assert [*short(lines(file)[0])] == ["error"]

    def test_the_winner_of_a_race(self, mode, file):
        """The loser has no line."""

        def twice(request, call_next):
            return (yield from race(call_next, [request, request.evolve(seed=1)], 1))

        made = call(mode, [twice, Record(file)], [Chunk(model="m"), Delay(9), "slow"], "fast")
        assert made.response.text == "fast"
        assert [line["request"].get("seed") for line in lines(file)] == [1]

    def test_a_question(self, mode, file):
        """`ask(…, through=[Record(…)])` records the question."""

        def judged(request, call_next):
            yield from ask(request.evolve(messages="fine?"), through=[Record(file)])
            return (yield from call_next(request))

        call(mode, judged, "yes", "hi")
        (line,) = lines(file)
        assert (line["request"]["messages"][0]["content"], short(line)) == ("fine?", {"answer": {"text": "yes"}})

    def test_an_answer_of_another_provider(self, mode, file):
        """It is named. That of the asked provider is not."""

        class Other:
            def complete(self, request):
                return "other"

            def stream(self, request):
                yield "other"

        call(mode, [Record(file), Fallback(Target(Other()))], ServerError("down"))
        assert short(lines(file)[0])["answer"] == {"text": "other", "provider": "Other"}

    def test_an_interruption_that_a_layer_swallows(self, stream_mode, file):
        """Half an answer is not recorded as a whole one."""

        def swallow(request, call_next):
            try:
                return (yield from call_next(request))
            except Exception:  # noqa: BLE001  # the mistake that is tested
                return Response("Par")

        made = call(stream_mode, [Record(file), swallow], ["Par", ServerError("down")])
        assert isinstance(made.ran.error, StreamInterrupted)
        assert short(lines(file)[0])["error"]["class"] == "ServerError"

    def test_what_is_not_recorded(self, mode, file):
        """A mistake in the setup, and what was missing in another recording."""
        call(mode, [Record(file), Replay(file.with_name("none"))])

        def wrong(request, call_next):
            raise ConfigError("no key")
            yield

        call(mode, [Record(file), wrong])
        assert lines(file) == []

    def test_no_deadline_cuts_the_writing_off(self, mode, file):
        """Even if it passes while the line is written."""
        slow = Record(file)

        def late(request, call_next):
            response = yield from call_next(request)
            request.call.leash = type(request.call.leash)(deadline=request.call.clock())
            return response

        made = call(mode, [Deadline(9), slow, late], "hi")
        assert (made.response.text, len(lines(file))) == ("hi", 1)

    @pytest.mark.parametrize("mode", MODES, ids=str)
    def test_no_event_loop_waits_for_the_disk(self, mode, file, monkeypatch):
        """A sync call writes where it is, an async call in a thread."""
        threads = []
        monkeypatch.setattr(RecordingFile, "append", lambda *_: threads.append(threading.current_thread()))
        call(mode, Record(file), "hi")
        call(mode, Record(file), ServerError("down"))
        assert [thread is threading.main_thread() for thread in threads] == [mode.backend is None] * 2


class TestSecrets:
    @pytest.mark.parametrize("mode", MODES[:2] + MODES[3:4], ids=str)
    def test_no_key_stands_in_the_file(self, mode, file):
        """Neither from headers and `extra`, nor in messages that echo one."""
        request = REQUEST.evolve(
            headers={"Authorization": "Bearer sk-secret-1", "x-api-key": "sk-secret-2", "x-trace": "7"},
            extra={"api_key": "sk-secret-3", "list": [{"password": "sk-secret-4"}]},
        )
        for number in range(1, 5):
            for error in (
                ServerError(f"wrong key sk-secret-{number}!"),
                GuardRefused(f"sk-secret-{number}", reason=f"sk-secret-{number}"),
                ResponseInvalid(f"sk-secret-{number}", response=Response("x"), problem=f"sk-secret-{number}"),
            ):
                call(mode, Record(file), error, request=request)
        text = file.read_text()
        assert len(lines(file)) == 12
        assert "sk-secret" not in text
        assert '"headers": {"x-trace": "7"}' in text

    @pytest.mark.skipif(os.name == "nt", reason="files have no mode there")
    def test_a_new_file_is_its_owners(self, file):
        """One that is there keeps its mode."""
        Pipeline(ScriptedProvider("hi"), [Record(file)]).complete(REQUEST)
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        file.chmod(0o644)
        Pipeline(ScriptedProvider("hi"), [Record(file)]).complete(REQUEST)
        assert (stat.S_IMODE(file.stat().st_mode), len(lines(file))) == (0o644, 2)


class TestWhatCannotBeRecorded:
    @pytest.mark.parametrize("value", [object(), {1}], ids=["an object", "a set"])
    def test_a_request_that_is_not_json(self, mode, value, file, reports):
        """It is reported once, and the call goes on."""
        for _ in range(2):
            assert call(mode, Record(file), "hi", request=REQUEST.evolve(extra={"a": value})).response.text == "hi"
        assert reports() == (
            f"fluxibly: a call is not recorded in {str(file)!r}: the request: expected JSON values: got {kind_of(value)}\n"
        )
        assert lines(file) == []

    def test_an_answer_that_is_not_json(self, mode, file, reports):
        made = call(mode, Record(file), Response("hi", details={"a": {1}}))
        assert made.response.text == "hi"
        assert "is not recorded" in reports()
        assert lines(file) == []

    def test_an_answer_that_is_too_deep(self, mode, file, reports):
        deep = {}
        for _ in range(100_000):
            deep = {"a": deep}
        assert call(mode, Record(file), Response("hi", details=deep)).response.text == "hi"
        assert reports() == (
            f"fluxibly: a call is not recorded in {str(file)!r}: {'Chunk' if mode.streaming else 'Response'}.to_dict: "
            "expected JSON values: they are nested too deeply\n"
        )
        assert lines(file) == []

    def test_a_parsed_instance(self, file, reports):
        """JSON has no instances, so the user is told where to put the layer."""

        class Person:
            def __init__(self, name: str) -> None:
                self.name = name

        def parse(request, call_next):
            response = yield from call_next(request)
            return response.evolve(parsed=Person(response.text))

        Pipeline(ScriptedProvider("Ann"), [Record(file), parse]).complete(REQUEST)
        assert "has no `parsed`, because a Person is not JSON; have Record and Replay inside of Validation" in reports()
        assert short(lines(file)[0]) == {"answer": {"text": "Ann"}}

    def test_a_parsed_table(self, mode, file):
        layers = [Validation(schema={"type": "object"})]
        made = call(mode, [Record(file), *layers], '{"a": 1}')
        assert made.response.parsed == {"a": 1}
        assert short(lines(file)[0])["answer"]["parsed"] == {"a": 1}

    def test_a_file_that_cannot_be_written(self, mode, file, reports):
        """The call has its answer; that nothing is recorded is said once."""
        layers = [Record(file), Record(file)]
        file.mkdir()
        for layer in layers:
            assert call(mode, layer, "hi").response.text == "hi"
        assert (
            reports()
            == f"fluxibly: Record cannot write {str(file)!r} (Is a directory); the calls go on, and are not recorded\n"
        )

    @pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
    def test_a_disk_that_is_full(self, file):
        """What does not fit leaves no part of a line, and later reading is not harmed."""
        script = """
import resource, sys
from fluxibly import Pipeline, Request
from fluxibly.middleware import Record
from fluxibly.testing import ScriptedProvider
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
pipeline = Pipeline(ScriptedProvider("one", "x" * 3000, "two", "y" * 3000), [Record(sys.argv[1])])
for number in range(4):
    print(len(pipeline.complete(Request(model="m", messages=str(number))).text))
"""
        done = subprocess.run(
            [sys.executable, "-c", script, file], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.stdout.split() == ["3", "3000", "3", "3000"]
        assert (
            done.stderr
            == f"fluxibly: Record cannot write {str(file)!r} (File too large); the calls go on, and are not recorded\n"
        )
        assert [short(line)["answer"]["text"] for line in lines(file)] == ["one", "two"]
        assert file.read_bytes().endswith(b"\n")


class TestSettings:
    def test_repr(self, file):
        assert repr(Record(file)) == f"Record(file={str(file)!r})"

    @pytest.mark.parametrize(
        ("given", "got"),
        [(None, "None"), ("", "''"), (3, "3"), (b"a", "a bytes"), ("a\0b", r"'a\x00b'"), ("\ud800", r"'\ud800'")],
    )
    def test_a_file_that_is_none(self, given, got):
        for kind in (Record, Replay):
            with pytest.raises(ValueError, match="expected") as caught:
                kind(given)
            expected = f"{kind.__name__}: file: expected the path of a file (a str or a pathlib.Path), got {got}"
            assert str(caught.value) == expected

    def test_a_folder_that_is_none(self, tmp_path):
        """That is said before anything is asked."""
        name = str(tmp_path / "none" / "a.jsonl")
        for make in (lambda: Record(name), lambda: Replay(name, missing="ask")):
            with pytest.raises(ConfigError) as caught:
                make()
            assert f"file: expected a file in a folder that exists, got {name!r}; make the folder" in str(caught.value)
        Replay(name)  # it needs no folder, and its first call says what is missing

    def test_a_folder_in_place_of_a_file(self, tmp_path):
        for make in (lambda: Record(tmp_path), lambda: Replay(tmp_path, missing="ask")):
            with pytest.raises(ConfigError) as caught:
                make()
            assert str(caught.value).endswith(f"file: expected the path of a file, got the folder {str(tmp_path)!r}")

    def test_a_file_in_the_home_folder(self, mode, tmp_path, monkeypatch):
        """As in the URL of a store."""
        monkeypatch.setenv("HOME", str(tmp_path))
        call(mode, Record("~/a.jsonl"), "hi")
        assert call(mode, Replay("~/a.jsonl")).response.text == "hi"
        assert len(lines(tmp_path / "a.jsonl")) == 1

    def test_in_yaml(self, tmp_path):
        config = tmp_path / "llm.yaml"
        config.write_text(f"llm: {{framework: echo, model: e, middleware: [record: {{file: {tmp_path / 'a.jsonl'}}}]}}")
        with LLM.from_yaml(config) as llm:
            assert llm.complete("hi").text
        assert len(lines(tmp_path / "a.jsonl")) == 1
        config.write_text("llm: {framework: echo, model: e, middleware: [record: {file: none/a.jsonl}]}")
        with pytest.raises(
            ConfigError, match=r"llm.middleware\[0\].record.file: expected a file in a folder that exists"
        ):
            LLM.from_yaml(config)

    def test_the_laws(self, file):
        check_middleware(Record(file))
        assert lines(file)

    def test_the_file_stays_where_it_was(self, file, monkeypatch):
        """A program that changes its folder afterwards does not change the recording's."""
        monkeypatch.chdir(file.parent)
        layer = Record("answers.jsonl")
        monkeypatch.chdir("/")
        Pipeline(ScriptedProvider("hi"), [layer]).complete(REQUEST)
        assert len(lines(file)) == 1


class TestManyAtOnce:
    def test_threads(self, file):
        """100 threads record to one file through one instance."""
        layer = Record(file)

        def work(number):
            pipeline = Pipeline(ScriptedProvider(*["x" * 5000] * 3), [layer])
            for _ in range(3):
                pipeline.complete(REQUEST.evolve(seed=number))

        with ThreadPoolExecutor(100) as pool:
            list(pool.map(work, range(100)))
        found = sorted(line["request"]["seed"] for line in lines(file))
        assert found == sorted([*range(100)] * 3)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_tasks(self, backend, file):
        """1,000 tasks do."""
        layer = Record(file)
        pipeline = AsyncPipeline(AsyncScriptedProvider(*["hi"] * 1000), [layer])

        async def main():
            async with anyio.create_task_group() as group:
                for number in range(1000):
                    group.start_soon(pipeline.complete, REQUEST.evolve(seed=number))

        run_async(main, backend)
        assert sorted(line["request"]["seed"] for line in lines(file)) == [*range(1000)]

    def test_processes(self, file):
        """Two programs append to one file at once, and no line is torn."""
        script = """
import sys
from fluxibly import Pipeline, Request
from fluxibly.middleware import Record
from fluxibly.testing import ScriptedProvider
pipeline = Pipeline(ScriptedProvider(*["x" * 20_000] * 80), [Record(sys.argv[1])])
sys.stdin.readline()
for number in range(80):
    pipeline.complete(Request(model=sys.argv[2], messages="Hi"))
"""
        command = [sys.executable, "-c", script, str(file)]
        both = [subprocess.Popen([*command, name], stdin=subprocess.PIPE, stderr=subprocess.PIPE) for name in "ab"]
        for process in both:
            assert process.stdin is not None
            process.stdin.write(b"\n")
            process.stdin.flush()
        for process in both:
            assert process.communicate(timeout=100)[1] == b""
        models = [line["request"]["model"] for line in lines(file)]
        assert (models.count("a"), models.count("b")) == (80, 80)

    def test_a_call_within_the_writing(self, file, monkeypatch):
        """As a signal handler may make one: it does not wait for itself."""
        layer = Record(file)
        write, calls = os.write, []

        def interrupted(descriptor, data):
            if not calls:
                calls.append(1)
                Pipeline(ScriptedProvider("inner"), [layer]).complete(REQUEST)
            return write(descriptor, data)

        monkeypatch.setattr(os, "write", interrupted)
        Pipeline(ScriptedProvider("outer"), [layer]).complete(REQUEST)
        assert [short(line)["answer"]["text"] for line in lines(file)] == ["inner", "outer"]


class TestTornLines:
    @pytest.mark.parametrize("half", ["", "\ud83d"], ids=["UTF-8", "ASCII"])
    def test_a_line_of_its_own_after_a_torn_one(self, half, file, reports):
        """What a program that was killed has left is left out, whatever follows it."""
        answer = {"text": 'a"\\b é', "raw": {"yes": True, "no": False, "none": None, "number": -1.5e-7, "half": half}}
        line = encoded({"version": 1, "key": "k", "request": {"model": "mö"}, "answer": answer})
        for cut in range(1, len(line) - 2):
            file.write_bytes(line[:cut])
            Pipeline(ScriptedProvider("hi"), [Record(file)]).complete(REQUEST)
            first, second = file.read_bytes().splitlines()
            assert (first, json.loads(second)["answer"]["text"]) == (line[:cut], "hi")
            forget_reports()
            assert Pipeline(ScriptedProvider(), [Replay(file)]).complete(REQUEST).text == "hi", line[:cut]
            assert reports() == (
                f"fluxibly: line 1 of {str(file)!r} is cut off, as if a program had been killed while it wrote the line; "
                "Replay leaves such lines out\n"
            )

    def test_a_last_line_without_its_end(self, file):
        """As an editor may leave it: it counts."""
        record = Pipeline(ScriptedProvider("one", "two"), [Record(file)])
        record.complete(REQUEST)
        file.write_bytes(file.read_bytes().rstrip())
        record.complete(REQUEST)
        replay = Pipeline(ScriptedProvider(), [Replay(file)])
        assert [replay.complete(REQUEST).text for _ in range(2)] == ["one", "two"]

    def test_a_process_that_is_killed(self, file):
        """Whatever it was at, the file can be read."""
        script = """
import sys
from fluxibly import Pipeline, Request
from fluxibly.middleware import Record
from fluxibly.testing import ScriptedProvider
pipeline = Pipeline(ScriptedProvider(*["x" * 200_000] * 100_000), [Record(sys.argv[1])])
for number in range(100_000):
    pipeline.complete(Request(model="m-1", messages="What is the capital of France?"))
    print(number, flush=True)
"""
        process = subprocess.Popen([sys.executable, "-c", script, file], stdout=subprocess.PIPE)
        assert process.stdout is not None
        for _ in range(20):
            process.stdout.readline()
        process.kill()
        process.communicate()
        answer = Pipeline(ScriptedProvider(), [Replay(file)]).complete(REQUEST)
        assert len(answer.text) == 200_000


def test_an_error_that_is_a_time_limit(file):
    """The phase of the limit stands there, if it is not the usual one of the class."""
    error = RequestTimeout("late")
    error.phase = "connect"
    for each in (error, RequestTimeout("later")):
        with pytest.raises(RequestTimeout):
            Pipeline(ScriptedProvider(each), [Record(file)]).complete(REQUEST)
    assert [short(line)["error"].get("phase") for line in lines(file)] == ["connect", None]
