"""The parts of an answer through LangChain and LiteLLM: all of them arrive in their order, and go back in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, strategies as st
from support.canned_server import Canned
from support.libraries import KEY, LANGCHAIN, MODES, WEATHER, ask, cases

from fluxibly import Message, Request, Response
from fluxibly.types import Audio, Document, Image, Opaque, Reasoning, Text, ToolCall

pytest.importorskip("langchain")
pytest.importorskip("langchain_openai")
pytest.importorskip("langchain_anthropic")

from langchain_anthropic import ChatAnthropic
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_openai import ChatOpenAI
from pydantic import Field

from fluxibly.aggregate import Aggregator
from fluxibly.providers.langchain import AsyncLangChainProvider, LangChainProvider
from fluxibly.providers.langchain._messages import response_of, to_langchain
from fluxibly.providers.langchain._stream import MessageReader

all_modes = pytest.mark.parametrize("mode", MODES)
CITATION = {
    "type": "web_search_result_location",
    "url": "https://e.org",
    "title": "T",
    "encrypted_index": "E",
    "cited_text": "sun",
}
RESULT = {
    "type": "web_search_tool_result",
    "tool_use_id": "srvtoolu_1",
    "content": [
        {
            "type": "web_search_result",
            "url": "https://e.org",
            "title": "T",
            "encrypted_content": "abc",
            "page_age": None,
        }
    ],
}
SEARCH = {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {"query": "weather Oslo"}}
THOUGHTS: list[dict[str, Any]] = [
    {"type": "thinking", "thinking": "First I search", "signature": "c2ln"},
    {"type": "thinking", "thinking": "Now I know", "signature": "c2ln2"},
    {"type": "redacted_thinking", "data": "xyz"},
]
CALLS: list[dict[str, Any]] = [
    {"type": "tool_use", "id": "toolu_a", "name": "weather", "input": {"city": "Oslo"}},
    {"type": "tool_use", "id": "toolu_b", "name": "weather", "input": {"city": "Rome"}},
]
BLOCKS: list[dict[str, Any]] = [
    THOUGHTS[0],
    {"type": "text", "text": "Let me look. "},
    SEARCH,
    RESULT,
    THOUGHTS[1],
    THOUGHTS[2],
    {"type": "text", "text": "It says", "citations": [CITATION]},
    {"type": "text", "text": " so."},
    CALLS[0],
    {"type": "text", "text": "And:"},
    CALLS[1],
]
"""An answer of Anthropic's with interleaved reasoning, a tool of the service's own, and tool calls."""


def next_turn(response: Response) -> list[Message]:
    """Return the conversation after a response, with a result of each tool call. The first tool failed."""
    results = [Message.tool("sunny", call, is_error=not number) for number, call in enumerate(response.tool_calls)]
    return [Message.user("weather?"), response.message, *results]


# Anthropic


@pytest.fixture(params=cases("claude"))
def claude(request: pytest.FixtureRequest) -> Any:
    return request.param


@all_modes
def test_an_answer_goes_back_to_anthropic_as_it_came(server: Canned, mode: str) -> None:
    """Through LangChain, all blocks arrive in their order in all modes, and are sent back in it."""
    settings = LANGCHAIN.config(server, "anthropic:claude-test")
    server.blocks = BLOCKS
    response = LANGCHAIN.call(mode, settings, tools=[WEATHER])
    dialect = "langchain-anthropic"
    assert response.parts == (
        Reasoning(text="First I search", signature="c2ln", raw=THOUGHTS[0]),
        Text("Let me look. "),
        Opaque(dialect, SEARCH),
        Opaque(dialect, RESULT),
        Reasoning(text="Now I know", signature="c2ln2", raw=THOUGHTS[1]),
        Reasoning(raw=THOUGHTS[2]),
        Text("It says", raw={dialect: {"citations": [CITATION]}}),
        Text(" so."),
        ToolCall("toolu_a", "weather", {"city": "Oslo"}),
        Text("And:"),
        ToolCall("toolu_b", "weather", {"city": "Rome"}),
    )
    assert response.text == "Let me look. It says so.And:"
    assert response.details["citations"] == [CITATION]
    LANGCHAIN.call("sync", settings, messages=next_turn(response), tools=[WEATHER])
    answer, results = server.last.body["messages"][1:]
    assert answer == {"role": "assistant", "content": BLOCKS}
    assert [result.get("is_error", False) for result in results["content"]] == [True, False]


@all_modes
def test_litellm_gets_all_that_it_needs_to_restore_an_answer(server: Canned, claude: Any, mode: str) -> None:
    """Every block goes back through both libraries. LiteLLM's own shape has no order of texts and tool calls."""
    server.blocks = BLOCKS
    response = claude.library.call(mode, claude.config(server), tools=[WEATHER])
    assert [part.raw for part in response.reasoning_parts] == THOUGHTS
    assert response.text == "Let me look. It says so.And:"
    cited = response.details["citations"]
    assert [{name: citation[name] for name in CITATION} for citation in cited] == [CITATION]
    claude.library.call("sync", claude.config(server), messages=next_turn(response), tools=[WEATHER])
    sent = server.last.body["messages"][1]["content"]
    kinds = [block for block in sent if block["type"] != "text"]
    assert kinds == [block for block in BLOCKS if block["type"] != "text"]
    assert "".join(block["text"] for block in sent if block["type"] == "text") == response.text


