"""Masking of API keys and the user's content in messages that go to logs and spans."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator

from fluxibly._checks import is_list, is_mapping
from fluxibly.errors import ResponseInvalid, StreamInterrupted, root_cause
from fluxibly.messages import Message
from fluxibly.parts import Audio, Media, Text, opaque_parts
from fluxibly.types import Request

MASK = "***"
CUT = "[…]"
SHORTEST = 4
"""The minimum length of a secret key, in characters. A shorter key is a dummy for a server that needs no key, and may
be part of a word."""
RUN = 12
"""The length of a run, in characters, from which it is masked if a message shares it with a request's texts."""
CLOSER_LOOK = 200_000_000
"""The number of characters that may be searched to mask a message (about 0.1 s)."""
LONGEST = 2_000
"""The maximum length of a message, in characters. The rest is cut off."""
_SCHEME = re.compile(r"^\s*(?:bearer|basic|token|key|api-?key)\s+", re.IGNORECASE)
"""The scheme at the start of an `Authorization` header. A server may quote the token after it alone."""


def mask_secrets(text: str, secrets: Iterable[str]) -> str:
    """Return `text` with each secret replaced, even if it is escaped as in JSON, Python or a URL.

    Of an `Authorization` header such as `Bearer …`, the token alone is replaced too.
    """
    for form in forms_of(secrets):
        text = text.replace(form, MASK)
    return text


def forms_of(secrets: Iterable[str]) -> list[str]:
    """Return all that `mask_secrets` replaces, in order."""
    parts = {part for secret in secrets for part in (secret, _SCHEME.sub("", secret, count=1))}
    forms = {form for part in parts if len(part.strip()) >= SHORTEST for form in _written(part)}
    return sorted(forms, key=len, reverse=True)  # a form may contain another form


def _written(secret: str) -> Iterable[str]:
    from urllib.parse import quote

    for form in (secret, secret.strip()):
        yield form
        yield json.dumps(form)[1:-1]
        yield json.dumps(form, ensure_ascii=False)[1:-1]
        yield repr(form)[1:-1]
        raw = form.encode(errors="surrogatepass")
        yield repr(raw)[2:-1]
        yield quote(raw, safe="")


def error_message(error: BaseException, requests: Iterable[Request]) -> str:
    """Return an error's message without its quotes from these requests and from the answer."""
    cause = root_cause(error)
    text = as_text(cause)
    answers = [each.partial for each in (error, cause) if isinstance(each, StreamInterrupted)]
    if isinstance(cause, ResponseInvalid):
        answers.append(cause.response)
    quoted = [Message.assistant(answer) for answer in answers]
    for request in requests:
        text = mask_request(text, request, quoted)
    return text.encode(
        errors="backslashreplace"
    ).decode()  # exporters would lose the batch over half of a surrogate pair


def as_text(error: BaseException) -> str:
    """Return `str(error)`, or an empty str if the `__str__` of a user's exception fails."""
    try:
        return str(error)
    except Exception:  # noqa: BLE001  # a user's `__str__` may raise anything
        return ""


def mask_request(text: str, request: Request, quoted: Iterable[Message] = ()) -> str:
    """Return `text` with every run of 12 characters or more replaced that it shares with the request's texts.

    The request's texts are the texts of its messages, of the messages that the last attempt sent (middleware may have
    added some) and of the `quoted` messages. A `text` of over 2,000 characters is first cut to that length.
    """
    if len(text) > LONGEST:
        text = text[:LONGEST] + "…"
    if len(text) < RUN:
        return text
    places = _places(text)
    spans: list[tuple[int, int]] = []
    messages = {id(message): message for message in (*request.messages, *request.call.sent_messages, *quoted)}
    for content in _contents(messages.values()):
        spans += _shared(text, content, places)
    return _without(text, spans)


def request_of_texts(value: object) -> Request:
    """Return a request with all texts of a JSON value, by which messages about the value are masked. It is never sent."""
    texts = [text for text in _strings(value) if len(text) >= RUN]
    return Request(model="-", messages=tuple(map(Message.user, ("-", *texts))))


def _contents(messages: Iterable[Message]) -> Iterable[str]:
    """Yield the texts that a server could echo, as they are and as escaped by JSON and Python."""
    for message in messages:
        texts = [part.text for part in message.content if isinstance(part, Text)]
        urls = [part.url for part in message.content if isinstance(part, Media) and part.url is not None]
        texts += [part.transcript for part in message.content if isinstance(part, Audio) and part.transcript]
        texts += [url for url in urls if not url.startswith("data:")]  # megabytes, which no server quotes
        texts += [call.raw_arguments for call in message.tool_calls]
        texts += [part.text for part in message.reasoning]
        for part in opaque_parts(message.order):
            texts += _strings(part.raw)
        for text in texts:
            if len(text) < RUN:
                continue
            escaped = (json.dumps(text), json.dumps(text, ensure_ascii=False), repr(text))
            yield from {text, *(form[1:-1] for form in escaped)}


def _strings(value: object) -> Iterator[str]:
    """Yield every string in a JSON value, which may be nested more deeply than Python can recurse."""
    waiting = [value]
    seen: set[int] = set()
    """The tables and lists so far, because one may contain itself."""
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif (is_mapping(value) or is_list(value)) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if is_mapping(value) else value


def _places(text: str) -> dict[str, list[int]]:
    """Return the places of each block of 6 characters in a text."""
    half = RUN // 2
    places: dict[str, list[int]] = {}
    for place in range(len(text) - half + 1):
        places.setdefault(text[place : place + half], []).append(place)
    return places


def _shared(text: str, content: str, places: dict[str, list[int]]) -> list[tuple[int, int]]:
    """Return the runs of `text` that occur in `content`.

    A run of 12 characters contains a whole block of 6 that begins at a multiple of 6 in `content`. So a single pass
    over these blocks finds the places in `text` that need a closer look. If the closer looks would cost too much (a
    prompt of megabytes), all these places count as shared.
    """
    half = RUN // 2
    hits = places.keys() & (content[at : at + half] for at in range(0, len(content) - half + 1, half))
    starts = {max(0, place - back) for block in hits for place in places[block] for back in range(half)}
    too_much = len(starts) * len(content) > CLOSER_LOOK
    return [
        (start, start + RUN)
        for start in starts
        if too_much or (start + RUN <= len(text) and text[start : start + RUN] in content)
    ]


def _without(text: str, spans: list[tuple[int, int]]) -> str:
    pieces: list[str] = []
    at = 0
    for start, end in sorted(spans):
        if start > at or not pieces:
            pieces += [text[at:start], CUT]
        at = end  # all runs are equally long
    pieces.append(text[at:])
    return "".join(pieces)
