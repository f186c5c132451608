"""Rotations rounded into matrices in fp8, against float64, and which of vLLM's take them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
from torch import Tensor
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
from vllm.config.quantization import QuantizationConfigArgs
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from vllm.model_executor.layers.quantization.online.base import OnlineQuantizationConfig

from sliceserve.kernels.rounded import FP8, LARGEST
from sliceserve.server.fp8 import add_columns, round_rows
from sliceserve.server.taking import takes_rotations
from sliceserve.slicing.architectures import find_architecture


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
    rounded, scales = round_rows(rows)
    assert rounded.dtype == FP8
    assert_nearest(rounded, scales, rows)
    assert rounded.float().abs().amax(1).tolist() == [LARGEST] * 7 + [0] + [LARGEST] * 42


@pytest.mark.parametrize("spread", [0.0, 4.0])
def test_columns_join_rows_that_stay_as_they_are(spread: float) -> None:
    stored, scales = round_rows(values(50, 24, 0.0))
    before = stored.double() * scales
    columns = values(50, 8, spread)
    weight, rounded, grown = add_columns(stored, scales, columns)
    assert_nearest(rounded, grown, columns)
    steps = grown / scales
    assert torch.equal(steps, 2 ** steps.log2().round())
    assert (steps >= 1).all()
    # No scale is twice what it has to be.
    needed = torch.maximum(scales, columns.abs().amax(1, keepdim=True) / LARGEST)
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
def one_rank(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """vLLM's process groups, of this process alone."""
    store = tmp_path_factory.mktemp("group") / "store"
    model = ModelConfig(str(tiny), dtype="float16", skip_tokenizer_init=True)
    with set_current_vllm_config(VllmConfig(model_config=model)):
        init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
        initialize_model_parallel(1, 1)
        yield
    cleanup_dist_env_and_memory()


def stored_in(preset: str, strategy: str | None = None) -> CompressedTensorsConfig:
    """vLLM's config of a checkpoint, with another strategy of its weights if that is given."""
    scheme = preset_name_to_scheme(preset, ["Linear"])
    if strategy:
        scheme.weights.strategy = strategy
    stored = "int-quantized" if preset == "INT8" else "float-quantized"
    fields = QuantizationConfig(config_groups={"group_0": scheme}, format=stored)
    return CompressedTensorsConfig.from_config(fields.model_dump(mode="json"))


@pytest.mark.usefixtures("one_rank")
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
            ("a scale a matrix", stored_in("FP8_DYNAMIC", "tensor"), llama, [4, 4]),
            ("a scale a token before", stored_in("FP8"), llama, [4, 4]),
            ("some ignored", OnlineQuantizationConfig(some), llama, [4, 4]),
            ("blocks", OnlineQuantizationConfig(blocks), llama, [4, 4]),
        )
    }
    assert [name for name, joined in found.items() if joined] == [
        "stored", "online", "online, two written",
    ]  # fmt: skip
