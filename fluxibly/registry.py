"""Frameworks and middleware by name: built in, from other packages (entry points), and registered by the user."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import threading
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, cast

from fluxibly._checks import did_you_mean, is_list, is_mapping, kind_of, nearest
from fluxibly._extras import pip_install
from fluxibly._plugins import (
    WHAT,
    Kind,
    check_registration,
    entry_points,
    installed_points,
    is_redefinition,
    load,
    package_of,
)
from fluxibly.config import LLMConfig
from fluxibly.errors import ConfigError, FrameworkNotRegistered, Problems
from fluxibly.flow import Middleware

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint
    from pathlib import Path

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
    credentials: str = ""
    """The name of the credentials that take the place of `env_var`, and may also be found elsewhere."""
    files: tuple[str, ...] = ()
    """The files with these credentials. "~" is the home directory."""
    url_var: str | None = None
    """The environment variable from which the address is taken if `api_base` is not set."""
    takes: tuple[str, ...] = ()
    """The settings that it takes, of those that only some frameworks take."""
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

    @property
    def missing_key(self) -> str | None:
        """The step that gives the framework its API key or credentials; None if it has them or needs none."""
        if self.env_var is None or any(map(os.environ.get, (self.env_var, *self.instead))):
            return None
        if any(os.path.exists(os.path.expanduser(file)) for file in self.files):  # noqa: PTH110, PTH111  # pathlib is slow to import
            return None
        return f"set {self.env_var}" + (f", or {self.credentials}" if self.credentials else "")

    def factory(self, *, asynchronous: bool) -> ProviderFactory:
        """Return the class or function that makes the provider.

        Raises:
            ConfigError: packages that the framework needs are not installed, or the plugin is broken.
        """
        if self.plugin is not None:
            return load(self.plugin)
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
                takes=("quirks",),
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
        _built_in(
            "bedrock",
            "bedrock",
            "Bedrock",
            env_var="AWS_BEARER_TOKEN_BEDROCK",
            instead=("AWS_ACCESS_KEY_ID", "AWS_PROFILE"),
            credentials="AWS credentials",
            files=("~/.aws/credentials", "~/.aws/config"),
            url_var="AWS_ENDPOINT_URL_BEDROCK_RUNTIME",
            takes=("region",),
        ),
        _built_in(
            "vertex",
            "vertex",
            "Vertex",
            env_var="GOOGLE_API_KEY",
            instead=("GOOGLE_APPLICATION_CREDENTIALS",),
            credentials="Google credentials",
            files=("~/.config/gcloud/application_default_credentials.json",),
            url_var="GOOGLE_VERTEX_BASE_URL",
            takes=("region", "project"),
        ),
        _built_in(
            "cohere", "cohere", "Cohere", env_var="CO_API_KEY", instead=("COHERE_API_KEY",), url_var="CO_API_URL"
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
    "cost": "Cost",
    "deadline": "Deadline",
    "defaults": "Defaults",
    "tools": "Tools",
    "continue": "Continue",
    "redact": "Redact",
    "cache": "Cache",
    "record": "Record",
    "replay": "Replay",
    "guard": "Guard",
    "validation": "Validation",
    "extract_reasoning": "ExtractReasoning",
    "fallback": "Fallback",
    "balance": "Balance",
    "hedge": "Hedge",
    "retry": "Retry",
    "circuit_breaker": "CircuitBreaker",
    "budget": "Budget",
    "rate_limit": "RateLimit",
    "concurrency": "Concurrency",
    "stream_timeout": "StreamTimeout",
    "simulate_stream": "SimulateStream",
}
"""The classes, by their names in configurations, in the order of a stack: the outermost first."""
_IN_DEFAULT = ("Tracing", "Logging", "Metrics", "Timing", "StreamMeter", "Validation", "Retry")
"""The classes of the default stack."""
_OUTSIDE_OF_OWN = "validation"
"""The built-in layer inside of which the default stack has a user's own layers."""
_DEFAULT = ("default", "default_stack")
"""The names of the default stack in configurations."""

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
    check_registration(name, provider, "framework")
    new = Framework(name=name, sync=provider, asynchronous=async_provider)
    with _lock:
        old = _frameworks.get(name)
        taken = old is not None and not is_redefinition(old.sync, provider)
        if not replace and (
            taken or (old is None and (name in _built_in_frameworks() or name in entry_points("frameworks")))
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
    check_registration(name, factory, "middleware")
    with _lock:
        old = _middleware.get(name)
        taken = old is not None and not is_redefinition(old, factory)
        built_in = name in _BUILT_IN_MIDDLEWARE or name in _DEFAULT
        if not replace and (taken or (old is None and (built_in or name in entry_points("middleware")))):
            raise ValueError(f"the middleware {name!r} is registered already; pass replace=True to take it over")
        _middleware[name] = factory


class Plugin(NamedTuple):
    """A framework, middleware or function of another package, as `doctor` shows it."""

    name: str
    state: Literal["ready", "broken", "not used"]
    note: str
    """The package; and why the plugin is broken or not used."""


def plugins(kind: Kind) -> Iterator[Plugin]:
    """Load each plugin, and yield its state."""
    built_in: Container[str] = ()
    if kind != "functions":
        built_in = _built_in_frameworks() if kind == "frameworks" else _BUILT_IN_MIDDLEWARE
    used = entry_points(kind)
    for point in installed_points(kind):
        name, package = point.name, package_of(point)
        if name in built_in:
            yield Plugin(name, "not used", f"{package}: fluxibly's own {WHAT[point.group]} has this name")
        elif package != package_of(used[name]):
            yield Plugin(name, "not used", f"{package}: {package_of(used[name])} has this name too, and is used")
        else:
            try:
                load(point)
            except ConfigError as error:
                yield Plugin(name, "broken", str(error))
            else:
                yield Plugin(name, "ready", package)


def frameworks() -> Mapping[str, Framework]:
    """Return all frameworks, by name."""
    others = {name: Framework(name=name, plugin=point) for name, point in entry_points("frameworks").items()}
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
        if framework is None:
            problems.of(check_framework, name, settings, path=f"{section}.")
        else:  # the settings are not for it
            problems.of(check_framework, name, {})
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
    framework = check_config(config)
    return framework.factory(asynchronous=asynchronous)(config)


_ONLY_SOME: Mapping[str, str] = {
    "quirks": "OpenAI-compatible services",
    "region": "'bedrock' and 'vertex'",
    "project": "calls of 'vertex'",
}
"""The settings that only some of the built-in frameworks take, and which."""


def check_framework(name: str, settings: Mapping[str, Any], *, path: str = "") -> Framework:
    """Find a framework by its name, and check that it takes the settings. `path` precedes them in messages.

    Raises:
        FrameworkNotRegistered: no framework has that name.
        ConfigError: the framework is a broken plugin, or does not take a setting.
    """
    framework = find_framework(name, path=path and f"{path}framework: ")
    if framework.module:  # else it is a user's own, which may read any setting
        wrong = [
            f"{path}{setting}: only {which} take this setting, and {framework.name!r} does not; leave it out"
            for setting, which in _ONLY_SOME.items()
            if settings.get(setting) and setting not in framework.takes
        ]
        if wrong:
            raise ConfigError.of(wrong)
    return framework


def framework_called(name: str) -> str | None:
    """Return the framework of this name, or the one that users also call so, such as `gemini` for "google"; else None."""
    if name in _frameworks or name in _built_in_frameworks() or name in entry_points("frameworks"):
        return name
    from fluxibly.providers.services import ALIASES, MODEL_FAMILIES

    plain = _plain(name)
    if plain in MODEL_FAMILIES:
        return None
    return ALIASES.get(plain) or next((each for each in frameworks() if _plain(each) == plain), None)


def missing_key(config: LLMConfig) -> str | None:
    """Return the step that gives a configuration its API key. None: it has one, needs none, or may find one elsewhere."""
    framework = find_framework(config.framework)
    own_server = config.api_base is not None and framework.url_var in framework.instead
    authorized = any(name.lower() == "authorization" or name.lower().endswith("api-key") for name in config.headers)
    if config.api_key or own_server or authorized or framework.credentials:
        return None
    return framework.missing_key


def check_config(config: LLMConfig) -> Framework:
    """Find the framework of a configuration, and check that it takes the settings; see `check_framework`."""
    return check_framework(config.framework, {name: getattr(config, name) for name in _ONLY_SOME})


def find_framework(name: str, *, path: str = "") -> Framework:
    """Find a framework by its name. `path` precedes the message.

    Raises:
        FrameworkNotRegistered: no framework has that name.
        ConfigError: it is a plugin, and the plugin is broken.
    """
    found = _frameworks.get(name) or _built_in_frameworks().get(name)
    if found is not None:
        return found
    point = entry_points("frameworks").get(name)
    if point is None:
        known = list(frameworks())
        raise FrameworkNotRegistered(
            f"{path}{_instead_of(name)}LLM framework {name!r} not registered. Available frameworks: {known}"
        )
    try:
        load(point)
    except ConfigError as error:
        raise ConfigError(f"{path}{error}") from error.__cause__
    return Framework(name=name, plugin=point)


def nearest_framework(name: str) -> str | None:
    """Return the framework that a name which is not registered may mean; None if none is near."""
    from fluxibly.providers.services import ALIASES

    # Names of one service are often far apart, and names that are near often mean another service.
    meant: dict[str, str] = {**ALIASES, **{_plain(each): each for each in frameworks()}}
    return meant.get(_plain(name)) or meant.get(nearest(_plain(name), meant, 0.75) or "")


def _instead_of(name: str) -> str:
    """Return a question that says which framework was meant, or an empty string."""
    near = nearest_framework(name)
    return f"did you mean {near!r}? " if near else ""


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name.lower())


