"""CUDA graphs of draft models, by the code of vLLM that chooses among them; no GPU takes part."""

from types import SimpleNamespace
from typing import Any

from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher
from vllm.v1.spec_decode.draft_model import DraftModelProposer
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from sliceserve.server.drafts import dispatch_drafts

SIZES = [1, 2, 4, 8]


class Runner(GPUModelRunner):  # type: ignore[misc]
    """vLLM's runner with no more than it needs to resolve its modes."""

    def __init__(self, *, drafts: bool) -> None:
        speculative = SimpleNamespace(
            uses_draft_model=lambda: drafts,
            use_eagle=lambda: False,
            uses_extract_hidden_states=lambda: False,
            enforce_eager=False,
        )
        self.compilation_config = CompilationConfig(
            mode=CompilationMode.VLLM_COMPILE,
            cudagraph_mode=CUDAGraphMode.PIECEWISE,
            cudagraph_capture_sizes=SIZES,
            max_cudagraph_capture_size=SIZES[-1],
        )
        self.compilation_config.set_splitting_ops_for_v1(all2all_backend="")
        self.vllm_config = SimpleNamespace(
            compilation_config=self.compilation_config,
            num_speculative_tokens=1,
            lora_config=None,
            scheduler_config=SimpleNamespace(max_num_seqs=1),
        )
        self.speculative_config = speculative if drafts else None
        self.parallel_config = SimpleNamespace(tensor_parallel_size=1, data_parallel_size=1)
        self.uniform_decode_query_len, self.max_num_reqs = 2, 1
        self.kv_cache_config = SimpleNamespace(kv_cache_groups=[])
        self.cudagraph_dispatcher = CudagraphDispatcher(self.vllm_config)
        if drafts:
            self.drafter: Any = object.__new__(DraftModelProposer)
            self.drafter.speculative_config = speculative
            self.drafter.cudagraph_dispatcher = CudagraphDispatcher(self.vllm_config)

    def resolve(self) -> None:
        """Do what vLLM does once the KV cache is known."""
        self._check_and_update_cudagraph_mode([], [])


def test_a_draft_runs_the_graphs_that_its_model_runs() -> None:
    class Mended(Runner):
        pass

    dispatch_drafts(Mended)
    dispatch_drafts(Mended)  # with the next model of the process
    runner = Mended(drafts=True)
    before = runner.drafter.cudagraph_dispatcher.dispatch(3)
    assert before[0] is CUDAGraphMode.NONE
    runner.resolve()
    mode, batch = runner.drafter.cudagraph_dispatcher.dispatch(3)
    assert (mode, batch.num_tokens) == (CUDAGraphMode.PIECEWISE, 4)
    assert runner.cudagraph_dispatcher.dispatch(3) == (mode, batch)


def test_a_model_without_a_draft_is_left_alone() -> None:
    class Mended(Runner):
        pass

    dispatch_drafts(Mended)
    mended, plain = Mended(drafts=False), Runner(drafts=False)
    for runner in (mended, plain):
        runner.resolve()
    assert mended.cudagraph_dispatcher.cudagraph_keys == plain.cudagraph_dispatcher.cudagraph_keys
