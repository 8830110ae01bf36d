"""Calls whose requests have a `Target`: who is asked, with which parameters, and the life of the providers."""

from __future__ import annotations

import gc
import logging
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import anyio
import pytest
from anyio import from_thread
from support.canned_server import canned_server

from fluxibly import LLM, AsyncLLM, LLMConfig, Target, ask, register_llm_framework
from fluxibly.errors import AuthenticationError, ConfigError, ProviderError, RateLimitError, ServerError
from fluxibly.middleware import Fallback, Logging, Retry
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.provider import Provider
from fluxibly.testing import AsyncScriptedProvider, Cut, ScriptedProvider
from fluxibly.testing.modes import Mode, run, run_async
from fluxibly.types import ProviderInfo, Request, Response, Usage

REQUEST = Request(
    model="gpt", messages="hi", seed=7, temperature=0.9, extra={"of": "openai"}, headers={"x-gateway": "s-1"}
)


@pytest.fixture(autouse=True)
def _registries(monkeypatch):
    monkeypatch.setattr("fluxibly.registry._frameworks", {})


def scripted(mode, *answers):
    return (AsyncScriptedProvider if mode.backend else ScriptedProvider)(*answers)


def sent_to(*targets):
    """Return a middleware that sends the request to each target in turn, and returns the last answer."""

    def route(request, call_next):
        for target in targets:
            response = yield from call_next(request.evolve(target=target))
        return response

    return route


class Noted:
    """A middleware that keeps the records of calls."""

    def __init__(self):
        self.records = []

    def __call__(self, request, call_next):
        self.records.append(request.call)
        return (yield from call_next(request))


class Made:
    """A provider that a framework makes, and the list of those that were made."""

    def __init__(self, config):
        self.config = config
        self.closed = 0
        self.requests = []
        self.made.append(self)

    def answer(self, request):
        self.requests.append(request)
        return f"{self.config.model} answers"


class SyncMade(Made):
    def complete(self, request):
        return self.answer(request)

    def stream(self, request):
        yield self.answer(request)

    def close(self):
        self.closed += 1


class AsyncMade(Made):
    async def complete(self, request):
        return self.answer(request)

    async def stream(self, request):
        yield self.answer(request)

    async def aclose(self):
        self.closed += 1


@pytest.fixture
def made(monkeypatch):
    """The providers that the framework "made" made."""
    found = []
    monkeypatch.setattr(Made, "made", found, raising=False)
    register_llm_framework("made", SyncMade, async_provider=AsyncMade)
    return found


