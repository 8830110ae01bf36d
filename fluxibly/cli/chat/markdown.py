"""Markdown that is printed block by block, while it comes.

A block is finished when the next one begins. What is finished is printed once and stays; the rest may still change its look.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import attrs
from markdown_it import MarkdownIt
from rich.markdown import Heading, Markdown
from rich.syntax import Syntax
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from markdown_it.token import Token
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
"""What colours a terminal, and takes no place on it."""
CODE_THEME = "ansi_dark"
"""A theme of the terminal's own sixteen colours, and its own background: it can be read on dark and light ones."""

# Tags are shown as they are. A browser would hide them, but here they may be what somebody has asked for.
_parser = MarkdownIt("commonmark", {"html": False}).enable("strikethrough").enable("table")
LONG = 20_000
"""The most characters that are laid out again and again. No terminal shows as many at once."""
_UNDECIDED = re.compile(r"(?:^|\n)[ \t]*(?:[-=*_#>+~`|:]{1,3}|\d{1,9}[.)]?)[ \t]*\Z")
"""The beginning of a last line that may become a list, a heading, a table or a fence: shown, it would flicker."""
_PADDING = re.compile(r"(?:\x1b\[[0-9;]*m| )+\Z")
"""The spaces at the end of a line, with the colours between them: copied text should not have them."""
_LISTS = ("bullet_list_open", "ordered_list_open")


class _Heading(Heading):
    """A heading that begins where all lines begin."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.text


class _Markdown(Markdown):
    """Rich's Markdown, with line breaks where the model has them, and without hidden links or tags."""

    elements = {**Markdown.elements, "heading_open": _Heading}  # noqa: RUF012  # as in the base class

    def __init__(self, markup: str) -> None:
        super().__init__("", code_theme=CODE_THEME, hyperlinks=False)
        self.parsed = _parser.parse(markup)
        for token in self.parsed:
            for child in token.children or ():
                if child.type == "softbreak":
                    child.type = "hardbreak"


@attrs.frozen
class _Block:
    """A block at the top level of a text, or an item of a list there: its lines, and what it is."""

    start: int
    end: int
    token: Token
    in_list: bool = False


def _blocks(text: str) -> list[_Block]:
    """Return the blocks of a text. Items of a list at the top level are blocks of their own."""
    found: list[_Block] = []
    within = 0
    for token in _parser.parse(text):
        if token.map is not None and token.nesting >= 0:
            if token.level == 0 and token.type not in _LISTS:
                found.append(_Block(token.map[0], token.map[1], token))
            elif token.level == 1 and token.type == "list_item_open":
                found.append(_Block(token.map[0], token.map[1], token, in_list=within > 0))
                within += 1
        if token.level == 0 and token.type in _LISTS:
            within = 0
    return found


class MarkdownStream:
    """A Markdown text that comes in pieces. `take` returns what can be printed for good, `rest` what still changes."""

    def __init__(self) -> None:
        self._text = ""
        """What has not been printed."""
        self._pieces: list[str] = []
        """What has come since."""
        self._printed = False
        """Whether anything has been printed, so that an empty line has to stand before the next block."""
        self._in_list = False
        """Whether the text goes on within a list."""
        self._code_lines = 0
        """The lines of the code block at the beginning of the text that have been printed."""

    def feed(self, text: str) -> None:
        """Add a piece of text."""
        self._pieces.append(text)

    def take(self, console: Console, *, final: bool = False) -> list[str]:
        """Return the lines that will not change any more, and forget them. `final`: the text is complete."""
        self._text += "".join(self._pieces)
        self._pieces.clear()
        blocks = self._parsed(self._text)
        done = blocks if final else blocks[:-1]
        lines = self._text.split("\n")
        out: list[str] = []
        for block in done:
            out += self._before(block)
            out += self._rendered(console, block, lines)[self._code_lines :]
            self._printed, self._code_lines = True, 0
        if final:
            self._text = ""
            return out
        if blocks:
            last = blocks[-1]
            self._text = "\n".join(lines[last.start :])
            if done:
                self._in_list = last.in_list
            if last.token.type == "fence":
                out += self._code_so_far(console, last)
        return out

    def rest(self, console: Console) -> list[str]:
        """Return the lines of what is left, as they look now; of a very long text, the last ones."""
        text = self._text if len(self._text) < LONG or self._code_lines else self._text[-LONG:].partition(" ")[2]
        undecided = _UNDECIDED.search(text)
        if undecided is not None and not self._code_lines:
            text = text[: undecided.start()]
        lines = text.split("\n")
        out: list[str] = []
        for block in self._parsed(text)[:1]:
            rendered = self._rendered(console, block, lines)[self._code_lines :]
            out += rendered if self._code_lines else [*self._before(block), *rendered]
        return out

    def _parsed(self, text: str) -> list[_Block]:
        blocks = _blocks(text)
        if blocks:
            # Whether the first one stands in a list is not to be seen in what is left of the text.
            blocks[0] = attrs.evolve(blocks[0], in_list=self._in_list and blocks[0].token.type == "list_item_open")
        return blocks

    def _before(self, block: _Block) -> list[str]:
        """Return the empty line that stands before a block, if it needs one."""
        if not self._printed or self._code_lines:
            return []
        return [] if block.in_list else [""]

    def _code_so_far(self, console: Console, block: _Block) -> list[str]:
        """Return the new whole lines of a code block that goes on. A finished line of code does not change any more."""
        whole = block.token.content.rpartition("\n")[0]  # without the line that still comes
        if not whole.strip():
            return []
        rendered = _lines_of(console, _code(block.token, whole))
        new = rendered[self._code_lines :]
        before = self._before(block) if not self._code_lines else []
        self._code_lines = len(rendered)
        return [*before, *new]

    def _rendered(self, console: Console, block: _Block, lines: Sequence[str]) -> list[str]:
        if block.token.type == "fence":
            return _lines_of(console, _code(block.token, block.token.content.rstrip("\n")))
        source = "\n".join(lines[block.start : block.end])
        try:
            return _lines_of(console, _Markdown(source))
        except Exception:  # noqa: BLE001  # whatever the libraries cannot lay out is shown as it came
            return _lines_of(console, Text(source))


def _code(token: Token, code: str) -> RenderableType:
    language = token.info.partition(" ")[0].lower()
    return Syntax(code, language or "text", theme=CODE_THEME, background_color="default", word_wrap=True)


def _lines_of(console: Console, what: RenderableType) -> list[str]:
    """Return the lines of something as they are written to the terminal."""
    with console.capture() as captured:
        console.print(what)
    lines = [_PADDING.sub(lambda end: end[0].replace(" ", ""), line) for line in captured.get().split("\n")]
    full = [number for number, line in enumerate(lines) if CODES.sub("", line).strip()]
    return lines[full[0] : full[-1] + 1] if full else []
