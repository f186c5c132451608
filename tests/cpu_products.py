"""Products of quantised weights for CPUs on which vLLM has none, or one that is wrong.

The one of four bits needs AVX-512; in that of eight sums saturate without VNNI. These take what
vLLM gives to its own, weights repacked and tokens rounded; all else of vLLM is as it is.
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.platforms import current_platform

from sliceserve.server.cpu import saturates

FOUR_BITS = "cpu_gemm_wna16"
COLUMNS = 16  # outputs whose weights of four bits vLLM puts together


def stand_in_where_needed() -> torch.library.Library | None:
    """Bring the products that this CPU lacks, as long as what is returned is kept."""
    if not current_platform.is_cpu():
        return None
    if saturates():
        exact_in_eight_bits()
    if hasattr(torch.ops._C, FOUR_BITS):
        return None
    library = torch.library.Library("_C", "FRAGMENT")
    # vLLM 0.24 has one argument more, of weights whose inputs were sorted; none are here.
    sorts = "g_idx" in inspect.signature(getattr(ops, FOUR_BITS)).parameters
    library.define(
        f"{FOUR_BITS}(Tensor x, Tensor weight, Tensor(a!) out, Tensor scales, Tensor? zeros, "
        f"{'Tensor? g_idx, ' if sorts else ''}Tensor? bias, int pack, str isa) -> ()"
    )
    library.impl(FOUR_BITS, multiply_sorted if sorts else multiply, "CPU")
    return library


def exact_in_eight_bits() -> None:
    """Replace vLLM's product by one in float64."""
    create = ops.create_onednn_scaled_mm

    def remember(weight: Tensor, weight_scales: Tensor, *rest: Any, **named: Any) -> Any:
        handler = create(weight, weight_scales, *rest, **named)
        handler.scaled = weight.double() * weight_scales.flatten()
        return handler

    def multiply_exactly(
        handler: Any, x: Tensor, output: Tensor, scale: Tensor, zero: None, _: Any, bias: Any
    ) -> Tensor:
        assert zero is None
        product = (x.double() @ handler.scaled) * scale
        return output.copy_(product if bias is None else product + bias)

    ops.create_onednn_scaled_mm, ops.onednn_scaled_mm = remember, multiply_exactly


def multiply(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    pack: int,
    isa: str,
) -> None:
    """Write x·W (+ bias) with W multiplied out in float32."""
    assert zeros is None
    assert isa == "vec"
    inputs, outputs = x.shape[1], scales.shape[1]
    blocks = weight.view(outputs // COLUMNS, inputs, COLUMNS // pack)
    rows = blocks.permute(1, 0, 2).reshape(inputs, outputs // pack)
    numbers = torch.stack([rows >> 4 * place & 15 for place in range(pack)], -1).flatten(1) - 8
    dense = numbers * scales.float().repeat_interleave(inputs // scales.shape[0], 0)
    product = x.float() @ dense
    out.copy_(product if bias is None else product + bias)


def multiply_sorted(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    g_idx: Tensor | None,
    *rest: Any,
) -> None:
    """Do what `multiply` does, of weights that are in the order of the inputs."""
    assert g_idx is None
    multiply(x, weight, out, scales, zeros, *rest)
