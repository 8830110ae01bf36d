"""The names of models as users write them: "framework:model", and bare names that a service is known by."""

from __future__ import annotations

from fluxibly.errors import ConfigError, FrameworkNotRegistered
from fluxibly.registry import framework_called, frameworks, nearest_framework


def split_model(text: str) -> tuple[str | None, str]:
    """Split "framework:model" at the first colon.

    The framework is None, and the model the whole text, if the text before the colon is neither the name of a framework
    nor another name for one ("google:…" is `gemini`).
    """
    name, colon, model = text.partition(":")
    framework = framework_called(name) if colon and model.strip() else None
    return (None, text) if framework is None else (framework, model.strip())


def read_model(text: str) -> tuple[str, str]:
    """Return the framework and the model of "framework:model", or of a bare name that a service is known by.

    "ollama:mistral:7b" is Ollama's `mistral:7b`, and "claude-sonnet-4-5" Anthropic's. A name that is not known says nothing
    about its framework, so there is no guess.

    Raises:
        ConfigError: the text is neither. The message says what to write.
        FrameworkNotRegistered: the text before the colon is nearly the name of a framework.
    """
    framework, model = split_model(text)
    if framework is not None:
        return framework, model
    from fluxibly.providers.services import framework_of_model

    text = text.strip()
    framework = framework_of_model(text)
    if framework is not None:
        return framework, text
    raise _unreadable(text)


_LOCAL = {"local": "local:smollm2", "echo": "echo:echo"}
"""What to write for a framework that has a model of its own."""


def _unreadable(text: str) -> ConfigError:
    """Return the error for a text that names no framework."""
    expected = f'expected "framework:model", like "openai:gpt-4o-mini", got {text!r}'
    name, colon, model = text.partition(":")
    called = framework_called(name)
    if not text.strip():
        return ConfigError(expected)
    if called is not None:
        return ConfigError(f"{expected}; {name!r} is a framework: write {_LOCAL.get(called, f'{name}:MODEL')!r}")
    if text.lower().endswith(".gguf"):
        return ConfigError(f"{expected}; write {f'local:{text}'!r} for a model of this file")
    if f"local:{text}" in _LOCAL.values():
        return ConfigError(f"{expected}; write {f'local:{text}'!r}")
    if "://" in text:
        # Never the address: it may have a password in it.
        expected = 'expected "framework:model", like "openai:gpt-4o-mini", got an address'
        return ConfigError(
            f"{expected}; write LLM('openai:MODEL', api_base='http…') for a server that speaks OpenAI's dialect"
        )
    vendor, _, rest = text.partition("/")
    if rest and framework_called(vendor) is not None:
        return ConfigError(f"{expected}; write {f'{vendor}:{rest}'!r}, or who else serves it: {f'openrouter:{text}'!r}")
    from fluxibly.providers.services import MODEL_FAMILIES, framework_of_model

    if framework_of_model(text.lower()) is not None:
        return ConfigError(f"{expected}; did you mean {text.lower()!r}?")
    has_framework = colon and "/" not in name and name.lower() not in MODEL_FAMILIES
    near = nearest_framework(name) if has_framework else None
    if near is not None:
        known = f"Available frameworks: {list(frameworks())}"
        return FrameworkNotRegistered(f"{expected}; did you mean {f'{near}:{model}'!r}? {known}")
    return ConfigError(
        f"{expected}. No service is known by this name alone: write who serves it, like {f'ollama:{text}'!r} or "
        f"{f'openrouter:{text}'!r}"
    )
