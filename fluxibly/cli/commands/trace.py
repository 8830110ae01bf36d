"""The command `trace`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fluxibly.cli.commands.app import app, examples
from fluxibly.cli.screen import Screen
from fluxibly.errors import ConfigError, FluxiblyError


@app.command(
    epilog=examples(
        'fluxibly chat --trace t.jsonl "Name three colours."',
        "fluxibly trace t.jsonl",
        "fluxibly trace t.jsonl --html t.html",
    )
)
def trace(
    file: Annotated[Path, typer.Argument(help="A file of spans in OTLP JSON, as chat --trace writes it.")],
    messages: Annotated[
        bool, typer.Option("--messages", help="Show the messages, too, if they were captured.")
    ] = False,
    html: Annotated[Path | None, typer.Option(metavar="OUT", help="Write an HTML page to this file instead.")] = None,
    show: Annotated[
        bool, typer.Option("--open", help="Open the page in a browser; without --html, it is written beside FILE.")
    ] = False,
) -> None:
    """Draw the spans of a file as a waterfall."""
    screen = Screen()
    try:
        if html is None and not show:
            from fluxibly.cli.trace.terminal import render

            Console(highlight=False).print(render(file, messages=messages))
            return
        from fluxibly.cli.trace.html import render as render_page

        if messages:
            raise ConfigError("--messages is for the terminal; a page has the messages anyway, so leave it out")
        out = file.with_name(f"{file.name}.html") if html is None else html
        page = render_page(file)
        if out.exists() and out.samefile(file):
            raise ConfigError(f"--html {out}: expected another file than the trace itself")
        _write(out, page)
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(str(error)) from error
    screen.lines(f"wrote {out}")
    if show:
        import webbrowser

        address = out.absolute().as_uri()
        if not webbrowser.open(address):
            raise FluxiblyError(f"--open: no browser could be started; open {address} in one")


def _write(out: Path, page: str) -> None:
    try:
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot write {out}: {error.strerror or error}; name another file with --html OUT"
        ) from error
