"""Adapters on joined linears, beside sums in float64."""

from collections.abc import Collection, Iterator
from typing import Any

import pytest
import torch
from conftest import save_sliced, tiny_config
from one_rank import one_rank
from torch import Tensor
from vllm.config import ModelConfig, VllmConfig
from vllm.config.lora import LoRAConfig
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.lora.utils import from_layer

from sliceserve.server.adapted import AdaptedJoinedLinear, adapt_joined
from sliceserve.server.joined import JoinedLinear, Part
from sliceserve.server.plugin import register
from sliceserve.slicing.modeling import ROTATION

WIDTH, RANK, TOKENS = 64, 4, [0, 1, 2, 1, 2, 0]
# What the second of two ranks holds of a layer whose attention and MLP share a sublayer.
READS = [
    Part("self_attn.q_proj", 16, 16),
    Part("self_attn.k_proj", 8, 8),
    Part("mlp.fc1", 32, 32),
    Part(f"{ROTATION}.0.down", 16, 4, 12),
]
WRITES = [
    Part("self_attn.dense", 16, 16),
    Part("mlp.fc2", 32, 32),
    Part(f"{ROTATION}.0.up", 16, 4, 12),
]
# Of which there are three slices and one name.
ONE = [Part("self_attn.qkv_proj", start, 8) for start in (8, 24, 40)]


@pytest.fixture(scope="module", autouse=True)
def in_float32(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    register()
    work = tmp_path_factory.mktemp("group")
    sliced = save_sliced(work / "sliced", tiny_config(num_hidden_layers=1), [WIDTH] * 3, [8, 8])
    model = ModelConfig(str(sliced), dtype="float32", skip_tokenizer_init=True)
    with one_rank(VllmConfig(model_config=model), work / "store"):
        yield


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + shape[0]))


def whole_sizes(parts: list[Part]) -> dict[str, int]:
    """The length of each whole matrix along the axis that is joined, of which a part is held."""
    return {part.name: 2 * part.start + 48 for part in parts}


def adapted_linear(
    parts: list[Part], axis: int, targets: list[str] | None = None, packs: bool = True
) -> tuple[Any, Tensor]:
    """Make a joined linear that takes adapters, packed as on CPUs; return it and its matrix."""
    linear = JoinedLinear(parts, axis, WIDTH, frozenset(), None, "layers.0.joined_reads.reads_0")
    sizes = whole_sizes(parts)
    for name, size in sizes.items():
        whole = values(size, WIDTH, seed=len(name))
        linear.load(f"{name}.weight", whole if axis == 0 else whole.T)
    weight = linear.weight.detach().clone().double()
    if packs:
        linear.quant_method.process_weights_after_loading(linear)
    layer = torch.nn.ModuleDict({"joined_reads": torch.nn.ModuleDict({"reads_0": linear})})
    adapt_joined(layer)
    # A CPU's vLLM gives tokens without an adapter the last place, which stays empty.
    lora = LoRAConfig(
        max_lora_rank=8, max_loras=3, lora_dtype=torch.float32, target_modules=targets
    )
    adapted: Any = from_layer(linear, 3, lora, [])
    assert isinstance(adapted, AdaptedJoinedLinear)
    wrapper = PunicaWrapperCPU(len(TOKENS), len(TOKENS), "cpu", lora_config=lora)
    wrapper.update_metadata(LoRAMapping(tuple(TOKENS), (1, 2), True), [1, 2, None], 3, 1000)
    adapted.set_mapping(wrapper)
    return adapted, weight


def factors(
    parts: list[Part], axis: int, rank: int, seed: int, left_out: Collection[str] = ()
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """An adapter as vLLM hands it on: A and B of whole matrices by name, None of what has none."""
    lists: tuple[list[Tensor | None], list[Tensor | None]] = ([], [])
    for name, size in whole_sizes([part for part in parts if ROTATION not in part.name]).items():
        ins, outs = (WIDTH, size) if axis == 0 else (size, WIDTH)
        pair = values(rank, ins, seed=seed), values(outs, rank, seed=seed + 1)
        for found, factor in zip(lists, pair, strict=True):
            found.append(None if name in left_out else factor)
    return lists


def delta(parts: list[Part], axis: int, given: tuple[list[Any], list[Any]]) -> Tensor:
    """What an adapter adds to the joined matrix, in float64."""
    names = list(whole_sizes([part for part in parts if ROTATION not in part.name]))
    added = []
    for part in parts:
        shape = (part.span, WIDTH) if axis == 0 else (WIDTH, part.span)
        change = torch.zeros(shape, dtype=torch.float64)
        a, b = (one[names.index(part.name)] if part.name in names else None for one in given)
        if a is not None:
            change = part.share(b.double() @ a.double(), axis)
        added.append(change)
    return torch.cat(added, axis)


@pytest.mark.parametrize(
    ("parts", "axis"), [(READS, 0), (WRITES, 1), (ONE, 0)], ids=["reads", "writes", "one-name"]
)
def test_tokens_get_what_their_adapter_adds_to_a_ranks_share(parts: list[Part], axis: int) -> None:
    linear, weight = adapted_linear(parts, axis)
    first = factors(parts, axis, 6, 1)
    second = factors(parts, axis, RANK, 2, left_out=[parts[0].name] if parts is not ONE else [])
    x = values(len(TOKENS), weight.shape[1], seed=3)

    def check(expected: list[Tensor]) -> None:
        exact = torch.stack([weight @ one.double() for one in x])
        for row, token in enumerate(TOKENS):
            exact[row] += expected[token] @ x[row].double()
        found = linear.summed(x) if axis else linear(x)
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-4)

    linear.set_lora(0, *first)
    linear.set_lora(1, *second)
    none = torch.zeros_like(weight)
    check([none, delta(parts, axis, first), delta(parts, axis, second)])
    # A smaller one in the place of a larger leaves nothing of that.
    linear.set_lora(0, *second)
    check([none, *[delta(parts, axis, second)] * 2])
    linear.reset_lora(0)
    check([none, none, delta(parts, axis, second)])


