"""Behaviour that the frameworks `langchain` and `litellm` share, with the real libraries against a local server."""

from __future__ import annotations

import json
from typing import Any

import anyio
import pytest
from support.canned_server import Canned, canned_server
from support.dialects import ask as ask_llm, serving, sse
from support.libraries import KEY, LANGCHAIN, MODES, STREAM_MODES, WEATHER, Case, cases, sent_key

from fluxibly import (
    AsyncPipeline,
    LLMConfig,
    Message,
    Pipeline,
    ProviderError,
    Request,
    StreamInterrupted,
    Tool,
    errors,
)
from fluxibly.config import Timeouts
from fluxibly.testing.modes import MODES as REAL_MODES, Mode

all_modes = pytest.mark.parametrize("mode", MODES)
stream_modes = pytest.mark.parametrize("mode", STREAM_MODES)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize `case` with each library and model, `claude` and `gpt` with each library and one of its models."""
    for name, part in (("case", ""), ("claude", "claude"), ("gpt", "gpt")):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, cases(part))


def call(server: Canned, case: Case, mode: str = "sync", **request: Any) -> Any:
    return case.library.call(mode, case.config(server), **request)


def failure(server: Canned, case: Case, mode: str, timeout: Any = 60, **request: Any) -> ProviderError:
    error = case.library.failure(mode, case.config(server, timeout=timeout), **request)
    assert isinstance(error, ProviderError)
    return error


# Answers


@all_modes
def test_an_answer_is_the_same_in_all_modes(server: Canned, case: Case, mode: str) -> None:
    """Text, usage and finish reason are the same in all modes. The key and the model's name are sent once."""
    response = call(server, case, mode)
    assert response.text == "You said: hello there"
    assert response.finish_reason == "stop"
    usage = response.usage
    assert (usage.input_tokens, usage.output_tokens, usage.cached_tokens) == (11, 5, 3)
    assert [seen.body["model"] for seen in server.seen] == [case.model.partition(case.library.prefix)[2]]
    assert sent_key(server) == KEY


def test_chunks_come_as_the_words_do(server: Canned, case: Case) -> None:
    """Each piece of text has its own chunk, and a last chunk has the metadata."""
    provider = case.library.providers[0](case.config(server))
    with Pipeline(provider) as pipeline, pipeline.stream(Request(model=case.model, messages="a b c")) as stream:
        chunks = list(stream)
    assert [chunk.text for chunk in chunks] == ["You ", "said: ", "a ", "b ", "c", ""]
    assert chunks[-1].usage is not None


@all_modes
def test_tool_calls_come_whole(server: Canned, case: Case, mode: str) -> None:
    """A tool call is complete in all modes; a stream's fragments are joined."""
    response = call(server, case, mode, tools=[WEATHER])
    (tool_call,) = response.tool_calls
    assert (tool_call.name, tool_call.arguments) == ("weather", {"city": "Oslo"})
    assert tool_call.id in ("call_a", "toolu_a")
    assert response.finish_reason == "tool_call"


@all_modes
def test_signed_reasoning_goes_back_unchanged(server: Canned, claude: Case, mode: str) -> None:
    """Signed reasoning is read in all modes, kept with its signature, and sent with the next turn."""
    thinking = {"thinking": {"type": "enabled", "budget_tokens": 1024}}
    response = call(server, claude, mode, tools=[WEATHER], extra=thinking)
    assert response.reasoning == "Let me see."
    assert [(part.text, part.signature) for part in response.reasoning_parts] == [("Let me see.", "c2ln")]
    messages = [Message.user("weather?"), Message.assistant(response), Message.tool("sunny", response.tool_calls[0])]
    call(server, claude, messages=messages, tools=[WEATHER], extra=thinking)
    block, tool_use = server.last.body["messages"][1]["content"]
    assert (block["type"], block["thinking"], block["signature"]) == ("thinking", "Let me see.", "c2ln")
    assert (tool_use["type"], tool_use["id"]) == ("tool_use", "toolu_a")


# The configured service


