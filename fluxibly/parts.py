"""The parts of messages and answers: text, media, reasoning, tool calls, and what only one dialect knows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, cast

import attrs

from fluxibly._checks import is_mapping, kind_of, problem
from fluxibly._values import Value

if TYPE_CHECKING:
    import os
    from typing import Self


table = cast("Callable[[], dict[str, Any]]", dict)
"""The factory of empty mappings. `dict[str, Any]` would be called a good deal more slowly."""


@attrs.frozen(repr=False, eq=False)
class Text(Value):
    """A piece of text. `raw` holds the fields that a service sent beside an answer's text (citations, a signature)."""

    text: str
    raw: Mapping[str, Any] | None = attrs.field(default=None, kw_only=True)


@attrs.frozen(kw_only=True, repr=False, eq=False)
class Media(Value):
    """The base of `Image`, `Audio` and `Document`: either a `url`, or the bytes `data` with their `media_type`.

    The URL is an http, https or data URL, or one that the service knows (Gemini's `gs:`). `raw` holds the fields that
    a service sent beside a part of its answer.
    """

    url: str | None = None
    data: bytes | None = attrs.field(default=None, repr=lambda data: "None" if data is None else f"<{len(data)} bytes>")
    media_type: str | None = None
    raw: Mapping[str, Any] | None = None

    def __attrs_post_init__(self) -> None:
        if type(self) is Media:
            raise TypeError("a Media: use Image, Audio or Document")
        what = _article(type(self).__name__)
        if (self.url is None) == (self.data is None):
            got = "neither" if self.url is None else "both"
            raise ValueError(f"{what}: expected either url= or data=, got {got}")
        if self.url is not None:
            if not isinstance(self.url, str):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers may be untyped
                raise TypeError(f"{what}'s url: expected a str, got {kind_of(self.url)}")
            scheme, colon, _ = self.url.partition(":")
            # A single letter is a drive of Windows.
            if not colon or len(scheme) < 2 or not scheme.isascii() or not scheme.isalnum() or scheme.lower() == "file":
                got = "a path" if self.url else "an empty str"
                raise ValueError(
                    f"{what}'s url: expected an http, https or data URL, got {got}; "
                    f"read a file with {type(self).__name__}.from_file(path)"
                )
        if self.data is None:
            return
        if not isinstance(self.data, (bytes, bytearray, memoryview)):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers may be untyped
            raise TypeError(f"{what}'s data: expected bytes, got {kind_of(self.data)}; decode base64 first")
        if self.media_type is None:
            raise ValueError(f"{what} with data= needs media_type=, e.g. {_EXAMPLES[type(self).__name__]!r}")
        if not isinstance(self.media_type, str) or "/" not in self.media_type:  # pyright: ignore[reportUnnecessaryIsInstance]  # callers may be untyped
            expected = f"a media type, such as {_EXAMPLES[type(self).__name__]!r}"
            raise ValueError(problem(f"{what}'s media_type", expected, self.media_type))

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], *, media_type: str | None = None, **fields: Any) -> Self:
        """Read a file. The media type follows from the name's suffix, unless it is given.

        Raises:
            ValueError: the suffix is unknown, or belongs to another kind of file.
            OSError: the file cannot be read.
        """
        from mimetypes import guess_type
        from pathlib import Path

        kind, path = cls.__name__, Path(path)
        found = guess_type(path.name)[0] if media_type is None else media_type
        if found is None:
            raise ValueError(f"{kind}.from_file: cannot tell the media type of {path.name!r}; pass media_type=")
        found = _MEDIA_TYPES.get(found, found)
        right = _KINDS.get(found.partition("/")[0], "Document")
        if media_type is None and right != kind:
            raise ValueError(f"{kind}.from_file: expected {_article(kind.lower())}, got {found}; use {right}.from_file")
        if kind == "Document":
            fields.setdefault("name", path.name)
        return cls(data=path.read_bytes(), media_type=found, **fields)


