"""On a machine with a GPU: slice there, and compare vLLM with Transformers in bfloat16.

    python tests/gpu_agreement.py WORK_DIR

Not collected by pytest, which must pass without a GPU. Prints the largest difference in logprob of
the tokens that vLLM (compiled, CUDA graphs) chose, over prompts fed to both; exits with 1 above
the tolerance of bfloat16.
"""

import json
import sys
from pathlib import Path

import torch
from conftest import save_tiny, tiny_config
from test_vllm import generate
from transformers import AutoModelForCausalLM

from sliceserve.slicing.job import SliceOptions, run_slice
from sliceserve.slicing.report import describe

TOLERANCE = 0.1
PROMPTS = [[1, 2, 3, 4, 5], list(range(200)), [7, 9, 11] * 20]


@torch.no_grad()
def main(work: Path) -> int:
    config = tiny_config(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=6, num_attention_heads=16,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=2048,
    )  # fmt: skip
    dense = save_tiny(work / "dense", config, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(dense)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data *= 0.2
    model.to(torch.bfloat16).save_pretrained(dense)
    sliced = work / "sliced"
    run = run_slice(SliceOptions(str(dense), sliced, samples=32, device="cuda"))
    print(describe(run.summary), run.stopwatch)
    reference = AutoModelForCausalLM.from_pretrained(sliced, dtype=torch.bfloat16).cuda().eval()
    results = generate(sliced, PROMPTS, 32, {"dtype": "bfloat16", "max_model_len": 512})
    worst = 0.0
    for prompt, result in zip(PROMPTS, results, strict=True):
        ids = torch.tensor([prompt + result["tokens"]], device="cuda")
        scores = reference(input_ids=ids).logits[0].float().log_softmax(-1)
        for offset, (token, logprob) in enumerate(
            zip(result["tokens"], result["logprobs"], strict=True)
        ):
            expected = scores[len(prompt) + offset - 1, token].item()
            worst = max(worst, abs(expected - logprob))
    print(json.dumps({"largest_logprob_difference": worst, "tolerance": TOLERANCE}))
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
