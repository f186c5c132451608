"""A vLLM plugin for tests, by which an engine is out of GPU memory once it is told so.

`installed` makes the directory that a server's `PYTHONPATH` has to name. In it, a file `load` makes
the loading of the model fail, and a file `step` the next step of the engine.
"""

import shutil
from pathlib import Path
from typing import Any

MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB."


def installed(directory: Path) -> Path:
    """Make the directory a place where Python finds the plugin."""
    shutil.copy(__file__, directory)
    metadata = directory / "out_of_memory-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: out-of-memory\nVersion: 0\n")
    entry = "[vllm.general_plugins]\nout_of_memory = out_of_memory:register\n"
    (metadata / "entry_points.txt").write_text(entry)
    return directory


def register() -> None:
    """Patch what every worker of vLLM is wrapped in."""
    import torch
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    step = WorkerWrapperBase.execute_model

    def fail_if_told(name: str) -> None:
        if Path(__file__).with_name(name).exists():
            raise torch.OutOfMemoryError(MESSAGE)

    def load_model(self: Any, **options: Any) -> Any:
        fail_if_told("load")
        return self.worker.load_model(**options)

    def execute_model(self: Any, *arguments: Any, **options: Any) -> Any:
        fail_if_told("step")
        return step(self, *arguments, **options)

    WorkerWrapperBase.load_model = load_model
    WorkerWrapperBase.execute_model = execute_model
