"""The sliced model in vLLM: its own residual stream around vLLM's attention and MLP.

Every layer moves the stream by x ← x·S + branch(norm(x)); widths may change at each sublayer.
Under tensor parallelism rotations are replicated: they need no communication of their own.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import SupportsPP
from vllm.model_executor.models.llama import LlamaAttention, LlamaMLP
from vllm.model_executor.models.utils import (
    PPMissingLayer,
    is_pp_missing_parameter,
    make_layers,
    maybe_prefix,
)
from vllm.sequence import IntermediateTensors

from sliceserve.slicing.architectures import Architecture, find_architecture
from sliceserve.slicing.config import SlicedConfig
from sliceserve.slicing.modeling import expected_shapes
from sliceserve.slicing.weights import compare_shapes

STACKED: dict[str, tuple[str, str | int]] = {
    ".q_proj.": (".qkv_proj.", "q"),
    ".k_proj.": (".qkv_proj.", "k"),
    ".v_proj.": (".qkv_proj.", "v"),
    ".gate_proj.": (".gate_up_proj.", 0),
    ".up_proj.": (".gate_up_proj.", 1),
}


class ResidualRotation(nn.Module):
    """x ← x·S, with S stored as a linear's weight [out_width, in_width].

    A plain parameter, not a vLLM linear: those are wrapped for LoRA and quantised.
    """

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_width, in_width), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Rotate [tokens, in_width] to [tokens, out_width]."""
        return nn.functional.linear(x, self.weight)


def make_attention(
    vllm_config: VllmConfig, config: SlicedConfig, width: int, prefix: str
) -> nn.Module:
    """Make vLLM's attention on a stream of `width` columns."""
    bias = bool(getattr(config, "attention_bias", False))
    attention: nn.Module = LlamaAttention(
        config=config,
        hidden_size=width,
        num_heads=config.num_attention_heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        max_position_embeddings=config.max_position_embeddings,
        quant_config=vllm_config.quant_config,
        bias=bias,
        bias_o_proj=bias,
        cache_config=vllm_config.cache_config,
        prefix=prefix,
    )
    return attention


def make_mlp(vllm_config: VllmConfig, config: SlicedConfig, width: int, prefix: str) -> nn.Module:
    """Make vLLM's gated MLP on a stream of `width` columns."""
    mlp: nn.Module = LlamaMLP(
        hidden_size=width,
        intermediate_size=config.intermediate_size,
        hidden_act=config.hidden_act,
        quant_config=vllm_config.quant_config,
        bias=bool(getattr(config, "mlp_bias", False)),
        prefix=prefix,
    )
    return mlp


BRANCHES = {
    "LlamaForCausalLM": {"self_attn": make_attention, "mlp": make_mlp},
    "MistralForCausalLM": {"self_attn": make_attention, "mlp": make_mlp},
}


class SlicedDecoderLayer(nn.Module):
    """One decoder layer, described by its architecture, on a stream of changing width."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        architecture: Architecture,
        widths: list[int],
        prefix: str,
    ) -> None:
        """Make the layer; `widths` has one entry per sublayer and one more."""
        super().__init__()
        config = vllm_config.model_config.hf_config
        eps = getattr(config, architecture.norm_eps)
        makers = BRANCHES[architecture.causal_lm]
        self.architecture = architecture
        rotations = []
        for sublayer, width, next_width in zip(
            architecture.sublayers, widths[:-1], widths[1:], strict=True
        ):
            self.add_module(sublayer.norm, sliced_norm(width, config.hidden_size, eps))
            for (name,) in sublayer.branches:
                branch = makers[name](vllm_config, config, width, f"{prefix}.{name}")
                self.add_module(name, branch)
            for path in sublayer.writes:
                self._widen_output(path, next_width, vllm_config, prefix)
            rotations.append(ResidualRotation(width, next_width))
        self.residual_rotation = nn.ModuleList(rotations)

    def _widen_output(self, path: str, width: int, vllm_config: VllmConfig, prefix: str) -> None:
        """Replace a writer of the wrong width: vLLM's blocks write as many columns as they read."""
        old: Any = self.get_submodule(path)
        if old.output_size == width:
            return
        new = RowParallelLinear(
            input_size=old.input_size,
            output_size=width,
            bias=old.bias is not None,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.{path}",
        )
        self.set_submodule(path, new)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """Run the layer: [tokens, widths[0]] to [tokens, widths[-1]]."""
        sublayers = self.architecture.sublayers
        for sublayer, rotation in zip(sublayers, self.residual_rotation, strict=True):
            normed = self.get_submodule(sublayer.norm)(hidden_states)
            hidden_states = rotation(hidden_states)
            for (name,) in sublayer.branches:
                branch = self.get_submodule(name)
                if name == self.architecture.attention:
                    update = branch(positions=positions, hidden_states=normed)
                else:
                    update = branch(normed)
                hidden_states = hidden_states + update
        return hidden_states


