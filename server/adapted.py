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
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.platforms import current_platform

from sliceserve.kernels.accumulate import accumulate
from sliceserve.kernels.rounded import rounded
from sliceserve.server.joined import JoinedLinear, Part
from sliceserve.slicing.modeling import ROTATION

# Of vLLM's own models, whose names `--lora-target-modules` may have too.
PACKS = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


class AdaptedJoinedLinear(BaseLayerWithLoRA):  # type: ignore[misc]  # vLLM is untyped here
    """A joined linear with the adapters that are in use, in vLLM's buffers for them."""

    def __init__(self, base_layer: JoinedLinear) -> None:
        """Wrap a linear; `create_lora_weights` makes the buffers."""
        super().__init__()
        self.base_layer = base_layer
        # Adapters read what is not rounded: `add_to` rounds that, and not the layer.
        self.scaled = None
        self.parts = _adaptable(base_layer)
        self.names = names_of(base_layer)

    def create_lora_weights(
        self,
        max_loras: int,
        lora_config: LoRAConfig,
        model_config: Any = None,  # noqa: ARG002 - vLLM names it
    ) -> None:
        """Make the buffers: of each part when joined by rows, else one for all of them."""
        targets = lora_config.target_modules
        self.asked_for = [one for one in self.names if targets is None or _is_among(one, targets)]
        self.rank = lora_config.max_lora_rank
        outputs, inputs = self.base_layer.output_size, self.base_layer.input_size
        if self.base_layer.axis == 0:
            sizes, rank = [part.size for part in self.parts], self.rank
        else:
            sizes, rank = [outputs], self.rank * len(self.parts)

        dtype, device = lora_config.lora_dtype, current_platform.device_type

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(max_loras, 1, *shape, dtype=dtype, device=device)

        self.n_slices, self.output_slices = len(sizes), tuple(sizes)
        self.lora_a_stacked = tuple(zeros(rank, inputs) for _ in sizes)
        self.lora_b_stacked = tuple(zeros(size, rank) for size in sizes)

    @property
    def weight(self) -> Tensor:
        """The joined matrix."""
        return self.base_layer.weight  # type: ignore[no-any-return]

    def reset_lora(self, index: int) -> None:
        """Empty a place of the buffers."""
        for stacked in (*self.lora_a_stacked, *self.lora_b_stacked):
            stacked[index] = 0

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
            if a is not None and b is not None and part.name in self.asked_for:
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
            # A factor that is too large fits neither, as in vLLM's own linears.
            rows = slice(first, first + self.rank)
            a_place = self.lora_a_stacked[0][index, 0, rows, offset : offset + part.size]
            b_place = self.lora_b_stacked[0][index, 0, :, rows]
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
        return self.base_layer.with_biases(summed)

    def add_to(self, x: Tensor, a: Tensor) -> Tensor:
        """Do what `JoinedLinear.add_to` does."""
        base: JoinedLinear = self.base_layer
        if base.adds_into(x):
            accumulate(x, a, base.weight)
            return base.with_biases(self._adapt(x, a))
        if base.scaled is not None and x.is_cuda:
            q, scale = rounded(a, a[:, :0], None, False, base.weight.dtype)
            product = self._adapt(base.rounded_product(q, scale, x.dtype), a)
            return base.with_biases(x + tensor_model_parallel_all_reduce(product))
        return x + self.summed(a)

    def finish_loading(self, factors: Tensor | float = 1.0) -> Tensor | float:
        """Do what `JoinedLinear.finish_loading` does."""
        return self.base_layer.finish_loading(factors)

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


def _is_among(path: str, targets: list[str]) -> bool:
    """Whether a matrix, or what vLLM would have stacked it in, is asked for by its last name."""
    last = path.rpartition(".")[2]
    return last in targets or any(last in PACKS[name] for name in targets if name in PACKS)


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
            # Who asks for what vLLM would have stacked asks for the linear that it is in.
            stacked = {whole: parts for whole, parts in PACKS.items() if {*parts} <= {*lasts}}
            packed |= {whole: [*parts, name] for whole, parts in stacked.items()}
        for one, last in zip(paths, lasts, strict=True):
            renamed[f".{one}.lora_"] = f".{parent}.{last}.lora_"
    return packed, renamed
