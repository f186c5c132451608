"""On a machine with GPUs: slice there, and compare vLLM with Transformers in bfloat16.

    python tests/gpu_agreement.py WORK_DIR

Not collected by pytest, which must pass without a GPU. For each form of rotation, on one GPU, and
with two also tensor-parallel and pipeline-parallel, it prints the largest difference in logprob of
the tokens that vLLM chose (compiled, CUDA graphs), over prompts fed to both, and exits with 1 above
the tolerance of bfloat16. The same in fp8, against Transformers rounding alike in float32; then the
all-reduces of one step, dense and sliced.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from conftest import save_tiny, tiny_config
from rounding import round_joined, widened
from test_vllm import generate_each, read_results, run_script
from transformers import AutoModelForCausalLM

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


def load_reference(directory: Path, wide: Path | None) -> Any:
    """Load what vLLM is compared with: the checkpoint, or one in fp8 multiplied out."""
    dtype = torch.bfloat16 if wide is None else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(wide or directory, dtype=dtype)
    if wide is not None:
        round_joined(model, stored=True)
    return model.cuda().eval()


def main(work: Path) -> int:
    dense = make_dense(work / "dense")
    directories = [work / form for form in FORMS]
    for form, directory in zip(FORMS, directories, strict=True):
        run = run_slice(
            SliceOptions(str(dense), directory, samples=32, device="cuda", **FORMS[form])
        )
        print(form, describe(run.summary), run.stopwatch, flush=True)
    run_quantize(QuantizeOptions(work / "low-rank", work / "fp8", "fp8"))
    wide = widened(work / "fp8", work / "fp8-wide")
    layouts: dict[str, dict[str, Any]] = {"one GPU": {}}
    if torch.cuda.device_count() > 1:
        layouts["tensor-parallel 2"] = {"tensor_parallel_size": 2}
        layouts["pipeline-parallel 2"] = {"pipeline_parallel_size": 2}
    passed = True
    for layout, options in layouts.items():
        settings = {
            "dtype": "bfloat16",
            "max_model_len": 512,
            "gpu_memory_utilization": 0.3,
        } | options
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
        models = [dense, *directories]
        options = {"tensor_parallel_size": 2, "gpu_memory_utilization": 0.3}
        counts = read_results(run_script("vllm_all_reduces.py", models, {}, options), len(models))
        print("all-reduces a step, each rank:", dict(zip(["dense", *FORMS], counts, strict=True)))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
