"""The sliced model in vLLM: embedding, layers and head of a pipeline stage, and their weights."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.kernels.linear.scaled_mm import cpu as cpu_kernels
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsPP
from vllm.model_executor.models.utils import (
    PPMissingLayer,
    WeightsMapper,
    is_pp_missing_parameter,
    make_layers,
    maybe_prefix,
)
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from sliceserve.server.adapted import PACKS, adapt_joined
from sliceserve.server.cpu import check_products, choose_products
from sliceserve.server.drafts import dispatch_drafts
from sliceserve.server.fused import FusedDecoderLayer
from sliceserve.server.joined import JoinedLinear
from sliceserve.server.layers import Shapes, SlicedDecoderLayer, plain_linear, sliced_norm
from sliceserve.server.progress import reporting
from sliceserve.server.taking import takes_rotations
from sliceserve.slicing.architectures import find_architecture
from sliceserve.slicing.modeling import expected_shapes
from sliceserve.slicing.quantised import Scheme, quantised_scheme, stored_shapes
from sliceserve.slicing.weights import compare_shapes

# Checkpoints carry the base model's names; vLLM's modules have one name for all architectures.
OUTPUTS = {"dense": "o_proj", "out_proj": "o_proj"}
RENAMED = {"model.decoder.": "model."} | {
    f".self_attn.{name}.": f".self_attn.{own}." for name, own in OUTPUTS.items()
}
STORED_WEIGHT = ("weight_packed", "weight_scale", "weight_shape")
STACKED: dict[str, tuple[str, str | int]] = {
    ".q_proj.": (".qkv_proj.", "q"),
    ".k_proj.": (".qkv_proj.", "k"),
    ".v_proj.": (".qkv_proj.", "v"),
    ".gate_proj.": (".gate_up_proj.", 0),
    ".up_proj.": (".gate_up_proj.", 1),
}


@support_torch_compile
class SlicedModel(nn.Module):
    """Embedding, decoder layers and final norm of this pipeline stage."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", shapes: Shapes) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        slicing = config.description
        architecture = find_architecture(slicing.architecture)
        widths, step = slicing.widths, len(architecture.sublayers)
        eps = architecture.epsilon(config)
        self.position_offset = architecture.position_offset
        tied_here = config.tie_word_embeddings and get_pp_group().is_last_rank
        if get_pp_group().is_first_rank or tied_here:
            self.embed_tokens = VocabParallelEmbedding(
                config.vocab_size, widths[0], quant_config=vllm_config.quant_config
            )
        else:
            self.embed_tokens = PPMissingLayer()
        self.embed_positions: nn.Module | None = None
        if architecture.positions:
            rows, width = shapes[f"{architecture.positions}.weight"]
            first = get_pp_group().is_first_rank
            self.embed_positions = nn.Embedding(rows, width) if first else PPMissingLayer()

        def make_layer(prefix: str) -> nn.Module:
            index = int(prefix.rsplit(".", 1)[1])
            start, end = index * step, (index + 1) * step
            around, between = widths[start : end + 1], slicing.ranks[start:end]
            # Other quantised linears, and those with sharded adapters, keep to vLLM's own classes.
            quant_config, lora_config = vllm_config.quant_config, vllm_config.lora_config
            fused = quant_config is None or takes_rotations(
                quant_config, architecture, between, prefix
            )
            fused = fused and not (lora_config and lora_config.fully_sharded_loras)
            kind = FusedDecoderLayer if fused else SlicedDecoderLayer
            return kind(vllm_config, architecture, around, between, shapes, prefix)

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
        if self.embed_positions is not None and intermediate_tensors is None:
            hidden_states = hidden_states + self.embed_positions(positions + self.position_offset)
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            hidden_states = layer(positions, hidden_states)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": hidden_states})
        return self.norm(hidden_states)


