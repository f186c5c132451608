"""The real vLLM against Transformers, each run in a process of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import OTHER_CONFIGS, save_sliced, save_tiny, tiny_config
from forked import run_forked
from oldest import needs_asked_stages
from safetensors.torch import load_file, save_file
from server_process import reserved_port
from test_checkpoint import damage_tensors, shard
from transformers import AutoModelForCausalLM

from sliceserve.slicing.job import PAPER, SliceOptions, run_slice

PROMPTS = [[1, 2, 3, 4, 5], [200, 7, 99], list(range(40))]
EAGER = {"enforce_eager": True}
PATIENCE = 300  # seconds
# Attention on a GPU computes float32 input at a lower precision.
TOLERANCE = 3e-2 if torch.cuda.is_available() else 1e-3


def run_vllm(
    directories: list[Path],
    prompts: list[list[int]],
    tokens: int,
    options: dict[str, Any],
    variants: list[dict[str, Any]] | None = None,
    count: bool = False,
    pieces: bool = False,
    memory: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Generate with each of some models, in float32 or by options of its own.

    With `count`, the all-reduces of a step are counted, which shows those that are not compiled;
    with `pieces`, a CPU compiles and fuses as a GPU does, its attention writes rows that lie apart,
    and what was compiled is counted; with `memory`, what is allocated while models are loaded.
    """
    variants = variants or [{"dtype": "float32"}] * len(directories)
    request = {"prompts": prompts, "tokens": tokens, "variants": variants}
    request |= {"count": count, "pieces": pieces, "memory": memory}
    return run_script("vllm_generate.py", directories, request, options)


def run_script(
    name: str, directories: list[Path], request: dict[str, Any], options: dict[str, Any]
) -> subprocess.CompletedProcess[str]:
    script = Path(__file__).with_name(name)
    request = request | {"directories": [str(directory) for directory in directories]}
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        # The engine in the same process: another start of Python and vLLM takes most of the time.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    if "nnodes" in options:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    elif any(f"{kind}_parallel_size" in options for kind in ("tensor", "pipeline", "data")):
        # Two workers share the cores; vLLM's own binding wants a NUMA node for each.
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
    # One node waits for another for ever.
    timeout = PATIENCE if "nnodes" in options else None
    return run_forked(script, [json.dumps(request | {"options": options})], environment, timeout)


def generate_each(
    directories: list[Path],
    prompts: list[list[int]],
    tokens: int,
    options: dict[str, Any],
    variants: list[dict[str, Any]] | None = None,
) -> list[list[dict[str, Any]]]:
    result = run_vllm(directories, prompts, tokens, options, variants)
    return [found["outputs"] for found in read_results(result, len(directories))]


def read_results(result: subprocess.CompletedProcess[str], count: int) -> list[Any]:
    lines = [line for line in result.stdout.splitlines() if line.startswith("RESULT ")]
    assert len(lines) == count, result.stdout[-3000:] + result.stderr[-6000:]
    return [json.loads(line.removeprefix("RESULT ")) for line in lines]


def generate(
    directory: Path, prompts: list[list[int]], tokens: int, options: dict[str, Any]
) -> list[dict[str, Any]]:
    (results,) = generate_each([directory], prompts, tokens, options)
    return results


