"""Options that several commands have, and the configuration that they describe."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Literal

import attrs
import typer

from fluxibly.cli.screen import Screen, ScreenHandler
from fluxibly.config import LLMConfig
from fluxibly.errors import ConfigError

# Defaults without a configuration file. A small model may never stop: without a limit, an answer can take minutes.
LOCAL_TEMPERATURE = 0.2
LOCAL_MAX_TOKENS = 512

ConfigFile = Annotated[Path | None, typer.Option("--config", help="A YAML file with an `llm:` section.")]
Framework = Annotated[str | None, typer.Option(help="The framework that runs the model; see `fluxibly frameworks`.")]
Model = Annotated[str | None, typer.Option(help="The model's name, or for `local` the path of a GGUF file.")]


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
LogLevel = Literal["debug", "info", "warning", "error", "critical"]


def config_of(file: Path | None, framework: str | None, model: str | None) -> LLMConfig:
    """Return the configuration that the options describe; by default, the small local model."""
    from fluxibly.providers.local import DEFAULT_MODEL

    if file is not None:
        from fluxibly.registry import read_yaml

        config, middleware = read_yaml(file, framework=framework)
        config = attrs.evolve(config, middleware=middleware)
        if framework is not None and framework != config.framework:
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
        return config if model is None else attrs.evolve(config, model=model)
    defaults = {"local": DEFAULT_MODEL, "echo": "echo"}
    framework = "local" if framework is None else framework
    if model is None:
        model = defaults.get(framework)
    if model is None:
        from fluxibly.registry import find_framework

        find_framework(framework)  # a wrong name is reported first
        raise ConfigError(f"--framework {framework}: give --model too")
    if framework != "local":
        return LLMConfig(framework=framework, model=model)
    return LLMConfig(framework=framework, model=model, temperature=LOCAL_TEMPERATURE, max_tokens=LOCAL_MAX_TOKENS)


def log_to(screen: Screen, level: LogLevel | None) -> None:
    """Log to standard error: by default warnings, and at a terminal everything from INFO up."""
    shown = logging.getLevelNamesMapping()[level.upper()] if level is not None else None
    logger = logging.getLogger("fluxibly")
    logger.setLevel(shown if shown is not None else logging.INFO if screen.live else logging.WARNING)
    logger.addHandler(ScreenHandler(screen, failures=level is not None))
    logger.propagate = False
    # `chat` prints a line of its own about spans that were not exported.
    logging.getLogger("opentelemetry").addHandler(logging.NullHandler())
    logging.getLogger("opentelemetry").propagate = False
