"""`RateLimit` against a local service with limits of its own: it slows down, stops when asked to, and gets no further 429."""

from __future__ import annotations

import threading

import anyio
import pytest
from support.limited_server import limited_server

from fluxibly import LLM, AsyncLLM, LLMConfig
from fluxibly.errors import RateLimitError
from fluxibly.middleware.rate_limit import RateLimit
from fluxibly.middleware.retry import Retry

FRAMEWORKS = pytest.mark.parametrize("framework", ["openai", "anthropic"])


def config_of(framework, url):
    path = "/v1" if framework == "openai" else ""
    return LLMConfig(framework=framework, model="m", api_key="key", api_base=url + path, max_tokens=10)


def call_in_threads(llm, threads, each):
    """Make calls in threads at once. Return the texts, and the errors."""
    texts, errors = [], []

    def work():
        for _ in range(each):
            try:
                texts.append(llm.complete("Hi").text)
            except RateLimitError as error:
                errors.append(error)

    workers = [threading.Thread(target=work, daemon=True) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    return texts, errors


def check_pause(service):
    """Check that all requests came before or after a pause, and that none was refused after it."""
    first, last = min(service.refused), max(service.refused)
    times = [*service.answered, *service.refused]
    assert not [at for at in times if last + 0.5 < at < last + 0.95], "some did not stop"
    assert last < first + 0.9, "refused after the pause"
    assert any(at > last + 0.95 for at in service.answered)


def test_headers_slow_it_down_before_any_429():
    """The user's rate is ten times the service's. Nothing is refused all the same."""
    with (
        limited_server(capacity=60, rate=40) as service,
        LLM(config_of("openai", service.url), [RateLimit(requests=400, per=1, burst=30)]) as llm,
    ):
        texts, errors = call_in_threads(llm, 20, 6)
    assert (len(texts), errors, service.refused) == (120, [], [])
    lasted = service.answered[-1] - service.answered[0]
    assert lasted > (120 - 60) / 40 * 0.9


@FRAMEWORKS
def test_a_429_stops_all_threads(framework):
    """Others have used the limit up. All threads wait for as long as the service asks, and then nothing is refused."""
    with (
        limited_server(capacity=60, rate=40, level=60.0) as service,
        LLM(config_of(framework, service.url), [Retry(), RateLimit(requests=400, per=1, burst=10)]) as llm,
    ):
        texts, errors = call_in_threads(llm, 20, 3)
    assert (len(texts), errors) == (60, [])
    check_pause(service)


def test_without_it_many_are_refused():
    """The same load, with Retry alone: so the tests above have something to find."""
    with (
        limited_server(capacity=10, rate=1) as service,
        LLM(config_of("openai", service.url), [Retry(max_retries=1, max_retry_after=0)]) as llm,
    ):
        _, errors = call_in_threads(llm, 20, 3)
    assert errors
    assert len(service.refused) > 20


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
@pytest.mark.anyio
async def test_tasks(anyio_backend):
    """In async calls alike."""
    texts = []
    with limited_server(capacity=60, rate=40, level=60.0) as service:
        async with AsyncLLM(
            config_of("openai", service.url), [Retry(), RateLimit(requests=400, per=1, burst=10)]
        ) as llm:

            async def work():
                texts.append((await llm.complete("Hi")).text)

            async with anyio.create_task_group() as tasks:
                for _ in range(50):
                    tasks.start_soon(work)
    assert texts == ["fine"] * 50
    check_pause(service)
