"""`Cache` with answers in a file or in a user's store: whatever becomes of the store, the calls go on."""

from __future__ import annotations

import subprocess
import sys
import time

import attrs
import pytest
from hypothesis import given, settings, strategies as st
from support import strategies
from support.calling import REQUEST, call
from support.rich import answered, rich
from support.stores import SlowStore

from fluxibly._logs import forget_reports
from fluxibly.errors import DeadlineExceeded, FluxiblyError
from fluxibly.middleware import Cache, Deadline, Validation
from fluxibly.middleware._answer_bytes import from_bytes, to_bytes
from fluxibly.middleware._answers import Answer, Pieces
from fluxibly.stores import Entry, MemoryStore, SQLiteStore, sqlite
from fluxibly.testing import Delay, check_middleware
from fluxibly.testing.modes import MODES
from fluxibly.types import CallRecord, Chunk, Response

SYNC = MODES[0]


@pytest.fixture(autouse=True)
def _afresh():
    forget_reports()


@pytest.fixture
def url(tmp_path):
    return f"sqlite:{tmp_path / 'answers.db'}"


def cached(store, **settings):
    return Cache(store, namespace="n", **settings)


class TestFiles:
    def test_keep_answers(self, mode, later, url):
        """Another instance, as in another program, has them."""
        first = call(mode, cached(url), rich())
        hit = call(later, cached(url))
        assert hit.response == first.response
        assert (hit.response.cache_hit, hit.response.details) == (True, {"sources": ["a"]})
        assert (hit.response.request_id, hit.response.rate_limits) == (None, {})
        if later.streaming:
            assert answered(hit.ran.events) == first.response
        if later.streaming and mode.streaming:
            assert hit.ran.events == first.ran.events

    def test_keep_the_pace(self, stream_mode, url):
        call(stream_mode, cached(url), ["one ", Delay(2), "two"])
        assert call(stream_mode, cached(url, pace=True)).clock.sleeps == pytest.approx([2])

    def test_of_other_namespaces(self, mode, url):
        call(mode, Cache(url, namespace="a"), "one")
        assert call(mode, Cache(url, namespace="b"), "two").response.text == "two"
        assert call(mode, Cache(url, namespace="a")).response.text == "one"

    def test_of_parsed_answers(self, mode, later, url):
        """An object of a class is made again from the text, by the schema that the stack has now."""

        @attrs.frozen
        class Person:
            name: str

        @attrs.frozen
        class Older:
            name: str
            age: int

        call(mode, [cached(url), Validation(schema=Person)], '{"name": "Ada"}')
        assert call(later, [cached(url), Validation(schema=Person)]).response.parsed == Person("Ada")
        changed = call(later, [cached(url), Validation(schema=Older)], '{"name": "Ada", "age": 36}')
        assert changed.response.parsed == Older("Ada", 36)
        schema = {"type": "object"}
        request = REQUEST.evolve(messages="As JSON")
        call(mode, [cached(url), Validation(schema=schema)], '{"a": [1]}', request=request)
        assert call(later, [cached(url)], request=request).response.parsed == {"a": [1]}

    def test_ttl(self, mode, url, monkeypatch):
        """Times are the system's, so that processes agree; a clock that jumps breaks nothing."""
        now = [1e9]
        monkeypatch.setattr(sqlite, "_now", lambda: now[0])
        call(mode, cached(url, ttl=10), "one")
        now[0] += 9
        assert call(mode, cached(url, ttl=10)).response.text == "one"
        now[0] -= 10**6
        assert call(mode, cached(url, ttl=10)).response.text == "one"
        now[0] += 10**6 + 2
        assert call(mode, cached(url, ttl=10), "two").response.text == "two"

    def test_max_bytes(self, mode, url):
        cache = cached(url, max_bytes=3000)
        call(mode, cache, "x" * 4000)
        assert call(mode, cache, "two").response.text == "two"
        for number in range(20):
            call(mode, cache, "x" * 500, request=REQUEST.evolve(messages=f"{number}"))
        assert call(mode, cache, "three").response.text == "three"

    def test_that_are_damaged(self, mode, url, tmp_path, capsys):
        """The call goes on, and so does the cache, with a new file."""
        (tmp_path / "answers.db").write_bytes(b"no database " * 1000)
        assert call(mode, cached(url), "one").response.text == "one"
        assert call(mode, cached(url)).response.text == "one"
        assert (tmp_path / "answers.db.broken-1").exists()
        assert capsys.readouterr().err.count("is damaged") == 1

    def test_that_are_full(self, mode, tmp_path, capsys):
        """It is said once, and what is there is answered from it."""
        store = SQLiteStore(tmp_path / "answers.db")
        cache = cached(store)
        call(mode, cache, "one")
        store.save("x", b"x", None, 0.0)
        db = store._file.writer.connection
        [(pages,)] = db.execute("PRAGMA page_count").fetchall()
        db.execute(f"PRAGMA max_page_count = {pages}")
        for number in range(2):
            request = REQUEST.evolve(messages=f"Other {number}")
            assert len(call(mode, cache, "x" * 100_000, request=request).response.text) == 100_000
        assert call(mode, cache).response.text == "one"
        assert capsys.readouterr().err.count("Cache: its store SQLiteStore failed with DiskFull") == 1

    def test_whose_folder_is_gone(self, mode, tmp_path, capsys):
        folder = tmp_path / "gone"
        folder.mkdir()
        cache = cached(f"sqlite:{folder / 'answers.db'}")
        folder.rmdir()
        for text in ("one", "two"):
            assert call(mode, cache, text).response.text == text
        assert capsys.readouterr().err.count("Cache: its store SQLiteStore failed with FileNotFoundError") == 1

    def test_that_two_processes_have(self, tmp_path):
        """Answers of one are hits of the other, while both write."""
        script = """
import sys
from fluxibly import Pipeline, Request
from fluxibly.middleware import Cache
class Provider:
    def complete(self, request):
        return f"answer to {request.messages[0].text}"
pipeline = Pipeline(Provider(), [Cache(sys.argv[1], namespace="n")], framework="same")
sys.stdin.readline()
hits = 0
for number in range(60):
    response = pipeline.complete(Request(model="m", messages=f"{number}"))
    assert response.text == f"answer to {number}"
    hits += response.cache_hit
print(hits)
"""
        url = f"sqlite:{tmp_path / 'answers.db'}"
        command = [sys.executable, "-c", script, url]
        both = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)]
        for process in both:
            process.stdin.write(b"go\n")
            process.stdin.flush()
        assert [process.communicate(timeout=60)[0].strip().isdigit() for process in both] == [True, True]
        done = subprocess.run(command, input=b"go\n", capture_output=True, timeout=60, check=True)
        assert done.stdout.strip() == b"60"

    def test_it_keeps_the_laws(self, url):
        check_middleware(cached(url))


