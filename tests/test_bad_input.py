"""Mistakes in users' code, and the error messages for them. The command line's mistakes are in its own tests."""

from __future__ import annotations

import sys

import pytest
from support.calling import REQUEST, call, scripted

from fluxibly import LLM, AsyncLLM, LLMConfig, Message, Pipeline, Request, register_llm_framework
from fluxibly.errors import AuthenticationError, BadPrompt, ConfigError, FrameworkNotRegistered, root_cause
from fluxibly.middleware import Logging, Retry, StreamMeter, Validation
from fluxibly.pipeline import AsyncPipeline
from fluxibly.testing import ScriptedProvider, VirtualClock
from fluxibly.testing.modes import MODES, run

ECHO = LLMConfig(framework="echo", model="m")
STREAMS = [mode for mode in MODES if mode.streaming]


@pytest.fixture(autouse=True)
def _registry(monkeypatch):
    monkeypatch.setattr("fluxibly.registry._frameworks", {})


def message_of(error):
    """Return an error's message with the notes that explain it."""
    return "\n".join([str(error), *getattr(error, "__notes__", [])])


class TestConfiguration:
    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("llm: {framework: echo}", "llm.model: is required"),
            (
                "llm: {framework: echo, model: m, temperature: 3}",
                "llm.temperature: expected a number from 0 to 2, got 3",
            ),
            (
                "llm: {framework: echo, model: m, max_tokens: many}",
                "llm.max_tokens: expected a whole number from 1 up, got 'many'",
            ),
            (
                "llm: {framework: echo, model: m, max_token: 5}",
                "llm.max_token: there is no such setting; did you mean 'max_tokens'?",
            ),
            (
                "llm: {framework: echo, model: '${NO_SUCH_VARIABLE}'}",
                "llm.model: the environment variable NO_SUCH_VARIABLE is not set",
            ),
            ("", "is empty; it needs a section `llm:`"),
            ("llm: [echo]", "`llm:`: expected a table with framework and model, got a list"),
            ("llm: {framework: ecko, model: m}", "LLM framework 'ecko' not registered. Available frameworks: ["),
            (
                "llm: {framework: echo, model: m, middleware: [loging]}",
                "llm.middleware[0]: middleware 'loging' not registered; did you mean 'logging'? Available middleware: [",
            ),
            (
                "llm: {framework: echo, model: m, middleware: [retry: {max_retry: 1}]}",
                "llm.middleware[0].retry.max_retry: there is no such setting; did you mean 'max_retries'?",
            ),
            (
                "llm: {framework: echo, model: m, middleware: [retry: {max_retries: x}]}",
                "llm.middleware[0].retry.max_retries: expected a whole number from 0 up, got 'x'",
            ),
        ],
    )
    def test_a_yaml_file(self, tmp_path, text, problem):
        """A mistake in the file is a ValueError of fluxibly, which names the setting and the expected value."""
        file = tmp_path / "bad.yaml"
        file.write_text(text)
        for kind in (LLM, AsyncLLM):
            with pytest.raises((ConfigError, FrameworkNotRegistered)) as caught:
                kind.from_yaml(file)
            assert problem in str(caught.value)
            assert isinstance(caught.value, ValueError)

    def test_values_that_are_not_a_configuration(self):
        """A dict, a provider, nothing, or half a model is a TypeError that says what to write."""
        for wrong, write in (
            ({"framework": "echo"}, r"write LLM\(LLMConfig.from_mapping\(…\)\) or LLM\(\*\*settings\)"),
            (5, 'expected an LLMConfig or a text like "openai:gpt-4o-mini", got an int'),
            (ScriptedProvider("hi"), r"write Pipeline\(provider, middleware\)"),
            (
                None,
                r"write LLM\(\"openai:gpt-4o-mini\"\), LLM\(framework=\"openai\", model=\"gpt-4o-mini\"\) or LLM\(LLMConfig\(…\)\)",
            ),
        ):
            with pytest.raises(TypeError, match=f"^LLM: .*{write}"):
                LLM(wrong)

    def test_an_unknown_keyword(self):
        """The error suggests the nearest keyword, even on Python before 3.13."""
        with pytest.raises(TypeError, match="LLMConfig has no 'temprature'; did you mean 'temperature'"):
            LLMConfig(framework="echo", model="m", temprature=1)

    @pytest.mark.parametrize("wrong", ["logging", Logging(), 5])
    def test_a_stack_that_is_not_a_list(self, wrong):
        """A middleware alone is not a stack, and a name is not a list of letters."""
        with pytest.raises(TypeError, match=r"middleware: expected a list, like \[Logging\(\), Retry\(\)\], got a"):
            LLM(ECHO, middleware=wrong)

    def test_an_extra_that_is_not_installed(self, monkeypatch):
        """The error names the command that installs it."""
        from importlib.util import find_spec

        monkeypatch.setattr(
            "importlib.util.find_spec", lambda name, *rest: None if name == "xllamacpp" else find_spec(name, *rest)
        )
        with pytest.raises(ConfigError, match=r"'local' needs packages that are not installed: pip install xllamacpp"):
            LLM(LLMConfig(framework="local", model="smollm2"))

    def test_a_missing_key_names_its_variable(self, monkeypatch):
        """A missing key is an error, at once or at the call, before anything is sent."""
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        with pytest.raises((ConfigError, AuthenticationError), match="OPENAI_API_KEY"):
            LLM(LLMConfig(framework="openai", model="gpt-4o-mini")).forward("hi")


