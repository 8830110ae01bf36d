"""The command `doctor`: versions, keys and endpoints, and what would fix those that fail."""

from __future__ import annotations

import os
import platform
import shlex
import time
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any, Final, get_args

import fluxibly
from fluxibly._checks import nearest
from fluxibly._extras import EXTRAS, version_of
from fluxibly._plugins import Kind
from fluxibly.cli.environment import source_of
from fluxibly.cli.findings import Finding, Standing, show_section, show_to_do, show_words
from fluxibly.cli.inspect import broken_plugins, is_mentioned, missing_of
from fluxibly.cli.screen import line_of
from fluxibly.cli.side_by_side import side_by_side
from fluxibly.cli.trace.file import duration
from fluxibly.config import LLMConfig
from fluxibly.errors import (
    AuthenticationError,
    ConnectionFailed,
    PermissionDenied,
    ProviderError,
    RequestTimeout,
)
from fluxibly.llm import LLM
from fluxibly.providers.local import DEFAULT_MODEL, cached_path, named_model
from fluxibly.registry import find_framework, frameworks, missing_key, plugins
from fluxibly.stores import to_store
from fluxibly.types import ProviderInfo

if TYPE_CHECKING:
    from pathlib import Path

    from fluxibly.cli.screen import Screen
    from fluxibly.registry import Plugin

PROBE_TIMEOUT: Final = 5.0
"""Seconds to wait for an endpoint to answer."""
CORE: Final = ("attrs", "cattrs", "httpx", "msgspec", "opentelemetry-api", "PyYAML")


def examine(screen: Screen, config: LLMConfig | None, *, file: Path | None = None) -> int:
    """Check everything, or only what a configuration needs. Return 1 if a check failed, else 0.

    Args:
        file: the file that the configuration is from.
    """
    packages = list(_packages())
    if config is not None:
        others, services = list(_stores(config)), [_check(config, file, asked=True)]
    else:
        found = {kind: list(plugins(kind)) for kind in get_args(Kind)}
        others = [_plugin(plugin) for plugin in chain(*found.values())]
        broken = broken_plugins(found["frameworks"])
        usable = [each.name for each in frameworks().values() if each.plugin is None or each.name not in broken]
        services = list(side_by_side(_check_default, usable))
    checks = [*packages, *others, *services]
    if screen.live:
        _show(screen, packages, others, services)
    else:
        versions = (("", "python", platform.python_version(), ""), ("", "fluxibly", fluxibly.__version__, ""))
        screen.rows([*versions, *(each.row for each in checks)], ("", "", "state", "to do"))
    return int(any(each.bad for each in checks))


def _show(screen: Screen, packages: list[Finding], others: list[Finding], services: list[Finding]) -> None:
    screen.note(f"fluxibly {fluxibly.__version__}, Python {platform.python_version()}\n")
    show_section(screen, "Frameworks", services, hint="`fluxibly frameworks --all` says what each needs.")
    show_section(screen, "Plugins", [each for each in others if each.kind == "plugin"])
    show_section(screen, "Stores", [each for each in others if each.kind == "store"])
    there = [f"{each.name} {each.state}" for each in packages if each.standing == "ready"]
    absent = [each.name for each in packages if each.standing == "unset"]
    show_words(screen, "Packages", [("installed", there), ("optional", absent)])
    show_to_do(screen, [*packages, *others, *services])


def _plugin(plugin: Plugin) -> Finding:
    if plugin.state == "ready":
        return Finding("plugin", plugin.name, f"ready, from {plugin.note}")
    return Finding("plugin", plugin.name, plugin.state, plugin.note, bad=plugin.state == "broken", standing="wrong")


def _packages() -> Iterator[Finding]:
    for package in CORE:
        yield Finding("package", package, version_of(package) or "not installed as a package")
    for package in (package for packages in EXTRAS.values() for package in packages):
        found = version_of(package)
        if found:
            yield Finding("package", package, found)
        else:
            how = shlex.join(["pip", "install", package])
            yield Finding("package", package, "not installed", how, standing="unset")


def _check_default(name: str) -> Finding:
    """Check a framework that nobody asked for: that it is not set up is no failure."""
    framework = find_framework(name)
    missing = missing_of(framework)
    if missing is not None:
        standing: Standing = "wrong" if is_mentioned(framework) else "unset"
        return Finding("framework", name, "not set up", missing, standing=standing)
    if framework.extra is not None and name != "local":
        return Finding("framework", name, "ready")  # loading its library would take seconds
    return _check(LLMConfig(framework=name, model=DEFAULT_MODEL if name == "local" else "-"), None, asked=False)


def _check(config: LLMConfig, file: Path | None, *, asked: bool) -> Finding:
    """Make the model with its stack, as a chat does, and look whether its service answers.

    If a framework is not set up, that is a failure only if the user asked for it.
    """
    name = config.framework
    try:
        with LLM(config) as llm:
            provider = llm.pipeline.provider
            credentials = getattr(provider, "credentials", None)
            if credentials is not None:
                credentials.obtain()
            return _answers(config, provider, file, asked=asked)
    except (Exception, SystemExit) as error:  # noqa: BLE001  # whatever another package raises, the framework cannot be used
        standing: Standing = "wrong" if asked or is_mentioned(find_framework(name)) else "unset"
        return Finding("framework", name, "not set up", line_of(error), bad=asked, standing=standing)


