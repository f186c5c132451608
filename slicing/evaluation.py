"""Task results of dense and sliced models through lm-evaluation-harness, side by side."""

import json
import logging
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sliceserve.slicing.devices import checked_device, within_memory
from sliceserve.slicing.errors import MachineError, UserError, fault, reason
from sliceserve.slicing.perplexity import check_model, default_dtype, load_model
from sliceserve.slicing.source import load_tokenizer, locate_all

SPLITS = {"training_split": "train", "validation_split": "validation", "test_split": "test"}
PREFERRED = ("acc_norm", "acc")  # what the paper reports, the first that a task has


@dataclass(frozen=True)
class Score:
    """One metric of one task.

    Attributes:
        value: the mean over the task's examples.
        stderr: its standard error; nan where the harness gives none.
        examples: how many were evaluated.

    """

    value: float
    stderr: float
    examples: int


Scores = dict[str, dict[str, Score]]  # by task, by metric


def evaluate(
    models: Sequence[str],
    tasks: Sequence[str],
    data: Path | None,
    limit: int | None,
    batch_size: int,
    device: str,
    dtype: str | None,
    on_result: Callable[[str, Scores], None] | None = None,
    revision: str | None = None,
) -> dict[str, Scores]:
    """Evaluate models, one after the other, on tasks of lm-evaluation-harness.

    Args:
        models: dense models or sliced checkpoints, each as for `perplexity`.
        tasks: names that the harness knows.
        data: a directory with TASK/train.jsonl, validation.jsonl or test.jsonl for every task, in
            the fields of the task's own data set; None takes those from the hub.
        limit: examples a task, from its start; None takes all.
        batch_size: sequences at once.
        device: where it runs.
        dtype: to run in; None is float32 on a CPU and the stored one elsewhere.
        on_result: is told of each model as soon as it is done.
        revision: of the one model that is on the hub.

    Returns:
        The scores by model, task and metric.

    Raises:
        UserError: lm-eval is not installed, an unknown task or model, no data for a task.
        MachineError: the hub did not give a model or data, or the device is too small.

    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            "evaluate needs lm-evaluation-harness, pip install 'sliceserve[evaluate]': "
            f"{reason(error)}"
        ) from error
    place = checked_device(device)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager()
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise UserError(f"--tasks {','.join(unknown)}: lm-evaluation-harness has no such task")
    overrides = {} if data is None else {task: local_data(task, data) for task in tasks}
    try:
        with tempfile.TemporaryDirectory() as directory:
            specifications = [
                derive_task(manager, task, overrides[task], Path(directory)) if overrides else task
                for task in tasks
            ]
            loaded = manager.load(specifications)["tasks"]
    except Exception as error:
        # Everything is caught: it raises what its parsers, the network and the hub raise.
        raise (MachineError if data is None else fault(error))(
            f"--tasks {','.join(tasks)}: the data cannot be read: {reason(error)}"
        ) from error
    locations = locate_all(models, revision)
    tokenizers = [load_tokenizer(location) for location in locations]
    for location in locations:
        check_model(location)
    results = {}
    for name, location, tokenizer in zip(models, locations, tokenizers, strict=True):
        with within_memory(place):
            model = load_model(location, place, default_dtype(place, dtype))
            harness = HFLM(
                pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch_size
            )
            output = simple_evaluate(
                harness,
                tasks=list(loaded.values()),
                task_manager=manager,
                limit=limit,
                log_samples=False,
                bootstrap_iters=1000,
            )
        results[name] = read_scores(output["results"], output["n-samples"])
        if on_result is not None:
            on_result(name, results[name])
        del harness, model
        if place.type == "cuda":
            torch.cuda.empty_cache()
    return results


def local_data(task: str, data: Path) -> dict[str, Any]:
    """Return the fields of a task's description by which its data comes from local files.

    Raises:
        UserError: there is no file for the task.

    """
    files = {
        split: str((data / task / f"{split}.jsonl").resolve())
        for split in SPLITS.values()
        if (data / task / f"{split}.jsonl").is_file()
    }
    if not files.keys() - {"train"}:
        raise UserError(
            f"--data {str(data)!r} holds no {task}/validation.jsonl and no {task}/test.jsonl"
        )
    return {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
        **{field: split if split in files else None for field, split in SPLITS.items()},
    }


def derive_task(manager: Any, task: str, changes: Mapping[str, Any], directory: Path) -> str:
    """Write a task's description with changes and return its path; the rest is the stock one's."""
    stock = manager.task_index[task].yaml_path
    path = directory / f"{task}.yaml"
    # JSON is YAML.
    path.write_text(json.dumps({"include": str(stock), "task": task, **changes}))
    return str(path)


def read_scores(results: Mapping[str, Any], counts: Mapping[str, Any]) -> Scores:
    """Read the harness's table: keys such as "acc,none" and "acc_stderr,none"."""
    scores: Scores = {}
    for task, row in results.items():
        scores[task] = {}
        for key, value in row.items():
            metric, _, variant = key.partition(",")
            if not variant or metric.endswith("_stderr") or not isinstance(value, float | int):
                continue
            stderr = row.get(f"{metric}_stderr,{variant}")
            scores[task][metric] = Score(
                float(value),
                float(stderr) if isinstance(stderr, float | int) else math.nan,
                int(counts[task]["effective"]),
            )
    return scores


def main_metric(scores: Mapping[str, Score]) -> str:
    """Return the metric to show: length-normalised accuracy, accuracy, or the task's first."""
    return next((metric for metric in PREFERRED if metric in scores), next(iter(scores)))


def average(scores: Scores) -> Score:
    """Return the mean of the tasks' main metrics, and its standard error (tasks independent)."""
    main = [task[main_metric(task)] for task in scores.values()]
    count = len(main)
    return Score(
        sum(score.value for score in main) / count,
        math.sqrt(sum(score.stderr**2 for score in main)) / count,
        sum(score.examples for score in main),
    )


def as_table(results: Mapping[str, Scores]) -> str:
    """Return the results as a table: a line a task, a column a model, ± the standard error."""
    models = list(results)
    first = results[models[0]]
    rows = [["task", "metric", "examples", *models]]
    for task in first:
        metric = main_metric(first[task])
        cells = [_cell(results[model][task][metric]) for model in models]
        rows.append([task, metric, str(first[task][metric].examples), *cells])
    if len(first) > 1:
        averages = [average(results[model]) for model in models]
        rows.append(["average", "", str(averages[0].examples), *map(_cell, averages)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index < 2 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _cell(score: Score) -> str:
    error = "" if math.isnan(score.stderr) else f" ± {score.stderr:.4f}"
    return f"{score.value:.4f}{error}"
