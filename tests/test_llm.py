"""LLM and AsyncLLM: the public interface, as in the README."""

from __future__ import annotations

import gc
import logging
import threading

import anyio
import attrs
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from support.typed_dicts import keys_of

import fluxibly
import fluxibly.llm
from fluxibly import (
    LLM,
    AsyncLLM,
    Chunk,
    LLMConfig,
    Message,
    Pipeline,
    ProviderError,
    Request,
    Response,
    Restart,
    StreamInterrupted,
    Usage,
    default_stack,
    register_llm_framework,
    register_middleware,
)
from fluxibly._keywords import KEYWORDS
from fluxibly.errors import ConfigError, DeadlineExceeded, RequestTimeout, ServerError
from fluxibly.limits import Timeouts
from fluxibly.middleware import (
    Balance,
    CircuitBreaker,
    Concurrency,
    Deadline,
    Fallback,
    Hedge,
    Logging,
    Metrics,
    RateLimit,
    Retry,
    StreamMeter,
    StreamTimeout,
    Timing,
    Tracing,
    Validation,
)
from fluxibly.testing import AsyncScriptedProvider, ScriptedProvider
from fluxibly.testing.modes import BACKENDS

ECHO = LLMConfig(framework="echo", model="m")


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture(autouse=True)
def _registries(monkeypatch):
    monkeypatch.setattr("fluxibly.registry._frameworks", {})
    monkeypatch.setattr("fluxibly.registry._middleware", {})


def scripted(*answers, **settings):
    """Return a configuration whose provider follows a script, and the list of providers that are made from it."""
    made = []

    def provider(config):
        made.append(ScriptedProvider(*answers))
        return made[-1]

    def async_provider(config):
        made.append(AsyncScriptedProvider(*answers))
        return made[-1]

    register_llm_framework("scripted", provider, async_provider=async_provider, replace=True)
    return LLMConfig(**{"framework": "scripted", "model": "m", **settings}), made


class TestCalls:
    def test_sync(self):
        """The four methods return a str, an iterator of str, a Response and a Stream."""
        llm = LLM(config=ECHO)
        assert llm.forward("Hello there", temperature=0.2) == "Hello there"
        assert list(llm.forward_stream("Count to three")) == ["Count ", "to ", "three"]
        response = llm.complete("Hello there")
        assert (str(response), response.finish_reason, response.model) == ("Hello there", "stop", "m")
        assert response.usage == Usage(input_tokens=2, output_tokens=2)
        assert response.elapsed >= 0
        with llm.stream([Message.user("Hi you")]) as stream:
            assert [chunk.text for chunk in stream if chunk.text] == ["Hi ", "you"]
        assert stream.response.text == "Hi you"
        assert stream.response.stats.chunks == 3

    def test_async(self, backend):
        """The methods of AsyncLLM return the same, awaited."""

        async def main():
            async with AsyncLLM(ECHO) as llm:
                assert await llm.forward("Hello there", temperature=0.2) == "Hello there"
                assert [text async for text in llm.forward_stream("Count on")] == ["Count ", "on"]
                assert (await llm.complete("Hello")).finish_reason == "stop"
                async with llm.stream([Message.user("Hi you")]) as stream:
                    assert [chunk.text async for chunk in stream if chunk.text] == ["Hi ", "you"]
                assert stream.response.stats.chunks == 3
            with pytest.raises(RuntimeError, match="closed"):
                await llm.forward("x")

        anyio.run(main, backend=backend)

    def test_the_same_objects_everywhere(self):
        """`fluxibly.llm` exports the same LLM and LLMConfig as `fluxibly`."""
        assert fluxibly.llm.LLM is fluxibly.LLM
        assert fluxibly.llm.LLMConfig is fluxibly.LLMConfig

    @pytest.mark.parametrize(
        "prompt", ["hi", Message.user("hi"), [Message.user("hi")], (Message.user("hi"),)], ids=repr
    )
    def test_prompts(self, prompt):
        """A prompt is a str, a message or a sequence of messages."""
        config, made = scripted("ok")
        assert LLM(config).forward(prompt) == "ok"
        assert made[0].requests[0].messages == (Message.user("hi"),)

    def test_a_provider_of_ten_lines(self, backend):
        """A provider that returns and yields strings has the whole default stack, with LLM and with AsyncLLM."""

        class Parrot:
            def __init__(self, config):
                self.name = config.model

            def complete(self, request):
                return f"{self.name}: {request.messages[-1].text}"

            def stream(self, request):
                yield from self.complete(request).split(" ")

        register_llm_framework("parrot", Parrot)
        config = LLMConfig(framework="parrot", model="Polly")
        assert LLM(config).forward("Hello") == "Polly: Hello"
        assert list(LLM(config).forward_stream("Hello")) == ["Polly:", "Hello"]

        async def main():
            llm = AsyncLLM(config)
            assert await llm.forward("Hello") == "Polly: Hello"
            assert [text async for text in llm.forward_stream("Hello")] == ["Polly:", "Hello"]

        anyio.run(main, backend=backend)

    def test_retries_of_the_configuration(self, monkeypatch):
        """`max_retries` reaches the default stack's Retry."""
        monkeypatch.setattr("fluxibly._drivers.stack.SystemClock.sleep", staticmethod(lambda seconds: None))
        config, made = scripted(ServerError("a"), ServerError("b"), "ok", max_retries=1)
        with pytest.raises(ServerError, match="b"):
            LLM(config).forward("hi")
        assert made[0].left == 1


