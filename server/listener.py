"""The HTTP servers on the bound socket: a small one while the engine starts, then the real one."""

from __future__ import annotations

import contextlib
import math
import ssl
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn
import vllm.envs

from sliceserve.server import vllm_compat
from sliceserve.server.logs import hide_queries, websocket_protocol
from sliceserve.server.protocol import BoundedProtocol
from sliceserve.slicing.errors import UserError, reading

if TYPE_CHECKING:
    import argparse
    import socket
    from collections.abc import Callable, Generator, Iterator

    from starlette.types import ASGIApp

# Seconds that a connection has to take the end of its answer once the engine has stopped.
LAST_BYTES_S = 5
_NEED_CERTIFICATE = (
    "ssl_keyfile", "ssl_ca_certs", "ssl_cert_reqs", "ssl_ciphers", "enable_ssl_refresh",
)  # fmt: skip


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


def check_tls(args: argparse.Namespace) -> None:
    """Refuse TLS options that uvicorn would fail on, or that would do nothing.

    Raises:
        UserError: an option without the one it needs, a file or a value that is of no use.

    """
    certificate, key, ciphers = args.ssl_certfile, args.ssl_keyfile, args.ssl_ciphers
    if not certificate:
        for name in _NEED_CERTIFICATE:
            if value := getattr(args, name):
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{flag} {value}: there is no --ssl-certfile, so no TLS either")
        return
    _check_client_certificates(args.ssl_ca_certs, args.ssl_cert_reqs)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # OpenSSL does not say which file it could not open.
    for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs"):
        if file := getattr(args, name):
            with reading(f"--{name.replace('_', '-')} {file}"):
                Path(file).read_bytes()
    pair = f"--ssl-certfile {certificate}" + (f" --ssl-keyfile {key}" if key else "")
    with _loading(f"{pair}: this is no certificate with its unencrypted key in PEM"):
        # Without this function OpenSSL asks a terminal, each time it reads the key.
        context.load_cert_chain(certificate, key, password=lambda: "")
    if args.ssl_ca_certs:
        with _loading(f"--ssl-ca-certs {args.ssl_ca_certs}: there is no certificate in PEM in it"):
            context.load_verify_locations(args.ssl_ca_certs)
    if ciphers:
        with _loading(f"--ssl-ciphers {ciphers}: OpenSSL has none of these"):
            context.set_ciphers(ciphers)


def _check_client_certificates(authorities: str | None, wanted: int) -> None:
    if wanted not in tuple(ssl.VerifyMode):
        raise UserError(f"--ssl-cert-reqs {wanted}: it is 0, 1 or 2")
    if authorities and not wanted:
        raise UserError(
            f"--ssl-ca-certs {authorities}: without --ssl-cert-reqs 2 (or 1) no client is asked "
            "for a certificate"
        )
    if wanted and not authorities:
        raise UserError(
            f"--ssl-cert-reqs {wanted}: there is no --ssl-ca-certs, so no client's certificate "
            "would be valid"
        )


@contextlib.contextmanager
def _loading(complaint: str) -> Iterator[None]:
    try:
        yield
    except ssl.SSLError as error:
        raise UserError(complaint) from error


def make_listener(
    app: ASGIApp,
    args: argparse.Namespace,
    refused_head: Callable[[int], None] | None = None,
    **options: Any,
) -> Listener:
    """Return a server with vLLM's HTTP and TLS options, for which it has yet to run.

    Args:
        app: what it serves.
        args: vLLM's options.
        refused_head: is told the status of each head that the server refuses itself.
        options: of `uvicorn.Config`.

    """
    log_config = vllm_compat.uvicorn_log_config(args)
    if log_config is not None:
        options["log_config"] = log_config
    config = uvicorn.Config(
        app,
        interface="asgi3",  # uvicorn takes what is no coroutine function for an older one
        http=BoundedProtocol,
        ws=websocket_protocol(),
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
    # `BoundedProtocol` reads them here; uvicorn has no arguments for them.
    config.h11_max_header_count = args.h11_max_header_count  # type: ignore[attr-defined]
    config.refused_head = refused_head  # type: ignore[attr-defined]
    config.load()
    hide_queries()
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
