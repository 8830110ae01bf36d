"""Bedrock's dialect: requests, compared with those of boto3, and checked by the service's model in botocore."""

from __future__ import annotations

import json
import re
from contextlib import closing
from typing import Any

import pytest
from hypothesis import given, strategies as st
from support import aws
from support.aws import whole
from support.clients import bedrock_client
from support.dialects import PNG, WEATHER, answering
from support.recordings import load

from fluxibly.errors import BadRequest
from fluxibly.providers.dialects.bedrock import BedrockCodec
from fluxibly.types import Audio, Document, Image, Message, Opaque, Reasoning, Request, Text, Tool, ToolCall

CODEC = BedrockCodec()
CLAUDE = "us.anthropic.claude-sonnet-4-20250514-v1:0"
EVENTS = "application/vnd.amazon.eventstream"


def body_of(*, streaming: bool = False, **fields: Any) -> dict[str, Any]:
    """Return the body of a request, after a check that it is valid by the service's own model."""
    pytest.importorskip("botocore")
    request = Request(**{"model": CLAUDE, "messages": "Hi", **fields})
    body = json.loads(CODEC.encode(request, stream=streaming).body)
    assert aws.problems(body, stream=streaming) == []
    return body


def blocks_of(*messages: Message, **fields: Any) -> list[dict[str, Any]]:
    """Return the blocks of the last turn."""
    return body_of(messages=messages, **fields)["messages"][-1]["content"]


# Requests


def test_plain_request() -> None:
    """A plain request has its path, and nothing that was not requested."""
    encoded = CODEC.encode(Request(model=CLAUDE, messages="Hi"), stream=False)
    assert encoded.path == "/model/us.anthropic.claude-sonnet-4-20250514-v1%3A0/converse"
    assert json.loads(encoded.body) == {"messages": [{"role": "user", "content": [{"text": "Hi"}]}]}


