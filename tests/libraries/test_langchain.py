"""The framework `langchain`: the real langchain-openai and langchain-anthropic against a local server."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from typing import Any

import pytest

pytest.importorskip("langchain")
pytest.importorskip("langchain_openai")
pytest.importorskip("langchain_anthropic")

from langchain_core.language_models import BaseChatModel, FakeListChatModel
from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from support.canned_server import Canned
from support.libraries import KEY, LANGCHAIN, WEATHER, ask

from fluxibly import LLMConfig, Message, Pipeline, ProviderError, Request, errors
from fluxibly.providers.langchain import AsyncLangChainProvider, LangChainProvider
from fluxibly.providers.langchain._models import split_model
from fluxibly.types import Image

config, call, failure = LANGCHAIN.config, LANGCHAIN.call, LANGCHAIN.failure


@pytest.fixture(params=LANGCHAIN.models)
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# Answers


def test_answers_keep_the_services_values(server: Canned, model: str, mode: str) -> None:
    """An answer has the service's own finish reason, count of reasoning tokens and name for the model."""
    response = call(mode, config(server, model))
    assert response.raw_finish_reason == ("end_turn" if "claude" in model else "stop")
    assert response.usage.reasoning_tokens == (None if "claude" in model else 2)
    assert response.model == split_model(model)[1] + "-0613"


def test_whole_answers_have_ids_headers_and_langchains_message(server: Canned) -> None:
    """Only a whole answer has an id, a request id, rate limits and LangChain's message in `raw`."""
    response = call("sync", config(server, "gpt-4o"))
    assert (response.id, response.request_id) == ("chatcmpl-1", "req-1")
    assert response.rate_limits == {"x-ratelimit-remaining-requests": "7"}
    assert isinstance(response.raw, AIMessage)


def test_a_conversation_with_tools_goes_back(server: Canned, model: str) -> None:
    """The model's call and the tool's result go back in each service's own format."""
    settings = config(server, model)
    response = call("sync", settings, tools=[WEATHER])
    messages = [
        Message.user("weather?"),
        Message.assistant(response),
        Message.tool("sunny", response.tool_calls[0]),
    ]
    call("sync", settings, messages=messages, tools=[WEATHER], tool_choice="none")
    sent = server.last.body["messages"]
    if "claude" in model:
        assert sent[1]["content"] == [
            {"type": "tool_use", "id": "toolu_a", "name": "weather", "input": {"city": "Oslo"}}
        ]
        assert sent[2]["content"][0]["tool_use_id"] == "toolu_a"
        assert server.last.body["tool_choice"] == {"type": "none"}
    else:
        assert sent[1]["tool_calls"][0]["id"] == "call_a"
        assert json.loads(sent[1]["tool_calls"][0]["function"]["arguments"]) == {"city": "Oslo"}
        assert (sent[2]["role"], sent[2]["tool_call_id"]) == ("tool", "call_a")
        assert server.last.body["tool_choice"] == "none"


# Requests


def test_parameters_reach_openai(server: Canned, mode: str) -> None:
    """Each parameter of a call is in OpenAI's body under OpenAI's name."""
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
        reasoning_effort="low",
        extra={"logit_bias": {"50256": -100}, "temperature": 0.4, "odd": [1]},
        headers={"traceparent": "00-abc"},
    )
    body = server.last.body
    assert body["model"] == "gpt-4o"
    assert (body["max_completion_tokens"], body["top_p"], body["seed"], body["top_k"]) == (64, 0.9, 7, 40)
    assert (body["frequency_penalty"], body["presence_penalty"], body["stop"]) == (0.1, -0.1, ["END"])
    assert (body["temperature"], body["logit_bias"], body["odd"]) == (0.4, {"50256": -100}, [1])
    assert body["tools"][0]["function"]["name"] == "weather"
    assert body["tool_choice"] == {"type": "function", "function": {"name": "weather"}}
    assert body["response_format"]["json_schema"]["schema"] == {"type": "object", "title": "Answer"}
    assert body["reasoning_effort"] == "low"
    assert server.last.headers["traceparent"] == "00-abc"


