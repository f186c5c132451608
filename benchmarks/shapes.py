"""The shapes of well-known models, and a tokenizer that needs no vocabulary file."""

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

SHAPES = {
    "llama-2-7b": {"hidden_size": 4096, "intermediate_size": 11008, "layers": 32, "kv_heads": 32},
    "llama-2-13b": {"hidden_size": 5120, "intermediate_size": 13824, "layers": 40, "kv_heads": 40},
    "llama-2-70b": {"hidden_size": 8192, "intermediate_size": 28672, "layers": 80, "kv_heads": 8},
    "tiny": {"hidden_size": 256, "intermediate_size": 704, "layers": 2, "kv_heads": 2},
    "narrow": {"hidden_size": 1024, "intermediate_size": 8192, "layers": 24, "kv_heads": 8},
}


def dense_config(name: str, layers: int | None = None) -> LlamaConfig:
    """Return the config of a shape, with another number of layers if that is given."""
    shape = SHAPES[name]
    return LlamaConfig(
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        num_hidden_layers=layers or shape["layers"],
        num_attention_heads=shape["hidden_size"] // 128,
        num_key_value_heads=shape["kv_heads"],
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        architectures=["LlamaForCausalLM"],
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


def byte_tokenizer() -> Any:
    """Return a tokenizer with one token a byte, and 256 for the end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {byte: index for index, byte in enumerate(alphabet)} | {"<s>": 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>")
