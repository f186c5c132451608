"""A survey of the dense model: which directions of the residual stream matter, place by place.

The second moment C = Σxxᵀ says how much of the signal a direction holds; H = Σggᵀ, that of the
loss's gradient, how much the output changes with it. The output-aware weight of a place is
W = τ·C/tr C + H/(τ·tr H) (arXiv 2609.35579), and its basis are the leading eigenvectors of W
blended with its mean over all places: what one place deletes is lost for those behind it, so it
pays if they delete the same. All layers are run forward once, and for some of the windows backward,
one layer in memory at a time; what a layer reads is kept in a file in between.
"""

from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from sliceserve.slicing.layers import DenseLayers
from sliceserve.slicing.memory import ROWS_OF_LOGITS, return_freed_memory
from sliceserve.slicing.modeling import SlicedNorm
from sliceserve.slicing.moments import (
    ROWS_PER_PRODUCT,
    SecondMoment,
    principal_basis,
    product_rows,
)
from sliceserve.slicing.parts import part_path
from sliceserve.slicing.progress import Progress
from sliceserve.slicing.recording import Contexts, record
from sliceserve.slicing.signals import Signals, make_signals, read_tensor, write_tensor
from sliceserve.slicing.stopwatch import Stopwatch
from sliceserve.slicing.weights import write_tensors

TAU = 3.0
COMMON = 0.65  # the share of all places' mean in the basis of each
TIED_WEIGHT = 3.0  # of what the head reads, in the basis of a table that is embedding and head
GRADIENT_WINDOWS = 32


@dataclass(frozen=True)
class SurveyPlan:
    """What a survey is to find.

    Attributes:
        widths: columns to keep at each place.
        output_aware: whether to look at gradients as well.
        shared: whether all places are to have one basis.
        tied: whether the embedding's basis is to serve the head too.

    """

    widths: list[int]
    output_aware: bool
    shared: bool
    tied: bool


