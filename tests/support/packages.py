"""Packages with entry points, as an installer leaves them in a folder of the path."""

from __future__ import annotations

from pathlib import Path

FRAMEWORK, MIDDLEWARE = "fluxibly.frameworks", "fluxibly.middleware"


def install(
    folder: Path, name: str, points: str, *, group: str = FRAMEWORK, code: str = "", metadata: str | None = None
) -> None:
    """Install version 1.0 of a package with one module, which has the package's name and holds `code`."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    text = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n" if metadata is None else metadata
    (info / "METADATA").write_text(text)
    (info / "entry_points.txt").write_text(f"[{group}]\n{points}\n")
    (folder / f"{name}.py").write_text(code)
