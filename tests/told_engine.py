"""A vLLM plugin for tests, by which an engine does what it is told.

`installed` makes the directory that a server's `PYTHONPATH` has to name. In it, a file `load` makes
the loading of the model run out of GPU memory, a file `step` the next step of the engine, with
a file `hold` the model that is loaded waits for its end, as does a step, which makes a file `held`,
and with a file `slow` steps take longer.
"""

import shutil
import time
from pathlib import Path
from typing import Any

SLOW_S = 0.1
MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB."


def installed(directory: Path) -> Path:
    """Make the directory a place where Python finds the plugin."""
    shutil.copy(__file__, directory)
    metadata = directory / "told_engine-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: told-engine\nVersion: 0\n")
    entry = "[vllm.general_plugins]\ntold_engine = told_engine:register\n"
    (metadata / "entry_points.txt").write_text(entry)
    return directory


class EchoSockets:
    """ASGI layer that sends a WebSocket its messages back."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass on what is no WebSocket."""
        if scope["type"] != "websocket":
            await self.app(scope, receive, send)
            return
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            await send({**message, "type": "websocket.send"})


def register() -> None:
    """Patch what every worker of vLLM is wrapped in."""
    import torch
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    step = WorkerWrapperBase.execute_model

    def is_told(name: str) -> bool:
        return Path(__file__).with_name(name).exists()

    def fail_if_told(name: str) -> None:
        if is_told(name):
            raise torch.OutOfMemoryError(MESSAGE)

    def wait_while_told(name: str) -> None:
        while is_told(name):
            time.sleep(0.01)

    def load_model(self: Any, **options: Any) -> None:
        fail_if_told("load")
        self.worker.load_model(**options)
        wait_while_told("hold")

    def execute_model(self: Any, *arguments: Any, **options: Any) -> Any:
        if is_told("hold"):
            Path(__file__).with_name("held").touch()
            wait_while_told("hold")
        fail_if_told("step")
        if is_told("slow"):
            time.sleep(SLOW_S)
        return step(self, *arguments, **options)

    WorkerWrapperBase.load_model = load_model
    WorkerWrapperBase.execute_model = execute_model
