"""Streamed writing of a checkpoint: a part a step while slicing, shards of them at the end."""

import json
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

import torch
from safetensors import safe_open
from torch import Tensor

from sliceserve.slicing.weights import INDEX, write_tensors

MERGED_BYTES = 2**29


class PartWriter:
    """Collects the tensors of one part and writes them in the background.

    As a context it waits for what is being written, so that the directory can be removed after it.
    """

    def __init__(self, directory: Path, dtype: torch.dtype) -> None:
        """Write parts into a directory; their tensors are cast to `dtype`."""
        self.directory = directory
        self.dtype = dtype
        self._pending: dict[str, Tensor] = {}
        self._thread = ThreadPoolExecutor(1)
        self._copied: torch.cuda.Event | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._thread.shutdown()

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor of the part."""
        cast = tensor.detach().to(self.dtype).contiguous()
        if cast.is_cuda:
            # Into pinned memory: forty times as fast, and nobody waits for it before `write`.
            host = torch.empty(cast.shape, dtype=cast.dtype, pin_memory=True)
            cast = host.copy_(cast, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()
        self._pending[name] = cast

    def write(self, number: int) -> "Future[int]":
        """Start to write the part; the result is the bytes of its tensors."""
        pending, self._pending = self._pending, {}
        if self._copied is not None:
            self._copied.synchronize()
        return self._thread.submit(_write, part_path(self.directory, number), pending)


def part_path(directory: Path, number: int) -> Path:
    """Return where a part lies."""
    return directory / f"part-{number:05d}.safetensors"


def _write(path: Path, tensors: dict[str, Tensor]) -> int:
    temporary = path.with_suffix(".tmp")
    write_tensors(temporary, tensors)
    temporary.replace(path)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def plan_shards(part_bytes: list[int], merged_bytes: int = MERGED_BYTES) -> list[list[int]]:
    """Group consecutive parts into shards: small ones are merged up to `merged_bytes`."""
    shards: list[list[int]] = []
    room = 0
    for number, size in enumerate(part_bytes):
        if size > room:
            shards.append([])
            room = merged_bytes
        shards[-1].append(number)
        room -= size
    return shards


def assemble_shards(
    parts: Path, output: Path, part_bytes: list[int], merged_bytes: int = MERGED_BYTES
) -> None:
    """Make the shards and the index out of the parts; can be killed and run again.

    Args:
        parts: the directory that holds the parts; those that make a shard of their own are moved.
        output: the directory for the shards.
        part_bytes: of each part, in order.
        merged_bytes: see `plan_shards`.

    """
    shards = plan_shards(part_bytes, merged_bytes)
    weight_map: dict[str, str] = {}
    parameters = 0
    for number, numbers in enumerate(shards, start=1):
        final = output / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        sources = [part_path(parts, part) for part in numbers]
        if not final.exists() and len(sources) == 1:
            sources[0].replace(final)
        elif not final.exists():
            _write(final, {k: v for source in sources for k, v in _tensors(source).items()})
        for name, size in _sizes(final).items():
            weight_map[name] = final.name
            parameters += size
    index = {
        "metadata": {"total_size": sum(part_bytes), "total_parameters": parameters},
        "weight_map": weight_map,
    }
    temporary = output / f"{INDEX}.tmp"
    temporary.write_text(json.dumps(index, indent=2) + "\n")
    temporary.replace(output / INDEX)


def remove_shards(output: Path) -> None:
    """Remove the shards that a run killed at its very end may have left without its state."""
    for path in output.glob("*.safetensors"):
        path.unlink()


def _tensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as part:
        return {name: part.get_tensor(name) for name in part.keys()}  # noqa: SIM118


def _sizes(path: Path) -> Mapping[str, int]:
    with safe_open(path, framework="pt") as part:
        names = list(part.keys())
        return {name: torch.Size(part.get_slice(name).get_shape()).numel() for name in names}
