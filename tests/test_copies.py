"""Copies and pickles of models and of middleware."""

from __future__ import annotations

import asyncio
import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fluxibly import LLM, AsyncLLM, CallNext, Flow, LLMConfig, Pipeline, Request, Response, default_stack
from fluxibly.middleware import (
    Balance,
    Budget,
    Cache,
    CircuitBreaker,
    Concurrency,
    Continue,
    Cost,
    Deadline,
    Defaults,
    ExtractReasoning,
    Fallback,
    Guard,
    Hedge,
    Logging,
    Metrics,
    RateLimit,
    Record,
    Redact,
    Replay,
    Retry,
    RetryBudget,
    SimulateStream,
    StreamMeter,
    StreamTimeout,
    Timing,
    Tools,
    Tracing,
    Validation,
)
from fluxibly.stores import MemoryStore
from fluxibly.stores.sqlite import SQLiteStore
from fluxibly.testing import ScriptedProvider


def polite(request: Request, call_next: CallNext) -> Flow[Response]:
    """Change nothing."""
    return (yield from call_next(request))


def weather(city: str) -> str:
    """Return the weather of a city."""
    return city


def passes(_: object) -> None:
    """Refuse nothing."""


class Counting:
    """A middleware of the user's own."""

    def __init__(self, by: int) -> None:
        self.by = by

    def __call__(self, request: Request, call_next: CallNext) -> Flow[Response]:
        return (yield from call_next(request))


def layers(folder: Path) -> list[Any]:
    return [
        Tracing(capture="span"), Logging(), Metrics(), Timing(), StreamMeter(), Cost(), Deadline(30), Defaults(seed=1), Tools([weather]), Continue(),
        Redact(restore=True), Cache(), Record(folder / "calls.jsonl"), Replay(folder / "calls.jsonl", missing="ask"),
        Guard(output=passes, release="sentence"), Validation(), ExtractReasoning(), Fallback(["echo:other"]), Balance(["echo:other"]),
        Hedge(2.0), Retry(budget=RetryBudget()), CircuitBreaker(), Budget(tokens=10**6), RateLimit(requests=600), Concurrency(9),
        RateLimit(), Concurrency("auto"), StreamTimeout(idle=30), SimulateStream(), Counting(3), polite,
    ]  # fmt: skip


WAYS = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda each: pickle.loads(pickle.dumps(each)),  # noqa: S301  # our own
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
class TestCopies:
    def test_a_model(self, way: Any, tmp_path: Path) -> None:
        """A copy of a model with every built-in middleware, after a call, has the same settings and answers."""
        stack = [layer for layer in layers(tmp_path) if not isinstance(layer, Tools)]  # echo takes none
        llm = LLM("echo:m", stack, seed=5, stop=["END"])
        before = repr(llm)
        llm.complete("hi")
        list(llm.forward_stream("hi"))
        made = way(llm)
        assert made is not llm
        assert repr(made) == before
        assert made.config == llm.config
        assert made.pipeline.provider is not llm.pipeline.provider
        assert made.complete("hello").text == "hello"
        llm.close()
        assert made.complete("hello").text == "hello"

    def test_an_async_model(self, way: Any) -> None:
        """The same for an AsyncLLM."""
        llm = AsyncLLM("echo:m", temperature=0.5)

        async def main() -> None:
            await llm.forward("hi")
            made = way(llm)
            await llm.aclose()
            assert await made.forward("hello") == "hello"
            assert made.config == llm.config

        asyncio.run(main())

    def test_a_closed_model(self, way: Any) -> None:
        """A copy of a model that is closed is open."""
        llm = LLM("echo:m")
        llm.close()
        assert way(llm).forward("hi") == "hi"

    def test_a_model_of_a_class_of_ones_own(self, way: Any) -> None:
        """What a subclass keeps goes with the copy."""
        made = way(Named("me"))
        assert (made.owner, made.forward("hi")) == ("me", "hi")

    def test_a_schema(self, way: Any) -> None:
        """A copy checks answers as the original does."""
        layer = way(Validation(schema=list[int]))
        assert Pipeline(ScriptedProvider("[1, 2]"), [layer]).complete(Request(model="m", messages="?")).parsed == [1, 2]

    @pytest.mark.parametrize("number", range(29))
    def test_a_middleware(self, way: Any, number: int, tmp_path: Path) -> None:
        """A copy of a middleware has the same settings."""
        layer = layers(tmp_path)[number]
        assert repr(way(layer)).partition(" at 0x")[0] == repr(layer).partition(" at 0x")[0]


class Named(LLM):
    """A model with an owner."""

    def __init__(self, owner: str) -> None:
        super().__init__("echo:m")
        self.owner = owner


def test_a_deep_copy_of_a_model_of_ones_own() -> None:
    """A deep copy has what a subclass keeps as a copy of its own, also if that refers to the model."""

    class Keeps(LLM):
        def __init__(self) -> None:
            super().__init__("echo:m")
            self.history = ["hi"]
            self.chat = self.conversation(system="Be brief.")
            self.me = self

    llm = Keeps()
    made = copy.deepcopy(llm)
    made.history.append("again")
    made.chat.send("hello")
    assert made.me is made
    assert (llm.history, len(llm.chat.messages), len(made.chat.messages)) == (["hi"], 1, 3)
    llm.close()
    assert made.chat.send("hello").text == "hello"


def test_copies_share_their_middleware() -> None:
    """A copy in the same process has the same limiter, so that both together stay under the limit."""
    limit = RateLimit(requests=5)
    llm = LLM("echo:m", [limit])
    assert copy.copy(llm).pipeline.middleware[0] is limit
    assert copy.deepcopy(llm).pipeline.middleware[0] is limit


def test_stores(tmp_path: Path) -> None:
    """A pickled store in memory begins empty; one on disk is the same file."""
    store = MemoryStore()
    store.save("key", b"value", None, 0.0)
    assert pickle.loads(pickle.dumps(store)).load("key", 0.0) is None  # noqa: S301  # our own
    disk = SQLiteStore(tmp_path / "answers.db", max_bytes=10**6)
    assert repr(pickle.loads(pickle.dumps(disk))) == repr(disk)  # noqa: S301  # our own
    first, second = pickle.loads(pickle.dumps([RateLimit(requests=5, store=store), RateLimit(requests=6, store=store)]))  # noqa: S301  # our own
    assert first.store is second.store


def test_a_pickle_in_another_process(tmp_path: Path) -> None:
    """A model travels to another process, as multiprocessing and Ray send it, and its key from the environment does not."""
    config = LLMConfig(framework="openai", model="m", headers={"x-gateway": "harbour"})
    os.environ["OPENAI_API_KEY"] = "sk-of-this-process"
    try:
        file = tmp_path / "llm.pickle"
        file.write_bytes(pickle.dumps(LLM(config, default_stack(config, RateLimit(requests=5)))))
    finally:
        del os.environ["OPENAI_API_KEY"]
    assert b"sk-of-this-process" not in file.read_bytes()
    code = f"import pickle; llm = pickle.load(open({str(file)!r}, 'rb')); print(llm.config.model, len(llm.pipeline.middleware))"
    env = {**os.environ, "OPENAI_API_KEY": "sk-of-that-process"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["m", "8"]
