"""Conversations: what a turn adds, what a turn that ends early leaves, and the files that keep them."""

from __future__ import annotations

import asyncio
import copy
import gc
import json
import os
import pickle
import stat
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import anyio
import pytest
from hypothesis import given, strategies as st

from fluxibly import (
    LLM,
    AsyncLLM,
    Chunk,
    LLMConfig,
    Message,
    ProviderError,
    StreamInterrupted,
    conversation as conversation_module,
    register_llm_framework,
    sleep,
)
from fluxibly.errors import BadPrompt, BadRequest, ConfigError, DeadlineExceeded
from fluxibly.middleware import Continue, Tools
from fluxibly.parts import Image, Opaque, Reasoning, Text
from fluxibly.testing import AsyncScriptedProvider, ScriptedProvider
from fluxibly.testing.modes import Mode, run_async
from fluxibly.types import Response, ToolCall

SYSTEM = Message.system("Be brief.")


@pytest.fixture(autouse=True)
def _registries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fluxibly.registry._frameworks", {})


def made(mode: Mode, *answers: Any, middleware: Any = ()) -> Any:
    """Return a model that answers from a script."""
    kind = AsyncScriptedProvider if mode.backend else ScriptedProvider
    provider = kind(*answers)
    register_llm_framework("scripted", lambda _: provider, async_provider=lambda _: provider, replace=True)
    config = LLMConfig(framework="scripted", model="m")
    llm = (AsyncLLM if mode.backend else LLM)(config, middleware=list(middleware))
    llm.script = provider
    return llm


def turn(mode: Mode, chat: Any, prompt: Any, **settings: Any) -> Response:
    """Take a turn in a mode, and read its stream to the end."""

    async def aturn() -> Response:
        if not mode.streaming:
            return await chat.send(prompt, **settings)
        async with chat.stream(prompt, **settings) as stream:
            async for _ in stream:
                pass
            return stream.response

    if mode.backend:
        return run_async(aturn, mode.backend)
    if not mode.streaming:
        return chat.send(prompt, **settings)
    with chat.stream(prompt, **settings) as stream:
        for _ in stream:
            pass
        return stream.response


def texts(chat: Any) -> list[tuple[str, str]]:
    return [(message.role, message.text) for message in chat.messages]


