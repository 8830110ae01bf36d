"""The framework `litellm`: the real LiteLLM against a local server."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import anyio
import pytest

if importlib.util.find_spec("litellm") is None:  # to import it here would fetch its price map from the network
    pytest.skip("needs LiteLLM", allow_module_level=True)

from canned_server import MODES, Canned, ask, canned_server

from fluxibly import AsyncPipeline, LLMConfig, Message, Pipeline, ProviderError, Request, StreamInterrupted, errors
from fluxibly.config import Timeouts
from fluxibly.messages import Tool
from fluxibly.providers.litellm import AsyncLiteLLMProvider, LiteLLMProvider

pytestmark = [
    # LiteLLM's own types, when pydantic builds their validators at the first call, and when they are dumped
    pytest.mark.filterwarnings("ignore:Item '.*' on TypedDict class:UserWarning"),
    pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning"),
    # its streams, which look at fields of its own that pydantic is to drop
    pytest.mark.filterwarnings("ignore:Accessing the 'model_:DeprecationWarning"),
]

KEY = "sk-secret-0123456789abcdef"
WEATHER = Tool("weather", "The weather of a city.", {"type": "object", "properties": {"city": {"type": "string"}}})
SERVICES = ("openai/gpt-4o", "anthropic/claude-sonnet-4-5")


@pytest.fixture
def server() -> Iterator[Canned]:
    with canned_server() as canned:
        yield canned


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[mode for mode in MODES if "stream" in mode])
def stream_mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=SERVICES)
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def config(server: Canned, model: str, **settings: Any) -> LLMConfig:
    base = server.url + ("" if "claude" in model else "/v1")
    return LLMConfig(**{"framework": "litellm", "model": model, "api_key": KEY, "api_base": base, **settings})


def call(mode: str, settings: LLMConfig, **request: Any) -> Any:
    asked = Request(**{"model": settings.model, "messages": "hello there", **request})
    return ask(mode, lambda: LiteLLMProvider(settings), lambda: AsyncLiteLLMProvider(settings), asked)


def failure(mode: str, settings: LLMConfig, **request: Any) -> BaseException:
    """The provider's error, and the assurance that the key is in none of what is printed of it."""
    with pytest.raises((ProviderError, StreamInterrupted)) as caught:
        call(mode, settings, **request)
    assert KEY not in "".join(traceback.format_exception(caught.value))
    assert KEY not in repr(vars(caught.value))
    return errors.root_cause(caught.value)


def test_an_answer_is_the_same_in_all_modes(server: Canned, model: str, mode: str) -> None:
    """Text, usage, finish reason, request id; the model's name goes through as LiteLLM has it."""
    response = call(mode, config(server, model))
    assert response.text == "You said: hello there"
    assert response.finish_reason == "stop"
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens, response.usage.cached_tokens) == (11, 5, 3)
    assert response.request_id == "req-1"
    assert response.id
    assert server.last.body["model"] == model.partition("/")[2]
    sent = server.last.headers
    assert sent.get("authorization", sent.get("x-api-key", "")).removeprefix("Bearer ") == KEY
    assert len(server.seen) == 1


def test_chunks_come_as_the_words_do(server: Canned, model: str) -> None:
    """One for each piece of text, and a last one with what is no text."""
    with Pipeline(LiteLLMProvider(config(server, model))).stream(Request(model=model, messages="a b c")) as stream:
        chunks = list(stream)
    assert [chunk.text for chunk in chunks] == ["You ", "said: ", "a ", "b ", "c", ""]
    assert chunks[-1].usage is not None


def test_tool_calls_and_their_results(server: Canned, model: str, mode: str) -> None:
    """The model's call, and the conversation that goes on with its result."""
    settings = config(server, model)
    response = call(mode, settings, tools=[WEATHER])
    (tool_call,) = response.tool_calls
    assert (tool_call.name, tool_call.arguments) == ("weather", {"city": "Oslo"})
    assert response.finish_reason == "tool_call"
    messages = [Message.user("weather?"), Message.assistant(response), Message.tool("sunny", tool_call)]
    call("sync", settings, messages=messages, tools=[WEATHER])
    sent = json.dumps(server.last.body["messages"])
    assert tool_call.id in sent
    assert "sunny" in sent


def test_signed_reasoning_goes_back_unchanged(server: Canned, mode: str) -> None:
    """Read in all modes, kept with its signature, and sent with the next turn."""
    settings = config(server, "anthropic/claude-sonnet-4-5")
    thinking = {"thinking": {"type": "enabled", "budget_tokens": 1024}}
    response = call(mode, settings, tools=[WEATHER], extra=thinking)
    assert response.reasoning == "Let me see."
    assert [(part.text, part.signature) for part in response.reasoning_parts] == [("Let me see.", "c2ln")]
    messages = [Message.user("weather?"), Message.assistant(response), Message.tool("sunny", response.tool_calls[0])]
    call("sync", settings, messages=messages, tools=[WEATHER], extra=thinking)
    block = server.last.body["messages"][1]["content"][0]
    assert (block["type"], block["thinking"], block["signature"]) == ("thinking", "Let me see.", "c2ln")


