"""Run vLLM on each of some models and print what it generated, one line of JSON for each.

Asked for them, it also counts the all-reduces of one step, by tensor-parallel rank, the pieces that
each model was compiled in, or the bytes of the CPU that were taken while it was loaded.
"""

import asyncio
import gc
import json
import os
import sys
from itertools import accumulate
from multiprocessing import get_context
from typing import Any

from cpu_products import stand_in_where_needed
from vllm.platforms import current_platform

# Processes that vLLM spawns import this module too.
PRODUCTS = stand_in_where_needed()

AS_ON_A_GPU = "TESTS_RUN_AS_ON_A_GPU"  # is set for them, too
APART: set[bool] = set()  # whether rows that attention wrote lay apart
DEFAULTS = {
    "max_model_len": 128,
    "max_num_seqs": 8,
    "skip_tokenizer_init": True,
    "enable_prefix_caching": False,
}
GREEDY: dict[str, Any] = {
    "temperature": 0, "ignore_eos": True, "logprobs": 1, "detokenize": False,
}  # fmt: skip
COMPILED = {
    "pieces": "num_piecewise_capturable_graphs_seen",
    "different": "num_compiled_artifacts_saved",
}  # counters of vLLM


def main(
    directories: list[str],
    prompts: list[list[int]],
    tokens: int,
    options: dict[str, Any],
    variants: list[dict[str, Any]],
    count: bool = False,
    pieces: bool = False,
    memory: bool = False,
) -> None:
    if current_platform.is_cpu():
        fork_workers()
    if pieces and current_platform.is_cpu():
        os.environ[AS_ON_A_GPU] = "1"
        run_as_on_a_gpu()
    if count or pieces:
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # functions are sent to the workers
    loading: dict[str, int] = {}
    if memory:
        measure_loading(loading)
    for directory, variant in zip(directories, variants, strict=True):
        APART.clear()
        if "data_parallel_size" in options:
            results = asyncio.run(generate_apart(directory, prompts, tokens, variant | options))
        else:
            results = generate(directory, prompts, tokens, variant | options, count, pieces)
        results |= {"apart": sorted(APART), "loading": loading}
        print("RESULT " + json.dumps(results), flush=True)


def fork_workers() -> None:
    """Have a CPU's workers forked, as a GPU's are: most of their start is to import vLLM."""
    from vllm.v1.executor import multiproc_executor

    multiproc_executor.get_mp_context = lambda: get_context("fork")


def run_as_on_a_gpu() -> None:
    """Have a CPU compile, fuse and write as a GPU does."""
    write_rows_apart(APART)
    fuse_all()
    compile_in_pieces()


