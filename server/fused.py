"""A sliced decoder layer with its rotations fused into its linears: two products a sublayer.

With h = norm(x), a the branches' outputs and [a ‖ b] a concatenation, a sublayer is, for

- a whole rotation S: x ← [a ‖ x]·[W_o ; S];
- a low-rank one, S = I + A·B: [· ‖ u] = h·[W_in ‖ A], x ← x + [a ‖ ρu]·[W_o ; B], where ρ is the
  root mean square by which the norm divided x;
- none: x ← x + a·W_o.

On a GPU the division by ρ of a gated MLP, and of attention like Llama's, waits until after the
product that reads (`kernels.gated`, `kernels.placed`): there u = x·A is what the rotation goes on
with. What is added to x is added where x lies (`kernels.accumulate`). With quantised weights no
norm waits. In fp8 the compiler makes one kernel of the addition, the norm and its rounding. Where
vLLM multiplies eight bits by CUTLASS with a scale a token, `kernels.rounded` makes one of what
remains.

The columns of x (or of u) are sharded over tensor-parallel ranks as those of a are, so that one
all-reduce sums both. Where it can, attention writes into the matrix [a ‖ ·] itself
(`server.roomy`).
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm import envs
from vllm.config import VllmConfig
from vllm.distributed import (
    divide,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.model_executor.layers.activation import get_act_and_mul_fn
from vllm.platforms import current_platform

from sliceserve.kernels.gated import gated
from sliceserve.kernels.rounded import rounded
from sliceserve.server.adapted import names_of
from sliceserve.server.joined import JoinedLinear, Part, padding, shard
from sliceserve.server.layers import LayerBuilder, Shapes, add_module, replace, sliced_norm
from sliceserve.server.packed import group_size
from sliceserve.server.placing import PlacingAttention, can_place, split_at_placing
from sliceserve.server.roomy import RoomyAttention, can_make_room
from sliceserve.server.taking import probe_linear
from sliceserve.slicing.architectures import Architecture, Sublayer
from sliceserve.slicing.modeling import ROTATION

Branch = tuple[str, ...]


def _passed(x: Tensor) -> tuple[Tensor, None]:
    """Stand in attention for a linear whose product the layer has computed, or will."""
    return x, None


class FusedDecoderLayer(nn.Module):
    """One decoder layer, described by its architecture, on a stream of changing width."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        architecture: Architecture,
        widths: list[int],
        ranks: list[int | None],
        shapes: Shapes,
        prefix: str,
    ) -> None:
        """Make the layer; the arguments are those of `SlicedDecoderLayer`."""
        super().__init__()
        config = vllm_config.model_config.hf_config
        eps = architecture.epsilon(config)
        builder = LayerBuilder(vllm_config, architecture, shapes, prefix)
        self.architecture, self.ranks = architecture, ranks
        self.gates: list[bool] = []
        self.late_norms: list[bool] = []
        self.places: list[bool] = []
        self.joined_reads, self.joined_writes = nn.ModuleDict(), nn.ModuleDict()
        self.read_names: list[str] = []
        self.write_names: list[str] = []
        self.input_sizes: list[list[int]] = []
        self.own_columns: list[tuple[int, int]] = []  # of a whole rotation those of the stream
        self.joins: list[bool] = []
        packs = group_size(probe_linear(builder.quant_config, prefix)) is not None
        for index, (sublayer, rank) in enumerate(zip(architecture.sublayers, ranks, strict=True)):
            width, next_width = widths[index : index + 2]
            add_module(self, sublayer.norm, sliced_norm(width, config.hidden_size, eps))
            branches = [self._add_branch(builder, sublayer, path) for path in sublayer.branches]
            start, size = shard(width if rank is None else rank)
            zeros = padding(size, packs) if rank else 0
            self.own_columns.append((start, size + zeros))
            reads = [parts for parts, _ in branches]
            writes = [part for _, part in branches]
            rotation = f"{ROTATION}.{index}"
            if rank is None:
                writes.append(Part(rotation, start, size))
            elif rank:
                reads.append([Part(f"{rotation}.down", start, size, zeros)])
                writes.append(Part(f"{rotation}.up", start, size, zeros))
            room = sum(part.span for part in writes[1:])
            gates = self._is_gated_mlp(builder, sublayer)
            # In float16 the product could overflow; what rounds a token's row norms it on the way.
            plain = builder.quant_config is None and builder.dtype != torch.float16
            # It sums a row in an order that depends on how many there are.
            plain = plain and not envs.VLLM_BATCH_INVARIANT
            late = rank is not None and plain and fuses_here()
            normed = not late or any(map(builder.has_bias, sublayer.reads))
            places = fuses_here() and self._place(vllm_config, sublayer, room, normed)
            self.joins.append(not places and not self._make_room(vllm_config, sublayer, room))
            self.gates.append(gates)
            self.late_norms.append(late and (gates or (places and not normed)))
            self.places.append(places)
            self.input_sizes.append([sum(part.span for part in parts) for parts in reads])
            joined = [part for parts in reads for part in parts]
            self.read_names.append(self._join(builder, joined, 0, width))
            self.write_names.append(self._join(builder, writes, 1, next_width))

    def _join(self, builder: LayerBuilder, parts: list[Part], axis: int, other: int) -> str:
        biased = frozenset(part.name for part in parts if builder.has_bias(part.name))
        kind, made = [("reads", self.joined_reads), ("writes", self.joined_writes)][axis]
        prefix = f"{builder.prefix}.joined_{kind}.{len(made)}"
        linear = JoinedLinear(parts, axis, other, biased, builder.quant_config, prefix)
        # By the last link of a linear's name vLLM knows its adapters.
        paths = names_of(linear)
        name = paths[0].rpartition(".")[2] if len(paths) == 1 else f"{kind}_{len(made)}"
        made[name] = linear
        return name

    def joined(self, index: int) -> tuple[Any, Any]:
        """Return the linears with which a sublayer reads and writes the stream."""
        reads, writes = self.read_names[index], self.write_names[index]
        return self.joined_reads[reads], self.joined_writes[writes]

    def _add_branch(
        self, builder: LayerBuilder, sublayer: Sublayer, branch: Branch
    ) -> tuple[list[Part], Part]:
        """Add a branch's modules; return the parts that it reads with and that it writes with."""
        if branch == (self.architecture.attention,):
            attention: Any = builder.attention(sublayer)
            for name in ("qkv_proj", "o_proj"):
                replace(attention, name, _passed)
            add_module(self, self.architecture.attention, attention)
            return _attention_parts(attention, *linears_of(sublayer, branch))
        reads, write = linears_of(sublayer, branch)
        width = builder.shapes[f"{write}.weight"][1]
        size = divide(width, get_tensor_model_parallel_world_size())
        start = size * get_tensor_model_parallel_rank()
        if len(branch) > 1:
            (read,) = reads
            for path in branch[1:-1]:
                add_module(self, path, builder.activation())
            return [Part(read, start, size)], Part(write, start, size)
        add_module(self, branch[0], get_act_and_mul_fn(builder.config.hidden_act))
        # Gate and up are two matrices, or the halves of one.
        starts = [start, start] if len(reads) > 1 else [start, width + start]
        halves = [
            Part(name, first, size)
            for name, first in zip(reads * (3 - len(reads)), starts, strict=True)
        ]
        return halves, Part(write, start, size)

    def _make_room(self, vllm_config: VllmConfig, sublayer: Sublayer, room: int) -> bool:
        """Have attention leave room for what is joined with its output; return whether it does."""
        path = self.architecture.attention
        if not room or vllm_config.quant_config is not None or sublayer.branches[0] != (path,):
            return False
        module: Any = self.get_submodule(path)
        if can_make_room(module.attn, room, vllm_config):
            module.attn = RoomyAttention(module.attn, room)
            return True
        return False

    def _place(self, vllm_config: VllmConfig, sublayer: Sublayer, room: int, normed: bool) -> bool:
        """Have attention take the joined product as it is; return whether it does."""
        path = self.architecture.attention
        if sublayer.branches != ((path,),):
            return False
        module: Any = self.get_submodule(path)
        if not can_place(module, room, vllm_config):
            return False
        norm: Any = self.get_submodule(sublayer.norm)
        module.attn = PlacingAttention(module, room, norm.variance_epsilon, normed)
        split_at_placing(vllm_config.compilation_config)
        return True

    def _is_gated_mlp(self, builder: LayerBuilder, sublayer: Sublayer) -> bool:
        """Whether a sublayer is one MLP that computes silu(gate)·up, without biases."""
        (branch, *more) = sublayer.branches
        return (
            not more
            and len(branch) == 1
            and branch != (self.architecture.attention,)
            and builder.config.hidden_act == "silu"
            and not any(builder.has_bias(path) for path in sublayer.reads)
        )

    def finish_loading(self) -> None:
        """Round rotations that came into matrices of eight bits."""
        for index in range(len(self.ranks)):
            reads, writes = self.joined(index)
            reads.finish_loading(writes.finish_loading())

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """Run the layer: [tokens, widths[0]] to [tokens, widths[-1]]; the input may be changed."""
        for index, sublayer in enumerate(self.architecture.sublayers):
            hidden_states = self._run_sublayer(index, sublayer, positions, hidden_states)
        return hidden_states

    def _run_sublayer(self, index: int, sublayer: Sublayer, positions: Tensor, x: Tensor) -> Tensor:
        norm: Any = self.get_submodule(sublayer.norm)
        rank, (start, size) = self.ranks[index], self.own_columns[index]
        reads, writes = self.joined(index)
        projected = reads(x if self.late_norms[index] else norm(x))
        if self.places[index]:
            return self._write_placed(index, positions, x, projected)
        if self.late_norms[index]:
            joined = gated(x, projected, size if rank else 0, norm.variance_epsilon)
            moved: Tensor = writes.add_to(x, joined)
            return moved
        rounds = rank is not None and x.is_cuda and writes.scaled is not None
        inputs = torch.split(projected, self.input_sizes[index], dim=-1)
        if rounds and self.gates[index]:
            columns, divisor = (inputs[1], _divisor(norm, x)) if rank else (inputs[0][:, :0], None)
            q, scale = rounded(inputs[0], columns, divisor, True, writes.weight.dtype)
            activated: Tensor = writes.add_rounded_to(x, q, scale)
            return activated
        # Bound to a name before attention splits the graph: vLLM compiles equal layers once only if
        # what crosses attention is not named after an operation, as an element of a tuple is.
        beside = None
        if rank is None and size:
            beside = x[..., start : start + size]
        elif rank and size:
            beside = inputs[-1] * _divisor(norm, x).to(x.dtype)
        outputs = [
            self._run(branch, positions, y)
            for branch, y in zip(sublayer.branches, inputs, strict=False)
        ]
        if rounds:
            branches = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
            columns = branches[:, :0] if beside is None else beside
            q, scale = rounded(branches, columns, None, False, writes.weight.dtype)
            added: Tensor = writes.add_rounded_to(x, q, scale)
            return added
        if beside is not None:
            outputs.append(beside)
        joined = torch.cat(outputs, dim=-1) if self.joins[index] else _filled(*outputs)
        written: Tensor = writes.summed(joined) if rank is None else writes.add_to(x, joined)
        return written

    def _write_placed(self, index: int, positions: Tensor, x: Tensor, projected: Tensor) -> Tensor:
        """Run what is left of a sublayer whose attention takes the joined product as it is."""
        attention: Any = self.get_submodule(self.architecture.attention)
        _, writes = self.joined(index)
        start, size = self.own_columns[index]
        # As below, bound to a name before attention.
        beside = x[..., start : start + size] if self.ranks[index] is None else None
        joined = attention.attn(positions, x, projected)
        moved: Tensor
        if beside is not None:
            moved = writes.summed(_filled(joined, beside))
        elif x.is_cuda and writes.scaled is not None:
            q, scale = rounded(joined, joined[:, :0], None, False, writes.weight.dtype)
            moved = writes.add_rounded_to(x, q, scale)
        else:
            moved = writes.add_to(x, joined)
        return moved

    def _run(self, branch: Branch, positions: Tensor, y: Tensor) -> Tensor:
        if branch == (self.architecture.attention,):
            result: Tensor = self.get_submodule(branch[0])(positions=positions, hidden_states=y)
            return result
        # Not all of vLLM's activations heed that rows of a product of several matrices lie apart.
        y = y.contiguous()
        for path in branch[1:-1] or branch:
            y = self.get_submodule(path)(y)
        return y


