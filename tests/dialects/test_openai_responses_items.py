"""What goes back to the Responses API: each item of an answer in its place, as it came, after a stream too."""

from __future__ import annotations

import json
from base64 import b64encode
from typing import Any

import pytest
from hypothesis import given, strategies as st
from support.dialects import recut, sse

from fluxibly import errors
from fluxibly.providers.dialects.codec import Event
from fluxibly.providers.dialects.openai_responses import DIALECT, ResponsesCodec
from fluxibly.testing.codec_check import outcome_of
from fluxibly.types import Audio, Document, Image, Message, Opaque, Reasoning, Request, Response, Text, ToolCall

CODEC = ResponsesCodec()


def text_part(text: str, **fields: object) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": [], **fields}


def message(*content: dict[str, Any], **fields: object) -> dict[str, Any]:
    return {"id": "msg_1", "type": "message", "status": "completed", "role": "assistant", "content": list(content),
            **fields}  # fmt: skip


SAID = message(text_part("Hello"))
THOUGHT = {"id": "rs_1", "type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}],
           "encrypted_content": "gAAA"}  # fmt: skip
CALL = {"id": "fc_1", "type": "function_call", "status": "completed", "call_id": "call_1", "name": "add",
        "arguments": '{"a": 1}'}  # fmt: skip
CUSTOM = {"id": "ctc_1", "type": "custom_tool_call", "status": "completed", "call_id": "call_2", "name": "patch",
          "input": "*** Begin"}  # fmt: skip
SEARCH = {
    "id": "ws_1",
    "type": "web_search_call",
    "status": "completed",
    "action": {"type": "search", "query": "tides"},
}
PICTURE = {"id": "ig_1", "type": "image_generation_call", "status": "completed", "output_format": "webp",
           "result": b64encode(b"picture").decode()}  # fmt: skip
NOTE = {"type": "url_citation", "url": "https://example.test", "title": "Tides", "start_index": 0, "end_index": 2}
LOGPROB = {"token": "Hi", "bytes": [72, 105], "logprob": -0.5, "top_logprobs": []}


def answer(*output: dict[str, Any], status: str = "completed") -> dict[str, Any]:
    return {"id": "resp_1", "object": "response", "status": status, "model": "gpt-5", "error": None,
            "output": list(output)}  # fmt: skip


def whole(*output: dict[str, Any]) -> Response:
    return CODEC.decode(json.dumps(answer(*output)).encode())


def pieces(text: str) -> list[str]:
    return [text[n : n + 2] for n in range(0, len(text), 2)]


