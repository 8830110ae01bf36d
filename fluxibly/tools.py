"""Python functions as tools: what a model is told of a function, and what goes into it and comes out of it as JSON."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Generic, NamedTuple, cast, get_args, get_origin, overload

import attrs

from fluxibly._checks import is_list, is_mapping, kind_of
from fluxibly._schemas.classes import schemas_of
from fluxibly._schemas.docstrings import Described, described
from fluxibly._schemas.kinds import hints_of
from fluxibly._schemas.structuring import structured
from fluxibly.errors import ConfigError
from fluxibly.messages import Content, Tool
from fluxibly.parts import Media, Text, ToolCall

if TYPE_CHECKING:
    from inspect import Parameter

    from typing_extensions import ParamSpec, TypeVar

    P = ParamSpec("P", default=...)
    R = TypeVar("R", default=Any)
else:
    from typing import ParamSpec, TypeVar

    P = ParamSpec("P")
    R = TypeVar("R")

__all__ = ["BadArguments", "FunctionTool", "tool"]

_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


class BadArguments(ValueError):
    """The arguments of a tool call do not fit its function. The message is for the model, and says what was expected."""


class _Argument(NamedTuple):
    """A parameter of a function, as a model may give it."""

    name: str
    kind: object
    """Its type; `Any` takes the JSON value as it is."""
    required: bool


@attrs.frozen(repr=False, eq=False)
class FunctionTool(Tool, Generic[P, R]):
    """A tool with the function that carries it out, made by `tool`. Calling it calls the function.

    Two are equal if a model is told the same of them.
    """

    function: Callable[P, R] = attrs.field(kw_only=True, repr=False, eq=False)
    _arguments: tuple[_Argument, ...] = attrs.field(default=(), kw_only=True, repr=False, eq=False, alias="arguments")
    _takes_any: bool = attrs.field(default=False, kw_only=True, repr=False, eq=False, alias="takes_any")
    """Whether the function takes arguments of any name (`**kwargs`)."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.function(*args, **kwargs)

    @property
    def is_async(self) -> bool:
        """Whether a call of the function returns a coroutine. (A sync function may return one as well.)"""
        return _is_kind(self.function, inspect.iscoroutinefunction)

    def read(self, call: ToolCall) -> dict[str, Any]:
        """Return the arguments of a call as values of the types that the function takes.

        The function may change them: they share nothing with the call.

        Raises:
            BadArguments: they are not JSON, one is missing, unknown or of the wrong type. The message lists all problems.
        """
        if call.error is not None:
            raise BadArguments(f"{call.error}; expected a JSON object with {self._expected()}")
        try:
            given: Mapping[str, Any] = _copied(call.arguments)
        except RecursionError:
            expected = f"expected a JSON object with {self._expected()}"
            raise BadArguments(f"the arguments are nested too deeply; {expected}") from None
        known = {argument.name for argument in self._arguments}
        problems: list[str] = []
        if not self._takes_any:
            unknown = [name for name in given if name not in known]
            problems += [f"{name} is unknown; expected {self._expected()}" for name in unknown]
        found: dict[str, Any] = {}
        for name, kind, required in self._arguments:
            if name in given:
                try:
                    found[name] = given[name] if kind is Any else structured(given[name], kind, name)
                except ValueError as error:
                    problems.append(str(error))
            elif required:
                problems.append(f"{name} is required, and missing")
        if problems:
            raise BadArguments("; ".join(problems))
        return {**given, **found} if self._takes_any else found

    def _expected(self) -> str:
        names = [f"{each.name} (required)" if each.required else each.name for each in self._arguments]
        return ", ".join(names) or "no arguments"

    def content_of(self, result: object) -> Content:
        """Return what the function has returned as the content of a tool's message.

        A str, `Text`, `Image`, `Audio`, `Document`, and a list of these are content as they are. Everything else becomes
        JSON.

        Raises:
            TypeError: JSON has no such value.
        """
        if isinstance(result, Enum):
            result = result.value
        if isinstance(result, str):
            return result
        if isinstance(result, (Text, Media)):
            return [result]
        if _is_content(result):
            return cast("Content", result)
        return _as_json(result, self.name)