class TestWhoIsAsked:
    def test_the_target_gets_the_adapted_request(self, mode):
        """The pipeline's own provider gets none."""
        own, other = scripted(mode), scripted(mode, "one two")
        target = Target(other, model="claude", drop=["seed"], temperature=0.1)
        ran = run(mode, own, [sent_to(target)], REQUEST)
        assert ran.response.text == "one two"
        (asked,) = other.requests
        assert (asked.model, asked.seed, asked.temperature, asked.extra, asked.headers) == ("claude", None, 0.1, {}, {})
        assert (own.requests, other.opened, other.closed) == ([], mode.streaming, mode.streaming)

    def test_a_request_of_the_caller_may_have_a_target(self, mode):
        """No middleware is needed."""
        other = scripted(mode, "one two")
        ran = run(mode, scripted(mode), [], Request(model="m", messages="hi", target=Target(other, model="claude")))
        assert (ran.response.text, other.requests[0].model) == ("one two", "claude")

    def test_another_model_asks_the_same_provider(self, mode):
        """The name of a model keeps extra and headers."""
        own = scripted(mode, "fine")
        ran = run(mode, own, [sent_to(Target("gpt-mini"))], REQUEST)
        assert (ran.response.text, ran.response.provider) == ("fine", "scripted")
        (asked,) = own.requests
        assert (asked.model, asked.extra, asked.headers) == ("gpt-mini", REQUEST.extra, REQUEST.headers)

    def test_another_model_of_whom_a_router_chose(self, mode):
        """A fallback within a router stays with the router's choice."""
        other = scripted(mode, ServerError("down"), "fine")
        ran = run(mode, scripted(mode), [sent_to(Target(other)), Fallback(to=["gpt-mini"])], REQUEST)
        assert ran.response.text == "fine"
        assert [asked.model for asked in other.requests] == ["gpt", "gpt-mini"]

    def test_there_and_back(self, mode):
        """The record names the provider of each attempt, and the pipeline's own again after it."""
        own, other = scripted(mode, ServerError("down"), "fine"), scripted(mode, ServerError("down"))
        target = Target(other, model="claude")
        seen = []

        def watch(request, call_next):
            call = request.call
            for to in (None, target, None):
                changes = {"target": to, "model": "gpt"} if to is None else {"target": to}
                try:
                    return (yield from call_next(request.evolve(**changes)))
                except ServerError:
                    seen.append((call.target, call.provider.name, call.sent_model))
            raise AssertionError

        noted = Noted()
        ran = run(mode, own, [noted, watch], REQUEST)
        assert ran.response.text == "fine"
        assert seen == [(None, "ScriptedProvider", "gpt"), (target, "ScriptedProvider", "claude")]
        (record,) = noted.records
        assert (record.target, record.attempts) == (None, 3)
        assert [asked.headers for asked in own.requests] == [REQUEST.headers] * 2

    def test_the_record_and_the_response_name_who_answered(self, mode):
        """`response.provider` is the name in telemetry."""

        class Up(type(scripted(mode))):
            info = ProviderInfo(name="Up", framework="up", telemetry_name="up.service")

        noted = Noted()
        ran = run(mode, scripted(mode, ServerError("down")), [noted, Fallback(to=[Up("fine")])], REQUEST)
        (record,) = noted.records
        assert (record.provider.name, ran.response.provider) == ("Up", "up.service")
        assert [spent.provider.name for spent in record.spent] == ["ScriptedProvider", "Up"]

    def test_a_question_to_another_model_leaves_the_call_as_it_is(self, mode):
        """`ask` has a record of its own."""
        judge = scripted(mode, Response("yes", usage=Usage(input_tokens=2, output_tokens=1)))

        def judged(request, call_next):
            answer = yield from ask(request, target=Target(judge, model="judge"))
            assert (answer.text, request.call.target, request.call.provider.name) == ("yes", None, "ScriptedProvider")
            return (yield from call_next(request))

        own = scripted(mode, "fine")
        ran = run(mode, own, [judged], REQUEST)
        assert (ran.response.text, own.requests[0].model, judge.requests[0].model) == ("fine", "gpt", "judge")
        assert ran.response.total_usage == Usage(input_tokens=2, output_tokens=1)

    def test_an_interrupted_target_is_not_replayed(self, mode):
        """After output of a target, no other target is asked."""
        targets = [scripted(mode, ["one ", Cut()]), scripted(mode, "two")]
        ran = run(mode, scripted(mode, ServerError("down")), [Fallback(to=targets)], REQUEST)
        if mode.streaming:
            assert (ran.error.partial.text, targets[1].left) == ("one ", 1)
        else:
            assert ran.response.text == "two"


