"""Queries, keys and values, and a rotation's columns, each where attention or its output wants it.

As in `kernels.gated` the norm waits until after the product that reads. With ρ = √(mean(x²) + ε),
p = [q ‖ k ‖ v ‖ u] = x·[W_q ‖ W_k ‖ W_v ‖ A] and R the rotary embedding of a token's position,

    queries ← R(q/ρ),  keys[slot] ← R(k/ρ),  values[slot] ← v/ρ,  joined[:, last columns] ← u

and where it did not wait, p = (x/ρ)·[…], the same of R(q), R(k), v and ρu. x [tokens, width], p
[tokens, (heads + 2·kv_heads)·size + rank], queries [tokens, heads, size], the caches [blocks, block
size, kv_heads, size], joined [tokens, in] what [W_o ; B] multiplies, whose first columns attention
writes; rank may be 0. R turns the pairs (i, i + size/2) of a head, of which a row of cos_sin holds
the cosines and then the sines. One kernel reads p once, where there are a norm, a rotary embedding,
a concatenation and a copy into the cache otherwise.
"""

from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# Up to so many tokens: heads of a step, warps, and programs a token, between which its steps are
# divided. Chosen on an H100.
BLOCKS = ((8, 8, 4, 64), (64, 16, 4, 64), (256, 16, 4, 2), (1 << 62, 16, 4, 1))


def turned(
    x: Tensor,
    projected: Tensor,
    angles: Tensor,
    kv_heads: int,
    queries: Tensor,
    joined: Tensor,
    eps: float,
    normed: bool,
) -> tuple[Tensor, Tensor]:
    """Write queries and u, and return keys and values, [tokens, kv_heads, size], in plain torch.

    Args:
        x: the stream.
        projected: its product.
        angles: cosines and sines of each token, [tokens, size].
        kv_heads: of keys and of values.
        queries: written, as by `placed`.
        joined: the same.
        eps: of the norm.
        normed: whether the product is of the normed stream.

    """
    heads, size = queries.shape[1:]
    columns = (heads + 2 * kv_heads) * size
    # What is returned shares no memory with the product, which may be written over by it.
    own, u = projected[:, :columns].to(torch.float32, copy=True), projected[:, columns:]
    rho = (x.float().square().mean(-1, keepdim=True) + eps).sqrt()
    if normed:
        u = (u * rho).to(x.dtype)
    else:
        own = own / rho
    own = own.view(len(own), heads + 2 * kv_heads, size)
    q, k, v = torch.split(own, [heads, kv_heads, kv_heads], dim=1)
    cos, sin = angles.float()[:, None].chunk(2, dim=-1)

    def turn(part: Tensor) -> Tensor:
        a, b = part.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)

    queries.copy_(turn(q))
    joined[:, joined.shape[1] - u.shape[1] :] = u
    return turn(k), v.to(x.dtype)


def reference(
    x: Tensor,
    projected: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    slots: Tensor,
    caches: tuple[Tensor, Tensor],
    queries: Tensor,
    joined: Tensor,
    eps: float,
    normed: bool,
) -> None:
    """Do the same in plain torch."""
    _, block_size, kv_heads, _ = caches[0].shape
    angles = cos_sin[positions]
    keys_and_values = turned(x, projected, angles, kv_heads, queries, joined, eps, normed)
    kept = slots >= 0
    at = slots[kept] // block_size, slots[kept] % block_size
    for cache, part in zip(caches, keys_and_values, strict=True):
        cache[at] = part[: len(slots)][kept]


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _mean_square(row, width, block: tl.constexpr):  # type: ignore[no-untyped-def]
        column = tl.arange(0, block)
        x = tl.load(row + column, mask=column < width, other=0.0).to(tl.float32)
        return tl.sum(x * x) / width

    # What differs from step to step, or before there is a cache: no kernel is to be compiled anew.
    @triton.jit(do_not_specialize=["stored", "block_size"])  # type: ignore[untyped-decorator]
    def _placed(  # type: ignore[no-untyped-def]
        x_ptr, p_ptr, position_ptr, turn_ptr, slot_ptr, key_ptr, value_ptr, q_ptr, joined_ptr,
        width, heads, kv_heads, half, rank, eps, stored, block_size, x_stride, p_stride,
        turn_stride, joined_stride, key_block, key_place, key_head, value_block, value_place,
        value_head, steps, stream_block: tl.constexpr, rank_block: tl.constexpr,
        head_block: tl.constexpr, half_block: tl.constexpr, normed: tl.constexpr,
    ):  # fmt: skip
        token = tl.program_id(0).to(tl.int64)
        stream = x_ptr + token * x_stride
        scale = 1.0 if normed else tl.rsqrt(_mean_square(stream, width, stream_block) + eps)
        total, row = heads + 2 * kv_heads, p_ptr + token * p_stride
        if tl.program_id(1) == 0:
            beside = tl.arange(0, rank_block)
            u = tl.load(row + total * 2 * half + beside, mask=beside < rank, other=0.0)
            if normed:
                rho = tl.sqrt(_mean_square(stream, width, stream_block) + eps)
                u = (u.to(tl.float32) * rho).to(u.dtype)
            last = joined_ptr + token * joined_stride
            tl.store(last + beside, u, mask=beside < rank)
        pair = tl.arange(0, half_block)
        paired = pair < half
        turn = turn_ptr + tl.load(position_ptr + token) * turn_stride + pair
        cos = tl.load(turn, mask=paired, other=0.0).to(tl.float32)[None, :]
        sin = tl.load(turn + half, mask=paired, other=0.0).to(tl.float32)[None, :]
        slot = tl.load(slot_ptr + token, mask=token < stored, other=-1).to(tl.int64)
        block, place = slot // block_size, slot % block_size
        kept = tl.where(slot >= 0, total, 0)
        start = tl.program_id(1) * steps
        for step in range(start, start + steps):
            head = (step * head_block + tl.arange(0, head_block))[:, None]
            inside = (head < total) & paired[None, :]
            at = head * 2 * half + pair[None, :]
            a = tl.load(row + at, mask=inside, other=0.0).to(tl.float32) * scale
            b = tl.load(row + at + half, mask=inside, other=0.0).to(tl.float32) * scale
            c = tl.where(head < heads + kv_heads, cos, 1.0)  # values are not turned
            s = tl.where(head < heads + kv_heads, sin, 0.0)
            first = (a * c - b * s).to(q_ptr.dtype.element_ty)
            second = (b * c + a * s).to(q_ptr.dtype.element_ty)
            query = q_ptr + token * heads * 2 * half + at
            tl.store(query, first, mask=inside & (head < heads))
            tl.store(query + half, second, mask=inside & (head < heads))
            inside = inside & (head >= heads) & (head < kept)
            own = head - heads
            key = key_ptr + block * key_block + place * key_place + own * key_head + pair[None, :]
            tl.store(key, first, mask=inside & (own < kv_heads))
            tl.store(key + half, second, mask=inside & (own < kv_heads))
            own -= kv_heads
            value = value_ptr + block * value_block + place * value_place + own * value_head
            value += pair[None, :]
            tl.store(value, first, mask=inside & (own >= 0))
            tl.store(value + half, second, mask=inside & (own >= 0))


