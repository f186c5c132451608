"""Run vLLM on each of some models and print what it generated, one line of JSON for each."""

import json
import os
import sys
from typing import Any

from cpu_products import stand_in_where_needed

# Processes that vLLM spawns import this module too.
PRODUCTS = stand_in_where_needed()


def main(
    directories: list[str],
    prompts: list[list[int]],
    tokens: int,
    options: dict[str, Any],
    variants: list[dict[str, Any]],
    apart: bool = False,
) -> None:
    if apart:
        write_rows_apart()
    for directory, variant in zip(directories, variants, strict=True):
        results = generate(directory, prompts, tokens, variant | options)
        print("RESULT " + json.dumps(results), flush=True)


def write_rows_apart() -> None:
    """Have attention on the CPU write rows that lie apart, as on a GPU it can."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    from sliceserve.server import roomy

    forward = CPUAttentionBackendImpl.forward

    def forward_apart(*arguments: Any, output: Any, **named: Any) -> Any:
        if len(output) > 1 and output.is_contiguous():
            sys.exit("no room was made beside attention's output")
        close = output.contiguous()
        forward(*arguments, output=close, **named)
        return output.copy_(close)

    CPUAttentionBackendImpl.forward = forward_apart
    roomy.WRITES_APART += ("CPU_ATTN",)


def generate(
    directory: str, prompts: list[list[int]], tokens: int, options: dict[str, Any]
) -> list[dict[str, Any]]:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        model=directory,
        **(
            {
                "max_model_len": 128,
                "max_num_seqs": 8,
                "skip_tokenizer_init": True,
                "enable_prefix_caching": False,
            }
            | options
        ),
    )
    sampling = SamplingParams(
        temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=1, detokenize=False
    )
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling)
    results = []
    for output in outputs:
        (completion,) = output.outputs
        ids = list(completion.token_ids)
        chosen = [step[token].logprob for step, token in zip(completion.logprobs, ids, strict=True)]
        results.append({"tokens": ids, "logprobs": chosen})
    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()
    return results


if __name__ == "__main__":
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    request = json.loads(sys.argv[1])
    main(**request)
