"""Gemini's dialect: all parts of an answer keep their order, whole and streamed, and go back as they came."""

from __future__ import annotations

import base64
import json
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given
from support.dialects import PNG, interrupted, recut, sse, streamed
from support.gemini import answer

from fluxibly.errors import StreamProtocolError
from fluxibly.providers.dialects.gemini import GeminiCodec
from fluxibly.testing.codec_check import chunks_of
from fluxibly.types import Audio, Document, Image, Message, Opaque, Reasoning, Request, Response, Text, ToolCall

CODEC = GeminiCodec()
SEARCH = {"toolCall": {"toolType": "GOOGLE_SEARCH_WEB", "id": "s1", "args": {"q": "tides"}}, "thoughtSignature": "t9"}
FOUND = {"toolResponse": {"toolType": "GOOGLE_SEARCH_WEB", "id": "s1", "response": {"hits": [1, 2]}}}
CODE = {"executableCode": {"language": "PYTHON", "code": "print(1)"}}
RESULT = {"codeExecutionResult": {"outcome": "OUTCOME_OK", "output": "1\n"}}
PICTURE = {"inlineData": {"mimeType": "image/png", "data": "iVBORw=="}}


def whole(*parts: dict[str, Any], **more: Any) -> Response:
    return CODEC.decode(json.dumps(answer(*parts, reason="STOP", **more)).encode())


def in_events(*parts: dict[str, Any]) -> bytes:
    """Return a stream with an event for each part."""
    return sse(*(answer(part) for part in parts), answer(reason="STOP"))


def sent_back(response: Response, model: str = "gemini-2.5-flash") -> list[dict[str, Any]]:
    """Return the parts that the dialect sends for an answer."""
    request = Request(model=model, messages=[Message.user("x"), Message.assistant(response), Message.user("y")])
    contents = json.loads(CODEC.encode(request, stream=False).body)["contents"]
    return contents[1]["parts"] if contents[1]["role"] == "model" else []


def contents_of(*messages: Message, model: str = "gemini-2.5-flash") -> list[dict[str, Any]]:
    return json.loads(CODEC.encode(Request(model=model, messages=messages), stream=False).body)["contents"]


def round_trip(*parts: dict[str, Any]) -> tuple[Any, ...]:
    """Check that the parts come in the same order in both modes, and go back as they came; return them."""
    response = whole(*parts)
    assert recut(CODEC, in_events(*parts)) == response
    assert sent_back(response) == list(parts)
    return response.parts


# The order of parts


def test_every_kind_of_part() -> None:
    """Each part keeps its place and its signature; what has no kind of its own is opaque."""
    parts = round_trip(
        {"text": "Hm.", "thought": True},
        {"text": "So.", "thought": True, "thoughtSignature": "t1"},
        SEARCH,
        FOUND,
        {"text": "Let me "},
        {"text": "look.", "thoughtSignature": "t2"},
        CODE,
        RESULT,
        PICTURE | {"thoughtSignature": "t3"},
        {"functionCall": {"name": "weather", "args": {"city": "Rome"}, "id": "a1"}, "thoughtSignature": "t4"},
        {"text": "Wait."},
        {"functionCall": {"name": "now", "args": {}}},
        {"text": "", "thoughtSignature": "t5"},
    )
    assert parts == (
        Reasoning(text="Hm.", raw={"text": "Hm.", "thought": True}),
        Reasoning(text="So.", signature="t1", raw={"text": "So.", "thought": True, "thoughtSignature": "t1"}),
        Opaque("gemini", SEARCH),
        Opaque("gemini", FOUND),
        Text("Let me "),
        Text("look.", raw={"thoughtSignature": "t2"}),
        Opaque("gemini", CODE),
        Opaque("gemini", RESULT),
        Image(data=b"\x89PNG", media_type="image/png", raw={"thoughtSignature": "t3"}),
        ToolCall("a1", "weather", {"city": "Rome"}, signature="t4"),
        Text("Wait."),
        ToolCall("call_1", "now", raw={"functionCall": {"id": None}}),
        Text("", raw={"thoughtSignature": "t5"}),
    )