@pytest.mark.parametrize(
    "blocks", [[{"type": "text", "text": "  "}, CALLS[0]], [{"type": "text", "text": ""}, CALLS[0]]]
)
def test_texts_of_white_space_are_not_sent(server: Canned, claude: Any, blocks: list[dict[str, Any]]) -> None:
    """A text that says nothing, which Anthropic refuses, stays in the answer and does not go back."""
    server.blocks = blocks
    response = claude.library.call("sync", claude.config(server), tools=[WEATHER])
    claude.library.call("sync", claude.config(server), messages=next_turn(response), tools=[WEATHER])
    sent = server.last.body["messages"][1]["content"]
    assert [block for block in sent if block["type"] != "text" or block["text"].strip()] == [CALLS[0]]
    if claude.library is LANGCHAIN:
        assert sent == [CALLS[0]]


# OpenAI's Responses

ANNOTATION = {"type": "url_citation", "url": "https://e.org", "title": "T", "start_index": 0, "end_index": 3}
ITEMS: list[dict[str, Any]] = [
    {
        "type": "reasoning",
        "id": "rs_1",
        "summary": [{"type": "summary_text", "text": "I look it up"}],
        "encrypted_content": "ENC",
    },
    {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"type": "search", "query": "q"}},
    {
        "type": "message",
        "id": "msg_1",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": "It is sunny", "annotations": [ANNOTATION]}],
    },
    {
        "type": "function_call",
        "id": "fc_1",
        "call_id": "call_1",
        "name": "weather",
        "arguments": '{"city":  "Oslo"}',
        "status": "completed",
    },
    {"type": "reasoning", "id": "rs_2", "summary": [], "encrypted_content": "ENC2"},
    {"type": "image_generation_call", "id": "ig_1", "status": "completed", "result": "iVBORw=="},
    {
        "type": "message",
        "id": "msg_2",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": "Here it is", "annotations": []}],
    },
]


def responses(mode: str, server: Canned, form: str | None = None, **request: Any) -> Response:
    """Return an answer of OpenAI's Responses through LangChain. `form` is LangChain's form of the content."""

    def chat_model() -> ChatOpenAI:
        base = server.url + "/v1"
        return ChatOpenAI(
            model="gpt-5", api_key=KEY, base_url=base, use_responses_api=True, max_retries=0, output_version=form
        )

    asked = Request(**{"model": "gpt-5", "messages": "hi", "tools": [WEATHER], **request})
    found: Response = ask(
        mode,
        lambda: LangChainProvider.wrap(chat_model()),
        lambda: AsyncLangChainProvider.wrap(chat_model()),
        asked,
    )
    return found


