"""The conversion of JSON values into instances of types by cattrs, msgspec and pydantic, as strict as JSON is."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Annotated, Any, Literal, TypeAlias, get_args, get_origin

import msgspec

from fluxibly._checks import is_list, is_mapping
from fluxibly._schemas.checking import MOST_PROBLEMS, cut
from fluxibly._schemas.kinds import (
    ANYTHING,
    SCALARS,
    TAG,
    Field,
    fields_of,
    init_names,
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

Hook: TypeAlias = Callable[[Any], Any]
"""A function that makes a JSON value into an instance. It raises `Misfit`."""


class Misfit(ValueError):
    """A value does not fit a type. The message is for the model, which has to correct the value.

    Args:
        problems: what is wrong, each with the path below the value, like `.people[0].age`.
    """

    def __init__(self, problems: Sequence[tuple[str, str]]) -> None:
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        return self.message()

    def message(self, path: str = "$") -> str:
        """Return the message, with the paths below `path`."""
        shown = [f"{path}{below}: {cut(text)}" for below, text in self.problems[:MOST_PROBLEMS]]
        more = len(self.problems) - len(shown)
        return "; ".join([*shown, f"and {more} more problems"] if more else shown)


def structured(value: object, kind: object, path: str = "$") -> Any:
    """Return a JSON value as an instance of a type.

    Args:
        value: the value, as decoded from JSON.
        kind: a type that `schemas_of` takes.
        path: the path of the value, for the message.

    Raises:
        ValueError: the value does not fit. The message lists the problems, each with its path.
    """
    return read_by(structurer(kind), value, path)


def read_by(hook: Hook, value: object, path: str = "$") -> Any:
    """Return a JSON value as an instance, by the function of its type.

    Raises:
        ValueError: the value does not fit. The message lists the problems, each with its path.
    """
    try:
        return hook(value)
    except RecursionError:
        raise ValueError(f"{path}: it is nested too deeply") from None
    except Misfit as misfit:
        raise ValueError(misfit.message(path)) from None


def structurer(kind: object) -> Hook:
    """Return the function that makes JSON values into instances of a type.

    It raises `Misfit` if a value does not fit, and `RecursionError` if it is nested too deeply.
    """
    try:
        return _kept(kind)
    except TypeError:  # it has no hash, like an annotation with a list in it
        return _Maker().hook(kind)


def _misfit(expected: str, value: object) -> Misfit:
    return Misfit([("", f"expected {expected}, got {_json_kind(value)}")])


def _said(error: BaseException) -> str:
    """Return the message of an error that a class raised. (The validators of attrs have more arguments than the message.)"""
    text = error.args[0] if error.args and isinstance(error.args[0], str) else str(error)
    return " ".join(text.split()) or type(error).__name__


def at(name: str | int, misfit: Misfit) -> list[tuple[str, str]]:
    """Return the problems of a value as those of what holds it, at a name or a place."""
    if isinstance(name, int):
        step = f"[{name}]"
    else:
        step = f".{name}" if name.isidentifier() and len(name) < 100 else f"[{cut(name)!r}]"
    return [(step + path, text) for path, text in misfit.problems]


def _json_kind(value: Any) -> str:
    """Return the kind of a JSON value, in the words of JSON."""
    for scalar in SCALARS.values():
        if isinstance(value, scalar.accepted):
            return scalar.expected
    return "an array" if is_list(value) else "an object" if is_mapping(value) else type(value).__name__


class _Maker:
    """The making of a type's hook, and of those of the types that it holds. A type that holds itself has its own hook."""

    def __init__(self) -> None:
        self._made: dict[object, Hook] = {}

    def hook(self, kind: Any) -> Hook:
        """Return the hook of a type."""
        try:
            found = self._made.get(kind)
        except TypeError:
            return self._hook(resolved(kind))
        if found is not None:
            return found
        made: list[Hook] = []

        def later(value: Any) -> Any:
            return made[0](value)

        self._made[kind] = later  # for a type that holds itself
        made.append(self._hook(resolved(kind)))
        self._made[kind] = made[0]
        return made[0]

    def _hook(self, kind: Any) -> Hook:
        origin, arguments = get_origin(kind), get_args(kind)
        cls: Any = origin or kind
        if origin is Annotated:
            return _by_pydantic(kind) if is_pydantic(kind) else self._annotated(kind)
        if kind in ANYTHING:
            return _unchanged
        if kind in SCALARS:
            return _float if kind is float else partial(_scalar, SCALARS[kind].expected, kind)
        if is_union(kind):
            return self._union(members_of(kind))
        if origin is Literal:
            return partial(_choice, _choices(arguments))
        if is_kind(cls, enum.Enum):
            return partial(_choice, _choices([*cls]))
        if is_pydantic(kind):
            return _by_pydantic(kind)
        return self._container(kind, cls, arguments) or self._class(kind, cls)

    def _annotated(self, kind: Any) -> Hook:
        """Return the hook of an annotated type. Constraints of `msgspec.Meta` are checked by msgspec."""
        inner = self.hook(get_args(kind)[0])
        limits = [extra for extra in kind.__metadata__ if isinstance(extra, msgspec.Meta)]
        return partial(_limited, inner, limits) if limits else inner

    def _union(self, members: Sequence[Any]) -> Hook:
        hooks = [(member, self.hook(member), _field_names(resolved(member))) for member in members]
        return partial(_union, hooks)

    def _container(self, kind: Any, cls: Any, arguments: Sequence[Any]) -> Hook | None:
        """Return the hook of a list, a set, a tuple or a mapping; None for other types."""
        if is_row(cls):
            return None
        if is_kind(cls, tuple) and get_origin(kind) and arguments[-1:] != (Ellipsis,):
            hooks = [self.hook(each) for each in arguments if each != ()]
            return partial(_row, [*enumerate(hooks)], len(hooks), tuple)
        if is_items(cls):
            return partial(
                _items, self.hook(arguments[0] if arguments else Any), _usual(cls, (list, tuple, set, frozenset))
            )
        if is_kind(cls, Mapping) and not is_typed_dict(cls):
            keys, values = arguments if len(arguments) == 2 else (str, Any)
            return partial(_table, _keys(resolved(keys)), self.hook(values), _usual(cls, (dict,)))
        return None

    def _class(self, kind: Any, cls: Any) -> Hook:
        """Return the hook of a class with fields; all other types are msgspec's."""
        fields = fields_of(kind)
        if fields is None:
            return partial(_by_msgspec, kind)
        hooks = {field.json_name: self.hook(field.kind) for field in fields}
        if is_row(cls):
            names = [(field.name, hooks[field.json_name]) for field in fields]
            least = sum(field.required for field in fields)
            return partial(_row, names, least, partial(_instance, cls))
        if (attributes := init_names(cls)) is not None:
            return _by_cattrs(
                kind, [(name, field, hooks[field.json_name]) for name, field in zip(attributes, fields, strict=True)]
            )
        forbids_others = is_kind(cls, msgspec.Struct) and cls.__struct_config__.forbid_unknown_fields
        return partial(_object, cls, [(field, hooks[field.json_name]) for field in fields], forbids_others)


