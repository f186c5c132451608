"""The report on a sliced checkpoint: one HTML page with nothing outside it."""

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from transformers import AutoModelForCausalLM

from sliceserve.slicing.architectures import Architecture, find_architecture
from sliceserve.slicing.charts import Line, line_chart
from sliceserve.slicing.checkpoint import (
    SPECTRUM,
    CheckpointSummary,
    read_checkpoint_summary,
    read_sliced_config,
)
from sliceserve.slicing.config import SlicedConfig
from sliceserve.slicing.errors import MachineError, UserError, fault
from sliceserve.slicing.evaluation import Score, average, main_metric
from sliceserve.slicing.finetune import HISTORY
from sliceserve.slicing.job import PAPER
from sliceserve.slicing.modeling import HEAD_MAP, ROTATION, expected_shapes
from sliceserve.slicing.quantised import quantised_linears
from sliceserve.slicing.report import describe_ranks
from sliceserve.slicing.source import read_json_object

TEMPLATES = Path(__file__).with_name("data")
PLACES_SHOWN = 5
COUNTS = ("before", "after", "bytes_after")  # of parameters, and bytes


def write_report(directory: Path, results: Sequence[Path], output: Path) -> None:
    """Write the report on a sliced checkpoint.

    Args:
        directory: the checkpoint.
        results: files that `perplexity`, `evaluate` and `benchmark` have printed with `--json`.
        output: the HTML file; replaced if it is there.

    Raises:
        UserError: not a sliced checkpoint, or a file that holds no results.

    """
    summary = read_checkpoint_summary(directory)
    config = read_sliced_config(directory)
    perplexities, evaluations, speeds = read_results(results)
    page = _rendered(
        "report.html.jinja",
        summary=summary,
        options=summary.provenance.get("options", {}),
        hidden_size=config.base().hidden_size,
        rotations=describe_ranks(summary.slicing.ranks),
        energy=energy_of(summary),
        source=summary.provenance.get("source", {}),
        parts=parts_table(summary, config),
        places=describe_widths(summary),
        charts=spectrum_charts(directory, summary),
        perplexities=perplexities,
        evaluation=evaluation_rows(evaluations),
        speeds=speeds,
        speed_charts=speed_charts(speeds),
        finetuning=finetuning_charts(directory),
        provenance=flatten(summary.provenance),
    )
    _write(page, output, "--output")


def write_speeds(speeds: Mapping[str, Any], options: Mapping[str, Any], output: Path) -> None:
    """Write a page on what `benchmark` has measured, with a plot.

    Args:
        speeds: fields of `server.speed.Speed` by model.
        options: fields of `server.speed.SpeedOptions`.
        output: the HTML file; replaced if it is there.

    """
    page = _rendered(
        "speed.html.jinja",
        speeds=speeds,
        speed_charts=speed_charts(speeds),
        options=options,
        provenance=flatten({name: one for name, one in options.items() if one is not None})
        + [(f"commit of {name}", one["commit"]) for name, one in speeds.items() if one["commit"]],
    )
    _write(page, output, "--plot")


def _rendered(template: str, **fields: object) -> str:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**fields)


def check_page(output: Path, argument: str) -> None:
    """Make the directory of a page that is to be written.

    Raises:
        UserError: it is a directory itself, or its own cannot be made or written to.

    """
    if output.is_dir():
        raise UserError(f"{argument} {str(output)!r} is a directory")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise fault(error, UserError)(
            f"{argument} {str(output)!r} cannot be written: {error}"
        ) from error


