"""What a batch has come to: the last lines, and the exit status."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

import attrs

from fluxibly._checks import secrets_in_query
from fluxibly._masking import MASK
from fluxibly.batch import Batch
from fluxibly.cli.batch.progress import total_of
from fluxibly.cli.batch.words import by_class, lasting, most_frequent, rows, spent
from fluxibly.cli.commands.app import FAILED, INTERRUPTED, MISUSED, OK

RESUMABLE = 75
"""`EX_TEMPFAIL` of sysexits.h: the same command goes on where this one stopped."""


@attrs.frozen
class Ending:
    """The end of a batch.

    Args:
        batch: the batch, which has run.
        arguments: what was typed after `fluxibly`.
        was_told: whether a signal asked it to stop.
        masked: returns a text without keys.
    """

    batch: Batch
    arguments: Sequence[str]
    was_told: bool
    masked: Callable[[str], str]

    @property
    def status(self) -> int:
        """The exit status."""
        report = self.batch.report
        if report.stopped is not None:
            return INTERRUPTED if self.was_told else MISUSED if report.is_stuck else RESUMABLE
        return FAILED if report.failed else OK

    def lines(self) -> list[str]:
        """Return the last lines: what the rows have come to, what it took, and the commands that go on."""
        report, batch = self.batch.report, self.batch
        done = report.answered + report.failed
        total, is_exact = total_of(batch.source, batch.reached, batch.limit)
        if total is None or total <= done:
            counted = f"{rows(done)} done"
        else:
            counted = f"{done:,} of {'' if is_exact else 'about '}{rows(total)} done"
        if report.failed:
            counted += f", {report.failed:,} failed"
        lines = [" · ".join([counted, *self._took()])]
        if report.errors:
            lines.append(f"{'errors of this run' if self._is_second else 'errors'}: {by_class(report.errors)}")
            lines += [f"  {kind}: {self.masked(report.first_errors[kind])}" for kind in most_frequent(report.errors)]
        if report.stopped is not None:
            # Who has stopped it knows that, but not what goes on at a provider.
            lines += [] if self.was_told and batch.executor == "online" else [f"stopped: {report.stopped}"]
            if not report.is_stuck:
                lines.append(f"go on: {self._command(self.arguments)}")
        elif batch.limit is not None and (total is None or batch.source.size is None or not self._is_read):
            lines.append(f"go on: {self._command(without(self.arguments, '--limit'))}")
        if report.unaskable:
            one = report.unaskable == 1
            lines.append(
                f"{rows(report.unaskable)} of the input cannot be asked; mend {'it' if one else 'them'}, then add --retry-errors"
            )
        if could := report.failed - report.unaskable:
            again = self._command(with_option(self.arguments, "--retry-errors"))
            lines.append(f"ask the {could:,} again: {again}")
        return lines

    @property
    def _is_second(self) -> bool:
        """Whether rows that are counted are those of an earlier run."""
        return self.batch.report.skipped > 0

    def _took(self) -> list[str]:
        """Return what this run took."""
        report = self.batch.report
        took = [*spent(report), lasting(report.elapsed)]
        if not self._is_second:
            return took
        has_done = report.errors or report.asked or report.skipped < report.answered + report.failed
        if report.stopped is None and not has_done:
            return ["nothing was left to ask"]
        return [f"this run: {report.asked:,} asked", *took]

    @property
    def _is_read(self) -> bool:
        """Whether the input was read to its end."""
        source = self.batch.source
        return source.size is not None and source.position >= source.size

    def _command(self, arguments: Sequence[str]) -> str:
        kept = [without_secrets(argument) for argument in arguments if argument != "--cancel"]
        return shlex.join(["fluxibly", *map(self.masked, kept)])


def without_secrets(argument: str) -> str:
    """Return an argument without the password and the keys that an address in it may have."""
    if "://" not in argument:
        return argument
    try:
        secrets = [urlsplit(argument).password or "", *secrets_in_query(argument)]
    except ValueError:  # it is no address
        return argument
    for secret in filter(None, secrets):
        argument = argument.replace(secret, MASK)
    return argument


def without(arguments: Sequence[str], option: str) -> list[str]:
    """Return arguments without an option and its value."""
    kept: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument == option:
            next(rest, None)
        elif not argument.startswith(f"{option}="):
            kept.append(argument)
    return kept


def with_option(arguments: Sequence[str], flag: str) -> list[str]:
    """Return arguments with a flag."""
    if flag in arguments:
        return list(arguments)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return [*arguments[:end], flag, *arguments[end:]]