def default_stack(config: LLMConfig, *layers: Middleware) -> tuple[Middleware, ...]:
    """Return the default stack, outermost first, with `layers` in it.

    A layer of a built-in class takes the place of the default's layer of that class; if the default has none, it goes to the
    place that suits it, such as `Fallback` outside of `Retry`, and `RateLimit` inside. Of one class there may be several
    layers, which keep their order. A layer of your own goes inside of `Validation` and outside of `Fallback` and `Retry`, in
    the order given, so that it sees a call once, however many attempts it takes. (To add a layer inside of everything
    else, write `[*default_stack(config), layer]`.)

    Raises:
        TypeError: a layer is not a middleware.
    """
    return _default_stack(config.max_retries, layers)


def built_in_kind(layer: object) -> str | None:
    """Return the name of the built-in class that a layer is of, such as "Retry"; None for a layer of the user's own."""
    # Not by `isinstance`, because that would load the classes of all built-in layers.
    names = [cls.__name__ for cls in type(layer).__mro__ if cls.__module__.startswith("fluxibly.middleware.")]
    return names[0] if names and names[0] in _BUILT_IN_MIDDLEWARE.values() else None


def _default_stack(max_retries: int, layers: Iterable[Middleware]) -> tuple[Middleware, ...]:
    module = importlib.import_module("fluxibly.middleware")
    given: dict[str, list[Middleware]] = {name: [] for name in _BUILT_IN_MIDDLEWARE.values()}
    own: list[Middleware] = []
    for layer in layers:
        if not callable(layer) or isinstance(layer, type):
            raise TypeError(f"default_stack: expected middleware, like Retry(max_retries=5), got {kind_of(layer)}")
        kind = built_in_kind(layer)
        (own if kind is None else given[kind]).append(layer)
    ordered: list[Middleware] = []
    for name, cls in _BUILT_IN_MIDDLEWARE.items():
        if given[cls]:
            ordered += given[cls]
        elif cls in _IN_DEFAULT:
            settings = {"max_retries": max_retries} if cls == "Retry" else {}
            ordered.append(getattr(module, cls)(**settings))
        if name == _OUTSIDE_OF_OWN:
            ordered += own
    return tuple(ordered)