class TestKinds:
    @pytest.mark.parametrize("backend", ["asyncio", "trio"])
    @pytest.mark.parametrize("streaming", [False, True])
    def test_a_sync_provider_runs_in_a_thread(self, streaming, backend):
        """In an async pipeline it must not hold up the event loop."""
        threads = []

        class Blocking:
            def complete(self, request):
                threads.append(threading.get_ident())
                return "fine"

            def stream(self, request):
                yield self.complete(request)

        ran = run(Mode(streaming, backend), AsyncScriptedProvider(), [sent_to(Target(Blocking()))], REQUEST)
        assert ran.response.text == "fine"
        assert threads[0] != threading.get_ident()

    @pytest.mark.parametrize("streaming", [False, True])
    def test_an_async_provider_in_a_sync_pipeline(self, streaming):
        """It is a mistake of the program, which no policy catches."""
        other = AsyncScriptedProvider("fine")
        stack = [Fallback(to=[other, ScriptedProvider("never")])]
        ran = run(Mode(streaming), ScriptedProvider(ServerError("down")), stack, REQUEST)
        assert isinstance(ran.error, TypeError)
        assert "the provider AsyncScriptedProvider is asynchronous; use AsyncPipeline or AsyncLLM" in str(ran.error)
        assert other.requests == []

    def test_a_target_without_stream(self, mode):
        """In a stream it is an error that names it, raised where the request is sent; the pipeline goes on."""

        class WholeOnly:
            def complete(self, request):
                return "whole"

        seen = []

        def watch(request, call_next):
            try:
                return (yield from call_next(request.evolve(target=Target(WholeOnly()))))
            except NotImplementedError as error:
                seen.append(str(error))
            return (yield from call_next(request))

        ran = run(mode, scripted(mode, "own"), [watch], REQUEST)
        assert ran.response.text == ("own" if mode.streaming else "whole")
        assert [message.startswith("the provider WholeOnly has no stream()") for message in seen] == [
            True
        ] * mode.streaming