class TestTurns:
    def test_the_messages_grow(self, mode: Mode) -> None:
        """A turn adds the prompt and the answer, and the next turn sends all of them."""
        llm = made(mode, "Four.", "Five.")
        chat = llm.conversation(system="Be brief.")
        assert turn(mode, chat, "2 + 2?").text == "Four."
        assert turn(mode, chat, "And 1 more?", temperature=0.5).text == "Five."
        assert texts(chat) == [
            ("system", "Be brief."),
            ("user", "2 + 2?"),
            ("assistant", "Four."),
            ("user", "And 1 more?"),
            ("assistant", "Five."),
        ]
        first, second = llm.script.requests
        assert [message.text for message in second.messages] == [text for _, text in texts(chat)[:-1]]
        assert (first.temperature, second.temperature) == (None, 0.5)
        assert chat.last_error is None

    def test_what_tools_add(self, mode: Mode) -> None:
        """The calls of tools and their results stand between the prompt and the answer, with their reasoning."""
        call = ToolCall("c1", "double", {"number": 4})
        first = Response.from_parts([Reasoning(text="Let me see.", signature="c2ln"), call])

        def double(number: int) -> int:
            """Double a number."""
            return 2 * number

        llm = made(mode, first, "Eight.", "Nine.", middleware=[Tools([double])])
        chat = llm.conversation()
        response = turn(mode, chat, "Twice 4?")
        assert chat.messages == [Message.user("Twice 4?"), *response.added, response.message]
        assert [message.role for message in chat.messages] == ["user", "assistant", "tool", "assistant"]
        assert chat.messages[1].reasoning[0].signature == "c2ln"
        turn(mode, chat, "And 1 more?")
        assert llm.script.requests[-1].messages == tuple(chat.messages[:-1])

    def test_a_prompt_of_several_messages(self, mode: Mode) -> None:
        """A prompt may be messages: the results of tools that the program has run itself, or dicts."""
        call = ToolCall("c1", "clock", {})
        chat = made(mode, Response(tool_calls=[call]), "Noon.").conversation()
        response = turn(mode, chat, {"role": "user", "content": "What time is it?"})
        turn(mode, chat, [Message.tool("12:00", response.tool_calls[0])])
        assert [message.role for message in chat.messages] == ["user", "assistant", "tool", "assistant"]

    def test_an_answer_that_went_on(self, mode: Mode) -> None:
        """An answer in several parts is one message."""
        cut = Response("One two", finish_reason="length")
        llm = made(mode, cut, Response(" three.", finish_reason="stop"), middleware=[Continue()])
        chat = llm.conversation()
        turn(mode, chat, "Count.")
        assert texts(chat) == [("user", "Count."), ("assistant", "One two three.")]

    def test_an_answer_as_an_object(self, mode: Mode) -> None:
        """`into=` works as in other calls."""
        chat = made(mode, '{"a": 1}').conversation()
        assert turn(mode, chat, "JSON?", into=dict[str, int]).parsed == {"a": 1}
        assert chat.messages[-1].text == '{"a": 1}'

    def test_the_list_may_be_changed(self) -> None:
        """Between two turns the program may shorten the messages."""
        llm = made(Mode(streaming=False), "one", "two")
        chat = llm.conversation(system="Be brief.")
        chat.send("1?")
        del chat.messages[1:]
        chat.send("2?")
        assert [message.text for message in llm.script.requests[1].messages] == ["Be brief.", "2?"]

    @pytest.mark.parametrize("messages", [None, 5, "Hello", {"role": "user", "content": "Hello"}, ["Hello"]])
    def test_what_is_no_list_of_messages(self, messages: Any) -> None:
        """What cannot be sent is refused where it is set, and the next turn works."""
        chat = made(Mode(streaming=False), "Yes.").conversation(system="Be brief.")
        with pytest.raises(TypeError, match=r"messages: expected a .*Message\.user\(…\)"):
            chat.messages = messages
        chat.send("Well?")
        assert len(chat.messages) == 3

    def test_messages_may_be_set(self) -> None:
        """Any messages may take the place of the list, also in OpenAI's shape."""
        chat = made(Mode(streaming=False), "Yes.", "No.").conversation()
        chat.messages = (SYSTEM, {"role": "user", "content": "Hello"})
        chat.send("Well?")
        assert [message.text for message in chat.messages] == ["Be brief.", "Hello", "Well?", "Yes."]

    @pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda chat: pickle.loads(pickle.dumps(chat))])  # noqa: S301  # our own
    def test_a_copy_is_a_branch(self, way: Any) -> None:
        """A copy goes on by itself from where the conversation is, also while a turn is under way."""
        chat = LLM("echo:echo").conversation(system="Be brief.")
        stream = chat.stream("left")
        branch = way(chat)
        branch.send("right")
        list(stream)
        assert texts(chat) == [("system", "Be brief."), ("user", "left"), ("assistant", "left")]
        assert texts(branch) == [("system", "Be brief."), ("user", "right"), ("assistant", "right")]

    def test_the_repr_has_no_content(self) -> None:
        """The `repr` says how long a conversation is, and nothing of what was said."""
        chat = made(Mode(streaming=False), "secret").conversation(system="secret")
        chat.send("secret")
        assert repr(chat) == "<Conversation of 3 messages>"


