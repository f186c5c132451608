"""`sliceserve evaluate` against log-likelihoods taken from Transformers directly."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sliceserve.slicing.cli import main

COLOURS = ("red", "green", "blue and yellow", "grey")
PIQA = [
    {"goal": f"Paint the {thing}", "sol1": f"Take {one}.", "sol2": f"Use {two}!", "label": n % 2}
    for n, (thing, one, two) in enumerate(
        (f"{size} door", one, two)
        for size in ("small", "tall", "old")
        for one in COLOURS
        for two in COLOURS
        if one != two
    )
]
WINOGRANDE = [
    {"sentence": f"The {a} hit the {b} because _ fell.", "option1": a, "option2": b, "answer": n}
    for a, b, n in (("ball", "wall", "1"), ("cup", "dog", "2"), ("tree", "car", "1"))
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for task, rows in (("piqa", PIQA), ("winogrande", WINOGRANDE)):
        (root / task).mkdir()
        lines = [json.dumps(row) for row in rows]
        (root / task / "validation.jsonl").write_text("\n".join(lines) + "\n")
    return root


@torch.no_grad()
def log_likelihood(model: Any, tokenizer: Any, context: str, continuation: str) -> float:
    ids = torch.tensor([tokenizer(context + continuation)["input_ids"]])
    scores = model(input_ids=ids).logits[0].log_softmax(-1)
    start = len(tokenizer(context)["input_ids"])
    return sum(scores[t - 1, ids[0, t]].item() for t in range(start, ids.shape[1]))


def piqa_by_hand(directory: Path, limit: int) -> tuple[list[float], list[float]]:
    """Whether the right answer has the larger likelihood, as it is and by its length."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    plain, normed = [], []
    for row in PIQA[:limit]:
        answers = (row["sol1"], row["sol2"])
        context = f"Question: {row['goal']}\nAnswer:"
        scores = [log_likelihood(model, tokenizer, context, f" {text}") for text in answers]
        by_length = [score / len(text) for score, text in zip(scores, answers, strict=True)]
        plain.append(float((scores[1] > scores[0]) == row["label"]))
        normed.append(float((by_length[1] > by_length[0]) == row["label"]))
    return plain, normed


def test_scores_agree_with_transformers(
    tiny: Path, tiny_sliced: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [str(tiny), str(tiny_sliced)]
    arguments = ["evaluate", *models, "--tasks", "piqa,winogrande", "--data", str(data)]
    assert main([*arguments, "--limit", "30", "--batch-size", "4", "--json"]) == 0
    evaluation = json.loads(capsys.readouterr().out)["evaluation"]
    assert list(evaluation) == models
    for model in (tiny, tiny_sliced):
        scores = evaluation[str(model)]["piqa"]
        for metric, right in zip(("acc", "acc_norm"), piqa_by_hand(model, 30), strict=True):
            mean = sum(right) / 30
            stderr = math.sqrt(mean * (1 - mean) / 29)
            assert scores[metric]["value"] == pytest.approx(mean)
            assert scores[metric]["stderr"] == pytest.approx(stderr)
            assert scores[metric]["examples"] == 30
        assert evaluation[str(model)]["winogrande"]["acc"]["examples"] == len(WINOGRANDE)


def test_the_table_shows_models_side_by_side(
    tiny: Path, tiny_sliced: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", str(tiny), str(tiny_sliced), "--tasks", "piqa,winogrande"]
    assert main([*arguments, "--data", str(data), "--limit", "3"]) == 0
    output = capsys.readouterr()
    assert output.err.count("average") == 2  # each model as it is done
    header, piqa, winogrande, average = output.out.splitlines()
    assert header.split() == ["task", "metric", "examples", str(tiny), str(tiny_sliced)]
    assert piqa.split()[:3] == ["piqa", "acc_norm", "3"]
    assert winogrande.split()[:3] == ["winogrande", "acc", "3"]
    dense = [float(line.split()[3]) for line in (piqa, winogrande)]
    assert average.split()[0] == "average"
    assert float(average.split()[2]) == pytest.approx(sum(dense) / 2, abs=1e-4)