class TestProvidersOfAPipeline:
    """Those of configurations: made once, when they are first asked, and closed with the pipeline."""

    def test_one_provider_for_equal_configurations(self, made):
        """Targets of the same text share it, also targets that a middleware makes for each call."""

        def route(request, call_next):
            return (yield from call_next(request.evolve(target=Target("made:a", top_p=0.5))))

        with Pipeline(ScriptedProvider(), [route]) as pipeline:
            assert made == []
            assert [pipeline.complete(REQUEST).text for _ in range(3)] == ["a answers"] * 3
            with pipeline.stream(REQUEST) as stream:
                assert [chunk.text for chunk in stream] == ["a answers"]
            assert len(made) == 1

    def test_one_provider_for_each_configuration(self, made):
        """Configurations that differ in anything have providers of their own, and each pipeline has its own."""
        configs = [LLMConfig(framework="made", model="a", api_key=key) for key in ("1", "2", "1")]
        stack = [sent_to(Target("made:a"), Target("made:b"), *map(Target, configs))]
        for _ in range(2):
            with Pipeline(ScriptedProvider(), stack) as pipeline:
                pipeline.complete(REQUEST)
        assert [each.config.model for each in made] == ["a", "b", "a", "a"] * 2
        assert [each.closed for each in made] == [1] * 8

    def test_many_threads_make_it_once(self, made):
        """Threads that come at the same time wait for the first."""
        barrier = threading.Barrier(8, timeout=10)

        def slow(config):
            time.sleep(0.02)
            return SyncMade(config)

        register_llm_framework("slow", slow)

        def together(request, call_next):
            barrier.wait()
            return (yield from call_next(request.evolve(target=Target("slow:a"))))

        with Pipeline(ScriptedProvider(), [together]) as pipeline, ThreadPoolExecutor(8) as threads:
            calls = [threads.submit(pipeline.complete, REQUEST) for _ in range(8)]
            assert [call.result().text for call in calls] == ["a answers"] * 8
        assert [(len(each.requests), each.closed) for each in made] == [(8, 1)]

    def test_many_tasks_make_it_once(self, made, backend):
        """So do tasks."""

        async def main():
            async with AsyncPipeline(AsyncScriptedProvider(), [sent_to(Target("made:a"))]) as pipeline:
                async with anyio.create_task_group() as tasks:
                    for _ in range(20):
                        tasks.start_soon(pipeline.complete, REQUEST)
                assert [(len(each.requests), each.closed) for each in made] == [(20, 0)]

        run_async(main, backend)
        assert [each.closed for each in made] == [1]

    def test_making_it_does_not_block_the_event_loop(self, made, backend):
        """A provider may read files or load a model."""
        begun, go = anyio.Event(), threading.Event()

        def slow(config):
            from_thread.run_sync(begun.set)
            assert go.wait(10)
            return AsyncMade(config)

        register_llm_framework("slow", slow, async_provider=slow)

        async def main():
            stack = [sent_to(Target("slow:a"))]
            async with AsyncPipeline(AsyncScriptedProvider(), stack) as pipeline, anyio.create_task_group() as tasks:
                tasks.start_soon(pipeline.complete, REQUEST)
                await begun.wait()
                go.set()

        run_async(main, backend)
        assert [(len(each.requests), each.closed) for each in made] == [(1, 1)]

    def test_a_failure_is_not_kept(self, made, mode):
        """The next call tries again."""
        fail = [True]

        def flaky(config):
            if fail:
                fail.pop()
                raise RateLimitError("no seats left")
            return (AsyncMade if mode.backend else SyncMade)(config)

        register_llm_framework("flaky", flaky, async_provider=flaky)
        noted = Noted()
        ran = run(mode, scripted(mode), [noted, Retry(base_delay=0), sent_to(Target("flaky:a"))], REQUEST)
        assert ran.response.text == "a answers"
        assert noted.records[0].attempts == 1

    def test_a_given_provider_stays_open(self, made):
        """It belongs to the user."""
        given = ScriptedProvider("fine")
        with Pipeline(ScriptedProvider(), [sent_to(Target("made:a"), Target(given))]) as pipeline:
            pipeline.complete(REQUEST)
            pipeline.close()
        assert (given.shut, pipeline.provider.shut, made[0].closed) == (False, True, 1)

    def test_an_async_pipeline_closes_both_kinds(self, made, backend):
        """A sync provider that it made is closed in a thread."""
        register_llm_framework("sync", SyncMade)
        given = ScriptedProvider("fine")

        async def main():
            targets = (Target("made:a"), Target("sync:b"), Target(given))
            async with AsyncPipeline(AsyncScriptedProvider(), [sent_to(*targets)]) as pipeline:
                await pipeline.complete(REQUEST)
                await pipeline.aclose()

        run_async(main, backend)
        assert ([each.closed for each in made], given.shut) == ([1, 1], False)

    def test_an_error_of_a_close_leaves_none_open(self, made, backend):
        """The error is raised when all others are closed."""

        def broken(config):
            provider = SyncMade(config)
            provider.close = lambda: 1 / 0
            return provider

        register_llm_framework("broken", broken)
        stack = [sent_to(Target("made:a"), Target("broken:b"), Target("made:c"))]
        pipeline = Pipeline(ScriptedProvider(), stack)
        pipeline.complete(REQUEST)
        with pytest.raises(ZeroDivisionError):
            pipeline.close()
        assert pipeline.provider.shut

        async def main():
            pipeline = AsyncPipeline(AsyncScriptedProvider(), stack)
            await pipeline.complete(REQUEST)
            with pytest.raises(ZeroDivisionError):
                await pipeline.aclose()
            assert pipeline.provider.shut

        run_async(main, backend)
        assert [each.closed for each in made] == [1, 0, 1] * 2

    def test_use_after_close(self, made):
        """No call begins, and a call under way makes no further provider."""

        def closing(request, call_next):
            pipeline.close()
            return (yield from call_next(request.evolve(target=Target("made:a"))))

        pipeline = Pipeline(ScriptedProvider(), [closing])
        with pytest.raises(RuntimeError, match="this pipeline is closed; make a new one"):
            pipeline.complete(REQUEST)
        with pytest.raises(RuntimeError, match="this Pipeline is closed; make a new one"):
            pipeline.complete(REQUEST)
        assert made == []

    def test_a_provider_that_was_given_for_one_call_is_freed(self):
        """A pipeline keeps neither the target nor the provider."""
        kept = []

        def route(request, call_next):
            provider = ScriptedProvider("fine")
            kept.append(weakref.ref(provider))
            return (yield from call_next(request.evolve(target=Target(provider))))

        pipeline = Pipeline(ScriptedProvider(), [route])
        for _ in range(3):
            pipeline.complete(REQUEST)
        gc.collect()
        assert [ref() for ref in kept] == [None] * 3

    def test_a_pipeline_is_a_provider(self, mode):
        """A target may have a stack of its own."""
        inner = scripted(mode, ServerError("down"), "fine")
        kind = AsyncPipeline if mode.backend else Pipeline
        target = Target(kind(inner, [Retry(base_delay=0)]), model="claude")
        assert isinstance(target.to, Provider)
        ran = run(mode, scripted(mode), [sent_to(target)], REQUEST)
        assert (ran.response.text, [asked.model for asked in inner.requests]) == ("fine", ["claude"] * 2)


