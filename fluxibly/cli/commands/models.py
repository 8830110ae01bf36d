"""The command `models`."""

from __future__ import annotations

from typing import Annotated

import typer

from fluxibly.cli.commands.app import app, examples
from fluxibly.cli.commands.options import ConfigFile, EnvFile, config_of
from fluxibly.cli.screen import Screen


@app.command(epilog=examples("fluxibly models", "fluxibly models openai -q mini"))
def models(  # noqa: PLR0917  # typer reads the options from the parameters
    provider: Annotated[str | None, typer.Argument(help="One service; by default all that are set up.")] = None,
    query: Annotated[str, typer.Option("--query", "-q", metavar="TEXT", help="Only names that hold this text.")] = "",
    refresh: Annotated[bool, typer.Option("--refresh", help="Ask again; lists are kept for an hour.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
    config: ConfigFile = None,
    env_file: EnvFile = None,
) -> None:
    """List the models that services offer, as --model takes them."""
    from fluxibly.cli.models import show_models

    settings = None if config is None else config_of(config, None, None)
    show_models(Screen(), config=settings, provider=provider, query=query, refresh=refresh, as_json=as_json)