def sliced_norm(width: int, hidden_size: int, eps: float) -> RMSNorm:
    """Make the norm of a sliced stream: no weights, epsilon for the original hidden_size."""
    return RMSNorm(width, eps=eps * hidden_size / width, has_weight=False)


@support_torch_compile
class SlicedModel(nn.Module):
    """Embedding, decoder layers and final norm of this pipeline stage."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        slicing = config.description
        architecture = find_architecture(slicing.architecture)
        widths, step = slicing.widths, len(architecture.sublayers)
        eps = getattr(config, architecture.norm_eps)
        if get_pp_group().is_first_rank:
            self.embed_tokens = VocabParallelEmbedding(
                config.vocab_size, widths[0], quant_config=vllm_config.quant_config
            )
        else:
            self.embed_tokens = PPMissingLayer()

        def make_layer(prefix: str) -> nn.Module:
            index = int(prefix.rsplit(".", 1)[1])
            around = widths[index * step : (index + 1) * step + 1]
            return SlicedDecoderLayer(vllm_config, architecture, around, prefix)

        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers, make_layer, prefix=maybe_prefix(prefix, "layers")
        )
        self.input_width = widths[self.start_layer * step]
        if get_pp_group().is_last_rank:
            self.norm = sliced_norm(widths[-1], config.hidden_size, eps)
        else:
            self.norm = PPMissingLayer()

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Embed token ids [tokens] to [tokens, widths[0]]."""
        embedded: Tensor = self.embed_tokens(input_ids)
        return embedded

    def make_empty_intermediate_tensors(
        self, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> IntermediateTensors:
        """Make the buffer that this stage receives: the stream at the width of its first layer."""
        shape = (batch_size, self.input_width)
        return IntermediateTensors(
            {"hidden_states": torch.zeros(shape, dtype=dtype, device=device)}
        )

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        """Run this stage: tokens to the normed stream, or to what the next stage receives."""
        if intermediate_tensors is not None:
            hidden_states = intermediate_tensors["hidden_states"]
        elif inputs_embeds is not None:
            hidden_states = inputs_embeds
        else:
            hidden_states = self.embed_tokens(input_ids)
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            hidden_states = layer(positions, hidden_states)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": hidden_states})
        return self.norm(hidden_states)


class SlicedForCausalLM(nn.Module, SupportsPP):  # type: ignore[misc]  # vLLM is untyped here
    """A sliced decoder language model with its head; vLLM runs it."""

    packed_modules_mapping = {  # noqa: RUF012 - vLLM reads a plain dict
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """Make the modules of this rank.

        Raises:
            ValueError: prompt embeddings are enabled; a sliced stream has no dense hidden_size.

        """
        super().__init__()
        model_config = vllm_config.model_config
        if getattr(model_config, "enable_prompt_embeds", False):
            raise ValueError(
                "--enable-prompt-embeds cannot be used with a sliced model: embeddings of the "
                "dense hidden_size do not fit its residual stream"
            )
        config = model_config.hf_config
        self.config = config
        self.model = SlicedModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors
        if get_pp_group().is_last_rank:
            self.lm_head = ParallelLMHead(
                config.vocab_size,
                config.hidden_size,
                quant_config=vllm_config.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
        else:
            self.lm_head = PPMissingLayer()
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Embed token ids [tokens] to [tokens, widths[0]]."""
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        """Run this stage of the model."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Return the logits [tokens, vocab], gathered over the tensor-parallel ranks."""
        logits: Tensor | None = self.logits_processor(self.lm_head, hidden_states)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load this rank's part of a checkpoint, every tensor checked for name and shape.

        Raises:
            ValueError: lists all missing, unexpected and misshapen tensors in one sentence.

        """
        expected = expected_shapes(self.config)
        found: dict[str, tuple[int, ...]] = {}
        loaded = {name for name in self._load(weights, expected, found) if name}
        problems = compare_shapes(found, expected)
        if problems:
            raise ValueError(
                f"the checkpoint does not hold the tensors its config implies: {problems}"
            )
        return loaded

    def _load(
        self,
        weights: Iterable[tuple[str, Tensor]],
        expected: dict[str, tuple[int, ...]],
        found: dict[str, tuple[int, ...]],
    ) -> Iterator[str]:
        parameters: dict[str, Any] = dict(self.named_parameters())
        for name, tensor in weights:
            found[name] = tuple(tensor.shape)
            if found[name] != expected.get(name) or is_pp_missing_parameter(name, self):
                continue
            target: str = name
            shard: tuple[str | int, ...] = ()
            for part, (whole, index) in STACKED.items():
                if part in name:
                    target, shard = name.replace(part, whole), (index,)
            parameter = parameters[target]
            loader = getattr(parameter, "weight_loader", default_weight_loader)
            loader(parameter, tensor, *shard)
            yield target
