"""Count the all-reduces of one step of each of some models, by tensor-parallel rank."""

import json
import os
import sys
from typing import Any


def start(worker: Any) -> None:  # noqa: ARG001 - vLLM passes its worker
    from vllm.distributed import get_tp_group

    group: Any = get_tp_group()
    group.all_reduces, summed = 0, group.all_reduce

    def counted(tensor: Any) -> Any:
        group.all_reduces += 1
        return summed(tensor)

    group.all_reduce = counted


def read(worker: Any) -> int:  # noqa: ARG001
    from vllm.distributed import get_tp_group

    group: Any = get_tp_group()
    return int(group.all_reduces)


def main(directories: list[str], options: dict[str, Any]) -> None:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    for directory in directories:
        llm = LLM(
            model=directory,
            max_model_len=128,
            max_num_seqs=8,
            skip_tokenizer_init=True,
            enforce_eager=True,
            **options,
        )
        llm.collective_rpc(start)
        sampling = SamplingParams(max_tokens=1, ignore_eos=True, detokenize=False)
        llm.generate([{"prompt_token_ids": [1, 2, 3]}], sampling)
        print("RESULT " + json.dumps(llm.collective_rpc(read)), flush=True)
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # functions are sent to the workers
    request = json.loads(sys.argv[1])
    main(**request)
