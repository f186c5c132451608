"""Linears in fp8 that take rotations in: which of vLLM's can, and how a rotation is rounded.

e4m3 rounds relative to a number's own size as far as 2^14 below its largest: a rotation that shares
a scale with a branch, of a row of weights or of a token, is rounded no worse than with one of its
own, unless the two lie further apart than that.
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
NATIVE = 89  # the compute capability from which GPUs multiply fp8
SCALED = "CutlassFP8ScaledMMLinearKernel"  # takes what is rounded already, with a scale a token


def takes_fp8_rotations(linear: LinearBase, quant_config: Any, architecture: Architecture) -> bool:
    """Whether a linear in fp8 can have rotations as more rows and columns.

    GPUs without fp8 run something that has sizes of its own.

    Args:
        linear: of a layer, to look at.
        quant_config: of vLLM.
        architecture: of the layer.

    """
    if not (current_platform.is_cpu() or current_platform.has_device_capability(NATIVE)):
        return False
    if type(linear.quant_method).__name__ in ONLINE:
        # A layer that is to stay as it is would not be known by its name when joined.
        chosen = getattr(quant_config, "args", None)
        return not quant_config.ignored_layers and getattr(chosen, "targets", None) is None
    scheme: Any = getattr(linear, "scheme", None)
    if type(scheme).__name__ != STORED or scheme.is_static_input_scheme:
        return False
    # Of a product that sums several matrices each was given scales of its own.
    single = all(len(sublayer.writes) == 1 for sublayer in architecture.sublayers)
    return single and scheme.strategy == "channel"


def scaled_product(linear: Any) -> Any:
    """Return vLLM's kernel of a linear, if that takes what was rounded before; else None."""
    holders = (linear.quant_method, getattr(linear, "scheme", None))
    kernel: Any = next(filter(None, (getattr(one, "fp8_linear", None) for one in holders)), None)
    if type(kernel).__name__ != SCALED or envs.VLLM_BATCH_INVARIANT:
        return None
    return kernel if kernel.config.activation_quant_key.scale.group_shape.is_per_token() else None


def round_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix [out, in] to nearest; return it in fp8 and a scale a row, [out, 1]."""
    wide = rows.float()
    scales = wide.abs().amax(1, keepdim=True) / LARGEST
    scales = torch.where(scales > 0, scales, 1.0)
    return (wide / scales).to(FP8), scales


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
    needed = wide.abs().amax(1, keepdim=True) / LARGEST
    known = torch.where(scales > 0, scales, needed.clamp(min=torch.finfo(torch.float32).tiny))
    steps = torch.exp2(torch.log2(needed / known).ceil().clamp(min=0))
    grown = known * steps
    return (weight.float() / steps).to(FP8), (wide / grown).to(FP8), grown
