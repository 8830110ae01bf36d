"""The console script `fluxibly`: `main` is here; `commands/` has the commands and their options, and needs typer and rich.

`chat/`, `batch/`, `inspect.py`, `doctor.py` and `models.py` carry out the commands, `findings.py`, `report.py` and `screen.py` lay out and
print, `spans.py` records spans, and `trace/` draws trace files. This package may import every other package; no other package imports it.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and exit: 0 for success, 2 for a user's mistake, 1 for another failure, 130 after Ctrl-C."""
    try:
        from fluxibly.cli.commands import run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("typer", "rich"):
            raise
        from fluxibly._extras import pip_install

        how = pip_install(*_extras_of(sys.argv[1:]))
        sys.stderr.write(f"fluxibly: the command line needs packages that are not installed: {how}\n")
        sys.exit(2)
    except KeyboardInterrupt:  # while it is being loaded
        sys.exit(130)
    sys.exit(run(sys.argv[1:]))


_OF_CHAT = {"--trace": "otel", "--otlp": "otel"}
"""The extras that options of `chat` and `batch` need."""


def _extras_of(arguments: list[str]) -> list[str]:
    """Return the extras that a command needs. Options are matched by name only, because their parser is missing."""
    given = {argument.partition("=")[0] for argument in arguments}
    extras = ["cli"]
    if arguments[:1] == ["serve"]:
        extras.append("serve")
    if arguments[:1] in (["chat"], ["serve"], ["batch"]):
        if not given & {"--framework", "--config"} and _is_local(arguments):
            extras.append("local")
        extras += sorted({extra for option, extra in _OF_CHAT.items() if option in given})
    return extras


def _is_local(arguments: list[str]) -> bool:
    """Whether a local model is to answer: none is named, or it is named as one."""
    for number, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in ("-m", "--model"):
            value = value if equals else "".join(arguments[number + 1 : number + 2])
            return value.startswith(("local", "smollm2")) or value.endswith(".gguf")
    return True