def _copied(value: Any) -> Any:
    """Return a copy of a JSON value."""
    if is_mapping(value):
        return {name: _copied(each) for name, each in value.items()}
    return [_copied(each) for each in value] if is_list(value) else value


def _is_content(value: object) -> bool:
    """Whether a value is a list of texts and media. A list of bare str is JSON."""
    if not isinstance(value, (list, tuple)):
        return False
    parts = cast("Sequence[object]", value)
    return any(isinstance(part, (Text, Media)) for part in parts) and all(
        isinstance(part, (str, Text, Media)) for part in parts
    )


def _as_json(value: object, name: str) -> str:
    import json

    import msgspec

    try:
        try:
            return msgspec.json.encode(value, enc_hook=_plain).decode()
        except (OverflowError, UnicodeEncodeError):  # a number of more than 64 bits, half of a surrogate pair
            return json.dumps(msgspec.to_builtins(value, enc_hook=_plain))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise TypeError(
            f"the tool {name} returned {kind_of(value)}, which is not JSON: {error}; return a str, numbers, lists, dicts, "
            "instances of attrs, dataclasses or pydantic, or Text, Image, Audio and Document"
        ) from None


def _plain(value: Any) -> object:
    """Return a value that msgspec does not know as one that it knows."""
    dump = getattr(value, "model_dump", None)  # pydantic's
    if callable(dump) and not isinstance(value, type):
        return dump(mode="json")
    if is_mapping(value):
        return dict(value)
    raise TypeError(f"JSON has no {type(value).__name__}")


@overload
def tool(
    function: Callable[P, R],
    *,
    name: str | None = None,
    description: str | None = None,
    parameters: Mapping[str, Any] | None = None,
) -> FunctionTool[P, R]: ...
@overload
def tool(
    *, name: str | None = None, description: str | None = None, parameters: Mapping[str, Any] | None = None
) -> Callable[[Callable[P, R]], FunctionTool[P, R]]: ...
def tool(
    function: Callable[..., Any] | None = None,
    *,
    name: str | None = None,
    description: str | None = None,
    parameters: Mapping[str, Any] | None = None,
) -> Any:
    """Make a tool of a Python function, sync or async, for `Tools` or for `llm.complete(…, tools=[…])`::

        @tool
        def get_weather(city: Annotated[str, "its English name"], unit: Literal["c", "f"] = "c") -> str:
            "Return the weather in a city."

    A parameter's type may be an attrs class, a dataclass, a TypedDict, a msgspec Struct, a pydantic model, an Enum, a
    `Literal`, a list, a dict, a union and so on; a parameter without an annotation takes any JSON value. What is said of a
    parameter in the docstring (in the style of Google, NumPy or Sphinx), or in `Annotated[str, "its English name"]`, goes to
    the model. A parameter with a default need not be given. Arguments that a `functools.partial` has set by name are not shown to the
    model, which cannot set it.

    Args:
        function: a function, a bound method, a partial or another callable. Without it, `tool(name=…)` is a decorator.
        name: by default the function's own.
        description: by default what the docstring says before its sections.
        parameters: a JSON Schema of the arguments, in place of the annotations. The function then gets the JSON values as
            they are, and only their names are checked. It may take `**kwargs`.

    Raises:
        ConfigError: the function cannot be a tool: a parameter is positional-only or `*args`, a type has no JSON Schema, it
            is a generator function, and so on. The message says what to write.
    """
    if function is None:
        return partial(tool, name=name, description=description, parameters=parameters)
    if isinstance(function, FunctionTool):
        return _changed(cast("FunctionTool[..., Any]", function), name, description, parameters)
    return _made(function, name, description, parameters)


def _changed(
    made: FunctionTool[..., Any], name: str | None, description: str | None, parameters: Mapping[str, Any] | None
) -> FunctionTool[..., Any]:
    name = made.name if name is None else name
    description = made.description if description is None else description
    if parameters is not None:
        return _made(made.function, name, description, parameters)
    if (name, description) == (made.name, made.description):
        return made
    called = _checked_name(name, made)
    return attrs.evolve(made, name=called, description=_checked_description(description, called))


