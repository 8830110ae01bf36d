"""OpenAI's chat dialect: what goes back to a service is what came from it, whole and streamed."""

from __future__ import annotations

import base64
import json
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from support import dialects
from support.recordings import load

from fluxibly.errors import BadRequest
from fluxibly.providers.dialects.anthropic import AnthropicCodec
from fluxibly.providers.dialects.openai_chat import OpenAICodec
from fluxibly.providers.dialects.openai_request import Quirks
from fluxibly.providers.services import OWN_SERVER, SERVICES
from fluxibly.testing.codec_check import check_cuts
from fluxibly.types import (
    Audio,
    Document,
    Image,
    Message,
    Opaque,
    Reasoning,
    Request,
    Response,
    Text,
    Tool,
    ToolCall,
)

OWN = OpenAICodec(Quirks(**OWN_SERVER))
MISTRAL = OpenAICodec(Quirks(**SERVICES["mistral"].quirks))
GROQ = OpenAICodec(Quirks(**SERVICES["groq"].quirks))
OPENAI = OpenAICodec(Quirks(**SERVICES["openai"].quirks))
sse = partial(dialects.sse, done=True)
CLOCK = Tool("clock")
CALL = {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
PNG = base64.b64encode(b"\x89PNG").decode()


def whole(message: dict[str, Any], finish: str = "stop", **body: Any) -> Response:
    """Return the response of a whole answer."""
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish}
    return OWN.decode(json.dumps({"choices": [choice], **body}).encode())


def streamed(*deltas: dict[str, Any], finish: str = "stop") -> Response:
    """Return the response of a stream of deltas, which is the same however it is cut."""
    events = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    end = {"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]}
    outcome = check_cuts(OWN, sse(*events, end))
    assert outcome.failure is None
    return outcome.response


def returned(response: Response, codec: OpenAICodec = OWN, *, tools: tuple[Tool, ...] = (CLOCK,)) -> dict[str, Any]:
    """Return the message that goes back for a response."""
    request = Request(model="m", messages=[Message.user("Hi"), response.message, Message.user("And?")], tools=tools)
    body: dict[str, Any] = json.loads(codec.encode(request, stream=False).body)
    message: dict[str, Any] = body["messages"][1]
    return message


def both(message: dict[str, Any], finish: str = "stop") -> Response:
    """Return the response of a message, after checking that a stream of it in a single delta is the same."""
    response = whole(message, finish)
    again = streamed(message, finish=finish)
    assert again.parts == response.parts
    assert again == response
    assert again.details == response.details
    return response


# Reasoning


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_reasoning_goes_back_under_the_name_it_came_by(name: str) -> None:
    """A final answer without calls has its reasoning, too; a conversation without tools sends none."""
    response = both({name: "Hm.", "content": "Ten."})
    assert response.parts == (Reasoning(text="Hm.", raw={name: "Hm."}), Text("Ten."))
    assert returned(response) == {"role": "assistant", "content": "Ten.", name: "Hm."}
    assert returned(response, tools=()) == {"role": "assistant", "content": "Ten."}
    assert returned(response, GROQ) == {"role": "assistant", "content": "Ten."}


def test_reasoning_goes_back_once_a_tool_was_called() -> None:
    """Calls in any message make a conversation one with tools, though the request offers none any more."""
    response = whole({"reasoning_content": "Hm.", "content": "Ten."})
    call = ToolCall("c1", "clock")
    turns = [Message.assistant(tool_calls=[call]), Message.tool("10", call), response.message, Message.user("And?")]
    sent = json.loads(OWN.encode(Request(model="m", messages=turns), stream=False).body)
    assert sent["messages"][2]["reasoning_content"] == "Hm."


def test_reasoning_by_both_names_is_read_once() -> None:
    """The service's own name is the more telling one."""
    response = both({"reasoning": "Hm.", "reasoning_content": "Hm.", "content": "Ten."})
    assert response.reasoning_parts == (Reasoning(text="Hm.", raw={"reasoning_content": "Hm."}),)


@pytest.mark.parametrize(
    "framework", ["deepseek", "moonshot", "xai", "zai", "dashscope", "minimax", "llamacpp", "vllm", "lmstudio"]
)
def test_services_that_take_reasoning_back(framework: str) -> None:
    """These services get the `reasoning_content` that they sent."""
    codec = OpenAICodec(Quirks(**SERVICES[framework].quirks))
    response = whole({"reasoning_content": "Hm.", "tool_calls": [CALL]}, "tool_calls")
    assert returned(response, codec) == {
        "role": "assistant",
        "content": None,
        "reasoning_content": "Hm.",
        "tool_calls": [CALL],
    }


@pytest.mark.parametrize("framework", ["openai", "azure", "groq", "mistral", "cerebras", "perplexity", "github"])
def test_services_that_refuse_unknown_fields(framework: str) -> None:
    """Fields of other services stay behind when a conversation moves."""
    codec = OpenAICodec(Quirks(**SERVICES[framework].quirks))
    call = {**CALL, "id": "D681PevKs"}
    message = {
        "reasoning": "Hm.",
        "reasoning_details": [{"type": "reasoning.text", "text": "Hm.", "index": 0}],
        "content": "Ten.",
        "extra_content": {"google": {"thought_signature": "s"}},
        "tool_calls": [{**call, "extra_content": {"google": {"thought_signature": "t"}}}],
    }
    assert returned(whole(message), codec) == {"role": "assistant", "content": "Ten.", "tool_calls": [call]}


@pytest.mark.parametrize("framework", ["openai", "groq"])
def test_media_of_other_services_are_refused(framework: str) -> None:
    """A model's image goes back to no service that has no place for it, and is not left out without a word."""
    codec = OpenAICodec(Quirks(**SERVICES[framework].quirks))
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}
    answer = whole({"content": "See:", "images": [picture]})
    gemini = Message.assistant(["See:", Image(data=b"png", media_type="image/png", raw={"thoughtSignature": "s"})])
    for message in (answer.message, gemini):
        with pytest.raises(BadRequest, match="got an Image in an assistant's message; leave it out"):
            codec.encode(Request(model="m", messages=[Message.user("x"), message]), stream=False)


