"""The JSON Schemas of types: attrs classes, dataclasses, TypedDicts, msgspec Structs, pydantic models, and what they hold."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import types
import typing
from collections.abc import Mapping, Sequence, Set as AbstractSet
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

import attrs
import msgspec

from fluxibly._checks import is_list, is_mapping
from fluxibly.errors import ConfigError

EXPECTED = (
    "expected an attrs class, a dataclass, a TypedDict, a msgspec Struct, a pydantic model, a list, a union or another type of "
    "these, or a JSON Schema"
)
_SCALARS: Mapping[object, str] = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}
_REF = "#/$defs/"


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


class Field(NamedTuple):
    """A field of a class, with its name in JSON."""

    name: str
    kind: object
    required: bool
    description: str = ""


def fields_of(kind: Any) -> list[Field] | None:
    """Return the fields of an attrs class, a dataclass or a TypedDict; None for other types.

    Raises:
        ConfigError: a name in an annotation cannot be found.
    """
    if attrs.has(kind):
        hints = hints_of(kind)
        return [
            Field(f.name, hints.get(f.name, Any), f.default is attrs.NOTHING, _described(f.metadata))
            for f in attrs.fields(kind)
            if f.init
        ]
    if dataclasses.is_dataclass(kind):
        hints = hints_of(kind)
        return [
            Field(
                f.name,
                hints[f.name],
                f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING,
                _described(f.metadata),
            )
            for f in dataclasses.fields(kind)
            if f.init
        ]
    required: object = getattr(kind, "__required_keys__", None)
    if isinstance(required, frozenset):
        return [Field(name, _without_marks(hint), name in required) for name, hint in hints_of(kind).items()]
    return None


def hints_of(kind: Any) -> dict[str, Any]:
    """Return the types of a class's or function's annotations.

    Raises:
        ConfigError: a name in an annotation cannot be found.
    """
    try:
        return typing.get_type_hints(kind, include_extras=True)
    except (NameError, AttributeError, TypeError, SyntaxError) as error:
        raise ConfigError(
            f"{name_of(kind)}: an annotation cannot be read: {error}; define the types that it names at the top of the module"
        ) from None


def is_pydantic(kind: object) -> bool:
    """Whether a type is a pydantic model or a dataclass of pydantic's."""
    return isinstance(kind, type) and hasattr(kind, "__pydantic_core_schema__")


def is_kind(kind: Any, *kinds: type) -> bool:
    """Whether a type is a subclass. (Type checkers do not narrow it by this, and so do not take it for partly unknown.)"""
    return isinstance(kind, type) and issubclass(kind, kinds)


def is_items(kind: Any) -> bool:
    """Whether a type is that of an array: a list, a set, a tuple, a sequence."""
    return is_kind(kind, Sequence, AbstractSet) and not is_kind(kind, str, bytes, bytearray, memoryview)


def is_named_tuple(kind: Any) -> bool:
    """Whether a type is a tuple with names."""
    return is_kind(kind, tuple) and hasattr(kind, "_fields")


def is_typed_dict(kind: Any) -> bool:
    """Whether a type is a TypedDict, of whatever package."""
    return hasattr(kind, "__required_keys__")


def is_union(kind: object) -> bool:
    """Whether a type is `A | B` or `Union[A, B]`."""
    return get_origin(kind) in (Union, types.UnionType)


def name_of(kind: Any) -> str:
    """Return a type's name for messages and schemas."""
    arguments = get_args(kind)
    if is_union(kind):
        return " | ".join(map(name_of, arguments))
    if get_origin(kind) is Annotated:
        return name_of(arguments[0])
    if not arguments or not hasattr(get_origin(kind), "__name__"):
        return getattr(kind, "__name__", None) or str(kind).replace("typing.", "")
    return f"{get_origin(kind).__name__}[{', '.join(map(name_of, arguments))}]"


