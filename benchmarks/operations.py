"""What our kernels take beside what torch.compile makes of the same, on one GPU.

    python benchmarks/operations.py llama-2-7b llama-2-13b llama-2-70b

Bfloat16, a quarter of the width deleted, low-rank rotations of the default rank, each as a CUDA
graph. Microseconds a call, compiled and ours, and their ratio. `gated`: norm, activation and
concatenation, without the products. `accumulate`: the product that writes, with its addition.
`placed`: norm, rotary embedding, the KV cache's update (compiled: by vLLM's kernel) and the
rotation's columns; where the norm does not wait, ours has it as the compiler makes it. `rounded`:
joined with those and rounded to fp8 or int8, a scale a token.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from cuda_graph import seconds_in_turn
from shapes import GATED, SHAPES
from torch import Tensor
from torch.nn.functional import linear, silu
from vllm import _custom_ops as vllm_operations
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

from sliceserve.kernels.accumulate import accumulate
from sliceserve.kernels.gated import gated
from sliceserve.kernels.placed import placed
from sliceserve.kernels.rounded import FP8, reference, rounded
from sliceserve.slicing.rotations import default_rank
from sliceserve.slicing.shape import sliced_width

EPS = 1e-5
HEAD, BLOCK = 128, 16  # the size of a head, and tokens of a block of the KV cache
CALLS, REPLAYS = 8, 10
ROUNDED = {"rounded to fp8": FP8, "rounded to int8": torch.int8}
NAMES = (
    "gated",
    "placed",
    "placed, normed before",
    "accumulate",
    *(f"{name}{of}" for name in ROUNDED for of in (", gated", "")),
)

Forms = tuple[Callable[[], object], Callable[[], object]]  # compiled, and ours


def microseconds(forms: Forms) -> tuple[float, float]:
    """Return the times of a call of each."""
    first, second = seconds_in_turn(forms, CALLS, REPLAYS)
    return first * 1e6, second * 1e6


def normed_and_joined(x: Tensor, projected: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return what the product reads, and what it writes joined with the rotation's columns."""
    inner = (projected.shape[1] - rank) // 2
    read, rho = normed(x)
    gate, up, beside = projected.split([inner, inner, rank], dim=-1)
    return read, torch.cat([silu(gate) * up, beside * rho], dim=-1)


def normed(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the product reads, and what the norm divided by."""
    square = x.float().square().mean(-1, keepdim=True) + EPS
    return (x.float() * square.rsqrt()).to(x.dtype), square.sqrt().to(x.dtype)


def read_normed(x: Tensor) -> Tensor:
    """Return what the product reads."""
    read, _ = normed(x)
    return read


def turned_and_joined(
    rho: Tensor, projected: Tensor, positions: Tensor, cos_sin: Tensor, joined: Tensor, heads: int,
    kv_heads: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return queries and keys, as vLLM has them compiled, and write the rotation's columns."""
    sizes = [heads * HEAD, kv_heads * HEAD, kv_heads * HEAD]
    q, k, _, u = projected.split([*sizes, projected.shape[1] - sum(sizes)], dim=-1)
    joined[:, heads * HEAD :] = u * rho
    turned: tuple[Tensor, Tensor] = RotaryEmbedding.forward_static(
        positions, q, k, HEAD, HEAD, cos_sin, True
    )
    return turned


def placing(tokens: int, heads: int, kv_heads: int, width: int, rank: int, before: bool) -> Forms:
    """Return what is between a product and attention, and the norm before it, compiled and ours."""

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")

    x, projected = random(tokens, width), random(tokens, (heads + 2 * kv_heads) * HEAD + rank)
    caches = random(-(-tokens // BLOCK), 2, BLOCK, kv_heads, HEAD).unbind(1)
    queries, joined = random(tokens, heads, HEAD), random(tokens, heads * HEAD + rank)
    slots, cos_sin = torch.arange(tokens, device="cuda"), random(4096, HEAD)
    positions, one = slots % 2048, torch.ones(1, device="cuda")
    norms, turns, reads = map(torch.compile, (normed, turned_and_joined, read_normed))
    values = projected[:, (heads + kv_heads) * HEAD : (heads + 2 * kv_heads) * HEAD]

    def compiled() -> None:
        _, rho = norms(x)
        _, keys = turns(rho, projected, positions, cos_sin, joined, heads, kv_heads)
        key_and_value = (part.unflatten(-1, (kv_heads, HEAD)) for part in (keys, values))
        vllm_operations.reshape_and_cache_flash(*key_and_value, *caches, slots, "auto", one, one)

    def ours() -> None:
        if before:
            reads(x)
        placed(x, projected, positions, cos_sin, slots, caches, queries, joined, EPS, before)

    return compiled, ours


def added(x: Tensor, a: Tensor, weight: Tensor) -> Tensor:
    """Return the stream with a product added."""
    return x + linear(a, weight)


def operations(
    tokens: int, hidden: int, kv_heads: int, width: int, inner: int, rank: int
) -> dict[str, Forms]:
    """Return the operations by name."""

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device="cuda") / 64

    x, projected = random(tokens, width), random(tokens, 2 * inner + rank)
    a, weight = random(tokens, inner + rank), random(width, inner + rank)
    rho = torch.rand(tokens, 1, device="cuda")
    attention, beside = random(tokens, hidden), random(tokens, rank)
    joins, adds, rounds = map(torch.compile, (normed_and_joined, added, reference))
    gate_up, u = projected.split([2 * inner, rank], dim=-1)
    found = {
        "gated": (lambda: joins(x, projected, rank), lambda: gated(x, projected, rank, EPS)),
        "placed": placing(tokens, hidden // HEAD, kv_heads, width, rank, False),
        "placed, normed before": placing(tokens, hidden // HEAD, kv_heads, width, rank, True),
        "accumulate": (lambda: adds(x, a, weight), lambda: accumulate(x, a, weight)),
    }
    for name, dtype in ROUNDED.items():
        gates = (gate_up, u, rho, True, dtype)
        joined = (attention, beside, None, False, dtype)
        for key, case in {f"{name}, gated": gates, name: joined}.items():
            found[key] = partial(rounds, *case), partial(rounded, *case)
    return found


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("shapes", nargs="+", choices=GATED)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 64, 256, 1024, 8192])
    parser.add_argument("--only", nargs="+", choices=NAMES, help="some, by the names in the table")
    options = parser.parse_args()
    print(
        "| operation | shape | " + " | ".join(f"{count} tokens" for count in options.tokens) + " |"
    )
    print("| --- | --- |" + " ---: |" * len(options.tokens))
    for shape in options.shapes:
        hidden, inner = SHAPES[shape]["hidden_size"], SHAPES[shape]["intermediate_size"]
        width, rank = sliced_width(hidden, 0.25, 128), default_rank(hidden)
        kv_heads = SHAPES[shape].get("num_key_value_heads", hidden // HEAD)
        columns = []
        for count in options.tokens:
            torch.compiler.reset()
            found = operations(count, hidden, kv_heads, width, inner, rank)
            columns.append({name: microseconds(found[name]) for name in options.only or found})
        for name in columns[0]:
            cells = (
                f"{compiled:.1f} → {ours:.1f} ({ours / compiled:.2f})"
                for compiled, ours in (column[name] for column in columns)
            )
            print(f"| {name} | {shape} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
