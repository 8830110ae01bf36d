"""llama.cpp in this process: models that are loaded once and shared, and threads that generate the answers.

The library pushes: it calls a callback with each event, and stops when the callback returns True. The rest of fluxibly
pulls. Between them is a `Generation`: a thread with a bounded queue. The library swallows a callback's exceptions, so
the callback raises none; errors travel through the queue. A thread that still generates during interpreter shutdown
crashes the process, so running generations are stopped at exit.
"""

from __future__ import annotations

import atexit
import os
import secrets
import threading
from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakSet, WeakValueDictionary

import attrs

from fluxibly._checks import text, whole
from fluxibly._extras import pip_install
from fluxibly.errors import ConfigError, ProviderError, RequestTimeout
from fluxibly.providers.local._model import has_tools_in_template
from fluxibly.providers.local._tools import TEMPLATE

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

QUEUE_LIMIT = 64
"""The number of events that wait for a slow consumer before the callback itself waits."""
OWN_TEMPLATE = "model"
TOOLS_TEMPLATE = "tools"
DEFAULT_TEMPLATE = "chatml"


def default_threads() -> int:
    """Return half of the processors this process may use, at most 4. llama.cpp almost stalls if all are busy."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(4, usable // 2))


@attrs.frozen(kw_only=True)
class Settings:
    """The settings for loading a model. In a configuration they are keys of `additional_params`.

    Args:
        n_ctx: the maximum number of tokens in the prompt and the answer together.
        n_threads: the number of processor threads; by default half of the processors, at most 4.
        n_batch: the number of prompt tokens processed at a time; a call can be cancelled between two batches.
        n_parallel: the number of answers generated at once, which share `n_ctx`; further calls wait.
        n_gpu_layers: the number of layers to put on a GPU, if xllamacpp was built for GPUs (-1: as many as fit).
        chat_template: the name of a template of llama.cpp, a Jinja template, "model" for the file's own template, or "tools"
            for ChatML with tools.

    """

    n_ctx: int = 4096
    n_threads: int = attrs.field(factory=default_threads)
    n_batch: int = 64
    n_parallel: int = 1
    n_gpu_layers: int = -1
    chat_template: str = DEFAULT_TEMPLATE

    def __attrs_post_init__(self) -> None:
        least = {"n_ctx": 64, "n_threads": 1, "n_batch": 1, "n_parallel": 1, "n_gpu_layers": -1}
        found = [whole(f"additional_params.{name}", getattr(self, name), low) for name, low in least.items()]
        found.append(text("additional_params.chat_template", self.chat_template))
        problems = [each for each in found if each is not None]
        if problems:
            raise ConfigError.of(problems)

    @property
    def takes_tools(self) -> bool:
        """Whether the template may mention tools. The named templates of llama.cpp do not."""
        return self.chat_template in (OWN_TEMPLATE, TOOLS_TEMPLATE) or "tools" in self.chat_template


SETTINGS = frozenset(field.name for field in attrs.fields(Settings))


def settings_of(params: Mapping[str, Any]) -> Settings:
    """Return the settings in a configuration's `additional_params`. The rest goes into the body of each request."""
    return Settings(**{name: value for name, value in params.items() if name in SETTINGS})


class Engine:
    """A loaded model. Get it from `load`, which shares it."""

    def __init__(self, path: Path, settings: Settings, alias: str) -> None:
        self.pid = os.getpid()
        library = _library()
        params = library.CommonParams()
        params.model.path = str(path)
        params.model_alias = {alias}
        params.n_ctx = settings.n_ctx
        params.n_parallel = settings.n_parallel
        params.n_batch = params.n_ubatch = settings.n_batch
        params.n_gpu_layers = settings.n_gpu_layers
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings.n_threads
        template = settings.chat_template
        if template != OWN_TEMPLATE:
            params.chat_template = TEMPLATE if template == TOOLS_TEMPLATE else template
        self.takes_tools = settings.takes_tools and (template != OWN_TEMPLATE or has_tools_in_template(path))
        params.cache_ram_mib = 0  # the default caches up to 8 GB of old prompts
        params.verbosity = -1
        params.offline = True
        params.ui = False
        params.api_keys = [secrets.token_hex(16)]  # the server always opens a loopback port
        params.endpoint_metrics = True
        try:
            self.server = _start(library, params)
        except RuntimeError as error:
            wrong = "" if template == DEFAULT_TEMPLATE else ", or chat_template is invalid"
            raise ProviderError(
                f"llama.cpp could not load {path.name}: the file is damaged, in an unknown format, or too large for "
                f"the memory with n_ctx={settings.n_ctx}{wrong}",
                provider="local",
                model=alias,
            ) from error


