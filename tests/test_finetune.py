"""Recovery fine-tuning: what is trained, what is written, and runs that end early."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import OTHER_CONFIGS, save_tiny
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from sliceserve.slicing.cli import main
from sliceserve.slicing.errors import UserError
from sliceserve.slicing.finetune import HISTORY, FinetuneOptions, run_finetune
from sliceserve.slicing.job import SliceOptions, run_slice

SHARD = "model-00001-of-00001.safetensors"
TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. "


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{number}: {TEXT}" for number in range(200)))
    return str(path)


def options(directory: Path, output: Path, text: str, **changes: Any) -> FinetuneOptions:
    fields: dict[str, Any] = {
        "text": text, "samples": 24, "validation_samples": 4, "sequence_length": 64,
        "batch_size": 4, "epochs": 4, "rank": 3, "learning_rate": 3e-3,
    }  # fmt: skip
    return FinetuneOptions(directory, output, **(fields | changes))


def difference(before: Path, after: Path) -> dict[str, torch.Tensor]:
    old, new = load_file(before / SHARD), load_file(after / SHARD)
    assert {k: v.shape for k, v in old.items()} == {k: v.shape for k, v in new.items()}
    return {name: new[name].double() - old[name].double() for name in old}


@pytest.mark.parametrize("method", ["lora", "full"])
def test_training_recovers_text_it_was_not_trained_on(
    method: str, tiny_sliced: Path, text: str, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    run = run_finetune(options(tiny_sliced, output, text, method=method), show_progress=False)
    assert run.after < 0.8 * run.before
    history = json.loads((output / HISTORY).read_text())
    losses = [step["loss"] for step in history["steps"]]
    assert len(losses) == history["steps"][-1]["step"] == 24
    assert losses[-1] < losses[0]
    assert (history["perplexity_before"], history["perplexity_after"]) == (run.before, run.after)
    changes = difference(tiny_sliced, output)
    changed = {name for name, change in changes.items() if change.abs().max() > 1e-6}
    if method == "full":
        assert changed == changes.keys()
        return
    assert changed == {
        f"model.layers.{layer}.{path}_proj.weight"
        for layer in range(3)
        for path in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o",
                     "mlp.gate", "mlp.up", "mlp.down")
    }  # fmt: skip
    for name in changed:
        assert torch.linalg.matrix_rank(changes[name], rtol=1e-4) == 3, name


def test_the_perplexities_are_those_of_the_checkpoints(
    tiny_sliced: Path, text: str, tmp_path: Path
) -> None:
    """With all windows but one held out, the figure is close to that of the whole text."""
    output = tmp_path / "out"
    chosen = options(tiny_sliced, output, text, samples=4, validation_samples=200, epochs=1)
    run = run_finetune(chosen, show_progress=False)
    ids = AutoTokenizer.from_pretrained(tiny_sliced)(Path(text).read_text())["input_ids"]
    windows = torch.tensor(ids[: len(ids) // 64 * 64]).reshape(-1, 64)
    for directory, expected in ((tiny_sliced, run.before), (output, run.after)):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        with torch.no_grad():
            loss = model(input_ids=windows, labels=windows).loss
        assert loss.exp().item() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_an_interrupted_run_goes_on_to_the_same_weights(
    method: str, tiny_sliced: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_finetune(options(tiny_sliced, whole, text, method=method), show_progress=False)
    resumed = options(tiny_sliced, cut, text, method=method, resume=True)
    training_step, calls = Trainer.training_step, []

    def interrupted(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 16:
            raise KeyboardInterrupt
        return training_step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_finetune(resumed, show_progress=False)
        assert not cut.exists()
        run_finetune(resumed, show_progress=False)
    assert len(calls) < 24 + 16, "it must not begin anew"
    assert (cut / SHARD).read_bytes() == (whole / SHARD).read_bytes()
    old, new = (json.loads((directory / HISTORY).read_text()) for directory in (whole, cut))
    assert old == new


def test_a_resumed_run_with_other_options_is_refused(
    tiny_sliced: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_finetune(options(tiny_sliced, output, text, resume=True), show_progress=False)
    with pytest.raises(UserError, match=r"options\.rank was 3 and is 4"):
        run_finetune(options(tiny_sliced, output, text, resume=True, rank=4), show_progress=False)


def test_a_run_that_diverges_is_one_sentence(
    tiny_sliced: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "training_step", lambda *_, **__: torch.tensor(torch.nan))
    wild = options(tiny_sliced, tmp_path / "out", text, method="full")
    with pytest.raises(UserError, match="loss is not finite: lower --learning-rate"):
        run_finetune(wild, show_progress=False)
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_what_was_gained(
    tiny_sliced: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["finetune", str(tiny_sliced), "--output", str(tmp_path / "out"), "--text", text,
                 "--samples", "8", "--sequence-length", "64", "--rank", "2"]  # fmt: skip
    assert main(arguments) == 0
    *description, gained = capsys.readouterr().out.splitlines()
    assert gained.startswith("perplexity   ")
    assert gained.endswith("on 8 windows it was not trained on")
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.splitlines() == description
    before, after = (
        json.loads((directory / "provenance.json").read_text())
        for directory in (tiny_sliced, tmp_path / "out")
    )
    assert after.pop("finetuning")[0]["options"]["alpha"] == 10
    assert after == before


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_tied_table_stays_tied(method: str, text: str, tmp_path: Path) -> None:
    dense = save_tiny(tmp_path / "dense", OTHER_CONFIGS["llama-tied"], torch.float32)
    sliced, output = tmp_path / "sliced", tmp_path / "out"
    run_slice(SliceOptions(str(dense), sliced, samples=8, sequence_length=64), show_progress=False)
    run = run_finetune(options(sliced, output, text, method=method), show_progress=False)
    assert run.after < 0.8 * run.before
    assert "lm_head.weight" not in difference(sliced, output)
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.lm_head.weight is model.model.embed_tokens.weight
