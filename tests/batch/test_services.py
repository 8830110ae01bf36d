"""Rows that are answered by the provider's own batches, against servers that have the services' APIs."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from support.batch_services import BatchService, batch_service, prompt_of

from fluxibly import LLM, AsyncLLM, LLMConfig
from fluxibly.batch import Batch, ProviderBatches
from fluxibly.batch._input import open_input
from fluxibly.errors import ConfigError
from fluxibly.llm import default_stack
from fluxibly.middleware import Cost, Defaults, ExtractReasoning, RateLimit, Validation

BAD = (400, {"error": {"type": "invalid_request_error", "message": "Invalid value: 'secret words of the prompt'"}})
BUSY = (500, {"error": {"type": "api_error", "message": "The server had an error"}})


@pytest.fixture(params=["openai", "anthropic"])
def service(request: pytest.FixtureRequest) -> Iterator[BatchService]:
    with batch_service(request.param) as found:
        yield found


@pytest.fixture
def openai() -> Iterator[BatchService]:
    with batch_service("openai") as found:
        yield found


@pytest.fixture
def anthropic() -> Iterator[BatchService]:
    with batch_service("anthropic") as found:
        yield found


def config_for(service: BatchService) -> LLMConfig:
    return LLMConfig(framework=service.kind, model="m", api_key="k", api_base=f"{service.url}/v1")


def write_rows(folder: Path, count: int, **fields: Any) -> Path:
    path = folder / "in.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"prompt {n}", **fields}) + "\n" for n in range(count)))
    return path


def batch_of(
    service: BatchService, folder: Path, *, llm: LLM | AsyncLLM | None = None, rows: int = 7, **more: Any
) -> Batch:
    """Return a batch of a few rows, of which three go into a batch of the provider."""
    path = folder / "in.jsonl"
    if not path.exists():
        write_rows(folder, rows)
    settings = {
        "poll_every": 0.01,
        "max_rows": 3,
        **{name: more.pop(name) for name in list(more) if name in ("max_rows", "max_tokens")},
    }
    more.setdefault("executor", ProviderBatches(**settings))
    return Batch(llm or LLM(config_for(service)), path, folder / "out.jsonl", **more)


def lines_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out.jsonl").read_bytes().splitlines()]


def check_whole(folder: Path, rows: int = 7) -> list[dict[str, Any]]:
    """Check that each row has one line, and return the lines by row."""
    lines = sorted(lines_in(folder), key=lambda line: line["row"])
    assert [line["row"] for line in lines] == list(range(rows))
    return lines


def test_rows_are_answered_once_each_in_batches_of_the_provider(service, tmp_path):
    report = batch_of(service, tmp_path).run()
    lines = check_whole(tmp_path)
    assert [line["text"] for line in lines] == [f"re: prompt {n}" for n in range(7)]
    assert lines[0] | {"key": ""} == {
        "row": 0, "custom_id": None, "key": "", "text": "re: prompt 0", "tool_calls": None, "finish_reason": "stop",
        "usage": {"input_tokens": 1000, "output_tokens": 100}, "cost": None, "model": "m", "attempts": 1, "elapsed": 60,
        "error": None,
    }  # fmt: skip
    assert [len(batch.rows) for batch in service.batches.values()] == [3, 3, 1]
    assert service.paid == Counter(f"prompt {n}" for n in range(7))
    assert (report.answered, report.failed, report.asked, report.input_tokens) == (7, 0, 7, 7000)
    assert (report.batches, report.in_flight, report.stopped) == ({"ended": 3}, 0, None)


def test_rows_at_the_service_are_not_asked_online_too(service, tmp_path):
    service.looks = 10**9
    batch = batch_of(service, tmp_path, limit=5)
    thread = threading.Thread(target=batch.run)
    thread.start()
    while sum(each.looks > 0 for each in service.batches.values()) < 2:
        time.sleep(0.01)
    batch.stop()
    thread.join()
    before = (tmp_path / "out.jsonl.batches").read_bytes()
    online = batch_of(service, tmp_path, executor="online")
    for begin in (online.run, online.estimate):
        with pytest.raises(
            ConfigError, match=r"2 batches with 5 rows are at the service; .*--executor provider --cancel"
        ):
            begin()
    found = batch_of(service, tmp_path).estimate()
    assert (found.rows, found.submitted, found.seconds) == (2, 5, None)
    assert (tmp_path / "out.jsonl.batches").read_bytes() == before
    assert service.online == Counter()
    service.looks = 0
    batch_of(service, tmp_path, limit=5).run()
    assert batch_of(service, tmp_path, executor="online").run().answered == 7
    assert service.paid + service.online == Counter(f"prompt {n}" for n in range(7))


def test_a_second_run_has_nothing_to_do(service, tmp_path):
    batch_of(service, tmp_path).run()
    before = list(service.paths)
    report = batch_of(service, tmp_path).run()
    assert service.paths == before
    assert (report.answered, report.asked) == (7, 0)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_async(service, tmp_path, backend):
    async def run() -> None:
        async with AsyncLLM(config_for(service)) as llm:
            report = await batch_of(service, tmp_path, llm=llm).arun()
            assert report.answered == 7

    anyio.run(run, backend=backend)
    check_whole(tmp_path)


def test_lines_are_those_of_online_answers(service, tmp_path):
    """The executor changes nothing of what a line says, but the measurements."""
    rows = write_rows(tmp_path, 3, custom_id="mine", max_tokens=7)
    Batch(LLM(config_for(service)), rows, tmp_path / "online.jsonl").run()
    batch_of(service, tmp_path).run()
    online = sorted(
        (json.loads(line) for line in (tmp_path / "online.jsonl").read_bytes().splitlines()),
        key=lambda line: line["row"],
    )
    provider = sorted(lines_in(tmp_path), key=lambda line: line["row"])
    assert [line | {"elapsed": 0} for line in provider] == [line | {"elapsed": 0} for line in online]
    sent = next(iter(service.batches.values())).rows[0]
    assert sent["params" if service.kind == "anthropic" else "body"]["max_tokens"] == 7


def test_requests_have_the_parameters_and_defaults_of_the_stack(service, tmp_path):
    config = config_for(service)
    stack = default_stack(config, Defaults(temperature=0.25))
    llm = LLM(config, stack)
    batch_of(service, tmp_path, llm=llm, rows=1).run()
    body = next(iter(service.batches.values())).rows[0]["params" if service.kind == "anthropic" else "body"]
    assert body["temperature"] == 0.25


def test_failed_rows_have_the_error_of_an_online_call_without_quotes(service, tmp_path):
    error = BAD[1] if service.kind == "openai" else {"type": "error", **BAD[1]}
    (tmp_path / "in.jsonl").write_text('{"prompt": "secret words of the prompt", "custom_id": "x"}\n{"prompt": "b"}\n')
    service.outcome = lambda prompt: (400, error) if prompt.startswith("secret") else "answered"
    report = batch_of(service, tmp_path).run()
    failed, answered = check_whole(tmp_path, 2)
    assert answered["text"] == "re: b"
    assert failed["custom_id"] == "x"
    assert failed["key"]
    assert failed["error"]["type"] == "BadRequest"
    assert failed["error"]["retryable"] is False
    assert failed["error"]["status"] == 400
    assert failed["error"]["request_id"] == "req_1"
    assert "Invalid value" in failed["error"]["message"]
    assert "secret" not in failed["error"]["message"]
    assert (report.answered, report.failed, report.errors) == (1, 1, {"BadRequest": 1})


def test_all_rows_failed_so_there_is_no_output_file(openai, tmp_path):
    openai.outcome = lambda _: BAD
    batch_of(openai, tmp_path, rows=3).run()
    assert {line["error"]["type"] for line in check_whole(tmp_path, 3)} == {"BadRequest"}
    assert "output" not in openai.batches["batch_0000"].lines


@pytest.mark.parametrize("trouble", ["expired", BUSY], ids=["expired", "server error"])
def test_rows_that_may_yet_be_answered_go_into_the_next_batch(service, tmp_path, trouble):
    seen: Counter[str] = Counter()

    def outcome(prompt: str) -> Any:
        seen[prompt] += 1
        return trouble if prompt in ("prompt 1", "prompt 5") and seen[prompt] == 1 else "answered"

    service.outcome = outcome
    report = batch_of(service, tmp_path).run()
    lines = check_whole(tmp_path)
    assert [line["attempts"] for line in lines] == [1, 2, 1, 1, 1, 2, 1]
    assert service.paid == Counter(f"prompt {n}" for n in range(7))
    assert report.failed == 0


@pytest.mark.parametrize("trouble", ["expired", BUSY, None], ids=["expired", "server error", "no result"])
def test_rows_fail_after_three_batches(service, tmp_path, trouble):
    service.outcome = lambda prompt: trouble if prompt == "prompt 1" else "answered"
    report = batch_of(service, tmp_path).run()
    lines = check_whole(tmp_path)
    kind = {"expired": "RequestTimeout", None: "StreamProtocolError"}.get(
        trouble if isinstance(trouble, str) else None, "ServerError"
    )
    if isinstance(trouble, tuple):
        kind = "ServerError"
    assert lines[1]["error"]["type"] == kind
    assert lines[1]["error"]["retryable"] is True
    assert lines[1]["attempts"] == 3
    assert service.rows_submitted["prompt 1"] == 3
    assert report.stopped is None
    service.outcome = lambda _: "answered"
    again = batch_of(service, tmp_path, retry_errors=True).run()
    assert (again.answered, again.failed) == (7, 0)
    assert check_whole(tmp_path)[1]["text"] == "re: prompt 1"


def test_what_is_left_is_asked_online(service, tmp_path):
    service.outcome = lambda prompt: {"prompt 1": "expired", "prompt 2": BUSY, "prompt 3": BAD}.get(prompt, "answered")
    report = batch_of(service, tmp_path, then="online").run()
    lines = check_whole(tmp_path)
    assert service.online == Counter({"prompt 1": 1, "prompt 2": 1})
    assert lines[3]["error"]["type"] == "BadRequest"
    assert service.rows_submitted == Counter(f"prompt {n}" for n in range(7))
    assert (report.answered, report.failed) == (6, 1)


def test_rows_that_cannot_be_asked_harm_no_others(service, tmp_path):
    rows = [
        {"prompt": "a"},
        {"nothing": 1},
        {"prompt": "b", "temperature": "hot"},
        {"prompt": "c", "headers": {"x": "y"}},
        {"prompt": "d"},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = batch_of(service, tmp_path).run()
    lines = check_whole(tmp_path, 5)
    assert (report.answered, report.failed, report.asked) == (2, 3, 2)
    assert [bool(line["error"]) for line in lines] == [False, True, True, True, False]
    assert "headers" in lines[3]["error"]["message"]
    assert [line["attempts"] for line in lines] == [1, 0, 0, 0, 1]


def test_first_rows_that_all_fail_alike_stop_the_run(service, tmp_path):
    write_rows(tmp_path, 30, temperature="hot")
    report = batch_of(service, tmp_path).run()
    assert report.stopped == "the first 20 rows all failed alike: ConfigError"
    assert (report.asked, lines_in(tmp_path), service.batches) == (0, [], {})


def test_more_first_rows_may_fail_alike_than_are_written_at_once(openai, tmp_path):
    write_rows(tmp_path, 700, temperature="hot")
    report = batch_of(openai, tmp_path, stop_after_errors=600).run()
    assert report.stopped == "the first 600 rows all failed alike: ConfigError"
    assert (report.asked, lines_in(tmp_path), openai.batches) == (0, [], {})


def test_first_rows_that_fail_alike_are_written_once_another_row_is_sent(service, tmp_path):
    rows = [{"prompt": f"prompt {n}", "temperature": "hot"} for n in range(5)] + [{"prompt": "fine"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = batch_of(service, tmp_path, stop_after_errors=6).run()
    assert [line["text"] for line in check_whole(tmp_path, 6)] == [None] * 5 + ["re: fine"]
    assert (report.errors, report.asked, report.stopped) == ({"ConfigError": 5}, 1, None)


def test_a_batch_whose_rows_all_fail_alike_stops_the_run(anthropic, tmp_path):
    anthropic.outcome = lambda _: (404, {"type": "error", "error": {"type": "not_found_error", "message": "model: m"}})
    report = batch_of(anthropic, tmp_path, max_rows=4, stop_after_errors=4, rows=9).run()
    assert report.stopped is not None
    assert report.stopped.startswith("all 4 rows of a batch failed alike: NotFound")
    assert "model: m" in report.first_errors["NotFound"]


def test_each_model_has_batches_of_its_own(service, tmp_path):
    rows = [{"prompt": f"prompt {n}", "model": "ab"[n % 2]} for n in range(7)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    batch_of(service, tmp_path).run()
    assert [line["model"] for line in check_whole(tmp_path)] == list("abababa")


def test_uploads_are_split_by_estimated_tokens(service, tmp_path):
    batch_of(service, tmp_path, max_tokens=130, max_rows=7).run()
    check_whole(tmp_path)
    sizes = [len(batch.rows) for batch in service.batches.values()]
    assert sum(sizes) == 7
    assert max(sizes) < 4
    assert min(sizes[:-1]) > 1


def test_limit(service, tmp_path):
    report = batch_of(service, tmp_path, limit=4).run()
    assert report.answered == 4
    assert service.rows_submitted == Counter(f"prompt {n}" for n in range(4))


def test_answers_beyond_the_limit_are_written_if_they_were_submitted(service, tmp_path):
    stopped_while_running(service, tmp_path)
    assert batch_of(service, tmp_path, limit=2).run().answered == 7
    assert service.paid == Counter(f"prompt {n}" for n in range(7))


def test_failures_that_were_submitted_again_are_replaced_by_any_later_run(service, tmp_path):
    service.outcome = lambda prompt: BAD if prompt == "prompt 1" else "answered"
    assert batch_of(service, tmp_path).run().failed == 1
    service.outcome = lambda _: "answered"
    service.hold_at("submit after")
    batch = batch_of(service, tmp_path, retry_errors=True)
    thread = threading.Thread(target=batch.run)
    thread.start()
    assert service.reached.wait(20)
    batch.stop()
    service.release()
    thread.join(20)
    report = batch_of(service, tmp_path).run()  # without retry_errors
    assert (report.answered, report.failed) == (7, 0)
    assert service.paid == Counter(f"prompt {n}" for n in range(7))
    check_whole(tmp_path)


def test_other_outputs(service, tmp_path):
    write_rows(tmp_path, 7)
    executor = ProviderBatches(poll_every=0.01, max_rows=3)
    Batch(LLM(config_for(service)), tmp_path / "in.jsonl", tmp_path / "out.csv", executor=executor).run()
    texts = [line.split(",")[3] for line in (tmp_path / "out.csv").read_text().splitlines()]
    assert sorted(texts) == ["text" if n < 0 else f"re: prompt {n}" for n in range(7)] + ["text"]


# Results


def test_foreign_and_repeated_results_are_left_out(service, tmp_path, caplog):
    answer = b'{"custom_id": "%s", "result": {"type": "succeeded", "message": {"content": []}}}'
    service.extra_lines = [answer % b"someone-else", b"", b'{"custom_id": 1}', answer % b"a" * 1]
    real = service.make

    def make(rows: list[dict[str, Any]], **facts: Any) -> Any:
        service.extra_lines.append(answer % rows[0]["custom_id"].encode())  # a second result of a row
        return real(rows, **facts)

    service.make = make  # type: ignore[method-assign]
    with caplog.at_level(logging.WARNING, "fluxibly"):
        batch_of(service, tmp_path, max_rows=7).run()
    assert all(line["text"].startswith("re: ") for line in check_whole(tmp_path))
    assert "results of unknown rows" in caplog.text


def test_a_download_that_is_cut_is_begun_again(service, tmp_path):
    service.cut_results = 2
    batch_of(service, tmp_path, max_rows=7).run()
    check_whole(tmp_path)
    assert service.paid == Counter(f"prompt {n}" for n in range(7))


def test_answers_cost_what_the_service_takes_less(service, tmp_path):
    config = config_for(service)
    llm = LLM(config, default_stack(config, Cost(prices={"m": (1.0, 2.0)})))
    report = batch_of(service, tmp_path, llm=llm).run()
    assert {line["cost"] for line in check_whole(tmp_path)} == {(1000 * 1.0 + 100 * 2.0) / 1e6 / 2}
    assert report.cost == pytest.approx(7 * 0.0006)


# Submissions


@pytest.mark.parametrize("cut", ["before", "after"])
def test_a_submission_without_an_answer_is_not_paid_twice(service, tmp_path, cut):
    service.cut = ["", cut]
    report = batch_of(service, tmp_path).run()
    check_whole(tmp_path)
    assert service.paid == Counter(f"prompt {n}" for n in range(7))
    assert len(service.batches) == 3
    assert report.stopped is None


def test_a_lost_batch_is_told_from_another_of_the_same_size(anthropic, tmp_path):
    """Anthropic's batches have no name, so only results tell whose they are. Until then, nothing is submitted again."""
    foreign: list[str] = []
    real = anthropic.make

    def make(rows: list[dict[str, Any]], **facts: Any) -> Any:
        made = real(rows, **facts)
        if not foreign:  # another program submits as many rows at the same time
            foreign.append(real([{**row, "custom_id": f"other-{n}"} for n, row in enumerate(rows)]).id)
        return made

    anthropic.make = make  # type: ignore[method-assign]
    anthropic.cut = ["after"]
    anthropic.looks = 3
    batch_of(anthropic, tmp_path, rows=3).run()
    check_whole(tmp_path, 3)
    assert len(anthropic.batches) == 2