@pytest.mark.parametrize("in_place", [False, True])
def test_both_products_are_added_to_the_stream(
    in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place as on a GPU, too."""
    linear, weight = adapted_linear(WRITES, 1, packs=not in_place)
    monkeypatch.setattr(linear.base_layer, "adds_into", lambda _: in_place)
    given = factors(WRITES, 1, RANK, 1)
    linear.set_lora(0, *given)
    a, stream = values(len(TOKENS), weight.shape[1], seed=4), values(len(TOKENS), WIDTH, seed=5)
    exact = stream.double() + a.double() @ weight.T
    for row, token in enumerate(TOKENS):
        if token == 1:
            exact[row] += delta(WRITES, 1, given) @ a[row].double()
    x = stream.clone()
    found = linear.add_to(x, a)
    assert (found is x) == in_place
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("targets", "left_out"),
    [
        (["fc1"], ["self_attn.q_proj", "self_attn.k_proj"]),
        (["q_proj", "k_proj"], ["mlp.fc1"]),
        (["fc1", "qkv_proj"], []),
    ],
)
def test_only_matrices_that_are_asked_for_are_adapted(
    targets: list[str], left_out: list[str]
) -> None:
    """Of a linear of several, too; and those that vLLM would have stacked by that name."""
    linear, weight = adapted_linear(READS, 0, targets)
    linear.set_lora(0, *factors(READS, 0, RANK, 1))
    change = delta(READS, 0, factors(READS, 0, RANK, 1, left_out))
    x = values(len(TOKENS), WIDTH, seed=7)
    exact = x.double() @ weight.T
    for row, token in enumerate(TOKENS):
        if token == 1:
            exact[row] += change @ x[row].double()
    torch.testing.assert_close(linear(x).double(), exact, rtol=0, atol=2e-4)


def test_a_rank_above_the_largest_is_an_error() -> None:
    linear, _ = adapted_linear(WRITES, 1)
    with pytest.raises(RuntimeError, match="size"):
        linear.set_lora(0, *factors(WRITES, 1, 9, 1))


@pytest.mark.parametrize("axis", [0, 1])
def test_zeros_of_other_sizes_warm_up(axis: int) -> None:
    """As vLLM makes them, from the sizes of its buffers."""
    parts = [READS, WRITES][axis]
    linear, weight = adapted_linear(parts, axis)
    pairs = zip(linear.lora_a_stacked, linear.lora_b_stacked, strict=True)
    zeros = [(torch.zeros(8, a.shape[-1]), torch.zeros(b.shape[-2], 8)) for a, b in pairs]
    linear.set_lora(0, [a for a, _ in zeros], [b for _, b in zeros])
    x = values(len(TOKENS), weight.shape[1], seed=6)
    torch.testing.assert_close(linear(x).double(), x.double() @ weight.T, rtol=0, atol=2e-4)


def test_adapters_are_found_by_the_names_of_their_matrices() -> None:
    """A linear of several is packed from names beside its own; one of one has the matrix's name."""
    register()
    layer = torch.nn.Module()
    prefix = "model.layers.0"
    for kind, name, parts in (("reads", "reads_0", READS), ("writes", "qkv_proj", ONE)):
        linear = JoinedLinear(parts, 0, WIDTH, frozenset(), None, f"{prefix}.{kind}")
        layer.add_module(f"joined_{kind}", torch.nn.ModuleDict({name: linear}))
    packed, renamed = adapt_joined(layer)
    assert packed == {"reads_0": ["q_proj", "k_proj", "fc1"]}
    assert renamed == {
        ".self_attn.q_proj.lora_": ".joined_reads.q_proj.lora_",
        ".self_attn.k_proj.lora_": ".joined_reads.k_proj.lora_",
        ".mlp.fc1.lora_": ".joined_reads.fc1.lora_",
        ".self_attn.qkv_proj.lora_": ".joined_writes.qkv_proj.lora_",
    }
