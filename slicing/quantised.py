"""What a quantised checkpoint holds: the schemes, their tensors, and how a config names them.

The formats are those of compressed-tensors; `quantize` writes them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sliceserve.slicing.architectures import find_architecture
from sliceserve.slicing.config import SlicedConfig
from sliceserve.slicing.errors import UserError
from sliceserve.slicing.modeling import ROTATION, expected_shapes

INT32_BITS = 32  # of the numbers that weights of fewer than eight bits are packed into


@dataclass(frozen=True)
class Scheme:
    """How linears are quantised.

    Attributes:
        name: as `quantize --scheme` takes it.
        preset: its name in compressed-tensors.
        format: that its weights are stored in.
        bits: of a weight.
        group_size: inputs that share a scale; None for one scale a row.

    """

    name: str
    preset: str
    format: str
    bits: int
    group_size: int | None = None

    def __str__(self) -> str:
        groups = "" if self.group_size is None else f" (groups of {self.group_size})"
        return f"{self.name}{groups}"

    def tensors(self, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
        """Return names, relative to the linear, and shapes that a weight is stored as."""
        scales = (outputs, 1 if self.group_size is None else inputs // self.group_size)
        if self.bits == 8:
            return {"weight": (outputs, inputs), "weight_scale": scales}
        packed = (outputs, inputs * self.bits // INT32_BITS)
        return {"weight_packed": packed, "weight_scale": scales, "weight_shape": (2,)}

    def weight_bytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """Return the bytes of a weight [outputs, inputs]; a scale a row is not counted."""
        outputs, inputs = shape
        groups = 0 if self.group_size is None else -(-inputs // self.group_size)
        return outputs * (inputs * self.bits // 8 + groups * dtype.itemsize)


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("fp8", "FP8_DYNAMIC", "float-quantized", 8),
        Scheme("int8", "INT8", "int-quantized", 8),
        Scheme("w4a16", "W4A16", "pack-quantized", 4, 128),
    )
}


def quantised_linears(config: SlicedConfig) -> dict[str, tuple[int, int]]:
    """Return names and shapes [outputs, inputs] of the weights that are quantised where any are."""
    architecture = find_architecture(config.description.architecture)
    return {
        name: (shape[0], shape[1])
        for name, shape in expected_shapes(config).items()
        if name.startswith(f"{architecture.layers}.")
        and name.endswith(".weight")
        and len(shape) == 2
        and f".{ROTATION}." not in name
    }


def stored_shapes(config: SlicedConfig) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor of a checkpoint, quantised or not.

    Raises:
        UserError: another tool has quantised it, in a format of its own.

    """
    shapes = expected_shapes(config)
    scheme = quantised_scheme(config)
    if scheme is not None:
        for name, shape in quantised_linears(config).items():
            del shapes[name]
            path = name.removesuffix(".weight")
            shapes |= {f"{path}.{leaf}": tensor for leaf, tensor in scheme.tensors(*shape).items()}
    return shapes


def quantised_scheme(config: SlicedConfig) -> Scheme | None:
    """Return the scheme that `quantize` stored the linears in; None if it did not.

    Raises:
        UserError: another tool has, in a format of its own.

    """
    fields = getattr(config, "quantization_config", None)
    if fields is None:
        return None
    given = fields.get("format") if isinstance(fields, dict) else None
    for scheme in SCHEMES.values():
        if scheme.format == given:
            return scheme if scheme.group_size is None else _grouped(scheme, fields)
    raise UserError(f"quantization_config of config.json: format {given!r} is not known")


def _grouped(scheme: Scheme, fields: Mapping[str, Any]) -> Scheme:
    """Return a scheme with the group size and bits of a config checked."""
    try:
        (group,) = fields["config_groups"].values()
        size, bits = group["weights"]["group_size"], group["weights"]["num_bits"]
    except (KeyError, TypeError, ValueError, AttributeError):
        size, bits = None, None
    if bits != scheme.bits or not isinstance(size, int) or size < 1:
        raise UserError(
            f"quantization_config of config.json: {scheme.format} needs one group of "
            f"{scheme.bits} bits with a group_size, not {bits} bits with {size}"
        )
    return replace(scheme, group_size=size)


def check_unquantised(directory: Path, config: SlicedConfig, command: str) -> None:
    """Check that a command that needs the weights as they were gets them.

    Raises:
        UserError: they are quantised.

    """
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"DIR {str(directory)!r} is quantised: {command} needs the checkpoint it was made from"
        )
