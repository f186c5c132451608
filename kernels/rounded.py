"""A branch joined with what a rotation adds beside it, rounded to eight bits with a scale a token.

    y = [a ‖ ρ·u], or [silu(g) · v ‖ ρ·u] of a branch that is [g ‖ v]
    s = max|y| / 448, q = y / s in e4m3; or 127 and int8

s is 1 / (448·512) at least, as vLLM has it in fp8, where small values are rounded relative to their
own size. In int8 they are not: there it is 2^-100, which only keeps a row of zeros from being
divided by zero.

q is what [W ; B] of eight bits multiplies. a [tokens, inner] or [tokens, 2·inner], u [tokens,
rank], ρ [tokens, 1], q [tokens, inner + rank], s [tokens, 1] in float32. Left to itself the
compiler writes y to memory and reads it again, and finds the largest of a row in two steps.
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

FP8 = torch.float8_e4m3fn
LARGEST = {FP8: torch.finfo(FP8).max, torch.int8: 127.0}  # of what is used, the same below zero
SMALLEST_SCALES = {FP8: 1 / (LARGEST[FP8] * 512), torch.int8: 2.0**-100}
NEAREST = 1.5 * 2.0**23  # added to a small float32, its lowest bits are the nearest whole number
COLUMNS_OF_A_WARP = 1024  # chosen on an H100


def reference(
    a: Tensor, u: Tensor, rho: Tensor | None, gates: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Compute q and s in plain torch, in float32."""
    left, right = a.float(), u.float()
    if gates:
        gate, up = left.chunk(2, dim=-1)
        left = silu(gate) * up
    if rho is not None:
        right = right * rho
    y = torch.cat([left, right], dim=-1)
    largest = LARGEST[dtype]
    scale = (y.abs().amax(-1, keepdim=True) / largest).clamp(min=SMALLEST_SCALES[dtype])
    bounded = (y / scale).clamp(-largest, largest)
    return (bounded.round() if dtype == torch.int8 else bounded).to(dtype), scale


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _rounded(  # type: ignore[no-untyped-def]
        a_ptr, u_ptr, rho_ptr, q_ptr, s_ptr, inner, rank, a_stride, u_stride, bound, smallest,
        nearest, whole: tl.constexpr, gates: tl.constexpr, divided: tl.constexpr,
        block: tl.constexpr, rank_block: tl.constexpr,
    ):  # fmt: skip
        token = tl.program_id(0).to(tl.int64)
        column, beside = tl.arange(0, block), tl.arange(0, rank_block)
        inside, within = column < inner, beside < rank
        left = tl.load(a_ptr + token * a_stride + column, mask=inside, other=0.0).to(tl.float32)
        if gates:
            up = tl.load(a_ptr + token * a_stride + inner + column, mask=inside, other=0.0)
            left = left / (1 + tl.exp(-left)) * up.to(tl.float32)
        right = tl.load(u_ptr + token * u_stride + beside, mask=within, other=0.0).to(tl.float32)
        if divided:
            right = right * tl.load(rho_ptr + token)
        largest = tl.maximum(tl.max(tl.abs(left)), tl.max(tl.abs(right)))
        scale = tl.maximum(largest / bound, smallest)
        tl.store(s_ptr + token, scale)
        # Few tokens keep few processors busy: what takes time is the number of instructions.
        inverse = 1 / scale
        left, right = left * inverse, right * inverse
        if whole:
            left = (left + nearest).to(tl.int32, bitcast=True)
            right = (right + nearest).to(tl.int32, bitcast=True)
        row = q_ptr + token * (inner + rank)
        tl.store(row + column, left.to(q_ptr.dtype.element_ty), mask=inside)
        tl.store(row + inner + beside, right.to(q_ptr.dtype.element_ty), mask=within)


def launch(
    a: Tensor,
    u: Tensor,
    rho: Tensor | None,
    gates: bool,
    dtype: torch.dtype,
    held: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the kernel; arguments as those of `rounded`, and what holds q if not that dtype."""
    q, scale = _empty(a, u, rho, gates, held or dtype)
    tokens, rank = u.shape
    inner = q.shape[1] - rank
    block = triton.next_power_of_2(inner)
    kernel: Any = _rounded[(tokens,)]
    kernel(
        a, u, rho, q, scale, inner, rank, a.stride(0), u.stride(0), LARGEST[dtype],
        SMALLEST_SCALES[dtype], NEAREST, whole=dtype == torch.int8, gates=gates,
        divided=rho is not None, block=block, rank_block=triton.next_power_of_2(max(rank, 1)),
        num_warps=min(32, max(4, block // COLUMNS_OF_A_WARP)),
    )  # fmt: skip
    return q, scale


@torch.library.custom_op("sliceserve::rounded", mutates_args=())
def rounded(
    a: Tensor, u: Tensor, rho: Tensor | None, gates: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return q and s, by the kernel where there are a GPU and Triton.

    Args:
        a: what the branch computed, or gate and up before their activation; rows may be strided.
        u: the rotation's columns, [tokens, rank]; rows may be strided.
        rho: what a row of u is multiplied by, [tokens, 1] in float32; None for 1.
        gates: whether a is [g ‖ v].
        dtype: of q, float8_e4m3fn or int8.

    Raises:
        ValueError: the shapes or dtypes do not fit each other.

    """
    if a.ndim != 2 or u.ndim != 2 or len(a) != len(u) or a.dtype != u.dtype:
        raise ValueError(
            f"a {list(a.shape)} {a.dtype} and u {list(u.shape)} {u.dtype} must be two matrices of "
            "as many rows and one dtype"
        )
    if rho is not None and (tuple(rho.shape) != (len(a), 1) or rho.dtype != torch.float32):
        raise ValueError(f"rho {list(rho.shape)} {rho.dtype} must be [{len(a)}, 1] in float32")
    if dtype not in LARGEST:
        raise ValueError(f"dtype {dtype} is not one of {', '.join(map(str, LARGEST))}")
    if gates and a.shape[1] % 2:
        raise ValueError(f"a does not have two halves: {a.shape[1]} columns")
    dense = a.stride(1) == u.stride(1) == 1 and (rho is None or rho.is_contiguous())
    usable = triton is not None and a.is_cuda and dense
    return (launch if usable and len(a) else reference)(a, u, rho, gates, dtype)


def _empty(
    a: Tensor,
    u: Tensor,
    rho: Tensor | None,  # noqa: ARG001
    gates: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    inner = a.shape[1] // 2 if gates else a.shape[1]
    q = a.new_empty(a.shape[0], inner + u.shape[1], dtype=dtype)
    return q, a.new_empty(a.shape[0], 1, dtype=torch.float32)


rounded.register_fake(_empty)
