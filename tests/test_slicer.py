from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import OTHER_CONFIGS, save_tiny, tiny_config
from reference import Reference, exact_norms
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from sliceserve.slicing.architectures import find_architecture
from sliceserve.slicing.config import sliced_config
from sliceserve.slicing.dense import open_dense_model
from sliceserve.slicing.errors import UserError
from sliceserve.slicing.layers import DenseLayers
from sliceserve.slicing.parts import PartWriter, assemble_shards
from sliceserve.slicing.places import SlicePlan
from sliceserve.slicing.progress import Progress
from sliceserve.slicing.rotations import auto_rank, fixed_rank
from sliceserve.slicing.shape import sliced_width
from sliceserve.slicing.slicer import Slicer
from sliceserve.slicing.stopwatch import Stopwatch
from sliceserve.slicing.survey import COMMON, TAU, Survey, SurveyPlan

IDS = torch.randint(0, 256, (6, 48), generator=torch.Generator().manual_seed(3))
CONFIGS = {"llama": tiny_config()} | OTHER_CONFIGS


def slice_to(
    dense: Path,
    output: Path,
    widths: list[int],
    dtype: torch.dtype,
    signal_bytes: int = 10**9,
    survey: dict[str, Any] | None = None,
    **plan: Any,
) -> Any:
    """Slice with everything in `dtype` and load the result with Transformers."""
    output.mkdir()
    model = open_dense_model(str(dense))
    exact_norms(model.skeleton)
    progress = Progress(output / "unfinished", {})
    writer = PartWriter(progress.directory, dtype)
    stopwatch = Stopwatch(torch.device("cpu"))
    layers = DenseLayers(model, torch.device("cpu"), dtype)
    slice_plan = SlicePlan(widths, **plan)
    found = None
    if survey is not None:
        surveying = Progress(progress.directory / "survey", {})
        survey_plan = SurveyPlan(widths, tied=slice_plan.tied, **survey)
        found = Survey(layers, survey_plan, surveying, stopwatch)
        found.run(IDS, 2, signal_bytes, show_progress=False)
    slicer = Slicer(layers, slice_plan, found, writer, stopwatch)
    slicer.run(IDS, 2, signal_bytes, progress, show_progress=False)
    assert slicer.signals.home == ("memory of cpu" if signal_bytes else "a file")
    assert [name for name, p in model.skeleton.named_parameters() if not p.is_meta] == [], (
        "weights of finished layers must be let go"
    )
    assemble_shards(progress.directory, output, progress.part_bytes, merged_bytes=100_000)
    config = sliced_config(
        model.config,
        model.architecture,
        widths,
        slicer.places.ranks,
        model.parameters,
        str(dtype).removeprefix("torch."),
        slice_plan.tied,
    )
    config.save_pretrained(output)
    sliced = exact_norms(AutoModelForCausalLM.from_pretrained(output, dtype=dtype).eval())
    sliced.calibration_signals = torch.cat([slicer.signals[i] for i in range(len(slicer.signals))])
    sliced.survey = found
    return sliced


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    result: Tensor = model(input_ids=ids).logits
    return result


def places_of(config: Any) -> int:
    return int(config.num_hidden_layers) * (1 if config.model_type == "phi" else 2)


