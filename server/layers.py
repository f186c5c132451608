"""Decoder layers whose quantised linears take no rotations in, or with sharded LoRA.

Their linears are vLLM's own, and rotations stand beside them.

Every sublayer moves the stream by x ← x·S + Σ branch(norm(x)); widths may change at each.
Under tensor parallelism rotations are replicated: they need no communication of their own.
Other layers are those of `sliceserve.server.fused`.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.activation import get_act_fn
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.models.llama import LlamaAttention, LlamaMLP
from vllm.model_executor.models.qwen3 import Qwen3Attention

from sliceserve.slicing.architectures import Architecture, Sublayer

Shapes = dict[str, tuple[int, ...]]


class _NoRotaryEmbedding(nn.Module):
    def forward(self, positions: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        return q, k


class UnrotatedAttention(LlamaAttention):  # type: ignore[misc]
    """Attention of models that learn their positions and add them to the embedding."""

    def _init_rotary_emb(self, config: Any, quant_config: Any) -> None:  # noqa: ARG002
        self.rotary_emb = _NoRotaryEmbedding()


class LayerBuilder:
    """Makes the branches of one decoder layer out of vLLM's own modules.

    Linears that stand alone take their sizes from the tensors that the checkpoint must hold; so do
    the biases of attention, of which each architecture has others.
    """

    def __init__(
        self, vllm_config: VllmConfig, architecture: Architecture, shapes: Shapes, prefix: str
    ) -> None:
        self.config = vllm_config.model_config.hf_config
        self.cache_config = vllm_config.cache_config
        self.quant_config = vllm_config.quant_config
        self.dtype = vllm_config.model_config.dtype
        self.architecture = architecture
        self.prefix = prefix
        index = prefix.rsplit(".", 1)[1]
        self.shapes = {
            name.removeprefix(stem): shape
            for stem in [f"{architecture.layers}.{index}."]
            for name, shape in shapes.items()
            if name.startswith(stem)
        }

    def build(self, path: str, sublayer: Sublayer) -> nn.Module:
        """Make the module at `path` of the layer, which is a link of a branch of `sublayer`."""
        if path == self.architecture.attention:
            attention: Any = self.attention(sublayer)
            (write,) = (name for name in sublayer.writes if name.startswith(f"{path}."))
            replace(attention, "o_proj", self.linear(RowParallelLinear, write))
            return attention  # type: ignore[no-any-return]
        if path in sublayer.reads:
            return self.linear(ColumnParallelLinear, path)
        if path in sublayer.writes:
            return self.linear(RowParallelLinear, path)
        if path == "mlp":
            return self.gated_mlp(sublayer)
        return self.activation()

    def activation(self) -> nn.Module:
        """Make the activation of an MLP without a gate."""
        names = ("hidden_act", "activation_function")
        (name,) = (getattr(self.config, name) for name in names if hasattr(self.config, name))
        activation: nn.Module = get_act_fn(name)
        return activation

    def linear(self, kind: type, path: str) -> nn.Module:
        """Make a linear that reads or writes the stream."""
        out_width, in_width = self.shapes[f"{path}.weight"]
        linear: nn.Module = kind(
            in_width,
            out_width,
            bias=self.has_bias(path),
            quant_config=self.quant_config,
            prefix=f"{self.prefix}.{path}",
        )
        return linear

    def has_bias(self, path: str) -> bool:
        """Whether the checkpoint has a bias for a linear of the layer."""
        return f"{path}.bias" in self.shapes

    def attention(self, sublayer: Sublayer) -> nn.Module:
        """Make attention; its `o_proj` is of the input's width, and to be replaced."""
        config, path = self.config, self.architecture.attention
        reads = [name for name in sublayer.reads if name.startswith(f"{path}.")]
        heads = config.num_attention_heads
        common: dict[str, Any] = {
            "hidden_size": self.shapes[f"{reads[0]}.weight"][1],
            "num_heads": heads,
            "num_kv_heads": getattr(config, "num_key_value_heads", None) or heads,
            "cache_config": self.cache_config,
            "quant_config": self.quant_config,
            "prefix": f"{self.prefix}.{path}",
        }
        attention: nn.Module
        if self.has_norm(f"{path}.q_norm"):
            attention = Qwen3Attention(
                rope_parameters=config.rope_parameters,
                max_position=config.max_position_embeddings,
                head_dim=config.head_dim,
                rms_norm_eps=self.architecture.epsilon(config),
                qkv_bias=self.has_bias(reads[0]),
                **common,
            )
        else:
            kind = UnrotatedAttention if self.architecture.positions else LlamaAttention
            attention = kind(
                config=config,
                max_position_embeddings=config.max_position_embeddings,
                bias=self.has_bias(reads[0]),
                **common,
            )
        return attention

    def has_norm(self, path: str) -> bool:
        """Whether the layer has a norm of its own beside those of the stream."""
        return f"{path}.weight" in self.shapes

    def gated_mlp(self, sublayer: Sublayer) -> nn.Module:
        """Make a gated MLP; its output is as wide as the next place of the stream."""
        (write,) = (name for name in sublayer.writes if name.startswith("mlp."))
        mlp: nn.Module = LlamaMLP(
            hidden_size=self.shapes[f"{sublayer.reads[0]}.weight"][1],
            intermediate_size=self.config.intermediate_size,
            hidden_act=self.config.hidden_act,
            quant_config=self.quant_config,
            bias=self.has_bias(sublayer.reads[0]),
            prefix=f"{self.prefix}.mlp",
        )
        replace(mlp, "down_proj", self.linear(RowParallelLinear, write))
        return mlp


