"""A stack as it is explained: its layers with their settings, the targets, and the provider. Secrets stay out of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import attrs

from fluxibly._checks import is_secret, public_headers, secrets_in, secrets_in_query, shown_url
from fluxibly._logs import one_line
from fluxibly._masking import mask_secrets
from fluxibly.config import LLMConfig
from fluxibly.flow.compose import layer_name
from fluxibly.flow.shown import settings_of_layer
from fluxibly.provider import Threaded
from fluxibly.registry import built_in_kind
from fluxibly.target import Target
from fluxibly.types import ProviderInfo, Request

_LONGEST = 600
"""The most characters of a layer's settings that are shown."""
_DEEPEST = 8
"""The most stacks within each other that are explained: a provider may be a pipeline itself."""
_OF_CONFIG = ("framework", "model", "region", "project", "temperature", "max_tokens")

_URL = re.compile(r"\w[\w+.-]*://[^\s'\"<>]+")
_ADDRESS_IN_MEMORY = re.compile(r" at 0x[0-9a-fA-F]+")
_FUNCTION = re.compile(r"<(?:function|bound method) (?:[\w.<>]*\.)?([\w<>]+)[^<>]*(?:<[^<>]*>)?>")
_NAMED_TEXT = re.compile(r"""(['"]?\b(\w+)['"]?\s*[=:]\s*)(b?'(?:[^'\\]|\\.)*'|b?"(?:[^"\\]|\\.)*")""")


@attrs.frozen(eq=False)
class Branch:
    """A target that a layer may ask, in words: which model of which provider."""

    name: str
    what: str


@attrs.frozen(eq=False)
class Layer:
    """A layer of a stack. Its `str` is its name with its place, such as "Retry (7)"."""

    position: int
    """The place in the chain, from 1 for the outermost."""
    layer: Any
    """The middleware itself."""
    kind: str | None
    """The name of its built-in class, such as "Retry"; None for a layer of your own, whatever its name is."""
    name: str
    settings: str
    """Its settings as its `repr` has them, without secrets."""
    branches: tuple[Branch, ...] = ()

    def __str__(self) -> str:
        return f"{self.name} ({self.position})"


class Chain:
    """A stack that is explained, as the rules see it.

    Attributes:
        layers: the layers, outermost first. Where the provider is a pipeline itself, its layers follow.
        provider: the provider at the end; None if only its configuration is known.
        config: the configuration of the model; None if it is not known.
        info: the description of the provider at the end; None if only the configuration is known.
    """

    def __init__(
        self,
        middleware: Iterable[object],
        *,
        provider: object = None,
        config: LLMConfig | None = None,
        info: ProviderInfo | None = None,
    ) -> None:
        self.config = config
        found = list(middleware)
        provider = _unwrapped(provider)
        stacks = 0
        while (inner := _stack_in(provider)) is not None and stacks < _DEEPEST:
            stacks += 1
            found += inner
            info = cast("Any", provider).info
            provider = _unwrapped(cast("Any", provider).provider)
        self.provider = provider
        self.info = info
        self.secrets = tuple(_secrets(config, found))
        self.layers = tuple(self._layer(place, layer) for place, layer in enumerate(found, 1))

    def of(self, *kinds: str) -> Iterator[Layer]:
        """Yield the layers of built-in classes with these names."""
        return (layer for layer in self.layers if layer.kind in kinds)

    @property
    def title(self) -> str:
        """The name of the explained stack, in a few words."""
        count = len(self.layers)
        return self.clean(f"{self.framework or 'a provider'}, {count} layer{'' if count == 1 else 's'}")

    @property
    def framework(self) -> str | None:
        """The framework of the provider at the end, if it is known."""
        if self.config is not None:
            return self.config.framework
        return None if self.info is None else self.info.framework

    @property
    def provider_shown(self) -> str:
        """The provider at the end, in words."""
        shown: list[str] = []
        if self.config is not None:
            values = {name: getattr(self.config, name) for name in _OF_CONFIG}
            shown += [f"{name}={value}" for name, value in values.items() if value is not None]
        elif self.info is not None:
            shown += [f"name={self.info.name}", f"framework={self.info.framework}"]
        if self.info is not None and self.info.server_address is not None:
            shown.append(f"server={self.info.server_address}:{self.info.server_port}")
        return self.clean(", ".join(shown))

    def clean(self, text: str) -> str:
        """Return a text without secrets, and without what could break a line or move a cursor."""
        text = _URL.sub(lambda match: shown_url(match[0]), text)
        text = _NAMED_TEXT.sub(lambda match: f"{match[1]}'***'" if is_secret(match[2]) else match[0], text)
        return one_line(mask_secrets(text, self.secrets))

    def _layer(self, place: int, layer: object) -> Layer:
        kind = built_in_kind(layer)
        name = self.clean(_name_of(layer))
        return Layer(place, layer, kind, name, self._settings(layer, name), tuple(self._branches(layer, kind)))

    def _settings(self, layer: object, name: str) -> str:
        """Return the settings of a layer, as its `repr` shows them."""
        try:
            settings = settings_of_layer(layer)
            if settings is not None:
                return self.clean(settings)
            shown = repr(layer)
        except Exception as error:  # noqa: BLE001  # a user's `__repr__` may raise anything
            return f"(its repr raises {type(error).__name__})"
        inside = re.fullmatch(rf"(?:[\w.<>]*\.)?{re.escape(name)}\((.*)\)", shown, re.DOTALL)
        shown = shown if inside is None else inside[1]
        shown = _ADDRESS_IN_MEMORY.sub("", _FUNCTION.sub(r"\1", shown))
        shown = self.clean(shown)  # before it is cut, because half of a secret is not found
        return shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}…"

    def _branches(self, layer: object, kind: str | None) -> Iterator[Branch]:
        targets = targets_of(layer)
        if not targets:
            return
        if kind != "Balance":
            yield Branch("first", f"whoever is asked: {self.clean(self._whom())}")
        for place, target in enumerate(targets, 1):
            yield Branch(f"target {place}", self.clean(self._target(target)))

    def _whom(self) -> str:
        if self.config is not None:
            return f"{self.config.framework}, {self.config.model}"
        return "the pipeline's provider" if self.info is None else _name_of_provider(self.info)

    def _target(self, target: Target) -> str:
        """Name the provider and the model of a target, which is not made for that."""
        asked = adapted(template_of(self.config), target)
        model = "" if asked is None or asked.model == _NO_MODEL else f", {asked.model}"
        config = config_of(target)
        if config is not None:
            server = "" if config.api_base is None else f" at {config.api_base}"
            return f"{config.framework}{model}{server}"
        if target.provider is not None:
            info = getattr(target.provider, "info", None)
            name = _name_of_provider(info) if isinstance(info, ProviderInfo) else type(target.provider).__name__
            return f"{name}{model}"
        return f"{model.removeprefix(', ')} of the same provider"


