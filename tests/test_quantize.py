"""Eight-bit checkpoints against rounding by hand; these and four bits in vLLM."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import add_adapter, make_adapter
from conftest import OTHER_CONFIGS, save_tiny
from oldest import OLDEST
from rounding import round_joined, round_joined_int8, round_rotations, widened
from safetensors.torch import load_file, save_file
from test_checkpoint import shard
from test_four_bits import GROUP_SIZES, make_four_bits, make_sliced
from test_vllm import EAGER, PROMPTS, generate_each, greedy
from test_vllm_features import PROMPTS as FEATURE_PROMPTS
from test_vllm_features import run_each
from torch.testing import assert_close

from sliceserve.slicing.checkpoint import read_checkpoint_summary, read_sliced_config
from sliceserve.slicing.cli import main
from sliceserve.slicing.job import PAPER, SliceOptions, run_slice
from sliceserve.slicing.page import parts_table
from sliceserve.slicing.quantize import QuantizeOptions, run_quantize

LARGEST = {"fp8": 448.0, "int8": 127.5}  # compressed-tensors maps the largest of a row here
DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}


@pytest.fixture(scope="module")
def sliced(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tied model with low-rank rotations, and one with biases and whole ones."""
    found = {}
    for name, changes in (("llama-tied", {"rank": 4}), ("opt", PAPER)):
        work = tmp_path_factory.mktemp(name)
        dense = save_tiny(work / "dense", OTHER_CONFIGS[name], torch.float32)
        found[name] = work / "sliced"
        options = SliceOptions(str(dense), found[name], samples=8, sequence_length=64, **changes)
        run_slice(options, show_progress=False)
    return found


