"""The command `fluxibly serve`: a model and its stack behind OpenAI's API."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from fluxibly.llm import AsyncLLM
from fluxibly.providers.local import model_path
from fluxibly.serve import application
from fluxibly.serve._server import listen, run

if TYPE_CHECKING:
    from fluxibly.config import LLMConfig


def serve(
    config: LLMConfig,
    *,
    host: str,
    port: int,
    token: str | None,
    models: Sequence[str],
    pass_extra: bool,
    hosts: Sequence[str],
    say: Callable[[str], None],
) -> None:
    """Serve until Ctrl-C. `say` prints the line that says where.

    Raises:
        ConfigError: the configuration or the address is wrong.
        KeyboardInterrupt: Ctrl-C has ended the server.
    """
    llm = AsyncLLM(config)
    if config.framework == "local":
        model_path(config.model)  # a client must not wait for a download
    address = listen(host, port, public=token is not None)
    allowed = ["localhost", "127.0.0.1", "::1", host, *hosts] if address.is_loopback else None
    app = application(llm, token=token, hosts=allowed, models=models, pass_extra=pass_extra)
    for name in ("uvicorn", "uvicorn.error", "asyncio"):
        logger = logging.getLogger(name)
        logger.propagate = False
        logger.handlers[:] = logging.getLogger("fluxibly").handlers
    line = f"listening at {address.url}, base_url={address.url}/v1"
    run(app, address, started=lambda: say(line))
