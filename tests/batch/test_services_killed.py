"""Programs that are killed while their rows are answered by the provider's batches: nothing is lost, and nothing paid twice."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.batch_services import BatchService, batch_service

PROGRAM = """
import sys
from fluxibly import LLM
from fluxibly.batch import Batch, ProviderBatches
kind, url, folder = sys.argv[1:]
llm = LLM(framework=kind, model="m", api_key="k", api_base=url + "/v1")
settings = ProviderBatches(poll_every=0.15, max_rows=4)
report = Batch(llm, folder + "/in.jsonl", folder + "/out.jsonl", executor=settings).run()
sys.exit(report.stopped)
"""
ROWS = 10
EACH_ONCE = Counter(f"prompt {n}" for n in range(ROWS))


@pytest.fixture(params=["openai", "anthropic"])
def service(request: pytest.FixtureRequest) -> Iterator[BatchService]:
    with batch_service(request.param) as found:
        yield found


def started(service: BatchService, folder: Path) -> subprocess.Popen[bytes]:
    path = folder / "in.jsonl"
    if not path.exists():
        path.write_text("".join(json.dumps({"prompt": f"prompt {n}"}) + "\n" for n in range(ROWS)))
    return subprocess.Popen([sys.executable, "-c", PROGRAM, service.kind, service.url, str(folder)])


def finish(service: BatchService, folder: Path) -> None:
    assert started(service, folder).wait(60) == 0
    rows = [json.loads(line)["row"] for line in (folder / "out.jsonl").read_bytes().splitlines()]
    assert sorted(rows) == list(range(ROWS))
    assert service.paid == EACH_ONCE


@pytest.mark.parametrize(
    ("step", "cut"),
    [
        ("upload", ""),
        ("submit before", ""),
        ("submit before", "before"),
        ("submit after", ""),
        ("status", ""),
        ("results", ""),
    ],
    ids=["uploading", "submitting, it acts", "submitting, it does not act", "submitted", "waiting", "writing results"],
)
def test_killed_at_each_step(service, tmp_path, step, cut):
    if step == "upload" and service.kind == "anthropic":
        pytest.skip("Anthropic's batches have no upload of their own")
    service.hold_at(step)
    program = started(service, tmp_path)
    assert service.reached.wait(60)
    program.kill()
    program.wait()
    service.cut = [cut] if cut else []
    service.release()
    finish(service, tmp_path)
    assert service.rows_submitted == EACH_ONCE


def test_killed_at_random_moments(service, tmp_path):
    chance = random.Random()  # noqa: S311  # each run tries others
    service.looks = 3
    for _ in range(4):
        program = started(service, tmp_path)
        try:
            assert program.wait(0.4 + 0.5 * chance.random()) == 0
        except subprocess.TimeoutExpired:
            program.kill()
            program.wait()
    finish(service, tmp_path)
    assert service.rows_submitted == EACH_ONCE
