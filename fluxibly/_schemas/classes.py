"""The JSON Schemas of types: attrs classes, dataclasses, TypedDicts, msgspec Structs, pydantic models, and what they hold."""

from __future__ import annotations

import enum
import inspect
from collections.abc import Mapping, Sequence, Set as AbstractSet
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec

from fluxibly._checks import is_list, is_mapping
from fluxibly._schemas.kinds import (
    ANYTHING,
    SCALARS,
    Field,
    fields_of,
    is_hashable,
    is_items,
    is_kind,
    is_pydantic,
    is_row,
    is_typed_dict,
    is_union,
    members_of,
    name_of,
    resolved,
)
from fluxibly._schemas.references import with_references
from fluxibly.errors import ConfigError

EXPECTED = (
    "expected an attrs class, a dataclass, a TypedDict, a msgspec Struct, a pydantic model, a list, a union or another type of "
    "these, or a JSON Schema"
)
_REF = "#/$defs/"
_FORMATS: Mapping[str, Mapping[str, str]] = {
    "bytes": {"contentEncoding": "base64"},
    "bytearray": {"contentEncoding": "base64"},
    "date": {"format": "date"},
    "datetime": {"format": "date-time"},
    "Decimal": {"description": "a decimal number"},
    "time": {"format": "time"},
    "timedelta": {"format": "duration"},
    "UUID": {"format": "uuid"},
}
"""The words for strings that stand for a type of the standard library, by the type's name."""