def test_a_fallback_to_another_service_does_not_get_the_key(
    server: Canned, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`Request.model` may name any model, but the key and the address are only for the configured service."""
    (other,) = set(case.library.models) - {case.model}
    name = "ANTHROPIC" if "claude" in other else "OPENAI"
    monkeypatch.setenv(f"{name}_API_KEY", "sk-other")
    with canned_server() as others:
        monkeypatch.setenv(f"{name}_BASE_URL", others.url + ("" if "claude" in other else "/v1"))
        call(server, case, model=other)
        call(server, case)
        assert sent_key(others) == "sk-other"
        assert (len(others.seen), len(server.seen)) == (1, 1)
    assert sent_key(server) == KEY


@pytest.mark.parametrize("key", ["sk-abc\n", "sk-äbc", " sk-abc"])
def test_a_malformed_key_is_refused_and_not_shown(server: Canned, case: Case, key: str) -> None:
    """A malformed key is refused before anything is sent, and the error does not show the key."""
    with pytest.raises(errors.AuthenticationError) as caught:
        case.library.providers[0](case.config(server, api_key=key))
    assert key.strip() not in str(caught.value)


def test_keys_of_the_environment_are_not_shown(server: Canned, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library takes its key from the environment if the configuration has none. It is masked all the same."""
    name = "ANTHROPIC" if "claude" in case.model else "OPENAI"
    monkeypatch.setenv(f"{name}_API_KEY", KEY)
    server.fail = (400, json.dumps({"error": {"message": f"bad key {KEY}"}}), {})
    error = case.library.failure("sync", case.config(server, api_key=None))
    assert sent_key(server) == KEY
    assert "bad key " in str(error)


@pytest.mark.parametrize("key", ["sk-a\nbc", "sk-a\x00bc", "sk-abc\x7f"])
def test_a_key_with_control_characters_is_refused(server: Canned, case: Case, key: str) -> None:
    """A header cannot carry it, and a line end would begin another header."""
    with pytest.raises(errors.AuthenticationError, match="control characters") as caught:
        case.library.providers[0](case.config(server, api_key=key))
    assert "sk-a" not in str(caught.value)


def test_provider_info(server: Canned, case: Case) -> None:
    """The description of the provider, for logs and spans, is the same in all modes."""
    info, async_info = (provider(case.config(server)).info for provider in case.library.providers)
    assert info == async_info
    assert (info.name, info.framework) == (case.library.class_name, case.library.framework)
    assert info.telemetry_name == case.model.partition(case.library.prefix)[0]
    assert f"http://{info.server_address}:{info.server_port}" == server.url


def test_odd_arguments_of_tool_calls(gpt: Case) -> None:
    """`null` is no arguments, and a fragment with a new number but no id and no name belongs to the call before."""
    fragments = [
        {"index": 0, "id": "a", "type": "function", "function": {"name": "add", "arguments": ""}},
        {"index": 1, "function": {"arguments": '{"a": 1}'}},
        {"index": 1, "id": "b", "type": "function", "function": {"name": "now", "arguments": "null"}},
    ]
    calls = [{**fragments[0], "function": {"name": "add", "arguments": '{"a": 1}'}}, fragments[2]]
    fields = {"id": "x", "object": "chat.completion", "created": 1, "model": "gpt-4o"}
    whole = {**fields, "choices": [{"index": 0, "message": {"role": "assistant", "content": None, "tool_calls": calls},
                                    "finish_reason": "tool_calls"}]}  # fmt: skip
    choices: list[dict[str, Any]] = [
        {"index": 0, "delta": {"tool_calls": [each]}, "finish_reason": None} for each in fragments
    ]
    choices.append({"index": 0, "delta": {}, "finish_reason": "tool_calls"})
    stream = sse(*({**fields, "object": "chat.completion.chunk", "choices": [each]} for each in choices), done=True)
    for mode, body, kind in (("sync", json.dumps(whole).encode(), "application/json"),
                             ("sync stream", stream, "text/event-stream")):  # fmt: skip
        with serving(body, kind) as address:
            config = LLMConfig(framework=gpt.library.framework, model=gpt.model, api_key=KEY, api_base=address)
            response = gpt.library.call(mode, config, tools=[Tool("add"), Tool("now")])
        assert [(call.name, call.arguments, call.error) for call in response.tool_calls] == [
            ("add", {"a": 1}, None),
            ("now", {}, None),
        ]


# Errors

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
    server: Canned, case: Case, status: int, body: dict[str, Any], kind: type[ProviderError]
) -> None:
    """The error has the status and the retry hint, but not the key."""
    server.fail = (status, json.dumps(body), {"retry-after": "3"})
    error = failure(server, case, "sync")
    assert type(error) is kind
    assert (error.status, error.retry_after) == (status, 3.0)
    assert (error.provider, error.model) == (case.library.framework, case.model)
    assert len(server.seen) == 1


