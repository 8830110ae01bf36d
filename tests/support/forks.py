"""A process that runs batches in children of its own, one after another, so that tests can kill them.

It has imported everything, so a child is at work after a few milliseconds. `python -m support.forks`: for each line on standard input,
the settings of a batch as JSON, it prints the child's number, and when the child has ended, how.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Forks:
    """The parent of the children, as a test holds it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def begin(self, **settings: Any) -> int:
        """Begin a batch, and return the number of its process."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(settings) + "\n")
        self._process.stdin.flush()
        return int(self._line())

    def end(self) -> dict[str, Any] | None:
        """Wait until the child has ended, and return its report; None: it was killed."""
        found: dict[str, Any] | None = json.loads(self._line())
        return found

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


@contextmanager
def forks() -> Iterator[Forks]:
    """Run the parent."""
    with subprocess.Popen(
        [sys.executable, "-m", "support.forks"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()  # it is ready
        yield Forks(process)


def _run(settings: dict[str, Any]) -> dict[str, Any]:
    from fluxibly import AsyncLLM
    from fluxibly.batch import Batch

    prompts, answers, url = (settings.pop(name) for name in ("prompts", "answers", "url"))
    report = Batch(AsyncLLM("openai:m", api_base=url, api_key="k"), prompts, answers, **settings).run()
    return {"answered": report.answered, "failed": report.failed, "asked": report.asked, "stopped": report.stopped}


def _main() -> None:
    import asyncio  # noqa: F401  # all that a batch imports late
    import logging

    import anyio._backends._asyncio  # noqa: F401

    import fluxibly.batch._runner
    import fluxibly.providers.openai  # noqa: F401

    logging.disable(logging.WARNING)
    _say("ready")
    for line in sys.stdin:
        reads, writes = os.pipe()
        child = os.fork()
        if not child:
            code = 1
            try:
                os.write(writes, json.dumps(_run(json.loads(line))).encode())
                code = 0
            except BaseException:  # noqa: BLE001  # the test sees no report
                traceback.print_exc()
            os._exit(code)
        os.close(writes)
        _say(str(child))
        os.waitpid(child, 0)
        with open(reads, "rb") as pipe:  # noqa: PTH123  # a Path cannot open a descriptor
            _say((pipe.read() or b"null").decode())


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    _main()