def _write(page: str, output: Path, argument: str) -> None:
    """Write a page whole; raises UserError or MachineError that name the argument."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = output.with_name(f".{output.name}.tmp")
        temporary.write_text(page, "utf-8")
        temporary.replace(output)
    except OSError as error:
        raise fault(error, MachineError)(
            f"{argument} {str(output)!r} cannot be written: {error}"
        ) from error


def read_results(
    files: Sequence[Path],
) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
    """Read perplexities, evaluations by model and speeds by model from what commands have printed.

    Raises:
        UserError: a file that holds none of them.

    """
    perplexities: list[dict[str, Any]] = []
    evaluations: dict[str, Any] = {}
    speeds: dict[str, Any] = {}
    for file in files:
        fields = read_json_object(file)
        if isinstance(fields.get("evaluation"), dict):
            for model, scores in fields["evaluation"].items():
                evaluations.setdefault(model, {}).update(
                    {
                        task: {metric: Score(**score) for metric, score in metrics.items()}
                        for task, metrics in scores.items()
                    }
                )
        elif isinstance(fields.get("speed"), dict):
            speeds |= fields["speed"]
        elif "perplexity" in fields and "text" in fields:
            perplexities.append(fields)
        else:
            raise UserError(
                f"--results {str(file)!r} is not what `perplexity`, `evaluate` or `benchmark` "
                "prints with --json"
            )
    return perplexities, evaluations, speeds


def evaluation_rows(evaluations: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns and rows of the table of tasks, the last row their average."""
    if not evaluations:
        return {}
    models = list(evaluations)
    tasks = list(dict.fromkeys(task for scores in evaluations.values() for task in scores))
    rows = []
    for task in tasks:
        metric = next(main_metric(s[task]) for s in evaluations.values() if task in s)
        cells = [evaluations[model].get(task, {}).get(metric) for model in models]
        rows.append((task, metric, cells))
    if len(tasks) > 1 and all(scores.keys() >= set(tasks) for scores in evaluations.values()):
        rows.append(("average", "", [average(evaluations[model]) for model in models]))
    return {"models": models, "rows": rows}


def speed_charts(speeds: Mapping[str, Any]) -> list[Markup]:
    """Draw the time of a token, and tokens a second, against the requests at once.

    The last, of prompts, is left out where an older `benchmark` has not measured it.
    """

    def lines(key: str, scale: float) -> list[Line]:
        return [
            Line(model, [(batch["batch_size"], batch[key] * scale) for batch in speed["batches"]])
            for model, speed in speeds.items()
        ]

    if not speeds:
        return []
    x_label = "requests at once"
    charts = [
        line_chart(lines("itl", 1e3), "Milliseconds a token", x_label, "ITL, ms"),
        line_chart(lines("output_throughput", 1), "Tokens a second", x_label, "tokens/s"),
    ]
    batches = [batch for speed in speeds.values() for batch in speed["batches"]]
    if all("prompt_throughput" in batch for batch in batches):
        prompts = lines("prompt_throughput", 1)
        charts.append(line_chart(prompts, "Tokens of prompts a second", x_label, "tokens/s"))
    return charts


def part_of(name: str, architecture: Architecture) -> str:
    """Return the part of the model that a parameter belongs to."""
    if name.startswith(tuple(f"{path}." for path in architecture.tables)):
        return "embedding"
    if name.startswith((f"{architecture.head}.", f"{HEAD_MAP}.")):
        return "head"
    if f".{ROTATION}." in name:
        return "rotations"
    if f".{architecture.attention}." in name:
        return "attention"
    norms = (architecture.final_norm, *(sublayer.norm for sublayer in architecture.sublayers))
    return "norms" if any(f".{norm}." in f".{name}" for norm in norms) else "MLP"


