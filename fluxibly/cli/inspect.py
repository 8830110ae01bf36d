"""The commands `explain` and `frameworks`, and what is known of a framework without asking its service."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fluxibly.cli.environment import source_of
from fluxibly.cli.findings import Finding, Standing, show_section, show_to_do
from fluxibly.explain import Explanation, explain
from fluxibly.providers.services import SERVICES
from fluxibly.registry import find_framework, frameworks, make_middleware, plugins

if TYPE_CHECKING:
    from fluxibly.cli.screen import Screen
    from fluxibly.config import LLMConfig
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


def show_frameworks(screen: Screen, *, everything: bool) -> None:
    """Print each framework, whether it can be used, and what is missing; for a person, only what somebody has begun.

    Args:
        everything: print all for a person too.
    """
    found = list(_frameworks(broken_plugins(plugins("frameworks"))))
    if everything or not screen.live:
        screen.rows([each.row[1:] for each in found], ("framework", "status", "to do"))
        return
    shown = [_with_source(each) if each.standing == "ready" else each for each in found]
    show_section(screen, "Frameworks", shown, hint="`fluxibly frameworks --all` says what each needs.")
    show_to_do(screen, shown)


def _frameworks(broken: dict[str, str]) -> Iterator[Finding]:
    for framework in frameworks().values():
        name, missing = framework.name, missing_of(framework)
        if framework.plugin is not None and name in broken:
            yield Finding("framework", name, "broken", broken[name], standing="wrong")
        elif missing is None:
            yield Finding("framework", name, "ready")
        else:
            standing: Standing = "wrong" if is_mentioned(framework) else "unset"
            yield Finding("framework", name, "not ready", missing, standing=standing)


def _with_source(ready: Finding) -> Finding:
    """Return a finding that says where the key of a framework is."""
    return Finding("framework", ready.name, next(_found(find_framework(ready.name)), "needs no key"))


def broken_plugins(others: Iterable[Plugin]) -> dict[str, str]:
    """Return the reasons why plugins are broken, by their names."""
    return {plugin.name: plugin.note for plugin in others if plugin.state == "broken"}


def missing_of(framework: Framework) -> str | None:
    """Return the step that is needed before a framework can be used, or None."""
    if not framework.installed:
        return framework.to_install
    row = SERVICES.get(framework.name)
    needs_address = row is not None and row.base_url is None and framework.url_var is not None
    if needs_address and not os.environ.get(framework.url_var or ""):
        return " and ".join(filter(None, (framework.missing_key, f"set {framework.url_var}")))
    return framework.missing_key


def is_mentioned(framework: Framework) -> bool:
    """Whether somebody has begun to set a framework up: by a variable, a file or a package of its own."""
    return framework.plugin is not None or next(_found(framework), None) is not None


def _found(framework: Framework) -> Iterator[str]:
    """Yield what there is of the key, the credentials and the address of a framework."""
    for variable in (framework.env_var, *framework.instead, framework.url_var):
        if variable is not None and os.environ.get(variable):
            yield source_of(variable)
    for file in framework.files:
        if Path(file).expanduser().exists():
            yield file
