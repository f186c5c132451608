"""What the log says last of an engine that does not start."""

import logging
import os
from pathlib import Path

import pytest
import told_engine
from server_process import START_SECONDS, serving, wait_until_gone

from sliceserve.server.failure import FILE, loading_fault, shared_failure, tell_failures
from sliceserve.slicing.errors import MachineError


@pytest.fixture
def logger() -> logging.Logger:
    return logging.Logger("of this test")


def fail(logger: logging.Logger, words: str, error: Exception) -> None:
    try:
        raise error
    except type(error):
        logger.exception(words)


def test_the_first_end_of_a_process_is_the_cause(logger: logging.Logger) -> None:
    with shared_failure() as failure:
        tell_failures(logger)
        assert failure() is None
        fail(logger, "A plugin failed.", ValueError("harmless"))
        logger.error("WorkerProc failed to start.")
        assert failure() is None
        fail(logger, "WorkerProc failed to start.", MemoryError("two\n  lines"))
        fail(logger, "EngineCore failed to start.", RuntimeError("see above"))
        assert failure() == "MemoryError: two lines"


def test_nothing_is_left_of_a_start(logger: logging.Logger) -> None:
    with shared_failure() as failure:
        tell_failures(logger)
        directory = Path(os.environ[FILE]).parent
    assert FILE not in os.environ
    assert not directory.exists()
    fail(logger, "EngineCore failed to start.", MemoryError("late"))
    assert failure() is None


def test_nobody_is_told_who_does_not_ask(logger: logging.Logger) -> None:
    tell_failures(logger, {})
    assert not logger.handlers


@pytest.mark.parametrize(
    ("text", "of_the_machine"),
    [
        ("No available memory for the cache blocks. Try more `gpu_memory_utilization`.", True),
        ("Free memory on device cuda:0 (3.1/79.1 GiB) is less than desired.", True),
        ("32.0 GiB KV cache is needed, which is larger than the available KV cache memory.", True),
        ("model '/models/memory-7b' has no config.json", False),
        ("/srv/memory/model: unknown architecture", False),
        ("memory-7b/memory.json is not JSON", False),
    ],
)
def test_short_memory_is_the_machines_fault_and_the_word_in_a_name_is_not(
    text: str, *, of_the_machine: bool
) -> None:
    assert (loading_fault(ValueError(text)) is MachineError) is of_the_machine


def test_out_of_memory_while_loading_is_the_last_word(tiny_sliced: Path, tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    memory.mkdir()
    told_engine.installed(memory)
    (memory / "load").touch()
    log = tmp_path / "log"
    with serving(tiny_sliced, log, PYTHONPATH=str(memory)) as server:
        assert server.process.wait(START_SECONDS) == 1
        wait_until_gone(server.process.pid)
    lines = [line for line in log.read_text().splitlines() if "app.py" in line]
    assert lines[-1].endswith(f"The engine did not start: OutOfMemoryError: {told_engine.MESSAGE}")