def test_interleaved_reasoning_keeps_its_place() -> None:
    """Reasoning between texts stands there in a stream, and goes back joined, in one field."""
    response = streamed({"reasoning": "A"}, {"content": "1"}, {"reasoning": "B"}, {"reasoning": "b"}, {"content": "2"})
    assert response.parts == (
        Reasoning(text="A", raw={"reasoning": "A"}),
        Text("1"),
        Reasoning(text="Bb", raw={"reasoning": "Bb"}),
        Text("2"),
    )
    assert returned(response) == {"role": "assistant", "content": "12", "reasoning": "ABb"}


@pytest.mark.parametrize("framework", ["minimax", "openrouter", "vllm"])
def test_services_that_take_blocks_of_reasoning_back(framework: str) -> None:
    """These services get the `reasoning_details` that they sent, which say all that the text beside them says."""
    codec = OpenAICodec(Quirks(**SERVICES[framework].quirks))
    blocks = [{"type": "reasoning.text", "id": "r1", "format": "f", "index": 0, "text": "Hm."}]
    response = both({"reasoning_content": "Hm.", "reasoning_details": blocks, "content": "Ten."})
    assert returned(response, codec) == {"role": "assistant", "content": "Ten.", "reasoning_details": blocks}


@pytest.mark.parametrize("framework", ["minimax", "sambanova", "dashscope", "groq"])
def test_reasoning_in_the_text_goes_back_there(framework: str) -> None:
    """A service gets a text with its reasoning as the model wrote it."""
    codec = OpenAICodec(Quirks(**SERVICES[framework].quirks))
    said = "<think>\nHm.\n</think>\n\nTen."
    assert returned(both({"content": said}), codec) == {"role": "assistant", "content": said}


# Fields of LiteLLM's proxy

SIGNED = {"type": "thinking", "thinking": "Hm, hm.", "signature": "c2ln"}
REDACTED = {"type": "redacted_thinking", "data": "RU5D"}


def piece(thinking: str, signature: str | None = None) -> dict[str, Any]:
    """Return a delta of the proxy's, which says each piece of the reasoning in several fields."""
    blocks = [{"type": "thinking", "thinking": thinking, "signature": signature}]
    return {
        "reasoning_content": thinking,
        "thinking_blocks": blocks,
        "provider_specific_fields": {"thinking_blocks": blocks, "reasoning_content": thinking},
    }


def test_thinking_blocks_of_litellms_proxy() -> None:
    """Anthropic's blocks come with the same text beside them, and go back to the proxy as they came."""
    blocks = [SIGNED, REDACTED, {**REDACTED, "data": "RU5E"}, {**SIGNED, "thinking": "So."}]
    response = whole({"reasoning_content": "Hm, hm.So.", "thinking_blocks": blocks, "content": "Ten."})
    again = streamed(
        *[{"role": "assistant", "content": ""}, piece("Hm, "), piece("hm."), piece("", "c2ln")],
        *[{"thinking_blocks": [{**block, "thinking": None}]} for block in blocks[1:3]],
        *[piece("So."), piece("", "c2ln"), {"content": "Ten."}],
    )
    assert again == response
    assert again.parts == response.parts
    assert response.parts == (
        Reasoning(text="Hm, hm.", signature="c2ln", raw=SIGNED),
        Reasoning(raw=blocks[1]),
        Reasoning(raw=blocks[2]),
        Reasoning(text="So.", signature="c2ln", raw=blocks[3]),
        Text("Ten."),
    )
    assert returned(response) == {"role": "assistant", "content": "Ten.", "thinking_blocks": blocks}
    assert returned(response, OPENAI) == returned(response, MISTRAL) == {"role": "assistant", "content": "Ten."}


