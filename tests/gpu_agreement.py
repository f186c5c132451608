"""On a machine with GPUs: slice there, and compare vLLM with Transformers in bfloat16.

    python tests/gpu_agreement.py WORK_DIR [--layouts eager compiled]

Not collected by pytest, which must pass without a GPU. For a Llama with each form of rotation and a
Phi, on one GPU, eager and compiled with CUDA graphs, and with two GPUs also tensor-parallel and
pipeline-parallel, it prints the largest difference in logprob of the tokens that vLLM chose, over
prompts fed to both, and exits with 1 above the tolerance of bfloat16. The same in fp8, against
Transformers rounding alike in float32; then, with two GPUs, the all-reduces of one step, dense and
sliced.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from conftest import save_tiny, tiny_config
from rounding import round_joined, widened
from test_vllm import generate_each, read_results, run_script
from transformers import AutoModelForCausalLM, PhiConfig, PreTrainedConfig

from sliceserve.slicing.job import PAPER, SliceOptions, run_slice
from sliceserve.slicing.quantize import QuantizeOptions, run_quantize
from sliceserve.slicing.report import describe

# In bfloat16; and in fp8, where that moves values across the middle of two that there are.
TOLERANCES = {False: 0.1, True: 0.5}
PROMPTS = [[1, 2, 3, 4, 5], list(range(200)), [7, 9, 11] * 20]
FORMS: dict[str, dict[str, Any]] = {
    "whole": dict(PAPER),
    "low-rank": {"rotation": "low-rank"},
    "shared": {"rotation": "shared"},
}


LAYOUTS: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    "compiled": {},
    "tensor-parallel": {"tensor_parallel_size": 2},
    "pipeline-parallel": {"pipeline_parallel_size": 2},
}


def dense_configs() -> dict[str, PreTrainedConfig]:
    """Sublayers that follow each other, and such that attention and MLP share."""
    common: dict[str, Any] = {
        "hidden_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 16,
        "num_key_value_heads": 4, "max_position_embeddings": 2048,
    }  # fmt: skip
    llama = tiny_config(**common, intermediate_size=2816, head_dim=64)
    phi = PhiConfig(**common, intermediate_size=4096, vocab_size=llama.vocab_size,
                    bos_token_id=256, eos_token_id=256)  # fmt: skip
    return {"llama": llama, "phi": phi}


def make_dense(directory: Path, config: PreTrainedConfig) -> Path:
    """Write a random model whose layers change the stream as much as a trained one's do."""
    save_tiny(directory, config, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(directory)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data *= 0.2
    model.to(torch.bfloat16).save_pretrained(directory)
    return directory


@torch.no_grad()
def difference(reference: Any, results: list[dict[str, Any]]) -> float:
    """Return the largest difference between vLLM's logprobs and those of Transformers."""
    worst = 0.0
    for prompt, result in zip(PROMPTS, results, strict=True):
        ids = torch.tensor([prompt + result["tokens"]], device="cuda")
        scores = reference(input_ids=ids).logits[0].float().log_softmax(-1)
        for offset, (token, logprob) in enumerate(
            zip(result["tokens"], result["logprobs"], strict=True)
        ):
            worst = max(worst, abs(scores[len(prompt) + offset - 1, token].item() - logprob))
    return worst


def load_reference(directory: Path, wide: Path | None) -> Any:
    """Load what vLLM is compared with: the checkpoint, or one in fp8 multiplied out."""
    dtype = torch.bfloat16 if wide is None else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(wide or directory, dtype=dtype)
    if wide is not None:
        round_joined(model, stored=True)
    return model.cuda().eval()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("work", type=Path, metavar="WORK_DIR")
    fitting = list(LAYOUTS) if torch.cuda.device_count() > 1 else ["eager", "compiled"]
    parser.add_argument("--layouts", nargs="+", choices=fitting, default=fitting)
    arguments = parser.parse_args()
    work: Path = arguments.work
    models = {name: make_dense(work / name, config) for name, config in dense_configs().items()}
    sliced = {form: ("llama", options) for form, options in FORMS.items()}
    sliced["phi"] = ("phi", FORMS["low-rank"])
    for name, (model, options) in sliced.items():
        run = run_slice(
            SliceOptions(
                str(models[model]), work / f"{name}-sliced", samples=32, device="cuda", **options
            )
        )
        print(name, describe(run.summary), run.stopwatch, flush=True)
    directories = [work / f"{name}-sliced" for name in sliced]
    run_quantize(QuantizeOptions(work / "low-rank-sliced", work / "fp8", "fp8"))
    wide = widened(work / "fp8", work / "fp8-wide")
    passed = True
    for layout in arguments.layouts:
        settings = {
            "dtype": "bfloat16",
            "max_model_len": 512,
            "gpu_memory_utilization": 0.3,
        } | LAYOUTS[layout]
        served = [*directories, work / "fp8"]
        results = generate_each(served, PROMPTS, 32, settings, [{}] * len(served))
        for directory, result in zip(served, results, strict=True):
            in_fp8 = directory.name == "fp8"
            reference = load_reference(directory, wide if in_fp8 else None)
            found, tolerance = difference(reference, result), TOLERANCES[in_fp8]
            passed = passed and found <= tolerance
            print(
                f"{layout}, {directory.name}: largest logprob difference {found:.4f}, tolerance "
                f"{tolerance}",
                flush=True,
            )
    if torch.cuda.device_count() > 1:
        counted = [models["llama"], *directories[: len(FORMS)]]
        options = {"tensor_parallel_size": 2, "gpu_memory_utilization": 0.3}
        counts = read_results(run_script("vllm_all_reduces.py", counted, {}, options), len(counted))
        print("all-reduces a step, each rank:", dict(zip(["dense", *FORMS], counts, strict=True)))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
