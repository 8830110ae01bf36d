"""The bodies of OpenAI's chat completions API as prompts and settings of calls, for programs that are asked in its shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import attrs

from fluxibly._checks import is_list
from fluxibly._dicts import Reader
from fluxibly._formats import output_format

_PASSED: Final = (
    "temperature",
    "top_p",
    "top_k",
    "frequency_penalty",
    "presence_penalty",
    "seed",
    "n",
    "reasoning_effort",
    "stop",
)
"""The parameters whose values are those of a call. `LLM.request` checks them."""
_MISLEADING: Final[Mapping[str, str]] = {
    "functions": "; write tools",
    "function_call": "; write tool_choice",
    "logit_bias": "",
    "logprobs": "",
    "top_logprobs": "",
    "audio": "",
    "web_search_options": "",
}
"""The parameters whose loss would show in the answer, each with a hint."""


@attrs.frozen
class Body:
    """What the body of a request for a chat completion says."""

    messages: list[Any]
    settings: dict[str, Any]
    """The settings of the call, as `LLM.complete` takes them, without the model."""
    model: Any
    """The model that the body names, unchecked; None if it names none."""
    stream: bool
    usage: bool
    """Whether the last object of a stream has the usage."""
    rest: dict[str, Any]
    """The parameters that fluxibly has no setting for."""


def read_body(value: object) -> Body:
    """Return what a body says.

    Raises:
        TypeError, ValueError: it is no request for a chat completion. The message begins with the path of what is wrong.
    """
    fields = Reader(value, "")
    messages = fields.items("messages")
    if not messages:
        raise ValueError("messages: expected a list of messages, got nothing")
    for number, message in enumerate(messages):
        Reader(message, f"messages[{number}]")  # which refuses what is no mapping
    settings = {name: value for name in _PASSED if (value := fields.value(name)) is not None}
    model = fields.value("model")
    limits = [fields.value(name) for name in ("max_completion_tokens", "max_tokens")]
    if limits != [None, None]:
        settings["max_tokens"] = limits[1] if limits[0] is None else limits[0]
    if tools := fields.items("tools"):
        settings["tools"] = [_tool(tool, f"tools[{number}]") for number, tool in enumerate(tools)]
    if (choice := _tool_choice(fields.value("tool_choice"))) is not None:
        settings["tool_choice"] = choice
    wanted = fields.value("response_format")
    if output_format(wanted) is not None:
        settings["response_format"] = wanted
    metadata = fields.table("metadata") or {}
    if (user := fields.text("user")) is not None:
        metadata["user"] = user
    if metadata:
        settings["metadata"] = metadata
    stream = fields.take("stream", bool, "true or false", default=False)
    options = Reader(fields.table("stream_options") or {}, "stream_options")
    usage = options.take("include_usage", bool, "true or false", default=False)
    rest = {name: value for name, value in fields.rest().items() if value is not None}
    return Body(messages, settings, model, stream, usage, rest)


def _tool(value: object, path: str) -> object:
    kind = Reader(value, path).text("type", "function")
    if kind != "function":
        raise ValueError(f"{path}.type: expected 'function', got {kind[:80]!r}")
    return value


def _tool_choice(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    choice = Reader(value, "tool_choice")
    kind = choice.text("type", "function")
    if kind != "function":
        raise ValueError(f"tool_choice.type: expected 'function', got {kind[:80]!r}")
    return Reader(choice.value("function"), "tool_choice.function").needed("name")


def misleading(rest: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the parameters whose loss would mislead who asks, each with what to write instead, if there is something."""
    for name, hint in _MISLEADING.items():
        if rest.get(name):
            yield name, hint
    modalities: object = rest.get("modalities")
    if is_list(modalities) and modalities != ["text"]:
        yield "modalities", ""
