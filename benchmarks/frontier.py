"""Perplexity against true parameters: the paper's form, each step beyond it, and all together.

    python benchmarks/frontier.py MODEL OUT --calibration FILE --text FILE --targets 0.9 0.8

Slices MODEL in every form to every target (rotations and head included, against the model as it is
stored) and measures the results on the first windows of each text. MODEL, FILE and --device are as
for `sliceserve slice`. Every row is kept in OUT/rows.jsonl and its model in OUT/models, so that a
run that was stopped goes on where it was; the table and OUT/frontier.svg come last.
"""

import argparse
import json
import math
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sliceserve.slicing.calibration import token_windows
from sliceserve.slicing.checkpoint import read_checkpoint_summary
from sliceserve.slicing.corpora import read_corpus
from sliceserve.slicing.dense import open_dense_model
from sliceserve.slicing.job import PAPER, SliceOptions, run_slice
from sliceserve.slicing.perplexity import measure_text
from sliceserve.slicing.shape import choose_shape
from sliceserve.slicing.source import load_tokenizer, locate, quiet_transformers

AWARE = {"basis": "output-aware", "refit": "none"}
FORMS: dict[str, dict[str, Any]] = {
    "paper": PAPER,
    "output-aware bases": {"rotation": "dense", **AWARE},
    "and low-rank rotations": {"rotation": "low-rank", **AWARE},
    "and writers refitted": {"rotation": "low-rank", "refit": "output"},
    "and readers too": {"rotation": "low-rank", "refit": "full"},
    "the same, one basis for all": {"rotation": "shared", "refit": "full"},
}
COMPLETE = {"low-rank": "and readers too", "shared": "the same, one basis for all"}
DENSE = "dense"


@dataclass(frozen=True)
class Settings:
    """What all rows have in common; `windows` is how many of each text are measured on."""

    model: str
    calibration: str
    text: list[str]
    samples: int
    sequence_length: int
    windows: list[int]
    device: str
    compute_dtype: str | None

    def perplexities(self, model: str) -> dict[str, float]:
        """Measure a model on the start of each text."""
        length, device, dtype = self.sequence_length, self.device, self.compute_dtype
        return {
            Path(text).stem: measure_text(
                model, text, length, windows, device, dtype, show_progress=False
            ).perplexity
            for text, windows in zip(self.text, self.windows, strict=True)
        }


def windows_of(model: str, text: str, length: int, most: int) -> int:
    """Count the windows of a text, up to `most`."""
    tokenizer = load_tokenizer(locate(model))
    windows = token_windows(read_corpus(text, "--text", "held out"), tokenizer, length)
    if not len(windows):
        sys.exit(f"--text {text!r} has no {length} tokens")
    return min(len(windows), most)


def measure(settings: Settings, form: str, target: float, output: Path) -> dict[str, Any]:
    """Slice the model in a form to a target, unless it was, and measure it."""
    quiet_transformers()
    if form == DENSE:
        parameters = open_dense_model(settings.model).parameters
        row = {"width": None, "parameters": parameters, "stored": 1.0, "seconds": None}
        return row | {"form": form, "target": 1.0, **settings.perplexities(settings.model)}
    seconds = None
    if not output.exists():
        started = time.perf_counter()
        options = SliceOptions(
            settings.model,
            output,
            target_params=target,
            calibration=settings.calibration,
            samples=settings.samples,
            sequence_length=settings.sequence_length,
            device=settings.device,
            compute_dtype=settings.compute_dtype,
            **FORMS[form],
        )
        run_slice(options, show_progress=False)
        seconds = time.perf_counter() - started
    summary = read_checkpoint_summary(output)
    return {
        "form": form,
        "target": target,
        "width": summary.slicing.widths[0],
        "parameters": summary.sliced_parameters,
        "stored": summary.ratio,
        **settings.perplexities(str(output)),
        "seconds": seconds,
    }


def default_form(settings: Settings, target: float) -> str:
    """Return which of the forms `sliceserve slice` takes for a target unless told."""
    model = open_dense_model(settings.model)
    options = SliceOptions(settings.model, Path(), target_params=target)
    return COMPLETE[choose_shape(options, model, model.dtype).rotation]


