"""`Target`: another model, or another provider with its own model and parameters, to answer a request."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

import attrs

from fluxibly import provider as providers
from fluxibly._checks import did_you_mean, is_mapping, kind_of, nearest, problem
from fluxibly._parameters import CONFIGURED, parameter_problems
from fluxibly.config import LLMConfig
from fluxibly.errors import ConfigError, Problems
from fluxibly.types import Request, replaced

_FIELDS = {field.name: field for field in attrs.fields(Request)}
_SETTINGS = _FIELDS.keys() - {"messages", "call", "target", "model"}
"""The parameters that a target may set."""
_DROPPED = _SETTINGS - {"metadata"}
"""The parameters that a target may drop: those that are sent."""
_CONFIG_ONLY = {field.name for field in attrs.fields(LLMConfig)} - _FIELDS.keys()


class Target:
    """The model or provider that answers a request in place of the pipeline's own.

    A target is a description: each pipeline makes the provider of its own kind, sync or async, when the target is first
    asked, and closes it. Targets with equal configurations share that provider. A provider that you made yourself is
    yours to close. For example::

        CLAUDE = Target("anthropic:claude-sonnet-4-5", drop=["seed"])

        def fallback(request, call_next):
            try:
                return (yield from call_next(request))
            except ProviderError:
                return (yield from call_next(request.evolve(target=CLAUDE)))

    A middleware that shows its targets as a tuple `targets` has them checked when an `LLM` is made.

    Args:
        to: "framework:model", such as "anthropic:claude-sonnet-4-5", if the text before the first colon is the name of a
            framework (so "mistral:7b" is Mistral's; write "ollama:mistral:7b"). Any other str is another model of the
            provider that is asked already. Or an `LLMConfig`, whose parameters and limits then apply. Or a provider.
        model: the model to ask a provider for; by default that of the request.
        drop: the parameters of the request that this target does not take, such as "seed".
        parameters: parameters to set, by the names of `Request`. They win over those of the request.

    If the provider changes, the request's `extra` and `headers` stay behind: they are in the words of another service,
    and may hold its secrets.

    Raises:
        TypeError: `to` is none of these, or a parameter is unknown; the message names the nearest known parameter.
        ConfigError: a value is out of range, or the configuration has its own `middleware`, which a target cannot have.
    """

    __slots__ = ("__weakref__", "_changes", "_config", "drop", "parameters", "provider", "to")

    def __init__(self, to: object, *, model: str | None = None, drop: Iterable[str] = (), **parameters: Any) -> None:
        self.to = to
        self.provider: Any = None
        self._config: LLMConfig | None = None
        own: dict[str, Any] = {}
        problems = Problems()
        if isinstance(to, LLMConfig):
            problems.of(_check_config, to)
            self._config = to
            own = {name: value for name in CONFIGURED if (value := getattr(to, name)) is not None}
        elif isinstance(to, str):
            if model is not None:
                raise TypeError(f"Target: expected the model within the text, got {to!r} and model={model!r}")
            problems.of(_check_text, to)
        else:
            _check_provider(to)
            self.provider = to
        if model is not None:
            parameters["model"] = model
        self.drop = problems.of(_to_drop, drop) or ()
        self.parameters = problems.of(_to_parameters, parameters, self.drop) or {}
        problems.check()
        self._changes = own | {name: _default_of(name) for name in self.drop} | self.parameters

    def __repr__(self) -> str:
        shown = [self._name()]
        for name, value in self.parameters.items():
            write = _FIELDS[name].repr
            shown.append(f"{name}={(write if callable(write) else repr)(value)}")
        if self.drop:
            shown.append(f"drop={[*self.drop]}")
        return f"Target({', '.join(shown)})"

    def _name(self) -> str:
        if isinstance(self.to, str):
            return repr(self.to)
        config = self._config
        return type(self.provider).__name__ if config is None else repr(f"{config.framework}:{config.model}")

    @property
    def config(self) -> LLMConfig | None:
        """The configuration of the provider to make; None for a provider that exists: a given one, or the one asked already."""
        if self._config is None and isinstance(self.to, str):
            # The search is repeated until it succeeds, because a framework may be registered late.
            from fluxibly._model_names import split_model  # late, because most programs have no targets

            framework, model = split_model(self.to)
            if framework is not None:
                self._config = LLMConfig(framework=framework, model=model)
        return self._config

    def adapt(self, request: Request) -> Request:
        """Return the request as this target gets it: with the model, the parameters and the target set."""
        config = self.config
        own: dict[str, Any]
        if config is not None:
            own = {"model": config.model, "extra": dict(config.additional_params), "headers": {}, "target": self}
        elif self.provider is not None:
            own = {"extra": {}, "headers": {}, "target": self}
        else:
            # A request that was made with this target has no other target.
            own = {"model": self.to, "target": None if request.target is self else request.target}
        return replaced(request, {**own, **self._changes})


def to_targets(values: object, path: str = "to") -> tuple[Target, ...]:
    """Return targets as code or YAML gives them. It is the converter of a middleware's field `to`.

    Args:
        values: `Target`s, and everything that `Target(to=…)` takes; or tables with the settings of an `LLMConfig`, and
            `drop`. One of these alone stands for a list of one.
        path: precedes the settings in messages.

    Raises:
        ConfigError: it lists every problem, each with its path.
    """
    if isinstance(values, (str, Target, LLMConfig)) or is_mapping(values) or providers.answers(values):
        values = [values]
    elif not isinstance(values, Iterable):
        raise ConfigError(f"{path}: expected a list of models, tables or Targets, got {kind_of(values)}")
    items = cast("Iterable[object]", values)
    problems = Problems()
    found = [problems.of(_to_target, value, f"{path}[{index}]") for index, value in enumerate(items)]
    problems.check()
    if not found:
        raise ConfigError(f"{path}: expected at least one target, got none")
    return tuple(target for target in found if target is not None)


def _to_target(value: object, path: str) -> Target:
    if isinstance(value, Target):
        return value
    try:
        return _of_table(dict(value)) if is_mapping(value) else Target(value)
    except ConfigError as error:
        raise ConfigError.of([_at(path, each) for each in error.problems]) from error
    except TypeError as error:
        raise ConfigError(_at(path, str(error))) from error


def _at(path: str, text: str) -> str:
    """Put a message under the path of a target. A message that begins with a setting's name continues the path."""
    text = text.removeprefix("Target: ")
    return f"{path}.{text}" if re.match(r"\w+[.:\[]", text) else f"{path}: {text}"


def _of_table(table: dict[Any, Any]) -> Target:
    """Return the target of a table, as YAML has it."""
    problems = Problems(
        [
            f"{name}: a target has none, because the stack of the call applies; leave it out"
            for name in ("middleware", "max_retries")
            if table.pop(name, None) is not None
        ]
    )
    drop = problems.of(_to_drop, table.pop("drop", None) or ())
    problems.of(_check_not_both, table, drop or ())
    config = problems.of(_to_config, table)
    problems.check()
    return Target(config, drop=drop or ())


def _to_config(table: Mapping[str, Any]) -> LLMConfig:
    if unknown := [name for name in table if nearest(str(name), ("drop",), 0.75)]:
        raise ConfigError(f"{unknown[0]}: there is no such setting; did you mean 'drop'?")
    return LLMConfig.from_mapping(table)


def check_targets(layers: Iterable[object]) -> None:
    """Check the targets that middleware have (their attribute `targets`), so that no call meets a mistake in an outage.

    Raises:
        ConfigError: it lists each target whose framework is unknown, whose packages are missing, or that has no key.
    """
    problems = Problems()
    for layer in layers:
        found: object = getattr(layer, "targets", ())
        for index, target in enumerate(cast("Iterable[object]", found) if isinstance(found, (tuple, list)) else ()):
            if isinstance(target, Target):
                name = getattr(layer, "__name__", type(layer).__name__)
                problems.of(_check, target, f"{name}.targets[{index}]")
    problems.check()


def _check(target: Target, path: str) -> None:
    from fluxibly.registry import check_config, missing_key

    config = target.config
    if config is None:
        return
    try:
        check_config(config).factory(asynchronous=False)
    except ConfigError as error:
        raise type(error).of([f"{path}: {each}" for each in error.problems]) from error
    missing = missing_key(config)
    if missing is not None and "headers" not in target.parameters:
        raise ConfigError(f"{path}: {config.framework} needs an API key: {missing}, or set api_key in an LLMConfig")


def _check_config(config: LLMConfig) -> None:
    if config.middleware is not None:
        raise ConfigError("Target: expected a configuration without middleware: the stack of the call applies")


def _check_text(text: str) -> None:
    name, colon, model = text.partition(":")
    if not name.strip() or (colon and not model.strip()):
        raise ConfigError(f'Target: expected "framework:model" or the name of a model, got {text!r}')


def _check_provider(to: object) -> None:
    if isinstance(to, type) and providers.answers(to):
        providers.check(to)
    expected = 'Target: expected "framework:model", the name of a model, an LLMConfig or a provider'
    if isinstance(getattr(to, "config", None), LLMConfig) and hasattr(to, "forward"):
        raise TypeError(f"{expected}, got {kind_of(to)}; write Target(llm.config)")
    if not providers.answers(to):
        raise TypeError(f"{expected}, got {kind_of(to)}")


def _to_drop(drop: object) -> tuple[str, ...]:
    """Return the names of the parameters that a target drops."""
    names = (drop,) if isinstance(drop, str) else drop
    if is_mapping(names) or not isinstance(names, Iterable):
        raise ConfigError(problem("Target: drop", 'a list of parameters, like ["seed"]', drop))
    given = list(cast("Iterable[object]", names))
    unknown = [
        f"Target: drop: expected the names of parameters that are sent, got {name!r}{did_you_mean(str(name), _DROPPED)}"
        for name in given
        if name not in tuple(_DROPPED)  # a tuple, because a value of a wrong type may have no hash
    ]
    if unknown:
        raise ConfigError.of(unknown)
    return tuple(map(str, given))


def _default_of(name: str) -> Any:
    """Return the value of a parameter that a request does not set."""
    default: Any = _FIELDS[name].default
    return default.factory() if isinstance(default, attrs.Factory) else default  # type: ignore[arg-type]


def _to_parameters(parameters: Mapping[str, Any], drop: tuple[str, ...]) -> dict[str, Any]:
    """Check the parameters that a target sets, and return them as a request has them."""
    for name in parameters:
        if name not in _SETTINGS and name != "model":
            advice = "; it belongs into an LLMConfig" if name in _CONFIG_ONLY else did_you_mean(name, _SETTINGS)
            raise TypeError(f"Target: a target sets no parameter {name!r}{advice}")
    _check_not_both(parameters, drop)
    problems = parameter_problems(parameters)
    if problems:
        raise ConfigError.of([f"Target: {each}" for each in problems])
    # Converted now, because a generator gives its values only once.
    converted = Request(model="-", messages="-").evolve(**parameters)
    return {name: getattr(converted, name) for name in parameters}


def _check_not_both(parameters: Mapping[str, Any], drop: tuple[str, ...]) -> None:
    both = [name for name in drop if name in parameters]
    if both:
        raise ConfigError.of([f"Target: {name}: expected a value, or the name in drop, got both" for name in both])
