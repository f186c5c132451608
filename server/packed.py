"""Linears of four bits that take rotations in: which of vLLM's can, and how a rotation is packed.

A group of a row's inputs has a scale of its own, and what a linear reads stays as it is: rotations
that are rounded to nearest as more rows and columns change neither. Kernels for four bits multiply
whole tiles, which rotations are filled up to with zeros. vLLM can also be told to round what such
a linear reads, a token at a time; then rotations stay beside it.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm import envs
from vllm.model_executor.layers.linear import LinearBase
from vllm.platforms import current_platform

from sliceserve.slicing.packing import Packer
from sliceserve.slicing.parsing import GROUP_SIZES
from sliceserve.slicing.quantised import INT32_BITS, SCHEMES

STORED = "CompressedTensorsWNA16"
FOUR_BITS = SCHEMES["w4a16"]
PACKED = INT32_BITS // FOUR_BITS.bits  # weights in a number of `weight_packed`
TILE = 128  # outputs or inputs, whole groups of any size


def group_size(linear: LinearBase) -> int | None:
    """Return how many inputs of a linear share a scale; None if rotations cannot be packed for it.

    Args:
        linear: of vLLM, whose `scheme` says how it is quantised.

    """
    scheme: Any = getattr(linear, "scheme", None)
    if (
        type(scheme).__name__ != STORED
        or scheme.pack_factor != PACKED
        or not scheme.symmetric
        or getattr(scheme, "has_g_idx", False)
        or _rounds_inputs(linear.params_dtype)
    ):
        return None
    return scheme.group_size if scheme.group_size in GROUP_SIZES else None


def _rounds_inputs(dtype: torch.dtype) -> bool:
    """Whether vLLM rounds what linears of four bits read to eight."""
    on_cpu = envs.VLLM_CPU_INT4_W4A8 and dtype == torch.bfloat16
    if current_platform.is_cpu():
        return bool(on_cpu and torch.cpu._is_amx_tile_supported())
    return envs.VLLM_MARLIN_INPUT_DTYPE is not None


def pack(matrix: Tensor, group: int) -> dict[str, Tensor]:
    """Round a matrix to nearest and pack it.

    Args:
        matrix: [out, in].
        group: inputs that share a scale.

    Returns:
        `weight_packed` [out, in / 8] and `weight_scale` [out, in / group].

    """
    packer = Packer(replace(FOUR_BITS, group_size=group))
    packed = packer.pack(matrix, packer.scales(matrix))
    return {name: packed[name] for name in ("weight_packed", "weight_scale")}