def table(rows: list[dict[str, Any]], texts: list[str], defaults: dict[float, str]) -> str:
    """Return the rows as a Markdown table; the mean is that of the ratios to the dense model.

    What a user gets who says nothing but the target stands in bold.
    """
    dense = next(row for row in rows if row["form"] == DENSE)
    columns = ["form", "width", "parameters", "of the stored", *texts, "mean ratio", "seconds"]
    lines = [" | ".join(columns), " | ".join(["---", *["---:"] * (len(columns) - 1)])]
    for row in rows:
        ratios = [math.log(row[text] / dense[text]) for text in texts]
        picked = defaults.get(row["target"]) == row["form"]
        cells = [
            f"**{row['form']}**" if picked else row["form"],
            str(row["width"] or ""),
            f"{row['parameters']:,}",
            f"{row['stored']:.3f}",
            *(f"{row[text]:.2f}" for text in texts),
            f"{math.exp(sum(ratios) / len(ratios)):.2f}",
            "" if row["seconds"] is None else f"{row['seconds']:.0f}",
        ]
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def plot(
    rows: list[dict[str, Any]], texts: list[str], defaults: dict[float, str], path: Path
) -> None:
    """Draw perplexity on each text against parameters: a line a form, a broad one the default."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    plt.rcParams["svg.hashsalt"] = "frontier"
    across = min(3, len(texts))
    down = -(-len(texts) // across)
    figure, axes = plt.subplots(
        down, across, figsize=(4 * across, 3.6 * down + 0.6), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(texts) :]:
        axis.remove()
    forms = list(dict.fromkeys(row["form"] for row in rows))
    picked = [row for row in rows if defaults.get(row["target"]) == row["form"]]
    for axis, text in zip(axes.flat, texts, strict=False):
        for form in forms:
            points = _points(text, [row for row in rows if row["form"] == form])
            if form == DENSE:
                axis.plot(*points, "k*", markersize=11, label=form)
            else:
                axis.plot(*points, "o-", markersize=4, label=form)
        if picked:
            axis.plot(
                *_points(text, picked), color="black", alpha=0.15, linewidth=10, label="default"
            )
        axis.set(xlabel="parameters, millions", ylabel="perplexity", title=text, yscale="log")
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_minor_formatter(NullFormatter())
        low, high = axis.get_ylim()
        steps = [10**power * digit for power in range(6) for digit in (1, 1.5, 2, 3, 4, 6, 8)]
        axis.set_yticks([step for step in steps if low <= step <= high])
        axis.grid(alpha=0.3)
    lines, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=min(4, across + 1))
    figure.savefig(path, metadata={"Date": None})


def _points(text: str, rows: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Return millions of parameters, rising, and the perplexities there."""
    found = sorted((row["parameters"] / 1e6, row[text]) for row in rows)
    return [x for x, _ in found], [y for _, y in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.9, 0.8, 0.7])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=64, help="of each text, at most")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compute-dtype")
    parser.add_argument("--jobs", type=int, default=1, help="rows at once")
    given = vars(parser.parse_args())
    output, targets, forms, jobs = (given.pop(x) for x in ("output", "targets", "forms", "jobs"))
    length, most = given["sequence_length"], given["windows"]
    given["windows"] = [windows_of(given["model"], x, length, most) for x in given["text"]]
    settings = Settings(**given)
    output.mkdir(parents=True, exist_ok=True)
    noted, kept = output / "settings.json", output / "rows.jsonl"
    if not noted.exists():
        noted.write_text(json.dumps(asdict(settings), indent=2) + "\n")
    elif json.loads(noted.read_text()) != asdict(settings):
        sys.exit(f"{noted} holds other settings: choose another OUT")
    lines = kept.read_text().splitlines() if kept.exists() else []
    found = {(row["form"], row["target"]): row for row in map(json.loads, lines)}
    wanted = [(DENSE, 1.0), *((form, target) for target in targets for form in forms)]
    missing = [pair for pair in wanted if pair not in found]
    with (
        ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool,
        tqdm(total=len(wanted), initial=len(wanted) - len(missing), unit="row") as bar,
    ):
        running = {
            pool.submit(
                measure,
                settings,
                form,
                target,
                output / "models" / f"{form}-{target}".replace(" ", "-"),
            ): (form, target)
            for form, target in missing
        }
        try:
            for done in as_completed(running):
                found[running[done]] = row = done.result()
                with kept.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                bar.update()
        finally:
            # Leaving the pool would run what is waiting, also after an error or an interrupt.
            pool.shutdown(cancel_futures=True)
    order = [DENSE, *forms]
    rows = [found[pair] for pair in sorted(wanted, key=lambda pair: order.index(pair[0]))]
    names = [Path(text).stem for text in settings.text]
    defaults = {target: default_form(settings, target) for target in targets}
    print(table(rows, names, defaults))
    try:
        plot(rows, names, defaults, output / "frontier.svg")
    except ImportError as error:
        print(f"no {output / 'frontier.svg'}: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
