"""Calls in threads of their own, which do not keep a program that is interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def side_by_side(call: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Call a function with each item, all at the same time, and yield the results in the order of the items.

    An exception of a call is raised in place of its result. The threads are daemons: unlike those of an executor, they do
    not hold up the end of the program.
    """
    results: list[Future[R]] = []
    for item in items:
        result: Future[R] = Future()
        Thread(target=_run, args=(call, item, result), daemon=True).start()
        results.append(result)
    return (result.result() for result in results)


def _run(call: Callable[[T], R], item: T, result: Future[R]) -> None:
    try:
        result.set_result(call(item))
    except BaseException as error:  # noqa: BLE001  # the one who waits gets it
        result.set_exception(error)
