"""One matrix product for several matrices of the checkpoint, sharded over tensor-parallel ranks.

Matrices that read the same input are stacked by rows, those whose outputs are summed side by side
by columns. So a rotation costs no product of its own: its factors are more rows, or columns, of
the products that a layer runs anyway. The matrix may be of eight bits
(`sliceserve.server.eight_bits`) or of four (`sliceserve.server.packed`).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from vllm import _custom_ops as ops
from vllm import envs
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.utils import set_weight_attrs

from sliceserve.kernels.accumulate import accumulate
from sliceserve.kernels.rounded import LARGEST
from sliceserve.server.eight_bits import (
    add_balanced_columns,
    add_columns,
    round_rows,
    scaled_product,
)
from sliceserve.server.packed import PACKED, TILE, group_size, pack

# Elements; a shard of a rotation starts at a multiple, and a low-rank one is filled up to one. In
# eight bits it is 16 bytes; what does not divide by it vLLM copies, or leaves to slower kernels.
ALIGNMENT = 16


class Part(NamedTuple):
    """The shard of one matrix of the checkpoint that this rank holds.

    Attributes:
        name: of the matrix, relative to the layer and without `.weight`.
        start: its first row (or column).
        size: how many.
        zeros: that follow them, in the joined matrix only.

    """

    name: str
    start: int
    size: int
    zeros: int = 0

    @property
    def span(self) -> int:
        """How many rows or columns of the joined matrix are the part's."""
        return self.size + self.zeros

    def share(self, matrix: Tensor, axis: int) -> Tensor:
        """Return this rank's share of a whole matrix, and the zeros after it along the axis."""
        widths = (0, self.zeros) if axis == 1 else (0, 0, 0, self.zeros)
        return pad(matrix.narrow(axis, self.start, self.size), widths)


