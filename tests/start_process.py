"""A server whose engine does not start, for tests of the start's bound.

    python start_process.py waits|deaf|fails OPTION...

The engine's process has a worker, whose number is printed after the port. An engine that `waits`
fails once its process is gone, as vLLM's does; one that is `deaf` waits for ever; one that `fails`
does so at once and leaves a thread behind, where the end may take a second. The options are those
of `sliceserve serve`.
"""

import asyncio
import multiprocessing
import os
import socket
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from life_process import engine_process

from sliceserve.server import app, ending
from sliceserve.server.progress import DIRECTORY
from sliceserve.server.serve import make_parser, parse_arguments

CONFIG: Any = SimpleNamespace(
    model_config=SimpleNamespace(served_model_name="m"),
    device_config=SimpleNamespace(device_type="cpu"),
    parallel_config=SimpleNamespace(world_size_across_dp=1),
)
SUMMARY: Any = SimpleNamespace(dense_parameters=2, sliced_parameters=1)


def start_engine(*_arguments: Any) -> None:
    """Stand for vLLM's, which blocks its thread, with 43 % of the weights loaded."""
    (Path(os.environ[DIRECTORY]) / "one").write_bytes(b"." * 43)
    engine = multiprocessing.Process(target=engine_process)
    engine.start()
    if sys.argv[1] == "deaf":
        time.sleep(600)
    if sys.argv[1] == "fails":
        ending.LAST_S = 1.0
        threading.Thread(target=time.sleep, args=[600], name="plugin").start()
        raise RuntimeError("it cannot start")
    engine.join()
    raise RuntimeError("the engine's process is gone")


def main() -> int:
    arguments = ["DIR", "--host", "127.0.0.1", *sys.argv[2:]]
    args, settings = parse_arguments(make_parser(), arguments)
    app.start_engine = start_engine  # type: ignore[assignment]
    access = app.access_of(settings, args)
    with socket.create_server(("127.0.0.1", 0)) as bound:
        print(bound.getsockname()[1], flush=True)
        return asyncio.run(
            app.serve(
                CONFIG, args, settings, SUMMARY, access, lambda _exchange: None, "here", bound
            )
        )


if __name__ == "__main__":
    sys.exit(main())
