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
from conftest import OTHER_CONFIGS, save_tiny
from safetensors.torch import load_file, save_file
from test_checkpoint import damage_tensors, shard
from transformers import AutoModelForCausalLM

from sliceserve.slicing.job import PAPER, SliceOptions, run_slice

PROMPTS = [[1, 2, 3, 4, 5], [200, 7, 99], list(range(40))]
EAGER = {"enforce_eager": True}
# Attention on a GPU computes float32 input at a lower precision.
TOLERANCE = 3e-2 if torch.cuda.is_available() else 1e-3


def run_vllm(
    directories: list[Path],
    prompts: list[list[int]],
    tokens: int,
    options: dict[str, Any],
    variants: list[dict[str, Any]] | None = None,
    apart: bool = False,
    count: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Generate with each of some models, in float32 or by options of its own.

    With `apart`, attention on the CPU is made to write rows that lie apart; with `count`, the
    all-reduces of a step are counted, which shows those that are not compiled.
    """
    variants = variants or [{"dtype": "float32"}] * len(directories)
    request = {"prompts": prompts, "tokens": tokens, "variants": variants}
    request |= {"apart": apart, "count": count}
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
    if options.get("tensor_parallel_size") or options.get("pipeline_parallel_size"):
        # Two workers share the cores; vLLM's own binding wants a NUMA node for each.
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
    return subprocess.run(
        [sys.executable, str(script), json.dumps(request | {"options": options})],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def generate_each(
    directories: list[Path],
    prompts: list[list[int]],
    tokens: int,
    options: dict[str, Any],
    variants: list[dict[str, Any]] | None = None,
    apart: bool = False,
) -> list[list[dict[str, Any]]]:
    result = run_vllm(directories, prompts, tokens, options, variants, apart)
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
    """The uneven model, and a sliced tiny model of every other architecture."""
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
    return directories


@pytest.mark.parametrize(
    ("names", "options", "apart"),
    [
        pytest.param(
            ["uneven", *OTHER_CONFIGS, "llama-tied-low-rank", "opt-low-rank"],
            EAGER,
            False,
            id="eager",
        ),
        pytest.param(["uneven", "phi", "llama-tied-low-rank"], {}, True, id="compiled-rows-apart"),
        pytest.param(
            # vLLM on a CPU runs no stages without compilation.
            ["opt", "llama-tied-low-rank"],
            {"pipeline_parallel_size": 2},
            False,
            id="pp2-compiled",
        ),
    ],
)
def test_vllm_agrees_for_every_architecture(
    names: list[str], options: dict[str, Any], apart: bool, others: dict[str, Path]
) -> None:
    models = [others[name] for name in names]
    for model, got in zip(
        models, generate_each(models, PROMPTS, 12, options, apart=apart), strict=True
    ):
        check_agreement(model, got)


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
