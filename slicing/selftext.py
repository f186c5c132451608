"""Calibration text that the dense model writes itself, for users who have none.

Sampled from the model at temperature 1. A document begins with a random token (LLM-QAT, arXiv
2305.17888, section 3.1); every other one, where the tokenizer has a chat template, is the answer to
a request of many kinds. Where a document ends, another begins: there is nothing to pad.
"""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from sliceserve.slicing.corpora import DATA
from sliceserve.slicing.dense import DenseModel
from sliceserve.slicing.devices import within_memory
from sliceserve.slicing.errors import reading
from sliceserve.slicing.weights import write_tensors

SELF = "self"
PROMPTS = DATA / "prompts.txt"
CACHE_SHARE = 0.5  # of the memory that is free beside the model


def write_windows(
    path: Path,
    model: DenseModel,
    tokenizer: Any,
    shape: tuple[int, int],
    seed: int,
    device: torch.device,
    show_progress: bool = True,
) -> Tensor:
    """Let a dense model write calibration windows, or read those that a run before has kept.

    The whole model must fit in the device's memory.

    Args:
        path: where the windows are kept; they are read from there if they are there.
        model: the dense model.
        tokenizer: its tokenizer, for the tokens that are no text.
        shape: samples and sequence_length.
        seed: of the sampling.
        device: where to run.
        show_progress: whether to show a bar.

    Returns:
        Token ids [samples, sequence_length].

    Raises:
        MachineError: the model does not fit on the device.

    """
    if path.exists():
        return load_file(path)["windows"]
    with within_memory(device):
        dense: Any = AutoModelForCausalLM.from_pretrained(
            **model.location.from_pretrained_arguments(),
            dtype=torch.float32 if device.type == "cpu" else model.dtype,
        )
        windows = sample_windows(dense.to(device).eval(), tokenizer, shape, seed, show_progress)
    temporary = path.with_suffix(".tmp")
    write_tensors(temporary, {"windows": windows})
    temporary.replace(path)
    return windows


@torch.inference_mode()
def sample_windows(
    model: Any, tokenizer: Any, shape: tuple[int, int], seed: int, show_progress: bool = True
) -> Tensor:
    """Sample windows from a model on its device: token ids [samples, sequence_length]."""
    samples, sequence_length = shape
    size = _windows_at_once(model, samples, sequence_length)
    special = set(tokenizer.all_special_ids)
    words = [token for token in range(len(tokenizer)) if token not in special]
    generator = torch.Generator().manual_seed(seed)
    first = torch.tensor(words)[torch.randint(len(words), (samples, 1), generator=generator)]
    prompts = chat_prompts(tokenizer)
    config = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=sequence_length - 1, pad_token_id=words[0]
    )
    # Transformers fills what `config` leaves open from here, and would pad after a document's end.
    model.generation_config = GenerationConfig()
    parts = []
    devices = [model.device] if model.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices),
        tqdm(
            total=samples * (sequence_length - 1),
            desc="writing calibration text",
            unit="token",
            disable=not show_progress,
        ) as bar,
    ):
        torch.manual_seed(seed)
        for start in range(0, samples, size):
            batch = first[start : start + size].to(model.device)
            documents = _Documents(words, prompts, tokenizer.eos_token_id, generator, len(batch))
            for row in range(1 if prompts else len(batch), len(batch), 2):
                batch[row] = documents.begin_prompt(row)
            written = model.generate(
                batch,
                attention_mask=torch.ones_like(batch),
                generation_config=config,
                logits_processor=LogitsProcessorList([documents]),
                stopping_criteria=StoppingCriteriaList([_Progress(bar)]),
            )
            parts.append(written.cpu())
    return torch.cat(parts)


def _windows_at_once(model: Any, samples: int, sequence_length: int) -> int:
    """Return how many windows have room for their keys and values."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    numbers = 2 * config.num_hidden_layers * heads * head_dim * sequence_length
    if model.device.type == "cuda":
        free = torch.cuda.mem_get_info(model.device)[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(samples, int(CACHE_SHARE * free / (numbers * model.dtype.itemsize))))


def chat_prompts(tokenizer: Any) -> list[list[int]]:
    """Return the token ids of requests of many kinds, up to where the model is to answer.

    None where the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        return []
    with reading("the chat template, for calibration text that the model writes,"):
        return [
            tokenizer(
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": request}],
                    tokenize=False,
                    add_generation_prompt=True,
                ),
                add_special_tokens=False,
            )["input_ids"]
            for request in PROMPTS.read_text(encoding="utf-8").split("\n")
            if request
        ]


class _Documents(LogitsProcessor):  # type: ignore[misc]
    """Begins a document where one has ended; what the model says goes on everywhere else."""

    def __init__(
        self,
        words: list[int],
        prompts: list[list[int]],
        end: int | None,
        generator: torch.Generator,
        rows: int,
    ) -> None:
        self.words = words
        self.prompts = prompts
        self.end = end
        self.generator = generator
        self.forced: list[list[int]] = [[] for _ in range(rows)]  # what is left of a prompt
        self.answers = [False] * rows  # whether a row's document answers a prompt

    def begin_prompt(self, row: int) -> int:
        """Begin a document with a random prompt; return its first token."""
        index = int(torch.randint(len(self.prompts), (), generator=self.generator))
        first, *self.forced[row] = self.prompts[index]
        self.answers[row] = True
        return first

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        last = input_ids[:, -1].tolist()
        for row, forced in enumerate(self.forced):
            if forced:
                allowed = [forced.pop(0)]
            elif last[row] != self.end or self.end is None:
                continue
            elif self.prompts and not self.answers[row]:
                allowed = [self.begin_prompt(row)]
            else:
                self.answers[row] = False
                allowed = self.words
            scores[row] = -torch.inf
            scores[row, allowed] = 0
        return scores


class _Progress(StoppingCriteria):  # type: ignore[misc]
    """Shows how many tokens are written; stops nothing."""

    def __init__(self, bar: Any) -> None:
        self.bar = bar

    def __call__(self, input_ids: Tensor, _scores: Tensor, **_kwargs: Any) -> Tensor:
        self.bar.update(len(input_ids))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
