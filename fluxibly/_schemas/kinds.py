"""Types as they are written, and what there is to know of each: its name, its fields, what it stands for."""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import sys
import types
import typing
from collections.abc import Mapping, Sequence, Set as AbstractSet
from typing import Annotated, Any, Final, NamedTuple, TypeVar, Union, get_args, get_origin

import attrs
import msgspec

from fluxibly.errors import ConfigError


class Scalar(NamedTuple):
    """A type of Python that is one of JSON's."""

    json_type: str
    """Its name in JSON Schema."""
    expected: str
    """Its name in messages."""
    accepted: tuple[type, ...]


SCALARS: Final[Mapping[Any, Scalar]] = {
    bool: Scalar("boolean", "a boolean", (bool,)),
    int: Scalar("integer", "an integer", (int,)),
    float: Scalar("number", "a number", (float, int)),
    str: Scalar("string", "a string", (str,)),
    type(None): Scalar("null", "null", (type(None),)),
}
ANYTHING: Final = (Any, object)
"""The types that every value has."""


class Field(NamedTuple):
    """A field of a class."""

    name: str
    """Its name as an argument of the class."""
    json_name: str
    kind: Any
    required: bool
    description: str = ""


def fields_of(kind: Any) -> list[Field] | None:
    """Return the fields of an attrs class, a dataclass, a TypedDict, a Struct or a NamedTuple; None for other types.

    Those that the class sets itself (`init=False`) are left out.

    Raises:
        ConfigError: a name in an annotation cannot be found.
    """
    cls: Any = get_origin(kind) or kind
    if not is_kind(cls, object):
        return None
    if is_kind(cls, msgspec.Struct):
        return _fields_of_struct(kind)
    if attrs.has(cls):
        hints = _hints_of_class(kind)
        return [
            Field(f.alias, f.alias, hints.get(f.name, Any), f.default is attrs.NOTHING, described(f.metadata))
            for f in attrs.fields(cls)
            if f.init
        ]
    if dataclasses.is_dataclass(cls):
        return _fields_of_dataclass(kind, cls)
    if is_typed_dict(cls):
        return [_named(name, hint, name in cls.__required_keys__) for name, hint in _hints_of_class(kind).items()]
    if is_named_tuple(cls):
        hints = _hints_of_class(kind)
        return [Field(name, name, hints.get(name, Any), name not in cls._field_defaults) for name in cls._fields]
    return None


def init_names(cls: Any) -> list[str] | None:
    """Return the names of the attributes that are the fields of an attrs class or a dataclass; None for other classes.

    None for a dataclass with arguments that are no attributes (`InitVar`), too.
    """
    if attrs.has(cls):
        return [field.name for field in attrs.fields(cls) if field.init]
    if dataclasses.is_dataclass(cls):
        every: Mapping[str, Any] = getattr(cls, "__dataclass_fields__", {})
        if not any(
            is_kind(type(field.type), dataclasses.InitVar) or "InitVar" in str(field.type) for field in every.values()
        ):
            return [field.name for field in dataclasses.fields(cls) if field.init]
    return None


def _fields_of_dataclass(kind: Any, cls: Any) -> list[Field]:
    """Return the fields of a dataclass, with those that only its constructor takes (`InitVar`)."""
    hints = _hints_of_class(kind)
    every: Mapping[str, Any] = cls.__dataclass_fields__
    kept = {field.name for field in dataclasses.fields(cls)}
    missing = dataclasses.MISSING
    found: list[Field] = []
    for name, field in every.items():
        hint = hints[name]
        if is_kind(type(hint), dataclasses.InitVar):
            hint = filled(hint.type, _given_to(kind).get(cls, {}))
        elif name not in kept:
            continue  # a ClassVar
        required = field.default is missing and field.default_factory is missing
        if field.init:
            found.append(Field(name, name, hint, required, described(field.metadata)))
    return found


