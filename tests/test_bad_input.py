"""What users get wrong, and what they are told: in code (the command line's mistakes are in its own tests)."""

from __future__ import annotations

import sys

import pytest
from support.calling import REQUEST, call, scripted

from fluxibly import LLM, AsyncLLM, LLMConfig, Message, Pipeline, Request, register_llm_framework
from fluxibly.errors import AuthenticationError, ConfigError, FrameworkNotRegistered, root_cause
from fluxibly.middleware import Logging, Retry, StreamMeter, Validation
from fluxibly.pipeline import AsyncPipeline
from fluxibly.testing import ScriptedProvider, VirtualClock
from fluxibly.testing.modes import MODES, run

ECHO = LLMConfig(framework="echo", model="m")
STREAMS = [mode for mode in MODES if mode.streaming]


@pytest.fixture(params=MODES, ids=str)
def mode(request):
    return request.param


@pytest.fixture(autouse=True)
def _registry(monkeypatch):
    monkeypatch.setattr("fluxibly.registry._frameworks", {})


def told(error):
    """An error's message with the notes that explain it."""
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
                "middleware[0]: middleware 'loging' not registered",
            ),
            (
                "llm: {framework: echo, model: m, middleware: [retry: {max_retry: 1}]}",
                "middleware[0].retry.max_retry: there is no such setting; did you mean 'max_retries'?",
            ),
            (
                "llm: {framework: echo, model: m, middleware: [retry: {max_retries: x}]}",
                "middleware[0].retry: Retry: max_retries: expected a whole number from 0 up, got 'x'",
            ),
        ],
    )
    def test_a_yaml_file(self, tmp_path, text, problem):
        """One ValueError of ours, which names the place and what would be right."""
        file = tmp_path / "bad.yaml"
        file.write_text(text)
        for kind in (LLM, AsyncLLM):
            with pytest.raises((ConfigError, FrameworkNotRegistered)) as caught:
                kind.from_yaml(file)
            assert problem in str(caught.value)
            assert isinstance(caught.value, ValueError)

    def test_no_configuration(self):
        """A dict, or a model's name, is none."""
        for wrong in ({"framework": "echo"}, "gpt-4o", None):
            with pytest.raises(TypeError, match="LLM takes an LLMConfig, not a"):
                LLM(wrong)

    def test_an_unknown_keyword(self):
        """The nearest that there is, also on Python before 3.13."""
        with pytest.raises(TypeError, match="LLMConfig has no 'temprature'; did you mean 'temperature'"):
            LLMConfig(framework="echo", model="m", temprature=1)

    @pytest.mark.parametrize("wrong", ["logging", Logging(), 5])
    def test_a_stack_that_is_no_list(self, wrong):
        """One middleware is not a stack, and a name is not a list of letters."""
        with pytest.raises(TypeError, match=r"middleware is a list, like \[Logging\(\), Retry\(\)\], not a"):
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
        """Whether at once or at the call, before anything is sent."""
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        with pytest.raises((ConfigError, AuthenticationError), match="OPENAI_API_KEY"):
            LLM(LLMConfig(framework="openai", model="gpt-4o-mini")).forward("hi")