def test_the_views_of_an_answer() -> None:
    """Text, reasoning, media and calls are also there by kind, and no text is there twice."""
    response = streamed(
        CODEC,
        in_events(
            {"text": "Hm.", "thought": True},
            {"text": "So.", "thought": True, "thoughtSignature": "t1"},
            {"text": "Here: "},
            PICTURE,
            {"text": "Nice?", "thoughtSignature": "t2"},
        ),
    )
    assert (response.text, response.reasoning) == ("Here: Nice?", "Hm.So.")
    assert [part.text for part in response.reasoning_parts] == ["Hm.", "So."]
    assert response.media == (Image(data=b"\x89PNG", media_type="image/png"),)


def test_pieces_are_joined() -> None:
    """The pieces of a text or of a thought are one part, but not across a signature or another part."""
    response = streamed(
        CODEC,
        sse(
            answer({"text": "Let ", "thought": True}),
            answer({"text": "me ", "thought": True}, {"text": "see.", "thought": True}),
            answer({"text": "", "thought": True, "thoughtSignature": "t1"}),
            answer({"text": "It "}),
            answer({"text": "is "}, {"text": "noon."}),
            answer({"text": " Or ", "thoughtSignature": "t2"}),
            answer({"text": "late"}),
            answer({"text": "r."}, CODE),
            answer({"text": "End."}, reason="STOP"),
        ),
    )
    assert sent_back(response) == [
        {"text": "Let me see.", "thought": True},
        {"text": "", "thought": True, "thoughtSignature": "t1"},
        {"text": "It is noon."},
        {"text": " Or ", "thoughtSignature": "t2"},
        {"text": "later."},
        CODE,
        {"text": "End."},
    ]


def test_thoughts_between_texts() -> None:
    """Each run of thoughts is complete when something else follows."""
    parts = round_trip({"text": "a", "thought": True}, {"text": "b"}, {"text": "c", "thought": True}, {"text": "d"})
    assert [part.text for part in parts] == ["a", "b", "c", "d"]
    assert [type(part) for part in parts] == [Reasoning, Text, Reasoning, Text]


def test_parts_without_content() -> None:
    """Empty parts, null fields and `thought: false` neither make parts nor part a text."""
    response = whole({}, {"text": ""}, {"text": "a", "thought": False}, {"text": "b", "thoughtSignature": None})
    assert response.parts == (Text("ab"),)
    assert response.order is None


def test_images_among_thoughts() -> None:
    """A draft of an image, which is marked as a thought, is reasoning: it is sent back, but is not the answer's image."""
    draft = PICTURE | {"thought": True}
    parts = round_trip({"text": "A sketch.", "thought": True}, draft, PICTURE | {"thoughtSignature": "t"})
    assert [type(part) for part in parts] == [Reasoning, Reasoning, Image]


def test_a_signature_without_text() -> None:
    """A part with nothing but a signature goes back."""
    assert sent_back(whole({"text": "a"}, {"thoughtSignature": "t"})) == [{"text": "a"}, {"thoughtSignature": "t"}]


def test_other_fields_beside_a_part() -> None:
    """Other fields of a part are in `raw`, and go back."""
    meta = {"partMetadata": {"source": "a.txt"}}
    parts = round_trip(
        {"text": "a"} | meta,
        {"text": "b", "thought": True} | meta,
        {"functionCall": {"name": "f", "args": {}, "id": "1"}} | meta,
        {"inlineData": {"mimeType": "application/pdf", "data": "JVBERg==", "displayName": "a.pdf"}} | meta,
    )
    assert parts[0] == Text("a", raw=meta)
    assert parts[2] == ToolCall("1", "f", raw=meta)
    assert parts[3].raw == {**meta, "inlineData": {"displayName": "a.pdf"}}


KINDS: list[st.SearchStrategy[dict[str, Any]]] = [
    st.builds(lambda text: {"text": text}, st.sampled_from(["a", "Hé ", "\n\nb"])),
    st.builds(lambda text: {"text": text, "thought": True}, st.sampled_from(["x", "Hm. "])),
    st.sampled_from(
        [SEARCH, FOUND, CODE, RESULT, PICTURE, {"fileData": {"mimeType": "video/mp4", "fileUri": "gs://b/v"}}]
    ),
    st.builds(lambda n, city: {"functionCall": {"name": f"f{n}", "args": {"c": city}}}, st.integers(0, 9), st.text()),
    st.builds(lambda n: {"functionCall": {"name": "f", "args": {}, "id": f"call_{n}"}}, st.integers(0, 9)),
]