def _fields_of_struct(kind: Any) -> list[Field]:
    """Return the fields of a Struct, with its tag as the first."""
    cls: Any = get_origin(kind) or kind
    try:
        fields = msgspec.structs.fields(kind)
    except (NameError, AttributeError, TypeError, SyntaxError) as error:
        raise _unreadable(kind, error) from None
    hints = _hints_of_class(kind)
    found = [Field(f.name, f.encode_name, hints[f.name], f.required) for f in fields]
    config = cls.__struct_config__
    if config.tag is None:
        return found
    return [Field(TAG, config.tag_field or "type", typing.Literal[config.tag], True), *found]


TAG: Final = ""
"""The name of the field for the tag of a Struct, which its constructor does not take."""


def _hints_of_class(kind: Any) -> dict[str, Any]:
    """Return the types of a class's annotations, in which type variables are replaced by what they stand for."""
    cls: Any = get_origin(kind) or kind
    given = _given_to(kind)
    owners: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        owners.update(dict.fromkeys(inspect.get_annotations(base), base))
    everything: dict[TypeVar, Any] = {variable: each for table in given.values() for variable, each in table.items()}
    return {name: filled(hint, given.get(owners.get(name, cls), everything)) for name, hint in hints_of(cls).items()}


def _given_to(kind: Any) -> dict[Any, dict[TypeVar, Any]]:
    """Return what the type variables of a class and of its bases stand for."""
    cls: Any = get_origin(kind) or kind
    own: dict[TypeVar, Any] = dict(zip(getattr(cls, "__parameters__", ()), get_args(kind), strict=False))
    found: dict[Any, dict[TypeVar, Any]] = {cls: own}
    for base in getattr(cls, "__orig_bases__", ()):
        if isinstance(get_origin(base), type) and get_origin(base) is not typing.Generic:
            found |= {each: table for each, table in _given_to(filled(base, own)).items() if each not in found}
    return found


def filled(kind: Any, given: Mapping[TypeVar, Any]) -> Any:
    """Return a type with its type variables replaced; those that nothing is given for by their bound, or `Any`."""
    if isinstance(kind, TypeVar):
        every: Any = kind.__constraints__
        return given.get(kind, Union[every] if every else kind.__bound__ or Any)  # noqa: UP007  # it is a tuple
    bare = is_kind(kind, object) and not get_args(kind)
    generic: Any = kind
    variables: tuple[Any, ...] = () if bare else getattr(kind, "__parameters__", ())
    return generic[tuple(filled(each, given) for each in variables)] if variables else kind


def hints_of(kind: Any) -> dict[str, Any]:
    """Return the types of a class's or function's annotations.

    Raises:
        ConfigError: a name in an annotation cannot be found.
    """
    try:
        return typing.get_type_hints(kind, include_extras=True)
    except (NameError, AttributeError, TypeError, SyntaxError) as error:
        raise _unreadable(kind, error) from None


def _unreadable(kind: Any, error: Exception) -> ConfigError:
    return ConfigError(
        f"{name_of(kind)}: an annotation cannot be read: {error}; define the types that it names at the top of the module"
    )


def described(metadata: Mapping[Any, Any]) -> str:
    """Return the description in a field's metadata."""
    description = metadata.get("description", "")
    return description if isinstance(description, str) else ""


def _named(name: str, hint: Any, required: bool) -> Field:
    """Return a field of a TypedDict. (`__required_keys__` knows nothing of marks in annotations that are strings.)"""
    while (mark := getattr(get_origin(hint), "_name", "")) in ("Required", "NotRequired", "ReadOnly"):
        required = required if mark == "ReadOnly" else mark == "Required"
        (hint,) = get_args(hint)
    return Field(name, name, hint, required)


def resolved(kind: Any) -> Any:
    """Return the type that a `NewType`, an alias (`type X = …`) or a type variable stands for, and other types as they are.

    Raises:
        ConfigError: a name in an alias cannot be found.
    """
    while True:
        if isinstance(kind, typing.NewType):
            kind = kind.__supertype__
        elif isinstance(kind, TypeVar):
            kind = filled(kind, {})
        elif type(kind).__name__ == "TypeAliasType":
            kind = filled(_value_of(kind), {})
        elif type(get_origin(kind)).__name__ == "TypeAliasType":
            alias: Any = get_origin(kind)
            kind = filled(_value_of(alias), dict(zip(alias.__type_params__, get_args(kind), strict=False)))
        elif kind is None:
            kind = type(None)
        else:
            return kind


