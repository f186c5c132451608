"""A server whose engine is a stand-in, for tests of signals.

    python life_process.py DRAIN_TIMEOUT [stuck] [stays] [brief] [http://COLLECTOR]

A `stuck` engine has a process that does not stop by itself. With `stays` a thread never ends, and
with `brief` the end may take a second. A collector gets a span at the end. It prints its port, and
a line for every call of the engine's shutdown, and of what cuts requests. Only GET /metrics and
/large end; GET /die kills the engine first, GET /hang has it hang.
"""

import asyncio
import multiprocessing
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import uvicorn
from vllm.tracing import init_tracer

from sliceserve.server import ending
from sliceserve.server.drain import METRICS, Drain
from sliceserve.server.health import Lifecycle, Phase
from sliceserve.server.life import run_until_signal
from sliceserve.server.listener import Listener
from sliceserve.server.tracing import end_traces

LARGE = 32 * 2**20  # bytes, more than sockets hold
HANGS, CUT = asyncio.Event(), asyncio.Event()


def engine_process() -> None:
    """Have a worker, whose number is printed, and do not end."""
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(worker.pid, flush=True)
    worker.wait()


class StandIn:
    errored = False
    output_handler = None

    def __init__(self, stuck: bool) -> None:
        self.process = multiprocessing.Process(target=engine_process) if stuck else None
        if self.process:
            self.process.start()

    def shutdown(self, timeout: float) -> None:
        print(f"shutdown {timeout}", flush=True)
        if self.process:
            self.process.join()


async def endless(scope: Any, _receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        if scope["path"] == "/die":
            StandIn.errored = True
        if scope["path"] == "/hang":
            HANGS.set()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        more = scope["path"] not in (METRICS, "/large")
        body = b"begun" if scope["path"] != "/large" else bytes(LARGE)
        await send({"type": "http.response.body", "body": body, "more_body": more})
        if more:
            await CUT.wait()


async def main() -> int:
    lifecycle = Lifecycle(Phase.SERVING)

    def cut() -> None:
        print("cut", flush=True)
        CUT.set()

    drain = Drain(endless, lifecycle, cut)

    async def hung() -> None:
        await HANGS.wait()

    config = uvicorn.Config(
        drain, lifespan="off", log_level="critical", timeout_graceful_shutdown=1
    )
    with socket.create_server(("127.0.0.1", 0)) as bound:
        engine = StandIn("stuck" in sys.argv)
        print(bound.getsockname()[1], flush=True)
        return await run_until_signal(
            Listener(config), bound, engine, hung(), drain, lifecycle, float(sys.argv[1])
        )


if __name__ == "__main__":
    if "stays" in sys.argv:
        threading.Thread(target=time.sleep, args=[600], name="plugin").start()
    if "brief" in sys.argv:
        ending.LAST_S = 1.0
    code = asyncio.run(main())
    if sys.argv[-1].startswith("http:"):
        ending.end_within()
        init_tracer("test", sys.argv[-1]).start_span("last").end()
        end_traces()
    sys.exit(code)