class TestEarlyEnds:
    def test_a_failure(self, mode: Mode) -> None:
        """A turn that fails leaves the messages, says why, and the next turn works."""
        chat = made(mode, BadRequest("no"), "Yes.").conversation(system="Be brief.")
        with pytest.raises(BadRequest) as caught:
            turn(mode, chat, "Well?")
        assert chat.messages == [SYSTEM]
        assert chat.last_error is caught.value
        turn(mode, chat, "Well?")
        assert chat.last_error is None
        assert len(chat.messages) == 3

    def test_an_interruption(self, stream_mode: Mode) -> None:
        """A stream that breaks after output leaves the messages, too."""
        chat = made(stream_mode, [Chunk("Ye"), ProviderError("cut")]).conversation()
        with pytest.raises(StreamInterrupted) as caught:
            turn(stream_mode, chat, "Well?")
        assert chat.messages == []
        assert chat.last_error is caught.value

    @pytest.mark.parametrize(
        ("prompt", "settings", "kind"),
        [
            ("", {}, BadPrompt),
            ("Well?", {"temprature": 1}, TypeError),
            ("Well?", {"temperature": 9}, ConfigError),
            (5, {}, TypeError),
        ],
    )
    def test_a_mistake(self, mode: Mode, prompt: Any, settings: Any, kind: type[Exception]) -> None:
        """A mistake of the caller begins no turn."""
        chat = made(mode, "Yes.").conversation()
        with pytest.raises(kind):
            turn(mode, chat, prompt, **settings)
        assert turn(mode, chat, "Well?").text == "Yes."
        assert len(chat.messages) == 2

    @pytest.mark.parametrize("how", ["close", "drop", "break", "unread"])
    def test_a_stream_that_is_left(self, how: str) -> None:
        """A stream that is closed or dropped before its end leaves the messages, and the next turn works."""
        llm = made(Mode(streaming=True), ["a ", "b ", "c"], "Yes.")
        chat = llm.conversation()
        stream = chat.stream("Well?")
        if how != "unread":
            assert next(iter(stream)).text == "a "
        if how in ("close", "break"):
            stream.close()
        del stream
        assert isinstance(chat.last_error, GeneratorExit) or how in ("drop", "unread")
        assert chat.send("Well?").text == ("Yes." if how != "unread" else "a b c")
        assert llm.script.opened == llm.script.closed
        assert len(chat.messages) == 2

    def test_an_async_stream_that_is_left(self, anyio_backend: str) -> None:
        """The same for an AsyncLLM, where a dropped stream ends on the event loop."""
        llm = made(Mode(streaming=True, backend="asyncio"), ["a ", "b"], ["a ", "b"], "Yes.")

        async def main() -> None:
            chat = llm.conversation()
            async with chat.stream("Well?") as stream:
                async for _ in stream:
                    break
            assert isinstance(chat.last_error, GeneratorExit)
            stream = chat.stream("Well?")
            if anyio_backend == "asyncio":  # trio warns of every async generator that is dropped
                await anext(aiter(stream))
            del stream
            gc.collect()
            assert (await chat.send("Well?")).text == ("Yes." if anyio_backend == "asyncio" else "a b")
            assert len(chat.messages) == 2

        run_async(main, anyio_backend)

    def test_a_cancelled_turn(self, anyio_backend: str) -> None:
        """A cancelled turn leaves the messages, and its cancellation is the last error."""

        class Slow:
            async def complete(self, request: Any) -> str:
                await anyio.sleep_forever()
                return ""

        register_llm_framework("slow", lambda _: Slow(), replace=True)

        async def main() -> None:
            chat = AsyncLLM("slow:m").conversation()
            with anyio.move_on_after(0.01):
                await chat.send("Well?")
            assert chat.messages == []
            assert isinstance(chat.last_error, anyio.get_cancelled_exc_class())

        run_async(main, anyio_backend)

    def test_a_turn_out_of_time(self) -> None:
        """A limit of a turn holds, and leaves the messages."""

        class Slow:
            def complete(self, request: Any) -> str:
                threading.Event().wait(5)
                return ""

        register_llm_framework("slow", lambda _: Slow(), replace=True)
        chat = LLM("slow:m").conversation()
        with pytest.raises(DeadlineExceeded):
            chat.send("Well?", timeout=0.05)
        assert chat.messages == []

    def test_an_interrupted_program(self) -> None:
        """Ctrl-C in a turn leaves the messages."""
        chat = made(Mode(streaming=False), KeyboardInterrupt(), "Yes.").conversation()
        with pytest.raises(KeyboardInterrupt):
            chat.send("Well?")
        assert isinstance(chat.last_error, KeyboardInterrupt)
        assert chat.send("Well?").text == "Yes."

    @pytest.mark.parametrize("streaming", [False, True])
    def test_interrupted_at_any_line(self, streaming: bool) -> None:
        """Ctrl-C at any line of a turn leaves the messages of whole turns, and the next turn works."""
        chat = made(Mode(streaming=streaming), *["Yes."] * 200).conversation()
        line, interrupted = 1, True
        while interrupted:
            before = len(chat.messages)
            interrupted = interrupt_at(line, partial(turn, Mode(streaming=streaming), chat, "Well?"))
            assert len(chat.messages) - before in ((0, 2) if interrupted else (2,))
            assert chat.send("Well?").text == "Yes."
            line += 1
        assert line > 20


