import copy
import json
from itertools import combinations, pairwise
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import OTHER_CONFIGS, tiny_config
from safetensors import safe_open
from shapes import dense_config
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

from sliceserve.slicing.cli import main
from sliceserve.slicing.footprint import Footprint, Part
from sliceserve.slicing.placement import stages, tensor_parallel_sizes
from sliceserve.slicing.plan import Form, Plan, PlanOptions, make_plan
from sliceserve.slicing.source import locate

GIB = 2**30
LLAMA_2_70B = dense_config("llama-2-70b")
OPT_66B = OPTConfig(
    vocab_size=50272, hidden_size=9216, ffn_dim=36864, num_hidden_layers=64,
    num_attention_heads=72, word_embed_proj_dim=9216, max_position_embeddings=2048,
    architectures=["OPTForCausalLM"], dtype="float16",
)  # fmt: skip


def save_config(directory: Path, config: Any) -> str:
    """A directory that holds a config.json and nothing else."""
    config = copy.deepcopy(config)
    with torch.device("meta"):
        config.architectures = [type(AutoModelForCausalLM.from_config(config)).__name__]
    config.save_pretrained(directory)
    (file,) = directory.glob("config.json")
    assert list(directory.glob("*.safetensors")) == []
    return str(file.parent)


def plan_of(model: str, gpu_memory: int = 24 * GIB, **options: Any) -> Plan:
    fields: dict[str, Any] = {"quantization": ["none"], "context": 128}
    return make_plan(PlanOptions(model, gpu_memory, **fields | options))


# Table 2 of the paper: batch 1, 128 tokens, 16-bit weights, whole rotations, 25 %.
@pytest.mark.parametrize(
    ("config", "gib", "dense", "sliced"),
    [
        (LLAMA_2_70B, 40, 4, 3),
        (LLAMA_2_70B, 24, 7, 5),
        (OPT_66B, 40, 4, 3),
        (OPT_66B, 24, 6, 5),
    ],
)
def test_the_papers_counts(config: Any, gib: int, dense: int, sliced: int, tmp_path: Path) -> None:
    plan = plan_of(save_config(tmp_path, config), gib * GIB, fraction=[0.25], rotation=["dense"])
    assert [form.pipeline_gpus for form in plan.forms] == [dense, sliced]
    for form in plan.forms:
        assert form.pipeline_layers is not None
        assert sum(form.pipeline_layers) == config.num_hidden_layers


def test_opt_66b_at_a_quarter_cannot_be_on_four_cards_of_24_gib(tmp_path: Path) -> None:
    """By hand: 64 layers of 12·D·d + 2·d², without tables and biases."""
    dense, width = 9216, 6912
    layers = 64 * (12 * dense * width + 2 * width**2) * 2
    assert layers > 4 * 24 * GIB
    plan = plan_of(save_config(tmp_path, OPT_66B), fraction=[0.25], rotation=["dense"])
    assert plan.forms[1].width == width
    assert plan.forms[1].weight_bytes > layers


@pytest.mark.parametrize("rotation", ["shared", "low-rank"])
@pytest.mark.parametrize(("share", "gpus"), [(0.97, 5), (0.99, 4)])
def test_opt_66b_without_whole_rotations_is_on_four_cards_that_are_filled(
    rotation: str, share: float, gpus: int, tmp_path: Path
) -> None:
    """By hand: the last stage of four has 16 layers of 12·D·d and the table."""
    dense, width = 9216, 6912
    stage = (16 * 12 * dense * width + OPT_66B.vocab_size * width) * 2
    assert (stage < share * 24 * GIB) == (gpus == 4)
    plan = plan_of(
        save_config(tmp_path, OPT_66B),
        fraction=[0.25],
        rotation=[rotation],
        gpu_memory_utilization=share,
    )
    assert [form.pipeline_gpus for form in plan.forms] == [6, gpus]


@pytest.mark.parametrize("name", ["llama", *OTHER_CONFIGS])
def test_dense_parameters_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    config = tiny_config() if name == "llama" else OTHER_CONFIGS[name]
    # Models that other tests save leave their dtype in the config.
    plan = plan_of(save_config(tmp_path, config), rotation=["shared"], dtype="bfloat16")
    dense = plan.forms[0]
    with torch.device("meta"):
        assert dense.parameters == AutoModelForCausalLM.from_config(config).num_parameters()
    assert dense.rotations_bytes == 0
    assert dense.weight_bytes == 2 * dense.parameters


