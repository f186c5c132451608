"""The shapes of well-known models, and a tokenizer that needs no vocabulary file."""

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerFast

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": LLAMA | {"hidden_size": 4096, "intermediate_size": 11008, "layers": 32},
    "llama-2-13b": LLAMA | {"hidden_size": 5120, "intermediate_size": 13824, "layers": 40},
    "llama-2-70b": LLAMA
    | {"hidden_size": 8192, "intermediate_size": 28672, "layers": 80, "num_key_value_heads": 8},
    "llama-3-8b": LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "layers": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
    },
    "opt-13b": {
        "model_type": "opt",
        "architectures": ["OPTForCausalLM"],
        "vocab_size": 50272,
        "hidden_size": 5120,
        "word_embed_proj_dim": 5120,
        "ffn_dim": 20480,
        "layers": 40,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
    "phi-2": {
        "model_type": "phi",
        "architectures": ["PhiForCausalLM"],
        "vocab_size": 51200,
        "hidden_size": 2560,
        "num_attention_heads": 32,
        "intermediate_size": 10240,
        "layers": 32,
        "max_position_embeddings": 4096,
        "partial_rotary_factor": 0.4,
        "tie_word_embeddings": False,
    },
    "tiny": LLAMA | {"hidden_size": 256, "intermediate_size": 704, "layers": 2},
    "narrow": LLAMA
    | {"hidden_size": 1024, "intermediate_size": 8192, "layers": 24, "num_key_value_heads": 8},
}
GATED = [name for name, shape in SHAPES.items() if shape["model_type"] == "llama"]
HEAD_SIZE = 128  # where a shape does not say how many heads there are


def dense_config(name: str, layers: int | None = None) -> PretrainedConfig:
    """Return the config of a shape, with another number of layers if that is given.

    Positions are 4096 everywhere, more than some of these models have.
    """
    fields = {"num_attention_heads": SHAPES[name]["hidden_size"] // HEAD_SIZE} | SHAPES[name]
    own = fields.pop("layers")
    fields["num_hidden_layers"] = layers or own
    config: PretrainedConfig = AutoConfig.for_model(**fields, dtype="bfloat16")
    return config


def byte_tokenizer() -> Any:
    """Return a tokenizer with one token a byte, and 256 for the end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {byte: index for index, byte in enumerate(alphabet)} | {"<s>": 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>")
