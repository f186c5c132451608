"""Rotations rounded into matrices in fp8 and four bits, and which of vLLM's linears take them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
from one_rank import one_rank
from test_four_bits import unpacked
from torch import Tensor
from vllm.config import ModelConfig, VllmConfig
from vllm.config.quantization import QuantizationConfigArgs
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from vllm.model_executor.layers.quantization.online.base import OnlineQuantizationConfig

from sliceserve.kernels.rounded import FP8, LARGEST
from sliceserve.server.eight_bits import add_balanced_columns, add_columns, round_rows
from sliceserve.server.joined import JoinedLinear, Part
from sliceserve.server.taking import takes_rotations
from sliceserve.slicing.architectures import find_architecture
from sliceserve.slicing.packing import Packer
from sliceserve.slicing.quantised import SCHEMES


def values(rows: int, columns: int, spread: float) -> Tensor:
    """Normal values whose rows differ in size by as much as `spread` powers of ten."""
    generator = torch.Generator().manual_seed(3)
    sizes = 10 ** (spread * (torch.rand(rows, 1, generator=generator) - 0.5))
    return torch.randn(rows, columns, generator=generator) * sizes


def assert_nearest(rounded: Tensor, scales: Tensor, exact: Tensor) -> None:
    """Check that no value is further off than half of e4m3's last bit, or smallest step."""
    furthest = torch.maximum(exact.double().abs() * 2**-4, scales.double() * 2**-10)
    error = (rounded.double() * scales.double() - exact.double()).abs()
    assert (error <= furthest * (1 + 1e-5)).all()


def test_rows_have_scales_of_their_own() -> None:
    rows = values(50, 24, 6.0)
    rows[7] = 0
    rounded, scales = round_rows(rows, FP8)
    assert rounded.dtype == FP8
    assert_nearest(rounded, scales, rows)
    assert rounded.float().abs().amax(1).tolist() == [LARGEST[FP8]] * 7 + [0] + [LARGEST[FP8]] * 42
    whole, scales = round_rows(rows, torch.int8)
    assert ((whole.double() * scales - rows).abs() <= scales.double() * 0.50001).all()
    assert whole.abs().amax(1).tolist() == [127] * 7 + [0] + [127] * 42


def test_columns_join_whole_numbers_whose_scales_stay() -> None:
    stored, scales = round_rows(values(50, 24, 0.0), torch.int8)
    columns = values(50, 8, 0.0) * torch.logspace(-3, 3, 8)
    columns[:, 7] = columns[:, 6] * torch.linspace(-1, 1, 50)
    columns[0] /= 100
    columns[:, 3] = 0
    weight, rounded, kept, divisors = add_balanced_columns(stored, scales, columns)
    assert torch.equal(weight, stored)
    assert torch.equal(kept, scales)
    assert divisors.shape == (8,)
    # As large as eight bits hold, each: the sum of A·B over its directions is what it was.
    assert rounded.abs().amax(0).tolist() == [127, 127, 127, 0, 127, 127, 127, 127]
    error = (rounded.double() * kept * divisors - columns).abs()
    assert (error <= kept.double() * divisors * 0.50001).all()


@pytest.mark.parametrize("shrunk", [1.0, 1e-1, 1e-3, 0.0])
def test_a_row_with_little_of_its_own_does_not_decide_for_the_others(shrunk: float) -> None:
    exact, columns = values(256, 512, 0.0), values(256, 64, 0.0)
    exact[7] *= shrunk
    stored, scales = round_rows(exact, torch.int8)
    weight, rounded, grown, divisors = add_balanced_columns(stored, scales, columns)
    back = rounded.double() * grown * divisors
    assert (back - columns).norm() < 0.03 * columns.norm()
    others = torch.arange(256) != 7
    assert torch.equal(weight[others], stored[others])
    assert torch.equal(grown[others], scales[others])
    # Of its own sum, to which the columns add more now, the row loses no more than they do.
    lost = (weight.double() * grown - exact)[7].abs()
    assert lost.max() <= (grown[7] + scales[7]) * 0.50001