class TestPrompts:
    @pytest.mark.parametrize(
        ("prompt", "kind", "problem"),
        [
            ("", ValueError, "the prompt is empty; give a non-empty string or a sequence of Message"),
            ([], ValueError, "the prompt has no messages"),
            (None, TypeError, "a prompt is a str or a sequence of Message, not None"),
            (5, TypeError, "not an int"),
            (b"hi", TypeError, "not a bytes"),
            ({"role": "user", "content": "hi"}, TypeError, "not a dict"),
            (["hi"], TypeError, "but has a str in it; write Message.user(...)"),
            ([{"role": "user"}], TypeError, "but has a dict in it"),
        ],
        ids=repr,
    )
    def test_wrong_ones(self, prompt, kind, problem):
        """Refused at the call, in each way to make one."""
        llm = LLM(ECHO)
        for ask in (llm.forward, llm.complete, llm.stream, llm.forward_stream, AsyncLLM(ECHO).stream):
            with pytest.raises(kind) as caught:
                ask(prompt)
            assert problem in str(caught.value)

    def test_one_of_ten_megabytes(self, caplog):
        """Is as good as any other."""
        caplog.set_level("DEBUG", logger="fluxibly")
        prompt = "word " * 2_000_000
        assert LLM(ECHO).forward(prompt) == prompt
        assert "prompt_length=10000000" in caplog.messages[0]
        assert max(map(len, caplog.messages)) < 500

    @pytest.mark.parametrize("role", ["bot", "", None, "User"])
    def test_a_wrong_role(self, role):
        """The right ones are named."""
        with pytest.raises(ValueError) as caught:
            Message(role, "hi")
        assert str(caught.value) == f"a message's role is one of system, user, assistant, tool, not {role!r}"

    @pytest.mark.parametrize("content", [5, None, [5], {"text": 1}.values()], ids=str)
    def test_wrong_content(self, content):
        """The kind is named."""
        with pytest.raises(TypeError, match="is a str, Text"):
            Message.user(content)

    def test_a_pipeline_takes_requests(self, mode):
        """Not prompts."""
        error = run(mode, scripted(mode, "x"), [], "hi").error
        assert isinstance(error, TypeError)
        assert str(error) == "expected a Request, got a str; LLM takes prompts"