def resolved(kind: Any) -> Any:
    """Return the type that a `NewType` or an alias (`type X = …`) stands for, and other types as they are."""
    while True:
        if isinstance(kind, typing.NewType):
            kind = kind.__supertype__
        elif type(kind).__name__ == "TypeAliasType":
            kind = kind.__value__
        else:
            return kind


def _described(metadata: Mapping[Any, Any]) -> str:
    description = metadata.get("description", "")
    return description if isinstance(description, str) else ""


def _without_marks(hint: Any) -> Any:
    """Return a TypedDict's annotation without `Required`, `NotRequired` and `ReadOnly`."""
    while getattr(get_origin(hint), "_name", "") in ("Required", "NotRequired", "ReadOnly"):
        (hint,) = get_args(hint)
    return hint


class _Describer:
    """The schemas of types that share their definitions."""

    def __init__(self) -> None:
        self.defs: dict[str, Any] = {}
        self._names: dict[object, str] = {}
        """The names of the classes that have a definition."""

    def schema(self, kind: Any, given: Mapping[Any, object] | None = None) -> dict[str, Any]:
        """Return the schema of a type. `given` has what the type variables of a generic class stand for."""
        kind = resolved(kind)
        given = {} if given is None else given
        if isinstance(kind, TypeVar):
            return self.schema(given[kind], given) if kind in given else self.schema(kind.__bound__ or Any, given)
        origin, arguments = get_origin(kind), get_args(kind)
        if origin is Annotated:
            return self._annotated(arguments[0], arguments[1:], given)
        if kind in (Any, object):
            return {}
        scalar = _SCALARS.get(type(None) if kind is None else kind)
        if scalar is not None:
            return {"type": scalar}
        if is_union(kind):
            members = [self.schema(member, given) for member in arguments]
            return {} if {} in members else {"anyOf": members}
        if origin is Literal:
            return _choice(arguments)
        cls: Any = origin or kind
        if not isinstance(cls, type):
            raise ConfigError(f"{name_of(kind)} has no JSON Schema: {EXPECTED}")
        if issubclass(cls, enum.Enum):
            return _choice([member.value for member in cls])
        return self._container(cls, arguments, given) or self._class(kind, cls, arguments, given)

    def _annotated(self, kind: Any, extras: Sequence[object], given: Mapping[object, object]) -> dict[str, Any]:
        schema = self.schema(kind, given)
        words: dict[str, Any] = {}
        for extra in extras:
            if isinstance(extra, str):
                words["description"] = extra
            elif isinstance(extra, msgspec.Meta):
                words |= _words_of(extra)
        return _with_words(schema, words)

    def _container(self, cls: Any, arguments: Sequence[Any], given: Mapping[object, object]) -> dict[str, Any] | None:
        if is_named_tuple(cls):
            return None
        if is_kind(cls, tuple) and arguments and arguments[-1] is not Ellipsis:
            items = [self.schema(each, given) for each in arguments if each != ()]
            return {
                "type": "array",
                "prefixItems": items,
                "items": False,
                "minItems": len(items),
                "maxItems": len(items),
            }
        if is_items(cls):
            item = {"items": self.schema(arguments[0], given)} if arguments else {}
            unique = {"uniqueItems": True} if is_kind(cls, AbstractSet) else {}
            return {"type": "array", **item, **unique}
        if is_kind(cls, Mapping) and not is_typed_dict(cls):
            values = {"additionalProperties": self.schema(arguments[1], given)} if len(arguments) == 2 else {}
            return {"type": "object", **values}
        return None

    def _class(self, kind: Any, cls: Any, arguments: Sequence[Any], given: Mapping[object, object]) -> dict[str, Any]:
        parameters: tuple[object, ...] = getattr(cls, "__parameters__", ())
        chosen = tuple(given.get(each, each) for each in arguments)
        key: object = (cls, *chosen) if chosen else cls
        if key in self._names:
            return {"$ref": _REF + self._names[key]}
        if is_pydantic(kind):
            import pydantic

            return self._hoisted(pydantic.TypeAdapter(kind).json_schema(), key)
        fields = None if is_kind(cls, msgspec.Struct) else fields_of(cls)
        if fields is None:
            return self._by_msgspec(kind, key)
        name = self._name(key, "_".join(map(name_of, (cls, *chosen))))
        own: dict[Any, object] = dict(zip(parameters, chosen, strict=False))
        properties = {
            field.name: _with_words(
                self.schema(field.kind, own), {"description": field.description} if field.description else {}
            )
            for field in fields
        }
        self.defs[name] |= {
            "type": "object",
            "properties": properties,
            "required": [field.name for field in fields if field.required],
        }
        if (text := _docstring(cls)) is not None:
            self.defs[name]["description"] = text
        return {"$ref": _REF + name}

    def _name(self, key: object, wanted: str) -> str:
        """Return a name for a definition that no other class has, and begin the definition."""
        name, number = wanted, 1
        while name in self.defs:
            number += 1
            name = f"{wanted}_{number}"
        self._names[key] = name
        self.defs[name] = {"title": wanted}
        return name

    def _by_msgspec(self, kind: Any, key: object) -> dict[str, Any]:
        def hook(inner: type) -> dict[str, Any]:
            if is_pydantic(inner):
                return self.schema(inner)
            raise NotImplementedError

        try:
            schema = msgspec.json.schema(kind, schema_hook=hook)
        except (TypeError, NameError) as error:
            reason = str(error).partition("\n")[0]
            raise ConfigError(f"{name_of(kind)} has no JSON Schema: {EXPECTED} ({reason})") from None
        return self._hoisted(schema, key)

    def _hoisted(self, schema: dict[str, Any], key: object) -> dict[str, Any]:
        """Return a schema of its own whose definitions are moved to the others."""
        inner: dict[str, Any] = schema.pop("$defs", {})
        names: dict[str, str] = {}
        for name, each in inner.items():
            names[name] = name if self.defs.get(name) == each else self._name((key, name), name)
        self.defs |= {new: _renamed(inner[old], names) for old, new in names.items()}
        found: dict[str, Any] = _renamed(schema, names)
        if "properties" not in found:
            return found
        name = self._name(key, str(found.get("title") or "value"))
        self.defs[name] = found
        return {"$ref": _REF + name}


