"""The schema of an answer as it is given on the command line: a file, JSON, or a short form like `name, age int`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, cast

from fluxibly._checks import did_you_mean, is_mapping, kind_of
from fluxibly.errors import ConfigError

TYPES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}
FORM = "NAME [TYPE][?][: DESCRIPTION], … with the types str, int, float, bool, and list[…] of these"
_FIELD = re.compile(r"(?P<name>[^\W\d]\w*)(?P<open>\?)?(?:\s+(?P<type>[^\s?]+(?:\[\s*\w+\s*\])?)(?P<optional>\?)?)?")
_LIST = re.compile(r"(?:list)?\[\s*(?P<before>\w*)\s*\]|(?P<after>\w+)\[\]")


def checked_schema(text: str) -> dict[str, Any]:
    """Return the JSON Schema of `schema_of`, once it is known that answers can be checked by it.

    Raises:
        ConfigError: it is no JSON Schema, or jsonschema is not installed.
    """
    from fluxibly._schemas.shapes import shape_of  # late, because most chats have no schema

    schema = schema_of(text)
    shape_of(schema, "--schema")
    return schema


def schema_of(text: str) -> dict[str, Any]:
    """Return the JSON Schema of a file, of JSON, or of the short form.

    The short form is fields with commas between them, or a line for each: `name`, `age int`, `tags list[str]`, `nick str?`
    (null if it is not known), `bio: a sentence`. Brackets around all of it make a list of such objects.

    Raises:
        ConfigError: the file cannot be read, or there is no schema in it or in the text.
    """
    stripped = text.strip()
    if not stripped:
        raise ConfigError(f"--schema: expected a file or {FORM}, got nothing")
    if stripped.startswith("{"):
        return _json(text, "--schema")
    path = Path(text).expanduser()
    try:
        is_file = path.is_file()
    except (OSError, ValueError):  # too long for a name
        is_file = False
    if is_file or stripped.endswith(".json"):
        try:
            return _json(path.read_text(encoding="utf-8"), f"--schema {text}")
        except OSError as error:
            raise ConfigError(f"--schema {text}: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"--schema {text}: expected a JSON Schema, got a file that is not text") from error
    if stripped.startswith("[") and stripped.endswith("]"):
        return {"type": "array", "items": _object(stripped[1:-1])}
    return _object(stripped)


def _json(text: str, what: str) -> dict[str, Any]:
    try:
        found: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{what}: expected a JSON Schema, got text that is not JSON: {error}") from error
    if not is_mapping(found):
        raise ConfigError(f"{what}: expected a JSON Schema, which is an object, got {kind_of(found)}")
    return cast("dict[str, Any]", found)


def _object(text: str) -> dict[str, Any]:
    """Return the schema of an object. All of its properties are always there, because services make the best of that."""
    properties: dict[str, Any] = {}
    for field in text.split("\n") if "\n" in text else text.split(","):
        if field.strip():
            name, schema = _field(field.strip().rstrip(","))
            if name in properties:
                raise ConfigError(f"--schema: expected each name once, got {name!r} twice")
            properties[name] = schema
    if not properties:
        raise ConfigError(f"--schema: expected {FORM}, got no names")
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _field(text: str) -> tuple[str, dict[str, Any]]:
    before, _, description = text.partition(":")
    match = _FIELD.fullmatch(before.strip())
    if match is None:
        raise ConfigError(f"--schema: expected {FORM}, got {text!r} (a file of that name does not exist)")
    schema = _type(match["type"] or "str", match["name"])
    if match["open"] or match["optional"]:
        schema = {**schema, "type": [schema["type"], "null"]}
    if description.strip():
        schema["description"] = description.strip()
    return match["name"], schema


def _type(text: str, name: str) -> dict[str, Any]:
    several = _LIST.fullmatch(text)
    if several is not None:
        return {"type": "array", "items": _type(several["before"] or several["after"] or "str", name)}
    if text not in TYPES:
        hint = did_you_mean(text, TYPES)
        raise ConfigError(f"--schema: {name}: expected one of {', '.join(TYPES)} or list[…], got {text!r}{hint}")
    return {"type": TYPES[text]}