PARAMETERS: dict[str, Any] = {
    "temperature": 0.5,
    "max_tokens": 7,
    "top_p": 0.9,
    "top_k": 40,
    "stop": ["END", "."],
    "n": 1,
    "tools": [WEATHER, Tool("now", strict=True)],
    "tool_choice": "required",
    "response_format": {"type": "object"},
    "extra": {
        "guardrailConfig": {"guardrailIdentifier": "gr1", "guardrailVersion": "1", "trace": "enabled"},
        "toolConfig": {"tools": [{"systemTool": {"name": "nova_grounding"}}, {"cachePoint": {"type": "default"}}]},
        "additionalModelRequestFields": {"anthropic_beta": ["x"]},
        "additionalModelResponseFieldPaths": ["/stop_sequence"],
        "requestMetadata": {"team": "tides"},
        "serviceTier": {"type": "priority"},
        "performanceConfig": {"latency": "optimized"},
    },
}
SENT_PARAMETERS: dict[str, Any] = {
    **PARAMETERS["extra"],
    "inferenceConfig": {"temperature": 0.5, "maxTokens": 7, "topP": 0.9, "stopSequences": ["END", "."]},
    "additionalModelRequestFields": {"top_k": 40, "anthropic_beta": ["x"]},
    "toolConfig": {
        "tools": [
            {
                "toolSpec": {
                    "name": "weather",
                    "description": "The weather in a city.",
                    "inputSchema": {"json": dict(WEATHER.parameters)},
                }
            },
            {
                "toolSpec": {
                    "name": "now",
                    "inputSchema": {"json": {"type": "object", "properties": {}}},
                    "strict": True,
                }
            },
            *PARAMETERS["extra"]["toolConfig"]["tools"],
        ],
        "toolChoice": {"any": {}},
    },
    "outputConfig": {
        "textFormat": {"type": "json_schema", "structure": {"jsonSchema": {"schema": '{"type":"object"}'}}},
    },
}
CALLS = [ToolCall("tooluse_1", "weather", {"city": "Rome"}), ToolCall("tooluse_2", "now")]
SIGNED = {"reasoningContent": {"reasoningText": {"text": "Hm.", "signature": "s1g"}}}
USED = [
    {"toolUse": {"toolUseId": "tooluse_1", "name": "weather", "input": {"city": "Rome"}}},
    {"toolUse": {"toolUseId": "tooluse_2", "name": "now", "input": {}}},
]
CONVERSATIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "parameters": (PARAMETERS, {"messages": [{"role": "user", "content": [{"text": "Hi"}]}], **SENT_PARAMETERS}),
    "system": (
        {
            "messages": [
                Message.system("Be brief."),
                Message.user(["Hé", "llo"]),
                Message("system", [Text("Rhyme.", raw={"cachePoint": {"ttl": "1h"}}), Text("Really.")]),
            ]
        },
        {
            "system": [
                {"text": "Be brief."},
                {"text": "Rhyme."},
                {"cachePoint": {"type": "default", "ttl": "1h"}},
                {"text": "Really."},
            ],
            "messages": [{"role": "user", "content": [{"text": "Hé"}, {"text": "llo"}]}],
        },
    ),
    "media": (
        {
            "messages": [
                Message.user(
                    [
                        "See:",
                        PNG,
                        Image(url="data:image/webp;base64,R0lG"),
                        Image(url="s3://tides-bucket/a/b.JPG"),
                        Document(data=b"%PDF", media_type="application/pdf", name="The tides, 2026.pdf"),
                        Document(data=b"a,b", media_type="text/csv; charset=utf-8", name="tides.2026.csv"),
                        Document(url="s3://tides-bucket/notes.docx"),
                        Document(data=b"film", media_type="video/quicktime"),
                        Document(url="s3://tides-bucket/film.mkv"),
                        Audio(data=b"RIFF", media_type="audio/wav"),
                        Audio(url="s3://tides-bucket/sea", media_type="audio/mpeg"),
                    ]
                )
            ]
        },
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"text": "See:"},
                        {"image": {"format": "png", "source": {"bytes": b"\x89PNG"}}},
                        {"image": {"format": "webp", "source": {"bytes": b"GIF"}}},
                        {"image": {"format": "jpeg", "source": {"s3Location": {"uri": "s3://tides-bucket/a/b.JPG"}}}},
                        {"document": {"format": "pdf", "name": "The tides 2026", "source": {"bytes": b"%PDF"}}},
                        {"document": {"format": "csv", "name": "tides 2026", "source": {"bytes": b"a,b"}}},
                        {
                            "document": {
                                "format": "docx",
                                "name": "document",
                                "source": {"s3Location": {"uri": "s3://tides-bucket/notes.docx"}},
                            }
                        },
                        {"video": {"format": "mov", "source": {"bytes": b"film"}}},
                        {"video": {"format": "mkv", "source": {"s3Location": {"uri": "s3://tides-bucket/film.mkv"}}}},
                        {"audio": {"format": "wav", "source": {"bytes": b"RIFF"}}},
                        {"audio": {"format": "mp3", "source": {"s3Location": {"uri": "s3://tides-bucket/sea"}}}},
                    ],
                }
            ]
        },
    ),
    "tools": (
        {
            "messages": [
                Message.user("Weather?"),
                Message.assistant([Reasoning(text="Hm.", signature="s1g", raw=SIGNED), "Let me look.", *CALLS]),
                Message.tool(["sunny", PNG, Document(data=b"x", media_type="text/markdown", name="r.md")], CALLS[0]),
                Message.tool("no clock", CALLS[1], is_error=True),
                Message.user("And then?"),
            ],
            "tools": [WEATHER],
            "tool_choice": "weather",
        },
        {
            "messages": [
                {"role": "user", "content": [{"text": "Weather?"}]},
                {"role": "assistant", "content": [SIGNED, {"text": "Let me look."}, *USED]},
                {
                    "role": "user",
                    "content": [
                        {
                            "toolResult": {
                                "toolUseId": "tooluse_1",
                                "content": [
                                    {"text": "sunny"},
                                    {"image": {"format": "png", "source": {"bytes": b"\x89PNG"}}},
                                    {"document": {"format": "md", "name": "r", "source": {"bytes": b"x"}}},
                                ],
                            }
                        },
                        {
                            "toolResult": {
                                "toolUseId": "tooluse_2",
                                "content": [{"text": "no clock"}],
                                "status": "error",
                            }
                        },
                        {"text": "And then?"},
                    ],
                },
            ],
            "toolConfig": {
                "tools": SENT_PARAMETERS["toolConfig"]["tools"][:1],
                "toolChoice": {"tool": {"name": "weather"}},
            },
        },
    ),
    "guarded and cached": (
        {
            "messages": [
                Message.user(
                    [
                        Text("Long.", raw={"cachePoint": {}}),
                        Image(data=b"\x89PNG", media_type="image/png", raw={"cache_control": {"type": "ephemeral"}}),
                        Text("Is it?", raw={"guardContent": {"text": {"qualifiers": ["query"]}}, "cachePoint": {}}),
                        Text("", raw={"cache_control": {"type": "ephemeral", "ttl": "1h"}}),
                    ]
                ),
                Message.assistant([Text("So.", raw={"cachePoint": None, "cache_control": None}), CALLS[0]]),
                Message.tool(Text("sunny", raw={"cachePoint": {"type": "default"}}), CALLS[0]),
            ]
        },
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"text": "Long."},
                        {"cachePoint": {"type": "default"}},
                        {"image": {"format": "png", "source": {"bytes": b"\x89PNG"}}},
                        {"cachePoint": {"type": "default"}},
                        {"guardContent": {"text": {"text": "Is it?", "qualifiers": ["query"]}}},
                        {"cachePoint": {"type": "default"}},
                        {"cachePoint": {"type": "default", "ttl": "1h"}},
                    ],
                },
                {"role": "assistant", "content": [{"text": "So."}, USED[0]]},
                {
                    "role": "user",
                    "content": [
                        {"toolResult": {"toolUseId": "tooluse_1", "content": [{"text": "sunny"}]}},
                        {"cachePoint": {"type": "default"}},
                    ],
                },
            ]
        },
    ),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("ours", "theirs"), CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_boto3_sends_the_same(ours: dict[str, Any], theirs: dict[str, Any], streaming: bool) -> None:
    """The path and the body of a request are what boto3 sends for the same conversation."""
    encoded = CODEC.encode(Request(**{"model": CLAUDE, "messages": "Hi", **ours}), stream=streaming)
    kind, answer = (EVENTS, b"") if streaming else ("application/json", b"{}")
    with answering(kind, answer) as (address, asked), closing(bedrock_client(address)) as client:
        if streaming:
            list(client.converse_stream(modelId=CLAUDE, **theirs)["stream"])
        else:
            client.converse(modelId=CLAUDE, **theirs)
    assert (encoded.path, json.loads(encoded.body)) == asked[0]
    assert body_of(streaming=streaming, **ours) == asked[0][1]