@torch.no_grad()
def greedy(
    directory: Path, prompts: list[list[int]], tokens: int, prepare: Any = lambda model: model
) -> list[dict[str, Any]]:
    """The same with Transformers, on a model that `prepare` may change first."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    prepare(model)
    results = []
    for prompt in prompts:
        ids, logprobs = list(prompt), []
        for _ in range(tokens):
            scores = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            ids.append(int(scores.argmax()))
            logprobs.append(scores.max().item())
        results.append({"tokens": ids[len(prompt) :], "logprobs": logprobs})
    return results


@pytest.fixture(scope="module")
def uneven(tiny: Path) -> Path:
    """The tiny model at a width that two ranks cannot share evenly."""
    output = tiny.with_name("uneven")
    run_slice(
        SliceOptions(
            str(tiny), output, fraction=0.25, round_to=1, samples=8, sequence_length=64, **PAPER
        ),
        show_progress=False,
    )
    config = json.loads((output / "config.json").read_text())
    assert config["slicing"]["widths"][0] == 72
    return output


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory, uneven: Path) -> dict[str, Path]:
    """The uneven model, a sliced tiny model of every other architecture, and other forms."""
    directories = {"uneven": uneven}
    for name, config in OTHER_CONFIGS.items():
        work = tmp_path_factory.mktemp(name)
        dense = save_tiny(work / "dense", config, torch.float32)
        directories[name] = work / "sliced"
        options = SliceOptions(str(dense), work / "sliced", samples=8, sequence_length=64, **PAPER)
        run_slice(options, show_progress=False)
    # A rotation is shared in steps of 16 directions: of 24 both of two ranks have some.
    low_rank = (
        ("llama-tied", "low-rank", 4), ("llama-tied", "rank-24", 24), ("opt", "low-rank", "auto"),
    )  # fmt: skip
    for name, label, rank in low_rank:
        dense = directories[name].with_name("dense")
        directories[f"{name}-{label}"] = output = directories[name].with_name(label)
        options = SliceOptions(str(dense), output, rank=rank, samples=8, sequence_length=64)
        run_slice(options, show_progress=False)
    # Each stage of a pipeline begins at a width of its own, and both have the table.
    widths, ranks = [96, 96, 80, 80, 64, 72, 48], [24, None, 40, None, None, None]
    directories["differing"] = tmp_path_factory.mktemp("differing") / "sliced"
    save_sliced(directories["differing"], tiny_config(), widths, ranks, tied=True)
    return directories


@pytest.mark.parametrize(
    ("names", "options"),
    [
        pytest.param(
            ["uneven", *OTHER_CONFIGS, "llama-tied-low-rank", "opt-low-rank"], EAGER, id="eager"
        ),
        pytest.param(
            # vLLM on a CPU runs no stages without compilation.
            ["opt", "differing"],
            {"pipeline_parallel_size": 2},
            id="pp2-compiled",
        ),
        pytest.param(["llama-tied-rank-24"], {"tensor_parallel_size": 2}, id="tp2-compiled"),
    ],
)
def test_vllm_agrees_for_every_architecture(
    names: list[str], options: dict[str, Any], others: dict[str, Path]
) -> None:
    models = [others[name] for name in names]
    for model, got in zip(models, generate_each(models, PROMPTS, 12, options), strict=True):
        check_agreement(model, got)


def test_layers_of_equal_width_are_compiled_once(
    others: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many, as in the dense model: what is before attention, between two and after it."""
    short, long = (tiny_config(num_hidden_layers=layers) for layers in (2, 6))
    biased = tiny_config(num_hidden_layers=2, attention_bias=True)
    models = {
        "dense-6": save_tiny(tmp_path / "dense-6", long, torch.float32),
        "low-rank-2": save_sliced(tmp_path / "low-rank-2", short, [64] * 5, [8] * 4),
        "low-rank-6": save_sliced(tmp_path / "low-rank-6", long, [64] * 13, [8] * 12),
        "uneven": others["uneven"],
        "phi": others["phi"],
        "qwen3": save_sliced(tmp_path / "qwen3", OTHER_CONFIGS["qwen3"], [64] * 7, [8] * 6),
        "biases": save_sliced(tmp_path / "biases", biased, [64] * 5, [8] * 4),
    }
    # What earlier runs compiled is not known.
    monkeypatch.setenv("VLLM_USE_AOT_COMPILE", "0")
    caches = [{"cache_dir": str(tmp_path / f"{name}-cache")} for name in models]
    variants = [{"dtype": "float32", "compilation_config": cache} for cache in caches]
    result = run_vllm(list(models.values()), PROMPTS, 12, {}, variants, pieces=True)
    compiled = {}
    for (name, model), found in zip(models.items(), read_results(result, len(models)), strict=True):
        check_agreement(model, found["outputs"])
        compiled[name] = found["compiled"]
        # Room was made beside what attention writes, which is not looked at on a GPU.
        assert torch.cuda.is_available() or found["apart"] == [name != "dense-6"]
        placed = ["late"] if name.startswith("low-rank") else ["normed"]
        placed *= name in ("low-rank-2", "low-rank-6", "biases", "uneven")
        assert torch.cuda.is_available() or found["placed"] == [placed]
    assert compiled == {
        "dense-6": {"pieces": 7, "different": 3},
        "low-rank-2": {"pieces": 3, "different": 3},
        "low-rank-6": {"pieces": 7, "different": 3},
        "uneven": {"pieces": 4, "different": 3},
        "phi": {"pieces": 4, "different": 3},
        "qwen3": {"pieces": 4, "different": 3},
        "biases": {"pieces": 3, "different": 3},
    }


