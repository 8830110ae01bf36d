"""What a batch would take, in lines."""

from __future__ import annotations

from collections.abc import Iterator

from rich.live import Live
from rich.text import Text

from fluxibly._extras import pip_install, version_of
from fluxibly.batch import Batch, Estimate
from fluxibly.cli.batch.words import lasting, rows, short
from fluxibly.cli.screen import Screen, line_of
from fluxibly.cli.trace.facts import money


def estimated(screen: Screen, batch: Batch) -> Estimate:
    """Return what a batch would take. Meanwhile, a person sees how much of the input is read."""
    if screen.quiet or not screen.draws_aside:
        return batch.estimate()
    with Live(console=screen.err, transient=True, get_renderable=lambda: Text(_reading(batch)), redirect_stdout=False):
        return batch.estimate()


def _reading(batch: Batch) -> str:
    size, position = batch.source.size, batch.source.position
    return f"reading: {100 * position // size} %" if size else f"reading: {_size(position)}"


def show_estimate(screen: Screen, batch: Batch, found: Estimate) -> None:
    """Print what a batch would take."""
    for name, value in _lines(batch, found):
        screen.line(f"{name:<9}{value}")
    screen.line("nothing was sent; leave out --dry-run to run it")


def _lines(batch: Batch, found: Estimate) -> Iterator[tuple[str, str]]:
    done = f", {found.skipped:,} done already" if found.skipped else ""
    repeats = f", {found.repeats:,} get the answer of another" if found.repeats else ""
    submitted = f", {found.submitted:,} at the service" if found.submitted else ""
    yield "rows", f"{found.rows:,} to ask{repeats}{submitted}{done}"
    if found.changed and batch.changed is None:
        yield (
            "changed",
            f"{rows(found.changed)} of these would be asked differently now; add --changed keep or --changed ask",
        )
    for problem in found.problems:
        where = ", ".join(problem.first) + (", …" if problem.rows > len(problem.first) else "")
        text = line_of(ValueError(problem.message))
        yield "problem", f"{rows(problem.rows)}: {text} ({where})"
    media = f"; without the media of {rows(found.media)}" if found.media else ""
    yield "input", f"{short(found.input_tokens)} tokens (a guess: 3.5 bytes a token{media})"
    yield "output", f"{short(found.output_tokens)} tokens{f' ({found.output_from})' if found.output_from else ''}"
    yield "cost", _cost(batch, found)
    yield "time", _time(batch, found)
    yield "file", f"about {_size(found.bytes)}"


def _cost(batch: Batch, found: Estimate) -> str:
    half = ", at half the price, as batches of providers are" if batch.executor == "provider" else ""
    if found.cost is not None:
        return f"{money(found.cost)}{half}"
    if not found.rows:
        return "nothing"
    names = ", ".join(found.unpriced[:3]) + (", …" if len(found.unpriced) > 3 else "")
    how = "" if version_of("genai-prices") is not None else f"; {pip_install('prices')} knows many"
    return f"not known, as is the price of {names}{how}"


def _time(batch: Batch, found: Estimate) -> str:
    if batch.executor == "provider":
        return "within a day, as the provider says"
    if found.seconds is None:
        return "not known: no rate is given, such as --rpm 3000 or --tpm 1M, so it is found on the way"
    return f"{lasting(found.seconds)} at the least, at the rate that is given"


def _size(count: int) -> str:
    """Return a size in bytes."""
    return f"{short(count)}B" if count >= 1000 else f"{count} B"