@pytest.mark.parametrize(
    "model",
    [
        "amazon.nova-micro-v1:0",
        "arn:aws:bedrock:us-east-1:123456789012:application-inference-profile/a1b2",
        "arn:aws:sagemaker:us-east-1:123456789012:endpoint/tides-v1",
        "a b/c?d#e%2F~é",
    ],
)
def test_paths(model: str) -> None:
    """Colons, slashes and everything else in a model's name are quoted as boto3 quotes them."""
    with answering("application/json", b"{}") as (address, asked), closing(bedrock_client(address)) as client:
        client.converse(modelId=model, messages=[{"role": "user", "content": [{"text": "Hi"}]}])
    assert CODEC.encode(Request(model=model, messages="Hi"), stream=False).path == asked[0][0]


def test_a_model_with_half_a_character() -> None:
    """A model's name that is no valid text gives a path that the service refuses, rather than another exception."""
    assert CODEC.encode(Request(model="m\ud800", messages="Hi"), stream=True).path == "/model/m%3F/converse-stream"


@pytest.mark.parametrize(
    ("choice", "sent"), [("auto", {"auto": {}}), ("required", {"any": {}}), ("weather", {"tool": {"name": "weather"}})]
)
def test_tool_choice(choice: str, sent: dict[str, Any]) -> None:
    """A tool choice other than the keywords is a tool's name. It also applies to tools in `extra`."""
    assert body_of(tools=[WEATHER], tool_choice=choice)["toolConfig"]["toolChoice"] == sent
    extra = {"toolConfig": {"tools": [{"systemTool": {"name": "nova_grounding"}}]}}
    assert body_of(tool_choice=choice, extra=extra)["toolConfig"] == {**extra["toolConfig"], "toolChoice": sent}


