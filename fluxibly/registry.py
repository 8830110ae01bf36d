"""Frameworks and middleware by name: built in, from other packages (entry points), and registered by the user."""

from __future__ import annotations

import importlib
import importlib.util
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, cast

import attrs

from fluxibly._checks import did_you_mean, is_list, is_mapping, kind_of, nearest, unknown_settings
from fluxibly._extras import pip_install
from fluxibly.config import LLMConfig
from fluxibly.errors import ConfigError, FrameworkNotRegistered, Problems
from fluxibly.flow import Middleware

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint
    from pathlib import Path

Kind: TypeAlias = Literal["frameworks", "middleware"]
ProviderFactory: TypeAlias = Callable[..., Any]
MiddlewareFactory: TypeAlias = Callable[..., Middleware]


class Framework(NamedTuple):
    """A factory of providers. `module` is loaded at first use; its provider classes take an `LLMConfig`."""

    name: str
    module: str = ""
    sync_name: str = ""
    async_name: str | None = None
    sync: ProviderFactory | None = None
    asynchronous: ProviderFactory | None = None
    extra: str | None = None
    """The extra that the framework needs: a key of `EXTRAS`."""
    needs: str | None = None
    """The module that the extra installs."""
    env_var: str | None = None
    """The environment variable with the API key; None if the framework needs no key, or finds it elsewhere."""
    instead: tuple[str, ...] = ()
    """Other environment variables, each of which takes the place of `env_var`."""
    url_var: str | None = None
    """The environment variable from which the address is taken if `api_base` is not set."""
    plugin: EntryPoint | None = None
    """The entry point of another package that names the factory."""

    @property
    def installed(self) -> bool:
        """Whether the module that the framework needs can be imported."""
        return self.needs is None or importlib.util.find_spec(self.needs) is not None

    @property
    def to_install(self) -> str:
        """The command that installs the missing packages."""
        return pip_install(*([] if self.extra is None else [self.extra]))

    def factory(self, *, asynchronous: bool) -> ProviderFactory:
        """Return the class or function that makes the provider.

        Raises:
            ConfigError: packages that the framework needs are not installed, or the plugin is broken.
        """
        if self.plugin is not None:
            return _load(self.plugin)
        if not self.installed:
            raise ConfigError(f"the framework {self.name!r} needs packages that are not installed: {self.to_install}")
        if self.sync is not None:
            return self.asynchronous or self.sync if asynchronous else self.sync
        module = importlib.import_module(self.module)
        name = self.async_name or self.sync_name if asynchronous else self.sync_name
        factory: ProviderFactory = getattr(module, name)
        return factory


def _built_in(name: str, module: str, stem: str, **options: Any) -> Framework:
    return Framework(
        name=name,
        module=f"fluxibly.providers.{module}",
        sync_name=f"{stem}Provider",
        async_name=f"Async{stem}Provider",
        **options,
    )


@cache
def _built_in_frameworks() -> Mapping[str, Framework]:
    # Late, because only a program that makes a provider needs the table.
    from fluxibly.providers.services import SERVICES

    found = [
        _built_in("echo", "echo", "Echo"),
        _built_in("local", "local", "Local", extra="local", needs="xllamacpp"),
        *(
            _built_in(
                name,
                OPENAI.rpartition(".")[2],
                "OpenAI",
                env_var=row.env_var if row.key_required else None,
                instead=(row.url_var,) if row.title == "OpenAI" else (),  # a server of one's own may need no key
                url_var=row.url_var,
            )
            for name, row in SERVICES.items()
        ),
        _built_in(
            "anthropic",
            "anthropic",
            "Anthropic",
            env_var="ANTHROPIC_API_KEY",
            instead=("ANTHROPIC_AUTH_TOKEN",),
            url_var="ANTHROPIC_BASE_URL",
        ),
        _built_in(
            "gemini",
            "gemini",
            "Gemini",
            env_var="GEMINI_API_KEY",
            instead=("GOOGLE_API_KEY",),
            url_var="GOOGLE_GEMINI_BASE_URL",
        ),
        _built_in("ollama", "ollama", "Ollama", url_var="OLLAMA_HOST"),
        _built_in("ollama-generate", "ollama", "OllamaGenerate", url_var="OLLAMA_HOST"),
        _built_in("langchain", "langchain", "LangChain", extra="langchain", needs="langchain"),
        _built_in("litellm", "litellm", "LiteLLM", extra="litellm", needs="litellm"),
    ]
    return {framework.name: framework for framework in found}


