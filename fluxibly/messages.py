"""The parts of a prompt: messages, their content, and tools."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias, TypeVar, cast, get_args, runtime_checkable

import attrs

from fluxibly._checks import is_mapping, kind_of
from fluxibly._values import Value

_T = TypeVar("_T")
Role: TypeAlias = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[str, ...] = get_args(Role)


@attrs.frozen(repr=False, eq=False)
class Text(Value):
    """A piece of text in a message."""

    text: str


@attrs.frozen(kw_only=True, repr=False, eq=False)
class Image(Value):
    """An image in a message: either a `url` (http, https or data) or the bytes `data` with their `media_type`.

    `detail` is OpenAI's hint ("low", "high", "auto"). Other providers ignore it.
    """

    url: str | None = None
    data: bytes | None = attrs.field(default=None, repr=lambda data: "None" if data is None else f"<{len(data)} bytes>")
    media_type: str | None = None
    detail: str | None = None

    def __attrs_post_init__(self) -> None:
        if (self.url is None) == (self.data is None):
            got = "neither" if self.url is None else "both"
            raise ValueError(f"an Image: expected either url= or data=, got {got}")
        if self.url is not None and not isinstance(self.url, str):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers may be untyped
            raise TypeError(f"an Image's url: expected a str, got {kind_of(self.url)}")
        if self.data is None:
            return
        if not isinstance(self.data, (bytes, bytearray, memoryview)):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers may be untyped
            raise TypeError(f"an Image's data: expected bytes, got {kind_of(self.data)}; decode base64 first")
        if self.media_type is None:
            raise ValueError("an Image with data= needs media_type=, e.g. 'image/png'")


@attrs.frozen(kw_only=True, repr=False, eq=False)
class Reasoning(Value):
    """A model's reasoning, which must be sent back to the model unchanged in the next turn.

    `text` is the readable part, `signature` proves the reasoning to the service, and `raw` is the block as the service
    sent it (a redacted block has nothing else). Only the dialect that produced the block reads `raw`.
    """

    text: str = ""
    signature: str | None = None
    raw: Mapping[str, Any] | None = None


def parse_arguments(raw: str) -> tuple[dict[str, Any], str | None]:
    """Return a tool call's arguments as a dict, and the error in the text or None. With an error the dict is empty."""
    import json  # late, to keep `import fluxibly` fast

    if not raw.strip():
        return {}, None
    try:
        value: Any = json.loads(raw)
    except ValueError as error:
        return {}, f"the arguments are not JSON: {error}"
    except RecursionError:
        return {}, "the arguments are nested too deeply"
    if not is_mapping(value):
        return {}, f"the arguments: expected a JSON object, got {kind_of(value)}"
    return dict(value), None


@attrs.frozen(repr=False, eq=False)
class ToolCall(Value):
    """A model's request to call a tool.

    Pass `arguments` or `raw_arguments`, and the other is derived from it. If the model's text is not a JSON object,
    `arguments` is empty, `raw_arguments` holds the text, and `error` says what is wrong with the text.
    """

    id: str
    name: str
    arguments: Mapping[str, Any] = attrs.field(factory=dict[str, Any])
    raw_arguments: str = ""
    signature: str | None = attrs.field(default=None, kw_only=True)
    """A proof that must be sent back with the call (Gemini's thought signature)."""
    error: str | None = attrs.field(default=None, init=False, eq=False)

    def __attrs_post_init__(self) -> None:
        if not is_mapping(self.arguments):
            raise TypeError(
                f"a ToolCall's arguments: expected a mapping, got {kind_of(self.arguments)}; "
                "pass text as raw_arguments="
            )
        if not isinstance(self.raw_arguments, str):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers may be untyped
            raise TypeError(
                f"a ToolCall's raw_arguments: expected a str, got {kind_of(self.raw_arguments)}; "
                "pass a mapping as arguments="
            )
        if self.raw_arguments and not self.arguments:
            arguments, error = parse_arguments(self.raw_arguments)
            object.__setattr__(self, "arguments", arguments)
            object.__setattr__(self, "error", error)
        elif not self.raw_arguments:
            import json

            object.__setattr__(self, "raw_arguments", json.dumps(dict(self.arguments), ensure_ascii=False))


Part: TypeAlias = Text | Image
Content: TypeAlias = "str | Part | Sequence[str | Part]"


