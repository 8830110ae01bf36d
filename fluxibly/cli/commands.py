"""The commands of the console script, and its exit status."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import attrs
import typer
from rich.console import Console

import fluxibly
from fluxibly.cli.screen import Screen, ScreenHandler, line_of
from fluxibly.config import LLMConfig
from fluxibly.errors import (
    AuthenticationError,
    ConfigError,
    ContextLengthExceeded,
    FluxiblyError,
)

OK, FAILED, MISUSED, INTERRUPTED = 0, 1, 2, 130

# Defaults without a configuration file. A small model may never stop: without a limit, an answer can take minutes.
LOCAL_TEMPERATURE = 0.2
LOCAL_MAX_TOKENS = 512

app = typer.Typer(
    name="fluxibly",
    help="Call language models through a chain of middleware.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigFile = Annotated[Path | None, typer.Option("--config", help="A YAML file with an `llm:` section.")]
Framework = Annotated[str | None, typer.Option(help="The framework that runs the model; see `fluxibly frameworks`.")]
Model = Annotated[str | None, typer.Option(help="The model's name, or for `local` the path of a GGUF file.")]
LogLevel = Literal["debug", "info", "warning", "error", "critical"]


def run(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit status. A user's mistake is reported in one line on standard error."""
    try:
        result: Any = app(list(arguments) or ["--help"], prog_name="fluxibly", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else OK
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has closed the pipe, so Python must not try to flush the rest of the buffer at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (ConfigError, ContextLengthExceeded) as error:
        return _report(error, MISUSED)
    except NotImplementedError as error:  # a provider without stream()
        return _report(error, MISUSED, "try --no-stream: ")
    except AuthenticationError as error:
        return _report(error, MISUSED if error.status is None else FAILED)  # without a status, the key is missing
    except FluxiblyError as error:
        return _report(error, FAILED)
    except Exception as error:  # noqa: BLE001  # an error of a provider or a middleware
        message = getattr(error, "format_message", None)
        if message is not None:  # an error of typer, for wrong arguments
            sys.stderr.write(f"fluxibly: {' '.join(message().split())}\n")
            return MISUSED
        if logging.getLogger("fluxibly").isEnabledFor(logging.DEBUG):
            traceback.print_exc()
        return _report(error, FAILED, f"{type(error).__name__}: ")


def _report(error: BaseException, status: int, prefix: str = "") -> int:
    sys.stderr.write(f"fluxibly: {prefix}{line_of(error)}\n")
    return status


def _config(file: Path | None, framework: str | None, model: str | None) -> LLMConfig:
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


def _log(screen: Screen, level: LogLevel | None) -> None:
    """Log to standard error: by default warnings, and at a terminal everything from INFO up."""
    shown = logging.getLevelNamesMapping()[level.upper()] if level is not None else None
    logger = logging.getLogger("fluxibly")
    logger.setLevel(shown if shown is not None else logging.INFO if screen.live else logging.WARNING)
    logger.addHandler(ScreenHandler(screen, failures=level is not None))
    logger.propagate = False
    # `chat` prints a line of its own about spans that were not exported.
    logging.getLogger("opentelemetry").addHandler(logging.NullHandler())
    logging.getLogger("opentelemetry").propagate = False


def _version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"fluxibly {fluxibly.__version__}\n")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def chat(  # noqa: PLR0917  # typer reads the options from the parameters
    prompt: Annotated[str | None, typer.Argument(help="The question; - reads it from standard input.")] = None,
    config: ConfigFile = None,
    framework: Framework = None,
    model: Model = None,
    system: Annotated[str | None, typer.Option(help="Instructions for the model.")] = None,
    no_stream: Annotated[bool, typer.Option("--no-stream", help="Wait for the whole answer.")] = False,
    log_level: Annotated[LogLevel | None, typer.Option(help="The lowest level to log on standard error.")] = None,
    trace: Annotated[Path | None, typer.Option(help="A file to write the spans to, as OTLP JSON lines.")] = None,
    otlp: Annotated[str | None, typer.Option(metavar="URL", help="A backend to send the spans to, over HTTP.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the response as JSON, for scripts.")] = False,
) -> None:
    """Ask a model; without a prompt, start a conversation."""
    from fluxibly.cli.chat import Chat, check_installed, recorder

    screen = Screen()
    settings = _config(config, framework, model)
    _log(screen, log_level)
    check_installed(settings.framework, spans=trace is not None or otlp is not None)
    spans = recorder(trace, otlp, keep=screen.live)
    try:
        Chat(config=settings, screen=screen, recorder=spans, system=system, stream=not no_stream, as_json=as_json).run(
            prompt
        )
    finally:
        screen.end_line()
        problem = spans.close()
        if problem is not None:
            screen.aside(f"fluxibly: {problem}", "yellow")


@app.command()
def explain(
    config: ConfigFile = None,
    framework: Framework = None,
    model: Model = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail if an order of the layers hurts.")] = False,
    mermaid: Annotated[
        bool, typer.Option("--mermaid", help="Print a flowchart in Mermaid's language instead.")
    ] = False,
) -> None:
    """Print the stack that would run: what each layer does, the worst case of a call, and warnings of orders that hurt."""
    from fluxibly.cli.inspect import explained

    explanation = explained(_config(config, framework, model))
    screen = Screen()
    screen.lines(explanation.mermaid() if mermaid else str(explanation))
    if strict:
        explanation.check()


@app.command()
def frameworks() -> None:
    """List the registered frameworks: whether each is ready, and which package or key is missing."""
    from fluxibly.cli.inspect import framework_rows

    Screen().rows(framework_rows(), ("framework", "status", "to do"))


@app.command()
def doctor(config: ConfigFile = None, framework: Framework = None, model: Model = None) -> int:
    """Check versions, keys and endpoints, and say how to fix problems."""
    from fluxibly.cli.inspect import examine

    return examine(Screen(), _config(config, framework, model) if config or framework or model else None)


@app.command()
def trace(
    file: Annotated[Path, typer.Argument(help="A file of spans in OTLP JSON, as chat --trace writes it.")],
    html: Annotated[Path | None, typer.Option(metavar="OUT", help="Write an HTML page to this file instead.")] = None,
) -> None:
    """Draw the spans of a file as a waterfall."""
    try:
        if html is None:
            from fluxibly.cli.trace.terminal import render

            Console(highlight=False).print(render(file))
        else:
            from fluxibly.cli.trace.html import render as render_page

            html.write_text(render_page(file), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(str(error)) from error
