"""The conversion of JSON values into instances of types, as strict as JSON is: a number is no text, and a text no number."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Annotated, Any, Literal, TypeAlias, get_args, get_origin

import msgspec

from fluxibly._checks import is_list, is_mapping
from fluxibly._schemas.classes import (
    fields_of,
    is_items,
    is_kind,
    is_named_tuple,
    is_pydantic,
    is_typed_dict,
    is_union,
    name_of,
    resolved,
)

Hook: TypeAlias = Callable[[Any, Any], Any]


class Misfit(ValueError):
    """A value does not fit a type. The message is for the model, which has to correct the value."""


def structured(value: object, kind: object, path: str = "$") -> Any:
    """Return a JSON value as an instance of a type.

    Args:
        value: the value, as decoded from JSON.
        kind: a type that `schemas_of` takes.
        path: the path of the value, for the message.

    Raises:
        Misfit: the value does not fit. The message lists every problem, with its path.
    """
    from cattrs import transform_error

    try:
        return _converter().structure(value, kind)
    except RecursionError:
        raise Misfit("the value is nested too deeply") from None
    except Exception as error:  # noqa: BLE001  # cattrs raises groups of any errors that the class raises
        raise Misfit("; ".join(transform_error(error, path=path, format_exception=_problem))) from None


def _problem(error: BaseException, kind: type | None) -> str:
    if isinstance(error, KeyError):
        return "required field missing"
    return " ".join(str(error).split()) or type(error).__name__


def _misfit(expected: str, value: object) -> Misfit:
    return Misfit(f"expected {expected}, got {_json_kind(value)}")


_JSON_KINDS: tuple[tuple[type, str], ...] = (
    (bool, "a boolean"),
    (int, "an integer"),
    (float, "a number"),
    (str, "a string"),
    (list, "an array"),
)


def _json_kind(value: Any) -> str:
    """Return the kind of a JSON value, in the words of JSON."""
    if value is None:
        return "null"
    found = [name for kind, name in _JSON_KINDS if isinstance(value, kind)]
    return found[0] if found else "an object" if is_mapping(value) else type(value).__name__


@cache
def _converter() -> Any:
    """Return a cattrs converter for JSON. The default one is lenient: bool("no") is True, and int(2.7) is 2."""
    from cattrs import Converter

    converter = Converter()

    def factory(kind: Any, converter: Any) -> Hook:
        return _hook(resolved(kind), converter)

    converter.register_structure_hook_factory(_any)(factory)
    for kind in (bool, int, float, str, bytes):  # cattrs has hooks of its own for them, which come first
        converter.register_structure_hook(kind, _hook(kind, converter))
    return converter


def _any(_: object) -> bool:
    return True


def _hook(kind: Any, converter: Any) -> Hook:
    """Return the function that structures values of a type."""
    origin, arguments = get_origin(kind), get_args(kind)
    scalar = _SCALARS.get(type(None) if kind is None else kind)
    cls: Any = origin or kind
    if kind in (Any, object):
        return _unchanged
    if scalar is not None:
        return partial(_scalar, *scalar)
    if origin is Annotated:
        return _annotated(kind, converter)
    if is_union(kind):
        return partial(_union, converter, arguments)
    if origin is Literal:
        return partial(_choice, {(type(value), value): value for value in arguments})
    if not isinstance(cls, type):
        return partial(_by_msgspec, converter)
    if issubclass(cls, enum.Enum):
        return partial(_choice, {(type(member.value), member.value): member for member in cls})
    if is_pydantic(kind):
        return _by_pydantic
    if issubclass(cls, msgspec.Struct):
        return partial(_by_msgspec, converter)
    return _container_hook(cls, arguments, converter) or _class_hook(kind, cls, converter)


_SCALARS: Mapping[object, tuple[str, tuple[type, ...]]] = {
    bool: ("a boolean", (bool,)),
    int: ("an integer", (int,)),
    float: ("a number", (float, int)),
    str: ("a string", (str,)),
    type(None): ("null", (type(None),)),
}


def _unchanged(value: object, _: object) -> object:
    return value


def _scalar(expected: str, accepted: tuple[type, ...], given: Any, kind: Any) -> object:
    value: Any = given
    if not isinstance(given, accepted) or (isinstance(value, bool) and bool not in accepted):
        raise _misfit(expected, value)
    return float(value) if kind is float else value


def _annotated(kind: Any, converter: Any) -> Hook:
    """Return the hook of an annotated type. Constraints of `msgspec.Meta` are checked by msgspec."""
    inner = get_args(kind)[0]
    limits = tuple(extra for extra in kind.__metadata__ if isinstance(extra, msgspec.Meta))

    def hook(value: object, _: object) -> object:
        found = converter.structure(value, inner)
        for limit in limits:
            try:
                msgspec.convert(value, Annotated[_plain_kind(value), limit])
            except msgspec.ValidationError as error:
                raise Misfit(_said(error)) from None
            except TypeError:  # the constraint is for another type
                continue
        return found

    return hook


def _plain_kind(value: object) -> Any:
    return type(value)


def _union(converter: Any, members: Sequence[Any], value: object, _: object) -> object:
    """Return a value as an instance of the member that fits; of several classes, that which has the most of its fields."""
    problems: list[str] = []
    best: tuple[int, Any] | None = None
    exact = sorted(members, key=lambda member: resolved(member) is not type(value))
    for member in exact:
        try:
            found = structured(value, member, path="")
        except Misfit as misfit:
            problems.append(f"{name_of(member)}: {misfit}")
            continue
        fields = _field_names(resolved(member))
        known = len(fields & value.keys()) if is_mapping(value) else 0
        if best is None or known > best[0]:
            best = known, found
    if best is None:
        raise Misfit(f"none of {', '.join(map(name_of, members))} fits ({'; '.join(problems)})")
    return best[1]


def _field_names(kind: Any) -> frozenset[str]:
    """Return the names of a class's fields in JSON."""
    cls: Any = get_origin(kind) or kind
    if is_kind(cls, msgspec.Struct):
        names: tuple[str, ...] = cls.__struct_encode_fields__
        return frozenset(names)
    if is_pydantic(cls):
        fields: Mapping[str, Any] = getattr(cls, "__pydantic_fields__", {})
        return frozenset(each.alias or name for name, each in fields.items())
    return frozenset(field.name for field in fields_of(cls) or ())