class TestPrompts:
    @pytest.mark.parametrize(
        ("prompt", "kind", "problem"),
        [
            ("", BadPrompt, "the prompt is empty; give a non-empty string or a sequence of Message"),
            ([], BadPrompt, "the prompt has no messages"),
            (None, TypeError, "the prompt: expected a str or a sequence of Message, got None"),
            (5, TypeError, "got an int"),
            (b"hi", TypeError, "got a bytes"),
            (
                {"role": "user", "contents": "hi"},
                ValueError,
                "messages[0].contents: unknown field; did you mean 'content'?",
            ),
            (["hi"], TypeError, "got a str in the sequence; write Message.user(…)"),
            ([{"role": "user"}], BadPrompt, "the prompt is empty; give a non-empty string or a sequence of Message"),
            (
                [{"content": "hi"}],
                ValueError,
                "messages[0].role: expected one of system, user, assistant, tool, developer, function, got nothing",
            ),
        ],
        ids=repr,
    )
    def test_values_that_are_not_a_prompt(self, prompt, kind, problem):
        """Every method that makes a call refuses a wrong prompt at once."""
        llm = LLM(ECHO)
        for ask in (llm.forward, llm.complete, llm.stream, llm.forward_stream, AsyncLLM(ECHO).stream):
            with pytest.raises(kind) as caught:
                ask(prompt)
            assert problem in str(caught.value)

    def test_a_prompt_of_ten_megabytes(self, caplog):
        """A prompt of ten megabytes is answered, and log lines stay short."""
        caplog.set_level("DEBUG", logger="fluxibly")
        prompt = "word " * 2_000_000
        assert LLM(ECHO).forward(prompt) == prompt
        assert "prompt_length=10000000" in caplog.messages[0]
        assert max(map(len, caplog.messages)) < 500

    @pytest.mark.parametrize("role", ["bot", "", None, "User"])
    def test_a_wrong_role(self, role):
        """The error names the valid roles."""
        with pytest.raises(ValueError, match="a message's role") as caught:
            Message(role, "hi")
        assert str(caught.value) == f"a message's role: expected one of system, user, assistant, tool, got {role!r}"

    @pytest.mark.parametrize("content", [5, None, [5], {"text": 1}.values()], ids=str)
    def test_wrong_content(self, content):
        """The error names the accepted types of content."""
        with pytest.raises(TypeError, match="expected a str, Text"):
            Message.user(content)

    def test_a_pipeline_takes_requests(self, mode):
        """A pipeline takes a Request, and refuses a prompt."""
        error = run(mode, scripted(mode, "x"), [], "hi").error
        assert isinstance(error, TypeError)
        assert str(error) == "expected a Request, got a str; LLM takes prompts"


