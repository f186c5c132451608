"""How much of the host's memory a slicing run takes, and what it leaves for calibration signals."""

import ctypes
import math
import os
import resource
from contextlib import suppress
from math import prod
from pathlib import Path

import torch

from sliceserve.slicing.dense import DenseModel
from sliceserve.slicing.errors import MachineError, UserError
from sliceserve.slicing.moments import ROWS_PER_PRODUCT

AVAILABLE_SHARE = 0.8
TOKENS_PER_BATCH = 4096
ROWS_OF_LOGITS = 512
CGROUP = Path("/sys/fs/cgroup")  # a container's own, as it sees it


def peak_bytes() -> int:
    """Return the largest memory this process has held so far (resident set, bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_bytes() -> int:
    """Return the memory this process holds now (resident set, bytes)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def available_bytes(cgroup: Path = CGROUP) -> int:
    """Return most of the memory that is free on the host and within the container's limit."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(AVAILABLE_SHARE * min(free, container_bytes(cgroup)))


def container_bytes(cgroup: Path) -> float:
    """Return what a container's limit leaves, infinity without one; old page cache counts as free.

    Args:
        cgroup: the directory with the files of version 2, or with the folder `memory` of version 1.

    """
    for limit, usage, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        with suppress(OSError, ValueError):  # there is none, or it is "max"
            left = int((cgroup / limit).read_text()) - int((cgroup / usage).read_text())
            return max(0, left + _counter((cgroup / limit).with_name("memory.stat"), cache))
    return math.inf


def _counter(file: Path, name: str) -> int:
    """Return one line's number, 0 where the file or the line is missing, as in some sandboxes."""
    with suppress(OSError, ValueError, KeyError):
        return int(dict(map(str.split, file.read_text().splitlines()))[name])
    return 0


def return_freed_memory() -> None:
    """Give freed memory back to the system, where the C library can.

    It keeps blocks below 32 MB for later; pieces of layers scattered among them add up, layer by
    layer, to several times what is in use.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def signal_budget(
    model: DenseModel,
    limit: int | None,
    device: torch.device,
    output: torch.dtype,
    surveys: bool = False,
    refits: bool = False,
) -> int:
    """Return the bytes of host memory that calibration signals may take.

    Args:
        model: the dense model.
        limit: bytes for the process; None takes most of what is available.
        device: where layers run; on a GPU moments and activations take none of the host's.
        output: dtype of the weights written.
        surveys: whether the dense model is surveyed before.
        refits: whether weights are refitted.

    Raises:
        UserError: weights and working set alone are above the limit.
        MachineError: no limit was given, and they are above what is available.

    """
    allowed = available_bytes() + resident_bytes() if limit is None else limit
    needed = resident_bytes() + max(
        working_set(model, device, output) + refits * refit_set(model, device),
        surveys * survey_set(model, device),
    )
    if needed > allowed:
        what = (
            f"{allowed / 1e9:.2f} GB is too small for this model, which needs about "
            f"{needed / 1e9:.2f} GB beside its calibration signals"
        )
        if limit is None:
            raise MachineError(f"the memory left here of {what}")
        raise UserError(f"--memory-limit {what}")
    return allowed - needed


def working_set(model: DenseModel, device: torch.device, output: torch.dtype) -> int:
    """Estimate the bytes held beside the signals: a table or two layers, moments, activations.

    A layer is in memory as it is stored, as it runs and as it is written, while the next is read.
    """
    architecture, config = model.architecture, model.config
    shapes = {name: tuple(p.shape) for name, p in model.skeleton.named_parameters()}
    first = f"{architecture.layers}.0."
    layer = sum(prod(shape) for name, shape in shapes.items() if name.startswith(first))
    table = max(prod(shapes[f"{path}.weight"]) for path in (architecture.tokens, architecture.head))
    stored, written = model.dtype.itemsize, output.itemsize
    tables = table * (stored + written)
    runs = 0 if device.type == "cuda" else layer * 4
    layers = layer * (2 * stored + written) + runs
    if device.type == "cuda":
        return max(tables, layers)
    width = int(config.hidden_size)
    inner = max(max(shape) for name, shape in shapes.items() if name.startswith(first))
    moments = 6 * 8 * width * width
    activations = 4 * TOKENS_PER_BATCH * (3 * inner + 8 * width)
    return max(tables, layers) + moments + activations + 8 * ROWS_PER_PRODUCT * (inner + width)


def survey_set(model: DenseModel, device: torch.device) -> int:
    """Estimate the bytes that a survey holds beside the signals: the head, a layer's gradients."""
    if device.type == "cuda":
        return 0
    layer, inner, width, vocabulary = _sizes(model)
    head = 4 * vocabulary * (2 * width + 3 * ROWS_OF_LOGITS)
    backward = 2 * 4 * layer + 4 * TOKENS_PER_BATCH * (8 * inner + 24 * width)
    moments = 10 * 8 * width * width
    return max(head, backward) + moments


def refit_set(model: DenseModel, device: torch.device) -> int:
    """Estimate what a refit holds more: the dense layer, and the sums and factors of a fit."""
    if device.type == "cuda":
        return 0
    layer, inner, width, _ = _sizes(model)
    return 4 * layer + 8 * (5 * inner * inner + 6 * inner * width) + 4 * TOKENS_PER_BATCH * inner


def _sizes(model: DenseModel) -> tuple[int, int, int, int]:
    """Return a layer's parameters, the widest input of its linears, hidden_size, vocabulary."""
    first = f"{model.architecture.layers}.0."
    shapes = [tuple(p.shape) for name, p in model.skeleton.named_parameters() if first in name]
    layer = sum(prod(shape) for shape in shapes)
    inner = max(max(shape) for shape in shapes)
    return layer, inner, int(model.config.hidden_size), int(model.config.vocab_size)
