"""Batches: the cost of a row, and rows a second against the number of calls at once, compared with the installed peers.

`python -m benchmarks.batches` prints two tables; `--plot FILE` draws the second (needs matplotlib). Each contender reads a file of
prompts, asks a local server, and writes a file of answers, in a process of its own. Contenders take turns. `--peers PYTHON` names
an interpreter that has the peers which are not installed here, and fluxibly; it may be given several times.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.measure import left_out, table
from benchmarks.over_http import server

ROWS = 8_000
ROUNDS = 5
AT_ONCE = (1, 10, 100, 500, 1_000)
ANSWER_TAKES = 0.2
SECONDS = 4.0
"""How long a point of the curve takes at least, for a contender that is never held up."""
PROMPT = "What is the capital of France?"

Ask = Callable[[str], Awaitable[str]]


# The contenders. Each does the whole work of a file.


def fluxibly_batch(url: str, given: Path, out: Path, at_once: int) -> None:
    """`fluxibly.batch.Batch`, with the default stack. It need not find the rate, which takes seconds: no peer does."""
    from fluxibly import AsyncLLM
    from fluxibly.batch import Batch

    _log_nothing()
    Batch(AsyncLLM(**_config(url)), given, out, concurrency=at_once, rpm=1e9).run()


def fluxibly_map(url: str, given: Path, out: Path, at_once: int) -> None:
    """`AsyncLLM.map`, with the default stack."""
    from fluxibly import AsyncLLM

    async def run() -> None:
        async with AsyncLLM(**_config(url)) as llm:
            with out.open("w") as file:
                async for answer in llm.map(_prompts(given), concurrency=at_once):
                    file.write(json.dumps({"row": answer.row, "text": answer.text}) + "\n")

    _log_nothing()
    asyncio.run(run())


def bare_loop(url: str, given: Path, out: Path, at_once: int) -> None:
    """Tasks that call `AsyncLLM.complete`, with the default stack: what a user would write."""
    from fluxibly import AsyncLLM

    async def run() -> None:
        async with AsyncLLM(**_config(url)) as llm:

            async def ask(prompt: str) -> str:
                return (await llm.complete(prompt)).text

            await _loop(ask, given, out, at_once)

    _log_nothing()
    asyncio.run(run())


def httpx_loop(url: str, given: Path, out: Path, at_once: int) -> None:
    """The same tasks with httpx."""
    import httpx

    async def run() -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(timeout=60, limits=limits) as client:

            async def ask(prompt: str) -> str:
                answer = await client.post(f"{url}/chat/completions", json=_body(prompt))
                return str(answer.json()["choices"][0]["message"]["content"])

            await _loop(ask, given, out, at_once)

    asyncio.run(run())


def aiohttp_loop(url: str, given: Path, out: Path, at_once: int) -> None:
    """The same tasks with aiohttp."""
    import aiohttp

    async def run() -> None:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:

            async def ask(prompt: str) -> str:
                async with session.post(f"{url}/chat/completions", json=_body(prompt)) as answer:
                    return str((await answer.json())["choices"][0]["message"]["content"])

            await _loop(ask, given, out, at_once)

    asyncio.run(run())


def openai_loop(url: str, given: Path, out: Path, at_once: int) -> None:
    """The same tasks with the openai SDK."""
    import openai

    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=url, api_key="k") as client:

            async def ask(prompt: str) -> str:
                answer = await client.chat.completions.create(**_body(prompt))
                return str(answer.choices[0].message.content)

            await _loop(ask, given, out, at_once)

    asyncio.run(run())


def litellm_batch(url: str, given: Path, out: Path, at_once: int) -> None:
    """`litellm.batch_completion`, as its documentation has it: a thread for each call at once."""
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    import litellm

    messages = [_body(prompt)["messages"] for prompt in _prompts(given)]
    answers = litellm.batch_completion(
        model="openai/m", messages=messages, max_workers=at_once, api_base=url, api_key="k"
    )
    with out.open("w") as file:
        for row, answer in enumerate(answers):
            file.write(json.dumps({"row": row, "text": answer.choices[0].message.content}) + "\n")


def llm_loop(url: str, given: Path, out: Path, at_once: int) -> None:
    """A loop over `model.prompt` of the package llm, in threads."""
    from concurrent.futures import ThreadPoolExecutor

    import llm
    from llm.default_plugins.openai_models import Chat

    model = Chat("m", api_base=url)

    def ask(prompt: str) -> str:
        answer: str = llm.Model.prompt(model, prompt, key="k", stream=False).text()
        return answer

    with ThreadPoolExecutor(at_once) as pool, out.open("w") as file:
        for row, text in enumerate(pool.map(ask, _prompts(given))):
            file.write(json.dumps({"row": row, "text": text}) + "\n")


def curator(url: str, given: Path, out: Path, at_once: int) -> None:
    """`curator.LLM`, with its limits far above what is asked."""
    os.environ |= {"CURATOR_DISABLE_CACHE": "true", "TELEMETRY_ENABLED": "false", "CURATOR_VIEWER": "0"}
    from bespokelabs import curator as package

    model = package.LLM(
        model_name="m",
        backend="openai",
        backend_params={
            "base_url": url,
            "api_key": "k",
            "max_requests_per_minute": 10**7,
            "max_tokens_per_minute": 10**9,
            "max_concurrent_requests": at_once,
        },
    )
    answers = model(list(_prompts(given)))
    rows = getattr(answers, "dataset", answers)
    with out.open("w") as file:
        for row, answer in enumerate(rows):
            file.write(json.dumps({"row": row, "text": answer["response"]}) + "\n")


class _RayActor:
    """An actor of Ray Data that asks a service by the openai SDK, with one client and one semaphore."""

    def __init__(self, url: str, at_once: int) -> None:
        import openai

        self.client = openai.AsyncOpenAI(base_url=url, api_key="k")
        self.room = asyncio.Semaphore(at_once)

    async def _ask(self, prompt: str) -> str:
        async with self.room:
            answer = await self.client.chat.completions.create(**_body(prompt))
        return str(answer.choices[0].message.content)

    async def __call__(self, batch: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        yield {"text": await asyncio.gather(*[self._ask(str(prompt)) for prompt in batch["prompt"]])}


def ray_data(url: str, given: Path, out: Path, at_once: int) -> None:
    """Ray Data's `map_batches`, one actor with the openai SDK. Ray runs already; the actor is started anew."""
    import ray
    from ray.data import ActorPoolStrategy

    if not ray.is_initialized():
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200_000_000)
    ray.data.DataContext.get_current().enable_progress_bars = False
    answered = ray.data.from_items([{"prompt": prompt} for prompt in _prompts(given)]).map_batches(
        _RayActor,
        fn_constructor_args=(url, at_once),
        batch_size=max(at_once, 100),
        compute=ActorPoolStrategy(size=1),
    )
    with out.open("w") as file:
        for row, answer in enumerate(answered.iter_rows()):
            file.write(json.dumps({"row": row, "text": answer["text"]}) + "\n")