class TestMiddleware:
    def test_not_a_generator_function(self, mode):
        """A middleware that returns a value, but is not a generator function, is named."""

        def direct(request, call_next):
            return call_next

        error = call(mode, direct, "x").ran.error
        assert isinstance(error, TypeError)
        assert "direct returned a function, expected a generator; write it as a generator function" in message_of(error)
        assert "return (yield from call_next(request))" in message_of(error)

    def test_async_def(self, mode):
        """A middleware that is a coroutine function is named."""

        async def asynchronous(request, call_next):
            return None

        assert "asynchronous returned a coroutine" in message_of(call(mode, asynchronous, "x").ran.error)

    def test_async_generator(self, mode):
        """A middleware that is an async generator function is named."""

        async def asynchronous(request, call_next):
            yield 1

        assert "asynchronous returned an async_generator" in message_of(call(mode, asynchronous, "x").ran.error)

    def test_a_middleware_that_returns_none(self, mode):
        """A middleware that forgets its `return` is named, with the line to write."""

        def forgetful(request, call_next):
            yield from call_next(request)

        error = root_cause(call(mode, forgetful, "x").ran.error)
        assert isinstance(error, TypeError)
        assert "forgetful returned None, expected a Response" in message_of(error)
        assert "return (yield from call_next(request))" in message_of(error)

    def test_a_middleware_that_returns_text(self, mode):
        """The middleware is named, not the built-in layer that fails on its text, nor the outermost layer."""

        def texter(request, call_next):
            response = yield from call_next(request)
            return response.text

        for stack in ([Logging(), texter], [Logging(), Validation(), StreamMeter(), texter]):
            error = root_cause(call(mode, stack, "x").ran.error)
            assert isinstance(error, (TypeError, AttributeError))
            assert "the middleware" in message_of(error)
            assert "texter returned a str, expected a Response" in message_of(error)

    def test_a_middleware_of_several_that_returns_text(self, mode):
        """Every middleware that may have returned the text is named."""

        def innocent(request, call_next):
            return (yield from call_next(request))

        def texter(request, call_next):
            return (yield from call_next(request)).text

        error = root_cause(call(mode, [innocent, texter], "x").ran.error)
        assert "innocent" in message_of(error)
        assert "texter returned a str" in message_of(error)

    def test_a_middleware_that_does_not_send_a_request(self, mode):
        """The error says that `call_next` takes a Request."""

        def prompting(request, call_next):
            return (yield from call_next("hi"))

        for stack in ([prompting], [prompting, Logging(), Retry()]):
            error = root_cause(call(mode, stack, "x").ran.error)
            assert "call_next: expected a Request, got a str" in message_of(error)

    def test_a_middleware_that_returns_none_under_others(self, mode):
        """The note names the middleware, whichever layer fails on its None."""

        def forgetful(request, call_next):
            yield from call_next(request)

        error = root_cause(call(mode, [Logging(), Retry(), forgetful], "x").ran.error)
        assert "forgetful" in message_of(error)

    @pytest.mark.parametrize("rubbish", [5, None, "text", object()], ids=["int", "None", "str", "object"])
    def test_a_middleware_that_yields_a_wrong_value(self, mode, rubbish):
        """The middleware is named, with the effects that it may yield."""

        def odd(request, call_next):
            yield rubbish
            return (yield from call_next(request))

        error = root_cause(call(mode, [Logging(), odd], "x").ran.error)
        assert isinstance(error, TypeError)
        assert "odd yielded " in message_of(error)
        assert "it may yield only from call_next(request), sleep(...), perform(...)" in message_of(error)

    @pytest.mark.parametrize(
        ("layer", "problem"),
        [
            (5, "got "),
            (Retry, "Retry is a class: write Retry()"),
            (None, "got None"),
        ],
    )
    def test_a_layer_that_is_not_a_middleware(self, layer, problem):
        """A layer that is not a middleware is refused when the pipeline or the LLM is made."""
        for make in (
            lambda: Pipeline(ScriptedProvider(), [layer]),
            lambda: AsyncPipeline(ScriptedProvider(), [layer]),
            lambda: LLM(ECHO, [layer]),
        ):
            with pytest.raises((TypeError, ConfigError)) as caught:
                make()
            assert problem in str(caught.value)