def test_thinking_blocks_are_anthropics_own() -> None:
    """A conversation with the proxy goes on with Anthropic itself, and the other way round."""
    response = both({"thinking_blocks": [SIGNED, REDACTED], "content": "Ten."})
    body = json.loads(AnthropicCodec().encode(Request(model="m", messages=[response.message]), stream=False).body)
    blocks = body["messages"][-1]["content"]
    assert blocks == [SIGNED, REDACTED, {"type": "text", "text": "Ten."}]
    answer = {"type": "message", "role": "assistant", "content": blocks, "stop_reason": "end_turn"}
    native = AnthropicCodec().decode(json.dumps(answer).encode())
    assert returned(native)["thinking_blocks"] == [SIGNED, REDACTED]


def test_provider_specific_fields() -> None:
    """The pieces are merged, and go back only to a service that takes them."""
    fields = {"thought_signatures": ["s", "t"], "compaction": {"id": 1, "text": "x"}}
    response = whole({"content": "Ten.", "provider_specific_fields": {**fields, "refusal": None}})
    again = streamed(
        {"content": "Te", "provider_specific_fields": {"thought_signatures": ["s"], "compaction": {"id": 1}}},
        {"provider_specific_fields": {"thought_signatures": ["t"], "compaction": {"text": "x"}, "citations": None}},
        {"content": "n.", "provider_specific_fields": None},
    )
    assert again.parts == response.parts == (Text("Ten."), Opaque("openai-chat", {"provider_specific_fields": fields}))
    assert returned(response) == {"role": "assistant", "content": "Ten.", "provider_specific_fields": fields}
    assert returned(response, OPENAI) == returned(response, MISTRAL) == {"role": "assistant", "content": "Ten."}


@pytest.mark.parametrize("fields", [{}, {"refusal": None}, {"thinking_blocks": [SIGNED]}, "odd", [1]])
def test_provider_specific_fields_that_say_nothing_new(fields: object) -> None:
    """Fields that are null, or stand in the message as well, are no part of an answer."""
    assert both({"content": "Ten.", "provider_specific_fields": fields}).parts == (Text("Ten."),)


# Details of reasoning


def test_details_are_kept_apart_by_type_index_and_id() -> None:
    """Fragments are joined into blocks; another id begins another block, and a missing id continues one."""
    details = [
        {"type": "reasoning.summary", "summary": "Think", "id": "rs_1", "index": 0},
        {"type": "reasoning.summary", "summary": "ing", "id": None, "index": 0},
        {"type": "reasoning.summary", "summary": "More", "id": "rs_2", "index": 0},
        {"type": "reasoning.encrypted", "data": "xyz", "id": "rs_2", "index": 0},
    ]
    response = streamed(*({"reasoning_details": [detail]} for detail in details), {"content": "Ten."})
    blocks = [
        {"type": "reasoning.summary", "summary": "Thinking", "id": "rs_1", "index": 0},
        {"type": "reasoning.summary", "summary": "More", "id": "rs_2", "index": 0},
        {"type": "reasoning.encrypted", "data": "xyz", "id": "rs_2", "index": 0},
    ]
    assert response.parts == (
        Reasoning(text="Thinking", raw=blocks[0]),
        Reasoning(text="More", raw=blocks[1]),
        Reasoning(raw=blocks[2]),
        Text("Ten."),
    )
    for tools in ((), (CLOCK,)):
        assert returned(response, tools=tools)["reasoning_details"] == blocks


def test_a_whole_answers_details_go_back_unchanged() -> None:
    """Blocks of a whole answer are never joined, though they look like fragments."""
    details = [
        {"type": "reasoning.text", "text": "A", "index": 0, "format": "f", "signature": None},
        {"type": "reasoning.text", "text": "B", "index": 0, "format": "f", "signature": "s"},
        {"type": "reasoning.encrypted", "data": "x", "id": "c1"},
    ]
    response = whole({"reasoning": "AB", "reasoning_details": details, "content": None, "tool_calls": [CALL]})
    assert returned(response)["reasoning_details"] == details
    assert (response.reasoning, [part.signature for part in response.reasoning_parts]) == ("AB", [None, "s", None])
    assert response.order is None


def test_details_between_texts_and_a_late_signature() -> None:
    """A block that follows a text is another one; a signature that comes after the text is the block's."""
    detail = {"type": "reasoning.text", "index": 0}
    response = streamed(
        {"reasoning_details": [{**detail, "text": "A"}]},
        {"content": "1"},
        {"reasoning_details": [{**detail, "text": "", "signature": "s"}]},
        {"reasoning_details": [{**detail, "text": "B"}]},
        {"content": "2"},
    )
    assert response.parts == (
        Reasoning(text="A", signature="s", raw={**detail, "text": "A", "signature": "s"}),
        Text("1"),
        Reasoning(text="B", raw={**detail, "text": "B"}),
        Text("2"),
    )


