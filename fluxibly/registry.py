"""Frameworks and middleware by name: built in, from other packages (entry points), and registered by the user."""

from __future__ import annotations

import importlib
import importlib.util
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from fluxibly._checks import did_you_mean, is_mapping, kind_of
from fluxibly._extras import pip_install
from fluxibly.errors import ConfigError, FrameworkNotRegistered
from fluxibly.flow import Middleware

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

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
            ConfigError: packages that the framework needs are not installed.
        """
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
            _built_in(name, OPENAI.rpartition(".")[2], "OpenAI", env_var=row.env_var if row.key_required else None)
            for name, row in SERVICES.items()
        ),
        _built_in("anthropic", "anthropic", "Anthropic", env_var="ANTHROPIC_API_KEY"),
        _built_in("gemini", "gemini", "Gemini", env_var="GEMINI_API_KEY"),
        _built_in("ollama", "ollama", "Ollama"),
        _built_in("ollama-generate", "ollama", "OllamaGenerate"),
        _built_in("langchain", "langchain", "LangChain", extra="langchain", needs="langchain"),
        _built_in("litellm", "litellm", "LiteLLM", extra="litellm", needs="litellm"),
    ]
    return {framework.name: framework for framework in found}


OPENAI = "fluxibly.providers.openai"
"""The module of all frameworks that speak a dialect of OpenAI's, and have quirks."""
_BUILT_IN_MIDDLEWARE = {
    "logging": "Logging",
    "tracing": "Tracing",
    "metrics": "Metrics",
    "timing": "Timing",
    "stream_meter": "StreamMeter",
    "validation": "Validation",
    "retry": "Retry",
}

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
        if not replace and (
            taken or (old is None and (name in _BUILT_IN_MIDDLEWARE or name in _entry_points("middleware")))
        ):
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
def _entry_points(kind: str) -> Mapping[str, EntryPoint]:
    from importlib.metadata import entry_points

    return {point.name: point for point in entry_points(group=f"fluxibly.{kind}")}


def frameworks() -> Mapping[str, Framework]:
    """Return all frameworks, by name."""
    others = {name: Framework(name=name, module=point.value) for name, point in _entry_points("frameworks").items()}
    return dict(sorted({**others, **_built_in_frameworks(), **_frameworks}.items()))


def make_provider(config: Any, *, asynchronous: bool) -> Any:
    """Make the provider that an `LLMConfig` names.

    Raises:
        FrameworkNotRegistered: no framework has that name.
        ConfigError: packages are missing, or the provider rejects the configuration.
    """
    framework = find_framework(config.framework)
    if config.quirks and framework.module and framework.module != OPENAI:
        raise ConfigError(
            f"quirks: apply to OpenAI-compatible services only, and {framework.name!r} is none; leave them out"
        )
    return framework.factory(asynchronous=asynchronous)(config)


def find_framework(name: str) -> Framework:
    """Find a framework by its name.

    Raises:
        FrameworkNotRegistered: no framework has that name.
    """
    found = _frameworks.get(name) or _built_in_frameworks().get(name)
    if found is not None:
        return found
    point = _entry_points("frameworks").get(name)
    if point is None:
        known = list(frameworks())
        raise FrameworkNotRegistered(
            f"LLM framework {name!r} not registered. Available frameworks: {known}{did_you_mean(name, known)}"
        )
    return Framework(name=name, sync=point.load())


def make_middleware(items: Sequence[Any]) -> tuple[Middleware, ...]:
    """Make the stack that a configuration lists: names, tables of a name and its settings, and middleware objects.

    Raises:
        ConfigError: an unknown name, or unknown settings.
    """
    return tuple(_make(item, f"middleware[{index}]") for index, item in enumerate(items))


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
    except (TypeError, ValueError) as error:
        unknown = _unknown_setting(factory, settings)
        if unknown is not None:
            raise ConfigError(f"{path}.{name}.{unknown}") from error
        raise ConfigError(f"{path}.{name}: {error}") from error


def _unknown_setting(factory: MiddlewareFactory, settings: Mapping[str, Any]) -> str | None:
    """Word the first setting that a middleware does not have."""
    import inspect

    parameters = inspect.signature(factory).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return None
    unknown = [str(name) for name in settings if name not in parameters]
    return f"{unknown[0]}: there is no such setting{did_you_mean(unknown[0], parameters)}" if unknown else None


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
        loaded: MiddlewareFactory = point.load()
        return loaded
    known = sorted({*_middleware, *_BUILT_IN_MIDDLEWARE, *_entry_points("middleware")})
    raise ConfigError(
        f"{path}: middleware {name!r} not registered. Available middleware: {known}{did_you_mean(name, known)}"
    )
