"""On a machine with GPUs: slice there, and compare vLLM in bfloat16 with Transformers in float32.

    PYTHONPATH=benchmarks python tests/gpu_agreement.py WORK_DIR [--layouts eager compiled] \\
        [--models low-rank fp8]

Not collected by pytest, which must pass without a GPU. For a Llama with each form of rotation and a
Phi, on one GPU, eager and compiled with CUDA graphs, and with two GPUs also tensor-parallel and
pipeline-parallel, it prints the largest and the mean difference in logprob of the tokens that vLLM
chose, over prompts fed to both, and exits with 1 above the tolerance of bfloat16. The same in fp8,
int8 and four bits, against Transformers rounding alike, and with what servers are started with:
float16, a KV cache in fp8, another attention, weights on the CPU, after a sleep, LoRA adapters for
half of the requests. Then, tensor-parallel, the all-reduces of one step, dense and sliced.
"""

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from adapters import add_adapter, make_adapter
from conftest import save_tiny, tiny_config
from rounding import round_joined, round_joined_int8, round_rotations, widened
from test_vllm import generate_each, read_results, run_script, run_vllm
from torch import Tensor
from transformers import AutoModelForCausalLM, PhiConfig, PreTrainedConfig

from sliceserve.slicing.job import PAPER, SliceOptions, run_slice
from sliceserve.slicing.quantised import SCHEMES
from sliceserve.slicing.quantize import QuantizeOptions, run_quantize
from sliceserve.slicing.report import describe


class Tolerance(NamedTuple):
    """How far logprobs may be from those of Transformers, of one token and in the mean.

    The mean tells more (`rounding_noise.py`): one linear whose adapter is left out moves it further
    than rounding does, and the largest not always.
    """

    largest: float
    mean: float


TOLERANCE = Tolerance(0.1, 0.03)  # in bfloat16
# bfloat16 moves values across the middle of two steps; Transformers does not round its cache.
TOLERANCES = {
    "fp8": Tolerance(0.5, 0.15),
    "int8": Tolerance(0.3, 0.08),
    "fp8-cache": Tolerance(0.5, 0.15),
}
PROMPTS = [[1, 2, 3, 4, 5], list(range(200)), [7, 9, 11] * 20]
FORMS: dict[str, dict[str, Any]] = {
    "whole": dict(PAPER),
    "low-rank": {"rotation": "low-rank"},
    "rank-64": {"rotation": "low-rank", "rank": 64},  # of which both of two ranks have a part
    "rank-20": {"rotation": "low-rank", "rank": 20},  # filled up with zeros
    "shared": {"rotation": "shared"},
}
QUANTISED = ["fp8", "int8", "w4a16"]  # of the low-rank form
MODELS = [*FORMS, "phi", *QUANTISED]

# So little that several may share a GPU.
COMMON: dict[str, Any] = {
    "dtype": "bfloat16",
    "max_model_len": 512,
    "gpu_memory_utilization": 0.3,  # has to be free
    "kv_cache_memory_bytes": 2**30,
}
ADAPTERS: dict[str, Any] = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    "compiled": {},
    "float16": {"dtype": "float16"},
    "fp8-cache": {"kv_cache_dtype": "fp8"},
    "triton-attention": {"attention_backend": "TRITON_ATTN"},
    "offloaded": {"cpu_offload_gb": 1},
    "asleep": {"enable_sleep_mode": True},
    "adapter": dict(ADAPTERS),
    "adapter-tensor-parallel": ADAPTERS | {"tensor_parallel_size": 2},
    "tensor-parallel": {"tensor_parallel_size": 2},
    "pipeline-parallel": {"pipeline_parallel_size": 2},
}


def dense_configs() -> dict[str, PreTrainedConfig]:
    """Sublayers that follow each other, and such that attention and MLP share."""
    common: dict[str, Any] = {
        "hidden_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 16,
        "num_key_value_heads": 4, "max_position_embeddings": 2048,
    }  # fmt: skip
    llama = tiny_config(**common, intermediate_size=2816, head_dim=64)
    phi = PhiConfig(**common, intermediate_size=4096, vocab_size=llama.vocab_size,
                    bos_token_id=256, eos_token_id=256)  # fmt: skip
    return {"llama": llama, "phi": phi}


