"""What a check found, and how findings are laid out for a person."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

import attrs
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from fluxibly.cli.screen import Screen

Standing = Literal["ready", "wrong", "away", "unset"]
"""Whether something works, is half set up or broken, is a server that does not run here, or was never set up."""
_MARKS = {"ready": ("✓", "green"), "wrong": ("✗", "red")}


@attrs.frozen
class Finding:
    """The result of a check. `bad` marks a failure; `to_do` is the step that fixes it or completes the setup."""

    kind: str
    name: str
    state: str
    to_do: str = ""
    bad: bool = False
    standing: Standing = "ready"

    @property
    def row(self) -> tuple[str, str, str, str]:
        """The finding as a script reads it."""
        return self.kind, self.name, self.state, self.to_do


def show_section(screen: Screen, title: str, findings: Sequence[Finding], *, hint: str = "") -> None:
    """Print findings, the ready ones first. Those that nobody has set up share a line, with a hint of what they need."""
    if not findings:
        return
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for standing, (mark, style) in _MARKS.items():
        for each in findings:
            if each.standing == standing:
                text = Text(each.state)
                if each.to_do and standing == "ready":
                    text.append(f"; {each.to_do}", "dim")
                table.add_row(Text(mark, style), Text(each.name, "bold"), text)
    for standing, says in (("away", "not running"), ("unset", "not set up")):
        names = [each.name for each in findings if each.standing == standing]
        if names:
            table.add_row("", Text(says, "dim"), Text(", ".join(names), "dim"))
    screen.show(Text(title, "bold"))
    if hint and any(each.standing == "unset" for each in findings):
        table.add_row("", "", Text(hint, "dim italic"))
    screen.show(Padding(table, (0, 0, 1, 1)))


def show_words(screen: Screen, title: str, lines: Iterable[tuple[str, Iterable[str]]]) -> None:
    """Print lines of words, each with a label."""
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for label, words in lines:
        text = ", ".join(words)
        if text:
            table.add_row(Text(label, "dim"), Text(text, "dim"))
    screen.show(Text(title, "bold"))
    screen.show(Padding(table, (0, 0, 1, 3)))


def show_to_do(screen: Screen, findings: Iterable[Finding]) -> None:
    """Print a numbered list of what would fix the findings that are wrong."""
    steps = [each for each in findings if each.standing == "wrong" and each.to_do]
    if not steps:
        screen.show(Text("Nothing to do", "bold green"))
        return
    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for number, each in enumerate(steps, 1):
        table.add_row(f"{number}.", Text(each.name, "bold").append(f": {each.to_do}", "not bold"))
    screen.show(Text(f"{len(steps)} thing{'s' if len(steps) > 1 else ''} to do", "bold yellow"))
    screen.show(Padding(table, (0, 0, 0, 1)))