def test_sliced_parameters_are_those_of_a_narrow_llama_and_its_rotations(tmp_path: Path) -> None:
    """Without rotations the sliced model is a Llama of hidden_size d whose norms have no weights.

    A whole rotation a sublayer and a head of full width come on top, or 2·d·r a sublayer.
    """
    plan = plan_of(save_config(tmp_path, LLAMA_2_70B), fraction=[0.25], rank=128)
    _, whole, low_rank, shared = plan.forms
    fields = LLAMA_2_70B.to_dict() | {"hidden_size": 6144, "head_dim": 128}
    with torch.device("meta"):
        narrow = AutoModelForCausalLM.from_config(LlamaConfig(**fields)).num_parameters()
    assert shared.parameters == narrow - 161 * 6144
    assert low_rank.parameters == shared.parameters + 160 * 2 * 128 * 6144
    assert low_rank.rotations_bytes == 160 * 2 * 128 * 6144 * 2
    # The last sublayer writes back to the full width, and the head reads it.
    squares = 159 * 6144**2 + 6144 * 8192
    wider = 2048 * (28672 + 32000)
    assert whole.parameters == shared.parameters + squares + wider
    assert whole.rotations_bytes == 2 * squares


def test_the_parts_of_a_checkpoint_are_its_tensors(tiny_sliced: Path, tmp_path: Path) -> None:
    """The bytes of a real checkpoint, planned from its config alone."""
    (tmp_path / "config.json").write_bytes((tiny_sliced / "config.json").read_bytes())
    (form,) = plan_of(str(tmp_path)).forms
    sums = {"embed_tokens": 0, "residual_rotation": 0, "model.layers": 0, "lm_head": 0}
    for file in tiny_sliced.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                (part, *_) = [part for part in sums if part in name]
                sums[part] += prod(tensors.get_slice(name).get_shape()) * 4
    assert form.name == "sliced"
    assert [form.embedding_bytes, form.rotations_bytes, form.layers_bytes, form.head_bytes] == list(
        sums.values()
    )
    assert form.weight_bytes == form.parameters * 4


def test_the_cache_by_hand(tmp_path: Path) -> None:
    """Llama-2-70B: keys and values, 8 heads of 128, 80 layers, 2 bytes: 320 KiB a token."""
    plan = plan_of(
        save_config(tmp_path, LLAMA_2_70B), rotation=["shared"], context=4096, concurrency=16
    )
    assert {form.cache_bytes for form in plan.forms} == {320 * 1024 * 4096 * 16}


def test_fp8_halves_the_linears_and_nothing_else(tmp_path: Path) -> None:
    model = save_config(tmp_path, dense_config("llama-2-7b"))
    plan = plan_of(model, fraction=[0.25], rotation=["dense"], quantization=["none", "fp8"])
    dense, sliced, dense_fp8, sliced_fp8 = plan.forms
    assert dense.layers_bytes - dense_fp8.layers_bytes == 32 * (4 * 4096 + 3 * 11008) * 4096
    linears = sliced_fp8.layers_bytes
    assert sliced.layers_bytes == 2 * linears
    for name in ("embedding_bytes", "rotations_bytes", "head_bytes", "cache_bytes", "parameters"):
        assert getattr(sliced, name) == getattr(sliced_fp8, name)


def test_tensor_parallel_sizes_are_common_divisors() -> None:
    assert tensor_parallel_sizes(LLAMA_2_70B) == [1, 2, 4, 8]
    assert tensor_parallel_sizes(OPT_66B) == [1, 2, 3, 4, 6, 8, 9, 12, 18, 24, 36, 72]
    assert tensor_parallel_sizes(OTHER_CONFIGS["mistral"]) == [1, 2]


def test_five_gpus_in_a_pipeline_are_eight_in_tensor_parallel(tmp_path: Path) -> None:
    form = plan_of(save_config(tmp_path, LLAMA_2_70B), rotation=["dense"]).forms[1]
    assert (form.pipeline_gpus, form.tensor_parallel_gpus) == (5, 8)
    assert form.tensor_parallel_bytes is not None
    shares = form.weight_bytes + form.cache_bytes
    assert shares / 8 < form.tensor_parallel_bytes < shares / 8 + form.activation_bytes


