from pathlib import Path

import pytest
import torch
from conftest import OTHER_CONFIGS, save_tiny, tiny_config
from test_vllm import EAGER, PROMPTS, TOLERANCE, generate, greedy
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from sliceserve.slicing.cli import main
from sliceserve.slicing.job import SliceOptions, run_slice

CONFIGS = {"llama": tiny_config()} | OTHER_CONFIGS


def slice_shared(work: Path, name: str) -> Path:
    dense = save_tiny(work / "dense", CONFIGS[name], torch.float32)
    output = work / "sliced"
    options = SliceOptions(
        str(dense), output, rotation="shared", refit="full", samples=8, sequence_length=64
    )
    run_slice(options, show_progress=False)
    return output


@pytest.mark.parametrize("name", ["llama", "llama-biases", "llama-tied", "mistral", "qwen3"])
def test_the_exported_model_computes_the_same(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sliced, plain = slice_shared(tmp_path, name), tmp_path / "plain"
    assert main(["export", str(sliced), "--output", str(plain)]) == 0
    printed = capsys.readouterr().out
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in (sliced, plain)
    ]
    assert type(models[1]).__name__ == CONFIGS[name].architectures[0]
    assert models[1].config.hidden_size < CONFIGS[name].hidden_size
    assert f"{models[1].num_parameters():,} parameters" in printed
    ids = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        ours, theirs = (model(input_ids=ids).logits for model in models)
    assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert AutoTokenizer.from_pretrained(plain)("abc")["input_ids"]


def test_stock_vllm_runs_the_exported_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sliced, plain = slice_shared(tmp_path, "llama-tied"), tmp_path / "plain"
    assert main(["export", str(sliced), "--output", str(plain)]) == 0
    # No plugin: what vLLM itself knows must do.
    monkeypatch.setenv("VLLM_PLUGINS", "")
    got = generate(plain, PROMPTS, 12, EAGER)
    for ours, theirs in zip(got, greedy(sliced, PROMPTS, tokens=12), strict=True):
        assert ours["tokens"] == theirs["tokens"]
        assert ours["logprobs"] == pytest.approx(theirs["logprobs"], abs=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("opt", "OPTForCausalLM has LayerNorms"),
        ("phi3", "engines derive the head_dim of Phi3ForCausalLM"),
        ("qwen2", "engines derive the head_dim of Qwen2ForCausalLM"),
    ],
)
def test_what_the_base_architecture_cannot_hold_is_refused(
    name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sliced = slice_shared(tmp_path, name)
    assert main(["export", str(sliced), "--output", str(tmp_path / "plain")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "plain").exists()


def test_rotations_are_refused(
    tiny_sliced: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(tiny_sliced), "--output", str(tmp_path / "plain")]) == 2
    assert "slice with --rotation shared" in capsys.readouterr().err
