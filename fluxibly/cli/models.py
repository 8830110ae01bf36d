"""The command `models`: what the services that are set up offer, by their own lists."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Final, Literal

import attrs

from fluxibly.cli.inspect import broken_plugins, is_mentioned, missing_of
from fluxibly.cli.model_cache import keep, kept
from fluxibly.cli.screen import line_of, printable
from fluxibly.cli.side_by_side import side_by_side
from fluxibly.config import LLMConfig
from fluxibly.errors import ConfigError, ConnectionFailed, ProviderError
from fluxibly.providers.local import cached_path, packaged_models
from fluxibly.registry import find_framework, frameworks, make_provider, plugins

if TYPE_CHECKING:
    from fluxibly.cli.screen import Screen

TIMEOUT: Final = 10.0
"""Seconds for which a service is asked."""
State = Literal["listed", "failed", "no list", "not running"]


@attrs.frozen
class Offer:
    """The models of a framework, or why they are not known."""

    provider: str
    state: State
    models: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    """A word on each of the models, or none at all."""
    problem: str = ""
    same_as: str | None = attrs.field(default=None, repr=False)
    """Equal for two frameworks that offer the models of one account."""


def show_models(
    screen: Screen,
    *,
    config: LLMConfig | None,
    provider: str | None,
    query: str,
    refresh: bool,
    as_json: bool,
) -> None:
    """Print the models of one framework, or of each that is set up.

    Raises:
        FrameworkNotRegistered: `provider` is unknown.
        ConfigError, ProviderError: the models of the one framework cannot be listed.
    """
    if config is not None and provider not in (None, config.framework):
        raise ConfigError(f"expected {config.framework!r}, whose configuration is in the file, got {provider!r}")
    if config is None and provider is not None:
        config = _config(find_framework(provider).name)
    if config is not None:
        offers: Iterable[Offer] = [offer_of(config, refresh=refresh)]
    else:
        offers = _without_doubles(_all_offers(refresh=refresh))
    if config is not None and any(offer.state == "no list" for offer in offers):
        raise ProviderError(f"{config.framework} has no list of its models", provider=config.framework)
    offers = (_matching(offer, query) for offer in offers)
    if as_json:
        screen.lines(json.dumps([_as_json(offer) for offer in offers], indent=2))
        return
    shown = [_show(screen, offer) for offer in offers]
    if config is None:
        _show_rest(screen, shown, query)


def _config(framework: str) -> LLMConfig:
    return LLMConfig(framework=framework, model="-")


def _all_offers(*, refresh: bool) -> Iterator[Offer]:
    """Ask each service that is set up, all at the same time."""
    broken = broken_plugins(plugins("frameworks"))
    ready = [each for each in frameworks().values() if each.name not in broken and missing_of(each) is None]
    return side_by_side(partial(_tried, refresh=refresh), [each.name for each in ready])


def _tried(name: str, *, refresh: bool) -> Offer:
    """Return the offer of a framework; a failure is one too."""
    framework = find_framework(name)
    try:
        return offer_of(_config(name), refresh=refresh)
    except (Exception, SystemExit) as error:  # noqa: BLE001  # a plugin may raise anything
        away = isinstance(error, ConnectionFailed) and framework.env_var is None and not is_mentioned(framework)
        return Offer(name, "not running" if away else "failed", problem=line_of(error))


def offer_of(config: LLMConfig, *, refresh: bool = False) -> Offer:
    """Return the models that a framework offers.

    Raises:
        ConfigError, ProviderError: the list cannot be had.
    """
    name = config.framework
    framework = find_framework(name)
    if name == "local":
        return _local()
    if framework.extra is not None:
        return Offer(name, "no list")  # to load its library would take seconds
    provider = make_provider(config, asynchronous=False)
    try:
        if not getattr(provider, "has_list", False):
            return Offer(name, "no list")
        account: str | None = provider.account
        # A server of the user's own is asked each time, because its models come and go.
        place = account if framework.env_var is not None else None
        models: list[str] | None = kept(place) if place is not None and not refresh else None
        if models is None:
            models = list[str](provider.list_models(timeout=TIMEOUT))
            if place is not None:
                keep(place, models)
        return Offer(name, "listed", tuple(models), same_as=account)
    finally:
        getattr(provider, "close", lambda: None)()


def _local() -> Offer:
    models = packaged_models()
    notes = [
        f"{model.title}, {model.license}; "
        + ("fetched" if cached_path(model).is_file() else f"the first call fetches {model.wheel_size / 1e6:.0f} MB")
        for model in models
    ]
    return Offer("local", "listed", tuple([model.name for model in models]), tuple(notes))


def _without_doubles(offers: Iterable[Offer]) -> Iterator[Offer]:
    """Yield the first of the frameworks that offer the models of one account: OpenAI's has two, for two of its APIs."""
    seen = set[str]()
    for offer in offers:
        if offer.same_as not in seen:
            yield offer
        if offer.same_as is not None:
            seen.add(offer.same_as)


def _matching(offer: Offer, query: str) -> Offer:
    """Return an offer with the models whose names hold `query`, whatever its case."""
    found = [index for index, model in enumerate(offer.models) if query.lower() in f"{offer.provider}:{model}".lower()]
    notes = tuple(offer.notes[index] for index in found) if offer.notes else ()
    return attrs.evolve(offer, models=tuple(offer.models[index] for index in found), notes=notes)


def _as_json(offer: Offer) -> dict[str, object]:
    found: dict[str, object] = {"provider": offer.provider, "state": offer.state, "models": list(offer.models)}
    if offer.notes:
        found["notes"] = list(offer.notes)
    if offer.problem:
        found["problem"] = offer.problem
    return found


def _show(screen: Screen, offer: Offer) -> Offer:
    """Print the models of an offer, each as the option `--model` takes it."""
    for index, model in enumerate(offer.models):
        name = printable(f"{offer.provider}:{model}")
        # A person pastes it into a shell; a program passes it on as it is.
        screen.line(shlex.quote(name) if screen.live else name, offer.notes[index] if offer.notes else "")
    return offer


def _show_rest(screen: Screen, offers: list[Offer], query: str) -> None:
    """Tell which services failed, and a person also what else is not listed."""
    for offer in offers:
        if offer.state == "failed":
            named = offer.problem.lower().startswith(offer.provider)
            screen.aside(f"fluxibly: {'' if named else offer.provider + ': '}{offer.problem}", "yellow")
    if query and not any(offer.models for offer in offers):
        screen.note(f"No model's name has {query!r} in it.")
    for state, says in (("no list", "Without a list"), ("not running", "Not running here")):
        names = [offer.provider for offer in offers if offer.state == state]
        if names:
            screen.note(f"{says}: {', '.join(names)}")
    if not query:
        screen.note("`fluxibly doctor` says what other services need.")
