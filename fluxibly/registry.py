"""Frameworks and middleware by name: the built-in ones, those of other packages (entry points), and the user's own."""

from __future__ import annotations

import importlib
import importlib.util
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from fluxibly._checks import did_you_mean, is_mapping
from fluxibly._extras import pip_install
from fluxibly.errors import ConfigError, FrameworkNotRegistered
from fluxibly.flow import Middleware

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

ProviderFactory: TypeAlias = Callable[..., Any]
MiddlewareFactory: TypeAlias = Callable[..., Middleware]


class Framework(NamedTuple):
    """A way to make providers. `module` is loaded at first use; the classes in it take an `LLMConfig`."""

    name: str
    module: str = ""
    sync_name: str = ""
    async_name: str | None = None
    sync: ProviderFactory | None = None
    asynchronous: ProviderFactory | None = None
    extra: str | None = None
    """The extra that it needs, a key of `EXTRAS`."""
    needs: str | None = None
    """The module that the extra installs."""
    env_var: str | None = None
    """The environment variable with its API key; None where it needs no key, or has it from elsewhere."""

    @property
    def installed(self) -> bool:
        """Whether what it needs can be imported."""
        return self.needs is None or importlib.util.find_spec(self.needs) is not None

    @property
    def to_install(self) -> str:
        """The command that installs what it needs and lacks."""
        return pip_install(*([] if self.extra is None else [self.extra]))

    def factory(self, *, asynchronous: bool) -> ProviderFactory:
        """What makes the provider.

        Raises:
            ConfigError: packages that it needs are not installed.
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
            _built_in(name, "openai", "OpenAI", env_var=row.env_var if row.key_required else None)
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
    """Make a framework known, so that `LLMConfig(framework=name)` finds it.

    Args:
        name: what configurations call it.
        provider: the class of a `Provider` (or any callable that makes one), which takes the `LLMConfig`.
        async_provider: likewise for an `AsyncProvider`; without it `AsyncLLM` runs `provider` in worker threads,
            unless that is asynchronous itself.
        replace: take the name over if it is in use. (The same class defined again, as notebooks do, always may.)

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
    """Make a middleware known, so that YAML can name it.

    Args:
        name: what configurations call it.
        factory: a class (or any callable that makes a middleware), which takes its settings as keywords; or a
            generator function that is the middleware itself.
        replace: take the name over if it is in use.

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
        raise ValueError(f"a {what} needs a name (a non-empty str), not {name!r}")
    if not callable(factory):
        raise TypeError(f"register a class or another callable for the {what} {name!r}, not {factory!r}")


def _same(old: object, new: object) -> bool:
    """Whether one is the other, or the other defined again."""
    if old is new:
        return True
    names = [(getattr(x, "__module__", None), getattr(x, "__qualname__", None)) for x in (old, new)]
    return names[0] == names[1] and None not in names[0]


@cache
def _entry_points(kind: str) -> Mapping[str, EntryPoint]:
    from importlib.metadata import entry_points

    return {point.name: point for point in entry_points(group=f"fluxibly.{kind}")}


def frameworks() -> Mapping[str, Framework]:
    """All frameworks that can be named, by name."""
    others = {name: Framework(name=name, module=point.value) for name, point in _entry_points("frameworks").items()}
    return dict(sorted({**others, **_built_in_frameworks(), **_frameworks}.items()))


def make_provider(config: Any, *, asynchronous: bool) -> Any:
    """The provider that an `LLMConfig` names.

    Raises:
        FrameworkNotRegistered: nobody registered that name.
        ConfigError: packages that it needs are not installed, or it refuses the configuration.
    """
    return find_framework(config.framework).factory(asynchronous=asynchronous)(config)


def find_framework(name: str) -> Framework:
    """The framework of this name.

    Raises:
        FrameworkNotRegistered: there is none.
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
    """The stack that a configuration lists: names, tables of one name and its settings, and middleware objects.

    Raises:
        ConfigError: an unknown name, or settings that it does not take.
    """
    return tuple(_make(item, f"middleware[{index}]") for index, item in enumerate(items))


def _make(item: Any, path: str) -> Middleware:
    settings: Any = {}
    if isinstance(item, str):
        name: Any = item
    elif is_mapping(item):
        if len(item) != 1:
            raise ConfigError(
                f"{path}: a middleware with settings is a table of one name, e.g. - retry: {{max_retries: 5}}"
            )
        ((name, settings),) = item.items()
        settings = {} if settings is None else settings
        if not is_mapping(settings):
            raise ConfigError(f"{path}.{name}: expected a table of settings, e.g. - retry: {{max_retries: 5}}")
    elif callable(item):
        return item  # type: ignore[no-any-return]  # a middleware object; the pipeline checks it
    else:
        raise ConfigError(f"{path}: a middleware is a name or a table of one name, not {item!r}")
    factory = _find_middleware(str(name), path)
    if _is_middleware_function(factory):
        if settings:
            raise ConfigError(f"{path}.{name}: this middleware is a function and takes no settings")
        return factory  # type: ignore[return-value]
    try:
        return factory(**settings)
    except (TypeError, ValueError) as error:
        unknown = _unknown_setting(factory, settings)
        if unknown is not None:
            raise ConfigError(f"{path}.{name}.{unknown}") from error
        raise ConfigError(f"{path}.{name}: {error}") from error


def _unknown_setting(factory: MiddlewareFactory, settings: Mapping[str, Any]) -> str | None:
    """What to say of the first setting that a middleware does not take."""
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