def test_no_tools() -> None:
    """Without a choice "none" in the dialect, the tools are left out, unless the conversation has calls."""
    assert "toolConfig" not in body_of(tools=[WEATHER], tool_choice="none")
    assert "toolConfig" not in body_of()
    with pytest.raises(BadRequest, match="tool_choice: expected 'auto', 'required' or a tool's name"):
        body_of(messages=[*called("1"), Message.tool("x", "1")], tools=[WEATHER], tool_choice="none")


def called(*ids: str) -> list[Message]:
    return [Message.user("x"), Message.assistant([ToolCall(each, "now") for each in ids])]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"seed": 1}, "seed"),
        ({"frequency_penalty": 0.1}, "frequency_penalty"),
        ({"presence_penalty": 0.1}, "presence_penalty"),
        ({"n": 2}, "n;"),
        ({"response_format": "json"}, "response_format"),
        ({"reasoning_effort": "enormous"}, "reasoning_effort"),
        ({"reasoning_effort": "high", "max_tokens": 100}, "raise max_tokens"),
        ({"reasoning_effort": "none", "model": "qwen.qwen3-32b-v1:0"}, "reasoning_effort: expected an effort for qwen"),
        ({"top_k": 3, "model": "meta.llama4-scout-17b-instruct-v1:0"}, "additionalModelRequestFields"),
        ({"tool_choice": {"auto": {}}}, "tool_choice"),
    ],
)
def test_refused_parameters(fields: dict[str, Any], said: str) -> None:
    """An unsupported parameter raises an error that names it, rather than being dropped."""
    with pytest.raises(BadRequest, match=re.escape(said)) as caught:
        body_of(**fields)
    assert not caught.value.retryable


@pytest.mark.parametrize(
    ("model", "effort", "more", "output"),
    [
        (CLAUDE, "low", {"thinking": {"type": "enabled", "budget_tokens": 2048}}, None),
        (CLAUDE, "none", {"thinking": {"type": "disabled"}}, None),
        (
            "global.anthropic.claude-opus-4-6-v1",
            "xhigh",
            {"thinking": {"type": "adaptive", "display": "summarized"}},
            {"effort": "xhigh"},
        ),
        ("us.anthropic.claude-opus-5", "none", {"thinking": {"type": "disabled"}}, None),
        (
            "us.amazon.nova-2-lite-v1:0",
            "high",
            {"reasoningConfig": {"type": "enabled", "maxReasoningEffort": "high"}},
            None,
        ),
        ("us.amazon.nova-2-lite-v1:0", "none", {"reasoningConfig": {"type": "disabled"}}, None),
        ("openai.gpt-oss-120b-1:0", "low", {"reasoning_effort": "low"}, None),
        ("qwen.qwen3-32b-v1:0", "low", None, {"effort": "low"}),
        ("arn:aws:bedrock:us-east-1:1:application-inference-profile/a1", "low", None, {"effort": "low"}),
    ],
)
def test_reasoning_effort(model: str, effort: str, more: dict[str, Any] | None, output: dict[str, Any] | None) -> None:
    """Each family of models gets the effort under its own name."""
    body = body_of(model=model, reasoning_effort=effort)
    assert (body.get("additionalModelRequestFields"), body.get("outputConfig")) == (more, output)


