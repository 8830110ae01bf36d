"""The command `serve`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from fluxibly._extras import EXTRAS, pip_install, version_of
from fluxibly.cli.commands.app import app, examples
from fluxibly.cli.commands.options import ConfigFile, EnvFile, Framework, LogLevel, Model, config_of, log_to
from fluxibly.cli.screen import Screen
from fluxibly.errors import ConfigError

TOKEN_VARIABLE = "FLUXIBLY_SERVE_TOKEN"  # noqa: S105  # the name of a variable


@app.command(
    epilog=examples(
        "fluxibly serve -m local:smollm2",
        "fluxibly serve --config stack.yaml --port 9000",
        "FLUXIBLY_SERVE_TOKEN=… fluxibly serve --config stack.yaml --host 0.0.0.0",
    )
)
def serve(  # noqa: PLR0917  # typer reads the options from the parameters
    config: ConfigFile = None,
    framework: Framework = None,
    model: Model = None,
    host: Annotated[str, typer.Option(help="The name or address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes a free one.")] = 8080,
    token: Annotated[
        str | None,
        typer.Option(
            help=f"The API key that clients need; better in {TOKEN_VARIABLE}, since processes show their options."
        ),
    ] = None,
    models: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="The models that requests may name; by default theirs is ignored."),
    ] = None,
    pass_extra: Annotated[
        bool, typer.Option("--pass-extra", help="Pass unknown parameters of requests on to the service.")
    ] = False,
    allow_host: Annotated[
        str | None, typer.Option(metavar="A,B", help="Further names of this machine that Host headers may have.")
    ] = None,
    log_level: Annotated[LogLevel | None, typer.Option(help="The lowest level to log on standard error.")] = None,
    trace: Annotated[Path | None, typer.Option(help="A file to write the spans to, as OTLP JSON lines.")] = None,
    otlp: Annotated[str | None, typer.Option(metavar="URL", help="A backend to send the spans to, over HTTP.")] = None,
    env_file: EnvFile = None,
) -> None:
    """Answer OpenAI's chat completions API for other programs, by a model and its stack."""
    if any(version_of(package) is None for package in EXTRAS["serve"]):
        raise ConfigError(f"serve needs packages that are not installed: {pip_install('serve')}")
    from fluxibly.cli.chat import check_installed, recorder
    from fluxibly.cli.serve import serve as run

    key = _token(token)
    screen = Screen()
    settings = config_of(config, framework, model)
    log_to(screen, log_level)
    check_installed(settings.framework, spans=trace is not None or otlp is not None)
    spans = recorder(trace, otlp, keep=False)
    try:
        run(
            settings,
            host=host,
            port=port,
            token=key,
            models=_names("--models", models),
            pass_extra=pass_extra,
            hosts=_names("--allow-host", allow_host),
            say=lambda line: print(line, file=sys.stdout, flush=True),  # noqa: T201  # the line is what a program waits for
        )
    finally:
        problem = spans.close()
        if problem is not None:
            screen.aside(f"fluxibly: {problem}", "yellow")


def _token(given: str | None) -> str | None:
    """Return the token that clients need. An empty one is a mistake: it is a variable of a shell that was never set."""
    where, token = ("--token", given) if given is not None else (TOKEN_VARIABLE, os.environ.get(TOKEN_VARIABLE))
    if token is None:
        return None
    if not token.strip():
        raise ConfigError(f"{where}: expected a token, got an empty str")
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise ConfigError(f"{where}: expected visible ASCII characters without spaces, got others")
    return token


def _names(option: str, given: str | None) -> list[str]:
    if given is None:
        return []
    names = [name.strip() for name in given.split(",")]
    if not all(names):
        raise ConfigError(f"{option}: expected names with commas between them, got an empty one")
    return names