def test_parameters_reach_anthropic(server: Canned, mode: str) -> None:
    """Each parameter of a call is in Anthropic's body under Anthropic's name."""
    call(
        mode,
        config(server, "anthropic/claude-test"),
        messages=[Message.system("be brief"), Message.user("hello")],
        temperature=0.3,
        max_tokens=64,
        top_k=40,
        stop=["END"],
        tools=[WEATHER],
        tool_choice="required",
        response_format={"type": "object"},
        extra={"metadata": {"user_id": "u"}},
        headers={"traceparent": "00-abc"},
    )
    body = server.last.body
    assert (body["system"], body["model"], body["temperature"]) == ("be brief", "claude-test", 0.3)
    assert (body["max_tokens"], body["top_k"], body["stop_sequences"]) == (64, 40, ["END"])
    assert (body["tools"][0]["name"], body["tool_choice"]) == ("weather", {"type": "any"})
    assert body["output_config"]["format"] == {"type": "json_schema", "schema": {"type": "object"}}
    assert body["metadata"] == {"user_id": "u"}
    assert server.last.headers["traceparent"] == "00-abc"


def test_unset_parameters_are_not_sent(server: Canned) -> None:
    """Parameters that are not set are not sent, because some models refuse parameters that others accept."""
    call("sync", config(server, "gpt-4o"))
    assert set(server.last.body) == {"model", "messages", "stream"}


def test_images_reach_the_service(server: Canned, model: str) -> None:
    """Images are sent by URL and as bytes."""
    parts = ["look: ", Image(url="https://example.org/a.png"), Image(data=b"\x89PNG", media_type="image/png")]
    call("sync", config(server, model), messages=[Message.user(parts)])
    content = server.last.body["messages"][0]["content"]
    assert content[0] == {"type": "text", "text": "look: "}
    if "claude" in model:
        assert content[1]["source"] == {"type": "url", "url": "https://example.org/a.png"}
        assert content[2]["source"] == {"type": "base64", "media_type": "image/png", "data": "iVBORw=="}
    else:
        assert [part["image_url"]["url"] for part in content[1:]] == [
            "https://example.org/a.png",
            "data:image/png;base64,iVBORw==",
        ]


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"n": 2}, "n"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"model": "claude-test", "seed": 1}, "seed"),
        ({"model": "claude-test", "response_format": "json"}, "schema"),
    ],
)
def test_unsupported_parameters_are_errors(server: Canned, changes: dict[str, Any], names: str) -> None:
    """A parameter that cannot be passed on is never dropped: it is an error, and nothing is sent."""
    settings = config(server, changes.pop("model", "gpt-4o"))
    error = failure("sync", settings, **changes)
    assert isinstance(error, errors.BadRequest)
    assert names in str(error)
    assert server.seen == []


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("openai/gpt-4o", ("openai", "gpt-4o")),
        ("anthropic/claude-x", ("anthropic", "claude-x")),
        ("google_genai:gemini-2", ("google_genai", "gemini-2")),
        ("google-genai:gemini-2", ("google_genai", "gemini-2")),
        ("o1-mini", ("openai", "o1-mini")),
        ("o4-mini", ("openai", "o4-mini")),
        ("gpt-5", ("openai", "gpt-5")),
        ("claude-3-5", ("anthropic", "claude-3-5")),
        ("accounts/fireworks/models/m", (None, "accounts/fireworks/models/m")),
        ("ft:gpt-4o:me", ("ft", "gpt-4o:me")),
    ],
)
def test_names_of_models(name: str, parts: tuple[str | None, str]) -> None:
    """Models may have LangChain's names, or the prefixes of other frameworks."""
    assert split_model(name) == parts


# Errors

