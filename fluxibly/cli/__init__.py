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
        sys.stderr.write("fluxibly: the command line needs an extra: pip install 'fluxibly[cli]'\n")
        sys.exit(2)
    sys.exit(run(sys.argv[1:]))