_EXAMPLES = {"Image": "image/png", "Audio": "audio/wav", "Document": "application/pdf"}
_KINDS = {"image": "Image", "audio": "Audio"}
_MEDIA_TYPES = {"audio/x-wav": "audio/wav", "audio/x-flac": "audio/flac"}
"""The registered names of types that some platforms name otherwise."""


def _article(name: str) -> str:
    return f"an {name}" if name[0] in "AEIOUaeiou" else f"a {name}"


@attrs.frozen(kw_only=True, repr=False, eq=False)
class Image(Media):
    """An image: either a `url` (http, https or data) or the bytes `data` with their `media_type`.

    `detail` is OpenAI's hint ("low", "high", "auto"). Other providers ignore it.
    """

    detail: str | None = None


@attrs.frozen(kw_only=True, repr=False, eq=False)
class Audio(Media):
    """Speech or another sound: either a `url` or the bytes `data` with their `media_type` ("audio/wav", "audio/mpeg").

    `transcript` is what is said, as the service that made the audio wrote it down.
    """

    transcript: str | None = None


@attrs.frozen(kw_only=True, repr=False, eq=False)
class Document(Media):
    """A file to read, such as a PDF: either a `url` or the bytes `data` with their `media_type` ("application/pdf").

    `name` is the file's name, which some services show to the model.
    """

    name: str | None = None


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
    """Return a tool call's arguments as a dict, and the error in the text or None. With an error the dict is empty.

    Models write no text, or `null`, for no arguments.
    """
    import json  # late, to keep `import fluxibly` fast

    if not raw.strip():
        return {}, None
    try:
        value: Any = json.loads(raw)
    except ValueError as error:
        return {}, f"the arguments are not JSON: {error}"
    except RecursionError:
        return {}, "the arguments are nested too deeply"
    if value is None:
        return {}, None
    if not is_mapping(value):
        return {}, f"the arguments: expected a JSON object, got {kind_of(value)}"
    return dict(value), None


def _check_raw(raw: object, what: str) -> None:
    if not is_mapping(raw):
        raise TypeError(f"{what}'s raw: expected a mapping, got {kind_of(raw)}")


@attrs.frozen(repr=False, eq=False)
class ToolCall(Value):
    """A model's request to call a tool.

    Pass `arguments` or `raw_arguments`, and the other is derived from it. If the model's text is not a JSON object,
    `arguments` is empty, `raw_arguments` holds the text, and `error` says what is wrong with the text. A custom tool
    of OpenAI's takes free text: `raw["type"]` is then "custom", and the text is `raw_arguments`.
    """

    id: str
    name: str
    arguments: Mapping[str, Any] = attrs.field(factory=table)
    raw_arguments: str = ""
    signature: str | None = attrs.field(default=None, kw_only=True)
    """A proof that must be sent back with the call (Gemini's thought signature)."""
    raw: Mapping[str, Any] | None = attrs.field(default=None, kw_only=True, eq=False)
    """Other fields that the service sent with the call, and wants back. They do not count in comparisons."""
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
        if self.raw is not None:
            _check_raw(self.raw, "a ToolCall")
            if self.raw.get("type") == "custom":
                return
        if self.raw_arguments and not self.arguments:
            arguments, error = parse_arguments(self.raw_arguments)
            object.__setattr__(self, "arguments", arguments)
            object.__setattr__(self, "error", error)
        elif not self.raw_arguments:
            import json

            object.__setattr__(self, "raw_arguments", json.dumps(dict(self.arguments), ensure_ascii=False))


@attrs.frozen(repr=False, eq=False)
class Opaque(Value):
    """A part that only the dialect which made it can read, such as a search that the service did on its own.

    It goes back to that dialect unchanged; others leave it out. `raw` is the part as the service sent it.
    """

    dialect: str
    """The dialect: "anthropic", "gemini", "openai-responses", …"""
    raw: Mapping[str, Any]

    def __attrs_post_init__(self) -> None:
        _check_raw(self.raw, "an Opaque")

    @property
    def type(self) -> str:
        """The service's name for what the part is, such as "web_search_call"; "" if it has none."""
        name = self.raw.get("type")
        return name if isinstance(name, str) else ""


