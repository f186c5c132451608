"""The sliced checkpoint on disk (docs/checkpoint.md): written beside, renamed, read, checked."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sliceserve.slicing.config import CAUSAL_LM, MODEL_TYPE, SlicedConfig, Slicing, parse_slicing
from sliceserve.slicing.errors import MachineError, UserError, fault, reading
from sliceserve.slicing.modeling import HEAD_MAP, ROTATION, expected_shapes
from sliceserve.slicing.quantised import (
    Scheme,
    quantised_linears,
    quantised_scheme,
    stored_shapes,
)
from sliceserve.slicing.source import read_json_object
from sliceserve.slicing.weights import ShardReader, check_shapes

PROVENANCE = "provenance.json"
SPECTRUM = "spectrum.npy"


@dataclass(frozen=True)
class CheckpointSummary:
    """What a sliced checkpoint holds.

    Attributes:
        slicing: the `slicing` object of its config.
        sliced_parameters: numbers stored, rotations and head included; not the scales of
            quantised weights.
        rotation_parameters: those of the residual rotations, and of the map before a tied head.
        bytes: of all files of the directory.
        dtype: of the stored weights that are not quantised.
        scheme: that the others are quantised by; None if none are.
        provenance: how it was made.

    """

    directory: Path
    slicing: Slicing
    sliced_parameters: int
    rotation_parameters: int
    bytes: int
    dtype: str
    scheme: Scheme | None
    provenance: dict[str, Any]

    @property
    def dense_parameters(self) -> int:
        """Parameters of the dense model as its user stored it."""
        return self.slicing.dense_parameters

    @property
    def stored_as(self) -> str:
        """What weights are stored in, in words: dtype and scheme."""
        return self.dtype if self.scheme is None else f"{self.dtype}, linears in {self.scheme}"

    @property
    def ratio(self) -> float:
        """True size: sliced over dense parameters."""
        return self.sliced_parameters / self.dense_parameters


@contextmanager
def staged_directory(output: Path, expected_bytes: int, resume: bool = False) -> Iterator[Path]:
    """Give a directory beside `output` that becomes `output` when all went well.

    Whatever ends the block early, an interrupt too, removes what was written, unless `resume` says
    that a later run is to go on with it. What a killed run left is never removed.

    Raises:
        UserError: `output` exists, its parent may not be written, or an unfinished directory is
            there that is not to be resumed.
        MachineError: the disk is (or gets) full or fails, or another run writes that directory.

    """
    if output.exists() or output.is_symlink():
        raise UserError(f"--output {str(output)!r} exists already")
    staging = output.with_name(f".{output.name}.partial")
    made = [parent for parent in output.parents if not parent.exists()]
    if staging.exists() and not resume:
        raise UserError(
            f"{str(staging)!r} is left of an unfinished run: go on with --resume, or delete it"
        )
    finished = False
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir(exist_ok=True)
        with _locked(staging):
            free = shutil.disk_usage(staging).free + _size(staging)
            if free < expected_bytes:
                raise MachineError(
                    f"--output {str(output)!r} needs about {expected_bytes / 1e9:.2f} GB and its "
                    f"disk has {free / 1e9:.2f} GB left"
                )
            yield staging
            sync_directory(staging)
            staging.rename(output)
            finished = True
    except OSError as error:
        raise fault(error, MachineError)(
            f"--output {str(output)!r} cannot be written: {error}"
        ) from error
    finally:
        if not finished and not resume:
            shutil.rmtree(staging, ignore_errors=True)
            for parent in made:
                # One that was not made, or that someone else uses by now, stays.
                with suppress(OSError):
                    parent.rmdir()


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold a directory against a second run; the lock ends with the process, killed or not."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise MachineError(f"another run is writing {str(directory)!r}") from error
        yield
    finally:
        os.close(descriptor)


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def sync_directory(directory: Path) -> None:
    """Flush every file of a directory to disk, so that a rename never names half a checkpoint."""
    for path in [*directory.iterdir(), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_sliced_config(directory: Path) -> SlicedConfig:
    """Read and check the config.json of a sliced checkpoint.

    Raises:
        UserError: no such directory, no readable config, not a sliced model, or a newer format.

    """
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(f"DIR {str(directory)!r} is no checkpoint: it holds no config.json")
    fields = read_json_object(path)
    if fields.get("model_type") != MODEL_TYPE:
        raise UserError(
            f"DIR {str(directory)!r} is not a sliced checkpoint; make one with `sliceserve slice`"
        )
    if fields.get("architectures") != [CAUSAL_LM]:
        raise UserError(f"config {str(path)!r} must name the architecture {CAUSAL_LM}")
    parse_slicing(*map(fields.get, ("slicing", "num_hidden_layers", "hidden_size")))
    with reading(f"config {str(path)!r}"):
        config: SlicedConfig = SlicedConfig.from_dict(fields)
        config.base()
    return config


def read_checkpoint_summary(directory: Path) -> CheckpointSummary:
    """Read a sliced checkpoint's headers and check every tensor's name and shape; no weights.

    Raises:
        UserError: not a sliced checkpoint, a newer format, or corrupt, missing or wrong tensors.

    """
    config = read_sliced_config(directory)
    scheme = quantised_scheme(config)
    shards = ShardReader(directory)
    shapes = shards.shapes()
    with reading(f"config of DIR {str(directory)!r}"):
        counted, expected = expected_shapes(config), stored_shapes(config)
    check_shapes(f"DIR {str(directory)!r}", shapes, expected)
    dtype = shards.dtype(counted.keys() - (quantised_linears(config) if scheme else {}).keys())
    if config.dtype != dtype:
        raise UserError(f"DIR {str(directory)!r} holds {dtype}, and its config says {config.dtype}")
    sizes = {name: torch.Size(shape).numel() for name, shape in counted.items()}
    provenance = directory / PROVENANCE
    return CheckpointSummary(
        directory=directory,
        slicing=config.description,
        sliced_parameters=sum(sizes.values()),
        rotation_parameters=sum(
            n for name, n in sizes.items() if f".{ROTATION}." in name or name.startswith(HEAD_MAP)
        ),
        bytes=sum(file.stat().st_size for file in directory.iterdir() if file.is_file()),
        dtype=str(dtype).removeprefix("torch."),
        scheme=scheme,
        provenance=read_json_object(provenance) if provenance.exists() else {},
    )