def test_another_batch_of_the_same_size_is_not_taken_for_a_lost_one(anthropic, tmp_path):
    anthropic.cut = ["before"]
    anthropic.looks = 3
    other = [
        {
            "custom_id": f"other-{n}",
            "params": {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": "z"}]},
        }
        for n in range(3)
    ]
    real = anthropic.pass_step

    def pass_step(step: str) -> None:
        if step == "submit before" and not anthropic.batches:
            anthropic.make(other)
        real(step)

    anthropic.pass_step = pass_step  # type: ignore[method-assign]
    batch_of(anthropic, tmp_path, rows=3).run()
    check_whole(tmp_path, 3)
    assert len(anthropic.batches) == 2
    assert anthropic.rows_submitted == Counter({"z": 3, "prompt 0": 1, "prompt 1": 1, "prompt 2": 1})


def test_in_doubt_the_run_stops_and_pays_nothing_twice(anthropic, tmp_path):
    anthropic.cut = ["after"]
    anthropic.results_gone = True
    report = batch_of(anthropic, tmp_path, rows=3).run()
    assert report.stopped is not None
    assert "are gone, which may be a lost one" in report.stopped
    assert "delete the lines with" in report.stopped
    assert len(anthropic.batches) == 1
    again = batch_of(anthropic, tmp_path).run()
    assert again.stopped is not None
    assert len(anthropic.batches) == 1


def test_a_refused_submission_stops_the_run_and_loses_nothing(service, tmp_path):
    refused = (400, {"error": {"type": "invalid_request_error", "message": "billing is not active"}})
    service.refuse = lambda _: refused if len(service.batches) > 1 else None
    report = batch_of(service, tmp_path).run()
    assert report.stopped is not None
    assert report.stopped.startswith("the service refused a batch: BadRequest")
    assert report.answered == 3
    service.refuse = lambda _: None
    assert batch_of(service, tmp_path).run().answered == 7
    assert service.paid == Counter(f"prompt {n}" for n in range(7))


def test_a_full_queue_is_waited_for(openai, tmp_path, caplog):
    """OpenAI fails a batch whose tokens do not fit into its queue, together with those of others."""
    limit = 200

    def problems(batch: Any) -> list[dict[str, Any]]:
        others = [
            each
            for each in openai.batches.values()
            if each is not batch and each.status in ("validating", "in_progress")
        ]
        queued = sum(40 * len(each.rows) for each in [batch, *others])
        message = f"Enqueued token limit reached for m in organization org. Limit: {limit} enqueued tokens."
        return (
            [{"code": "token_limit_exceeded", "message": message, "line": None, "param": None}]
            if queued > limit
            else []
        )

    openai.problems = problems
    with caplog.at_level(logging.WARNING, "fluxibly"):
        report = batch_of(openai, tmp_path, rows=12, max_rows=12).run()
    check_whole(tmp_path, 12)
    assert report.stopped is None
    assert openai.paid == Counter(f"prompt {n}" for n in range(12))
    assert "queue of the service is full" in caplog.text
    assert len(openai.batches["batch_0000"].rows) == 12


def test_too_many_requests_at_submission_are_waited_for(anthropic, tmp_path):
    refusals = [(429, {"type": "error", "error": {"type": "rate_limit_error", "message": "queue full"}})] * 2
    anthropic.refuse = lambda _: refusals.pop() if refusals else None
    batch_of(anthropic, tmp_path).run()
    check_whole(tmp_path)
    assert anthropic.paid == Counter(f"prompt {n}" for n in range(7))


def test_a_row_that_fails_validation_is_told_and_harms_no_other(openai, tmp_path, caplog):
    def problems(batch: Any) -> list[dict[str, Any]]:
        prompts = [prompt_of(row["body"]) for row in batch.rows]
        wrong = [number for number, prompt in enumerate(prompts, 1) if prompt == "prompt 4"]
        return [
            {"code": "invalid_value", "message": "no such parameter", "line": number, "param": "x"} for number in wrong
        ]

    openai.problems = problems
    with caplog.at_level(logging.WARNING, "fluxibly"):
        report = batch_of(openai, tmp_path).run()
    assert "line 2 (row 4): no such parameter" in caplog.text
    lines = check_whole(tmp_path)
    assert lines[4]["error"] | {"message": ""} == {
        "type": "BadRequest", "message": "", "retryable": False, "status": None, "code": "invalid_value", "request_id": None,
    }  # fmt: skip
    assert (report.answered, report.failed, report.stopped) == (6, 1, None)
    assert openai.paid["prompt 3"] == openai.paid["prompt 5"] == 1


def test_a_failed_validation_of_the_whole_stops_the_run(openai, tmp_path):
    openai.problems = lambda _: [{"code": "model_not_found", "message": "The model m does not exist", "line": None}]
    report = batch_of(openai, tmp_path).run()
    assert report.stopped is not None
    assert "did not begin the batch batch_0000: The model m does not exist" in report.stopped
    assert lines_in(tmp_path) == []
    openai.problems = lambda _: []
    assert batch_of(openai, tmp_path).run().answered == 7
    assert openai.paid == Counter(f"prompt {n}" for n in range(7))


def test_a_wrong_key_stops_the_run(service, tmp_path):
    service.key = "another"
    report = batch_of(service, tmp_path).run()
    assert report.stopped is not None
    assert report.stopped.startswith("AuthenticationError")
    service.key = "k"
    assert batch_of(service, tmp_path).run().answered == 7


# Stopping, resuming, cancelling


def stopped_while_running(service: BatchService, folder: Path) -> None:
    """Run a batch until all of it is at the service, and stop."""
    service.looks = 10**9
    batch = batch_of(service, folder)
    thread = threading.Thread(target=batch.run)
    thread.start()
    for _ in range(1000):
        if batch.report.in_flight == 7 and batch.report.batches.get("in_progress") == 3:
            break
        thread.join(0.01)
    batch.stop()
    thread.join(20)
    assert not thread.is_alive()
    assert batch.report.stopped == (
        "on request; 3 batches go on at the service (7 rows), and another run waits for the answers"
    )
    service.looks = 1


def test_a_stopped_run_leaves_the_batches_running_and_another_waits_for_them(service, tmp_path):
    stopped_while_running(service, tmp_path)
    assert lines_in(tmp_path) == []
    report = batch_of(service, tmp_path).run()
    assert report.answered == 7
    assert len(service.batches) == 3
    check_whole(tmp_path)


def test_cancel_keeps_what_is_answered(service, tmp_path):
    service.looks = 1
    seen = iter(range(100))
    service.outcome = lambda _: "answered" if next(seen) < 3 else "expired"
    stopped_while_running(service, tmp_path)
    service.look(service.batches[next(iter(service.batches))])
    report = batch_of(service, tmp_path).cancel()
    assert report.stopped == "cancelled"
    assert report.answered == 3
    assert all(batch.cancelled for batch in list(service.batches.values())[1:])
    service.outcome = lambda _: "answered"
    assert batch_of(service, tmp_path).run().answered == 7
    assert service.paid == Counter(f"prompt {n}" for n in range(7))


def test_a_batch_that_somebody_else_cancels_is_not_submitted_again_by_itself(service, tmp_path):
    stopped_while_running(service, tmp_path)
    next(iter(service.batches.values())).cancelled = True
    report = batch_of(service, tmp_path).run()
    assert report.stopped is not None
    assert "was cancelled, and 3 of its rows have no answer" in report.stopped
    assert report.answered == 4
    assert len(service.batches) == 3
    assert batch_of(service, tmp_path).run().answered == 7


@pytest.mark.parametrize("changed", [None, "keep", "ask"])
def test_an_input_that_has_changed_under_a_batch(service, tmp_path, changed):
    stopped_while_running(service, tmp_path)
    rows = [{"prompt": f"prompt {n}" if n != 2 else "another"} for n in range(8)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if changed is None:
        with pytest.raises(ConfigError, match=r"because the input has changed; .*--changed keep"):
            batch_of(service, tmp_path).run()
        return
    batch_of(service, tmp_path, changed=changed).run()
    lines = check_whole(tmp_path, 8)
    assert lines[2]["text"] == ("re: another" if changed == "ask" else "re: prompt 2")
    assert service.rows_submitted["prompt 1"] == 1


def test_rows_that_were_added_meanwhile_are_no_change(service, tmp_path):
    stopped_while_running(service, tmp_path)
    with (tmp_path / "in.jsonl").open("a") as file:
        file.write('{"prompt": "one more"}\n')
    assert batch_of(service, tmp_path).run().answered == 8
    assert service.rows_submitted["prompt 1"] == 1


def test_batches_of_another_provider_are_not_looked_for_here(tmp_path, service):
    stopped_while_running(service, tmp_path)
    with batch_service(service.kind) as other, pytest.raises(ConfigError, match="expected batches at"):
        batch_of(other, tmp_path).run()


def test_the_file_of_submissions_of_something_else_is_refused(service, tmp_path):
    (tmp_path / "out.jsonl.batches").write_text("something\n")
    with pytest.raises(ConfigError, match=r"out\.jsonl\.batches, line 1"):
        batch_of(service, tmp_path).run()
    assert (tmp_path / "out.jsonl.batches").read_text() == "something\n"


def test_a_torn_last_line_of_submissions_is_cut_off(service, tmp_path):
    stopped_while_running(service, tmp_path)
    with (tmp_path / "out.jsonl.batches").open("a") as file:
        file.write('{"batch": "torn", "st')
    assert batch_of(service, tmp_path).run().answered == 7
    assert len(service.batches) == 3


def test_a_batch_that_the_service_has_forgotten_stops_the_run(service, tmp_path):
    stopped_while_running(service, tmp_path)
    service.batches.pop(next(iter(service.batches)))
    report = batch_of(service, tmp_path).run()
    assert report.stopped is not None
    assert "does not know the batch" in report.stopped
    assert "delete the lines with" in report.stopped


# What cannot be


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (ExtractReasoning(), "ExtractReasoning"),
        (Validation(empty="retry"), "Validation"),
        (lambda request, call_next: (yield from call_next(request)), "lambda"),
    ],
    ids=["ExtractReasoning", "Validation", "own"],
)
def test_layers_that_would_change_requests_or_answers_are_refused(openai, tmp_path, layer, name):
    config = config_for(openai)
    batch = batch_of(openai, tmp_path, llm=LLM(config, [layer, RateLimit()]))
    with pytest.raises(ConfigError, match=f"{name}.* cannot act on a provider's batch"):
        batch.run()
    assert openai.paths == []