def test_top_k() -> None:
    """Claude and Nova take it in a field of their own, beside the reasoning effort."""
    assert body_of(model=CLAUDE, top_k=3, reasoning_effort="low")["additionalModelRequestFields"] == {
        "top_k": 3,
        "thinking": {"type": "enabled", "budget_tokens": 2048},
    }
    body = body_of(model="us.amazon.nova-2-lite-v1:0", top_k=3, reasoning_effort="low")
    assert body["additionalModelRequestFields"] == {
        "inferenceConfig": {"topK": 3},
        "reasoningConfig": {"type": "enabled", "maxReasoningEffort": "low"},
    }


def test_structured_answers() -> None:
    """A JSON Schema is sent as text, with its name and its description, beside the reasoning effort."""
    schema = {"type": "object", "properties": {"é": {"type": "string"}}}
    table = {"type": "json_schema", "json_schema": {"name": "tide", "schema": schema, "description": "A tide."}}
    sent = body_of(response_format=table, model="anthropic.claude-opus-4-6-v1", reasoning_effort="low")["outputConfig"]
    assert sent["effort"] == "low"
    definition = sent["textFormat"]["structure"]["jsonSchema"]
    assert json.loads(definition.pop("schema")) == schema
    assert definition == {"name": "tide", "description": "A tide."}
    assert "outputConfig" not in body_of(response_format="text")


def test_extra_wins() -> None:
    """`extra` replaces values in the body; objects are merged, and null removes a field."""
    body = body_of(
        temperature=0.5,
        max_tokens=5,
        top_k=3,
        extra={"inferenceConfig": {"temperature": 1, "maxTokens": None}, "additionalModelRequestFields": {"top_k": 4}},
    )
    assert body["inferenceConfig"] == {"temperature": 1}
    assert body["additionalModelRequestFields"] == {"top_k": 4}


@pytest.mark.parametrize("number", ["40-", "41-", "45-"])
def test_recorded_requests_are_made_again(number: str) -> None:
    """The codec encodes a recorded call as the recorded client did."""
    sent = load(number).request
    config = sent.get("inferenceConfig", {})
    tools = [tool["toolSpec"] for tool in sent.get("toolConfig", {}).get("tools", ())]
    assert sent == body_of(
        messages=sent["messages"][0]["content"][0]["text"],
        tools=[Tool(tool["name"], tool["description"], tool["inputSchema"]["json"]) for tool in tools],
        temperature=config.get("temperature"),
        max_tokens=config.get("maxTokens"),
        top_p=config.get("topP"),
        stop=config.get("stopSequences"),
    )


def test_values_that_json_cannot_represent() -> None:
    """A value that JSON cannot represent is rejected before the request is sent, without quoting the prompt."""
    for fields in ({"extra": {"thing": object()}}, {"response_format": {"thing": object()}}):
        with pytest.raises(BadRequest, match="object"):
            body_of(**fields)
    with pytest.raises(BadRequest, match="surrogate") as caught:
        body_of(messages="a secret \ud83d")
    assert "secret" not in str(caught.value)


# Media

SERVICE_NAMES: dict[type, dict[str, str]] = {
    Image: {"image/png": "png", "image/jpeg": "jpeg", "image/jpg": "jpeg", "image/gif": "gif", "IMAGE/WEBP": "webp"},
    Audio: {
        "audio/mpeg": "mp3",
        "audio/wav": "wav",
        "audio/x-wav": "wav",
        "audio/flac": "flac",
        "audio/ogg; codecs=opus": "ogg",
        "audio/mp4": "m4a",
        "audio/aac": "aac",
        "audio/webm": "webm",
    },
    Document: {
        "application/pdf": "pdf",
        "application/msword": "doc",
        "application/vnd.openxmlformats-officedocument.wordprocessingml.document": "docx",
        "application/vnd.ms-excel": "xls",
        "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet": "xlsx",
        "text/html": "html",
        "text/markdown": "md",
        "text/plain": "txt",
        "text/x-python": "txt",
        "application/json": "txt",
        "video/mp4": "mp4",
        "video/webm": "webm",
        "video/3gpp": "three_gp",
        "video/x-matroska": "mkv",
        "video/mpeg": "mpeg",
    },
}
FORMATS = [(kind, media_type, form) for kind, forms in SERVICE_NAMES.items() for media_type, form in forms.items()]