def test_unsigned_details_between_texts() -> None:
    """A block that goes on after a text is another one, though nothing but the text says so."""
    detail = {"type": "reasoning.text", "index": 0}
    response = streamed(
        {"reasoning_details": [{**detail, "text": "A"}]},
        {"content": "1"},
        {"reasoning_details": [{**detail, "text": "B"}]},
        {"content": "2"},
    )
    blocks = [{**detail, "text": "A"}, {**detail, "text": "B"}]
    assert response.parts == (
        Reasoning(text="A", raw=blocks[0]),
        Text("1"),
        Reasoning(text="B", raw=blocks[1]),
        Text("2"),
    )
    assert returned(response)["reasoning_details"] == blocks


def test_reasoning_beside_details_that_cannot_be_read() -> None:
    """The readable text is a part of its own, and the encrypted block stands before the call that it belongs to."""
    detail = {"type": "reasoning.encrypted", "data": "x", "id": "c1"}
    response = both({"reasoning": "Hm.", "reasoning_details": [detail], "tool_calls": [CALL]}, "tool_calls")
    assert response.parts == (
        Reasoning(text="Hm.", raw={"reasoning": "Hm."}),
        Reasoning(raw=detail),
        ToolCall("c1", "clock"),
    )
    assert returned(response) == {
        "role": "assistant",
        "content": None,
        "reasoning": "Hm.",
        "reasoning_details": [detail],
        "tool_calls": [CALL],
    }


# Inline reasoning


@pytest.mark.parametrize("text", ["Ten.", ""])
def test_inline_reasoning_goes_back_as_it_was_written(text: str) -> None:
    """The content goes back with its tags and white space to every service, in a conversation with tools."""
    content = f"<think>\nHm.\n</think>\n\n{text}"
    response = both({"content": content})
    assert response.reasoning_parts == (Reasoning(text="Hm.\n", raw={"content": content.removesuffix(text)}),)
    assert response.text == text
    assert streamed(*({"content": each} for each in content)).parts == response.parts
    for codec in (OWN, GROQ, OPENAI):
        assert returned(response, codec)["content"] == content
    assert returned(response, tools=())["content"] == text


def test_inline_reasoning_without_text_and_before_calls() -> None:
    """Empty tags are kept, and so is reasoning that is not closed; both stand before the calls."""
    empty = "<think>\n\n</think>\n\n"
    for deltas in ([{"content": empty, "tool_calls": [CALL]}], [{"content": empty}, {"tool_calls": [CALL]}]):
        response = streamed(*deltas, finish="tool_calls")
        assert response.parts == (Reasoning(raw={"content": empty}), ToolCall("c1", "clock"))
        assert returned(response) == {"role": "assistant", "content": empty, "tool_calls": [CALL]}
    assert both({"content": "<think>cut"}).parts == (Reasoning(text="cut", raw={"content": "<think>cut"}),)


def test_white_space_before_calls_keeps_its_place() -> None:
    """Text that could have been the beginning of a tag stands before the call that follows it."""
    for deltas in ([{"content": "\n\n", "tool_calls": [CALL]}], [{"content": "\n\n"}, {"tool_calls": [CALL]}]):
        assert streamed(*deltas).parts == (Text("\n\n"), ToolCall("c1", "clock"))
    assert whole({"content": "\n\n", "tool_calls": [CALL]}).parts == (Text("\n\n"), ToolCall("c1", "clock"))


def test_recorded_inline_reasoning_goes_back() -> None:
    """An answer of vLLM without a reasoning parser goes back with all its content."""
    recording = load("25-")
    response = check_cuts(OWN, recording.body).response
    events = [line[6:] for line in recording.body.decode().splitlines() if line.startswith("data: {")]
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events]
    said = "".join(delta.get("content") or "" for delta in deltas)
    assert returned(response)["content"] == said


# Parts of a content


def test_thinking_parts_go_back_to_mistral_in_their_order() -> None:
    """A content's parts keep their order and go back as they came; others get the text alone."""
    content = [
        {"type": "thinking", "thinking": [{"type": "text", "text": "A"}], "closed": True},
        {"type": "text", "text": "1"},
        {"type": "reference", "reference_ids": [1, 2]},
        {"type": "thinking", "thinking": [{"type": "text", "text": "B"}, {"type": "reference", "reference_ids": [3]}]},
        {"type": "text", "text": "2"},
    ]
    response = both({"content": content})
    assert response.parts == (
        Reasoning(text="A", raw=content[0]),
        Text("1"),
        Opaque("openai-chat", content[2]),
        Reasoning(text="B", raw=content[3]),
        Text("2"),
    )
    assert returned(response, MISTRAL, tools=()) == {"role": "assistant", "content": content}
    assert returned(response, GROQ) == {"role": "assistant", "content": "12"}


