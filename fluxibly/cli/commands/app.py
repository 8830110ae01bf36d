"""The commands of the console script, and its exit status."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer

import fluxibly
from fluxibly.cli.commands.options import EnvFile
from fluxibly.cli.screen import line_of
from fluxibly.errors import (
    AuthenticationError,
    ConfigError,
    ContextLengthExceeded,
    FluxiblyError,
)

OK, FAILED, MISUSED, INTERRUPTED = 0, 1, 2, 130


def examples(*lines: str) -> str:
    """Return the end of a command's help: lines that can be typed as they are."""
    return "\n".join(["\b", "Examples:", *[f"  {line}" for line in lines]])


app = typer.Typer(
    name="fluxibly",
    help="Call language models through a chain of middleware.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=examples("fluxibly chat", 'fluxibly chat "What is the capital of France?"', "fluxibly COMMAND --help"),
)


def run(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit status. A user's mistake is reported in one line on standard error."""
    try:
        # The arguments go with the context, for commands that say how to go on.
        result: Any = app(
            list(arguments) or ["--help"], prog_name="fluxibly", standalone_mode=False, obj=list(arguments)
        )
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


def _version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"fluxibly {fluxibly.__version__}\n")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", "-V", is_eager=True, callback=_version, help="Print the version and exit.")
    ] = False,
    env_file: EnvFile = None,
) -> None:
    pass
