"""The variables of a `.env` file, and where the value of a variable is from."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING, Final

from fluxibly._extras import pip_install
from fluxibly.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

LARGEST: Final = 1024 * 1024
"""Maximum size of a file, in characters."""
_from_files: Final[dict[str, Path]] = {}
"""The files that variables of this process are from."""


def read_env_file(file: Path) -> None:
    """Set the variables of a `.env` file in this process, except those that are set already.

    Raises:
        ConfigError: the file cannot be read, or has a line that is no `NAME=value`. The message quotes no line.
    """
    try:
        from dotenv import load_dotenv
        from dotenv.parser import parse_stream
    except ImportError:
        raise ConfigError(f"--env-file needs a package that is not installed: {pip_install('cli')}") from None
    text = _text(file)
    for line in parse_stream(io.StringIO(text)):
        if line.error:
            begins = len(line.original.string) - len(line.original.string.lstrip())
            number = line.original.line + line.original.string[:begins].count("\n")
            raise ConfigError(f"--env-file {file}: expected NAME=value in line {number}, got something else")
    before = set(os.environ)
    try:
        load_dotenv(stream=io.StringIO(text))
    except ValueError:
        raise ConfigError(f"--env-file {file}: expected text, got a NUL character in a value") from None
    _from_files.update(dict.fromkeys(set(os.environ) - before, file))


def _text(file: Path) -> str:
    try:
        with file.open(encoding="utf-8-sig") as opened:
            text = opened.read(LARGEST + 1)
    except OSError as error:
        raise ConfigError(f"--env-file {file}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--env-file {file}: expected text in UTF-8, got other bytes") from None
    if len(text) > LARGEST:
        raise ConfigError(f"--env-file {file}: expected at most {LARGEST:,} characters, got more")
    return text


def source_of(variable: str) -> str:
    """Say where a variable is from, such as "OPENAI_API_KEY from .env"."""
    return f"{variable} from {_from_files.get(variable, 'the environment')}"
