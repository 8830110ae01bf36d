"""Options that several commands have, and the configuration that they describe."""

from __future__ import annotations

import logging
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import attrs
import typer
from typer.core import TyperCommand

from fluxibly.cli.screen import Screen, ScreenHandler
from fluxibly.config import LLMConfig
from fluxibly.errors import ConfigError

# Defaults without a configuration file. A small model may never stop: without a limit, an answer can take minutes.
LOCAL_TEMPERATURE = 0.2
LOCAL_MAX_TOKENS = 512
OWN_MODELS = {"local": "smollm2", "echo": "echo"}
"""The models of frameworks that have one of their own."""

ConfigFile = Annotated[Path | None, typer.Option("--config", help="A YAML file with an `llm:` section.")]
Framework = Annotated[
    str | None, typer.Option(help="A framework, for --model with a name of its own; see `fluxibly frameworks`.")
]


def _models(incomplete: str) -> list[str]:
    """Return how the names of models begin, for shells that complete words."""
    from fluxibly.providers.local import packaged_models
    from fluxibly.registry import frameworks

    names = [f"local:{model.name}" for model in packaged_models()]
    names += [f"{name}:" for name in frameworks() if name != "local"]
    return [name for name in names if name.startswith(incomplete)]


Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="PROVIDER:MODEL",
        autocompletion=_models,
        help="Who answers, such as openai:gpt-4o-mini, ollama:mistral:7b or local:FILE.gguf.",
    ),
]


def _read_env_file(file: Path | None) -> Path | None:
    if file is not None:
        from fluxibly.cli.environment import read_env_file

        read_env_file(file)
    return file


EnvFile = Annotated[
    Path | None,
    typer.Option(
        "--env-file",
        metavar="FILE",
        is_eager=True,
        callback=_read_env_file,
        help="A .env file with keys. Variables that are set already win.",
    ),
]
"""A file that is read before the command runs: the command itself has nothing to do with it."""
Parameter = Annotated[
    list[str] | None,
    typer.Option("--option", "-o", metavar="NAME VALUE", help="A parameter, like temperature 0.5; may be repeated."),
]
"""A parameter of a call, for a `PairsCommand`."""
LogLevel = Literal["debug", "info", "warning", "error", "critical"]


class PairsCommand(TyperCommand):
    """A command whose option `-o` has two values, which typer has no type for."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse arguments, in which `-o NAME VALUE` is `-o NAME=VALUE`."""
        joined: list[str] = []
        rest = iter(args)
        for argument in rest:
            joined.append(argument)
            if argument == "--":
                break
            if argument in ("-o", "--option"):
                pair = list(islice(rest, 1))
                if pair and "=" not in pair[0]:
                    pair += islice(rest, 1)
                joined += ["=".join(pair)] if pair else []
        return super().parse_args(ctx, [*joined, *rest])


def config_of(file: Path | None, framework: str | None, model: str | None) -> LLMConfig:
    """Return the configuration that the options describe; by default, the small local model.

    Args:
        file: a configuration file; what it has of another service stays behind.
        framework: a framework. The model is then its own name for it.
        model: "framework:model", or a name that says enough; see `read_model`.
    """
    if framework is None and model is not None:
        framework, model = _named(model, in_file=file is not None)
    if file is not None:
        return _from_file(file, framework, model)
    framework = "local" if framework is None else framework
    if model is None:
        model = OWN_MODELS.get(framework)
    if model is None:
        from fluxibly.registry import find_framework

        find_framework(framework)  # a wrong name is reported first
        raise ConfigError(f"--framework {framework}: give --model too")
    if framework != "local":
        return LLMConfig(framework=framework, model=model)
    return LLMConfig(framework=framework, model=model, temperature=LOCAL_TEMPERATURE, max_tokens=LOCAL_MAX_TOKENS)


def _from_file(file: Path, framework: str | None, model: str | None) -> LLMConfig:
    from fluxibly.registry import read_yaml

    config, middleware = read_yaml(file, framework=framework)
    config = attrs.evolve(config, middleware=middleware)
    if framework is None or framework == config.framework:
        return config if model is None else attrs.evolve(config, model=model)
    if model is None:
        raise ConfigError(f"--framework {framework}: give --model too; the file's is for {config.framework}")
    # These settings of the file belong to another service, and must not reach this one.
    return attrs.evolve(
        config,
        framework=framework,
        model=model,
        api_key=None,
        headers={},
        api_base=None,
        region=None,
        project=None,
        quirks={},
    )


def _named(text: str, *, in_file: bool) -> tuple[str | None, str]:
    """Return the framework and the model that a text names. With a configuration file, a plain name is one of its framework.

    Raises:
        ConfigError: the text says too little. The message says what to write.
    """
    from fluxibly._model_names import read_model, split_model
    from fluxibly.providers.local import named_model

    framework, model = split_model(text)
    if framework is not None or in_file:
        return framework, model
    if text in OWN_MODELS:
        return text, OWN_MODELS[text]
    if text and (named_model(text) is not None or text.lower().endswith(".gguf")):
        return "local", text
    return read_model(text)


def log_to(screen: Screen, level: LogLevel | None) -> None:
    """Log to standard error: by default warnings, and everything from INFO up for a user who wants details."""
    shown = logging.getLevelNamesMapping()[level.upper()] if level is not None else None
    logger = logging.getLogger("fluxibly")
    logger.setLevel(shown if shown is not None else logging.INFO if screen.verbose else logging.WARNING)
    logger.addHandler(ScreenHandler(screen, failures=level is not None))
    logger.propagate = False
    # `chat` prints a line of its own about spans that were not exported.
    logging.getLogger("opentelemetry").addHandler(logging.NullHandler())
    logging.getLogger("opentelemetry").propagate = False