@st.composite
def parts_of_answers(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Return parts in any order; some of them signed, and no two texts or thoughts that would be joined."""
    parts: list[dict[str, Any]] = []
    for _ in range(draw(st.integers(0, 8))):
        part = dict(draw(st.one_of(KINDS)))
        if draw(st.booleans()):
            part["thoughtSignature"] = draw(st.text("abc=/+", min_size=1, max_size=4))
            if "text" in part and draw(st.booleans()):
                part["text"] = draw(st.sampled_from(["", " "]))
        before = parts[-1] if parts else {}
        if part.keys() != before.keys() or "text" not in part or "thoughtSignature" in part:
            parts.append(part)
    return parts


@given(parts=parts_of_answers(), cuts=st.lists(st.integers(1, 3), max_size=8))
def test_any_order(parts: list[dict[str, Any]], cuts: list[int]) -> None:
    """Parts in any order are the same in both modes, however a stream spreads them over events, and go back as they came."""
    response = whole(*parts)
    events: list[list[dict[str, Any]]] = []
    rest = list(parts)
    for cut in (*cuts, len(rest)):
        events.append(rest[:cut])
        rest = rest[cut:]
    stream = sse(*(answer(*some) for some in events), answer(reason="STOP"))
    assert streamed(CODEC, stream) == response
    assert sent_back(response) == parts
    again = Response.from_dict(json.loads(json.dumps(response.to_dict())))
    assert sent_back(again) == parts


# Media


@pytest.mark.parametrize(
    ("media_type", "kind"),
    [
        ("image/webp", Image),
        ("audio/wav", Audio),
        ("Audio/L16;rate=24000", Audio),
        ("application/pdf", Document),
        ("video/mp4", Document),
    ],
)
def test_media_that_a_model_made(media_type: str, kind: type) -> None:
    """Media come as bytes or by URL; the media type decides the class."""
    data = {"inlineData": {"mimeType": media_type, "data": "AAEC"}}
    url = {"fileData": {"mimeType": media_type, "fileUri": "https://generativelanguage.googleapis.com/v1beta/files/a"}}
    parts = round_trip(data, url)
    assert parts == (
        kind(data=b"\0\1\2", media_type=media_type),
        kind(url="https://generativelanguage.googleapis.com/v1beta/files/a", media_type=media_type),
    )
    assert whole(data).has_output


def test_media_in_a_stream_is_output() -> None:
    """An image is a chunk's output, and comes between the texts around it."""
    body = sse(answer({"text": "a"}, PICTURE, {"text": "b"}), answer(reason="STOP"))
    chunks = list(chunks_of(CODEC, [body]))
    assert [(chunk.parts, chunk.text) for chunk in chunks] == [
        ((), "a"),
        ((Image(data=b"\x89PNG", media_type="image/png"),), "b"),
        ((), ""),
    ]
    assert chunks[1].has_output


def test_base64_in_the_other_alphabet() -> None:
    """Data in the alphabet of URLs is read too."""
    data = base64.urlsafe_b64encode(b"\xfb\xff\xfe").decode()
    assert whole({"inlineData": {"mimeType": "image/png", "data": data}}).media[0].data == b"\xfb\xff\xfe"


@pytest.mark.parametrize(
    "part",
    [
        {"inlineData": {"mimeType": "image/png", "data": "not base64"}},
        {"inlineData": {"data": "AAEC"}},
        {"inlineData": {"mimeType": "image/png"}},
        {"fileData": {"fileUri": "no url", "mimeType": "image/png"}},
        {"videoMetadata": {"fps": 1}},
        {"inlineData": [1]},
    ],
)
def test_unreadable_parts(part: dict[str, Any]) -> None:
    """A part that cannot be read is opaque, and goes back."""
    assert round_trip(part) == (Opaque("gemini", part),)


def test_media_in_messages() -> None:
    """Audio and documents are sent as bytes, data URLs, or by URL, as images are; Google's own URLs pass unchanged."""
    media = [
        Audio(data=b"\0\1\2", media_type="audio/wav"),
        Document(url="data:application/pdf;base64,JVBERg=="),
        Document(url="gs://bucket/report.pdf"),
        Document(url="https://generativelanguage.googleapis.com/v1beta/files/abc", media_type="video/mp4"),
        Document(url="https://www.youtube.com/watch?v=abc"),
    ]
    assert contents_of(Message.user(["What?", *media]))[0]["parts"][1:] == [
        {"inlineData": {"mimeType": "audio/wav", "data": "AAEC"}},
        {"inlineData": {"mimeType": "application/pdf", "data": "JVBERg=="}},
        {"fileData": {"fileUri": "gs://bucket/report.pdf", "mimeType": "application/pdf"}},
        {
            "fileData": {
                "fileUri": "https://generativelanguage.googleapis.com/v1beta/files/abc",
                "mimeType": "video/mp4",
            }
        },
        {"fileData": {"fileUri": "https://www.youtube.com/watch?v=abc"}},
    ]


# Ids and results of calls


def conversation(call: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the two turns after the model made this call: the call, and its result."""
    response = whole({"functionCall": {"name": "f", "args": {}} | call})
    (made,) = response.tool_calls
    return contents_of(Message.user("x"), Message.assistant(response), Message.tool("1", made.id, name="f"))[1:]


def test_ids_that_look_made_up() -> None:
    """An id that the service sent goes back, whatever it looks like; an id that was made up does not."""
    turns = conversation({"id": "call_0"})
    assert turns[0]["parts"][0]["functionCall"]["id"] == turns[1]["parts"][0]["functionResponse"]["id"] == "call_0"
    turns = conversation({})
    assert turns[0]["parts"] == [{"functionCall": {"name": "f", "args": {}}}]
    assert turns[1]["parts"] == [{"functionResponse": {"name": "f", "response": {"output": "1"}}}]


def test_ids_of_the_last_call() -> None:
    """Made-up ids repeat from turn to turn: a result belongs to the last call before it."""
    real, made_up = (whole({"functionCall": {"name": "f", "args": {}} | fields}) for fields in ({"id": "call_0"}, {}))
    turns = [Message.user("x")]
    for response in (real, made_up, real):
        turns += [Message.assistant(response), Message.tool("1", response.tool_calls[0])]
    results = [turn["parts"][0]["functionResponse"] for turn in contents_of(*turns)[2::2]]
    assert [result.get("id") for result in results] == ["call_0", None, "call_0"]


def test_ids_of_other_origin() -> None:
    """The ids of calls from elsewhere are sent, and so is a result's id without a call."""
    contents = contents_of(
        Message.user("x"),
        Message.assistant("", tool_calls=[ToolCall("call_7", "f")]),
        Message.tool("1", "call_7"),
        Message.tool("2", "call_8", name="g"),
    )
    assert contents[1]["parts"][0]["functionCall"]["id"] == "call_7"
    assert [part["functionResponse"]["id"] for part in contents[2]["parts"]] == ["call_7", "call_8"]


def test_results_of_tools_that_failed() -> None:
    """An error is said as an error, even if it is JSON."""
    call = ToolCall("a", "f")
    for text in ("No such city.", '{"code": 7}'):
        turns = [Message.user("x"), Message.assistant("", tool_calls=[call]), Message.tool(text, call, is_error=True)]
        assert contents_of(*turns)[2]["parts"] == [
            {"functionResponse": {"name": "f", "response": {"error": text}, "id": "a"}}
        ]


def test_results_with_media() -> None:
    """A result keeps its images, audio and documents."""
    call = ToolCall("a", "f")
    document = Document(url="gs://bucket/a.pdf")
    audio = Audio(data=b"\0\1\2", media_type="audio/wav")
    result = Message.tool(["See:", PNG, document, audio], call)
    response = contents_of(Message.user("x"), Message.assistant("", tool_calls=[call]), result)[2]["parts"][0]
    assert response["functionResponse"]["parts"] == [
        PICTURE,
        {"fileData": {"fileUri": "gs://bucket/a.pdf", "mimeType": "application/pdf"}},
        {"inlineData": {"mimeType": "audio/wav", "data": "AAEC"}},
    ]


def test_no_stand_in_beside_a_signature() -> None:
    """Google's stand-in signature is not added to an answer that has a signature anywhere."""
    parts = [SEARCH, FOUND, {"functionCall": {"name": "f", "args": {}, "id": "1"}}]
    assert sent_back(whole(*parts), model="gemini-3-pro-preview") == parts


# Conversations that move between services


def test_parts_of_other_dialects() -> None:
    """Opaque parts and raw fields of other dialects stay behind; white space alone is not sent."""
    message = Message.assistant(
        [
            Reasoning(text="a", raw={"type": "thinking", "thinking": "a", "signature": "s"}),
            Text("\n\n"),
            Opaque("anthropic", {"type": "server_tool_use"}),
            Text("Hi", raw={"type": "text", "citations": [1]}),
            ToolCall("toolu_1", "f", raw={"type": "tool_use", "caller": {}}),
        ]
    )
    assert contents_of(Message.user(["x", " "]), message) == [
        {"role": "user", "parts": [{"text": "x"}]},
        {"role": "model", "parts": [{"text": "Hi"}, {"functionCall": {"name": "f", "args": {}, "id": "toolu_1"}}]},
    ]


# Details


GROUNDING = {
    "webSearchQueries": ["tides"],
    "groundingChunks": [{"web": {"uri": "https://a.test"}}],
    "groundingSupports": [{"segment": {"endIndex": 3}, "groundingChunkIndices": [0]}],
}


def test_details_of_a_whole_answer() -> None:
    """What came beside the content is in `details`, under the service's own names."""
    candidate = {
        "content": {"parts": [{"text": "a"}]},
        "finishReason": "STOP",
        "index": 0,
        "safetyRatings": [{"category": "HARM", "probability": "LOW"}],
        "groundingMetadata": GROUNDING,
        "citationMetadata": {"citationSources": [{"uri": "https://b.test"}]},
        "urlContextMetadata": {"urlMetadata": [{"retrievedUrl": "https://c.test"}]},
        "avgLogprobs": 0.0,
        "logprobsResult": {"chosenCandidates": [{"token": "a", "logProbability": 0.0}]},
    }
    feedback = {"safetyRatings": [{"category": "HARM", "probability": "NEGLIGIBLE"}]}
    body = {"candidates": [candidate], "promptFeedback": feedback}
    details = {name: candidate[name] for name in candidate if name not in ("content", "finishReason", "index")}
    response = CODEC.decode(json.dumps(body).encode())
    assert response.details == {**details, "promptFeedback": feedback}
    assert streamed(CODEC, sse(body)).details == response.details


def test_details_of_a_stream() -> None:
    """Lists that the service repeats are there once, lists that it continues are joined, and the last ratings count."""

    def event(text: str, reason: str | None = None, **details: Any) -> dict[str, Any]:
        found = answer({"text": text}, reason=reason)
        found["candidates"][0] |= details
        return found

    def logprobs(*tokens: str) -> dict[str, Any]:
        return {"chosenCandidates": [{"token": token, "logProbability": -0.5} for token in tokens]}

    more = {**GROUNDING, "groundingChunks": [*GROUNDING["groundingChunks"], {"web": {"uri": "https://b.test"}}]}
    sources = [{"uri": f"https://{name}.test"} for name in "ab"]
    low, high = ([{"category": "HARM", "probability": said}] for said in ("LOW", "HIGH"))
    body = sse(
        event("a", safetyRatings=low, logprobsResult=logprobs("a"), citationMetadata={"citationSources": sources[:1]}),
        event("b", safetyRatings=high, logprobsResult=logprobs("b"), groundingMetadata={"webSearchQueries": ["tides"]}),
        event("b", groundingMetadata=GROUNDING, logprobsResult=logprobs("b")),
        event("c", "STOP", groundingMetadata=more, citationMetadata={"citationSources": sources[1:]}),
    )
    assert recut(CODEC, body).details == {
        "safetyRatings": high,
        "groundingMetadata": more,
        "citationMetadata": {"citationSources": sources},
        "logprobsResult": logprobs("a", "b", "b"),
    }


def test_details_of_alternatives() -> None:
    """Each candidate has its own parts and details."""
    first = answer({"text": "a"}, reason="STOP", index=0)["candidates"][0]
    second = answer({"text": "b"}, PICTURE, reason="STOP", index=1)["candidates"][0] | {"avgLogprobs": -1.5}
    body = {"candidates": [first, second]}
    response = CODEC.decode(json.dumps(body).encode())
    (other,) = response.alternatives
    assert (response.details, other.details) == ({}, {"avgLogprobs": -1.5})
    assert other.parts == (Text("b"), Image(data=b"\x89PNG", media_type="image/png"))
    assert streamed(CODEC, sse(body)) == response


# Calls whose arguments are streamed


def partial(path: str, value: Any, *, kind: str = "stringValue", more: bool = False) -> dict[str, Any]:
    return {"jsonPath": path, kind: value} | ({"willContinue": True} if more else {})


def piece(*arguments: dict[str, Any], more: bool = True, **fields: Any) -> dict[str, Any]:
    call = {"partialArgs": list(arguments)} if arguments else {}
    return {"functionCall": {**fields, **call, **({"willContinue": True} if more else {})}}


def test_streamed_arguments() -> None:
    """Pieces without a name belong to the call before; each says the path of its value, and texts are continued."""
    parts = [
        piece(name="book", id="a1"),
        piece(partial("$.city", "Zü", more=True)) | {"thoughtSignature": "t1"},
        piece(partial("$.city", "rich"), partial("$.nights", 2, kind="numberValue")),
        piece(partial("$.guests[0].name", "Ann"), partial("$.guests[0]['of age']", True, kind="boolValue")),
        piece(partial("$.guests[1].name", "Bob"), partial('$["note"]', "NULL_VALUE", kind="nullValue")),
        piece(more=False),
        piece(partial("$.zone", "CET"), more=False, name="now", id="a2") | {"thoughtSignature": "t2"},
        {"functionCall": {"name": "end", "args": {"x": 1}, "id": "a3"}},
    ]
    book = {
        "city": "Zürich",
        "nights": 2,
        "guests": [{"name": "Ann", "of age": True}, {"name": "Bob"}],
        "note": None,
    }
    response = whole(*parts)
    assert response.tool_calls == (
        ToolCall("a1", "book", book, signature="t1"),
        ToolCall("a2", "now", {"zone": "CET"}, signature="t2"),
        ToolCall("a3", "end", {"x": 1}),
    )
    assert recut(CODEC, in_events(*parts)) == response
    assert sent_back(response)[0] == {
        "functionCall": {"name": "book", "args": book, "id": "a1"},
        "thoughtSignature": "t1",
    }


def test_streamed_arguments_that_are_cut_off() -> None:
    """A call that was cut off has the arguments that came, and the stream fails."""
    partial_response, error = interrupted(CODEC, sse(answer(piece(partial("$.a", "x"), name="f", id="1"))))
    assert isinstance(error, StreamProtocolError)
    assert partial_response.tool_calls == (ToolCall("1", "f", {"a": "x"}),)


@pytest.mark.parametrize("path", ["", "$", "$.a[99999999999]", "$" + ".a" * 5000, None])
def test_odd_paths(path: Any) -> None:
    """Paths to nowhere, far beyond a list's end or very deep neither fail nor fill the memory."""
    (call,) = whole(piece(partial(path, "x"), more=False, name="f")).tool_calls
    assert len(call.raw_arguments) < 50


# Google's own client


def test_the_official_client_sends_the_same() -> None:
    """The `google-genai` package sends the parts of an answer back as this dialect does."""
    types = pytest.importorskip("google.genai.types")
    models = pytest.importorskip("google.genai.models")
    parts = [
        {"text": "Hm.", "thought": True},
        SEARCH | {"thoughtSignature": "dDk="},
        FOUND,
        {"text": "Look: "},
        {"text": "here.", "thoughtSignature": "dDI="},
        CODE,
        RESULT,
        PICTURE,
        {"functionCall": {"name": "f", "args": {"a": 1}, "id": "call_3"}, "thoughtSignature": "dDQ="},
        {"text": "", "thoughtSignature": "dDU="},
    ]
    content = types.Content.model_validate({"role": "model", "parts": parts})
    theirs = json.loads(json.dumps(models._Content_to_mldev(content.model_dump(exclude_none=True)), default=_plain))
    assert _in_camel_case(theirs)["parts"] == sent_back(whole(*parts))


def _plain(value: object) -> str:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(getattr(value, "value", value))


def _in_camel_case(value: Any) -> Any:
    if isinstance(value, dict):
        return {_camel(name): _in_camel_case(item) for name, item in value.items()}
    return [_in_camel_case(item) for item in value] if isinstance(value, list) else value


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)