def write_rows_apart(seen: set[bool]) -> None:
    """Have attention on the CPU write rows that lie apart, as on a GPU it can; note if they do."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    from sliceserve.server import roomy

    forward = CPUAttentionBackendImpl.forward

    def forward_apart(*arguments: Any, output: Any, **named: Any) -> Any:
        if len(output) > 1:
            seen.add(not output.is_contiguous())
        close = output.contiguous()
        forward(*arguments, output=close, **named)
        return output.copy_(close)

    CPUAttentionBackendImpl.forward = forward_apart
    roomy.WRITES_APART += ("CPU_ATTN",)


def fuse_all() -> None:
    """Have a CPU fuse what a GPU does; note how attention has its norm."""
    from sliceserve.server import fused, placing

    fused.fuses_here = lambda: True
    turned, seen = placing.turned, set()

    def noting(*arguments: Any) -> Any:
        seen.add("normed" if arguments[-1] else "late")
        return turned(*arguments)

    noting.seen = seen
    placing.turned = noting


def compile_in_pieces() -> None:
    """Have the CPU's models compiled as a GPU's are: split at attention, equal pieces once."""
    from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config

    def keep_mode(vllm_config: Any) -> None:
        compilation = vllm_config.compilation_config
        mode, backend = compilation.mode, compilation.backend
        check(vllm_config)
        compilation.mode, compilation.backend, compilation.compile_sizes = mode, backend, []

    CpuPlatform.check_and_update_config = staticmethod(keep_mode)
    # It looks for kernels that a CPU's vLLM has not.
    FixFunctionalizationPass.__call__ = lambda *_: None


def measure_loading(found: dict[str, int]) -> None:
    """Note the bytes that torch allocates and maps at most while a model is loaded, and its own."""
    from torch.profiler import ProfilerActivity, profile
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    load_model, load_weights = BaseModelLoader.load_model, DefaultModelLoader.load_weights

    def measured(*arguments: Any, **named: Any) -> Any:
        # What is only let go of where Python looks for circles counts, whenever it would look.
        gc.collect()
        gc.disable()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            model = load_model(*arguments, **named)
        gc.enable()
        events = profiler.profiler.kineto_results.events()
        changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        found["peak"] = max(accumulate(change for _, change in changes))
        return model

    def noting(self: Any, model: Any, *rest: Any) -> None:
        # Once they are loaded, a CPU packs them.
        sizes = [tensor.nbytes for tensor in (*model.parameters(), *model.buffers())]
        found["model"], found["largest"] = sum(sizes), max(sizes)
        load_weights(self, model, *rest)

    BaseModelLoader.load_model, DefaultModelLoader.load_weights = measured, noting


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


def read_placed(worker: Any) -> list[str]:  # noqa: ARG001
    """How attention of a model that ran in this process had its norm, since this was asked last."""
    from sliceserve.server import placing

    seen: set[str] = getattr(placing.turned, "seen", set())
    found = sorted(seen)
    seen.clear()
    return found


def count_all_reduces(llm: Any) -> list[int]:
    """Those of one step, on each rank."""
    from vllm import SamplingParams

    llm.collective_rpc(start_counting)
    sampling = SamplingParams(max_tokens=1, ignore_eos=True, detokenize=False)
    llm.generate([{"prompt_token_ids": [1, 2, 3]}], sampling)
    return list(llm.collective_rpc(read_count))


def generate(
    directory: str,
    prompts: list[list[int]],
    tokens: int,
    options: dict[str, Any],
    count: bool,
    pieces: bool,
) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.compilation.counter import compilation_counter
    from vllm.distributed import cleanup_dist_env_and_memory

    before = compilation_counter.clone()
    llm = LLM(model=directory, **(DEFAULTS | options))
    if options.get("enable_sleep_mode"):
        llm.sleep()
        llm.wake_up()
    counts = count_all_reduces(llm) if count else None
    sampling = SamplingParams(**GREEDY, max_tokens=tokens)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling)
    results = [read(output) for output in outputs]
    placed = llm.collective_rpc(read_placed) if pieces else None
    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()
    return {
        "outputs": results,
        "all_reduces": counts,
        "placed": placed,
        "compiled": {
            name: getattr(compilation_counter, counter) - getattr(before, counter)
            for name, counter in COMPILED.items()
        },
    }


def read(output: Any) -> dict[str, Any]:
    """The tokens of a request and their logprobs."""
    (completion,) = output.outputs
    ids = list(completion.token_ids)
    steps = zip(completion.logprobs, ids, strict=True)
    return {"tokens": ids, "logprobs": [step[token].logprob for step, token in steps]}


async def generate_apart(
    directory: str, prompts: list[list[int]], tokens: int, options: dict[str, Any]
) -> dict[str, Any]:
    """Generate for all prompts with each of some engines side by side."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(model=directory, **(DEFAULTS | options)))
    sampling = SamplingParams(**GREEDY, max_tokens=tokens)

    async def ask(ids: list[int], rank: int, name: str) -> dict[str, Any]:
        request = llm.generate({"prompt_token_ids": ids}, sampling, name, data_parallel_rank=rank)
        *_, last = [output async for output in request]
        return read(last)

    requests = [(ids, rank) for rank in range(options["data_parallel_size"]) for ids in prompts]
    asked = [ask(ids, rank, str(number)) for number, (ids, rank) in enumerate(requests)]
    outputs = await asyncio.gather(*asked)
    llm.shutdown()
    return {"outputs": outputs}


if os.environ.get(AS_ON_A_GPU):
    run_as_on_a_gpu()

if __name__ == "__main__":
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    request = json.loads(sys.argv[1])
    main(**request)
