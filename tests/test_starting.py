"""A start that takes too long, with a stand-in for the engine; test_faulty_server.py has vLLM's."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from server_process import STOP_SECONDS, read_stat

from sliceserve.server.health import Lifecycle, Phase
from sliceserve.server.starting import start_within

SCRIPT = Path(__file__).with_name("start_process.py")
# What takes longer hangs.
LIMIT_S = 60


@pytest.mark.parametrize("engine", ["waits", "deaf"])
def test_a_start_that_hangs_ends_with_1_and_its_processes_with_it(
    engine: str, tmp_path: Path
) -> None:
    command = [sys.executable, str(SCRIPT), engine, "--start-timeout", "10"]
    # Where vLLM 0.24 does not log by itself.
    environment = os.environ | {"VLLM_LOGGING_STREAM": "ext://sys.stderr"}
    environment |= {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as started:
        try:
            assert started.stdout
            url = f"http://127.0.0.1:{int(started.stdout.readline())}"
            worker = Path(f"/proc/{int(started.stdout.readline())}/stat")
            alive = httpx.get(f"{url}/livez", timeout=LIMIT_S)
            assert (alive.status_code, alive.json()["status"]) == (200, "starting")
            _, log = started.communicate(timeout=LIMIT_S)
        finally:
            started.kill()
    assert started.returncode == 1
    (said,) = [line for line in log.splitlines() if "did not start" in line]
    assert said.endswith(
        "The server did not start within 10 s (--start-timeout): "
        "it was loading the model, 43% of the weights loaded."
    )
    assert "Traceback" not in log
    deadline = time.monotonic() + STOP_SECONDS
    while read_stat(worker) and read_stat(worker)[1] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if engine == "waits":
        assert not list(tmp_path.glob("sliceserve-*"))


@pytest.mark.parametrize("seconds", [0, 1e300])
def test_a_start_in_time_or_without_a_bound_goes_on(seconds: float) -> None:
    lifecycle = Lifecycle()
    with start_within(seconds, lifecycle):
        watching = [one for one in threading.enumerate() if one.name == "start-timeout"]
    assert len(watching) == (1 if seconds else 0)
    for one in watching:
        one.join(LIMIT_S)
        assert not one.is_alive()
    assert lifecycle.phase is Phase.STARTING


def test_an_error_in_time_is_passed_on() -> None:
    with pytest.raises(ValueError, match="of the start"), start_within(LIMIT_S, Lifecycle()):
        raise ValueError("of the start")