def _stores(config: LLMConfig) -> Iterator[Finding]:
    """Ask each store of a configuration's stack that is outside of the process whether it answers."""
    try:
        with LLM(config) as llm:
            given: list[Any] = [getattr(layer, "store", None) for layer in llm.pipeline.middleware]
    except (Exception, SystemExit):  # noqa: BLE001  # `_check` says what is wrong
        return
    stores = [to_store(each, ("load", "save")) if isinstance(each, str) else each for each in given]
    far = [store for store in stores if not getattr(store, "local", True) and hasattr(store, "load")]
    for shown, store in {repr(store): store for store in far}.items():
        began = time.monotonic()
        try:
            store.load("fluxibly doctor", began)
        except Exception as error:  # noqa: BLE001  # each kind of store has its own
            yield Finding("store", shown, "does not work", line_of(error), bad=True, standing="wrong")
        else:
            yield Finding("store", shown, f"answers in {duration(time.monotonic() - began)}")


def _answers(config: LLMConfig, provider: Any, file: Path | None, *, asked: bool) -> Finding:
    if config.framework == "local":
        return _local(config)
    info = getattr(provider, "info", None)
    if not isinstance(info, ProviderInfo) or info.in_process or info.server_address is None:
        return Finding("framework", config.framework, "ready")
    return _endpoint(config, provider, info, file, asked=asked)


def _local(config: LLMConfig) -> Finding:
    model = named_model(config.model)
    if model is None or cached_path(model).is_file():
        return Finding("framework", "local", "ready")
    return Finding("framework", "local", "ready", f"the first call fetches the model, {model.wheel_size / 1e6:.0f} MB")


def _endpoint(config: LLMConfig, provider: Any, info: ProviderInfo, file: Path | None, *, asked: bool) -> Finding:
    """Ask a service for its models, which shows whether it takes the key."""
    name, framework = config.framework, find_framework(config.framework)
    where = f"{info.server_address}:{info.server_port}"
    variable = framework.url_var
    if config.api_base is None and variable is not None and os.environ.get(variable):
        where += f" (from {variable})"
    key = _key(provider, file)
    began = time.monotonic()
    models: list[str] = []
    note = ""
    try:
        models = _list(provider, info)
    except (ConnectionFailed, RequestTimeout) as error:
        away = not asked and framework.env_var is None and not is_mentioned(framework)
        bad = asked or info.server_port == 443
        state = f"{where} does not answer"
        return Finding("framework", name, state, line_of(error), bad=bad, standing="away" if away else "wrong")
    except (AuthenticationError, PermissionDenied) as error:
        # An account of a cloud may be allowed to call models, and not to list them.
        if isinstance(error, AuthenticationError) or getattr(provider, "credentials", None) is None:
            state = f"{where} {'refuses the key' if key else 'wants a key'}"
            to_do = f"check {key}" if key else missing_key(config) or "give it as api_key"
            return Finding("framework", name, state, f"{to_do}; {line_of(error)}", bad=True, standing="wrong")
        note = f"does not list its models: {line_of(error)}"
    except ProviderError as error:  # it has answered
        note = f"does not list its models: {line_of(error)}"
    state = f"{where} answers in {duration(time.monotonic() - began)}" + (f", {key}" if key else "")
    near = None if not asked or config.model in models else nearest(config.model, models, 0.7)
    if near is not None:
        note = f"did you mean the model {near!r}? Its list has no {config.model!r}"
    return Finding("framework", name, state, note, standing="ready" if near is None else "wrong")


def _key(provider: Any, file: Path | None) -> str:
    """Say where a provider has its key from, such as "OPENAI_API_KEY from .env"; "" if it has none."""
    source: str | None = getattr(provider, "key_source", None)
    if source is None:
        source = getattr(getattr(provider, "credentials", None), "origin", None)
    if source is None:
        return ""
    if source in {"api_key", "headers"}:
        return f"{source} from {file or 'the configuration'}"
    return source_of(source) if source.isupper() else f"credentials from {source}"


def _list(provider: Any, info: ProviderInfo) -> list[str]:
    """Return the models that a service lists. Of a service without a list, only see whether it answers.

    Raises:
        ProviderError: it does not answer, or refuses.
    """
    if getattr(provider, "has_list", False):
        listed: list[str] = provider.list_models(timeout=PROBE_TIMEOUT)
        return listed
    import httpx  # late, because most services have a list

    scheme = "https" if info.server_port == 443 else "http"
    try:
        httpx.get(f"{scheme}://{info.server_address}:{info.server_port}/", timeout=PROBE_TIMEOUT)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise ConnectionFailed(f"{type(error).__name__}: check the network, the proxy, or api_base") from None
    return []