def events_of_content(place: dict[str, Any], content: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the events of a message's content."""
    key = "refusal" if content["type"] == "refusal" else "text"
    kind = "refusal" if key == "refusal" else "output_text"
    empty: dict[str, Any] = {**content, key: ""}
    notes = content.get("annotations", [])
    return [
        {"type": "response.content_part.added", **place, "part": empty},
        *({"type": f"response.{kind}.delta", **place, "delta": piece, "logprobs": []} for piece in pieces(content[key])),
        *({"type": "response.output_text.annotation.added", **place, "annotation_index": n, "annotation": note}
          for n, note in enumerate(notes)),
        {"type": f"response.{kind}.done", **place, key: content[key]},
        {"type": "response.content_part.done", **place, "part": content},
    ]  # fmt: skip


def events_of_item(index: int, item: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the events of an item, as OpenAI sends them."""
    place: dict[str, Any] = {"output_index": index, "item_id": item.get("id")}
    begun = {**item, "status": "in_progress"} if "status" in item else dict(item)
    between: list[dict[str, Any]] = []
    match item["type"]:
        case "message":
            begun["content"] = []
            for number, content in enumerate(item["content"]):
                between += events_of_content({**place, "content_index": number}, content)
        case "reasoning":
            begun |= {"summary": [], "encrypted_content": None}
            for part in item["summary"]:
                between += [{"type": "response.reasoning_summary_text.delta", **place, "delta": piece}
                            for piece in pieces(part["text"])]  # fmt: skip
        case "function_call" | "custom_tool_call" as kind:
            key = "arguments" if kind == "function_call" else "input"
            begun[key] = ""
            name = "function_call_arguments" if kind == "function_call" else "custom_tool_call_input"
            between = [{"type": f"response.{name}.delta", **place, "delta": piece} for piece in pieces(item[key])]
            between += [{"type": f"response.{name}.done", **place, key: item[key]}]
        case "image_generation_call":
            begun["result"] = None
            between = [{"type": "response.image_generation_call.partial_image", **place, "partial_image_b64": "AAAA"}]
        case _:
            between = [{"type": f"response.{item['type']}.in_progress", **place}]
    return [
        {"type": "response.output_item.added", "output_index": index, "item": begun},
        *between,
        {"type": "response.output_item.done", "output_index": index, "item": item},
    ]


def events_of(*output: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the events of an answer, as OpenAI sends them."""
    items = [event for index, item in enumerate(output) for event in events_of_item(index, item)]
    return [
        {"type": "response.created", "response": answer(status="in_progress")},
        *items,
        {"type": "response.completed", "response": answer(*output)},
    ]


def streamed(*events: dict[str, Any]) -> Response:
    outcome = outcome_of(CODEC, [sse(*events)])
    assert outcome.failure is None, outcome
    return outcome.response


def sent(*messages: Message, **fields: Any) -> list[dict[str, Any]]:
    """Return the items of a conversation that is sent."""
    request = Request(model="gpt-5", messages=messages, **fields)
    items: list[dict[str, Any]] = json.loads(CODEC.encode(request, stream=False).body)["input"]
    return items


def same(one: Response, other: Response) -> None:
    """Check that two answers are the same, with the order of their parts and their details."""
    assert one == other
    assert one.parts == other.parts
    assert one.details == other.details


# Any items in any order

words = st.text(alphabet="ab é☃", min_size=1, max_size=7)
contents = st.one_of(
    st.builds(lambda text, notes: text_part(text, annotations=notes), words, st.lists(st.just(NOTE), max_size=2)),
    st.builds(lambda text: text_part(text, logprobs=[{**LOGPROB, "token": text}]), words),
    st.builds(lambda text: {"type": "refusal", "refusal": text}, words),
)
messages = st.builds(
    lambda content, fields: message(*content, **fields),
    st.lists(contents, max_size=3),
    st.sampled_from([{}, {"phase": "commentary"}, {"phase": "final_answer"}, {"phase": None}]),
)
thoughts = st.builds(
    lambda said, more: {
        **THOUGHT,
        "summary": [{"type": "summary_text", "text": text} for text in said],
        **more,
    },
    st.lists(words, max_size=2),
    st.sampled_from([{}, {"content": [{"type": "reasoning_text", "text": ""}]}]),
)
calls = st.builds(
    lambda arguments, more: {**CALL, "arguments": arguments, **more},
    st.sampled_from(['{"a": 1}', '{"b": "é"}', "broken"]),
    st.sampled_from([{}, {"namespace": "math"}, {"caller": {"type": "program", "caller_id": "prog_1"}}]),
)
customs = st.builds(lambda text: {**CUSTOM, "input": text}, st.just("") | words)
others = st.sampled_from(
    [
        SEARCH,
        {"id": "fs_1", "type": "file_search_call", "status": "completed", "queries": ["x"], "results": None},
        {"id": "ci_1", "type": "code_interpreter_call", "status": "completed", "code": "1", "container_id": "c"},
        {"id": "ts_1", "type": "tool_search_call", "execution": "server", "arguments": {"query": "x"}},
        {"id": "mcp_1", "type": "mcp_call", "server_label": "s", "name": "n", "arguments": "{}", "output": "1"},
        {"id": "lsh_1", "type": "local_shell_call", "status": "completed", "call_id": "c", "action": {"type": "exec"}},
        {"id": "ap_1", "type": "apply_patch_call", "status": "completed", "call_id": "c", "operation": {}},
        {"id": "cmp_1", "type": "compaction", "encrypted_content": "gBBB"},
        {"id": "ig_2", "type": "image_generation_call", "status": "failed", "result": None},
        {"type": "a_new_kind", "odd": [None]},
    ]
)
pictures = st.builds(
    lambda data, more: {**PICTURE, "result": b64encode(data).decode(), **more},
    st.binary(min_size=1, max_size=9),
    st.sampled_from([{}, {"output_format": "png", "revised_prompt": "A buoy."}]),
)
outputs = st.lists(
    st.one_of(messages, thoughts, calls, customs, others, pictures), min_size=1, max_size=6
).map(lambda items: [item if "call_id" not in item else {**item, "call_id": f"call_{n}"} for n, item in enumerate(items)])  # fmt: skip


@given(output=outputs)
def test_an_answer_goes_back_as_it_came(output: list[dict[str, Any]]) -> None:
    """Whole or streamed, all items go back unchanged and in their order."""
    response = whole(*output)
    same(streamed(*events_of(*output)), response)
    kept = Response.from_dict(json.loads(json.dumps(response.to_dict())))
    for each in (response, kept):
        assert sent(Message.user("Hi"), each.message)[1:] == output


def without_positions(event: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in event.items() if key not in ("output_index", "content_index")}


@given(output=outputs)
def test_streams_of_other_servers(output: list[dict[str, Any]]) -> None:
    """A stream may lack the output of the last event, the events of items, all but the last event, or all numbers."""
    response = whole(*output)
    events = events_of(*output)
    same(streamed(*events[:-1], {"type": "response.completed", "response": answer()}), response)
    same(streamed(*[event for event in events if event["type"] != "response.output_item.added"]), response)
    same(
        streamed(*[event for event in events if event["type"].startswith("response.output_item.")], events[-1]),
        response,
    )
    same(streamed(events[-1]), response)
    if all(len(item.get("content", [])) < 2 for item in output):
        same(streamed(*[event for event in events if "content_part" not in event["type"]]), response)
        same(streamed(*map(without_positions, events)), response)


# One thing at a time


def test_the_client_sends_the_same() -> None:
    """OpenAI's own client sends the same items back when an answer's output is appended to the input."""
    httpx, openai = pytest.importorskip("httpx"), pytest.importorskip("openai")
    output = [THOUGHT, message(text_part("Look", annotations=[NOTE]), phase="commentary"), SEARCH, CALL, CUSTOM, PICTURE,
              {"id": "x_1", "type": "a_new_kind", "odd": None}, SAID]  # fmt: skip
    asked: list[Any] = []

    def respond(request: Any) -> Any:
        asked.append(json.loads(request.content))
        return httpx.Response(200, json={**answer(*output), "created_at": 1, "tools": [], "tool_choice": "auto",
                                         "parallel_tool_calls": True})  # fmt: skip

    http_client = httpx.Client(transport=httpx.MockTransport(respond))
    with openai.OpenAI(api_key="k", http_client=http_client) as client:
        first = client.responses.create(model="gpt-5", input="Hi", store=False)
        client.responses.create(model="gpt-5", input=[{"role": "user", "content": "Hi"}, *first.output], store=False)
    assert sent(Message.user("Hi"), whole(*output).message) == asked[1]["input"]


def test_the_parts_of_an_answer() -> None:
    """Each item is a part of its kind, and the order of the items is kept."""
    response = whole(SAID, THOUGHT, SEARCH, PICTURE, CALL, CUSTOM)
    item = {"id": "msg_1", "type": "message", "status": "completed", "role": "assistant"}
    part = {"type": "output_text", "annotations": [], "logprobs": []}
    picture = {key: value for key, value in PICTURE.items() if key != "result"}
    assert response.parts == (
        Text("Hello", raw={"part": part, "item": item}),
        Reasoning(text="Hm.", signature="gAAA", raw=THOUGHT),
        Opaque(DIALECT, SEARCH),
        Image(data=b"picture", media_type="image/webp", raw=picture),
        ToolCall("call_1", "add", {"a": 1}, raw={"item": {"id": "fc_1", "status": "completed"}}),
        ToolCall(
            "call_2",
            "patch",
            raw_arguments="*** Begin",
            raw={"type": "custom", "item": {"id": "ctc_1", "status": "completed"}},
        ),
    )
    assert (response.text, response.finish_reason) == ("Hello", "tool_call")
    same(recut(CODEC, sse(*events_of(SAID, THOUGHT, SEARCH, PICTURE, CALL, CUSTOM))), response)


def test_a_plain_answer_keeps_its_id() -> None:
    """A plain answer streams as its pieces and one chunk for the rest, and its id and phase go back."""
    said = message(text_part("Hello"), phase="final_answer")
    decoder = CODEC.decoder()
    read = [Event(json.dumps(event).encode()) for event in events_of(said)]
    chunks = [chunk for event in read for chunk in decoder.decode_event(event)]
    assert [chunk.text for chunk in chunks] == ["He", "ll", "o", ""]
    assert [chunk.text_only for chunk in chunks] == [True, True, True, False]
    assert sent(Message.assistant(streamed(*events_of(said)))) == [said]


def test_a_call_that_ends_otherwise_than_it_began() -> None:
    """The fields of a finished tool call count, if they differ from those that it began with."""
    unfinished = {**CALL, "arguments": '{"a"', "status": "incomplete"}
    response = streamed(*events_of(unfinished))
    (call,) = response.tool_calls
    assert call.raw == {"item": {"id": "fc_1", "status": "incomplete"}}
    assert call.error is not None
    assert sent(Message.assistant(response)) == [unfinished]


def test_items_that_finish_at_the_end() -> None:
    """Llama.cpp numbers nothing, and finishes all items at the end; each keeps its place."""
    thought = {"id": "rs_1", "type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}],
               "encrypted_content": "", "status": "completed"}  # fmt: skip
    said = message({"type": "output_text", "text": "Hello", "annotations": []})
    first = {"type": "function_call", "status": "completed", "call_id": "fc_1", "name": "add", "arguments": "{}"}
    second = {**first, "call_id": "fc_2", "arguments": '{"a": 1}'}
    begun = [{**item, "status": "in_progress"} for item in (thought, said, first, second)]
    events = [
        {"type": "response.output_item.added", "item": {**begun[0], "content": []}},
        {"type": "response.reasoning_text.delta", "item_id": "rs_1", "delta": "Hm."},
        {"type": "response.output_item.added", "item": {**begun[1], "content": []}},
        {"type": "response.output_text.delta", "item_id": "msg_1", "delta": "Hel"},
        {"type": "response.output_text.delta", "item_id": "msg_1", "delta": "lo"},
        {"type": "response.output_item.added", "item": {**begun[2], "arguments": ""}},
        {"type": "response.function_call_arguments.delta", "item_id": "fc_1", "delta": "{}"},
        {"type": "response.output_item.added", "item": {**begun[3], "arguments": ""}},
        {"type": "response.function_call_arguments.delta", "item_id": "fc_2", "delta": '{"a": 1}'},
        *({"type": "response.output_item.done", "item": item} for item in (thought, said, first, second)),
        {"type": "response.completed", "response": answer(thought, said, first, second)},
    ]
    same(recut(CODEC, sse(*events)), whole(thought, said, first, second))


def test_wrong_numbers() -> None:
    """An event with a number that no item has belongs to the item of its kind under way."""
    events = events_of(SAID, CALL)
    moved = [event | ({"output_index": 7} if event["type"].endswith("delta") else {}) for event in events]
    same(streamed(*moved), whole(SAID, CALL))
    zero = [event | ({"output_index": 0} if "output_index" in event else {}) for event in events_of(CALL, SAID, CALL)]
    same(streamed(*zero), whole(CALL, SAID, CALL))


def test_a_stream_without_finished_items() -> None:
    """An item that no event finishes is complete at the end of the response, as far as it is known."""
    events = [event for event in events_of(SAID, CALL) if event["type"] != "response.output_item.done"]
    end = {"type": "response.completed", "response": answer()}
    same(streamed(*events[:-1], end), whole(SAID, CALL))
    said = message(text_part("Hello", annotations=[NOTE]))
    same(streamed(*events_of(said)[:-2], end), whole(said))
    empty = {"type": "response.output_item.done", "output_index": 0, "item": {**said, "content": []}}
    same(streamed(*events_of(said)[:-2], empty, end), whole(said))
    only_delta = {"type": "response.output_text.delta", "delta": "Hello"}
    response = streamed(only_delta, end)
    assert sent(Message.assistant(response)) == [
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Hello", "annotations": []}],
        }
    ]


def test_annotations_and_log_probabilities() -> None:
    """Annotations and log probabilities are in the details, once, and go back with their text."""
    said = message(text_part("Hi", annotations=[NOTE, NOTE], logprobs=[LOGPROB]), text_part("!", annotations=[NOTE]))
    response = recut(CODEC, sse(*events_of(said)))
    assert response.details == {"annotations": [NOTE, NOTE, NOTE], "logprobs": [LOGPROB]}
    same(response, whole(said))
    assert sent(Message.assistant(response)) == [said]


def test_log_probabilities_that_only_the_pieces_have() -> None:
    """Log probabilities of the pieces count if the finished item has none."""
    pieces = [{"token": "He", "logprob": -1.0}, {"token": "llo", "logprob": -2.0}]
    response = streamed(
        *({"type": "response.output_text.delta", "output_index": 0, "content_index": 0, "delta": each["token"],
           "logprobs": [each]} for each in pieces),
        {"type": "response.completed", "response": answer(SAID)},
    )  # fmt: skip
    assert (response.text, response.details) == ("Hello", {"logprobs": pieces})


def test_text_that_was_changed() -> None:
    """A text that a middleware changed goes out as a plain message, without the fields of the old text."""
    response = whole(SAID, CALL).evolve(text="[redacted]")
    assert sent(Message.assistant(response)) == [
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "[redacted]"}]},
        CALL,
    ]