class Survey:
    """The survey of one model; can be killed and run again, it goes on where it was.

    Parts of its progress: one a layer going forward (moments), one for the head, one a layer going
    backward (weights of places, or the one basis).
    """

    def __init__(
        self,
        layers: DenseLayers,
        plan: SurveyPlan,
        progress: Progress,
        stopwatch: Stopwatch,
    ) -> None:
        """Prepare the survey of a model, kept in the directory of `progress`."""
        self.layers = layers
        self.plan = plan
        self.progress = progress
        self.stopwatch = stopwatch
        self.architecture = layers.model.architecture
        self.hidden_size = int(layers.model.config.hidden_size)
        self.step = len(self.architecture.sublayers)
        self.last = len(layers) * self.step
        self._total = self._zeros()

    @torch.no_grad()
    def run(
        self, windows: Tensor, windows_per_batch: int, signal_bytes: int, show_progress: bool = True
    ) -> None:
        """Survey the model with calibration tokens [samples, sequence_length]."""
        progress, count = self.progress, len(self.layers)
        done = len(progress.part_bytes)
        if done > 2 * count:
            self._total = progress.tensors()["total"].to(self.layers.device)
            return
        chosen = windows[:: self._stride(len(windows))]
        bar = tqdm(
            total=2 * count, initial=max(0, done - 1), disable=not show_progress, unit="layer"
        )
        with bar:
            bar.set_description("surveying forward")
            if done <= count:
                self._forward(windows, windows_per_batch, signal_bytes, done, bar)
            bar.set_description("surveying backward")
            self._backward(chosen, windows_per_batch, signal_bytes, bar)

    def basis(self, place: int) -> tuple[Tensor, Tensor]:
        """Return the basis of a place, [hidden_size, width], and the eigenvalues, falling.

        Both in float64, of the survey's end.
        """
        count, device = len(self.layers), self.layers.device
        width = self.plan.widths[place]
        if self.plan.shared:
            kept = load_file(part_path(self.progress.directory, 2 * count))
            return kept["basis"].to(device), kept["values"]
        number = count if place == self.last else 2 * count - place // self.step
        # A part holds the weights of other places too, hidden_size² numbers each.
        with safe_open(part_path(self.progress.directory, number), "pt") as part:
            own = part.get_tensor(f"weight.{place}").to(device)
        total = self._total
        weight = (1 - COMMON) * own / own.trace() + COMMON * total / total.trace()
        basis, values = principal_basis(weight, width, self.layers.centred)
        self.layers.warn_of_rank(values, width, place)
        return basis, values.cpu()

    def head_metric(self) -> Tensor:
        """Return the mean curvature of the loss in what the tied table reads, [D, D]."""
        kept = load_file(part_path(self.progress.directory, len(self.layers)))
        return kept["head.metric"].to(self.layers.device)

    def _zeros(self) -> Tensor:
        size = self.hidden_size
        return torch.zeros(size, size, dtype=torch.float64, device=self.layers.device)

    def _stride(self, samples: int) -> int:
        return -(-samples // GRADIENT_WINDOWS)

    def _moments(self, count: int) -> list[SecondMoment]:
        return [SecondMoment(self.hidden_size, self.layers.device) for _ in range(count)]

    def _finish(
        self, tensors: dict[str, Tensor], signals: Signals | None, state: dict[str, Tensor]
    ) -> None:
        path = part_path(self.progress.directory, len(self.progress.part_bytes))
        write_tensors(path, {name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
        written: Future[int] = Future()
        written.set_result(path.stat().st_size)
        self.progress.finish_part(written, state, [] if signals is None else [signals])
        return_freed_memory()

    def _forward(self, windows: Tensor, size: int, signal_bytes: int, done: int, bar: Any) -> None:
        layers, progress = self.layers, self.progress
        batches = list(torch.split(windows, size))
        stride = self._stride(len(windows))
        signals = self._signals("stream", batches, signal_bytes)

        def take(index: int, stream: Tensor) -> None:
            if done == 0:
                signals[index] = layers.centre(stream)

        with self.stopwatch("embedding"):
            contexts = record(layers.model, batches, layers.device, layers.dtype, take)
        if done > 0:
            progress.restore_signals([signals], layers.dtype, list(map(len, batches)))
        count = len(layers)
        for index, weights in layers.read_ahead(range(min(done, count), count)):
            moments = self._moments(self.step + (index == count - 1))
            with self.stopwatch("loading"):
                layer = layers.load(index, weights)
            with self._tape(index).open("wb", buffering=0) as tape:
                for number in range(len(batches)):
                    x = signals[number].to(layers.device)
                    if self.plan.output_aware:
                        first = -(number * size) % stride
                        with self.stopwatch("signals"):
                            write_tensor(tape, x[first::stride])
                    for moment, sublayer in zip(
                        moments[: self.step], self.architecture.sublayers, strict=True
                    ):
                        with self.stopwatch("moments"):
                            moment.add(x)
                        with self.stopwatch("forward"):
                            x = layers.advance(layer, sublayer, x, contexts[index][len(x)])
                    if index == count - 1:
                        with self.stopwatch("moments"):
                            moments[-1].add(x)
                    with self.stopwatch("signals"):
                        signals[number] = x
            with self.stopwatch("writing"):
                sums = {f"moment.{n}": moment.sum for n, moment in enumerate(moments)}
                self._finish(sums, signals, {})
            bar.update()
        if len(progress.part_bytes) == count:
            self._at_head(windows, batches, signals, stride, signal_bytes)

    def _signals(self, what: str, batches: list[Tensor], signal_bytes: int) -> Signals:
        capacities = [batch.numel() * self.hidden_size for batch in batches]
        layers = self.layers
        spill = self.progress.directory / f"spilled-{what}.bin"
        # Stream and gradients are there together at the head.
        return make_signals(capacities, layers.dtype, layers.device, signal_bytes // 2, spill)

    def _tape(self, index: int) -> Path:
        return self.progress.directory / f"read-by-{index:05d}.bin"

    def _at_head(
        self,
        windows: Tensor,
        batches: list[Tensor],
        signals: Signals,
        stride: int,
        signal_bytes: int,
    ) -> None:
        """Look at the head: the gradient of the loss there, and what a tied table must serve."""
        layers, device = self.layers, self.layers.device
        model, dtype = layers.model, layers.dtype
        scale, shift = layers.final_norm()
        normed = SlicedNorm(
            self.hidden_size, self.hidden_size, self.architecture.epsilon(model.config)
        )
        names = dict(model.skeleton.named_parameters())
        bias_name = f"{self.architecture.head}.bias"
        bias = layers.read(bias_name).to(device, dtype) if bias_name in names else None
        table = None
        if self.plan.output_aware or self.plan.tied:
            table = layers.read(f"{self.architecture.head}.weight").to(device, dtype)
        gradient, reads, means = self._moments(3)
        rows = 0 if table is None else len(table)
        weights = torch.zeros(rows, dtype=torch.float64, device=device)
        chosen = windows[::stride]
        kept = self._signals("gradients", list(torch.split(chosen, 1)), signal_bytes)
        number = offset = 0
        for index, batch in enumerate(batches):
            for row in range(-offset % stride, len(batch), stride):
                if table is None:
                    break
                x = signals[index][row].to(device)
                with torch.enable_grad():
                    leaf = x.detach().requires_grad_()
                    read = normed(leaf) * scale.to(dtype)
                y = read.detach() if shift is None else read.detach() + shift.to(dtype)
                into = torch.zeros_like(y)
                with self.stopwatch("head"):
                    targets = batch[row, 1:].to(device)
                    for start in range(0, len(targets), ROWS_OF_LOGITS):
                        part = slice(start, min(start + ROWS_OF_LOGITS, len(targets)))
                        logits = y[part] @ table.T
                        if bias is not None:
                            logits = logits + bias
                        chances = logits.to(torch.promote_types(dtype, torch.float32)).softmax(-1)
                        if self.plan.tied:
                            weights += chances.sum(0)
                            means.add(chances.to(dtype) @ table)
                            reads.add(read[part].detach())
                        chances[torch.arange(len(chances)), targets[part]] -= 1
                        into[part] = chances.to(dtype) @ table
                    (before,) = torch.autograd.grad(read, leaf, into)
                    kept[number] = layers.centre(before).unsqueeze(0)
                    gradient.add(kept[number])
                number += 1
            offset += len(batch)
        moment = self._kept_moment(len(layers) - 1, self.step)
        tensors = self._weigh(self.last, moment, gradient.sum)
        if self.plan.tied and table is not None:
            metric = -means.sum
            for start in range(0, len(table), ROWS_PER_PRODUCT):
                for entries in product_rows(table[start : start + ROWS_PER_PRODUCT]):
                    chosen_weights = weights[start : start + ROWS_PER_PRODUCT, None]
                    metric += (entries * chosen_weights.to(entries.dtype)).T @ entries
            tensors |= {"head.metric": metric, "head.moment": reads.sum}
        self._finish(tensors, kept if self.plan.output_aware else None, {"total": self._total})

    def _backward(self, chosen: Tensor, size: int, signal_bytes: int, bar: Any) -> None:
        layers, progress, count = self.layers, self.progress, len(self.layers)
        batches = list(torch.split(chosen, size))
        self._total = progress.tensors()["total"].to(layers.device)
        contexts: list[Contexts] = []
        if self.plan.output_aware:
            signals = self._signals("gradients", batches, signal_bytes)
            progress.restore_signals([signals], layers.dtype, list(map(len, batches)))
            contexts = record(layers.model, batches, layers.device, layers.dtype, _ignore)
        done = len(progress.part_bytes) - count - 1
        for index in range(count - 1 - done, -1, -1):
            gradients = self._moments(self.step)
            if self.plan.output_aware:
                for _, weights in layers.read_ahead([index]):
                    layer = layers.load(index, weights)
                    self._differentiate(index, layer, batches, signals, contexts[index], gradients)
            with self.stopwatch("eigenvectors"):
                tensors: dict[str, Tensor] = {}
                # Place 0, where one basis for all is complete, comes last.
                for n in reversed(range(self.step)):
                    moment = self._kept_moment(index, n)
                    tensors |= self._weigh(index * self.step + n, moment, gradients[n].sum)
            with self.stopwatch("writing"):
                kept = signals if self.plan.output_aware else None
                self._finish(tensors, kept, {"total": self._total})
            part_path(progress.directory, index).unlink()
            self._tape(index).unlink(missing_ok=True)
            bar.update()

    def _differentiate(
        self,
        index: int,
        layer: torch.nn.Module,
        batches: list[Tensor],
        signals: Signals,
        contexts: Contexts,
        gradients: list[SecondMoment],
    ) -> None:
        """Take the gradients past a layer, from behind it to before it."""
        layers, length = self.layers, batches[0].shape[1]
        with self._tape(index).open("rb", buffering=0) as tape, self.stopwatch("backward"):
            for number, batch in enumerate(batches):
                shape = torch.Size([len(batch), length, self.hidden_size])
                x = read_tensor(tape, shape, layers.dtype).to(layers.device).requires_grad_()
                with torch.enable_grad():
                    stream = [x]
                    for sublayer in self.architecture.sublayers:
                        context = contexts[len(batch)]
                        stream.append(layers.advance(layer, sublayer, stream[-1], context))
                    behind = signals[number].to(layers.device)
                    found = torch.autograd.grad(stream[-1], stream[:-1], behind)
                for gradient, value in zip(gradients, found, strict=True):
                    gradient.add(value)
                signals[number] = found[0]

    def _kept_moment(self, index: int, number: int) -> Tensor:
        kept = load_file(part_path(self.progress.directory, index))
        return kept[f"moment.{number}"].to(self.layers.device)

    def _weigh(self, place: int, moment: Tensor, gradient: Tensor) -> dict[str, Tensor]:
        """Find the weight of a place, add it to all; of one basis for all, that basis."""
        plan = self.plan
        self.layers.check_finite(moment + gradient, place)
        weight = self._combine(moment, gradient)
        if place == 0 and plan.tied:
            kept = load_file(part_path(self.progress.directory, len(self.layers)))
            metric, reads = (kept[f"head.{x}"].to(weight.device) for x in ("metric", "moment"))
            weight = weight + TIED_WEIGHT * self._combine(reads, metric)
        self._total = self._total + weight
        if not plan.shared:
            return {f"weight.{place}": weight}
        if place > 0:
            return {}
        basis, values = principal_basis(self._total, plan.widths[0], self.layers.centred)
        return {"basis": basis, "values": values}

    def _combine(self, moment: Tensor, gradient: Tensor) -> Tensor:
        """Weigh signal and gradient: τ·C/tr C + H/(τ·tr H)."""
        weight = moment / moment.trace()
        if self.plan.output_aware:
            weight = TAU * weight + gradient / gradient.trace() / TAU
        return weight


def _ignore(_index: int, _stream: Tensor) -> None:
    return