def make_dense(directory: Path, config: PreTrainedConfig) -> Path:
    """Write a random model whose layers change the stream as much as a trained one's do."""
    save_tiny(directory, config, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(directory)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data *= 0.2
    model.to(torch.bfloat16).save_pretrained(directory)
    return directory


@torch.no_grad()
def differences(reference: Any, results: list[dict[str, Any]]) -> Tensor:
    """Return how far vLLM's logprobs are from those of Transformers, of each token."""
    found = []
    for prompt, result in zip(PROMPTS, results, strict=True):
        ids = torch.tensor([prompt + result["tokens"]], device="cuda")
        scores = reference(input_ids=ids).logits[0].float().log_softmax(-1)
        for offset, (token, logprob) in enumerate(
            zip(result["tokens"], result["logprobs"], strict=True)
        ):
            found.append(abs(scores[len(prompt) + offset - 1, token].item() - logprob))
    return torch.tensor(found)


def load_reference(name: str, directory: Path, adapter: Path | None = None) -> Any:
    """Load what vLLM is compared with: Transformers, rounding alike where something is rounded."""
    stored = directory
    if name in TOLERANCES:
        wide = f"{name}-wide-adapted" if adapter else f"{name}-wide"
        directory = widened(directory, directory.with_name(wide))
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    if adapter:
        add_adapter(model, adapter)
    if name == "fp8":
        round_joined(model, stored=True)
    elif name == "int8":
        round_joined_int8(model, stored)
    elif name == "w4a16":
        round_rotations(model, SCHEMES["w4a16"].group_size, torch.bfloat16)
    return model.cuda().eval()


def make_adapters(models: dict[str, Path]) -> dict[str, Path]:
    """Make an adapter of each model; quantised ones share that of what they were made from."""
    bases = {
        name: path.with_name("low-rank-sliced") if name in QUANTISED else path
        for name, path in models.items()
    }
    made = {base: make_adapter(base, 0.05)[0] for base in set(bases.values())}
    return {name: made[base] for name, base in bases.items()}


def generate_adapted(
    models: dict[str, Path], adapters: dict[str, Path], settings: dict[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Generate without an adapter and with it, in one batch; return both by model."""
    runs = [{"adapters": [None, str(adapters[name])]} for name in models]
    request = {"prompts": PROMPTS, "tokens": 32, "runs": runs}
    run = run_script("vllm_features.py", list(models.values()), request, settings)
    results = [found["outputs"] for found in read_results(run, len(models))]
    count = len(PROMPTS)
    return {
        name: (result[:count], result[count:]) for name, result in zip(models, results, strict=True)
    }


def make_models(work: Path, names: list[str]) -> dict[str, Path]:
    """Slice, and quantise, what is asked for; return the directories by name."""
    configs = dense_configs()
    dense: dict[str, Path] = {}
    sliced: dict[str, tuple[str, dict[str, Any]]] = {
        form: ("llama", options) for form, options in FORMS.items()
    }
    sliced["phi"] = ("phi", FORMS["low-rank"])
    needed = {"low-rank" if name in QUANTISED else name: None for name in names}
    for name in needed:
        model, options = sliced[name]
        if model not in dense:
            dense[model] = make_dense(work / model, configs[model])
        directory = work / f"{name}-sliced"
        run = run_slice(
            SliceOptions(
                str(dense[model]), directory, samples=32, device="cuda", round_to=128, **options
            )
        )
        print(name, describe(run.summary), run.stopwatch, flush=True)
    found = {name: work / f"{name}-sliced" for name in names if name not in QUANTISED}
    for scheme in (name for name in names if name in QUANTISED):
        run_quantize(
            QuantizeOptions(
                work / "low-rank-sliced", work / scheme, scheme, samples=8, device="cuda"
            )
        )
        found[scheme] = work / scheme
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("work", type=Path, metavar="WORK_DIR")
    single = [name for name in LAYOUTS if not name.endswith("-parallel")]
    fitting = list(LAYOUTS) if torch.cuda.device_count() > 1 else single
    parser.add_argument("--layouts", nargs="+", choices=fitting, default=fitting)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    arguments = parser.parse_args()
    models = make_models(arguments.work, arguments.models)
    references = {name: load_reference(name, directory) for name, directory in models.items()}
    adapting = any(layout.startswith("adapter") for layout in arguments.layouts)
    adapters = make_adapters(models) if adapting else {}
    adapted = {name: load_reference(name, models[name], one) for name, one in adapters.items()}
    passed = True
    for layout in arguments.layouts:
        settings = COMMON | LAYOUTS[layout]
        # A process has one engine that can sleep.
        apart = [[one] for one in models.values()] if layout == "asleep" else [[*models.values()]]
        if layout.startswith("adapter"):
            compared = {}
            for name, (without, having) in generate_adapted(models, adapters, settings).items():
                compared[name] = (references[name], without)
                compared[f"{name}, adapted"] = (adapted[name], having)
        else:
            results = [
                result
                for group in apart
                for result in generate_each(group, PROMPTS, 32, settings, [{}] * len(group))
            ]
            pairs = zip(references.values(), results, strict=True)
            compared = dict(zip(models, pairs, strict=True))
        for name, (reference, result) in compared.items():
            found = differences(reference, result)
            largest, mean = found.max().item(), found.mean().item()
            bound = max(TOLERANCES.get(one, TOLERANCE) for one in (name.split(",")[0], layout))
            passed = passed and largest <= bound.largest and mean <= bound.mean
            print(
                f"{layout}, {name}: logprobs differ by at most {largest:.4f} (tolerance "
                f"{bound.largest}), by {mean:.4f} in the mean (tolerance {bound.mean})",
                flush=True,
            )
    forms = {name: path for name, path in models.items() if name in FORMS}
    if "tensor-parallel" in arguments.layouts and forms:
        counted = {"dense": arguments.work / "llama"} | forms
        options = COMMON | {"tensor_parallel_size": 2, "enforce_eager": True}
        run = run_vllm(list(counted.values()), PROMPTS, 1, options, [{}] * len(counted), count=True)
        counts = [found["all_reduces"] for found in read_results(run, len(counted))]
        print("all-reduces a step, each rank:", dict(zip(counted, counts, strict=True)))
        passed = passed and all(count == counts[0] for count in counts)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