def test_texts_of_other_origin() -> None:
    """Texts of other dialects are joined into plain messages; white space alone is left out."""
    citation = Text("cited", raw={"type": "text", "citations": [{}]})
    own = whole(SAID).parts[0]
    alone = Text("part", raw={"part": {"type": "output_text"}})  # its message is missing
    foreign = Opaque("anthropic", {"type": "server_tool_use"})
    mixed = Message.assistant([alone, "plain ", citation, own, "\n", ToolCall("c", "look"), " ", foreign, "end"])
    assert sent(mixed) == [
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "partplain cited"}]},
        SAID,
        {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "end"}]},
    ]


def test_white_space_that_came_as_a_message() -> None:
    """A message goes back even if it says nothing, because reasoning may require the item that follows it."""
    blank, empty = message(text_part("\n")), message(id="msg_2")
    response = whole(THOUGHT, blank, empty, CALL)
    assert sent(Message.assistant(response)) == [THOUGHT, blank, empty, CALL]


def test_content_parts_without_text() -> None:
    """A content part of an unknown kind is no text, and goes back with its message."""
    said = message(text_part("Hi"), {"type": "output_audio", "data": "AAAA", "transcript": "Hi"})
    response = whole(said)
    assert response.text == "Hi"
    assert sent(Message.assistant(response)) == [said]
    bare = {"type": "response.output_item.done", "output_index": 0, "item": said}
    same(streamed(bare, {"type": "response.completed", "response": answer()}), response)