def footprint_of(layers: list[int], embedding: int, head: int, tied: int) -> Footprint:
    return Footprint(
        parameters=0,
        embedding=Part(embedding),
        layers=[Part(size) for size in layers],
        rotations=[Part()] * len(layers),
        head=Part(head),
        tied=Part(tied),
        cache=Part(1),
        activations=Part(2),
    )


@pytest.mark.parametrize("room", [11, 13, 14, 17, 23, 31, 64, 65, 66])
def test_no_shorter_pipeline_fits(room: int) -> None:
    """Against every way to cut eight layers into consecutive stages."""
    layers, embedding, head, tied = [5, 7, 6, 8, 7, 5, 9, 6], 3, 1, 2
    sizes = [size + 1 for size in layers]
    fitting = []
    for cuts in range(len(sizes)):
        ends = sizes.copy()
        ends[0] += embedding
        ends[-1] += head + (tied if cuts else 0)
        for places in combinations(range(1, len(sizes)), cuts):
            bounds = [0, *places, len(sizes)]
            pieces = [sum(ends[a:b]) for a, b in pairwise(bounds)]
            if max(pieces) <= room - 2:
                fitting.append(len(pieces))
    found = stages(footprint_of(layers, embedding, head, tied), room)
    assert (len(found) if found else None) == min(fitting, default=None)


def test_what_does_not_fit_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_config(tmp_path, tiny_config())
    arguments = ["plan", model, "--gpu-memory", "100KB", "--quantization", "none"]
    assert main(arguments) == 0
    assert "none fits" in capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    for form in json.loads(capsys.readouterr().out)["forms"]:
        assert form["pipeline_gpus"] is form["tensor_parallel_gpus"] is None


def test_the_table_and_json_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_config(tmp_path, tiny_config())
    arguments = ["plan", model, "--gpu-memory", "2MiB", "--fraction", "0.2", "0.3"]
    assert main(arguments) == 0
    table = capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    fields = json.loads(capsys.readouterr().out)
    assert len(fields["forms"]) == 2 * (1 + 2 * 3)
    for form in fields["forms"]:
        (line,) = [
            line
            for line in table.splitlines()
            if line.startswith(f"{form['name']} ")
            and f" {fields['dtype'] if form['quantization'] == 'none' else 'fp8'} " in line
        ]
        assert f" {form['parameters']:,} " in line
        assert line.split()[-2:] == [
            str(form["pipeline_gpus"]),
            str(form["tensor_parallel_gpus"]),
        ]
    for sentence in fields["assumptions"]:
        assert sentence in table


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--gpu-memory", "many"], "--gpu-memory: 'many' is not a size"),
        (["--gpu-memory", "40"], "--gpu-memory: '40' has no unit, as 40GiB has"),
        (["--gpu-memory", "0GiB"], "--gpu-memory: '0GiB' is no memory"),
        (["--gpu-memory", "1GiB", "--context", "513"], "--context 513 is more than the 512"),
        (["--gpu-memory", "1GiB", "--rank", "4", "--rotation", "dense"], "--rank 4 needs"),
        (["--gpu-memory", "1GiB", "--rank", "auto"], "--rank: invalid number value: 'auto'"),
        (["--gpu-memory", "1GiB", "--gpu-memory-utilization", "2"], "2 is not in (0, 1]"),
        (["--gpu-memory", "1GiB", "--fraction", "0.99"], "--fraction 0.99 with --round-to 8"),
    ],
)
def test_bad_arguments_get_one_sentence(
    more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", save_config(tmp_path, tiny_config()), *more]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert message in line


@pytest.mark.parametrize("option", ["--fraction 0.3", "--rotation dense", "--round-to 4"])
def test_a_sliced_checkpoint_is_not_sliced_again(
    option: str, tiny_sliced: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", str(tiny_sliced), "--gpu-memory", "1GiB", *option.split()]
    assert main(arguments) == 2
    assert "is sliced already" in capsys.readouterr().err


def test_of_the_hub_only_the_config_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def download(model: str, **options: Any) -> str:
        asked.append((model, options["allow_patterns"]))
        return save_config(tmp_path, tiny_config())

    monkeypatch.setattr("sliceserve.slicing.source.snapshot_download", download)
    forms: list[Form] = plan_of("owner/name").forms
    assert asked == [("owner/name", ["config.json"])]
    assert len(forms) == 4
    assert locate(str(tmp_path)).directory == tmp_path
