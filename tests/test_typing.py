"""A file as a user would write it passes mypy and pyright, both strict, and runs."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

FILE = Path(__file__).with_name("typing_examples.py")


def run(*command: str) -> None:
    done = subprocess.run(
        [sys.executable, *command, str(FILE)], capture_output=True, text=True, check=False, cwd=FILE.parent.parent
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_mypy_strict():
    """The file passes mypy: nothing in it is Any or untyped."""
    run("-m", "mypy", "--strict")


@pytest.mark.skipif(find_spec("pyright") is None, reason="pyright is not installed")
def test_pyright_strict():
    """The file passes pyright with the project's own settings, which are strict."""
    run("-m", "pyright", "--pythonpath", sys.executable)


def test_it_runs():
    """The file runs with warnings as errors."""
    run("-W", "error")