@pytest.mark.parametrize("mode", ["sync", "sync stream", "trio", "trio stream"])  # LangChain cannot close async clients
def test_an_answer_goes_back_to_openais_responses_as_it_came(server: Canned, mode: str) -> None:
    """All items arrive in their order, with their ids and the picture, and are sent back in it."""
    server.items = ITEMS
    response = responses(mode, server)
    dialect = "langchain-openai"
    assert response.parts == (
        Reasoning(text="I look it up", raw={dialect: ITEMS[0]}),
        Opaque(dialect, ITEMS[1]),
        Text("It is sunny", raw={dialect: {"annotations": [ANNOTATION], "id": "msg_1"}}),
        ToolCall(
            "call_1",
            "weather",
            raw_arguments='{"city":  "Oslo"}',
            raw={dialect: {"type": "function_call", "id": "fc_1"}},
        ),
        Reasoning(raw={dialect: ITEMS[4]}),
        Image(
            data=b"\x89PNG",
            media_type="image/png",
            raw={dialect: {"type": "image_generation_call", "id": "ig_1", "status": "completed"}},
        ),
        Text("Here it is", raw={dialect: {"id": "msg_2"}}),
    )
    assert (response.finish_reason, response.details) == ("tool_call", {"annotations": [ANNOTATION]})
    responses("sync", server, messages=next_turn(response))
    sent = server.last.body["input"][1:-1]
    assert [(item["type"], item["id"]) for item in sent] == [(item["type"], item["id"]) for item in ITEMS]
    assert (sent[0], sent[1], sent[4]) == (ITEMS[0], ITEMS[1], ITEMS[4])
    assert sent[2]["content"] == ITEMS[2]["content"]
    assert sent[3] == {name: value for name, value in ITEMS[3].items() if name != "status"}


@pytest.mark.parametrize("mode", ["sync", "sync stream"])
def test_langchains_common_form_goes_back_too(server: Canned, mode: str) -> None:
    """A model that is set to LangChain's common form of content ("v1") gets its items back in their order."""
    server.items, server.blocks = ITEMS, BLOCKS
    response = responses(mode, server, form="v1")
    responses("sync", server, form="v1", messages=next_turn(response))
    sent = server.last.body["input"][1:-1]
    assert [item["type"] for item in sent] == [item["type"] for item in ITEMS]
    assert sent[2]["content"] == ITEMS[2]["content"]
    assert [item["encrypted_content"] for item in sent if item["type"] == "reasoning"] == ["ENC", "ENC2"]

    def claude() -> LangChainProvider:
        return LangChainProvider.wrap(
            ChatAnthropic(model_name="claude-test", api_key=KEY, base_url=server.url, output_version="v1")
        )

    response = ask(mode, claude, None, Request(model="m", messages="hi", tools=[WEATHER]))
    ask("sync", claude, None, Request(model="m", messages=next_turn(response), tools=[WEATHER]))
    assert server.last.body["messages"][1]["content"] == BLOCKS


def test_parts_of_an_integration_go_only_to_it(server: Canned) -> None:
    """Another integration gets the texts, the calls and the picture, without the fields and items of the first."""
    server.items = ITEMS
    response = responses("sync", server)
    LANGCHAIN.call("sync", LANGCHAIN.config(server, "anthropic:claude-test"), messages=next_turn(response))
    assert server.last.body["messages"][1]["content"] == [
        {"type": "text", "text": "It is sunny"},
        {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Oslo"}},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw=="}},
        {"type": "text", "text": "Here it is"},
    ]


# OpenAI's chat


def test_speech_of_openai(server: Canned) -> None:
    """Speech is a part of the answer. OpenAI gets its id back, and other services what was said."""
    server.message = {
        "content": None,
        "audio": {"id": "audio_1", "data": "UklGRg==", "transcript": "Hi!", "expires_at": 9},
    }
    settings = LANGCHAIN.config(server, "openai:gpt-4o")
    response = LANGCHAIN.call("sync", settings)
    (speech,) = response.media
    assert (speech.data, speech.transcript) == (b"RIFF", "Hi!")
    messages = [Message.user("hi"), response.message, Message.user("again")]
    LANGCHAIN.call("sync", settings, messages=messages)
    assert server.last.body["messages"][1]["audio"] == {"id": "audio_1"}
    LANGCHAIN.call("sync", LANGCHAIN.config(server, "anthropic:claude-test"), messages=messages)
    assert server.last.body["messages"][1]["content"] == "Hi!"


