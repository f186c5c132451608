"""A start that takes too long, with a stand-in for the engine; test_faulty_server.py has vLLM's."""

import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import told_engine
from server_process import serving, wait_for_end_of

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
    wait_for_end_of(worker)
    if engine == "waits":
        assert not list(tmp_path.glob("sliceserve-*"))


def test_a_start_that_fails_ends_with_1_whatever_it_leaves_behind() -> None:
    environment = os.environ | {"VLLM_LOGGING_STREAM": "ext://sys.stderr"}
    with subprocess.Popen(
        [sys.executable, str(SCRIPT), "fails"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    ) as started:  # fmt: skip
        try:
            output, log = started.communicate(timeout=LIMIT_S)
        finally:
            started.kill()
    assert started.returncode == 1
    assert "it cannot start" in log
    (said,) = [line for line in log.splitlines() if "did not end" in line]
    assert re.search(r"did not end within 1 s; it is ended .* runs: .*plugin, Process-1 ", said)
    wait_for_end_of(Path(f"/proc/{int(output.split()[1])}/stat"))


def test_insecure_serves_other_machines_and_a_full_disk_for_the_access_log_does_not_matter(
    tiny_sliced: Path, tmp_path: Path
) -> None:
    engine = told_engine.installed(tmp_path)
    (engine / "hold").touch()
    options = ("--host", "0.0.0.0", "--insecure", "--access-log", "/dev/full")
    log = tmp_path / "log"
    with serving(tiny_sliced, log, *options, PYTHONPATH=str(engine)) as server:
        assert server.wait_for("/livez", 200).json()["status"] == "starting"
        # Another address than that of all other tests, and of this machine all the same.
        elsewhere = replace(server, url=server.url.replace("127.0.0.1", "127.0.0.2"))
        for _ in range(2):
            assert "loading" in elsewhere.wait_for("/v1/models", 503).text
        assert server.process.poll() is None
    assert log.read_text().count("The access log loses lines: No space left on device") == 1


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
