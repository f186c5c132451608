"""The kernels: through Triton's interpreter on the CPU, against float64."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from oldest import OLDEST
from torch import Tensor
from torch.nn.functional import silu
from torch.testing import assert_close
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends import flash_attn

from sliceserve.kernels import accumulate as added
from sliceserve.kernels import gated as compiled
from sliceserve.kernels.accumulate import accumulate
from sliceserve.kernels.placed import placed
from sliceserve.kernels.rounded import FP8, rounded
from sliceserve.server.placing import split_cache

EPS = 1e-5
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
# Tokens, width, inner, rank: one row, odd sizes, no rotation, more than a program's columns.
SIZES = [(1, 96, 40, 0), (5, 101, 57, 13), (3, 64, 600, 24), (130, 32, 16, 8), (2, 8, 2100, 4)]


def exact(x: Tensor, projected: Tensor, rank: int) -> Tensor:
    inner = (projected.shape[1] - rank) // 2
    wide, divided = projected.double(), (x.double().square().mean(-1, keepdim=True) + EPS).sqrt()
    gate, up = wide[:, :inner] / divided, wide[:, inner : 2 * inner] / divided
    return torch.cat([silu(gate) * up, wide[:, 2 * inner :]], -1)


def inputs(dtype: torch.dtype, size: tuple[int, int, int, int]) -> tuple[Tensor, Tensor, int]:
    """A stream and its product, both views of wider matrices."""
    tokens, width, inner, rank = size
    torch.manual_seed(0)
    x = torch.randn(tokens, width + 3).to(dtype)[:, 3:]
    return x, torch.randn(tokens, 2 * inner + rank + 5).to(dtype)[:, 5:], rank


CASES = [(dtype, size) for dtype in TOLERANCES for size in SIZES]
# Steps of a program: so many tokens that it does all of one's columns, and fewer, where it shares.
CASES += [(torch.float32, (513, 24, 4100, 8)), (torch.bfloat16, (130, 24, 8300, 8))]
# The same, and whether the branch has gates and the rotation a divisor.
ROUNDED = [
    (dtype, size, gates, divided)
    for dtype in TOLERANCES
    for size in SIZES
    for gates in (True, False)
    for divided in (True, False)
]


def rounded_inputs(
    dtype: torch.dtype, size: tuple[int, int, int, int], gates: bool, divided: bool
) -> tuple[Tensor, Tensor, Tensor | None, bool]:
    """A branch and what stands beside it, views of one matrix, and divisors."""
    _, projected, rank = inputs(dtype, size)
    a, u = projected.split([projected.shape[1] - rank, rank], dim=-1)
    rho = 0.5 + torch.rand(len(a), 1, generator=torch.Generator().manual_seed(1))
    return a, u, rho if divided else None, gates


def exactly_joined(a: Tensor, u: Tensor, rho: Tensor | None, gates: bool) -> Tensor:
    left, right = a.double(), u.double()
    if gates:
        gate, up = left.chunk(2, -1)
        left = silu(gate) * up
    return torch.cat([left, right if rho is None else right * rho.double()], -1)


# Tokens, width, heads, heads of keys and values, head size, rank: one row, heads that are shared,
# odd sizes, no rotation, a program that does some of a token's steps, and one that does all.
PLACED = [
    (dtype, size, normed)
    for normed in (False, True)
    for dtype in TOLERANCES
    for size in [(1, 96, 2, 2, 16, 8), (5, 101, 6, 2, 40, 13), (9, 64, 5, 1, 8, 0)]
]
PLACED += [(torch.float32, size, False) for size in ((130, 16, 61, 2, 4, 4), (300, 8, 33, 4, 2, 2))]


def placed_inputs(
    dtype: torch.dtype, size: tuple[int, int, int, int, int, int], normed: bool
) -> tuple[Any, ...]:
    """A stream and its product, views of wider matrices, and caches that lie as vLLM's do."""
    tokens, width, heads, kv_heads, head, rank = size
    x, projected, _ = inputs(dtype, (tokens, width, (heads + 2 * kv_heads) * head // 2, rank))
    places, angles = tokens + 30, torch.rand(50, head // 2) * 7
    cos_sin = torch.cat([angles.cos(), angles.sin()], -1).to(dtype)
    slots = torch.randperm(places)[:tokens]
    slots[tokens // 2 + 1 :: 3] = -1  # tokens that are not kept
    blocks, block_size = -(-places // 16), 16
    if tokens % 2:
        shape = (blocks, kv_heads, block_size, 2 * head)
        caches = torch.zeros(shape, dtype=dtype).transpose(1, 2).split(head, -1)
    else:
        caches = torch.zeros(blocks, 2, block_size, kv_heads, head, dtype=dtype).unbind(1)
    queries, joined = x.new_zeros(tokens, heads, head), x.new_zeros(tokens, heads * head + rank)
    # The last token is of padding, and has no slot.
    stored = max(1, tokens - 1)
    positions = torch.randint(0, len(cos_sin), (tokens,))
    return x, projected, positions, cos_sin, slots[:stored], caches, queries, joined, EPS, normed


def exactly_placed(
    x: Tensor, projected: Tensor, positions: Tensor, cos_sin: Tensor, slots: Tensor,
    caches: tuple[Tensor, Tensor], queries: Tensor, joined: Tensor, eps: float, normed: bool,
) -> list[Tensor]:  # fmt: skip
    """What is to be written, one token and one head at a time, in float64."""
    heads, kv_heads, size = queries.shape[1], caches[0].shape[2], queries.shape[2]
    keys, values, queries, joined = (
        torch.zeros_like(t).double() for t in (*caches, queries, joined)
    )
    half = size // 2
    for token, (row, stream) in enumerate(zip(projected.double(), x.double(), strict=True)):
        angles = cos_sin[positions[token]].double()
        turn = torch.complex(angles[:half], angles[half:])
        rho = (stream.square().mean() + eps).sqrt()
        divided = row if normed else row / rho

        def head(number: int, turn: Tensor = turn, row: Tensor = divided) -> Tensor:
            own = row[number * size : (number + 1) * size]
            turned = torch.complex(own[:half], own[half:]) * turn
            return torch.cat([turned.real, turned.imag])

        queries[token] = torch.stack([head(number) for number in range(heads)])
        last = row[(heads + 2 * kv_heads) * size :]
        joined[token, len(joined[token]) - len(last) :] = last * rho if normed else last
        if token >= len(slots) or slots[token] < 0:
            continue
        block, place = divmod(int(slots[token]), keys.shape[1])
        for number in range(kv_heads):
            keys[block, place, number] = head(heads + number)
            values[block, place, number] = head(heads + kv_heads + number, torch.ones_like(turn))
    return [keys, values, queries, joined]


def rows_of_all_sizes() -> tuple[Tensor, Tensor, None, bool]:
    """Rows of nothing, of little and of nearly all that float32 holds, and halves of a step."""
    halves = torch.arange(-127, 127) + 0.5
    row = torch.cat([halves, torch.tensor([127.0, 0.0])])
    rows = torch.stack([row * size for size in (0.0, 1e-30, 2.0**-20, 1.0, 2.0**120)])
    return rows[:, :-9], rows[:, -9:], None, False


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    work = tmp_path_factory.mktemp("interpreted")
    cases = {
        "gated": [(*inputs(*case), EPS) for case in CASES],
        # The interpreter rounds to fp8 wrongly below powers of two: q is left unrounded.
        "rounded": [(*rounded_inputs(*case), FP8, torch.float32) for case in ROUNDED],
        "whole": [
            *((*rounded_inputs(*case), torch.int8) for case in ROUNDED),
            (*rows_of_all_sizes(), torch.int8),
        ],
        "placed": [placed_inputs(*case) for case in PLACED],
    }
    torch.save(cases, work / "inputs")
    subprocess.run(
        [sys.executable, Path(__file__).with_name("interpret_kernels.py"), "inputs", "outputs"],
        cwd=work,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        check=True,
    )
    outputs: dict[str, list[Any]] = torch.load(work / "outputs")
    return outputs


@pytest.mark.parametrize("index", range(len(CASES)))
def test_the_kernel_is_the_formula(index: int, interpreted: dict[str, list[Any]]) -> None:
    dtype, size = CASES[index]
    x, projected, rank = inputs(dtype, size)
    y, tolerance = interpreted["gated"][index], TOLERANCES[dtype]
    assert y.dtype == dtype
    assert_close(y.double(), exact(x, projected, rank), rtol=tolerance, atol=tolerance)
    assert torch.equal(y[:, size[2] :], projected[:, 2 * size[2] :])


@pytest.mark.parametrize("index", range(len(PLACED)))
def test_queries_keys_and_values_are_placed(index: int, interpreted: dict[str, list[Any]]) -> None:
    dtype, size, normed = PLACED[index]
    arguments, tolerance = placed_inputs(dtype, size, normed), TOLERANCES[dtype]
    exact = exactly_placed(*arguments)
    placed(*arguments)
    *_, caches, queries, joined, _, _ = arguments
    for written in (interpreted["placed"][index], (*caches, queries, joined)):
        for found, expected in zip(written, exact, strict=True):
            assert found.dtype == dtype
            assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_what_is_placed_must_fit() -> None:
    arguments = list(placed_inputs(torch.float32, (5, 101, 6, 2, 40, 13), False))
    arguments[7] = arguments[7][:, :12]
    with pytest.raises(ValueError, match=r"placed: .* joined \[5, 12\]"):
        placed(*arguments)


@pytest.mark.parametrize("index", range(len(ROUNDED)))
def test_the_rounding_kernel_is_the_formula(index: int, interpreted: dict[str, list[Any]]) -> None:
    y = exactly_joined(*rounded_inputs(*ROUNDED[index]))
    unrounded, scale = interpreted["rounded"][index]
    assert_close(scale.double(), y.abs().amax(-1, keepdim=True) / 448, rtol=1e-6, atol=0)
    assert_close(unrounded.double() * scale, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("index", range(len(ROUNDED)))
def test_whole_numbers_are_the_nearest(index: int, interpreted: dict[str, list[Any]]) -> None:
    arguments = rounded_inputs(*ROUNDED[index])
    y = exactly_joined(*arguments)
    for q, scale in (interpreted["whole"][index], rounded(*arguments, torch.int8)):
        assert q.dtype == torch.int8
        assert_close(scale.double(), y.abs().amax(-1, keepdim=True) / 127, rtol=1e-6, atol=0)
        assert ((q.double() * scale - y).abs() <= scale.double() * 0.50001).all()
        assert q.abs().amax(-1).tolist() == [127] * len(q)


def test_rows_of_all_sizes_are_rounded(interpreted: dict[str, list[Any]]) -> None:
    y = exactly_joined(*rows_of_all_sizes())
    for q, scale in (interpreted["whole"][-1], rounded(*rows_of_all_sizes(), torch.int8)):
        assert scale.isfinite().all()
        assert (scale > 0).all()
        assert ((q.double() * scale - y).abs() <= scale.double() * 0.50001).all()
        assert q.abs().amax(-1).tolist() == [0, 127, 127, 127, 127]


@pytest.mark.parametrize("case", ROUNDED)
def test_rounding_without_a_gpu_is_to_nearest(case: Any) -> None:
    arguments = rounded_inputs(*case)
    y = exactly_joined(*arguments)
    q, scale = rounded(*arguments, FP8)
    assert q.dtype == torch.float8_e4m3fn
    # Half of the last of e4m3's three bits, or of its smallest step.
    furthest = torch.maximum(y.abs() * 2**-4, scale.double() * 2**-10)
    assert ((q.double() * scale - y).abs() <= furthest * (1 + 1e-5)).all()
    assert torch.equal(q.float().abs().amax(-1), torch.full((len(q),), 448.0))


@pytest.mark.parametrize(
    ("shapes", "rho", "gates", "message"),
    [
        (((3, 8), (4, 2)), None, False, "as many rows"),
        (((3, 8), (3, 2)), torch.ones(3), False, r"must be \[3, 1\] in float32"),
        (((3, 7), (3, 2)), None, True, "two halves"),
    ],
)
def test_what_cannot_be_rounded_is_refused(
    shapes: Any, rho: Tensor | None, gates: bool, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        rounded(*(torch.ones(*shape) for shape in shapes), rho, gates, FP8)


def test_a_dtype_that_is_not_of_eight_bits_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dtype torch.int16 is not one of"):
        rounded(torch.ones(3, 8), torch.ones(3, 2), None, False, torch.int16)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_without_a_gpu_the_operation_falls_back(dtype: torch.dtype) -> None:
    x, projected, rank = inputs(dtype, SIZES[1])
    y = compiled.gated(x, projected, rank, EPS)
    tolerance = TOLERANCES[dtype]
    assert_close(y.double(), exact(x, projected, rank), rtol=tolerance, atol=tolerance)
    empty = compiled.gated(x[:0], projected[:0], rank, EPS)
    assert empty.shape == (0, SIZES[1][2] + rank)


@pytest.mark.parametrize(
    ("shape", "rank", "message"),
    [((4, 20), 2, "as many rows"), ((3, 20), 3, "two halves"), ((3, 20), 20, "two halves")],
)
def test_what_does_not_fit_is_refused(shape: tuple[int, int], rank: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compiled.gated(torch.ones(3, 8), torch.ones(*shape), rank, EPS)


def test_operations_keep_their_promises_to_the_compiler() -> None:
    x, projected, rank = inputs(torch.float32, SIZES[1])
    torch.library.opcheck(compiled.gated, (x, projected, rank, EPS))
    for q in (FP8, torch.int8):
        joined = (projected[:, :-rank], projected[:, -rank:], None, True, q)
        torch.library.opcheck(rounded, joined)
    torch.library.opcheck(accumulate, (torch.ones(3, 5), torch.ones(3, 4), torch.ones(5, 4)))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("size", [(1, 96, 40), (5, 101, 57), (3, 7, 600), (130, 32, 16), (0, 8, 4)])
def test_accumulate_is_a_product_in_float64(dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    tokens, width, inner = size
    torch.manual_seed(0)
    # The stream, what is added and the weights are views of wider matrices.
    whole = torch.randn(tokens, width + 3).to(dtype)
    x, beside = whole[:, 3:], whole[:, :3].clone()
    a = torch.randn(tokens, inner + 5).to(dtype)[:, 5:]
    weight = (torch.randn(width, inner + 2) / inner**0.5).to(dtype)[:, 2:]
    expected = x.double() + a.double() @ weight.double().T
    plain = added.reference(x, a, weight)
    accumulate(x, a, weight)
    for found in (x, plain):
        assert_close(found.double(), expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
    assert torch.equal(whole[:, :3], beside)


@pytest.mark.parametrize(
    ("x", "a", "weight"),
    [
        (torch.ones(3, 5), torch.ones(2, 4), torch.ones(5, 4)),
        (torch.ones(3, 5), torch.ones(3, 4), torch.ones(6, 4)),
        (torch.ones(3, 5), torch.ones(3, 4), torch.ones(5, 3)),
        (torch.ones(3, 5), torch.ones(3, 4), torch.ones(5, 4, dtype=torch.bfloat16)),
    ],
)
def test_accumulate_refuses_what_does_not_fit(x: Tensor, a: Tensor, weight: Tensor) -> None:
    with pytest.raises(ValueError, match=r"x \[3, 5\] float32"):
        accumulate(x, a, weight)
    assert torch.equal(x, torch.ones(3, 5))


def test_accumulate_adds_in_place_also_when_compiled() -> None:
    torch.manual_seed(0)
    x, a, weight = torch.randn(3, 7), torch.randn(3, 9), torch.randn(7, 9)
    expected = x.double() + a.double() @ weight.double().T

    def step(x: Tensor) -> Tensor:
        accumulate(x, a, weight)
        return x * 2

    for run in (step, torch.compile(step, backend="aot_eager")):
        stream = x.clone()
        doubled = run(stream)
        assert_close(stream.double(), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(doubled, stream * 2)


def test_caches_are_split_as_vllm_splits_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the vLLM that is installed, and as 0.24 and 0.32 keep them, in both orders of memory."""
    blocks, block_size, heads, size = 7, 16, 2, 8
    old = torch.empty(blocks, 2, block_size, heads, size, device="meta")
    new = torch.empty(blocks, heads, block_size, 2 * size, device="meta")
    layouts = [
        (old, old.unbind(1)),
        (old.transpose(2, 3).contiguous().transpose(2, 3), None),
        (new, new.transpose(1, 2).split(size, -1)),
        (new.transpose(1, 2).contiguous().transpose(1, 2), None),
    ]
    given: list[Tensor] = []
    monkeypatch.setattr(
        flash_attn,
        "reshape_and_cache_flash",
        lambda _k, _v, *rest: given.extend(rest[:2]),
        raising=False,
    )
    implementation = SimpleNamespace(
        attn_type=AttentionType.DECODER, head_size=size, kv_cache_dtype="auto"
    )
    layer = SimpleNamespace(_k_scale=None, _v_scale=None)
    update = flash_attn.FlashAttentionImpl.do_kv_cache_update
    for kv_cache, by_hand in layouts:
        found = split_cache(kv_cache, heads, size)
        assert found is not None
        expected = [by_hand]
        if kv_cache.ndim == (5 if OLDEST else 4):
            given.clear()
            update(implementation, layer, None, None, kv_cache, None)
            expected.append(tuple(given))
        for pair in filter(None, expected):
            for ours, theirs in zip(found, pair, strict=True):
                assert ours.shape == theirs.shape == (blocks, block_size, heads, size)
                assert ours.stride() == theirs.stride()
                assert ours.storage_offset() == theirs.storage_offset()
    assert split_cache(new[..., 1:], heads, size) is None
    assert split_cache(torch.empty(new.shape), heads, size) is None  # a CPU's lies in tiles