ContentPart: TypeAlias = Text | Media
"""A part of any message."""
Part: TypeAlias = Text | Media | Reasoning | ToolCall | Opaque
"""A part of an answer, or of an assistant's message."""


# The order of parts. Messages and responses keep their parts by kind, because most have only one, and users ask for
# the text or the tool calls. An order says where each part stands, if it is not where parts of its kind usually stand.


class Span(NamedTuple):
    """The place of a text in an answer's order: its length in characters, and the fields beside it (`Text.raw`)."""

    length: int
    raw: Mapping[str, Any] | None = None


Kind: TypeAlias = Literal["reasoning", "media", "text", "content", "tool_call"]
Place: TypeAlias = Kind | Span | Opaque
Order: TypeAlias = tuple[Place, ...]


def place_of(part: object, what: str) -> Place:
    """Return the place of a part in an answer's order.

    Raises:
        TypeError: the value is not a part. `what` begins the message.
    """
    if isinstance(part, Text):
        return Span(len(part.text), part.raw)
    if isinstance(part, Media):
        return "media"
    if isinstance(part, Reasoning):
        return "reasoning"
    if isinstance(part, ToolCall):
        return "tool_call"
    if isinstance(part, Opaque):
        return part
    raise TypeError(
        f"{what}: expected Text, Image, Audio, Document, Reasoning, ToolCall or Opaque, got {kind_of(part)}"
    )


def kind_of_place(place: Kind | Span) -> Kind:
    """Return the kind of the part that belongs to a place."""
    return "text" if isinstance(place, Span) else place


def in_order(order: Order | None, parts: Mapping[Kind, Sequence[Part]]) -> tuple[Part, ...]:
    """Return parts in their order.

    `parts` has the parts of each kind, and the kinds as they usually stand. If the parts of a kind have become more or
    fewer than their places, because a middleware changed them, they stand together at the first of the places.
    """
    left = {kind: list(of_kind) for kind, of_kind in parts.items()}
    if order is None:
        return tuple([part for of_kind in left.values() for part in of_kind])
    places = Counter([kind_of_place(place) for place in order if not isinstance(place, Opaque)])
    changed = {kind for kind, of_kind in left.items() if len(of_kind) != places[kind]}
    found: list[Part] = left.pop("reasoning") if not places["reasoning"] else []
    for place in order:
        if isinstance(place, Opaque):
            found.append(place)
            continue
        kind = kind_of_place(place)
        waiting = left[kind]
        count = len(waiting) if kind in changed else 1
        found += waiting[:count]
        del waiting[:count]
    return (*found, *[part for of_kind in left.values() for part in of_kind])


def opaque_parts(order: Order | None) -> tuple[Opaque, ...]:
    """Return the opaque parts, which an order has in their places."""
    return tuple([place for place in order or () if isinstance(place, Opaque)])


def split_text(text: str, order: Order | None) -> list[Text]:
    """Return an answer's text as the texts that its order has places for; as one text if it was changed since."""
    spans = [place for place in order or () if isinstance(place, Span)]
    if not spans or sum([span.length for span in spans]) != len(text):
        return [Text(text)] if text else []
    texts: list[Text] = []
    at = 0
    for span in spans:
        texts.append(Text(text[at : at + span.length], raw=span.raw))
        at += span.length
    return texts


def order_unless_usual(order: Sequence[Place], usual: Sequence[Kind]) -> Order | None:
    """Return an order; None if it is what an answer has without one."""
    ranks: list[int] = []
    texts = 0
    for place in order:
        if isinstance(place, Opaque) or (isinstance(place, Span) and place.raw is not None):
            return tuple(order)
        kind = kind_of_place(place)
        texts += kind == "text"
        ranks.append(usual.index(kind))
    return None if texts < 2 and ranks == sorted(ranks) else tuple(order)
