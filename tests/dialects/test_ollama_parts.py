"""Ollama's own dialect: thinking, images and log probabilities of an answer, whole and streamed, and the way back."""

from __future__ import annotations

import base64
import json
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given
from support.dialects import PNG, WEATHER, recut, streamed
from support.ollama import last, line, ndjson

from fluxibly.errors import BadRequest
from fluxibly.providers.dialects.ollama import OllamaCodec
from fluxibly.types import Audio, Document, Image, Message, Opaque, Reasoning, Request, Response, Text, ToolCall

CHAT = OllamaCodec()
GENERATE = OllamaCodec(endpoint="generate")
CALL = {"id": "a1", "function": {"index": 0, "name": "now", "arguments": {}}}
DRAWN = base64.b64encode(b"\x89PNG").decode()


def sent_back(response: Response, **fields: Any) -> dict[str, Any]:
    """Return the message that the dialect sends for an answer."""
    request = Request(model="qwen3", messages=[Message.user("x"), Message.assistant(response)], **fields)
    return json.loads(CHAT.encode(request, stream=False).body)["messages"][1]


def test_the_order_of_a_stream() -> None:
    """Text, thinking and calls stand in the order in which they came; each run of thinking is complete."""
    response = recut(
        CHAT,
        ndjson(
            line("", thinking="Hm"),
            line("", thinking="."),
            line("Wait. "),
            line("", thinking="So."),
            line("", tool_calls=[CALL]),
            line("Done."),
            last(),
        ),
    )
    assert response.parts == (
        Reasoning(text="Hm.", raw={"thinking": "Hm."}),
        Text("Wait. "),
        Reasoning(text="So.", raw={"thinking": "So."}),
        ToolCall("a1", "now"),
        Text("Done."),
    )
    assert sent_back(response) == {
        "role": "assistant",
        "content": "Wait. Done.",
        "thinking": "Hm.So.",
        "tool_calls": [CALL],
    }


INLINE = "\n<think>\nHm, ok.\n</think>\n\n"


@pytest.mark.parametrize("text", ["Let me look.", ""])
def test_reasoning_in_the_text(text: str) -> None:
    """Reasoning that a model wrote into its text goes back there, beside tool calls, as it was written."""
    whole = CHAT.decode(ndjson(last(content=INLINE + text, tool_calls=[CALL])))
    assert (whole.text, whole.reasoning) == (text, "Hm, ok.\n")
    assert whole.reasoning_parts == (Reasoning(text="Hm, ok.\n", raw={"content": INLINE}),)
    lines = [line(piece) for piece in (*INLINE, *text)]
    assert streamed(CHAT, ndjson(*lines, line("", tool_calls=[CALL]), last())) == whole
    assert sent_back(whole) == {"role": "assistant", "content": INLINE + text, "tool_calls": [CALL]}


def test_reasoning_in_the_text_of_an_answer_without_tools() -> None:
    """It goes back only in a conversation with tools; elsewhere models are not shown their earlier reasoning."""
    response = CHAT.decode(ndjson(last(content=INLINE + "Hi")))
    assert sent_back(response) == {"role": "assistant", "content": "Hi"}
    assert sent_back(response, tools=[WEATHER])["content"] == INLINE + "Hi"


def test_reasoning_that_a_call_interrupts() -> None:
    """No reasoning is there twice if a call comes before the closing tag, and all of it goes back."""
    response = streamed(CHAT, ndjson(line("<think>a"), line("", tool_calls=[CALL]), line("b</think>\n"), last()))
    assert response.reasoning == "".join(part.text for part in response.reasoning_parts) == "ab"
    assert sent_back(response)["content"] == "<think>ab</think>\n"


def test_text_that_looks_like_a_tag() -> None:
    """Text that may begin a tag is let go before a call, in its place."""
    response = streamed(CHAT, ndjson(line("<th"), line("", tool_calls=[CALL]), line("e end"), last()))
    assert response.parts == (Text("<th"), ToolCall("a1", "now"), Text("e end"))


def test_images_that_a_model_made() -> None:
    """Images are part of the answer, and go back; what is not base64 is left out."""
    whole = CHAT.decode(ndjson(last(content="Here.", images=[DRAWN, "?"])))
    assert whole.media == (Image(data=b"\x89PNG", media_type="image/png"),)
    assert streamed(CHAT, ndjson(line("", images=[DRAWN]), line("Here."), last())) == whole
    assert sent_back(whole) == {"role": "assistant", "content": "Here.", "images": [DRAWN]}
    assert CHAT.decode(ndjson(last(images=[DRAWN]))).has_output


