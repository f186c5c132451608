"""A last bound on the time of the end: a thread that stays would keep the process for ever."""

from __future__ import annotations

import multiprocessing
import os
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from sliceserve.server.starting import kill_children

if TYPE_CHECKING:
    from collections.abc import Iterator

_logger = init_logger("vllm.sliceserve.ending")

# Seconds for what follows the drain, more than its parts have together: those of the last words to
# clients, of the engine's stop and of the last bytes to connections.
LAST_S = 30.0
# Who reads the log may be what hangs.
TELL_S = 1.0


def end_within(seconds: float = 0.0) -> None:
    """End the process with 1, and its children with it, if it still runs LAST_S later than this.

    Of several calls the one whose time is up first ends the process.

    Args:
        seconds: from now until the LAST_S begin.

    """
    seconds += LAST_S
    timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), _end, [seconds])
    # Else the process would wait for it.
    timer.daemon = True
    timer.name = "end-timeout"
    timer.start()


@contextmanager
def ended_after() -> Iterator[None]:
    """Have the process end LAST_S after the block, however that ends."""
    try:
        yield
    finally:
        end_within()


def _end(seconds: float) -> None:
    try:
        telling = threading.Thread(target=_tell, args=[seconds], name="end-told", daemon=True)
        telling.start()
        telling.join(TELL_S)
        kill_children()
    finally:
        os._exit(1)


def _tell(seconds: float) -> None:
    threads = (t.name for t in threading.enumerate() if t.is_alive() and not t.daemon)
    processes = (f"{p.name} ({p.pid})" for p in multiprocessing.active_children())
    _logger.error(
        "The server did not end within %g s; it is ended although this still runs: %s.",
        seconds,
        ", ".join([*threads, *processes]) or "nothing that Python knows of",
    )
