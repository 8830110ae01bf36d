"""What the options of `batch` say."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Literal

from fluxibly._checks import did_you_mean
from fluxibly.errors import ConfigError

_COUNT = re.compile(r"(\d[\d_,]*(?:\.\d+)?)\s*([kKmM]?)")
_TIMES = {"": 1, "k": 1_000, "m": 1_000_000}


def count_of(option: str, text: str | None) -> float | None:
    """Return the number that an option gives, such as 3000, 50k or 1.5M.

    Raises:
        ConfigError: it is no number above 0.
    """
    if text is None:
        return None
    found = _COUNT.fullmatch(text.strip())
    number = float(re.sub("[_,]", "", found[1])) * _TIMES[found[2].lower()] if found else 0.0
    if number <= 0:
        raise ConfigError(f"{option}: expected a number a minute, such as 3000, 50k or 1M, got {text!r}")
    return number


def concurrency_of(text: str) -> int | Literal["auto"]:
    """Return the calls at once that `--concurrency` gives.

    Raises:
        ConfigError: it is neither "auto" nor a whole number from 1 up.
    """
    if text.isascii() and text.isdigit() and int(text) >= 1:
        return int(text)
    if text != "auto":
        guess = did_you_mean(text, ("auto",))
        raise ConfigError(f"--concurrency: expected a number of calls at once, or auto, got {text!r}{guess}")
    return "auto"


def dollars_of(text: str | None) -> float | None:
    """Return the dollars that `--budget` gives, such as 20, 0.5 or $20.

    Raises:
        ConfigError: it is no number above 0.
    """
    if text is None:
        return None
    try:
        dollars = float(text.strip().removeprefix("$").replace("_", ""))
    except ValueError:
        dollars = math.nan
    if not 0 < dollars < math.inf:
        raise ConfigError(f"--budget: expected US dollars, such as 20 or 0.5, got {text!r}")
    return dollars


def template_of(text: str | None) -> str | None:
    """Return the template that `--template` gives: the text itself, or that of @FILE.

    Raises:
        ConfigError: the file cannot be read.
    """
    if text is None or not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"--template {text}: {error.strerror or error}; write --template @FILE") from error
    except UnicodeDecodeError:
        raise ConfigError(f"--template {text}: expected a file in UTF-8, got other bytes") from None


def check_files(prompts: str, out: Path, errors: Path | None) -> None:
    """Check that no file of a batch would take the place of another, and that there are folders for those that it writes.

    Raises:
        ConfigError: a file is given twice, or its folder does not exist.
    """
    if prompts != "-" and (Path(prompts).is_dir() or not Path(prompts).exists()):
        what = "a folder" if Path(prompts).is_dir() else "nothing there"
        raise ConfigError(f"{prompts}: expected a file of prompts, or - for standard input, got {what}")
    given: list[tuple[str, Path]] = [] if prompts == "-" else [("the input", Path(prompts))]
    for option, path in (("--out", out), ("--errors", errors)):
        if path is None:
            continue
        if path.is_dir():
            raise ConfigError(
                f"{option} {path}: expected a file, got a folder; write {option} {path / 'answers.jsonl'}"
            )
        if not path.parent.is_dir():
            raise ConfigError(f"{option} {path}: the folder {path.parent} does not exist; make it first")
        for what, other in given:
            if path.resolve() == other.resolve():
                raise ConfigError(f"{option} {path}: expected another file than {what}")
        given.append((option, path))