class Stored:
    """A user's store with the two methods that are needed, and a value that it always has."""

    def __init__(self, value=None, *, local):
        self.value = value
        self.local = local
        self.saved = []

    def load(self, key, now):
        return self.value

    def save(self, key, value, seconds, now):
        self.saved.append((key, value, seconds))

    async def aload(self, key, now):
        return self.load(key, now)

    async def asave(self, key, value, seconds, now):
        self.save(key, value, seconds, now)


class Failing(Stored):
    def __init__(self, *methods, local):
        super().__init__(local=local)
        self.methods = methods

    def load(self, key, now):
        if "load" in self.methods:
            raise ConnectionError("secret address")

    def save(self, key, value, seconds, now):
        if "save" in self.methods:
            raise ConnectionError("secret address")


@pytest.fixture(params=[True, False], ids=["local", "far"])
def local(request):
    return request.param


class TestStores:
    def test_get_bytes_and_times(self, mode, local):
        store = Stored(local=local)
        call(mode, cached(store, ttl=7), "one")
        [(key, value, seconds)] = store.saved
        assert key.startswith("answer ")
        assert (type(value), seconds) == (bytes, 7)

    @pytest.mark.parametrize("methods", [("load",), ("save",), ("load", "save")], ids=" and ".join)
    def test_that_fail(self, mode, local, methods, capsys):
        """It is said once, without what the error says, and the calls go on as if nothing were known."""
        cache = cached(Failing(*methods, local=local))
        for text in ("one", "two"):
            assert call(mode, cache, text).response.text == text
        said = capsys.readouterr().err
        assert said == (
            "fluxibly: Cache: its store Failing failed with ConnectionError; until it works again, Cache lets calls pass\n"
        )

    def test_that_work_again(self, mode):
        """A store that fails is asked again after a while, and not by every call."""
        store = SlowStore()
        store.fails = lambda method: ConnectionError() if method == "load" else None
        cache = cached(store)
        call(mode, cache, "one")
        store.fails = lambda method: None
        assert call(mode, cache, "two").response.text == "two"
        assert store.asked == ["load", "save", "save"]

    @pytest.mark.parametrize(
        "value",
        [b"", b"\xff", b"{}", b"[1, {}, false]", b'[9, {"text": "x"}, false]\nnull', b"[1]\n" * 2, None, 3, "x"],
    )
    def test_that_have_something_else(self, mode, local, value, capsys):
        """What cannot be read is no answer."""
        store = Stored(Entry(value, 5.0), local=local)
        made = call(mode, cached(store), "one")
        if value == b"[1, {}, false]" and not mode.streaming:
            assert made.response.text == ""  # an answer, though an empty one
        else:
            assert made.response.text == "one"
            assert "an answer in the store cannot be read" in capsys.readouterr().err

    def test_that_take_their_time(self, mode):
        """A deadline that passes while the answer is saved does not lose the answer."""
        cache = cached(SlowStore())
        made = call(mode, [Deadline(60), cache], "one")
        assert made.response.text == "one"

    @pytest.mark.parametrize("backend", ["asyncio", "trio"])
    def test_a_deadline_while_saving(self, backend):
        """The answer is there, so the call has it."""
        import anyio

        from fluxibly.pipeline import AsyncPipeline
        from fluxibly.testing.modes import run_async

        class Provider:
            async def complete(self, request):
                return "one"

        store = SlowStore(0.0)

        async def main():
            async def asave(*_):
                await anyio.sleep(5)

            store.asave = asave
            pipeline = AsyncPipeline(Provider(), [cached(store)])
            began = time.monotonic()
            response = await pipeline.complete(REQUEST, timeout=0.2)
            return response.text, time.monotonic() - began

        text, took = run_async(main, backend)
        assert text == "one"
        assert took < 3

    @pytest.mark.parametrize("backend", ["asyncio", "trio"])
    def test_a_deadline_while_loading(self, backend):
        import anyio

        from fluxibly.pipeline import AsyncPipeline
        from fluxibly.testing.modes import run_async

        class Provider:
            async def complete(self, request):
                return "one"

        store = SlowStore(0.0)

        async def main():
            async def aload(*_):
                await anyio.sleep(5)

            store.aload = aload
            with pytest.raises(DeadlineExceeded):
                await AsyncPipeline(Provider(), [cached(store)]).complete(REQUEST, timeout=0.1)

        run_async(main, backend)

    def test_answers_that_are_not_data(self, mode, capsys):
        """They are not kept, which is said once."""

        def parsing(request, call_next):
            response = yield from call_next(request)
            return response.evolve(details={"when": time})

        cache = cached(MemoryStore())
        for text in ("one", "two"):
            assert call(mode, [cache, parsing], text).response.text == text
        assert capsys.readouterr().err.count("Cache: an answer cannot be kept (TypeError)") == 1