def _renamed(schema: Any, names: Mapping[str, str]) -> Any:
    """Return a schema with its references to definitions renamed."""
    if is_list(schema):
        return [_renamed(each, names) for each in schema]
    if not is_mapping(schema):
        return schema
    found: dict[str, Any] = {key: _renamed(value, names) for key, value in schema.items()}
    ref: object = found.get("$ref")
    if isinstance(ref, str) and ref.startswith(_REF):
        found["$ref"] = _REF + names.get(ref.removeprefix(_REF), ref.removeprefix(_REF))
    return found


def _choice(values: Sequence[Any]) -> dict[str, Any]:
    kinds = sorted({_json_type(value) for value in values})
    if "" in kinds:
        raise ConfigError(f"{values!r} has no JSON Schema: expected values that are JSON, like 'a' or 1")
    return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": [*values]}


def _json_type(value: object) -> str:
    return _SCALARS.get(type(value), "")


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


def _with_words(schema: dict[str, Any], words: Mapping[str, Any]) -> dict[str, Any]:
    if not words:
        return schema
    if schema.get("type") == "array":
        named = {"minLength": "minItems", "maxLength": "maxItems"}
        words = {named.get(word, word): value for word, value in words.items()}
    if "$ref" in schema:  # no other word may stand beside a reference
        return {"anyOf": [schema], **words}
    return {**schema, **words}


def _docstring(cls: Any) -> str | None:
    text = cls.__dict__.get("__doc__")
    generated = f"{cls.__name__}("  # of a dataclass without a docstring
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