def test_a_provider_without_batches_is_refused(tmp_path):
    llm = LLM(LLMConfig(framework="echo", model="m"))
    write_rows(tmp_path, 1)
    with pytest.raises(ConfigError, match="expected a framework with a batch API"):
        Batch(llm, tmp_path / "in.jsonl", tmp_path / "out.jsonl", executor="provider").run()


@pytest.mark.parametrize("more", [{"dedupe": True}, {"budget": 1.0}, {"executor": "online", "then": "online"}])
def test_options_that_batches_do_not_have(openai, tmp_path, more):
    with pytest.raises(ConfigError):
        batch_of(openai, tmp_path, **more)


@pytest.mark.parametrize("settings", [{"poll_every": 0}, {"max_rows": 0}, {"max_tokens": 0}])
def test_settings_are_checked(settings):
    with pytest.raises(ValueError, match=f"ProviderBatches: {next(iter(settings))}: expected"):
        ProviderBatches(**settings)


def test_standard_input_is_refused(openai, tmp_path):
    with pytest.raises(ConfigError, match="write it to a file"):
        Batch(LLM(config_for(openai)), open_input("-"), tmp_path / "out.jsonl", executor="provider")


def test_cancel_needs_batches_of_the_provider(openai, tmp_path):
    with pytest.raises(ConfigError, match="--executor provider"):
        batch_of(openai, tmp_path, executor="online").cancel()