WORDS: list[tuple[int, dict[str, Any], type[ProviderError]]] = [
    (400, {"message": "All messages are long.", "type": "too_many_prompt_tokens"}, errors.ContextLengthExceeded),
    (400, {"message": "Your request exceeded model token limit: 7", "type": "e"}, errors.ContextLengthExceeded),
    (400, {"message": "input length and `max_tokens` exceed context limit: 19 + 2 > 20"}, errors.ContextLengthExceeded),
    (400, {"message": "You have reached your specified API usage limits.", "type": "e"}, errors.QuotaExceeded),
    (429, {"message": "余额不足或无可用资源包,请充值。", "code": "1113"}, errors.QuotaExceeded),
    (429, {"message": "Your allowance has been reached.", "type": "budget_exceeded"}, errors.QuotaExceeded),
    (400, {"message": "Budget has been exceeded! Current cost: 2, Max budget: 1"}, errors.QuotaExceeded),
    (429, {"message": "Request too large on tokens per min (TPM): Limit 3, Requested 4."}, errors.RateLimitError),
    (400, {"message": "max_tokens is too large: 9. This model supports at most 8."}, errors.BadRequest),
]


@pytest.mark.parametrize("mode", ["sync", "asyncio stream"])
def test_a_full_context_and_an_empty_account_are_known(server: Canned, case: Case, mode: str) -> None:
    """The services' words decide the class, even where the library keeps only a text that quotes them."""
    for status, body, kind in WORDS:
        server.fail = (status, json.dumps({"type": "error", "error": body}), {})
        error = failure(server, case, mode)
        assert (type(error), error.status, error.retryable) == (kind, status, kind.default_retryable), body


@pytest.mark.parametrize("mode", ["sync stream", "asyncio stream"])
def test_words_count_in_a_stream(server: Canned, case: Case, mode: str) -> None:
    """An error after the first words has the class of its words, not that of a lost connection."""
    for _, body, kind in WORDS[1:5]:
        server.stream_error = {"type": "error", "error": {"type": "e", **body}}
        assert type(failure(server, case, mode, messages="a b c d")) is kind, body


@all_modes
@pytest.mark.parametrize("status", [429, 500])
def test_no_mode_retries_by_itself(server: Canned, case: Case, mode: str, status: int) -> None:
    """Only the middleware `Retry` retries."""
    server.fail = (status, '{"error": {"message": "no"}}', {})
    assert failure(server, case, mode).retryable
    assert len(server.seen) == 1


@all_modes
def test_a_refused_connection_is_retryable(case: Case, mode: str) -> None:
    """A port without a listener causes a retryable error."""
    with canned_server() as gone:
        pass
    assert failure(gone, case, mode).retryable


@all_modes
def test_a_silent_server_runs_into_the_time_limit(server: Canned, case: Case, mode: str) -> None:
    """A silent server causes a RequestTimeout, whichever limit applies."""
    server.stall = True
    assert isinstance(failure(server, case, mode, timeout=0.2), errors.RequestTimeout)


@stream_modes
@pytest.mark.parametrize(
    ("limits", "phase"),
    [(Timeouts(connect=5, first_byte=5, idle=0.2), "idle"), (Timeouts(connect=5, total=0.3), "total")],
)
def test_keep_alives_do_not_outlast_the_limits(
    server: Canned, case: Case, mode: str, limits: Timeouts, phase: str
) -> None:
    """A server that sends only comments runs into the time limits."""
    server.stall_after = True
    error = failure(server, case, mode, timeout=limits, messages="a b c")
    assert isinstance(error, errors.RequestTimeout)
    assert error.phase == phase
    assert server.gone.wait(10), "the connection was not closed"


# Connections