class SlicedForCausalLM(nn.Module, SupportsLoRA, SupportsPP):  # type: ignore[misc]  # vLLM is untyped here
    """A sliced decoder language model with its head; vLLM runs it.

    LoRA adapters may adapt every linear of a layer, but neither rotations nor the head.
    """

    hf_to_vllm_mapper = WeightsMapper(orig_to_new_substr=RENAMED)
    packed_modules_mapping = PACKS

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """Make the modules of this rank.

        Raises:
            ValueError: prompt embeddings are enabled (a sliced stream has no dense hidden_size), or
                the weights cannot be multiplied in the dtype, or on this CPU.

        """
        super().__init__()
        model_config = vllm_config.model_config
        if getattr(model_config, "enable_prompt_embeds", False):
            raise ValueError(
                "--enable-prompt-embeds cannot be used with a sliced model: embeddings of the "
                "dense hidden_size do not fit its residual stream"
            )
        config = model_config.hf_config
        scheme = quantised_scheme(config)
        check_dtype(scheme, model_config.dtype)
        if current_platform.is_cpu():
            check_products(scheme, torch.ops._C)
            choose_products(cpu_kernels)
        self.config, self.scheme = config, scheme
        self.shapes, self.stored = expected_shapes(config), stored_shapes(config)
        # A matrix that is one in the checkpoint too has one adapter.
        self.packed_modules_mapping = {
            whole: [whole] if any(f".{whole}." in name for name in self.shapes) else parts
            for whole, parts in self.packed_modules_mapping.items()
        }
        self.model = SlicedModel(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"), shapes=self.shapes
        )
        lora_config = vllm_config.lora_config
        if lora_config is not None:
            if (targets := lora_config.target_modules) is not None:
                own = {OUTPUTS.get(name, name) for name in targets}
                lora_config.target_modules = sorted({*targets} | own)
            packed, renamed = adapt_joined(self.model)
            self.packed_modules_mapping |= packed
            self.hf_to_vllm_mapper = WeightsMapper(orig_to_new_substr=renamed | RENAMED)
        widths = config.description.widths
        self.head_width = widths[-1]
        self.is_draft = is_draft(vllm_config)
        if vllm_config.speculative_config is not None:
            dispatch_drafts(GPUModelRunner)
        self.output_width = config.hidden_size if self.is_draft else self.head_width
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors
        if get_pp_group().is_last_rank:
            self.lm_head = ParallelLMHead(
                config.vocab_size,
                widths[0] if config.tie_word_embeddings else widths[-1],
                bias="lm_head.bias" in self.shapes,
                quant_config=vllm_config.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
            if config.tie_word_embeddings:
                self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
                self.head_map = plain_linear(widths[-1], widths[0])
        else:
            self.lm_head, self.head_map = PPMissingLayer(), PPMissingLayer()
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
        """Run this stage of the model; a draft's output is padded to the dense hidden_size."""
        output = self.model(input_ids, positions, intermediate_tensors, inputs_embeds)
        if isinstance(output, IntermediateTensors) or self.output_width == self.head_width:
            return output
        return nn.functional.pad(output, (0, self.output_width - self.head_width))

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Return the logits [tokens, vocab], gathered over the tensor-parallel ranks."""
        hidden_states = hidden_states[..., : self.head_width]
        if self.config.tie_word_embeddings:
            hidden_states = self.head_map(hidden_states)
        bias = self.lm_head.bias if "lm_head.bias" in self.shapes else None
        logits: Tensor | None = self.logits_processor(self.lm_head, hidden_states, bias)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load this rank's part of a checkpoint, every tensor checked for name and shape.

        Raises:
            ValueError: lists all missing, unexpected and misshapen tensors in one sentence; or a
                running engine is to load quantised weights anew.

        """
        # vLLM then keeps what it is given until this returns: rotations could not be rounded.
        if self.scheme is not None and any(one.is_meta for one in self.parameters()):
            raise ValueError(
                f"the weights of a running engine are in {self.scheme} and cannot be loaded anew: "
                "start another one"
            )
        found: Shapes = {}
        if not self.is_draft:  # the model that it drafts for reports
            weights = reporting(weights, self.stored)
        loaded = set(self._load(weights, found))
        problems = compare_shapes(found, self.stored)
        if problems:
            raise ValueError(
                f"the checkpoint does not hold the tensors its config implies: {problems}"
            )
        for module in self.modules():
            if isinstance(module, FusedDecoderLayer):
                module.finish_loading()
        return loaded

    def _load(self, weights: Iterable[tuple[str, Tensor]], found: Shapes) -> Iterator[str]:
        parameters: dict[str, Any] = dict(self.named_parameters())
        joined = self._joined_parts()
        for name, tensor in weights:
            found[name] = tuple(tensor.shape)
            target = rename(name)
            if found[name] != self.stored.get(name) or is_pp_missing_parameter(target, self):
                continue
            if target in joined:
                path, module, relative = joined[target]
                loaded = f"{path}.{module.load(relative, tensor)}"
                yield loaded
                # What takes adapters is wrapped; where it is loaded anew vLLM 0.32 leaves that out.
                yield loaded.replace(".base_layer.", ".")
                continue
            shard: tuple[str | int, ...] = ()
            for part, (whole, index) in STACKED.items():
                if part in target:
                    target, shard = target.replace(part, whole), (index,)
            parameter = parameters[target]
            loader = getattr(parameter, "weight_loader", default_weight_loader)
            loader(parameter, tensor, *shard)
            yield target

    def _joined_parts(self) -> dict[str, tuple[str, JoinedLinear, str]]:
        """Map checkpoint names to the joined linear that holds them and to the name it knows."""
        found = {}
        for path, module in self.named_modules():
            if isinstance(module, JoinedLinear):
                layer = path.rsplit(".joined_", 1)[0]
                for part in module.parts:
                    for kind in ("bias", "weight", *STORED_WEIGHT):
                        name = f"{part.name}.{kind}"
                        found[rename(f"{layer}.{name}")] = (path, module, name)
        return found


def check_dtype(scheme: Scheme | None, dtype: torch.dtype) -> None:
    """Check that weights of four bits run in 16, which vLLM's kernels for them would say late.

    Raises:
        ValueError: they do not.

    """
    if scheme and scheme.bits < 8 and dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"--dtype {str(dtype).removeprefix('torch.')} cannot be used with {scheme}: vLLM "
            "multiplies such weights in bfloat16 and float16 only"
        )


def is_draft(vllm_config: VllmConfig) -> bool:
    """Whether the model drafts tokens for another one.

    vLLM copies what a draft model returns into a buffer as wide as its hidden_size.
    """
    speculative: Any = vllm_config.speculative_config
    if speculative is None or not speculative.uses_draft_model():
        return False
    return speculative.draft_model_config is vllm_config.model_config


def rename(name: str) -> str:
    """Return vLLM's name of a tensor of the checkpoint."""
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return name
