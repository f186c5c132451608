"""Held-out perplexity, layers read from the disk, against whole models in memory."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import OTHER_CONFIGS, save_tiny, tiny_config
from torch import Tensor
from transformers import AutoModelForCausalLM

from sliceserve.slicing.cli import main
from sliceserve.slicing.dense import open_dense_model
from sliceserve.slicing.heldout import describe_held_out, measure_held_out
from sliceserve.slicing.job import SliceOptions, run_slice

CPU = torch.device("cpu")


@torch.no_grad()
def perplexity(directory: Path, windows: Tensor) -> float:
    """By the loss that Transformers gives, in float64."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    losses = [model(input_ids=row[None], labels=row[None]).loss for row in windows]
    return math.exp(torch.stack(losses).mean())


@pytest.mark.parametrize("name", ["llama", "llama-tied", "opt", "phi"])
def test_agrees_with_the_loss_of_transformers(name: str, tmp_path: Path) -> None:
    config = OTHER_CONFIGS.get(name, tiny_config())
    dense = save_tiny(tmp_path / "dense", config, torch.float32)
    sliced = tmp_path / "sliced"
    options = SliceOptions(str(dense), sliced, fraction=0.4, samples=8, sequence_length=64)
    run_slice(options, show_progress=False)
    generator = torch.Generator().manual_seed(1)
    windows = {
        kind: torch.randint(256, (count, 48), generator=generator)
        for kind, count in (("a", 1), ("b", 300))
    }
    model = open_dense_model(str(dense))
    found = measure_held_out(model, sliced, windows, CPU, torch.float32, show_progress=False)
    for kind, rows in windows.items():
        assert found[kind]["windows"] == len(rows)
        assert found[kind]["dense"] == pytest.approx(perplexity(dense, rows), rel=1e-4)
        assert found[kind]["sliced"] == pytest.approx(perplexity(sliced, rows), rel=1e-4)


def test_slice_ends_with_every_kind_of_text(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    arguments = ["slice", str(tiny), "--output", str(output), "--samples", "9"]
    assert main([*arguments, "--sequence-length", "64"]) == 0
    printed = capsys.readouterr().out
    held_out = json.loads((output / "provenance.json").read_text())["held_out"]
    kinds = ["encyclopedia", "chat", "web", "fiction", "speech", "code", "manual"]
    assert list(held_out) == kinds
    assert describe_held_out(held_out) in printed
    ratios = [values["sliced"] / values["dense"] for values in held_out.values()]
    assert f"{math.prod(ratios) ** (1 / 7):.2f}" in printed.split("mean")[-1]
