"""Access by API key: every route is closed to requests without one, but those named as public."""

from __future__ import annotations

import hashlib
import hmac
import logging
from typing import TYPE_CHECKING

from starlette.datastructures import Headers

from sliceserve.server.exchange import note_key
from sliceserve.server.responses import error_response
from sliceserve.slicing.errors import UserError

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable
    from pathlib import Path

    from starlette.types import ASGIApp, Receive, Scope, Send

_logger = logging.getLogger("vllm.sliceserve.auth")


class KeyRing:
    """The keys that open the server: fixed ones, and those of a file that may change meanwhile.

    Only digests are kept, so that no key can reach a log, a traceback or a core dump from here.
    """

    def __init__(self, keys: Iterable[str] = (), file: Path | None = None) -> None:
        """Read the keys.

        Args:
            keys: keys that stay.
            file: a file with a key a line; empty lines and those that begin with # are skipped.

        Raises:
            UserError: the file cannot be read or holds no key, or a key cannot be sent in a header.

        """
        self._fixed = [_digest(_checked(key, "--api-key or SLICESERVE_API_KEY")) for key in keys]
        self._file = file
        self._from_file: list[bytes] = []
        self._version: tuple[int, ...] = ()
        if file is not None:
            try:
                self._version = _version(file.stat())
                self._from_file = _read(file)
            except OSError as error:
                raise UserError(f"--api-key-file {str(file)!r}: {error.strerror}") from error
            if not self._from_file:
                raise UserError(f"--api-key-file {str(file)!r}: there is no key in it")

    def __bool__(self) -> bool:
        """Whether a key is needed at all; stays true when the file is emptied later."""
        return bool(self._fixed) or self._file is not None

    def name_of(self, key: str) -> str | None:
        """Return what one of the keys is called in logs, in a time that does not depend on which.

        That is the first 8 digits of its SHA-256; None if it is no key.
        """
        self._refresh()
        digest = _digest(key)
        found = False
        for known in (*self._fixed, *self._from_file):
            found |= hmac.compare_digest(digest, known)
        return digest.hex()[:8] if found else None

    def _refresh(self) -> None:
        """Read the file again if it changed; an emptied one leaves none of its keys valid."""
        if self._file is None:
            return
        try:
            version = _version(self._file.stat())
            if version == self._version:
                return
            self._from_file = _read(self._file)
        except (OSError, UserError) as error:
            version = ()
            # A missing file is a rotation under way more often than a revocation.
            if self._version:
                _logger.warning("%s is unusable; its last keys stay valid: %s", self._file, error)
        else:
            _logger.info("%s was read again: keys=%d", self._file, len(self._from_file))
        self._version = version


class Auth:
    """ASGI layer that answers 401 unless the request has a key as its bearer token."""

    def __init__(self, app: ASGIApp, keys: KeyRing, public: frozenset[str]) -> None:
        """Wrap the application.

        Args:
            app: what is protected.
            keys: the keys that open it.
            public: exact paths that anyone may GET.

        """
        self.app, self._keys, self._public = app, keys, public

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] == "lifespan" or self._is_open(scope):
            await self.app(scope, receive, send)
            return
        scheme, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
        name = self._keys.name_of(token.strip()) if scheme.lower() == "bearer" else None
        if name is not None:
            note_key(scope, name)
            await self.app(scope, receive, send)
            return
        challenge = 'Bearer realm="sliceserve"'
        message = "No API key was given: send the header 'Authorization: Bearer KEY'."
        if token:
            challenge += ', error="invalid_token"'
            message = "The API key is not valid."
        response = error_response(
            401, "AuthenticationError", message, {"WWW-Authenticate": challenge}
        )
        await response(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        reads = scope["type"] == "http" and scope["method"] in ("GET", "HEAD")
        return reads and scope["path"] in self._public


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _read(file: Path) -> list[bytes]:
    try:
        lines = [line.strip() for line in file.read_text().splitlines()]
    except UnicodeDecodeError:
        raise UserError(f"--api-key-file {str(file)!r}: it is not text") from None
    keys = [
        _checked(line, f"--api-key-file {str(file)!r}, line {number}")
        for number, line in enumerate(lines, 1)
        if line and not line.startswith("#")
    ]
    return [_digest(key) for key in keys]


def _checked(key: str, where: str) -> str:
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"{where}: a key is made of printable ASCII characters without spaces")
    return key


def _version(stat: os.stat_result) -> tuple[int, ...]:
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