def interrupt_at(line: int, function: Callable[[], object]) -> bool:
    """Call a function with Ctrl-C before a line of conversation.py, counted as they run. Return whether there was such a line."""
    seen = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal seen
        if frame.f_code.co_filename != conversation_module.__file__:
            return None
        seen += event == "line"
        if event == "line" and seen == line:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


class TestOneAtATime:
    def test_a_second_turn(self, stream_mode: Mode) -> None:
        """A turn while a stream is open is a RuntimeError, and the first goes on."""
        llm = made(stream_mode, ["a ", "b"], "Yes.")
        chat = llm.conversation()

        async def main() -> None:
            stream: Any = chat.stream("1?")
            await anext(aiter(stream)) if stream_mode.backend else next(iter(stream))
            with pytest.raises(RuntimeError, match="a turn of this conversation is under way"):
                chat.stream("2?")
            with pytest.raises(RuntimeError, match="a turn of this conversation is under way"):
                await chat.send("2?")  # the error comes before there is something to await
            _ = [each async for each in stream] if stream_mode.backend else list(stream)

        run_async(main, stream_mode.backend or "asyncio")
        assert texts(chat) == [("user", "1?"), ("assistant", "a b")]

    def test_two_threads(self) -> None:
        """Of many threads that take a turn at once, one does, and each of the others gets the RuntimeError."""
        entered, go = threading.Event(), threading.Event()

        class Waiting:
            def complete(self, request: Any) -> str:
                entered.set()
                go.wait(10)
                return "Yes."

        register_llm_framework("waiting", lambda _: Waiting(), replace=True)
        chat = LLM("waiting:m").conversation()
        refused: list[RuntimeError] = []
        first = threading.Thread(target=chat.send, args=("Well?",))
        first.start()
        assert entered.wait(10)

        def try_it() -> None:
            try:
                chat.send("Well?")
            except RuntimeError as error:
                refused.append(error)

        threads = [threading.Thread(target=try_it) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        go.set()
        first.join()
        assert len(refused) == 8
        assert len(chat.messages) == 2
        assert chat.last_error is None

    def test_a_second_reader(self) -> None:
        """A second thread that reads a turn's stream is refused, and the turn goes on with the first."""
        entered, go = threading.Event(), threading.Event()

        class Slow:
            def stream(self, request: Any) -> Any:
                yield "a "
                entered.set()
                go.wait(10)
                yield "b"

        register_llm_framework("slow", lambda _: Slow())
        chat = LLM("slow:m", middleware=[]).conversation()
        stream = chat.stream("Well?")
        first = threading.Thread(target=lambda: list(stream))
        first.start()
        assert entered.wait(10)
        with pytest.raises(RuntimeError, match="another thread is reading this stream"):
            next(iter(stream))
        with pytest.raises(RuntimeError, match="a turn of this conversation is under way"):
            chat.send("Well?")
        go.set()
        first.join()
        assert texts(chat) == [("user", "Well?"), ("assistant", "a b")]

    def test_a_second_task(self, anyio_backend: str) -> None:
        """The same for tasks."""

        async def main() -> None:
            entered, go = anyio.Event(), anyio.Event()

            class Slow:
                async def stream(self, request: Any) -> Any:
                    yield "a "
                    entered.set()
                    await go.wait()
                    yield "b"

            register_llm_framework("slow", lambda _: Slow())
            chat = AsyncLLM("slow:m", middleware=[]).conversation()
            stream = chat.stream("Well?")

            async def read() -> None:
                _ = [each async for each in stream]

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(read)
                await entered.wait()
                with pytest.raises(RuntimeError, match="another task is reading this stream"):
                    await anext(stream)
                with pytest.raises(RuntimeError, match="a turn of this conversation is under way"):
                    await chat.send("Well?")
                go.set()
            assert texts(chat) == [("user", "Well?"), ("assistant", "a b")]

        run_async(main, anyio_backend)

    def test_leaving_at_the_last_chunk(self, stream_mode: Mode) -> None:
        """A consumer that leaves when the answer is whole has completed the turn."""

        def short(request: Any, call_next: Any) -> Any:
            yield from sleep(0)
            return Response("All of it.")

        chat = made(stream_mode, middleware=[short]).conversation()

        async def main() -> None:
            stream: Any = chat.stream("1?")
            while not stream._driver.ended:
                await anext(aiter(stream)) if stream_mode.backend else next(iter(stream))
            await stream.aclose() if stream_mode.backend else stream.close()
            assert chat.last_error is None
            assert texts(chat) == [("user", "1?"), ("assistant", "All of it.")]

        run_async(main, stream_mode.backend or "asyncio")


PARTS = st.sampled_from(
    [
        Text("Hä?\n\u2028😀"),
        Reasoning(text="Hm.", signature="c2ln"),
        ToolCall("c1", "look", {"where": "là"}),
        Image(data=b"\x00\xff", media_type="image/png"),
        Opaque("anthropic", {"type": "server_tool_use", "id": "s"}),
    ]
)


class TestFiles:
    @given(st.lists(st.lists(PARTS, min_size=1, max_size=4), max_size=4))
    def test_what_is_saved_is_loaded(self, tmp_path_factory: pytest.TempPathFactory, answers: Any) -> None:
        """All kinds of messages come back as they were."""
        llm = made(Mode(streaming=False), *[Response.from_parts(parts) for parts in answers])
        chat = llm.conversation(system="Be brief.")
        for number, _ in enumerate(answers):
            chat.send(f"{number}?")
        file = tmp_path_factory.mktemp("chats") / "chat.json"
        chat.save(file)
        assert llm.conversation(load=file).messages == chat.messages

    def test_the_file(self, tmp_path: Path) -> None:
        """The file is JSON with mode 600, whatever it was before, and nothing else is left in the folder."""
        file = tmp_path / "chat.json"
        file.write_text("old")
        file.chmod(0o644)
        link = tmp_path / "link.json"
        link.symlink_to(file)
        chat = made(Mode(streaming=False), "Yes.").conversation(system="Be brief.")
        chat.send("Well?")
        chat.save(link)
        assert link.is_symlink()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        found = json.loads(file.read_text(encoding="utf-8"))
        assert found["version"] == 1
        assert [each["role"] for each in found["messages"]] == ["system", "user", "assistant"]
        assert sorted(each.name for each in tmp_path.iterdir()) == ["chat.json", "link.json"]

    def test_a_save_that_fails(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A save that fails leaves the old file as it was, and no other file."""
        file = tmp_path / "chat.json"
        chat = made(Mode(streaming=False), "Yes.").conversation(system="Be brief.")
        chat.save(file)
        before = file.read_bytes()
        chat.send("Well?")

        def full(_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            chat.save(file)
        assert file.read_bytes() == before
        assert [each.name for each in tmp_path.iterdir()] == ["chat.json"]
        with pytest.raises(FileNotFoundError) as caught:
            chat.save(tmp_path / "nowhere" / "chat.json")
        assert str(caught.value).endswith(f"{str(tmp_path / 'nowhere' / 'chat.json')!r}")

    def test_what_is_no_file_stays(self, tmp_path: Path) -> None:
        """A folder or a pipe is not replaced, and the error names it."""
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        chat = LLM("echo:echo").conversation(system="Be brief.")
        for place in (pipe, tmp_path, Path(os.devnull)):
            with pytest.raises(OSError, match="expected a file to write or replace") as caught:
                chat.save(place)
            assert caught.value.filename == str(place)
        assert stat.S_ISFIFO(pipe.stat().st_mode)
        assert list(tmp_path.iterdir()) == [pipe]

    def test_half_a_surrogate_pair(self, tmp_path: Path) -> None:
        """A text that UTF-8 cannot hold is saved all the same."""
        chat = made(Mode(streaming=False), "half \ud83d, \udc80").conversation()
        chat.send("Well?")
        chat.messages.append({"role": "user", "content": "one of OpenAI's shape"})
        chat.save(tmp_path / "chat.json")
        loaded = LLM("echo:echo").conversation(load=tmp_path / "chat.json").messages
        assert loaded[:2] == chat.messages[:2]
        assert loaded[2] == Message.user("one of OpenAI's shape")

    def test_an_async_conversation_is_saved(self, tmp_path: Path, anyio_backend: str) -> None:
        """An AsyncLLM's conversation is saved by `await`, and loaded by the other kind of model, too."""
        file = tmp_path / "chat.json"
        llm = made(Mode(streaming=False, backend="asyncio"), "Yes.")

        async def main() -> None:
            chat = llm.conversation()
            await chat.send("Well?")
            await chat.save(file)

        run_async(main, anyio_backend)
        chat = made(Mode(streaming=False), "No.").conversation(load=str(file))
        assert texts(chat) == [("user", "Well?"), ("assistant", "Yes.")]
        assert chat.send("Really?").text == "No."

    def test_a_list_of_messages(self, tmp_path: Path) -> None:
        """A file with a bare list of messages in OpenAI's shape is read too."""
        file = tmp_path / "chat.json"
        file.write_text('[{"role": "system", "content": "Be brief."}]')
        assert LLM("echo:echo").conversation(load=file).messages == [SYSTEM]

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("{", "expected a conversation as save\\(\\) writes it, got a file that is not JSON"),
            ("[" * 100_000, "got a file that is not JSON"),
            ("\udcff", "got a file that is not JSON"),
            ("5", "got an int without messages"),
            ('{"messages": {}}', "without messages"),
            ('{"version": 2, "messages": []}', "a newer fluxibly has written this conversation"),
            ('[{"role": "nobody", "content": "x"}]', "role"),
            ("[5]", "chat.json: "),
        ],
    )
    def test_a_file_without_a_conversation(self, tmp_path: Path, text: str, problem: str) -> None:
        """The error names the file, and says what is wrong with it."""
        file = tmp_path / "chat.json"
        file.write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(ConfigError, match=problem) as caught:
            LLM("echo:echo").conversation(load=file)
        assert str(caught.value).startswith(str(file))

    def test_what_cannot_begin_one(self, tmp_path: Path) -> None:
        """A system message beside a file, or one that is no text, is a TypeError; a missing file says so."""
        llm = LLM("echo:echo")
        with pytest.raises(TypeError, match="expected system= or load=, got both"):
            llm.conversation(system="x", load=tmp_path)
        with pytest.raises(TypeError, match="system: expected a str, got a list"):
            llm.conversation(system=["x"])  # type: ignore[arg-type]  # what is tested
        with pytest.raises(
            TypeError, match=r"load: expected a file, got a list; to go on with messages, set chat\.messages"
        ):
            llm.conversation(load=[SYSTEM])  # type: ignore[arg-type]  # what is tested
        with pytest.raises(FileNotFoundError):
            llm.conversation(load=tmp_path / "none.json")


def test_many_conversations_of_one_model() -> None:
    """Conversations of one model do not mix, in threads and in tasks."""
    llm = LLM("echo:echo", middleware=[])
    chats = [llm.conversation(system=str(number)) for number in range(20)]
    threads = [threading.Thread(target=chat.send, args=(f"from {chat.messages[0].text}",)) for chat in chats]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(chat.messages[-1].text == f"from {chat.messages[0].text}" for chat in chats)

    async def main() -> None:
        allm = AsyncLLM("echo:echo", middleware=[])
        many = [allm.conversation(system=str(number)) for number in range(100)]
        await asyncio.gather(*(chat.send(f"from {chat.messages[0].text}") for chat in many))
        assert all(chat.messages[-1].text == f"from {chat.messages[0].text}" for chat in many)

    asyncio.run(main())
