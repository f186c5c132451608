"""GPUs as NVML tells of them, with a stand-in for its module; there are no GPUs here."""

import logging
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from helm_render import GPU_SERIES
from prometheus_client import CollectorRegistry
from vllm.config import ParallelConfig
from vllm.third_party import pynvml

from sliceserve.server.gpus import GpuReader, GpuReading, engine_gpus, watching_gpus
from sliceserve.server.metrics import ServerMetrics

GIB = 2**30
PART = "MIG-41b35014-d2d5-5a4c-b2d4-4a3a2b1c0d9e"


class Nvml:
    """The part of pynvml that is used, of a machine with some GPUs."""

    class NVMLError(Exception):
        """As in pynvml, the base of all errors."""

    def __init__(self, gpus: int) -> None:
        self.uuids = {f"GPU-{index}-of-a-machine": index for index in range(gpus)}
        self.opened = 0
        self.answers = True
        self.lost: set[int] = set()

    def _check(self, found: bool) -> None:
        if not (self.opened and found):
            raise self.NVMLError("Unknown Error")

    def nvmlInit(self) -> None:  # noqa: N802
        if not self.answers:
            raise self.NVMLError("Driver Not Loaded")
        self.opened += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.opened -= 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:  # noqa: N802
        self._check(index in self.uuids.values() and index not in self.lost)
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Any:  # noqa: N802
        self._check(uuid in self.uuids or uuid == PART)
        return self.uuids.get(uuid, uuid)

    def nvmlDeviceGetIndex(self, handle: Any) -> int:  # noqa: N802
        self._check(True)
        return handle if isinstance(handle, int) else 0

    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any:  # noqa: N802
        self._check(True)
        used = (handle if isinstance(handle, int) else 5) * GIB
        return SimpleNamespace(used=used, total=80 * GIB)

    def nvmlDeviceGetUtilizationRates(self, handle: Any) -> Any:  # noqa: N802
        self._check(isinstance(handle, int))
        return SimpleNamespace(gpu=10 * handle)


def config(device: str = "cuda", **parallel: Any) -> Any:
    """An engine's configuration: one GPU unless told otherwise."""
    defaults = {
        "use_ray": False, "world_size": 1, "local_world_size": 1, "data_parallel_size_local": 1,
        "data_parallel_rank_local": None, "assigned_physical_gpu_ids": None,
    }  # fmt: skip
    return SimpleNamespace(
        device_config=SimpleNamespace(device_type=device),
        parallel_config=SimpleNamespace(**defaults | parallel),
    )


def ranks(world: int, data: int = 1) -> dict[str, int]:
    return {"world_size": world, "local_world_size": world, "data_parallel_size_local": data}


@pytest.mark.parametrize(
    ("parallel", "visible", "expected"),
    [
        ({}, None, ["0"]),
        ({}, "", ["0"]),
        ({}, "3", ["3"]),
        (ranks(2), "6, 4,5", ["6", "4"]),
        (ranks(2, data=2), None, ["0", "1", "2", "3"]),
        (ranks(2, data=2), "7,6,5,4", ["7", "6", "5", "4"]),
        ({"data_parallel_rank_local": 2, **ranks(2)}, None, ["4", "5"]),
        # Two nodes of two GPUs for one rank of four.
        ({"world_size": 4, "local_world_size": 2}, None, ["0", "1"]),
        (ranks(2), "GPU-a,GPU-b,GPU-c", ["GPU-a", "GPU-b"]),
        # vLLM has resolved --device-ids among the visible ones.
        ({"assigned_physical_gpu_ids": [5, 2], **ranks(2)}, "2,5,7", ["5", "2"]),
        # vLLM refuses to start.
        (ranks(2), "1", ["1"]),
        ({"use_ray": True}, None, []),
    ],
)
def test_the_gpus_of_the_engine_are_those_that_vllm_takes(
    parallel: dict[str, Any], visible: str | None, expected: list[str]
) -> None:
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert engine_gpus(config(**parallel), environment) == expected