def _value_of(alias: Any) -> Any:
    """Return what an alias stands for. Names in strings are looked up where it is defined."""
    try:
        value = alias.__value__
        names = vars(sys.modules[alias.__module__]) if alias.__module__ in sys.modules else {}
        own = {each.__name__: each for each in alias.__type_params__}
        holder = types.SimpleNamespace(__annotations__={"value": value})
        return typing.get_type_hints(holder, {**names, alias.__name__: alias}, own, include_extras=True)["value"]
    except (NameError, AttributeError, TypeError, SyntaxError) as error:
        raise _unreadable(alias, error) from None


def is_hashable(kind: Any, *, instances: bool = False) -> bool:
    """Whether a type has a hash, or its instances have one."""
    kind = kind if not instances else resolved(kind)
    if instances:
        if is_union(kind):
            return all(is_hashable(member, instances=True) for member in members_of(kind))
        kind = get_args(kind)[0] if get_origin(kind) is Annotated else kind
        cls: Any = get_origin(kind) or kind
        return not isinstance(cls, type) or getattr(cls, "__hash__", None) is not None
    try:
        hash(kind)
    except TypeError:
        return False
    return True


def is_pydantic(kind: object) -> bool:
    """Whether a type is a pydantic model, a dataclass of pydantic's, or a scalar with its constraints (`Field(ge=1)`)."""
    if get_origin(kind) is Annotated:
        inner, *extras = get_args(kind)
        packages = {type(extra).__module__.partition(".")[0] for extra in extras}
        return inner in SCALARS and not packages.isdisjoint(("pydantic", "annotated_types"))
    return isinstance(kind, type) and hasattr(kind, "__pydantic_core_schema__")


def is_kind(kind: Any, *kinds: type) -> bool:
    """Whether a type is a subclass. (Type checkers do not narrow it by this, and so do not take it for partly unknown.)"""
    return isinstance(kind, type) and issubclass(kind, kinds)


def is_items(kind: Any) -> bool:
    """Whether a type is that of an array: a list, a set, a tuple, a sequence."""
    if kind in (collections.abc.Iterable, collections.abc.Collection):
        return True
    return is_kind(kind, Sequence, AbstractSet) and not is_kind(kind, str, bytes, bytearray, memoryview, range)


def is_named_tuple(kind: Any) -> bool:
    """Whether a type is a tuple with names."""
    return is_kind(kind, tuple) and hasattr(kind, "_fields")


def is_row(cls: Any) -> bool:
    """Whether a class is an array in JSON: a named tuple, or a Struct that is written so."""
    return is_named_tuple(cls) or (is_kind(cls, msgspec.Struct) and cls.__struct_config__.array_like)


def is_typed_dict(kind: Any) -> bool:
    """Whether a type is a TypedDict, of whatever package."""
    return hasattr(kind, "__required_keys__")


def item_of(kind: Any) -> Any:
    """Return the type of a list's items; None for other types."""
    kind = resolved(kind)
    return get_args(kind)[0] if get_origin(kind) is list else None


def is_union(kind: object) -> bool:
    """Whether a type is `A | B` or `Union[A, B]`."""
    return get_origin(kind) in (Union, types.UnionType)


def members_of(kind: object) -> tuple[Any, ...]:
    """Return the members of a union. (`UnsetType` stands for a property that is not there.)"""
    return tuple(member for member in get_args(kind) if member is not msgspec.UnsetType)


def name_of(kind: Any) -> str:
    """Return a type's name for messages and schemas."""
    arguments = get_args(kind)
    if kind is type(None):
        return "None"
    if kind is Ellipsis:
        return "..."
    if is_union(kind):
        return " | ".join(map(name_of, members_of(kind)))
    if get_origin(kind) is Annotated:
        return name_of(arguments[0])
    origin = get_origin(kind)
    if not arguments or not hasattr(origin, "__name__"):
        return getattr(kind, "__name__", None) or str(kind).replace("typing.", "")
    shown = map(repr, arguments) if origin is typing.Literal else map(name_of, arguments)
    return f"{origin.__name__}[{', '.join(shown)}]"
