"""The progress of a batch on standard error: drawn at a terminal, and a line now and then where there is none."""

from __future__ import annotations

import os
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fluxibly.batch import Batch
from fluxibly.cli.batch.progress import Figures, Progress
from fluxibly.cli.batch.words import by_class, lasting, spent
from fluxibly.cli.screen import Screen

REFRESHES = 4
"""How often a second the display is drawn."""
EVERY = 10.0
"""The seconds between the lines where there is no terminal."""
WIDEST = 80


class Display:
    """What a person sees of a batch while it runs.

    Args:
        batch: the batch, whose report changes.
        screen: where it is shown.
    """

    def __init__(self, batch: Batch, screen: Screen) -> None:
        self._batch = batch
        self._screen = screen
        self._progress = Progress(batch)
        self.is_stopping = False
        """Whether the batch only waits for what is in flight."""

    @contextmanager
    def shown(self) -> Generator[None]:
        """Show the progress meanwhile."""
        if self._screen.quiet:
            yield
        elif self._screen.draws_aside:
            live = Live(
                self, console=self._screen.err, refresh_per_second=REFRESHES, transient=True, redirect_stdout=False
            )
            live.start()
            try:
                yield
            finally:
                with suppress(OSError):  # the terminal may be gone; what the batch has come to does not depend on it
                    live.stop()
        else:
            ended = threading.Event()
            thread = threading.Thread(target=self._lines, args=(ended,), name="fluxibly-progress", daemon=True)
            thread.start()
            try:
                yield
            finally:
                ended.set()
                thread.join()

    def stop(self) -> None:
        """Say that the batch only waits for what is in flight. A signal handler calls it."""
        self.is_stopping = True
        if not self._screen.quiet and not self._screen.draws_aside:
            with suppress(OSError):  # nobody may be there any more
                os.write(2, f"{self._waiting()}\n".encode())  # a stream may be in the midst of a write of its own

    def _waiting(self) -> str:
        if self._batch.executor == "provider":
            return "stopping: what was submitted goes on at the service; Ctrl-C again ends now"
        in_flight = self._batch.report.in_flight
        waits = f": waiting for {in_flight:,} in flight" if in_flight else ""
        return f"stopping{waits}; Ctrl-C again ends now"

    def _lines(self, ended: threading.Event) -> None:
        while not ended.wait(EVERY):
            self._screen.aside(" · ".join(self._facts(self._progress.figures())))

    def _facts(self, figures: Figures) -> list[str]:
        """Return all that a line says."""
        report = self._batch.report
        facts = [figures.rows()]
        if report.failed:
            facts.append(f"{report.failed:,} failed")
        facts.append(f"{report.in_flight:,} in flight")
        facts.append(f"{figures.rate:,.3g}/s" if figures.rate < 100 else f"{figures.rate:,.0f}/s")
        if figures.seconds_left is not None:
            facts.append(f"{lasting(figures.seconds_left)} left")
        return [*facts, *spent(report), *self._limits(), *self._batches()]

    def _limits(self) -> list[str]:
        """Return the limits that were found and hold now."""
        report = self._batch.report
        found: list[str] = []
        if report.rate is not None:
            found.append(f"limit {60 * report.rate:,.0f} a minute")
        if report.places is not None:
            found.append(f"{report.places:,} at once")
        return found

    def _batches(self) -> list[str]:
        """Return what there is to say of batches at the provider."""
        report = self._batch.report
        states = [f"{count:,} {state.replace('_', ' ')}" for state, count in report.batches.items()]
        found = [f"batches: {', '.join(states)}"] if states else []
        return found if report.notice is None else [*found, report.notice]

    def _errors(self) -> str:
        """Return the errors of this run, which are not all that failed if there was an earlier one."""
        report = self._batch.report
        if not report.errors:
            return ""
        return f"{', in this run' if report.skipped else ''}: {by_class(report.errors)}"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        figures, report = self._progress.figures(), self._batch.report
        width = min(options.max_width, WIDEST)
        left = "" if figures.seconds_left is None else f"{lasting(figures.seconds_left)} left"
        share = "" if figures.share is None else f"{100 * figures.share:.0f} %"
        bar = Table.grid(expand=False, padding=(0, 1, 0, 0))
        for _ in range(3):
            bar.add_column(no_wrap=True)
        text = Text.assemble(share, (f"  {left}" if left else "", "dim"))
        total, done = (1.0, 0.0) if figures.share is None else (1.0, figures.share)
        name = self._batch.output.path.name
        name = name if len(name) <= width // 3 else f"…{name[1 - width // 3 :]}"
        room = max(width - len(name) - text.cell_len - 3, 5)
        bar.add_row(Text(name, "bold"), ProgressBar(total=total, completed=done, width=room), text)
        yield bar
        rate = f"{figures.rate:,.3g}" if figures.rate < 100 else f"{figures.rate:,.0f}"
        lines = [
            [figures.rows(), f"{report.in_flight:,} in flight", f"{rate}/s, {60 * figures.rate:,.0f} a minute"],
            [*spent(report), *self._limits()],
            self._batches(),
        ]
        for facts in lines:
            if facts:
                yield _line(" · ".join(facts), width)
        if report.failed:
            yield _line(f"{report.failed:,} failed{self._errors()}", width, "red")
        if self.is_stopping:
            yield _line(self._waiting(), width, "yellow")


def _line(text: str, width: int, style: str = "") -> Text:
    line = Text(text, style, no_wrap=True, end="\n")
    line.truncate(width, overflow="ellipsis")
    return line