class TestMiddleware:
    def test_not_a_generator_function(self, mode):
        """It returned a value where a generator was due."""

        def direct(request, call_next):
            return call_next

        error = call(mode, direct, "x").ran.error
        assert isinstance(error, TypeError)
        assert "direct returned a function, expected a generator; write it as a generator function" in told(error)
        assert "return (yield from call_next(request))" in told(error)

    def test_async_def(self, mode):
        """Nor is a coroutine one."""

        async def asynchronous(request, call_next):
            return None

        assert "asynchronous returned a coroutine" in told(call(mode, asynchronous, "x").ran.error)

    def test_async_generator(self, mode):
        """Nor is an async generator."""

        async def asynchronous(request, call_next):
            yield 1

        assert "asynchronous returned an async_generator" in told(call(mode, asynchronous, "x").ran.error)

    def test_one_that_returns_none(self, mode):
        """The forgotten `return`."""

        def forgetful(request, call_next):
            yield from call_next(request)

        error = root_cause(call(mode, forgetful, "x").ran.error)
        assert isinstance(error, TypeError)
        assert "forgetful returned None, expected a Response" in told(error)
        assert "return (yield from call_next(request))" in told(error)

    def test_one_that_returns_text(self, mode):
        """It is named, and not the built-in layer that stumbled over its text, or stands outermost."""

        def texter(request, call_next):
            response = yield from call_next(request)
            return response.text

        for stack in ([Logging(), texter], [Logging(), Validation(), StreamMeter(), texter]):
            error = root_cause(call(mode, stack, "x").ran.error)
            assert isinstance(error, (TypeError, AttributeError))
            assert "the middleware" in told(error)
            assert "texter returned a str, expected a Response" in told(error)

    def test_one_of_several_that_returns_text(self, mode):
        """All that it may have been are named."""

        def innocent(request, call_next):
            return (yield from call_next(request))

        def texter(request, call_next):
            return (yield from call_next(request)).text

        error = root_cause(call(mode, [innocent, texter], "x").ran.error)
        assert "innocent" in told(error)
        assert "texter returned a str" in told(error)

    def test_one_that_sends_no_request(self, mode):
        """`call_next` takes a request."""

        def prompting(request, call_next):
            return (yield from call_next("hi"))

        for stack in ([prompting], [prompting, Logging(), Retry()]):
            error = root_cause(call(mode, stack, "x").ran.error)
            assert "call_next takes a Request, not a str" in told(error)

    def test_one_that_returns_none_under_others(self, mode):
        """The note names it, whichever layer stumbled over its None."""

        def forgetful(request, call_next):
            yield from call_next(request)

        error = root_cause(call(mode, [Logging(), Retry(), forgetful], "x").ran.error)
        assert "forgetful" in told(error)

    @pytest.mark.parametrize("rubbish", [5, None, "text", object()], ids=["int", "None", "str", "object"])
    def test_one_that_yields_rubbish(self, mode, rubbish):
        """It is named, with what it may yield."""

        def odd(request, call_next):
            yield rubbish
            return (yield from call_next(request))

        error = root_cause(call(mode, [Logging(), odd], "x").ran.error)
        assert isinstance(error, TypeError)
        assert "odd yielded " in told(error)
        assert "it may yield only from call_next(request), sleep(...), perform(...)" in told(error)

    @pytest.mark.parametrize(
        ("layer", "problem"),
        [
            (5, "not 5"),
            (Retry, "Retry is a class: write Retry()"),
            (None, "not None"),
        ],
    )
    def test_what_is_none(self, layer, problem):
        """Refused when the pipeline or the LLM is made."""
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
    def test_one_that_yields_numbers(self, mode, item, kind):
        """The error names it and what to yield; after output it is the cause of StreamInterrupted."""
        for script in ([item], ["text", item]):
            made = call(mode, [Logging(), Retry()], script)
            error = root_cause(made.ran.error)
            assert isinstance(error, TypeError)
            assert str(error) == f"the provider ScriptedProvider yielded {kind}; its stream() yields Chunk or str"
            assert made.record.attempts == 1

    @pytest.mark.parametrize("mode", [mode for mode in MODES if not mode.streaming], ids=str)
    def test_one_whose_complete_is_a_generator(self, mode):
        """As its stream() would be; nothing of it is run."""

        class Confused:
            def complete(self, request):
                yield "x"

        error = run(mode, Confused(), [Logging()], REQUEST, clock=VirtualClock()).error
        assert isinstance(error, TypeError)
        assert str(error) == ("the provider Confused returned a generator; its complete() returns a Response or a str")

    @pytest.mark.parametrize("mode", [mode for mode in MODES if not mode.streaming], ids=str)
    def test_one_that_returns_a_number(self, mode):
        """Likewise."""

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
            f"the provider {type(provider).__name__} returned an int; its complete() returns a Response or a str"
        )

    @pytest.mark.parametrize(
        ("stream", "problem"),
        [
            (lambda self, request: 5, "returned an int; make it a generator"),
            (lambda self, request: "text", "returned a str; make it a generator"),
            (lambda self, request: None, "returned None; make it a generator"),
        ],
    )
    def test_a_stream_that_is_none(self, stream, problem):
        """A text is no stream of characters."""
        provider = type("Odd", (), {"complete": lambda self, request: "x", "stream": stream})()
        with pytest.raises(TypeError) as caught:
            list(Pipeline(provider).stream(REQUEST))
        assert f"the stream() of Odd {problem}" in str(caught.value)

    def test_one_without_complete(self):
        """Or a class where an object is due."""

        class Nothing:
            def __init__(self, config=None):
                pass

        with pytest.raises(TypeError, match="a provider has a method complete"):
            Pipeline(Nothing())
        with pytest.raises(TypeError, match=r"Nothing is a class: write Nothing\(\)"):
            Pipeline(Nothing)
        register_llm_framework("nothing", Nothing)
        with pytest.raises(TypeError, match="a provider has a method complete"):
            LLM(LLMConfig(framework="nothing", model="m"))

    def test_an_async_one_in_a_sync_pipeline(self):
        """It is said where it belongs."""

        class Async:
            async def complete(self, request):
                return "x"

        with pytest.raises(TypeError, match="Async is asynchronous; use AsyncPipeline or AsyncLLM"):
            Pipeline(Async())

    def test_a_class_that_takes_no_configuration(self):
        """Python's error is as clear as any."""

        class Bare:
            def complete(self, request):
                return "x"

        register_llm_framework("bare", Bare)
        with pytest.raises(TypeError, match=r"Bare\(\) takes no arguments"):
            LLM(LLMConfig(framework="bare", model="m"))


def test_a_request_with_unknown_fields():
    """`evolve` names what there is."""
    with pytest.raises(TypeError, match="a Request has no 'temprature'; it has model, messages, "):
        Request(model="m", messages="hi").evolve(temprature=1)


def test_no_mistake_loads_a_telemetry_sdk_or_a_client():
    """Errors of configuration come before anything heavy."""
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