@pytest.mark.parametrize("spread", [0.0, 4.0])
def test_columns_join_rows_that_stay_as_they_are(spread: float) -> None:
    stored, scales = round_rows(values(50, 24, 0.0), FP8)
    before = stored.double() * scales
    columns = values(50, 8, spread)
    weight, rounded, grown = add_columns(stored, scales, columns)
    assert_nearest(rounded, grown, columns)
    steps = grown / scales
    assert torch.equal(steps, 2 ** steps.log2().round())
    assert (steps >= 1).all()
    # No scale is twice what it has to be.
    needed = torch.maximum(scales, columns.abs().amax(1, keepdim=True) / LARGEST[FP8])
    assert (grown < 2 * needed * (1 + 1e-6)).all()
    # Exactly, but for what falls below the smallest normal value.
    normal = (before / grown).abs() >= torch.finfo(FP8).smallest_normal
    assert torch.equal((weight.double() * grown)[normal], before[normal])
    assert normal.float().mean() > 0.8


def test_rows_of_zeros_take_the_columns_scales() -> None:
    stored, scales = torch.zeros(3, 4).to(FP8), torch.zeros(3, 1)
    columns = torch.tensor([[1.0, -2.0], [0.0, 0.0], [3e-4, 1e-4]])
    weight, rounded, grown = add_columns(stored, scales, columns)
    assert not weight.float().any()
    assert_nearest(rounded, grown, columns)


