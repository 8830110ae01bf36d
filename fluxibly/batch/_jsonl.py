"""Rows as JSON lines: those of OpenAI's batch API, fluxibly's own, and objects whose fields are columns."""

from __future__ import annotations

import json
import math
from typing import Any, Final

import msgspec

from fluxibly._checks import did_you_mean, is_mapping, kind_of
from fluxibly._keywords import KEYWORDS, no_keyword
from fluxibly._masking import mask_request, request_of_texts
from fluxibly.batch._rows import Row, bad_row
from fluxibly.batch._template import IDS, Prompts, checked, id_column, name_of
from fluxibly.batch._text_lines import LONGEST
from fluxibly.providers.dialects.json_values import without_lone_surrogates
from fluxibly.providers.dialects.openai_bodies import read_body

_SETTINGS: Final = KEYWORDS - {"headers"}
_FIELDS: Final = (*IDS, "prompt", "messages", *sorted(_SETTINGS))
_NEVER_NULL: Final = ("model", "extra", "metadata")
"""The settings whose null says the same as nothing."""
_OPENAI_FIELDS: Final = (*IDS, "method", "url", "body")

_decode = msgspec.json.Decoder().decode


class JSONLines:
    """Reads rows of lines, one by one.

    Args:
        prompts: how prompts are made of objects whose fields are columns. None: the lines say what to ask.
    """

    def __init__(self, prompts: Prompts | None) -> None:
        self._prompts = prompts
        self._line = b""
        self._number = 0

    def add(self, line: bytes) -> bool:
        """Take a line. Return whether it ends a row, which `row` then returns."""
        self._number += 1
        if line.isspace():
            return False
        self._line = line
        return True

    def end(self) -> bool:
        """Note that there are no more lines. Return whether that ends a row."""
        return False

    def row(self, number: int) -> Row:
        """Return the row that has ended."""
        line = self._number
        try:
            fields = _fields(self._line)
        except ValueError as error:
            return bad_row(number, line, str(error))
        custom_id = None
        try:
            custom_id = name_of(fields.get("custom_id", fields.get("id")))
            if self._prompts is not None:
                return self._of_columns(number, fields, self._prompts)
            prompt, settings = _of_openai(fields) if "body" in fields else _own(fields)
        except (TypeError, ValueError) as error:
            return bad_row(number, line, mask_request(str(error), request_of_texts(fields)), custom_id)
        return Row(number, custom_id, prompt, settings, None, line)

    def _of_columns(self, number: int, fields: dict[str, Any], prompts: Prompts) -> Row:
        name = id_column(tuple(fields), prompts)
        custom_id = None if name is None else name_of(fields[name])
        try:
            prompt = prompts.of(fields)
        except KeyError as error:
            raise ValueError(f"there is no field {error.args[0]!r}") from None
        return Row(number, custom_id, prompt, {}, None, self._number)

    def check(self, name: str) -> None:
        """Check that the row that has ended has the columns that prompts are made of. A row that cannot be read has any.

        Raises:
            ConfigError: it has not.
        """
        if self._prompts is None:
            return
        try:
            fields = _fields(self._line)
        except ValueError:
            return
        checked(self._prompts, tuple(fields), name)


def _fields(line: bytes) -> dict[str, Any]:
    """Return the object of a line.

    Raises:
        ValueError: it is none.
    """
    if len(line) > LONGEST:
        raise ValueError(f"expected a line of at most {LONGEST} bytes, got more")
    try:
        value: object = _decode(line)
    except (ValueError, RecursionError):
        value = _read_slowly(line)
    if type(value) is not dict:
        raise ValueError(f"expected a JSON object, got {kind_of(value)}")
    return value  # pyright: ignore[reportUnknownVariableType]  # the keys are str


def _read_slowly(line: bytes) -> object:
    """Return the value of a line that msgspec does not read: with half of a surrogate pair in it, or no JSON.

    Raises:
        ValueError: it is no JSON. The message says what is wrong.
    """
    try:
        return without_lone_surrogates(json.loads(line.decode(), parse_constant=_no_number, parse_float=_finite))
    except UnicodeDecodeError as error:
        problem = f"expected UTF-8, got other bytes at {error.start + 1}"
    except json.JSONDecodeError as error:
        problem = f"expected JSON, got something else at character {error.pos + 1} ({error.msg})"
    except RecursionError:
        problem = "expected JSON, got values that are nested too deeply"
    except ValueError as error:
        problem = str(error) if "JSON" in str(error) else "expected JSON, got a number with too many digits"
    raise ValueError(problem)


def _no_number(name: str) -> float:
    raise ValueError(f"expected JSON, got {name}")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_number("a number that is too large")


def _own(fields: dict[str, Any]) -> tuple[object, dict[str, Any]]:
    """Return the prompt and the settings of fluxibly's own form."""
    for name in IDS:
        fields.pop(name, None)
    prompt, messages = fields.pop("prompt", None), fields.pop("messages", None)
    for name in fields:
        if name not in _SETTINGS:
            raise ValueError(_no_field(name))
    if (prompt is None) == (messages is None):
        raise ValueError(f"expected a prompt or messages, got {'neither' if prompt is None else 'both'}")
    for name in _NEVER_NULL:
        if name in fields and fields[name] is None:
            del fields[name]
    return messages if prompt is None else prompt, fields


def _no_field(name: str) -> str:
    if name == "headers":
        return "headers: a row cannot set HTTP headers; set them in the configuration"
    shown = name if len(name) <= 40 else f"{name[:40]}…"
    hint = did_you_mean(name, _FIELDS)
    return f"a row has no field {shown!r}{hint}" if hint else str(no_keyword(shown))


def _of_openai(fields: dict[str, Any]) -> tuple[object, dict[str, Any]]:
    """Return the prompt and the settings of a line of OpenAI's batch API. The body's model is not used."""
    for name in fields:
        if name not in _OPENAI_FIELDS:
            shown = name if len(name) <= 40 else f"{name[:40]}…"
            raise ValueError(f"beside a body, a row has no field {shown!r}; write it into the body")
    method, url = fields.get("method"), fields.get("url")
    if method is not None and method != "POST":
        raise ValueError("method: expected 'POST', got something else")
    if url is not None and not (isinstance(url, str) and url.rstrip("/").endswith("/chat/completions")):
        raise ValueError("url: expected '/v1/chat/completions', got something else")
    if not is_mapping(fields["body"]):
        raise ValueError(f"body: expected an object, got {kind_of(fields['body'])}")
    try:
        body = read_body(fields["body"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"body.{error}") from None
    if body.rest:
        body.settings["extra"] = body.rest
    return body.messages, body.settings