def test_audio_and_documents_reach_the_service(server: Canned) -> None:
    """Audio and files of a user's message are sent as the service has them, or are an error."""
    pdf = Document(data=b"%PDF", media_type="application/pdf", name="a.pdf")
    sound = Audio(data=b"RIFF", media_type="audio/wav")
    LANGCHAIN.call("sync", LANGCHAIN.config(server, "openai:gpt-4o"), messages=[Message.user(["see", pdf, sound])])
    assert server.last.body["messages"][0]["content"][1:] == [
        {"type": "file", "file": {"file_data": "data:application/pdf;base64,JVBERg==", "filename": "a.pdf"}},
        {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}},
    ]
    settings = LANGCHAIN.config(server, "anthropic:claude-test")
    LANGCHAIN.call("sync", settings, messages=[Message.user(["see", pdf])])
    assert server.last.body["messages"][0]["content"][1]["source"] == {
        "type": "base64",
        "media_type": "application/pdf",
        "data": "JVBERg==",
    }
    assert "audio" in str(LANGCHAIN.failure("sync", settings, messages=[Message.user(sound)]))


# Other integrations


class Recorded(BaseChatModel):
    """A chat model that plays messages back, and keeps what it was sent. A whole answer is one message."""

    messages: list[Any]
    sent: list[Any] = Field(default_factory=list)

    @property
    def _llm_type(self) -> str:
        return "recorded"

    def _generate(self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any) -> ChatResult:
        self.sent[:] = messages
        return ChatResult(generations=[ChatGeneration(message=self.messages[0])])

    def _stream(
        self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any
    ) -> Iterator[ChatGenerationChunk]:
        for message in self.messages:
            yield ChatGenerationChunk(message=message)


Recorded.__module__ = "langchain_google_genai.chat_models"
GEMINI = "langchain-google-genai"
SIGNATURES = "__gemini_function_call_thought_signatures__"
CODE = {"type": "executable_code", "executable_code": "1+1", "language": 1}
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw=="}}


def recorded(*messages: Any, stream: bool) -> tuple[Response, list[Any]]:
    """Return the response to recorded messages, and the messages of the next turn as the model gets them."""
    model = Recorded(messages=list(messages))
    mode = "sync stream" if stream else "sync"
    response = ask(mode, lambda: LangChainProvider.wrap(model), None, Request(model="m", messages="hi"))
    again = Recorded(messages=[AIMessage("done")])
    request = Request(model="m", messages=next_turn(response))
    ask("sync", lambda: LangChainProvider.wrap(again), None, request)
    return response, again.sent


def test_blocks_of_gemini_whole_and_streamed() -> None:
    """Code that Gemini ran, a picture, and the signature of a call arrive in their order, and go back."""
    call: Any = {"id": "c1", "name": "look", "args": {"a": 1}, "type": "tool_call"}
    piece: Any = {"id": "c1", "name": "look", "args": '{"a": 1}', "index": None, "type": "tool_call_chunk"}
    metadata = {"finish_reason": "STOP", "safety_ratings": [{"category": "X"}]}
    thought = {"type": "thinking", "thinking": "hm, well", "signature": "s1"}
    extra = {SIGNATURES: {"c1": "c2ln"}}
    whole = AIMessage(
        [thought, {"type": "text", "text": "See "}, CODE, PICTURE, "the end"],
        tool_calls=[call],
        additional_kwargs=extra,
        response_metadata=metadata,
    )
    chunks = [
        AIMessageChunk([{"type": "thinking", "thinking": "hm, "}], response_metadata={"safety_ratings": [1]}),
        AIMessageChunk([{"type": "thinking", "thinking": "well", "signature": "s1"}]),
        AIMessageChunk("Se"),
        AIMessageChunk("e "),
        AIMessageChunk([CODE, PICTURE]),
        AIMessageChunk(["the end"]),
        AIMessageChunk("", tool_call_chunks=[piece], additional_kwargs=extra, response_metadata=metadata),
    ]
    for stream, messages in ((False, [whole]), (True, chunks)):
        response, sent = recorded(*messages, stream=stream)
        assert response.parts == (
            Reasoning(text="hm, well", signature="s1", raw={GEMINI: thought}),
            Text("See "),
            Opaque(GEMINI, CODE),
            Image(data=b"\x89PNG", media_type="image/png", raw={GEMINI: {"type": "image_url"}}),
            Text("the end"),
            ToolCall("c1", "look", {"a": 1}, signature="c2ln"),
        )
        assert response.details == {"safety_ratings": [{"category": "X"}]}
        answer, result = sent[1:]
        assert answer.content == [*whole.content[:-1], {"type": "text", "text": "the end"}]
        assert answer.additional_kwargs == extra
        assert (answer.tool_calls[0]["args"], result.status) == ({"a": 1}, "error")