OPENAI = "fluxibly.providers.openai"
"""The module of all frameworks that speak a dialect of OpenAI's, and have quirks."""
_BUILT_IN_MIDDLEWARE = {
    "tracing": "Tracing",
    "logging": "Logging",
    "metrics": "Metrics",
    "timing": "Timing",
    "stream_meter": "StreamMeter",
    "validation": "Validation",
    "retry": "Retry",
}
"""The classes, by their names in configurations, in the order of a stack: the outermost first."""
_DEFAULT = ("default", "default_stack")
"""The names of the default stack in configurations."""

_WHAT = {"fluxibly.frameworks": "framework", "fluxibly.middleware": "middleware"}
"""What the entry points of a group are."""

_lock = threading.Lock()
_frameworks: dict[str, Framework] = {}
_middleware: dict[str, MiddlewareFactory] = {}


def register_llm_framework(
    name: str, provider: ProviderFactory, *, async_provider: ProviderFactory | None = None, replace: bool = False
) -> None:
    """Register a framework, so that `LLMConfig(framework=name)` finds it.

    Args:
        name: the name for configurations.
        provider: a class or function that takes the `LLMConfig` and returns a `Provider`.
        async_provider: the same for an `AsyncProvider`. Without it `AsyncLLM` runs `provider` in worker threads, unless
            that provider is asynchronous itself.
        replace: take over a name that is in use. (A class may always replace an earlier definition of itself, as
            notebooks do.)

    Raises:
        ValueError: the name is in use, or empty.
        TypeError: `provider` cannot be called.
    """
    _check(name, provider, "framework")
    new = Framework(name=name, sync=provider, asynchronous=async_provider)
    with _lock:
        old = _frameworks.get(name)
        taken = old is not None and not _same(old.sync, provider)
        if not replace and (
            taken or (old is None and (name in _built_in_frameworks() or name in _entry_points("frameworks")))
        ):
            raise ValueError(f"the LLM framework {name!r} is registered already; pass replace=True to take it over")
        _frameworks[name] = new


def register_middleware(name: str, factory: MiddlewareFactory, *, replace: bool = False) -> None:
    """Register a middleware, so that YAML can name it.

    Args:
        name: the name for configurations.
        factory: a class or function that takes the settings as keywords and returns a middleware; or a generator function
            that is the middleware itself.
        replace: take over a name that is in use.

    Raises:
        ValueError: the name is in use, or empty.
        TypeError: `factory` cannot be called.
    """
    _check(name, factory, "middleware")
    with _lock:
        old = _middleware.get(name)
        taken = old is not None and not _same(old, factory)
        built_in = name in _BUILT_IN_MIDDLEWARE or name in _DEFAULT
        if not replace and (taken or (old is None and (built_in or name in _entry_points("middleware")))):
            raise ValueError(f"the middleware {name!r} is registered already; pass replace=True to take it over")
        _middleware[name] = factory


def _check(name: object, factory: object, what: str) -> None:
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{what} name: expected a non-empty str, got {name!r}")
    if not callable(factory):
        raise TypeError(f"the {what} {name!r}: expected a class or another callable, got {kind_of(factory)}")


def _same(old: object, new: object) -> bool:
    """Whether two classes are the same, or the second is a new definition of the first."""
    if old is new:
        return True
    names = [(getattr(x, "__module__", None), getattr(x, "__qualname__", None)) for x in (old, new)]
    return names[0] == names[1] and None not in names[0]


@cache
def _entry_points(kind: Kind) -> Mapping[str, EntryPoint]:
    """Return the entry points of a kind by name. Of several packages with one name, the first by its name wins."""
    return {point.name: point for point in reversed(_installed_points(kind))}


def _installed_points(kind: Kind) -> list[EntryPoint]:
    from importlib.metadata import entry_points

    group = f"fluxibly.{kind}"
    try:
        found = list(entry_points(group=group))
    except Exception:  # noqa: BLE001  # one package's unreadable metadata must not hide the others
        found = [point for point in _readable_points() if point.group == group]
    return sorted(found, key=lambda point: (point.name, package_of(point)))


def _readable_points() -> Iterator[EntryPoint]:
    """Yield the entry points of each package whose metadata can be read."""
    from importlib.metadata import distributions

    seen: set[str] = set()
    for distribution in distributions():
        try:
            name, points = distribution.name.lower(), list(distribution.entry_points)
        except Exception:  # noqa: BLE001, S112  # whatever is wrong with that package
            continue
        if name not in seen:  # a package that is on the path twice is imported from its first place
            seen.add(name)
            yield from points