def _choice(choices: Mapping[Any, Any], value: Any, _: object) -> object:
    try:
        return choices[type(value), value]
    except (KeyError, TypeError):
        expected = ", ".join(repr(choice) for _, choice in choices)
        given = repr(value) if isinstance(value, (str, int)) and len(repr(value)) < 50 else _json_kind(value)
        raise Misfit(f"expected one of {expected}, got {given}") from None


def _container_hook(cls: Any, arguments: Sequence[Any], converter: Any) -> Hook | None:
    """Return the hook of a list, a set, a tuple or a mapping; None for other types."""
    from cattrs import cols

    factories: Any = cols  # whose types are partly unknown
    if is_named_tuple(cls):
        return None
    if is_kind(cls, tuple) and arguments and arguments[-1] is not Ellipsis:
        return partial(_tuple, arguments)
    if is_items(cls):
        items: Any = arguments[0] if arguments else Any
        base = factories.list_structure_factory(list[items], converter)
        return partial(_items, base, list[items], _maker(cls))
    if is_kind(cls, Mapping) and not is_typed_dict(cls):
        values: Any = arguments[1] if len(arguments) == 2 else Any
        keys: Any = arguments[0] if arguments else str
        table = factories.mapping_structure_factory(dict[str, values], converter)
        return partial(_table, table, keys)
    return None


def _maker(cls: Any) -> Callable[[list[Any]], Any]:
    """Return the function that makes a list's items into an instance of a class, or of the usual class for an abstract one."""
    usual: tuple[Any, ...] = (list, tuple, set, frozenset)
    found: Callable[[list[Any]], Any] = next((kind for kind in usual if issubclass(kind, cls)), cls)
    return found


def _items(base: Hook, kind: Any, make: Callable[[list[Any]], Any], value: object, _: object) -> object:
    if not is_list(value):
        raise _misfit("an array", value)
    return make(base(value, kind))


def _tuple(kinds: Sequence[Any], value: object, _: object) -> object:
    kinds = [kind for kind in kinds if kind != ()]
    if not is_list(value) or len(value) != len(kinds):
        raise _misfit(f"an array of {len(kinds)}", value)
    return tuple(
        [structured(each, kind, path=f"[{n}]") for n, (each, kind) in enumerate(zip(value, kinds, strict=True))]
    )


def _table(base: Hook, keys: Any, value: object, _: object) -> object:
    if not is_mapping(value):
        raise _misfit("an object", value)
    found = base(value, dict)
    return found if keys in (str, Any) else {_key(key, keys): each for key, each in found.items()}


def _key(key: str, kind: Any) -> object:
    """Return a key of a JSON object, which is always a string, as its type."""
    try:
        return msgspec.convert(key, kind, strict=False)
    except msgspec.ValidationError as error:
        raise Misfit(_said(error)) from None


def _class_hook(kind: Any, cls: Any, converter: Any) -> Hook:
    """Return the hook of an attrs class, a dataclass or a TypedDict; all other types are msgspec's."""
    if fields_of(cls) is None:
        return partial(_by_msgspec, converter)
    from cattrs import gen
    from cattrs.gen import typeddicts

    factories: Any = typeddicts if is_typed_dict(cls) else gen  # whose types are partly unknown
    base: Hook = factories.make_dict_structure_fn(kind, converter)

    def hook(value: object, _: object) -> object:
        if not is_mapping(value):
            raise _misfit("an object", value)
        return base(value, kind)

    return hook


def _by_msgspec(converter: Any, value: object, kind: Any) -> object:
    def inner(wanted: type, given: object) -> object:
        return converter.structure(given, wanted)

    try:
        return msgspec.convert(value, kind, strict=True, dec_hook=inner)
    except msgspec.ValidationError as error:
        raise Misfit(_said(error)) from None


def _by_pydantic(value: object, kind: Any) -> object:
    import pydantic

    try:
        # As JSON, because in pydantic's strict mode a date, for example, may then be a string.
        return pydantic.TypeAdapter(kind).validate_json(msgspec.json.encode(value), strict=True)
    except pydantic.ValidationError as error:
        problems = [
            f"{each['msg']} at {'.'.join(map(str, each['loc'])) or 'the top'}"
            for each in error.errors(include_url=False, include_context=False, include_input=False)
        ]
        raise Misfit("; ".join(problems)) from None


def _said(error: msgspec.ValidationError) -> str:
    """Return msgspec's message in lower case, as those of all others are."""
    text = str(error).replace(" - at `$", " at `")
    return text[:1].lower() + text[1:]