def test_fragments_of_thinking_parts_are_joined() -> None:
    """A stream's fragments make one part; the service may send lists and strings in turn."""
    response = streamed(
        {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "A"}], "closed": True}]},
        {"content": [{"type": "thinking", "thinking": "b"}]},
        {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "c"}]}, {"type": "text", "text": "1"}]},
        {"content": "2"},
    )
    thinking = {"type": "thinking", "thinking": [{"type": "text", "text": "Abc"}], "closed": True}
    assert response.parts == (Reasoning(text="Abc", raw=thinking), Text("12"))
    assert returned(response, MISTRAL)["content"] == [thinking, {"type": "text", "text": "12"}]


def test_recorded_thinking_parts_go_back() -> None:
    """Mistral's stream goes back as a part of thinking and a part of text."""
    response = check_cuts(MISTRAL, load("21-").body).response
    thinking, text = returned(response, MISTRAL, tools=())["content"]
    assert thinking == {
        "type": "thinking",
        "thinking": [{"type": "text", "text": response.reasoning}],
        "closed": True,
    }
    assert text == {"type": "text", "text": response.text}


def test_empty_texts_are_no_parts() -> None:
    """Beside media, texts of white space alone are left out; a string is sent as it is."""
    image = Image(url="https://x/y.png")
    request = Request(model="m", messages=[Message.user(["", " \n", image]), Message.user(" ")])
    sent = json.loads(OWN.encode(request, stream=False).body)["messages"]
    assert sent[0]["content"] == [{"type": "image_url", "image_url": {"url": "https://x/y.png"}}]
    assert sent[1]["content"] == " "


def test_opaque_parts_of_other_dialects_stay_behind() -> None:
    """Only this dialect's own parts go back, and only to a service that takes them."""
    message = Message.assistant(["Hi", Opaque("anthropic", {"type": "x"}), Opaque("openai-chat", {"type": "y"})])
    for codec, content in ((MISTRAL, [{"type": "text", "text": "Hi"}, {"type": "y"}]), (OWN, "Hi")):
        request = Request(model="m", messages=[message, Message.user("Ho")])
        sent = json.loads(codec.encode(request, stream=False).body)
        assert sent["messages"][0] == {"role": "assistant", "content": content}


# Calls


def test_signatures_of_geminis_compatible_address() -> None:
    """`extra_content` goes back with the call, or on the message beside whose text it came."""
    extra = {"google": {"thought_signature": "c2ln"}}
    call = {**CALL, "extra_content": extra}
    response = both({"content": None, "tool_calls": [call]}, "tool_calls")
    assert response.tool_calls[0].raw == {"extra_content": extra}
    assert returned(response)["tool_calls"] == [call]
    text = both({"content": "Ten.", "extra_content": extra})
    assert text.parts == (Text("Ten.", raw={"extra_content": extra}),)
    late = streamed({"content": "Te"}, {"content": "n."}, {"content": "", "extra_content": extra})
    assert late.parts == text.parts
    assert returned(text) == {"role": "assistant", "content": "Ten.", "extra_content": extra}


def test_text_with_extra_content_before_a_call() -> None:
    """The fields belong to the text before the call."""
    extra = {"google": {"thought_signature": "c2ln"}}
    response = both({"content": "Ten.", "extra_content": extra, "tool_calls": [CALL]}, "tool_calls")
    assert response.parts == (Text("Ten.", raw={"extra_content": extra}), ToolCall("c1", "clock"))


def test_function_calls_in_the_old_form() -> None:
    """A `function_call` goes back as one, and its result as the function's."""
    function = {"name": "clock", "arguments": '{"zone": 1}'}
    response = both({"content": None, "function_call": function}, "function_call")
    fragments = [{"name": "clock", "arguments": ""}, {"arguments": '{"zone"'}, {"arguments": ": 1}"}]
    assert streamed(*({"function_call": each} for each in fragments), finish="function_call") == response
    (call,) = response.tool_calls
    assert (call.name, call.arguments, call.raw) == ("clock", {"zone": 1}, {"type": "function_call"})
    assert response.finish_reason == "tool_call"
    request = Request(model="m", messages=[Message.user("Hi"), response.message, Message.tool("10:30", call)])
    assert json.loads(OWN.encode(request, stream=False).body)["messages"][1:] == [
        {"role": "assistant", "content": None, "function_call": function},
        {"role": "function", "name": "clock", "content": "10:30"},
    ]


def test_a_result_belongs_to_the_last_call_with_its_id() -> None:
    """Ids that are made up repeat: a later call in the new form has its result in the new form."""
    old = ToolCall("call_0", "clock", raw={"type": "function_call"})
    new = ToolCall("call_0", "clock")
    turns = [Message.assistant(tool_calls=[old]), Message.tool("1", old)]
    turns += [Message.assistant(tool_calls=[new]), Message.tool("2", new)]
    sent = json.loads(OWN.encode(Request(model="m", messages=turns), stream=False).body)["messages"]
    assert [message["role"] for message in sent] == ["assistant", "function", "assistant", "tool"]


