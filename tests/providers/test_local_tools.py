"""Tools of the local model: the calls that llama.cpp's grammar holds it to, and the functions that run for them."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Literal

import anyio
import anyio.lowlevel
import attrs
import pytest

from fluxibly import LLM, AsyncLLM, LLMConfig, tool
from fluxibly.aggregate import Aggregator
from fluxibly.errors import BadRequest
from fluxibly.middleware import Tools
from fluxibly.providers.local._engine import Settings
from fluxibly.providers.local._model import has_tools_in_template
from fluxibly.providers.local._tools import TEMPLATE, CallReader, schema_of_call, tools_to_call
from fluxibly.types import Chunk, Message, Request, Tool

QUESTION = "What is the weather in Paris?"


@attrs.frozen
class Place:
    city: str
    country: Literal["France", "Spain"]


def get_weather(city: str, unit: Literal["celsius", "fahrenheit"] = "celsius") -> str:
    """Return the weather in a city.

    Args:
        city: its name
    """
    return f"20 degrees {unit} in {city}"


def look_up(place: Place, reason: Literal["tourism", "business"]) -> str:
    """Look up a place."""
    assert isinstance(place, Place)
    return f"{place.city} is fine for {reason}"


class TestTheCall:
    TOOLS = (tool(get_weather), tool(look_up))

    def test_the_schema(self):
        """Each tool's own definitions stay apart from those of the others."""
        schema = schema_of_call(self.TOOLS)
        first, second = schema["anyOf"]
        assert first["properties"] == {"name": {"const": "get_weather"}, "arguments": {"$ref": "#/$defs/0"}}
        assert [*second["properties"]] == second["required"] == ["name", "arguments"]
        assert schema["$defs"]["1"]["properties"]["place"] == {"$ref": "#/$defs/1/$defs/Place"}
        assert self.TOOLS[1].parameters["properties"]["place"] == {"$ref": "#/$defs/Place"}
        assert "anyOf" not in schema_of_call(self.TOOLS[:1])

    @pytest.mark.parametrize(
        ("choice", "names"),
        [(None, []), ("auto", []), ("none", []), ("required", ["get_weather", "look_up"]), ("look_up", ["look_up"])],
    )
    def test_the_choice(self, choice, names):
        request = Request(model="m", messages="x", tools=self.TOOLS, tool_choice=choice)
        assert [each.name for each in tools_to_call(request)] == names

    def test_an_unknown_choice(self):
        request = Request(model="m", messages="x", tools=self.TOOLS, tool_choice="look")
        with pytest.raises(BadRequest, match="expected one of auto, none, required, get_weather, look_up, got 'look'"):
            tools_to_call(request)

    @pytest.mark.parametrize(
        "arguments", ['{"city": "Paris"}', "{}", '{"a": {"b": {}}, "c": "}}"}', '{"a":[{}], "b": " } "}', '{ "a" : 1 }']
    )
    @pytest.mark.parametrize("end", ["}", "\n}", " } ", "}\n\n"])
    def test_the_reader(self, arguments, end):
        """Wherever the text is cut, the arguments are the same, and only they go out."""
        text = '{\n  "name" : "say \\"x\\"",\n"arguments":  ' + arguments + end
        for size in range(1, len(text) + 1):
            reader, answer = CallReader(), Aggregator()
            for at in range(0, len(text), size):
                answer.add(reader.read(Chunk(text[at : at + size])))
            answer.add(reader.read(Chunk(finish_reason="stop")))
            response = answer.response()
            (called,) = response.tool_calls
            assert (called.name, called.raw_arguments, response.text) == ('say "x"', arguments, "")
            assert (response.finish_reason, called.error) == ("tool_call", None)
            assert called.id.startswith("call_")

    def test_a_call_that_is_cut_off(self):
        """It has what came, and its finish reason says so."""
        reader, answer = CallReader(), Aggregator()
        answer.add(reader.read(Chunk('{"name": "get_weather", "arguments": {"city": "Pa')))
        answer.add(reader.read(Chunk(finish_reason="length")))
        response = answer.response()
        assert (response.finish_reason, response.tool_calls[0].raw_arguments) == ("length", '{"city": "Pa')
        assert CallReader().read(Chunk('{"na', finish_reason="stop")) == Chunk(finish_reason="stop")


class TestTheTemplate:
    def file(self, tmp_path, template):
        key = b"tokenizer.chat_template"
        value = b"" if template is None else struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 8, len(template))
        file = tmp_path / "model.gguf"
        file.write_bytes(b"GGUF" + struct.pack("<I", 3) + value + (template or b"") + b" tools " * 9)
        return file

    def test_of_a_file(self, tmp_path):
        """Only the template counts, not what comes after it."""
        assert has_tools_in_template(self.file(tmp_path, b"{% for tool in tools %}"))
        assert not has_tools_in_template(self.file(tmp_path, b"{{ messages }}"))
        assert not has_tools_in_template(self.file(tmp_path, None))

    def test_settings(self):
        assert Settings(chat_template="tools").takes_tools
        assert "tools" in TEMPLATE


