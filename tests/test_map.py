"""`llm.map`: many prompts at once, bounded, with errors as values, in sync and async code."""

from __future__ import annotations

import gc
import itertools
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from support.misbehaving import Peer, Received, serve

from fluxibly import LLM, Answer, AsyncLLM, LLMConfig, register_llm_framework
from fluxibly.errors import BadPrompt, ConfigError, FluxiblyError, ProviderError
from fluxibly.types import Request


class Counted:
    """What the providers of these tests have seen."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.asked: list[str] = []
        self.now = self.most = self.cancelled = 0

    def enter(self, text: str) -> None:
        with self.lock:
            self.asked.append(text)
            self.now += 1
            self.most = max(self.most, self.now)

    def leave(self) -> None:
        with self.lock:
            self.now -= 1


seen = Counted()


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "seen", Counted())
    monkeypatch.setattr("fluxibly.registry._frameworks", {})


def answer_to(text: str) -> str:
    if "wrong" in text:
        raise ProviderError(f"no answer to {text}")
    if "bug" in text:
        raise KeyError(text)
    return text.upper()


class Threads:
    def __init__(self, config: LLMConfig) -> None:
        pass

    def complete(self, request: Request) -> str:
        text = request.messages[-1].text
        seen.enter(text)
        try:
            time.sleep(0.05 if "slow" in text else 0.002)
            return answer_to(text)
        finally:
            seen.leave()


class Tasks:
    def __init__(self, config: LLMConfig) -> None:
        pass

    async def complete(self, request: Request) -> str:
        text = request.messages[-1].text
        seen.enter(text)
        try:
            await anyio.sleep(3600 if "hang" in text else 0.05 if "slow" in text else 0.002)
            return answer_to(text)
        except anyio.get_cancelled_exc_class():
            seen.cancelled += 1
            raise
        finally:
            seen.leave()


@pytest.fixture
def name() -> str:
    register_llm_framework("mapped", Threads, async_provider=Tasks, replace=True)
    return "mapped:m"


def prompts(count: int) -> list[str]:
    return [f"p{number}" for number in range(count)]


class TestThreads:
    def test_every_prompt_has_one_answer(self, name: str) -> None:
        """Answers come as they are there, each with the place of its prompt."""
        answers = [*LLM(name).map(prompts(300), concurrency=20)]
        assert sorted(answer.row for answer in answers) == [*range(300)]
        assert all(answer.text == f"P{answer.row}" for answer in answers)
        assert sorted(seen.asked) == sorted(prompts(300))

    @pytest.mark.parametrize("concurrency", [1, 7])
    def test_no_more_at_once_than_asked_for(self, name: str, concurrency: int) -> None:
        assert len([*LLM(name).map(prompts(50), concurrency=concurrency)]) == 50
        assert seen.most == concurrency

    def test_in_order(self, name: str) -> None:
        """With `ordered`, a slow answer holds the others back."""
        given = ["slow", *prompts(60), "slow"]
        answers = [*LLM(name).map(given, concurrency=10, ordered=True)]
        assert [answer.text for answer in answers] == [text.upper() for text in given]

    def test_a_slow_answer_holds_nobody_back(self, name: str) -> None:
        assert next(LLM(name).map(["slow", *prompts(10)], concurrency=4)).row != 0

    def test_errors_are_values(self, name: str) -> None:
        """Whatever a call raises is the error of its row alone."""
        given: list[Any] = ["a", "wrong", "", "bug", 5, "b"]
        answers = [*LLM(name).map(given, ordered=True)]
        assert [type(answer.error) for answer in answers] == [
            type(None), ProviderError, BadPrompt, KeyError, TypeError, type(None)
        ]  # fmt: skip
        with pytest.raises(ProviderError, match="no answer to wrong"):
            _ = answers[1].text
        assert answers[1].response is None

    def test_prompts_are_read_as_they_are_needed(self, name: str) -> None:
        """An endless generator is read at most twice `concurrency` ahead, in the thread that reads the answers."""
        read: list[int] = []

        def endless() -> Iterator[str]:
            while True:
                read.append(threading.get_ident())
                yield "p"

        answers = LLM(name).map(endless(), concurrency=5)
        assert read == []
        for number, _ in zip(range(20), answers, strict=False):
            assert len(read) <= number + 1 + 10
        answers.close()
        assert {*read} == {threading.get_ident()}

    def test_settings_and_types_are_those_of_each_call(self, name: str) -> None:
        answers = LLM(name).map(['{"A": 1}', "no JSON"], into={"type": "object"}, ordered=True, max_tokens=100)
        first, second = answers
        assert first.response is not None
        assert first.response.parsed == {"A": 1}
        assert isinstance(second.error, FluxiblyError)

    def test_an_error_of_the_prompts_comes_after_the_answers(self, name: str) -> None:
        def broken() -> Iterator[str]:
            yield from prompts(5)
            raise OSError("the file is gone")

        got: list[Answer] = []
        with pytest.raises(OSError, match="the file is gone"):
            got.extend(LLM(name).map(broken()))
        assert len(got) == 5

    def test_leaving_ends_the_threads(self, name: str) -> None:
        """Nothing more is sent after the loop is left; calls that cannot be stopped end by themselves."""
        before = threading.active_count()
        for _ in LLM(name).map(prompts(1000), concurrency=10):
            break
        gc.collect()
        end = time.monotonic() + 30
        while threading.active_count() > before and time.monotonic() < end:
            time.sleep(0.01)
        assert threading.active_count() <= before
        assert len(seen.asked) <= 40

    @pytest.mark.parametrize("how", ["leave", "Ctrl-C"])
    def test_leaving_ends_calls_over_http(self, how: str) -> None:
        """A server that never answers does not hold up a loop that is left, also by Ctrl-C while it waits."""

        def script(peer: Peer, request: Received) -> None:
            if b"hang" not in request.body:
                peer.answer({"choices": [{"message": {"role": "assistant", "content": "A"}, "finish_reason": "stop"}]})
                return
            if next(hanging) == 2 and how == "Ctrl-C":
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            peer.wait_for_end()

        hanging = itertools.count()
        with serve(script) as server:
            llm = LLM("openai:m", api_base=server.url, api_key="k")
            answers = llm.map(["a", "hang", "hang", "hang"], concurrency=4)
            if how == "leave":
                assert next(answers).text == "A"
                answers.close()
            else:
                with pytest.raises(KeyboardInterrupt):
                    assert [answer.text for answer in answers] == ["A"]
            assert [thread.name for thread in threading.enumerate() if thread.name == "fluxibly-map"] == []
            llm.close()

    def test_spans_of_the_caller_are_those_of_the_calls(self, name: str) -> None:
        """The calls run in a copy of the context of the loop."""
        from contextvars import ContextVar

        who: ContextVar[str] = ContextVar("who", default="nobody")
        found: list[str] = []

        def note(request: Request, call_next: Any) -> Any:
            found.append(who.get())
            return (yield from call_next(request))

        who.set("me")
        assert len([*LLM(name, middleware=[note]).map(["a", "b"])]) == 2
        assert found == ["me", "me"]


@pytest.mark.anyio
class TestTasks:
    async def test_every_prompt_has_one_answer(self, name: str) -> None:
        answers = [answer async for answer in AsyncLLM(name).map(prompts(300), concurrency=20)]
        assert sorted(answer.row for answer in answers) == [*range(300)]
        assert all(answer.text == f"P{answer.row}" for answer in answers)
        assert seen.most == 20

    async def test_in_order(self, name: str) -> None:
        given = ["slow", *prompts(60), "slow"]
        answers = [answer.text async for answer in AsyncLLM(name).map(given, concurrency=10, ordered=True)]
        assert answers == [text.upper() for text in given]

    async def test_prompts_may_be_asynchronous(self, name: str) -> None:
        """One task at a time asks an asynchronous generator for its next prompt."""
        at_once = 0

        async def given() -> AsyncIterator[str]:
            nonlocal at_once
            for prompt in prompts(50):
                at_once += 1
                assert at_once == 1
                await anyio.lowlevel.checkpoint()
                at_once -= 1
                yield prompt

        answers = [answer.row async for answer in AsyncLLM(name).map(given(), concurrency=7, ordered=True)]
        assert answers == [*range(50)]

    async def test_errors_are_values(self, name: str) -> None:
        given: list[Any] = ["a", "wrong", "", "bug", 5]
        answers = [type(answer.error) async for answer in AsyncLLM(name).map(given, ordered=True)]
        assert answers == [type(None), ProviderError, BadPrompt, KeyError, TypeError]

    async def test_a_slow_reader_stops_the_sending(self, name: str) -> None:
        """At most twice `concurrency` answers are there or under way, and ten times with `ordered`."""
        for ordered, most in ((False, 10), (True, 50)):
            seen.asked.clear()
            async with aclosing(AsyncLLM(name).map(prompts(1000), concurrency=5, ordered=ordered)) as answers:
                async for _ in answers:
                    break
                await anyio.sleep(0.1)
                assert len(seen.asked) <= most + 1

    async def test_leaving_cancels_what_is_under_way(self, name: str) -> None:
        given = ["a", *["hang"] * 100]
        async with aclosing(AsyncLLM(name).map(given, concurrency=8)) as answers:
            async for answer in answers:
                assert answer.text == "A"
                break
        assert seen.now == 0
        assert seen.cancelled == len(seen.asked) - 1 > 0

    async def test_a_cancelled_reader(self, name: str) -> None:
        """When the task that reads is cancelled, nothing is under way any more."""
        with anyio.move_on_after(0.1) as scope:
            async for _ in AsyncLLM(name).map(["hang"] * 10, concurrency=4):
                pass
        assert scope.cancelled_caught
        assert seen.now == 0
        assert seen.cancelled == 4

    async def test_an_error_of_the_prompts_comes_after_the_answers(self, name: str) -> None:
        def broken() -> Iterator[str]:
            yield from prompts(5)
            raise OSError("the file is gone")

        got: list[int] = []

        async def read() -> None:
            async for answer in AsyncLLM(name).map(broken()):
                got.append(answer.row)  # noqa: PERF401  # the error comes after these

        with pytest.raises(OSError, match="the file is gone"):
            await read()
        assert sorted(got) == [*range(5)]

    async def test_an_error_of_the_loop(self, name: str) -> None:
        """The exception of the code that reads is its own, and nothing stays under way."""

        async def read() -> None:
            async with aclosing(AsyncLLM(name).map(["a", "hang", "hang"])) as answers:
                async for _ in answers:
                    raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await read()
        assert seen.now == 0

    async def test_no_prompts(self, name: str) -> None:
        assert [answer async for answer in AsyncLLM(name).map([])] == []

    async def test_two_maps_of_one_model(self, name: str) -> None:
        """Several loops may share a model."""
        llm = AsyncLLM(name)
        counts: list[int] = []

        async def read(count: int) -> None:
            counts.append(len([answer async for answer in llm.map(prompts(count), concurrency=5)]))

        async with anyio.create_task_group() as group:
            for count in (10, 20, 30):
                group.start_soon(read, count)
        assert sorted(counts) == [10, 20, 30]


@pytest.mark.parametrize("kind", [LLM, AsyncLLM])
class TestMistakes:
    """Mistakes are raised by `map` itself, before anything is sent."""

    @pytest.mark.parametrize("given", ["one prompt", b"bytes", 5, None], ids=repr)
    def test_one_prompt(self, name: str, kind: Any, given: object) -> None:
        with pytest.raises(TypeError, match="map: expected several prompts, like a list of texts, got "):
            kind(name).map(given)

    @pytest.mark.parametrize("concurrency", [0, -1, 1.5, "many", None, True], ids=repr)
    def test_concurrency(self, name: str, kind: Any, concurrency: object) -> None:
        with pytest.raises(ConfigError, match="concurrency: expected a whole number from 1 up, got "):
            kind(name).map(["a"], concurrency=concurrency)

    def test_keywords(self, name: str, kind: Any) -> None:
        with pytest.raises(TypeError, match="a call has no setting 'stream'"):
            kind(name).map(["a"], stream=True)
        with pytest.raises(ConfigError, match="temperature"):
            kind(name).map(["a"], temperature=9)
        with pytest.raises(ConfigError, match="timeout: expected a number"):
            kind(name).map(["a"], timeout=-1)


def test_synchronous_code_has_no_asynchronous_prompts(name: str) -> None:
    async def given() -> AsyncIterator[str]:
        yield "a"

    with pytest.raises(TypeError, match="map: expected several prompts"):
        LLM(name).map(given())  # type: ignore[arg-type]


def test_the_end_of_the_event_loop(name: str) -> None:
    """A loop that is left early, and whose generator nobody closes, ends with the event loop at the latest."""

    async def leave() -> None:
        async for _ in AsyncLLM(name).map(["a", *["hang"] * 10]):
            break

    anyio.run(leave)
    gc.collect()
    assert seen.now == 0


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_prompts_that_end_the_program(name: str, backend: str, kind: type[BaseException]) -> None:
    """What prompts raise reaches the consumer after what was under way, even if it is no `Exception`."""
    rows: list[int] = []

    def given() -> Iterator[str]:
        yield from ("a", "b", "c")
        raise kind

    async def read() -> bool:
        try:
            async for answer in AsyncLLM(name).map(given(), concurrency=2):
                rows.append(answer.row)  # noqa: PERF401  # what comes before the exception counts
        except kind:
            return True
        return False

    assert anyio.run(read, backend=backend)
    assert sorted(rows) == [0, 1, 2]
