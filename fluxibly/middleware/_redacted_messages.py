"""The redaction of messages, and of other values that hold texts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import attrs

from fluxibly._checks import is_mapping, kind_of
from fluxibly.types import Audio, ContentPart, Document, Media, Message, Reasoning, Text, ToolCall

T = TypeVar("T")
_M = TypeVar("_M", bound=Media)


class Changes(Protocol):
    """The changes of the texts of messages."""

    def text(self, text: str, /) -> str:
        """Return a text with its changes."""
        ...

    def arguments(self, call: ToolCall, /) -> str:
        """Return the arguments of a tool call, as text, with their changes."""
        ...

    def reasoning(self, part: Reasoning, /) -> Reasoning:
        """Return a block of reasoning with its changes."""
        ...


def texts_of(message: Message) -> list[str]:
    """Return all texts of a message that are searched."""
    texts = [part.text for part in message.content if isinstance(part, Text)]
    if len(texts) < len(message.content):
        texts += [part.transcript or "" for part in message.content if isinstance(part, Audio)]
        texts += [part.name or "" for part in message.content if isinstance(part, Document)]
    if message.tool_calls or message.reasoning:
        texts += [_unescaped(call) for call in message.tool_calls]
        texts += [part.text for part in message.reasoning]
    return texts if message.name is None else [*texts, message.name]


def changed_message(message: Message, changes: Changes) -> Message:
    """Return a message with its changes; the message itself, if there are none."""
    changed: dict[str, Any] = {}
    if message.reasoning:
        changed["reasoning"] = tuple([changes.reasoning(part) for part in message.reasoning])
    content = tuple([_changed_part(part, changes.text) for part in message.content])
    if message.tool_calls:
        changed["tool_calls"] = tuple([_changed_call(call, changes) for call in message.tool_calls])
    changed["content"] = content
    # A service may refuse a name with other characters in it, so the name of a speaker is left out.
    if message.name is not None and message.role != "tool" and changes.text(message.name) != message.name:
        changed["name"] = None
    differs = any(not _are_same(value, getattr(message, name)) for name, value in changed.items())
    return attrs.evolve(message, **changed) if differs else message


def _unescaped(call: ToolCall) -> str:
    """Return the arguments of a tool call, as text, in which every letter stands for itself."""
    raw = call.raw_arguments
    if "\\" not in raw or not call.arguments:
        return raw
    return json.dumps(dict(call.arguments), ensure_ascii=False, default=str)


def _are_same(new: Any, old: Any) -> bool:
    if isinstance(new, tuple):
        return all(one is other for one, other in zip(new, old, strict=True))  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    return new is old


def _changed_part(part: ContentPart, change: Callable[[str], str]) -> ContentPart:
    if isinstance(part, Text):
        text = change(part.text)
        return part if text == part.text else attrs.evolve(part, text=text)
    return changed_media(part, change)


def changed_media(media: _M, change: Callable[[str], str]) -> _M:
    """Return media with changes in their texts. Their bytes and addresses stay."""
    if isinstance(media, Audio) and media.transcript:
        transcript = change(media.transcript)
        return media if transcript == media.transcript else attrs.evolve(media, transcript=transcript)
    if isinstance(media, Document) and media.name:
        name = change(media.name)
        return media if name == media.name else attrs.evolve(media, name=name)
    return media


def _changed_call(call: ToolCall, changes: Changes) -> ToolCall:
    arguments = changes.arguments(call)
    if arguments == call.raw_arguments:
        return call
    return ToolCall(call.id, call.name, raw_arguments=arguments, signature=call.signature, raw=call.raw)


def changed_values(value: T, change: Callable[[str], str], *, strict: bool = False) -> T:
    """Return JSON values, and objects of attrs classes, with changes in the texts within; the value itself, if none changes.

    Args:
        strict: whether to refuse values of other types, which may have texts as well.

    Raises:
        TypeError: there is one.
    """
    return _Values(change, strict=strict).changed(value)  # type: ignore[no-any-return]  # of the same type


@attrs.frozen
class _Values:
    change: Callable[[str], str]
    strict: bool = attrs.field(kw_only=True)

    def changed(self, value: Any) -> Any:
        if isinstance(value, str):
            text = self.change(value)
            return value if text == value else text
        if value is None or isinstance(value, (bool, int, float)):
            return value
        if is_mapping(value):
            table = {key: self.changed(item) for key, item in value.items()}
            return value if all(table[key] is item for key, item in value.items()) else table
        if isinstance(value, (list, tuple)):
            return self._sequence(value)  # pyright: ignore[reportUnknownArgumentType]
        if attrs.has(kind := _kind(value)):
            return self._object(value, kind)
        if self.strict:
            raise TypeError(f"expected JSON values or an object of an attrs class, got {kind_of(value)}")
        return value

    def _sequence(self, value: list[Any] | tuple[Any, ...]) -> Any:
        items = [self.changed(item) for item in value]
        if all(one is other for one, other in zip(items, value, strict=True)):
            return value
        return items if isinstance(value, list) else tuple(items)

    def _object(self, value: Any, kind: type[Any]) -> Any:
        changed: dict[str, Any] = {}
        for field in attrs.fields(kind):
            old = getattr(value, field.name)
            new = self.changed(old)
            if new is not old and field.init:
                changed[field.alias or field.name] = new
        return attrs.evolve(value, **changed) if changed else value


def _kind(value: object) -> type[Any]:
    return type(value)


def without(details: Mapping[str, Any], names: tuple[str, ...]) -> Mapping[str, Any]:
    """Return details without some of their fields; the same details, if they have none of these."""
    return details if details.keys().isdisjoint(names) else {n: v for n, v in details.items() if n not in names}
