"""Every code block of the README and of the pages in `docs/` runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from support.readme import BLOCKS, PAGES, README, ROOT, blocks, blocks_of

from fluxibly import LLM


def test_every_block_has_a_language_that_is_run():
    """Every other block needs a backend of some 850 MB, and a marked test of its own runs it."""
    others = [code for kind, code in BLOCKS if kind not in {"python", "yaml", "sh"}]
    assert all("phoenix" in code or "mlflow" in code for code in others)


def test_the_python_blocks_run_in_order(tmp_path):
    """The blocks run as pasted into one session; in a process of its own, because they set up telemetry."""
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks("python")), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error", script.name],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "answered" in done.stdout
    assert (tmp_path / "trace.jsonl").read_text(encoding="utf-8").startswith('{"resourceSpans"')


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_pages_run(page, tmp_path):
    """The Python blocks of a page run as pasted into one session, and its YAML blocks configure a model."""
    assert {kind for kind, _ in blocks_of(page)} <= {"python", "yaml", "text"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join(blocks("python", page))],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for code in blocks("yaml", page):
        file = tmp_path / "framework.yaml"
        file.write_text(code, encoding="utf-8")
        LLM.from_yaml(file).close()


@pytest.mark.parametrize("code", blocks("yaml"))
def test_the_yaml_blocks_configure_a_model(code, tmp_path, monkeypatch):
    """Each YAML block is a complete configuration file."""
    monkeypatch.setenv("OPENAI_API_KEY", "test-key")
    file = tmp_path / "framework.yaml"
    file.write_text(code, encoding="utf-8")
    with LLM.from_yaml(file) as llm:
        assert llm.config.framework == "openai"
        assert len(llm.pipeline.middleware) == 5


def commands():
    return [line for code in blocks("sh") for line in code.splitlines() if line]


@pytest.mark.model
@pytest.mark.parametrize("line", [line for line in commands() if "fluxibly " in line])
def test_the_commands_run(line, gguf, tmp_path):
    """Each `fluxibly` command, without its install step, exits with 0 and prints something."""
    command = line.removeprefix("pip install '.[local]' && ")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", "-c", command],  # noqa: S607  # as a reader of the README types it
        capture_output=True,
        text=True,
        timeout=110,
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_install_commands_name_extras_that_exist():
    """The README, which is for a checkout, names extras; the code's own advice names packages."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    text = README.read_text(encoding="utf-8")
    named = set(re.findall(r"pip install (?:-e )?'\.\[([a-z,]+)\]'", text))
    assert {extra for group in named for extra in group.split(",")} <= set(extras)
    assert "local" in named
