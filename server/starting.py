"""A bound on the time of the start: a load that hangs would hold its GPUs for ever."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import psutil  # type: ignore[import-untyped]
from vllm.logger import init_logger
from vllm.utils.system_utils import kill_process_tree

from sliceserve.server.health import Lifecycle, Phase

if TYPE_CHECKING:
    from collections.abc import Iterator

_logger = init_logger("vllm.sliceserve.starting")

# Seconds to end in good order once the engine's processes are killed.
END_S = 10
INTERVAL_S = 0.5


@contextmanager
def start_within(seconds: float, lifecycle: Lifecycle) -> Iterator[None]:
    """End the process with 1, and the engine's with it, if the block takes longer.

    Nothing but a thread can: the start of the engine blocks the thread that it runs in.

    Args:
        seconds: that the block may take; 0 for no bound.
        lifecycle: says what the start is doing, and is told that it fails.

    Raises:
        SystemExit: the block failed because its time was up.

    """
    if not seconds:
        yield
        return
    ended, late = threading.Event(), threading.Event()

    def watch() -> None:
        if ended.wait(min(seconds, threading.TIMEOUT_MAX)):
            return
        late.set()
        _logger.error(
            "The server did not start within %g s (--start-timeout): it was %s.",
            seconds,
            _doing(lifecycle),
        )
        lifecycle.enter(Phase.FAILING, "the start took too long")
        end = time.monotonic() + END_S
        try:
            # What waits for these fails now; what does not is ended all the same.
            while time.monotonic() < end:
                kill_children()
                time.sleep(INTERVAL_S)
        finally:
            os._exit(1)

    threading.Thread(target=watch, name="start-timeout", daemon=True).start()
    try:
        yield
    except Exception:
        if late.is_set():
            raise SystemExit(1) from None
        raise
    finally:
        ended.set()
    if late.is_set():
        raise SystemExit(1)


def kill_children() -> None:
    """Kill the processes of the engine, of which more may start meanwhile."""
    for process in multiprocessing.active_children():
        # One that has just ended.
        with suppress(psutil.Error):
            kill_process_tree(process.pid)


def _doing(lifecycle: Lifecycle) -> str:
    loaded = lifecycle.weights_loaded()
    share = "" if loaded is None else f", {loaded:.0%} of the weights loaded"
    return f"{lifecycle.step}{share}"
