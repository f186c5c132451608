"""The sliced model in Transformers: the reference that vLLM is compared with.

Importing this module makes `AutoModelForCausalLM.from_pretrained(DIR)` read sliced checkpoints.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from sliceserve.slicing.architectures import Architecture, Sublayer, find_architecture
from sliceserve.slicing.config import SlicedConfig, register_config

ROTATION = "residual_rotation"  # of a layer: one rotation a sublayer
HEAD_MAP = "head_map"  # before a head that is the embedding's table


class SlicedNorm(nn.Module):
    """RMSNorm over the d kept columns of a D-wide stream, y = x·rsqrt(mean(x²) + eps·D/d).

    It divides by √(D/d) less than the dense norm does; that constant is folded into the linears
    that read y, which keeps the norm exact and without weights (design: norm over the original D).
    """

    def __init__(self, width: int, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps * hidden_size / width

    def forward(self, x: Tensor) -> Tensor:
        """Norm the last axis in float32 or better: [..., width] to [..., width]."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def has_shift(norm: Any) -> bool:
    """Whether a norm adds a bias; folded into what it feeds, which then needs a bias too."""
    return getattr(norm, "bias", None) is not None


def resize_linear(
    model: nn.Module,
    path: str,
    in_features: int | None = None,
    out_features: int | None = None,
    bias: bool = False,
) -> None:
    """Replace a linear of `model` by one of another size; `bias` gives one that had none."""
    old: Any = model.get_submodule(path)
    new = nn.Linear(
        in_features or old.in_features,
        out_features or old.out_features,
        bias=bias or old.bias is not None,
        device=old.weight.device,
        dtype=old.weight.dtype,
    )
    model.set_submodule(path, new)


def branch_outputs(
    layer: nn.Module, architecture: Architecture, sublayer: Sublayer, x: Tensor, context: Any
) -> list[Tensor]:
    """Return branch(norm(x)) for each branch of a sublayer of a dense or sliced layer."""
    normed = layer.get_submodule(sublayer.norm)(x)
    outputs = []
    for chain in sublayer.branches:
        y = normed
        for path in chain:
            module = layer.get_submodule(path)
            y = module(y, **context)[0] if path == architecture.attention else module(y)
        outputs.append(y)
    return outputs


class LowRankRotation(nn.Module):
    """A rotation that turns few directions, x·S = x + (x·A)·B; Aᵀ and Bᵀ are its weights."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Rotate the last axis: [..., width] to [..., width]."""
        rotated: Tensor = x + self.up(self.down(x))
        return rotated


def make_rotation(width: int, next_width: int, rank: int | None) -> nn.Module:
    """Make the rotation between two places: a matrix, a low-rank update, or (rank 0) nothing."""
    if rank is None:
        return nn.Linear(width, next_width, bias=False)
    return LowRankRotation(width, rank) if rank else nn.Identity()


class SlicedLayer(nn.Module):
    """A decoder layer on a stream that changes width: x ← x·S + Σ branch(norm(x)).

    The branches are the dense layer's own modules, with linears of reduced width.
    """

    def __init__(
        self,
        dense: nn.Module,
        architecture: Architecture,
        widths: list[int],
        ranks: list[int | None],
        hidden_size: int,
        eps: float,
    ) -> None:
        """Take over the modules of `dense`.

        Args:
            dense: a decoder layer.
            architecture: its description.
            widths: of the stream, one entry per sublayer and one more.
            ranks: of the rotations, one entry per sublayer.
            hidden_size: of the dense model.
            eps: the epsilon of the dense norms.

        """
        super().__init__()
        self.architecture = architecture
        for name, child in dense.named_children():
            self.add_module(name, child)
        rotations = []
        for sublayer, width, next_width, rank in zip(
            architecture.sublayers, widths[:-1], widths[1:], ranks, strict=True
        ):
            shifted = has_shift(self.get_submodule(sublayer.norm))
            self.set_submodule(sublayer.norm, SlicedNorm(width, hidden_size, eps))
            for path in sublayer.reads:
                resize_linear(self, path, in_features=width, bias=shifted)
            for path in sublayer.writes:
                resize_linear(self, path, out_features=next_width)
            rotations.append(make_rotation(width, next_width, rank))
        self.residual_rotation = nn.ModuleList(rotations)

    def forward(self, hidden_states: Tensor, **context: Any) -> Tensor:
        """Run the layer: [batch, positions, widths[0]] to [batch, positions, widths[-1]]."""
        sublayers = self.architecture.sublayers
        for sublayer, rotation in zip(sublayers, self.residual_rotation, strict=True):
            update = self.branches(sublayer, hidden_states, context)
            hidden_states = rotation(hidden_states) + update
        return hidden_states

    def branches(self, sublayer: Sublayer, hidden_states: Tensor, context: Any) -> Tensor:
        """Return Σ branch(norm(x)): what the sublayer adds to the stream."""
        outputs = branch_outputs(self, self.architecture, sublayer, hidden_states, context)
        return sum(outputs[1:], start=outputs[0])


class SlicedForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A sliced decoder language model; weights carry the names of the dense model."""

    config_class = SlicedConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = False
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_flash_attn = True
    _no_split_modules = ("SlicedLayer",)

    def __init__(self, config: SlicedConfig) -> None:
        super().__init__(config)
        slicing = config.description
        architecture = find_architecture(slicing.architecture)
        base_config = config.base()
        base = AutoModelForCausalLM.from_config(base_config, dtype=torch.get_default_dtype())
        resize_model(
            base,
            architecture,
            slicing.widths,
            slicing.ranks,
            config.hidden_size,
            architecture.epsilon(config),
        )
        for name, child in base.named_children():
            self.add_module(name, child)
        self.head_path = architecture.head
        if config.tie_word_embeddings:
            self.add_module(HEAD_MAP, nn.Linear(slicing.widths[-1], slicing.widths[0], bias=False))
            table: Any = self.get_submodule(architecture.tokens)
            self.get_output_embeddings().weight = table.weight
            self._tied_weights_keys = {
                f"{architecture.head}.weight": f"{architecture.tokens}.weight"
            }
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        path = find_architecture(self.config.description.architecture).tokens
        embedding: nn.Module = self.get_submodule(path)
        return embedding

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        head: nn.Module = self.get_submodule(self.head_path)
        return head

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return the logits [batch, positions, vocab] and, with labels, the mean loss in nats."""
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        stream = outputs.last_hidden_state[:, kept]
        if self.config.tie_word_embeddings:
            stream = self.get_submodule(HEAD_MAP)(stream)
        logits = self.get_submodule(self.head_path)(stream)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def resize_model(
    model: nn.Module,
    architecture: Architecture,
    widths: list[int],
    ranks: list[int | None],
    hidden_size: int,
    eps: float,
) -> None:
    """Give a dense model of `architecture` the shapes of a sliced one, in place; no weights kept.

    Args:
        model: a dense model, on any device (meta too).
        architecture: its description.
        widths: columns at each place of the residual stream.
        ranks: of the rotations between them.
        hidden_size: of the dense model.
        eps: the epsilon of the dense norms.

    """
    step = len(architecture.sublayers)
    for path in architecture.tables:
        # In place: a table of positions has a class of its own.
        table: Any = model.get_submodule(path)
        table.embedding_dim = widths[0]
        table.weight = nn.Parameter(table.weight.new_empty(table.num_embeddings, widths[0]))
    layers: Any = model.get_submodule(architecture.layers)
    for index, layer in enumerate(layers):
        start, end = index * step, (index + 1) * step
        layers[index] = SlicedLayer(
            layer, architecture, widths[start : end + 1], ranks[start:end], hidden_size, eps
        )
    shifted = has_shift(model.get_submodule(architecture.final_norm))
    model.set_submodule(architecture.final_norm, SlicedNorm(widths[-1], hidden_size, eps))
    resize_linear(model, architecture.head, in_features=widths[-1], bias=shifted)


def expected_shapes(config: SlicedConfig) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor that a checkpoint with this config must hold."""
    with torch.device("meta"):
        model = SlicedForCausalLM(config)
    return {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}


register_config()
AutoModelForCausalLM.register(SlicedConfig, SlicedForCausalLM, exist_ok=True)
