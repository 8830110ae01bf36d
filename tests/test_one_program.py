"""The same program with different frameworks: the same prompt, tools and parameters give the same `Response`."""

from __future__ import annotations

import json
from typing import Any

import attrs
import pytest
from support.dialects import PNG, WEATHER, answering, ask, sse

from fluxibly import LLMConfig, Message
from fluxibly.errors import BadRequest
from fluxibly.testing.modes import MODES, Mode
from fluxibly.types import Image, Response, Usage


@attrs.frozen
class Service:
    """A framework's service: its tool call and its final answer, each whole and streamed."""

    framework: str
    model: str
    whole: tuple[Any, Any]
    streamed: tuple[bytes, bytes]
    proof: str = "s1g"
    """The part of the reasoning that has to be sent back."""
    refuses: frozenset[str] = frozenset()
    """The parameters, and forms of images, that the service cannot take."""


def _lines(*values: Any) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


ARGUMENTS = {"city": "Rome"}
DETAIL = {"type": "reasoning.text", "text": "Hm.", "signature": "s1g", "index": 0}


def _chat(**message: Any) -> Any:
    finish = "tool_calls" if "tool_calls" in message else "stop"
    usage = {"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 2}}
    return {"id": "i", "model": "m-1", "choices": [{"message": message, "finish_reason": finish}], "usage": usage}


def _chat_stream(whole: Any) -> bytes:
    (choice,) = whole["choices"]
    return sse(
        {**whole, "choices": [{"delta": choice["message"], "finish_reason": choice["finish_reason"]}]}, done=True
    )


def _openrouter() -> Service:
    function = {"name": "weather", "arguments": json.dumps(ARGUMENTS)}
    call = {"index": 0, "id": "c1", "type": "function", "function": function}
    whole = _chat(tool_calls=[call], reasoning_details=[DETAIL]), _chat(content="Sunny.")
    return Service("openrouter", "m", whole, (_chat_stream(whole[0]), _chat_stream(whole[1])))


def _openai_responses() -> Service:
    summary = [{"type": "summary_text", "text": "Hm."}]
    thought = {"type": "reasoning", "id": "r1", "summary": summary, "encrypted_content": "s1g"}
    call = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": json.dumps(ARGUMENTS)}
    said = {"type": "message", "content": [{"type": "output_text", "text": "Sunny."}]}
    usage = {"input_tokens": 9, "output_tokens": 4, "input_tokens_details": {"cached_tokens": 2}}
    answer = {"id": "i", "model": "m-1", "status": "completed", "usage": usage}
    whole = {**answer, "output": [thought, call]}, {**answer, "output": [said]}
    streamed = sse(
        *(
            {"type": "response.output_item.done", "output_index": n, "item": item}
            for n, item in enumerate((thought, call))
        ),
        {"type": "response.completed", "response": whole[0]},
    )
    second = sse({"type": "response.completed", "response": whole[1]})
    return Service("openai-responses", "gpt-5", whole, (streamed, second), refuses=frozenset({"stop", "seed"}))


def _anthropic() -> Service:
    thought = {"type": "thinking", "thinking": "Hm.", "signature": "s1g"}
    call = {"type": "tool_use", "id": "c1", "name": "weather", "input": ARGUMENTS}
    usage = {"input_tokens": 7, "cache_read_input_tokens": 2, "output_tokens": 4}

    def message(reason: str, *blocks: Any) -> Any:
        return {"id": "i", "model": "m-1", "content": blocks, "stop_reason": reason, "usage": usage}

    def stream(whole: Any) -> bytes:
        events: list[Any] = [{"type": "message_start", "message": {**whole, "content": []}}]
        for index, block in enumerate(whole["content"]):
            events.append({"type": "content_block_start", "index": index, "content_block": block})
            events.append({"type": "content_block_stop", "index": index})
        end = {"type": "message_delta", "delta": {"stop_reason": whole["stop_reason"]}, "usage": usage}
        return sse(*events, end, {"type": "message_stop"})

    whole = message("tool_use", thought, call), message("end_turn", {"type": "text", "text": "Sunny."})
    streams = stream(whole[0]), stream(whole[1])
    return Service("anthropic", "claude-sonnet-4-5", whole, streams, refuses=frozenset({"seed"}))


def _gemini() -> Service:
    def answer(*parts: Any) -> Any:
        usage = {"promptTokenCount": 9, "candidatesTokenCount": 4, "cachedContentTokenCount": 2}
        candidate = {"content": {"parts": parts}, "finishReason": "STOP"}
        return {"candidates": [candidate], "usageMetadata": usage, "modelVersion": "m-1", "responseId": "i"}

    call = {"functionCall": {"id": "c1", "name": "weather", "args": ARGUMENTS}, "thoughtSignature": "s1g"}
    whole = answer({"text": "Hm.", "thought": True}, call), answer({"text": "Sunny."})
    return Service("gemini", "gemini-3-pro", whole, (sse(whole[0]), sse(whole[1])))


def _ollama() -> Service:
    def answer(**message: Any) -> Any:
        end = {"done": True, "done_reason": "stop", "prompt_eval_count": 9, "eval_count": 4}
        return {"model": "m-1", "message": {"role": "assistant", "content": "", **message}, **end}

    call = {"id": "c1", "function": {"name": "weather", "arguments": ARGUMENTS}}
    whole = answer(thinking="Hm.", tool_calls=[call]), answer(content="Sunny.")
    streams = _lines(whole[0]), _lines(whole[1])
    return Service("ollama", "m", whole, streams, proof="Hm.", refuses=frozenset({"url", "tool_choice"}))


SERVICES = (_openrouter(), _openai_responses(), _anthropic(), _gemini(), _ollama())
services = pytest.mark.parametrize("service", SERVICES, ids=lambda service: service.framework)
PARAMETERS: dict[str, Any] = {
    "tools": [WEATHER],
    "tool_choice": "required",
    "response_format": {"type": "object", "properties": {"city": {"type": "string"}}},
    "stop": ["END"],
    "seed": 7,
    "reasoning_effort": "low",
    "temperature": 0.5,
    "max_tokens": 4_000,
    "extra": {"their_own": 1},
}
PROMPT = (
    Message.system("Be brief."),
    Message.user("Hi"),
    Message.assistant("Hello!"),
    Message.user(["Where is this, and how is the weather there?", PNG]),
)


@services
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_conversation_with_a_tool(service: Service, mode: Mode) -> None:
    """A question, a tool call, its result and the answer look the same to the program, whatever the dialect."""
    bodies = service.streamed if mode.streaming else tuple(json.dumps(each).encode() for each in service.whole)
    kind = "application/x-ndjson" if service.framework == "ollama" else "text/event-stream"
    parameters = {name: value for name, value in PARAMETERS.items() if name not in service.refuses}
    with answering(kind if mode.streaming else "application/json", *bodies) as (address, asked):
        config = LLMConfig(framework=service.framework, model=service.model, api_base=address, api_key="key-1")
        first = ask(config, mode, PROMPT, **parameters)
        (call,) = first.tool_calls
        turns = [*PROMPT, Message.assistant(first), Message.tool("sunny", call)]
        second = ask(config, mode, turns, max_tokens=4_000, tools=[WEATHER])
    _check_first(first, has_id=service.framework != "ollama")
    assert (second.text, second.finish_reason, second.tool_calls) == ("Sunny.", "stop", ())
    (_, question), (_, answered) = asked
    assert question["their_own"] == 1
    for word in ("Be brief.", "Hello!", "Where is this", "iVBORw==", "weather", "city"):
        assert word in json.dumps(question)
    for word in (service.proof, "sunny", "Rome", *(["c1"] if service.framework != "ollama" else [])):
        assert word in json.dumps(answered)


@services
def test_parameters_that_a_service_cannot_take(service: Service) -> None:
    """A parameter that the service cannot take raises BadRequest with its name, and is not sent; others are sent."""
    answer = json.dumps(service.whole[1]).encode()
    asks: dict[str, tuple[Any, dict[str, Any]]] = {name: ("Hi", {name: PARAMETERS[name]}) for name in PARAMETERS}
    asks["url"] = Message.user(["Where is this?", Image(url="https://x.test/a.png")]), {}
    with answering("application/json", answer) as (address, asked):
        config = LLMConfig(framework=service.framework, model=service.model, api_base=address, api_key="key-1")
        for name, (prompt, parameters) in asks.items():
            before = len(asked)
            if name in service.refuses:
                with pytest.raises(BadRequest, match=name):
                    ask(config, MODES[0], prompt, **parameters)
                assert len(asked) == before
            else:
                assert ask(config, MODES[0], prompt, **parameters).text == "Sunny."
                assert len(asked) == before + 1


def _check_first(response: Response, *, has_id: bool) -> None:
    (call,) = response.tool_calls
    assert (call.id, call.name, call.arguments, call.error) == ("c1", "weather", ARGUMENTS, None)
    assert json.loads(call.raw_arguments) == ARGUMENTS
    assert (response.text, response.reasoning, response.finish_reason) == ("", "Hm.", "tool_call")
    assert response.raw_finish_reason
    assert response.model == "m-1"
    assert response.id == ("i" if has_id else None)
    assert response.usage == Usage(input_tokens=9, output_tokens=4, **({"cached_tokens": 2} if has_id else {}))
