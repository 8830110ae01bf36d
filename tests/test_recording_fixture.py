"""The pytest fixture `recording`: tests that record a real server's answers, and pass without it afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.canned_server import canned_server

ROOT = Path(__file__).parents[1]
CONFTEST = 'pytest_plugins = ["fluxibly.testing.pytest_plugin"]\n'
TESTS = """
import os
import pytest
from fluxibly import AsyncLLM, LLM, LLMConfig
from fluxibly.errors import RateLimitError

CONFIG = LLMConfig(framework="openai", model="gpt-4o", api_base=os.environ["SERVER"], api_key="sk-any-key")

def test_whole(recording):
    with LLM(CONFIG, [recording]) as llm:
        assert llm.complete("Hello there").text == "You said: Hello there"

class TestStreams:
    @pytest.mark.parametrize("words", ["one", "two/Zwei", "a" * 200, "a" * 201], ids=str)
    def test_stream(self, words, recording):
        with LLM(CONFIG, [recording]) as llm, llm.stream(words) as stream:
            assert "".join(map(str, stream)) == f"You said: {words}"

def test_async(recording):
    import asyncio

    async def main():
        async with AsyncLLM(CONFIG, [recording]) as llm:
            return (await llm.complete("Hi")).text

    assert asyncio.run(main()) == "You said: Hi"

def test_without():
    pass
"""


@pytest.fixture
def project(tmp_path):
    """Return a function that runs pytest in a project, and returns its outcome counts and output."""
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_it.py").write_text(TESTS)
    with canned_server() as server:
        url = f"{server.url}/v1"

    def run_tests(*arguments, server=url):
        env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "COV"))}
        env["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # they take seconds
        path = os.pathsep.join(filter(None, (str(ROOT), env.get("PYTHONPATH"))))
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", *arguments],
            cwd=tmp_path,
            env={**env, "SERVER": server, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    return run_tests


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_record_and_replay(project, tmp_path):
    """Recorded with a server, the tests pass when it is gone. What is missing is said, with what to do."""
    folder = tmp_path / "recordings" / "test_it"
    with canned_server() as server:
        url = f"{server.url}/v1"
        status, output = project("-k", "whole", server=url)
        assert (status, "there is no file" in output, server.seen, folder.exists()) == (1, True, [], False)
        status, output = project("--llm-record=missing", server=url)
        assert (status, len(server.seen)) == (0, 6), output
        for _ in range(2):  # each begins the file anew
            status, output = project("--llm-record=all", "-k", "whole", server=url)
            assert status == 0, output
        assert len(server.seen) == 8
    status, output = project(server=url)
    assert status == 0, output
    assert "7 passed" in output
    one, long, longer, other, whole_async, whole = names(folder)
    assert one == "TestStreams.test_stream-" + "a" * 76 + one[100:]
    assert (len(one), len(long), one != long) == (115, 115, True)
    assert longer == "TestStreams.test_stream-one.jsonl"
    assert other.startswith("TestStreams.test_stream-two_Zwei-")
    assert (whole_async, whole) == ("test_async.jsonl", "test_whole.jsonl")
    (line,) = (folder / whole).read_text().splitlines()
    assert json.loads(line)["answer"]["text"] == "You said: Hello there"
    assert "sk-any-key" not in "".join(path.read_text() for path in folder.iterdir())
    (folder / whole).write_text(line.replace('"key": "', '"key": "0'))
    (folder / whole_async).unlink()
    status, output = project(server=url)
    assert (status, "2 failed, 5 passed" in output) == (1, True)
    assert "differs only in what is not shown there" in output
    assert "there is no file" in output
    assert output.count("; run pytest --llm-record=missing to record it") >= 2


@pytest.mark.parametrize(
    ("node", "name"),
    [
        ("test_a", "test_a"),
        ("TestA::test_b", "TestA.test_b"),
        ("test_a[gpt-4o-0.5]", "test_a-gpt-4o-0.5"),
        ("test_a[x/y]", "test_a-x_y-*"),
        ("test_a[x y]", "test_a-x_y-*"),
        ("test_a[A]", "test_a-A-*"),
        ("test_a[..]", "test_a--*"),
        ("test_ä", "test__-*"),
        ("test_a[" + "b" * 300 + "]", "test_a-" + "b" * 93 + "-*"),
        ("test_a[a::b]", "test_a-a__b-*"),
        ("test_a[b[c]]", "test_a-b_c_-*"),
    ],
)
def test_names(node, name):
    """A name is safe, and one that differs from its test's has a hash of it."""
    from fluxibly.testing.pytest_plugin import recording_of

    class Item:
        path = Path("/tests/test_x.py")
        nodeid = f"tests/test_x.py::{node}"

    file = recording_of(Item())
    assert file.parent == Path("/tests/recordings/test_x")
    begin, star, _ = name.partition("*")
    assert (file.stem[: len(begin)], len(file.stem)) == (begin, len(begin) + (8 if star else 0))
