"""The bodies of OpenAI's chat completions API as prompts and settings of calls, for programs that are asked in its shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

from fluxibly._checks import is_list
from fluxibly._dicts import Reader
from fluxibly._formats import output_format

_PASSED: Final[tuple[str, ...]] = (
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
_TYPED: Final = frozenset({"tools", "tool_choice", "response_format", "metadata", "user", "stream", "stream_options"})
"""The parameters that have to be of some type, which few bodies have."""
_KNOWN: Final = _TYPED | {*_PASSED, "messages", "model", "max_completion_tokens", "max_tokens"}
"""All parameters that are read."""
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


class Body(NamedTuple):
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


def read_body(value: Mapping[str, Any]) -> Body:
    """Return what a body says.

    Raises:
        TypeError, ValueError: it is no request for a chat completion. The message begins with the path of what is wrong.
    """
    given = {name: each for name, each in value.items() if each is not None}
    messages: list[Any] = Reader({"messages": given.get("messages")}, "").items("messages")
    if not messages:
        raise ValueError("messages: expected a list of messages, got nothing")
    for number, message in enumerate(messages):
        if type(message) is not dict:
            Reader(message, f"messages[{number}]")  # which refuses what is no mapping
    settings: dict[str, Any] = {name: given[name] for name in _PASSED if name in given}
    limit = given.get("max_completion_tokens", given.get("max_tokens"))
    if limit is not None:
        settings["max_tokens"] = limit
    stream = usage = False
    if not given.keys().isdisjoint(_TYPED):
        fields = Reader(given, "")
        if tools := fields.items("tools"):
            settings["tools"] = [_tool(tool, f"tools[{number}]") for number, tool in enumerate(tools)]
        if (choice := _tool_choice(given.get("tool_choice"))) is not None:
            settings["tool_choice"] = choice
        if output_format(given.get("response_format")) is not None:
            settings["response_format"] = given["response_format"]
        metadata = fields.table("metadata") or {}
        if (user := fields.text("user")) is not None:
            metadata["user"] = user
        if metadata:
            settings["metadata"] = metadata
        stream = fields.take("stream", bool, "true or false", default=False)
        options = Reader(fields.table("stream_options") or {}, "stream_options")
        usage = options.take("include_usage", bool, "true or false", default=False)
    rest = {name: each for name, each in given.items() if name not in _KNOWN}
    return Body(messages, settings, given.get("model"), stream, usage, rest)


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
