"""Messages and tools: what a prompt consists of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias, TypeVar, cast, get_args, runtime_checkable

import attrs

from fluxibly._checks import is_mapping, kind_of
from fluxibly._roots import BadPrompt
from fluxibly._values import Value
from fluxibly.parts import (
    ContentPart,
    Kind,
    Media,
    Order,
    Part,
    Place,
    Reasoning,
    Text,
    ToolCall,
    in_order,
    order_unless_usual,
    place_of,
)

_T = TypeVar("_T")
Role: TypeAlias = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[str, ...] = get_args(Role)


Content: TypeAlias = "str | ContentPart | Sequence[str | ContentPart]"
Parts: TypeAlias = "str | Part | Sequence[str | Part]"


def _parts(content: object) -> tuple[ContentPart, ...]:
    if isinstance(content, str):
        return (Text(content),) if content else ()
    if isinstance(content, (Text, Media)):
        return (content,)
    if not isinstance(content, Iterable) or isinstance(content, (bytes, Mapping)):
        raise TypeError(
            f"a message's content: expected a str, Text, Image, Audio, Document or a sequence of these, got {kind_of(content)}"  # pyright: ignore[reportUnknownArgumentType]
        )
    parts: list[ContentPart] = []
    for part in content:  # pyright: ignore[reportUnknownVariableType]
        if isinstance(part, str):
            parts.append(Text(part))
        elif isinstance(part, (Text, Media)):
            parts.append(part)
        else:
            raise TypeError(
                f"a message's content: expected a str, Text, Image, Audio or Document as a part, got {kind_of(part)}"  # pyright: ignore[reportUnknownArgumentType]
            )
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
    """The property of a `Response` that `Message.assistant` reads."""

    @property
    def parts(self) -> tuple[Part, ...]: ...


USUAL: tuple[Kind, ...] = ("reasoning", "content", "tool_call")
"""The order of a message's parts, unless `Message.order` says otherwise."""


@attrs.frozen(repr=False, eq=False)
class Message(Value):
    """A turn of a conversation, usually made with a class method such as `Message.user("Hi")`."""

    role: Role = attrs.field(validator=_known_role)
    content: tuple[ContentPart, ...] = attrs.field(default=(), converter=_parts)
    tool_calls: tuple[ToolCall, ...] = attrs.field(default=(), converter=_calls, kw_only=True)
    """The tool calls that an assistant asked for."""
    tool_call_id: str | None = attrs.field(default=None, kw_only=True)
    """For the role "tool": the `ToolCall.id` that this message answers."""
    name: str | None = attrs.field(default=None, kw_only=True)
    """The name of the speaker; for the role "tool", the tool's name (Gemini needs it)."""
    reasoning: tuple[Reasoning, ...] = attrs.field(default=(), converter=_thoughts, kw_only=True)
    is_error: bool = attrs.field(default=False, kw_only=True)
    """For the role "tool": whether the tool failed, and the content says how."""
    order: Order | None = attrs.field(default=None, kw_only=True)
    """Where each part of an assistant's message stands; None for reasoning, content, tool calls. See `parts`."""

    @property
    def text(self) -> str:
        """The texts of the message, joined."""
        return "".join([part.text for part in self.content if isinstance(part, Text)])

    @property
    def parts(self) -> tuple[Part, ...]:
        """All parts of the message in their order: content, reasoning, tool calls and opaque parts."""
        return in_order(
            self.order, {"reasoning": self.reasoning, "content": self.content, "tool_call": self.tool_calls}
        )

    @classmethod
    def system(cls, text: str) -> Message:
        """Return a message with instructions to the model."""
        return cls("system", text)

    @classmethod
    def user(cls, content: Content) -> Message:
        """Return a user's message: a str, or a sequence of str, `Text`, `Image`, `Audio` and `Document`."""
        return cls("user", content)

    @classmethod
    def assistant(cls, content: Parts | Answer = "", *, tool_calls: Iterable[ToolCall] = ()) -> Message:
        """Return a model's message: a str, a sequence of parts, or a `Response`, whose parts go back as they came.

        `tool_calls` stand after the content.
        """
        if isinstance(content, str):  # first, because it is the usual case
            return cls("assistant", content, tool_calls=tool_calls)
        if isinstance(content, Answer):
            return _assistant(content.parts, tool_calls)
        parts: Iterable[object] = content if isinstance(content, Sequence) else (content,)
        return _assistant(parts, tool_calls)

    @classmethod
    def tool(
        cls, content: Content, tool_call: str | ToolCall, *, name: str | None = None, is_error: bool = False
    ) -> Message:
        """Return a tool's result. `tool_call` is the `ToolCall` that it answers, or its id (then pass `name` too).

        `is_error` says that the tool failed, and that the content is its error. Services without a field for it get
        the content alone.
        """
        if isinstance(tool_call, ToolCall):
            return cls("tool", content, tool_call_id=tool_call.id, name=name or tool_call.name, is_error=is_error)
        if not isinstance(tool_call, str):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers may be untyped
            raise TypeError(
                f"a tool's result: expected the ToolCall that it answers, or its id, got {kind_of(tool_call)}"
            )
        return cls("tool", content, tool_call_id=tool_call, name=name, is_error=is_error)

    def to_dict(self) -> dict[str, Any]:
        """Return the message as JSON values, which lose nothing: `from_dict` makes the same message of them.

        Text alone is `{"role": "user", "content": "hi"}`. Other content is a list of parts, with bytes as base64.
        """
        from fluxibly._dicts import is_plain, part_to_dict

        parts = self.parts
        fields: dict[str, Any] = {
            "role": self.role,
            "content": self.text if is_plain(parts) else [part_to_dict(part) for part in parts],
        }
        for name in ("tool_call_id", "name"):
            if getattr(self, name) is not None:
                fields[name] = getattr(self, name)
        return fields | ({"is_error": True} if self.is_error else {})

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Message:
        """Return the message of a mapping: one of `to_dict`, or a message in the shape of OpenAI's chat completions.

        Raises:
            ValueError: a field is missing, unknown or of the wrong type. The error names its path.
        """
        return _from_dict(fields, "")


