"""A batch that signals stop: Ctrl-C, the end that a supervisor asks for, and a closed terminal."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from fluxibly.batch import Batch
from fluxibly.cli.batch.display import Display

_HANGUP: signal.Signals | None = getattr(signal, "SIGHUP", None)
_SIGNALS = (signal.SIGINT, signal.SIGTERM, *(() if _HANGUP is None else (_HANGUP,)))
_OUTPUTS = (1, 2)


def run(batch: Batch, display: Display, *, cancels: bool = False) -> bool:
    """Run a batch to its end, or cancel it at the provider, and show its progress. Return whether a signal asked it to stop.

    The first signal lets what is in flight end, the second cancels it, and a third one, if that should hang, raises.

    Raises:
        KeyboardInterrupt: the third signal.
    """

    def stop() -> None:
        display.stop()
        batch.stop()

    with _stopped_by_signals(stop) as received, display.shown():
        if cancels:
            batch.cancel()
        else:
            batch.run()
    return bool(received)


@contextmanager
def _stopped_by_signals(stop: Callable[[], object]) -> Generator[list[int]]:
    """Call `stop` at each signal meanwhile. The value is the signals that came. What the parent has ignored stays ignored."""
    received: list[int] = []
    terminals = [descriptor for descriptor in _OUTPUTS if os.isatty(descriptor)]

    def handle(number: int, _: FrameType | None) -> None:
        if number == _HANGUP:
            _leave(terminals)
            if number in received:
                return  # a terminal that is closed may send it, and the shell in it again
        received.append(number)
        if len(received) > 2:
            raise KeyboardInterrupt
        stop()

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, handle)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(terminals: Sequence[int]) -> None:
    """Write to nowhere what goes to a terminal that is closed, since each write to it would fail."""
    for descriptor in terminals:
        if not os.isatty(descriptor):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