@pytest.fixture(scope="module")
def in_float16(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("group") / "store"
    model = ModelConfig(str(tiny), dtype="float16", skip_tokenizer_init=True)
    with one_rank(VllmConfig(model_config=model), store):
        yield


def stored_in(preset: str, strategy: str | None = None) -> CompressedTensorsConfig:
    """vLLM's config of a checkpoint, with another strategy of its weights if that is given."""
    scheme = preset_name_to_scheme(preset, ["Linear"])
    if strategy:
        scheme.weights.strategy = strategy
    stored = {"INT8": "int-quantized", "W4A16": "pack-quantized", "W4A16_ASYM": "pack-quantized"}
    form = stored.get(preset, "float-quantized")
    fields = QuantizationConfig(config_groups={"group_0": scheme}, format=form)
    return CompressedTensorsConfig.from_config(fields.model_dump(mode="json"))


@pytest.mark.usefixtures("in_float16")
def test_rotations_join_what_they_can() -> None:
    llama, phi = (find_architecture(name) for name in ("LlamaForCausalLM", "PhiForCausalLM"))
    rows = OnlineQuantizationConfig(QuantizationConfigArgs(linear="fp8_per_channel"))
    some = QuantizationConfigArgs(linear="fp8_per_channel", ignore=["re:.*o_proj"])
    blocks = QuantizationConfigArgs(linear="fp8_per_block")
    found = {
        name: takes_rotations(config, architecture, ranks, "model.layers.0")
        for name, config, architecture, ranks in (
            ("stored", stored_in("FP8_DYNAMIC"), llama, [4, 0]),
            ("online", rows, llama, [4, 0]),
            ("online, two written", rows, phi, [4]),
            ("stored, two written", stored_in("FP8_DYNAMIC"), phi, [4]),
            ("whole", rows, llama, [4, None]),
            ("int8", stored_in("INT8"), llama, [4, 4]),
            ("int8, two written", stored_in("INT8"), phi, [4]),
            ("a scale a matrix", stored_in("FP8_DYNAMIC", "tensor"), llama, [4, 4]),
            ("a scale a token before", stored_in("FP8"), llama, [4, 4]),
            ("some ignored", OnlineQuantizationConfig(some), llama, [4, 4]),
            ("blocks", OnlineQuantizationConfig(blocks), llama, [4, 4]),
            ("four bits", stored_in("W4A16"), llama, [4, 0]),
            ("four bits, two written", stored_in("W4A16"), phi, [4]),
            ("four bits, whole", stored_in("W4A16"), llama, [None, 4]),
            ("four bits with zero points", stored_in("W4A16_ASYM"), llama, [4, 4]),
        )
    }
    assert [name for name, joined in found.items() if joined] == [
        "stored", "online", "online, two written", "int8", "four bits", "four bits, two written",
    ]  # fmt: skip


def joined_in_four_bits(axis: int, start: int) -> JoinedLinear:
    """Of a rank that holds 128 of 512 rows or columns, and the second half of a rotation's 64."""
    parts = [Part("proj", start, 128), Part("rotation", 32, 32, zeros=96)]
    prefix = "model.layers.0.joined_reads.0"
    return JoinedLinear(parts, axis, 256, frozenset(), stored_in("W4A16"), prefix)


@pytest.mark.usefixtures("in_float16")
@pytest.mark.parametrize("axis", [0, 1])
def test_a_share_of_a_rotation_follows_in_four_bits(axis: int) -> None:
    whole = {"proj": values(512, 256, 2.0), "rotation": values(64, 256, 2.0)}
    whole = {name: tensor if axis == 0 else tensor.T for name, tensor in whole.items()}
    linear, packer = joined_in_four_bits(axis, 256), Packer(SCHEMES["w4a16"])
    for kind, tensor in packer.pack(whole["proj"], packer.scales(whole["proj"])).items():
        assert linear.load(f"proj.{kind}", tensor) == kind
    assert linear.load("rotation.weight", whole["rotation"]) == "weight_packed"
    numbers, scale = unpacked({f"x.{name}": p for name, p in linear.named_parameters()}, "x")
    shares = [whole["proj"].narrow(axis, 256, 128), whole["rotation"].narrow(axis, 32, 32)]
    expected = torch.cat([*shares, torch.zeros_like(shares[1]).repeat_interleave(3, axis)], axis)
    steps = scale.repeat_interleave(128, 1)
    assert ((numbers * steps - expected).abs() <= 0.5001 * steps).all()
    assert not numbers.narrow(axis, 160, 96).any()


@pytest.mark.usefixtures("in_float16")
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("preset", "dtype"), [("INT8", torch.int8), ("FP8_DYNAMIC", FP8)])
def test_a_share_of_a_rotation_follows_in_eight_bits(
    preset: str, dtype: torch.dtype, axis: int
) -> None:
    """The second share of a rotation of rank 52, filled up with zeros."""
    parts = [Part("proj", 256, 128), Part("rotation", 32, 20, zeros=12)]
    prefix = "model.layers.0.joined_reads.0"
    linear = JoinedLinear(parts, axis, 256, frozenset(), stored_in(preset), prefix)
    whole = {"proj": values(512, 256, 0.5), "rotation": values(52, 256, 0.5)}
    whole = {name: tensor if axis == 0 else tensor.T for name, tensor in whole.items()}
    weight, scale = round_rows(whole["proj"], dtype)
    linear.load("proj.weight", weight)
    linear.load("proj.weight_scale", scale)
    linear.load("rotation.weight", whole["rotation"])
    divisors = torch.ones(160)
    divisors[128:] *= linear.finish_loading()
    scales = linear.weight_scale.double() * (divisors if axis == 1 else 1)
    shares = [whole["proj"].narrow(axis, 256, 128), whole["rotation"].narrow(axis, 32, 20)]
    expected = torch.cat([*shares, torch.zeros_like(shares[0].narrow(axis, 0, 12))], axis).double()
    if dtype == FP8:
        assert_nearest(linear.weight, scales, expected)
    else:
        # Some rows are rounded a second time.
        assert ((linear.weight.double() * scales - expected).abs() <= scales * (1 + 1e-5)).all()
    assert not linear.weight.float().narrow(axis, 148, 12).any()


@pytest.mark.usefixtures("in_float16")
def test_a_rank_gets_no_part_of_a_group() -> None:
    linear, packer = joined_in_four_bits(1, 64), Packer(SCHEMES["w4a16"])
    weight = values(256, 512, 0.0)
    packed = packer.pack(weight, packer.scales(weight))
    with pytest.raises(ValueError, match="128 inputs of proj from 64, and groups of 128 stay"):
        linear.load("proj.weight_scale", packed["weight_scale"])