@pytest.mark.parametrize(("kind", "media_type", "form"), FORMATS)
def test_formats(kind: type, media_type: str, form: str) -> None:
    """Each media type has the service's name, which is valid by its model."""
    (block,) = blocks_of(Message.user([kind(data=b"x", media_type=media_type)]))
    ((name, fields),) = block.items()
    assert fields["format"] == form
    assert name == ("video" if media_type.startswith("video/") else kind.__name__.lower())


@pytest.mark.parametrize(
    ("kind", "suffix", "form"),
    [
        (Image, "jpg", "jpeg"),
        (Image, "webp", "webp"),
        (Audio, "flac", "flac"),
        (Audio, "webm", "webm"),
        (Document, "docx", "docx"),
        (Document, "htm", "html"),
        (Document, "md", "md"),
        (Document, "mpg", "mpeg"),
        (Document, "3gp", "three_gp"),
        (Document, "webm", "webm"),
    ],
)
def test_formats_by_suffix(kind: type, suffix: str, form: str) -> None:
    """Media at an address without a media type have the format of its suffix, whatever this machine knows of it."""
    (block,) = blocks_of(Message.user([kind(url=f"s3://tides-bucket/a.b/c.{suffix}")]))
    ((_, fields),) = block.items()
    assert fields["format"] == form
    assert fields["source"] == {"s3Location": {"uri": f"s3://tides-bucket/a.b/c.{suffix}"}}


@pytest.mark.parametrize(
    ("media", "said"),
    [
        (Image(url="https://x.test/a.png"), "s3://"),
        (Document(url="gs://x/a.pdf"), "s3://"),
        (Image(data=b"x", media_type="image/svg+xml"), "image: expected one of jpeg, png, gif, webp"),
        (Document(data=b"x", media_type="application/zip"), "document: expected one of pdf"),
        (Document(data=b"x", media_type="image/png"), "document: expected one of pdf"),
        (Audio(data=b"x", media_type="audio/midi"), "audio: expected one of aac"),
        (Audio(data=b"x", media_type="text/plain"), "audio: expected one of aac"),
        (Image(url="s3://tides-bucket/image"), "got 'no media type'"),
        (Document(url="s3://tides-bucket/a.pdf", media_type="application/zip"), "got 'application/zip'"),
    ],
)
def test_refused_media(media: Any, said: str) -> None:
    """Formats and addresses that the service does not take are errors that say what it takes."""
    with pytest.raises(BadRequest, match=re.escape(said)):
        body_of(messages=[Message.user(["x", media])])


def test_audio_in_a_result() -> None:
    """A tool's result takes no audio."""
    result = Message.tool(Audio(data=b"x", media_type="audio/wav"), "1")
    with pytest.raises(BadRequest, match=r"in a tool's result for Bedrock, got Audio"):
        body_of(messages=[*called("1"), result])


def test_media_of_an_assistant() -> None:
    """A model's image goes back to the service that sent it, and to no other."""
    sent = {"image": {"format": "png", "source": {"bytes": "iVBORw=="}}}
    image = CODEC.decode(json.dumps(whole([sent])).encode()).media[0]
    for message in (Message.assistant([image]), Message.from_dict(Message.assistant([image]).to_dict())):
        assert body_of(messages=[Message.user("x"), message, Message.user("y")])["messages"][1]["content"] == [sent]
    other = Image(data=b"png", media_type="image/png", raw={"thoughtSignature": "s"})
    for picture in (other, PNG):
        with pytest.raises(BadRequest, match="got an Image in an assistant's message; leave it out"):
            body_of(messages=[Message.user("x"), Message.assistant(["See:", picture]), Message.user("y")])