def test_reasoning_beside_the_content_goes_back() -> None:
    """Reasoning in `additional_kwargs` (DeepSeek, Ollama) is kept there in both modes."""
    whole = AIMessage("Hi", additional_kwargs={"reasoning_content": "hm well"})
    chunks = [
        AIMessageChunk("", additional_kwargs={"reasoning_content": "hm "}),
        AIMessageChunk("", additional_kwargs={"reasoning_content": "well"}),
        AIMessageChunk("Hi"),
    ]
    for stream, messages in ((False, [whole]), (True, chunks)):
        response, sent = recorded(*messages, stream=stream)
        assert (response.reasoning, response.text) == ("hm well", "Hi")
        assert (sent[1].content, sent[1].additional_kwargs) == ("Hi", {"reasoning_content": "hm well"})


def test_log_probabilities_add_up() -> None:
    """The log probabilities of a stream's tokens are all in the details."""
    chunks = [
        AIMessageChunk(token, response_metadata={"logprobs": {"content": [{"token": token}]}}) for token in ("a", "b")
    ]
    response, _ = recorded(*chunks, stream=True)
    assert response.details == {"logprobs": {"content": [{"token": "a"}, {"token": "b"}]}}


def test_standard_blocks_of_media() -> None:
    """LangChain's standard blocks for media are parts, by their bytes or their URL."""
    blocks: list[Any] = [
        {"type": "image", "base64": "iVBORw==", "mime_type": "image/webp"},
        {"type": "audio", "url": "https://e.org/a", "mime_type": "audio/mpeg"},
        {"type": "file", "base64": "JVBERg==", "mime_type": "application/pdf", "extras": {"filename": "a"}},
        {"type": "media", "data": "iVBORw==", "mime_type": "image/png"},
    ]
    response, sent = recorded(AIMessage(blocks), stream=False)
    picture, sound, pdf, other = response.media
    assert (picture.data, picture.media_type, type(other)) == (b"\x89PNG", "image/webp", Image)
    assert (type(sound), sound.url, sound.media_type) == (Audio, "https://e.org/a", "audio/mpeg")
    assert (type(pdf), pdf.data) == (Document, b"%PDF")
    assert sent[1].content == blocks


@pytest.mark.parametrize(
    "block",
    [
        {"type": "image", "base64": "not base64!", "mime_type": "image/png"},
        {"type": "image_url", "image_url": None},
        {"type": "image_url", "image_url": ["odd"]},
        {"type": "thinking", "thinking": None},
        {"type": "text"},
        {"type": 1},
        {},
    ],
)
def test_odd_blocks_are_kept(block: dict[str, Any]) -> None:
    """A block of an unexpected shape raises nothing, and goes back as it came."""
    whole, sent = recorded(AIMessage([block, {"type": "text", "text": "ok"}]), stream=False)
    streamed, _ = recorded(AIMessageChunk([block, {"type": "text", "text": "ok"}]), stream=True)
    assert whole.parts == streamed.parts
    assert sent[1].content == [block, {"type": "text", "text": "ok"}]