def test_reasoning_goes_back_to_a_store() -> None:
    """Reasoning without encrypted content goes back if the caller asks the service to store responses."""
    bare = {"id": "rs_1", "type": "reasoning", "summary": []}
    response = whole(bare, SAID)
    assert sent(Message.assistant(response)) == [SAID]
    assert sent(Message.assistant(response), extra={"store": True}) == [bare, SAID]


def test_parts_of_other_dialects_are_left_out() -> None:
    """Opaque parts, reasoning and fields of other dialects do not go to this API."""
    foreign = [
        Reasoning(text="Hm", signature="s", raw={"type": "thinking", "thinking": "Hm", "signature": "s"}),
        Opaque("anthropic", SEARCH),
        ToolCall("c", "look", raw={"type": "tool_use", "caller": {"type": "direct"}}),
        ToolCall("d", "look", raw={"type": "function_call"}),
    ]
    plain = {"type": "function_call", "name": "look", "arguments": "{}"}
    assert sent(Message.assistant(foreign)) == [{**plain, "call_id": "c"}, {**plain, "call_id": "d"}]


def test_results_of_custom_tools() -> None:
    """The result of a custom tool's call has its own type; the last call with an id counts."""
    first = Message.assistant([ToolCall("x", "patch", raw_arguments="a", raw={"type": "custom"}), ToolCall("y", "add")])
    again = Message.assistant([ToolCall("x", "add")])
    items = sent(first, Message.tool("1", "x"), Message.tool("2", "y"), again, Message.tool("3", "x", is_error=True))
    assert items == [
        {"type": "custom_tool_call", "call_id": "x", "name": "patch", "input": "a"},
        {"type": "function_call", "call_id": "y", "name": "add", "arguments": "{}"},
        {"type": "custom_tool_call_output", "call_id": "x", "output": "1"},
        {"type": "function_call_output", "call_id": "y", "output": "2"},
        {"type": "function_call", "call_id": "x", "name": "add", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "x", "output": "3"},
    ]