@lru_cache(maxsize=512)
def _kept(kind: object) -> Hook:
    return _Maker().hook(kind)


def _unchanged(value: object) -> object:
    return value


def _scalar(expected: str, kind: type, value: object) -> object:
    if type(value) is not kind:
        raise _misfit(expected, value)
    return value


def _float(value: object) -> float:
    if type(value) is float:
        return value
    if type(value) is not int:
        raise _misfit("a number", value)
    try:
        return float(value)
    except OverflowError:
        raise Misfit([("", "the number is too large")]) from None


def _limited(inner: Hook, limits: Sequence[msgspec.Meta], value: Any) -> object:
    found = inner(value)
    for limit in limits:
        annotated: Any = Annotated[type(value), limit]
        try:
            msgspec.convert(value, annotated)
        except msgspec.ValidationError as error:
            raise Misfit([("", _lower(error))]) from None
        except TypeError:  # the constraint is for another type
            continue
    return found


def _union(members: Sequence[tuple[Any, Hook, frozenset[str]]], value: Any) -> object:
    """Return a value as an instance of the member that fits; of several classes, that which has the most of its fields."""
    best: tuple[int, Any] | None = None
    misfits: list[tuple[Any, Misfit]] = []
    for member, hook, names in members:
        try:
            found = hook(value)
        except Misfit as misfit:
            misfits.append((member, misfit))
            continue
        if resolved(member) is type(value):
            return found
        known = len(names & value.keys()) if is_mapping(value) else 0
        if best is None or known > best[0]:
            best = known, found
    if best is not None:
        return best[1]
    near = [(member, each) for member, each in misfits if any(path for path, _ in each.problems)]
    if len(near) == 1:  # the others are of another kind altogether, like None
        raise near[0][1]
    reasons = [f"{name_of(member)}: {each.message('')}".replace(": : ", ": ") for member, each in near]
    expected = " or ".join([name_of(member) for member, *_ in members])
    given = "" if near else f", got {_json_kind(value)}"
    raise Misfit([("", f"expected {expected}{given}" + (f" ({'; '.join(reasons)})" if reasons else ""))])


