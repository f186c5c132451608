"""Decoder architectures as data: where the residual stream is normed, read and written.

A decoder layer is a list of sublayers, x ← x + Σ branch(norm(x)). One description serves the
slicer, the Transformers model and the vLLM plugin; a further architecture is one more value here.
"""

from dataclasses import dataclass

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
        embeddings: the tables summed into the first residual (weight [vocab, hidden_size]).
        layers: the list of decoder layers.
        sublayers: the residual branch points of one layer, in order.
        attention: the module of a layer that takes positions, mask and cache.
        final_norm: the norm before the head.
        head: the linear that gives the logits (weight [vocab, hidden_size]).
        norm_eps: the config field with the epsilon of every norm.

    """

    causal_lm: str
    embeddings: tuple[str, ...]
    layers: str
    sublayers: tuple[Sublayer, ...]
    attention: str
    final_norm: str
    head: str
    norm_eps: str

    def places(self, num_hidden_layers: int) -> int:
        """Count the places of the residual stream: one before every sublayer and one at the end."""
        return num_hidden_layers * len(self.sublayers) + 1


GATED_PRE_NORM = (
    Sublayer(
        norm="input_layernorm",
        reads=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        writes=("self_attn.o_proj",),
        branches=(("self_attn",),),
    ),
    Sublayer(
        norm="post_attention_layernorm",
        reads=("mlp.gate_proj", "mlp.up_proj"),
        writes=("mlp.down_proj",),
        branches=(("mlp",),),
    ),
)


def _gated_pre_norm(causal_lm: str) -> Architecture:
    return Architecture(
        causal_lm=causal_lm,
        embeddings=("model.embed_tokens",),
        layers="model.layers",
        sublayers=GATED_PRE_NORM,
        attention="self_attn",
        final_norm="model.norm",
        head="lm_head",
        norm_eps="rms_norm_eps",
    )


ARCHITECTURES = {
    description.causal_lm: description
    for description in map(_gated_pre_norm, ("LlamaForCausalLM", "MistralForCausalLM"))
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