def parts_table(summary: CheckpointSummary, config: SlicedConfig) -> list[dict[str, Any]]:
    """Count parameters and bytes by part, before and after; the last row is the sum."""
    architecture = find_architecture(summary.slicing.architecture)
    with init_empty_weights(include_buffers=False):
        dense = AutoModelForCausalLM.from_config(config.base())
    before = {name: parameter.numel() for name, parameter in dense.named_parameters()}
    if sum(before.values()) != summary.dense_parameters:
        # A tied head is stored with the embedding.
        before.pop(f"{architecture.head}.weight", None)
    after = {name: torch.Size(shape).numel() for name, shape in expected_shapes(config).items()}
    kept = getattr(torch, summary.dtype)
    sizes = {name: count * kept.itemsize for name, count in after.items()}
    if summary.scheme:
        for name, shape in quantised_linears(config).items():
            sizes[name] = summary.scheme.weight_bytes(shape, kept)
    stored = summary.provenance.get("source", {}).get("dtype", summary.dtype)
    rows: list[dict[str, Any]] = []
    for part in ("embedding", "attention", "MLP", "rotations", "norms", "head"):
        counts = [
            sum(n for name, n in numbers.items() if part_of(name, architecture) == part)
            for numbers in (before, after, sizes)
        ]
        rows.append({"part": part} | dict(zip(COUNTS, counts, strict=True)))
    rows.append({"part": "total"} | {key: sum(row[key] for row in rows) for key in COUNTS})
    for row in rows:
        row["bytes_before"] = row["before"] * getattr(torch, stored).itemsize
    return rows


def describe_widths(summary: CheckpointSummary) -> list[tuple[str, int]]:
    """Return the widths, consecutive places of equal width together."""
    result = []
    first = 0
    for width, group in groupby(summary.slicing.widths):
        last = first + len(list(group)) - 1
        result.append((f"{first} to {last}" if last > first else f"{first}", width))
        first = last + 1
    return result


def energy_of(summary: CheckpointSummary) -> str:
    """Return what the spectrum is of: a survey weighs directions by more than their energy."""
    options = summary.provenance.get("options", {})
    paper = all(options.get(name, value) == value for name, value in PAPER.items())
    return "energy" if paper else "weight"


def spectrum_charts(directory: Path, summary: CheckpointSummary) -> list[Markup]:
    """Draw the energy that slicing lost at each place, and the spectrum at some of them."""
    if not (directory / SPECTRUM).exists():
        return []
    spectrum = np.load(directory / SPECTRUM).astype(np.float64)
    widths = summary.slicing.widths[: len(spectrum)]
    total = spectrum.sum(1)
    kept = np.array([row[:width].sum() for row, width in zip(spectrum, widths, strict=True)])
    lost = 1 - kept / total
    energy = energy_of(summary)
    shown = np.unique(np.linspace(0, len(spectrum) - 1, PLACES_SHOWN).round().astype(int))
    lines = [
        Line(f"place {place}", list(enumerate(spectrum[place] / total[place], start=1)))
        for place in shown
    ]
    return [
        line_chart(
            [Line("lost", list(enumerate(lost)))],
            f"Share of the residual stream's {energy} that is deleted, by place",
            "place in the residual stream",
            f"{energy} deleted",
            log=bool(lost.min() > 0),
        ),
        line_chart(
            lines,
            "Spectrum of the residual stream at some places",
            f"direction, by falling {energy}",
            f"share of the {energy}",
            log=True,
            marker=(widths[0], f"kept: {widths[0]}"),
        ),
    ]


def finetuning_charts(directory: Path) -> dict[str, Any]:
    """Draw the loss curve of the last fine-tuning, if there was one."""
    if not (directory / HISTORY).exists():
        return {}
    history = read_json_object(directory / HISTORY)
    points = [(step["step"], step["loss"]) for step in history["steps"]]
    chart = line_chart(
        [Line("loss", points)], "Training loss by step", "step", "loss (nats a token)"
    )
    return history | {"chart": chart}


def flatten(fields: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return nested fields as rows of a table."""
    rows = []
    for key, value in fields.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            rows += flatten(value, f"{name}.")
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            for number, item in enumerate(value, start=1):
                rows += flatten(item, f"{name} {number}.")
        else:
            rows.append((name, value if isinstance(value, str) else json.dumps(value)))
    return rows
