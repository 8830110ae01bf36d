"""The keywords of `LLM` and of its calls: those that exist, and advice for those that do not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from fluxibly._checks import did_you_mean, is_mapping, kind_of
from fluxibly.config import LLMConfig
from fluxibly.types import Request

KEYWORDS = frozenset(field.name for field in attrs.fields(Request)) - {"messages", "call", "target"}
"""The keywords of a call, those of `Overrides`: read from `Request`, because making a TypedDict at each import costs too much."""
_INSTEAD = {
    "extra_body": "write extra={…}",
    "extra_headers": "write headers={…}",
    "functions": "write tools=[…], or add the middleware Tools([…]) that runs them",
    "into": "complete(), stream() and parse() take it",
    "max_completion_tokens": "write max_tokens=…",
    "max_output_tokens": "write max_tokens=…",
    "max_retries": "set it in the configuration, or as middleware: Retry(max_retries=…)",
    "messages": "give the messages as the prompt, the first argument of a call",
    "response_model": "write into=…, or llm.parse(prompt, Person)",
    "restarts": "only stream() takes it",
    "schema": "write into=…, or response_format={…}",
    "stop_sequences": "write stop=[…]",
    "stream": "call llm.stream(…) or llm.forward_stream(…)",
    "system": "write [Message.system(…), Message.user(…)] as the prompt, or llm.conversation(system=…)",
}
"""The advice for settings that other clients have, or that only some calls take."""
_OF_CONFIG = frozenset(field.name for field in attrs.fields(LLMConfig)) - KEYWORDS
"""The settings that a configuration has, and a call does not."""
NO_SETTING = {
    **{name: f"a call takes it, like llm.complete(…, {name}=…)" for name in ("metadata", "tool_choice")},
    **{
        name: advice for name, advice in _INSTEAD.items() if name not in ("extra_body", "max_retries", "stop_sequences")
    },
    "extra": "write additional_params={…}",
    "prompt": "a call takes it, like llm.complete(prompt)",
    "provider": 'write framework="…", or "framework:model" as the first argument',
    "tools": "a call takes it, like llm.complete(…, tools=[…]); or add the middleware Tools([…]) that runs them",
}
"""The advice for settings that a configuration does not have, unless a name that it has is near."""


def configured(who: str, config: object, settings: dict[str, Any], middleware: object) -> LLMConfig:
    """Return the configuration of settings, or of a text like "openai:gpt-4o-mini" and settings.

    Raises:
        TypeError: there is no model. The message says what to write.
        ConfigError: a setting is wrong, or the text names no framework.
    """
    if isinstance(config, str):
        from fluxibly._model_names import read_model, split_model  # late, because many programs write configurations

        if isinstance(middleware, str) and split_model(config)[0] is None:
            raise TypeError(f"{who}: expected one text, like {who}({f'{config}:{middleware}'!r}), got two")
        for name in ("framework", "model"):
            if name in settings:
                raise TypeError(
                    f"{who}: expected {name} in the text alone, got {config!r} and {name}={settings[name]!r}"
                )
        settings["framework"], settings["model"] = read_model(config)
    elif config is not None:
        write = f"{who}(LLMConfig.from_mapping(…)) or {who}(**settings)" if is_mapping(config) else f"{who}(…)"
        if hasattr(config, "complete"):
            write = (
                "Pipeline(provider, middleware) for a provider of your own, or register it by register_llm_framework"
            )
        raise TypeError(
            f'{who}: expected an LLMConfig or a text like "openai:gpt-4o-mini", got {kind_of(config)}; write {write}'
        )
    if "framework" not in settings or "model" not in settings:
        raise TypeError(_no_model(who, settings))
    return LLMConfig(**settings)


def _no_model(who: str, settings: Mapping[str, object]) -> str:
    """Return the message for a model without a name or a framework."""
    example = f'{who}("openai:gpt-4o-mini"), {who}(framework="openai", model="gpt-4o-mini") or {who}(LLMConfig(…))'
    model, framework = settings.get("model"), settings.get("framework")
    if model is not None:
        return f"{who}: expected a framework for the model {model!r}; write {example}"
    if framework is not None:
        return f"{who}: expected a model for the framework {framework!r}; write {example}"
    return f"{who}: expected a model; write {example}"


def no_keyword(name: str) -> TypeError:
    """Return the error for a keyword that a call does not take."""
    if name in _INSTEAD:
        return TypeError(f"a call has no setting {name!r}; {_INSTEAD[name]}")
    if name in _OF_CONFIG:
        return TypeError(f"a call has no setting {name!r}; set it in the configuration, like LLM(…, {name}=…)")
    hint = did_you_mean(name, {*KEYWORDS, "timeout"})
    return TypeError(f"a call has no setting {name!r}{hint}; pass provider parameters in extra=")
