"""The console script `fluxibly`: `main` here, the commands in `app.py`, which needs typer and rich.

`chat.py` and `inspect.py` do what the commands say, `screen.py` and `report.py` print, `spans.py` records, `trace/`
draws trace files. May import everything; nothing imports it.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; exits with 0, with 2 for a mistake of the user's, and with 1 for any other failure."""
    try:
        from fluxibly.cli.app import run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("typer", "rich"):
            raise
        from fluxibly._extras import pip_install

        how = pip_install(*_extras_of(sys.argv[1:]))
        sys.stderr.write(f"fluxibly: the command line needs packages that are not installed: {how}\n")
        sys.exit(2)
    sys.exit(run(sys.argv[1:]))


def _extras_of(arguments: list[str]) -> list[str]:
    """The extras that a command needs. Its options are only glanced at: what parses them is missing."""
    given = {argument.partition("=")[0] for argument in arguments}
    extras = ["cli"]
    if arguments[:1] == ["chat"]:
        if not given & {"--framework", "--config"}:
            extras.append("local")
        if given & {"--trace", "--otlp"}:
            extras.append("otel")
    return extras
