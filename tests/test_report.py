"""The HTML report: parsed, and its figures compared with the checkpoint's own."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import OTHER_CONFIGS, save_tiny
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sliceserve.slicing.checkpoint import read_checkpoint_summary
from sliceserve.slicing.cli import main
from sliceserve.slicing.config import SlicedConfig
from sliceserve.slicing.finetune import HISTORY
from sliceserve.slicing.job import PAPER, SliceOptions, run_slice
from sliceserve.slicing.page import parts_table

VOID = {"meta", "br", "img", "hr", "link", "input"}


class Page(HTMLParser):
    """Tables as rows of cells, all attributes, and whether every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, _tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data.strip()

    def row(self, first: str) -> list[str]:
        (found,) = [row for row in self.rows if row[0] == first]
        return found


def report(directory: Path, output: Path, *results: Path) -> Page:
    more = ["--results", *map(str, results)] if results else []
    assert main(["report", str(directory), "--output", str(output), *more]) == 0
    return Page(output.read_text("utf-8"))


def write(path: Path, fields: Any) -> Path:
    path.write_text(json.dumps(fields))
    return path


def test_the_page_tells_what_was_measured(tiny: Path, tiny_sliced: Path, tmp_path: Path) -> None:
    perplexity = {"model": "<dense>", "text": "t", "backend": "vllm", "perplexity": 12.5,
                  "predicted_tokens": 1234, "windows": 1, "sequence_length": 9}  # fmt: skip

    def score(value: float) -> dict[str, float]:
        return {"value": value, "stderr": 0.03, "examples": 50}

    evaluation = {
        model: {
            "piqa": {"acc": score(0.1), "acc_norm": score(value)},
            "wino": {"acc": score(0.5)},
        }
        for model, value in (("dense", 0.75), ("sliced", 0.25))
    }
    page = report(
        tiny_sliced,
        tmp_path / "new/page.html",
        write(tmp_path / "p.json", perplexity),
        write(tmp_path / "e.json", {"evaluation": evaluation}),
    )
    assert page.row("<dense>") == ["<dense>", "12.50", "t", "1,234", "vllm"]
    assert page.row("piqa") == ["piqa", "acc_norm", "0.7500 ± 0.0300", "0.2500 ± 0.0300"]
    assert page.row("average") == ["average", "", "0.6250 ± 0.0212", "0.3750 ± 0.0212"]
    dense, sliced = (load_file(next(d.glob("*.safetensors"))) for d in (tiny, tiny_sliced))
    for part, pattern in (
        ("embedding", "embed_tokens"), ("attention", "self_attn"), ("MLP", "mlp"),
        ("rotations", "rotation"), ("norms", "norm"), ("head", "lm_head"), ("total", ""),
    ):  # fmt: skip
        counts = [
            sum(t.numel() for name, t in tensors.items() if pattern in name)
            for tensors in (dense, sliced)
        ]
        sizes = [f"{4 * count / 1e6:,.1f}" for count in counts]
        assert page.row(part) == [part, *(f"{count:,}" for count in counts), *sizes]
    assert page.row("0 to 5")[1] == "64"
    assert (
        page.row("source.sha256")[1]
        == json.loads((tiny_sliced / "provenance.json").read_text())["source"]["sha256"]
    )


def test_the_page_needs_nothing_else(tiny_sliced: Path, tmp_path: Path) -> None:
    page = report(tiny_sliced, tmp_path / "page.html")
    assert not [name for name, _ in page.attributes if name in ("src", "href", "onload")]
    text = (tmp_path / "page.html").read_text()
    assert not re.search(r"<script|@import|url\(|https?://", text)
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_the_spectrum_is_that_of_the_embedding(tiny: Path, tiny_sliced: Path) -> None:
    """Place 0 holds the embeddings of the calibration tokens, so it can be had without slicing."""
    spectrum = np.load(tiny_sliced / "spectrum.npy")
    assert spectrum.shape == (6, 96)
    assert (np.diff(spectrum) <= 0).all()
    table = load_file(next(tiny.glob("*.safetensors")))["model.embed_tokens.weight"].double()
    # 8 windows of 64 tokens; each row of the table weighs as often as it occurs.
    energies = table.square().sum(1)
    assert 512 * energies.min() < spectrum[0].sum() < 512 * energies.max()


