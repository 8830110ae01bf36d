"""The command `trace`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fluxibly.cli.commands.app import app
from fluxibly.errors import ConfigError


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