def _parts(content: object) -> tuple[Part, ...]:
    if isinstance(content, str):
        return (Text(content),) if content else ()
    if isinstance(content, (Text, Image)):
        return (content,)
    if not isinstance(content, Iterable) or isinstance(content, (bytes, Mapping)):
        raise TypeError(
            f"a message's content: expected a str, Text, Image or a sequence of these, got {kind_of(content)}"  # pyright: ignore[reportUnknownArgumentType]
        )
    parts: list[Part] = []
    for part in content:  # pyright: ignore[reportUnknownVariableType]
        if isinstance(part, str):
            parts.append(Text(part))
        elif isinstance(part, (Text, Image)):
            parts.append(part)
        else:
            raise TypeError(f"a message's content: expected a str, Text or Image as a part, got {kind_of(part)}")  # pyright: ignore[reportUnknownArgumentType]
    return tuple(parts)


def _calls(calls: object) -> tuple[ToolCall, ...]:
    return _all_of(ToolCall, calls, "a message's tool_calls: expected a sequence of ToolCall")


def _thoughts(parts: object) -> tuple[Reasoning, ...]:
    return _all_of(Reasoning, parts, "a message's reasoning: expected a sequence of Reasoning")


def _all_of(kind: type[_T], values: object, expected: str) -> tuple[_T, ...]:
    """Return `values` as a tuple of `kind`. Otherwise `expected` begins the error message."""
    if values == ():  # nearly always
        return ()
    if not isinstance(values, Iterable):
        raise TypeError(f"{expected}, got {kind_of(values)}")
    found: tuple[object, ...] = tuple(values)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    for value in found:
        if not isinstance(value, kind):
            raise TypeError(f"{expected}, got {kind_of(value)} in the sequence")
    return found  # type: ignore[return-value]  # each was checked above


def _known_role(instance: object, attribute: object, role: object) -> None:
    if role not in ROLES:
        raise ValueError(f"a message's role: expected one of {', '.join(ROLES)}, got {role!r}")


@runtime_checkable
class Answer(Protocol):
    """The fields of a `Response` that `Message.assistant` reads."""

    @property
    def text(self) -> str: ...
    # Any, because pyright sees the converters of attrs here, not the tuples of `ToolCall` and `Reasoning` they return.
    @property
    def tool_calls(self) -> Any: ...
    @property
    def reasoning_parts(self) -> Any: ...


@attrs.frozen(repr=False, eq=False)
class Message(Value):
    """A turn of a conversation, usually made with a class method such as `Message.user("Hi")`."""

    role: Role = attrs.field(validator=_known_role)
    content: tuple[Part, ...] = attrs.field(default=(), converter=_parts)
    tool_calls: tuple[ToolCall, ...] = attrs.field(default=(), converter=_calls, kw_only=True)
    """The tool calls that an assistant asked for."""
    tool_call_id: str | None = attrs.field(default=None, kw_only=True)
    """For the role "tool": the `ToolCall.id` that this message answers."""
    name: str | None = attrs.field(default=None, kw_only=True)
    """The name of the speaker; for the role "tool", the tool's name (Gemini needs it)."""
    reasoning: tuple[Reasoning, ...] = attrs.field(default=(), converter=_thoughts, kw_only=True)

    @property
    def text(self) -> str:
        """The texts of the message, joined."""
        return "".join([part.text for part in self.content if isinstance(part, Text)])

    @classmethod
    def system(cls, text: str) -> Message:
        """Return a message with instructions to the model."""
        return cls("system", text)

    @classmethod
    def user(cls, content: Content) -> Message:
        """Return a user's message: a str, or a sequence of str, `Text` and `Image`."""
        return cls("user", content)

    @classmethod
    def assistant(cls, content: Content | Answer = "", *, tool_calls: Iterable[ToolCall] = ()) -> Message:
        """Return a model's message, or the message of a `Response`: its text, tool calls and reasoning to send back."""
        if isinstance(content, str) or not isinstance(content, Answer):  # str first, because it is the usual case
            return cls("assistant", cast("tuple[Part, ...]", content), tool_calls=tool_calls)
        return cls("assistant", content.text, tool_calls=content.tool_calls, reasoning=content.reasoning_parts)

    @classmethod
    def tool(cls, content: Content, tool_call: str | ToolCall, *, name: str | None = None) -> Message:
        """Return a tool's result. `tool_call` is the `ToolCall` that it answers, or its id (then pass `name` too)."""
        if isinstance(tool_call, ToolCall):
            return cls("tool", content, tool_call_id=tool_call.id, name=name or tool_call.name)
        if not isinstance(tool_call, str):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers may be untyped
            raise TypeError(
                f"a tool's result: expected the ToolCall that it answers, or its id, got {kind_of(tool_call)}"
            )
        return cls("tool", content, tool_call_id=tool_call, name=name)