def stop_once_submitted(batch: Batch) -> None:
    while not batch.report.batches:
        time.sleep(0.01)
    batch.stop()


def test_rows_at_the_service_belong_to_all_names_of_an_output(service: BatchService, tmp_path: Path) -> None:
    """They are neither submitted nor asked again under another name."""
    service.looks = 10**6
    link = tmp_path / "link.jsonl"
    link.symlink_to(tmp_path / "out.jsonl")
    for out in (link, tmp_path / "out.jsonl"):
        batch = Batch(
            LLM(config_for(service)),
            write_rows(tmp_path, 3),
            out,
            executor=ProviderBatches(poll_every=0.02),
            changed="keep",
        )
        thread = threading.Thread(target=stop_once_submitted, args=(batch,))
        thread.start()
        assert "1 batch goes on" in str(batch.run().stopped)
        thread.join()
    assert len(service.batches) == 1
    online = Batch(LLM(config_for(service)), tmp_path / "in.jsonl", tmp_path / "out.jsonl", changed="keep")
    with pytest.raises(ConfigError, match="1 batch with 3 rows is at the service"):
        online.run()
    assert not service.online
    batch_of(service, tmp_path, changed="keep").cancel()
    assert online.run().answered == 3


def test_results_that_are_gone_are_not_paid_again(anthropic: BatchService, tmp_path: Path) -> None:
    anthropic.results_gone = True
    for _ in range(2):
        report = batch_of(anthropic, tmp_path, rows=3).run()
        assert "the service has no results of the batch msgbatch_0000 any more" in str(report.stopped)
        assert "delete the lines with" in str(report.stopped)
    assert len(anthropic.batches) == 1


