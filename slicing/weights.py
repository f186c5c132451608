"""Reading of safetensors shards, a tensor at a time, and their check against a config."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sliceserve.slicing.errors import UserError, reading

INDEX = "model.safetensors.index.json"
FLOATS = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


class TensorReader(Protocol):
    """Tensors by name, read when asked for."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor."""

    def read(self, name: str) -> Tensor:
        """Return one tensor, on the CPU, in its stored dtype."""


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write one safetensors file.

    Raises:
        OSError: the disk is full.

    """
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        # safetensors wraps the operating system's errors; a full disk must stay one.
        raise OSError(str(error)) from error


class ShardReader:
    """Reads the safetensors shards of a directory, one tensor at a time."""

    def __init__(self, directory: Path) -> None:
        """Open every shard's header.

        Raises:
            UserError: no safetensors file, an index that names a missing or wrong shard, or a
                shard that is corrupt or truncated.

        """
        self.files = shard_files(directory)
        self._where: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        for file in self.files:
            try:
                with safe_open(file, framework="pt") as shard:
                    for name in shard.keys():  # noqa: SIM118 - a shard is not a mapping
                        self._where[name] = file
                        header = shard.get_slice(name)
                        self._shapes[name] = tuple(header.get_shape())
                        self._dtypes[name] = header.get_dtype()
            except (SafetensorError, OSError) as error:
                raise UserError(f"shard {str(file)!r} is corrupt or truncated: {error}") from error

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor."""
        return dict(self._shapes)

    def dtype(self, names: Iterable[str]) -> torch.dtype:
        """Return the dtype that these tensors are stored in.

        Raises:
            UserError: they have several, or one that is no floating point (quantised weights).

        """
        stored = self.dtype_names(names)
        if len(stored) != 1 or stored[0] not in FLOATS:
            where = str(self.files[0].parent)
            raise UserError(
                f"model {where!r} must be stored in one of {', '.join(FLOATS)}, "
                f"not in {' and '.join(stored)}"
            )
        return FLOATS[stored[0]]

    def dtype_names(self, names: Iterable[str]) -> list[str]:
        """Return the dtypes that these tensors are stored in, by their safetensors names."""
        return sorted({self._dtypes[name] for name in names if name in self._dtypes})

    def read(self, name: str) -> Tensor:
        """Return one tensor, on the CPU, in its stored dtype."""
        with safe_open(self._where[name], framework="pt") as shard:
            tensor: Tensor = shard.get_tensor(name)
        return tensor


class MemoryReader:
    """The same for tensors that are in memory already (a dequantised GGUF file)."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        return self._tensors[name]


def shard_files(directory: Path) -> list[Path]:
    """Return the safetensors files of a model directory, sorted.

    Raises:
        UserError: there is none, or the index cannot be read or names a file that is not there.

    """
    index = directory / INDEX
    if not index.exists():
        single = directory / "model.safetensors"
        if not single.exists():
            raise UserError(f"model {str(directory)!r} holds no model.safetensors and no {INDEX}")
        return [single]
    with reading(f"index {str(index)!r}"):
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        files = [directory / name for name in names]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise UserError(
            f"model {str(directory)!r} lacks its shards {', '.join(missing)}: its download, or "
            "the copying of it, is incomplete"
        )
    return files


def check_shapes(
    where: str, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Compare tensors with what a config implies.

    Raises:
        UserError: lists all missing, unexpected and misshapen tensors in one sentence.

    """
    problems = compare_shapes(found, expected)
    if problems:
        raise UserError(f"{where} does not hold the tensors its config implies: {problems}")


def compare_shapes(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> str:
    """Return all missing, unexpected and misshapen tensors in words, '' if there are none."""
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    misshapen = [
        f"{name} is {list(found[name])} and not {list(expected[name])}"
        for name in sorted(found.keys() & expected.keys())
        if found[name] != expected[name]
    ]
    lists = {"missing": missing, "unexpected": unexpected, "wrong shape": misshapen}
    return "; ".join(f"{what}: {', '.join(names)}" for what, names in lists.items() if names)


def hash_files(files: Iterable[Path]) -> str:
    """Return the SHA-256 (hex) over the contents of files, in the order given."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(2**24):
                digest.update(chunk)
    return digest.hexdigest()