STATUSES: list[tuple[int, dict[str, Any], type[ProviderError]]] = [
    (400, {"error": {"message": "bad", "type": "invalid_request_error"}}, errors.BadRequest),
    (400, {"error": {"message": "too long", "code": "context_length_exceeded"}}, errors.ContextLengthExceeded),
    (401, {"error": {"message": f"wrong key {KEY}", "code": "invalid_api_key"}}, errors.AuthenticationError),
    (403, {"error": {"message": "no"}}, errors.PermissionDenied),
    (404, {"error": {"message": "no such model"}}, errors.NotFound),
    (429, {"error": {"message": "slow down"}}, errors.RateLimitError),
    (429, {"error": {"message": "pay", "code": "insufficient_quota"}}, errors.QuotaExceeded),
    (500, {"error": {"message": "oops"}}, errors.ServerError),
    (529, {"error": {"message": "busy", "type": "overloaded_error"}}, errors.Overloaded),
]


@pytest.mark.parametrize(("status", "body", "kind"), STATUSES)
def test_errors_become_ours_after_one_attempt(
    server: Canned, model: str, status: int, body: dict[str, Any], kind: type[ProviderError]
) -> None:
    """The error has the status, the retry hint and the request id, but not the key."""
    server.fail = (status, json.dumps(body), {"retry-after": "3"})
    error = failure("sync", config(server, model))
    assert type(error) is kind
    assert (error.status, error.retry_after, error.request_id) == (status, 3.0, "req-1")
    assert (error.provider, error.model) == ("langchain", model)
    assert len(server.seen) == 1


def test_an_error_in_a_stream_keeps_the_output_before_it(server: Canned, model: str, stream_mode: str) -> None:
    """The error in a stream is the cause of StreamInterrupted."""
    server.stream_error = {"type": "error", "error": {"type": "overloaded_error", "message": "busy"}}
    error = failure(stream_mode, config(server, model), messages="a b c")
    assert isinstance(error, errors.Overloaded)


@pytest.mark.parametrize("how", ["cut", "drop"])
def test_a_stream_without_its_end_is_an_error(server: Canned, model: str, stream_mode: str, how: str) -> None:
    """A stream without its end is an error, whether the connection closes properly or not."""
    setattr(server, how, True)
    error = failure(stream_mode, config(server, model), messages="a b c")
    assert isinstance(error, errors.StreamProtocolError)


@pytest.mark.parametrize("body", ["<html>no</html>", "{}", "[1]", '{"choices": []}', '{"choices": null}', "", "null"])
def test_rubbish_is_an_error(server: Canned, model: str, body: str) -> None:
    """A body that is not an answer raises an error of fluxibly's, not an exception of LangChain's."""
    server.body = body
    with pytest.raises(ProviderError):
        call("sync", config(server, model))


def test_an_error_inside_of_a_200(server: Canned) -> None:
    """OpenRouter reports the failure of another service in a 200 response."""
    server.body = '{"error": {"message": "upstream is down", "code": 502}}'
    error = failure("sync", config(server, "gpt-4o"))
    assert isinstance(error, errors.ServerError)
    assert "upstream is down" in str(error)


# Abandoned streams


def test_closing_from_another_thread_ends_a_read(server: Canned) -> None:
    """Closing a stream ends the read of another thread."""
    server.stall_after = True
    pipeline = Pipeline(LangChainProvider(config(server, "gpt-4o")))
    stream = pipeline.stream(Request(model="gpt-4o", messages="a b"))
    reading = threading.Event()

    def read() -> None:
        try:
            for chunk in stream:
                if chunk.text.startswith("said"):
                    reading.set()
        except Exception:  # noqa: BLE001, S110  # the test is that the read ends, however it does
            pass

    thread = threading.Thread(target=read)
    thread.start()
    assert reading.wait(10)
    stream.close()
    thread.join(10)
    assert not thread.is_alive()
    pipeline.close()
    assert server.gone.wait(10)


# Existing chat models


