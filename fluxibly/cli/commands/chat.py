"""The command `chat`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from fluxibly.cli.commands.app import app, examples
from fluxibly.cli.commands.options import (
    ConfigFile,
    EnvFile,
    Framework,
    LogLevel,
    Model,
    PairsCommand,
    Parameter,
    config_of,
    log_to,
)
from fluxibly.cli.screen import Screen
from fluxibly.config import LLMConfig
from fluxibly.errors import ConfigError

_HELP = examples(
    'fluxibly chat "What is the capital of France?"',
    'cat report.txt | fluxibly chat "Summarise this."',
    "fluxibly chat -m openai:gpt-4o-mini  # a conversation",
    'fluxibly chat -c "And of Spain?"',
    'fluxibly chat "What is on it?" -a photo.jpg -m gemini:gemini-2.5-flash',
    "fluxibly chat \"Invent a dog\" --schema 'name, age int, tricks list[str]'",
    'fluxibly chat "Be creative." -o temperature 1.5 -o max_tokens 200',
    'fluxibly chat "What is the weather in Ostend?" --tools weather:forecast',
)


@app.command(cls=PairsCommand, epilog=_HELP)
def chat(  # noqa: PLR0917  # typer reads the options from the parameters
    prompt: Annotated[
        str | None, typer.Argument(help="The question. What is piped in stands before it; - is that alone.")
    ] = None,
    model: Model = None,
    system: Annotated[str | None, typer.Option("--system", "-s", help="Instructions for the model.")] = None,
    go_on: Annotated[bool, typer.Option("--continue", "-c", help="Go on with the last conversation.")] = False,
    attach: Annotated[
        list[str] | None,
        typer.Option("--attach", "-a", metavar="FILE|URL", help="Images, audio, PDFs or text files; may be repeated."),
    ] = None,
    schema: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|FIELDS", help="Answer with JSON of a JSON Schema, or of 'name, age int, tags list[str]'."
        ),
    ] = None,
    option: Parameter = None,
    tools: Annotated[
        list[str] | None,
        typer.Option(metavar="MODULE:FUNCTION", help="A function that the model may call; may be repeated."),
    ] = None,
    config: ConfigFile = None,
    framework: Framework = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but the answer.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show figures, spans and log lines.")] = False,
    no_stream: Annotated[bool, typer.Option("--no-stream", help="Wait for the whole answer.")] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown/--no-markdown", help="Whether to render Markdown at a terminal.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the response as JSON, for scripts.")] = False,
    log: Annotated[
        bool | None, typer.Option("--log/--no-log", help="Whether to keep the turns; see `fluxibly logs`.")
    ] = None,
    log_level: Annotated[LogLevel | None, typer.Option(help="The lowest level to log on standard error.")] = None,
    trace: Annotated[Path | None, typer.Option(help="A file to write the spans to, as OTLP JSON lines.")] = None,
    otlp: Annotated[str | None, typer.Option(metavar="URL", help="A backend to send the spans to, over HTTP.")] = None,
    capture: Annotated[
        bool, typer.Option("--capture", help="Record the prompts and the answers in the spans, too.")
    ] = False,
    env_file: EnvFile = None,
) -> None:
    """Ask a model; without a prompt, start a conversation.

    By default a small model on this machine answers.
    """
    from fluxibly.cli.chat import Asker, Chat, check_installed, recorder
    from fluxibly.cli.chat.attachments import attachments_of
    from fluxibly.cli.chat.schemas import checked_schema
    from fluxibly.cli.chat.settings import parameters_of, with_tools
    from fluxibly.cli.turns import TurnLog, last_conversation, new_conversation

    if capture and trace is None and otlp is None:
        raise ConfigError("--capture: expected a place for the spans; add --trace FILE or --otlp URL")
    if quiet and verbose:
        raise ConfigError("expected --quiet or --verbose, got both")
    screen = Screen(quiet=quiet, verbose=verbose)
    parameters = parameters_of(option or ())
    earlier = None
    if go_on:
        earlier = last_conversation(screen)
        if earlier is None:
            raise ConfigError("--continue: there is no conversation to go on with")

    def configure(config: Path | None, framework: str | None, model: str | None) -> LLMConfig:
        return with_tools(parameters.configure(config_of(config, framework, model)), tools or ())

    settings = configure(*(config, framework, model) if earlier is None else earlier.settings(config, framework, model))
    answers = None if schema is None else checked_schema(schema)
    attached = attachments_of(attach or ())
    log_to(screen, log_level)
    check_installed(settings.framework, spans=trace is not None or otlp is not None)
    turns = TurnLog.open(screen, wanted=log, config_file=config)
    spans = recorder(trace, otlp, keep=(screen.live and verbose) or turns is not None)
    if capture:
        from fluxibly.telemetry._content import capture_by_default

        capture_by_default("span")
    asker = Asker(
        screen=screen,
        recorder=spans,
        conversation=new_conversation() if earlier is None else earlier.id,
        stream=not no_stream,
        json=as_json,
        markdown=markdown,
        parameters=parameters.call,
        schema=answers,
        log=turns,
    )
    try:
        Chat(
            asker=asker,
            config=settings,
            configure=partial(configure, config, None),
            system=system,
            earlier=earlier,
            attached=attached,
        ).run(prompt)
    finally:
        screen.end_line()
        problem = spans.close()
        if problem is not None:
            screen.aside(f"fluxibly: {problem}", "yellow")