def stack_into(stack: Sequence[Middleware], schema: object) -> tuple[Middleware, ...]:
    """Return a stack whose answers have to fit a schema.

    The outermost `Validation` gets the schema. If there is none, one is added, outside of the first layer that the default stack
    has inside of it (`Fallback`, `Retry`, …).

    Raises:
        ConfigError: the schema describes no answers.
    """
    import attrs

    for number, layer in enumerate(stack):
        if built_in_kind(layer) == "Validation":
            changed: Any = attrs.evolve(cast("Any", layer), schema=schema)
            return (*stack[:number], changed, *stack[number + 1 :])
    return stack_with(stack, importlib.import_module("fluxibly.middleware").Validation(schema=schema))


def stack_with(stack: Sequence[Middleware], layer: Middleware) -> tuple[Middleware, ...]:
    """Return a stack with one more layer of a built-in class, at the place that suits it.

    It goes outside of the first layer that the default stack has inside of it.
    """
    kinds = list(_BUILT_IN_MIDDLEWARE.values())
    inner = {*kinds[kinds.index(str(built_in_kind(layer))) + 1 :]}
    place = next((number for number, each in enumerate(stack) if built_in_kind(each) in inner), len(stack))
    return (*stack[:place], layer, *stack[place:])


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
    if not isinstance(item, str) and not is_mapping(item) and callable(item):
        return (cast("Middleware", item),)  # the pipeline checks it
    name, settings = _name_and_settings(item, path)
    if name not in _DEFAULT or name in _middleware:
        return (_make(name, settings, path),)
    path = f"{path}.{name}"
    expected = "middleware and their settings, e.g. - default_stack: {retry: {max_retries: 5}}"
    table = _table(settings, path, lambda: expected)
    problems = Problems()
    layers = [problems.of(_make, str(each), table[each], path) for each in table]
    problems.check()
    return _default_stack(max_retries, cast("list[Middleware]", layers))


