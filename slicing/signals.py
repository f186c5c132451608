"""The calibration signals: the residual stream of every batch, kept where there is room for it."""

import os
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

GPU_SHARE = 0.4  # of the free memory of a GPU; its layers and moments need the rest


class Signals(Protocol):
    """One tensor [windows, positions, width] a batch, by the batch's number."""

    home: str

    def __len__(self) -> int:
        """Return the number of batches."""

    def __getitem__(self, index: int) -> Tensor:
        """Return a batch; it is valid until the same batch is set."""

    def __setitem__(self, index: int, signal: Tensor) -> None:
        """Replace a batch; its width may change."""


class HeldSignals:
    """Signals in memory: on the GPU, or in the host's, pinned if a GPU is to read them."""

    def __init__(self, capacities: Sequence[int], dtype: torch.dtype, device: Any, pin: bool):
        """Reserve room for batches of at most these numbers of elements."""
        self.home = f"memory of {device}"
        self._buffers = [
            torch.empty(size, dtype=dtype, device=device, pin_memory=pin) for size in capacities
        ]
        self._shapes: list[torch.Size] = [torch.Size([0])] * len(capacities)

    def __len__(self) -> int:
        return len(self._buffers)

    def __getitem__(self, index: int) -> Tensor:
        shape = self._shapes[index]
        return self._buffers[index][: shape.numel()].view(shape)

    def __setitem__(self, index: int, signal: Tensor) -> None:
        self._shapes[index] = signal.shape
        self[index].copy_(signal)


class SpilledSignals:
    """Signals in a file: what is in memory is the batch in hand."""

    def __init__(self, capacities: Sequence[int], dtype: torch.dtype, path: Path) -> None:
        """Make the file, sparse at first."""
        self.home = "a file"
        self._dtype = dtype
        self._file = path.open("w+b", buffering=0)
        ends = accumulate(size * dtype.itemsize for size in capacities)
        self._starts = [0, *ends][: len(capacities)]
        self._shapes: list[torch.Size] = [torch.Size([0])] * len(capacities)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Tensor:
        self._file.seek(self._starts[index])
        return read_tensor(self._file, self._shapes[index], self._dtype)

    def __setitem__(self, index: int, signal: Tensor) -> None:
        self._shapes[index] = signal.shape
        self._file.seek(self._starts[index])
        write_tensor(self._file, signal.to(self._dtype))


def make_signals(
    capacities: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    host_bytes: int,
    spill: Path,
) -> Signals:
    """Make a store in the fastest memory with enough room: the GPU, the host, a file.

    Args:
        capacities: elements of each batch at full width.
        dtype: of the signals.
        device: where the layers run.
        host_bytes: of the host's memory that may be used.
        spill: the file to make otherwise.

    """
    needed = sum(capacities) * dtype.itemsize
    on_gpu = device.type == "cuda"
    if on_gpu and needed <= GPU_SHARE * torch.cuda.mem_get_info(device)[0]:
        return HeldSignals(capacities, dtype, device, pin=False)
    if needed <= host_bytes:
        return HeldSignals(capacities, dtype, "cpu", pin=on_gpu)
    return SpilledSignals(capacities, dtype, spill)


def save_signals(signals: Signals, path: Path) -> None:
    """Write all batches to one file, one after the other."""
    with path.open("wb", buffering=0) as file:
        for index in range(len(signals)):
            write_tensor(file, signals[index])


def load_signals(
    signals: Signals, path: Path, shapes: Sequence[Sequence[int]], dtype: torch.dtype
) -> None:
    """Read what `save_signals` wrote; `shapes` are those of the batches."""
    with path.open("rb", buffering=0) as file:
        for index, shape in enumerate(shapes):
            signals[index] = read_tensor(file, torch.Size(shape), dtype)


def write_tensor(file: Any, tensor: Tensor) -> None:
    """Write a tensor's elements at the file's position.

    Raises:
        OSError: the disk is full.

    """
    held = tensor.detach().contiguous()
    if held.is_cuda:
        # Copies into pinned memory are forty times as fast.
        held = torch.empty(held.shape, dtype=held.dtype, pin_memory=True).copy_(held)
    flat = held.flatten().view(torch.uint8)
    left = memoryview(flat.numpy().data)
    while left:
        left = left[os.write(file.fileno(), left) :]


def read_tensor(file: Any, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Read the elements of a tensor from the file's position.

    Raises:
        OSError: the file ends before.

    """
    data = bytearray(shape.numel() * dtype.itemsize)
    left = memoryview(data)
    while left:
        count = file.readinto(left)
        if not count:
            raise OSError(f"{file.name} is truncated")
        left = left[count:]
    return torch.frombuffer(data, dtype=dtype).view(shape)