def test_custom_tools() -> None:
    """A custom tool takes text, in fragments too, and its call goes back as it came."""
    call = {"id": "c1", "type": "custom", "custom": {"name": "shell", "input": "ls -l\n"}}
    response = both({"content": None, "tool_calls": [call]}, "tool_calls")
    (found,) = response.tool_calls
    assert (found.name, found.raw_arguments, found.arguments, found.error) == ("shell", "ls -l\n", {}, None)
    assert returned(response)["tool_calls"] == [call]
    first = {"index": 0, "id": "c1", "type": "custom", "custom": {"name": "shell", "input": ""}}
    pieces = [first, {"index": 0, "custom": {"input": "ls "}}, {"index": 0, "custom": {"input": "-l\n"}}]
    assert streamed(*({"tool_calls": [each]} for each in pieces), finish="tool_calls").tool_calls == (found,)


def test_a_failed_tool() -> None:
    """The dialect has no field for an error: the content is all."""
    call = ToolCall("c1", "clock")
    turns = [Message.assistant(tool_calls=[call]), Message.tool("no clock", call, is_error=True)]
    sent = json.loads(OWN.encode(Request(model="m", messages=turns), stream=False).body)
    assert sent["messages"][1] == {"role": "tool", "content": "no clock", "tool_call_id": "c1"}


def test_a_refusal_goes_back_as_a_refusal() -> None:
    """A refusal is text here, and the service's own field there; a service that has no such field gets the text."""
    response = both({"content": None, "refusal": "No."})
    assert response.parts == (Text("No.", raw={"type": "refusal"}),)
    assert (response.text, response.finish_reason) == ("No.", "content_filter")
    assert streamed({"content": "", "refusal": "N"}, {"refusal": "o."}).parts == response.parts
    assert returned(response, OPENAI) == {"role": "assistant", "content": None, "refusal": "No."}
    assert returned(response, GROQ) == {"role": "assistant", "content": "No."}


def test_a_refusal_after_text() -> None:
    """Text before a refusal stays content."""
    response = streamed({"content": "Well. "}, {"refusal": "No"}, {"refusal": "."})
    assert response.parts == (Text("Well. "), Text("No.", raw={"type": "refusal"}))
    assert returned(response) == {"role": "assistant", "content": "Well. ", "refusal": "No."}


# Media


def test_images_that_a_model_made() -> None:
    """OpenRouter's images are parts with their bytes, and go back in their own field."""
    images = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}, "index": 0},
        {"type": "image_url", "image_url": {"url": "https://x/y.webp"}},
    ]
    response = both({"content": "A buoy.", "images": images})
    assert [(image.data, image.media_type, image.url) for image in response.media] == [
        (b"\x89PNG", "image/png", None),
        (None, None, "https://x/y.webp"),
    ]
    assert returned(response) == {"role": "assistant", "content": "A buoy.", "images": images}
    assert streamed({"images": images[:1]}).has_output


def test_images_that_are_none() -> None:
    """An entry without a URL is kept as it is, and one that is not base64 keeps its URL."""
    odd = {"type": "image_url", "image_url": {"url": "data:image/png;base64,a"}}
    response = both({"images": [{"type": "image_url"}, odd, None]})
    assert response.parts[0] == Opaque("openai-chat", {"type": "image_url"})
    (image,) = response.media
    assert image.url == "data:image/png;base64,a"


@pytest.mark.parametrize(
    ("data", "media_type"),
    [
        (b"RIFF\x04\0\0\0WAVEfmt ", "audio/wav"),
        (b"RIFF\x04\0\0\0AVI fmt ", "audio/pcm"),
        (b"ID3\x04", "audio/mpeg"),
        (b"\xff\xfb\x90\x64", "audio/mpeg"),
        (b"\xff\xff\xfe\xff", "audio/pcm"),
        (b"OggS\0", "audio/ogg"),
        (b"fLaC\0", "audio/flac"),
        (b"", "audio/pcm"),
    ],
)
def test_speech(data: bytes, media_type: str) -> None:
    """Audio has its bytes, its transcript and its id, by which it goes back."""
    audio = {"id": "audio_1", "data": base64.b64encode(data).decode(), "transcript": "Ten.", "expires_at": 7}
    response = both({"content": None, "audio": audio})
    raw = {"id": "audio_1", "expires_at": 7}
    assert response.parts == (Audio(data=data, media_type=media_type, transcript="Ten.", raw=raw),)
    assert returned(response, OPENAI) == {"role": "assistant", "content": None, "audio": {"id": "audio_1"}}
    assert returned(response, GROQ) == {"role": "assistant", "content": "Ten."}


@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize("each", [True, False])
def test_speech_in_pieces(size: int, each: bool) -> None:
    """The data comes as base64 in pieces, or as pieces of base64; the id and the transcript come apart."""
    data = b"RIFF\x04\0\0\0WAVEfmt \x01\x02"
    encoded = base64.b64encode(data).decode()
    pieces = [encoded[n : n + size] for n in range(0, len(encoded), size)]
    if each:
        pieces = [base64.b64encode(data[n : n + size]).decode() for n in range(0, len(data), size)]
    response = streamed(
        {"content": None, "audio": {"id": "audio_1", "transcript": "Te"}},
        *({"audio": {"data": piece}} for piece in pieces),
        {"audio": {"transcript": "n."}},
        {"audio": {"expires_at": 7}},
    )
    raw = {"id": "audio_1", "expires_at": 7}
    assert response.media == (Audio(data=data, media_type="audio/wav", transcript="Ten.", raw=raw),)


