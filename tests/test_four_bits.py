"""Four-bit checkpoints: rounding against solutions by hand. In vLLM: `test_quantize`."""

import json
from fractions import Fraction
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import OTHER_CONFIGS, save_tiny, tiny_config
from safetensors.torch import load_file
from shapes import dense_config
from test_checkpoint import shard
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from sliceserve.server.models import check_dtype
from sliceserve.server.packed import STORED, group_size
from sliceserve.slicing.calibration import pick_windows
from sliceserve.slicing.checkpoint import read_checkpoint_summary
from sliceserve.slicing.cli import main
from sliceserve.slicing.corpora import read_corpus
from sliceserve.slicing.gptq import round_columns
from sliceserve.slicing.job import SliceOptions, run_slice
from sliceserve.slicing.placement import tensor_parallel_sizes
from sliceserve.slicing.quantised import SCHEMES
from sliceserve.slicing.quantize import QuantizeOptions, run_quantize

GROUP_SIZES = {"llama": 64, "phi3": 32}
WINDOWS = {"samples": 6, "sequence_length": 64}


def make_sliced(work: Path) -> dict[str, Path]:
    """A model with low-rank rotations, and one whose readers are one matrix and that has none."""
    fields = OTHER_CONFIGS["phi3"].to_dict() | {"intermediate_size": 256}
    configs = {
        "llama": tiny_config(
            hidden_size=192,
            intermediate_size=256,
            tie_word_embeddings=True,
            attention_bias=True,
            mlp_bias=True,
        ),
        "phi3": type(OTHER_CONFIGS["phi3"])(**fields),
    }
    forms: dict[str, Any] = {"llama": {"rank": 4}, "phi3": {"rotation": "shared"}}
    found = {}
    for name, config in configs.items():
        dense = save_tiny(work / f"{name}-dense", config, torch.float32)
        found[name] = work / name
        options = SliceOptions(
            str(dense), found[name], fraction=1 / 3, round_to=64, refit="none", **WINDOWS,
            **forms[name],
        )  # fmt: skip
        run_slice(options, show_progress=False)
    return found


def make_four_bits(sliced: dict[str, Path]) -> dict[str, Path]:
    """The same in four bits, rounded by GPTQ."""
    outputs = {name: path.with_name(f"{name}-four") for name, path in sliced.items()}
    for name, output in outputs.items():
        options = QuantizeOptions(sliced[name], output, "w4a16", GROUP_SIZES[name], **WINDOWS)
        run_quantize(options, show_progress=False)
    return outputs


@pytest.fixture(scope="module")
def sliced(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_sliced(tmp_path_factory.mktemp("narrow"))


@pytest.fixture(scope="module")
def four_bits(sliced: dict[str, Path]) -> dict[str, Path]:
    return make_four_bits(sliced)


def unpacked(tensors: dict[str, Tensor], path: str) -> tuple[Tensor, Tensor]:
    """The numbers from -8 to 7 of a linear, eight in an int32 from its low end, and scales."""
    packed, scale = tensors[f"{path}.weight_packed"], tensors[f"{path}.weight_scale"]
    nibbles = torch.stack([packed >> 4 * place & 15 for place in range(8)], -1).flatten(1) - 8
    assert list(nibbles.shape) == tensors[f"{path}.weight_shape"].tolist()
    return nibbles, scale


def linears(directory: Path) -> dict[str, Tensor]:
    return {
        name.removesuffix(".weight"): weight
        for name, weight in load_file(shard(directory)).items()
        if ".layers." in name and "residual_rotation" not in name and name.endswith(".weight")
    }


@pytest.mark.parametrize("name", GROUP_SIZES)
def test_each_group_is_rounded_to_nearest(
    name: str, sliced: dict[str, Path], tmp_path: Path
) -> None:
    size = GROUP_SIZES[name]
    options = QuantizeOptions(sliced[name], tmp_path / "out", "w4a16", size, rounding="nearest")
    summary = run_quantize(options, show_progress=False)
    before, after = load_file(shard(sliced[name])), load_file(shard(tmp_path / "out"))
    changed = linears(sliced[name])
    assert len(changed) == 3 * (7 if name == "llama" else 4)
    for path, weight in changed.items():
        del before[f"{path}.weight"]
        numbers, scale = unpacked(after, path)
        groups = weight.unflatten(1, (-1, size))
        # The 16 steps are 15 apart, so that the largest value lies at 7.5 of them.
        assert_close(scale, groups.abs().amax(2) / 7.5, rtol=1e-6, atol=0)
        expected = (groups / scale[..., None]).round().clamp(-8, 7).flatten(1)
        assert (numbers != expected).float().mean() < 1e-3
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor)
    assert summary.sliced_parameters == read_checkpoint_summary(sliced[name]).sliced_parameters


