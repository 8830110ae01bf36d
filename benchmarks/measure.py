"""Interleaved timing, and the table that shows the results."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter

ROUNDS = 15


def interleaved(
    contenders: Mapping[str, Callable[[], object]],
    *,
    per_run: int,
    rounds: int = ROUNDS,
    clock: Callable[[], float] = perf_counter,
) -> dict[str, float]:
    """Return the median microseconds per unit of work for each contender, which does `per_run` units when called.

    Contenders take turns in every round, so that a noisy machine disturbs all of them equally.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, run in contenders.items():
                start = clock()
                run()
                times[name].append((clock() - start) / per_run * 1e6)
    finally:
        gc.enable()
    return {name: statistics.median(values) for name, values in times.items()}


def table(title: str, results: Mapping[str, float], *, unit: str = "µs", goal: str = "") -> None:
    """Print each result with its difference from the first result, and its ratio to the first result."""
    base = next(iter(results.values()))
    print(f"\n{title}" + (f"   (goal: {goal})" if goal else ""))
    width = max(len(name) for name in results)
    print(f"  {'':{width}}  {unit:>10}  {'more':>10}  {'ratio':>7}")
    for name, value in results.items():
        print(f"  {name:{width}}  {value:10.3f}  {value - base:10.3f}  {value / base:7.2f}")


def left_out(names: Sequence[str]) -> None:
    """Report the peers that were not measured."""
    if names:
        print(f"\nLeft out, because not installed: {', '.join(names)}")