def _name_and_settings(item: Any, path: str) -> tuple[str, object]:
    """Return the name in an item of a configuration, and what stands for its settings."""
    if isinstance(item, str):
        return item, None
    if not is_mapping(item):
        raise ConfigError(f"{path}: expected the name of a middleware or a table of one name, got {kind_of(item)}")
    if len(item) != 1:
        raise ConfigError(f"{path}: expected a table of one name and its settings, e.g. - retry: {{max_retries: 5}}")
    ((name, settings),) = item.items()
    return str(name), settings


def _example(factory: Callable[..., Any], name: str, given: object) -> str:
    from fluxibly._settings import example  # late, because most settings are right

    return f"settings, e.g. - {name}: {example(factory, given)}"


def _table(settings: object, path: str, expected: Callable[[], str]) -> Mapping[Any, Any]:
    """Return settings as a table, which is empty if there are none. `expected` describes it."""
    if settings is None:
        return {}
    if not is_mapping(settings):
        raise ConfigError(f"{path}: expected a table of {expected()}")
    return settings


def _make(name: str, given: object, path: str) -> Middleware:
    factory = _find_middleware(name, path)
    if _is_middleware_function(factory):
        if given:
            raise ConfigError(f"{path}.{name}: this middleware is a function without settings")
        return factory  # type: ignore[return-value]  # a generator function is a middleware
    settings = _table(given, f"{path}.{name}", partial(_example, factory, name, given))
    try:
        return factory(**settings)
    except Exception as error:
        from fluxibly._settings import settings_problems  # late, because most settings are right

        raise ConfigError.of(settings_problems(factory, settings, f"{path}.{name}", error)) from error


def _is_middleware_function(factory: object) -> bool:
    import inspect

    return inspect.isgeneratorfunction(factory)


def _find_middleware(name: str, path: str) -> MiddlewareFactory:
    if name in _middleware:
        return _middleware[name]
    if name in _BUILT_IN_MIDDLEWARE:
        factory: MiddlewareFactory = getattr(importlib.import_module("fluxibly.middleware"), _BUILT_IN_MIDDLEWARE[name])
        return factory
    point = entry_points("middleware").get(name)
    if point is not None:
        try:
            return load(point)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error.__cause__
    known = sorted({*_middleware, *_BUILT_IN_MIDDLEWARE, *entry_points("middleware"), "default_stack"})
    near = did_you_mean(name, known) or "."
    raise ConfigError(f"{path}: middleware {name!r} not registered{near} Available middleware: {known}")
