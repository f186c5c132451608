"""The slicing loop of SliceGPT (arXiv 2401.15024, section 3): fold, rotate and delete, in order.

Every place of the residual stream gets a basis U: the principal directions of the signal there,
taken with everything before it sliced already. Linears that read the stream become W·diag(g)·U,
those that write it UᵀW, and the stream itself moves from one place to the next by S = UᵀU′. Where
the last place keeps all columns, its basis is the identity, and the head stays as it was.
"""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sliceserve.slicing.architectures import Sublayer
from sliceserve.slicing.dense import DenseModel
from sliceserve.slicing.errors import UserError
from sliceserve.slicing.memory import ROWS_PER_PRODUCT, return_freed_memory
from sliceserve.slicing.modeling import ROTATION, SlicedLayer
from sliceserve.slicing.moments import SecondMoment, numerical_rank, principal_basis
from sliceserve.slicing.parts import PartWriter
from sliceserve.slicing.progress import Progress
from sliceserve.slicing.recording import Contexts, record
from sliceserve.slicing.rotations import RankRule, align
from sliceserve.slicing.signals import Signals, make_signals
from sliceserve.slicing.stopwatch import Stopwatch

logger = logging.getLogger(__name__)


def sliced_width(hidden_size: int, fraction: float, round_to: int) -> int:
    """Return the columns kept: (1 - fraction)·hidden_size, down to a multiple of `round_to`.

    A fraction of 0 keeps all columns, whatever the multiple.

    Raises:
        UserError: nothing would be left.

    """
    if fraction == 0:
        return hidden_size
    # The tiny addend keeps a product such as 0.7·1000 from falling just below its whole number.
    width = int((1 - fraction) * hidden_size + 1e-9) // round_to * round_to
    if width < 1:
        raise UserError(
            f"--fraction {fraction} with --round-to {round_to} leaves none of the "
            f"{hidden_size} columns"
        )
    return width


