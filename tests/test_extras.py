"""The optional packages: what the table says is what the project declares."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest

import fluxibly
from fluxibly._extras import EXTRAS, pip_install, version_of

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_table_is_that_of_the_project():
    """An extra here has the packages that it has there, whatever other extras it brings along."""
    declared = {
        name: {re.split("[<>=]", package)[0] for package in packages if not package.startswith("fluxibly[")}
        for name, packages in PROJECT["optional-dependencies"].items()
        if name != "dev"
    }
    assert {name: set(packages) for name, packages in EXTRAS.items()} == declared


def test_only_what_is_missing_is_to_be_installed(monkeypatch):
    """All of it in one command, quoted for a shell."""
    there = {"rich"}

    def version(name: str) -> str:
        if name in there:
            return "1.0"
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert version_of("rich") == "1.0"
    assert pip_install("cli", "local") == "pip install typer xllamacpp"
    assert pip_install("litellm") == "pip install 'litellm[mcp]'"
    there |= {"typer"}
    assert pip_install("cli") == "pip install rich typer", "all are there, so one of them is broken"


def test_the_version_is_said_once():
    """The package says it, and its metadata take it from there."""
    assert fluxibly.__version__ == importlib.metadata.version("fluxibly")
    assert fluxibly.__version__.startswith("2.")


@pytest.mark.parametrize("folder", ["fluxibly", "README.md", "CHANGELOG.md", "ARCHITECTURE.md", "docs", "examples"])
def test_nobody_is_told_to_install_another_projects_distribution(folder):
    """On the public index `fluxibly` is another project: `pip install fluxibly` would put that over this."""
    path = ROOT / folder
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.suffix in {".py", ".md", ".css"}]
    for file in files:
        assert not re.search(r"pip install (-\S+ )*['\"]?fluxibly", file.read_text(encoding="utf-8")), file
