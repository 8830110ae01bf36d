"""Tools for models that were not made for them: a chat template, and calls that llama.cpp's grammar holds a model to.

llama.cpp itself takes `tool_choice="required"` for "text, and then a call", and the name of a tool for "auto". So a call that
has to be made is asked for as JSON of a schema, and read as a call.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from functools import partial
from typing import Any

import attrs

from fluxibly._schemas.references import with_references
from fluxibly.errors import BadRequest
from fluxibly.types import Chunk, Request, Tool, ToolCallDelta

TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- 'You may call functions. Their signatures are within <tools></tools>:\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '\\n</tools>\\n\\nTo call one, write its name and arguments as JSON within <tool_call></tool_call>:\\n' }}
    {{- '<tool_call>\\n{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if message.content %}
            {{- message.content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {%- if message.content or not loop.first %}
                {{- '\\n' }}
            {%- endif %}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {%- if call.function.arguments is string %}
                {{- call.function.arguments }}
            {%- else %}
                {{- call.function.arguments | tojson }}
            {%- endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
"""The ChatML of models like Qwen, with their form of tools."""


def tools_to_call(request: Request) -> Sequence[Tool]:
    """Return the tools one of which the model has to call. There are none if it may as well answer.

    Raises:
        BadRequest: the request names a tool that it does not have.
    """
    choice = request.tool_choice
    if choice in (None, "auto", "none"):
        return ()
    if choice == "required":
        return request.tools
    chosen = [tool for tool in request.tools if tool.name == choice]
    if not chosen:
        known = ", ".join(["auto", "none", "required", *[tool.name for tool in request.tools]])
        raise BadRequest(f"tool_choice: expected one of {known}, got {choice!r}", provider="local", model=request.model)
    return chosen


def schema_of_call(tools: Sequence[Tool]) -> dict[str, Any]:
    """Return the JSON Schema of a call of one of the tools: an object with a name and arguments, in this order."""
    definitions = {
        str(number): with_references(tool.parameters, partial(_below, f"#/$defs/{number}"))
        for number, tool in enumerate(tools)
    }
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.name}, "arguments": {"$ref": f"#/$defs/{number}"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for number, tool in enumerate(tools)
    ]
    return {**(calls[0] if len(calls) == 1 else {"anyOf": calls}), "$defs": definitions}


def _below(root: str, ref: str) -> str:
    """Return a reference within a schema that has become a part of another, at `root`."""
    return root + ref[1:]


_BEGINNING = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*')
_END = re.compile(r"\s*\}\s*\Z|\s+\Z")
"""The possible end of the object: the brace after the arguments."""


class CallReader:
    """The reader of an answer that is a call in JSON, as `schema_of_call` describes it. It makes a tool call of the text."""

    def __init__(self) -> None:
        self._text = ""
        """The text that has not gone out."""
        self._begun = self._has_arguments = False

    def read(self, chunk: Chunk) -> Chunk:
        """Return a chunk of the answer with a part of the tool call in place of its text."""
        deltas = self._deltas(chunk.text) if chunk.text else ()
        reason = "tool_call" if chunk.finish_reason == "stop" and self._begun else chunk.finish_reason
        return attrs.evolve(chunk, text="", tool_calls=deltas, finish_reason=reason)

    def _deltas(self, text: str) -> tuple[ToolCallDelta, ...]:
        self._text += text
        deltas: list[ToolCallDelta] = []
        if not self._begun:
            beginning = _BEGINNING.match(self._text)
            if beginning is None:
                return ()
            self._begun = True
            self._text = self._text[beginning.end() :]
            deltas.append(ToolCallDelta(index=0, id=f"call_{secrets.token_hex(8)}", name=json.loads(beginning[1])))
        if not self._has_arguments:
            self._text = self._text.lstrip()
        end = _END.search(self._text)
        place = len(self._text) if end is None else end.start()
        if place:
            self._has_arguments = True
            deltas.append(ToolCallDelta(index=0, arguments=self._text[:place]))
            self._text = self._text[place:]
        return tuple(deltas)
