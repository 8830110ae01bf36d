"""The code blocks of the README and of the pages in `docs/`."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))


def blocks_of(page):
    """Return the code blocks of a page, as pairs of language and code."""
    return re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


BLOCKS = blocks_of(README)


def blocks(language, page=README):
    return [code for kind, code in blocks_of(page) if kind == language]
