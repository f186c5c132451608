"""What vLLM offers beside plain generation, on sliced models: the tokens must stay the same."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import make_adapter
from conftest import OTHER_CONFIGS, save_tiny, tiny_config
from oldest import DRAFTS, needs_sharded_adapters
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_vllm import EAGER, TOLERANCE, greedy, read_results, run_script
from transformers import AutoModelForCausalLM

from sliceserve.server.serve import main
from sliceserve.slicing.errors import UserError
from sliceserve.slicing.job import PAPER, SliceOptions, run_slice
from sliceserve.slicing.quantize import QuantizeOptions, run_quantize

PROMPTS = [[1, 2, 3, 4, 5] * 8, [200, 7, 99], list(range(40))]
TOKENS = 12
FORMS: dict[str, dict[str, Any]] = {
    "whole": PAPER,
    "low-rank": {"rank": 4},
    "shared": {"rotation": "shared"},
}
ACCEPTED = "vllm:spec_decode_num_accepted_tokens"
DRAFTED = "vllm:spec_decode_num_draft_tokens"


def slice_tiny(dense: Path, name: str, **options: Any) -> Path:
    output = dense.with_name(name)
    common = {"fraction": 0.3, "samples": 8, "sequence_length": 64}
    run_slice(SliceOptions(str(dense), output, **(common | options)), show_progress=False)
    return output


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny dense model, and sliced with every form of rotations."""
    work = tmp_path_factory.mktemp("forms")
    dense = save_tiny(work / "dense", OTHER_CONFIGS["llama-tied"], torch.float32)
    sliced = {name: slice_tiny(dense, name, **options) for name, options in FORMS.items()}
    return {"dense": dense} | sliced


def run_each(
    runs: list[tuple[Path, dict[str, Any]]], options: dict[str, Any], fused: bool = False
) -> list[Any]:
    request: dict[str, Any] = {"prompts": PROMPTS, "tokens": TOKENS, "fused": fused}
    request["runs"] = [run for _, run in runs]
    directories = [directory for directory, _ in runs]
    return read_results(run_script("vllm_features.py", directories, request, options), len(runs))


def check(outputs: list[dict[str, Any]], expected: list[dict[str, Any]], run: Any) -> None:
    for ours, theirs in zip(outputs, expected, strict=True):
        assert ours["tokens"] == theirs["tokens"], run
        assert ours["logprobs"] == pytest.approx(theirs["logprobs"], abs=TOLERANCE), run


REPEATED = {"enable_prefix_caching": True, "block_size": 32, "max_num_batched_tokens": 16}


@pytest.mark.parametrize("fused", [False, True], ids=["as-on-a-cpu", "fused-as-on-a-gpu"])
def test_prefixes_chunks_and_drafts_change_no_token(fused: bool, forms: dict[str, Path]) -> None:
    def drafted_by(name: str) -> dict[str, Any]:
        draft = {"method": "draft_model", "model": str(forms[name]), "num_speculative_tokens": 3}
        return {"speculative_config": draft} if DRAFTS else {}

    lookup = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1}
    runs = [(name, {"options": REPEATED | drafted_by(name), "rounds": 2}) for name in FORMS]
    if DRAFTS:
        runs += [
            ("dense", {"options": drafted_by("low-rank")}),
            # The last: vLLM on a CPU starts no other engine in a process that has imported Numba.
            ("low-rank", {"options": {"speculative_config": lookup}}),
        ]
    results = run_each([(forms[name], run) for name, run in runs], EAGER, fused)
    expected = {name: greedy(forms[name], PROMPTS, TOKENS) for name in forms}
    for (name, run), result in zip(runs, results, strict=True):
        check(result["outputs"], expected[name], name)
        if fused and not torch.cuda.is_available():
            assert result["placed"] == ["normed" if name == "whole" else "late"], name
        counters = result["counters"]
        if "rounds" in run:
            assert counters["vllm:prefix_cache_hits"] > 0, name
            # The model's own drafts are its tokens.
            assert counters.get(ACCEPTED) == counters.get(DRAFTED), name
        assert not DRAFTS or counters[DRAFTED] > 0, name


def doubled_biases(sliced: Path) -> Path:
    """Copy a checkpoint, each bias twice as large and all else a tenth smaller."""
    copy = Path(shutil.copytree(sliced, sliced.with_name(f"{sliced.name}-changed")))
    for file in copy.glob("*.safetensors"):
        tensors = load_file(file)
        changed = {
            name: tensor * (2.0 if name.endswith("bias") else 0.9)
            for name, tensor in tensors.items()
        }
        save_file(changed, file, metadata={"format": "pt"})
    return copy


