"""The commands that inspect the configuration and the installation: `explain`, `frameworks` and `doctor`."""

from __future__ import annotations

import os
import platform
import shlex
import time
from collections.abc import Container, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import TYPE_CHECKING, get_args

import attrs

import fluxibly
from fluxibly._extras import EXTRAS, version_of
from fluxibly._plugins import Kind
from fluxibly.cli.screen import line_of
from fluxibly.cli.trace.file import duration
from fluxibly.config import LLMConfig
from fluxibly.explain import Explanation, explain
from fluxibly.llm import LLM
from fluxibly.providers.addresses import with_address
from fluxibly.providers.local import DEFAULT_MODEL, cached_path, named_model
from fluxibly.providers.services import SERVICES
from fluxibly.registry import find_framework, frameworks, make_middleware, plugins
from fluxibly.types import ProviderInfo

if TYPE_CHECKING:
    from fluxibly.cli.screen import Screen
    from fluxibly.registry import Framework, Plugin


def explained(config: LLMConfig) -> Explanation:
    """Explain the stack of a configuration. Its provider is not made, so no key is needed.

    Raises:
        FrameworkNotRegistered: the configuration's framework is unknown.
        ConfigError: a middleware is unknown.
    """
    find_framework(config.framework)
    layers = ["default"] if config.middleware is None else config.middleware
    return explain(make_middleware(layers, max_retries=config.max_retries), config=config)


def framework_rows() -> Iterator[tuple[str, str, str]]:
    """Yield a row for each framework: its name, whether it can be used, and what is missing."""
    broken = _broken(plugins("frameworks"))
    for framework in frameworks().values():
        missing = missing_of(framework)
        if framework.plugin is not None and framework.name in broken:
            yield framework.name, "broken", broken[framework.name]
        else:
            yield framework.name, "ready" if missing is None else "not ready", missing or ""


def _broken(others: Iterable[Plugin]) -> dict[str, str]:
    """Return the reasons why plugins are broken, by their names."""
    return {plugin.name: plugin.note for plugin in others if plugin.state == "broken"}


def missing_of(framework: Framework) -> str | None:
    """Return the step that is needed before a framework can be used, or None."""
    return framework.missing_key if framework.installed else framework.to_install


PROBE_TIMEOUT = 5.0
"""Seconds to wait for an endpoint to answer."""
CORE = ("attrs", "cattrs", "httpx", "msgspec", "opentelemetry-api", "PyYAML")


@attrs.frozen
class Finding:
    """The result of a check. `bad` marks a failure; `to_do` is the step that fixes it or completes the setup."""

    kind: str
    name: str
    state: str
    to_do: str = ""
    bad: bool = False


def examine(screen: Screen, config: LLMConfig | None) -> int:
    """Check everything, or only what a configuration needs. Return 1 if a check failed, else 0."""
    if config is not None:
        found = [*_versions(), _check(config, asked=True)]
    else:
        with ThreadPoolExecutor(max_workers=16) as threads:
            others = {kind: list(plugins(kind)) for kind in get_args(Kind)}
            configurations = _configurations(_broken(others["frameworks"]))
            found = [*_versions(), *map(_plugin, chain(*others.values())), *threads.map(_check, configurations)]
    screen.rows([(each.kind, each.name, each.state, each.to_do) for each in found], ("", "", "state", "to do"))
    return int(any(each.bad for each in found))


def _configurations(broken: Container[str]) -> Iterator[LLMConfig]:
    for framework in frameworks().values():
        if framework.plugin is None or framework.name not in broken:
            yield LLMConfig(framework=framework.name, model=DEFAULT_MODEL if framework.name == "local" else "-")


def _plugin(plugin: Plugin) -> Finding:
    ready = plugin.state == "ready"
    state = f"ready, from {plugin.note}" if ready else plugin.state
    return Finding("plugin", plugin.name, state, "" if ready else plugin.note, bad=plugin.state == "broken")


def _versions() -> Iterator[Finding]:
    yield Finding("", "python", platform.python_version())
    yield Finding("", "fluxibly", fluxibly.__version__)
    for package in CORE:
        yield Finding("package", package, version_of(package) or "not installed as a package")
    for package in (package for packages in EXTRAS.values() for package in packages):
        found = version_of(package)
        to_do = "" if found else shlex.join(["pip", "install", package])
        yield Finding("package", package, found or "not installed", to_do)


def _check(config: LLMConfig, *, asked: bool = False) -> Finding:
    """Make the model with its stack, as a chat does, and look whether its service answers.

    If a framework is not set up, that is a failure only if the user asked for it.
    """
    name = config.framework
    if not asked:
        framework = find_framework(name)
        missing = missing_of(framework)
        if missing is not None:
            return Finding("framework", name, "not set up", missing)
        if framework.extra is not None:
            return Finding("framework", name, "ready")  # loading its library would take seconds
    try:
        with LLM(config) as llm:
            credentials = getattr(llm.pipeline.provider, "credentials", None)
            if credentials is not None:
                credentials.obtain()
            return _answers(config, llm.pipeline.provider, asked=asked)
    except (Exception, SystemExit) as error:  # noqa: BLE001  # whatever another package raises, the framework cannot be used
        return Finding("framework", name, "not set up", line_of(error), bad=asked)


def _answers(config: LLMConfig, provider: object, *, asked: bool) -> Finding:
    if config.framework == "local":
        return _local(config)
    info = getattr(provider, "info", None)
    if not isinstance(info, ProviderInfo) or info.in_process or info.server_address is None:
        return Finding("framework", config.framework, "ready")
    return _endpoint(config, info, asked=asked)


def _local(config: LLMConfig) -> Finding:
    model = named_model(config.model)
    if model is None or cached_path(model).is_file():
        return Finding("framework", "local", "ready")
    return Finding("framework", "local", "ready", f"the first call fetches the model, {model.wheel_size / 1e6:.0f} MB")


def _endpoint(config: LLMConfig, info: ProviderInfo, *, asked: bool) -> Finding:
    """Request the list of models if the service speaks OpenAI's dialect; else, check only that the service answers."""
    import httpx  # late, because `explain` and `frameworks` do not need it

    name, host, port = config.framework, info.server_address, info.server_port
    url, headers = f"{'https' if port == 443 else 'http'}://{host}:{port}/", dict(config.headers)
    service = SERVICES.get(name)
    variable = find_framework(name).url_var
    where = f"{host}:{port}"
    if config.api_base is None and variable is not None and os.environ.get(variable):
        where += f" (from {variable})"
    if service is not None:
        base = with_address(config, service.url_var, service.url_path).api_base or service.base_url
        url = url if base is None else f"{base.rstrip('/')}/models"
        key = config.fixed_key or os.environ.get(service.env_var)
        headers = {service.auth_header: service.auth_prefix + key, **headers} if key else headers
    began = time.monotonic()
    try:
        status = httpx.get(url, headers=headers, timeout=PROBE_TIMEOUT).status_code
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        to_do = f"{type(error).__name__}; start the server, check the network, the proxy, or api_base"
        return Finding("framework", name, f"{where} does not answer", to_do, bad=asked or port == 443)
    if status in (401, 403) and service is not None:
        return Finding("framework", name, f"{where} refuses the key", f"check {service.env_var}", bad=True)
    return Finding("framework", name, f"{where} answers in {duration(time.monotonic() - began)}")