def check_agreement(model: Path, got: list[dict[str, Any]]) -> None:
    """Check against Transformers."""
    for ours, theirs in zip(got, greedy(model, PROMPTS, tokens=12), strict=True):
        assert ours["tokens"] == theirs["tokens"], model
        assert ours["logprobs"] == pytest.approx(theirs["logprobs"], abs=TOLERANCE), model


def test_two_ranks_agree_and_rotations_need_no_all_reduce_of_their_own(
    others: dict[str, Path], uneven: Path
) -> None:
    """One for the embedding and one a sublayer, as in the dense model."""
    dense = uneven.with_name("dense")
    low_rank = [others[f"llama-tied-{label}"] for label in ("low-rank", "rank-24")]
    models = [dense, uneven, others["phi"], *low_rank]
    options = EAGER | {"tensor_parallel_size": 2}
    results = read_results(run_vllm(models, PROMPTS, 12, options, count=True), len(models))
    for model, result in zip(models, results, strict=True):
        check_agreement(model, result["outputs"])
        config = json.loads((model / "config.json").read_text())
        # Phi's attention and MLP share a sublayer.
        sublayers = (1 if model == others["phi"] else 2) * config["num_hidden_layers"]
        assert result["all_reduces"] == [1 + sublayers] * 2, model


@pytest.mark.parametrize(
    ("labels", "parallel"),
    [
        (["rank-24", "low-rank"], "tensor"),
        pytest.param(["low-rank"], "pipeline", marks=needs_asked_stages),
    ],
)
def test_two_ranks_agree_compiled_and_fused_as_on_a_gpu(
    labels: list[str], parallel: str, others: dict[str, Path]
) -> None:
    """Of rotations both tensor-parallel ranks have a part, or only the first."""
    models = [others[f"llama-tied-{label}"] for label in labels]
    run = run_vllm(models, PROMPTS, 12, {f"{parallel}_parallel_size": 2}, pieces=True)
    for model, result in zip(models, read_results(run, len(models)), strict=True):
        check_agreement(model, result["outputs"])
        assert torch.cuda.is_available() or result["placed"] == [["late"]] * 2


def test_two_engines_side_by_side_agree(others: dict[str, Path]) -> None:
    """Data parallelism: each of the two is asked everything."""
    model, options = others["llama-tied-low-rank"], EAGER | {"data_parallel_size": 2}
    got = generate(model, PROMPTS, 12, options)
    assert len(got) == 2 * len(PROMPTS)
    for served in (got[: len(PROMPTS)], got[len(PROMPTS) :]):
        check_agreement(model, served)