# Any order

words = st.lists(st.sampled_from(["a ", "bc", " d", "é"]), min_size=1, max_size=3)
kinds = st.sampled_from(["text", "cited", "thinking", "redacted", "call", "search", "result", "unknown"])


@given(st.lists(st.tuples(kinds, words), max_size=8))
def test_any_order_of_blocks_goes_back_as_it_came(drawn: list[tuple[str, list[str]]]) -> None:
    """Blocks in any order give the same parts whole and in pieces, and go back to the same integration unchanged."""
    blocks: list[dict[str, Any]] = []
    pieces: list[AIMessageChunk] = []
    for index, (kind, said) in enumerate(drawn):
        block, chunks = _block(kind, said, index)
        blocks.append(block)
        pieces += chunks
    calls: Any = [
        {"type": "tool_call", "id": block["id"], "name": block["name"], "args": block["input"]}
        for block in blocks
        if block["type"] == "tool_use"
    ]
    dialect = "langchain-anthropic"
    whole = response_of(AIMessage([dict(block) for block in blocks], tool_calls=calls), dialect)
    reader, joined = MessageReader(dialect), Aggregator()
    for message in pieces:
        for chunk in reader.read(message):
            joined.add(chunk)
    for chunk in reader.end():
        joined.add(chunk)
    streamed = joined.response()
    assert streamed.parts == whole.parts
    assert (streamed.text, streamed.tool_calls, streamed.details) == (whole.text, whole.tool_calls, whole.details)
    (sent,) = to_langchain((whole.message,), "anthropic", dialect)
    assert _without_bare_text(sent.content) == _without_bare_text(blocks)


def _block(kind: str, said: list[str], index: int) -> tuple[dict[str, Any], list[AIMessageChunk]]:
    """Return a block as langchain-anthropic has it, and the pieces in which it streams the block."""
    text = "".join(said)
    if kind in ("text", "cited", "thinking"):
        block: dict[str, Any] = {"type": "thinking", "thinking": text, "signature": text}
        end: dict[str, Any] = {"type": "thinking", "signature": text, "thinking": ""}
        if kind != "thinking":
            block, end = {"type": "text", "text": text}, {"type": "text", "text": ""}
        if kind == "cited":
            block["citations"] = end["citations"] = [{"cited_text": text}]
        name = block["type"]
        pieces = [{"type": name, name: piece, "index": index} for piece in said]
        return block, [AIMessageChunk([piece]) for piece in (*pieces, {**end, "index": index})]
    if kind in ("call", "search"):
        block = {"type": "server_tool_use", "id": f"id_{index}", "name": "look", "input": {"for": text}}
        delta: dict[str, Any] = {"type": "input_json_delta", "index": index}
        begun = [AIMessageChunk([{**block, "input": {}, "index": index}])]
        parts = ['{"for": ', f'"{text}"', "}"]
        if kind == "search":
            return block, begun + [AIMessageChunk([{**delta, "partial_json": part}]) for part in parts]
        block["type"] = "tool_use"
        chunk: dict[str, Any] = {"type": "tool_call_chunk", "index": index, "id": None, "name": None}
        first = {**chunk, "id": block["id"], "name": "look", "args": ""}
        return block, [
            AIMessageChunk([{**block, "input": {}, "index": index}], tool_call_chunks=[first]),
            *[
                AIMessageChunk([{**delta, "partial_json": part}], tool_call_chunks=[{**chunk, "args": part}])
                for part in parts
            ],
        ]
    block = {
        "redacted": {"type": "redacted_thinking", "data": text},
        "result": {"type": "web_search_tool_result", "tool_use_id": "x", "content": [{"index": 1, "said": said}]},
        "unknown": {"type": "hologram", "rays": text},
    }[kind]
    return block, [AIMessageChunk([{**block, "index": index}])]


def _without_bare_text(content: Any) -> list[Any]:
    """Return content as blocks, with a single text as a block as well."""
    return [{"type": "text", "text": content}] if isinstance(content, str) and content else list(content)