def test_the_loss_curve_of_a_finetuned_model_is_drawn(tiny_sliced: Path, tmp_path: Path) -> None:

    directory = tmp_path / "tuned"
    shutil.copytree(tiny_sliced, directory)
    history = {
        "options": {"method": "lora", "samples": 3, "sequence_length": 4, "text": "t",
                    "epochs": 1, "validation_samples": 2},
        "perplexity_before": 50.0,
        "perplexity_after": 25.0,
        "steps": [{"step": n, "loss": 1 / n} for n in range(1, 30)],
    }  # fmt: skip
    write(directory / HISTORY, history)
    report(directory, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "50.00 before, 25.00 after" in text
    curve = re.search(r'aria-label="Training loss by step".*?points="([^"]*)"', text, re.DOTALL)
    assert curve is not None
    points = [tuple(map(float, point.split(","))) for point in curve[1].split()]
    assert len(points) == 29
    xs, ys = zip(*points, strict=True)
    assert list(xs) == sorted(xs)
    assert list(ys) == sorted(ys), "down the page as the loss falls"


@pytest.mark.parametrize("name", OTHER_CONFIGS)
def test_parts_add_up_for_every_architecture(name: str, tmp_path: Path) -> None:
    dense = save_tiny(tmp_path / "dense", OTHER_CONFIGS[name], torch.float32)
    output = tmp_path / "out"
    run_slice(
        SliceOptions(str(dense), output, fraction=0.3, samples=4, sequence_length=64),
        show_progress=False,
    )
    summary = read_checkpoint_summary(output)
    *parts, total = parts_table(summary, SlicedConfig.from_pretrained(output))
    assert total["before"] == AutoModelForCausalLM.from_pretrained(dense).num_parameters()
    assert total["after"] == AutoModelForCausalLM.from_pretrained(output).num_parameters()
    assert all(row["before"] for row in parts if row["part"] not in ("rotations", "head"))
    assert sum(row["after"] for row in parts) == total["after"]


@pytest.mark.parametrize(
    ("options", "rotations", "least"),
    [
        ({"target_params": 0.7}, "6 of rank 8.", "weight: signal and gradient, of this"),
        ({"target_params": 0.7, "basis": "pca"}, "6 of rank 8.", "weight: signal, of this"),
        ({"target_params": 0.95}, "none.", "weight: signal and gradient, of all places."),
        ({"fraction": 0.3, **PAPER}, "6 whole matrices.", "energy in the calibration text."),
    ],
)
def test_a_model_of_any_form_has_a_page(
    options: dict[str, Any], rotations: str, least: str, tiny: Path, tmp_path: Path
) -> None:
    output, file = tmp_path / "out", tmp_path / "page.html"
    chosen = SliceOptions(str(tiny), output, samples=14, sequence_length=64, **options)
    width = run_slice(chosen, show_progress=False).summary.slicing.widths[0]
    assert main(["report", str(output), "--output", str(file)]) == 0
    text = file.read_text()
    Page(text)
    assert f"{100 * (96 - width) / 96:.3g} % of the hidden dimension was deleted" in text
    assert f"Rotations: {rotations}" in text
    assert f"directions with the least {least}" in text


def test_a_file_that_holds_no_results_is_refused(
    tiny_sliced: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write(tmp_path / "x.json", {"a": 1})
    arguments = ["report", str(tiny_sliced), "--output", str(tmp_path / "page.html")]
    assert main([*arguments, "--results", str(other)]) == 2
    assert "x.json' is not what" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()