def _field_names(kind: Any) -> frozenset[str]:
    """Return the names of a class's fields in JSON."""
    if is_pydantic(kind):
        fields: Mapping[str, Any] = getattr(kind, "__pydantic_fields__", {})
        return frozenset({each.alias or name for name, each in fields.items()})
    return frozenset({field.json_name for field in fields_of(kind) or ()})


def _choices(choices: Sequence[Any]) -> dict[Any, Any]:
    values = [(each.value if isinstance(each, enum.Enum) else each, each) for each in choices]
    return {(type(value), value): each for value, each in values}


def _choice(choices: Mapping[Any, Any], value: Any) -> object:
    try:
        return choices[type(value), value]
    except (KeyError, TypeError):
        shown = ", ".join([msgspec.json.encode(choice).decode() for _, choice in choices])
        text = msgspec.json.encode(value).decode()
        given = text if isinstance(value, (str, int)) and len(text) <= 50 else _json_kind(value)
        raise Misfit([("", f"expected one of {shown}, got {given}")]) from None


def _usual(cls: Any, usual: Sequence[Any]) -> Any:
    """Return a class, or the usual one for an abstract class."""
    return next((kind for kind in usual if issubclass(kind, cls)), cls)


def _items(item: Hook, make: Any, value: object) -> object:
    if not is_list(value):
        raise _misfit("an array", value)
    try:
        found = [item(each) for each in value]
    except Misfit:
        raise Misfit(_problems_of([(n, item, each) for n, each in enumerate(value)])) from None
    return found if make is list else make(found)


def _problems_of(values: Sequence[tuple[str | int, Hook, Any]]) -> list[tuple[str, str]]:
    problems: list[tuple[str, str]] = []
    for name, hook, value in values:
        try:
            hook(value)
        except Misfit as misfit:
            problems += at(name, misfit)
    return problems


def _row(hooks: Sequence[tuple[Any, Hook]], least: int, make: Any, value: object) -> object:
    """Return an array with a type for each place as a tuple or an instance of a class."""
    if not is_list(value):
        raise _misfit("an array", value)
    if not least <= len(value) <= len(hooks):
        expected = f"{least}" if least == len(hooks) else f"{least} to {len(hooks)}"
        raise Misfit([("", f"expected an array of {expected}, got one of {len(value)}")])
    try:
        found = [(name, hook(each)) for (name, hook), each in zip(hooks, value, strict=False)]
    except Misfit:
        numbered = zip(hooks, value, strict=False)
        raise Misfit(_problems_of([(n, hook, each) for n, ((_, hook), each) in enumerate(numbered)])) from None
    return tuple([each for _, each in found]) if make is tuple else make(dict(found))


def _table(keys: Hook | None, values: Hook, make: Any, value: object) -> object:
    if not is_mapping(value):
        raise _misfit("an object", value)
    try:
        found = {key: values(each) for key, each in value.items()}
    except Misfit:
        raise Misfit(_problems_of([(key, values, each) for key, each in value.items()])) from None
    if keys is not None:
        found = {keys(key): each for key, each in found.items()}
    return found if make is dict else make(found)


def _keys(kind: Any) -> Hook | None:
    """Return the hook of an object's keys, which are strings in JSON whatever they stand for; None for strings."""
    if kind in (str, *ANYTHING):
        return None
    from_text: dict[str, Any] = {}
    if is_kind(kind, enum.Enum) or get_origin(kind) is Literal:
        choices = _choices([*kind] if is_kind(kind, enum.Enum) else get_args(kind))
        from_text = {str(value): each for (_, value), each in choices.items()}

    def hook(key: str) -> object:
        if from_text:
            if key not in from_text:
                raise Misfit(at(key, Misfit([("", f"expected one of {', '.join(from_text)} as the name")])))
            return from_text[key]
        try:
            return msgspec.convert(key, kind, strict=False)
        except msgspec.ValidationError as error:
            raise Misfit(at(key, Misfit([("", f"as the name, {_lower(error)}")]))) from None

    return hook


