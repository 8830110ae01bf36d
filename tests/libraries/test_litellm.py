"""The framework `litellm`: the real LiteLLM against a local server."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest

if importlib.util.find_spec("litellm") is None:  # importing it here would fetch its price map from the network
    pytest.skip("needs LiteLLM", allow_module_level=True)

from support.canned_server import Canned
from support.libraries import LITELLM, LITELLM_WARNS, WEATHER

from fluxibly import LLMConfig, Message, Request, Response, errors
from fluxibly.aggregate import Aggregator
from fluxibly.providers.litellm import LiteLLMProvider
from fluxibly.types import Image, Opaque, Reasoning, Text, ToolCall

pytestmark = LITELLM_WARNS
config, call, failure = LITELLM.config, LITELLM.call, LITELLM.failure


@pytest.fixture(params=LITELLM.models)
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_answers_have_their_ids(server: Canned, model: str, mode: str) -> None:
    """An answer, streamed or not, has its id and the request id from the headers."""
    response = call(mode, config(server, model))
    assert response.id
    assert response.request_id == "req-1"


def test_tool_calls_and_their_results(server: Canned, model: str, mode: str) -> None:
    """The model's call is read, and the conversation continues with the tool's result."""
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
    """LiteLLM translates the parameters to Anthropic's format."""
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
    """LiteLLM passes on `n`."""
    call("sync", config(server, "openai/gpt-4o"), n=2)
    assert server.last.body["n"] == 2


def test_unsupported_parameters_are_errors(server: Canned) -> None:
    """LiteLLM refuses parameters that the service does not support, unless LiteLLM's own global switch is set."""
    error = failure("sync", config(server, "anthropic/claude-sonnet-4-5"), seed=3)
    assert isinstance(error, errors.BadRequest)
    assert "seed" in str(error)
    assert server.seen == []


@pytest.mark.parametrize("how", ["cut", "drop"])
def test_a_stream_without_its_end_is_an_error(server: Canned, model: str, stream_mode: str, how: str) -> None:
    """A stream without its end is an error: the finish reason that LiteLLM makes up is not accepted."""
    setattr(server, how, True)
    error = failure(stream_mode, config(server, model), messages="a b c d")
    assert isinstance(error, (errors.StreamProtocolError, errors.ConnectionFailed))


def test_an_error_in_a_stream_keeps_the_output_before_it(server: Canned, stream_mode: str) -> None:
    """The error in a stream is the cause of StreamInterrupted."""
    server.stream_error = {"error": {"type": "server_error", "message": "busy"}}
    error = failure(stream_mode, config(server, "openai/gpt-4o"), messages="a b c d")
    # LiteLLM reports a failed connection
    assert type(error) is errors.ServerError
    assert "busy" in str(error)


def test_a_model_that_litellm_does_not_know() -> None:
    """An unknown model is reported when the provider is created, with the expected format of the name."""
    with pytest.raises(errors.ConfigError, match="provider/model"):
        LiteLLMProvider(LLMConfig(framework="litellm", model="nobodys-model"))


# Parts of answers

BASE = {"id": "x", "created": 1, "model": "gemini-3"}
MESSAGE: dict[str, Any] = {
    "role": "assistant",
    "content": "Here",
    "reasoning_content": "hm",
    "images": [{"type": "image_url", "index": 0, "image_url": {"url": "data:image/png;base64,iVBORw=="}}],
    "tool_calls": [
        {
            "id": "call_1",
            "type": "function",
            "index": 0,
            "function": {"name": "look", "arguments": "{}"},
            "provider_specific_fields": {"thought_signature": "c2ln"},
        }
    ],
    "provider_specific_fields": {"thought_signatures": ["dGV4dA=="], "citations": [[{"title": "T"}]], "odd": 1},
    "annotations": [{"type": "url_citation", "url_citation": {"url": "https://e.org"}}],
}


class Stream:
    """What a reader needs to know of the stream."""

    received_finish_reason = "tool_calls"


def gemini(*, stream: bool) -> Response:
    """Return an answer of Gemini's as LiteLLM has it, whole or in pieces."""
    import litellm

    from fluxibly.providers.litellm._answers import StreamReader, response_of

    if not stream:
        choice = {"index": 0, "message": dict(MESSAGE), "finish_reason": "tool_calls"}
        return response_of(litellm.ModelResponse(**BASE, choices=[choice]), "gemini")
    reader, answer = StreamReader("gemini"), Aggregator()
    reader.opened(Stream())
    fields = {"citation": {"title": "T"}, "odd": 1}
    deltas: list[dict[str, Any]] = [
        {"reasoning_content": "h"},
        {"reasoning_content": "m"},
        {"content": "He"},
        {"content": "re"},
        {"images": MESSAGE["images"], "provider_specific_fields": {"thought_signatures": ["dGV4dA=="]}},
        {"annotations": MESSAGE["annotations"], "provider_specific_fields": fields},
        {"tool_calls": MESSAGE["tool_calls"]},
    ]
    ends = [None] * (len(deltas) - 1) + ["tool_calls"]
    for delta, end in zip(deltas, ends, strict=True):
        choice = {"index": 0, "delta": delta, "finish_reason": end}
        for chunk in reader.read(litellm.types.utils.ModelResponseStream(**BASE, choices=[choice])):
            answer.add(chunk)
    for chunk in reader.last():
        answer.add(chunk)
    return answer.response()


@pytest.mark.parametrize("stream", [False, True])
def test_what_a_service_sends_beside_goes_back(stream: bool) -> None:
    """Reasoning, a picture, signatures and the service's own fields arrive, and go back where LiteLLM has them."""
    from fluxibly.providers.litellm._answers import body_of

    response = gemini(stream=stream)
    thought, text, picture, call, own = response.parts
    assert (thought, text) == (Reasoning(text="hm", raw={"reasoning_content": "hm"}), Text("Here"))
    assert isinstance(picture, Image)
    assert (picture.data, picture.media_type) == (b"\x89PNG", "image/png")
    assert isinstance(call, ToolCall)
    assert (call.id, call.name, call.signature) == ("call_1", "look", "c2ln")
    assert own == Opaque("litellm-gemini", {"provider_specific_fields": {"thought_signatures": ["dGV4dA=="]}})
    assert response.details == {"citations": [{"title": "T"}], "odd": 1, "annotations": MESSAGE["annotations"]}
    request = Request(model="gemini/gemini-3", messages=[Message.user("hi"), response.message])
    sent = body_of(request, "gemini", stream=False)["messages"][1]
    assert (sent["content"], sent["reasoning_content"]) == ("Here", "hm")
    assert sent["images"] == MESSAGE["images"]
    assert sent["tool_calls"][0]["provider_specific_fields"] == {"thought_signature": "c2ln"}
    assert sent["provider_specific_fields"] == {"thought_signatures": ["dGV4dA=="]}
    other = body_of(request, "openai", stream=False)["messages"][1]
    assert "provider_specific_fields" not in {**other, **other["tool_calls"][0]}


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


def test_the_import_uses_no_network_and_does_not_change_the_environment(tmp_path: Any) -> None:
    """The import uses no network and does not change the environment or LiteLLM's globals."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LITELLM")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", IMPORT], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == "True False None None [] [] False"


def test_without_the_extra_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without LiteLLM the error names the package to install."""
    monkeypatch.setitem(sys.modules, "litellm", None)
    with pytest.raises(errors.ConfigError, match=r"pip install 'litellm\[mcp\]'"):
        LiteLLMProvider(LLMConfig(framework="litellm", model="openai/gpt-4o"))