_ROLES = {**{role: role for role in ROLES}, "developer": "system", "function": "tool"}
"""The role of a message, by its name in a mapping."""


def _from_dict(given: object, path: str) -> Message:
    from fluxibly._dicts import Reader, call_id_of, parts_of_message

    fields = Reader(given, path or "a message")
    name: object = fields.value("role")
    if not isinstance(name, str) or name not in _ROLES:
        got = "nothing" if name is None else repr(name) if isinstance(name, str) else kind_of(name)
        raise ValueError(f"{fields.at('role')}: expected one of {', '.join(_ROLES)}, got {got}")
    role, speaker, call_id = _ROLES[name], fields.text("name"), fields.text("tool_call_id")
    if name == "function" and call_id is None:
        call_id = call_id_of(speaker or "")
    is_error = fields.take("is_error", bool, "true or false", default=False)
    parts = parts_of_message(fields)
    fields.done(("role", "content", "name", "tool_call_id", "tool_calls", "is_error"))
    if role == "assistant":
        message = Message.assistant(parts)
    else:
        content = [part for part in parts if isinstance(part, (Text, Media))]
        if len(content) < len(parts):
            raise ValueError(f"{fields.path}: expected reasoning, tool calls and opaque parts only from an assistant")
        message = Message(cast("Role", role), content)
    return attrs.evolve(message, name=speaker, tool_call_id=call_id, is_error=is_error)


def _assistant(parts: Iterable[object], tool_calls: Iterable[ToolCall]) -> Message:
    given = [Text(part) if isinstance(part, str) else part for part in (*parts, *tool_calls)]
    order: list[Place] = [
        "content" if isinstance(part, (Text, Media)) else place_of(part, "an assistant's content") for part in given
    ]
    return Message(
        "assistant",
        [part for part in given if isinstance(part, (Text, Media))],
        tool_calls=[part for part in given if isinstance(part, ToolCall)],
        reasoning=[part for part in given if isinstance(part, Reasoning)],
        order=order_unless_usual(order, USUAL),
    )


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


Prompt: TypeAlias = "str | Message | Mapping[str, Any] | Sequence[Message | Mapping[str, Any]]"
"""A text of the user, a message, or the messages of a conversation. A message may be a mapping, in OpenAI's shape too."""


def to_messages(prompt: object) -> tuple[Message, ...]:
    """Return the messages of a prompt: a str, a `Message`, a message as a mapping, or a sequence of messages.

    Raises:
        TypeError: the prompt is of another type.
        BadPrompt: the prompt is empty.
    """
    if isinstance(prompt, str):
        if not prompt:
            raise BadPrompt(_EMPTY_PROMPT)
        return (Message.user(prompt),)
    if isinstance(prompt, (Message, Mapping)):
        return to_messages([cast("object", prompt)])
    if not isinstance(prompt, Iterable) or isinstance(prompt, bytes):
        raise TypeError(f"the prompt: expected a str or a sequence of Message, got {kind_of(prompt)}")  # pyright: ignore[reportUnknownArgumentType]
    given: tuple[object, ...] = tuple(prompt)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    if any(isinstance(message, Mapping) for message in given):
        given = tuple(_of_mapping(message, number) for number, message in enumerate(given))
    for message in given:
        if not isinstance(message, Message):
            got = kind_of(message)
            hint = "; write Message.user(…)" if isinstance(message, (str, tuple, list)) else ""
            raise TypeError(f"the prompt: expected a str or a sequence of Message, got {got} in the sequence{hint}")
    if not given:
        raise BadPrompt("the prompt has no messages; give a non-empty string or a sequence of Message")
    messages = cast("tuple[Message, ...]", given)
    last = messages[-1]
    if not _says_something(last) and (last.role == "user" or not any(map(_says_something, messages))):
        raise BadPrompt(_EMPTY_PROMPT)
    return messages


def _of_mapping(message: object, number: int) -> object:
    """Return a message that was given as a mapping. Other values are left to the caller."""
    return _from_dict(message, f"messages[{number}]") if is_mapping(message) else message


_EMPTY_PROMPT = "the prompt is empty; give a non-empty string or a sequence of Message"


def _says_something(message: Message) -> bool:
    """Whether a message has content. A tool's result may be empty, and an assistant may only call tools."""
    for part in message.content:
        if not isinstance(part, Text) or part.text:
            return True
    return bool(message.tool_calls or message.reasoning or message.order or message.role == "tool")


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
        hint = "; the middleware Tools([…]) takes functions" if callable(tool) else ""
        raise TypeError(
            f"a tool: expected a Tool or a mapping with name, description and parameters, got {kind_of(tool)}{hint}"
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
