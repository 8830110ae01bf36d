"""The optional packages: the table in the code agrees with the project's declaration."""

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


def test_the_table_agrees_with_the_project():
    """Each extra in the table has the packages that `pyproject.toml` declares, apart from other extras that it includes."""
    declared = {
        name: {re.split("[<>=]", package)[0] for package in packages if not package.startswith("fluxibly[")}
        for name, packages in PROJECT["optional-dependencies"].items()
        if name != "dev"
    }
    assert {name: set(packages) for name, packages in EXTRAS.items()} == declared


def test_the_install_command_names_only_missing_packages(monkeypatch):
    """All missing packages are in one command, quoted for a shell."""
    there = {*EXTRAS["cli"]} - {"typer"}

    def version(name: str) -> str:
        if name in there:
            return "1.0"
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert version_of("rich") == "1.0"
    assert pip_install("cli", "local") == "pip install typer xllamacpp"
    assert pip_install("litellm") == "pip install 'litellm[mcp]'"
    there |= {"typer"}
    assert pip_install("cli").startswith("pip install rich typer "), "if all are installed, one is broken: name all"


def test_the_version_is_written_once():
    """The package has the version, and its metadata take the version from the package."""
    assert fluxibly.__version__ == importlib.metadata.version("fluxibly")
    assert fluxibly.__version__.startswith("2.")


@pytest.mark.parametrize("folder", ["fluxibly", "README.md", "CHANGELOG.md", "ARCHITECTURE.md", "docs", "examples"])
def test_no_text_advises_to_install_another_projects_distribution(folder):
    """On the public index, `fluxibly` is another project: `pip install fluxibly` would overwrite this project with it."""
    path = ROOT / folder
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.suffix in {".py", ".md", ".css"}]
    for file in files:
        assert not re.search(r"pip install (-\S+ )*['\"]?fluxibly", file.read_text(encoding="utf-8")), file
