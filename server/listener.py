"""The HTTP servers on the bound socket: a small one while the engine starts, then the real one."""

from __future__ import annotations

import contextlib
import math
import threading
from typing import TYPE_CHECKING, Any

import uvicorn
import vllm.envs

from sliceserve.server import vllm_compat
from sliceserve.server.protocol import BoundedProtocol

if TYPE_CHECKING:
    import argparse
    import socket
    from collections.abc import Generator, Iterator

    from starlette.types import ASGIApp

# Seconds that a connection has to take the end of its answer once the engine has stopped.
LAST_BYTES_S = 5


class Listener(uvicorn.Server):
    """An HTTP server that leaves signals to its owner."""

    def linger(self, seconds: float) -> None:
        """Give connections at least so long to take what is written once the server is to exit."""
        least = self.config.timeout_graceful_shutdown or 0
        self.config.timeout_graceful_shutdown = max(least, math.ceil(seconds))

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Install no handlers."""
        yield


def make_listener(app: ASGIApp, args: argparse.Namespace, **options: Any) -> Listener:
    """Return a server with vLLM's HTTP and TLS options, for which it has yet to run."""
    log_config = vllm_compat.uvicorn_log_config(args)
    if log_config is not None:
        options["log_config"] = log_config
    config = uvicorn.Config(
        app,
        http=BoundedProtocol,
        host=args.host,
        port=args.port,
        log_level=args.uvicorn_log_level,
        access_log=not args.disable_uvicorn_access_log,
        h11_max_incomplete_event_size=args.h11_max_incomplete_event_size,
        timeout_keep_alive=vllm.envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE,
        timeout_graceful_shutdown=LAST_BYTES_S,
        ssl_keyfile=args.ssl_keyfile,
        ssl_certfile=args.ssl_certfile,
        ssl_ca_certs=args.ssl_ca_certs,
        ssl_cert_reqs=args.ssl_cert_reqs,
        ssl_ciphers=args.ssl_ciphers,
        **options,
    )
    # `BoundedProtocol` reads it here; uvicorn has no argument for it.
    config.h11_max_header_count = args.h11_max_header_count  # type: ignore[attr-defined]
    config.load()
    return Listener(config)


@contextlib.contextmanager
def listening(app: ASGIApp, args: argparse.Namespace, bound: socket.socket) -> Iterator[None]:
    """Serve the application on the socket from a thread of its own for the time of the block.

    The start of the engine blocks its thread. The socket itself stays open after the block: who
    connects meanwhile waits for the next listener.
    """
    listener = make_listener(app, args, loop="asyncio", lifespan="off")
    thread = threading.Thread(
        target=listener.run, kwargs={"sockets": [bound.dup()]}, name="start-up", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        listener.should_exit = True
        thread.join(2 * LAST_BYTES_S)
