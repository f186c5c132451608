"""Our slicing loop against a plain implementation of the published one, on the CPU.

    python benchmarks/plain_loop.py MODEL --calibration FILE --text FILE

The plain loop holds the model and all signals in memory and runs every decoder layer twice, once
to see what its MLP reads and once to see what it writes, as the published code does (rotate and
slice sequentially, batches of two windows, float64 moments and eigenvectors). Llama architecture
only. All times are from loading model and text to the saved weights. Exits with 1 if the
perplexities differ by over 0.5 %.
"""

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from sliceserve.slicing.calibration import pick_windows, token_windows
from sliceserve.slicing.corpora import read_corpus
from sliceserve.slicing.job import PAPER, SliceOptions, run_slice
from sliceserve.slicing.perplexity import load_model, measure
from sliceserve.slicing.shape import sliced_width
from sliceserve.slicing.source import load_tokenizer, locate, quiet_transformers

TOLERANCE = 0.005


class Norm(nn.Module):
    """RMSNorm without weights that divides by the dense width, whatever the width of x."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.hidden_size, self.eps = hidden_size, eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) / self.hidden_size + self.eps)


class Layer(nn.Module):
    """A Llama layer with a matrix on each of its two shortcuts."""

    def __init__(self, dense: Any, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.self_attn, self.mlp = dense.self_attn, dense.mlp
        self.input_layernorm = Norm(hidden_size, eps)
        self.post_attention_layernorm = Norm(hidden_size, eps)
        self.attn_shortcut = self.mlp_shortcut = torch.eye(hidden_size)

    def forward(self, hidden_states: Tensor, **context: Any) -> Tensor:
        update = self.self_attn(self.input_layernorm(hidden_states), **context)[0]
        hidden_states = hidden_states @ self.attn_shortcut + update
        self.mlp_reads = hidden_states
        update = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states @ self.mlp_shortcut + update


def principal(signals: list[Tensor]) -> Tensor:
    moments = [(batch.double().mT @ batch.double()).sum(0) for batch in signals]
    moment = torch.stack(moments).sum(0)
    moment.diagonal().add_(0.01 * moment.diagonal().mean())
    return torch.linalg.eigh(moment).eigenvectors.flip(-1)


def rotate(linear: Any, change: Callable[[Tensor], Tensor]) -> None:
    weight = change(linear.weight.data.double()).float()
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)


@torch.no_grad()
def slice_plainly(model: Any, windows: Tensor, width: int) -> None:
    """Slice a float32 Llama in place; the last place keeps its full width."""
    hidden_size, eps = model.config.hidden_size, model.config.rms_norm_eps
    layers = model.model.layers
    contexts: list[dict[str, Any]] = []
    inputs: list[Tensor] = []

    def capture(_layer: Any, args: Any, kwargs: Any) -> None:
        inputs.append(args[0])
        contexts.append(kwargs)
        raise StopIteration

    hook = layers[0].register_forward_pre_hook(capture, with_kwargs=True)
    for batch in windows.split(2):  # type: ignore[no-untyped-call]
        try:
            model(input_ids=batch, use_cache=False)
        except StopIteration:
            continue
    hook.remove()
    basis = principal(inputs)[:, :width]
    table = model.model.embed_tokens
    head = model.lm_head.weight.data.clone()
    table.weight = nn.Parameter((table.weight.double() @ basis).float(), requires_grad=False)
    for index, dense in enumerate(layers):
        last = index == len(layers) - 1
        scale_in = dense.input_layernorm.weight.double()
        scale_mlp = dense.post_attention_layernorm.weight.double()
        layer = layers[index] = Layer(dense, hidden_size, eps)
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            rotate(linear, lambda w, g=scale_in, u=basis: (w * g) @ u)
        inputs = [(batch.double() @ basis).float() for batch in inputs]
        layer.attn_shortcut = basis.T.float()
        rotated = [layer.mlp.gate_proj, layer.mlp.up_proj]
        for linear in rotated:
            rotate(linear, lambda w, g=scale_mlp: w * g)
        reads = []
        for batch, context in zip(inputs, contexts, strict=True):
            layer(batch, **context)
            reads.append(layer.mlp_reads)
        before, basis = basis, principal(reads)[:, :width]
        layer.attn_shortcut = (before.T @ basis).float()
        rotate(layer.self_attn.o_proj, lambda w, u=basis: u.T @ w)
        for linear in rotated:
            rotate(linear, lambda w, u=basis: w @ u)
        layer.mlp_shortcut = basis.T.float()
        outputs = [layer(b, **context) for b, context in zip(inputs, contexts, strict=True)]
        if not last:
            before, basis = basis, principal(outputs)[:, :width]
            layer.mlp_shortcut = (before.T @ basis).float()
            rotate(layer.mlp.down_proj, lambda w, u=basis: u.T @ w)
        inputs = outputs
        print(f"plain loop: layer {index + 1}/{len(layers)}", file=sys.stderr)
    model.lm_head.weight = nn.Parameter(head, requires_grad=False)
    rotate(model.lm_head, lambda w: w * model.model.norm.weight.double())
    model.model.norm = Norm(hidden_size, eps)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=2048)
    options = parser.parse_args()
    quiet_transformers()
    location = locate(options.model)
    tokenizer = load_tokenizer(location)
    length = options.sequence_length
    corpus = read_corpus(options.calibration, "--calibration")
    held_out = token_windows(read_corpus(options.text, "--text"), tokenizer, length)[:8]
    cpu = torch.device("cpu")

    def perplexity(model: Any) -> float:
        return math.exp(measure(model, held_out) / (held_out.numel() - len(held_out)))

    with tempfile.TemporaryDirectory() as work:
        names, runs = ["plain loop"], []
        started = time.perf_counter()
        windows = pick_windows(corpus, tokenizer, options.samples, length, 0, "--calibration")
        plain = AutoModelForCausalLM.from_pretrained(
            **location.from_pretrained_arguments(), dtype=torch.float32
        ).eval()
        slice_plainly(plain, windows, sliced_width(plain.config.hidden_size, 0.25, 8))
        torch.save(plain.state_dict(), Path(work, "plain.pt"))
        seconds = [time.perf_counter() - started]
        perplexities = [perplexity(plain)]
        del plain
        for dtype in ("float32", "bfloat16"):
            sliced = Path(work, dtype)
            started = time.perf_counter()
            run = run_slice(
                SliceOptions(
                    options.model,
                    sliced,
                    calibration=options.calibration,
                    samples=options.samples,
                    sequence_length=length,
                    dtype="float32",
                    compute_dtype=dtype,
                    **PAPER,
                )
            )
            seconds.append(time.perf_counter() - started)
            perplexities.append(perplexity(load_model(locate(str(sliced)), cpu, torch.float32)))
            names.append(f"sliceserve, --compute-dtype {dtype}")
            runs.append(run.stopwatch)
    print("| 25 % | seconds | | perplexity |")
    print("| --- | ---: | ---: | ---: |")
    for name, took, value in zip(names, seconds, perplexities, strict=True):
        print(f"| {name} | {took:.1f} | × {seconds[0] / took:.2f} | {value:.3f} |")
    print(*runs, sep="\n")
    worst = max(abs(value / perplexities[0] - 1) for value in perplexities)
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
