import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from quickstart import running

SCRIPT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""


def is_running(pid: int) -> bool:
    """Whether a process runs; one that only its new parent has not reaped yet does not."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def test_what_a_step_started_ends_with_it_also_when_interrupted() -> None:
    # A shell has made what it runs in the background ignore this.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with (  # noqa: PT012
        pytest.raises(KeyboardInterrupt),
        running([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE) as process,
    ):
        assert process.stdout is not None
        grandchild = int(process.stdout.readline())
        assert is_running(process.pid)
        assert is_running(grandchild)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    assert process.returncode == -signal.SIGTERM
    deadline = time.monotonic() + 60
    while is_running(grandchild):
        assert time.monotonic() < deadline
        time.sleep(0.05)