CONTENDERS: dict[str, tuple[Callable[[str, Path, Path, int], None], str]] = {
    "bare loop of AsyncLLM.complete": (bare_loop, "fluxibly"),
    "fluxibly batch": (fluxibly_batch, "fluxibly"),
    "AsyncLLM.map": (fluxibly_map, "fluxibly"),
    "bare loop of aiohttp": (aiohttp_loop, "aiohttp"),
    "bare loop of httpx": (httpx_loop, "httpx"),
    "loop of the openai SDK": (openai_loop, "openai"),
    "litellm.batch_completion": (litellm_batch, "litellm"),
    "loop of llm": (llm_loop, "llm"),
    "curator": (curator, "bespokelabs"),
    "Ray Data, openai SDK": (ray_data, "ray"),
}
"""Each contender, and the package that it needs."""


def _log_nothing() -> None:
    """Log nothing: warnings of the run would go to the terminal."""
    import logging

    logging.getLogger("fluxibly").setLevel(logging.CRITICAL)


def _config(url: str) -> dict[str, Any]:
    return {"framework": "openai", "model": "m", "api_base": url, "api_key": "k"}


def _body(prompt: str) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": prompt}]}


def _prompts(given: Path) -> Iterator[str]:
    with given.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["prompt"]


async def _loop(ask: Ask, given: Path, out: Path, at_once: int) -> None:
    """Ask for each prompt of a file in tasks, and write each answer as it comes."""
    rows = enumerate(_prompts(given))
    with out.open("w") as file:

        async def work() -> None:
            for row, prompt in rows:
                file.write(json.dumps({"row": row, "text": await ask(prompt)}) + "\n")

        await asyncio.gather(*[work() for _ in range(at_once)])


# Measuring


def child(name: str, url: str, rows: int, at_once: int) -> None:
    """Do the work of a contender twice, the first time in small, and print what the second has taken."""
    run = CONTENDERS[name][0]
    with tempfile.TemporaryDirectory() as folder:

        def once(count: int) -> Path:
            given, out = Path(folder, f"{count}.jsonl"), Path(folder, f"{count}.out.jsonl")
            given.write_text("".join([json.dumps({"prompt": f"{PROMPT} {row}"}) + "\n" for row in range(count)]))
            run(url, given, out, at_once)
            return out

        warm = 1 if run is ray_data else min(rows, at_once)
        once(warm)
        began, cpu = perf_counter(), _cpu()
        out = once(rows + 1 if rows == warm else rows)
        elapsed, cpu = perf_counter() - began, _cpu() - cpu
        lines = sum(1 for _ in out.open("rb"))
    assert lines >= rows, f"{name}: {lines} of {rows} rows"  # noqa: S101  # or the figures would be wrong
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"elapsed": elapsed, "cpu": cpu, "peak": peak, "rows": lines}))