class Slicer:
    """One run over a dense model, layer by layer."""

    def __init__(
        self,
        model: DenseModel,
        widths: list[int],
        rank_rule: RankRule | None,
        writer: PartWriter,
        device: torch.device,
        dtype: torch.dtype,
        signal_bytes: int,
        windows_per_batch: int,
    ) -> None:
        """Prepare a run.

        Args:
            model: the dense model; weights are read layer by layer.
            widths: columns to keep at each place.
            rank_rule: says how many directions the rotation between two places of equal width
                turns; None keeps rotations whole.
            writer: takes the sliced weights as they are done.
            device: where layers run.
            dtype: of the forward pass; moments, bases and rotations are float64 throughout.
            signal_bytes: of the host's memory that calibration signals may take; more spill.
            windows_per_batch: calibration windows that run through a layer at once.

        """
        self.model = model
        self.widths = widths
        self.rank_rule = rank_rule
        self.hidden_size = int(model.config.hidden_size)
        self.ranks: list[int | None] = []
        self.writer = writer
        self.device = device
        self.dtype = dtype
        self.signal_bytes = signal_bytes
        self.windows_per_batch = windows_per_batch
        self.stopwatch = Stopwatch(device)
        self.basis = torch.empty(0)
        self.spectrum = torch.empty(0, self.hidden_size, dtype=torch.float64)
        final_norm = model.skeleton.get_submodule(model.architecture.final_norm)
        self.centred = isinstance(final_norm, nn.LayerNorm)
        self.layers: Any = model.skeleton.get_submodule(model.architecture.layers)
        self.signals: Signals

    @torch.no_grad()
    def run(self, windows: Tensor, progress: Progress, show_progress: bool = True) -> None:
        """Slice the model with calibration tokens [samples, sequence_length], from where it stands.

        Afterwards `ranks` holds what the rule gave, and `spectrum` the eigenvalues of the stream's
        second moment, falling, float64 [places, hidden_size], but for a last place that is whole.

        Raises:
            UserError: the dense model holds or gives values that are not finite.

        """
        batches = _split(windows, self.windows_per_batch)
        columns = signal_columns(self.hidden_size, self.widths, self.rank_rule)
        capacities = [batch.numel() * columns for batch in batches]
        spill = progress.directory / "spilled.bin"
        self.signals = make_signals(capacities, self.dtype, self.device, self.signal_bytes, spill)
        count, steps = len(self.layers), len(self.model.architecture.sublayers) * len(batches)
        done = len(progress.part_bytes)
        bar = tqdm(
            total=count * steps,
            initial=max(0, min(done - 1, count)) * steps,
            disable=not show_progress,
            unit="batch",
        )
        with bar, ThreadPoolExecutor(1) as loader:
            bar.set_description("slicing embedding")
            if done == 0:
                contexts = self._start(batches)
                progress.finish_part(self.writer.write(0), self._state(), self.signals)
            elif done <= count:
                contexts = record(
                    self.model, one_of_each_size(batches), self.device, self.dtype, _ignore
                )
                progress.restore_signals(self.signals, self.dtype, list(map(len, batches)))
            if done > 0:
                state = progress.tensors()
                self.basis, self.spectrum = state["basis"].to(self.device), state["spectrum"]
                self.ranks = [None if rank < 0 else rank for rank in state["ranks"].tolist()]
            first = max(0, done - 1)
            ahead = loader.submit(self._read_layer, first) if first < count else None
            for index in range(count):
                if index >= first and ahead is not None:
                    bar.set_description(f"slicing layer {index + 1}/{count}")
                    with self.stopwatch("loading"):
                        weights = ahead.result()
                    if index + 1 < count:
                        ahead = loader.submit(self._read_layer, index + 1)
                    self._slice_layer(index, weights, contexts[index], bar.update)
                    with self.stopwatch("writing"):
                        part = self.writer.write(index + 1)
                        progress.finish_part(part, self._state(), self.signals)
                # The sliced layer is made of the dense one's modules: let go of its weights.
                self.layers[index] = nn.Identity()
                return_freed_memory()
        if len(progress.part_bytes) == count + 1:
            self._fold_head()
            progress.finish_part(self.writer.write(count + 1), self._state())

    def _state(self) -> dict[str, Tensor]:
        ranks = [-1 if rank is None else rank for rank in self.ranks]
        return {"basis": self.basis, "spectrum": self.spectrum, "ranks": torch.tensor(ranks)}

    def _read(self, name: str) -> Tensor:
        """Read a tensor on the CPU; there must be no NaN or infinity in it."""
        weight = self.model.read(name)
        if not weight.isfinite().all():
            raise UserError(f"MODEL holds values that are not finite in its tensor {name!r}")
        return weight

    def _read_layer(self, index: int) -> dict[str, Tensor]:
        """Read all tensors of a layer, pinned where a GPU is to take them."""
        prefix = f"{self.model.architecture.layers}.{index}"
        names = [name for name, _ in self.layers[index].named_parameters()]
        weights = {name: self._read(f"{prefix}.{name}") for name in names}
        if self.device.type == "cuda":
            return {name: weight.pin_memory() for name, weight in weights.items()}
        return weights

    def _norm(self, path: str, weights: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Return a norm's scale g and shift, [hidden_size] in float64."""
        scale = torch.ones(self.hidden_size, dtype=torch.float64, device=self.device)
        if f"{path}.weight" in weights:
            scale = self._wide(weights[f"{path}.weight"])
        shift = weights.get(f"{path}.bias")
        return scale, None if shift is None else self._wide(shift)

    def _wide(self, weight: Tensor) -> Tensor:
        return weight.to(self.device).to(torch.float64)

    def _centre(self, stream: Tensor, dim: int = -1) -> Tensor:
        """Remove the mean over hidden_size where the norms are LayerNorms: they would do it.

        What is left is the stream of a model with RMSNorms that computes the same (section 3.1).
        """
        return stream - stream.mean(dim, keepdim=True) if self.centred else stream

    def _start(self, batches: list[Tensor]) -> list[Contexts]:
        """Find the first basis, slice the embedding tables E to E·U and start the signals."""
        architecture = self.model.architecture
        moment = SecondMoment(self.hidden_size, self.device)

        def take(index: int, stream: Tensor) -> None:
            wide = self._centre(stream)
            moment.add(wide)
            self.signals[index] = wide

        with self.stopwatch("embedding"):
            contexts = record(self.model, batches, self.device, self.dtype, take)
        self.basis = self._principal_basis(moment, 0)
        self._rotate_signals()
        with self.stopwatch("rotating weights"):
            for path in architecture.tables:
                table = self._read(f"{path}.weight")
                narrow = self._by_rows(table, lambda rows: self._centre(rows) @ self.basis)
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
        architecture = self.model.architecture
        prefix, step = f"{architecture.layers}.{index}", len(architecture.sublayers)
        widths = self.widths[index * step : (index + 1) * step + 1]
        eps = architecture.epsilon(self.model.config)
        # Rotations are done here, on the signals.
        ranks: list[int | None] = [0] * step
        layer = SlicedLayer(
            self.layers[index], architecture, widths, ranks, self.hidden_size, eps
        ).eval()
        norms = tuple(f"{sublayer.norm}." for sublayer in architecture.sublayers)
        rotated = {
            f"{path}."
            for sublayer in architecture.sublayers
            for path in (*sublayer.reads, *sublayer.writes)
        }
        for name, weight in weights.items():
            if not name.startswith(norms):
                self._assign(layer, name, weight)
                if not name.startswith(tuple(rotated)):
                    self.writer.add(f"{prefix}.{name}", weight)
        for number, sublayer in enumerate(architecture.sublayers):
            with self.stopwatch("rotating weights"):
                self._rotate_readers(layer, sublayer, weights, widths[number], prefix)
            rotation = self._advance(
                partial(_branches, layer, sublayer, contexts), index * step + number + 1, advance
            )
            with self.stopwatch("rotating weights"):
                for path in sublayer.writes:
                    columns = weights.pop(f"{path}.weight").T
                    narrow = self._by_rows(columns, lambda rows: self._centre(rows) @ self.basis)
                    self.writer.add(f"{prefix}.{path}.weight", narrow.T)
                    if (bias := weights.pop(f"{path}.bias", None)) is not None:
                        narrow = self._centre(self._wide(bias)) @ self.basis
                        self.writer.add(f"{prefix}.{path}.bias", narrow)
                for name, weight in rotation.items():
                    self.writer.add(f"{prefix}.{ROTATION}.{number}.{name}", weight)

    def _rotate_readers(
        self,
        layer: SlicedLayer,
        sublayer: Sublayer,
        weights: dict[str, Tensor],
        width: int,
        prefix: str,
    ) -> None:
        scale, shift = self._norm(sublayer.norm, weights)
        rescaled = scale * (self.hidden_size / width) ** 0.5
        for path in sublayer.reads:
            weight, bias = weights.pop(f"{path}.weight"), weights.pop(f"{path}.bias", None)
            sliced = {"weight": self._by_rows(weight, lambda rows: rows * rescaled @ self.basis)}
            if bias is not None:
                sliced["bias"] = self._wide(bias)
            if shift is not None:
                offset = self._by_rows(weight, lambda rows: rows @ shift)
                sliced["bias"] = sliced.get("bias", 0) + offset
            for leaf, tensor in sliced.items():
                self._assign(layer, f"{path}.{leaf}", tensor)
                self.writer.add(f"{prefix}.{path}.{leaf}", tensor)

    def _advance(
        self, branches: Callable[[Tensor], Tensor], place: int, advance: Callable[[], Any]
    ) -> dict[str, Tensor]:
        """Move the signals to the next place of the stream and find the basis there.

        x·Uᵀ + Σ branch(norm(x)) has all hidden_size columns; its principal basis is the next U.

        Returns:
            The weights of the rotation that leads there, by their names.

        """
        before, width, rule = self.basis, self.widths[place], self.rank_rule
        whole = place == len(self.widths) - 1 and width == self.hidden_size
        low_rank = rule is not None and not whole and self.widths[place - 1] == width
        lift = before.T.to(self.dtype)
        moment = SecondMoment(self.hidden_size, self.device)
        for index in range(len(self.signals)):
            with self.stopwatch("signals"):
                x = self.signals[index].to(self.device)
            with self.stopwatch("forward"):
                wide = self._centre(x @ lift + branches(x))
            if not whole:
                with self.stopwatch("moments"):
                    moment.add(wide)
            with self.stopwatch("signals"):
                # What a rotation of low rank leaves out depends on where the stream was.
                self.signals[index] = torch.cat([wide, x], dim=-1) if low_rank else wide
            advance()
        if whole:
            self.basis = torch.eye(self.hidden_size, dtype=torch.float64, device=self.device)
        else:
            self.basis = self._principal_basis(moment, place)
        if rule is None or not low_rank:
            self.ranks.append(None)
            if not whole:
                self._rotate_signals()
            return {"weight": self.basis.T @ before}
        with self.stopwatch("eigenvectors"):
            alignment = align(before, self.basis)
        self.basis = alignment.basis
        # No more than the deleted directions can turn.
        rank = min(rule(alignment.cosines), self.hidden_size - width)
        self.ranks.append(rank)
        self._rotate_signals(alignment.neglected(rank))
        down, up = alignment.factors(rank)
        return {"down.weight": down.T, "up.weight": up.T} if rank else {}

    def _principal_basis(self, moment: SecondMoment, place: int) -> Tensor:
        """Find the principal basis of a place from the moment there."""
        if not moment.sum.isfinite().all():
            raise UserError(
                f"MODEL gives values that are not finite at place {place} of its residual "
                f"stream: its weights are corrupt or overflow in {self.dtype}"
            )
        with self.stopwatch("eigenvectors"):
            basis, spectrum = principal_basis(moment.sum, self.widths[place], self.centred)
            self.spectrum = torch.cat([self.spectrum, spectrum.cpu().unsqueeze(0)])
        # Centring empties one direction.
        possible = min(self.widths[place], self.hidden_size - self.centred)
        if (rank := numerical_rank(self.spectrum[-1])) < possible:
            logger.warning(
                "at place %d the calibration signal has rank %d and %d directions are kept: some "
                "are arbitrary; use more or more varied calibration text",
                place,
                rank,
                self.widths[place],
            )
        return basis

    def _rotate_signals(self, neglected: tuple[Tensor, Tensor] | None = None) -> None:
        """Move the signals into the basis of the place where they are.

        Args:
            neglected: factors of the part of the rotation that the sliced model leaves out; the
                signals hold the columns they had before as well.

        """
        narrow = self.basis.to(self.dtype)
        if neglected is not None:
            down, up = (factor.to(self.dtype) for factor in neglected)
        with self.stopwatch("signals"):
            for index in range(len(self.signals)):
                signal = self.signals[index].to(self.device)
                rotated = signal[..., : self.hidden_size] @ narrow
                if neglected is not None:
                    rotated -= signal[..., self.hidden_size :] @ down @ up
                self.signals[index] = rotated

    def _fold_head(self) -> None:
        """Fold the final norm into the head, H·diag(g)·U, and its shift as a bias."""
        architecture = self.model.architecture
        names = dict(self.model.skeleton.named_parameters())
        path = architecture.final_norm
        leaves = [leaf for leaf in ("weight", "bias") if f"{path}.{leaf}" in names]
        scale, shift = self._norm(path, {f"{path}.{x}": self._read(f"{path}.{x}") for x in leaves})
        name, bias = f"{architecture.head}.weight", f"{architecture.head}.bias"
        table = self._read(name)
        with self.stopwatch("rotating weights"):
            narrow = None
            if self.widths[-1] < self.hidden_size:
                narrow = self.basis * (self.hidden_size / self.widths[-1]) ** 0.5

            def fold(rows: Tensor) -> Tensor:
                return rows * scale if narrow is None else rows * scale @ narrow

            self.writer.add(name, self._by_rows(table, fold))
            offset = self._wide(self._read(bias)) if bias in names else None
            if shift is not None:
                folded = self._by_rows(table, lambda rows: rows @ shift)
                offset = folded if offset is None else offset + folded
            if offset is not None:
                self.writer.add(bias, offset)

    def _by_rows(self, table: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """Change a matrix in float64, some rows at a time, into the checkpoint's dtype."""
        result = None
        for start in range(0, len(table), ROWS_PER_PRODUCT):
            rows = change(self._wide(table[start : start + ROWS_PER_PRODUCT]))
            if result is None:
                # A vector is a bias, still to be added to.
                kept = rows.dtype if rows.ndim == 1 else self.writer.dtype
                shape = (len(table), *rows.shape[1:])
                result = torch.empty(shape, dtype=kept, device=self.device)
            result[start : start + len(rows)] = rows
        assert result is not None  # noqa: S101 - a matrix has rows
        return result

    def _assign(self, layer: nn.Module, name: str, weight: Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        parameter = nn.Parameter(weight.to(self.device).to(self.dtype), requires_grad=False)
        setattr(layer.get_submodule(path), leaf, parameter)


def signal_columns(hidden_size: int, widths: list[int], rank_rule: RankRule | None) -> int:
    """Return the most columns that a calibration signal has between two places."""
    return hidden_size if rank_rule is None else hidden_size + max(widths)


def one_of_each_size(batches: list[Tensor]) -> list[Tensor]:
    """Return one batch of every number of windows."""
    return list({len(batch): batch for batch in batches}.values())


def _ignore(_index: int, _stream: Tensor) -> None:
    return


def _branches(layer: SlicedLayer, sublayer: Sublayer, contexts: Contexts, x: Tensor) -> Tensor:
    return layer.branches(sublayer, x, contexts[len(x)])


def _split(rows: Tensor, size: int) -> list[Tensor]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]
