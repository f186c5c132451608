"""LoRA adapters on joined linears, which keep their rotations joined.

An adapter of a matrix adds x·Aᵀ·Bᵀ to x·Wᵀ. Where matrices are joined by rows, each adapter's
product goes to the columns of its matrix; where they are joined by columns, A is as wide as all of
them, and zero outside of its matrix's columns. Nothing is added to what a rotation computes. A norm
that waits until after the product divides what an adapter adds as well: both are linear in x.

vLLM adapts linears of its own classes only, by the name of their module; this has it find ours, and
call adapters by their names.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config.lora import LoRAConfig
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.lora import utils
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

from sliceserve.kernels.accumulate import accumulate
from sliceserve.server.joined import JoinedLinear, Part
from sliceserve.slicing.modeling import ROTATION


class AdaptedJoinedLinear(BaseLinearLayerWithLoRA):  # type: ignore[misc]  # vLLM is untyped here
    """A joined linear with the adapters that are in use, in vLLM's buffers for them."""

    def __init__(self, base_layer: JoinedLinear) -> None:
        """Wrap a linear; `create_lora_weights` makes the buffers."""
        super().__init__(base_layer)
        self.scaled = base_layer.scaled
        self.parts = _adaptable(base_layer)
        self.names = names_of(base_layer)

    def create_lora_weights(
        self,
        max_loras: int,
        lora_config: LoRAConfig,
        model_config: Any = None,  # noqa: ARG002 - vLLM names it
    ) -> None:
        """Make the buffers: of each part when joined by rows, else one for all of them."""
        self.lora_config = lora_config
        self.rank = lora_config.max_lora_rank
        outputs, inputs = self.base_layer.output_size, self.base_layer.input_size
        if self.base_layer.axis == 0:
            sizes, rank = [part.size for part in self.parts], self.rank
        else:
            sizes, rank = [outputs], self.rank * len(self.parts)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(
                max_loras, 1, *shape, dtype=lora_config.lora_dtype, device=self.device
            )

        self.n_slices, self.output_slices = len(sizes), tuple(sizes)
        self.lora_a_stacked = tuple(zeros(rank, inputs) for _ in sizes)
        self.lora_b_stacked = tuple(zeros(size, rank) for size in sizes)

    def set_lora(
        self,
        index: int,
        lora_a: Tensor | Sequence[Tensor | None],
        lora_b: Tensor | Sequence[Tensor | None],
    ) -> None:
        """Put an adapter in a place of the buffers.

        Args:
            index: the place.
            lora_a: of each name [rank, in], or of the only one; None where it is not adapted.
            lora_b: likewise, [out, rank]. To warm up vLLM gives zeros of other sizes.

        """
        self.reset_lora(index)
        pair = [[one] if isinstance(one, Tensor) else one for one in (lora_a, lora_b)]
        given = dict(zip(self.names, zip(*pair, strict=True), strict=False))
        offset = 0
        for number, part in enumerate(self.parts):
            a, b = given.get(part.name, (None, None))
            if a is not None and b is not None:
                self._put(index, number, offset, part, a, b)
            offset += part.span

    def _put(self, index: int, number: int, offset: int, part: Part, a: Tensor, b: Tensor) -> None:
        own = slice(part.start, part.start + part.size)
        if self.base_layer.axis == 0:
            a_place, b_place = (
                stacked[number][index, 0] for stacked in (self.lora_a_stacked, self.lora_b_stacked)
            )
            b = b[own]
        else:
            a = a[:, own]
            first = number * self.rank
            a_place = self.lora_a_stacked[0][index, 0, first:, offset : offset + part.size]
            b_place = self.lora_b_stacked[0][index, 0, :, first:]
        a_place[: a.shape[0], : a.shape[1]].copy_(a, non_blocking=True)
        b_place[: b.shape[0], : b.shape[1]].copy_(b, non_blocking=True)

    def _adapt(self, product: Tensor, x: Tensor) -> Tensor:
        """Add what the tokens' adapters make of x to a product, in place; return that."""
        self.punica_wrapper.add_lora_linear(
            product, x, self.lora_a_stacked, self.lora_b_stacked, 1.0, self.output_slices
        )
        return product

    def forward(self, x: Tensor) -> Tensor:
        """Multiply: [tokens, in of this rank] to [tokens, out of this rank]."""
        return self._adapt(self.base_layer(x), x)

    def summed(self, a: Tensor) -> Tensor:
        """Do what `JoinedLinear.summed` does."""
        summed: Tensor = tensor_model_parallel_all_reduce(self(a))
        return self.base_layer.with_biases(summed)  # type: ignore[no-any-return]

    def add_to(self, x: Tensor, a: Tensor) -> Tensor:
        """Do what `JoinedLinear.add_to` does."""
        if self.base_layer.adds_in_place and x.is_cuda:
            accumulate(x, a, self.base_layer.weight)
            return self.base_layer.with_biases(self._adapt(x, a))  # type: ignore[no-any-return]
        return x + self.summed(a)

    def finish_loading(self, factors: Tensor | float = 1.0) -> Tensor | float:
        """Do what `JoinedLinear.finish_loading` does."""
        return self.base_layer.finish_loading(factors)  # type: ignore[no-any-return]

    @classmethod
    def can_replace_layer(
        cls,
        source_layer: nn.Module,
        lora_config: LoRAConfig,  # noqa: ARG003 - vLLM names it
        packed_modules_list: list[str],  # noqa: ARG003
        model_config: Any = None,  # noqa: ARG003
    ) -> bool:
        """Whether vLLM is to wrap a linear in this class."""
        return isinstance(source_layer, JoinedLinear)


def _adaptable(linear: JoinedLinear) -> list[Part]:
    """Return the parts that can have adapters, which come before those of a rotation."""
    return [part for part in linear.parts if ROTATION not in part.name]


def names_of(linear: JoinedLinear) -> list[str]:
    """Return the matrices that can have adapters, by their paths in the layer."""
    return list(dict.fromkeys(part.name for part in _adaptable(linear)))


def adapt_joined(model: nn.Module) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Have vLLM find the joined linears of a model.

    Args:
        model: of which all layers are alike. A linear of one matrix has that matrix's last name.

    Returns:
        For vLLM, what a linear of several matrices is packed from, by the last links of names; and
        what is to be replaced in the names of an adapter's tensors.

    """
    if AdaptedJoinedLinear not in utils._all_lora_classes:
        utils._all_lora_classes = (*utils._all_lora_classes, AdaptedJoinedLinear)
    packed: dict[str, list[str]] = {}
    renamed: dict[str, str] = {}
    for path, module in model.named_modules():
        if not isinstance(module, JoinedLinear):
            continue
        *_, parent, name = path.split(".")
        paths = names_of(module)
        lasts = [one.rpartition(".")[2] for one in paths]
        if len(paths) > 1:
            packed[name] = lasts
        for one, last in zip(paths, lasts, strict=True):
            renamed[f".{one}.lora_"] = f".{parent}.{last}.lora_"
    return packed, renamed
