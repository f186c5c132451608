"""Run vLLM on models, each with features of its own, and print what it generated and counted.

Every run has options of the engine beside the common ones, LoRA adapters that all prompts are run
with (none, without `adapters`), the number of times that they are, and a checkpoint whose weights
are loaded before the last time. A line of JSON for each has the tokens and logprobs of the last
time, the engine's counters, and how attention had its norm where a CPU fuses as a GPU does, which
`fused` asks for.
"""

import json
import os
import sys
from typing import Any

from vllm.platforms import current_platform
from vllm_generate import fork_workers, fuse_all, read_placed, write_rows_apart

COUNTERS = (
    "vllm:prefix_cache_hits",
    "vllm:spec_decode_num_drafts",
    "vllm:spec_decode_num_draft_tokens",
    "vllm:spec_decode_num_accepted_tokens",
)


def main(
    directories: list[str],
    runs: list[dict[str, Any]],
    prompts: list[list[int]],
    tokens: int,
    options: dict[str, Any],
    fused: bool = False,
) -> None:
    if current_platform.is_cpu():
        fork_workers()
    if fused and current_platform.is_cpu():
        write_rows_apart(set())
        fuse_all()
    for directory, run in zip(directories, runs, strict=True):
        run["options"] = options | run.get("options", {})
        result = generate(directory, prompts, tokens, **run)
        print("RESULT " + json.dumps(result), flush=True)


def generate(
    directory: str,
    prompts: list[list[int]],
    tokens: int,
    options: dict[str, Any],
    adapters: tuple[str | None, ...] = (None,),
    rounds: int = 1,
    reload: str | None = None,
) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.lora.request import LoRARequest

    defaults = {
        "dtype": "float32",
        "max_model_len": 128,
        "max_num_seqs": 8,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
    }
    llm = LLM(model=directory, **(defaults | options))
    sampling = SamplingParams(
        temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=1, detokenize=False
    )
    requests = [
        LoRARequest(f"adapter-{index}", index, adapter) if adapter else None
        for index, adapter in enumerate(adapters, start=1)
    ]
    batch = [{"prompt_token_ids": ids} for _ in requests for ids in prompts]
    chosen = [request for request in requests for _ in prompts]
    for number in range(1, rounds + 1):
        if reload and number == rounds:
            llm.collective_rpc("reload_weights", kwargs={"weights_path": reload})
        outputs = llm.generate(batch, sampling, lora_request=chosen)
    results = []
    for output in outputs:
        (completion,) = output.outputs
        ids = list(completion.token_ids)
        steps = zip(completion.logprobs, ids, strict=True)
        results.append({"tokens": ids, "logprobs": [step[token].logprob for step, token in steps]})
    placed = read_placed(None)
    counters = {
        metric.name: metric.value for metric in llm.get_metrics() if metric.name in COUNTERS
    }
    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()
    return {"outputs": results, "counters": counters, "placed": placed}


if __name__ == "__main__":
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    main(**json.loads(sys.argv[1]))