def test_vllms_own_configuration_has_what_is_asked_of_it() -> None:
    found = config()
    found.parallel_config = ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=2)
    assert engine_gpus(found, {"CUDA_VISIBLE_DEVICES": "4,5,6,7,8"}) == ["4", "5", "6", "7"]


def test_a_server_on_a_cpu_has_no_gpus_even_where_there_are_some() -> None:
    assert engine_gpus(config("cpu"), {"CUDA_VISIBLE_DEVICES": "0"}) == []


def test_indices_and_uuids_are_read_and_others_are_not() -> None:
    nvml = Nvml(8)
    readings = GpuReader(nvml, ["3", "GPU-6-of-a-machine"]).read()
    assert readings == {
        "3": GpuReading(3 * GIB, 80 * GIB, 0.3),
        "6": GpuReading(6 * GIB, 80 * GIB, 0.6),
    }
    assert nvml.opened == 0


def exported(readings: list[dict[str, GpuReading]]) -> dict[tuple[str, str], str]:
    """The samples of GPUs after some readings, as text, since no NaN equals another."""
    registry = CollectorRegistry()
    metrics = ServerMetrics(registry, "m")
    for reading in readings:
        metrics.set_gpu_readings(reading)
    return {
        (sample.name.removeprefix("sliceserve_gpu_"), sample.labels["gpu"]): str(sample.value)
        for family in registry.collect()
        for sample in family.samples
        if "gpu" in sample.labels and sample.labels["model_name"] == "m"
    }


def test_a_part_of_a_gpu_is_named_by_its_uuid_and_has_no_utilization() -> None:
    found = exported([GpuReader(Nvml(1), [PART]).read()])
    assert {f"sliceserve_gpu_{name}" for name, _ in found} == GPU_SERIES
    assert found == {
        ("memory_used_bytes", PART): str(5.0 * GIB),
        ("memory_total_bytes", PART): str(80.0 * GIB),
        ("utilization_ratio", PART): "nan",
    }


def test_what_nvml_stops_telling_is_not_a_number_until_it_comes_back() -> None:
    nvml = Nvml(2)
    reader = GpuReader(nvml, ["0", "1"])
    series = ("memory_used_bytes", "memory_total_bytes", "utilization_ratio")
    nvml.lost = {1}
    readings = [reader.read()]
    assert exported(readings).keys() == {(name, "0") for name in series}
    nvml.lost = set()
    readings.append(reader.read())
    assert exported(readings)["memory_used_bytes", "1"] == str(1.0 * GIB)
    nvml.answers = False
    readings.append(reader.read())
    assert exported(readings) == {(name, gpu): "nan" for name in series for gpu in "01"}
    nvml.answers = True
    readings.append(reader.read())
    assert exported(readings)["memory_used_bytes", "1"] == str(1.0 * GIB)
    assert nvml.opened == 0


def test_a_thread_reads_again_and_again_until_the_block_ends() -> None:
    reported: list[dict[str, GpuReading]] = []
    enough = threading.Event()

    def report(readings: dict[str, GpuReading]) -> None:
        reported.append(readings)
        if len(reported) == 3:
            enough.set()

    before = set(threading.enumerate())
    with watching_gpus(GpuReader(Nvml(1), ["0"]), report, interval=0):
        (thread,) = set(threading.enumerate()) - before
        assert enough.wait(60)
    thread.join(60)
    assert not thread.is_alive()
    assert reported[:3] == [{"0": GpuReading(0, 80 * GIB, 0.0)}] * 3


def test_without_gpus_there_is_no_thread() -> None:
    before = threading.active_count()
    with watching_gpus(GpuReader(Nvml(1), []), lambda _: None, interval=0):
        assert threading.active_count() == before


def test_this_machine_exports_what_it_has(caplog: pytest.LogCaptureFixture) -> None:
    """With the real module: a GPU's memory, or nothing where there is no NVML, and no error."""
    with caplog.at_level(logging.DEBUG):
        found = GpuReader(pynvml, ["0"]).read()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        assert exported([found]) == {}
        (record,) = caplog.records
        assert record.levelno == logging.INFO
        assert "NVML" in record.getMessage()
    else:
        memory = pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0))
        assert found["0"].memory_total == memory.total
        assert not caplog.records