def test_parameters_reach_openai(server: Canned, mode: str) -> None:
    """Each on the wire, per call, under its own name."""
    call(
        mode,
        config(server, "openai/gpt-4o"),
        temperature=0.3,
        max_tokens=64,
        top_p=0.9,
        frequency_penalty=0.1,
        presence_penalty=-0.1,
        stop=["END"],
        seed=7,
        top_k=40,
        tools=[WEATHER],
        tool_choice="weather",
        response_format={"type": "object", "title": "Answer"},
        extra={"logit_bias": {"50256": -100}, "temperature": 0.4, "odd": [1]},
        headers={"traceparent": "00-abc"},
    )
    body = server.last.body
    assert (body["max_tokens"], body["top_p"], body["seed"], body["top_k"]) == (64, 0.9, 7, 40)
    assert (body["frequency_penalty"], body["presence_penalty"], body["stop"]) == (0.1, -0.1, ["END"])
    assert (body["temperature"], body["logit_bias"], body["odd"]) == (0.4, {"50256": -100}, [1])
    assert body["tool_choice"] == {"type": "function", "function": {"name": "weather"}}
    assert body["response_format"]["json_schema"]["schema"] == {"type": "object", "title": "Answer"}
    assert server.last.headers["traceparent"] == "00-abc"


def test_parameters_reach_anthropic(server: Canned) -> None:
    """LiteLLM puts them into Anthropic's words."""
    messages = [Message.system("be brief"), Message.user("hello")]
    call(
        "sync",
        config(server, "anthropic/claude-sonnet-4-5"),
        messages=messages,
        temperature=0.3,
        max_tokens=64,
        stop=["END"],
        tools=[WEATHER],
        tool_choice="required",
    )
    body = server.last.body
    assert (body["temperature"], body["max_tokens"], body["stop_sequences"]) == (0.3, 64, ["END"])
    assert (body["tools"][0]["name"], body["tool_choice"]["type"]) == ("weather", "any")
    assert "be brief" in json.dumps(body["system"])


def test_several_choices(server: Canned) -> None:
    """`n` is LiteLLM's to pass on."""
    call("sync", config(server, "openai/gpt-4o"), n=2)
    assert server.last.body["n"] == 2


def test_what_the_service_has_no_word_for_is_an_error(server: Canned) -> None:
    """LiteLLM says so, unless its own global switch is set."""
    error = failure("sync", config(server, "anthropic/claude-sonnet-4-5"), seed=3)
    assert isinstance(error, errors.BadRequest)
    assert "seed" in str(error)
    assert server.seen == []


STATUSES: list[tuple[int, dict[str, Any], type[ProviderError]]] = [
    (400, {"error": {"message": "bad", "type": "invalid_request_error"}}, errors.BadRequest),
    (
        400,
        {"error": {"message": "This model's maximum context length is 8 tokens.", "code": "context_length_exceeded"}},
        errors.ContextLengthExceeded,
    ),
    (401, {"error": {"message": f"wrong key {KEY}", "code": "invalid_api_key"}}, errors.AuthenticationError),
    (403, {"error": {"message": "no"}}, errors.PermissionDenied),
    (404, {"error": {"message": "no such model"}}, errors.NotFound),
    (429, {"error": {"message": "slow down"}}, errors.RateLimitError),
    (500, {"error": {"message": "oops"}}, errors.ServerError),
    (503, {"error": {"message": "busy"}}, errors.Overloaded),
]


@pytest.mark.parametrize(("status", "body", "kind"), STATUSES)
def test_errors_become_ours_after_one_attempt(
    server: Canned, model: str, status: int, body: dict[str, Any], kind: type[ProviderError]
) -> None:
    """With the status and the service's hint, and without the key."""
    server.fail = (status, json.dumps(body), {"retry-after": "3"})
    error = failure("sync", config(server, model))
    assert type(error) is kind
    assert (error.status, error.retry_after) == (status, 3.0)
    assert (error.provider, error.model) == ("litellm", model)
    assert len(server.seen) == 1


@pytest.mark.parametrize("status", [429, 500])
def test_no_mode_retries_by_itself(server: Canned, model: str, mode: str, status: int) -> None:
    """Retrying is for the middleware of that name."""
    server.fail = (status, '{"error": {"message": "no"}}', {})
    error = failure(mode, config(server, model))
    assert isinstance(error, ProviderError)
    assert error.retryable
    assert len(server.seen) == 1


