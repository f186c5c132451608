"""Weights that vLLM cannot multiply on this CPU, or not rightly, refused before they run.

Where another of its products can, that is chosen.
"""

import functools
from typing import Any

import torch

from sliceserve.slicing.quantised import Scheme

LARGEST, INPUTS, OUTPUTS = 127, 64, 16  # of a product that shows whether sums saturate
TILE = 32  # outputs of vLLM's product of eight bits by AMX


def check_products(scheme: Scheme | None, products: Any) -> None:
    """Check that vLLM multiplies weights of a scheme on this CPU.

    Args:
        scheme: of the weights; None for those that are not quantised.
        products: vLLM's operations, `torch.ops._C`.

    Raises:
        ValueError: it does not, or its sums are wrong.

    """
    if scheme is None:
        return
    if scheme.bits < 8 and not hasattr(products, "cpu_gemm_wna16"):
        raise ValueError(
            f"{scheme} cannot be served on this CPU: what vLLM multiplies such weights by needs "
            "AVX-512"
        )
    if (
        scheme.name == "int8"
        and hasattr(products, "create_onednn_scaled_mm_handler")
        and saturates()
    ):
        raise ValueError(
            f"{scheme} cannot be served on this CPU: without VNNI, sums of vLLM's products of "
            "eight bits saturate, and answers are wrong"
        )


def choose_products(kernels: Any) -> None:
    """Have vLLM multiply eight bits by AMX only where its product for that can.

    That takes activations of 16 bits, and whole tiles of outputs. vLLM 0.32 gives it others too,
    and fails while it loads a model or at its first request; oneDNN's product takes them all.

    Args:
        kernels: vLLM's module of products of eight bits for CPUs, which asks for each matrix
            [outputs, inputs] while it is loaded; called again, this changes nothing.

    """
    fits = kernels.check_cpu_sgl_kernel
    if hasattr(fits, "__wrapped__"):
        return

    @functools.wraps(fits)
    def fits_in_tiles(outputs: int, inputs: int, dtype: torch.dtype) -> bool:
        # While a model is made, the default dtype is the model's.
        whole = outputs % TILE == 0 and torch.get_default_dtype().itemsize == 2
        return bool(fits(outputs, inputs, dtype)) and (whole or dtype != torch.int8)

    kernels.check_cpu_sgl_kernel = fits_in_tiles


def saturates() -> bool:
    """Whether two products of eight bits are summed in 16 here, which large ones do not fit."""
    from vllm import _custom_ops as ops

    weight = torch.full((OUTPUTS, INPUTS), LARGEST, dtype=torch.int8)
    x = torch.full((1, INPUTS), LARGEST, dtype=torch.int8)
    # While a model is made, the default dtype is the model's.
    scales = torch.ones(1, OUTPUTS, dtype=torch.float32)
    out = torch.empty_like(scales)
    handler = ops.create_onednn_scaled_mm(
        weight.t(), scales[0], out.dtype, dynamic_quant=True, use_azp=False
    )
    ops.onednn_scaled_mm(handler, x, out, scales[:, :1].contiguous(), None, None, None)
    return bool((out != LARGEST * LARGEST * INPUTS).any())