def _instance(cls: Any, given: dict[str, Any]) -> object:
    given.pop(TAG, None)
    try:
        return cls(**given)
    except Exception as error:  # noqa: BLE001  # a class may refuse values by any error
        raise Misfit([("", _said(error))]) from None


def _by_cattrs(kind: Any, fields: Sequence[tuple[str, Field, Hook]]) -> Hook:
    """Return the hook of an attrs class or a dataclass: the function that cattrs writes for it, with our hooks for its fields.

    (By itself, cattrs would convert numbers and texts to one another.)

    Args:
        fields: the fields, each after the name of its attribute.
    """
    from cattrs import ClassValidationError, Converter, gen

    options: Any = {
        name: gen.override(rename=field.json_name, struct_hook=partial(_without_type, hook))
        for name, field, hook in fields
    }
    makers: Any = gen  # whose types are partly unknown
    parameters = () if get_args(kind) else getattr(kind, "__parameters__", ())
    cls: Any = kind[tuple([Any for _ in parameters])] if parameters else kind  # cattrs wants an argument for each
    make = makers.make_dict_structure_fn(cls, Converter(), _cattrs_detailed_validation=True, **options)
    json_names = {name: field.json_name for name, field, _ in fields}

    def hook(value: object) -> object:
        if not is_mapping(value):
            raise _misfit("an object", value)
        try:
            return make(value, cls)
        except ClassValidationError as errors:
            noted, others = errors.group_exceptions()
            problems = [each for error, note in noted for each in at(json_names[note.name], _as_misfit(error))]
            raise Misfit([*problems, *[("", _said(error)) for error in others]]) from None

    return hook


def _without_type(hook: Hook, value: object, _: object) -> object:
    return hook(value)


def _as_misfit(error: BaseException) -> Misfit:
    """Return what cattrs has noted of a field: its misfit, or a KeyError because it is missing."""
    if isinstance(error, Misfit):
        return error
    if isinstance(error, KeyError):
        return Misfit([("", "it is missing")])
    raise error


def _object(cls: Any, fields: Sequence[tuple[Field, Hook]], forbids_others: bool, value: Any) -> object:
    """Return an object as an instance of a class. (Called, a TypedDict makes a dict.)"""
    if not is_mapping(value):
        raise _misfit("an object", value)
    given: dict[str, Any] = {}
    problems: list[tuple[str, str]] = []
    for field, hook in fields:
        if field.json_name in value:
            try:
                given[field.name] = hook(value[field.json_name])
            except Misfit as misfit:
                problems += at(field.json_name, misfit)
        elif field.required:
            problems += at(field.json_name, Misfit([("", "it is missing")]))
    if forbids_others:
        names = {field.json_name for field, _ in fields}
        for name in sorted(value.keys() - names):
            problems += at(name, Misfit([("", f"there is no such field; expected {', '.join(sorted(names))}")]))
    if problems:
        raise Misfit(problems)
    return _instance(cls, given)


def _by_msgspec(kind: Any, value: object) -> object:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise Misfit([("", _lower(error))]) from None


def _by_pydantic(kind: Any) -> Hook:
    import pydantic

    adapter: Any = pydantic.TypeAdapter(kind)

    def hook(value: object) -> object:
        try:
            # As JSON, because in pydantic's strict mode a date, for example, may then be a string.
            return adapter.validate_json(msgspec.json.encode(value), strict=True)
        except pydantic.ValidationError as error:
            found = error.errors(include_url=False, include_context=False, include_input=False)
            raise Misfit([(_path(each["loc"]), _lower(each["msg"])) for each in found]) from None
        except UnicodeEncodeError:
            raise Misfit([("", "a text has half a character (a surrogate)")]) from None

    return hook


def _path(steps: Sequence[str | int]) -> str:
    path = ""
    for step in reversed(steps):
        ((path, _),) = at(step, Misfit([(path, "")]))
    return path


def _lower(error: object) -> str:
    """Return a message of msgspec or pydantic in lower case, as those of all others are."""
    text = str(error).replace(" - at `$", " at `")
    return text[:1].lower() + text[1:]
