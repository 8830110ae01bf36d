"""Middleware that records calls in a file, for tests and demos without a network."""

from __future__ import annotations

import attrs

from fluxibly._checks import validator
from fluxibly.flow import CallNext, Flow, provider_of
from fluxibly.middleware._copies import Rebuilt
from fluxibly.middleware._recorder import Recorder
from fluxibly.middleware._recording import RecordingFile, check_file, to_file
from fluxibly.types import Request, Response


@attrs.frozen(eq=False)
class Record(Rebuilt):
    """Middleware that appends each exchange to a file, from which `Replay` answers later calls.

    The file has a JSON object a line, which a person can read: the request, and the chunks with their times, the whole
    answer, or the error with the chunks before it. **Prompts and answers stand in it in clear**; when it is new, only its
    owner may read it. API keys and secret headers are left out, and the messages of errors are masked as in logs.

    Outside of `Retry`, it records what comes of a call; inside, each attempt. A stream that its consumer leaves, or that is
    cancelled, is recorded as far as it came if that was output. A call that cannot be recorded goes on all the same, which
    is reported once on standard error. Any number of threads and processes may record to one file.

    Args:
        file: the path of the file, in a folder that exists.

    Raises:
        ConfigError: the folder does not exist, or the path is that of a folder.
        ValueError: `file` is not a path.
    """

    file: str = attrs.field(converter=to_file, validator=validator(check_file))
    _file: RecordingFile = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        file = RecordingFile(self.file, "Record")
        file.check_folder()
        object.__setattr__(self, "_file", file)

    def __call__(self, request: Request, call_next: CallNext) -> Flow[Response]:
        info = yield from provider_of(request)
        return (yield from Recorder(request, info, self._file).over(call_next))
