"""The access log: a JSON object a line for each request, without any text of prompts or answers."""

from __future__ import annotations

import json
import logging
import os
import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from sliceserve.server.health import LIVEZ, READYZ
from sliceserve.server.status_page import STATUS
from sliceserve.slicing.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sliceserve.server.exchange import Exchange

_logger = logging.getLogger("vllm.sliceserve.access_log")

OFF = "off"
_STREAMS = {"stdout": 1, "stderr": 2}
_NOT_WHEN_FINE = (LIVEZ, READYZ, "/metrics", STATUS)
# Of what clients choose freely.
_LONGEST_TEXT = 128


def open_access_log(destination: str) -> Callable[[Exchange], None]:
    """Return what writes an exchange as one line.

    A line that cannot be written, on a full disk for instance, is lost and its request is not
    disturbed; the server's log says so once until a line can be written again. A part of it may be
    there, on a line of its own.

    Args:
        destination: stdout, stderr, off, or the name of a file that lines are added to.

    Raises:
        UserError: the file cannot be opened.

    """
    if destination == OFF:
        return lambda _exchange: None
    descriptor = _STREAMS.get(destination)
    if descriptor is None:
        try:
            # Appending, so that a rotation may truncate the file.
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            descriptor = os.open(destination, flags, 0o640)
        except OSError as error:
            raise UserError(f"--access-log {destination!r}: {error.strerror}") from error
    writer = _Writer(descriptor)

    def write(exchange: Exchange) -> None:
        if exchange.route not in _NOT_WHEN_FINE or exchange.status != 200:
            writer.write(as_line(exchange))

    return write


class _Writer:
    """Writes whole lines past the buffers of sys.stdout, which would keep what fails."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._broken = self._torn = False
        # The listeners of the start and of what follows have threads of their own.
        self._lock = threading.Lock()

    def write(self, line: bytes) -> None:
        """Write a line, in one call but where only a part of it is taken."""
        with self._lock:
            try:
                self._write_all(line)
            except OSError as error:
                if not self._broken:
                    _logger.warning("The access log loses lines: %s", error.strerror)
                self._broken = True
            else:
                self._broken = False

    def _write_all(self, line: bytes) -> None:
        # What is left of a line that was lost must not spoil the next one.
        rest = b"\n" + line if self._torn else line
        while rest:
            written = os.write(self._descriptor, rest)
            rest = rest[written:]
            self._torn = bool(rest)


def as_line(exchange: Exchange) -> bytes:
    """Return the line, its end included: the exchange's fields, the time in ISO 8601."""
    fields = dict(vars(exchange))
    fields["time"] = datetime.fromtimestamp(exchange.time, UTC).isoformat(timespec="milliseconds")
    for name in ("method", "model"):
        fields[name] = fields[name] and fields[name][:_LONGEST_TEXT]
    for name in ("seconds", "first_byte_seconds"):
        fields[name] = fields[name] and round(fields[name], 6)
    return json.dumps({"time": fields.pop("time"), **fields}).encode() + b"\n"