def _cpu() -> float:
    """Return the CPU seconds of this process and of those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def measured(python: str, name: str, url: str, rows: int, at_once: int) -> dict[str, float] | None:
    """Run a contender in a process of its own; None if it fails."""
    command = [python, "-m", "benchmarks.batches", "--child", name, url, f"{rows}", f"{at_once}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  # ours
    if done.returncode:
        print(f"  {name} failed: {(done.stderr.strip().splitlines() or ['?'])[-1][:200]}")
        return None
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def interpreters(others: list[str]) -> tuple[dict[str, str], list[str]]:
    """Return the interpreter for each contender whose package is installed, and the packages that none has."""
    found: dict[str, str] = {}
    missing: list[str] = []
    for name, (_, package) in CONTENDERS.items():
        if importlib.util.find_spec(package) is not None:
            found[name] = sys.executable
            continue
        probe = f"import importlib.util as u, sys; sys.exit(u.find_spec({package!r}) is None)"
        for python in others:
            if not subprocess.run([python, "-c", probe], check=False).returncode:  # noqa: S603  # as the user says
                found[name] = python
                break
        else:
            missing.append(package)
    return found, missing


def _share(name: str) -> int:
    """Return by what the rows of a contender are divided, because it is slow."""
    return (
        1 if name in ("fluxibly batch", "AsyncLLM.map", "bare loop of AsyncLLM.complete", "bare loop of aiohttp") else 8
    )


def costs(pythons: dict[str, str]) -> None:
    """Print what a row costs at 100 at once, against answers that come at once."""
    walls: dict[str, list[float]] = {}
    cpus: dict[str, list[float]] = {}
    with server() as url:
        for _ in range(ROUNDS):
            for name, python in pythons.items():
                found = measured(python, name, url, ROWS // _share(name), 100)
                if found is not None:
                    walls.setdefault(name, []).append(found["elapsed"] / found["rows"] * 1e6)
                    cpus.setdefault(name, []).append(found["cpu"] / found["rows"] * 1e6)
    medians = {name: statistics.median(values) for name, values in walls.items()}
    table("A row, 100 at once, wall time", medians, goal="fluxibly batch <= 1.2, and >= 2,000 rows/s")
    table("A row, 100 at once, CPU time", {name: statistics.median(values) for name, values in cpus.items()})


def curve(pythons: dict[str, str], picture: Path | None) -> None:
    """Print, and draw, rows a second against the number at once, where each answer takes 0.2 s."""
    rates: dict[str, dict[int, float]] = {}
    with server(ANSWER_TAKES) as url:
        for at_once in AT_ONCE:
            rows = int(max(at_once / ANSWER_TAKES * SECONDS, 10))
            for name, python in pythons.items():
                found = measured(python, name, url, max(min(rows, ROWS) // _share(name), at_once, 10), at_once)
                if found is not None:
                    rates.setdefault(name, {})[at_once] = found["rows"] / found["elapsed"]
    print(f"\nRows a second, answers of {ANSWER_TAKES:g} s   (goal: no fall from 500 to 1,000)")
    width = max(map(len, rates))
    print(f"  {'at once':{width}}  " + "  ".join([f"{at_once:>7,}" for at_once in AT_ONCE]))
    for name, found in rates.items():
        print(f"  {name:{width}}  " + "  ".join([f"{found.get(at_once, float('nan')):7,.0f}" for at_once in AT_ONCE]))
    if picture is not None:
        draw(rates, picture)


def draw(rates: dict[str, dict[int, float]], picture: Path) -> None:
    """Draw rows a second against the number at once."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for name, found in rates.items():
        ours = "fluxibly" in name or "AsyncLLM" in name
        axes.plot([*found], [*found.values()], marker="o", label=name, linewidth=2.5 if ours else 1.2)
    axes.plot(
        AT_ONCE, [at_once / ANSWER_TAKES for at_once in AT_ONCE], "k:", linewidth=1, label="what the server allows"
    )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="calls at once",
        ylabel="rows a second",
        title="Answers of 0.2 s, one process",
    )
    axes.set_xticks(AT_ONCE, [f"{at_once:,}" for at_once in AT_ONCE])
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(picture, dpi=110)
    print(f"wrote {picture}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plot", type=Path, help="a file to draw rows a second into, such as batches.png")
    parser.add_argument("--peers", action="append", default=[], metavar="PYTHON", help="an interpreter with peers")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    given, _ = parser.parse_known_args()
    if given.child:
        name, url, rows, at_once = given.child
        child(name, url, int(rows), int(at_once))
        return
    pythons, missing = interpreters(given.peers)
    costs(pythons)
    curve(pythons, given.plot)
    left_out(missing)


if __name__ == "__main__":
    main()
