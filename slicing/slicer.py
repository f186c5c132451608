"""The slicing loop of SliceGPT (arXiv 2401.15024, section 3): fold, rotate and delete, in order.

Every place of the residual stream gets a basis U. Linears that read the stream become W·diag(g)·U,
those that write it UᵀW, and the stream itself moves from one place to the next by S = UᵀU′. In the
paper's form U are the principal directions of the signal there, taken with everything before it
sliced already. With a survey of the dense model they are known before, may be aligned or shared,
and the weights can be refitted. Where the last place keeps the dense model's columns, the head
stays as it was.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sliceserve.slicing.architectures import Sublayer
from sliceserve.slicing.head import fold_head
from sliceserve.slicing.layers import DenseLayers
from sliceserve.slicing.memory import return_freed_memory
from sliceserve.slicing.modeling import ROTATION, SlicedLayer, SlicedNorm, branch_outputs
from sliceserve.slicing.moments import SecondMoment
from sliceserve.slicing.parts import PartWriter
from sliceserve.slicing.places import Places, SlicePlan
from sliceserve.slicing.progress import Progress
from sliceserve.slicing.recording import Contexts, record
from sliceserve.slicing.refit import Regression
from sliceserve.slicing.signals import Signals, make_signals
from sliceserve.slicing.stopwatch import Stopwatch
from sliceserve.slicing.survey import Survey


class Slicer:
    """One run over a dense model, layer by layer."""

    def __init__(
        self,
        layers: DenseLayers,
        plan: SlicePlan,
        survey: Survey | None,
        writer: PartWriter,
        stopwatch: Stopwatch,
    ) -> None:
        """Prepare a run.

        Args:
            layers: those of the dense model, and where and in which dtype they run; bases,
                rotations and regressions are float64 throughout.
            plan: what to make.
            survey: a finished survey of the dense model; None takes the paper's bases.
            writer: takes the sliced weights as they are done.
            stopwatch: times the steps.

        """
        self.layers = layers
        self.plan = plan
        self.survey = survey
        self.writer = writer
        self.stopwatch = stopwatch
        self.device, self.dtype = layers.device, layers.dtype
        self.architecture = layers.model.architecture
        self.hidden_size = int(layers.model.config.hidden_size)
        self.epsilon = self.architecture.epsilon(layers.model.config)
        self.places = Places(layers, plan, survey, stopwatch)
        self.strengths: list[float] = []  # of the regressions so far, see `refit.Fit`
        self.signals: Signals
        self.dense_signals: Signals

    @torch.no_grad()
    def run(
        self,
        windows: Tensor,
        windows_per_batch: int,
        signal_bytes: int,
        progress: Progress,
        show_progress: bool = True,
    ) -> None:
        """Slice the model, from where it stands.

        Afterwards `places` holds the ranks and the spectrum of all places, but for a last one that
        is whole.

        Args:
            windows: calibration tokens [samples, sequence_length].
            windows_per_batch: that run through a layer at once.
            signal_bytes: of the host's memory that calibration signals may take; more spill.
            progress: what is done already, and where to note what is.
            show_progress: whether to show a bar.

        Raises:
            UserError: the dense model holds or gives values that are not finite.

        """
        batches = list(torch.split(windows, windows_per_batch))
        stores = self._make_stores(batches, progress, signal_bytes)
        count, steps = len(self.layers), len(self.architecture.sublayers)
        done = len(progress.part_bytes)
        bar = tqdm(
            total=count * steps,
            initial=max(0, min(done - 1, count)) * steps,
            disable=not show_progress,
            unit="sublayer",
        )
        with bar:
            bar.set_description("slicing embedding")
            if done == 0:
                contexts = self._start(batches)
                progress.finish_part(self.writer.write(0), self._state(), stores)
            else:
                state = progress.tensors()
                self.places.restore(state)
                self.strengths = state["strengths"].tolist()
            if 0 < done <= count + 1:
                progress.restore_signals(stores, self.dtype, list(map(len, batches)))
            if 0 < done <= count:
                contexts = record(
                    self.layers.model, _one_of_each(batches), self.device, self.dtype, _ignore
                )
            for index, weights in self.layers.read_ahead(range(max(0, done - 1), count)):
                bar.set_description(f"slicing layer {index + 1}/{count}")
                self._slice_layer(index, weights, contexts[index], bar.update)
                with self.stopwatch("writing"):
                    part = self.writer.write(index + 1)
                    progress.finish_part(part, self._state(), stores)
                return_freed_memory()
        if len(progress.part_bytes) == count + 1:
            self._write_head()
            progress.finish_part(self.writer.write(count + 1), self._state())

    def _make_stores(
        self, batches: list[Tensor], progress: Progress, signal_bytes: int
    ) -> list[Signals]:
        """Make the signals of the sliced stream and, for refits, of the dense one."""
        # The paper's bases are found with all columns.
        columns = [self.hidden_size if self.survey is None else max(self.plan.widths)]
        columns += [self.hidden_size] * self.plan.refit_writes
        stores = []
        for number, width in enumerate(columns):
            capacities = [batch.numel() * width for batch in batches]
            spill = progress.directory / f"spilled-{number}.bin"
            share = signal_bytes * width // sum(columns)
            stores.append(make_signals(capacities, self.dtype, self.device, share, spill))
        self.signals, self.dense_signals = stores[0], stores[-1]
        return stores

    def _state(self) -> dict[str, Tensor]:
        strengths = torch.tensor(self.strengths, dtype=torch.float64)
        return self.places.state() | {"strengths": strengths}

    def _start(self, batches: list[Tensor]) -> list[Contexts]:
        """Find the first basis, slice the embedding tables E to E·U and start the signals."""
        # Text with few different tokens shows here.
        moment = SecondMoment(self.hidden_size, self.device, exact=True)
        if self.survey is not None:
            self.places.basis = self.places.surveyed_basis(0)

        def take(index: int, stream: Tensor) -> None:
            wide = self.layers.centre(stream)
            if self.survey is None:
                moment.add(wide)
                self.signals[index] = wide
                return
            if self.plan.refit_writes:
                self.dense_signals[index] = wide
            self.signals[index] = wide @ self.places.basis.to(self.dtype)

        with self.stopwatch("embedding"):
            contexts = record(self.layers.model, batches, self.device, self.dtype, take)
        if self.survey is None:
            self.places.basis = self.places.principal_basis(moment, 0)
            self._rotate_signals()
        with self.stopwatch("rotating weights"):
            for path in self.architecture.tables:
                table = self.layers.read(f"{path}.weight")
                narrow = self._by_rows(
                    table, lambda rows: self.layers.centre(rows) @ self.places.basis
                )
                self.writer.add(f"{path}.weight", narrow)
        return contexts

    def _slice_layer(
        self,
        index: int,
        weights: dict[str, Tensor],
        contexts: Contexts,
        advance: Callable[[], Any],
    ) -> None:
        """Slice one decoder layer, hand its tensors to the writer, and move the signals past it."""
        architecture = self.architecture
        prefix, step = f"{architecture.layers}.{index}", len(architecture.sublayers)
        widths = self.plan.widths[index * step : (index + 1) * step + 1]
        dense = self.layers.load(index, weights) if self.plan.refit_writes else None
        # Rotations are done here, on the signals.
        none: list[int | None] = [0] * step
        layer = SlicedLayer(
            self.layers.skeleton(index), architecture, widths, none, self.hidden_size, self.epsilon
        ).eval()
        norms = tuple(f"{sublayer.norm}." for sublayer in architecture.sublayers)
        rotated = tuple(
            f"{path}."
            for sublayer in architecture.sublayers
            for path in (*sublayer.reads, *sublayer.writes)
        )
        for name, weight in weights.items():
            if not name.startswith((*norms, *rotated)):
                self.layers.assign(layer, name, weight)
                self.writer.add(f"{prefix}.{name}", weight)
            elif not name.startswith(norms) and self.survey is None:
                self.layers.assign(layer, name, weight)
        for number, sublayer in enumerate(architecture.sublayers):
            place = index * step + number
            reads = self._reads(layer, sublayer, place)
            with self.stopwatch("rotating weights"):
                self._rotate_readers(layer, sublayer, weights, reads, prefix)
            if self.survey is None:
                rotation = self._advance(layer, sublayer, contexts, place + 1)
                written = self._rotated_writers(sublayer, weights, self.places.basis)
            else:
                rotation, written = self._move(layer, dense, sublayer, weights, contexts, place)
            for path in sublayer.writes:
                self.writer.add(f"{prefix}.{path}.weight", written[path])
                if (bias := weights.get(f"{path}.bias")) is not None:
                    narrow = self.layers.centre(self.layers.wide(bias)) @ self.places.basis
                    self.writer.add(f"{prefix}.{path}.bias", narrow)
            for name, weight in rotation.items():
                self.writer.add(f"{prefix}.{ROTATION}.{number}.{name}", weight)
            advance()

    def _reads(self, layer: SlicedLayer, sublayer: Sublayer, place: int) -> Tensor:
        """Return the map from the dense stream's columns to those that readers read, [D, width]."""
        if not self.plan.refit_reads:
            return self.places.basis
        return self._refit_norm(layer.get_submodule(sublayer.norm), self.plan.widths[place]).T

    def _refit_norm(self, norm: nn.Module, width: int) -> Tensor:
        """Find the map from the normed sliced stream to the normed dense one, [width, D]."""
        regression = Regression(width, self.hidden_size, self.device)
        dense_norm = SlicedNorm(self.hidden_size, self.hidden_size, self.epsilon)
        factor, first = (self.hidden_size / width) ** 0.5, 0
        with self.stopwatch("refitting"):
            for index in range(len(self.signals)):
                x = self.signals[index].to(self.device)
                dense = self.dense_signals[index].to(self.device)
                exact = torch.promote_types(x.dtype, torch.float32)
                normed = dense_norm(dense.to(exact)), factor * norm(x.to(exact))
                regression.add(normed[1], normed[0], first)
                first += len(x)
            fit = regression.fit(self.places.basis.T)
        self.strengths.append(fit.strength)
        return fit.weight

    def _rotate_readers(
        self,
        layer: SlicedLayer,
        sublayer: Sublayer,
        weights: dict[str, Tensor],
        reads: Tensor,
        prefix: str,
    ) -> None:
        scale, shift = self.layers.norm(sublayer.norm, weights)
        rescaled = scale * (self.hidden_size / reads.shape[1]) ** 0.5
        for path in sublayer.reads:
            weight, bias = weights.pop(f"{path}.weight"), weights.pop(f"{path}.bias", None)
            sliced = {"weight": self._by_rows(weight, lambda rows: rows * rescaled @ reads)}
            if bias is not None:
                sliced["bias"] = self.layers.wide(bias)
            if shift is not None:
                offset = self._by_rows(weight, lambda rows: rows @ shift)
                sliced["bias"] = sliced.get("bias", 0) + offset
            for leaf, tensor in sliced.items():
                self.layers.assign(layer, f"{path}.{leaf}", tensor)
                self.writer.add(f"{prefix}.{path}.{leaf}", tensor)

    def _rotated_writers(
        self, sublayer: Sublayer, weights: dict[str, Tensor], basis: Tensor
    ) -> dict[str, Tensor]:
        """Return UᵀW of the linears that write the stream, by their paths."""
        written = {}
        with self.stopwatch("rotating weights"):
            for path in sublayer.writes:
                columns = weights[f"{path}.weight"].T
                narrow = self._by_rows(columns, lambda rows: self.layers.centre(rows) @ basis)
                written[path] = narrow.T
        return written

    def _advance(
        self, layer: SlicedLayer, sublayer: Sublayer, contexts: Contexts, place: int
    ) -> dict[str, Tensor]:
        """Move the signals to the next place of the stream and find the basis there.

        x·Uᵀ + Σ branch(norm(x)) has all hidden_size columns; its principal basis is the next U.

        Returns:
            The weights of the rotation that leads there, by their names.

        """
        before, whole = self.places.basis, self.places.is_whole(place)
        lift = before.T.to(self.dtype)
        moment = SecondMoment(self.hidden_size, self.device)
        for index in range(len(self.signals)):
            with self.stopwatch("signals"):
                x = self.signals[index].to(self.device)
            with self.stopwatch("forward"):
                update = layer.branches(sublayer, x, contexts[len(x)])
                wide = self.layers.centre(x @ lift + update)
            if not whole:
                with self.stopwatch("moments"):
                    moment.add(wide)
            with self.stopwatch("signals"):
                self.signals[index] = wide
        if whole:
            self.places.basis = self.places.identity()
        else:
            self.places.basis = self.places.principal_basis(moment, place)
            self._rotate_signals()
        self.places.ranks.append(None)
        return {"weight": self.places.basis.T @ before}

    def _move(
        self,
        layer: SlicedLayer,
        dense: nn.Module | None,
        sublayer: Sublayer,
        weights: dict[str, Tensor],
        contexts: Contexts,
        place: int,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Move both streams past a sublayer, to a place whose basis is known.

        Returns:
            The weights of the rotation that leads there, by their names, and those of the linears
            that write the stream, by their paths.

        """
        rotation, rotate = self.places.rotation(place + 1)
        biases = [weights.get(f"{path}.bias") for path in sublayer.writes]
        narrow_biases = [
            None if bias is None else self.layers.centre(self.layers.wide(bias)) @ self.places.basis
            for bias in biases
        ]
        written = self._rotated_writers(sublayer, weights, self.places.basis)
        if dense is not None:
            for path in sublayer.writes:
                layer.set_submodule(path, nn.Identity())
            offset = sum(bias for bias in narrow_biases if bias is not None)
            regression = self._regression(layer, dense, sublayer, contexts, rotate, offset)
            with self.stopwatch("refitting"):
                prior = torch.cat([weight.T.to(torch.float64) for weight in written.values()])
                fit = regression.fit(prior)
            self.strengths.append(fit.strength)
            sizes = [weight.shape[1] for weight in written.values()]
            written = {
                path: part.T
                for path, part in zip(written, torch.split(fit.weight, sizes), strict=True)
            }
        for path, bias in zip(sublayer.writes, narrow_biases, strict=True):
            linear = nn.Linear(1, 1, bias=bias is not None, device="meta")
            layer.set_submodule(path, linear)
            self.layers.assign(layer, f"{path}.weight", written[path])
            if bias is not None:
                self.layers.assign(layer, f"{path}.bias", bias)
        for index in range(len(self.signals)):
            with self.stopwatch("signals"):
                x = self.signals[index].to(self.device)
            with self.stopwatch("forward"):
                moved = rotate(x) + layer.branches(sublayer, x, contexts[len(x)])
            with self.stopwatch("signals"):
                self.signals[index] = moved
        return rotation, written

    def _regression(
        self,
        layer: SlicedLayer,
        dense: nn.Module,
        sublayer: Sublayer,
        contexts: Contexts,
        rotate: Callable[[Tensor], Tensor],
        offset: Tensor | int,
    ) -> Regression:
        """Move the dense signals, and regress what is missing to them on what the writers read."""
        regression = None
        narrow, first = self.places.basis.to(self.dtype), 0
        for index in range(len(self.signals)):
            with self.stopwatch("signals"):
                x = self.signals[index].to(self.device)
                stream = self.dense_signals[index].to(self.device)
            with self.stopwatch("forward"):
                context = contexts[len(x)]
                stream = self.layers.advance(dense, sublayer, stream, context)
                inputs = branch_outputs(layer, self.architecture, sublayer, x, context)
                exact = torch.promote_types(x.dtype, torch.float32)
                missing = (stream @ narrow).to(exact) - rotate(x).to(exact) - offset
            with self.stopwatch("signals"):
                self.dense_signals[index] = stream
            with self.stopwatch("refitting"):
                joined = torch.cat(inputs, dim=-1)
                if regression is None:
                    sizes = joined.shape[-1], missing.shape[-1]
                    regression = Regression(*sizes, self.device)
                regression.add(joined, missing.to(exact), first)
                first += len(x)
        assert regression is not None  # noqa: S101 - there are signals
        return regression

    def _rotate_signals(self) -> None:
        """Move the signals into the basis of the place where they are."""
        narrow = self.places.basis.to(self.dtype)
        with self.stopwatch("signals"):
            for index in range(len(self.signals)):
                self.signals[index] = self.signals[index].to(self.device) @ narrow

    def _write_head(self) -> None:
        """Write the head, refitted to the dense normed stream if the plan says so."""
        width = self.plan.widths[-1]
        reads, whole = self.places.basis, self.places.is_whole(len(self.plan.widths) - 1)
        if self.plan.refit_writes and not whole:
            reads = self._refit_norm(SlicedNorm(width, self.hidden_size, self.epsilon), width).T
        with self.stopwatch("rotating weights"):
            fold_head(
                self.layers, reads, self.survey if self.plan.tied else None, self.writer, whole
            )

    def _by_rows(self, table: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """Change a matrix in float64 into the checkpoint's dtype."""
        return self.layers.by_rows(table, change, self.writer.dtype)


def _one_of_each(batches: list[Tensor]) -> list[Tensor]:
    """Return one batch of every number of windows."""
    return list({len(batch): batch for batch in batches}.values())


def _ignore(_index: int, _stream: Tensor) -> None:
    return