def names_of(*names: str | None, result: str | None = None) -> list[str]:
    """Return the names that the documents of a message, and one in a tool's result, are sent with."""
    documents = [Document(data=b"x", media_type="application/pdf", name=name) for name in names]
    more = [*called("1"), Message.tool(Document(data=b"x", media_type="text/plain", name=result), "1")]
    body = body_of(messages=[Message.user(["x", *documents]), *more])
    last = body["messages"][-1]["content"][-1]["toolResult"]["content"][0]["document"]["name"]
    return [block["document"]["name"] for block in body["messages"][0]["content"] if "document" in block] + [last]


def test_names_of_documents() -> None:
    """A document's name has no characters that the service refuses, and loses only the suffix of its format."""
    assert names_of(
        "Q3. Report (final) [v2].PDF", "a_b/ c..pdf", "v1.2", ".pdf", "潮汐.pdf", None, "", result="x.txt"
    ) == [
        "Q3 Report (final) [v2]",
        "a b c",
        "v1 2",
        "document",
        "document (2)",
        "document (3)",
        "document (4)",
        "x",
    ]


def test_names_of_documents_are_unique() -> None:
    """The service wants each name only once in a conversation, also in tools' results."""
    assert names_of("a.pdf", "a", "a (2)", "a", result="a.txt") == ["a", "a (2)", "a (2) (2)", "a (3)", "a (4)"]
    assert names_of("x" * 199 + " y")[0] == "x" * 199
    long = "x" * 195 + " yyyyyyy"
    assert names_of(long, long, result=long) == [long[:200], "x" * 195 + " (2)", "x" * 195 + " (3)"]


@given(st.lists(st.one_of(st.text(max_size=300), st.text("a .()_", max_size=210)), min_size=1, max_size=12))
def test_any_names_of_documents(names: list[str]) -> None:
    """Whatever its name, a document has a valid name of its own."""
    sent = names_of(*[name.encode(errors="replace").decode() for name in names])
    assert len(set(sent)) == len(sent)
    for name in sent:
        assert re.fullmatch(r"[a-zA-Z0-9()\[\]-]+( [a-zA-Z0-9()\[\]-]+)*", name), name
        assert len(name) <= 200


def test_fields_of_documents() -> None:
    """`raw` has the fields that a `Document` has no place for."""
    fields = {"citations": {"enabled": True}, "context": "About tides."}
    document = Document(data=b"x", media_type="text/plain", name="a", raw={"document": fields})
    assert blocks_of(Message.user(["x", document]))[1] == {
        "document": {"format": "txt", "name": "a", "source": {"bytes": "eA=="}, **fields}
    }


# Conversations


def test_calls_of_other_services() -> None:
    """Ids that repeat from turn to turn become unique, and each result keeps the id of its call."""
    turns = [Message.user("Hi")]
    for call_id in ("call_0", "call_0", "a:b.c-d", "functions now/0", "", "x" * 100, "x" * 101):
        turns += [Message.assistant([ToolCall(call_id, "now")]), Message.tool("noon", call_id)]
    blocks = [turn["content"][0] for turn in body_of(messages=turns)["messages"][1:]]
    ids = [block["toolUse"]["toolUseId"] for block in blocks[::2]]
    assert (ids[0], ids[2]) == ("call_0", "a:b.c-d")
    assert len(set(ids)) == 7
    assert [block["toolResult"]["toolUseId"] for block in blocks[1::2]] == ids


def test_broken_arguments_go_back() -> None:
    """Arguments that are not an object are wrapped in an object, so that the model sees its own output."""
    call = ToolCall("1", "weather", raw_arguments='{"city": ')
    body = body_of(messages=[Message.user("x"), Message.assistant([call]), Message.tool("bad", call)])
    assert body["messages"][1]["content"][0]["toolUse"]["input"] == {"INVALID_JSON": '{"city": '}


