"""On a machine with GPUs: slice there, and compare vLLM with Transformers in bfloat16.

    python tests/gpu_agreement.py WORK_DIR

Not collected by pytest, which must pass without a GPU. For each form of rotation, on one GPU, and
with two also tensor-parallel and pipeline-parallel, it prints the largest difference in logprob of
the tokens that vLLM chose (compiled, CUDA graphs), over prompts fed to both, and exits with 1 above
the tolerance of bfloat16; then the all-reduces of one step, dense and sliced.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from conftest import save_tiny, tiny_config
from test_vllm import generate_each, read_results, run_script
from transformers import AutoModelForCausalLM

from sliceserve.slicing.job import PAPER, SliceOptions, run_slice
from sliceserve.slicing.report import describe

TOLERANCE = 0.1
PROMPTS = [[1, 2, 3, 4, 5], list(range(200)), [7, 9, 11] * 20]
FORMS: dict[str, dict[str, Any]] = {
    "whole": dict(PAPER),
    "low-rank": {"rotation": "low-rank"},
    "shared": {"rotation": "shared"},
}


def make_dense(directory: Path) -> Path:
    """Write a random model whose layers change the stream as much as a trained one's do."""
    config = tiny_config(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=6, num_attention_heads=16,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=2048,
    )  # fmt: skip
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


def main(work: Path) -> int:
    dense = make_dense(work / "dense")
    directories = [work / form for form in FORMS]
    for form, directory in zip(FORMS, directories, strict=True):
        run = run_slice(
            SliceOptions(str(dense), directory, samples=32, device="cuda", **FORMS[form])
        )
        print(form, describe(run.summary), run.stopwatch, flush=True)
    layouts: dict[str, dict[str, Any]] = {"one GPU": {}}
    if torch.cuda.device_count() > 1:
        layouts["tensor-parallel 2"] = {"tensor_parallel_size": 2}
        layouts["pipeline-parallel 2"] = {"pipeline_parallel_size": 2}
    worst = 0.0
    for layout, options in layouts.items():
        settings = {
            "dtype": "bfloat16",
            "max_model_len": 512,
            "gpu_memory_utilization": 0.3,
        } | options
        results = generate_each(directories, PROMPTS, 32, settings)
        for directory, result in zip(directories, results, strict=True):
            model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
            found = difference(model.cuda().eval(), result)
            print(f"{layout}, {directory.name}: largest logprob difference {found:.4f}", flush=True)
            worst = max(worst, found)
    if torch.cuda.device_count() > 1:
        models = [dense, *directories]
        options = {"tensor_parallel_size": 2, "gpu_memory_utilization": 0.3}
        counts = read_results(run_script("vllm_all_reduces.py", models, {}, options), len(models))
        print("all-reduces a step, each rank:", dict(zip(["dense", *FORMS], counts, strict=True)))
    print(f"largest of all {worst:.4f}, tolerance {TOLERANCE}")
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