KEY, OTHER_KEY = "sk-first-1234567890", "sk-second-1234567890"


@pytest.fixture
def servers():
    """A server of OpenAI's dialect that fails, and one of Anthropic's that answers."""
    with canned_server() as first, canned_server() as second:
        first.fail = (500, '{"error": {"message": "it is down"}}', {})
        yield first, second


def make_call(mode, servers, stack, overrides=None):
    """Call an LLM of the first server in a mode. Return its texts as they came, and the response."""
    config = LLMConfig(
        framework="openai",
        model="gpt",
        api_key=KEY,
        api_base=servers[0].url,
        headers={"x-mine": "h-first"},
        additional_params={"user": "u-1"},
    )
    overrides = overrides or {}

    def call():
        with LLM(config, stack) as llm:
            if not mode.streaming:
                return [], llm.complete("hi", **overrides)
            with llm.stream("hi", **overrides) as stream:
                return [chunk.text for chunk in stream], stream.response

    async def acall():
        async with AsyncLLM(config, stack) as llm:
            if not mode.streaming:
                return [], await llm.complete("hi", **overrides)
            async with llm.stream("hi", **overrides) as stream:
                return [chunk.text async for chunk in stream], stream.response

    return call() if mode.backend is None else run_async(acall, mode.backend)


