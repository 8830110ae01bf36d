"""The command `batch`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fluxibly.cli.commands.app import app, examples
from fluxibly.cli.commands.options import ConfigFile, EnvFile, Framework, LogLevel, Model, config_of, log_to
from fluxibly.cli.screen import Screen

_HELP = examples("fluxibly batch prompts.jsonl --out answers.jsonl --config stack.yaml")


@app.command(epilog=_HELP)
def batch(  # noqa: PLR0917  # typer reads the options from the parameters
    prompts: Annotated[Path, typer.Argument(help="A file of JSON lines, each with a prompt or messages.")],
    out: Annotated[Path, typer.Option(help="The file for the answers. What it has already is not asked again.")],
    model: Model = None,
    config: ConfigFile = None,
    framework: Framework = None,
    log_level: Annotated[LogLevel | None, typer.Option(help="The lowest level to log on standard error.")] = None,
    env_file: EnvFile = None,
) -> None:
    """Ask a model for each line of a file; run it again to go on."""
    from fluxibly.batch import Batch
    from fluxibly.llm import AsyncLLM

    log_to(Screen(), log_level)
    report = Batch(AsyncLLM(config_of(config, framework, model)), prompts, out).run()
    typer.echo(f"{report.answered} answered, {report.failed} failed in {report.elapsed:.1f} s")
