"""A thread whose caller can stop waiting for it."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from contextvars import copy_context
from typing import Protocol, TypeAlias, TypeVar, cast
from weakref import WeakSet

T = TypeVar("T")
_Answers: TypeAlias = queue.SimpleQueue[tuple[object, BaseException | None] | None]
"""Where a call leaves its result or its error. None: `abort` was called."""


class _Locked(Protocol):
    def renew_lock(self) -> None: ...


_locked: WeakSet[_Locked] = WeakSet()


def renew_lock_after_fork(owner: _Locked) -> None:
    """Have an object get a new lock in each process that is forked from this one.

    Another thread may hold the lock at that moment, and would never release it in the new process, where it does not exist.
    """
    _locked.add(owner)


def _renew_locks() -> None:
    for owner in [*_locked]:
        owner.renew_lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)


class NotInTime(Exception):
    """A call took longer than its caller waits. It never leaves fluxibly."""


class Worker:
    """A thread that makes one call at a time, in a copy of the context. Its owner can stop waiting for a call."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], object], _Answers] | None] = queue.SimpleQueue()
        # Each call has answers of its own, so that no later call gets an abort, or the answer of a call given up before.
        self._answers: _Answers = queue.SimpleQueue()
        self._aborted = False
        self.busy = False
        """Whether a call is running."""
        context = copy_context()
        threading.Thread(target=context.run, args=(self._serve,), name="fluxibly-worker", daemon=True).start()

    def _serve(self) -> None:
        while (item := self._calls.get()) is not None:
            call, answers = item
            try:
                answer: tuple[object, BaseException | None] = (call(), None)
            except BaseException as error:  # noqa: BLE001  # it is raised where the answer is awaited
                answer = (None, error)
            self.busy = False
            answers.put(answer)
            del item, call, answers, answer

    def run(self, call: Callable[[], T], seconds: float | None) -> T:
        """Return the result of a call.

        Raises:
            NotInTime: it took longer than `seconds`. It runs on, and `stop` makes its last call after it.
            InterruptedError: `abort` was called.
        """
        answers: _Answers = queue.SimpleQueue()
        # The answers are set before the flag is read, and `abort` does the reverse, so at least one sees the other.
        self._answers = answers
        if self._aborted:
            answers.put(None)
        else:
            self.busy = True
            self._calls.put((call, answers))
        return cast("T", _awaited(answers, seconds))

    def abort(self) -> None:
        """End a `run` in another thread, and all later runs."""
        self._aborted = True
        self._answers.put(None)

    def stop(self, last: Callable[[], object]) -> None:
        """Make a last call after the current call has returned, and end the thread. Wait only if no call is running."""
        wait = not self.busy
        answers: _Answers = queue.SimpleQueue()
        self._calls.put((last, answers))
        self._calls.put(None)
        if wait:
            _awaited(answers, None)


def _awaited(answers: _Answers, seconds: float | None) -> object:
    """Wait for the answer of a call, and return its result or raise its error."""
    try:
        answer = answers.get(timeout=None if seconds is None else min(max(seconds, 0.0), threading.TIMEOUT_MAX))
    except queue.Empty:
        raise NotInTime from None
    if answer is None:
        raise InterruptedError("the stream was closed while it was being read")
    value, error = answer
    if error is None:
        return value
    try:
        raise error
    finally:
        del error, answer  # they refer to this frame