def round_one_by_one(weight: Tensor, scale: Tensor, moment: Tensor) -> Tensor:
    """After each column, all that are left move to where they are best, solved afresh."""
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
    steps = scale.repeat_interleave(weight.shape[1] // scale.shape[1], 1)
    settled: list[int] = []
    rounded = weight.clone()
    free = moment.diagonal().argsort(descending=True).tolist()
    while free:
        column = free.pop(0)
        wanted = rounded[:, column] / steps[:, column]
        rounded[:, column] = wanted.round().clamp(-8, 7) * steps[:, column]
        settled.append(column)
        error = weight[:, settled] - rounded[:, settled]
        answer = torch.linalg.solve(damped[free][:, free], damped[free][:, settled] @ error.T)
        rounded[:, free] = weight[:, free] + answer.T
    return rounded


def test_columns_answer_for_those_before_them() -> None:
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(160, 160, generator=generator, dtype=torch.float64)
    inputs = torch.randn(500, 160, generator=generator, dtype=torch.float64) @ mixing.tril()
    weight = torch.randn(24, 160, generator=generator, dtype=torch.float64)
    scale = weight.unflatten(1, (-1, 32)).abs().amax(2) / 7.5
    moment = inputs.T @ inputs
    rounded = round_columns(weight, scale, moment)
    assert_close(rounded, round_one_by_one(weight, scale, moment))
    steps = scale.repeat_interleave(32, 1)
    nearest = (weight / steps).round().clamp(-8, 7) * steps
    lost, more = ((inputs @ (weight - w).T).square().sum() for w in (rounded, nearest))
    assert lost < 0.5 * more


@torch.no_grad()
def test_layers_are_rounded_for_what_rounded_layers_give(
    sliced: dict[str, Path], four_bits: dict[str, Path]
) -> None:
    """The inputs of the last layer, recorded in Transformers from the finished checkpoint."""
    directory = four_bits["llama"]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    read: list[Tensor] = []
    path = "model.layers.2.self_attn.q_proj"
    model.get_submodule(path).register_forward_pre_hook(
        lambda _, x: read.append(x[0].flatten(0, 1))
    )
    windows = pick_windows(
        read_corpus("mixture", "--calibration"), AutoTokenizer.from_pretrained(directory),
        seed=0, argument="--calibration", **WINDOWS,
    )  # fmt: skip
    model(input_ids=windows)
    (inputs,) = read
    numbers, scale = unpacked(load_file(shard(directory)), path)
    moment = inputs.double().T @ inputs.double()
    expected = round_columns(linears(sliced["llama"])[path], scale, moment)
    steps = scale.repeat_interleave(GROUP_SIZES["llama"], 1)
    # A value near the middle of two steps may go either way, and takes later columns with it.
    assert ((numbers * steps - expected).abs() > 0.5 * steps).float().mean() < 0.02


def test_float32_is_refused_before_it_runs() -> None:
    with pytest.raises(
        ValueError, match=r"--dtype float32 cannot be used with w4a16 \(groups of 128"
    ):
        check_dtype(SCHEMES["w4a16"], torch.float32)
    check_dtype(SCHEMES["int8"], torch.float32)
    check_dtype(SCHEMES["w4a16"], torch.float16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--scheme w4a16 --group-size 128", "does not divide the 64 inputs of model.layers.0."
         "self_attn.qkv_proj: --group-size 64 does"),
        ("--scheme int8 --group-size 64", "--group-size 64 is for w4a16: --scheme int8 has no"),
        ("--scheme fp8 --rounding gptq", "--rounding gptq is for w4a16: --scheme fp8 has eight"),
        ("--scheme w4a16 --group-size 64 --sequence-length 1024", "is more than the 512 positions"),
        ("--scheme w4a16 --group-size 64 --sequence-length 64 --calibration none.txt",
         "--calibration 'none.txt'"),
    ],
)  # fmt: skip
def test_what_cannot_be_quantised_gets_one_sentence(
    arguments: str,
    message: str,
    sliced: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out"
    command = ["quantize", str(sliced["phi3"]), "--output", str(output), *arguments.split()]
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_a_width_between_two_tiles_is_refused(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_slice(
        SliceOptions(str(tiny), tmp_path / "wide", fraction=0, samples=2, sequence_length=64),
        show_progress=False,
    )
    command = ["quantize", str(tmp_path / "wide"), "--output", str(tmp_path / "out")]
    assert main([*command, "--scheme", "w4a16", "--group-size", "32"]) == 2
    assert (
        "needs outputs in multiples of 64, and model.layers.0.self_attn.o_proj has 96: slice with "
        "--round-to 64"
    ) in capsys.readouterr().err


def test_the_plan_counts_the_bytes_stored(
    four_bits: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    directory = four_bits["llama"]
    assert main(["plan", str(directory), "--gpu-memory", "1GiB", "--json"]) == 0
    (form,) = json.loads(capsys.readouterr().out)["forms"]
    assert (form["quantization"], form["group_size"]) == ("w4a16", 64)
    stored = load_file(shard(directory)).items()
    assert form["layers_bytes"] == sum(
        prod(tensor.shape) * tensor.itemsize
        for name, tensor in stored
        if ".layers." in name and "rotation" not in name and not name.endswith("_shape")
    )


def test_no_rank_gets_a_part_of_a_group() -> None:
    """Llama-2-7B: 11008 inputs of the MLP's writer are 86 groups of 128, or 172 of 64."""
    config = dense_config("llama-2-7b")
    assert tensor_parallel_sizes(config) == [1, 2, 4, 8, 16, 32]
    assert tensor_parallel_sizes(config, 128) == [1, 2]
    assert tensor_parallel_sizes(config, 64) == [1, 2, 4]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"pack_factor": 8, "has_g_idx": False}, 64),
        ({"pack_factor": Fraction(8), "num_bits": 4}, 64),
        ({"pack_factor": 4, "has_g_idx": False}, None),
        ({"pack_factor": 8, "has_g_idx": True}, None),
    ],
    ids=["0.24", "0.32", "eight-bits", "reordered"],
)
def test_rotations_join_what_either_end_of_vllm_calls_four_bits(
    more: dict[str, Any], expected: int | None
) -> None:
    """With the fields that vLLM 0.24 and 0.32 give their schemes."""
    scheme = type(STORED, (SimpleNamespace,), {})(symmetric=True, group_size=64, **more)
    linear: Any = SimpleNamespace(scheme=scheme, params_dtype=torch.float16)
    assert group_size(linear) == expected
