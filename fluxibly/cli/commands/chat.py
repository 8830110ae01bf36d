"""The command `chat`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fluxibly.cli.commands.app import app
from fluxibly.cli.commands.options import ConfigFile, Framework, LogLevel, Model, config_of, log_to
from fluxibly.cli.screen import Screen
from fluxibly.errors import ConfigError


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
    capture: Annotated[
        bool, typer.Option("--capture", help="Record the prompts and the answers in the spans, too.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the response as JSON, for scripts.")] = False,
    go_on: Annotated[bool, typer.Option("--continue", "-c", help="Go on with the last conversation.")] = False,
    log: Annotated[
        bool | None, typer.Option("--log/--no-log", help="Whether to keep the turns; see `fluxibly logs`.")
    ] = None,
) -> None:
    """Ask a model; without a prompt, start a conversation."""
    from fluxibly.cli.chat import Chat, check_installed, recorder
    from fluxibly.cli.turns import TurnLog, last_conversation

    if capture and trace is None and otlp is None:
        raise ConfigError("--capture: expected a place for the spans; add --trace FILE or --otlp URL")
    screen = Screen()
    earlier = None
    if go_on:
        earlier = last_conversation(screen)
        if earlier is None:
            raise ConfigError("--continue: there is no conversation to go on with")
        config, framework, model = earlier.settings(config, framework, model)
    settings = config_of(config, framework, model)
    log_to(screen, log_level)
    check_installed(settings.framework, spans=trace is not None or otlp is not None)
    turns = TurnLog.open(screen, wanted=log, config_file=config)
    spans = recorder(trace, otlp, keep=screen.live or turns is not None)
    if capture:
        from fluxibly.telemetry._content import capture_by_default

        capture_by_default("span")
    try:
        Chat(
            config=settings,
            screen=screen,
            recorder=spans,
            system=system,
            stream=not no_stream,
            as_json=as_json,
            log=turns,
            earlier=earlier,
        ).run(prompt)
    finally:
        screen.end_line()
        problem = spans.close()
        if problem is not None:
            screen.aside(f"fluxibly: {problem}", "yellow")