@pytest.fixture(scope="module")
def config(gguf: Path) -> LLMConfig:
    pytest.importorskip("xllamacpp")
    params = {"n_threads": 1, "n_ctx": 2048, "chat_template": "tools"}
    return LLMConfig(
        framework="local", model=str(gguf), temperature=0, max_tokens=100, timeout=60.0, additional_params=params
    )


@pytest.mark.model
class TestTheRealModel:
    """A small model's text is unreliable, so the tests assert on its calls."""

    @pytest.mark.parametrize("choice", ["required", "get_weather"])
    def test_it_has_to_call(self, config, choice):
        """Whole and streamed, its arguments fit the schema."""
        with LLM(config, middleware=[]) as llm:
            whole = llm.complete(QUESTION, tools=[tool(get_weather)], tool_choice=choice)
            with llm.stream(QUESTION, tools=[tool(get_weather)], tool_choice=choice) as stream:
                pieces = [delta for chunk in stream for delta in chunk.tool_calls]
        for response in (whole, stream.response):
            (called,) = response.tool_calls
            assert (called.name, response.text, response.finish_reason) == ("get_weather", "", "tool_call")
            assert tool(get_weather).read(called)["city"]
        assert whole.tool_calls[0].arguments == stream.response.tool_calls[0].arguments
        assert len(pieces) > 3

    def test_one_of_several(self, config):
        """A name holds it to that tool, whatever the question, and types to their fields and words."""
        tools = [tool(get_weather), tool(look_up)]
        with LLM(config, middleware=[]) as llm:
            response = llm.complete(QUESTION, tools=tools, tool_choice="look_up")
            free = llm.complete(QUESTION, tools=tools, tool_choice="required")
        (called,) = response.tool_calls
        arguments = tools[1].read(called)
        assert isinstance(arguments["place"], Place)
        assert arguments["reason"] in ("tourism", "business")
        assert free.tool_calls[0].name in ("get_weather", "look_up")

    def test_the_functions_run(self, config):
        """`Tools` runs the function, and the model answers with its result before it."""
        seen: list[str] = []

        def noted(city: str) -> str:
            """Return the weather in a city."""
            seen.append(city)
            return get_weather(city)

        with LLM(config, middleware=[Tools(noted)]) as llm:
            response = llm.complete(QUESTION, tool_choice="required")
            with llm.stream(QUESTION, tool_choice="noted") as stream:
                marks = [chunk.added for chunk in stream if chunk.added]
        assert [message.role for message in response.added] == ["assistant", "tool"]
        assert response.added[1].text == get_weather(seen[0])
        assert response.text
        assert len(marks) == 1
        assert stream.response.added[1].text == get_weather(seen[1])
        assert stream.response.text == response.text

    def test_async(self, config, anyio_backend):
        async def weather(city: str) -> str:
            await anyio.lowlevel.checkpoint()
            return get_weather(city)

        async def main():
            async with AsyncLLM(config, middleware=[Tools(weather)]) as llm:
                whole = await llm.complete(QUESTION, tool_choice="required")
                async with llm.stream(QUESTION, tool_choice="required") as stream:
                    async for _ in stream:
                        pass
                return whole, stream.response

        whole, streamed = anyio.run(main, backend=anyio_backend)
        assert whole.added[1].text == streamed.added[1].text
        assert whole.added[1].text.startswith("20 degrees")

    def test_a_conversation_with_tools_is_shown_to_the_model(self, config):
        """The template has a place for tools, calls and results: each makes the prompt longer."""
        calls = [Message.user(QUESTION)]
        with LLM(config, middleware=[]) as llm:
            first = llm.complete(calls, max_tokens=1)
            with_tools = llm.complete(calls, tools=[tool(get_weather)], tool_choice="required")
            calls += [with_tools.message, Message.tool("20 degrees", with_tools.tool_calls[0])]
            with_result = llm.complete(calls, tools=[tool(get_weather)], max_tokens=1)
        lengths = [each.usage.input_tokens for each in (first, with_tools, with_result)]
        assert lengths == sorted({*lengths})

    def test_a_template_of_the_file_without_tools(self, gguf):
        """llama.cpp would leave the tools out without a word."""
        config = LLMConfig(
            framework="local", model=str(gguf), additional_params={"n_ctx": 512, "chat_template": "model"}
        )
        with LLM(config, middleware=[]) as llm, pytest.raises(BadRequest) as caught:
            llm.complete(QUESTION, tools=[Tool("look")])
        assert str(caught.value).endswith("choose another model, or set additional_params: {chat_template: tools}")