def test_an_abandoned_stream_releases_its_connection(server: Canned, case: Case) -> None:
    """Leaving a stream in the consumer's own thread closes its connection."""
    server.stall_after = True
    with Pipeline(case.library.providers[0](case.config(server))) as pipeline:
        with pipeline.stream(Request(model=case.model, messages="a b")) as stream:
            assert next(iter(stream)).text == "You "
        assert server.gone.wait(10)


def test_a_stalled_stream_releases_its_connection(server: Canned, case: Case) -> None:
    """A stalled stream closes its connection, although the library still reads keep-alives and the provider is open."""
    server.stall_after = True
    limits = Timeouts(connect=5, first_byte=5, idle=0.2)
    with Pipeline(case.library.providers[0](case.config(server, timeout=limits))) as pipeline:
        with pytest.raises(StreamInterrupted), pipeline.stream(Request(model=case.model, messages="a b")) as stream:
            list(stream)
        assert server.gone.wait(10)


def test_an_abandoned_async_stream_releases_its_connection(server: Canned, case: Case) -> None:
    """Leaving an asynchronous stream closes its connection."""
    server.stall_after = True

    async def run() -> None:
        async with AsyncPipeline(case.library.providers[1](case.config(server))) as pipeline:
            async with pipeline.stream(Request(model=case.model, messages="a b")) as stream:
                async for chunk in stream:
                    assert chunk.text == "You "
                    break
            assert await anyio.to_thread.run_sync(server.gone.wait, 10)

    anyio.run(run)


@all_modes
def test_connections_close_with_the_provider(server: Canned, case: Case, mode: str) -> None:
    """Closing the provider closes its connections, while the process and the library's own clients live on."""
    call(server, case, mode)
    assert server.none_open(10)


@pytest.mark.parametrize("streamed", [False, True])
def test_connections_close_with_the_event_loop(server: Canned, case: Case, streamed: bool) -> None:
    """An async provider serves several loops and keeps no connection of an ended loop, whether it was closed or not."""
    provider = case.library.providers[1](case.config(server))
    request = Request(model=case.model, messages="hello")

    async def run() -> None:
        pipeline = AsyncPipeline(provider)
        if streamed:
            async with pipeline.stream(request) as stream:
                assert "".join([chunk.text async for chunk in stream]) == "You said: hello"
        else:
            assert (await pipeline.complete(request)).text == "You said: hello"
        assert streamed or not server.none_open(0)

    for _ in range(2):
        anyio.run(run)
        assert server.none_open(10)


def test_closing_one_provider_leaves_the_streams_of_another(server: Canned, case: Case) -> None:
    """Closing a provider does not break another's streams, even if the library has a shared client for both."""
    request = Request(model=case.model, messages="a b c")

    async def run() -> None:
        closing, reading = (AsyncPipeline(case.library.providers[1](case.config(server))) for _ in range(2))
        async with reading, reading.stream(request) as stream:
            chunks = aiter(stream)
            texts = [(await anext(chunks)).text]
            await closing.complete(request)
            await closing.aclose()
            texts += [chunk.text async for chunk in chunks]
        assert "".join(texts) == "You said: a b c"

    anyio.run(run)


# llama.cpp's server, with a real model


@pytest.mark.model
@pytest.mark.parametrize("mode", REAL_MODES, ids=str)
def test_a_real_model(local_server: str, case: Case, mode: Mode) -> None:
    """A conversation with a system message works in every mode, through the library's OpenAI and Anthropic clients."""
    service = case.model.partition(case.library.prefix)[0]
    config = LLMConfig(
        framework=case.library.framework,
        model=f"{service}{case.library.prefix}smollm2",
        api_key=KEY,
        api_base=local_server + ("/v1" if service == "openai" else ""),
        max_tokens=12,
        temperature=0,
    )
    messages = [
        Message.system("Answer in one word."),
        Message.user("Say hello."),
        Message.assistant("Hello."),
        Message.user("Count to fifty."),
    ]
    response = ask_llm(config, mode, messages)
    assert response.text
    assert response.finish_reason in ("stop", "length")
    assert response.usage is not None
    # langchain-anthropic reads a stream's usage from the last event, where llama.cpp omits the prompt's tokens
    if not (mode.streaming and case.library is LANGCHAIN and service == "anthropic"):
        assert (response.usage.input_tokens or 0) > 10
    assert 0 < (response.usage.output_tokens or 0) <= 12