class TestProviders:
    @pytest.mark.parametrize(("item", "kind"), [(5, "an int"), (None, "None"), (b"x", "a bytes")])
    @pytest.mark.parametrize("mode", STREAMS, ids=str)
    def test_a_provider_that_yields_wrong_items(self, mode, item, kind):
        """The error names the provider and the types to yield; after output, it is the cause of StreamInterrupted."""
        for script in ([item], ["text", item]):
            made = call(mode, [Logging(), Retry()], script)
            error = root_cause(made.ran.error)
            assert isinstance(error, TypeError)
            expected = "expected a Chunk, a str or a Response from its stream()"
            assert str(error) == f"the provider ScriptedProvider yielded {kind}, {expected}"
            assert made.record.attempts == 1

    @pytest.mark.parametrize("mode", [mode for mode in MODES if not mode.streaming], ids=str)
    def test_a_provider_whose_complete_is_a_generator(self, mode):
        """A complete() that is a generator, as stream() would be, is an error, and its code does not run."""

        class Confused:
            def complete(self, request):
                yield "x"

        error = run(mode, Confused(), [Logging()], REQUEST, clock=VirtualClock()).error
        assert isinstance(error, TypeError)
        assert str(error) == (
            "the provider Confused returned a generator, expected a Response or a str from its complete()"
        )

    @pytest.mark.parametrize("mode", [mode for mode in MODES if not mode.streaming], ids=str)
    def test_a_provider_that_returns_a_number(self, mode):
        """The error names the provider and the types that complete() returns."""

        class Numbers:
            def complete(self, request):
                return 5

        class AsyncNumbers:
            async def complete(self, request):
                return 5

        provider = (AsyncNumbers if mode.backend else Numbers)()
        error = run(mode, provider, [Logging()], REQUEST, clock=VirtualClock()).error
        assert isinstance(error, TypeError)
        assert str(error) == (
            f"the provider {type(provider).__name__} returned an int, expected a Response or a str from its complete()"
        )

    @pytest.mark.parametrize(
        ("stream", "problem"),
        [
            (lambda self, request: 5, "returned an int; make it a generator"),
            (lambda self, request: "text", "returned a str; make it a generator"),
            (lambda self, request: None, "returned None; make it a generator"),
        ],
    )
    def test_a_stream_that_is_not_an_iterator(self, stream, problem):
        """A stream() that is not a generator is an error, even if it returns a text."""
        provider = type("Odd", (), {"complete": lambda self, request: "x", "stream": stream})()
        with pytest.raises(TypeError) as caught:
            list(Pipeline(provider).stream(REQUEST))
        assert f"the stream() of Odd {problem}" in str(caught.value)

    def test_a_provider_without_complete(self):
        """An object without complete(), or a class instead of an object, is not a provider."""

        class Nothing:
            def __init__(self, config=None):
                pass

        with pytest.raises(TypeError, match="expected a provider with a method complete"):
            Pipeline(Nothing())
        with pytest.raises(TypeError, match=r"Nothing is a class: write Nothing\(\)"):
            Pipeline(Nothing)
        register_llm_framework("nothing", Nothing)
        with pytest.raises(TypeError, match="expected a provider with a method complete"):
            LLM(LLMConfig(framework="nothing", model="m"))

    def test_an_async_provider_in_a_sync_pipeline(self):
        """The error names the classes for async providers."""

        class Async:
            async def complete(self, request):
                return "x"

        with pytest.raises(TypeError, match="Async is asynchronous; use AsyncPipeline or AsyncLLM"):
            Pipeline(Async())

    def test_a_class_that_takes_no_configuration(self):
        """A class without an argument for the configuration raises Python's own error, which is clear."""

        class Bare:
            def complete(self, request):
                return "x"

        register_llm_framework("bare", Bare)
        with pytest.raises(TypeError, match=r"Bare\(\) takes no arguments"):
            LLM(LLMConfig(framework="bare", model="m"))


def test_a_request_with_unknown_fields():
    """The error of `evolve` names the fields that exist."""
    with pytest.raises(TypeError, match="a Request has no 'temprature'; it has model, messages, "):
        Request(model="m", messages="hi").evolve(temprature=1)


def test_no_mistake_loads_a_telemetry_sdk_or_a_client():
    """Errors of configuration are raised before any heavy import."""
    assert "fluxibly" in sys.modules
    import subprocess

    code = (
        "import sys\n"
        "from fluxibly import LLM, LLMConfig\n"
        "try:\n    LLM(LLMConfig(framework='ecko', model='m'))\n"
        "except ValueError as error:\n    assert 'echo' in str(error)\n"
        "assert not {'httpx', 'cattrs', 'yaml'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
