"""What a CPU cannot multiply is refused, by what its products give and not by its name."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from vllm import _custom_ops as ops
from vllm.model_executor.layers.utils import check_cpu_sgl_kernel

from sliceserve.server.cpu import check_products, choose_products, saturates
from sliceserve.slicing.quantised import SCHEMES

EVERY = SimpleNamespace(cpu_gemm_wna16=None, create_onednn_scaled_mm_handler=None)


@pytest.fixture
def product(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have vLLM's product of eight bits shift inputs to 0…255, and bound the sums of pairs."""

    def use(limit: int) -> None:
        def multiply(handler: Tensor, x: Tensor, out: Tensor, *_: Any) -> None:
            pairs = ((x.int() + 128)[:, :, None] * handler.int()).unflatten(1, (-1, 2)).sum(2)
            out.copy_(pairs.clamp(-limit, limit - 1).sum(1) - 128 * handler.int().sum(0))

        monkeypatch.setattr(ops, "create_onednn_scaled_mm", lambda weight, *_, **__: weight)
        monkeypatch.setattr(ops, "onednn_scaled_mm", multiply)

    return use


def test_a_cpu_whose_sums_saturate_is_refused(product: Any) -> None:
    product(2**15)
    assert saturates()
    with pytest.raises(ValueError, match="int8 cannot be served on this CPU: without VNNI"):
        check_products(SCHEMES["int8"], EVERY)
    for scheme in (None, SCHEMES["fp8"], SCHEMES["w4a16"]):
        check_products(scheme, EVERY)
    check_products(SCHEMES["int8"], SimpleNamespace())  # another architecture's product


def test_a_cpu_whose_sums_are_exact_is_not(product: Any) -> None:
    product(2**31)
    assert not saturates()
    check_products(SCHEMES["int8"], EVERY)


def test_a_cpu_without_a_product_of_four_bits_is_refused() -> None:
    with pytest.raises(ValueError, match=r"w4a16 \(groups of 128\) cannot be served on this CPU"):
        check_products(SCHEMES["w4a16"], SimpleNamespace())


def test_it_is_vllms_own_product_that_is_tried() -> None:
    """Against a product by hand of numbers that saturate where any do."""
    x = torch.full((1, 32), 127, dtype=torch.int8)
    weight = torch.full((16, 32), 127, dtype=torch.int8)
    scales = torch.ones(16)  # vLLM keeps no reference to it
    handler = ops.create_onednn_scaled_mm(weight.t(), scales, torch.float32, True, False)
    out = torch.empty(1, 16)
    ops.onednn_scaled_mm(handler, x, out, torch.ones(1, 1), None, None, None)
    wrong = bool((out.double() != x.double() @ weight.double().T).any())
    assert saturates() == wrong
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert saturates() == wrong
    finally:
        torch.set_default_dtype(torch.float32)


def test_amx_multiplies_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where this CPU has AMX, vLLM's own product is asked as well."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    kernels = SimpleNamespace(check_cpu_sgl_kernel=check_cpu_sgl_kernel)
    choose_products(kernels)
    chosen = kernels.check_cpu_sgl_kernel
    choose_products(kernels)
    assert kernels.check_cpu_sgl_kernel is chosen
    shapes = [(32, 32), (48, 64), (432, 576), (160, 96)]
    assert not any(chosen(*shape, torch.int8) for shape in shapes)
    monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.bfloat16)
    assert [chosen(*shape, torch.int8) for shape in shapes] == [True, False, False, True]
    for shape in (*shapes, (32, 24)):  # of other weights vLLM decides
        assert chosen(*shape, torch.bfloat16) == check_cpu_sgl_kernel(*shape, torch.bfloat16)
    monkeypatch.undo()
    if torch.cpu._is_amx_tile_supported():
        for outputs, inputs in shapes:
            weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
            if outputs % 32:
                with pytest.raises(RuntimeError, match="BLOCK_N"):
                    torch.ops._C.convert_weight_packed(weight)
            else:
                packed = torch.ops._C.convert_weight_packed(weight)
                x, scales = torch.full((1, inputs), 127.0).bfloat16(), torch.ones(outputs, 1)
                y = torch.ops._C.int8_scaled_mm_with_quant(x, packed, scales, None, x.dtype, True)
                assert_close(y.double(), x.double() @ weight.double().T, rtol=1e-2, atol=0)