_NO_MODEL = "-"


def template_of(config: LLMConfig | None) -> Request:
    """Return the request that a configuration sends, with no message."""
    if config is None:
        return Request(model=_NO_MODEL, messages="-")
    return Request(model=config.model, messages="-", max_tokens=config.max_tokens, extra=dict(config.additional_params))


def adapted(request: Request, target: Target) -> Request | None:
    """Return a request as a target gets it; None if the target cannot say."""
    try:
        return request.evolve(target=target)
    except Exception:  # noqa: BLE001  # a target that cannot be resolved is one that no call can ask
        return None


def config_of(target: Target) -> LLMConfig | None:
    """Return the configuration of a target's provider; None if it has none, or it is wrong."""
    try:
        return target.config
    except Exception:  # noqa: BLE001  # as above
        return None


def targets_of(layer: object) -> tuple[Target, ...]:
    """Return the targets that a middleware shows in its attribute `targets`."""
    try:
        found: object = getattr(layer, "targets", ())
    except Exception:  # noqa: BLE001  # a user's property may raise anything
        return ()
    items = cast("Sequence[object]", found) if isinstance(found, (tuple, list)) else ()
    return tuple(item for item in items if isinstance(item, Target))


def own(layer: object, name: str) -> Callable[..., object] | None:
    """Return a method by which a layer tells of itself; None if it has none."""
    try:
        found: object = getattr(layer, name, None)
    except Exception:  # noqa: BLE001  # a user's property may raise anything
        return None
    return found if callable(found) else None


def _stack_in(provider: object) -> tuple[object, ...] | None:
    """Return the middleware of a provider that is a pipeline; None if it is not."""
    layers = getattr(provider, "middleware", None)
    is_stack = isinstance(layers, tuple) and isinstance(getattr(provider, "info", None), ProviderInfo)
    return cast("tuple[object, ...]", layers) if is_stack and hasattr(provider, "provider") else None


def _unwrapped(provider: object) -> object:
    """Return a provider without the adapter that runs it in threads."""
    return provider.wrapped if isinstance(provider, Threaded) else provider


def _name_of(layer: object) -> str:
    if isinstance(layer, partial):
        of: object = layer.func  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        return f"{_name_of(of)} (partial)"
    try:
        return layer_name(layer).rpartition("<locals>.")[2]
    except Exception:  # noqa: BLE001  # a user's `__qualname__` may raise anything
        return type(layer).__name__


def _name_of_provider(info: ProviderInfo) -> str:
    name = info.name if info.framework == "custom" else info.framework
    return name if info.server_address is None else f"{name} ({info.server_address}:{info.server_port})"


def _secrets(config: LLMConfig | None, layers: Iterable[object]) -> Iterator[str]:
    """Yield the keys and other secrets that a stack holds, as far as they are texts."""
    configs = [config, *(config_of(target) for layer in layers for target in targets_of(layer))]
    for each in configs:
        if each is not None:
            yield from filter(None, [each.fixed_key])
            yield from _secret_headers(each.headers)
            yield from secrets_in(each.additional_params)
            yield from secrets_in_query(each.api_base or "")
    for layer in layers:
        for target in targets_of(layer):
            yield from _secret_headers(target.parameters.get("headers") or {})
            yield from secrets_in(target.parameters.get("extra") or {})


def _secret_headers(headers: Mapping[str, str]) -> Iterator[str]:
    public = public_headers(headers)
    return (value for name, value in headers.items() if name.lower() not in public)