def package_of(point: EntryPoint) -> str:
    """Return the name and version of the package that has an entry point."""
    try:
        return f"{point.dist.name} {point.dist.version}"  # type: ignore[union-attr]
    except Exception:  # noqa: BLE001  # an entry point without a package, or a package without readable metadata
        return "an unknown package"


def _load(point: EntryPoint) -> Callable[..., Any]:
    """Import what an entry point names.

    Raises:
        ConfigError: that fails, or what it names cannot be called.
    """
    what = f"{_WHAT[point.group]} {point.name!r}: the entry point {point.value!r} of {package_of(point)}"
    try:
        loaded = point.load()
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # a module may end with SystemExit, or with the panic of a library in Rust
        raise ConfigError(f"{what} cannot be imported: {_named(error)}; repair or uninstall that package") from error
    if not callable(loaded):
        raise ConfigError(f"{what}: expected a class or another callable, got {kind_of(loaded)}")
    return cast("Callable[..., Any]", loaded)


def _named(error: BaseException) -> str:
    """Return an exception's type and its message, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")


class Plugin(NamedTuple):
    """A framework or middleware of another package, as `doctor` shows it."""

    name: str
    state: Literal["ready", "broken", "not used"]
    note: str
    """The package; and why the plugin is broken or not used."""


def plugins(kind: Kind) -> Iterator[Plugin]:
    """Load each plugin, and yield its state."""
    built_in = _built_in_frameworks() if kind == "frameworks" else _BUILT_IN_MIDDLEWARE
    used = _entry_points(kind)
    for point in _installed_points(kind):
        name, package = point.name, package_of(point)
        if name in built_in:
            yield Plugin(name, "not used", f"{package}: fluxibly's own {_WHAT[point.group]} has this name")
        elif package != package_of(used[name]):
            yield Plugin(name, "not used", f"{package}: {package_of(used[name])} has this name too, and is used")
        else:
            try:
                _load(point)
            except ConfigError as error:
                yield Plugin(name, "broken", str(error))
            else:
                yield Plugin(name, "ready", package)


def frameworks() -> Mapping[str, Framework]:
    """Return all frameworks, by name."""
    others = {name: Framework(name=name, plugin=point) for name, point in _entry_points("frameworks").items()}
    return dict(sorted({**others, **_built_in_frameworks(), **_frameworks}.items()))


def read_yaml(
    file: str | Path,
    section: str = "llm",
    *,
    framework: str | None = None,
    middleware: Iterable[Middleware] | None = None,
) -> tuple[LLMConfig, Iterable[Middleware] | None]:
    """Read a configuration, and make the middleware that it lists.

    Args:
        file, section: see `LLMConfig.from_yaml`.
        framework, middleware: another framework, another stack than the file's.

    Raises:
        ConfigError: it lists every problem of the settings, the framework and the middleware.
    """
    from fluxibly._yaml import read_section

    settings, known = read_section(file, section)
    problems = Problems(known)
    config = problems.of(LLMConfig.from_mapping, settings, path=f"{section}.")
    name = settings.get("framework") if framework is None else framework
    if name and isinstance(name, str):  # else the settings' own problems say it
        problems.of(check_framework, name, settings.get("quirks"), path=f"{section}." if framework is None else "")
    layers = settings.get("middleware")
    if middleware is None and is_list(layers):
        max_retries = 3 if config is None else config.max_retries
        middleware = problems.of(make_middleware, layers, max_retries=max_retries, path=f"{section}.middleware")
    problems.check()
    return cast("LLMConfig", config), middleware


def make_provider(config: Any, *, asynchronous: bool) -> Any:
    """Make the provider that an `LLMConfig` names.

    Raises:
        FrameworkNotRegistered: no framework has that name.
        ConfigError: packages are missing, or the provider rejects the configuration.
    """
    framework = check_framework(config.framework, config.quirks)
    return framework.factory(asynchronous=asynchronous)(config)


def check_framework(name: str, quirks: object, *, path: str = "") -> Framework:
    """Find a framework by its name, and check that it takes the quirks. `path` precedes the settings in messages.

    Raises:
        FrameworkNotRegistered: no framework has that name.
        ConfigError: the framework is a broken plugin, or has no quirks.
    """
    framework = find_framework(name, path=path and f"{path}framework: ")
    if quirks and framework.module and framework.module != OPENAI:
        raise ConfigError(
            f"{path}quirks: apply to OpenAI-compatible services only, and {framework.name!r} is none; leave them out"
        )
    return framework


def find_framework(name: str, *, path: str = "") -> Framework:
    """Find a framework by its name. `path` precedes the message.

    Raises:
        FrameworkNotRegistered: no framework has that name.
        ConfigError: it is a plugin, and the plugin is broken.
    """
    found = _frameworks.get(name) or _built_in_frameworks().get(name)
    if found is not None:
        return found
    point = _entry_points("frameworks").get(name)
    if point is None:
        known = list(frameworks())
        raise FrameworkNotRegistered(
            f"{path}{_instead_of(name, known)}LLM framework {name!r} not registered. Available frameworks: {known}"
        )
    try:
        _load(point)
    except ConfigError as error:
        raise ConfigError(f"{path}{error}") from error.__cause__
    return Framework(name=name, plugin=point)


def _instead_of(name: str, known: Sequence[str]) -> str:
    """Return a question or a sentence that says which framework was meant, or an empty string."""
    from fluxibly.providers.services import ALIASES, ELSEWHERE

    # Names of one service are often far apart, and names that are near often mean another service.
    meant: dict[str, str] = {**ALIASES, **{each: each for each in ELSEWHERE}, **{_plain(each): each for each in known}}
    near = meant.get(_plain(name)) or meant.get(nearest(_plain(name), meant, 0.75) or "")
    if near is None or near in known:
        return f"did you mean {near!r}? " if near else ""
    return f"{ELSEWHERE[near]}. " if near in ELSEWHERE else ""


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name.lower())


def default_stack(config: LLMConfig, *layers: Middleware) -> tuple[Middleware, ...]:
    """Return the default stack, outermost first, with `layers` in it.

    A layer of a built-in class takes the place of the default's layer of that class. Any other layer goes outside of
    `Retry`, in the order given, so that it sees a call once, however many attempts it takes. (To add a layer inside of
    `Retry`, write `[*default_stack(config), layer]`.)

    Raises:
        TypeError: a layer is not a middleware.
    """
    return _default_stack(config.max_retries, layers)


def _default_stack(max_retries: int, layers: Iterable[Middleware]) -> tuple[Middleware, ...]:
    module = importlib.import_module("fluxibly.middleware")
    kinds = [getattr(module, name) for name in _BUILT_IN_MIDDLEWARE.values()]
    stack = {kind: kind() for kind in kinds} | {module.Retry: module.Retry(max_retries=max_retries)}
    own: list[Middleware] = []
    for layer in layers:
        if not callable(layer) or isinstance(layer, type):
            raise TypeError(f"default_stack: expected middleware, like Retry(max_retries=5), got {kind_of(layer)}")
        kind = next((kind for kind in kinds if isinstance(layer, kind)), None)
        if kind is None:
            own.append(layer)
        else:
            stack[kind] = layer
    place = kinds.index(module.Retry)
    ordered = [stack[kind] for kind in kinds]
    return (*ordered[:place], *own, *ordered[place:])


def make_middleware(items: Sequence[Any], *, max_retries: int = 3, path: str = "middleware") -> tuple[Middleware, ...]:
    """Make the stack that a configuration lists.

    Args:
        items: names, tables of a name and its settings, and middleware objects. "default" stands for the default stack;
            `{"default_stack": {"retry": {…}, "mine": {}}}` for the default stack with these layers in it.
        max_retries: the retries of the default stack.
        path: precedes the settings in messages.

    Raises:
        ConfigError: it lists all unknown names, unknown settings and wrong values, each with its path.
    """
    problems = Problems()
    made = [problems.of(_made, item, f"{path}[{index}]", max_retries) for index, item in enumerate(items)]
    problems.check()
    return tuple(layer for layers in made for layer in layers or ())


def _made(item: Any, path: str, max_retries: int) -> tuple[Middleware, ...]:
    """Return the layers that an item of a configuration stands for."""
    if isinstance(item, str) and item in _DEFAULT and item not in _middleware:
        return _default_stack(max_retries, ())
    if is_mapping(item) and len(item) == 1 and (name := next(iter(item))) in _DEFAULT and name not in _middleware:
        layers: object = {} if item[name] is None else item[name]
        if not is_mapping(layers):
            example = "e.g. - default_stack: {retry: {max_retries: 5}}"
            raise ConfigError(f"{path}.{name}: expected a table of middleware and their settings, {example}")
        problems = Problems()
        made = [problems.of(_make, {each: layers[each]}, f"{path}.{name}") for each in layers]
        problems.check()
        return _default_stack(max_retries, cast("list[Middleware]", made))
    return (_make(item, path),)


def _make(item: Any, path: str) -> Middleware:
    settings: Any = {}
    if isinstance(item, str):
        name: Any = item
    elif is_mapping(item):
        if len(item) != 1:
            raise ConfigError(
                f"{path}: expected a table of one name and its settings, e.g. - retry: {{max_retries: 5}}"
            )
        ((name, settings),) = item.items()
        settings = {} if settings is None else settings
        if not is_mapping(settings):
            raise ConfigError(f"{path}.{name}: expected a table of settings, e.g. - retry: {{max_retries: 5}}")
    elif callable(item):
        return item  # type: ignore[no-any-return]  # a middleware object; the pipeline checks it
    else:
        raise ConfigError(f"{path}: expected the name of a middleware or a table of one name, got {kind_of(item)}")
    factory = _find_middleware(str(name), path)
    if _is_middleware_function(factory):
        if settings:
            raise ConfigError(f"{path}.{name}: this middleware is a function without settings")
        return factory  # type: ignore[return-value]
    try:
        return factory(**settings)
    except Exception as error:
        raise ConfigError.of(_settings_problems(factory, settings, f"{path}.{name}", error)) from error


def _settings_problems(
    factory: MiddlewareFactory, settings: Mapping[Any, Any], path: str, error: Exception
) -> list[str]:
    """List what is wrong with the settings of a middleware that could not be made. `error` is what it raised."""
    names, required, any_name = _parameters(factory)
    unknown = [] if any_name else unknown_settings(settings, names, f"{path}.")
    missing = [f"{path}.{name}: is required" for name in required if name not in settings]
    wrong = [_at(path, names, factory, text) for text in _wrong_values(factory, settings)]
    return [*unknown, *missing, *wrong] or [_at(path, names, factory, text) for text in _told(error)]


def _parameters(factory: MiddlewareFactory) -> tuple[list[str], list[str], bool]:
    """Return the names of a factory's settings, those without a default, and whether it takes any name."""
    import inspect

    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # a callable of C has no signature
        return [], [], True
    named = [each for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    any_name = any(each.kind is each.VAR_KEYWORD for each in parameters)
    return [each.name for each in named], [each.name for each in named if each.default is each.empty], any_name


def _wrong_values(factory: MiddlewareFactory, settings: Mapping[Any, Any]) -> Iterator[str]:
    """Yield what the validators of an attrs class refuse. The class itself tells only the first of it."""
    if not (isinstance(factory, type) and attrs.has(factory)):
        return
    blank: Any = factory.__new__(factory)
    for field in attrs.fields(factory):
        name = field.alias or field.name
        if name in settings and field.validator is not None:
            try:
                value = settings[name] if field.converter is None else field.converter(settings[name])
                field.validator(blank, field, value)
            except (TypeError, ValueError) as error:
                told = (text.removeprefix(f"{factory.__name__}: ") for text in _told(error))
                yield from (text if text.startswith(name) else f"{name}: {text}" for text in told)
            except Exception:  # noqa: BLE001, S112  # the validator needs the other fields: making the object tells
                continue


def _told(error: Exception) -> Sequence[str]:
    """Return what a factory or a validator says is wrong."""
    if isinstance(error, ConfigError):
        return error.problems
    if not isinstance(error, (TypeError, ValueError, ImportError)):
        return [_named(error)]
    arguments: tuple[object, ...] = error.args
    message = arguments[0] if len(arguments) > 1 else error  # the validators of attrs add the field and the value
    return [" ".join(str(message).split()) or type(error).__name__]


def _at(path: str, names: Sequence[str], factory: MiddlewareFactory, text: str) -> str:
    """Put what is wrong under the path of a middleware. A text that begins with a setting's name continues the path."""
    text = text.removeprefix(f"{getattr(factory, '__name__', '')}: ")
    first = re.match(r"\w+(?=[.:\[])", text)
    return f"{path}.{text}" if first and first[0] in names else f"{path}: {text}"


def _is_middleware_function(factory: object) -> bool:
    import inspect

    return inspect.isgeneratorfunction(factory)


def _find_middleware(name: str, path: str) -> MiddlewareFactory:
    if name in _middleware:
        return _middleware[name]
    if name in _BUILT_IN_MIDDLEWARE:
        factory: MiddlewareFactory = getattr(importlib.import_module("fluxibly.middleware"), _BUILT_IN_MIDDLEWARE[name])
        return factory
    point = _entry_points("middleware").get(name)
    if point is not None:
        try:
            return _load(point)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error.__cause__
    known = sorted({*_middleware, *_BUILT_IN_MIDDLEWARE, *_entry_points("middleware"), "default_stack"})
    near = did_you_mean(name, known) or "."
    raise ConfigError(f"{path}: middleware {name!r} not registered{near} Available middleware: {known}")
