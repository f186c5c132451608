"""The gated activation of a stream that was not normed, joined with what its rotation reads.

A sliced norm has no weights: it only divides a token's row by ρ = √(mean(x²) + ε). So the product
that reads the stream need not wait for it. With p = [g ‖ v ‖ u] = x·[W_gate ‖ W_up ‖ A],

    y = [silu(g/ρ) · (v/ρ) ‖ u]

is what [W_down ; B] multiplies. x [tokens, width], p [tokens, 2·inner + rank], y [tokens,
inner + rank]; rank may be 0. The kernel reads x and p once and writes y: neither a norm nor a
concatenation is a pass over memory of its own.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# Up to so many tokens: columns of a step, warps, and programs a token, between which its steps are
# divided. Chosen on an H100: many tokens keep it busy with one each, which reads x once.
BLOCKS = ((8, 512, 4, 64), (128, 2048, 8, 64), (512, 2048, 8, 4), (1 << 62, 4096, 16, 1))


def reference(x: Tensor, projected: Tensor, rank: int, eps: float) -> Tensor:
    """Compute y in plain torch, the norm and the activation in float32."""
    inner = (projected.shape[-1] - rank) // 2
    gate, up, beside = torch.split(projected, [inner, inner, rank], dim=-1)
    scale = (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
    active = silu(gate.float() * scale) * (up.float() * scale)
    return torch.cat([active.to(x.dtype), beside], dim=-1)


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _gated(  # type: ignore[no-untyped-def]
        x_ptr, p_ptr, y_ptr, width, inner, rank, eps, x_stride, p_stride, steps,
        stream_block: tl.constexpr, block: tl.constexpr,
    ):  # fmt: skip
        token = tl.program_id(0).to(tl.int64)
        k = tl.arange(0, stream_block)
        x = tl.load(x_ptr + token * x_stride + k, mask=k < width, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x) / width + eps)
        first = tl.program_id(1) * steps
        for step in range(first, first + steps):
            column = step * block + tl.arange(0, block)
            inside, active = column < inner + rank, column < inner
            gate = tl.load(p_ptr + token * p_stride + column, mask=active, other=0.0)
            # What stands `inner` further on is the up half and, after that, u.
            other = tl.load(p_ptr + token * p_stride + inner + column, mask=inside, other=0.0)
            wide = gate.to(tl.float32) * scale
            product = wide / (1 + tl.exp(-wide)) * (other.to(tl.float32) * scale)
            y = tl.where(active, product.to(y_ptr.dtype.element_ty), other)
            tl.store(y_ptr + token * (inner + rank) + column, y, mask=inside)


def launch(x: Tensor, projected: Tensor, rank: int, eps: float) -> Tensor:
    """Run the kernel; arguments as those of `gated`."""
    tokens, columns = projected.shape
    inner = (columns - rank) // 2
    y = x.new_empty(tokens, inner + rank)
    block, warps, programs = next(rest for most, *rest in BLOCKS if tokens <= most)
    blocks = triton.cdiv(inner + rank, block)
    steps = triton.cdiv(blocks, programs)
    kernel: Any = _gated[tokens, triton.cdiv(blocks, steps)]
    kernel(
        x, projected, y, x.shape[1], inner, rank, eps, x.stride(0), projected.stride(0), steps,
        stream_block=triton.next_power_of_2(x.shape[1]), block=block, num_warps=warps,
    )  # fmt: skip
    return y


@torch.library.custom_op("sliceserve::gated", mutates_args=())
def gated(x: Tensor, projected: Tensor, rank: int, eps: float) -> Tensor:
    """Return y, by the kernel where there are a GPU and Triton.

    Args:
        x: the residual stream, [tokens, width]; rows may be strided.
        projected: its product, [tokens, 2·inner + rank]; rows may be strided.
        rank: columns at the end that are passed on.
        eps: of the norm.

    Raises:
        ValueError: the shapes or dtypes do not fit each other.

    """
    if x.ndim != 2 or projected.ndim != 2 or len(x) != len(projected) or x.dtype != projected.dtype:
        raise ValueError(
            f"x {list(x.shape)} {x.dtype} and projected {list(projected.shape)} {projected.dtype} "
            "must be two matrices of as many rows and one dtype"
        )
    if rank < 0 or projected.shape[1] <= rank or (projected.shape[1] - rank) % 2:
        raise ValueError(f"rank {rank} does not leave two halves of {projected.shape[1]} columns")
    usable = triton is not None and x.is_cuda and x.stride(1) == projected.stride(1) == 1
    return (launch if usable and len(x) else reference)(x, projected, rank, eps)


@gated.register_fake
def _(x: Tensor, projected: Tensor, rank: int, eps: float) -> Tensor:  # noqa: ARG001
    return x.new_empty(x.shape[0], (projected.shape[1] - rank) // 2 + rank)
