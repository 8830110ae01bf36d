"""What is not written to the file of turns: keys, and large media."""

from __future__ import annotations

import os
import re
from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import attrs

from fluxibly._checks import is_list, is_mapping, is_secret, secrets_in, secrets_in_query
from fluxibly._masking import MASK, forms_of
from fluxibly.middleware._patterns import Pattern, to_patterns

if TYPE_CHECKING:
    from fluxibly.config import LLMConfig

LARGEST = 1_000_000
"""The most bytes of an image, a recording or a document that are kept."""
_OTHER_VARIABLES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
"""Variables with secrets beside those that the frameworks name."""
_MEDIA = ("image", "audio", "document")
_BASE64 = re.compile(r"[0-9A-Za-z+/_-]+=*+\s*")


@attrs.frozen
class Masking:
    """Replaces keys in JSON values by `***`: those that are known, and whatever looks like one."""

    _forms: tuple[str, ...]

    @classmethod
    def of(cls, config: LLMConfig) -> Masking:
        """Return the masking of the keys of a configuration and of this process's environment."""
        return cls(tuple(forms_of({*_secrets_of(config), *_secrets_of_environment()})))

    def text(self, text: str) -> str:
        """Return a text with its keys masked."""
        for form in self._forms:
            text = text.replace(form, MASK)
        for pattern in to_patterns(["key"]):
            if isinstance(pattern, Pattern):
                text = _without(text, pattern.find(text, 0, len(text), None))
        return text

    def value(self, value: Any) -> Any:
        """Return a JSON value with the keys in its texts masked, and with a note in place of large media.

        Texts in the bytes of media are masked too.
        """
        if isinstance(value, str):
            if value[:5].lower() == "data:":
                return self._url(value)
            return _note(value, "data") if _is_large_base64(value) else self.text(value)
        if is_list(value):
            return [self.value(each) for each in value]
        if not is_mapping(value):
            return value
        is_media = value.get("type") in _MEDIA
        if is_media and (note := _note_of_media(value)) is not None:
            return {"type": "text", "text": note}
        return {
            self.text(str(name)): self._base64(each)
            if is_media and name == "data" and isinstance(each, str)
            else self.value(each)
            for name, each in value.items()
        }

    def _url(self, url: str) -> str:
        """Return a data URL, masked."""
        head, comma, content = url.partition(",")
        if _is_large_base64(content):
            return _note(content, _media_type(url))
        return f"{self.text(head)}{comma}{self._base64(content) if head.endswith(';base64') else self.text(content)}"

    def _base64(self, text: str) -> str:
        try:
            data = b64decode(text, validate=True)
        except ValueError:
            return self.text(text)
        masked = self.text(data.decode(errors="surrogateescape")).encode(errors="surrogateescape")
        return text if masked == data else b64encode(masked).decode("ascii")


def _without(text: str, spans: Iterable[tuple[int, int]]) -> str:
    pieces: list[str] = []
    at = 0
    for start, end in spans:
        pieces += [text[at:start], MASK]
        at = end
    return "".join([*pieces, text[at:]])


def _note_of_media(part: Mapping[str, Any]) -> str | None:
    """Return the text that takes the place of media; None if they are small enough, or lie elsewhere."""
    url, data = part.get("url"), part.get("data")
    content = data if isinstance(data, str) else url if isinstance(url, str) and url[:5].lower() == "data:" else ""
    if len(content) * 3 // 4 <= LARGEST:
        return None
    return _note(content.rpartition(",")[2], str(part.get("media_type") or _media_type(content) or part["type"]))


def _note(content: str, kind: str) -> str:
    try:
        data = b64decode(content, validate=True)
    except ValueError:
        data = content.encode(errors="replace")
    return f"[{kind}, {len(data)} bytes, sha256 {sha256(data).hexdigest()}: too large to be logged]"


def _media_type(url: str) -> str:
    return url[5:].partition(",")[0].partition(";")[0] if url[:5].lower() == "data:" else ""


def _is_large_base64(text: str) -> bool:
    """Whether a text is the base64 of large content, as services send it in fields of their own."""
    return len(text) * 3 // 4 > LARGEST and _BASE64.fullmatch(text) is not None


def _secrets_of(config: LLMConfig) -> Iterator[str]:
    if config.fixed_key is not None:
        yield config.fixed_key
    yield from (value for name, value in config.headers.items() if is_secret(name))
    yield from secrets_in(config.additional_params)
    if config.api_base is not None:
        yield from secrets_in_query(config.api_base)
        yield urlsplit(config.api_base).password or ""


def _secrets_of_environment() -> Iterator[str]:
    from fluxibly.registry import frameworks

    names = {*_OTHER_VARIABLES}
    for framework in frameworks().values():
        names.update(name for name in (framework.env_var, *framework.instead) if name is not None and is_secret(name))
    yield from (value for name in names if (value := os.environ.get(name)))
