"""Layers whose rotations are joined with their linears, as they are made."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_sliced, tiny_config
from one_rank import one_rank
from vllm.config import ModelConfig, VllmConfig

from sliceserve.server import fused
from sliceserve.server.plugin import register
from sliceserve.slicing.architectures import find_architecture
from sliceserve.slicing.modeling import expected_shapes


def one_layer(ranks: list[int | None], dtype: str, work: Path, **changes: Any) -> Any:
    """Make a layer without weights, 64 columns wide, of a config with changes."""
    register()
    widths = [64] * 3
    sliced = save_sliced(
        work / "sliced", tiny_config(num_hidden_layers=1, **changes), widths, ranks
    )
    model = ModelConfig(str(sliced), dtype=dtype, skip_tokenizer_init=True)
    config = VllmConfig(model_config=model)
    with one_rank(config, work / "store"):
        return fused.FusedDecoderLayer(
            config, find_architecture("LlamaForCausalLM"), widths, ranks,
            expected_shapes(model.hf_config), "model.layers.0",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "invariant", "late"),
    [("bfloat16", "0", True), ("bfloat16", "1", False), ("float16", "0", False)],
)
def test_no_norm_waits_where_it_would_change_answers(
    dtype: str, invariant: str, late: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a batch-invariant engine none may depend on how many tokens a step has."""
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", invariant)
    monkeypatch.setattr(fused, "fuses_here", lambda: True)
    layer = one_layer([8, 8], dtype, tmp_path)
    # Attention's waits only for `placed`, which a CPU's backend does not bear.
    assert layer.late_norms == [False, late]


def test_ranks_are_filled_up_with_zeros_to_whole_sixteens(tmp_path: Path) -> None:
    layer = one_layer([20, 5], "float32", tmp_path)
    for index, (rank, span) in enumerate([(20, 32), (5, 16)]):
        reads, writes = layer.joined(index)
        down, up = torch.randn(rank, 64), torch.randn(64, rank)
        for joined in (reads, writes):
            joined.weight.data.fill_(torch.nan)
        reads.load(f"residual_rotation.{index}.down.weight", down)
        writes.load(f"residual_rotation.{index}.up.weight", up)
        assert reads.weight.shape[0] % 16 == writes.weight.shape[1] % 16 == 0
        rows, columns = reads.weight[-span:], writes.weight[:, -span:]
        assert torch.equal(rows, torch.cat([down, torch.zeros(span - rank, 64)]))
        assert torch.equal(columns, torch.cat([up, torch.zeros(64, span - rank)], 1))
        assert reads.weight[:-span].isnan().all()


def test_what_has_no_bias_gets_none_from_new_memory(tmp_path: Path) -> None:
    """vLLM loads the weights of a running engine anew into memory that it does not empty."""
    layer = one_layer([20, 5], "float32", tmp_path, attention_bias=True)
    reads, _ = layer.joined(0)
    reads.bias.data.fill_(torch.nan)
    biases = {name: torch.randn(size) for name, size in (("q", 128), ("k", 64), ("v", 64))}
    for name, bias in biases.items():
        reads.load(f"self_attn.{name}_proj.bias", bias)
    assert torch.equal(reads.bias, torch.cat([*biases.values(), torch.zeros(32)]))
