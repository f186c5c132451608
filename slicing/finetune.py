"""Recovery fine-tuning of a sliced checkpoint: LoRA or all parameters, merged into a new one.

The paper (section 4) trains LoRA adapters of rank 32 with alpha 10 on about a thousand sequences.
"""

import importlib.metadata
import json
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sliceserve.slicing.architectures import Architecture, find_architecture
from sliceserve.slicing.calibration import check_vocabulary, pick_windows
from sliceserve.slicing.checkpoint import (
    PROVENANCE,
    SPECTRUM,
    CheckpointSummary,
    read_checkpoint_summary,
    read_sliced_config,
    staged_directory,
)
from sliceserve.slicing.corpora import Corpus, read_corpus
from sliceserve.slicing.devices import checked_device, within_memory
from sliceserve.slicing.errors import UserError
from sliceserve.slicing.modeling import SlicedForCausalLM
from sliceserve.slicing.parts import PartWriter, assemble_shards
from sliceserve.slicing.perplexity import measure
from sliceserve.slicing.progress import UNFINISHED, keep_job
from sliceserve.slicing.quantised import check_unquantised
from sliceserve.slicing.source import Location, copy_tokenizer, load_tokenizer
from sliceserve.slicing.weights import ShardReader, hash_files

HISTORY = "finetuning.json"
LEARNING_RATES = {"lora": 3e-4, "full": 1e-5}
LORA_DROPOUT = 0.05
APOLLO = "rank=64,proj=random,scale=1.0,scale_type=channel,update_proj_gap=200"
CHECKPOINTS = 10  # in a run: what an interrupt can cost


@dataclass(frozen=True)
class FinetuneOptions:
    """What to train and how; the fields are the options of `sliceserve finetune`.

    Attributes:
        directory: a sliced checkpoint.
        output: directory to make.
        method: "lora", or "full": all parameters, with APOLLO (arXiv 2412.05270), whose state is a
            small fraction of Adam's.
        text: to train on (see `corpora.read_corpus`).
        samples: windows to train on.
        validation_samples: further windows of the same text, to measure on before and after.
        sequence_length: tokens in a window.
        epochs: times the windows are gone through.
        batch_size: windows at once.
        learning_rate: at its peak; falls linearly to 0. None takes that of the method.
        rank: of the LoRA adapters.
        alpha: their scale is alpha / rank.
        seed: chooses the windows, their order and the adapters.
        device: where to train.
        resume: keep what is unfinished when the run ends early, and go on from it.

    """

    directory: Path
    output: Path
    method: str = "lora"
    text: str = "wikitext2-excerpt"
    samples: int = 128
    validation_samples: int = 8
    sequence_length: int = 1024
    epochs: int = 1
    batch_size: int = 4
    learning_rate: float | None = None
    rank: int = 32
    alpha: int = 10
    seed: int = 0
    device: str = "cpu"
    resume: bool = False


@dataclass(frozen=True)
class FinetuneRun:
    """A finished run.

    Attributes:
        summary: of the checkpoint written.
        before: perplexity on the validation windows, before training.
        after: and after.
        peak_gpu_bytes: allocated on the GPU at most; 0 on a CPU.

    """

    summary: CheckpointSummary
    before: float
    after: float
    peak_gpu_bytes: int