class TestOverHTTP:
    @pytest.fixture
    def target(self, servers):
        config = LLMConfig(framework="anthropic", model="claude-x", api_key=OTHER_KEY, api_base=servers[1].url)
        return Target(config, drop=["seed"])

    def test_a_fallback_to_another_service(self, mode, servers, target, caplog):
        """The other service answers, in its own words and streamed; the record and the response say so."""
        caplog.set_level(logging.DEBUG, "fluxibly")
        noted = Noted()
        overrides = {"seed": 3, "headers": {"x-own": "h-call"}, "extra": {"logit_bias": {}}}
        texts, response = make_call(mode, servers, [Logging(), noted, Fallback(to=[target])], overrides)
        assert (response.text, response.provider, response.model) == ("You said: hi", "anthropic", "claude-x-0613")
        assert [text for text in texts if text] == (["You ", "said: ", "hi"] if mode.streaming else [])
        (record,) = noted.records
        assert (record.provider.framework, record.model, record.attempts) == ("anthropic", "claude-x-0613", 2)
        assert [(each.provider.framework, each.model) for each in record.spent] == [
            ("openai", "gpt"),
            ("anthropic", "claude-x"),
        ]
        assert record.spent[0].usage is None
        assert response.total_usage == response.usage == record.spent[1].usage
        messages = [each.getMessage() for each in caplog.records]
        what = "streaming request" if mode.streaming else "request"
        assert messages[0].startswith(f"LLM {what} started | name=OpenAIProvider, framework=openai, model=gpt,")
        assert any("completed | " in message for message in messages)
        (decision,) = [message for message in messages if message.startswith("LLM call decision")]
        address = servers[1].url.removeprefix("http://")
        assert decision == (
            "LLM call decision | middleware=Fallback, "
            f'decision="asks claude-x at anthropic ({address}) after ServerError", error_type=ServerError, '
            'error_message="openai (gpt): 127.0.0.1 answered 500: it is down. The service failed; try again."'
        )
        assert not any("LLM call failed" in message or "sk-" in message for message in messages)

        (asked,) = servers[0].seen
        assert asked.headers["authorization"] == f"Bearer {KEY}"
        assert (asked.headers["x-mine"], asked.headers["x-own"]) == ("h-first", "h-call")
        assert (asked.body["user"], asked.body["seed"], asked.body["logit_bias"]) == ("u-1", 3, {})
        (asked,) = servers[1].seen
        assert asked.headers["x-api-key"] == OTHER_KEY
        assert asked.body.keys() == {"model", "messages", "max_tokens"} | ({"stream"} if mode.streaming else set())
        assert not any(secret in f"{asked}" for secret in (KEY, "h-first", "h-call", "u-1", "authorization"))

    def test_the_error_of_the_last_target_is_raised(self, mode, servers, target):
        """It names that target's service, and no key."""
        servers[1].fail = (529, f'{{"error": {{"type": "overloaded_error", "message": "not {OTHER_KEY}"}}}}', {})
        with pytest.raises(ServerError) as caught:
            make_call(mode, servers, [Fallback(to=[target])])
        assert (caught.value.provider, caught.value.model) == ("anthropic", "claude-x")
        assert "sk-" not in str(caught.value)

    @pytest.mark.parametrize("inside", [True, False])
    def test_retries(self, mode, servers, target, inside):
        """Within a fallback each target is tried again; outside of it the fallback begins anew."""
        servers[1].fail = servers[0].fail
        order = []
        for name, server in zip("ab", servers, strict=True):
            server.refuse = lambda asked, name=name: order.append(name)
        stack = [Fallback(to=[target]), Retry(max_retries=1, base_delay=0)]
        with pytest.raises(ServerError):
            make_call(mode, servers, stack if inside else stack[::-1])
        assert order == list("aabb" if inside else "abab")

    def test_a_key_that_is_missing_by_then(self, mode, servers, monkeypatch):
        """Is an AuthenticationError, so that whoever catches errors of providers goes on to the next target."""
        seen = []

        def fallback(request, call_next):
            for asked in (request, *[request.evolve(target=Target(to)) for to in ("anthropic:claude-x", "echo:m")]):
                try:
                    return (yield from call_next(asked))
                except ProviderError as error:
                    seen.append((type(error), request.call.provider.framework, request.call.attempts))
                    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
            raise AssertionError

        monkeypatch.setenv("ANTHROPIC_API_KEY", OTHER_KEY)
        _, response = make_call(mode, servers, [fallback])
        assert (response.text, response.provider) == ("hi", "echo")
        assert seen == [(ServerError, "openai", 1), (AuthenticationError, "openai", 1)]

    def test_a_configuration_that_cannot_work(self, mode, servers):
        """Is no error of a provider."""
        config = LLMConfig(framework="azure", model="m", api_key=OTHER_KEY)
        with pytest.raises(ConfigError, match="azure has no default address: set api_base"):
            make_call(mode, servers, [sent_to(Target(config))])

    def test_a_fallback_skips_what_cannot_be_asked(self, mode, servers, monkeypatch, caplog):
        """A target without its key, or whose configuration cannot work: the log and the error say so."""
        config = LLMConfig(framework="azure", model="m", api_key=OTHER_KEY)
        monkeypatch.setenv("ANTHROPIC_API_KEY", OTHER_KEY)

        def forget(request, call_next):
            monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
            return (yield from call_next(request))

        stack = [forget, Fallback(to=["anthropic:claude-x", config, "echo:m"])]
        _, response = make_call(mode, servers, stack)
        assert (response.text, response.provider) == ("hi", "echo")
        decisions = [record.decision for record in caplog.records]
        assert decisions == [
            "skips claude-x at anthropic, which cannot be asked: AuthenticationError",
            "skips m at azure, which cannot be asked: ConfigError",
            "asks m at echo after ServerError",
        ]

        monkeypatch.setenv("ANTHROPIC_API_KEY", OTHER_KEY)
        with pytest.raises(ServerError) as caught:
            make_call(mode, servers, [forget, Fallback(to=["anthropic:claude-x", config])])
        first, second, third = caught.value.__notes__
        assert "gpt at openai" in first
        assert "failed with ServerError: " in first
        assert second.startswith("Fallback: claude-x at anthropic could not be asked: AuthenticationError: ")
        assert third.startswith("Fallback: m at azure could not be asked: ConfigError: azure has no default address")
        assert "sk-" not in "".join(caught.value.__notes__)