def fuses_here() -> bool:
    """Whether a norm joined with what follows is faster than the two apart: not on a CPU."""
    cpu: bool = current_platform.is_cpu()
    return not cpu


def _filled(joined: Tensor, *others: Tensor) -> Tensor:
    """Write the others, one after the other, into the last columns of a matrix; return it."""
    start = joined.shape[-1] - sum(other.shape[-1] for other in others)
    for other in others:
        joined[..., start : start + other.shape[-1]] = other
        start += other.shape[-1]
    return joined


def _divisor(norm: Any, x: Tensor) -> Tensor:
    """Return what the norm divides a row by, ρ: [tokens, 1] in float32."""
    divisor: Tensor = (x.float().square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    return divisor


def linears_of(sublayer: Sublayer, branch: Branch) -> tuple[list[str], str]:
    """Return the paths of the linears with which a branch reads and writes the stream."""

    def owned(paths: tuple[str, ...]) -> list[str]:
        return [path for path in paths if any(f"{path}.".startswith(f"{own}.") for own in branch)]

    (write,) = owned(sublayer.writes)
    return owned(sublayer.reads), write


def _attention_parts(attention: Any, reads: list[str], write: str) -> tuple[list[Part], Part]:
    ranks, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
    totals = (attention.total_num_heads, *(attention.total_num_kv_heads,) * 2)
    counts = (attention.num_heads, *(attention.num_kv_heads,) * 2)
    # Ranks share key and value heads where there are fewer heads than ranks.
    firsts = [rank * total // ranks for total in totals]
    if len(reads) == 1:
        reads, firsts = reads * 3, [firsts[0], totals[0] + firsts[1], sum(totals[:2]) + firsts[2]]
    size = attention.head_dim
    parts = [
        Part(name, first * size, count * size)
        for name, first, count in zip(reads, firsts, counts, strict=True)
    ]
    return parts, Part(write, rank * counts[0] * size, counts[0] * size)