def run_finetune(options: FinetuneOptions, show_progress: bool = True) -> FinetuneRun:
    """Train a sliced checkpoint into `options.output`, which appears only when it is complete.

    Raises:
        UserError: anything the user gave that cannot be used; nothing is left behind.

    """
    try:
        from sliceserve.slicing.training import train
    except ImportError as error:
        raise UserError(
            f"finetune needs more packages: pip install 'sliceserve[finetune]' ({error})"
        ) from error
    if options.output.exists():
        raise UserError(f"--output {str(options.output)!r} exists already")
    device = checked_device(options.device)
    corpus = read_corpus(options.text, "--text")
    source = read_checkpoint_summary(options.directory)
    config = read_sliced_config(options.directory)
    check_unquantised(options.directory, config, "finetune")
    location = Location(options.directory, None)
    windows = pick_windows(
        corpus,
        load_tokenizer(location),
        options.samples + options.validation_samples,
        options.sequence_length,
        options.seed,
        "--text",
    )
    check_vocabulary(windows, config.vocab_size)
    shuffled = windows[torch.randperm(len(windows), generator=_generator(options.seed))]
    held_out, training = shuffled.tensor_split([options.validation_samples])
    shards = ShardReader(options.directory)
    job = describe_job(options, corpus, hash_files(shards.files))
    # The weights written, and the optimizer's checkpoints beside them: two, while one replaces one.
    trained = source.sliced_parameters * 4 if options.method == "full" else 0
    room = source.bytes + 2 * 2 * trained
    with staged_directory(options.output, room, options.resume) as staging:
        unfinished = staging / UNFINISHED
        unfinished.mkdir(exist_ok=True)
        keep_job(unfinished / "job.json", job)
        with within_memory(device):
            model: Any = SlicedForCausalLM.from_pretrained(
                options.directory, dtype=torch.float32 if _trains_wide(options, device) else "auto"
            ).to(device)
            before = perplexity(model, held_out, show_progress)
            model, history, peak = train(model, training, options, unfinished, show_progress)
            after = perplexity(model, held_out, show_progress)
        write_weights(model, staging, getattr(torch, source.dtype), source)
        for name in ("config.json", "generation_config.json", SPECTRUM):
            if (options.directory / name).exists():
                shutil.copyfile(options.directory / name, staging / name)
        copy_tokenizer(location, staging)
        measured = {"perplexity_before": before, "perplexity_after": after}
        steps = {"options": job["options"], **measured, "steps": history}
        (staging / HISTORY).write_text(json.dumps(steps, indent=2) + "\n")
        record = source.provenance | {"finetuning": [*_earlier(source), job | measured]}
        (staging / PROVENANCE).write_text(json.dumps(record, indent=2) + "\n")
        read_checkpoint_summary(staging)
        shutil.rmtree(unfinished)
    return FinetuneRun(read_checkpoint_summary(options.output), before, after, peak)


def describe_job(options: FinetuneOptions, corpus: Corpus, sha256: str) -> dict[str, Any]:
    """Return what determines the result, as plain JSON."""
    chosen = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()}
    for name in ("output", "resume"):
        del chosen[name]
    packages = ["sliceserve", "torch", "transformers"]
    packages.append("peft" if options.method == "lora" else "apollo-torch")
    return {
        "options": chosen | {"learning_rate": learning_rate(options)},
        "text": {"name": corpus.name, "sha256": corpus.sha256},
        "source_sha256": sha256,
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def learning_rate(options: FinetuneOptions) -> float:
    """Return the peak learning rate: the one asked for, or that of the method."""
    return options.learning_rate or LEARNING_RATES[options.method]


def perplexity(model: Any, windows: Tensor, show_progress: bool = True) -> float:
    """Return the perplexity of a model on windows [count, sequence_length]."""
    model.eval()
    predicted = windows.numel() - len(windows)
    return math.exp(min(measure(model, windows, show_progress) / predicted, 700))


def adapted_linears(architecture: Architecture) -> list[str]:
    """Return the linears of a layer that LoRA adapts: all that read or write the stream."""
    paths = [path for sub in architecture.sublayers for path in (*sub.reads, *sub.writes)]
    return list(dict.fromkeys(paths))


def write_weights(model: Any, output: Path, dtype: torch.dtype, source: CheckpointSummary) -> None:
    """Write a model's weights as shards with an index, as slicing does."""
    layers = find_architecture(source.slicing.architecture).layers
    groups: dict[str, list[str]] = {}
    state = dict(model.named_parameters())
    for name in state:
        inside = name.startswith(f"{layers}.")
        number = name.removeprefix(f"{layers}.").split(".")[0] if inside else name
        groups.setdefault(number, []).append(name)
    parts = output / UNFINISHED
    sizes = []
    with PartWriter(parts, dtype) as writer:
        for number, names in enumerate(groups.values()):
            for name in names:
                writer.add(name, state[name])
            sizes.append(writer.write(number).result())
    assemble_shards(parts, output, sizes)


def _trains_wide(options: FinetuneOptions, device: torch.device) -> bool:
    # Small updates of all parameters would be lost in the rounding of bfloat16.
    return options.method == "full" or device.type == "cpu"


def _earlier(source: CheckpointSummary) -> list[Any]:
    return list(source.provenance.get("finetuning", []))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
