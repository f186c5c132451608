"""TLS files that are read again when they change, while the server runs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    import uvicorn

_logger = logging.getLogger("vllm.sliceserve.certificates")

# By looking, as what tells of changes loses a file that another takes the place of: vLLM's own
# refresher sees the first rotation of a Kubernetes Secret and no later one.
INTERVAL_S = 5.0


@contextlib.contextmanager
def refreshing_certificates(config: uvicorn.Config, args: argparse.Namespace) -> Iterator[None]:
    """Load changed TLS files anew for the time of the block, if the options ask for it.

    New connections get the new certificate. Files of no use, such as a certificate whose key is
    yet to come, change nothing. Must run inside an event loop.

    Args:
        config: of the server, loaded.
        args: vLLM's options.

    """
    if not args.enable_ssl_refresh or config.ssl is None:
        yield
        return
    watching = asyncio.ensure_future(_watch(config.ssl, args))
    try:
        yield
    finally:
        watching.cancel()


async def _watch(context: ssl.SSLContext, args: argparse.Namespace) -> None:
    files = [
        Path(file) for file in (args.ssl_certfile, args.ssl_keyfile, args.ssl_ca_certs) if file
    ]
    seen = _versions(files)
    while True:
        await asyncio.sleep(INTERVAL_S)
        if (found := _versions(files)) == seen:
            continue
        seen = found
        try:
            # A pair that does not match would leave a context with neither.
            for loaded in (ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), context):
                _load(loaded, args)
        except OSError as error:  # SSLError is one
            _logger.warning("The new TLS files are unusable; the last ones stay valid: %s", error)
        else:
            _logger.info("The TLS files were read again.")


def _versions(files: list[Path]) -> list[tuple[int, ...] | None]:
    """Return what differs once a file is another; None for one that is missing."""
    versions: list[tuple[int, ...] | None] = []
    for file in files:
        try:
            stat = file.stat()
        except OSError:
            versions.append(None)
        else:
            versions.append((stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns))
    return versions


def _load(context: ssl.SSLContext, args: argparse.Namespace) -> None:
    # Without this function OpenSSL asks a terminal for the password of an encrypted key.
    context.load_cert_chain(args.ssl_certfile, args.ssl_keyfile, password=lambda: "")
    if args.ssl_ca_certs:
        context.load_verify_locations(args.ssl_ca_certs)
