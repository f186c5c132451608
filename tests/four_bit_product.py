"""vLLM's product of four-bit weights for CPUs without AVX-512, which its own kernel needs.

It reads weights as vLLM has repacked them for its own; all else of vLLM is as it is.
"""

import torch
from torch import Tensor

NAME = "cpu_gemm_wna16"
COLUMNS = 16  # outputs whose weights vLLM puts together


def has_kernel() -> bool:
    """Whether vLLM brings the product itself."""
    import vllm._custom_ops  # noqa: F401 - loads the library that fits the CPU

    return hasattr(torch.ops._C, NAME)


def define_where_missing() -> torch.library.Library | None:
    """Define the product for this process, as long as what is returned is kept."""
    if has_kernel():
        return None
    library = torch.library.Library("_C", "FRAGMENT")
    library.define(
        f"{NAME}(Tensor x, Tensor weight, Tensor(a!) out, Tensor scales, Tensor? zeros, "
        "Tensor? bias, int pack, str isa) -> ()"
    )
    library.impl(NAME, multiply, "CPU")
    return library


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