class TestSettings:
    def test_of_the_configuration(self):
        """The request has the settings of the configuration, and None for every other setting."""
        config, made = scripted("ok", temperature=0.1, top_p=0.5, additional_params={"top_k": 4})
        LLM(config).forward("hi")
        (request,) = made[0].requests
        assert (request.model, request.temperature, request.top_p, request.max_tokens) == ("m", 0.1, 0.5, None)
        assert request.extra == {"top_k": 4}

    def test_of_a_call_take_precedence(self):
        """The settings of a call apply to that call only; None means that a parameter is not sent."""
        config, made = scripted("ok", "ok", temperature=0.1, max_tokens=5)
        llm = LLM(config)
        llm.forward("hi", temperature=None, max_tokens=9, model="other", stop="x", seed=1)
        llm.forward("hi")
        first, second = made[0].requests
        assert (first.temperature, first.max_tokens, first.model, first.stop, first.seed) == (
            None,
            9,
            "other",
            ("x",),
            1,
        )
        assert (second.temperature, second.max_tokens, second.model, second.stop) == (0.1, 5, "m", ())

    def test_extra_is_merged_over_additional_params(self):
        """The call's `extra` takes precedence, and the configuration stays unchanged."""
        config, made = scripted("ok", "ok", additional_params={"a": 1, "b": 1})
        llm = LLM(config)
        llm.forward("hi", extra={"b": 2, "c": 3})
        llm.forward("hi")
        assert made[0].requests[0].extra == {"a": 1, "b": 2, "c": 3}
        assert made[0].requests[1].extra == config.additional_params == {"a": 1, "b": 1}

    def test_an_unknown_setting_is_a_type_error_with_the_nearest_name(self, backend):
        """Every method raises the error at the call."""
        llm = LLM(ECHO)
        for call in (llm.forward, llm.complete, llm.stream, llm.forward_stream, AsyncLLM(ECHO).forward_stream):
            with pytest.raises(TypeError, match="a call has no setting 'temprature'; did you mean 'temperature'"):
                call("hi", temprature=1)
        with pytest.raises(TypeError, match="pass provider parameters in extra="):
            llm.forward("hi", presence=1)

        async def main():
            with pytest.raises(TypeError, match="temprature"):
                await AsyncLLM(ECHO).forward("hi", temprature=1)

        anyio.run(main, backend=backend)

    def test_out_of_range(self):
        """A single error at the call lists all values out of range."""
        with pytest.raises(ConfigError) as caught:
            LLM(ECHO).forward_stream("hi", temperature=3, max_tokens=0, model="", extra="x")
        assert caught.value.problems == (
            "temperature: expected a number from 0 to 2, got 3",
            "max_tokens: expected a whole number from 1 up, got 0",
            "model: expected a non-empty str, got ''",
            "extra: expected a mapping (in YAML, a table), got a str",
        )

    def test_of_the_wrong_kind(self):
        """A setting without a range is checked for its type."""
        with pytest.raises(ConfigError) as caught:
            LLM(ECHO).forward("hi", seed="a", n=0, top_k=1.5, tool_choice=5, reasoning_effort=5, headers={"a": 5})
        assert caught.value.problems == (
            "seed: expected a whole number, got 'a'",
            "n: expected a whole number from 1 up, got 0",
            "top_k: expected a whole number, got 1.5",
            "tool_choice: expected a str, got 5",
            "reasoning_effort: expected a str, got 5",
            "headers.a: expected a str, got an int",
        )

    @pytest.mark.parametrize("name", ["model", "extra", "headers", "metadata"])
    def test_none_where_it_does_not_mean_unset(self, name):
        """None leaves a parameter of the model out. These are not parameters of the model."""
        with pytest.raises(ConfigError, match=f"^{name}: expected a .*, got None"):
            LLM(ECHO).forward("hi", **{name: None})
        assert LLM(ECHO).forward("hi", temperature=None, seed=None, tools=None, tool_choice=None) == "hi"

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"stream": True}, "a call has no setting 'stream'; call llm.stream(…) or llm.forward_stream(…)"),
            (
                {"system": "Be brief."},
                (
                    "a call has no setting 'system'; write [Message.system(…), Message.user(…)] as the prompt, or "
                    "llm.conversation(system=…)"
                ),
            ),
        ],
        ids=str,
    )
    def test_settings_of_other_clients(self, settings, message, backend):
        """A setting that other clients have is refused with what to write instead."""
        llm = LLM(ECHO)
        for call in (llm.forward, llm.forward_stream, llm.complete, llm.stream):
            with pytest.raises(TypeError) as caught:
                call("hi", **settings)
            assert str(caught.value) == message

        async def main():
            with pytest.raises(TypeError) as caught:
                await AsyncLLM(ECHO).forward("hi", **settings)
            assert str(caught.value) == message

        anyio.run(main, backend=backend)

    def test_restarts_are_for_streams(self):
        """Methods other than `stream` refuse `restarts`."""
        with pytest.raises(TypeError, match=r"no setting 'restarts'; only stream\(\) takes it"):
            LLM(ECHO).forward("hi", restarts=True)


