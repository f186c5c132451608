"""Scripts in processes forked from one that has imported vLLM, which takes most of a start."""

import os
import runpy
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

PRELOADED = ["vllm.entrypoints.llm", "vllm.v1.engine.llm_engine", "vllm.v1.engine.async_llm"]
OUTPUTS = ("stdout", "stderr")


def run_forked(
    script: Path, arguments: list[str], environment: dict[str, str], timeout: float | None
) -> subprocess.CompletedProcess[str]:
    """What `subprocess.run` gives of a script, with its output captured as text.

    Raises `subprocess.TimeoutExpired` after `timeout` seconds.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    command = [str(script), *arguments]
    with TemporaryDirectory() as work:
        paths = [Path(work) / name for name in OUTPUTS]
        process = context.Process(target=run_script, args=(command, environment, paths))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(command, timeout or 0)
        texts = [path.read_text(errors="replace") for path in paths]
        return subprocess.CompletedProcess(command, process.exitcode, *texts)


def run_script(command: list[str], environment: dict[str, str], outputs: list[Path]) -> None:
    """Become the script: with its arguments, its folder to import from, and files for output."""
    for stream, path in zip((sys.stdout, sys.stderr), outputs, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream.fileno())
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    runpy.run_path(command[0], run_name="__main__")