def _made(
    function: Callable[..., Any], name: str | None, description: str | None, parameters: Mapping[str, Any] | None
) -> FunctionTool[..., Any]:
    if not callable(function):
        raise ConfigError(f"tool: expected a function, got {kind_of(function)}; write tool(function)")
    inner, bound = _inner(function)
    called = _checked_name(name, inner)
    if isinstance(function, type):
        raise ConfigError(
            f"tool({called}): expected a function, got a class; write a function that returns an instance"
        )
    for test in (inspect.isgeneratorfunction, inspect.isasyncgenfunction):
        if _is_kind(function, test):
            raise ConfigError(
                f"tool({called}): expected a function that returns its value, got a generator function; return a list"
            )
    takes = _signature(function, inner, called, bound)
    takes_any = any(each.kind is each.VAR_KEYWORD for each in takes)
    named = [each for each in takes if each.kind is not each.VAR_KEYWORD]
    said = described(_docstring(function, inner), [each.name for each in named])
    text = said.text if description is None else _checked_description(description, called)
    if parameters is not None:
        if not is_mapping(parameters):
            raise ConfigError(
                f"tool({called}): parameters: expected a JSON Schema (a mapping), got {kind_of(parameters)}"
            )
        arguments = _of_schema(parameters, named, called, takes_any=takes_any)
        return FunctionTool(called, text, parameters, function=function, arguments=arguments, takes_any=takes_any)
    if takes_any:
        (kwargs,) = [each.name for each in takes if each.kind is each.VAR_KEYWORD]
        raise ConfigError(
            f"tool({called}): expected parameters that are named, got **{kwargs}; name them, or write "
            "tool(function, parameters={…}) with their JSON Schema"
        )
    hints = _hints(inner, called)
    kinds = {each.name: hints.get(each.name, Any) for each in named}
    arguments = tuple([_Argument(each.name, _bare(kinds[each.name]), each.default is each.empty) for each in named])
    return FunctionTool(called, text, _schema(kinds, arguments, said, called), function=function, arguments=arguments)


def _inner(function: Any) -> tuple[Any, set[str]]:
    """Return the function that a callable stands for, and the names of the parameters that partials have set."""
    bound: set[str] = set()
    while isinstance(function, partial):
        bound |= function.keywords.keys()
        function = function.func
    if not hasattr(function, "__name__"):  # an object with `__call__`
        function = getattr(function.__class__, "__call__", function)  # noqa: B004  # the method itself
    return function, bound


def _is_kind(function: Any, test: Callable[[Any], bool]) -> bool:
    """Whether a callable, or the function that it stands for, is of a kind of `inspect`."""
    inner, _ = _inner(function)
    return test(function) or test(inner)


def _checked_name(name: str | None, inner: Any) -> str:
    found = name
    if found is None:
        found = getattr(inner, "__name__", inner.__class__.__name__)
        if found == "__call__":
            found = inner.__qualname__.split(".")[-2]
    if not isinstance(found, str) or _NAME.fullmatch(found) is None:
        got = repr(found) if isinstance(found, str) else kind_of(found)
        raise ConfigError(
            f"tool: expected a name of at most 128 ASCII letters, digits, '_', '-', '.' and ':', got {got}; write "
            "tool(function, name='…')"
        )
    return found


def _checked_description(description: object, called: str) -> str:
    if not isinstance(description, str):
        raise ConfigError(f"tool({called}): description: expected a str, got {kind_of(description)}")
    return description


def _docstring(function: Any, inner: Any) -> str:
    """Return what is said of a callable: of an object with `__call__`, by that method or else by its class."""
    if getattr(inner, "__name__", None) != "__call__":
        return inspect.getdoc(inner) or ""
    while isinstance(function, partial):
        function = function.func
    # Not by `inspect.getdoc`, which finds that of `type.__call__`: "Call self as a function."
    return inner.__doc__ or type(function).__doc__ or ""