@pytest.mark.parametrize("scheme", LARGEST)
@pytest.mark.parametrize("name", ["llama-tied", "opt"])
def test_linears_are_rounded_to_nearest_and_all_else_stays(
    name: str, scheme: str, sliced: dict[str, Path], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    summary = run_quantize(QuantizeOptions(sliced[name], output, scheme), show_progress=False)
    before, after = load_file(shard(sliced[name])), load_file(shard(output))
    scales = {key for key in after if key.endswith("_scale")}
    assert len(scales) == 3 * (7 if name == "llama-tied" else 6)
    assert not any("residual_rotation" in key or "head" in key for key in scales)
    assert after.keys() - scales == before.keys()
    for key, weight in before.items():
        if f"{key}_scale" not in scales:
            assert torch.equal(after[key], weight)
            continue
        scale = weight.abs().amax(1, keepdim=True) / LARGEST[scheme]
        assert_close(after[f"{key}_scale"], scale, rtol=1e-6, atol=0)
        rounded = (weight / scale).clamp(-448, 448).to(DTYPES["fp8"])
        if scheme == "int8":
            rounded = (weight / scale).round().clamp(-128, 127).to(torch.int8)
        # A quotient that the two round from either side of a half.
        different = after[key].float() != rounded.float()
        assert after[key].dtype == DTYPES[scheme]
        assert different.float().mean() < 1e-3
    unquantised = read_checkpoint_summary(sliced[name])
    assert summary.sliced_parameters == unquantised.sliced_parameters
    assert summary.bytes < unquantised.bytes


@pytest.fixture(scope="module")
def eight_bits(sliced: dict[str, Path]) -> dict[str, Path]:
    outputs = {name: path.with_name("int8") for name, path in sliced.items()}
    for name, output in outputs.items():
        run_quantize(QuantizeOptions(sliced[name], output, "int8"), show_progress=False)
    return outputs


@pytest.fixture(scope="module")
def fp8(sliced: dict[str, Path]) -> Path:
    output = sliced["llama-tied"].with_name("fp8")
    run_quantize(QuantizeOptions(sliced["llama-tied"], output, "fp8"), show_progress=False)
    return output


def round_what_linears_read(model: torch.nn.Module) -> None:
    """Round each token to 255 steps, as an engine does."""

    def rounded(_linear: torch.nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        scale = inputs[0].abs().amax(-1, keepdim=True) / 127
        return (inputs[0] / scale).round() * scale

    for name, module in model.named_modules():
        kept = "residual_rotation" in name or "layers." not in name
        if isinstance(module, torch.nn.Linear) and not kept:
            module.register_forward_pre_hook(rounded)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_sliced(tmp_path_factory.mktemp("narrow"))


@pytest.fixture(scope="module")
def four_bits(narrow: dict[str, Path]) -> dict[str, Path]:
    return make_four_bits(narrow)


@pytest.fixture(scope="module")
def served(
    eight_bits: dict[str, Path],
    four_bits: dict[str, Path],
    sliced: dict[str, Path],
    fp8: Path,
) -> dict[str, list[dict[str, Any]]]:
    models = eight_bits | four_bits | {"fp8": fp8}
    # Four-bit weights, and those that are quantised while they load, do not run in float32.
    variants: list[dict[str, Any]] = [
        *[{"dtype": "float32"}] * len(eight_bits),
        *[{"dtype": "float16"}] * len(four_bits),
        {"dtype": "float32"},
    ]
    if not OLDEST:  # whose kernels for CPUs round nothing to fp8 while it loads
        models["fp8 online"] = sliced["llama-tied"]
        variants.append({"dtype": "float16", "quantization": "fp8_per_channel"})
    results = generate_each(list(models.values()), PROMPTS, 6, EAGER, variants)
    return dict(zip(models, results, strict=True))


def test_vllm_agrees_with_transformers_in_eight_bits(
    served: dict[str, list[dict[str, Any]]],
    eight_bits: dict[str, Path],
    sliced: dict[str, Path],
    tmp_path: Path,
) -> None:
    for name, directory in eight_bits.items():
        wide = widened(directory, tmp_path / name)
        # Rotations join linears but where they are whole.
        joined = partial(round_joined_int8, directory=directory)
        alike = joined if name == "llama-tied" else round_what_linears_read
        expected = greedy(wide, PROMPTS, 6, alike)
        exact = greedy(sliced[name], PROMPTS, 6)
        for ours, theirs, full in zip(served[name], expected, exact, strict=True):
            assert ours["tokens"] == theirs["tokens"], name
            # Where a value lies near the middle of two steps, the two round apart.
            assert ours["logprobs"] == pytest.approx(theirs["logprobs"], abs=2e-2), name
            # It is the eight-bit weights that ran.
            assert ours["logprobs"][0] != pytest.approx(full["logprobs"][0], abs=1e-4), name
        if name == "llama-tied":
            apart = greedy(wide, PROMPTS, 1, round_what_linears_read)
            for ours, other in zip(served[name], apart, strict=True):
                assert ours["logprobs"][0] != pytest.approx(other["logprobs"][0], abs=1e-4)


def test_rotations_join_linears_in_fp8(
    served: dict[str, list[dict[str, Any]]], fp8: Path, sliced: dict[str, Path], tmp_path: Path
) -> None:
    wide = widened(fp8, tmp_path / "wide")
    expected = greedy(wide, PROMPTS, 6, lambda model: round_joined(model, stored=True))
    apart = greedy(wide, PROMPTS, 6)
    for ours, theirs, other in zip(served["fp8"], expected, apart, strict=True):
        assert ours["tokens"][:5] == theirs["tokens"][:5]
        assert ours["logprobs"][0] == pytest.approx(theirs["logprobs"][0], abs=2e-3)
        # A value near the middle of two that fp8 has is rounded up in one and down in the other.
        assert ours["logprobs"][:5] == pytest.approx(theirs["logprobs"][:5], abs=6e-2)
        assert ours["logprobs"][0] != pytest.approx(other["logprobs"][0], abs=1e-2)
    if OLDEST:
        return
    # In float16 other values lie near the middle of two that fp8 has.
    exact = greedy(sliced["llama-tied"], PROMPTS, 1)
    for ours, theirs in zip(served["fp8 online"], exact, strict=True):
        assert ours["logprobs"][0] == pytest.approx(theirs["logprobs"][0], abs=0.2)


def test_vllm_agrees_with_transformers_in_four_bits(
    served: dict[str, list[dict[str, Any]]],
    four_bits: dict[str, Path],
    narrow: dict[str, Path],
) -> None:
    for name, directory in four_bits.items():
        expected = greedy(directory, PROMPTS, 6, partial(round_rotations, group=GROUP_SIZES[name]))
        for ours, theirs in zip(served[name], expected, strict=True):
            assert ours["tokens"] == theirs["tokens"], name
            assert ours["logprobs"] == pytest.approx(theirs["logprobs"], abs=3e-2), name
        # It is four-bit weights that ran, and rotations are among them.
        others = [narrow[name]] if name == "phi3" else [narrow[name], directory]
        for other in others:
            for ours, exact in zip(served[name], greedy(other, PROMPTS, 6), strict=True):
                assert ours["logprobs"] != pytest.approx(exact["logprobs"], abs=3e-2), name


def test_adapters_go_with_quantised_linears_and_their_rotations(
    eight_bits: dict[str, Path],
    four_bits: dict[str, Path],
    sliced: dict[str, Path],
    narrow: dict[str, Path],
    fp8: Path,
    tmp_path: Path,
) -> None:
    """They read what is not rounded. Requests with and without one share a batch."""
    eight, four = (make_adapter(path)[0] for path in (sliced["llama-tied"], narrow["llama"]))
    int8, group = eight_bits["llama-tied"], GROUP_SIZES["llama"]
    cases: dict[str, tuple[Path, Path, str, Any]] = {
        "int8": (int8, eight, "float32", partial(round_joined_int8, directory=int8)),
        "fp8": (fp8, eight, "float32", partial(round_joined, stored=True)),
        "w4a16": (four_bits["llama"], four, "float16", partial(round_rotations, group=group)),
    }
    runs = [
        (directory, {"adapters": [None, str(adapter)], "options": {"dtype": dtype}})
        for directory, adapter, dtype, _ in cases.values()
    ]
    lora = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2}
    found = run_each(runs, EAGER | lora)
    for (name, case), result in zip(cases.items(), found, strict=True):
        directory, adapter, _, rounds = case
        wide = directory if name == "w4a16" else widened(directory, tmp_path / name)

        def adapted(model: Any, adapter: Path = adapter, rounds: Any = rounds) -> None:
            add_adapter(model, adapter)
            rounds(model)

        plain, changed = (
            greedy(wide, FEATURE_PROMPTS, 2, prepare) for prepare in (rounds, adapted)
        )
        assert all(
            one["tokens"] != other["tokens"] for one, other in zip(plain, changed, strict=True)
        )
        # Later ones lie near the middle of two that fp8 has.
        tolerance = 6e-2 if name == "fp8" else 3e-2
        for ours, theirs in zip(result["outputs"], plain + changed, strict=True):
            assert ours["tokens"][:2] == theirs["tokens"], name
            assert ours["logprobs"][:2] == pytest.approx(theirs["logprobs"], abs=tolerance), name


def test_what_needs_the_weights_as_they_were_says_so(
    eight_bits: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, output = str(eight_bits["opt"]), str(tmp_path / "out")
    text = tmp_path / "text.txt"
    text.write_text("Rows and columns. " * 400)
    for arguments in (
        ["quantize", directory, "--output", output, "--scheme", "fp8"],
        ["export", directory, "--output", output],
        ["finetune", directory, "--output", output, "--text", str(text)],
    ):
        assert main(arguments) == 2
        assert f"is quantised: {arguments[0]} needs the checkpoint" in capsys.readouterr().err
    assert not Path(output).exists()


def test_a_scale_that_is_missing_is_named(eight_bits: dict[str, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(eight_bits["llama-tied"], tmp_path / "copy"))
    tensors = load_file(shard(copy))
    del tensors["model.layers.1.mlp.up_proj.weight_scale"]
    save_file(tensors, shard(copy), metadata={"format": "pt"})
    with pytest.raises(Exception, match=r"missing: model\.layers\.1\.mlp\.up_proj\.weight_scale$"):
        read_checkpoint_summary(copy)


def test_the_config_names_what_stays(eight_bits: dict[str, Path]) -> None:
    config = json.loads((eight_bits["llama-tied"] / "config.json").read_text())
    fields = config["quantization_config"]
    assert fields["quant_method"] == "compressed-tensors"
    assert fields["ignore"] == ["lm_head", "head_map", "re:.*residual_rotation.*"]


def test_the_parts_of_a_report_are_the_bytes_stored(eight_bits: dict[str, Path]) -> None:
    directory = eight_bits["opt"]
    *_, total = parts_table(read_checkpoint_summary(directory), read_sliced_config(directory))
    tensors = load_file(shard(directory)).items()
    stored = sum(tensor.nbytes for name, tensor in tensors if not name.endswith("_scale"))
    assert total["bytes_after"] == stored


def test_the_plan_of_an_eight_bit_checkpoint_is_for_eight_bits(
    eight_bits: dict[str, Path], sliced: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {}
    for name, directory in (("eight", eight_bits["opt"]), ("full", sliced["opt"])):
        arguments = ["plan", str(directory), "--gpu-memory", "1GiB", "--json"]
        assert main(arguments) == 0
        sizes[name] = json.loads(capsys.readouterr().out)["forms"]
    (eight,) = sizes["eight"]
    assert eight["quantization"] == "int8"
    assert eight["layers_bytes"] < sizes["full"][0]["layers_bytes"] / 3
    assert main([*arguments[:1], str(eight_bits["opt"]), *arguments[2:], "--quantization", "fp8"])
    assert "is quantised already" in capsys.readouterr().err
