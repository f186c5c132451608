import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sliceserve.slicing.checkpoint import read_checkpoint_summary, staged_directory
from sliceserve.slicing.errors import MachineError, UserError
from sliceserve.slicing.job import PAPER, SliceOptions, run_slice
from sliceserve.slicing.parts import PartWriter, assemble_shards
from sliceserve.slicing.weights import INDEX


@pytest.fixture
def copy(tiny_sliced: Path, tmp_path: Path) -> Path:
    """A sliced checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny_sliced, tmp_path / "copy"))


def shard(directory: Path) -> Path:
    (file,) = directory.glob("*.safetensors")
    return file


def test_the_directory_holds_what_the_format_says(tiny_sliced: Path, tiny: Path) -> None:
    names = {path.name for path in tiny_sliced.iterdir()}
    assert names >= {"config.json", INDEX, "provenance.json", "tokenizer.json"}
    assert names >= {"generation_config.json", "model-00001-of-00001.safetensors"}
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl", ".tmp"))]
    config = json.loads((tiny_sliced / "config.json").read_text())
    assert config["architectures"] == ["SlicedForCausalLM"]
    assert config["slicing"]["widths"] == [64] * 6 + [96]
    assert config["slicing"]["architecture"] == "LlamaForCausalLM"
    assert (
        config["rope_parameters"]
        == json.loads((tiny / "config.json").read_text())["rope_parameters"]
    )
    index = json.loads((tiny_sliced / INDEX).read_text())
    with safe_open(shard(tiny_sliced), framework="pt") as tensors:
        assert set(tensors.keys()) == set(index["weight_map"])
        rotation = tensors.get_slice("model.layers.2.residual_rotation.1.weight")
        assert rotation.get_shape() == [96, 64]
        assert tensors.get_slice("model.layers.0.self_attn.o_proj.weight").get_shape() == [64, 128]


def test_the_summary_counts_what_is_stored(tiny_sliced: Path, tiny: Path) -> None:
    summary = read_checkpoint_summary(tiny_sliced)
    dense = AutoModelForCausalLM.from_pretrained(tiny)
    assert summary.dense_parameters == dense.num_parameters()
    stored = load_file(shard(tiny_sliced))
    assert summary.sliced_parameters == sum(tensor.numel() for tensor in stored.values())
    assert summary.rotation_parameters == 5 * 64 * 64 + 96 * 64


def test_provenance_names_source_text_options_and_versions(tiny_sliced: Path) -> None:
    record = read_checkpoint_summary(tiny_sliced).provenance
    assert len(record["source"]["sha256"]) == len(record["calibration"]["sha256"]) == 64
    assert record["options"]["seed"] == 0
    assert record["options"]["samples"] == 8
    assert record["versions"]["torch"] == torch.__version__


def test_slicing_again_gives_the_same_bytes(tiny: Path, tiny_sliced: Path, tmp_path: Path) -> None:
    again = tmp_path / "sliced"
    fields = {"fraction": 0.3, "samples": 8, "sequence_length": 64} | PAPER
    run_slice(SliceOptions(str(tiny), again, **fields), show_progress=False)
    assert shard(again).read_bytes() == shard(tiny_sliced).read_bytes()
    other = tmp_path / "other-seed"
    run_slice(SliceOptions(str(tiny), other, seed=1, **fields), show_progress=False)
    assert shard(other).read_bytes() != shard(tiny_sliced).read_bytes()


def test_tokenizer_is_copied(tiny: Path, tiny_sliced: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tiny_sliced / name).read_bytes() == (tiny / name).read_bytes()
    text = "naïve text,\nwith lines"
    expected = AutoTokenizer.from_pretrained(tiny)(text)["input_ids"]
    assert AutoTokenizer.from_pretrained(tiny_sliced)(text)["input_ids"] == expected


@pytest.mark.parametrize(("merged", "shards"), [(1, 5), (800, 3), (10**6, 1)])
def test_small_parts_are_merged_into_shards(merged: int, shards: int, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    parts.mkdir()
    writer = PartWriter(parts, torch.float32)
    tensors = {f"t{index}": torch.full((100,), float(index)) for index in range(5)}
    sizes = []
    for number, (name, tensor) in enumerate(tensors.items()):
        writer.add(name, tensor)
        sizes.append(writer.write(number).result())
    assert sizes == [400] * 5
    assemble_shards(parts, tmp_path, sizes, merged)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{n + 1:05d}-of-{shards:05d}.safetensors" for n in range(shards)]
    merged_tensors = {k: v for name in files for k, v in load_file(tmp_path / name).items()}
    assert merged_tensors.keys() == tensors.keys()
    assert all(torch.equal(merged_tensors[name], tensors[name]) for name in tensors)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_size": 2000, "total_parameters": 500}
    assert index["weight_map"].keys() == tensors.keys()


def test_an_error_leaves_nothing_behind(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(RuntimeError), staged_directory(output, 1) as staging:  # noqa: PT012
        (staging / "file").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_parents_are_made_and_removed_again_on_an_error(tmp_path: Path) -> None:
    output = tmp_path / "not" / "there" / "out"
    with pytest.raises(RuntimeError), staged_directory(output, 1) as staging:  # noqa: PT012
        (staging / "file").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with staged_directory(output, 1) as staging:
        (staging / "file").write_text("whole")
    assert (output / "file").read_text() == "whole"


def test_a_disk_without_room_is_refused_before_work(tmp_path: Path) -> None:
    with (
        pytest.raises(MachineError, match=r"needs about 1000000\.00 GB"),
        staged_directory(tmp_path / "out", 10**15),
    ):
        raise AssertionError("the block must not run")
    assert list(tmp_path.iterdir()) == []


def test_a_newer_format_is_refused(copy: Path) -> None:
    change_slicing(copy, format_version=3)
    with pytest.raises(UserError, match="format 3 is newer than this release reads"):
        read_checkpoint_summary(copy)


def test_format_1_has_whole_matrices_only(copy: Path) -> None:
    path = copy / "config.json"
    config = json.loads(path.read_text())
    config["slicing"]["format_version"] = 1
    assert config["slicing"].pop("ranks") == [None] * 6
    path.write_text(json.dumps(config))
    assert read_checkpoint_summary(copy).slicing.ranks == [None] * 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": [64, 64], "ranks": [0]}, "lists 2 widths where 3 layers have 7 places"),
        ({"widths": [64] * 6 + [-1]}, "widths must be positive"),
        ({"widths": [64] * 6 + [97]}, "a width of 97, more than its hidden_size 96"),
        ({"ranks": [None] * 5}, "7 widths need 6 ranks"),
        ({"ranks": [None] * 5 + [3]}, "from 64 to 96 cannot have rank 3"),
        ({"ranks": [65] + [None] * 5}, "from 64 to 64 cannot have rank 65"),
        ({"extra": 1}, "slicing.extra"),
        ({"architecture": "BertModel"}, "architecture 'BertModel' is not supported"),
        ({"base_model_type": "lama"}, "knows no base_model_type 'lama'"),
        ({"format_version": 0}, "slicing.format_version"),
    ],
)
def test_an_impossible_config_is_refused(
    copy: Path, change: dict[str, object], message: str
) -> None:
    change_slicing(copy, **change)
    with pytest.raises(UserError, match=message):
        read_checkpoint_summary(copy)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "{", "config.json' cannot be read"),
        ("config.json", "[1]", "config.json' holds no JSON object"),
        (INDEX, "{", f"{INDEX}' cannot be read"),
        (INDEX, "[]", f"{INDEX}' cannot be read"),
        (INDEX, '{"weight_map": {"a": 1}}', f"{INDEX}' cannot be read"),
        ("provenance.json", "{", "provenance.json' cannot be read"),
    ],
)
def test_damaged_json_is_refused(copy: Path, file: str, content: str, message: str) -> None:
    (copy / file).write_text(content)
    with pytest.raises(UserError, match=message):
        read_checkpoint_summary(copy)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("slicing", [1], "is not a sliced model's: slicing"),
        ("num_hidden_layers", "3", "num_hidden_layers is '3'"),
        ("hidden_act", "no-such-function", "cannot be read"),
        ("rope_parameters", {"rope_type": "no-such-type"}, "cannot be read"),
        ("dtype", "bfloat16", "holds torch.float32, and its config says torch.bfloat16"),
    ],
)
def test_an_impossible_field_is_refused(
    copy: Path, field: str, value: object, message: str
) -> None:
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(UserError, match=message):
        read_checkpoint_summary(copy)


def test_all_wrong_tensors_are_listed_in_one_error(copy: Path) -> None:
    tensors = load_file(shard(copy))
    damage_tensors(tensors)
    save_file(tensors, shard(copy), metadata={"format": "pt"})
    with pytest.raises(UserError) as error:
        read_checkpoint_summary(copy)
    for part in (
        "missing: lm_head.weight, model.layers.0.residual_rotation.0.weight;",
        "unexpected: model.extra.weight;",
        "wrong shape: model.layers.1.mlp.up_proj.weight is [160, 63] and not [160, 64]",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("kept", [4, 100, 20_000])
def test_a_truncated_shard_is_refused(copy: Path, kept: int) -> None:
    file = shard(copy)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UserError, match="is corrupt or truncated"):
        read_checkpoint_summary(copy)


def test_a_missing_shard_is_named(copy: Path) -> None:
    shard(copy).unlink()
    with pytest.raises(UserError, match=r"lacks its shards model-00001-.*: its download"):
        read_checkpoint_summary(copy)


def change_slicing(directory: Path, **change: object) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["slicing"] |= change
    path.write_text(json.dumps(config))


def damage_tensors(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["lm_head.weight"], tensors["model.layers.0.residual_rotation.0.weight"]
    tensors["model.extra.weight"] = torch.zeros(1)
    narrow = tensors["model.layers.1.mlp.up_proj.weight"][:, :-1].contiguous()
    tensors["model.layers.1.mlp.up_proj.weight"] = narrow