@pytest.mark.parametrize("content", ["", " \n", ["", " "]])
def test_results_without_content(content: Any) -> None:
    """A result without content says that it is empty, or an error: models refuse no content, or an empty text in it."""
    for is_error, expected in ((False, {"content": [{"text": "(empty)"}]}), (True, {"content": [{"text": "error"}]})):
        (block,) = blocks_of(*called("1"), Message.tool(content, "1", is_error=is_error))
        status = {"status": "error"} if is_error else {}
        assert block == {"toolResult": {"toolUseId": "1", **expected, **status}}


def test_white_space_is_no_block() -> None:
    """The service refuses texts of only white space, and turns without content."""
    call = ToolCall("c1", "tide")
    body = body_of(
        messages=[
            Message.user(["When?", Text("")]),
            Message.assistant(["\n\n", call]),
            Message.tool("4", call),
            Message.assistant("\n"),
            Message.system(" "),
            Message.user([" ", "Well?"]),
        ]
    )
    assert "system" not in body
    assert [turn["content"] for turn in body["messages"]] == [
        [{"text": "When?"}],
        [{"toolUse": {"toolUseId": "c1", "name": "tide", "input": {}}}],
        [{"toolResult": {"toolUseId": "c1", "content": [{"text": "4"}]}}, {"text": "Well?"}],
    ]
    with pytest.raises(BadRequest, match="expected the last message to say something"):
        body_of(messages=[Message.user("Hi"), Message.assistant("Hello"), Message.user(" \n")])
    with pytest.raises(BadRequest, match="besides the system"):
        body_of(messages=[Message.system("alone")])
    with pytest.raises(BadRequest, match="only text in a system message"):
        body_of(messages=[Message("system", PNG), Message.user("Hi")])


def test_reasoning_that_stays_behind() -> None:
    """Reasoning without a signature, of other services, or as all of a turn is refused, so it is not sent."""
    thoughts = [
        Reasoning(text="a", raw={"reasoningContent": {"reasoningText": {"text": "a"}}}),
        Reasoning(text="b"),
        Reasoning(text="c", signature="s", raw={"type": "reasoning.text", "text": "c"}),
        Reasoning(text="d", signature="s", raw={"thought": True, "thoughtSignature": "s"}),
    ]
    sealed = Reasoning(text="Hm.", signature="s1g", raw=SIGNED)
    messages = [Message.user("x"), Message.assistant([*thoughts, "Hi"]), Message.user("y"), Message.assistant([sealed])]
    body = body_of(messages=[*messages, Message.user("z")])
    assert [turn["content"] for turn in body["messages"]] == [
        [{"text": "x"}],
        [{"text": "Hi"}],
        [{"text": "y"}, {"text": "z"}],
    ]


def test_claudes_reasoning_from_elsewhere() -> None:
    """Claude's own signatures are valid at each service. Other models get none of it."""
    thoughts = [
        Reasoning(text="a", signature="s", raw={"type": "thinking", "thinking": "a", "signature": "s"}),
        Reasoning(text="b", signature="t"),
    ]
    turns = [Message.user("x"), Message.assistant([*thoughts, "Hi"]), Message.user("y")]
    assert body_of(messages=turns)["messages"][1]["content"] == [
        {"reasoningContent": {"reasoningText": {"text": "a", "signature": "s"}}},
        {"reasoningContent": {"reasoningText": {"text": "b", "signature": "t"}}},
        {"text": "Hi"},
    ]
    assert body_of(messages=turns, model="amazon.nova-pro-v1:0")["messages"][1]["content"] == [{"text": "Hi"}]


def test_parts_of_other_dialects_stay_behind() -> None:
    """Opaque parts, and fields beside texts and calls, that came from another dialect are not sent."""
    answer = Message.assistant(
        [
            Opaque("anthropic", {"type": "server_tool_use"}),
            Text("Hi", raw={"type": "text", "citations": [{"cited_text": "x"}]}),
            ToolCall("c", "f", raw={"type": "function_call"}),
        ]
    )
    body = body_of(messages=[Message.user("x"), answer, Message.tool("1", "c")])
    assert body["messages"][1]["content"] == [{"text": "Hi"}, {"toolUse": {"toolUseId": "c", "name": "f", "input": {}}}]