class TestBytes:
    @given(strategies.good_scripts)
    @settings(max_examples=60)
    def test_of_any_answer(self, script):
        """An answer comes back from its bytes, with its chunks."""
        chunks = [step if isinstance(step, Chunk) else Chunk(step) for step in script if not isinstance(step, Delay)]
        response = answered(chunks)
        answer = Answer.of(
            response, CallRecord(), Pieces.of(chunks, [float(n) for n in range(len(chunks))], response.text)
        )
        again = from_bytes(to_bytes(answer), streamed=True, parse=str)
        assert again.response == answer.response == response
        assert [*again.pieces] == [*answer.pieces] == chunks
        assert from_bytes(to_bytes(answer), streamed=False, parse=str).pieces is None

    @pytest.mark.parametrize("text", ["\ud800 half", "line\nbreak\u2028", "\x00", "☃" * 10])
    def test_of_any_text(self, text):
        answer = Answer.of(
            Response(text, details={"p": float("-inf")}), CallRecord(), Pieces.of([Chunk(text)], [0.0], text)
        )
        again = from_bytes(to_bytes(answer), streamed=True, parse=str)
        assert again.response.text == text
        assert again.response.details == {"p": float("-inf")}
        assert [*again.pieces] == [Chunk(text)]

    @given(st.data())
    @settings(max_examples=150)
    def test_that_are_damaged(self, data):
        """Whatever is wrong with them raises a plain error, and never gives another text."""
        chunks = rich()
        chunks = [step if isinstance(step, Chunk) else Chunk(step) for step in chunks]
        response = answered(chunks)
        good = to_bytes(Answer.of(response, CallRecord(), Pieces.of(chunks, [0.0] * len(chunks), response.text)))
        at = data.draw(st.integers(0, len(good) - 1))
        bad = good[:at] + data.draw(st.binary(max_size=3)) + good[at + data.draw(st.integers(0, 3)) :]
        try:
            answer = from_bytes(bad, streamed=True, parse=str)
        except (ValueError, TypeError, AttributeError, KeyError):
            return
        assert isinstance(answer.response, Response)
        if answer.pieces is not None:
            assert all(isinstance(chunk, Chunk) for chunk in answer.pieces)

    @given(strategies.chunks)
    def test_of_chunks(self, chunk):
        chunk = chunk if isinstance(chunk, Chunk) else Chunk(chunk)
        assert Chunk.from_dict(chunk.to_dict()) == chunk


def test_it_is_never_an_error_of_the_call(mode, local):
    """Not even of the library's own kind."""

    class Odd(Failing):
        def load(self, key, now):
            raise FluxiblyError("odd")

    assert call(mode, cached(Odd(local=local)), "one").response.text == "one"