def test_a_result_that_cannot_be_read_harms_no_other(service: BatchService, tmp_path: Path) -> None:
    end = service._end

    def end_with_a_broken_line(batch: Any) -> None:
        end(batch)
        if len(service.batches) == 1:
            for lines in batch.lines.values():
                lines[0] = lines[0][:50]

    service._end = end_with_a_broken_line  # type: ignore[method-assign]
    assert batch_of(service, tmp_path, rows=3).run().answered == 3
    check_whole(tmp_path, 3)
    assert sum(service.paid.values()) == 4  # the one that was lost


def test_a_page_in_place_of_results_is_not_taken_for_none(service: BatchService, tmp_path: Path) -> None:
    end = service._end

    def page(batch: Any) -> None:
        end(batch)
        for name in batch.lines:
            batch.lines[name] = [b"<html>", b"</html>"]

    service._end = page  # type: ignore[method-assign]
    report = batch_of(service, tmp_path, rows=3).run()
    assert "StreamProtocolError" in str(report.stopped)
    assert len(service.batches) == 1  # no row is paid again


def test_the_words_of_a_refusal_are_in_no_file(service: BatchService, tmp_path: Path) -> None:
    service.refuse = lambda _: BAD
    assert batch_of(service, tmp_path).run().stopped is not None
    assert [path for path in tmp_path.iterdir() if b"secret words" in path.read_bytes()] == []


def test_answers_that_came_before_the_results_broke_off_are_kept(service: BatchService, tmp_path: Path) -> None:
    def without_end(_: Any, lines: list[bytes]) -> bytes:
        return b"\n".join([*lines[:2], lines[2][:50]])

    service.in_bytes = without_end.__get__(service)  # type: ignore[method-assign]
    report = batch_of(service, tmp_path, rows=3).run()
    assert "StreamProtocolError" in str(report.stopped)
    assert report.answered == len(lines_in(tmp_path)) == 2
    assert sum(service.paid.values()) == 3