class Plain(BaseChatModel):
    """A user's own chat model: it has a temperature, accepts keywords, and cannot stream."""

    temperature: float = 1.0

    @property
    def _llm_type(self) -> str:
        return "plain"

    def _generate(self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any) -> ChatResult:
        if messages[-1].content == "fail":
            raise LookupError("nothing known")
        if messages[-1].content == "leak":
            raise OSError(f"cannot reach it with {KEY}")
        text = f"{messages[-1].content} {self.temperature} {stop} {sorted(kwargs.items())}"
        return ChatResult(generations=[ChatGeneration(message=AIMessage(text))])


def wrapped(mode: str, chat_model: BaseChatModel, **request: Any) -> Any:
    asked = Request(**{"model": "any", "messages": "hi", **request})
    return ask(mode, lambda: LangChainProvider.wrap(chat_model), lambda: AsyncLangChainProvider.wrap(chat_model), asked)


def test_an_existing_chat_model_can_be_wrapped(mode: str) -> None:
    """Parameters set its fields for the call, or become keywords."""
    chat_model = Plain()
    response = wrapped(mode, chat_model, temperature=0.5, stop=["END"], seed=3, extra={"odd": 1})
    assert response.text == "hi 0.5 ['END'] [('odd', 1), ('seed', 3)]"
    assert chat_model.temperature == 1.0


def test_a_wrapped_model_streams_if_it_can() -> None:
    """LangChain's own fake model streams a character at a time."""
    pipeline = Pipeline(LangChainProvider.wrap(FakeListChatModel(responses=["abc"])))
    with pipeline.stream(Request(model="any", messages="hi")) as stream:
        assert [chunk.text for chunk in stream] == ["a", "b", "c"]


@pytest.mark.parametrize("mode", ["sync", "sync stream", "trio"])  # LangChain has no way to close its async clients
def test_a_wrapped_model_of_openai_takes_overrides(server: Canned, mode: str) -> None:
    """A wrapped model accepts overrides and otherwise keeps its own settings."""
    from langchain_openai import ChatOpenAI

    chat_model = ChatOpenAI(
        model="gpt-4o", api_key=KEY, base_url=server.url + "/v1", temperature=0.9, seed=5, max_retries=0
    )
    wrapped(mode, chat_model, temperature=0.1)
    assert (server.last.body["temperature"], server.last.body["seed"]) == (0.1, 5)


def test_tools_for_a_model_without_tool_support() -> None:
    """Tools for a chat model without tool support are an error that says so."""
    with pytest.raises(errors.BadRequest, match="Plain does not support tools"):
        wrapped("sync", Plain(), tools=[WEATHER])


def test_only_chat_models_can_be_wrapped() -> None:
    """The error for any other object names its type."""
    with pytest.raises(TypeError, match=r"expected a LangChain chat model \(a BaseChatModel\), got a str"):
        LangChainProvider.wrap("gpt-4o")  # type: ignore[arg-type]


# Configuration


def test_a_model_that_langchain_does_not_know() -> None:
    """The error for an unknown model repeats LangChain's own message."""
    with pytest.raises(errors.ConfigError, match="LangChain cannot create the model 'nobodys-model'"):
        LangChainProvider(LLMConfig(framework="langchain", model="nobodys-model", api_key=KEY))


def test_an_integration_that_is_not_installed() -> None:
    """The error for a missing integration names the package to install."""
    with pytest.raises(errors.ConfigError, match=r"langchain-upstage|langchain_upstage"):
        LangChainProvider(LLMConfig(framework="langchain", model="upstage:solar", api_key=KEY))


def test_a_missing_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing key is reported when the provider is created."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(errors.AuthenticationError, match="api_key"):
        LangChainProvider(LLMConfig(framework="langchain", model="gpt-4o"))


def test_without_the_extra_the_error_says_what_to_install() -> None:
    """In a process without LangChain the error names the packages to install."""
    code = (
        "import sys; sys.modules['langchain_core'] = None\n"
        "try:\n    import fluxibly.providers.langchain\n"
        "except ValueError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install langchain langchain-openai langchain-anthropic" in done.stdout