def test_speech_before_a_call() -> None:
    """Audio usually stands before the calls."""
    response = both({"audio": {"id": "a", "data": "AAAA"}, "tool_calls": [CALL]}, "tool_calls")
    assert response.parts == (Audio(data=b"\0\0\0", media_type="audio/pcm", raw={"id": "a"}), ToolCall("c1", "clock"))


@pytest.mark.parametrize(
    ("part", "sent"),
    [
        (
            Audio(data=b"RIFF", media_type="audio/wav"),
            {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}},
        ),
        (
            Audio(url="data:audio/mpeg;base64,SUQz"),
            {"type": "input_audio", "input_audio": {"data": "SUQz", "format": "mp3"}},
        ),
        (
            Document(data=b"%PDF", media_type="application/pdf", name="tides.pdf"),
            {"type": "file", "file": {"filename": "tides.pdf", "file_data": "data:application/pdf;base64,JVBERg=="}},
        ),
        (
            Document(data=b"%PDF", media_type="application/pdf"),
            {"type": "file", "file": {"filename": "document.pdf", "file_data": "data:application/pdf;base64,JVBERg=="}},
        ),
    ],
)
def test_audio_and_documents_of_a_user(part: Any, sent: dict[str, Any]) -> None:
    """Audio and documents go as their bytes, in OpenAI's parts."""
    body = json.loads(OWN.encode(Request(model="m", messages=Message.user(["Read:", part])), stream=False).body)
    assert body["messages"][0]["content"] == [{"type": "text", "text": "Read:"}, sent]


@pytest.mark.parametrize(
    ("part", "says"),
    [
        (Audio(url="https://x/y.wav"), "audio: expected the bytes of a WAV or an MP3 file, got a URL"),
        (
            Audio(data=b"OggS", media_type="audio/ogg"),
            "audio: expected the bytes of a WAV or an MP3 file, got 'audio/ogg'",
        ),
        (Document(url="https://x/y.pdf"), "a document: expected its bytes or a data URL, got another URL"),
    ],
)
def test_media_that_the_dialect_cannot_send(part: Any, says: str) -> None:
    """What the dialect has no form for is refused before it is sent."""
    with pytest.raises(BadRequest, match=says):
        OWN.encode(Request(model="m", messages=Message.user(part)), stream=False)


# Details


def test_details_of_whole_answers_and_streams() -> None:
    """Log probabilities are joined, and what services repeat in each event is there once."""
    notes = [{"type": "url_citation", "url_citation": {"url": "http://x/1"}}]
    tokens = [{"token": word, "logprob": -0.25} for word in ("Te", "n.")]
    safe = {"hate": {"filtered": False}, "custom_blocklists": {"details": [{"id": "b", "filtered": False}]}}
    body = {"citations": ["http://x/1"], "search_results": [{"url": "http://x/1"}], "prompt_filter_results": [safe]}
    choice: dict[str, Any] = {"index": 0, "content_filter_results": safe}
    answer = {
        "choices": [
            {
                **choice,
                "message": {"content": "Ten.", "annotations": notes},
                "logprobs": {"content": tokens, "refusal": None},
                "finish_reason": "stop",
            }
        ],
        **body,
    }
    events = [
        {
            "choices": [
                {
                    **choice,
                    "delta": {"content": token["token"], "annotations": notes},
                    "logprobs": {"content": [token], "refusal": None},
                }
            ],
            **body,
        }
        for token in tokens
    ]
    end = {"choices": [{**choice, "delta": {}, "logprobs": None, "finish_reason": "stop"}], **body}
    expected = {"annotations": notes, "logprobs": {"content": tokens}, "content_filter_results": safe, **body}
    assert OWN.decode(json.dumps(answer).encode()).details == expected
    assert check_cuts(OWN, sse(*events, end)).response.details == expected


def test_details_of_each_choice() -> None:
    """Log probabilities of an alternative are the alternative's own."""
    choices = [
        {"index": n, "delta": {"content": "a"}, "logprobs": {"content": [{"token": "a", "logprob": -n}]}}
        for n in range(2)
    ]
    ends = [{"index": n, "delta": {}, "finish_reason": "stop"} for n in range(2)]
    response = check_cuts(OWN, sse({"choices": choices}, {"choices": ends})).response
    assert response.details["logprobs"]["content"][0]["logprob"] == 0
    assert response.alternatives[0].details["logprobs"]["content"][0]["logprob"] == -1


def test_recorded_log_probabilities() -> None:
    """OpenAI's log probabilities add up to the text."""
    response = check_cuts(OWN, load("04-").body).response
    assert "".join(token["token"] for token in response.details["logprobs"]["content"]) == response.text