@pytest.mark.parametrize(
    ("data", "media_type"),
    [(b"\xff\xd8\xff", "image/jpeg"), (b"GIF89a", "image/gif"), (b"RIFF....WEBP", "image/webp"), (b"?", "image/png")],
)
def test_media_types_of_images(data: bytes, media_type: str) -> None:
    """The service does not say the media type: the data do."""
    (image,) = CHAT.decode(ndjson(last(images=[base64.b64encode(data).decode()]))).media
    assert (image.data, image.media_type) == (data, media_type)


def test_an_image_from_generate() -> None:
    """`/api/generate` has a single image."""
    end = {"model": "m", "response": "", "image": DRAWN, "done": True, "done_reason": "stop"}
    progress = {"model": "m", "response": "", "completed": 1, "total": 4, "done": False}
    response = streamed(GENERATE, ndjson(progress, end))
    assert response.parts == (Image(data=b"\x89PNG", media_type="image/png"),)
    assert GENERATE.decode(ndjson(end)) == response


def test_log_probabilities() -> None:
    """Log probabilities are in `details`, those of a stream joined."""
    items = [{"token": token, "logprob": -0.5, "top_logprobs": []} for token in "aab"]
    whole = CHAT.decode(ndjson({**last(content="aab"), "logprobs": items}))
    assert whole.details == {"logprobs": items}
    lines = [{**line(item["token"]), "logprobs": [item]} for item in items]
    assert streamed(CHAT, ndjson(*lines, last())).details == whole.details
    lines = [{"model": "m", "response": item["token"], "done": False, "logprobs": [item]} for item in items]
    assert streamed(GENERATE, ndjson(*lines, {"response": "", "done": True})).details == whole.details


@pytest.mark.parametrize(
    ("part", "got"),
    [
        (Document(data=b"%PDF", media_type="application/pdf"), "a Document"),
        (Audio(data=b"RIFF", media_type="audio/wav"), "an Audio"),
    ],
)
@pytest.mark.parametrize("codec", [CHAT, GENERATE])
def test_media_that_the_service_does_not_take(codec: OllamaCodec, part: Document | Audio, got: str) -> None:
    """Audio and documents raise an error that names them."""
    with pytest.raises(BadRequest, match=f"expected only text and images for Ollama, got {got}"):
        codec.encode(Request(model="m", messages=[Message.user(["x", part, PNG])]), stream=False)


def test_parts_of_other_dialects() -> None:
    """Opaque parts and reasoning of other dialects stay behind."""
    parts = [
        Reasoning(text="a", raw={"type": "thinking", "thinking": "a"}),
        Reasoning(text="b"),
        Opaque("anthropic", {"type": "server_tool_use"}),
        Text("Hi", raw={"type": "text", "citations": []}),
    ]
    messages = [Message.user("x"), Message.assistant(parts), Message.tool("no", ToolCall("a", "f"), is_error=True)]
    body = json.loads(CHAT.encode(Request(model="m", messages=messages), stream=False).body)
    assert body["messages"][1:] == [
        {"role": "assistant", "content": "Hi"},
        {"role": "tool", "content": "no", "tool_name": "f", "tool_call_id": "a"},
    ]


def messages() -> st.SearchStrategy[dict[str, Any]]:
    """Return messages with any of the fields that an answer may have."""
    calls = st.builds(
        lambda name, city: {"function": {"name": name, "arguments": {"c": city}}}, st.sampled_from("fg"), st.text()
    )
    return st.fixed_dictionaries(
        {"content": st.sampled_from(["", "\n", "Hi ", "<think>a</think>\n\nHi", "<think>a"])},
        optional={
            "thinking": st.sampled_from(["Hm.", "So. "]),
            "images": st.just([DRAWN]),
            "tool_calls": st.lists(calls, min_size=1, max_size=3).map(
                lambda found: [
                    {"id": f"x{n}", "function": {"index": n, **call["function"]}} for n, call in enumerate(found)
                ]
            ),
        },
    )


@given(message=messages(), cut=st.integers(1, 20))
def test_any_message(message: dict[str, Any], cut: int) -> None:
    """A whole answer goes back as it came; so does a stream that has its fields in lines of their own."""
    whole = CHAT.decode(ndjson(last(**message)))
    expected = {"role": "assistant", **message}
    assert sent_back(whole, tools=[WEATHER]) == expected
    lines = [line("", thinking=piece) for piece in message.get("thinking", "")]
    lines += [line("", images=message["images"])] if "images" in message else []
    content = message["content"]
    lines += [line(content[at : at + cut]) for at in range(0, len(content), cut)]
    lines += [line("", tool_calls=[call]) for call in message.get("tool_calls", [])]
    response = streamed(CHAT, ndjson(*lines, last()))
    assert sent_back(response, tools=[WEATHER]) == expected
    assert (response.text, response.reasoning) == (whole.text, whole.reasoning)
    assert "".join(part.text for part in response.reasoning_parts) == response.reasoning
