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
        final_norm = model.skeleton.get_submodule(model.architecture.final_norm)
        self.centred = isinstance(final_norm, nn.LayerNorm)

    @torch.no_grad()
    def run(self, windows: Tensor, show_progress: bool = True) -> None:
        """Slice the model with calibration tokens [samples, sequence_length].

        Raises:
            UserError: the dense model gives values that are not finite.

        """
        architecture = self.model.architecture
        layers: Any = self.model.skeleton.get_submodule(architecture.layers)
        batches = list(_split(windows, max(1, TOKENS_PER_BATCH // windows.shape[1])))
        steps = len(layers) * len(architecture.sublayers) * len(batches)
        with tqdm(total=steps, disable=not show_progress, unit="batch") as bar:
            bar.set_description("slicing embedding")
            contexts = self._start(layers, batches)
            self._slice_embedding()
            for index in range(len(layers)):
                bar.set_description(f"slicing layer {index + 1}/{len(layers)}")
                self._slice_layer(index, layers[index], contexts[index], bar.update)
                # The sliced layer is made of the dense one's modules: let go of its weights.
                layers[index] = nn.Identity()
        self._fold_head()

    def _read_on_cpu(self, name: str) -> Tensor:
        weight = self.model.read(name)
        if not weight.isfinite().all():
            raise UserError(f"MODEL holds values that are not finite in its tensor {name!r}")
        return weight

    def _read(self, name: str) -> Tensor:
        return self._read_on_cpu(name).to(self.device)

    def _read_norm(self, path: str) -> tuple[Tensor, Tensor | None]:
        """Read a norm's scale g and shift, [hidden_size] in float64."""
        names = dict(self.model.skeleton.get_submodule(path).named_parameters())
        scale = torch.ones(self.widths[-1], dtype=torch.float64, device=self.device)
        if "weight" in names:
            scale = self._read(f"{path}.weight").double()
        return scale, self._read(f"{path}.bias").double() if "bias" in names else None

    def _centre(self, stream: Tensor, dim: int = -1) -> Tensor:
        """Remove the mean over hidden_size where the norms are LayerNorms: they would do it.

        What is left is the stream of a model with RMSNorms that computes the same (section 3.1).
        """
        return stream - stream.mean(dim, keepdim=True) if self.centred else stream

    def _start(
        self, layers: nn.ModuleList, batches: list[Tensor]
    ) -> list[dict[int, dict[str, Any]]]:
        """Start the signals with the embedded tokens, at full width.

        Embeddings, masks, positions and rotary tables come from Transformers' own forward, so that
        no architecture needs code for them here.

        Returns:
            What the model hands every layer beside the stream, by batch size.

        """
        skeleton, architecture = self.model.skeleton, self.model.architecture
        real_layers, real_norm = list(layers), skeleton.get_submodule(architecture.final_norm)
        recorders = [_Recorder() for _ in real_layers]
        _replace(layers, recorders)
        skeleton.set_submodule(architecture.final_norm, nn.Identity())
        _move_buffers(skeleton, self.device)
        for path in architecture.tables:
            self._assign(skeleton, f"{path}.weight", self._read(f"{path}.weight"))
        for batch in batches:
            skeleton.base_model(input_ids=batch.to(self.device), use_cache=False)  # type: ignore[operator]
            self.signals.append(self._centre(recorders[0].stream).cpu())
        for path in architecture.tables:
            skeleton.get_submodule(path).to("meta")
        _replace(layers, real_layers)
        skeleton.set_submodule(architecture.final_norm, real_norm)
        return [recorder.contexts for recorder in recorders]

    def _slice_embedding(self) -> None:
        """Slice the embedding tables E to E·U and the signals with them."""
        moment = SecondMoment(self.widths[-1], self.device)
        for signal in self.signals:
            moment.add(signal.to(self.device))
        self._rotate_signals(moment, 0)
        for path in self.model.architecture.tables:
            table = self.model.read(f"{path}.weight")
            narrow = _by_rows(
                table, self.device, self.writer.dtype, lambda rows: self._centre(rows) @ self.basis
            )
            self.writer.add(f"{path}.weight", narrow)

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
        paths = [sublayer.norm for sublayer in architecture.sublayers]
        norms = [self._read_norm(f"{prefix}.{path}") for path in paths]
        folded = tuple(f"{path}." for path in paths)
        weights = {
            name: self._read(f"{prefix}.{name}")
            for name, _ in dense.named_parameters()
            if not name.startswith(folded)
        }
        widths = self.widths[index * step : (index + 1) * step + 1]
        eps = architecture.epsilon(self.model.config)
        layer = SlicedLayer(dense, architecture, widths, self.widths[-1], eps).eval()
        for name, weight in weights.items():
            self._assign(layer, name, weight)
        for number, sublayer in enumerate(architecture.sublayers):
            scale, shift = norms[number]
            scale = scale * (self.widths[-1] / widths[number]) ** 0.5
            for path in sublayer.reads:
                weight, bias = weights[f"{path}.weight"].double(), f"{path}.bias"
                weights[f"{path}.weight"] = (weight * scale) @ self.basis
                if shift is not None:
                    weights[bias] = weights.get(bias, 0) + weight @ shift
                for name in {f"{path}.weight", bias} & weights.keys():
                    self._assign(layer, name, weights[name])
            before = self.basis
            self._advance(
                partial(_branches, layer, sublayer, contexts),
                index * step + number + 1,
                advance,
            )
            for path in sublayer.writes:
                for name in {f"{path}.weight", f"{path}.bias"} & weights.keys():
                    weights[name] = self.basis.T @ self._centre(weights[name].double(), dim=0)
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
            wide = self._centre(x @ lift + branches(x))
            if not last:
                moment.add(wide)
            self.signals[index] = wide.cpu()
            advance()
        if last:
            self.basis = torch.eye(hidden_size, dtype=torch.float64, device=self.device)
            return
        self._rotate_signals(moment, place)

    def _rotate_signals(self, moment: SecondMoment, place: int) -> None:
        """Find the basis of a place from the moment there, and move the signals into it."""
        if not moment.sum.isfinite().all():
            raise UserError(
                f"MODEL gives values that are not finite at place {place} of its residual "
                f"stream: its weights are corrupt or overflow in {self.dtype}"
            )
        self.basis = principal_basis(moment.sum, self.widths[place], self.centred)
        narrow = self.basis.to(self.dtype)
        for index, signal in enumerate(self.signals):
            self.signals[index] = (signal.to(self.device) @ narrow).cpu()

    def _fold_head(self) -> None:
        """Fold the final norm into the head: H·diag(g) at full width, and its shift as a bias."""
        architecture = self.model.architecture
        scale, shift = self._read_norm(architecture.final_norm)
        name, bias = f"{architecture.head}.weight", f"{architecture.head}.bias"
        table = self._read_on_cpu(name)
        dtype = self.writer.dtype
        self.writer.add(name, _by_rows(table, self.device, dtype, lambda rows: rows * scale))
        has_bias = bias in dict(self.model.skeleton.named_parameters())
        offset = self.model.read(bias).double() if has_bias else 0
        if shift is not None:
            offset = offset + _by_rows(table, self.device, torch.float64, lambda rows: rows @ shift)
        if isinstance(offset, Tensor):
            self.writer.add(bias, offset)

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
        self.stream = torch.empty(0)

    def forward(self, hidden_states: Tensor, **context: Any) -> Tensor:
        self.contexts[len(hidden_states)] = context
        self.stream = hidden_states
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