def test_weights_are_loaded_anew_into_a_running_engine(tmp_path: Path) -> None:
    """Biases of what writes too, which OPT has; quantised ones are refused in one sentence."""
    runs: list[tuple[Path, dict[str, Any]]] = []
    # Not llama-tied: of its head vLLM on a CPU keeps what it made before, of the dense model too.
    for name, config in {"opt": OTHER_CONFIGS["opt"], "llama": tiny_config()}.items():
        dense = save_tiny(tmp_path / name / "dense", config, torch.float32)
        sliced = slice_tiny(dense, "low-rank", rank=4)
        runs.append((sliced, {"rounds": 2, "reload": str(doubled_biases(sliced))}))
    for (sliced, run), result in zip(runs, run_each(runs, EAGER), strict=True):
        before, after = (greedy(Path(one), PROMPTS, TOKENS) for one in (sliced, run["reload"]))
        assert before[0]["tokens"] != after[0]["tokens"]
        check(result["outputs"], after, sliced)
    stored = tmp_path / "int8"
    run_quantize(QuantizeOptions(sliced, stored, "int8"), show_progress=False)
    request = {"prompts": PROMPTS, "tokens": 1, "runs": [{"rounds": 2, "reload": str(stored)}]}
    refused = run_script("vllm_features.py", [stored], request, EAGER)
    assert refused.returncode != 0
    assert "the weights of a running engine are in int8 and cannot be loaded" in refused.stderr


def save_adapter(base: Path, directory: Path, targets: list[str]) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(r=4, target_modules=targets)).save_pretrained(directory)
    return directory


def test_adapters_of_another_width_or_place_are_refused(
    forms: dict[str, Path], tmp_path: Path
) -> None:
    """Before there is an engine, in one sentence."""
    dense, sliced = forms["dense"], forms["low-rank"]
    refused = [
        (save_adapter(dense, tmp_path / "of-dense", ["q_proj"]), "is for 96 columns .* has 64"),
        (save_adapter(sliced, tmp_path / "rotation", ["down"]), "rotations cannot have adapters"),
        (save_adapter(sliced, tmp_path / "head", ["head_map"]), "only linears of the layers"),
    ]
    for adapter, message in refused:
        with pytest.raises(UserError, match=message):
            main([str(forms["low-rank"]), "--enable-lora", "--lora-modules", f"mine={adapter}"])


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path, Path]]:
    """Sliced models, adapters of them, and the two merged."""
    models = {}
    chosen = {"llama-tied": "low-rank", "opt": "whole", "phi3": "shared", "phi": "low-rank"}
    for name, form in chosen.items():
        work = tmp_path_factory.mktemp(name)
        dense = save_tiny(work / "dense", OTHER_CONFIGS[name], torch.float32)
        sliced = slice_tiny(dense, "sliced", **FORMS[form])
        models[name] = (sliced, *make_adapter(sliced))
    return models


@pytest.mark.parametrize(
    ("names", "options", "fused"),
    [
        pytest.param(["llama-tied", "opt", "phi3", "phi"], EAGER, False, id="eager"),
        pytest.param(["llama-tied", "phi3", "phi"], EAGER, True, id="fused-as-on-a-gpu"),
        pytest.param(
            ["llama-tied"], EAGER | {"fully_sharded_loras": True}, False, id="rotations-beside"
        ),
        pytest.param(
            ["llama-tied", "phi"],
            {"tensor_parallel_size": 2},
            False,
            id="tp2-compiled",
            marks=needs_sharded_adapters,
        ),
    ],
)
def test_adapters_give_the_tokens_of_merged_weights(
    names: list[str],
    options: dict[str, Any],
    fused: bool,
    adapted: dict[str, tuple[Path, Path, Path]],
) -> None:
    """Requests with and without the adapter share a batch."""
    lora = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2}
    runs = [(adapted[name][0], {"adapters": [None, str(adapted[name][1])]}) for name in names]
    for name, result in zip(names, run_each(runs, options | lora, fused), strict=True):
        if fused and name == "llama-tied" and not torch.cuda.is_available():
            assert result["placed"] == ["late"], name
        sliced, _, merged = adapted[name]
        plain, changed = (greedy(model, PROMPTS, TOKENS) for model in (sliced, merged))
        assert plain[0]["tokens"] != changed[0]["tokens"]
        check(result["outputs"], plain + changed, name)


@pytest.mark.parametrize("name", ["opt", "phi"])
def test_only_linears_that_are_asked_for_are_adapted(
    name: str, adapted: dict[str, tuple[Path, Path, Path]], tmp_path: Path
) -> None:
    """`--lora-target-modules` leaves out what an adapter has for others, joined ones too."""
    sliced, adapter, _ = adapted[name]
    asked = ["q_proj", "k_proj", "v_proj", "out_proj", "dense", "fc2"]
    some = shutil.copytree(adapter, tmp_path / "some")
    factors = load_file(adapter / "adapter_model.safetensors")
    kept = {path: factor for path, factor in factors.items() if ".fc1." not in path}
    assert 0 < len(kept) < len(factors)
    save_file(kept, some / "adapter_model.safetensors")
    restricted = {"lora_target_modules": asked}
    beside = restricted | {"fully_sharded_loras": True}
    runs = [
        (sliced, {"adapters": [str(some)]}),
        (sliced, {"adapters": [str(adapter)]}),
        *((sliced, {"adapters": [str(adapter)], "options": one}) for one in (restricted, beside)),
    ]
    lora = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2}
    fewer, all_of_it, *left_out = (found["outputs"] for found in run_each(runs, EAGER | lora))
    for found, form in zip(left_out, ("joined", "rotations beside"), strict=True):
        check(found, fewer, f"{name}, {form}")
    assert [one["tokens"] for one in all_of_it] != [one["tokens"] for one in fewer]
