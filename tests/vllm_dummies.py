"""Print the sizes of the residual stream of a model with dummy weights, before and after layers.

First with vLLM's own, then for each variant with ours.
"""

import json
import os
import sys
from typing import Any

from cpu_products import stand_in_where_needed

PRODUCTS = stand_in_where_needed()


def watch(model: Any) -> None:
    def note(module: Any, _: Any, output: Any) -> None:
        module.seen = output.float().square().mean().sqrt().item()

    for module in (model.model.embed_tokens, *model.model.layers):
        module.register_forward_hook(note)


def read(model: Any) -> list[float]:
    return [module.seen for module in (model.model.embed_tokens, *model.model.layers)]


def sizes(directory: str, options: dict[str, Any]) -> list[float]:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        model=directory, load_format="dummy", max_model_len=128, max_num_seqs=8,
        skip_tokenizer_init=True, enforce_eager=True, **options,
    )  # fmt: skip
    llm.apply_model(watch)
    sampling = SamplingParams(max_tokens=1, ignore_eos=True, detokenize=False)
    llm.generate([{"prompt_token_ids": [1, 2, 3]}], sampling, use_tqdm=False)
    (found,) = llm.apply_model(read)
    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()
    return list(found)


def main(directories: list[str], options: dict[str, Any], variants: list[dict[str, Any]]) -> None:
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    from sliceserve.server.dummies import keep_stream

    (directory,) = directories
    print("RESULT " + json.dumps({"rotations": 0, "sizes": sizes(directory, options)}), flush=True)
    load = DummyModelLoader.load_weights
    rotations: list[int] = []

    def load_and_keep(self: Any, model: Any, config: Any) -> None:
        # Here, because a CPU packs weights once they are loaded.
        load(self, model, config)
        rotations.append(keep_stream(model))

    DummyModelLoader.load_weights = load_and_keep
    for variant in variants:
        found = {"sizes": sizes(directory, options | variant), "rotations": rotations.pop()}
        print("RESULT " + json.dumps(found), flush=True)


if __name__ == "__main__":
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    main(**json.loads(sys.argv[1]))
