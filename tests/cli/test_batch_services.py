"""The command `batch` with the provider's own batches."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.batch_services import BatchService, batch_service
from support.command_line import CommandLine, command_line

pytest.importorskip("typer")

COMMAND = ("batch", "in.jsonl", "--out", "out.jsonl", "--executor", "provider")


@pytest.fixture(params=["openai", "anthropic"])
def service(request: pytest.FixtureRequest) -> Iterator[BatchService]:
    with batch_service(request.param, looks=0) as found:
        yield found


@pytest.fixture
def fluxibly(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, service: BatchService
) -> Iterator[CommandLine]:
    """A command line in a folder of its own, with three prompts and the service."""
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").write_text("".join(json.dumps({"prompt": f"prompt {n}"}) + "\n" for n in range(3)))
    with command_line(tmp_path, capfd, monkeypatch) as found:
        name = service.kind.upper()
        found.set(**{f"{name}_API_KEY": "k", f"{name}_BASE_URL": f"{service.url}/v1"})
        yield found


def rows_of() -> list[dict[str, Any]]:
    return sorted(map(json.loads, Path("out.jsonl").read_text().splitlines()), key=lambda line: line["row"])


def test_rows_are_answered(fluxibly, service):
    ran = fluxibly(*COMMAND, "-m", f"{service.kind}:m")
    assert (ran.status, ran.lines[0].split(" · ")[0]) == (0, "3 rows done")
    assert [row["text"] for row in rows_of()] == ["re: prompt 0", "re: prompt 1", "re: prompt 2"]
    assert len(service.batches) == 1
    assert fluxibly(*COMMAND, "-m", f"{service.kind}:m").status == 0
    assert len(service.batches) == 1


def test_then_online(fluxibly, service):
    service.outcome = lambda prompt: "expired" if prompt == "prompt 1" else "answered"
    assert fluxibly(*COMMAND, "--then", "online", "-m", f"{service.kind}:m").status == 0
    assert [row["text"] for row in rows_of()] == ["re: prompt 0", "re: prompt 1", "re: prompt 2"]
    assert service.online == Counter({"prompt 1": 1})


def test_a_refusal_is_told_with_the_command_that_goes_on(fluxibly, service):
    service.refuse = lambda _: (400, {"error": {"type": "invalid_request_error", "message": "no batches for you"}})
    ran = fluxibly(*COMMAND, "-m", f"{service.kind}:m")
    assert ran.status == 75
    (stopped,) = [line for line in ran.lines if line.startswith("stopped: ")]
    assert "no batches for you" in stopped
    assert f"go on: fluxibly {' '.join(COMMAND)} -m {service.kind}:m" in ran.lines


def test_ctrl_c_leaves_the_batches_running_and_cancel_ends_them(fluxibly, service):
    service.looks = 10**9

    def interrupt() -> None:
        for _ in range(3000):
            if service.batches and any(batch.looks for batch in service.batches.values()):
                break
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    ran = fluxibly(*COMMAND, "-m", f"{service.kind}:m")
    thread.join()
    assert ran.status == 130
    assert "1 batch goes on at the service (3 rows)" in ran.out
    assert rows_of() == []
    ran = fluxibly("batch", "in.jsonl", "--out", "out.jsonl", "-m", f"{service.kind}:m")
    assert ran.status == 2
    assert "1 batch with 3 rows is at the service" in ran.err
    ran = fluxibly(*COMMAND, "--dry-run", "-m", f"{service.kind}:m")
    assert ran.lines[0] == "rows     0 to ask, 3 at the service"
    assert "time     within a day, as the provider says" in ran.lines
    ran = fluxibly(*COMMAND, "--cancel", "-m", f"{service.kind}:m")
    assert (ran.status, service.batches[next(iter(service.batches))].cancelled) == (75, True)
    assert "stopped: cancelled" in ran.lines
    assert f"go on: fluxibly {' '.join(COMMAND)} -m {service.kind}:m" in ran.lines
    service.looks = 0
    assert fluxibly(*COMMAND, "-m", f"{service.kind}:m").status == 0
    assert service.paid == Counter(f"prompt {n}" for n in range(3))


@pytest.mark.parametrize("options", [("--cancel",), ("--then", "online")])
def test_options_of_the_providers_batches_need_them(fluxibly, service, options):
    ran = fluxibly("batch", "in.jsonl", "--out", "out.jsonl", *options, "-m", f"{service.kind}:m")
    assert ran.status == 2
    assert "--executor provider" in ran.err


@pytest.mark.parametrize("options", [("--dedupe",), ("--budget", "5")])
def test_options_that_they_do_not_have(fluxibly, service, options):
    ran = fluxibly(*COMMAND, *options, "-m", f"{service.kind}:m")
    assert ran.status == 2
    assert service.paths == []