def _plain(request, call_next):
    return (yield from call_next(request))


class TestTimeout:
    """`timeout=` of a call."""

    def test_of_each_method(self, backend):
        """Each method takes the limits of its call, which no other call keeps."""
        config, made = scripted("ok", "ok", "ok", "ok", "ok")
        times = Timeouts(1, 2, 3, total=4)
        llm = LLM(config)
        llm.forward("hi", timeout=times)
        list(llm.forward_stream("hi", timeout=times))
        llm.complete("hi", timeout=times, temperature=0.5)
        list(llm.stream("hi", timeout=times))
        llm.forward("hi")
        assert [request.call.timeouts for request in made[0].requests] == [times] * 4 + [None]
        assert made[0].requests[2].temperature == 0.5

        async def main():
            llm = AsyncLLM(config)
            await llm.forward("hi", timeout=times)
            assert [text async for text in llm.forward_stream("hi", timeout=times)] == ["ok"]
            await llm.complete("hi", timeout=times)
            async with llm.stream("hi", timeout=times, restarts=True) as stream:
                assert [event.text async for event in stream] == ["ok"]
            await llm.forward("hi")
            assert [request.call.timeouts for request in made[1].requests] == [times] * 4 + [None]

        anyio.run(main, backend=backend)

    def test_a_number(self):
        """A number of seconds bounds each wait, and a whole call as a whole."""
        config, made = scripted("ok", "ok")
        llm = LLM(config)
        llm.forward("hi", timeout=30)
        list(llm.forward_stream("hi", timeout=30))
        whole, stream = (request.call for request in made[0].requests)
        assert whole.timeouts == Timeouts(30, 30, 30, 30)
        assert whole.leash.deadline == whole.started_at + 30
        assert stream.timeouts == Timeouts(30, 30, 30)
        assert stream.leash.deadline is None

    def test_a_call_that_takes_too_long(self, backend):
        """A whole call ends with `DeadlineExceeded`, and a stream with the limit that passed. Neither is retried."""
        release = threading.Event()

        class Blocking:
            def __init__(self, config):
                pass

            def complete(self, request):
                release.wait(30)
                return "late"

            def stream(self, request):
                yield self.complete(request)

        register_llm_framework("blocking", Blocking)
        config = LLMConfig(framework="blocking", model="m", max_retries=0)

        async def main():
            llm = AsyncLLM(config)
            with pytest.raises(DeadlineExceeded):
                await llm.forward("hi", timeout=0.05)
            with pytest.raises(RequestTimeout) as caught:
                await anext(llm.forward_stream("hi", timeout=0.05))
            assert caught.value.phase == "first_byte"

        try:
            with pytest.raises(DeadlineExceeded):
                LLM(config).forward("hi", timeout=0.05)
            with pytest.raises(RequestTimeout) as caught:
                list(LLM(config).forward_stream("hi", timeout=0.05))
            assert caught.value.phase == "first_byte"
            anyio.run(main, backend=backend)
        finally:
            release.set()

    @pytest.mark.parametrize("timeout", [0, -1, "5", float("nan"), True], ids=repr)
    def test_wrong_timeouts(self, timeout, backend):
        """A value that is no limit is refused at the call, before anything is sent."""
        config, made = scripted("never")
        expected = r"^timeout: expected a number of seconds above 0, got "
        llm = LLM(config)
        for call in (llm.forward, llm.forward_stream, llm.complete, llm.stream):
            with pytest.raises(ConfigError, match=expected):
                call("hi", timeout=timeout)

        async def main():
            llm = AsyncLLM(config)
            with pytest.raises(ConfigError, match=expected):
                await llm.forward("hi", timeout=timeout)
            with pytest.raises(ConfigError, match=expected):
                llm.stream("hi", timeout=timeout)

        anyio.run(main, backend=backend)
        assert made[0].requests == made[1].requests == []


