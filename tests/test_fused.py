"""Which norms wait until after the product that reads the stream."""

from pathlib import Path

import pytest
from conftest import save_sliced, tiny_config
from one_rank import one_rank
from vllm.config import ModelConfig, VllmConfig

from sliceserve.server import fused
from sliceserve.server.plugin import register
from sliceserve.slicing.architectures import find_architecture
from sliceserve.slicing.modeling import expected_shapes


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
    register()
    widths, ranks = [64] * 3, [8] * 2
    sliced = save_sliced(tmp_path / "sliced", tiny_config(num_hidden_layers=1), widths, [*ranks])
    model = ModelConfig(str(sliced), dtype=dtype, skip_tokenizer_init=True)
    config = VllmConfig(model_config=model)
    with one_rank(config, tmp_path / "store"):
        layer = fused.FusedDecoderLayer(
            config, find_architecture("LlamaForCausalLM"), widths, [*ranks],
            expected_shapes(model.hf_config), "model.layers.0",
        )  # fmt: skip
    # Attention's waits only for `placed`, which a CPU's backend does not bear.
    assert layer.late_norms == [False, late]
