import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import OTHER_CONFIGS, save_tiny, tiny_config
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, GPT2Config, OPTConfig, PhiConfig

from sliceserve.slicing.dense import open_dense_model, write_dense
from sliceserve.slicing.errors import UserError
from sliceserve.slicing.source import HUB_IGNORED, HUB_PATTERNS, copy_tokenizer, locate


@pytest.fixture
def source(tiny: Path, tmp_path: Path) -> Path:
    """A dense checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny, tmp_path / "source"))


def change_config(directory: Path, **change: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def refusal(model: Path) -> str:
    with pytest.raises(UserError) as error:
        open_dense_model(str(model))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("tied", [False, True])
def test_a_dense_model_is_written_as_it_was(tied: bool, tmp_path: Path) -> None:
    dense = save_tiny(tmp_path / "dense", tiny_config(tie_word_embeddings=tied), torch.float32)
    model = open_dense_model(str(dense))
    write_dense(model, tmp_path / "again", torch.float32)
    expected = AutoModelForCausalLM.from_pretrained(dense)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert model.parameters == expected.num_parameters() == again.num_parameters()
    ids = torch.arange(20).unsqueeze(0)
    assert_close(again(ids).logits, expected(ids).logits, rtol=0, atol=0)


def test_a_truncated_shard_is_refused(source: Path) -> None:
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "is corrupt or truncated" in refusal(source)


def test_missing_weights_are_refused(source: Path) -> None:
    (source / "model.safetensors").unlink()
    assert "holds no model.safetensors" in refusal(source)


def test_a_wrong_shape_is_named(source: Path) -> None:
    change_config(source, intermediate_size=100)
    expected = "wrong shape: model.layers.0.mlp.down_proj.weight is [96, 160] and not [96, 100]"
    assert expected in refusal(source)


def test_old_checkpoints_with_rotary_buffers_are_read(source: Path) -> None:
    weights = load_file(source / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(16)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    assert open_dense_model(str(source)).parameters == sum(
        tensor.numel() for name, tensor in weights.items() if "rotary" not in name
    )


def test_the_dtype_is_that_of_the_weights(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]
    (source / "config.json").write_text(json.dumps(config))
    weights = load_file(source / "model.safetensors")
    half = {name: tensor.half() for name, tensor in weights.items()}
    save_file(half, source / "model.safetensors", metadata={"format": "pt"})
    assert open_dense_model(str(source)).dtype == torch.float16


def test_integer_weights_are_refused(source: Path) -> None:
    weights = load_file(source / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"].to(torch.int8)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    assert "not in I8" in refusal(source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["NewForCausalLM"], "model_type": "new"}, "'NewForCausalLM' is not sup"),
        ({"architectures": []}, "must name one architecture, not []"),
        ({"architectures": None}, "must name one architecture, not None"),
        ({"architectures": [{}]}, "must name one architecture, not [{}]"),
        ({"auto_map": {"AutoConfig": "x.y"}, "model_type": "new"}, "cannot be read"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "is quantised"),
        ({"rope_parameters": {"rope_type": "unheard-of"}}, "cannot be read"),
        ({"num_attention_heads": "many"}, "cannot be read"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused(
    source: Path, change: dict[str, Any], message: str
) -> None:
    change_config(source, **change)
    assert message in refusal(source)


def test_an_unsupported_architecture_is_named(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    sentence = refusal(tmp_path / "gpt2")
    assert "architecture 'GPT2LMHeadModel' is not supported" in sentence
    assert "LlamaForCausalLM" in sentence


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_layer_norm_before": False}, "with do_layer_norm_before=False where only True"),
        ({"word_embed_proj_dim": 64}, "parts that are not supported: model.decoder.project_out"),
        ({"_remove_final_layer_norm": True}, "with _remove_final_layer_norm=True"),
    ],
)
def test_variants_of_opt_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = OPTConfig(**OTHER_CONFIGS["opt"].to_dict() | change)
    dense = save_tiny(tmp_path / "dense", config, torch.float32)
    assert message in refusal(dense)


def test_a_phi_with_normed_queries_is_refused(tmp_path: Path) -> None:
    config = PhiConfig(**OTHER_CONFIGS["phi"].to_dict() | {"qk_layernorm": True})
    assert "with qk_layernorm=True" in refusal(save_tiny(tmp_path / "phi", config, torch.float32))


@pytest.mark.parametrize("kept", [0, 3, 20, 1000, 1_000_000, 60_000_000])
def test_a_truncated_gguf_file_is_refused(kept: int, smollm2_gguf: Path, tmp_path: Path) -> None:
    file = tmp_path / "broken.gguf"
    with smollm2_gguf.open("rb") as whole:
        file.write_bytes(whole.read(kept))
    assert f"GGUF file {str(file)!r} cannot be read" in refusal(file)


@pytest.mark.parametrize("scaled", ["type", "tensor"])
def test_a_gguf_file_with_rope_scaling_is_refused(scaled: str, tmp_path: Path) -> None:
    file = tmp_path / "scaled.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(32)
    writer.add_vocab_size(10)
    if scaled == "type":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_tensor(
        "rope_freqs.weight" if scaled == "tensor" else "token_embd.weight",
        np.ones(16, dtype=np.float32),
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "scales its rotary embedding" in refusal(file)


def test_what_belongs_to_the_tokenizer_is_copied_and_no_more(source: Path, tmp_path: Path) -> None:
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (source / "tekken.json").write_text("{}")
    output = tmp_path / "output"
    output.mkdir()
    copy_tokenizer(locate(str(source)), output)
    assert {str(path.relative_to(output)) for path in output.rglob("*.*")} == {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
    }


def test_the_hub_is_asked_for_one_set_of_weights() -> None:
    from huggingface_hub.utils import filter_repo_objects

    files = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.json", "README.md",
             "consolidated.safetensors", "original/consolidated.00.pth", "tekken.json",
             "onnx/config.json", "pytorch_model.bin", "chat_template.jinja"]  # fmt: skip
    wanted = filter_repo_objects(files, allow_patterns=HUB_PATTERNS, ignore_patterns=HUB_IGNORED)
    assert set(wanted) == {
        "config.json",
        "model-00001-of-00002.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
    }