def _start(library: Any, params: Any) -> Any:
    """Return a server whose thread is running.

    A server that is freed before its own thread has started to work waits for that thread forever. So the server must
    answer a request from its thread before it can be freed. It is created in a separate thread, where no Ctrl-C
    arrives: Ctrl-C ends only the wait for the server here.
    """
    made: Future[Any] = Future()

    def start() -> None:
        try:
            server = library.Server(params)
            server.handle_metrics()
        except BaseException as error:  # noqa: BLE001  # raised where the server is awaited
            made.set_exception(error)
        else:
            made.set_result(server)

    threading.Thread(target=start, name="fluxibly-local-load").start()
    return made.result()


def missing() -> ConfigError:
    """Return the error for an environment without xllamacpp."""
    return ConfigError(f"the framework 'local' needs xllamacpp, which is not installed: {pip_install('local')}")


def _library() -> Any:
    try:
        import xllamacpp  # type: ignore[import-untyped]
    except ImportError as error:
        raise missing() from error
    return cast("Any", xllamacpp)


_engines: WeakValueDictionary[tuple[object, ...], Engine] = WeakValueDictionary()
_loading = threading.Lock()
_starting = threading.Lock()
"""Protects `_threads` and `_running`. It is held for a moment only, so a generation starts while a model is loaded."""
_inherited: list[object] = []


def load(path: Path, settings: Settings, alias: str) -> Engine:
    """Return the model of this file with these settings. All holders share it, and it is freed with the last holder."""
    key = (path, settings, alias)
    with _loading:
        engine = _engines.get(key)
        if engine is None:
            engine = _engines[key] = Engine(path, settings, alias)
        return engine


def _after_fork() -> None:
    """Set the parent's engines aside in a forked child: without their threads, using or freeing them would hang."""
    global _loading, _starting  # another thread may have held them during the fork
    _loading, _starting = threading.Lock(), threading.Lock()
    _inherited.extend(_engines.values())
    _engines.clear()
    _running.clear()
    _threads.clear()


_running: WeakSet[Generation] = WeakSet()
_threads: set[threading.Thread] = set()
"""The threads of generations. The last holder of an engine may be such a thread, which then frees the engine."""


class Stopped(Exception):  # not a failure
    """The end of a generation that was stopped from elsewhere while it was being read."""


class Generation:
    """An answer that is being generated. Call `next_event` from a single thread; `stop` is safe from any thread."""

    def __init__(self, engine: Engine, body: dict[str, Any]) -> None:
        self._engine = engine
        self._body = body
        self._ready = threading.Condition()
        self._events: deque[dict[str, Any]] = deque()
        self._error: Exception | None = None
        self._over = False
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="fluxibly-local", daemon=True)

    def start(self) -> None:
        """Start to generate, in a separate thread."""
        with _starting:
            _threads.difference_update([thread for thread in _threads if not thread.is_alive()])
            self._thread.start()
            _threads.add(self._thread)
            _running.add(self)

    def next_event(self, timeout: float | None) -> dict[str, Any] | None:
        """Return the next event, or None after the last event.

        Raises:
            RequestTimeout: no event came within `timeout` seconds.
            Stopped: `stop` was called.
            Exception: an error of the library; a ValueError or RuntimeError means that it refuses the request.

        """
        with self._ready:
            if not self._ready.wait_for(lambda: self._events or self._over or self._stopped, timeout):
                raise RequestTimeout
            if self._stopped:
                raise Stopped
            if self._events:
                event = self._events.popleft()
                self._ready.notify_all()
                return event
            if self._error is not None:
                raise self._error
            return None

    def stop(self) -> None:
        """Make the library stop before the next token, without waiting for it."""
        with self._ready:
            self._stopped = True
            self._events.clear()
            self._ready.notify_all()

    def join(self) -> None:
        """Wait for the end of the thread."""
        self._thread.join()

    def _run(self) -> None:
        try:
            self._engine.server.handle_chat_completions(self._body, self._take)
        except Exception as error:  # noqa: BLE001  # raised where the events are read
            self._error = error
        finally:
            with self._ready:
                self._over = True
                self._ready.notify_all()

    def _take(self, event: dict[str, Any]) -> bool:
        """Take an event from the library, as its callback. Return True to stop the library."""
        with self._ready:
            self._ready.wait_for(lambda: self._stopped or len(self._events) < QUEUE_LIMIT)
            if not self._stopped:
                self._events.append(event)
                self._ready.notify_all()
            return self._stopped


def _stop_all() -> None:
    for generation in list(_running):
        generation.stop()
    for thread in list(_threads):
        thread.join()


atexit.register(_stop_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
