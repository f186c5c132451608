"""The GPUs of this server as NVML sees them, read in a thread while the server runs."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import dataclass
from math import nan
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

_logger = init_logger("vllm.sliceserve.gpus")

VISIBLE = "CUDA_VISIBLE_DEVICES"
READ_INTERVAL_S = 5


@dataclass(frozen=True)
class GpuReading:
    """What a GPU tells of itself; not a number where it does not.

    Attributes:
        memory_used: bytes, by all processes.
        memory_total: bytes.
        utilization: share of NVML's last sample period in which a kernel ran.

    """

    memory_used: float = nan
    memory_total: float = nan
    utilization: float = nan


def engine_gpus(vllm_config: Any, environment: Mapping[str, str]) -> list[str]:
    """Return the GPUs of this machine that the engine takes: NVML indices, or UUIDs.

    They are numbered as vLLM numbers them. None are returned on a CPU, and with Ray, which
    chooses them itself.

    Args:
        vllm_config: the configuration, before the engine starts and changes it.
        environment: may name the devices that are visible.

    """
    parallel = vllm_config.parallel_config
    if vllm_config.device_config.device_type != "cuda" or parallel.use_ray:
        return []
    first = parallel.data_parallel_rank_local or 0
    taken = [
        rank * parallel.world_size + place
        for rank in range(first, first + parallel.data_parallel_size_local)
        for place in range(parallel.local_world_size)
    ]
    visible = [name.strip() for name in environment.get(VISIBLE, "").split(",") if name.strip()]
    chosen = [str(index) for index in parallel.assigned_physical_gpu_ids or ()] or visible
    if not chosen:
        return [str(number) for number in taken]
    # An engine with too few says so itself.
    return [chosen[number] for number in taken if number < len(chosen)]


class GpuReader:
    """Reads some GPUs through NVML, which is opened anew each time, so that it may come back."""

    def __init__(self, nvml: Any, devices: Sequence[str]) -> None:
        """Take the module `pynvml` and what names the GPUs."""
        self._nvml, self.devices = nvml, devices
        self._known: set[str] = set()

    def read(self) -> dict[str, GpuReading]:
        """Return what the GPUs tell, by NVML's index, or by UUID for a part of a GPU (MIG).

        A GPU is there once it has been found, even if NVML does not answer any more.
        """
        readings: dict[str, GpuReading] = {}
        try:
            self._nvml.nvmlInit()
            for device in self.devices:
                self._add(device, readings)
            self._nvml.nvmlShutdown()
        except self._nvml.NVMLError as error:
            _logger.info_once("NVML does not answer: %s", str(error))
        missing = self._known - readings.keys()
        self._known |= readings.keys()
        return readings | dict.fromkeys(missing, GpuReading())

    def _add(self, device: str, readings: dict[str, GpuReading]) -> None:
        nvml = self._nvml
        try:
            if device.isdecimal():
                handle = nvml.nvmlDeviceGetHandleByIndex(int(device))
            else:
                handle = nvml.nvmlDeviceGetHandleByUUID(device)
            # The index of a part is one within its GPU.
            part = device.startswith("MIG-")
            label = device if part else str(nvml.nvmlDeviceGetIndex(handle))
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        except nvml.NVMLError as error:
            _logger.info_once("NVML does not tell of GPU %s: %s", device, str(error))
            return
        try:
            utilization = nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
        except nvml.NVMLError:  # not supported of parts
            utilization = nan
        readings[label] = GpuReading(memory.used, memory.total, utilization)


@contextmanager
def watching_gpus(
    reader: GpuReader,
    report: Callable[[dict[str, GpuReading]], None],
    interval: float = READ_INTERVAL_S,
) -> Iterator[None]:
    """Report readings every so many seconds for the time of the block, if there are GPUs.

    The thread is not waited for: a driver that hangs must delay neither answers nor the end.
    """
    if not reader.devices:
        yield
        return
    ended = threading.Event()

    def run() -> None:
        while True:
            report(reader.read())
            if ended.wait(interval):
                return

    threading.Thread(target=run, name="gpus", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
