"""The slicing loop of SliceGPT (arXiv 2401.15024, section 3): fold, rotate and delete, in order.

Every place of the residual stream gets a basis U: the principal directions of the signal there,
taken with everything before it sliced already. Linears that read the stream become W·diag(g)·U,
those that write it UᵀW, and the stream itself moves from one place to the next by S = UᵀU′.
The head keeps its full width: the last writers and the last S lead back to all columns.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sliceserve.slicing.architectures import Sublayer
from sliceserve.slicing.dense import DenseModel
from sliceserve.slicing.errors import UserError
from sliceserve.slicing.modeling import ROTATION, SlicedLayer
from sliceserve.slicing.moments import SecondMoment, principal_basis
from sliceserve.slicing.weights import ShardWriter

TOKENS_PER_BATCH = 4096
ROWS_PER_PRODUCT = 16384


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
        writer: ShardWriter,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Prepare a run.

        Args:
            model: the dense model; weights are read layer by layer.
            widths: columns to keep at each place; the last is hidden_size.
            writer: takes the sliced weights as they are done.
            device: where layers run.
            dtype: of the forward pass; moments, bases and rotations are float64 throughout.

        """
        self.model = model
        self.widths = widths
        self.writer = writer
        self.device = device
        self.dtype = dtype
        self.signals: list[Tensor] = []
        self.basis = torch.empty(0)

    @torch.no_grad()
    def run(self, windows: Tensor, show_progress: bool = True) -> None:
        """Slice the model with calibration tokens [samples, sequence_length].

        Raises:
            UserError: the dense model gives values that are not finite.

        """
        architecture = self.model.architecture
        layers: Any = self.model.skeleton.get_submodule(architecture.layers)
        batches = list(_split(windows, max(1, TOKENS_PER_BATCH // windows.shape[1])))
        contexts = self._record_contexts(layers, batches)
        steps = len(layers) * len(architecture.sublayers) * len(batches)
        with tqdm(total=steps, disable=not show_progress, unit="batch") as bar:
            bar.set_description("slicing embedding")
            self._slice_embedding(batches)
            for index in range(len(layers)):
                bar.set_description(f"slicing layer {index + 1}/{len(layers)}")
                self._slice_layer(index, layers[index], contexts[index], bar.update)
                # The sliced layer is made of the dense one's modules: let go of its weights.
                layers[index] = nn.Identity()
        self._fold_head()

    def _read(self, name: str) -> Tensor:
        return self.model.read(name).to(self.device)

    def _record_contexts(
        self, layers: nn.ModuleList, batches: list[Tensor]
    ) -> list[dict[int, dict[str, Any]]]:
        """Record what the model hands every layer beside the stream, by batch size.

        Masks, positions and rotary embeddings come from Transformers' own forward, so that no
        architecture needs code for them here.
        """
        skeleton, norm = self.model.skeleton, self.model.architecture.final_norm
        real_layers, real_norm = list(layers), skeleton.get_submodule(norm)
        recorders = [_Recorder() for _ in real_layers]
        _replace(layers, recorders)
        skeleton.set_submodule(norm, nn.Identity())
        _move_buffers(skeleton, self.device)
        for size in {len(batch) for batch in batches}:
            shape = (size, batches[0].shape[1], self.widths[-1])
            stream = torch.zeros(shape, dtype=self.dtype, device=self.device)
            skeleton.base_model(inputs_embeds=stream, use_cache=False)  # type: ignore[operator]
        _replace(layers, real_layers)
        skeleton.set_submodule(norm, real_norm)
        return [recorder.contexts for recorder in recorders]

    def _slice_embedding(self, batches: list[Tensor]) -> None:
        """Slice the embedding table E to E·U and start the signals with it."""
        (path,) = self.model.architecture.embeddings
        table = self.model.read(f"{path}.weight")
        moment = SecondMoment(table.shape[1], self.device)
        for batch in batches:
            moment.add(table[batch].to(self.device))
        self.basis = self._principal_basis(moment, 0)
        narrow = _by_rows(table, self.device, self.writer.dtype, lambda rows: rows @ self.basis)
        self.writer.add(f"{path}.weight", narrow)
        self.signals = [
            (table[batch].to(self.device, torch.float64) @ self.basis).to(self.dtype).cpu()
            for batch in batches
        ]

    def _slice_layer(
        self,
        index: int,
        dense: nn.Module,
        contexts: dict[int, dict[str, Any]],
        advance: Callable[[], Any],
    ) -> None:
        """Slice one decoder layer, write it, and move the signals past it."""
        architecture = self.model.architecture
        prefix, step = f"{architecture.layers}.{index}", len(architecture.sublayers)
        norms = {f"{sublayer.norm}.weight" for sublayer in architecture.sublayers}
        weights = {
            name: self._read(f"{prefix}.{name}")
            for name, _ in dense.named_parameters()
            if name not in norms
        }
        widths = self.widths[index * step : (index + 1) * step + 1]
        eps = getattr(self.model.config, architecture.norm_eps)
        layer = SlicedLayer(dense, architecture, widths, self.widths[-1], eps).eval()
        for name, weight in weights.items():
            self._assign(layer, name, weight)
        for number, sublayer in enumerate(architecture.sublayers):
            scale = self._read(f"{prefix}.{sublayer.norm}.weight").double()
            scale *= (scale.numel() / widths[number]) ** 0.5
            for name in (f"{path}.weight" for path in sublayer.reads):
                weights[name] = (weights[name].double() * scale) @ self.basis
                self._assign(layer, name, weights[name])
            before = self.basis
            self._advance(
                partial(_branches, layer, sublayer, contexts),
                index * step + number + 1,
                advance,
            )
            for path in sublayer.writes:
                for name in (f"{path}.weight", f"{path}.bias"):
                    if name in weights:
                        weights[name] = self.basis.T @ weights[name].double()
            weights[f"{ROTATION}.{number}.weight"] = self.basis.T @ before
        for name, weight in weights.items():
            self.writer.add(f"{prefix}.{name}", weight)

    def _advance(
        self, branches: Callable[[Tensor], Tensor], place: int, advance: Callable[[], Any]
    ) -> None:
        """Move the signals to the next place of the stream and find the basis there.

        x·Uᵀ + Σ branch(norm(x)) has all hidden_size columns; its principal basis is the next U.
        """
        last = place == len(self.widths) - 1
        hidden_size = self.widths[-1]
        lift = self.basis.T.to(self.dtype)
        moment = SecondMoment(hidden_size, self.device)
        for index, signal in enumerate(self.signals):
            x = signal.to(self.device)
            wide = x @ lift + branches(x)
            if not last:
                moment.add(wide)
            self.signals[index] = wide.cpu()
            advance()
        if last:
            self.basis = torch.eye(hidden_size, dtype=torch.float64, device=self.device)
            return
        self.basis = self._principal_basis(moment, place)
        narrow = self.basis.to(self.dtype)
        for index, signal in enumerate(self.signals):
            self.signals[index] = (signal.to(self.device) @ narrow).cpu()

    def _principal_basis(self, moment: SecondMoment, place: int) -> Tensor:
        if not moment.sum.isfinite().all():
            raise UserError(
                f"MODEL gives values that are not finite at place {place} of its residual "
                f"stream: its weights are corrupt or overflow in {self.dtype}"
            )
        return principal_basis(moment.sum, self.widths[place])

    def _fold_head(self) -> None:
        """Fold the final norm into the head: H·diag(g), at full width."""
        architecture = self.model.architecture
        scale = self._read(f"{architecture.final_norm}.weight").double()
        name = f"{architecture.head}.weight"
        table = self.model.read(name)
        head = _by_rows(table, self.device, self.writer.dtype, lambda rows: rows * scale)
        self.writer.add(name, head)

    def _assign(self, layer: nn.Module, name: str, weight: Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        parameter = nn.Parameter(weight.to(self.dtype), requires_grad=False)
        setattr(layer.get_submodule(path), leaf, parameter)


def _branches(
    layer: SlicedLayer, sublayer: Sublayer, contexts: dict[int, dict[str, Any]], x: Tensor
) -> Tensor:
    return layer.branches(sublayer, x, contexts[len(x)])


def _split(rows: Tensor, size: int) -> tuple[Tensor, ...]:
    return tuple(rows[start : start + size] for start in range(0, len(rows), size))


class _Recorder(nn.Module):
    """Stands in for a decoder layer and keeps the keyword arguments it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.contexts: dict[int, dict[str, Any]] = {}

    def forward(self, hidden_states: Tensor, **context: Any) -> Tensor:
        self.contexts[len(hidden_states)] = context
        return hidden_states


def _replace(layers: nn.ModuleList, others: list[Any]) -> None:
    for index, other in enumerate(others):
        layers[index] = other


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    """Move what is real (rotary tables); parameters stay on the meta device."""
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, buffer.to(device), persistent=False)


def _by_rows(
    table: Tensor, device: torch.device, dtype: torch.dtype, change: Callable[[Tensor], Tensor]
) -> Tensor:
    """Change a vocabulary table in float64, a few rows at a time to bound the memory."""
    parts = (change(rows.to(device, torch.float64)) for rows in _split(table, ROWS_PER_PRODUCT))
    return torch.cat([part.to(dtype).cpu() for part in parts])
