"""Images, documents, videos and audio in the messages of Amazon Bedrock."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from fluxibly.providers.dialects.anthropic import TEXT_TYPES
from fluxibly.providers.dialects.encoding import bad_request, media_data
from fluxibly.providers.dialects.json_values import as_object, as_text
from fluxibly.types import Document, Image, Media, Request

NAME: Final = "Bedrock"
"""The service's name in messages."""

_IMAGES: Final[Mapping[str, str]] = {"image/jpg": "jpeg"} | {f"image/{f}": f for f in ("png", "jpeg", "gif", "webp")}
_OFFICE: Final = "application/vnd.openxmlformats-officedocument."
_DOCUMENTS: Final[Mapping[str, str]] = {
    "application/pdf": "pdf",
    "application/msword": "doc",
    "application/vnd.ms-excel": "xls",
    f"{_OFFICE}wordprocessingml.document": "docx",
    f"{_OFFICE}spreadsheetml.sheet": "xlsx",
    "text/csv": "csv",
    "text/html": "html",
    "text/markdown": "md",
    **dict.fromkeys(TEXT_TYPES, "txt"),
}
"""The service's names of document formats. Other text is "txt"."""
_VIDEOS: Final[Mapping[str, str]] = {
    "video/3gpp": "three_gp",
    "video/mp4": "mp4",
    "video/mpeg": "mpeg",
    "video/quicktime": "mov",
    "video/webm": "webm",
    "video/x-flv": "flv",
    "video/x-matroska": "mkv",
    "video/x-ms-wmv": "wmv",
}
_SOUNDS: Final[Mapping[str, str]] = {
    "audio/aac": "aac",
    "audio/flac": "flac",
    "audio/m4a": "m4a",
    "audio/mp3": "mp3",
    "audio/mp4": "m4a",
    "audio/mpeg": "mp3",
    "audio/ogg": "ogg",
    "audio/opus": "opus",
    "audio/wav": "wav",
    "audio/wave": "wav",
    "audio/webm": "webm",
    "audio/x-flac": "flac",
    "audio/x-m4a": "m4a",
    "audio/x-wav": "wav",
}
_FORMATS: Final[Mapping[str, Mapping[str, str]]] = {
    "image": _IMAGES,
    "document": _DOCUMENTS,
    "video": _VIDEOS,
    "audio": _SOUNDS,
}
"""The formats of each kind of block, by media type."""
_SUFFIXES: Final[Mapping[str, str]] = {"3gp": "three_gp", "htm": "html", "jpg": "jpeg", "mpg": "mpeg"}
"""The formats of files whose suffix is not the name of their format."""
_NOT_IN_NAME: Final = re.compile(r"[^a-zA-Z0-9()\[\]-]+")
"""The characters that the name of a document does not have, except for single spaces."""
_LONGEST_NAME: Final = 200
KINDS: Final = frozenset(_FORMATS)
"""The fields by which the `raw` of media is known to come from this dialect."""


class MediaBlocks:
    """The media of a request. The service wants each document to have a name, and each name only once."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._names: set[str] = set()

    def block(self, media: Media) -> dict[str, Any]:
        """Return the block of an image, a document, a video or audio."""
        found = media_data(media)
        if found is None and not (media.url or "").startswith("s3://"):
            raise bad_request(
                self._request, f"expected bytes, a data URL or an s3:// address of media for {NAME}, got another URL"
            )
        kind = (found[0] if found else media.media_type or "").partition(";")[0].strip().lower()
        name, form = self._format(media, kind)
        source = {"bytes": found[1]} if found else {"s3Location": {"uri": media.url}}
        fields: dict[str, Any] = {**as_object((media.raw or {}).get(name)), "format": form, "source": source}
        if name == "document":
            fields["name"] = self._name(as_text(getattr(media, "name", None)), form)
        return {name: fields}

    def _format(self, media: Media, kind: str) -> tuple[str, str]:
        """Return the name of the block that holds media, and that of their format, by media type or else by suffix."""
        suffix = "" if kind else (media.url or "").rpartition(".")[2].lower()
        names = (
            ["document", "video"] if isinstance(media, Document) else ["image" if isinstance(media, Image) else "audio"]
        )
        for name in names:
            formats = _FORMATS[name]
            if kind in formats:
                return name, formats[kind]
            if (form := _SUFFIXES.get(suffix, suffix)) in formats.values():
                return name, form
        if kind.startswith("text/") and isinstance(media, Document):
            return "document", "txt"
        known = ", ".join(dict.fromkeys(form for name in names for form in _FORMATS[name].values()))
        raise bad_request(
            self._request, f"{names[0]}: expected one of {known} for {NAME}, got {kind or 'no media type'!r}"
        )

    def _name(self, given: str, form: str) -> str:
        """Return the name of a document as the service accepts it, without the suffix that repeats its format."""
        stem, _, suffix = given.rpartition(".")
        words = _NOT_IN_NAME.sub(" ", stem if suffix.lower() == form else given).split()
        plain = " ".join(words)[:_LONGEST_NAME].rstrip() or "document"
        name, number = plain, 1
        while name in self._names:
            number += 1
            end = f" ({number})"
            name = plain[: _LONGEST_NAME - len(end)].rstrip() + end
        self._names.add(name)
        return name
