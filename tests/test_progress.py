"""What the loading processes tell of their progress, and what the probes make of it."""

import os
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import told_engine
from server_process import START_SECONDS, serving

from sliceserve.server.progress import DIRECTORY, reporting, shared_progress, slowest

SHAPES = {"a": (30, 10), "b": (7,), "c": (2, 3, 4), "d": (), "e": (668,)}


def weights() -> list[tuple[str, np.ndarray]]:
    return [(name, np.zeros(shape)) for name, shape in SHAPES.items()]


def test_the_share_is_that_of_the_elements_of_the_slowest(tmp_path: Path) -> None:
    assert slowest(tmp_path) is None
    environment = {DIRECTORY: str(tmp_path)}
    fast, slow = (reporting(weights(), SHAPES, environment) for _ in range(2))
    next(fast)
    next(slow)
    assert slowest(tmp_path) == 0
    assert len([*fast]) == len(SHAPES) - 1
    done = 0
    for name, tensor in weights()[:-1]:
        done += tensor.size
        next(slow)  # what comes before is loaded
        assert slowest(tmp_path) == done // 10 / 100, name
    assert next(slow, None) is None
    assert slowest(tmp_path) == 1


@pytest.mark.parametrize("environment", [{}, {DIRECTORY: "/no/such/directory"}])
def test_who_cannot_report_loads_all_the_same(environment: dict[str, str]) -> None:
    passed = list(reporting(weights(), SHAPES, environment))
    assert [(name, tensor.shape) for name, tensor in passed] == list(SHAPES.items())


def test_nothing_is_left_of_a_start() -> None:
    with shared_progress() as loaded:
        directory = Path(os.environ[DIRECTORY])
        assert loaded() is None
        late = reporting(weights(), SHAPES)
        next(late)
        assert loaded() == 0
    assert loaded() is None
    assert DIRECTORY not in os.environ
    assert len([*late]) == len(SHAPES) - 1
    assert not directory.exists()


def test_probes_tell_how_much_two_processes_have_loaded(tiny_sliced: Path, tmp_path: Path) -> None:
    told: list[float] = []
    options = ("--tensor-parallel-size", "2", "--max-model-len", "128")
    # vLLM's own binding wants a NUMA node for each.
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    # The cache and a first run come after the last weight, and may be over before this has looked.
    (tmp_path / "engine").mkdir()
    hold = told_engine.installed(tmp_path / "engine") / "hold"
    hold.touch()
    environment["PYTHONPATH"] = str(hold.parent)
    with serving(tiny_sliced, tmp_path / "log", *options, **environment) as server:
        deadline = time.monotonic() + START_SECONDS
        state = {"status": "starting"}
        while state["status"] != "serving":
            assert server.process.poll() is None, server.log.read_text()
            assert time.monotonic() < deadline, server.log.read_text()
            time.sleep(0.01)
            try:
                state = httpx.get(f"{server.url}/readyz", timeout=30).json()
            except httpx.TransportError:
                continue
            if "weights_loaded" in state:
                assert state["step"] == "loading the model"
                told.append(state["weights_loaded"])
                if told[-1] == 1:
                    hold.unlink(missing_ok=True)
    assert all(0 <= share <= 1 for share in told)