@pytest.mark.parametrize("how", ["cut", "drop"])
def test_a_stream_without_its_end_is_no_answer(server: Canned, model: str, stream_mode: str, how: str) -> None:
    """LiteLLM makes up a finish reason for it, which is not believed."""
    setattr(server, how, True)
    error = failure(stream_mode, config(server, model), messages="a b c d")
    assert isinstance(error, (errors.StreamProtocolError, errors.ConnectionFailed))


def test_an_error_in_a_stream_keeps_what_came_before(server: Canned, stream_mode: str) -> None:
    """As the cause of StreamInterrupted."""
    server.stream_error = {"error": {"type": "server_error", "message": "busy"}}
    error = failure(stream_mode, config(server, "openai/gpt-4o"), messages="a b c d")
    # LiteLLM calls it a failed connection, and says no more than the message
    assert isinstance(error, (errors.ServerError, errors.ConnectionFailed))
    assert "busy" in str(error)


def test_a_silent_server_runs_into_the_time_limit(server: Canned, model: str, mode: str) -> None:
    """Whichever limit it is, it is a RequestTimeout."""
    server.stall = True
    error = failure(mode, config(server, model, timeout=0.3))
    assert isinstance(error, errors.RequestTimeout)


def test_keep_alives_do_not_outlast_the_limits(server: Canned, model: str, stream_mode: str) -> None:
    """A server that trickles comments says nothing."""
    server.stall_after = True
    limits = Timeouts(connect=5, first_byte=5, idle=0.3)
    error = failure(stream_mode, config(server, model, timeout=limits), messages="a b c d")
    assert isinstance(error, errors.StreamStalled)


def test_no_connection_is_an_error_that_may_be_tried_again(mode: str, model: str) -> None:
    """Nothing listens there."""
    with canned_server() as gone:
        settings = config(gone, model)
    error = failure(mode, settings)
    assert isinstance(error, ProviderError)
    assert error.retryable


def test_a_stream_given_up_lets_go_of_its_connection(server: Canned, model: str) -> None:
    """LiteLLM's own stream has no way to say so."""
    server.stall_after = True
    with Pipeline(LiteLLMProvider(config(server, model))).stream(Request(model=model, messages="a b")) as stream:
        assert next(iter(stream)).text
    assert server.gone.wait(10)


def test_an_async_stream_given_up_lets_go_of_its_connection(server: Canned, model: str) -> None:
    """Asynchronously."""
    server.stall_after = True

    async def run() -> None:
        async with AsyncPipeline(AsyncLiteLLMProvider(config(server, model))) as pipeline:
            async with pipeline.stream(Request(model=model, messages="a b")) as stream:
                async for chunk in stream:
                    assert chunk.text
                    break
            assert await anyio.to_thread.run_sync(server.gone.wait, 10)

    anyio.run(run)


def test_a_model_that_litellm_does_not_know() -> None:
    """Noticed when the provider is made; the error says how to write it."""
    with pytest.raises(errors.ConfigError, match="provider/model"):
        LiteLLMProvider(LLMConfig(framework="litellm", model="nobodys-model"))


def test_a_malformed_key_is_refused_and_not_shown() -> None:
    """Before anything is sent."""
    with pytest.raises(errors.AuthenticationError) as caught:
        LiteLLMProvider(LLMConfig(framework="litellm", model="openai/gpt-4o", api_key="sk-abc\n"))
    assert "sk-abc" not in str(caught.value)


def test_who_it_is(server: Canned) -> None:
    """The same in all modes, for logs and spans."""
    settings = config(server, "anthropic/claude-sonnet-4-5")
    info = LiteLLMProvider(settings).info
    assert info == AsyncLiteLLMProvider(settings).info
    assert (info.name, info.framework, info.telemetry_name) == ("LiteLLMProvider", "litellm", "anthropic")
    assert f"http://{info.server_address}:{info.server_port}" == server.url


IMPORT = """
import os, socket
def refuse(*a, **k):
    raise SystemExit("LiteLLM went to the network")
socket.getaddrinfo = refuse
socket.socket.connect = refuse
before = dict(os.environ)
from fluxibly import LLMConfig
from fluxibly.providers.litellm import LiteLLMProvider
LiteLLMProvider(LLMConfig(framework="litellm", model="openai/gpt-4o", api_key="sk-abc"))
import litellm
print(dict(os.environ) == before, litellm.drop_params, litellm.api_key, litellm.num_retries, litellm.callbacks,
      litellm.success_callback, litellm.suppress_debug_info)
"""


def test_the_import_keeps_off_the_network_and_leaves_the_environment_as_it_was(tmp_path: Any) -> None:
    """And none of LiteLLM's globals is set."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LITELLM")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", IMPORT], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == "True False None None [] [] False"


def test_without_the_extra_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it would be with no LiteLLM installed."""
    monkeypatch.setitem(sys.modules, "litellm", None)
    with pytest.raises(errors.ConfigError, match=r"pip install 'fluxibly\[litellm\]'"):
        LiteLLMProvider(LLMConfig(framework="litellm", model="openai/gpt-4o"))