def shard(length: int) -> tuple[int, int]:
    """Return start and size of this rank's share of an axis that need not divide evenly."""
    ranks, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
    step = -(-length // (ranks * ALIGNMENT)) * ALIGNMENT
    start = min(length, rank * step)
    return start, min(length, start + step) - start


def padding(size: int, packs: bool) -> int:
    """Return the zeros that fill a rotation's share up to what products take at once.

    Args:
        size: of the share.
        packs: whether it becomes a part of a matrix of four bits.

    """
    return -size % (TILE if packs else ALIGNMENT)


class JoinedLinear(LinearBase):  # type: ignore[misc]  # vLLM is untyped here
    """y = x·Wᵀ (+ b) with W joined from parts of matrices [out, in] along one axis."""

    def __init__(
        self,
        parts: list[Part],
        axis: int,
        other: int,
        biased: frozenset[str],
        quant_config: Any,
        prefix: str,
    ) -> None:
        """Make the weight, to be filled by `load`.

        Args:
            parts: in the order in which they are joined.
            axis: 0 joins outputs (a column-parallel linear), 1 inputs (a row-parallel one).
            other: the length of the axis that all parts share.
            biased: names of the parts with a bias, which is as long as a matrix's outputs.
            quant_config: of vLLM, one that `takes_rotations`, or None.
            prefix: the module's path.

        """
        joined = sum(part.span for part in parts)
        sizes = (joined, other) if axis == 0 else (other, joined)
        super().__init__(
            input_size=sizes[1], output_size=sizes[0], quant_config=quant_config, prefix=prefix
        )
        self.parts = parts
        self.axis = axis
        self.biased = biased
        self.unrounded: dict[int, Tensor] = {}
        self.quant_method.create_weights(
            self,
            input_size_per_partition=sizes[1],
            output_partition_sizes=[sizes[0]],
            input_size=sizes[1],
            output_size=sizes[0],
            params_dtype=self.params_dtype,
            weight_loader=self.copy_part,
        )
        # vLLM multiplies otherwise where no answer may depend on the batch.
        self.adds_in_place = (
            quant_config is None
            and get_tensor_model_parallel_world_size() == 1
            and not envs.VLLM_BATCH_INVARIANT
        )
        self.scaled = scaled_product(self)
        self.group = group_size(self)
        if axis == 0 and biased:
            bias = nn.Parameter(torch.zeros(joined, dtype=self.params_dtype), requires_grad=False)
            # vLLM 0.32 waits for as many elements before it quantises.
            filled = sum(part.size for part in parts if part.name in biased)
            loading = {"weight_loader": self.copy_part, "weight_loader_numel": filled}
            set_weight_attrs(bias, loading)
            self.register_parameter("bias", bias)
        else:
            self.register_parameter("bias", None)
        # Outputs of several ranks are summed: their biases are added once, after that.
        self.summed_biases = nn.ParameterDict(
            {
                name.replace(".", "/"): nn.Parameter(
                    torch.zeros(other, dtype=self.params_dtype), requires_grad=False
                )
                for name in sorted(biased if axis == 1 else ())
            }
        )

    def load(self, name: str, tensor: Tensor) -> str:
        """Copy this rank's part of a tensor of the checkpoint; return the parameter's name.

        Args:
            name: of the tensor, relative to the layer.
            tensor: the whole of it.

        """
        path, _, kind = name.rpartition(".")
        if kind == "bias" and self.axis == 1:
            key = path.replace(".", "/")
            bias: Any = self.summed_biases[key]
            # vLLM sets another while it loads weights anew.
            getattr(bias, "weight_loader", default_weight_loader)(bias, tensor)
            return f"summed_biases.{key}"
        if kind == "weight_shape":
            self.weight_shape.data.copy_(torch.tensor([self.output_size, self.input_size]))
            return kind
        if kind == "weight":
            for part in self.parts:
                # Of a matrix of four bits only rotations were stored as they were.
                if part.name == path and (part.zeros or self.group is not None):
                    tensor = part.share(tensor, self.axis)
            if self.group is not None:
                packed = pack(tensor.to(self.params_dtype), self.group) if tensor.numel() else {}
                for packed_kind, source in packed.items():
                    self.load(f"{path}.{packed_kind}", source)
                return "weight_packed"
        # vLLM wraps the loader of a matrix that it quantises when all of it has come.
        parameter: Any = getattr(self, kind)
        parameter.weight_loader(parameter, tensor, name)
        return kind

    def copy_part(self, param: Tensor, tensor: Tensor, name: str) -> None:
        """Copy this rank's part of a tensor into a parameter; the others are arguments of `load`.

        vLLM calls it, and goes by the name of the first argument.

        Raises:
            ValueError: the rank's part of four-bit weights is not of whole groups.

        """
        path, _, kind = name.rpartition(".")
        if kind == "weight_scale" and self.axis == 1 and self.group is None:
            param.data.copy_(tensor)
            return
        offset, unit = 0, self._unit(kind)
        for part in self.parts:
            if kind == "bias" and part.name not in self.biased:
                # A running engine whose weights are loaded anew has them in new memory.
                param.data.narrow(0, offset, part.span).zero_()
            if part.name == path:
                # As long as the part in the joined matrix: it is the part, and not the whole.
                start = 0 if tensor.shape[self.axis] * unit == part.span else part.start
                if start % unit or part.span % unit:
                    raise ValueError(
                        f"tensor parallelism gives a rank {part.size} inputs of {path} from "
                        f"{part.start}, and groups of {self.group} stay whole"
                    )
                source = tensor.narrow(self.axis, start // unit, part.span // unit)
                if kind == "weight" and param.dtype in LARGEST and tensor.dtype != param.dtype:
                    # A loader may use the tensor's memory again.
                    self.unrounded[offset] = source.clone()
                else:
                    place = param.data.narrow(self.axis, offset // unit, part.span // unit)
                    place.copy_(source)
            offset += part.span

    def _unit(self, kind: str) -> int:
        """Return how many of the axis that is joined are one element of a parameter."""
        if self.axis == 0 or self.group is None:
            return 1
        return {"weight_packed": PACKED, "weight_scale": self.group}[kind]

    def finish_loading(self, factors: Tensor | float = 1.0) -> Tensor | float:
        """Round what came unrounded into a matrix that was stored in eight bits: a rotation.

        Args:
            factors: what each row of the rotation is to be multiplied by, [rank] or one for all.

        Returns:
            What each column of the rotation was divided by, alike.

        """
        divisors: Tensor | float = 1.0
        for offset, source in self.unrounded.items():
            if not source.numel():
                continue
            added = source.to(self.weight.device)
            place = self.weight.data.narrow(self.axis, offset, source.shape[self.axis])
            if self.axis == 0:
                rounded, scales = round_rows(added, self.weight.dtype)
                share = self.weight_scale.data.narrow(0, offset, len(source))
                share.copy_((scales.flatten() * factors)[:, None])
            elif self.weight.dtype == torch.int8:
                stored = self.weight.data.narrow(1, 0, offset)
                weight, rounded, scales, divisors = add_balanced_columns(
                    stored, self.weight_scale.data, added
                )
                stored.copy_(weight)
                self.weight_scale.data.copy_(scales)
            else:
                stored = self.weight.data.narrow(1, 0, offset)
                weight, rounded, scales = add_columns(stored, self.weight_scale.data, added)
                stored.copy_(weight)
                self.weight_scale.data.copy_(scales)
            place.copy_(rounded)
        self.unrounded.clear()
        return divisors

    def forward(self, x: Tensor) -> Tensor:
        """Multiply: [tokens, in of this rank] to [tokens, out of this rank]."""
        product: Tensor = self.quant_method.apply(self, x, self.bias)
        return product

    def summed(self, a: Tensor) -> Tensor:
        """Return a·Wᵀ summed over the ranks, with biases: [tokens, out]."""
        summed: Tensor = tensor_model_parallel_all_reduce(self(a))
        return self.with_biases(summed)

    def adds_into(self, x: Tensor) -> bool:
        """Whether what is added to a stream is added where that lies."""
        return self.adds_in_place and x.is_cuda

    def add_to(self, x: Tensor, a: Tensor) -> Tensor:
        """Return x [tokens, out] with `summed(a)` added; x may be changed."""
        if self.adds_into(x):
            accumulate(x, a, self.weight)
            return self.with_biases(x)
        return x + self.summed(a)

    def add_rounded_to(self, x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
        """Return x [tokens, out] with (q·scale)·Wᵀ added, summed over the ranks, with biases.

        Args:
            x: the residual stream.
            q: what is multiplied, [tokens, in] in the weights' eight bits.
            scale: of each token, [tokens, 1].

        """
        product = self.rounded_product(q, scale, x.dtype)
        return self.with_biases(x + tensor_model_parallel_all_reduce(product))

    def rounded_product(self, q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Return (q·scale)·Wᵀ of this rank in a dtype, [tokens, out]; q as in `add_rounded_to`."""
        product: Tensor
        if q.dtype == torch.int8:
            product = ops.cutlass_scaled_mm(
                q, self.weight, scale_a=scale, scale_b=self.weight_scale, out_dtype=dtype
            )
        else:
            product = self.scaled.apply_scaled_mm(
                A=q,
                B=self.weight,
                out_dtype=dtype,
                As=scale,
                Bs=self.weight_scale,
                bias=None,
                output_shape=[len(q), self.output_size],
            )
        return product

    def with_biases(self, x: Tensor) -> Tensor:
        """Add the biases of what was summed over the ranks, [tokens, out]."""
        for bias in self.summed_biases.values():
            x = x + bias
        return x