def schemas_of(kinds: Sequence[object]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return a JSON Schema for each type, and the definitions (`$defs`) that these refer to.

    Objects with properties allow no others, and require those that have no default or may be null, as OpenAI's strict mode
    wants it. Descriptions come from docstrings of classes, `Annotated[int, "in years"]`, `msgspec.Meta` and the metadata
    `description` of a field.

    Raises:
        ConfigError: a type has no JSON Schema, or a name in an annotation cannot be found.
    """
    describer = _Describer()
    schemas = [describer.schema(kind) for kind in kinds]
    return [_closed(schema) for schema in schemas], {name: _closed(each) for name, each in describer.defs.items()}


class _Describer:
    """The schemas of types that share their definitions."""

    def __init__(self) -> None:
        self.defs: dict[str, Any] = {}
        self._names: dict[object, str] = {}
        """The names of the classes and aliases that have a definition."""
        self._open: set[object] = set()
        """The aliases whose schema is being made."""

    def schema(self, kind: Any) -> dict[str, Any]:
        """Return the schema of a type."""
        if not is_hashable(kind):
            raise ConfigError(f"{EXPECTED}, got {kind!r}")
        if type(kind).__name__ == "TypeAliasType" or type(get_origin(kind)).__name__ == "TypeAliasType":
            return self._alias(kind)
        kind = resolved(kind)
        origin, arguments = get_origin(kind), get_args(kind)
        if origin is Annotated and is_pydantic(kind):
            return self._hoisted(_by_pydantic(kind), repr(kind))  # its constraints may have no hash
        if origin is Annotated:
            return self._annotated(arguments[0], arguments[1:])
        if kind in ANYTHING:
            return {}
        if kind in SCALARS:
            return {"type": SCALARS[kind].json_type}
        if is_union(kind):
            members = [self.schema(member) for member in members_of(kind)]
            return members[0] if len(members) == 1 else {} if {} in members else {"anyOf": members}
        if origin is Literal:
            return _choice(arguments)
        cls: Any = origin or kind
        if not isinstance(cls, type):
            raise _unknown(kind)
        if issubclass(cls, enum.Enum):
            return _choice([*cls])
        return self._container(kind, cls, arguments) or self._class(kind, cls)

    def _alias(self, kind: Any) -> dict[str, Any]:
        """Return the schema of an alias (`type X = …`), as a definition if it refers to itself."""
        if kind in self._names:
            return {"$ref": _REF + self._names[kind]}
        if kind in self._open:
            return {"$ref": _REF + self._name(kind, name_of(kind))}
        self._open.add(kind)
        schema = self.schema(resolved(kind))
        self._open.discard(kind)
        if kind not in self._names:
            return schema
        self.defs[self._names[kind]] |= schema
        return {"$ref": _REF + self._names[kind]}

    def _annotated(self, kind: Any, extras: Sequence[object]) -> dict[str, Any]:
        schema = self.schema(kind)
        words: dict[str, Any] = {}
        for extra in extras:
            if isinstance(extra, str):
                words["description"] = extra
            elif isinstance(extra, msgspec.Meta):
                words |= _words_of(extra)
        return _with_words(schema, words)

    def _container(self, kind: Any, cls: Any, arguments: Sequence[Any]) -> dict[str, Any] | None:
        if is_row(cls):
            return None
        if is_kind(cls, tuple) and get_origin(kind) and arguments[-1:] != (Ellipsis,):
            return _row([self.schema(each) for each in arguments if each != ()])
        if is_items(cls):
            if is_kind(cls, AbstractSet) and arguments and not is_hashable(arguments[0], instances=True):
                raise ConfigError(
                    f"{name_of(kind)}: {name_of(arguments[0])} has no hash; write list[{name_of(arguments[0])}]"
                )
            return {"type": "array", **({"items": self.schema(arguments[0])} if arguments else {})}
        if is_kind(cls, Mapping) and not is_typed_dict(cls):
            if arguments and "type" in (key := self.schema(arguments[0])) and key["type"] not in ("string", "integer"):
                raise ConfigError(f"{name_of(kind)}: expected keys that are str, int or an enum of these")
            return {"type": "object", **({"additionalProperties": self.schema(arguments[1])} if arguments else {})}
        return None

    def _class(self, kind: Any, cls: Any) -> dict[str, Any]:
        if kind in self._names:
            return {"$ref": _REF + self._names[kind]}
        if is_pydantic(kind):
            return self._hoisted(_by_pydantic(kind), kind)
        fields = fields_of(kind)
        if fields is None:
            return self._by_msgspec(kind)
        name = self._name(kind, name_of(kind))
        found = self.defs[name]
        schemas = {field.json_name: self._field(kind, field) for field in fields}
        if is_row(cls):
            found |= _row([*schemas.values()], least=sum(field.required for field in fields))
        else:
            required = [field.json_name for field in fields if field.required]
            found |= {"type": "object", "properties": schemas, "required": required}
        if (text := _docstring(cls)) is not None:
            found["description"] = text
        return {"$ref": _REF + name}

    def _field(self, kind: Any, field: Field) -> dict[str, Any]:
        try:
            schema = self.schema(field.kind)
        except ConfigError as error:
            raise ConfigError(f"{name_of(kind)}.{field.name}: {error}") from None
        return _with_words(schema, {"description": field.description} if field.description else {})

    def _name(self, key: object, kind: str) -> str:
        """Return a name for a definition that no other has, and begin the definition."""
        wanted = "".join([sign if sign.isalnum() or sign in "-_" else "_" for sign in kind]).strip("_")
        name, number = wanted, 1
        while name in self.defs:
            number += 1
            name = f"{wanted}_{number}"
        self._names[key] = name
        self.defs[name] = {"title": kind}
        return name

    def _by_msgspec(self, kind: Any) -> dict[str, Any]:
        try:
            schema = msgspec.json.schema(kind)
        except (TypeError, NameError):
            raise _unknown(kind) from None
        if schema.get("type") != "string":
            raise _unknown(kind)
        return {"type": "string", **_FORMATS.get(kind.__name__, {})}

    def _hoisted(self, schema: dict[str, Any], key: object) -> dict[str, Any]:
        """Return a schema of its own whose definitions are moved to the others."""
        inner: dict[str, Any] = schema.pop("$defs", {})
        names: dict[str, str] = {}
        for name, each in inner.items():
            names[name] = name if self.defs.get(name) == each else self._name((key, name), name)

        def renamed(ref: str) -> str:
            name = ref.removeprefix(_REF)
            return _REF + names.get(name, name) if ref.startswith(_REF) else ref

        self.defs |= {new: with_references(inner[old], renamed) for old, new in names.items()}
        found: dict[str, Any] = with_references(schema, renamed)
        if "properties" not in found:
            return found
        name = self._name(key, str(found.get("title") or "value"))
        self.defs[name] = found
        return {"$ref": _REF + name}


def _unknown(kind: object) -> ConfigError:
    return ConfigError(f"{name_of(kind)} has no JSON Schema: {EXPECTED}")


def _by_pydantic(kind: Any) -> dict[str, Any]:
    import pydantic

    try:
        return pydantic.TypeAdapter(kind).json_schema()
    except pydantic.errors.PydanticUserError as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"{name_of(kind)} has no JSON Schema: {reason}") from None


def _row(items: Sequence[dict[str, Any]], least: int | None = None) -> dict[str, Any]:
    """Return the schema of an array with a type for each place, of which the first `least` must be there."""
    alike = bool(items) and all(each == items[0] for each in items)
    each = {"items": items[0]} if alike else {"prefixItems": [*items]} if items else {}
    return {"type": "array", **each, "minItems": len(items) if least is None else least, "maxItems": len(items)}


def _choice(choices: Sequence[Any]) -> dict[str, Any]:
    values = [choice.value if isinstance(choice, enum.Enum) else choice for choice in choices]
    kinds = sorted({SCALARS[type(value)].json_type for value in values if type(value) in SCALARS})
    if any(type(value) not in SCALARS for value in values) or not values:
        raise ConfigError(f"{values!r} has no JSON Schema: expected values that are JSON, like 'a' or 1")
    return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": values}


def _words_of(meta: msgspec.Meta) -> dict[str, Any]:
    """Return the words of JSON Schema for the constraints of msgspec."""
    found: dict[str, Any] = {}
    for word, name in (
        *(("minimum", "ge"), ("maximum", "le"), ("exclusiveMinimum", "gt"), ("exclusiveMaximum", "lt")),
        *(("multipleOf", "multiple_of"), ("pattern", "pattern"), ("title", "title"), ("description", "description")),
        *(("minLength", "min_length"), ("maxLength", "max_length"), ("examples", "examples")),
    ):
        if (value := getattr(meta, name)) is not None:
            found[word] = value
    return found | (meta.extra_json_schema or {})


_LENGTHS: Mapping[str, Mapping[str, str]] = {
    "array": {"minLength": "minItems", "maxLength": "maxItems"},
    "object": {"minLength": "minProperties", "maxLength": "maxProperties"},
}
"""The words for the length of other types, by those for the length of a text."""


def _with_words(schema: dict[str, Any], words: Mapping[str, Any]) -> dict[str, Any]:
    if not words:
        return schema
    if (kind := schema.get("type")) in ("array", "object"):
        named = _LENGTHS[str(kind)]
        words = {named.get(word, word): value for word, value in words.items()}
    if "$ref" in schema:  # no other word may stand beside a reference
        return {"anyOf": [schema], **words}
    return {**schema, **words}


def _docstring(cls: Any) -> str | None:
    text = cls.__dict__.get("__doc__")
    generated = f"{cls.__name__}("  # of a dataclass or a NamedTuple without a docstring
    return inspect.cleandoc(text) if isinstance(text, str) and text and not text.startswith(generated) else None


_TABLES = {"properties", "patternProperties", "$defs"}
"""The words whose value is a table of schemas, by names that are no words."""
_VALUES = {"enum", "const", "examples", "required"}
"""The words whose value is no schema."""


def _closed(schema: Any) -> Any:
    """Return a schema without defaults, whose objects allow no other properties, and require those that may be null."""
    if is_list(schema):
        return [_closed(each) for each in schema]
    if not is_mapping(schema):
        return schema
    found: dict[str, Any] = {
        word: value if word in _VALUES else _closed(value)
        for word, value in schema.items()
        if word not in _TABLES and word != "default"
    }
    for word in _TABLES & schema.keys():
        found[word] = {name: _closed(each) for name, each in schema[word].items()}
    if "discriminator" in found and "oneOf" in found:  # of pydantic; only one member fits anyway
        del found["discriminator"]
        found["anyOf"] = found.pop("oneOf")
    if "$ref" in found and len(found) > 1:  # no other word may stand beside a reference
        found["anyOf"] = [{"$ref": found.pop("$ref")}]
    properties = found.get("properties")
    if is_mapping(properties):
        required = found.get("required", ())
        found.setdefault("additionalProperties", False)
        found["required"] = [name for name, each in properties.items() if name in required or _may_be_null(each)]
    return found


def _may_be_null(schema: object) -> bool:
    if not is_mapping(schema):
        return False
    kinds = schema.get("type")
    if kinds == "null" or (is_list(kinds) and "null" in kinds):
        return True
    return any(_may_be_null(each) for each in schema.get("anyOf", ()))