class TestStacks:
    def test_the_default(self):
        """The default stack has these middleware, outermost first."""
        kinds = [type(layer) for layer in LLM(ECHO).pipeline.middleware]
        assert kinds == [Tracing, Logging, Metrics, Timing, StreamMeter, Validation, Retry]
        assert LLM(attrs.evolve(ECHO, max_retries=7)).pipeline.middleware[-1] == Retry(max_retries=7)

    def test_log_lines_lie_in_the_span_of_the_call(self, backend):
        """Each line of a call is logged while the call's span is the current span, so logs can be correlated."""
        exporter = InMemorySpanExporter()
        spans = TracerProvider()
        spans.add_span_processor(SimpleSpanProcessor(exporter))
        seen = []
        handler = logging.Handler()
        handler.emit = lambda record: seen.append(
            (record.getMessage()[:21], trace.get_current_span().get_span_context())
        )
        logger = logging.getLogger("fluxibly")
        before = logger.level
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        try:
            stack = default_stack(ECHO, Tracing(tracer_provider=spans))
            LLM(ECHO, stack).forward("hi")
            list(LLM(ECHO, stack).forward_stream("hi"))

            async def main():
                async with AsyncLLM(ECHO, stack) as llm:
                    await llm.forward("hi")
                    [text async for text in llm.forward_stream("hi")]

            anyio.run(main, backend=backend)
        finally:
            logger.removeHandler(handler)
            logger.setLevel(before)
        calls = [span.get_span_context().span_id for span in exporter.get_finished_spans() if span.parent is None]
        assert len(calls) == 4
        assert [context.span_id for _, context in seen] == [call for call in calls for _ in range(2)]

    def test_a_layer_takes_the_place_of_its_class(self):
        """A built-in layer replaces the default's; a layer of the user's own goes outside of Retry, in the order given."""

        class Mine:
            def __call__(self, request, call_next):
                return (yield from call_next(request))

        def other(request, call_next):
            return (yield from call_next(request))

        mine, retry, validation = Mine(), Retry(max_retries=9), Validation(empty="retry")
        stack = default_stack(ECHO, mine, retry, other, validation)
        assert [type(layer) for layer in stack[:5]] == [Tracing, Logging, Metrics, Timing, StreamMeter]
        assert stack[5:] == (validation, mine, other, retry)
        assert default_stack(attrs.evolve(ECHO, max_retries=1))[-1] == Retry(max_retries=1)

    def test_the_places_of_other_layers(self):
        """A built-in layer that the default stack has none of goes to its own place; several of a class keep their order."""

        def mine(request, call_next):
            return (yield from call_next(request))

        per_minute, per_day = RateLimit(requests=60), RateLimit(requests=1000, per=86_400)
        places, deadline, breaker = Concurrency(9), Deadline(30), CircuitBreaker()
        balance, hedge, fallback = Balance(["a", "b"]), Hedge(2.0), Fallback(["c"])
        silence = StreamTimeout(idle=5)
        given = (silence, places, per_minute, mine, breaker, hedge, balance, fallback, per_day, deadline)
        *before, after_meter, validation, own, one, two, three, retry, four, five, six, seven, eight = default_stack(
            ECHO, *given
        )
        assert [type(layer) for layer in before] == [Tracing, Logging, Metrics, Timing, StreamMeter]
        assert (after_meter, own, one, two, three) == (deadline, mine, fallback, balance, hedge)
        assert (type(validation), type(retry)) == (Validation, Retry)
        assert (four, five, six, seven, eight) == (breaker, per_minute, per_day, places, silence)

    def test_a_class_of_the_users_own(self):
        """A subclass of a built-in class takes its place."""

        class Patient(Retry):
            pass

        patient = Patient(max_retries=9)
        assert default_stack(ECHO, patient)[-1] is patient

    @pytest.mark.parametrize("layer", ["retry", None, Retry, {"retry": {}}])
    def test_what_is_no_layer(self, layer):
        """A name, a class or a table is not a layer."""
        with pytest.raises(TypeError, match=r"default_stack: expected middleware, like Retry\(max_retries=5\), got"):
            default_stack(ECHO, layer)

    @pytest.mark.parametrize("item", ["default", "default_stack", {"default_stack": None}, {"default_stack": {}}])
    def test_the_default_by_name(self, item):
        """A configuration names the default stack, alone or among other layers."""
        stack = LLM(attrs.evolve(ECHO, max_retries=7, middleware=[item, {"timing": {}}])).pipeline.middleware
        assert stack == (*default_stack(attrs.evolve(ECHO, max_retries=7)), Timing())

    def test_the_default_with_layers_by_name(self, tmp_path):
        """YAML adds layers to the default stack, by the same rules as code."""
        register_middleware("quieter", lambda **settings: Validation(**settings), replace=True)  # noqa: PLW0108
        register_middleware("plain", _plain, replace=True)
        file = tmp_path / "stack.yaml"
        file.write_text(
            "llm:\n  framework: echo\n  model: m\n  max_retries: 7\n  middleware:\n"
            "    - default_stack: {retry: {max_retries: 5}, plain: , quieter: {empty: raise}}\n"
        )
        expected = default_stack(ECHO, Retry(max_retries=5), _plain, Validation(empty="raise"))
        assert LLM.from_yaml(file).pipeline.middleware == expected

    def test_all_that_is_wrong_in_it(self, tmp_path):
        """Each problem has its whole path."""
        file = tmp_path / "stack.yaml"
        file.write_text(
            "llm:\n  framework: echo\n  model: m\n  middleware:\n"
            "    - default_stack: {retry: {max_retry: 5}, loging: {}}\n    - default_stack: [retry]\n"
        )
        with pytest.raises(ConfigError) as caught:
            LLM.from_yaml(file)
        first, second, third = caught.value.problems
        assert first.startswith(
            "llm.middleware[0].default_stack.retry.max_retry: there is no such setting; did you mean"
        )
        assert second.startswith("llm.middleware[0].default_stack: middleware 'loging' not registered")
        assert third == (
            "llm.middleware[1].default_stack: expected a table of middleware and their settings, "
            "e.g. - default_stack: {retry: {max_retries: 5}}"
        )

    def test_its_names_are_taken(self):
        """A middleware cannot be registered under the names of the default stack, except on purpose."""
        for name in ("default", "default_stack"):
            with pytest.raises(ValueError, match="is registered already"):
                register_middleware(name, _plain)

    def test_a_custom_stack(self):
        """The first middleware is outermost."""
        log = []

        def layer(name):
            def mw(request, call_next):
                log.append(name)
                return (yield from call_next(request))

            return mw

        LLM(ECHO, middleware=[Logging(), layer("a"), Retry(max_retries=5), layer("b")]).forward("hi")
        assert log == ["a", "b"]

    def test_none_at_all(self):
        """An empty list means an empty stack, not the default stack."""
        assert LLM(ECHO, middleware=[]).pipeline.middleware == ()

    def test_of_the_configuration(self):
        """A configuration names middleware with or without settings; a stack passed to `LLM` takes precedence."""
        register_middleware("quiet", lambda **settings: Validation(**settings))  # noqa: PLW0108  # a function, not a class
        config = LLMConfig(
            framework="echo",
            model="m",
            middleware=["logging", {"retry": {"max_retries": 9}}, {"quiet": {"hold": True}}],
        )
        assert LLM(config).pipeline.middleware == (Logging(), Retry(max_retries=9), Validation(hold=True))
        assert LLM(config, [Timing()]).pipeline.middleware == (Timing(),)

    def test_from_yaml(self, tmp_path):
        """`from_yaml` reads the section `llm:`, including its stack."""
        file = tmp_path / "framework.yaml"
        file.write_text("llm: {framework: echo, model: m, middleware: [logging, retry: {max_retries: 1}]}")
        assert LLM.from_yaml(file).pipeline.middleware == (Logging(), Retry(max_retries=1))
        assert AsyncLLM.from_yaml(str(file), middleware=[]).pipeline.middleware == ()

    def test_the_repr_is_the_configuration_without_the_key(self):
        """The repr shows the model and the stack that would run, without the key."""
        config = attrs.evolve(ECHO, api_key="sk-secret-0123456789")
        llm = LLM(config, [Logging(), StreamMeter()])
        assert repr(llm) == "LLM('echo', 'm', middleware=[Logging(redact=None), StreamMeter()])"
        assert "sk-secret" not in repr(vars(llm))

    def test_without_any_configuration(self):
        """A Pipeline takes a provider and a stack."""
        request = Request(model="m", messages=[Message.user("hi")])
        assert Pipeline(ScriptedProvider("hello"), [Logging()]).complete(request) == Response("hello")