def test_recorded_filter_results() -> None:
    """Azure's results for the prompt come in an event without choices."""
    response = check_cuts(OWN, load("05-").body).response
    assert response.details["prompt_filter_results"][0]["prompt_index"] == 0


# Odd answers


def test_a_whole_answer_with_an_empty_delta_beside_the_message() -> None:
    """Perplexity sends both; the message is the answer."""
    body = {
        "choices": [{"index": 0, "message": {"content": "Ten."}, "delta": {"content": ""}, "finish_reason": "stop"}]
    }
    assert OWN.decode(json.dumps(body).encode()).text == "Ten."


def test_a_filtered_answer_without_a_message() -> None:
    """Azure leaves the message out; that is an answer, and no reason to ask again."""
    response = OWN.decode(json.dumps({"choices": [{"index": 0, "finish_reason": "content_filter"}]}).encode())
    assert (response.text, response.finish_reason) == ("", "content_filter")


# Any order of parts

texts = st.text("ab é\n", min_size=1, max_size=4).filter(lambda text: text.strip() != "")
text_part = st.builds(lambda text: {"type": "text", "text": text}, texts)
thinking_part = st.builds(lambda text: {"type": "thinking", "thinking": [{"type": "text", "text": text}]}, texts)
other_part = st.builds(lambda n: {"type": "reference", "reference_ids": [n]}, st.integers(0, 9))


def _no_neighbours(parts: list[dict[str, Any]]) -> bool:
    """Whether no two texts, or thoughts, stand side by side: a stream has no border between them."""
    return all(one["type"] != two["type"] or one["type"] == "reference" for one, two in pairwise(parts))


contents = st.lists(text_part | thinking_part | other_part, min_size=1, max_size=6).filter(_no_neighbours)
calls = st.lists(
    st.builds(
        lambda n, extra: {
            "id": f"call{n:05}",
            "type": "function",
            "function": {"name": "f", "arguments": '{"a": 1}'},
            **({"extra_content": {"google": {"thought_signature": extra}}} if extra else {}),
        },
        st.integers(0, 99999),
        st.text("xyz", max_size=2),
    ),
    max_size=3,
    unique_by=lambda call: call["id"],
)
EVERYTHING = OpenAICodec(Quirks(thinking_parts=True, **OWN_SERVER))


def _plain(content: list[dict[str, Any]]) -> object:
    return content[0]["text"] if [part["type"] for part in content] == ["text"] else content


@settings(deadline=None)
@given(contents, calls)
def test_any_order_of_parts_comes_back(content: list[dict[str, Any]], tool_calls: list[dict[str, Any]]) -> None:
    """A whole answer, and a stream of it part by part, give the same parts, and go back as they came."""
    message = {"content": content, **({"tool_calls": tool_calls} if tool_calls else {})}
    response = whole(message)
    assert returned(response, EVERYTHING) == {"role": "assistant", **message, "content": _plain(content)}
    deltas: list[dict[str, Any]] = [{"content": [piece]} for part in content for piece in _cut(part)]
    again = streamed_once(*deltas, *({"tool_calls": [call]} for call in tool_calls))
    assert again.parts == response.parts


def _cut(part: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a part in pieces of a character each, if it has text."""
    if part["type"] == "text":
        return [{"type": "text", "text": each} for each in part["text"]]
    if part["type"] == "thinking":
        return [
            {"type": "thinking", "thinking": [{"type": "text", "text": each}]} for each in part["thinking"][0]["text"]
        ]
    return [part]


def streamed_once(*deltas: dict[str, Any]) -> Response:
    events = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    return dialects.streamed(OWN, sse(*events, {"choices": [{"index": 0, "finish_reason": "stop"}]}))


fields = st.fixed_dictionaries(
    {},
    optional={
        "reasoning_content": texts,
        "reasoning_details": st.just([{"type": "reasoning.text", "text": "Hm", "index": 0, "signature": "s"}]),
        "images": st.just([{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}]),
        "content": st.sampled_from(["Ten.", "<think>\nHm\n</think>\n\nTen.", "\n\nTen."]),
        "extra_content": st.just({"google": {"thought_signature": "s"}}),
        "refusal": st.just("No."),
    },
)


@settings(deadline=None)
@given(fields, calls)
def test_any_fields_come_back(message: dict[str, Any], tool_calls: list[dict[str, Any]]) -> None:
    """Each field of a message goes back as it came; only reasoning that is there twice goes back once."""
    message |= {"tool_calls": tool_calls} if tool_calls else {}
    response = whole(message)
    sent = returned(response)
    expected = {key: value for key, value in message.items() if key != "reasoning_content"}
    if "reasoning_details" not in message and "reasoning_content" in message:
        expected["reasoning_content"] = message["reasoning_content"]
    empty = None if tool_calls or "refusal" in message else ""
    assert sent == {"role": "assistant", "content": empty, **expected}
    assert streamed_once(message).parts == response.parts
