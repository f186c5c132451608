"""The decoder layers of a dense model: read one ahead of the other, run sublayer by sublayer."""

import copy
import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from sliceserve.slicing.architectures import Sublayer
from sliceserve.slicing.dense import DenseModel
from sliceserve.slicing.errors import UserError
from sliceserve.slicing.modeling import branch_outputs
from sliceserve.slicing.moments import ROWS_PER_PRODUCT, numerical_rank

logger = logging.getLogger(__name__)


class DenseLayers:
    """The layers of a dense model on a device, of which the caller holds as many as it needs.

    Attributes:
        model: the dense model.
        centred: whether its norms are LayerNorms. They take the mean out of the stream; taken out
            of all that is written to it, the norms become RMSNorms (section 3.1).

    """

    def __init__(self, model: DenseModel, device: torch.device, dtype: torch.dtype) -> None:
        """Run layers on `device` in `dtype`."""
        self.model = model
        self.device = device
        self.dtype = dtype
        final_norm = model.skeleton.get_submodule(model.architecture.final_norm)
        self.centred = isinstance(final_norm, nn.LayerNorm)
        self._skeletons: Any = model.skeleton.get_submodule(model.architecture.layers)

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self._skeletons)

    def read(self, name: str) -> Tensor:
        """Read a tensor of the model on the CPU.

        Raises:
            UserError: there is a NaN or an infinity in it.

        """
        weight = self.model.read(name)
        if not weight.isfinite().all():
            raise UserError(f"MODEL holds values that are not finite in its tensor {name!r}")
        return weight

    def read_ahead(self, indices: Iterable[int]) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Give the weights of layers in this order, by their names in the layer.

        The next layer is read while the caller is busy with one; pinned if a GPU is to take it.
        """
        with ThreadPoolExecutor(1) as loader:
            ahead = None
            for index in indices:
                reading = loader.submit(self._read_layer, index)
                if ahead is not None:
                    yield ahead[0], ahead[1].result()
                ahead = index, reading
            if ahead is not None:
                yield ahead[0], ahead[1].result()

    def _read_layer(self, index: int) -> dict[str, Tensor]:
        prefix = f"{self.model.architecture.layers}.{index}"
        names = [name for name, _ in self._skeletons[index].named_parameters()]
        weights = {name: self.read(f"{prefix}.{name}") for name in names}
        if self.device.type == "cuda":
            return {name: weight.pin_memory() for name, weight in weights.items()}
        return weights

    def skeleton(self, index: int) -> nn.Module:
        """Return a layer of one's own, its parameters on the meta device."""
        layer: nn.Module = copy.deepcopy(self._skeletons[index])
        return layer

    def load(self, index: int, weights: dict[str, Tensor]) -> nn.Module:
        """Return the dense layer with its weights."""
        layer = self.skeleton(index)
        for name, weight in weights.items():
            self.assign(layer, name, weight)
        return layer

    def assign(self, module: nn.Module, name: str, weight: Tensor) -> None:
        """Give a module one of its parameters."""
        path, _, leaf = name.rpartition(".")
        parameter = nn.Parameter(weight.to(self.device).to(self.dtype), requires_grad=False)
        setattr(module.get_submodule(path), leaf, parameter)

    def advance(self, layer: nn.Module, sublayer: Sublayer, x: Tensor, context: Any) -> Tensor:
        """Move the dense stream past a sublayer: [windows, positions, hidden_size]."""
        outputs = branch_outputs(layer, self.model.architecture, sublayer, x, context)
        return self.centre(sum(outputs, start=x))

    def centre(self, stream: Tensor, dim: int = -1) -> Tensor:
        """Remove the mean over hidden_size where the norms are LayerNorms: they would do it."""
        return stream - stream.mean(dim, keepdim=True) if self.centred else stream

    def norm(self, path: str, weights: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Return a norm's scale g and shift, [hidden_size] in float64."""
        hidden_size = int(self.model.config.hidden_size)
        scale = torch.ones(hidden_size, dtype=torch.float64, device=self.device)
        if f"{path}.weight" in weights:
            scale = self.wide(weights[f"{path}.weight"])
        shift = weights.get(f"{path}.bias")
        return scale, None if shift is None else self.wide(shift)

    def final_norm(self) -> tuple[Tensor, Tensor | None]:
        """Return the scale and shift of the norm before the head, [hidden_size] in float64."""
        path = self.model.architecture.final_norm
        names = dict(self.model.skeleton.named_parameters())
        leaves = [f"{path}.{leaf}" for leaf in ("weight", "bias") if f"{path}.{leaf}" in names]
        return self.norm(path, {name: self.read(name) for name in leaves})

    def check_finite(self, moment: Tensor, place: int) -> None:
        """Check the second moment of the stream at a place.

        Raises:
            UserError: there is a NaN or an infinity in it.

        """
        if not moment.isfinite().all():
            raise UserError(
                f"MODEL gives values that are not finite at place {place} of its residual "
                f"stream: its weights are corrupt or overflow in {self.dtype}"
            )

    def warn_of_rank(self, spectrum: Tensor, width: int, place: int) -> None:
        """Warn where more directions are kept than the calibration signal has."""
        # Centring empties one direction.
        possible = min(width, len(spectrum) - self.centred)
        if (rank := numerical_rank(spectrum)) < possible:
            logger.warning(
                "at place %d the calibration signal has rank %d and %d directions are kept: some "
                "are arbitrary; use more or more varied calibration text",
                place,
                rank,
                width,
            )

    def wide(self, weight: Tensor) -> Tensor:
        """Return a weight on the device in float64."""
        return weight.to(self.device).to(torch.float64)

    def by_rows(
        self, table: Tensor, change: Callable[[Tensor], Tensor], dtype: torch.dtype
    ) -> Tensor:
        """Change a matrix in float64, some rows at a time, into the checkpoint's `dtype`."""
        result = None
        for start in range(0, len(table), ROWS_PER_PRODUCT):
            rows = change(self.wide(table[start : start + ROWS_PER_PRODUCT]))
            if result is None:
                # A vector is a bias, still to be added to.
                kept = rows.dtype if rows.ndim == 1 else dtype
                shape = (len(table), *rows.shape[1:])
                result = torch.empty(shape, dtype=kept, device=self.device)
            result[start : start + len(rows)] = rows
        assert result is not None  # noqa: S101 - a matrix has rows
        return result