@attrs.frozen(repr=False, eq=False)
class Tool(Value):
    """A function that the model may ask to call. `parameters` is the JSON Schema of its arguments."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = attrs.field(factory=lambda: {"type": "object", "properties": {}})
    strict: bool | None = attrs.field(default=None, kw_only=True)

    def __attrs_post_init__(self) -> None:
        if not isinstance(self.name, str):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers may be untyped
            raise TypeError(f"a Tool's name: expected a str, got {kind_of(self.name)}")
        if not is_mapping(self.parameters):
            raise TypeError(f"a Tool's parameters: expected a JSON Schema (a mapping), got {kind_of(self.parameters)}")


def to_messages(prompt: object) -> tuple[Message, ...]:
    """Return the messages of a prompt: a str, a `Message` or a sequence of `Message`.

    Raises:
        TypeError: the prompt is of another type.
        ValueError: the prompt is empty.
    """
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError(_EMPTY_PROMPT)
        return (Message.user(prompt),)
    if isinstance(prompt, Message):
        return to_messages((prompt,))
    if not isinstance(prompt, Iterable) or isinstance(prompt, (bytes, Mapping)):
        raise TypeError(f"the prompt: expected a str or a sequence of Message, got {kind_of(prompt)}")  # pyright: ignore[reportUnknownArgumentType]
    given: tuple[object, ...] = tuple(prompt)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    for message in given:
        if not isinstance(message, Message):
            hint = "; write Message.user(...)" if isinstance(message, str) else ""
            raise TypeError(
                f"the prompt: expected a str or a sequence of Message, got {kind_of(message)} in the sequence{hint}"
            )
    if not given:
        raise ValueError("the prompt has no messages; give a non-empty string or a sequence of Message")
    messages = cast("tuple[Message, ...]", given)
    last = messages[-1]
    if not _says_something(last) and (last.role == "user" or not any(map(_says_something, messages))):
        raise ValueError(_EMPTY_PROMPT)
    return messages


_EMPTY_PROMPT = "the prompt is empty; give a non-empty string or a sequence of Message"


def _says_something(message: Message) -> bool:
    """Whether a message has content. A tool's result may be empty, and an assistant may only call tools."""
    for part in message.content:
        if isinstance(part, Image) or part.text:
            return True
    return bool(message.tool_calls or message.reasoning or message.role == "tool")


def to_tools(tools: Iterable[Tool | Mapping[str, Any]] | None) -> tuple[Tool, ...]:
    """Return the tools of a request as a tuple.

    Raises:
        TypeError: `tools` is not a sequence of tools.
        ValueError: a mapping in the sequence has no name.
    """
    if tools is None:
        return ()
    if not isinstance(tools, Iterable) or isinstance(tools, (str, Mapping)):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers may be untyped
        found = kind_of(cast("object", tools))
        raise TypeError(f"tools: expected a sequence of Tool or of mappings, like [Tool('look')], got {found}")
    return tuple(tool if isinstance(tool, Tool) else _tool(tool) for tool in tools)


def _tool(tool: object) -> Tool:
    if not is_mapping(tool):
        raise TypeError(
            f"a tool: expected a Tool or a mapping with name, description and parameters, got {kind_of(tool)}"
        )
    fields: object = tool.get("function", tool)
    if not is_mapping(fields) or not isinstance(fields.get("name"), str):
        raise ValueError("a tool given as a mapping needs a 'name' (a str)")
    parameters = fields.get("parameters", fields.get("input_schema"))
    return Tool(
        fields["name"],
        fields.get("description") or "",
        parameters if parameters is not None else {"type": "object", "properties": {}},
        strict=fields.get("strict"),
    )


def to_stop(stop: str | Iterable[str] | None) -> tuple[str, ...]:
    """Return the stop sequences of a request as a tuple.

    Raises:
        TypeError: `stop` is neither a str nor a sequence of str.
    """
    if stop is None:
        return ()
    return (stop,) if isinstance(stop, str) else _all_of(str, stop, "stop: expected a str or a sequence of str")
