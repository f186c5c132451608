"""The serving part of the server's life: until a signal, then the drain, then the end."""

from __future__ import annotations

import asyncio
import multiprocessing
import signal
from typing import TYPE_CHECKING, Any

import vllm.envs
from vllm.logger import init_logger
from vllm.utils.system_utils import kill_process_tree

from sliceserve.server.deadline import LAST_WORDS_S
from sliceserve.server.ending import end_within
from sliceserve.server.health import Lifecycle, Phase

if TYPE_CHECKING:
    import socket
    from collections.abc import Coroutine

    from sliceserve.server.drain import Drain
    from sliceserve.server.listener import Listener

_logger = init_logger("vllm.sliceserve.life")

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Seconds for the engine's processes to release what they hold before they are killed.
ENGINE_STOP_S = 10
WATCH_INTERVAL_S = 1


async def run_until_signal(
    listener: Listener,
    bound: socket.socket,
    engine: Any,
    hung: Coroutine[None, None, None],
    drain: Drain,
    lifecycle: Lifecycle,
    drain_timeout: float,
) -> int:
    """Serve; a first signal begins the drain, a second one ends it, or the engine's stop, at once.

    What still runs when the time is up, or when the engine hangs, is cut with an error. From the
    first signal, or the engine's fault, the whole process has a time to end (`end_within`).

    Args:
        listener: the HTTP server to run on the bound socket.
        bound: the socket.
        engine: vLLM's engine, which is stopped once nothing runs or the time is up.
        hung: ends when the engine has not answered for too long.
        drain: counts the running requests.
        lifecycle: told of the drain.
        drain_timeout: seconds that running requests have to finish.

    Returns:
        0 after a drain, 128 + its number after a second signal, 1 if the engine died or hung.

    """
    asked, hurry, hopeless = asyncio.Event(), asyncio.Event(), asyncio.Event()
    received: list[int] = []

    def on_signal(number: int) -> None:
        received.append(number)
        if len(received) == 1:
            asked.set()
        elif not hurry.is_set():
            hurry.set()
            end_within()
        # At once, so that no request slips in between.
        lifecycle.enter(Phase.DRAINING, "waiting for running requests")

    loop = asyncio.get_running_loop()
    until = loop.time()
    for number in SIGNALS:
        loop.add_signal_handler(number, on_signal, number)
    serving = asyncio.ensure_future(listener.serve(sockets=[bound]))
    watching = asyncio.ensure_future(_watch(listener, engine))
    asking = asyncio.ensure_future(asked.wait())
    hurrying = asyncio.ensure_future(hurry.wait())
    hanging = asyncio.ensure_future(hung)
    hanging.add_done_callback(lambda _: hopeless.set())
    try:
        await asyncio.wait([serving, asking, hanging], return_when=asyncio.FIRST_COMPLETED)
        watching.cancel()
        end_within(drain_timeout if received else 0)
        if received:
            _logger.info("Draining: running=%d timeout=%ss", drain.running, drain_timeout)
            until = loop.time() + drain_timeout
            left = await drain.wait(drain_timeout, hurry, hopeless)
        elif hanging.done():
            left = drain.running
            lifecycle.enter(Phase.FAILING, "the engine hangs")
            _logger.error("The engine hangs.")
        else:
            left = drain.running
            _logger.error("The engine died.")
        if left and not engine.errored and not hurry.is_set():
            _logger.warning("Requests that did not finish in time: %d", left)
            drain.cut()
            left = await drain.wait(2 * LAST_WORDS_S, hurry)
        failed = not received or engine.errored or hanging.done()
        if left:
            # First, so that clients are told of its end.
            await _stop(engine, hurrying)
        # Whole answers may still be on their way to clients that read slowly.
        listener.linger(until - loop.time())
        listener.should_exit = True
        await asyncio.wait([serving, hurrying], return_when=asyncio.FIRST_COMPLETED)
        listener.force_exit = hurry.is_set()
        await serving
        if not left and engine.output_handler is not None:
            engine.output_handler.cancel()  # it would log the orderly end of the engine as an error
        await _stop(engine, hurrying)
    finally:
        for task in (asking, hurrying, watching, hanging):
            task.cancel()
        for number in SIGNALS:
            loop.remove_signal_handler(number)
    if hurry.is_set():
        return 128 + received[-1]
    return 1 if failed else 0


async def _stop(engine: Any, hurrying: asyncio.Task[Any]) -> None:
    """Stop the engine, its processes at once if there is, or comes, a second signal."""
    timeout = 0 if hurrying.done() else ENGINE_STOP_S
    # In a thread, so that signals are heard meanwhile.
    stopping = asyncio.ensure_future(asyncio.to_thread(engine.shutdown, timeout=timeout))
    await asyncio.wait([stopping, hurrying], return_when=asyncio.FIRST_COMPLETED)
    if not stopping.done():
        for process in multiprocessing.active_children():
            kill_process_tree(process.pid)  # the workers of several GPUs too
    await stopping


async def _watch(listener: Listener, engine: Any) -> None:
    """End the HTTP server when the engine is dead, as a supervisor can only start both anew."""
    while vllm.envs.VLLM_KEEP_ALIVE_ON_ENGINE_DEATH or not engine.errored:
        await asyncio.sleep(WATCH_INTERVAL_S)
    listener.should_exit = True