class SlicedDecoderLayer(nn.Module):
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
        """Make the layer.

        Args:
            vllm_config: of the engine.
            architecture: the description of the base model.
            widths: of the stream, one entry per sublayer and one more.
            ranks: of the rotations, one entry per sublayer.
            shapes: of all tensors of the checkpoint.
            prefix: the layer's path; its last part is its index.

        """
        super().__init__()
        config = vllm_config.model_config.hf_config
        eps = architecture.epsilon(config)
        builder = LayerBuilder(vllm_config, architecture, shapes, prefix)
        self.architecture = architecture
        rotations: list[nn.Module] = []
        for sublayer, width, next_width, rank in zip(
            architecture.sublayers, widths[:-1], widths[1:], ranks, strict=True
        ):
            self.add_module(sublayer.norm, sliced_norm(width, config.hidden_size, eps))
            for path in (path for branch in sublayer.branches for path in branch):
                add_module(self, path, builder.build(path, sublayer))
            rotations.append(make_rotation(width, next_width, rank))
        self.residual_rotation = nn.ModuleList(rotations)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """Run the layer: [tokens, widths[0]] to [tokens, widths[-1]]."""
        sublayers = self.architecture.sublayers
        for sublayer, rotation in zip(sublayers, self.residual_rotation, strict=True):
            normed = self.get_submodule(sublayer.norm)(hidden_states)
            hidden_states = rotation(hidden_states)
            for branch in sublayer.branches:
                hidden_states = hidden_states + self._run(branch, positions, normed)
        return hidden_states

    def _run(self, branch: tuple[str, ...], positions: Tensor, x: Tensor) -> Tensor:
        for path in branch:
            module = self.get_submodule(path)
            if path == self.architecture.attention:
                x = module(positions=positions, hidden_states=x)
            else:
                result = module(x)
                # vLLM's linears return their bias as well.
                x = result[0] if isinstance(result, tuple) else result
        return x


def replace(module: nn.Module, name: str, new: Callable[..., Any]) -> None:
    """Put a module, or a function, in the place of a module of vLLM's, whose weights are let go of.

    They refer to it, and it to them: Python would keep them until it looks for such circles. Where
    vLLM looks for linears to adapt it does not find a function.
    """
    for parameter in module.get_submodule(name).parameters():
        parameter.data = parameter.data.new_empty(0)
    delattr(module, name)
    setattr(module, name, new)


def add_module(layer: nn.Module, path: str, module: nn.Module) -> None:
    """Add a module to a layer at a path of one or two names."""
    parent, _, name = path.rpartition(".")
    if parent and parent not in dict(layer.named_children()):
        layer.add_module(parent, nn.Module())
    layer.get_submodule(parent).add_module(name, module)


class LowRankRotation(nn.Module):
    """A rotation that turns few directions, x·S = x + (x·A)·B."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down = plain_linear(width, rank)
        self.up = plain_linear(rank, width)

    def forward(self, x: Tensor) -> Tensor:
        """Rotate the stream: [tokens, width] to [tokens, width]."""
        rotated: Tensor = x + self.up(self.down(x))
        return rotated


def make_rotation(width: int, next_width: int, rank: int | None) -> nn.Module:
    """Make the rotation between two places: a matrix, a low-rank update, or (rank 0) nothing."""
    if rank is None:
        return plain_linear(width, next_width)
    return LowRankRotation(width, rank) if rank else nn.Identity()


def plain_linear(in_width: int, out_width: int) -> nn.Linear:
    """Make a linear [out_width, in_width] without bias, the same on all ranks.

    Not one of vLLM's: those are quantised, and LoRA wraps them, which before the head it must not:
    there are fewer rows there than tokens in the batch.
    """
    return nn.Linear(in_width, out_width, bias=False)


def sliced_norm(width: int, hidden_size: int, eps: float) -> RMSNorm:
    """Make the norm of a sliced stream: no weights, epsilon for the original hidden_size."""
    return RMSNorm(width, eps=eps * hidden_size / width, has_weight=False)
