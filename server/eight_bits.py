"""Linears of eight bits that take rotations in: which of vLLM's can, and how a rotation is rounded.

e4m3 rounds relative to a number's own size as far as 2^14 below its largest: a rotation that shares
a scale with a branch, of a row of weights or of a token, is rounded no worse than with one of its
own, unless the two lie further apart than that. Integers do not bear this. There each direction j
of a rotation A·B is balanced first, A's column j multiplied and B's row j divided by what makes
this row's largest value as large as the branch's weights beside it.
"""

from typing import Any

import torch
from torch import Tensor
from vllm import envs
from vllm.model_executor.layers.linear import LinearBase
from vllm.platforms import current_platform

from sliceserve.kernels.rounded import FP8, LARGEST
from sliceserve.slicing.architectures import Architecture

# Of vLLM: weights that are quantised while they load, with a scale for all of them or one a row.
ONLINE = ("Fp8PerTensorOnlineLinearMethod", "Fp8PtpcOnlineLinearMethod")
STORED = "CompressedTensorsW8A8Fp8"
STORED_INT8 = "CompressedTensorsW8A8Int8"
NATIVE = 89  # the compute capability from which GPUs multiply fp8
SPREAD = 4.0  # how far above the median a row may be in columns beside weights
# They take what is rounded already, with a scale a token.
SCALED = "CutlassFP8ScaledMMLinearKernel"
SCALED_INT8 = "CutlassInt8ScaledMMLinearKernel"


def takes_eight_bit_rotations(
    linear: LinearBase, quant_config: Any, architecture: Architecture
) -> bool:
    """Whether a linear of eight bits can have rotations as more rows and columns.

    GPUs without fp8 run something that has sizes of its own.

    Args:
        linear: of a layer, to look at.
        quant_config: of vLLM.
        architecture: of the layer.

    """
    native = current_platform.is_cpu() or current_platform.has_device_capability(NATIVE)
    if type(linear.quant_method).__name__ in ONLINE:
        # A layer that is to stay as it is would not be known by its name when joined.
        chosen = getattr(quant_config, "args", None)
        return (
            native and not quant_config.ignored_layers and getattr(chosen, "targets", None) is None
        )
    scheme: Any = getattr(linear, "scheme", None)
    stored = type(scheme).__name__
    usable = scheme.input_symmetric if stored == STORED_INT8 else native and stored == STORED
    # Of a product that sums several matrices each was given scales of its own.
    single = all(len(sublayer.writes) == 1 for sublayer in architecture.sublayers)
    return bool(
        usable and single and not scheme.is_static_input_scheme and scheme.strategy == "channel"
    )


def scaled_product(linear: Any) -> Any:
    """Return vLLM's kernel of a linear, if that takes what was rounded before; else None."""
    if envs.VLLM_BATCH_INVARIANT:
        return None
    scheme = getattr(linear, "scheme", None)
    holders = (linear.quant_method, scheme)
    kernel: Any = next(filter(None, (getattr(one, "fp8_linear", None) for one in holders)), None)
    if type(kernel).__name__ == SCALED:
        scale = kernel.config.activation_quant_key.scale
        return kernel if scale.group_shape.is_per_token() else None
    kernel = getattr(scheme, "kernel", None)
    return kernel if type(kernel).__name__ == SCALED_INT8 else None


def round_to(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to nearest, what is too large to the largest."""
    bounded = values.clamp(-LARGEST[dtype], LARGEST[dtype])
    return (bounded if dtype == FP8 else bounded.round()).to(dtype)


def round_rows(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round a matrix [out, in] to nearest; return it and a scale a row, [out, 1]."""
    wide = rows.float()
    scales = wide.abs().amax(1, keepdim=True) / LARGEST[dtype]
    scales = torch.where(scales > 0, scales, 1.0)
    return round_to(wide / scales, dtype), scales


def add_columns(weight: Tensor, scales: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Round columns by the scales of a matrix in fp8 whose rows they are to continue.

    Scales grow where the columns' values need it, by powers of two: what is in fp8 stays exact, but
    for what falls below the smallest normal value.

    Args:
        weight: [out, in] in fp8.
        scales: of its rows, [out, 1].
        columns: [out, more], not rounded.

    Returns:
        The matrix, the columns and the scales, new ones.

    """
    wide = columns.float()
    needed = wide.abs().amax(1, keepdim=True) / LARGEST[FP8]
    known = torch.where(scales > 0, scales, needed.clamp(min=torch.finfo(torch.float32).tiny))
    steps = torch.exp2(torch.log2(needed / known).ceil().clamp(min=0))
    grown = known * steps
    return (weight.float() / steps).to(FP8), round_to(wide / grown, FP8), grown


def add_balanced_columns(
    weight: Tensor, scales: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Round columns by the scales of a matrix in int8 whose rows they are to continue.

    Each column is divided by what makes its largest value fit. Scales stay as they are, but of rows
    whose weights are much smaller beside the columns' than those of most rows: these would decide
    for all others, and are rounded anew.

    Args:
        weight: [out, in] in int8.
        scales: of its rows, [out, 1].
        columns: [out, more], not rounded.

    Returns:
        The matrix, the columns, the scales, and what each column was divided by, [more].

    """
    wide = columns.float()
    known = torch.where(weight.any(1, keepdim=True), scales, 0.0)
    needed = wide.abs().amax(1, keepdim=True) / LARGEST[torch.int8]
    ratios = (needed / known)[(needed > 0) & (known > 0)]
    most = SPREAD * ratios.median() if ratios.numel() else 1.0
    grown = known.maximum(needed / most)
    grown = torch.where(grown > 0, grown, 1.0)
    stored = torch.where(known == grown, weight.float(), weight.float() * known / grown)
    steps = wide / grown
    divisors = steps.abs().amax(0) / LARGEST[torch.int8]
    divisors = torch.where(divisors > 0, divisors, 1.0)
    return (
        round_to(stored, torch.int8), round_to(steps / divisors, torch.int8), grown, divisors,
    )  # fmt: skip
