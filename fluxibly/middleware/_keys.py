"""The names of providers and models: keys of the state that calls share, and words for messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias, cast

from fluxibly._checks import kind_of, problem
from fluxibly.flow import Flow, provider_of
from fluxibly.flow.verbs import discard, is_unfinished
from fluxibly.functions import check_function, find_function
from fluxibly.target import Target
from fluxibly.types import ProviderInfo, Request

By: TypeAlias = Literal["provider", "provider and model"] | Callable[[Request], object]
_WORDS = ("provider", "provider and model")


def to_by(value: By | str) -> By:
    """Return what a `by` stands for, where YAML may have the name of a function. It is a converter of attrs."""
    return cast("By", word_or_function(value, _WORDS))


def check_by(name: str, value: object) -> str | None:
    """Check a `by`."""
    return check_word_or_function(name, value, _WORDS)


def word_or_function(value: object, words: Sequence[str]) -> object:
    """Return one of the words as it is, and the function that another str names."""
    return find_function(value) if isinstance(value, str) and value not in words else value


def check_word_or_function(name: str, value: object, words: Sequence[str]) -> str | None:
    """Check a setting that is one of the words, or a function of the request."""
    if value in words:
        return None
    if not callable(value):
        return problem(name, f"{', '.join(map(repr, words))} or a function of the request", value)
    return check_function(name, value)


def key_of(request: Request, by: By) -> Flow[str]:
    """Return the key of the state that a request shares."""
    return name_of((yield from provider_of(request)), request, by)


def name_of(info: ProviderInfo, request: Request, by: By) -> str:
    """Return the key of the state that a request to a provider shares, such as "openai@api.openai.com:443/gpt-4o"."""
    if by == "provider and model":
        return f"{info.key}/{request.model}"
    return info.key if by == "provider" else text_of(by(request))


def text_of(key: object, name: str = "by") -> str:
    """Return the text of a key that the user's function has returned. `name` is the setting's.

    Raises:
        TypeError: its text is another for each call, so calls would share nothing.
    """
    if isinstance(key, str):
        # A user's name may have half a surrogate pair, at which a store would fail, for all users.
        return key if key.isascii() else key.encode(errors="backslashreplace").decode()
    kind = type(key)
    if is_unfinished(key) or (kind.__str__ is object.__str__ and kind.__repr__ is object.__repr__):
        discard(key)
        raise TypeError(f"{name}: expected a key from its function, such as a str or a number, got {kind_of(key)}")
    return text_of(str(key), name)


def whom(request: Request) -> str:
    """Name the model and the provider that a request goes to, such as "gpt-4o at openai (api.openai.com:443)"."""
    target, targets = request.target, request.call.targets
    if targets.is_made(target):
        provider = name_of_provider(targets.info_of(target))
    else:
        config = target.config if isinstance(target, Target) else None
        provider = repr(target) if config is None else config.framework
    return f"{request.model} at {provider}"


def name_of_provider(info: ProviderInfo) -> str:
    """Name a provider, such as "openai (api.openai.com:443)"."""
    name = info.name if info.framework == "custom" else info.framework
    return name if info.server_address is None else f"{name} ({info.server_address}:{info.server_port})"
