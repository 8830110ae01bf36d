"""Parts and messages as JSON values, and back. OpenAI's chat shape, which everybody has, is read too.

Each reader takes the `path` of the value in what the caller gave, and its errors begin with the path.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from binascii import Error as NotBase64
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, TypeVar, cast

import attrs

from fluxibly._checks import did_you_mean, is_list, is_mapping, is_number, kind_of, problem
from fluxibly.parts import Audio, Document, Image, Opaque, Part, Reasoning, Text, ToolCall

_T = TypeVar("_T")

TYPES: Final[Mapping[str, type[Any]]] = {
    "text": Text,
    "image": Image,
    "audio": Audio,
    "document": Document,
    "reasoning": Reasoning,
    "tool_call": ToolCall,
    "opaque": Opaque,
}
"""The parts, by the name of their type."""
_NAMES: Final[Mapping[type[Any], str]] = {kind: name for name, kind in TYPES.items()}


# Writing


def is_plain(parts: Sequence[Part]) -> bool:
    """Whether parts are nothing but one text without fields beside it, or nothing."""
    return len(parts) < 2 and all(isinstance(part, Text) and part.raw is None for part in parts)


def part_to_dict(part: Part) -> dict[str, Any]:
    """Return a part as JSON values, without the fields that it does not set."""
    fields: dict[str, Any] = {"type": _NAMES[type(part)]}
    for field in attrs.fields(type(part)):
        value: object = getattr(part, field.name)
        if value is None or not field.init or value == field.default:
            continue
        if field.name == "data":
            value = b64encode(cast("bytes", value)).decode("ascii")
        fields[field.name] = value
    if isinstance(part, ToolCall):  # the arguments follow from the text, which may also be no JSON
        fields["arguments"] = fields.pop("raw_arguments", "")
    return cast("dict[str, Any]", plain(fields, part))


def plain(value: object, owner: object) -> object:
    """Return JSON values as dicts and lists of their own.

    Raises:
        TypeError: there is a value that JSON does not have, or the values are nested too deeply.
    """
    try:
        return _plain(value)
    except RecursionError:
        problem = "they are nested too deeply"
    except TypeError as error:
        problem = str(error)
    raise TypeError(f"{type(owner).__name__}.to_dict: expected JSON values: {problem}")


def _plain(value: object) -> object:
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if is_mapping(value):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in cast("Iterable[object]", value)]
    raise TypeError(f"got {kind_of(value)}")


# Reading


def _mistaken(path: str, expected: str, value: object) -> str:
    """Word what is wrong with a field. A text is not quoted: it may be the content of a conversation."""
    return f"{path}: expected {expected}, got a str" if isinstance(value, str) else problem(path, expected, value)


class Reader:
    """The fields of a mapping, taken one by one. `done` refuses those that nobody took."""

    def __init__(self, fields: object, path: str) -> None:
        if not is_mapping(fields):
            raise ValueError(_mistaken(path, "a mapping", fields))
        self.path = path
        self._left = dict(fields)

    def take(self, name: str, kind: type[Any] | tuple[type[Any], ...], expected: str, default: Any = None) -> Any:
        """Return a field, or the default if it is missing or null.

        Raises:
            ValueError: the field is of another type.
        """
        value = self._left.pop(name, None)
        if value is None:
            return default
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            raise ValueError(_mistaken(self.at(name), expected, value))
        return value

    def text(self, name: str, default: str | None = None) -> Any:
        """Return a field that is a str."""
        return self.take(name, str, "a str", default)

    def needed(self, name: str) -> str:
        """Return a field that is a str, and must be there."""
        if self._left.get(name) is None:
            raise ValueError(f"{self.at(name)}: expected a str, got nothing")
        return cast("str", self.text(name))

    def table(self, name: str) -> dict[str, Any] | None:
        """Return a field that is a mapping."""
        found = self.take(name, Mapping, "a mapping")
        return None if found is None else dict(found)

    def items(self, name: str) -> list[Any]:
        """Return a field that is a list."""
        found: list[Any] = self.take(name, list, "a list", [])
        return found

    def value(self, name: str) -> Any:
        """Return a field of any type."""
        return self._left.pop(name, None)

    def rest(self) -> dict[str, Any]:
        """Return all fields that are left."""
        left, self._left = self._left, {}
        return left

    def at(self, name: str) -> str:
        """Return the path of a field."""
        return f"{self.path}.{name}" if self.path else name

    def done(self, known: Iterable[str]) -> None:
        """Refuse fields that are left and say something.

        Raises:
            ValueError: there are such fields. The error gives the nearest of the `known` names.
        """
        left = [name for name, value in self._left.items() if value not in (None, "", [], {})]
        if left:
            raise ValueError(f"{self.at(left[0])}: unknown field{did_you_mean(str(left[0]), known)}")


def part_from_dict(value: object, path: str) -> Part:
    """Return the part of JSON values, in the form of `part_to_dict` or of OpenAI.

    Raises:
        ValueError: the values are not a part. The error names its path.
    """
    if isinstance(value, str):
        return Text(value)
    fields = Reader(value, path)
    name = fields.needed("type")
    read = _READERS.get(name)
    if read is not None:
        part = read(fields)
        fields.done(())
        return part
    kind = TYPES.get(name)
    if kind is None:
        known = ", ".join([*TYPES, *_READERS])
        raise ValueError(f"{path}.type: expected one of {known}, got {name!r}")
    return _part(fields, kind)


def _made(path: str, kind: Callable[..., _T], *args: Any, **fields: Any) -> _T:
    """Return an object of some fields. The path begins the message of its error."""
    try:
        return kind(*args, **fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _part(fields: Reader, kind: type[Any]) -> Part:
    found: dict[str, Any] = {}
    known = [field for field in attrs.fields(kind) if field.init]
    for field in known:
        if field.name == "raw":
            found["raw"] = fields.table("raw")
        elif field.name == "data":
            found["data"] = _bytes(fields.text("data"), fields.at("data"))
        elif field.name == "arguments":
            given = fields.value("arguments")
            found["raw_arguments" if isinstance(given, str) else "arguments"] = {} if given is None else given
        elif field.name in ("text", "id", "name", "dialect") and field.default is attrs.NOTHING:
            found[field.name] = fields.needed(field.name)
        elif field.name != "raw_arguments":
            found[field.name] = fields.text(field.name, "" if field.default == "" else None)
    fields.done([field.name for field in known])
    if kind is Opaque and found["raw"] is None:
        raise ValueError(f"{fields.at('raw')}: expected a mapping, got nothing")
    return cast("Part", _made(fields.path, kind, **found))


def _bytes(text: str | None, path: str) -> bytes | None:
    if text is None:
        return None
    try:
        return b64decode(text, validate=True)
    except NotBase64:
        raise ValueError(f"{path}: expected base64, got other text") from None


# OpenAI's shapes


def _image_url(fields: Reader) -> Part:
    given = fields.value("image_url")
    image = Reader({"url": given} if isinstance(given, str) else given, fields.at("image_url"))
    detail = image.text("detail") or fields.text("detail")
    found = _made(fields.path, Image, url=image.needed("url"), detail=detail)
    image.done(("url", "detail"))
    return found


def _thinking(fields: Reader) -> Part:
    """Return a block of thinking, as Mistral and Anthropic send it."""
    raw = {"type": "thinking", **fields.rest()}
    thinking = raw.get("thinking")
    pieces = [
        piece.get("text") if is_mapping(piece) else piece for piece in (thinking if is_list(thinking) else [thinking])
    ]
    signature = raw.get("signature")
    return Reasoning(
        text="".join([piece for piece in pieces if isinstance(piece, str)]),
        signature=signature if isinstance(signature, str) and signature else None,
        raw=raw,
    )


def _input_audio(fields: Reader) -> Part:
    audio = Reader(fields.value("input_audio"), fields.at("input_audio"))
    kind = audio.text("format", "wav")
    data = _bytes(audio.needed("data"), audio.at("data"))
    return _made(fields.path, Audio, data=data, media_type=_AUDIO.get(kind, f"audio/{kind}"))


_AUDIO: Final = {"mp3": "audio/mpeg"}


def _file(fields: Reader) -> Part:
    file = Reader(fields.value("file"), fields.at("file"))
    url = file.text("file_data")
    if url is None:
        raise ValueError(f"{file.at('file_data')}: expected the file's content as a data URL, got nothing")
    return _made(fields.path, Document, url=url, name=file.text("filename"))


_READERS: Final[Mapping[str, Callable[[Reader], Part]]] = {
    "image_url": _image_url,
    "input_image": _image_url,
    "input_text": lambda fields: Text(fields.needed("text")),
    "output_text": lambda fields: Text(fields.needed("text")),
    "refusal": lambda fields: Text(fields.needed("refusal"), raw={"type": "refusal"}),
    "thinking": _thinking,
    "input_audio": _input_audio,
    "file": _file,
}


def parts_of_message(fields: Reader) -> list[Part]:
    """Return the parts of a message: its `content`, and what OpenAI's shape has beside it.

    Raises:
        ValueError: a field is of the wrong type, or its value is not a part. The error names its path.
    """
    thoughts = {name: fields.text(name) for name in ("reasoning_content", "reasoning")}
    parts: list[Part] = [Reasoning(text=text, raw={name: text}) for name, text in thoughts.items() if text]
    parts += [_detail(detail, fields.at("reasoning_details")) for detail in fields.items("reasoning_details")]
    content = fields.value("content")
    if isinstance(content, str):
        parts += [Text(content)] if content else []
    elif is_list(content):
        parts += [part_from_dict(part, f"{fields.at('content')}[{number}]") for number, part in enumerate(content)]
    elif content is not None:
        raise ValueError(_mistaken(fields.at("content"), "a str or a list of parts", content))
    if refusal := fields.text("refusal"):
        parts.append(Text(refusal, raw={"type": "refusal"}))
    if extra := fields.table("extra_content"):
        _beside_text(parts, {"extra_content": extra})
    parts += [_generated(image, f"{fields.at('images')}[{n}]") for n, image in enumerate(fields.items("images"))]
    if audio := fields.table("audio"):
        parts.append(_said(Reader(audio, fields.at("audio"))))
    for number, call in enumerate(fields.items("tool_calls")):
        parts.append(_tool_call(Reader(call, f"{fields.at('tool_calls')}[{number}]")))
    if function := fields.table("function_call"):
        call = Reader(function, fields.at("function_call"))
        name = call.needed("name")
        parts.append(_call(call, call_id_of(name), name, call.value("arguments"), {"type": "function_call"}))
    fields.value("annotations")  # OpenAI's client dumps them, and no service takes them back
    return parts


def _beside_text(parts: list[Part], raw: dict[str, Any]) -> None:
    """Put fields beside the last part if it is a text, else beside an empty text."""
    last = parts.pop() if parts and isinstance(parts[-1], Text) else Text("")
    parts.append(attrs.evolve(last, raw={**(last.raw or {}), **raw}))


def _generated(value: object, path: str) -> Part:
    """Return an image that a model made, as OpenRouter sends it."""
    fields = Reader(value, path)
    image = _image_url(fields)
    return attrs.evolve(image, raw={"images": fields.rest()})


def call_id_of(function: str) -> str:
    """Return the id of a call in OpenAI's older form (`function_call`), which has only the function's name."""
    return f"call_{function}"


def _detail(value: object, path: str) -> Reasoning:
    detail = Reader(value, path)
    raw = dict(cast("Mapping[str, Any]", value))
    text = detail.text("text") or detail.text("summary") or ""
    return Reasoning(text=text, signature=detail.text("signature"), raw=raw)


def _said(audio: Reader) -> Audio:
    data = _bytes(audio.text("data", ""), audio.at("data"))
    raw = {name: value for name in ("id", "expires_at") if (value := audio.value(name)) is not None}
    return Audio(data=data, media_type="audio/pcm", transcript=audio.text("transcript"), raw=raw)


def _tool_call(call: Reader) -> ToolCall:
    kind = call.text("type", "function")
    inner = Reader(call.value(kind), call.at(kind))
    raw: dict[str, Any] = {"type": "custom"} if kind == "custom" else {}
    if (extra := call.table("extra_content")) is not None:
        raw["extra_content"] = extra
    arguments = inner.value("input" if kind == "custom" else "arguments")
    return _call(call, call.needed("id"), inner.needed("name"), arguments, raw)


def _call(reader: Reader, call_id: str, name: str, arguments: Any, raw: dict[str, Any]) -> ToolCall:
    given: dict[str, Any] = (
        {"raw_arguments": arguments} if isinstance(arguments, str) else {"arguments": arguments or {}}
    )
    return _made(reader.path, ToolCall, call_id, name, raw=raw or None, **given)


def numbers(value: object, kind: type[_T], path: str) -> _T:
    """Return an object of numbers, such as `Usage`.

    Raises:
        ValueError: a field is unknown, or not a number.
    """
    reader = Reader(value, path)
    found: dict[str, Any] = {}
    names = [field.name for field in attrs.fields(cast("Any", kind)) if field.init]
    for name in names:
        number = reader.value(name)
        if number is not None and not is_number(number):
            raise ValueError(problem(reader.at(name), "a number", number))
        if number is not None:
            found[name] = number
    reader.done(names)
    return kind(**found)