def test_results_of_the_users_own_machine() -> None:
    """The output of a call that only this API has is an item of the user's own, as an opaque part."""
    output = {"type": "local_shell_call_output", "id": "lsh_1", "output": "a.txt"}
    assert sent(Message.assistant([Opaque(DIALECT, output)])) == [output]


def test_files_and_images_in_a_conversation() -> None:
    """Documents are files by their data or their URL; results of tools hold them, too. Blank texts are left out."""
    pdf = Document(data=b"%PDF", media_type="application/pdf", name="tides.pdf")
    unnamed = Document(url="data:application/pdf;base64,JVBERg==")
    far = Document(url="https://example.test/tides.pdf")
    image = Image(url="https://example.test/buoy.png", detail="low")
    data = "data:application/pdf;base64,JVBERg=="
    files = [
        {"type": "input_file", "filename": "tides.pdf", "file_data": data},
        {"type": "input_file", "filename": "document.pdf", "file_data": data},
        {"type": "input_file", "file_url": "https://example.test/tides.pdf"},
    ]
    picture = {"type": "input_image", "image_url": "https://example.test/buoy.png", "detail": "low"}
    assert sent(Message.user(["Read", " ", pdf, unnamed, far, image]), Message.tool([pdf, image], "c")) == [
        {"role": "user", "content": [{"type": "input_text", "text": "Read"}, *files, picture]},
        {"type": "function_call_output", "call_id": "c", "output": [files[0], picture]},
    ]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (Message.user(Audio(data=b"RIFF", media_type="audio/wav")), "expected text, images and documents for OpenAI's Responses API, got an Audio"),
        (Message.tool([Audio(data=b"RIFF", media_type="audio/wav")], "c"), "expected text, images and documents for OpenAI's Responses API, got an Audio"),
        (Message.assistant([Image(data=b"PNG", media_type="image/png")]), "expected text, tool calls and images that OpenAI's Responses API made, got an Image"),
        (Message.assistant([Image(url="https://example.test/a.png", raw={"type": "image_generation_call"})]), "got an Image"),
    ],
)  # fmt: skip
def test_media_that_this_api_does_not_take(given: Message, expected: str) -> None:
    """Media that the API does not take are refused before the request is sent."""
    with pytest.raises(errors.BadRequest, match=expected):
        sent(given)


def test_image_only_answers_count_as_output() -> None:
    """An image alone is an answer; previews of it are ignored."""
    response = streamed(*events_of(PICTURE))
    assert response.has_output
    assert [(image.data, image.media_type) for image in response.media] == [(b"picture", "image/webp")]
    plain = {key: value for key, value in PICTURE.items() if key != "output_format"}
    assert whole(plain).media[0].media_type == "image/png"


@pytest.mark.parametrize("result", ["", None, "not base64!", 3])
def test_an_image_that_cannot_be_read(result: object) -> None:
    """An image without usable data stays as it came."""
    item = {**PICTURE, "result": result}
    assert whole(item).parts == (Opaque(DIALECT, item),)
