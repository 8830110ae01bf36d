"""Attachments: files and URLs as parts of a question."""

from __future__ import annotations

from mimetypes import guess_type
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from fluxibly.errors import ConfigError
from fluxibly.parts import Audio, Document, Image, Media, Text

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fluxibly.parts import ContentPart

_DOCUMENTS = ("application/pdf", "application/rtf", "application/msword", "application/epub+zip")
_OFFICE = ("application/vnd.", "video/")
_KINDS = "images, audio, PDFs, videos, office documents and text files"


def attachments_of(sources: Iterable[str]) -> list[ContentPart]:
    """Return the parts for files and URLs.

    Raises:
        ConfigError: a file does not exist or cannot be read, or what it has is not known.
    """
    return [_part(source) for source in sources]


def described(part: ContentPart) -> str:
    """Return how an attachment is named to the user who has added it."""
    if isinstance(part, Text):
        return f"{part.text.partition(':')[0]} ({len(part.text)} characters of text)"
    size = f", {len(part.data) / 1000:.0f} kB" if part.data is not None else ""
    return f"{type(part).__name__.lower()} ({part.media_type or part.url}{size})"


def _part(source: str) -> ContentPart:
    address = urlsplit(source)
    if len(address.scheme) > 1 and "://" in source and address.scheme != "file":  # one letter is a drive of Windows
        media_type = guess_type(address.path)[0]
        kind = None if media_type is None else _media(media_type)
        if kind is None:
            raise ConfigError(
                f"--attach {source}: cannot tell what it is from its name; expected an address that ends like .png, .mp3 or .pdf"
            )
        return kind(url=source, media_type=media_type)
    path = Path(source).expanduser()
    try:
        media_type = guess_type(path.name)[0]
        kind = None if media_type is None else _media(media_type)
        if kind is not None:
            return kind.from_file(path)
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"--attach {source}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"--attach {source}: {error}") from error
    text = _text(data)
    if text is None:
        raise ConfigError(f"--attach {source}: expected one of {_KINDS}, got another kind of file")
    return Text(f"{path.name}:\n\n{text}")


def _media(media_type: str) -> type[Media] | None:
    """Return the kind of part for a media type; None for text, and for what no model reads."""
    main = media_type.partition("/")[0]
    if main == "image" and media_type != "image/svg+xml":
        return Image
    if main == "audio":
        return Audio
    return Document if media_type in _DOCUMENTS or media_type.startswith(_OFFICE) else None


def _text(data: bytes) -> str | None:
    """Return the text that bytes are; None for other bytes."""
    if b"\0" in data:
        return None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