class TestStreams:
    def test_without_stream_the_error_says_so_at_the_call(self):
        """A provider without `stream` raises NotImplementedError at the call, in LLM and AsyncLLM."""

        class Whole:
            def __init__(self, config):
                pass

            def complete(self, request):
                return "ok"

        register_llm_framework("whole", Whole)
        config = LLMConfig(framework="whole", model="m")
        for llm in (LLM(config), AsyncLLM(config)):
            for call in (llm.stream, llm.forward_stream):
                with pytest.raises(NotImplementedError, match=r"Whole has no stream\(\); use forward\(\)"):
                    call("hi")
        assert LLM(config).forward("hi") == "ok"

    def test_forward_stream_starts_at_the_call(self, caplog):
        """The call logs "started" and sends nothing; a stream that is closed unread ends as abandoned."""
        caplog.set_level(logging.INFO, logger="fluxibly")
        config, made = scripted("a b")
        texts = LLM(config).forward_stream("hi")
        assert [record.getMessage().split(" |")[0] for record in caplog.records] == ["LLM streaming request started"]
        assert made[0].requests == []
        texts.close()
        assert caplog.messages[-1] == "LLM streaming abandoned | elapsed_time=0.00s, total_chunks=0, total_length=0"
        assert list(texts) == []

    @pytest.mark.parametrize("how", ["close", "drop", "throw"])
    def test_leaving_early(self, caplog, how):
        """However the consumer leaves, the stream is closed and logged as abandoned."""
        caplog.set_level(logging.INFO, logger="fluxibly")
        config, made = scripted("a b c")
        texts = LLM(config).forward_stream("hi")
        assert next(texts) == "a"
        if how == "close":
            texts.close()
        elif how == "throw":
            with pytest.raises(LookupError):
                texts.throw(LookupError())
        del texts
        gc.collect()
        assert caplog.messages[-1].startswith("LLM streaming abandoned | ")
        assert (made[0].opened, made[0].closed) == (1, 1)

    def test_leaving_early_in_async(self, backend, caplog):
        """An async stream that is closed unread, or after a text, is logged as abandoned."""
        caplog.set_level(logging.INFO, logger="fluxibly")
        config, made = scripted("a b c")

        async def main():
            unread = AsyncLLM(config).forward_stream("hi")
            await unread.aclose()
            del unread
            texts = AsyncLLM(config).forward_stream("hi")
            assert await anext(texts) == "a"
            await texts.aclose()

        anyio.run(main, backend=backend)
        gc.collect()
        assert [line.split(" |")[0] for line in caplog.messages].count("LLM streaming abandoned") == 2
        assert (made[1].opened, made[1].closed) == (1, 1)

    def test_texts_that_are_empty_are_left_out(self):
        """`forward_stream` leaves out the empty texts of chunks with only reasoning or a finish reason."""
        config, _ = scripted([Chunk(reasoning="hm"), "a", Chunk(finish_reason="stop")])
        assert list(LLM(config).forward_stream("hi")) == ["a"]

    def test_errors_come_at_the_first_iteration(self):
        """A provider's error comes unchanged before output, and as StreamInterrupted after output."""
        config, _ = scripted(ProviderError("no"), ["a", LookupError("odd")])
        llm = LLM(config, [])
        texts = llm.forward_stream("hi")
        with pytest.raises(ProviderError, match="no"):
            next(texts)
        texts = llm.forward_stream("hi")
        assert next(texts) == "a"
        with pytest.raises(StreamInterrupted) as caught:
            next(texts)
        assert isinstance(caught.value.__cause__, LookupError)
        assert caught.value.partial.text == "a"

    def test_restarts(self):
        """A consumer that asks for restarts gets them as events."""
        config, _ = scripted(["a", ServerError("down")], ["b"])
        llm = LLM(config, [Retry(on_interrupt="restart", base_delay=0)])
        with llm.stream("hi", restarts=True) as stream:
            assert list(stream) == [Chunk("a"), Restart("ServerError"), Chunk("b")]
        assert stream.response.text == "b"


class TestClosing:
    def test_close(self):
        """`close` closes the provider and may be called twice; a later call is an error."""
        config, made = scripted("ok")
        with LLM(config) as llm:
            pass
        llm.close()
        assert made[0].shut
        for call in (llm.forward, llm.forward_stream):
            with pytest.raises(RuntimeError, match="this Pipeline is closed; make a new one"):
                call("hi")

    def test_aclose(self, backend):
        """`aclose` closes the provider and may be called twice."""
        config, made = scripted("ok")

        async def main():
            llm = AsyncLLM(config)
            await llm.aclose()
            await llm.aclose()

        anyio.run(main, backend=backend)
        assert made[0].shut


def test_the_settings_of_a_call_are_those_of_a_request():
    """Type checkers read `Overrides`; calls check the fields of `Request`. Both have the same names."""
    assert keys_of("Overrides") == KEYWORDS