def _signature(function: Any, inner: Any, called: str, bound: set[str]) -> list[Parameter]:
    """Return the parameters that a model may set.

    Raises:
        ConfigError: the function has none that can be read, or one that has no name in a call.
    """
    try:
        parameters = [*inspect.signature(function).parameters.values()]
    except (TypeError, ValueError):
        raise ConfigError(
            f"tool({called}): expected a function with a signature, got {kind_of(function)}; write a function of your own "
            "that calls it"
        ) from None
    is_method = "." in getattr(inner, "__qualname__", "").rpartition("<locals>.")[2]
    if function is inner and is_method and parameters and parameters[0].name in ("self", "cls"):
        raise ConfigError(
            f"tool({called}): expected a method of an object, got the function of its class; write tool(object.{called})"
        )
    for each in parameters:
        if each.kind is each.POSITIONAL_ONLY:
            raise ConfigError(
                f"tool({called}): {each.name}: expected a parameter that can be given by name, got a positional-only one; "
                "leave the / out, or write a function that calls this one"
            )
        if each.kind is each.VAR_POSITIONAL:
            raise ConfigError(
                f"tool({called}): expected parameters that are named, got *{each.name}; write {each.name}: list[…]"
            )
    return [each for each in parameters if each.name not in bound]


def _hints(inner: Any, called: str) -> dict[str, Any]:
    try:
        return hints_of(inspect.unwrap(inner))
    except ConfigError as error:
        raise ConfigError(f"tool({called}): {error}, or write tool(function, parameters={{…}})") from None


def _schema(kinds: Mapping[str, Any], arguments: Sequence[_Argument], said: Described, called: str) -> dict[str, Any]:
    """Return the JSON Schema of a function's arguments."""
    described_kinds = {name: _with_description(kind, said.parameters.get(name)) for name, kind in kinds.items()}
    try:
        schemas, definitions = schemas_of([*described_kinds.values()])
    except ConfigError:
        for name, kind in described_kinds.items():  # to name the parameter
            try:
                schemas_of([kind])
            except ConfigError as error:
                raise ConfigError(
                    f"tool({called}): {name}: {error}, or write tool(function, parameters={{…}}) with a JSON Schema"
                ) from None
        raise
    found: dict[str, Any] = {
        "type": "object",
        "properties": dict(zip(kinds, schemas, strict=True)),
        "additionalProperties": False,
    }
    if required := [each.name for each in arguments if each.required]:
        found["required"] = required
    return found | ({"$defs": definitions} if definitions else {})


def _of_schema(
    parameters: Mapping[str, Any], named: Sequence[Parameter], called: str, *, takes_any: bool
) -> tuple[_Argument, ...]:
    """Return the arguments that a JSON Schema names. Their values are not converted."""
    properties: object = parameters.get("properties", {})
    required: object = parameters.get("required", [])
    if not is_mapping(properties) or not is_list(required):
        raise ConfigError(f"tool({called}): parameters: expected the JSON Schema of an object, with 'properties'")
    names = {each.name for each in named}
    unknown = [name for name in properties if name not in names]
    if unknown and not takes_any:
        raise ConfigError(
            f"tool({called}): parameters: expected only parameters that the function takes, got {', '.join(unknown)}; add "
            "**kwargs to the function"
        )
    missing = [each.name for each in named if each.default is each.empty and each.name not in properties]
    if missing:
        raise ConfigError(f"tool({called}): parameters: expected a property for {', '.join(missing)}, got none")
    needed = {*required, *[each.name for each in named if each.default is each.empty]}
    return tuple([_Argument(name, Any, name in needed) for name in properties])


def _with_description(kind: Any, text: str | None) -> Any:
    """Return a type with the description that a docstring has, unless it has one of its own."""
    if get_origin(kind) is Annotated:
        for extra in get_args(kind)[1:]:
            own = extra if isinstance(extra, str) else getattr(extra, "description", None)
            if isinstance(own, str) and own:
                return Annotated[kind, own]
    return kind if text is None else Annotated[kind, text]


def _bare(kind: Any) -> Any:
    """Return a type without the descriptions that are beside it."""
    if get_origin(kind) is Annotated and all(isinstance(extra, str) for extra in get_args(kind)[1:]):
        return get_args(kind)[0]
    return kind