def launch(
    x: Tensor,
    projected: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    slots: Tensor,
    caches: tuple[Tensor, Tensor],
    queries: Tensor,
    joined: Tensor,
    eps: float,
    normed: bool,
) -> None:
    """Run the kernel; arguments as those of `placed`."""
    keys, values = caches
    tokens, heads, size = queries.shape
    kv_heads = keys.shape[2]
    total = heads + 2 * kv_heads
    rank = projected.shape[1] - total * size
    head_block, warps, programs = next(rest for most, *rest in BLOCKS if tokens <= most)
    blocks = triton.cdiv(total, head_block)
    steps = triton.cdiv(blocks, programs)
    kernel: Any = _placed[tokens, triton.cdiv(blocks, steps)]
    kernel(
        x, projected, positions, cos_sin, slots, keys, values, queries,
        joined[:, joined.shape[1] - rank :], x.shape[1], heads, kv_heads, size // 2, rank, eps,
        len(slots), keys.shape[1], x.stride(0), projected.stride(0), cos_sin.stride(0),
        joined.stride(0), *keys.stride()[:3], *values.stride()[:3], steps,
        stream_block=triton.next_power_of_2(x.shape[1]),
        rank_block=triton.next_power_of_2(max(rank, 1)), head_block=head_block,
        half_block=triton.next_power_of_2(size // 2), normed=normed, num_warps=warps,
    )  # fmt: skip


def placed(
    x: Tensor,
    projected: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    slots: Tensor,
    caches: tuple[Tensor, Tensor],
    queries: Tensor,
    joined: Tensor,
    eps: float,
    normed: bool,
) -> None:
    """Write queries, keys, values and u, by the kernel where there are a GPU and Triton.

    Args:
        x: the residual stream, [tokens, width]; rows may be strided.
        projected: its product, [tokens, (heads + 2·kv_heads)·size + rank]; rows may be strided.
        positions: of the tokens, whole numbers [tokens].
        cos_sin: [positions, size]; half of a row cosines, half sines.
        slots: of the first tokens in the cache, [at most tokens]: which block times its size, and
            the place in it; below zero for none.
        caches: keys and values, [blocks, block size, kv_heads, size], of any strides but the last.
        queries: [tokens, heads, size], contiguous; written.
        joined: [tokens, rank or more]; the last `rank` columns are written.
        eps: of the norm.
        normed: whether the product is of the normed stream.

    Raises:
        ValueError: the shapes or dtypes do not fit each other.

    """
    keys, values = caches
    tokens, heads, size = queries.shape
    columns = (heads + 2 * keys.shape[2]) * size
    fits = (
        len(x) == len(projected) == len(positions) == len(joined) == tokens >= len(slots)
        and keys.shape == values.shape
        and cos_sin.shape[1] == keys.shape[3] == size
        and size % 2 == 0
        and 0 <= projected.shape[1] - columns <= joined.shape[1]
        and len({t.dtype for t in (x, projected, keys, values, queries, joined)}) == 1
    )
    if not fits:
        named = {"x": x, "projected": projected, "positions": positions, "cos_sin": cos_sin,
                 "slots": slots, "keys": keys, "values": values, "queries": queries,
                 "joined": joined}  # fmt: skip
        told = ", ".join(f"{name} {list(t.shape)} {t.dtype}" for name, t in named.items())
        raise ValueError(f"placed: these do not fit each other: {told}")
    in_rows = all(t.stride(-1) == 1 for t in (x, projected, cos_sin, keys, values, joined))
    listed = positions.is_contiguous() and slots.is_contiguous() and queries.is_contiguous()
    usable = triton is not None and x.is_cuda and in_rows and listed
    run = launch if usable and tokens else reference
    run(x, projected, positions, cos_sin, slots, caches, queries, joined, eps, normed)