@pytest.mark.parametrize("name", CONFIGS)
def test_rotating_without_slicing_changes_nothing(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    widths = [config.hidden_size] * (places_of(config) + 1)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        dense = save_tiny(tmp_path / f"dense-{dtype}", config, dtype)
        model = AutoModelForCausalLM.from_pretrained(dense, dtype=dtype).eval()
        expected = logits(exact_norms(model))
        sliced = slice_to(dense, tmp_path / f"sliced-{dtype}", widths, dtype)
        assert_close(logits(sliced), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", CONFIGS)
def test_slicing_agrees_with_an_independent_implementation(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    dense = save_tiny(tmp_path / "dense", config, torch.float64)
    layers = "model.decoder.layers" if name == "opt" else "model.layers"
    reference = Reference(str(dense), width=72, layers=layers, parallel=name == "phi")
    fresh = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(4))
    unsliced = reference.logits(fresh)
    reference.calibrate(IDS)
    widths = [72] * places_of(config) + [config.hidden_size]
    sliced = slice_to(dense, tmp_path / "sliced", widths, torch.float64)
    expected = reference.logits(fresh)
    assert (expected - unsliced).abs().max() > 0.1, "slicing must cost something"
    assert_close(logits(sliced, fresh), expected, rtol=0, atol=1e-8)


def reference_of(dense: Path, name: str, width: int) -> Reference:
    layers = "model.decoder.layers" if name == "opt" else "model.layers"
    return Reference(str(dense), width, layers, parallel=name == "phi", head=True)


def with_the_mean(weights: list[Tensor]) -> list[Tensor]:
    """Return what the bases of places with these weights, of one trace, come from."""
    mean = torch.stack(weights).mean(0)
    return [(1 - COMMON) * weight + COMMON * mean for weight in weights]


@pytest.mark.parametrize("name", CONFIGS)
def test_low_rank_rotations_are_exact_at_the_rank_of_what_is_deleted(
    name: str, tmp_path: Path
) -> None:
    config = CONFIGS[name]
    dense = save_tiny(tmp_path / "dense", config, torch.float64)
    reference = reference_of(dense, name, 72)
    for weight in with_the_mean([signal / signal.trace() for signal, _ in reference.survey(IDS)]):
        main = torch.linalg.svd(weight).U[:, :72]
        reference.projections.append(main @ main.T)
    widths = [72] * (places_of(config) + 1)
    deleted = config.hidden_size - 72
    sliced = slice_to(
        dense,
        tmp_path / "sliced",
        widths,
        torch.float64,
        survey={"output_aware": False, "shared": False},
        rank_rule=fixed_rank(deleted),
    )
    assert sliced.config.slicing["ranks"] == [deleted] * places_of(config)
    fresh = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(4))
    assert_close(logits(sliced, fresh), reference.logits(fresh), rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shared", [False, True])
def test_a_survey_agrees_with_automatic_differentiation(
    name: str, shared: bool, tmp_path: Path
) -> None:
    config = CONFIGS[name]
    dense = save_tiny(tmp_path / "dense", config, torch.float64)
    widths = [72] * (places_of(config) + 1)
    sliced = slice_to(
        dense,
        tmp_path / "sliced",
        widths,
        torch.float64,
        survey={"output_aware": True, "shared": shared},
        rank_rule=fixed_rank(4),
    )
    weights = [
        TAU * signal / signal.trace() + gradient / gradient.trace() / TAU
        for signal, gradient in reference_of(dense, name, 72).survey(IDS)
    ]
    common = torch.stack(weights).sum(0)
    weights = [common] * len(weights) if shared else with_the_mean(weights)
    for place, weight in enumerate(weights):
        main = torch.linalg.svd(weight).U[:, :72]
        basis, _ = sliced.survey.basis(place)
        assert_close(basis @ basis.T, main @ main.T, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", CONFIGS)
def test_at_full_width_nothing_changes_whatever_is_refitted(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    dense = save_tiny(tmp_path / "dense", config, torch.float64)
    widths = [config.hidden_size] * (places_of(config) + 1)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float64).eval()
    sliced = slice_to(
        dense,
        tmp_path / "sliced",
        widths,
        torch.float64,
        survey={"output_aware": True, "shared": False},
        rank_rule=fixed_rank(4),
        refit_writes=True,
        refit_reads=True,
        tied=config.tie_word_embeddings and name != "opt",
    )
    assert_close(logits(sliced), logits(exact_norms(model)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "phi", "opt"])
@pytest.mark.parametrize(
    "plan",
    [
        {"rank_rule": fixed_rank(0)},
        {"rank_rule": auto_rank},
        {"rank_rule": fixed_rank(5), "refit_writes": True},
        {"rank_rule": fixed_rank(0), "refit_writes": True, "refit_reads": True},
    ],
)
def test_calibration_sees_what_the_sliced_model_computes(
    name: str, plan: dict[str, Any], tmp_path: Path
) -> None:
    """What a rotation leaves out must be missing from the signals too."""
    config = CONFIGS[name]
    dense = save_tiny(tmp_path / "dense", config, torch.float64)
    tied = name == "llama-tied"
    survey = {"output_aware": True, "shared": "refit_reads" in plan}
    widths = [72] * (places_of(config) + 1)
    sliced = slice_to(
        dense, tmp_path / "sliced", widths, torch.float64, survey=survey, tied=tied, **plan
    )
    seen = []
    norm = sliced.get_submodule(find_architecture(config.architectures[0]).final_norm)
    norm.register_forward_pre_hook(lambda _norm, args: seen.append(args[0]))
    logits(sliced)
    assert_close(seen[0], sliced.calibration_signals, rtol=0, atol=1e-9)


def test_a_refit_comes_closer_to_the_dense_stream(tmp_path: Path) -> None:
    dense = save_tiny(tmp_path / "dense", tiny_config(), torch.float64)
    reference = reference_of(dense, "llama", 72)
    reference.logits(IDS)
    expected = reference.streams[-1]
    errors = []
    for refit in (False, True):
        sliced = slice_to(
            dense,
            tmp_path / f"sliced-{refit}",
            [72] * 7,
            torch.float64,
            survey={"output_aware": False, "shared": True},
            rank_rule=fixed_rank(0),
            refit_writes=refit,
        )
        basis, _ = sliced.survey.basis(0)
        errors.append((sliced.calibration_signals - expected @ basis).square().sum())
    assert errors[1] < 0.8 * errors[0]


REFITTED = {
    "survey": {"output_aware": True, "shared": False},
    "rank_rule": fixed_rank(4),
    "refit_writes": True,
}


@pytest.mark.parametrize(("last", "plan"), [(96, {}), (64, REFITTED)])
def test_signals_in_a_file_give_the_same_weights(
    last: int, plan: dict[str, Any], tiny: Path, tmp_path: Path
) -> None:
    models = [
        slice_to(tiny, tmp_path / f"sliced-{size}", [64] * 6 + [last], torch.float32, size, **plan)
        for size in (0, 10**9)
    ]
    for spilled, held in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(spilled, held)


def test_widths_may_differ_from_place_to_place(tmp_path: Path) -> None:
    dense = save_tiny(tmp_path / "dense", tiny_config(), torch.float64)
    widths = [96, 96, 88, 96, 80, 96, 96]
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float64).eval()
    expected = logits(exact_norms(model))
    sliced = slice_to(dense, tmp_path / "sliced", widths, torch.float64)
    got = logits(sliced)
    assert got.shape == expected.shape
    # Few directions are lost, so the model must stay close to the dense one; a wrong rotation
    # between two widths would not.
    cosine = torch.nn.functional.cosine_similarity(got.flatten(), expected.flatten(), dim=0)
    assert cosine > 0.9


def test_generation_with_a_cache_equals_generation_without(tiny_sliced: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_sliced, dtype=torch.float32).eval()
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    cached = model.generate(IDS[:2, :10], use_cache=True, **options)
    assert_close(cached, model.generate(IDS[:2, :10], use_cache=False, **options))
    assert cached.shape == (2, 22)


@pytest.mark.parametrize(
    ("hidden_size", "fraction", "round_to", "width"),
    [(576, 0.25, 8, 432), (576, 0.2, 8, 456), (4096, 0.3, 128, 2816), (1000, 0.3, 1, 700)],
)
def test_width_is_a_multiple_and_never_more_than_asked(
    hidden_size: int, fraction: float, round_to: int, width: int
) -> None:
    assert sliced_width(hidden_size, fraction, round_to) == width


def test_fraction_zero_keeps_a_width_that_is_no_multiple() -> None:
    assert sliced_width(100, 0, 64) == 100


def test_a_width_of_zero_is_refused() -> None:
    with pytest.raises(UserError, match="leaves none of the 96 columns"):
        sliced_width(96, 0.9, 64)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    dense = save_tiny(tmp_path / "dense", tiny_config(), torch.float32)
    model = AutoModelForCausalLM.from_pretrained(dense)
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    model.save_pretrained(dense)
    name = "'model.layers.1.mlp.down_proj.weight'"
    with pytest.raises(UserError, match=f"not finite in its tensor {name}"):
        slice_to(dense, tmp_path / "sliced", [64] * 6 + [96], torch.float32)


def test_signals_that_overflow_are_refused(tmp_path: Path) -> None:
    dense = save_tiny(tmp_path / "dense", tiny_config(), torch.float32)
    model = AutoModelForCausalLM.from_pretrained(dense)
    model.model.layers[1].mlp.down_proj.weight.data *= 1e38
    model.save_pretrained(dense)
    with pytest.raises(UserError, match="not finite at place 4"):
        slice_to(dense, tmp_path / "sliced", [64] * 6 + [96], torch.float32)
