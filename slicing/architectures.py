"""Decoder architectures as data: where the residual stream is normed, read and written.

A decoder layer is a list of sublayers, x ← x + Σ branch(norm(x)). One description serves the
slicer, the Transformers model and the vLLM plugin; a further architecture is one more value here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sliceserve.slicing.errors import UserError


@dataclass(frozen=True, slots=True)
class Sublayer:
    """One residual branch point of a decoder layer; every path is relative to the layer.

    Attributes:
        norm: the norm between the residual stream and the branches.
        reads: linears fed by the norm (weight [out, hidden_size]); rotated on the input side.
        writes: linears added to the stream (weight [hidden_size, in]); rotated on the output side.
        branches: what runs on the normed stream, summed; each branch is a chain of modules.

    """

    norm: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    branches: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Architecture:
    """A decoder-only language model, described by the paths of its modules.

    Attributes:
        causal_lm: the class name in `config.architectures`, in Transformers and in vLLM.
        sublayers: the residual branch points of one layer, in order.
        norm_eps: the epsilon of every norm, or the config field that holds it.
        tokens: the token embedding (weight [vocab, hidden_size]).
        positions: the table of learned positions that is added to it, if there is one.
        position_offset: rows of that table before position 0.
        layers: the list of decoder layers.
        attention: the module of a layer that takes positions, mask and cache.
        final_norm: the norm before the head.
        head: the linear that gives the logits (weight [vocab, hidden_size]).
        derives_head_dim: whether engines take head_dim from hidden_size, whatever the config says.
        requires: config fields that must have these values; others change what a layer computes.

    """

    causal_lm: str
    sublayers: tuple[Sublayer, ...]
    norm_eps: str | float
    tokens: str = "model.embed_tokens"
    positions: str | None = None
    position_offset: int = 0
    layers: str = "model.layers"
    attention: str = "self_attn"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    derives_head_dim: bool = False
    requires: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tables(self) -> tuple[str, ...]:
        """The embeddings that are summed into the first residual."""
        return (self.tokens, self.positions) if self.positions else (self.tokens,)

    def places(self, num_hidden_layers: int) -> int:
        """Count the places of the residual stream: one before every sublayer and one at the end."""
        return num_hidden_layers * len(self.sublayers) + 1

    def epsilon(self, config: Any) -> float:
        """Return the epsilon of the norms of a model with this config."""
        if isinstance(self.norm_eps, str):
            return float(getattr(config, self.norm_eps))
        return self.norm_eps


def _gated(
    reads_of_attention: tuple[str, ...], reads_of_mlp: tuple[str, ...]
) -> tuple[Sublayer, ...]:
    return (
        Sublayer(
            norm="input_layernorm",
            reads=reads_of_attention,
            writes=("self_attn.o_proj",),
            branches=(("self_attn",),),
        ),
        Sublayer(
            norm="post_attention_layernorm",
            reads=reads_of_mlp,
            writes=("mlp.down_proj",),
            branches=(("mlp",),),
        ),
    )


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATED = _gated(QKV, ("mlp.gate_proj", "mlp.up_proj"))

LLAMA = Architecture("LlamaForCausalLM", GATED, norm_eps="rms_norm_eps")
MISTRAL = Architecture("MistralForCausalLM", GATED, norm_eps="rms_norm_eps")
QWEN2 = Architecture("Qwen2ForCausalLM", GATED, norm_eps="rms_norm_eps", derives_head_dim=True)
QWEN3 = Architecture("Qwen3ForCausalLM", GATED, norm_eps="rms_norm_eps")
PHI3 = Architecture(
    "Phi3ForCausalLM",
    _gated(("self_attn.qkv_proj",), ("mlp.gate_up_proj",)),
    norm_eps="rms_norm_eps",
    derives_head_dim=True,
)
PHI = Architecture(
    "PhiForCausalLM",
    (
        Sublayer(
            norm="input_layernorm",
            reads=(*QKV, "mlp.fc1"),
            writes=("self_attn.dense", "mlp.fc2"),
            branches=(("self_attn",), ("mlp.fc1", "mlp.activation_fn", "mlp.fc2")),
        ),
    ),
    norm_eps="layer_norm_eps",
    final_norm="model.final_layernorm",
    requires={"qk_layernorm": False},
)
OPT = Architecture(
    "OPTForCausalLM",
    (
        Sublayer(
            norm="self_attn_layer_norm",
            reads=QKV,
            writes=("self_attn.out_proj",),
            branches=(("self_attn",),),
        ),
        Sublayer(
            norm="final_layer_norm",
            reads=("fc1",),
            writes=("fc2",),
            branches=(("fc1", "activation_fn", "fc2"),),
        ),
    ),
    norm_eps=1e-5,
    tokens="model.decoder.embed_tokens",
    positions="model.decoder.embed_positions",
    position_offset=2,
    layers="model.decoder.layers",
    final_norm="model.decoder.final_layer_norm",
    requires={"do_layer_norm_before": True, "_remove_final_layer_norm": False},
)

ARCHITECTURES = {
    description.causal_lm: description
    for description in (LLAMA, MISTRAL, QWEN2, QWEN3, PHI3, PHI, OPT)
}


def find_architecture(causal_lm: str) -> Architecture:
    """Return the description of an architecture by its class name.

    Raises:
        UserError: the architecture has no description; nothing is ever guessed.

    """
    if causal_lm not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"architecture {causal_lm!r} is not supported; supported are {known}")
    return ARCHITECTURES[causal_lm]


def check_variant(where: str, config: Any, architecture: Architecture) -> None:
    """Check that a model is the variant of its architecture that the description fits.

    Raises:
        UserError: a config field says that its layers compute something else.

    """
    for name, value in architecture.requires.items():
        found = getattr(config, name, value)
        if found != value:
            raise UserError(
                f"{where}: {architecture.causal_lm} with {name}={found!r} where only {value!r} is "
                "supported"
            )
