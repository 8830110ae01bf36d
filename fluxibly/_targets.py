"""The providers of a pipeline's targets."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

from fluxibly import provider as providers
from fluxibly.types import ProviderInfo

if TYPE_CHECKING:
    from fluxibly.target import Target


class _Asked(NamedTuple):
    """A provider as the pipeline calls it."""

    provider: Any
    info: ProviderInfo
    config: object
    """The configuration that it was made from; None for a provider that was given."""


class TargetProviders:
    """The providers that a pipeline makes for targets, each when it is first asked, and closes.

    Args:
        info: the description of the pipeline's own provider.
        asynchronous: whether the pipeline is.
    """

    def __init__(self, info: ProviderInfo, *, asynchronous: bool) -> None:
        self._info = info
        self._asynchronous = asynchronous
        self._lock = threading.Lock()
        self._made: list[_Asked] = []
        # Weak, because a middleware may make a target for each call.
        self._made_for: WeakKeyDictionary[Target, _Asked] = WeakKeyDictionary()
        self._closed = False

    def is_made(self, target: object) -> bool:
        """Whether the provider of a target exists already."""
        if target is None:
            return True
        from fluxibly.target import Target  # late, because most programs have no targets

        return not isinstance(target, Target) or target.provider is not None or self._find(target) is not None

    def info_of(self, target: object) -> ProviderInfo:
        """Return the description of a target's provider; None is the pipeline's own."""
        return self._info if target is None else self._of(target).info

    def provider_of(self, target: object) -> Any:
        """Return the provider of a target, which is made if it does not exist.

        Raises:
            FluxiblyError: the provider cannot be made: the framework is unknown, a key is missing, and so on.
            RuntimeError: the pipeline is closed.
        """
        return self._of(target).provider

    def _of(self, target: object) -> _Asked:
        from fluxibly.target import Target  # late, as above

        if not isinstance(target, Target):
            raise TypeError(f"Request.target: expected a Target, got {target!r}; write target=Target(…)")
        if target.provider is not None:  # adapted for each attempt, because a pipeline must not keep it alive
            return self._adapted(target.provider, None)
        made = self._find(target)
        if made is None:
            with self._lock:
                made = self._find(target)
                if made is None:
                    made = self._made_for[target] = self._make(target)
                    self._made.append(made)
        return made

    def _find(self, target: Target) -> _Asked | None:
        """Return the provider of a target if it exists: of this target, or of another with an equal configuration."""
        found = self._made_for.get(target)
        if found is None:
            config = target.config
            found = next((made for made in self._made if made.config == config), None)
            if found is not None:
                self._made_for[target] = found
        return found

    def _make(self, target: Target) -> _Asked:
        from fluxibly.registry import make_provider  # late, because most pipelines have no targets

        if self._closed:
            raise RuntimeError("this pipeline is closed; make a new one")
        return self._adapted(make_provider(target.config, asynchronous=self._asynchronous), target.config)

    def _adapted(self, provider: Any, config: Any) -> _Asked:
        info = providers.info_of(provider, None if config is None else config.framework)
        return _Asked(providers.for_pipeline(provider, asynchronous=self._asynchronous), info, config)

    def take_all(self) -> Iterable[Any]:
        """Return the providers that were made, for the pipeline to close. Make none from now on."""
        with self._lock:
            self._closed = True
            made, self._made = self._made, []
            self._made_for.clear()
        return [each.provider for each in made]
