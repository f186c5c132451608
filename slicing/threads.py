"""How many threads a container's limit of CPUs is worth, for what computes outside of vLLM.

torch starts one a core of the host. Where the limit is below that, threads that have had their
share of a period are stopped, and those that have not wait for them.
"""

import math
from contextlib import suppress
from pathlib import Path

import torch

from sliceserve.slicing.memory import CGROUP


def limit_threads(cgroup: Path = CGROUP) -> None:
    """Have torch compute in no more threads than the container has CPUs.

    Args:
        cgroup: the container's control group, as it sees it.

    """
    threads = torch.get_num_threads()
    if (limit := container_cpus(cgroup)) < threads:
        torch.set_num_threads(int(limit))


def container_cpus(cgroup: Path) -> float:
    """Return how many CPUs a limit comes to, rounded up; infinity without one.

    Args:
        cgroup: the directory with the files of version 2, or with the folder `cpu` of version 1.

    """
    with suppress(OSError, ValueError):  # there is none, or it is "max"
        quota, period = map(int, (cgroup / "cpu.max").read_text().split())
        return math.ceil(quota / period)
    with suppress(OSError, ValueError):
        quota, period = (
            int((cgroup / f"cpu/cpu.cfs_{name}_us").read_text()) for name in ("quota", "period")
        )
        if quota > 0:  # -1 says that there is none
            return math.ceil(quota / period)
    return math.inf