def test_two_nodes_agree(others: dict[str, Path], tmp_path: Path) -> None:
    """Tensor-parallel over two nodes by vLLM's own multiprocessing, both of them on this one."""
    model = others["llama-tied-rank-24"]
    shared: dict[str, Any] = {
        "tensor_parallel_size": 2, "nnodes": 2, "master_addr": "127.0.0.1", "dtype": "float32",
        "distributed_executor_backend": "mp", "max_model_len": 128, "max_num_seqs": 8,
    }  # fmt: skip
    script = str(Path(__file__).with_name("headless_node.py"))
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    log = tmp_path / "node.log"
    with reserved_port() as port, log.open("w") as file:
        shared["master_port"] = port
        command = [sys.executable, script, "--model", str(model), "--enforce-eager"]
        for name, value in (shared | {"node_rank": 1}).items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        node = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        try:
            got = generate(model, PROMPTS, 12, EAGER | shared)
        finally:
            node.terminate()
            node.wait(timeout=60)
    check_agreement(model, got)
    assert "rank=1" in log.read_text()


def split_checkpoint(directory: Path) -> None:
    """Put each tensor into a file of its own: files are mapped, and not read at once."""
    tensors, index = load_file(shard(directory)), {}
    shard(directory).unlink()
    for number, (name, tensor) in enumerate(tensors.items(), start=1):
        index[name] = f"model-{number:05d}-of-{len(tensors):05d}.safetensors"
        save_file({name: tensor}, directory / index[name], metadata={"format": "pt"})
    file = directory / "model.safetensors.index.json"
    file.write_text(json.dumps({"metadata": {}, "weight_map": index}))


def test_loading_takes_no_more_than_the_model_and_a_matrix_and_a_half(tmp_path: Path) -> None:
    """What is read, and what is put where it belongs or packed; nothing of vLLM's own linears."""
    wide = tiny_config(hidden_size=512, intermediate_size=1408, num_hidden_layers=6)
    models = [
        save_sliced(tmp_path / "low-rank", wide, [384] * 13, [64] * 12),
        save_sliced(tmp_path / "whole", wide, [384] * 12 + [512], [None] * 12),
    ]
    for model in models:
        split_checkpoint(model)
    results = read_results(run_vllm(models, PROMPTS, 1, EAGER, memory=True), len(models))
    for found in (result["loading"] for result in results):
        assert found["model"] > 10 * found["largest"]
        assert found["model"] <= found["peak"] <= found["model"] + 1.5 * found["largest"]


def test_fraction_zero_gives_the_dense_models_tokens(
    smollm2: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    """Full-width rotations of SmolLM2 in vLLM, against the dense model in vLLM."""
    rotated = tmp_path / "rotated"
    options = SliceOptions(
        str(smollm2), rotated, fraction=0.0, samples=2, sequence_length=128, **PAPER
    )
    run = run_slice(options, show_progress=False)
    assert run.summary.slicing.widths == [576] * 61
    expected, got = generate_each([smollm2, rotated], prompts, 24, EAGER)
    assert [one["tokens"] for one in got] == [one["tokens"] for one in expected]
    for ours, theirs in zip(got, expected, strict=True):
        assert ours["logprobs"] == pytest.approx(theirs["logprobs"], abs=TOLERANCE)


def test_vllm_lists_all_wrong_tensors_in_one_error(tiny_sliced: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_sliced, tmp_path / "copy"))
    tensors = load_file(shard(copy))
    damage_tensors(tensors)
    save_file(tensors, shard(copy), metadata={"format": "pt"})
    result = run_vllm([copy], PROMPTS, 1, EAGER)
    assert result.returncode != 0
    output = result.stdout + result.stderr
    assert "ValueError: the checkpoint does not hold the tensors its config implies" in output
    assert "missing: lm_head.weight, model.layers.0.residual_rotation.0.weight" in output
    assert "unexpected: model.extra.weight" in output
    assert "model.layers.1.mlp.up_proj.weight is [160, 63] and not [160, 64]" in output


def test_prompt_embeddings_are_refused(tiny_sliced: Path) -> None:
    result = run_vllm([tiny_sliced], PROMPTS, 1, EAGER | {"enable_prompt_embeds": True})
    assert result.returncode != 0
    output = result.stdout + result.stderr
    assert "--enable-prompt-embeds cannot be used with a sliced model" in output
