"""Run vLLM on each of some models and print what it generated, one line of JSON for each.

Asked for them, it also counts the all-reduces of one step, by tensor-parallel rank.
"""

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
    count: bool = False,
) -> None:
    if apart:
        write_rows_apart()
    if count:
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # functions are sent to the workers
    for directory, variant in zip(directories, variants, strict=True):
        results = generate(directory, prompts, tokens, variant | options, count)
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


def start_counting(worker: Any) -> None:  # noqa: ARG001 - vLLM passes its worker
    from vllm.distributed import get_tp_group

    group: Any = get_tp_group()
    group.all_reduces, summed = 0, group.all_reduce

    def counted(tensor: Any) -> Any:
        group.all_reduces += 1
        return summed(tensor)

    group.all_reduce = counted


def read_count(worker: Any) -> int:  # noqa: ARG001
    from vllm.distributed import get_tp_group

    group: Any = get_tp_group()
    return int(group.all_reduces)


def count_all_reduces(llm: Any) -> list[int]:
    """Those of one step, on each rank."""
    from vllm import SamplingParams

    llm.collective_rpc(start_counting)
    sampling = SamplingParams(max_tokens=1, ignore_eos=True, detokenize=False)
    llm.generate([{"prompt_token_ids": [1, 2, 3]}], sampling)
    return list(llm.collective_rpc(read_count))


def generate(
    directory: str, prompts: list[list[int]], tokens: int, options: dict[str, Any], count: bool
) -> dict[str, Any]:
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
    counts = count_all_reduces(llm) if count else None
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
    return {"outputs": results, "all_reduces": counts}


if __name__ == "__main__":
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    request = json.loads(sys.argv[1])
    main(**request)
